"""Files read back by readers of their own: a small glTF reader below, numpy, and trimesh where it is installed."""

import json
import struct

import numpy as np
import pytest

from smpl_jax import body as body_functions
from smpl_jax import export, rotations
from smpl_jax.io import load_body
from smpl_jax.render import clothing_colors

TURN = np.diag([1.0, -1.0, -1.0])
SIZES = {5126: ("f4", 4), 5125: ("u4", 4), 5123: ("u2", 2), 5121: ("u1", 1)}
WIDTHS = {"SCALAR": 1, "VEC3": 3, "VEC4": 4, "MAT4": 16}


@pytest.fixture(scope="module")
def body():
    return load_body()


@pytest.fixture(scope="module")
def pose(body):
    """A bent, turned pose in the camera frame."""
    vectors = np.random.default_rng(3).normal(0, 0.5, (body.num_joints, 3))
    vectors[0] = [2.9, 0.3, -0.2]
    return np.asarray(rotations.axis_angle_to_matrix(vectors.astype(np.float32)))


def read_glb(path):
    """The JSON document and the accessors of a GLB, with every structural rule that can be checked in a few lines."""
    data = path.read_bytes()
    magic, version, length = struct.unpack("<4sII", data[:12])
    assert (magic, version, length) == (b"glTF", 2, len(data))
    json_length, kind = struct.unpack("<I4s", data[12:20])
    assert kind == b"JSON" and json_length % 4 == 0
    document = json.loads(data[20 : 20 + json_length])
    start = 20 + json_length
    binary_length, kind = struct.unpack("<I4s", data[start : start + 8])
    binary = data[start + 8 :]
    assert kind == b"BIN\0" and binary_length == len(binary) and binary_length % 4 == 0
    assert document["buffers"] == [{"byteLength": binary_length}]
    arrays, end = [], 0
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        dtype, size = SIZES[accessor["componentType"]]
        width = WIDTHS[accessor["type"]]
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] >= end
        assert view["byteLength"] == accessor["count"] * width * size
        assert width * size % 4 == 0 or view["target"] == 34963  # vertex attributes are aligned to 4 bytes
        end = view["byteOffset"] + view["byteLength"]
        assert end <= binary_length
        array = np.frombuffer(binary[view["byteOffset"] : end], "<" + dtype).reshape(-1, width)
        assert np.isfinite(array).all()
        if "min" in accessor:
            np.testing.assert_array_equal(np.float32(accessor["min"]), array.min(0))
            np.testing.assert_array_equal(np.float32(accessor["max"]), array.max(0))
        if accessor.get("normalized"):
            array = array / np.iinfo(dtype).max
        arrays.append(array)
    return document, arrays


def skin(document, arrays):
    """Positions of a skinned mesh as the glTF 2.0 specification computes them (section 3.7.3)."""

    def local(node):
        x, y, z, w = node["rotation"]
        assert abs(np.linalg.norm(node["rotation"]) - 1) < 1e-6
        matrix = np.eye(4)
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, 3] = node["translation"]
        return matrix

    nodes, world = document["nodes"], {}

    def visit(index, parent):
        world[index] = parent @ local(nodes[index])
        for child in nodes[index].get("children", ()):
            visit(child, world[index])

    (rig,) = document["skins"]
    visit(rig["skeleton"], np.eye(4))
    inverse_bind = arrays[rig["inverseBindMatrices"]].reshape(-1, 4, 4).transpose(0, 2, 1)
    matrices = np.stack([world[j] @ m for j, m in zip(rig["joints"], inverse_bind)])
    attributes = document["meshes"][0]["primitives"][0]["attributes"]
    rest = np.concatenate([arrays[attributes["POSITION"]], np.ones((arrays[attributes["POSITION"]].shape[0], 1))], 1)
    out = np.zeros_like(rest, np.float64)
    for k in range(sum(name.startswith("JOINTS_") for name in attributes)):
        joints, weights = arrays[attributes[f"JOINTS_{k}"]], arrays[attributes[f"WEIGHTS_{k}"]]
        out += np.einsum("vk,vkab,vb->va", weights, matrices[joints], rest)
    return out[:, :3], {nodes[j]["name"]: world[j][:3, 3] for j in rig["joints"]}


