"""Systems in closed form: what they answer on cases whose answer is known, on the generated set, and on a training split of full size."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax import named
from chatpose_jax.data import questions
from chatpose_jax.data.example import Example
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.poses import pose_errors, true_poses
from chatpose_jax.evaluation.system import SYSTEMS, Question
from chatpose_jax.evaluation.systems import simple
from chatpose_jax.evaluation.systems.simple import MeanPose, NearestText, RidgeRegression, grams
from smpl_jax import Pose, io, stack

TEXT = "synthetic,tasks={'text': 1}"


def system(key, /, **options):
    make = named.find("--system", key, SYSTEMS)
    named.check_options("--system", named.signature("--system", make), options)
    return make(**options)


def turned(*degrees):
    """(N, 24, 3, 3): joint 16 turned about z."""
    out = np.tile(np.eye(3, dtype=np.float32), (len(degrees), 24, 1, 1))
    out[:, 16] = Rotation.from_euler("z", np.array(degrees)[:, None], degrees=True).as_matrix()
    return out


def row(text, degrees, kind="text", **more):
    image = [{"type": "image", "image": np.zeros((2, 2, 3), np.uint8)}] if kind == "image" else []
    messages = [
        {"role": "user", "content": [*image, {"type": "text", "text": text}]},
        {"role": "assistant", "content": more.pop("answer", "<POSE>")},
    ]
    pose = Pose(turned(degrees), "camera", **more)
    return Example(f"{text}{degrees}", kind, messages, pose)


OWN = {}


def own(split):
    """The source of the tests below: the rows that a test puts into OWN."""
    return OWN[split]


def asked(*rows):
    return [Question.of(each) for each in rows]


def degrees(answers):
    angles = Rotation.from_matrix(np.stack([answer.pose.rotations[16] for answer in answers])).as_euler("xyz", True)
    return angles[:, 2].round(2).tolist()


def test_on_generated_descriptions_words_tell_far_more_than_the_mean(monkeypatch):
    monkeypatch.setattr(simple, "MOST", 1024)  # the equations take most of the time
    body, val = io.load_body(), SyntheticDataset("val", 60, tasks={"text": 1})[:]
    errors = {}
    for name in ("mean", "nearest", "ridge"):
        answers = system(name, data=TEXT, rows=400).answer(asked(*val))
        errors[name] = pose_errors(stack([answer.pose for answer in answers]), true_poses(val), body)
    assert errors["ridge"]["pa_mpjpe"] < 0.65 * errors["mean"]["pa_mpjpe"]
    assert errors["nearest"]["mpjpe"] < errors["mean"]["mpjpe"]


def test_nearest_by_jaccard_over_all_n_grams():
    texts = ["the left arm is up", "the right arm is up", "both arms hang down", ""]
    model = NearestText(texts, turned(10, 20, 30, 40))
    for text in ("The right arm is up!", "arms hang", "left arm up and the right arm is not up"):
        a = grams(text)
        shares = [len(a & grams(t)) / len(a | grams(t)) for t in texts]
        expected = turned(10, 20, 30, 40)[int(np.argmax(shares))]
        np.testing.assert_array_equal(model.answer([text])[0], expected)
    np.testing.assert_allclose(model.answer(["nobody", ""]), MeanPose(texts, turned(10, 20, 30, 40)).answer(["", ""]))


def test_ridge_equals_the_kernel_form():
    """With all n-grams, the primal solution is that of the N x N kernel."""
    rng = np.random.default_rng(0)
    words = np.array(["up", "down", "left", "right", "arm", "leg"])
    texts = [" ".join(rng.choice(words, 5)) for _ in range(40)]
    poses = turned(*rng.uniform(-60, 60, 40))
    columns = sorted({g for t in texts for g in grams(t)})
    x, y = ([[float(c in grams(t)) for c in columns] for t in part] for part in (texts, ["left arm up", "leg"]))
    x, y, mean = np.array(x), np.array(y), poses.mean(0)
    found = np.linalg.solve(x @ x.T + 10 * np.eye(40), (poses - mean).reshape(40, -1))
    u, _, vt = np.linalg.svd(mean + (y @ x.T @ found).reshape(-1, 24, 3, 3))
    np.testing.assert_allclose(RidgeRegression(texts, poses).answer(["left arm up", "leg"]), u @ vt, atol=2e-6)


def test_a_question_is_answered_from_rows_of_its_kind(monkeypatch):
    caption = questions.TEXT_TO_POSE[3].format(caption="Arms up.")
    rows = [row(caption, 40), row("Say more.", 0, answer="No."), row("Which pose?", 10, "image")]
    monkeypatch.setitem(OWN, "train", rows)
    mean = system("mean", data=f"{__name__}:own")
    assert degrees(mean.answer(asked(rows[0], rows[2]))) == [40, 10]
    assert degrees(mean.answer(asked(row("?", 0, "instruction")))) == [25], "no such rows: the mean of all"
    assert mean.settings["rows"] == 2 and mean.note.startswith("computed from 2 training rows of ")
    nearest = system("nearest", data=f"{__name__}:own", name="words")
    assert nearest.name == "words"
    assert degrees(nearest.answer(asked(row("Please make a pose from the words: Arms up.", 0)))) == [40]


def test_joints_that_a_row_does_not_measure_count_as_the_mean(monkeypatch):
    measured = np.ones((1, 24), bool)
    measured[:, 16] = False
    monkeypatch.setitem(OWN, "train", [row("a", 30), row("b", 50), row("c", -170, measured=measured)])
    assert degrees(system("mean", data=f"{__name__}:own").answer(asked(row("", 0)))) == [40]
    answer = system("nearest", data=f"{__name__}:own").answer(asked(row("c", 0)))
    assert degrees(answer) == [40] and answer[0].pose.measured is None


def test_settings_tell_training_rows_apart(monkeypatch):
    rows = [row(str(i), i) for i in range(30)]
    monkeypatch.setitem(OWN, "train", rows)
    first, again, other = (system("mean", data=f"{__name__}:own", rows=10, seed=s).settings for s in (0, 0, 1))
    assert first == again and first["trained_on"] != other["trained_on"] and first["rows"] == 10


def test_rows_without_poses_and_bad_options_are_errors(monkeypatch):
    monkeypatch.setitem(OWN, "train", [row("a", 0, answer="No.")])
    with pytest.raises(UserError, match=r"mean pose: the training rows of .*own' have no poses"):
        system("mean", data=f"{__name__}:own")
    with pytest.raises(UserError, match="rows must be a whole number of at least 1"):
        system("ridge", rows=0)
    with pytest.raises(UserError, match="has no option 'row'"):
        system("ridge", row=3)


FULL = """
import resource, numpy as np
from chatpose_jax.evaluation.systems.simple import NearestText, RidgeRegression

random, chance = np.random.default_rng(0), 1 / np.arange(1, 1501)
drawn = random.choice(1500, (14_000, 60), p=chance / chance.sum())
texts = [" ".join(f"w{n}" for n in each) for each in drawn]
poses = np.tile(np.eye(3, dtype=np.float32), (14_000, 24, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest = NearestText(texts, poses)
nearest.answer(texts[:20])
columns = len(nearest.columns)
del nearest
RidgeRegression(texts, poses).answer(texts[:20])
print(columns, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_for_a_training_split_of_full_size():
    """14 000 texts of 60 words. As a matrix, even of single bytes, their n-grams would take 21 GiB; here all takes 0.6."""
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=True)
    columns, mebibytes = done.stdout.split()
    assert int(columns) > 1_000_000
    assert float(mebibytes) < 1024
