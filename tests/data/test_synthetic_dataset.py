"""The generated data set: protocol, splits, conversations, frames, images."""

import pickle
import re

import numpy as np
import pytest

from chatpose_jax.data import questions
from chatpose_jax.data.example import Example
from chatpose_jax.data.synthetic import preview
from chatpose_jax.data.synthetic.dataset import DEFAULT_TASKS, TASKS, SyntheticDataset, to_camera
from chatpose_jax.data.synthetic.families import POSTURES, sample_poses
from chatpose_jax.data.synthetic.scene import MAX_YAW, Studio, backdrop, draw_scene
from chatpose_jax.data.synthetic.situations import SITUATIONS
from chatpose_jax.errors import UserError

RX_PI = np.diag([1.0, -1.0, -1.0])
WORDS_ONLY = {name: w for name, w in DEFAULT_TASKS.items() if not name.startswith("image")}


def text_of(content):
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def images_of(example):
    parts = [p for m in example.messages if not isinstance(m["content"], str) for p in m["content"]]
    return [np.asarray(p["image"]) for p in parts if p["type"] == "image"]


@pytest.fixture(scope="module")
def rows():
    return SyntheticDataset("train", size=160, image_size=32).precompute()[:]


def test_each_pose_token_has_its_pose(rows):
    for row in rows:
        answers = [text_of(m["content"]) for m in row.messages if m["role"] == "assistant"]
        assert sum(a.count("<POSE>") for a in answers) == len(row.poses)
        assert row.poses.family == "smpl" and row.poses.rotations.dtype == np.float32
        assert not any("<POSE>" in text_of(m["content"]) for m in row.messages if m["role"] == "user")


def test_turns_alternate_and_only_the_first_holds_an_image(rows):
    for row in rows:
        assert [m["role"] for m in row.messages] == ["user", "assistant"] * (len(row.messages) // 2)
        assert len(row.messages) in (2, 4)
        with_image = [i for i, m in enumerate(row.messages) if not isinstance(m["content"], str)]
        assert with_image in ([], [0])
        assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in images_of(row))


def test_the_tasks_hold_all_kinds_and_pose_free_answers(rows):
    assert {r.kind for r in rows} == {"text", "image", "instruction"}
    assert all((len(r.poses) == 0) == (r.kind == "instruction") for r in rows)
    assert all(len(images_of(r)) == 1 for r in rows if r.kind == "image")
    assert all(not images_of(r) for r in rows if r.kind == "text")
    assert any(m["content"] == "<POSE>" for r in rows for m in r.messages)
    assert any(len(r.poses) == 2 for r in rows)


def test_random_access_is_deterministic_and_does_not_depend_on_size():
    small, large = SyntheticDataset("train", 40, image_size=24), SyntheticDataset("train", 900, image_size=24)
    for i in (39, 3, 17):
        a, b = small[i], large[i]
        assert a.id == b.id and [text_of(m["content"]) for m in a.messages] == [
            text_of(m["content"]) for m in b.messages
        ]
        np.testing.assert_array_equal(a.poses.rotations, b.poses.rotations)
        for x, y in zip(images_of(a), images_of(b)):
            np.testing.assert_array_equal(x, y)
    assert small[-1].id == small[39].id
    with pytest.raises(IndexError):
        small[40]


def test_precomputed_images_are_the_lazy_ones():
    lazy = SyntheticDataset("val", 6, image_size=24, tasks={"image": 1})
    drawn = SyntheticDataset("val", 6, image_size=24, tasks={"image": 1}).precompute(workers=2)
    for i in range(6):
        difference = images_of(lazy[i])[0].astype(int) - images_of(drawn[i])[0]
        # Skinning one body or a batch may round differently at the border of a triangle.
        assert np.mean(np.abs(difference) > 2) < 0.02


def test_splits_and_seeds_hold_different_poses():
    sets = [
        SyntheticDataset("train", 300), SyntheticDataset("val", 300), SyntheticDataset("test", 300),
        SyntheticDataset("train", 300, seed=1),
    ]  # fmt: skip
    keys = [{p.tobytes() for p in s.poses()} for s in sets]
    assert all(len(k) == 300 for k in keys)
    assert all(not keys[i] & keys[j] for i in range(4) for j in range(i))


def test_a_person_who_stands_before_the_camera_has_a_root_near_rx_pi():
    data = SyntheticDataset("val", 200, tasks={"text": 1})
    upright = [
        row.poses.rotations[0, 0]
        for row in data
        if re.search(r"[Ss]tands? upright|is standing|both feet", row.messages[0]["content"])
    ]
    assert len(upright) > 5
    cosine = [(np.trace(RX_PI.T @ root) - 1) / 2 for root in upright]
    assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 25


