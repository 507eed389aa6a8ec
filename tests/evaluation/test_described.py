"""The system "described": what the writer is asked, what the second system is asked, and what is counted."""

import numpy as np
import pytest

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.spec import Spec, make_system
from chatpose_jax.evaluation.system import Answer, Question, asked_words
from smpl_jax import Pose

HERE = "tests.evaluation.test_described"
IMAGE = {"type": "image", "image": np.zeros((4, 4, 3), np.uint8)}
ASKED: list[Question] = []


class Writes:
    """Writes how many images it saw; nothing about whatever is said to be invisible."""

    name, batch_size = "writer", 2

    def __init__(self) -> None:
        self.settings = {"size": 3}

    def answer(self, questions):
        assert len(questions) <= self.batch_size
        ASKED.extend(questions)
        return [self.one(question.messages[0]["content"]) for question in questions]

    def one(self, content):
        if "invisible" in content[-1]["text"]:
            return Answer("", notes={"no answer in words": True})
        return Answer(f"A pose,\nseen in {len(content) - 1} images.")


class Poses:
    """The pose turns by as many degrees as the caption has letters."""

    name, batch_size = "poses", 3

    def __init__(self, *, factor: float = 1.0) -> None:
        self.settings = {"factor": factor}

    def answer(self, questions):
        assert len(questions) <= self.batch_size
        ASKED.extend(questions)
        angles = [np.radians(len(asked_words(question.messages))) for question in questions]
        turned = [np.tile(np.eye(3, dtype=np.float32), (24, 1, 1)) for _ in angles]
        for each, angle in zip(turned, angles):
            each[0, :2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        return [Answer("It is <POSE>.", Pose(each, "camera"), notes={"forced": True}) for each in turned]


def system(**options):
    text = ",".join(f"{name}={value!r}" for name, value in options.items())
    return make_system(
        Spec.parse(f"described,writer={HERE}:Writes,to='{HERE}:Poses,factor=2'{',' + text if text else ''}")
    )


def question(text, image=False, **extras):
    content = [IMAGE, {"type": "text", "text": text}] if image else text
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "<POSE>"}]
    pose = Pose(np.tile(np.eye(3, dtype=np.float32), (1, 24, 1, 1)), "camera")
    return Question.of(Example(text, "image" if image else "text", messages, pose, extras))


def test_words_of_the_writer_become_poses():
    ASKED.clear()
    given = [
        question("The pose?", True),
        question("What about someone who waits for a bus?"),
        question("The pose of this person?", True, description="The man in red."),
        question("Can you show an invisible person?"),
    ]
    found = system().answer(given)
    asked, shown = [each for each in ASKED if each.wants == "words"], [each for each in ASKED if each.wants == "pose"]
    texts = [each.messages[0]["content"][-1]["text"] for each in asked]
    assert "the person in the middle of the image in two" in texts[0] and asked[0].messages[0]["content"][0] is IMAGE
    assert 'of whom this is said: "What about someone who waits for a bus?"' in texts[1]
    assert len(asked[1].messages[0]["content"]) == 1
    assert 'of whom this is said: "The man in red."' in texts[2] and len(asked[2].messages[0]["content"]) == 2
    captions = ["A pose, seen in 1 images.", "A pose, seen in 0 images.", "A pose, seen in 1 images.", "A person."]
    assert [each.text for each in found] == captions and [each.kind for each in shown] == ["text"] * 4
    assert [asked_words(each.messages) for each in shown] == captions
    for answer, caption in zip(found, captions):
        angle = np.degrees(np.arctan2(answer.pose.rotations[0, 1, 0], answer.pose.rotations[0, 0, 0]))
        assert angle == pytest.approx(len(caption), abs=1e-3)
    assert found[0].notes == {"forced": True}
    assert found[3].notes == {"forced": True, "no answer in words": True, "not described": True}


def test_its_settings_are_those_of_both():
    made = system()
    assert made.name == "writer-P" and system(name="GPT4-P").name == "GPT4-P"
    assert made.settings["writer"] == {"name": "writer", "size": 3}
    assert made.settings["to"] == {"name": "poses", "factor": 2}
    with pytest.raises(UserError, match="needs the option 'to'"):
        make_system(Spec.parse(f"described,writer={HERE}:Writes"))
    with pytest.raises(UserError, match=r"system 'described': system 'pose_va': expected .*did you mean pose_vae"):
        make_system(Spec.parse(f"described,writer={HERE}:Writes,to=pose_va"))
