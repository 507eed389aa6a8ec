"""The system "keypoints": poses of generated images whose true keypoints a stand-in writes, and texts that cannot be read."""

import json

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.example import Example
from chatpose_jax.data.keypoint_text import KeypointText
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import pose_errors, true_poses
from chatpose_jax.evaluation.spec import Spec, make_system
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.evaluation.systems.keypoints import upright
from smpl_jax import Pose, io, stack

HERE = "tests.evaluation.test_keypoints"
SET = "openpose25"  # of eight people, as in tests/smpl/test_fit.py, so that the program is compiled once
ROWS = SyntheticDataset("test", 8, 0, 336, {"image": 1}, keypoints=SET)
BAD = {2: "I cannot see any person.", 5: "nose 480 112, left eye 495 98", 6: None}
"""Numbers of rows -> what is written of them; None leaves a point out and adds one that nobody knows."""
ASKED: list[Question] = []


class Knows:
    """Writes the true keypoints, as JSON, but for the rows of ``BAD``."""

    name, batch_size, settings = "knows", 5, {}

    def answer(self, questions):
        assert len(questions) <= self.batch_size
        ASKED.extend(questions)
        return [Answer(self.one(int(question.key.split("-")[2]))) for question in questions]

    def one(self, number):
        if BAD.get(number):
            return BAD[number]
        places = KeypointText(SET).write(ROWS[number].extras["keypoints_2d"], (336, 336)).split(", ")
        if number in BAD:
            places = [*places[1:], "tail 500 500"]
        words = [place.rsplit(" ", 2) for place in places]
        return json.dumps({"keypoints": [{"name": name, "x": int(x), "y": int(y)} for name, x, y in words]})


def bare(pose):
    return pose.replace(betas=None, has_betas=None, shape_space=None, translation=None, has_translation=None)


class Constant:
    """One pose, whatever is asked."""

    name, batch_size, settings = "constant", 5, {}

    def answer(self, questions):
        return [Answer(pose=Pose(np.tile(np.diag([-1.0, -1, 1]), (24, 1, 1)).astype(np.float32), "camera"))] * len(
            questions
        )


def system(text=""):
    return make_system(Spec.parse(f"keypoints,writer={HERE}:Knows,points={SET},batch_size=8{text}"))


def test_keypoints_become_poses_and_what_cannot_be_read_is_counted():
    ASKED.clear()
    questions = [Question.of(row) for row in ROWS]
    found = system().answer(questions)
    parsed = [i for i in range(len(ROWS)) if i not in (2, 5)]
    truth, body = true_poses([ROWS[i] for i in parsed]), io.load_body()
    fitted, standing = (
        pose_errors(stack([bare(pose) for pose in poses]), truth, body)["mpjpe"]
        for poses in ([found[i].pose for i in parsed], [upright()] * len(parsed))
    )
    assert (
        fitted < 120 and fitted < 0.6 * standing
    )  # depths that keypoints do not tell cost 100 mm in two of these rows
    assert [i for i, answer in enumerate(found) if answer.notes.get("keypoints not parsed")] == [2, 5]
    assert [i for i, answer in enumerate(found) if answer.notes.get("keypoints read in part")] == [6]
    for i in (2, 5):
        np.testing.assert_array_equal(found[i].pose.rotations[0], np.diag([1, -1, -1]))
        assert found[i].text == BAD[i]
    assert found[6].notes["keypoints"] == 24 and found[0].notes["keypoints"] == 25
    alone = system().answer(questions[1:2])[0]  # an answer does not depend on its batch
    np.testing.assert_array_equal(alone.pose.rotations, found[1].pose.rotations)
    asked = ASKED[0]
    assert asked.wants == "words" and asked.messages[0]["content"][1]["text"] == KeypointText(SET).instructions()
    assert asked.messages[0]["content"][0]["type"] == "image"


def test_options(monkeypatch):
    ASKED.clear()
    question = Question.of(ROWS[2])
    question = Question(question.key, "", "image", question.messages, {"description": "The man in red."})
    made = system(f",asked=question,scale=100,otherwise={HERE}:Constant,name='LLaVA*-S'")
    (found,) = made.answer([question])
    np.testing.assert_array_equal(found.pose.rotations[5], np.diag([-1.0, -1, 1]))
    assert ASKED[0].messages[0]["content"][1]["text"] == KeypointText(SET, scale=100).question("The man in red.")
    assert made.name == "LLaVA*-S" and made.settings["otherwise"] == {"name": "constant"} and system().name == "knows-S"
    text = Question.of(Example("a", "text", [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]))
    with pytest.raises(UserError, match="question 'a' shows 0 images; keypoints need one"):
        made.answer([text])
    for option, words in (
        ("points=coco", "set of keypoints must be one of"),
        ("least=3", "least must be"),
        ("asked=x", "asked"),
    ):
        with pytest.raises(UserError, match=words):
            make_system(Spec.parse(f"keypoints,writer={HERE}:Knows,{option}"))


def test_the_command(tmp_path):
    words = [
        "eval",
        "estimation",
        "--system",
        f"keypoints,writer={HERE}:Knows,points={SET},batch_size=8",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    assert main([*words, "--data", "synthetic,tasks={'image': 1},test_size=8", "--drawings", "0"]) == 0
    found = json.loads((tmp_path / "estimation/synthetic/knows-S/scores.json").read_text())["scores"][0]
    assert found["counts"] == {"keypoints not parsed": 2, "keypoints read in part": 1}
    assert found["values"]["PA-MPJPE"]["value"] < 160 and found["facts"]["samples"] == "8"
