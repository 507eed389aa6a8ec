"""Which answers are drawn, and what is drawn of them."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.evaluation.gallery import PANEL, chosen, draw_panels, write_gallery
from chatpose_jax.evaluation.results import DrawnAnswer
from chatpose_jax.evaluation.scores import Scores, Value
from chatpose_jax.evaluation.system import Answer, Question
from smpl_jax import PosedBody, load_body, stack

GAP = 4


@pytest.fixture(scope="module")
def body():
    return load_body()


def rows(count, task="text"):
    return SyntheticDataset("test", count, tasks={task: 1})[:count]


def panel(image, number):
    return image[GAP : GAP + PANEL, GAP + (PANEL + GAP) * number :][:, :PANEL].astype(int)


def test_best_median_and_worst_are_chosen_by_value_and_order():
    values = np.array([5.0, np.nan, 1.0, 4.0, 3.0, 2.0, 1.0])
    assert chosen(values, False, 1) == [("best", 2), ("median", 5), ("worst", 0)]
    assert chosen(values, True, 2) == [
        ("best", 0),
        ("best", 3),
        ("median", 4),
        ("median", 5),
        ("worst", 6),
        ("worst", 2),
    ]
    assert chosen(np.array([np.nan, 7.0]), False, 3) == [("best", 1)]
    assert chosen(np.array([2.0, 1.0]), False, 3) == [("best", 1), ("worst", 0)]
    assert chosen(np.full(3, np.nan), False, 3) == [] and chosen(values, False, 0) == []


def test_the_truth_stands_beside_the_answer_and_the_image(body):
    for task, images in (("text", 0), ("image", 1)):
        row = rows(1, task)[0]
        drawn = draw_panels(row, Answer(pose=row.poses[0]), body)
        assert drawn.shape[1] == (images + 2) * (PANEL + GAP) + GAP and drawn.dtype == np.uint8
        truth, answer = panel(drawn, images), panel(drawn, images + 1)
        assert np.abs(truth - answer).mean() < 2, "the same body"
        assert (truth < 200).any()


def test_an_answer_without_pose_or_with_joints_alone_is_drawn(body):
    row = rows(1)[0]
    nothing = draw_panels(row, Answer(text="I see nobody."), body)
    assert len(np.unique(panel(nothing, 1)[: PANEL // 3])) == 1, "a plain panel that says so"
    joints = PosedBody(row.poses[0], body).joints[:24]
    lines = draw_panels(row, Answer(joints={"smpl24": joints}), body)
    assert np.abs(panel(lines, 1) - panel(nothing, 1)).mean() > 10
    upside_down = draw_panels(row, Answer(joints={"smpl24": joints * [1, -1, 1]}), body)
    np.testing.assert_allclose(panel(lines, 1)[::-1].mean(2), panel(upside_down, 1).mean(2), atol=160)
    ink = [np.argwhere(panel(image, 1).mean(2) < 200)[:, 0].mean() for image in (lines, upside_down)]
    assert abs(sum(ink) - PANEL) < 4, "mirrored about the middle"


def test_betas_and_place_of_an_answer_do_not_matter(body):
    row = rows(1)[0]
    pose = row.poses[0]
    far = pose.replace(
        betas=np.full(10, 4.0, np.float32), translation=np.array([9, 9, 9], np.float32), shape_space="SMPL"
    )
    images = [draw_panels(row, Answer(pose=each), body) for each in (pose, far)]
    np.testing.assert_array_equal(*images)


def test_answers_in_words_are_not_drawn_as_missing(tmp_path, body):
    examples = rows(3)
    questions = [Question.of(row) for row in examples]
    table = Scores("a", "A", {}, {}, {"BLEU-4": np.array([0.1, 0.5, 0.3])}, rank="BLEU-4", better="higher")
    said = [Answer(f"words {i}") for i in range(3)]
    shown = write_gallery(tmp_path, examples, questions, said, [table], body, each=1)
    assert [each.answer for each in shown] == ["words 1", "words 2", "words 0"]
    with Image.open(tmp_path / shown[0].image) as image:
        assert image.width == PANEL + 2 * GAP, "the true body alone"
    shown = write_gallery(
        tmp_path, examples, questions, [*said[:2], Answer(pose=examples[2].poses[0])], [table], body, each=1
    )
    with Image.open(tmp_path / shown[2].image) as image:
        assert image.width == 2 * (PANEL + GAP) + GAP, "a system that answers with poses lacks one here"


def test_of_several_people_the_one_that_was_asked_for_is_drawn(body):
    first, second = rows(2)
    poses = stack([first.poses[0], second.poses[0]])
    boxes = np.array([[0.0, 0, 50, 90], [100, 0, 50, 90]])
    row = dataclasses.replace(second, extras={"bbox": boxes[1] + 2})
    drawn = draw_panels(row, Answer(pose=poses, boxes=boxes), body)
    np.testing.assert_array_equal(drawn, draw_panels(row, Answer(pose=poses[1]), body))
    nobody = dataclasses.replace(row, extras={"bbox": boxes[1] + 500})
    np.testing.assert_array_equal(
        draw_panels(nobody, Answer(pose=poses, boxes=boxes), body), draw_panels(nobody, Answer(), body)
    )


def test_a_gallery_is_files_that_the_report_reads(tmp_path, body):
    examples = rows(6)
    examples = [row if i else row.__class__(**{**vars(row), "id": "../../ä b/<i>"}) for i, row in enumerate(examples)]
    questions = [Question.of(row) for row in examples]
    answers = [Answer(f"answer {i}", row.poses[0]) for i, row in enumerate(examples)]
    values = {"PA-MPJPE": Value(1.0, unit="mm")}
    samples = {"PA-MPJPE": np.arange(6.0)}
    tables = [
        Scores("a", "A", {}, values, samples, rank="PA-MPJPE"),
        Scores("b", "B", {}, values, samples, rank="PA-MPJPE", better="higher"),
        Scores("c", "C", {}, values, samples),
    ]
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery/old.png").write_bytes(b"")
    shown = write_gallery(tmp_path, examples, questions, answers, tables, body, each=1)
    assert [(each.table, each.place, each.answer) for each in shown] == [
        *[("a", *rest) for rest in (("best", "answer 0"), ("median", "answer 2"), ("worst", "answer 5"))],
        *[("b", *rest) for rest in (("best", "answer 5"), ("median", "answer 3"), ("worst", "answer 0"))],
    ]
    assert shown[0].question == examples[0].messages[0]["content"] and shown[0].unit == "mm" and shown[0].value == 0
    assert [DrawnAnswer(**each) for each in json.loads((tmp_path / "gallery.json").read_text())] == shown
    images = {each.image for each in shown}
    assert {f"gallery/{path.name}" for path in (tmp_path / "gallery").iterdir()} == images and len(images) == 4
    with Image.open(tmp_path / shown[0].image) as image:
        assert image.width == 2 * (PANEL + GAP) + GAP
    before = {name: (tmp_path / name).read_bytes() for name in images}
    write_gallery(tmp_path, examples, questions, answers, tables, body, each=1)
    assert before == {name: (tmp_path / name).read_bytes() for name in images}
