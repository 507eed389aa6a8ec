"""Poses written and read back, by this package and as others read AMASS."""

import json
from importlib.util import find_spec

import jax
import numpy as np
import pytest

import smpl_jax
from smpl_jax import Pose, load_body, read_poses, write_poses

from .models import random_arrays, random_rotations

RNG = np.random.default_rng(5)
METRES = 2e-5


def rotations(*shape):
    return random_rotations(RNG, *shape)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def same(a, b, atol=5e-6):
    assert (jax.tree.structure(a), a.frame) == (jax.tree.structure(b), b.frame)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


@pytest.mark.parametrize(("shape", "joints"), [((), 24), ((4,), 22), ((4,), 52), ((2, 3), 55)])
def test_what_is_written_reads_back_equal(shape, joints, tmp_path):
    bare = Pose(rotations(*shape, joints), "camera")
    measured = RNG.random((*shape, joints)) < 0.5
    whole = bare.replace(frame="z-up", betas=numbers(*shape, 7), translation=numbers(*shape, 3), measured=measured)
    for pose in (bare, whole):
        file = read_poses(write_poses(tmp_path / "pose.npz", pose))
        same(file.poses(), pose, 0)
        assert (file.shape, file.body, file.unused) == (shape, None, ("rotation_6d", "rotation_6d_order"))
    plain = write_poses(tmp_path / "pose.npy", bare, "axis-angle")
    assert np.load(plain).shape == (*shape, 3 * joints)
    same(read_poses(plain, "camera").poses(), bare)


def test_a_batch_of_which_some_have_a_shape_reads_back_equal(tmp_path):
    batch = smpl_jax.stack(
        [Pose(rotations(24), "model", betas=numbers(10)), Pose(rotations(24), "model", translation=numbers(3))]
    )
    file = read_poses(write_poses(tmp_path / "pose.npz", batch))
    same(file.poses(), batch, 0)
    assert file[0].translation is None and file[1].betas is None and file[0].has_betas is None


def test_our_file_holds_what_numpy_users_want(tmp_path):
    pose = Pose(rotations(24), "camera")
    path = write_poses(tmp_path / "pose.npz", pose, joints=numbers(24, 3), joint_names=list("abc"), body="somebody")
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == [
            "axis_angle", "body", "frame", "joint_names", "joints", "matrices", "rotation_6d", "rotation_6d_order",
        ]  # fmt: skip
        assert str(file["frame"]) == "camera (x right, y down, z away; metres)"
        assert str(file["rotation_6d_order"]) == "columns" and file["joint_names"].tolist() == ["a", "b", "c"]
        assert file["axis_angle"].shape == (24, 3) and {file[k].dtype for k in ("axis_angle", "joints")} == {
            np.dtype("f4")
        }
        np.testing.assert_allclose(smpl_jax.axis_angle_to_matrix(file["axis_angle"]), pose.rotations, atol=2e-6)
        first, second = pose.rotations[:, :, 0], pose.rotations[:, :, 1]
        np.testing.assert_allclose(file["rotation_6d"], np.concatenate([first, second], 1), atol=1e-6)
        np.testing.assert_array_equal(file["matrices"], pose.rotations)
    assert read_poses(path).body == "somebody"


AMASS = {  # keys of the two releases, as read by those who use them
    "smplh": ["betas", "dmpls", "gender", "mocap_framerate", "poses", "trans"],
    "smplx": [
        "betas", "gender", "mocap_frame_rate", "mocap_time_length", "num_betas", "pose_body", "pose_eye", "pose_hand", "pose_jaw",
        "poses", "root_orient", "surface_model_type", "trans",
    ],
}  # fmt: skip
JOINTS = {"smplh": 52, "smplx": 55}


def sequence(kind, size=4):
    betas = np.tile(numbers(16), (size, 1))
    return Pose(rotations(size, JOINTS[kind]), "z-up", betas=betas, translation=numbers(size, 3))


@pytest.mark.parametrize("kind", AMASS)
def test_amass_reads_back_equal_and_has_its_keys(kind, tmp_path):
    pose = sequence(kind)
    path = write_poses(tmp_path / "x_poses.npz", pose, "amass", gender="female", rate=120)
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == AMASS[kind]
        assert all(file[name].dtype == np.float64 for name in ("poses", "trans", "betas"))
        assert file["poses"].shape == (4, 3 * JOINTS[kind]) and file["betas"].shape == (16,)
        assert str(file["gender"]) == "female"
        if kind == "smplx":
            assert file["mocap_time_length"] == 4 / 120 and str(file["surface_model_type"]) == "smplx"
            parts = [file[name] for name in ("root_orient", "pose_body", "pose_jaw", "pose_eye", "pose_hand")]
            assert [part.shape[1] for part in parts] == [3, 63, 3, 6, 90]
            np.testing.assert_array_equal(np.concatenate(parts, 1), file["poses"])
    file = read_poses(path)
    same(file.poses(), pose)
    assert (file.frame, file.gender, file.rate) == ("z-up", "female", 120.0)

    lacking = pose.replace(betas=None, translation=None, measured=RNG.random((4, JOINTS[kind])) < 0.5)
    back = read_poses(write_poses(tmp_path / "x.npz", lacking, "amass", gender="neutral", rate=np.float32(30)))
    same(back.poses(), lacking)
    few = pose.replace(betas=pose.betas[:, :10])
    back = read_poses(write_poses(tmp_path / "x.npz", few, "amass", gender="male", rate=1.5))
    same(back.poses(), smpl_jax.to_betas(few, 16))


