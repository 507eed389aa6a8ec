"""Pose files as other programs write them: each array means what its name and shape say, or is refused."""

import zipfile

import numpy as np
import pytest

from smpl_jax import PoseFileError, axis_angle_to_matrix, read_poses
from smpl_jax.frames import turn

TRUE = np.random.default_rng(7).normal(0, 0.4, (5, 55, 3)).astype(np.float32)  # five poses of SMPL-X
MATRICES = np.asarray(axis_angle_to_matrix(TRUE))


def save(folder, arrays):
    path = folder / "pose.npz"
    np.savez(path, **arrays)
    return path


WRITERS = {
    # 4D-Humans: pred_smpl_params of its demo, one person or several
    "hmr2": ({"global_orient": MATRICES[:, :1], "body_pose": MATRICES[:, 1:24], "betas": np.zeros((5, 10))}, 24, None),
    "hmr2 without a joint axis": ({"global_orient": MATRICES[:, 0], "body_pose": MATRICES[:, 1:24]}, 24, None),
    # its data sets: the root is the first of 24
    "hmr2 data": ({"body_pose": TRUE[:, :24].reshape(5, 72), "has_body_pose": np.ones(5)}, 24, None),
    # NeuMan, InstantAvatar, smplx's SMPLOutput
    "neuman": (
        {"global_orient": TRUE[:, 0], "body_pose": TRUE[:, 1:24].reshape(5, 69), "transl": TRUE[:, 0]},
        24,
        None,
    ),
    "smplx, by joints": ({"global_orient": TRUE[:, :1], "body_pose": TRUE[:, 1:24]}, 24, None),
    # smplx's SMPLXOutput: 21 joints of body; its hands may be components
    "smplx of SMPL-X": (
        {"global_orient": TRUE[:, 0], "body_pose": TRUE[:, 1:22].reshape(5, 63), "left_hand_pose": np.ones((5, 6))},
        22,
        None,
    ),
    "smplx, full": ({"full_pose": TRUE.reshape(5, 165), "global_orient": TRUE[:, 0]}, 55, None),
    # AMASS for SMPL-H, its SMPL-X release, and parts of that
    "amass": (
        {"poses": TRUE[:, :52].reshape(5, 156), "trans": TRUE[:, 0], "mocap_framerate": np.float64(120)},
        52,
        "z-up",
    ),
    "amass, cut out": ({"poses": TRUE[:, :52].reshape(5, 156)}, 52, "z-up"),
    "amass of SMPL-X": (
        {
            "poses": TRUE.reshape(5, 165),
            "root_orient": TRUE[:, 0],
            "pose_body": TRUE[:, 1:22].reshape(5, 63),
            "pose_hand": TRUE[:, 25:].reshape(5, 90),
            "pose_jaw": TRUE[:, 22],
            "mocap_frame_rate": np.float64(30),
        },
        55,
        "z-up",
    ),
    "amass of SMPL-X, parts": (
        {"root_orient": TRUE[:, 0], "pose_body": TRUE[:, 1:22].reshape(5, 63), "mocap_frame_rate": np.float64(30)},
        22,
        "z-up",
    ),
    # human_body_prior with SMPL: its two hands in pose_hand
    "human_body_prior": (
        {
            "root_orient": TRUE[:, 0],
            "pose_body": TRUE[:, 1:22].reshape(5, 63),
            "pose_hand": TRUE[:, 22:24].reshape(5, 6),
        },
        24,
        None,
    ),
    "3dpw": ({"poses": TRUE[:, :24].reshape(5, 72), "betas": np.zeros(10)}, 24, None),
    "spin": ({"pose": TRUE[:, :24].reshape(5, 72)}, 24, None),
    "22 joints": ({"poses": TRUE[:, :22].reshape(5, 66)}, 22, None),
    "unhelpful neighbours": (
        {"poses": TRUE[:, :24], "pose": np.zeros((5, 4, 4)), "matrices": np.array([{}]), "frame": np.arange(5)},
        24,
        None,
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_others_write_is_read_as_they_mean_it(name, tmp_path):
    arrays, joints, frame = WRITERS[name]
    file = read_poses(save(tmp_path, arrays))
    assert (len(file), file.num_joints, file.frame) == (5, joints, frame)
    if frame is None:
        with pytest.raises(
            PoseFileError,
            match="does not state its frame; pass it to read_poses\\(path, frame=…\\), one of model, camera",
        ):
            file[3]
        file = read_poses(tmp_path / "pose.npz", "camera")
    assert file[3].frame == (frame or "camera") and file[3].shape == ()
    np.testing.assert_allclose(file[3].rotations, MATRICES[3, :joints], atol=1e-6)
    np.testing.assert_allclose(file[1:4].rotations, MATRICES[1:4, :joints], atol=1e-6)
    np.testing.assert_array_equal(np.stack([pose.rotations for pose in file]), file.poses().rotations)
    assert set(file.unused) <= set(arrays) | {"matrices (Python objects)"} and not set(file.unused) & set(file.names)


@pytest.mark.parametrize("batch", [1, 3, 21, 23, 24])
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("joints", [22, 24])
def test_no_number_of_poses_is_taken_for_a_number_of_joints(batch, matrices, joints, tmp_path):
    """(3, 3) is one matrix or three axis-angles, (1, 3, 3) likewise: the body beside it tells."""
    poses = np.resize(TRUE[:, :joints], (batch, joints, 3))
    poses = np.asarray(axis_angle_to_matrix(poses)) if matrices else poses
    for root in (poses[:, 0], poses[:, :1]):
        file = read_poses(save(tmp_path, {"global_orient": root, "body_pose": poses[:, 1:]}), "model")
        assert (len(file), file.num_joints) == (batch, joints)
        expected = poses[-1] if matrices else axis_angle_to_matrix(poses[-1])
        np.testing.assert_allclose(file[batch - 1].rotations, expected, atol=1e-6)
    if batch == 1:
        one = {"global_orient": poses[0, 0], "body_pose": poses[0, 1:]}
        np.testing.assert_allclose(read_poses(save(tmp_path, one), "model")[0].rotations, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "poses", "joints"),
    [
        ((24, 3), 1, 24),
        ((72,), 1, 24),
        ((5, 156), 5, 52),
        ((5, 165), 5, 55),
        ((2, 5, 66), 10, 22),
        ((24, 3, 3), 1, 24),
        ((3, 22, 3, 3), 3, 22),
    ],
)
def test_an_unnamed_array_is_a_whole_pose(shape, poses, joints, tmp_path):
    values = np.zeros(shape) if shape[-2:] != (3, 3) else np.broadcast_to(np.eye(3), shape)
    np.save(tmp_path / "pose.npy", values)
    file = read_poses(tmp_path / "pose.npy", "model")
    assert (len(file), file.num_joints) == (poses, joints)
    np.testing.assert_array_equal(file[poses - 1].rotations, np.tile(np.eye(3), (joints, 1, 1)))
    assert len(file.shape) == len(shape) - (
        2 if shape[-1] == 3 and shape[-2:] != (3, 3) else 3 if shape[-2:] == (3, 3) else 1
    )


def turned(axis_angle):
    return {"poses": np.resize(np.float32(axis_angle), (1, 72))}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"body_pose": np.zeros((23, 3))},
            r"body_pose does not contain the root; expected global_orient .* shape \(23, 3\)",
        ),
        ({"body_pose": np.zeros((4, 63))}, "body_pose does not contain the root"),
        ({"global_orient": np.zeros(3)}, "expected .*global_orient with body_pose of 23 or 21"),
        (
            {"global_orient": np.zeros((2, 3)), "body_pose": np.zeros((3, 69))},
            r"expected matrices, .*\(2, 3\); .*\(3, 69\)",
        ),
        (
            {"global_orient": np.zeros((2, 3)), "body_pose": np.tile(np.eye(3), (2, 23, 1, 1))},
            "expected matrices, axis_angle, .*; found ",
        ),
        (
            {"global_orient": np.zeros((2, 3)), "body_pose": np.zeros((2, 66))},
            "expected matrices, axis_angle, .*; found ",
        ),
        (
            {"global_orient": np.ones((2, 3)), "body_pose": np.zeros((2, 72))},
            "body_pose and global_orient are different",
        ),
        (
            {"global_orient": np.zeros((1, 6)), "body_pose": np.zeros((2, 72))},
            r"expected one global_orient for each .* shape \(1, 6\)",
        ),
        ({"poses": np.zeros((2, 72)), "root_orient": np.ones((2, 3))}, "poses and root_orient are different poses"),
        (turned(0.1) | {"pose": np.zeros((1, 72))}, "poses and pose are different poses; remove the wrong one"),
        ({"poses": np.zeros((2, 72)), "pose": np.zeros((3, 72))}, "poses and pose are different poses"),
        # counts that no body has: joint positions of 25 joints, SMPL-X without hands, a body without its root
        ({"poses": np.zeros((25, 3))}, r"expected .*found poses float64 of shape \(25, 3\)"),
        ({"poses": np.zeros((9, 75))}, "expected matrices, axis_angle, .*; found "),
        ({"poses": np.zeros((9, 69))}, "expected matrices, axis_angle, .*; found "),
        ({"poses": np.zeros((9, 216))}, "expected matrices, axis_angle, .*; found "),
        ({"axis_angle": np.zeros((24, 3, 3))}, "expected matrices, axis_angle, .*; found "),
        ({"matrices": np.zeros((24, 3))}, "expected matrices, axis_angle, .*; found "),
        ({"trans": np.zeros(3)}, "found trans"),
        ({"poses": np.array(3.0)}, r"shape \(\)"),
        ({"poses": np.zeros((0, 72))}, r"shape \(0, 72\)"),
        ({"poses": np.array(["a"])}, "expected matrices, .* <U1"),
        ({"poses": np.array([{}])}, r"poses \(Python objects\)"),
        ({"poses": np.full((2, 72), np.nan)}, "finite"),
        ({"matrices": np.zeros((24, 3, 3))}, "must be rotation matrices .* joint 0 "),
        ({"matrices": np.tile(np.diag([1, 1, -1.0]), (24, 1, 1))}, "must be rotation matrices"),
        ({"matrices": 1.001 * np.tile(np.eye(3), (24, 1, 1))}, "must be rotation matrices"),
        (
            {"poses": np.zeros(72), "frame": np.array("world")},
            "its frame must start with one of camera, model, .*; found 'world'",
        ),
    ],
)
def test_what_is_no_pose_or_more_than_one_is_an_error_that_lists_the_choices(arrays, words, tmp_path):
    path = save(tmp_path, arrays)
    with pytest.raises(PoseFileError, match=words) as caught:
        read_poses(path, None if "frame" in arrays else "model")[0]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def cut(path):
    save(path.parent, {"poses": np.zeros((4, 72))})
    path.write_bytes(path.read_bytes()[:-40])


