from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers import amass
from chatpose_jax.data.readers.amass import Amass, Place, file_name, place_of, to_view, yaw_of
from chatpose_jax.data.readers.posescript import ABOUT
from chatpose_jax.errors import UserError
from smpl_jax import poses as pose_files
from smpl_jax.pose import Pose, check, to_frame

from .amass_files import motion, upright, without_yaw, write_smplh, write_smplx

NAME = "BMLrub/rub055/0027_circle walk_poses.npz"


def one(folder: Path, where: Place, smplx: bool = False) -> Pose | Skipped:
    return Amass(folder, smplx).read([where])[where]


def skipped(folder: Path, where: Place, smplx: bool = False) -> Skipped:
    found = one(folder, where, smplx)
    assert isinstance(found, Skipped)
    return found


@pytest.mark.parametrize(
    "name",
    [
        NAME,
        "BioMotionLab_NTroje/rub055/0027_circle walk_poses.npz",
        "BMLrub/BioMotionLab_NTroje/rub055/0027_circle walk_poses.npz",
        "BMLrub/rub055/0027_circle walk_stageii.npz",
    ],
)
def test_a_file_has_one_name(name: str) -> None:
    assert file_name(name) == NAME


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Eyes_Japan_Dataset/aita/walk_poses.npz", "EyesJapanDataset/aita/walk_poses.npz"),
        ("MPI_HDM05/bd/HDM_bd_01_poses.npz", "HDM05/bd/HDM_bd_01_poses.npz"),
        ("MPI_Limits/03099/op1_poses.npz", "PosePrior/03099/op1_poses.npz"),
        ("MPI_mosh/00008/misc_poses.npz", "MoSh/00008/misc_poses.npz"),
        ("SSM_synced/20160930_50032/a_poses.npz", "SSM/20160930_50032/a_poses.npz"),
        ("DFaust_67/50002/a_poses.npz", "DFaust/50002/a_poses.npz"),
        ("Transitions_mocap/mazen/a_poses.npz", "Transitions/mazen/a_poses.npz"),
        ("TCD_handMocap/Database/a_poses.npz", "TCDHands/Database/a_poses.npz"),
        # only the first folder is renamed
        ("BMLhandball/MPI_mosh/SSM_synced_poses.npz", "BMLhandball/MPI_mosh/SSM_synced_poses.npz"),
        ("HumanEva/S1/Box_1_poses.npz", "HumanEva/S1/Box_1_poses.npz"),
        ("Mine/a_poses.npz", "Mine/a_poses.npz"),
    ],
)
def test_first_folders_are_renamed(name: str, expected: str) -> None:
    assert file_name(name) == expected


@pytest.mark.parametrize(
    "name", ["../x_poses.npz", "/etc/x_poses.npz", "CMU/../../x_poses.npz", "x_poses.npz", "CMU/x.pkl"]
)
def test_other_names_are_errors(name: str) -> None:
    with pytest.raises(UserError, match=r"expected (the name of )?a file"):
        file_name(name)


@pytest.mark.parametrize(
    "entry",
    [None, ["AMASS", NAME], ["H36M", NAME, 1], ["AMASS", NAME, -1], ["AMASS", NAME, 1.5], ["AMASS", NAME, True]],
)
def test_other_places_are_errors(entry: object) -> None:
    with pytest.raises(UserError, match="expected"):
        place_of(entry)


@pytest.mark.parametrize(
    "gender, rate", [("female", 120.0), (b"female", 120.0), ("male", np.float32(100)), (b"male", 60)]
)
@pytest.mark.parametrize(
    "folder", ["BMLrub", "BioMotionLab_NTroje", "BMLrub/BioMotionLab_NTroje", "BioMotionLab_NTroje/BioMotionLab_NTroje"]
)
def test_files_are_found_under_all_names(tmp_path: Path, folder: str, gender: object, rate: object) -> None:
    poses = write_smplh(tmp_path / folder / "rub055" / "0027_circle walk_poses.npz", motion(9), gender, rate)
    (tmp_path / folder / "rub055" / "shape.npz").write_bytes(b"")
    pose = one(tmp_path, Place(NAME, 4))
    assert isinstance(pose, Pose)
    check(pose)
    assert pose.frame == "z-up" and pose.family == "smplh" and pose.betas is None and pose.translation is None
    expected = Rotation.from_rotvec(poses[4].reshape(52, 3)).as_matrix()
    np.testing.assert_allclose(pose.rotations, expected, atol=1e-6)


def test_smplx_files_are_read_on_demand_only(tmp_path: Path) -> None:
    path = tmp_path / "BMLrub" / "rub055" / "0027_circle_walk_stageii.npz"
    poses = write_smplx(path, motion(9), b"neutral", np.float32(120))
    left_out = skipped(tmp_path, Place(NAME, 4))
    assert left_out.reason == "AMASS has only the SMPL-X file" and not left_out.broken
    assert str(path) in left_out.detail and "--set smplx=true" in left_out.detail
    pose = one(tmp_path, Place(NAME, 4), smplx=True)
    assert isinstance(pose, Pose) and pose.family == "smplh"
    np.testing.assert_allclose(pose.rotations, Rotation.from_rotvec(poses[4].reshape(52, 3)).as_matrix(), atol=1e-6)
    write_smplh(tmp_path / "BMLrub" / "rub055" / "0027_circle walk_poses.npz", motion(9, seed=1))
    preferred = one(tmp_path, Place(NAME, 4), smplx=True)
    assert isinstance(preferred, Pose)
    np.testing.assert_allclose(
        preferred.rotations, Rotation.from_rotvec(motion(9, seed=1)[4].reshape(52, 3)).as_matrix(), atol=1e-6
    )