def test_skinned_glb_shows_the_posed_body(tmp_path, body, pose):
    betas, translation = np.linspace(-1, 1, 10), np.array([0.1, 0.2, 3.0])
    path = export.write_skinned_glb(tmp_path / "body.glb", body, pose, betas, translation)
    vertices, joints = skin(*read_glb(path))
    expected = body_functions.forward(
        body, pose.astype(np.float32), betas.astype(np.float32), translation.astype(np.float32)
    )
    assert np.abs(vertices - np.asarray(expected.vertices) @ TURN).max() <= 1e-5
    assert list(joints) == list(body.joint_names)
    assert np.abs(np.stack(list(joints.values())) - np.asarray(expected.joints) @ TURN).max() <= 1e-5


def test_skinned_glb_in_the_model_frame_is_not_turned(tmp_path, body):
    rest = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    vertices, joints = skin(*read_glb(export.write_skinned_glb(tmp_path / "rest.glb", body, rest, frame="model")))
    assert np.abs(vertices - np.asarray(body.template).T).max() <= 1e-5
    assert joints["head"][1] > joints["pelvis"][1]
    upright = rest.copy()
    upright[0] = TURN  # the same person, told in the camera frame, stands up in glTF as well
    _, joints = skin(*read_glb(export.write_skinned_glb(tmp_path / "up.glb", body, upright)))
    assert joints["head"][1] > joints["pelvis"][1] and joints["left_wrist"][0] > joints["right_wrist"][0]


def test_weights_of_a_skinned_glb_are_normalised(tmp_path, body, pose):
    document, arrays = read_glb(export.write_skinned_glb(tmp_path / "body.glb", body, pose))
    attributes = document["meshes"][0]["primitives"][0]["attributes"]
    weights, joints = arrays[attributes["WEIGHTS_0"]], arrays[attributes["JOINTS_0"]]
    assert np.abs(weights.astype(np.float64).sum(1) - 1).max() < 1e-6
    assert (joints[weights == 0] == 0).all() and joints.max() < body.num_joints
    normals = arrays[attributes["NORMAL"]]
    assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-5


def test_more_than_four_joints_a_vertex_take_a_second_set(tmp_path, body, pose):
    import dataclasses

    rng = np.random.default_rng(0)
    weights = np.asarray(body.weights).copy()
    weights[:, 0] = 0
    weights[:6, 0] = rng.dirichlet(np.ones(6))
    busy = dataclasses.replace(body, weights=weights)
    document, arrays = read_glb(export.write_skinned_glb(tmp_path / "busy.glb", busy, pose))
    assert "JOINTS_1" in document["meshes"][0]["primitives"][0]["attributes"]
    vertices, _ = skin(document, arrays)
    expected = np.asarray(body_functions.vertices(busy, pose)) @ TURN
    assert np.abs(vertices - expected).max() <= 1e-5