def damaged(path):
    np.savez_compressed(path, poses=np.random.default_rng(0).normal(size=(40, 72)))
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)


def lying(path):
    """A header that promises 2⁵⁰ bytes."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2**44, 8)})
        file.write(bytes(64))


@pytest.mark.parametrize("write", [cut, damaged, lying, lambda path: path.write_bytes(b"\x80\x04}.")])
def test_a_damaged_file_or_a_pickle_is_not_opened(write, tmp_path):
    write(tmp_path / "pose.npz")
    with pytest.raises(PoseFileError, match=r"expected a complete .npy or .npz file of plain arrays.* Pickles"):
        read_poses(tmp_path / "pose.npz")
    with pytest.raises(PoseFileError, match="no such file"):
        read_poses(tmp_path / "none.npz")


def test_unnamed_arrays_that_are_no_pose(tmp_path):
    np.save(tmp_path / "pose.npy", np.float32(3))
    with pytest.raises(PoseFileError, match=r"an array of 22, 24, 52 or 55 joints, .* shape \(\)"):
        read_poses(tmp_path / "pose.npy")
    np.save(tmp_path / "pose.npy", np.zeros((2, 69)))
    with pytest.raises(PoseFileError, match="an array of 23 or 21 joints lacks the root"):
        read_poses(tmp_path / "pose.npy")
    np.save(tmp_path / "pose.npy", np.zeros((2, 72)))
    with pytest.raises(PoseFileError, match="the index of a pose in \\[0, 2\\), found 2"):
        read_poses(tmp_path / "pose.npy", "model")[2]


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("smpl_jax.io.MAX_BYTES", 2**20)
    np.savez_compressed(tmp_path / "bomb.npz", poses=np.zeros((1000, 72)), pose=np.zeros((1000, 72)))
    with pytest.raises(PoseFileError, match=r"poses, pose would unpack to 1,152,\d{3} bytes"):
        read_poses(tmp_path / "bomb.npz")
    with (
        zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive,
        archive.open("poses.npy", "w") as file,
    ):
        np.save(file, np.zeros((10, 72)))
    with pytest.raises(PoseFileError, match="poses is packed in a way that NumPy does not write"):
        read_poses(tmp_path / "lzma.npz")


@pytest.mark.parametrize(
    ("told", "frame"), [("camera (x right, y down, z away)", "camera"), ("model", "model"), ("Z-up: metres", "z-up")]
)
def test_a_file_says_its_frame_in_words(told, frame, tmp_path):
    path = save(tmp_path, {"matrices": MATRICES[0, :24], "frame": np.array(told)})
    assert (read_poses(path).frame, read_poses(path)[0].frame) == (frame, frame)
    assert read_poses(path, "model").frame == "model", "who reads it may know better"
    with pytest.raises(ValueError, match="frame must be one of"):
        read_poses(path, "world")


BETAS, PLACES = (np.random.default_rng(8).normal(size=(5, n)).astype(np.float32) for n in (10, 3))
POSES = TRUE[:, :24].reshape(5, 72)
FLAGS = np.array([1, 1, 0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "betas", "translation", "unused"),
    [
        ({"poses": POSES, "betas": BETAS, "trans": PLACES}, BETAS, PLACES, ()),
        ({"poses": POSES, "betas": BETAS[0]}, np.tile(BETAS[0], (5, 1)), None, ()),  # AMASS, 3DPW: one for all
        ({"poses": POSES, "betas": BETAS[:1], "transl": PLACES[0]}, np.tile(BETAS[0], (5, 1)), np.tile(PLACES[0], (5, 1)), ()),
        ({"poses": POSES, "betas": BETAS[:, None], "translation": PLACES}, BETAS, PLACES, ()),
        ({"pose": POSES, "shape": BETAS}, BETAS, None, ()),  # SPIN
        ({"poses": POSES, "shape": BETAS}, None, None, ("shape",)),
        ({"poses": POSES, "betas": BETAS[:3], "trans": np.zeros((5, 4))}, None, None, ("betas", "trans")),
        ({"poses": POSES, "betas": np.array(1.0), "trans": np.zeros((0, 3))}, None, None, ("betas", "trans")),
        ({"poses": POSES, "betas": np.array(["a"]), "transl": PLACES, "trans": PLACES}, None, PLACES, ("betas", "transl")),
        ({"poses": POSES, "betas": BETAS, "has_betas": np.zeros(5)}, None, None, ()),
        ({"poses": POSES, "betas": BETAS, "has_betas": np.ones(5)}, BETAS, None, ()),
        ({"poses": POSES, "dmpls": np.zeros((5, 8)), "cam_t": PLACES}, None, None, ("cam_t", "dmpls")),
    ],
)  # fmt: skip
def test_shape_and_place_lie_beside_the_pose(arrays, betas, translation, unused, tmp_path):
    file = read_poses(save(tmp_path, arrays), "model")
    for found, expected in ((file.poses().betas, betas), (file.poses().translation, translation)):
        if expected is None:
            assert found is None
        else:
            np.testing.assert_array_equal(found, expected)
    if betas is not None:
        np.testing.assert_array_equal(file[2].betas, betas[2])
        np.testing.assert_array_equal(file[::2].betas, betas[::2])
    assert file.unused == unused and file.poses().has_betas is None


def test_fillers_are_marked(tmp_path):
    """4D-Humans' data sets and SPIN's hold zeros, or anything, where a person has no fit."""
    arrays = {"body_pose": POSES, "betas": BETAS, "has_body_pose": FLAGS, "has_betas": FLAGS}
    file = read_poses(save(tmp_path, arrays), "camera")
    pose = file.poses()
    assert pose.measured.all(1).tolist() == [True, True, False, True, True] and not pose.measured[2].any()
    assert pose.has_betas.tolist() == [True, True, False, True, True] and not pose.betas[2].any()
    assert file[2].betas is None and not file[2].measured.any() and file[1].measured.all()
    assert file.unused == ()
    spin = read_poses(save(tmp_path, {"pose": POSES, "shape": BETAS, "has_smpl": FLAGS.astype(bool)}), "camera").poses()
    assert spin.has_betas.tolist() == spin.measured.all(1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("name", ["betas", "trans"])
def test_shape_and_place_must_be_numbers(name, tmp_path):
    arrays = {"poses": POSES, name: np.full((5, 3), np.nan)}
    with pytest.raises(
        PoseFileError, match=r"(betas|translation) must be finite numbers; found NaN or infinity in pose 1"
    ):
        read_poses(save(tmp_path, arrays), "model")[1]


@pytest.mark.parametrize("gender", [np.array("male"), np.array(b"male")])
def test_what_a_file_says_about_itself_can_be_read(gender, tmp_path):
    arrays = {
        "poses": TRUE[:, :52].reshape(5, 156),
        "gender": gender,
        "mocap_framerate": 120.0,
        "dmpls": np.zeros((5, 8)),
    }
    file = read_poses(save(tmp_path, arrays))
    assert (file.gender, file.rate, file.unused, file.shape) == ("male", 120.0, ("dmpls",), (5,))
    many = read_poses(save(tmp_path, {"pose": POSES, "gender": np.array(["m"] * 5)}))
    assert many.gender is None and many.unused == ("gender",)


def test_all_parts_of_smplx_make_its_whole_pose(tmp_path):
    arrays = {
        "root_orient": TRUE[:, 0],
        "pose_body": TRUE[:, 1:22].reshape(5, 63),
        "pose_hand": TRUE[:, 25:].reshape(5, 90),
        "pose_jaw": TRUE[:, 22],
        "pose_eye": TRUE[:, 23:25].reshape(5, 6),
        "mocap_frame_rate": np.float64(30),
    }
    file = read_poses(save(tmp_path, arrays))
    assert file.num_joints == 55 and file.unused == ()
    np.testing.assert_allclose(file[4].rotations, MATRICES[4], atol=1e-6)


def test_frames_are_turns_of_an_upright_person():
    """An upright person's root: (π/2, 0, 0) in AMASS (z up), (0, 0, 0) in the model's frame, (π, 0, 0) in the camera's."""
    roots = {"z-up": np.pi / 2, "model": 0.0, "camera": np.pi}
    roots = {name: np.asarray(axis_angle_to_matrix(np.array([angle, 0, 0]))) for name, angle in roots.items()}
    for source, root in roots.items():
        for target, expected in roots.items():
            np.testing.assert_allclose(turn(source, target) @ root, expected, atol=1e-6)
    with pytest.raises(ValueError, match="frame must be one of 'model', 'camera', 'z-up'; found 'world'"):
        turn("world")