def as_others_read(path):
    """The keywords of human_body_prior's body model, cut out of ``poses`` as AMASS's own notebooks do."""
    data = np.load(path)
    poses, size = data["poses"], len(data["trans"])
    return {
        "root_orient": poses[:, :3],
        "pose_body": poses[:, 3:66],
        "pose_hand": poses[:, -90:],
        "trans": data["trans"],
        "betas": np.repeat(data["betas"][:16][np.newaxis], size, axis=0),
        **(
            {"dmpls": data["dmpls"][:, :8]}
            if "dmpls" in data
            else {"pose_jaw": data["pose_jaw"], "pose_eye": data["pose_eye"]}
        ),
    }


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bodies")
    for kind in JOINTS:
        (folder / kind).mkdir()
        hands = {
            f"hands_{name}{s}": RNG.normal(size=(45, 45)[: 2 - (name == "mean")])
            for name in ("components", "mean")
            for s in "lr"
        }
        more = {"dynamic_lmk_faces_idx": np.zeros((79, 17), int), "dynamic_lmk_bary_coords": np.zeros((79, 17, 3))}
        more |= {"lmk_faces_idx": np.arange(51), "lmk_bary_coords": np.full((51, 3), 1 / 3)}
        size = (
            {"smplh": 6890, "smplx": 10475}[kind] if find_spec("smplx") else 200
        )  # smplx picks vertices by their numbers
        arrays = random_arrays(kind, size, 20 if kind == "smplx" else 16)
        np.savez(folder / kind / f"{kind.upper()}_MALE.npz", **arrays, **hands, **(more if kind == "smplx" else {}))
    return folder


@pytest.mark.parametrize("kind", JOINTS)
def test_what_others_read_from_our_amass_is_our_body(kind, bodies, tmp_path):
    """Vertices of our pose, and vertices from the file by the names and columns that others use, through smplx's keywords."""
    pose = sequence(kind, 3)
    pose = pose.replace(betas=np.tile(np.pad(pose.betas[:1, :10], ((0, 0), (0, 6))), (3, 1)))
    given = as_others_read(write_poses(tmp_path / "x.npz", pose, "amass", gender="male", rate=60))
    body = load_body(next((bodies / kind).iterdir()))
    expected = smpl_jax.vertices(body, **smpl_jax.for_body(smpl_jax.to_betas(pose, 10), body))
    keywords = {
        "global_orient": given["root_orient"],
        "body_pose": given["pose_body"],
        "left_hand_pose": given["pose_hand"][:, :45],
        "right_hand_pose": given["pose_hand"][:, 45:],
        "transl": given["trans"],
        "betas": given["betas"][:, :10],
    }
    if kind == "smplx":
        keywords |= {"jaw_pose": given["pose_jaw"]}
        keywords |= {"leye_pose": given["pose_eye"][:, :3], "reye_pose": given["pose_eye"][:, 3:]}
    else:
        assert not given["dmpls"].any()
    keywords = {name: np.float32(value) for name, value in keywords.items()}
    hands = {"use_pca": False, "flat_hand_mean": True}
    ours = smpl_jax.create(bodies, kind, gender="male", **hands)(**keywords)
    np.testing.assert_allclose(ours.vertices, expected, atol=METRES)
    smplx, torch = pytest.importorskip("smplx"), pytest.importorskip("torch")
    peer = smplx.create(bodies, kind, gender="male", ext="npz", batch_size=3, **hands)
    theirs = peer(**{name: torch.tensor(value) for name, value in keywords.items()})
    np.testing.assert_allclose(theirs.vertices.detach(), expected, atol=METRES)


