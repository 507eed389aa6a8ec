"""Files read back by readers of their own: a small glTF reader below, numpy, and trimesh where it is installed."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest

from smpl_jax import body as body_functions
from smpl_jax import export, rotations
from smpl_jax.body import BodyModel
from smpl_jax.frames import turn
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
    path = export.write_skinned_glb(tmp_path / "body.glb", body, pose, betas, translation, frame="camera")
    vertices, joints = skin(*read_glb(path))
    expected = body_functions.forward(
        body, pose.astype(np.float32), betas.astype(np.float32), translation.astype(np.float32)
    )
    assert np.abs(vertices - np.asarray(expected.vertices) @ TURN).max() <= 1e-5
    assert list(joints) == list(body.joint_names)
    assert np.abs(np.stack(list(joints.values())) - np.asarray(expected.joints) @ TURN).max() <= 1e-5


def test_a_skinned_glb_of_a_body_as_it_rests_is_not_turned(tmp_path, body):
    rest = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    vertices, joints = skin(*read_glb(export.write_skinned_glb(tmp_path / "rest.glb", body, rest)))
    assert np.abs(vertices - np.asarray(body.template).T).max() <= 1e-5
    assert joints["head"][1] > joints["pelvis"][1]
    upright = rest.copy()
    upright[0] = TURN  # the same person, told in the camera frame, stands up in glTF as well
    _, joints = skin(*read_glb(export.write_skinned_glb(tmp_path / "up.glb", body, upright, frame="camera")))
    assert joints["head"][1] > joints["pelvis"][1] and joints["left_wrist"][0] > joints["right_wrist"][0]


def test_one_person_told_in_three_frames_is_one_file(tmp_path, body, pose):
    told = {}
    for frame in ("model", "camera", "z-up"):
        turned = pose.copy()
        turned[0] = turn("model", frame) @ pose[0]
        place = turn("model", frame) @ np.asarray(body.joint_template)[0]
        move = (place - np.asarray(body.joint_template)[0]).astype(
            np.float32
        )  # the pelvis, which the root leaves alone
        vertices = np.asarray(body_functions.vertices(body, turned, None, move))
        rig, _ = skin(*read_glb(export.write_skinned_glb(tmp_path / "r.glb", body, turned, None, move, frame=frame)))
        document, arrays = read_glb(export.write_glb(tmp_path / "s.glb", vertices, body.faces, frame=frame))
        told[frame] = rig, arrays[document["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    for rig, static in told.values():
        np.testing.assert_allclose(rig, told["model"][0], atol=1e-5)
        np.testing.assert_allclose(static, told["model"][0], atol=1e-5)


def test_weights_of_a_skinned_glb_are_normalised(tmp_path, body, pose):
    document, arrays = read_glb(export.write_skinned_glb(tmp_path / "body.glb", body, pose))
    attributes = document["meshes"][0]["primitives"][0]["attributes"]
    weights, joints = arrays[attributes["WEIGHTS_0"]], arrays[attributes["JOINTS_0"]]
    assert np.abs(weights.astype(np.float64).sum(1) - 1).max() < 1e-6
    assert (joints[weights == 0] == 0).all() and joints.max() < body.num_joints
    normals = arrays[attributes["NORMAL"]]
    assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-5


def test_more_than_four_joints_a_vertex_take_a_second_set(tmp_path, body, pose):
    rng = np.random.default_rng(0)
    weights = np.asarray(body.weights).copy()
    weights[:, 0] = 0
    weights[:6, 0] = rng.dirichlet(np.ones(6))
    busy = dataclasses.replace(body, weights=weights)
    document, arrays = read_glb(export.write_skinned_glb(tmp_path / "busy.glb", busy, pose, frame="camera"))
    assert "JOINTS_1" in document["meshes"][0]["primitives"][0]["attributes"]
    vertices, _ = skin(document, arrays)
    expected = np.asarray(body_functions.vertices(busy, pose)) @ TURN
    assert np.abs(vertices - expected).max() <= 1e-5


def test_static_glb_and_obj_are_the_same_mesh_upright(tmp_path, body, pose):
    vertices = np.asarray(body_functions.vertices(body, pose))
    colors = clothing_colors(body)
    document, arrays = read_glb(
        export.write_glb(tmp_path / "mesh.glb", vertices, body.faces, frame="camera", colors=colors)
    )
    primitive = document["meshes"][0]["primitives"][0]
    np.testing.assert_allclose(arrays[primitive["attributes"]["POSITION"]], vertices @ TURN, atol=1e-7)
    np.testing.assert_array_equal(arrays[primitive["indices"]].reshape(-1, 3), body.faces)
    linear = arrays[primitive["attributes"]["COLOR_0"]][:, :3]
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(srgb, colors, atol=1e-3)

    lines = export.write_obj(tmp_path / "mesh.obj", vertices, body.faces, frame="camera").read_text().splitlines()
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
        export.write_glb(tmp_path / "mesh.glb", vertices, body.faces),
        export.write_obj(tmp_path / "mesh.obj", vertices, body.faces),
    ):
        mesh = trimesh.load(path, force="mesh", process=False)
        assert len(mesh.faces) == len(body.faces)
        np.testing.assert_allclose(mesh.bounds, [vertices.min(0), vertices.max(0)], atol=1e-5)
        assert mesh.volume > 0.03


def test_a_failed_write_leaves_the_old_file(tmp_path, body, pose, monkeypatch):
    target = export.write_skinned_glb(tmp_path / "pose.glb", body, pose)
    before = target.read_bytes()

    def full(self, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(export._Glb, "write", full)
    with pytest.raises(OSError, match="no space left"):
        export.write_skinned_glb(target, body, pose)
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["pose.glb"]


def test_a_body_of_many_joints_keeps_them_apart(tmp_path):
    """Joint numbers beyond 255 do not fit in a byte."""
    path = export.write_skinned_glb(tmp_path / "chain.glb", chain(300), np.tile(np.eye(3), (300, 1, 1)))
    document, arrays = read_glb(path)
    numbers = arrays[document["meshes"][0]["primitives"][0]["attributes"]["JOINTS_0"]]
    np.testing.assert_array_equal(numbers[:, 0], np.arange(300))


def chain(joints):
    """A body whose every joint carries one vertex."""
    rng = np.random.default_rng(0)
    return BodyModel.from_arrays(
        {
            "v_template": rng.normal(size=(joints, 3)),
            "shapedirs": np.zeros((joints, 3, 0)),
            "expressiondirs": np.zeros((joints, 3, 0)),
            "posedirs": np.zeros((joints, 3, 9 * (joints - 1)), np.float32),
            "J_regressor": np.eye(joints),
            "weights": np.eye(joints),
            "f": np.arange(joints)[:, None] % 7 + [[0, 1, 2]],
            "parents": np.arange(joints) - 1,
            "model_name": "chain",
            "joint_names": [f"joint{k}" for k in range(joints)],
        },
        num_betas=0,
    )


def odd_meshes(body):
    """(name, vertices, faces, colors) of meshes that a modeller would not write, and users do."""
    rest, faces = np.asarray(body.template).T, np.asarray(body.faces)
    loose = np.concatenate([rest, rest[:3] + 1])
    yield "whole", rest, faces, None
    yield "coloured", rest, faces, clothing_colors(body)
    yield "loose vertices", loose, faces, None
    yield "the head's faces with all vertices", rest, faces[(rest[faces, 1] > 0.3).all(1)], None
    yield "one triangle", np.eye(3), [[0, 1, 2]], (1, 0, 0)
    yield "faces without area", np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]]), [[0, 1, 2], [0, 1, 1]], None
    yield "all in one place", np.ones((4, 3)), [[0, 1, 2], [0, 2, 3]], None
    yield "both sides", np.eye(3), [[0, 1, 2], [0, 2, 1]], None
    yield "tiny", rest * 1e-25, faces, None
    yield "huge", rest * 1e18, faces, None
    yield "65 535 vertices", np.resize(rest, (65_535, 3)), [[0, 1, 65_534]], None
    yield "65 536 vertices", np.resize(rest, (65_536, 3)), [[0, 1, 65_535]], None


@pytest.mark.parametrize("number", range(12))
def test_normals_of_odd_meshes_are_unit_in_the_file(number, tmp_path, body):
    _, vertices, faces, colors = list(odd_meshes(body))[number]
    document, arrays = read_glb(export.write_glb(tmp_path / "odd.glb", vertices, faces, colors=colors))
    normals = arrays[document["meshes"][0]["primitives"][0]["attributes"]["NORMAL"]]
    assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-5
    lines = export.write_obj(tmp_path / "odd.obj", vertices, faces).read_text().splitlines()
    normals = np.array([line.split()[1:] for line in lines if line.startswith("vn ")], float)
    assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-3


@pytest.fixture(scope="session")
def validate(tmp_path_factory):
    """The Khronos validator, from npm: a list of files -> each file's messages. Where it is not installed (`NODE_PATH`), npm fetches it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("the Khronos validator needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    environment = dict(os.environ)
    found = subprocess.run(["node", "-e", "require('gltf-validator')"], cwd=folder, capture_output=True)
    if found.returncode:
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "gltf-validator@2.0.0-dev.3.10"]
        fetched = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if fetched.returncode:
            pytest.skip(f"npm could not fetch gltf-validator: {fetched.stderr.strip()[-200:]}")
        environment["NODE_PATH"] = str(folder / "node_modules")
    script = """
      const fs = require("fs"), validator = require("gltf-validator");
      const check = (path) => validator.validateBytes(new Uint8Array(fs.readFileSync(path)), {maxIssues: 20});
      Promise.all(process.argv.slice(1).map(check)).then((all) => console.log(JSON.stringify(all.map((r) => r.issues))));
    """

    def run(paths):
        command = ["node", "-e", script, *map(str, paths)]
        return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    return run


