"""Runs whose folder is on a bucket."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatpose_jax.models.chatpose import init_params
from chatpose_jax.orbax_s3 import COMMIT
from chatpose_jax.storage import tree, write_bytes
from chatpose_jax.train.hosts import Fault
from chatpose_jax.train.log import Log, read_metrics
from chatpose_jax.train.trainer import Interrupted, train
from tests.train.test_trainer import CONFIG, SETTINGS, Batches

SETTINGS = dataclasses.replace(SETTINGS, keep=1)


@pytest.fixture(scope="module")
def params():
    start = jax.device_get(init_params(CONFIG, jax.random.key(0)))
    return lambda: jax.tree.map(jnp.array, start)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, params):
    """The trained parameters and the log of a run on a disk."""
    folder = tmp_path_factory.mktemp("unbroken")
    return train(CONFIG, SETTINGS, params(), Batches(), folder, progress=False), losses(folder)


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def evaluate(params):
    return {"drawing": np.zeros((4, 4, 3), np.uint8), "val_pa_mpjpe": 1.0}


def test_a_broken_run_goes_on_to_the_same_bits(bucket, params, unbroken):
    settings = dataclasses.replace(SETTINGS, eval_every=2)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(CONFIG, settings, params(), Batches(at=3), bucket, evaluate=evaluate, progress=False)
    assert (bucket / "checkpoints" / "3" / COMMIT).exists()
    # What a kill in the next save leaves behind.
    write_bytes(bucket / "metrics-00000004.jsonl", '{"step": 4, "loss": 9.5}\n')
    write_bytes(bucket / "checkpoints" / "4" / "state" / "manifest.ocdbt", b"half")
    again = train(CONFIG, settings, params(), Batches(), bucket, evaluate=evaluate, progress=False)
    whole, expected = unbroken
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
    assert losses(bucket) == expected
    files = tree(bucket)
    assert [name for name in files if name.startswith("metrics")] == [
        f"metrics-{step:08d}.jsonl" for step in (1, 3, 4, 5)
    ]
    saved = {name.split("/")[1] for name in files if name.startswith("checkpoints/")}
    assert "6" in saved and not saved & {"3", "4"}
    assert all((bucket / "checkpoints" / step / COMMIT).exists() for step in saved)
    assert (
        len([name for name in files if name.startswith("tensorboard/events.out.tfevents.")]) == 4
    )  # one for each save


def test_a_run_whose_folder_another_one_has_writes_no_more(bucket, params):
    """Neither a checkpoint, nor the lines since the last one: the other run has written its own under the same name."""
    checks = iter([None])

    def check():
        if next(checks, "lost") == "lost":
            raise Fault("another run has begun to write it")

    with pytest.raises(Fault, match="another run"):
        train(CONFIG, SETTINGS, params(), Batches(), bucket, progress=False, check=check)
    files = tree(bucket)
    assert [name for name in files if name.startswith("metrics")] == ["metrics-00000001.jsonl"]
    assert len({name.split("/")[1] for name in files if name.startswith("checkpoints/")}) == 1


@pytest.mark.slow
def test_requests_that_fail_lose_nothing(bucket, faults, params, unbroken):
    faults(10)
    train(CONFIG, SETTINGS, params(), Batches(), bucket, progress=False)
    assert faults(0) > 5
    assert losses(bucket) == unbroken[1]


def test_a_log_is_trimmed_in_the_part_that_holds_the_lost_steps(bucket):
    lines = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 10)]
    for first, last in ((1, 3), (4, 6), (7, 9)):
        write_bytes(bucket / f"metrics-{first:08d}.jsonl", "".join(lines[first - 1 : last]))
    Log(bucket, 5).close()
    assert tree(bucket) == ["metrics-00000001.jsonl", "metrics-00000004.jsonl"]
    assert sorted(losses(bucket)) == [1, 2, 3, 4, 5]


def test_a_run_that_was_copied_from_a_bucket_goes_on_on_a_disk(tmp_path):
    (tmp_path / "metrics-00000001.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "metrics-00000003.jsonl").write_text('{"step": 3}\n{"step": 4}\n')
    log = Log(tmp_path, 3)
    log(4, {"loss": 1.5}, chart=False)
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    Log(tmp_path, 2).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