def test_to_camera_turns_the_root_only_and_keeps_up_down():
    pose = sample_poses(1, 0, family="stand").rotations[0]
    seen = to_camera(pose, yaw=40, pitch=5)
    np.testing.assert_array_equal(seen[1:], pose[1:])
    assert seen[0, 1, 1] < -0.9  # the body's up is the camera's minus y
    left = to_camera(np.eye(3)[None].repeat(24, 0), yaw=90)[0] @ np.array([0, 0, 1.0])
    np.testing.assert_allclose(left, [1, 0, 0], atol=1e-6)  # turned to its left, it looks to the image's right


def test_image_targets_are_seen_from_the_scene():
    def sideways(max_yaw):
        """How far each person looks to the side: the camera's x of the direction that the body faces."""
        data = SyntheticDataset("val", 30, image_size=24, tasks={"image": 1}, max_yaw=max_yaw)
        return np.stack([row.poses.rotations[0, 0, 0, 2] for row in data])

    turned = np.abs(sideways(40.0) - sideways(0.0))
    assert turned.std() > 0.1, "views differ in yaw"
    assert 0.4 < turned.max() < np.sin(np.radians(40)) + 0.05
    assert sideways(MAX_YAW).std() > MAX_YAW * np.pi / 180 / 3


def test_edits_change_what_they_say():
    data = SyntheticDataset("train", 400, tasks={"text_turns": 1})
    seen = 0
    for row in data:
        if len(row.poses) == 2:
            change = text_of(row.messages[2]["content"])
            moved = {j for j in range(24) if not np.allclose(*row.poses.rotations[:, j], atol=1e-4)}
            legs = {0, 1, 2, 4, 5, 7, 8}
            assert moved and not moved & legs
            for side, other in (("left", {14, 17, 19, 21}), ("right", {13, 16, 18, 20})):
                if re.search(rf"the {side} (arm|hand)", change):
                    assert not moved & other
                    seen += 1
    assert seen > 20


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.words)
def test_situations_are_possible(situation):
    assert situation.posture in POSTURES
    for arms in (situation.arms, situation.arms[::-1]):
        assert len(sample_poses(2, 0, situation.posture, arms)) == 2


def test_lists_are_as_long_as_they_should_be():
    assert len(SITUATIONS) >= 30 and len({s.words for s in SITUATIONS}) == len(SITUATIONS)
    assert len(questions.TEXT_TO_POSE) == 9 and len(questions.IMAGE_TO_POSE) == 5 and len(questions.POSE_ANSWERS) == 8
    assert questions.POSE_ANSWERS.count("<POSE>") == 1


def test_vocabulary_is_modest():
    data = SyntheticDataset("train", 1200, tasks=WORDS_ONLY)
    vocabulary = {w for row in data for m in row.messages for w in re.findall(r"[a-z]+", m["content"].lower())}
    assert 200 < len(vocabulary) < 500


def test_tasks_are_chosen():
    for task, (kind, _) in TASKS.items():
        row = SyntheticDataset("val", 2, image_size=16, tasks={task: 1})[1]
        assert isinstance(row, Example) and row.kind == kind and row.id.endswith(task)
        assert SyntheticDataset("val", 2, tasks={task: 1}).kind(1) == kind


def test_a_data_set_travels_to_other_processes():
    data = SyntheticDataset("val", 4, image_size=16)
    data[0]
    assert pickle.loads(pickle.dumps(data))[1].id == data[1].id


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        SyntheticDataset("dev")
    with pytest.raises(UserError, match="tasks: there is no 'songs'; the tasks are text, text_short"):
        SyntheticDataset("val", tasks={"songs": 1})
    with pytest.raises(UserError, match="tasks: weights must not be negative, nor all 0"):
        SyntheticDataset("val", tasks={"text": 0})


def test_images_show_a_body_in_its_place():
    rng = np.random.default_rng(0)
    studio = Studio()
    poses = sample_poses(6, 1, family="stand").rotations
    for pose in poses:
        scene = draw_scene(rng)
        seen = to_camera(pose, scene.yaw, scene.pitch)
        image = studio.render(seen, scene, 48).astype(int)
        body = (np.abs(image - backdrop(scene, 48)) > 12).any(-1)
        rows, columns = np.nonzero(body)
        assert 0.04 < body.mean() < 0.6
        assert rows.max() - rows.min() > 30  # fills the crop
        assert abs(columns.mean() - 24) < 10


def test_preview_draws_every_posture(monkeypatch):
    monkeypatch.setattr(preview, "POSTURES", {"stand": POSTURES["stand"], "sit": POSTURES["sit"]})
    sheet = preview.posture_sheet(per_family=1, columns=2)
    assert sheet.ndim == 3 and sheet.shape[1] > sheet.shape[0] and sheet.std() > 10
