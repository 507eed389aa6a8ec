"""The tasks of words and poses, with a judge whose features are known: a text says an angle, a pose has one joint bent by it."""

import dataclasses
import json

import numpy as np
import pytest

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.describe import NO_WORDS, TRUE, Describe
from chatpose_jax.evaluation.tasks.generation import NO_POSE, REAL, Generation, SpeculativeGeneration
from smpl_jax import Pose
from smpl_jax.pose import to_family, to_frame
from smpl_jax.rotations import axis_angle_to_matrix, matrix_to_axis_angle

from . import given_systems

COUNT, ELBOW, FOOT = 40, 18, 10
ANGLES = np.linspace(0.05, 3.0, COUNT)


class Judge:
    """Features (cos, sin) of the angle of the left elbow, and of the number in a text. A bent foot turns the feature away."""

    name = "known"

    def __init__(self, trained="human"):
        self.settings = {"fingerprint": "f1234", "trained_on": {"captions": trained} if trained else {}}

    def embed_poses(self, poses):
        assert poses.num_joints == 22
        angles = np.asarray(matrix_to_axis_angle(np.asarray(poses.rotations)))
        known = np.ones(angles.shape[:2], bool) if poses.measured is None else poses.measured
        return circle(angles[:, ELBOW, 2] + np.where(known[:, FOOT], angles[:, FOOT, 0], 0))

    def embed_texts(self, texts):
        return circle(np.array([float(text.split("elbow")[1].split()[0]) if "elbow" in text else 9 for text in texts]))


def circle(angles):
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def bent(angle, foot=0.0, joints=24, frame="camera", measured=None):
    vectors = np.zeros((24, 3), np.float32)
    vectors[ELBOW, 2], vectors[FOOT, 0] = angle, foot
    pose = Pose(np.array(axis_angle_to_matrix(vectors)), "camera", measured=measured)
    return to_frame(to_family(pose, {24: "smpl", 52: "smplh"}[joints]), frame)


def said(angle):
    return f"The left elbow {angle:.6f} is bent."