@pytest.mark.parametrize(
    ("change", "layout", "options", "words"),
    [
        ({}, "amass", {"rate": 30}, "'amass' needs gender, one of female, male, neutral; found None"),
        ({}, "amass", {"gender": "x", "rate": 30}, "found 'x'"),
        ({}, "amass", {"gender": "male"}, "'amass' needs rate, a positive number of poses per second; found None"),
        ({}, "amass", {"gender": "male", "rate": 0}, "needs rate.*found 0"),
        ({}, "amass", {"gender": "male", "rate": float("nan")}, "needs rate"),
        ({}, "amass", {"gender": "male", "rate": 30, "body": "x"}, "the layout 'amass' cannot store body"),
        ({"frame": "camera"}, "amass", {"gender": "male", "rate": 30}, r"AMASS uses the frame 'z-up', found 'camera'; to_frame"),
        ({"rotations": rotations(4, 24), "betas": None}, "amass", {"gender": "male", "rate": 30}, r"24 joints \(smpl\); to_family"),
        ({"betas": numbers(4, 16)}, "amass", {"gender": "male", "rate": 30}, "the same betas for all poses of a file"),
        ({"rotations": rotations(52), "betas": None, "translation": None}, "amass", {"gender": "male", "rate": 30}, r"pose\[None\]"),
        ({}, "axis-angle", {}, r"would lose betas, translation; drop them with pose.replace\(betas=None, translation=None"),
        ({}, "bvh", {}, "layout must be one of 'smpl_jax', 'amass', 'axis-angle'; found 'bvh'"),
        ({"shape_space": "mine"}, "amass", {"gender": "male", "rate": 30}, "AMASS stores betas of SMPL for 52 joints, .*of mine"),
        ({}, "smpl_jax", {"gender": "male"}, "cannot store gender"),
        ({"rotations": 2 * rotations(4, 52)}, "smpl_jax", {}, "must be rotation matrices"),
        ({"betas": numbers(16)}, "smpl_jax", {}, r"betas must have shape \(4, n\)"),
        ({"rotations": rotations(0, 24), "betas": None, "translation": None}, "smpl_jax", {}, "at least one pose"),
    ],
)  # fmt: skip
def test_what_a_layout_cannot_hold_is_one_line(change, layout, options, words, tmp_path):
    pose = sequence("smplh").replace(**change)
    path = tmp_path / ("x.npy" if layout == "axis-angle" else "x.npz")
    with pytest.raises(ValueError, match=words) as caught:
        write_poses(path, pose, layout, **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_suffix_says_what_a_file_is(tmp_path):
    for name, layout in (("x.npy", "smpl_jax"), ("x.npz", "axis-angle"), ("x", "smpl_jax")):
        with pytest.raises(ValueError, match=f"a file of layout '{layout}' must end in .np[yz]"):
            write_poses(tmp_path / name, Pose(rotations(24), "camera"), layout)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    pose = Pose(rotations(24), "camera")
    target = write_poses(tmp_path / "pose.npz", pose)
    before = target.read_bytes()

    def full(file, **_):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space left"):
        write_poses(target, pose)
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pose.npz"]


def test_a_pose_of_the_package_s_body_keeps_its_shape_in_a_file(tmp_path):
    """Betas belong to a body: a file of a posed body says which."""
    body = load_body()
    posed = smpl_jax.PosedBody(Pose(rotations(24), "camera", betas=numbers(10), translation=numbers(3)), body)
    file = read_poses(posed.save(tmp_path / "pose.npz"))
    assert file.body == file.shape_space == file[0].shape_space == body.name
    again = smpl_jax.PosedBody(file[0], body)
    np.testing.assert_array_equal(again.vertices, posed.vertices)
    assert json.dumps(again.to_json()) == json.dumps(posed.to_json())


@pytest.mark.parametrize(
    ("space", "body", "read"),
    [("SMPL", None, "SMPL"), ("mine", "other", "mine"), (None, "smplh", "SMPL"), (None, None, None)],
)
def test_a_file_says_which_shape_space_its_betas_have(space, body, read, tmp_path):
    pose = Pose(rotations(3, 24), "camera", betas=numbers(3, 10), shape_space=space)
    file = read_poses(write_poses(tmp_path / "pose.npz", pose, body=body))
    assert (file.shape_space, file.body, file[0].shape_space, file.poses().shape_space) == (read, body, read, read)
    assert "shape_space" not in file.unused
    bare = read_poses(write_poses(tmp_path / "bare.npz", pose.replace(betas=None), body=body))
    assert bare[0].shape_space is None


def test_arrays_beside_the_poses_do_not_change_them(tmp_path):
    pose = Pose(np.tile(np.eye(3, dtype=np.float32), (2, 24, 1, 1)), "camera")
    write_poses(tmp_path / "p.npz", pose, beside={"errors": np.ones((2, 5))})
    read = read_poses(tmp_path / "p.npz")
    assert len(read) == 2 and "errors" in read.unused and np.load(tmp_path / "p.npz")["errors"].shape == (2, 5)
    with pytest.raises(ValueError, match="betas"):
        write_poses(tmp_path / "p.npz", pose, beside={"betas": np.ones((2, 10))})
