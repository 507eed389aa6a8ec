"""Retriever: features that depend on what a pose or a text says alone; its folder."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.folder import ARRAYS, CONFIG, write_folder
from chatpose_jax.posescript.network import RetrieverLossConfig
from chatpose_jax.posescript.retriever import Retriever, load_retriever
from chatpose_jax.posescript.tokens import pad
from chatpose_jax.posescript.trainer import Batch, Examples
from smpl_jax.frames import turn
from smpl_jax.pose import Pose, to_family
from smpl_jax.rotations import axis_angle_to_matrix

TEXTS = (
    "The left arm is raised.",
    "Someone kneels.",
    "A person sits on the ground, with both legs straight, and looks up.",
)


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    return Retriever.random(TEXTS)


@pytest.fixture(scope="module")
def poses() -> Pose:
    angles = np.random.default_rng(0).normal(0, 0.3, (5, 24, 3)).astype(np.float32)
    return Pose(np.array(axis_angle_to_matrix(angles)), "camera")


def test_features_have_unit_length_and_do_not_depend_on_the_batch(retriever: Retriever, poses: Pose) -> None:
    found, alone = retriever.embed_poses(poses), retriever.embed_poses(poses[2:3])
    assert found.shape == (5, retriever.width) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(found[2:3], alone)
    texts = retriever.embed_texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(texts[1:2], retriever.embed_texts(TEXTS[1:2]))
    assert np.abs(texts[0] - texts[1]).max() > 0.01
    assert retriever.embed_texts([]).shape == retriever.embed_poses(poses[:0]).shape == (0, retriever.width)


def test_features_of_poses_do_not_depend_on_frame_yaw_family_and_hands(retriever: Retriever, poses: Pose) -> None:
    found = retriever.embed_poses(poses)
    rotations = np.array(poses.rotations)
    to_up = turn("camera", "z-up").astype(np.float32)
    yaw = np.asarray(axis_angle_to_matrix(np.array([0, 0, 2.5], np.float32)))
    rotations[:, 0] = yaw @ to_up @ rotations[:, 0]
    rotations[:, 22:] = np.asarray(axis_angle_to_matrix(np.array([0.5, 0, 0], np.float32)))
    np.testing.assert_allclose(retriever.embed_poses(Pose(rotations, "z-up")), found, atol=1e-5)
    np.testing.assert_allclose(retriever.embed_poses(to_family(poses, "smplx")), found, atol=1e-6)
    rotations[:, 18] = yaw
    assert np.abs(retriever.embed_poses(Pose(rotations, "z-up")) - found).max() > 1e-3
    measured = np.ones((5, 24), bool)
    measured[:, 18] = False  # then it does not matter what stands there
    hidden = [retriever.embed_poses(pose.replace(measured=measured)) for pose in (Pose(rotations, "z-up"), poses)]
    np.testing.assert_allclose(*hidden, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_both_directions(retriever: Retriever) -> None:
    rng = np.random.default_rng(1)
    ids, lengths = pad(retriever.tokens.encode(TEXTS))
    batch = Batch(rng.normal(0, 0.3, (3, 22, 3)).astype(np.float32), ids, lengths)
    texts = np.asarray(retriever.model.embed_texts(ids, lengths))
    scores = 10 * texts @ np.asarray(retriever.model.embed_poses(batch.poses)).T
    by_text, by_pose = (-np.diag(scores - np.log(np.exp(scores).sum(axis, keepdims=True))).mean() for axis in (1, 0))
    assert float(retriever.model.loss(batch, None, RetrieverLossConfig())[0]) == pytest.approx(
        (by_text + by_pose) / 2, rel=1e-4
    )
    assert float(retriever.model.loss(batch, None, RetrieverLossConfig("t2p"))[0]) == pytest.approx(by_text, rel=1e-4)


def test_equal_features_for_all_find_nothing(retriever: Retriever) -> None:
    """Or a network that has collapsed would be taken for the best."""
    tokens = [[ids] for ids in retriever.tokens.encode([TEXTS[0]] * 40)]
    for value in (0.1, np.nan):
        alike = Examples(np.full((40, 22, 3), value, np.float32), tokens)
        assert retriever.model.validate(alike)["mRecall"] == 0


def test_noise_keeps_numbers_that_never_vary_from_being_magnified() -> None:
    ids, lengths = pad(Retriever.random(TEXTS).tokens.encode(TEXTS * 20))
    poses = np.zeros((len(ids), 22, 3), np.float32)
    poses[:, :5] = np.random.default_rng(1).normal(0, 0.3, (len(ids), 5, 3))
    scales = []
    for noise in (0.0, 0.1):
        model, settings = Retriever.random(TEXTS).model, RetrieverLossConfig(noise=noise)
        step = nnx.jit(lambda model, key, settings=settings: model.loss(Batch(poses, ids, lengths), key, settings)[0])
        for number in range(100):
            step(model, jax.random.key(number))
        scales.append(np.sqrt(np.asarray(model.pose_encoder.trunk.norm_in.var[...]).reshape(22, 3)))
    assert scales[0][5:].max() < 0.01  # so a difference of 0.01 rad would count as much as 1 rad elsewhere
    np.testing.assert_allclose(scales[1][5:], 0.1, rtol=0.2)
    np.testing.assert_allclose(scales[1][:5] ** 2 - scales[0][:5] ** 2, 0.01, atol=0.01)


def test_a_folder_gives_the_same_features_and_says_what_it_is(
    retriever: Retriever, poses: Pose, tmp_path: Path
) -> None:
    write = {
        "kind": "retriever",
        "model": retriever.model,
        "tokens": retriever.tokens,
        "pose_input": retriever.pose_input,
    }
    trained_on = {"data": "synthetic", "split": "train"}
    first, second = (write_folder(tmp_path / name, trained_on=trained_on, **write) for name in ("one", "two"))  # type: ignore[arg-type]
    assert (first / ARRAYS).read_bytes() == (second / ARRAYS).read_bytes()
    loaded = load_retriever(first)
    assert loaded.name == "one" and loaded.settings["trained_on"] == trained_on
    assert loaded.settings["fingerprint"] == load_retriever(second).settings["fingerprint"]
    np.testing.assert_array_equal(loaded.embed_poses(poses), retriever.embed_poses(poses))
    np.testing.assert_array_equal(loaded.embed_texts(TEXTS), retriever.embed_texts(TEXTS))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "no config.json"),
        (lambda folder: _change(folder, kind="pose_vae"), "expected the kind 'retriever', found 'pose_vae'"),
        (lambda folder: _change(folder, version=9), "version 9 is not known"),
        (lambda folder: _flip(folder / ARRAYS), "fingerprint"),
        (lambda folder: _change(folder, model={"latent": 64, "joints": 22}), "has the shape"),
        (lambda folder: _change(folder, model={"width": 64}), "unknown setting 'width'"),
    ],
)
def test_a_damaged_folder_is_refused(retriever: Retriever, tmp_path: Path, break_it, words: str) -> None:
    write_folder(tmp_path, "retriever", retriever.model, retriever.tokens, retriever.pose_input, {})
    break_it(tmp_path)
    with pytest.raises(UserError, match=words):
        load_retriever(tmp_path)


def _change(folder: Path, **settings: object) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | settings))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
