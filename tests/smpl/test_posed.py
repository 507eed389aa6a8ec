"""A pose on a body: arrays, images and files of it."""

import json

import numpy as np
import pytest

import smpl_jax
from smpl_jax import Pose, PosedBody, load_body
from smpl_jax.render import render_body

UPRIGHT = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
UPRIGHT[0] = np.diag([1, -1, -1])


@pytest.fixture(scope="module")
def body():
    return load_body()


@pytest.fixture(scope="module")
def posed(body):
    return PosedBody(Pose(UPRIGHT, "camera"), body)


@pytest.fixture(scope="module")
def shaped(body):
    return PosedBody(Pose(UPRIGHT, "camera", betas=np.float32([2, -1]), translation=np.float32([0.5, 0.1, 4])), body)


def test_a_pose_knows_its_body(posed, tmp_path):
    np.testing.assert_array_equal(posed.matrices, UPRIGHT)
    np.testing.assert_allclose(np.abs(posed.axis_angle[0]), [np.pi, 0, 0], atol=1e-5)
    np.testing.assert_allclose(posed.rotation_6d[1], [1, 0, 0, 0, 1, 0])
    head, foot = (posed.body.joint_names.index(name) for name in ("head", "left_foot"))
    assert posed.joints[head, 1] < posed.joints[foot, 1], "y points down: an upright head has the smaller y"
    assert posed.vertices.shape == (6890, 3)
    assert posed.render(64).shape == (64, 64, 3)
    for suffix in (".glb", ".obj", ".npz", ".png"):
        assert posed.save(tmp_path / f"pose{suffix}").stat().st_size > 1000
    assert b'"skins"' in (tmp_path / "pose.glb").read_bytes()
    assert b'"COLOR_0"' in (tmp_path / "pose.glb").read_bytes()  # dressed, as in the image
    assert b'"skins"' not in posed.save(tmp_path / "static.glb", skinned=False).read_bytes()
    with np.load(tmp_path / "pose.npz", allow_pickle=False) as saved:
        assert sorted(saved) == [
            "axis_angle", "frame", "joint_names", "joints", "matrices", "rotation_6d", "rotation_6d_order",
        ]  # fmt: skip
        np.testing.assert_array_equal(saved["matrices"], UPRIGHT)
        assert str(saved["frame"]) == "camera (x right, y down, z away; metres)"
    assert repr(posed).startswith("PosedBody(pose=Pose(rotations=float32 (24, 3, 3), frame='camera'")


def test_arrays_are_its_own_and_cannot_be_changed(posed):
    arrays = (posed.matrices, posed.axis_angle, posed.rotation_6d, posed.joints, posed.vertices)
    assert all(array.flags.owndata and not array.flags.writeable for array in arrays)


def test_shape_and_place_are_used_everywhere(shaped, posed, body, tmp_path):
    betas, move = shaped.pose.betas, shaped.pose.translation
    np.testing.assert_allclose(shaped.joints, smpl_jax.joints(body, UPRIGHT, betas, move), atol=1e-6)
    np.testing.assert_allclose(shaped.vertices, smpl_jax.vertices(body, UPRIGHT, betas, move), atol=1e-6)
    assert np.abs(shaped.vertices - move - posed.vertices).max() > 0.02
    image = shaped.render(48)
    np.testing.assert_array_equal(image, render_body(body, UPRIGHT, betas, size=48, frame="camera"))
    assert (image != posed.render(48)).any()
    points = [line.split()[1:] for line in shaped.save(tmp_path / "x.obj").read_text().splitlines() if line[:2] == "v "]
    np.testing.assert_allclose(np.float32(points) * [1, -1, -1], shaped.vertices, atol=1e-5)
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.load(shaped.save(tmp_path / "x.glb", skinned=False), force="mesh", process=False)
    np.testing.assert_allclose(
        np.asarray(mesh.bounds)[:, 0], [shaped.vertices[:, 0].min(), shaped.vertices[:, 0].max()], atol=1e-5
    )
    with np.load(shaped.save(tmp_path / "x.npz")) as saved:
        np.testing.assert_array_equal(saved["betas"], betas)
        np.testing.assert_array_equal(saved["translation"], move)
        np.testing.assert_allclose(saved["joints"], shaped.joints, atol=1e-6)