def test_a_doubled_ending_is_one_in_smplx(tmp_path: Path) -> None:
    write_smplx(tmp_path / "KIT" / "3" / "walk_stageii.npz", motion(3))
    assert isinstance(one(tmp_path, Place("KIT/3/walk_poses_poses.npz", 1), smplx=True), Pose)


def test_filled_in_joints_are_not_measured(tmp_path: Path) -> None:
    write_smplh(tmp_path / "CMU" / "01" / "still_poses.npz", motion(30))
    write_smplh(tmp_path / "CMU" / "01" / "all_poses.npz", motion(30, fingers=True, feet=True))
    write_smplh(tmp_path / "CMU" / "01" / "single_poses.npz", motion(1, fingers=True, feet=True))
    still, everything, single = (one(tmp_path, Place(f"CMU/01/{n}_poses.npz", 0)) for n in ("still", "all", "single"))
    assert isinstance(still, Pose) and isinstance(everything, Pose) and isinstance(single, Pose)
    assert np.flatnonzero(~still.measured).tolist() == [10, 11, *range(22, 52)]
    assert everything.measured.all()
    assert np.flatnonzero(~single.measured).tolist() == [10, 11, *range(22, 52)]  # one frame does not show it


def test_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "CMU" / "01" / "01_01_poses.npz"
    bad = motion(5)
    bad[2, 30] = np.nan
    write_smplh(path, bad)
    beyond = skipped(tmp_path, Place("CMU/01/01_01_poses.npz", 5))
    assert beyond.broken and beyond.reason == "a frame beyond the end of the AMASS file"
    assert "frame 5 was asked for, but it has only 5" in beyond.detail
    assert skipped(tmp_path, Place("CMU/01/01_01_poses.npz", 2)).broken
    assert isinstance(one(tmp_path, Place("CMU/01/01_01_poses.npz", 3)), Pose)
    absent = skipped(tmp_path, Place("CMU/01/01_02_poses.npz", 0))
    assert not absent.broken and absent.reason == "not in the AMASS folder" and "01_02" in absent.detail
    path.write_bytes(path.read_bytes()[:3000])
    damaged = skipped(tmp_path, Place("CMU/01/01_01_poses.npz", 0))
    assert damaged.broken and str(path) in damaged.detail
    np.savez(path, poses=np.zeros((3, 72)))
    assert "expected a file of AMASS" in skipped(tmp_path, Place("CMU/01/01_01_poses.npz", 0)).detail


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_smplh(tmp_path / "CMU" / f"{name}_poses.npz", motion(5))
    opened: list[str] = []

    def read(path: Path) -> pose_files.PoseFile:
        opened.append(path.name)
        return pose_files.read_poses(path)

    monkeypatch.setattr(amass, "read_poses", read)
    places = [Place(f"CMU/{name}_poses.npz", frame) for frame in range(5) for name in "ab"]
    assert list(Amass(tmp_path).read(places)) == sorted(places)
    assert opened == ["a_poses.npz", "b_poses.npz"]


def test_the_folder_must_be_amass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"AMASS not found.*amass\.is\.tue\.mpg\.de"):
        Amass.open(ABOUT, tmp_path, "", False)
    (tmp_path / "AMASS" / "amass").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder that is named as a part of AMASS"):
        Amass.open(ABOUT, tmp_path, "", False)
    (tmp_path / "AMASS" / "MPI_mosh").mkdir()
    assert Amass.open(ABOUT, tmp_path, "", False).folder == tmp_path / "AMASS"
    assert Amass.open(ABOUT, tmp_path / "other", str(tmp_path / "AMASS"), False).folder == tmp_path / "AMASS"


def z_up(rotvecs: np.ndarray) -> Pose:
    root = Rotation.from_rotvec(rotvecs).as_matrix().astype(np.float32)
    rest = np.broadcast_to(np.eye(3, dtype=np.float32), (len(root), 51, 3, 3))
    return Pose(np.concatenate([root[:, None], rest], 1), "z-up")


def test_the_view_is_scipys() -> None:
    roots = Rotation.random(500, random_state=1).as_rotvec()
    tilt = np.abs(Rotation.from_rotvec(roots).as_euler("xyz")[:, 1])
    roots = roots[tilt < np.deg2rad(80)]  # near 90° the yaw itself is not determined
    pose = z_up(roots)
    seen = to_view(pose, yaw_of(pose))
    assert seen.frame == "camera" and seen.rotations.dtype == np.float32
    np.testing.assert_allclose(seen.rotations[:, 0], [without_yaw(root) for root in roots], atol=1e-6)
    assert np.array_equal(seen.rotations[:, 1:], pose.rotations[:, 1:])


def test_bodies_on_their_side_have_a_view() -> None:
    side = (Rotation.from_euler("z", 0.7) * Rotation.from_euler("y", 90, degrees=True)).as_rotvec()
    pose = z_up(side[None])
    seen = to_view(pose, yaw_of(pose))
    check(seen)
    # only the vertical turned: the body's axes keep their heights
    np.testing.assert_allclose(seen.rotations[0, 0, 1], -pose.rotations[0, 0, 2], atol=1e-6)


@pytest.mark.parametrize("turn", [0.0, 1.0, 3.0, -2.0])
def test_upright_people_face_the_camera(turn: float) -> None:
    pose = z_up(upright(turn)[None])
    seen = to_view(pose, yaw_of(pose))
    flat = to_frame(seen, "z-up"), to_frame(seen, "model"), seen
    for pose, angle in zip(flat, (np.pi / 2, 0, np.pi)):
        expected = Rotation.from_rotvec([angle, 0, 0]).as_matrix()
        np.testing.assert_allclose(pose.rotations[0, 0], expected, atol=1e-6)
