"""Conversations that join rows of other sources."""

import numpy as np
import pytest

from chatpose_jax.data.config import DataConfig
from chatpose_jax.data.example import Example
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from smpl_jax.pose import Pose, to_frame

CAPTIONS = ("synthetic", 3.0, {"tasks": {"text": 1}, "train_size": 40})
WORDS = ("synthetic", 1.0, {"tasks": {"words": 1}, "train_size": 40})


def rows_of(split="train", **options):
    of = options.pop("of", (CAPTIONS, WORDS))
    return examples(DataConfig(sources=(("joined", 1.0, {"of": of, "train_size": 60, **options}),)), split, 0)


def upside_down(split):
    """Rows in the body frame, as some sources have them."""
    rotations = np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1))
    messages = [{"role": "user", "content": "Stand."}, {"role": "assistant", "content": "<POSE>"}]
    return [Example("one", "text", messages, Pose(rotations, "model"))]


def test_conversations_hold_whole_rows_with_their_poses():
    rows, single = rows_of(), rows_of(of=(CAPTIONS, WORDS), parts=(1, 1))
    asked = {row.messages[0]["content"]: row for row in single}
    assert len(rows) == 60
    counts = []
    for row in rows:
        assert [m["role"] for m in row.messages] == ["user", "assistant"] * (len(row.messages) // 2)
        counts.append(len(row.messages) // 2)
        poses = sum(m["content"].count("<POSE>") for m in row.messages)
        assert row.poses.shape == (poses,)
        assert row.kind == ("text" if poses else "instruction")
    assert set(counts) == {1, 2, 3}
    # A pose belongs to its question.
    row = next(row for row in rows if len(row.poses) == 2)
    posed = [
        row.messages[i]["content"] for i in range(0, len(row.messages), 2) if "<POSE>" in row.messages[i + 1]["content"]
    ]
    for i, question in enumerate(posed):
        if question in asked:
            np.testing.assert_array_equal(asked[question].poses.rotations[0], row.poses.rotations[i])
    assert any(question in asked for row in rows for question in (m["content"] for m in row.messages))


def test_weights_are_those_of_the_parts_and_rows_do_not_depend_on_the_size():
    rows = rows_of(train_size=300)
    parts = [part["content"] for row in rows for part in row.messages if part["role"] == "assistant"]
    assert 0.68 < np.mean(["<POSE>" in part for part in parts]) < 0.82
    again = rows_of(train_size=10)
    assert [row.messages for row in again] == [rows[i].messages for i in range(10)]
    assert rows_of("val")[0].messages != rows[0].messages


def test_poses_come_in_the_camera_frame():
    rows = rows_of(of=(CAPTIONS, (f"{__name__}:upside_down", 3.0)), parts=(3, 3), train_size=4)
    found = [pose for row in rows for pose in row.poses.rotations]
    assert {row.poses.frame for row in rows} == {"camera"}
    expected = to_frame(upside_down("train")[0].poses, "camera").rotations[0]
    assert any(np.allclose(pose, expected) for pose in found)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parts": (2, 1)}, "fewest and the most"),
        ({"parts": (0, 1)}, "fewest and the most"),
        ({"of": (("nothing", 1.0),)}, "nothing"),
        ({"of": ()}, "at least one|needs|expected"),
        ({"train_size": 0}, "train_size"),
    ],
)
def test_options_that_do_not_fit_are_named(options, words):
    with pytest.raises(UserError, match=words):
        rows_of(**options)


def test_a_split_without_rows_is_empty():
    def nothing(split):
        return upside_down(split) if split == "train" else []

    globals()["nothing"] = nothing
    assert len(rows_of("val", of=((f"{__name__}:nothing", 1.0),))) == 0
    assert len(rows_of("val", of=((f"{__name__}:nothing", 1.0), CAPTIONS))) == 256