def test_static_glb_and_obj_are_the_same_mesh_upright(tmp_path, body, pose):
    vertices = np.asarray(body_functions.vertices(body, pose))
    colors = clothing_colors(body)
    document, arrays = read_glb(export.write_glb(tmp_path / "mesh.glb", vertices, body.faces, colors=colors))
    primitive = document["meshes"][0]["primitives"][0]
    np.testing.assert_allclose(arrays[primitive["attributes"]["POSITION"]], vertices @ TURN, atol=1e-7)
    np.testing.assert_array_equal(arrays[primitive["indices"]].reshape(-1, 3), body.faces)
    linear = arrays[primitive["attributes"]["COLOR_0"]][:, :3]
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(srgb, colors, atol=1e-3)

    lines = export.write_obj(tmp_path / "mesh.obj", vertices, body.faces).read_text().splitlines()
    points = np.array([line.split()[1:] for line in lines if line.startswith("v ")], float)
    faces = np.array([[c.split("//")[0] for c in line.split()[1:]] for line in lines if line.startswith("f ")], int)
    np.testing.assert_allclose(points, vertices @ TURN, atol=1e-6)
    np.testing.assert_array_equal(faces - 1, body.faces)
    edges = points[faces - 1]
    volume = np.einsum("fa,fa->f", edges[:, 0], np.cross(edges[:, 1], edges[:, 2])).sum() / 6
    assert volume > 0.03  # cubic metres: still turned outwards, not mirrored


def test_trimesh_reads_both(tmp_path, body):
    trimesh = pytest.importorskip("trimesh")
    vertices = np.asarray(body.template).T
    for path in (
        export.write_glb(tmp_path / "mesh.glb", vertices, body.faces, frame="model"),
        export.write_obj(tmp_path / "mesh.obj", vertices, body.faces, frame="model"),
    ):
        mesh = trimesh.load(path, force="mesh", process=False)
        assert len(mesh.faces) == len(body.faces)
        np.testing.assert_allclose(mesh.bounds, [vertices.min(0), vertices.max(0)], atol=1e-5)
        assert mesh.volume > 0.03


def test_npz_names_its_frame_and_orders(tmp_path, body, pose):
    joints = np.asarray(body_functions.joints(body, pose))
    path = export.write_npz(
        tmp_path / "pose.npz",
        pose,
        frame="camera: x right, y down",
        betas=np.ones(10),
        joints=joints,
        joint_names=body.joint_names,
    )
    with np.load(path, allow_pickle=False) as file:
        assert str(file["frame"]) == "camera: x right, y down"
        assert str(file["rotation_6d_order"]) == "columns"
        assert file["axis_angle"].shape == (24, 3) and file["rotation_6d"].shape == (24, 6)
        np.testing.assert_allclose(rotations.axis_angle_to_matrix(file["axis_angle"]), pose, atol=2e-6)
        np.testing.assert_allclose(file["rotation_6d"], np.concatenate([pose[:, :, 0], pose[:, :, 1]], 1), atol=1e-6)
        np.testing.assert_array_equal(file["matrices"], pose)
        np.testing.assert_array_equal(file["joints"], joints)
        assert file["joint_names"].tolist() == list(body.joint_names)


def test_a_failed_write_leaves_the_old_file(tmp_path, body, pose):
    target = tmp_path / "pose.npz"
    export.write_npz(target, pose, frame="camera")
    before = target.read_bytes()
    with pytest.raises(ValueError, match="allow_pickle"):
        export.write_npz(target, pose, frame=object())
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pose.npz"]


def test_bad_input_is_named(tmp_path, body, pose):
    with pytest.raises(ValueError, match="frame must be"):
        export.write_obj(tmp_path / "x.obj", np.zeros((3, 3)), [[0, 1, 2]], frame="world")
    with pytest.raises(ValueError, match=r"rotations must be \(24, 3, 3\)"):
        export.write_skinned_glb(tmp_path / "x.glb", body, pose[:22])
    with pytest.raises(ValueError, match="at most 10"):
        export.write_skinned_glb(tmp_path / "x.glb", body, pose, betas=np.zeros(11))
    with pytest.raises(ValueError, match="finite"):
        export.write_glb(tmp_path / "x.glb", np.full((3, 3), np.nan), [[0, 1, 2]])
    with pytest.raises(ValueError, match="colors must have"):
        export.write_glb(tmp_path / "x.glb", np.eye(3), [[0, 1, 2]], colors=np.zeros((2, 3)))
    assert list(tmp_path.iterdir()) == []