def talk(question, answer="<POSE>"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(i, **changes):
    pose = bent(ANGLES[i], joints=52, frame="z-up")
    stacked = Pose(pose.rotations[None], pose.frame, measured=pose.measured[None])
    extras = {"human": (said(ANGLES[i]),), "automatic": ("An elbow 1 in automatic words.",)}
    made = Example(
        f"row-{i}",
        "text",
        talk(f"{said(ANGLES[i])} What is the pose in SMPL?"),
        stacked,
        extras,
        group=f"clip-{i // 4}",
    )
    return dataclasses.replace(made, **changes)


ROWS = [row(i) for i in range(COUNT)]


def answers(angles):
    return [Answer(pose=None if angle is None else bent(angle)) for angle in angles]


def test_an_oracle_gets_everything_and_the_real_poses_too():
    task = Generation(ROWS, "toy", retriever=Judge())
    (scores,) = task.score(answers(ANGLES))
    assert list(scores.values)[:6] == [f"R^{way}@{k}" for way in ("P2T", "T2P") for k in (5, 10, 20)]
    for name, value in scores.values.items():
        assert value.value == pytest.approx(0 if name == "FID" else 100, abs=1e-6), name
        if name != "FID":
            assert scores.references[REAL][name].value == 100
    assert scores.table == "generation/toy"
    assert scores.facts["gallery"] == "40 pairs of text and pose"
    assert scores.facts["texts"] == "40 human captions, one for each row"
    assert "f1234" in scores.facts["retriever"]
    assert "10" in scores.facts["interval"], "whole clips are drawn"
    assert not scores.counts
    assert Scores.from_json(scores.to_json()).references[REAL] == scores.references[REAL]


def test_recall_of_answers_that_are_wrong_by_known_places():
    """Answer i is the true pose of row i + 7, so seven other poses are nearer to text i than its own, or nearly so."""
    shifted = np.roll(ANGLES, -7)
    (scores,) = Generation(ROWS, "toy", retriever=Judge(), recalls=(1, 5, 20)).score(answers(shifted))
    texts, poses = circle(ANGLES.astype(np.float32)), circle(shifted.astype(np.float32))
    ranks = [int((poses @ text > text @ pose + 1e-6).sum()) for text, pose in zip(texts, poses)]
    assert scores.values["R^T2P@5"].value == pytest.approx(100 * np.mean(np.array(ranks) < 5))
    assert 0 < scores.values["R^T2P@20"].value < 100
    assert scores.values["FID"].value == pytest.approx(0, abs=1e-6), "as a set they are the true poses"
    assert scores.values["R^T2P@20"].low < scores.values["R^T2P@20"].value < scores.values["R^T2P@20"].high
    assert scores.rank == "T2P rank"
    np.testing.assert_allclose(scores.samples["T2P rank"], np.array(ranks) + 1, atol=0.6)


def test_answers_without_a_pose_are_misses_and_counted():
    angles = [None if i % 10 == 0 else angle for i, angle in enumerate(ANGLES)]
    given = answers(angles)
    given[1] = dataclasses.replace(given[1], notes={"asked again": True})
    (scores,) = Generation(ROWS, "toy", retriever=Judge()).score(given)
    assert scores.counts == {NO_POSE: 4, "asked again": 1}
    assert scores.values["R^T2P@5"].value == scores.values["R^P2T@5"].value == 90
    assert scores.values["R-precision@1 (PoseScript)"].value == 90
    assert scores.values["FID"].value == pytest.approx(0, abs=1e-6)
    assert np.isnan(scores.samples["T2P rank"]).sum() == 4


def test_joints_that_the_data_did_not_measure_count_in_no_answer():
    measured = np.ones(52, bool)
    measured[FOOT] = False
    rows = [
        dataclasses.replace(each, poses=each.poses.replace(measured=each.poses.measured & measured)) for each in ROWS
    ]
    feet = [Answer(pose=bent(angle, foot=1.0)) for angle in ANGLES]
    unknown, known = (
        Generation(given, "toy", retriever=Judge(), recalls=(1,)).score(feet)[0].values["R^T2P@1"].value
        for given in (rows, ROWS)
    )
    assert unknown == 100
    assert known < 5


def test_the_caption_that_is_asked_is_the_one_that_judges():
    two = {"human": ("Nothing.", said(ANGLES[0])), "automatic": (said(0.5),)}
    several = [row(0, extras=two), row(1, extras={"automatic": (said(0.5),)}), row(2, extras={})]
    task = Generation(several, "toy", retriever=Judge())
    assert [caption.text for caption in task.captions] == [said(ANGLES[0]), said(0.5)]
    assert task.question(task.rows[0]).messages == several[0].messages[:1], "it holds the caption"
    assert task.question(task.rows[1]).messages[0]["content"].startswith(said(0.5)), "the row asks with another one"
    assert [each.id for each in task.rows] == ["row-0", "row-1"]
    assert task.settings == {"captions": "human-first"}
    asked = Generation(several, "toy", retriever=Judge(), captions="question")
    assert [caption.text for caption in asked.captions] == [said(ANGLES[i]) for i in range(3)]
    assert len(Generation(several, "toy", retriever=Judge(), captions="automatic").rows) == 2
    with pytest.raises(UserError, match=r"none of the 1 rows of toy .*captions=question"):
        Generation([row(0, extras={})], "toy", retriever=Judge())


def test_rows_with_images_or_without_poses_are_no_generation():
    image = {"type": "image", "image": np.zeros((8, 8, 3), np.uint8)}
    shown = row(1, messages=talk([image, {"type": "text", "text": said(ANGLES[1])}]))
    words = row(2, poses=Pose(np.zeros((0, 24, 3, 3), np.float32), "camera"), messages=talk("Hello.", "Good day."))
    assert [each.id for each in Generation([row(0), shown, words], "toy", retriever=Judge()).rows] == ["row-0"]


def test_spg_asks_the_complete_question_and_wants_a_retriever_of_questions():
    rows = [row(i, extras={"query": f"Someone feels an elbow {ANGLES[i]:.6f} today. How?"}) for i in range(COUNT)]
    rows = [dataclasses.replace(each, messages=talk(each.extras["query"])) for each in rows]
    task = SpeculativeGeneration(rows, "toy", retriever=Judge("query"))
    assert task.question(task.rows[3]).messages[0]["content"] == rows[3].extras["query"]
    (scores,) = task.score(answers(ANGLES))
    assert scores.values["R^T2P@5"].value == 100
    assert scores.table == "spg/toy"
    assert scores.facts["texts"] == "40 queries, one for each row"
    with pytest.raises(UserError, match=r"trained on captions of the kind 'human'.*other_retriever=true"):
        SpeculativeGeneration(rows, "toy", retriever=Judge("human"))
    (other,) = SpeculativeGeneration(rows, "toy", retriever=Judge("human"), other_retriever=True).score(answers(ANGLES))
    assert "'human'" in other.facts["retriever's fit"]
    assert (
        "does not say"
        in SpeculativeGeneration(rows, "toy", retriever=Judge(None)).score(answers(ANGLES))[0].facts["retriever's fit"]
    )
    with pytest.raises(UserError, match="trained on captions of the kind 'query'"):
        Generation(ROWS, "toy", retriever=Judge("query"))


def test_spg_leaves_out_rows_that_describe_the_pose():
    """The generated set has both kinds of rows in one split."""
    implied = row(1, extras={"query": "Someone feels an elbow today. How?"})
    assert [each.id for each in SpeculativeGeneration([row(0), implied], "toy", retriever=Judge("query")).rows] == [
        "row-1"
    ]
    with pytest.raises(UserError, match="texts=question"):
        SpeculativeGeneration([row(0)], "toy", retriever=Judge("query"))
    own = SpeculativeGeneration([row(0)], "toy", retriever=Judge("query"), texts="question")
    assert own.captions[0].text == row(0).messages[0]["content"]


def test_the_judge_is_not_the_one_that_rewarded():
    task = Generation(ROWS, "toy", retriever=Judge())
    task.check("other", {"model": {"reward": [{"retriever": "f9999"}]}})
    with pytest.raises(UserError, match=r"system 'trained' names the retriever 'known'.*another seed"):
        task.check("trained", {"model": {"reward": [{"retriever": "f1234"}]}})
    with pytest.raises(UserError, match="names the retriever"):
        Describe(ROWS, "toy", retriever=Judge()).check("trained", {"selected": "best of 8 by f1234"})
    Describe(ROWS, "toy").check("trained", {"selected": "best of 8 by f1234"})


def test_a_retriever_is_demanded_with_the_command_that_makes_one():
    with pytest.raises(UserError, match=r"retriever=FOLDER.*posescript train"):
        Generation(ROWS, "toy")
    with pytest.raises(UserError, match=r"posescript"):
        Generation(ROWS, "toy", retriever="/nowhere")


def test_describe_draws_poses_and_finds_them_by_the_words():
    task = Describe(ROWS, "toy", retriever=Judge(), size=64)
    question = task.question(task.rows[0])
    assert question.wants == "words"
    image, text = question.messages[0]["content"]
    assert text["text"] == "Describe the pose in words."
    pixels, straight = (np.asarray(task.question(task.rows[i]).messages[0]["content"][0]["image"]) for i in (0, 39))
    assert pixels.shape == (64, 64, 3) and (pixels != straight).any()
    np.testing.assert_array_equal(pixels, np.asarray(image["image"]))

    given = [Answer(said(angle)) for angle in ANGLES]
    (scores,) = task.score(given)
    assert scores.table == "describe/toy/captions"
    assert scores.values["BLEU-4"].value == pytest.approx(100)
    assert scores.values["ROUGE-L"].value == scores.values["R^T2P@5"].value == 100
    assert scores.references[TRUE]["R^T2P@5"].value == 100
    assert "drawings of the true poses: 40" in scores.facts["shown"]
    assert scores.facts["references"] == "1.00 per row, human captions, or automatic ones if there are none"

    given[::4] = [Answer(" ")] * 10
    (scores,) = task.score(given)
    assert scores.counts == {NO_WORDS: 10}
    assert scores.values["ROUGE-L"].value == scores.values["R^T2P@5"].value == scores.values["R^P2T@5"].value == 75
    assert scores.values["BLEU-4"].value < 75 + 1
    assert scores.references[TRUE]["R^T2P@5"].value == 100


def test_describe_uses_the_rows_own_images_and_all_references():
    image = {"type": "image", "image": np.full((8, 8, 3), 7, np.uint8)}
    content = [image, {"type": "text", "text": "What is the pose in SMPL?"}]
    pair = {"human": ("One arm.", "Another arm is up."), "automatic": ("No.",)}
    shown = row(0, kind="image", messages=talk(content), extras=pair)
    asked = row(
        1,
        kind="instruction",
        messages=talk([image, {"type": "text", "text": "Which posture?"}], "They sit."),
        extras={},
    )
    task = Describe([shown, asked, row(2, extras={}), row(3)], "toy")
    assert [each.id for each in task.rows] == ["row-0", "row-1", "row-3"]
    parts = task.question(shown).messages[-1]["content"]
    assert [part["type"] for part in parts] == ["image", "text"] and parts[0] is image
    assert parts[1]["text"] == "Describe the pose in words."
    assert task.question(asked).messages == asked.messages[:1]
    captions, words = task.score([Answer("Another arm is up."), Answer("They sit."), Answer("")])
    assert captions.facts["shown"] == "images of the rows: 1, drawings of the true poses: 1"
    assert captions.facts["references"] == "1.50 per row, human captions, or automatic ones if there are none"
    assert captions.facts["retriever"] == "none given, so the table has no recall"
    np.testing.assert_allclose(captions.samples["ROUGE-L"], [100, np.nan, 0])
    assert words.table == "describe/toy/answers" and words.values["ROUGE-L"].value == 100
    with pytest.raises(UserError, match="none of the 1 rows of toy can be described"):
        Describe([row(2, extras={})], "toy")


def test_with_a_retriever_of_the_package(tmp_path):
    from chatpose_jax.posescript.folder import write_folder
    from chatpose_jax.posescript.retriever import Retriever

    random = Retriever.random([said(angle) for angle in ANGLES])
    folder = write_folder(
        tmp_path / "judge", "retriever", random.model, random.tokens, random.pose_input, {"captions": "all"}
    )
    task = Generation(ROWS, "toy", retriever=str(folder))
    (scores,) = task.score(answers(ANGLES))
    for name, value in scores.references[REAL].items():
        assert scores.values[name].value == pytest.approx(value.value), (
            "true poses of another family and frame are the real ones"
        )
    assert scores.values["FID"].value < 1e-5
    assert scores.values["R^T2P@20"].value < 100, "it is not trained"
    (constant,) = task.score(answers([0.5] * COUNT))
    np.testing.assert_allclose(constant.values["R^T2P@10"].value, 25)
    assert constant.values["FID"].value > 1e-5


def test_the_command_asks_no_system_that_its_judge_has_rewarded(tmp_path, capsys):
    from chatpose_jax.cli.main import main
    from chatpose_jax.posescript.folder import write_folder
    from chatpose_jax.posescript.retriever import Retriever

    random = Retriever.random()
    folder = write_folder(tmp_path / "judge", "retriever", random.model, random.tokens, random.pose_input, {})
    mark = json.loads((folder / "config.json").read_text())["fingerprint"]
    here, asked = "tests.evaluation.given_systems", given_systems.Drawn.asked
    words = ["eval", "generation", "--data", "synthetic,tasks={'text': 1},test_size=6", "--set", f"retriever={folder}"]
    words += ["--drawings", "0", "--out", str(tmp_path / "out"), "--system"]
    assert main([*words, f"{here}:Rewarded,by='{mark}'"]) == 2
    assert "names the retriever 'judge'" in capsys.readouterr().err
    assert given_systems.Drawn.asked == asked
    assert main([*words, f"{here}:Rewarded,by=other"]) == 0
    assert given_systems.Drawn.asked == asked + 6
    (scores,) = json.loads((tmp_path / "out/generation/synthetic/rewarded/scores.json").read_text())["scores"]
    assert scores["facts"]["gallery"] == "6 pairs of text and pose" and set(scores["references"]) == {REAL}
    assert scores["values"]["R-precision@1 (UniPose)"]["value"] is None, "six pairs are no group of 32"
    assert REAL in capsys.readouterr().out


def test_of_a_prepared_data_set_rows_with_images_are_not_read():
    class Indexed(list):
        entries = np.array([(1, 0), (1, 1), (0, 0), (1, 0)], [("poses", "i4"), ("images", "i4")])

        def __getitem__(self, index):
            assert index in (0, 3)
            return super().__getitem__(index)

    assert [each.id for each in Generation(Indexed(ROWS[:4]), "toy", retriever=Judge()).rows] == ["row-0", "row-3"]
