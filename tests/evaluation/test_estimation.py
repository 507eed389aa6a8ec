"""Pose estimation by protocols A, B, C and D, against versions that are written here from their descriptions, in float64 with SciPy, a sample at a
time. The bodies are small ones in the format of SMPL's files.
"""

import pickle

import numpy as np
import pytest

from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation import protocols
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.estimation import Estimation
from smpl_jax import Pose, io, joints
from smpl_jax.metrics import pose_metrics
from smpl_jax.pose import stack

from ..smpl.models import random_arrays
from .small_smpl import SEEDS, matrices, smpl, write

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation
COUNT = 12
LSP14 = [6, 5, 4, 1, 2, 3, 16, 15, 14, 11, 12, 13, 8, 10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("smpl"))


def axis_angles(rng, scale=0.5):
    return rng.normal(0, scale, (COUNT, 24, 3))


def flags(*missing):
    found = np.ones(24, bool)
    found[list(missing)] = False
    return found


@pytest.fixture(scope="module")
def data():
    """Truths as of 3DPW, with what 3dpw_test has too."""
    rng = np.random.default_rng(7)
    rotations = matrices(axis_angles(rng))
    return [
        Example(
            f"downtown/image_{i:05d}.jpg#0",
            "image",
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<POSE>"}],
            Pose(rotations[i][None], "camera", measured=flags(10, 11, 22, 23)[None]),
            extras={
                "gender": ("male", "female")[i % 2],
                "betas": rng.normal(0, 1, 10).astype(np.float32),
                "detected": i != 3,
                "actor": i % 3,
                "keypoints_3d": np.concatenate([rng.normal(0, 0.4, (44, 3)), np.ones((44, 1))], 1),
            },
            group=f"sequence{i // 3}",
        )
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def answers(data):
    """Near the truth, with betas."""
    rng = np.random.default_rng(8)
    near = matrices(axis_angles(rng, 0.3))
    return [
        Answer("", Pose(row.poses.rotations[0] @ turned, "camera", betas=rng.normal(0, 1, 10).astype(np.float32)))
        for row, turned in zip(data, near)
    ]


# The descriptions, apart from the package's code --------------------------------------------------------------------------------------------


def procrustes(source, target):
    """Moved points, and the rotation: SciPy's solution of Wahba's problem, then the best scale."""
    x, y = source - source.mean(0), target - target.mean(0)
    if not np.abs(x).sum():
        return np.tile(target.mean(0), (len(target), 1)), np.eye(3)
    rotation = Rotation.align_vectors(y, x)[0].as_matrix()
    turned = x @ rotation.T
    return (turned * y).sum() / (x * x).sum() * turned + target.mean(0), rotation


def in_mm(a, b):
    return 1000 * np.linalg.norm(a - b, axis=-1).mean()


def degrees(a, b):
    return np.degrees(Rotation.from_matrix(np.asarray(a).swapaxes(-1, -2) @ np.asarray(b)).magnitude())


def expected_rotations(answer, row, measured):
    a, b = np.asarray(answer.pose.rotations, np.float64), np.asarray(row.poses.rotations[0], np.float64)
    joints = [j for j in range(1, 24) if measured[j]]
    few = [j for j in joints if j < 22]
    return {
        "MPJRE": 100 * np.abs(a - b)[joints].mean(),
        "MPJRE-21": 100 * np.abs(a - b)[few].mean(),
        "angle": degrees(a, b)[joints].mean(),
        "root angle": degrees(a, b)[0],
    }


def scored(task, answers):
    (found,) = task.score(answers)
    return found


def compare(found, expected, rows=range(COUNT)):
    for name, values in expected.items():
        np.testing.assert_allclose(found.samples[name][list(rows)], values, atol=3e-3, rtol=0, err_msg=name)
        assert found.values[name].value == pytest.approx(np.mean(values), abs=3e-3)


@pytest.mark.parametrize("name", ["A", "A-hips"])
@pytest.mark.parametrize("betas", ["own", "zero"])
def test_protocol_a(folder, data, answers, name, betas):
    regressor = np.load(folder / "J_regressor_h36m.npy")
    expected = {"MPJPE": [], "PA-MPJPE": []}
    for row, answer in zip(data, answers):
        truth = regressor @ smpl(row.extras["gender"], row.poses.rotations[0], row.extras["betas"])[1]
        found = (
            regressor @ smpl("neutral", answer.pose.rotations, answer.pose.betas if betas == "own" else np.zeros(10))[1]
        )
        middle = [side[0] if name == "A" else (side[LSP14[2]] + side[LSP14[3]]) / 2 for side in (found, truth)]
        expected["MPJPE"].append(in_mm((found - middle[0])[LSP14], (truth - middle[1])[LSP14]))
        expected["PA-MPJPE"].append(in_mm(procrustes(found[LSP14], truth[LSP14])[0], truth[LSP14]))
    task = Estimation(data, "3dpw", protocols=name, smpl=str(folder), betas=betas)
    found = scored(task, answers)
    compare(found, expected)
    rule = "0" if betas == "zero" else "those of the answer, or 0"
    assert found.facts["betas"] == f"{rule}; predicted poses on the neutral SMPL"
    assert found.facts["protocol"] == name
    assert found.facts["interval"].startswith("95 % bootstrap over 4 sequences")


def test_protocol_b(folder, data, answers):
    regressor = pickle.loads((folder / "SMPL_to_J19.pkl").read_bytes())
    points = [*range(25, 38), 43]
    expected = {"MPJPE": [], "PA-MPJPE": []}
    for row, answer in zip(data, answers):
        truth = row.extras["keypoints_3d"][:, :3]
        found = np.zeros((44, 3))
        found[25:] = regressor @ smpl("neutral", answer.pose.rotations, answer.pose.betas)[1]
        expected["MPJPE"].append(in_mm((found - found[39])[points], (truth - truth[39])[points]))
        expected["PA-MPJPE"].append(in_mm(procrustes(found[points], truth[points])[0], truth[points]))
    compare(scored(Estimation(data, "3dpw_test", protocols="B", smpl=str(folder)), answers), expected)


@pytest.mark.parametrize("name, count", [("C", 24), ("C22", 22)])
def test_protocol_c(data, answers, folder, name, count):
    expected = {"MPJPE": [], "PA-MPJPE": []}
    for row, answer in zip(data, answers):
        truth, found = (
            smpl("female", r, np.zeros(10))[0][:count] for r in (row.poses.rotations[0], answer.pose.rotations)
        )
        expected["MPJPE"].append(in_mm(found - found[0], truth - truth[0]))
        expected["PA-MPJPE"].append(in_mm(procrustes(found, truth)[0], truth))
    found = scored(Estimation(data, "3dpw", protocols=name, body=str(folder / "SMPL_FEMALE.pkl")), answers)
    compare(found, expected)
    assert found.facts["betas"] == "0 for true and predicted poses"
    assert not found.counts
    male = scored(Estimation(data, "3dpw", protocols=name, body=str(folder / "SMPL_MALE.npz")), answers)
    apart = {fact for fact in found.facts if found.facts[fact] != male.facts[fact]}
    assert apart == {"ground truth"}, "both bodies are called smpl, and their rows must not be taken for comparable"


def test_protocol_d(folder, data, answers):
    from scipy.integrate import quad

    zero, near = (
        5,
        range(6, COUNT),
    )  # a submission of zeros for one frame, and frames with errors on both sides of 50 mm
    rng, given = np.random.default_rng(9), []
    for i, answer in enumerate(answers):
        joints, _, turns = smpl("neutral", answer.pose.rotations, answer.pose.betas)
        if i in near:
            true = smpl(data[i].extras["gender"], data[i].poses.rotations[0], data[i].extras["betas"])[0]
            joints = true + rng.normal(0, 0.02, (24, 3))
        joints = joints * 0 if i == zero else joints
        orientations = turns[[0, 1, 2, 4, 5, 16, 17, 18, 19]]
        given.append(Answer("", None, {"smpl24": joints, "orientations9": orientations.reshape(27, 3)}))
    major, oriented = [1, 2, 4, 5, 7, 8, *range(16, 22)], [0, 1, 2, 4, 5, 16, 17, 18, 19]
    expected = {name: [] for name in ("MPJPE", "PA-MPJPE", "PCK@50", "AUC", "MPJAE", "MPJAE-PA")}
    rows = [i for i in range(COUNT) if i != 3]
    every, steps = [], np.linspace(0, 1, 200)
    for i in rows:
        truth, _, turns = smpl(data[i].extras["gender"], data[i].poses.rotations[0], data[i].extras["betas"])
        found = given[i].joints["smpl24"] - given[i].joints["smpl24"][0]
        truth = truth - truth[0]
        errors = 1000 * np.linalg.norm(found - truth, axis=-1)
        moved, rotation = procrustes(found, truth)
        expected["MPJPE"].append(errors.mean())
        expected["PA-MPJPE"].append(in_mm(moved, truth))
        expected["PCK@50"].append(100 * (errors[major] <= 50).mean())
        thresholds = np.arange(200.0)
        curve = [(errors[major] <= t).mean() for t in thresholds]
        expected["AUC"].append(
            quad(lambda x, curve=curve: np.interp(x, steps, curve), 0, 1, points=steps[1:-1], limit=500)[0]
        )
        stated = given[i].joints["orientations9"].reshape(9, 3, 3)
        expected["MPJAE"].append(degrees(stated, turns[oriented]).mean())
        expected["MPJAE-PA"].append(degrees(rotation @ stated, turns[oriented]).mean())
        every.append(errors[major])
    found = scored(Estimation(data, "3dpw", protocols="D", smpl=str(folder)), given)
    compare(found, expected, rows)
    assert np.isnan(found.samples["MPJPE"][3]), "nobody was detected there"
    assert found.counts["frames without detected keypoints, which the protocol leaves out"] == 1
    assert found.facts["samples"] == "11 of 12"
    assert "12 tracks of persons" in found.facts["tracks"]
    # the mean of the samples' areas is the area of the mean curve, which is what the official script integrates
    curve = [np.mean([(errors <= t).mean() for errors in every]) for t in range(200)]
    assert found.values["AUC"].value == pytest.approx(np.trapezoid(curve) / 199, abs=1e-6)
    assert all(np.isnan(found.samples[name]).all() for name in protocols.ROTATIONS)
    assert found.counts["positions but not all of the compared rotations"] == 11
    # and from poses, positions and orientations are those of the neutral body
    posed = scored(Estimation(data, "3dpw", protocols="D", smpl=str(folder)), answers)
    for name in ("MPJPE", "AUC", "MPJAE", "MPJAE-PA"):
        keep = [i for i in rows if i != zero and i not in near]
        np.testing.assert_allclose(posed.samples[name][keep], found.samples[name][keep], atol=3e-3)


def test_rotations(data, answers):
    for unmeasured, counted in (("left out", flags(10, 11, 22, 23)), ("counted", flags())):
        expected = [expected_rotations(answer, row, counted) for row, answer in zip(data, answers)]
        found = scored(Estimation(data, "rows", unmeasured=unmeasured), answers)
        compare(found, {name: [each[name] for each in expected] for name in protocols.ROTATIONS})
        words = "compared at the joints that the data measured, 19 of 23"
        assert (found.facts["rotations"] == words) == (unmeasured == "left out")
    near = [Answer("", Pose(row.poses.rotations[0], "camera")) for row in data]
    found = scored(Estimation(data, "rows"), near)
    assert all(found.values[name].value == pytest.approx(0, abs=2e-4) for name in protocols.ROTATIONS)


def test_protocol_c_is_what_evaluation_of_models_reports(data, answers):
    """``smpl_jax.metrics.pose_metrics``, also of poses of other families and frames, and rows of which little was measured."""
    body = io.load_body()
    rows = list(data)
    rows[0] = Example("x", "image", [], rows[0].poses.replace(measured=flags(*range(4, 24))[None]))
    rows[1] = Example("y", "image", [], rows[1].poses.replace(measured=flags(0, 22, 23)[None]))
    given = [answer.pose.replace(betas=None) for answer in answers]
    turned = [pose.replace(rotations=pose.rotations[:22]) for pose in given]
    names = {"MPJPE": "mpjpe", "PA-MPJPE": "pa_mpjpe", "MPJRE": "mpjre", "angle": "geodesic_degrees"}
    for poses in (given, turned):
        truth = stack([row.poses[0] for row in rows])
        expected = pose_metrics(stack(poses), truth, body)
        found = scored(Estimation(rows, "rows"), [Answer("", pose) for pose in poses])
        for ours, theirs in names.items():
            np.testing.assert_allclose(found.samples[ours], expected[theirs], rtol=1e-4, atol=1e-3, err_msg=ours)
    assert np.isnan(found.samples["MPJPE"][1])
    assert np.isfinite(found.samples["PA-MPJPE"][1]), "the root was not measured, which matters to MPJPE alone"
    model = np.diag([1.0, -1, -1]).astype(np.float32)
    other = given[2].replace(
        frame="model", rotations=np.concatenate([model @ given[2].rotations[:1], given[2].rotations[1:]])
    )
    again = scored(Estimation(rows, "rows"), [Answer("", pose) for pose in [*given[:2], other, *given[3:]]])
    first = scored(Estimation(rows, "rows"), [Answer("", pose) for pose in given])
    np.testing.assert_allclose(again.samples["root angle"], first.samples["root angle"], atol=1e-3)


def test_positions_instead_of_poses(folder, data, answers):
    """What HMR2 and SPIN write beside their poses gives what the poses give, without rotations; and no body file is needed for it."""
    regressor = np.load(folder / "J_regressor_h36m.npy")
    order = [0, 4, 5, 6, 1, 2, 3, *range(7, 17)]  # Human3.6M has the right leg first, the regressor the left one
    given = [
        Answer("", None, {"h36m17": (regressor @ smpl("neutral", answer.pose.rotations, answer.pose.betas)[1])[order]})
        for answer in answers
    ]
    task = Estimation(data, "3dpw", protocols="A", smpl=str(folder))
    ours, theirs = scored(task, given), scored(task, answers)
    for name in ("MPJPE", "PA-MPJPE"):
        np.testing.assert_allclose(ours.samples[name], theirs.samples[name], atol=3e-3)
    assert np.isnan(ours.values["MPJRE"].value)
    points = [Answer("", None, {"humans44": row.extras["keypoints_3d"][:, :3] + 1}) for row in data]
    bare = [
        Example(row.id, "image", [], row.poses.replace(measured=np.zeros((1, 24), bool)), row.extras) for row in data
    ]
    found = scored(Estimation(bare, "h36m_val_p2", protocols="B"), points)
    assert found.values["MPJPE"].value == pytest.approx(0, abs=1e-6)
    assert not set(protocols.ROTATIONS) & set(found.values), "there are no rotations in this data"
    assert found.facts["rotations"] == "the data has none"
    with pytest.raises(UserError, match=r"h36m17 must have the shape \(17, 3\), found \(16, 3\)"):
        task.score([Answer("", None, {"h36m17": np.zeros((16, 3))})] * COUNT)


def test_answers_without_a_pose_are_counted(data, answers):
    given = [*answers[:4], Answer("I cannot tell."), *answers[5:]]
    found = scored(Estimation(data, "rows"), given)
    assert found.counts == {"no pose and no positions in the answer": 1}
    assert found.facts["samples"] == "11 of 12"
    whole = scored(Estimation(data, "rows"), answers)
    np.testing.assert_array_equal(np.delete(found.samples["MPJPE"], 4), np.delete(whole.samples["MPJPE"], 4))
    assert np.isnan(found.samples["MPJPE"][4])


def test_which_protocols_a_data_set_takes(folder, data, answers):
    task = Estimation(data, "3dpw", smpl=str(folder))
    assert [found.facts["protocol"] for found in task.score(answers)] == ["A", "C", "D"]
    found = scored(Estimation(data, "3dpw-val-200"), answers)
    assert found.facts["protocol"] == "C"
    bodies = ", ".join(f"SMPL_{gender}.pkl or SMPL_{gender}.npz" for gender in ("MALE", "FEMALE", "NEUTRAL"))
    assert found.facts["left out"] == f"A, which needs {bodies}, J_regressor_h36m.npy; D, which needs {bodies}"
    with pytest.raises(
        UserError,
        match=r"SMPL_MALE.pkl or SMPL_MALE.npz, .*J_regressor_h36m.npy: needed.*licence: SMPL's own.*--set smpl=FOLDER",
    ):
        Estimation(data, "3dpw", protocols="A,C")
    with pytest.raises(UserError, match=r"SMPL_NEUTRAL.npz, SMPL_to_J19.pkl: needed.*smplify.*4dhumans"):
        Estimation(data, "h36m_val_p2")
    with pytest.raises(UserError, match=r"SMPL_NEUTRAL.pkl or SMPL_NEUTRAL.npz: needed"):
        Estimation(data, "h36m_val_p2", protocols="B").score(answers)
    with pytest.raises(UserError, match="expected some of A, A-hips, B, C, C22, D; found 'E'"):
        Estimation(data, "3dpw", protocols="E")
    plain = [Example(row.id, "image", row.messages, row.poses) for row in data]
    with pytest.raises(UserError, match="protocol D needs gender, betas, detected in the extras"):
        Estimation(plain, "mine", protocols="D", smpl=str(folder))
    words = Example("z", "text", plain[0].messages, plain[0].poses)
    task = Estimation([words, *plain], "mine")
    assert [row.id for row in task.rows] == [row.id for row in plain]
    with pytest.raises(UserError, match="no row of mine shows an image and has a pose"):
        Estimation([words], "mine")
    assert (task.question(plain[0]).key, task.question(plain[0]).wants) == (plain[0].id, "pose")


def test_damaged_files_are_named(tmp_path, folder, data, answers):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(tmp_path / "J_regressor_h36m.npy", np.zeros((17, 100)))
    with pytest.raises(
        UserError, match=r"J_regressor_h36m.npy: expected numbers of shape \(17, 200\).*found float64 \(17, 100\)"
    ):
        Estimation(data, "3dpw", protocols="A", smpl=str(tmp_path)).score(answers)
    swapped = np.load(folder / "J_regressor_h36m.npy")
    swapped[1:7] = 0  # the left leg at vertices farther right than those of the right leg, on each of the bodies
    sides = np.mean([random_arrays(seed=seed)["v_template"][:, 0] for seed in SEEDS.values()], 0)
    swapped[1:4, sides.argmin()] = swapped[4:7, sides.argmax()] = 1
    np.save(tmp_path / "J_regressor_h36m.npy", swapped)
    with pytest.raises(UserError, match="left and right change places in this regressor"):
        Estimation(data, "3dpw", protocols="A", smpl=str(tmp_path)).score(answers)
    (tmp_path / "J_regressor_h36m.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"J_regressor_h36m.npy"):
        Estimation(data, "3dpw", protocols="A", smpl=str(tmp_path)).score(answers)
    (tmp_path / "SMPL_FEMALE.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"SMPL_FEMALE.pkl tries to run os.system"):
        Estimation(data, "3dpw", protocols="A", smpl=str(tmp_path))


def test_what_a_table_cannot_compare_is_counted(folder, data, answers):
    other = answers[0].pose.replace(shape_space="SMPL-X")
    task = Estimation(data, "3dpw", protocols="A", smpl=str(folder))
    found = scored(task, [Answer("", other), *answers[1:]])
    assert found.counts == {"betas of another body than SMPL, replaced by 0": 1}
    plain = scored(task, [Answer("", answers[0].pose.replace(betas=None)), *answers[1:]])
    np.testing.assert_array_equal(found.samples["MPJPE"], plain.samples["MPJPE"])
    assert not plain.counts
    points = Answer("", None, {"smpl24": np.random.default_rng(0).normal(size=(24, 3))})
    found = scored(Estimation(data, "3dpw", protocols="C"), [points, *answers[1:]])
    words = (
        "no pose, only positions, which are of the system's own body",
        "positions but not all of the compared rotations",
    )
    assert found.counts == dict.fromkeys(words, 1)
    assert np.isnan(found.samples["MPJRE"][0])
    assert np.isfinite(found.samples["MPJPE"][0])
    found = scored(Estimation(data, "3dpw", protocols="A", smpl=str(folder)), [points, *answers[1:]])
    assert found.counts == {"no pose, and positions of other points than the protocol compares": 1}
    parts = answers[1].pose.replace(measured=flags(5))
    found = scored(Estimation(data, "3dpw", protocols="C"), [answers[0], Answer("", parts), *answers[2:]])
    assert found.counts == {"no pose and no positions in the answer": 1}
    toes = answers[1].pose.replace(measured=flags(10))
    found = scored(Estimation(data, "3dpw", protocols="C"), [answers[0], Answer("", toes), *answers[2:]])
    assert not found.counts, "toes hold no other joint, and 3DPW did not measure them"


def test_a_body_of_another_family(tmp_path, data, answers):
    """SMPL-X shares SMPL's first 22 joints, which are compared; its fingers are straight on both sides."""
    arrays = random_arrays("smplx", seed=4)
    np.savez(tmp_path / "SMPLX_NEUTRAL.npz", **arrays)
    body = io.load_body(tmp_path / "SMPLX_NEUTRAL.npz")
    found = scored(Estimation(data, "rows", body=str(tmp_path / "SMPLX_NEUTRAL.npz")), answers)
    assert found.facts["protocol"] == "C22"
    for i in (0, 5):
        sides = []
        for rotations in (answers[i].pose.rotations, data[i].poses.rotations[0]):
            whole = np.concatenate([rotations[:22], np.tile(np.eye(3, dtype=np.float32), (33, 1, 1))])
            points = np.asarray(joints(body, whole), np.float64)[:22]
            sides.append(points - points[0])
        assert found.samples["MPJPE"][i] == pytest.approx(in_mm(*sides), abs=1e-3)
    with pytest.raises(UserError, match=r"has 55; --set protocols=C22"):
        Estimation(data, "rows", protocols="C", body=str(tmp_path / "SMPLX_NEUTRAL.npz"))
    fewer = random_arrays(seed=4)
    for name, axis in (("weights", 1), ("J_regressor", 0), ("kintree_table", 1)):
        fewer[name] = fewer[name].take(range(20), axis)
    fewer["posedirs"] = fewer["posedirs"][..., : 9 * 19]
    np.savez(tmp_path / "odd.npz", **fewer)
    with pytest.raises(UserError, match=r"odd.npz: expected a number of joints of .*found 20"):
        Estimation(data, "rows", body=str(tmp_path / "odd.npz"))