def test_a_row_of_a_batch_without_shape_has_none(body, posed):
    batch = smpl_jax.stack([Pose(UPRIGHT, "camera"), Pose(UPRIGHT, "camera", betas=np.float32([2.0]))])
    assert PosedBody(batch[0], body).pose.betas is None
    np.testing.assert_array_equal(PosedBody(batch[0], body).joints, posed.joints)
    assert PosedBody(batch[1], body).pose.betas.tolist() == [2.0]


def test_another_family_and_frame(body, posed):
    pose = smpl_jax.to_family(smpl_jax.to_frame(posed.pose, "z-up"), "smplx")
    other = PosedBody(pose, body)
    assert other.matrices.shape == (55, 3, 3) and other.joints.shape == (24, 3)
    head, foot = (body.joint_names.index(name) for name in ("head", "left_foot"))
    assert other.joints[head, 2] > other.joints[foot, 2]
    np.testing.assert_array_equal(other.render(32), posed.render(32))


@pytest.mark.parametrize("shape", [(24, 3, 3), (22, 3, 3)])
def test_json_holds_the_shortest_decimals_of_float32(shape, shaped, body):
    pose = shaped.pose.replace(rotations=UPRIGHT[: shape[0]])
    posed = PosedBody(pose, body)
    values = json.loads(json.dumps(posed.to_json()))
    assert values["frame"] == "camera (x right, y down, z away; metres)" and values["body"] == body.name
    for name, expected in (
        ("axis_angle", posed.axis_angle), ("joints", posed.joints), ("betas", pose.betas), ("translation", pose.translation),
    ):  # fmt: skip
        np.testing.assert_array_equal(np.float32(values[name]), expected)
    written = [number for row in values["axis_angle"] + values["joints"] for number in row]
    assert (
        max(len(repr(abs(number)).split("e")[0]) for number in written) <= 12
    )  # nine digits, a point, zeros before them
    assert "betas" not in PosedBody(Pose(UPRIGHT, "camera"), body).to_json()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda posed, folder: posed.render(0), r"size must be a whole number in \[16, 4096\], found 0"),
        (lambda posed, folder: posed.render(64.5), "size must be a whole number"),
        (lambda posed, folder: posed.render(64, views="top"), "views must be some of front, .*found top"),
        (lambda posed, folder: posed.render(64, views=()), "views must be names"),
        (lambda posed, folder: posed.render(64, views=3), "views must be names"),
        (lambda posed, folder: posed.save(None), "path must be a path that ends in .glb, .obj, .npz, .png, found NoneType"),
        (lambda posed, folder: posed.save(folder / "x.glb", skinned="no"), "skinned must be True or False, found 'no'"),
        (lambda posed, folder: posed.save(folder / "new" / "pose.fbx"), "found .fbx"),
        (lambda posed, folder: posed.save(folder / "new" / "pose"), "found no suffix"),
        (lambda posed, folder: PosedBody(UPRIGHT, posed.body), "expected a smpl_jax.Pose, found ndarray"),
        (lambda posed, folder: PosedBody(Pose(UPRIGHT[0], "camera"), posed.body), r"rotations must have shape"),
        (lambda posed, folder: PosedBody(Pose(UPRIGHT[None], "camera"), posed.body), r"a batch of shape \(1,\); index it"),
        (lambda posed, folder: PosedBody(Pose(UPRIGHT * np.nan, "camera"), posed.body), "finite"),
        (lambda posed, folder: PosedBody(posed.pose, "smpl.npz"), "body must be a smpl_jax.BodyModel"),
        (lambda posed, folder: PosedBody(posed.pose.replace(betas=np.ones(16)), posed.body), "16 betas.* loaded with 10"),
    ],
)  # fmt: skip
def test_a_posed_body_checks_its_arguments(call, words, posed, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        call(posed, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "a refused path leaves no folder behind"


def test_one_view_and_capitals_are_understood(posed, tmp_path):
    np.testing.assert_array_equal(posed.render(32, views="side"), posed.render(32, views=["side"]))
    assert posed.save(tmp_path / "POSE.OBJ").stat().st_size > 1000