@pytest.mark.slow
def test_khronos_validator(validate, tmp_path, body, pose):
    paths = [
        export.write_glb(tmp_path / f"{name}.glb", vertices, faces, colors=colors)
        for name, vertices, faces, colors in odd_meshes(body)
    ]
    weights = np.asarray(body.weights).copy()
    weights[:, :50] = np.random.default_rng(0).dirichlet(np.ones(24), 50).T
    head = np.flatnonzero(np.asarray(body.weights).argmax(0) == body.joint_names.index("head"))
    rigs = {
        "rig": (body, pose),
        "rig at rest": (body, np.tile(np.eye(3), (24, 1, 1))),
        "busy rig": (dataclasses.replace(body, weights=weights), pose),
        "head alone": (body.subset(head), pose),
        "loose rig": (body.subset(np.arange(0, body.num_vertices, 2)), pose),
        "chain": (chain(300), np.tile(TURN, (300, 1, 1))),
    }
    paths += [export.write_skinned_glb(tmp_path / f"{name}.glb", *rig) for name, rig in rigs.items()]
    colors = clothing_colors(body)
    paths.append(
        export.write_skinned_glb(tmp_path / "coloured rig.glb", body, pose, np.ones(10), [0, 1, 2], colors=colors)
    )
    wrong = {path.name: i["messages"] for path, i in zip(paths, validate(paths)) if i["numErrors"] or i["numWarnings"]}
    assert not wrong
    # It is the validator that says so: a normal of length 0 is an error to it.
    data = bytearray((tmp_path / "one triangle.glb").read_bytes())
    start = 28 + int.from_bytes(data[12:16], "little") + 36
    assert np.allclose(np.frombuffer(data[start : start + 36], np.float32), 3**-0.5)
    data[start : start + 12] = bytes(12)
    (tmp_path / "broken.glb").write_bytes(data)
    (issues,) = validate([tmp_path / "broken.glb"])
    assert issues["numErrors"] == 1 and issues["messages"][0]["code"] == "ACCESSOR_VECTOR3_NON_UNIT"


