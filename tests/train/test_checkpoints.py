"""What a checkpoint belongs to, where it can be restored, and which ones stay."""

import dataclasses
import errno
import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.checkpoints import Checkpoints
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.train.step import TrainState
from chatpose_jax.train.trainer import identity


def state_of(mesh=None, seed=0):
    """A state of two arrays with a moment each, and twelve frozen arrays."""
    random = np.random.default_rng(seed)

    def array(shape, *axes):
        x = jnp.asarray(random.normal(size=shape), jnp.float32)
        return x if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    trainable = {"decoder/lora_a": array((8, 16), "fsdp", "tensor"), "pose_head/bias": array((8,), "data")}
    moments = [{path: array(x.shape) for path, x in trainable.items()}]
    count = array(()).astype(jnp.int32)
    frozen = {f"vision/{i}/kernel": array((8, 2)) for i in range(12)}
    return TrainState(count, trainable, moments, jnp.stack([count, count])), frozen


def opened(folder, frozen, keep=2):
    return Checkpoints(
        folder, keep=keep, identity={"model": {"width": 24}}, frozen=fingerprint(frozen), result=folder.parent / "model"
    )


def at(state, step):
    return dataclasses.replace(state, step=jnp.full_like(state.step, step))


def test_another_base_is_refused_by_name(tmp_path):
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    checkpoints.save(at(state, 1), {"step": 1})
    checkpoints.close()
    changed = {**frozen, "vision/7/kernel": frozen["vision/7/kernel"].at[3, 1].add(1e-6)}
    with pytest.raises(UserError, match=r"frozen base: vision/7/kernel of 12 arrays differ; give the --init"):
        opened(tmp_path, changed).restore(state)
    with pytest.raises(UserError, match=r"and 7 more of 12 arrays differ"):
        opened(tmp_path, state_of(seed=1)[1]).restore(state)
    _, position = opened(tmp_path, frozen).restore(state)
    assert position == {"step": 1}


def test_a_run_of_before_train_pose_loss_goes_on(tmp_path):
    """Its settings said that the head gives 24 joints, and nothing of the pose loss or of tied embeddings."""
    state, frozen = state_of()
    today = identity(preset("tiny"), TrainConfig())
    before = {
        "model": {**today["model"], "head": {"name": "mlp", "num_joints": 24, "options": []}},
        "train": dict(today["train"]),
    }
    assert before["train"].pop("pose_loss") == [["matrices", 1.0]]
    before["model"]["text"] = {name: value for name, value in today["model"]["text"].items() if name != "tied"}
    options = {"keep": 1, "frozen": fingerprint(frozen), "result": tmp_path}
    checkpoints = Checkpoints(tmp_path / "run", identity=before, **options)
    checkpoints.save(at(state, 1), {"step": 1})
    checkpoints.close()
    assert Checkpoints(tmp_path / "run", identity=today, **options).restore(state)[1] == {"step": 1}
    other = identity(preset("tiny"), TrainConfig(pose_loss=(("geodesic", 1.0),)))
    with pytest.raises(UserError, match=r"other settings of train\.pose_loss"):
        Checkpoints(tmp_path / "run", identity=other, **options).restore(state)
    tied = preset("tiny").replace(text=dataclasses.replace(preset("tiny").text, tied=True))
    with pytest.raises(UserError, match=r"other settings of model\.text"):
        Checkpoints(tmp_path / "run", identity=identity(tied, TrainConfig()), **options).restore(state)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_a_state_moves_to_another_mesh(tmp_path, sizes):
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    checkpoints.save(at(state, 3), {"step": 3})
    checkpoints.close()
    mesh = make_mesh(*sizes)
    there, placed = state_of(mesh, seed=0)
    restored, _ = opened(tmp_path, placed).restore(there)
    for a, b, like in zip(*map(jax.tree.leaves, (at(state, 3), restored, there)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.sharding == like.sharding


def test_the_newest_and_the_best_stay(tmp_path):
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    for step, metric in enumerate((None, 5.0, 3.0, 4.0, None, 6.0), 1):
        checkpoints.save(at(state, step), {"step": step}, metric)
    checkpoints.wait()
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [3, 5, 6]
    assert (checkpoints.best(), checkpoints.latest()) == (3, 6)
    checkpoints.close()
    again = opened(tmp_path, frozen)
    assert again.best() == 3, "known after a restart"
    restored, position = again.restore(state, again.best())
    assert (int(restored.step), position) == (3, {"step": 3})
    again.save(at(state, 7), {"step": 7}, 2.0)
    again.save(at(state, 8), {"step": 8})
    again.save(at(state, 9), {"step": 9})
    again.wait()
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == [7, 8, 9]


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    checkpoints.save(at(state, 1), {"step": 1})
    checkpoints.close()
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match="delete this folder to resume from an older one"):
        opened(tmp_path, frozen).restore(state)


def test_arrays_that_changed_on_the_disk_are_noticed(tmp_path):
    """Files that read well and hold other numbers are refused, and the older checkpoint stands."""
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    checkpoints.save(at(state, 1), {"step": 1})
    changed = {**state.trainable, "pose_head/bias": state.trainable["pose_head/bias"].at[3].add(1e-6)}
    checkpoints.save(at(dataclasses.replace(state, trainable=changed), 2), {"step": 2})
    checkpoints.close()
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "2" / "state")
    with pytest.raises(UserError, match=r"2: 2 of 6 arrays are not what was saved \(.step\): its files were damaged"):
        opened(tmp_path, frozen).restore(state)
    assert opened(tmp_path, frozen).restore(state, 1)[1] == {"step": 1}


def test_a_checkpoint_without_a_fingerprint_is_refused(tmp_path):
    state, frozen = state_of()
    checkpoints = opened(tmp_path, frozen)
    checkpoints.save(at(state, 1), {"step": 1})
    checkpoints.close()
    file = next((tmp_path / "1" / "run").rglob("metadata"))
    run = json.loads(file.read_text())
    del run["frozen"]
    file.write_text(json.dumps(run))
    with pytest.raises(UserError, match="does not say which frozen base"):
        opened(tmp_path, frozen).restore(state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_takes_no_more_is_one_error(tmp_path, caplog):
    """Here the largest file that a process may write is small, which a save finds out in the background."""
    state, frozen = state_of()
    state = dataclasses.replace(state, trainable={"large": jnp.asarray(np.random.default_rng(0).normal(size=100_000))})
    checkpoints = opened(tmp_path, frozen)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=f"os_error_code='{errno.EFBIG}'"):
            checkpoints.save(at(state, 1), {"step": 1})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
