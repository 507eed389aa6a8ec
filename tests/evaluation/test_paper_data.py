"""The tasks on rows of the real files' layouts: what the readers keep is what the protocols need."""

import numpy as np
import pytest

from chatpose_jax.data.readers.humans4d_eval import H36MVal, ThreeDPWTest
from chatpose_jax.data.readers.rpe import RpeRefined
from chatpose_jax.data.readers.threedpw import ThreeDPW
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.evaluation.system import Answer
from chatpose_jax.evaluation.tasks.estimation import Estimation
from chatpose_jax.evaluation.tasks.rpe import ReasonedEstimation

from ..data.readers import humans4d_eval_files, rpe_files, threedpw_files
from .small_smpl import matrices, smpl, write

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("smpl"))


def rows_of(reader):
    """As a prepared folder gives them."""
    records = [item for part in reader.parts("test") for item in reader.read("test", part)]
    return [from_bytes(to_bytes(item)).example() for item in records if isinstance(item, Record)]


def true_answers(rows):
    return [Answer("", row.poses[0]) for row in rows]


def test_3dpw(tmp_path, folder):
    made = threedpw_files.write(tmp_path, threedpw_files.sequence())
    made["poses2d"][1][2] = 0
    threedpw_files.write(tmp_path, made)
    rows = rows_of(ThreeDPW(tmp_path, size=32))
    tables = {
        found.facts["protocol"]: found for found in Estimation(rows, "3dpw", smpl=str(folder)).score(true_answers(rows))
    }
    assert list(tables) == ["A", "C", "D"]
    assert tables["C"].values["MPJPE"].value == pytest.approx(0, abs=1e-4)
    assert tables["A"].values["MPJPE"].value > 10, "the predicted body is neutral and of average shape"
    assert tables["D"].facts["samples"] == "7 of 8"
    assert tables["D"].facts["tracks"].startswith("2 tracks of persons")
    # What a submission to the official evaluation holds, made from the file itself: in the world, then through the camera.
    given = []
    for row in rows:
        person, frame = row.extras["actor"], row.extras["frame"]
        world = Rotation.from_rotvec(made["poses"][person][frame].reshape(24, 3)).as_matrix()
        places, _, turns = smpl(row.extras["gender"], world, made["betas"][person][:10])
        camera = made["cam_poses"][frame][:3, :3]
        nine = camera @ turns[[0, 1, 2, 4, 5, 16, 17, 18, 19]]
        joints = (places + made["trans"][person][frame]) @ camera.T + made["cam_poses"][frame][:3, 3]
        given.append(Answer("", None, {"smpl24": joints, "orientations9": nine.reshape(27, 3)}))
    (found,) = Estimation(rows, "3dpw", protocols="D", smpl=str(folder)).score(given)
    for name in ("MPJPE", "PA-MPJPE", "MPJAE", "MPJAE-PA"):
        assert found.values[name].value == pytest.approx(0, abs=2e-3)
    assert (found.values["PCK@50"].value, found.values["AUC"].value) == (100, pytest.approx(1, abs=3e-3))


def test_3dpw_as_4d_humans_packs_it(tmp_path, folder):
    humans4d_eval_files.write_3dpw(tmp_path)
    rows = rows_of(ThreeDPWTest(tmp_path, size=32))
    task = Estimation(rows, "3dpw_test-200", smpl=str(folder))
    assert [found.facts["protocol"] for found in task.score(true_answers(rows))] == ["A", "B", "C"]
    points = [Answer("", None, {"humans44": row.extras["keypoints_3d"][:, :3]}) for row in rows]
    (found,) = Estimation(rows, "3dpw_test", protocols="B").score(points)
    assert found.values["MPJPE"].value == 0
    assert found.facts["interval"].startswith("95 % bootstrap over 2 sequences")


def test_h36m(tmp_path, folder):
    humans4d_eval_files.write_h36m(tmp_path)
    rows = rows_of(H36MVal(tmp_path, size=32))
    poses = matrices(np.random.default_rng(0).normal(0, 0.3, (12, 24, 3)))
    given = [Answer("", row.poses[0].replace(rotations=poses[i], measured=None)) for i, row in enumerate(rows)]
    (found,) = Estimation(rows, "h36m_val_p2", smpl=str(folder)).score(given)
    assert list(found.values) == ["MPJPE", "PA-MPJPE"]
    assert np.isfinite(found.samples["MPJPE"]).all()
    assert not found.counts


def test_rpe(tmp_path):
    rpe_files.write_refined(tmp_path)
    rows = rows_of(RpeRefined(tmp_path))
    mean, *tables = ReasonedEstimation(rows, "rpe_refined").score(true_answers(rows))
    assert [found.facts["attributes"] for found in tables] == ["behaviour 3", "shape 3", "outfit 3", "pose 3"]
    assert mean.facts["samples"] == "12"
    assert mean.values["MPJPE"].value == pytest.approx(0, abs=1e-4)
    assert mean.values["MPJPE, fitted"].value > 100, "these fitted joints are random"
    assert mean.facts["rotations"] == "compared at the joints that the data measured, 19 of 23"
    boxes = np.stack([rows[0].extras["bbox"], rows[0].extras["bbox"] + [30, 0, 0, 0]]).astype(np.float32)
    answers = [
        Answer("", row.poses[0].replace(rotations=np.stack([row.poses.rotations[0]] * 2), measured=None), {}, {}, boxes)
        for row in rows
    ]
    again, *_ = ReasonedEstimation(rows, "rpe_refined").score(answers)
    np.testing.assert_array_equal(again.samples["MPJPE"], mean.samples["MPJPE"])
