"""The study of docs/claim.md: what it trains on and tests, its report, and that a killed run goes on."""

import gzip
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from chatpose_jax.data.synthetic.families import POSTURES
from chatpose_jax.data.synthetic.situations import GRAMMAR, QUESTIONS, SITUATIONS
from chatpose_jax.models.chatpose import init_params, unstack_layers
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor


@pytest.fixture(scope="module")
def claim():
    spec = importlib.util.spec_from_file_location("claim", Path(__file__).parent.parent / "bench" / "claim.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CAPTIONS = {"train": 400, "test": 16}
    return module


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def write(path, found):
    path.write_bytes(gzip.compress(json.dumps(found).encode()))


def tiny_base(claim):
    config = preset("tiny").replace(lora=None)
    processor = tiny_processor(config)
    return claim.Base(
        config,
        unstack_layers(init_params(config, jax.random.key(3))),
        lambda text: processor.encode([{"role": "user", "content": text}]).input_ids.tolist(),
    )


def words(text):
    return [word for word in re.findall("[a-z]+", text.lower()) if word not in GRAMMAR]


def test_no_word_of_a_tested_situation_is_trained_on(claim):
    """Read from the rows of the steps themselves, and without the script's own stems: not even its beginning occurs."""
    texts = claim.texts()
    for fold in range(claim.FOLDS):
        tested = claim.fold_of(fold).tested
        rows = {int(row) for step in range(300) for row in claim.batch_of(step, fold, 0).rows}
        seen = {word for row in rows for word in words(texts[row])}
        assert len(rows) > 400
        for number in tested:
            for word in words(SITUATIONS[number].words):
                begin = word.removesuffix("s")[:5]
                assert not [other for other in seen if other == word or (len(begin) > 3 and other.startswith(begin))], (
                    word
                )


def test_the_folds_test_every_posture_once(claim):
    folds = [claim.fold_of(fold) for fold in range(claim.FOLDS)]
    tested = [i for fold in folds for i in fold.tested]
    assert len(set(tested)) == len(tested) and not set(tested) & claim.direct()
    assert {SITUATIONS[i].posture for i in tested} == set(POSTURES)
    for fold, other in (folds, folds[::-1]):
        assert set(fold.tested) <= set(other.trained) and not set(fold.tested) & set(fold.trained)


def test_a_leak_stops_the_study(claim, monkeypatch):
    """Whoever deals situations without regard to their words: "plays a scarecrow" here, "plays a horse" there."""
    play = [i for i, situation in enumerate(SITUATIONS) if "plays" in situation.words]
    monkeypatch.setattr(claim, "part_of", lambda: [int(i == play[0]) for i in range(len(SITUATIONS))])
    with pytest.raises(SystemExit, match=r"plays a scarecrow.*play"):
        claim.fold_of(1)


def test_rows_are_those_of_the_seed_and_the_step(claim):
    one, again, other = (claim.batch_of(step, 0, 1) for step in (5, 5, 6))
    np.testing.assert_array_equal(one.poses, again.poses)
    assert (one.rows != other.rows).any()
    asked = one.rows[: claim.SITUATION_ROWS] // len(QUESTIONS)
    for number, pose in zip(asked, one.poses, strict=False):
        assert any((pose == target).all() for target in claim.targets(int(number)))
    assert (one.rows[claim.SITUATION_ROWS :] >= claim.SITUATION_TEXTS).all()


def test_targets_lead_with_the_left_and_answers_have_both_sides(claim):
    number = next(i for i, situation in enumerate(SITUATIONS) if situation.words == "proposes marriage")
    targets, answers = claim.joints(claim.targets(number)), claim.right_answers(number)
    left, right = (targets[:, joint] for joint in (4, 5))  # the knees, in the camera frame: z away from the camera
    assert (left[:, 2] < right[:, 2]).all()
    assert {bool(a[4, 2] < a[5, 2]) for a in answers} == {True, False}
    assert len(answers) == 4 * claim.TARGETS


def fake(claim, out, run, joints_of):
    fold = claim.fold_of(run.fold)

    def millimetres(numbers):
        poses = [joints_of(i) for i in numbers for _ in QUESTIONS]
        return np.rint(1000 * np.stack(poses)).astype(int).tolist()

    found = {
        "run": run._asdict(),
        "settings": {"steps": 1, "rate": claim.ARMS[run.arm].rate},
        "questions": [[i, q] for i in fold.tested for q in range(len(QUESTIONS))],
        "joints_mm": millimetres(fold.tested),
        "trained_questions_mm": millimetres(fold.trained),
        "captions_mm": np.rint(1000 * claim.joints(claim.captions("test")[1])).astype(int).tolist(),
    }
    out.mkdir(exist_ok=True)
    write(run.file(out), found)


def row(lines, name):
    cells = next(line for line in lines if line.startswith(f"| {name} |")).split("|")
    return [cell.strip() for cell in cells[2:-1]]


def test_the_report_of_some_runs(claim, tmp_path):
    """One arm is always right, one always the mean pose: the columns are known. What is not there is named."""
    assert list(claim.report(tmp_path)) == ["No run is complete."]
    fake(claim, tmp_path, claim.Run("pretrained", 0, 0), lambda i: claim.right_answers(i)[3])
    fake(claim, tmp_path, claim.Run("random", 0, 0), lambda i: claim.mean_pose(0))
    fake(claim, tmp_path, claim.Run("random", 1, 2), lambda i: claim.mean_pose(1))
    lines = "\n".join(claim.report(tmp_path)).splitlines()
    tested = [len(claim.fold_of(fold).tested) for fold in (0, 1)]
    known = dict(zip(claim.COLUMNS, row(lines, "pretrained")[1:], strict=True))
    assert row(lines, "pretrained")[0] == f"1 of 6, {tested[0]} situations"
    assert row(lines, "random")[0] == f"2 of 6, {sum(tested)} situations"
    assert known["PA, nearest"] == "0.00 [0.00, 0.00]" and known["held-out captions, PA"] == "0.00"
    assert float(known["right posture first, %"].split()[0]) > 90
    constant = dict(zip(claim.COLUMNS, row(lines, "random")[1:], strict=True))
    assert constant["PA, nearest"] == "1.00 [1.00, 1.00]" and constant["trained questions, PA"] == "1.00"
    assert row(lines, "pretrained less random") == [
        "1",
        "-1.00 [-1.00, -1.00]",
        "-1.00 [-1.00, -1.00]",
        known_points(lines),
    ]
    assert row(lines, "random less mean pose")[0] == "2"
    assert "3 of 30 runs are complete" in lines[-1] and "pretrained fold 1 seed 0" in lines[-1]
    assert ", random fold 1 seed 2" not in lines[-1] and "frozen-random fold 1 seed 2" in lines[-1]


def known_points(lines):
    points = row(lines, "pretrained less random")[-1]
    assert points.startswith("+")
    return points


def test_results_that_do_not_belong_together_are_refused(claim, tmp_path):
    for seed in range(2):
        run = claim.Run("random", 0, seed)
        fake(claim, tmp_path, run, lambda i: claim.mean_pose(0))
    data = read(run.file(tmp_path))
    write(run.file(tmp_path), {**data, "settings": {**data["settings"], "steps": 7}})
    with pytest.raises(SystemExit, match="choose another --out"):
        list(claim.report(tmp_path))


@pytest.mark.slow
def test_packed_questions_are_answered_as_alone(claim, monkeypatch):
    """Against whole rows behind a cached prefix, padded, as the frozen arms read them."""
    monkeypatch.setattr(claim, "DTYPE", "float32")
    base = tiny_base(claim)
    rows = claim.encode_rows(base.encode)
    config, trained, frozen = claim.start(base.config, base.params, rows, claim.ARMS["pretrained"], 0)
    params, numbers = claim.unflatten_layers({**trained, **frozen}), np.array([5, 400, 5, 90, 333])
    packed = claim.pack(rows, numbers)
    states = claim.final_states(config, params, rows.prefix, rows.ids[numbers], rows.lengths[numbers])
    last = states[np.arange(len(numbers)), rows.lengths[numbers] - 1]
    alone = claim.read_poses(config, claim.bind(config, params).pose_head, last)
    np.testing.assert_allclose(claim.answers(config, params, packed), alone, atol=1e-5)
    np.testing.assert_array_equal(alone[0], alone[2])
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    assert len(packed.ids) % claim.WIDTH == 0 and len(claim.pack(rows, numbers, 256).ids) == 256


@pytest.mark.slow
def test_a_killed_run_goes_on(claim, tmp_path, monkeypatch):
    """The file is the same to the last digit, whether the run was killed or not."""
    monkeypatch.setattr(claim, "STEPS", 5)
    monkeypatch.setattr(claim, "WARMUP", 2)
    monkeypatch.setattr(claim, "CHECKPOINT_SECONDS", -1)
    base = tiny_base(claim)
    rows = claim.encode_rows(base.encode)
    assert tiny_processor(base.config).decode(rows.vocabulary[rows.prefix]).startswith("A chat about human poses.")
    run = claim.Run("pretrained", 0, 0)
    claim.make(run, base, rows, tmp_path / "whole")

    real = claim.batch_of
    with monkeypatch.context() as patch:

        def killed(step, fold, seed):
            if step == 3:
                raise KeyboardInterrupt
            return real(step, fold, seed)

        patch.setattr(claim, "batch_of", killed)
        with pytest.raises(KeyboardInterrupt):
            claim.make(run, base, rows, tmp_path / "killed")
    assert not run.file(tmp_path / "killed").exists()
    steps = []
    monkeypatch.setattr(claim, "batch_of", lambda step, fold, seed: steps.append(step) or real(step, fold, seed))
    claim.make(run, base, rows, tmp_path / "killed")
    assert steps == [3, 4]
    results = [read(run.file(tmp_path / name)) for name in ("whole", "killed")]
    for result in results:
        del result["cpu_seconds"]
    assert results[0] == results[1]
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())