def test_bad_input_is_named(tmp_path, body, pose):
    with pytest.raises(ValueError, match="frame must be"):
        export.write_obj(tmp_path / "x.obj", np.zeros((3, 3)), [[0, 1, 2]], frame="world")
    with pytest.raises(ValueError, match=r"rotations must be \(24, 3, 3\)"):
        export.write_skinned_glb(tmp_path / "x.glb", body, pose[:22])
    with pytest.raises(ValueError, match="at most 10"):
        export.write_skinned_glb(tmp_path / "x.glb", body, pose, betas=np.zeros(11))
    with pytest.raises(ValueError, match="finite"):
        export.write_glb(tmp_path / "x.glb", np.full((3, 3), np.nan), [[0, 1, 2]])
    for write, name in ((export.write_glb, "x.glb"), (export.write_obj, "x.obj")):
        for faces in ([[0, 1, 3]], [[0, 1, -1]]):
            with pytest.raises(ValueError, match="faces must be vertex indices in \\[0, 3\\)"):
                write(tmp_path / name, np.eye(3), faces)
        with pytest.raises(ValueError, match="faces must be integers"):
            write(tmp_path / name, np.eye(3), [[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="a glTF mesh needs faces"):
        export.write_glb(tmp_path / "x.glb", np.eye(3), np.zeros((0, 3), int))
    with pytest.raises(ValueError, match=r"sRGB in 0\.\.1, found 0 to 255"):
        export.write_glb(tmp_path / "x.glb", np.eye(3), [[0, 1, 2]], colors=[0, 128, 255])
    with pytest.raises(ValueError, match="finite"):
        export.write_skinned_glb(tmp_path / "x.glb", body, np.full_like(pose, np.nan))
    with pytest.raises(ValueError, match="sum to 1"):
        unowned = dataclasses.replace(body, weights=body.weights.at[:, 7].set(0))
        export.write_skinned_glb(tmp_path / "x.glb", unowned, pose)
    with pytest.raises(ValueError, match="colors must have"):
        export.write_glb(tmp_path / "x.glb", np.eye(3), [[0, 1, 2]], colors=np.zeros((2, 3)))
    assert list(tmp_path.iterdir()) == []
