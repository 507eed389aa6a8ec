"""The default body: SMPL's format, a closed symmetric skin, and a shape that bends like a person's."""

import importlib.resources
import subprocess
import sys

import numpy as np
import pytest

from smpl_jax import body as body_functions
from smpl_jax import rotations
from smpl_jax.io import load_body, load_body_arrays

FLIP = np.array([-1.0, 1.0, 1.0])
SMPL_PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]


@pytest.fixture(scope="module")
def arrays():
    return load_body_arrays()


@pytest.fixture(scope="module")
def body():
    return load_body()


@pytest.fixture(scope="module")
def file():
    with importlib.resources.files("smpl_jax.default_body").joinpath("body.npz").open("rb") as handle:
        return dict(np.load(handle, allow_pickle=False))


def pose(body, **vectors):
    """(24, 3, 3) from axis-angle in degrees by joint name."""
    out = np.zeros((24, 3), np.float32)
    for name, vector in vectors.items():
        out[body.joint_names.index(name)] = np.radians(vector)
    return np.asarray(rotations.axis_angle_to_matrix(out))


def posed(body, **vectors):
    return np.asarray(body_functions.vertices(body, pose(body, **vectors)), np.float64)


def volume(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.einsum("fa,fa->f", a, np.cross(b, c)).sum() / 6


def slab_volume(vertices, faces, inside):
    """Volume of the piece of a mesh whose vertices are `inside`, its cuts closed by fans."""
    piece = faces[inside[faces].all(1)]
    edges = np.concatenate([piece[:, [0, 1]], piece[:, [1, 2]], piece[:, [2, 0]]])
    code, back = edges @ [len(vertices), 1], edges @ [1, len(vertices)]
    rim = edges[~np.isin(back, code)]
    # Each ring of the rim is closed around its own centre, so that a cut that has moved stays flat.
    ring = {}

    def root(v):
        while ring.setdefault(v, v) != v:
            v = ring[v]
        return v

    for a, b in rim:
        ring[root(a)] = root(b)
    owner = np.array([root(a) for a, _ in rim])
    total = volume(vertices, piece)
    for name in np.unique(owner):
        loop = rim[owner == name]
        center = vertices[loop[:, 0]].mean(0)
        total += np.einsum("a,ea->e", center, np.cross(vertices[loop[:, 1]], vertices[loop[:, 0]])).sum() / 6
    return total


def test_has_the_shapes_of_smpl_and_a_name_of_its_own(arrays, file):
    shapes = {
        "v_template": (6890, 3),
        "f": (13776, 3),
        "weights": (6890, 24),
        "J_regressor": (24, 6890),
        "shapedirs": (6890, 3, 10),
        "posedirs": (6890, 3, 207),
    }
    assert {name: arrays[name].shape for name in shapes} == shapes
    assert arrays["parents"].tolist() == SMPL_PARENTS
    assert file["kintree_table"].shape == (2, 24)
    assert str(arrays["model_name"]) == "chatpose-default"
    assert len(set(file["shape_names"].tolist())) == 10
    resource = importlib.resources.files("smpl_jax.default_body").joinpath("body.npz")
    assert len(resource.read_bytes()) < 1_000_000


def test_skin_is_one_closed_surface_facing_out(arrays):
    faces = arrays["f"]
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    code = edges.astype(np.int64) @ [6890, 1]
    assert len(np.unique(code)) == len(code)  # no edge is run along twice in one direction
    np.testing.assert_array_equal(np.sort(code), np.sort(edges.astype(np.int64) @ [1, 6890]))
    assert 6890 - len(edges) // 2 + len(faces) == 2
    assert len(np.unique(faces)) == 6890
    assert 0.05 < volume(arrays["v_template"].astype(np.float64), faces) < 0.08  # m³, 50 to 80 kg


def test_triangles_are_neither_slivers_nor_long(arrays):
    corners = arrays["v_template"][arrays["f"]].astype(np.float64)
    sides = corners - np.roll(corners, 1, axis=1)
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
    quality = 4 * np.sqrt(3) * area / (sides**2).sum((1, 2))  # 1 for equilateral
    assert quality.min() > 0.02 and np.median(quality) > 0.8
    assert np.percentile(np.linalg.norm(sides, axis=2), 99) < 0.05


def test_left_and_right_mirror_each_other(arrays, file):
    twin = file["vert_sym_idxs"].astype(int)
    np.testing.assert_array_equal(twin[twin], np.arange(6890))
    template = arrays["v_template"]
    np.testing.assert_array_equal(template[twin], template * FLIP.astype(np.float32))
    mirrored = {tuple(np.roll(f, -f.argmin())) for f in twin[arrays["f"]][:, ::-1]}
    assert mirrored == {tuple(np.roll(f, -f.argmin())) for f in arrays["f"].astype(int)}
    names = arrays["joint_names"].tolist()
    other = [names.index(n.replace("left", "?").replace("right", "left").replace("?", "right")) for n in names]
    np.testing.assert_allclose(arrays["weights"][twin][:, other], arrays["weights"], atol=2 / 65535)
    np.testing.assert_allclose(
        arrays["shapedirs"][twin] * FLIP[:, None], arrays["shapedirs"], atol=1.01 * file["shapedirs_scale"].max()
    )
    sign = np.outer(FLIP, FLIP)
    directions = arrays["posedirs"].reshape(6890, 3, 23, 3, 3)
    image = directions[twin][:, :, np.array(other[1:]) - 1] * FLIP[:, None, None, None] * sign
    np.testing.assert_allclose(image, directions, atol=1.01 * file["posedirs_scale"].max())


def test_a_mirrored_pose_gives_the_mirrored_body(body, file):
    twin = file["vert_sym_idxs"].astype(int)
    left = posed(body, left_shoulder=(10, -30, -60), left_knee=(70, 0, 0), spine2=(10, 20, 5))
    right = posed(body, right_shoulder=(10, 30, 60), right_knee=(70, 0, 0), spine2=(10, -20, -5))
    assert np.abs(left[twin] * FLIP - right).max() < 5e-4


def test_weights_are_a_partition_of_unity_over_four_joints(arrays):
    weights = arrays["weights"]
    np.testing.assert_allclose(weights.sum(1, dtype=np.float64), 1, atol=1e-6)
    assert weights.min() >= 0
    assert ((weights > 0).sum(1) <= 4).all()
    assert ((weights > 0.5).sum(0) > 20).all()  # every joint moves something


def test_joints_lie_where_the_skeleton_has_them(arrays):
    skeleton = pytest.importorskip("smpl_jax.default_body.skeleton")
    joints = arrays["J_regressor"].astype(np.float64) @ arrays["v_template"]
    assert np.abs(joints - (skeleton.joint_positions() - skeleton.ORIGIN)).max() < 2e-4
    np.testing.assert_allclose(arrays["J_regressor"].sum(1), 1, atol=1e-6)
    assert arrays["J_regressor"].min() >= 0
    assert np.linalg.norm(joints[0]) > 0.1  # the pelvis is not the origin: code that forgets it shows


def test_proportions_are_human(arrays, body):
    """Lengths in the range of adults; fractions of stature after Drillis & Contini as given by Winter."""
    vertices, joints = arrays["v_template"], np.asarray(body.joint_template)
    at = dict(zip(body.joint_names, joints))
    stature = np.ptp(vertices[:, 1])
    assert 1.65 < stature < 1.80
    assert 0.97 < np.ptp(vertices[:, 0]) / stature < 1.06  # span
    for upper, lower, fraction in (
        ("left_hip", "left_knee", 0.245),
        ("left_knee", "left_ankle", 0.246),
        ("left_elbow", "left_wrist", 0.146),
    ):
        assert np.linalg.norm(at[upper] - at[lower]) / stature == pytest.approx(fraction, abs=0.015), (upper, lower)
    assert at["left_hip"][0] > 0.05 and at["head"][1] > at["neck"][1] > at["spine3"][1]


def test_named_vertices_are_where_their_names_say(arrays, body):
    vertices = arrays["v_template"]
    low, high = vertices.min(0), vertices.max(0)
    place = {name: vertices[body.vertex_id(name)] for name in dict(body.vertex_ids)}
    assert place["head_top"][1] > high[1] - 0.01
    assert place["left_middle_tip"][0] > high[0] - 0.005
    assert place["left_heel"][1] < low[1] + 0.06 and place["left_heel"][2] < place["left_big_toe"][2] - 0.2
    assert place["left_small_toe"][0] > place["left_big_toe"][0] > 0
    head = vertices[:, 1] > place["chin"][1]
    assert place["nose"][2] > vertices[head, 2].max() - 0.005
    assert place["left_eye"][1] > place["nose"][1] > place["mouth"][1] > place["chin"][1]
    assert place["left_ear"][0] > 0.07
    tips = [place[f"left_{finger}_tip"][2] for finger in ("thumb", "index", "middle", "ring", "pinky")]
    assert tips == sorted(tips, reverse=True)
    for name in place:
        if name.startswith("left_"):
            np.testing.assert_array_equal(place["right_" + name[5:]], place[name] * FLIP.astype(np.float32))


@pytest.mark.parametrize(
    ("joint", "bend", "inside"),
    [
        ("left_elbow", (0, -90, 0), lambda v: (v[:, 0] > 0.30) & (v[:, 0] < 0.60)),
        ("left_knee", (90, 0, 0), lambda v: (v[:, 0] > 0) & (v[:, 1] < -0.50) & (v[:, 1] > -0.86)),
    ],
)
def test_bending_keeps_volume(body, arrays, joint, bend, inside):
    faces, rest = arrays["f"], arrays["v_template"].astype(np.float64)
    near = inside(rest)
    before = slab_volume(rest, faces, near)
    after = slab_volume(posed(body, **{joint: bend}), faces, near)
    assert 0.0005 < before < 0.02
    assert abs(after / before - 1) < 0.05


def test_arms_hang_from_shoulders_that_neither_bulge_nor_collapse(body, arrays):
    faces, rest = arrays["f"], arrays["v_template"].astype(np.float64)
    down = posed(body, left_shoulder=(0, 0, -75), right_shoulder=(0, 0, 75))
    assert abs(volume(down, faces) / volume(rest, faces) - 1) < 0.03
    shoulder = np.asarray(body.joint_template)[body.joint_names.index("left_shoulder")]
    near = np.linalg.norm(rest - shoulder, axis=1) < 0.10
    distance = np.linalg.norm(down - shoulder, axis=1)[near]
    assert distance.max() < 0.135
    tip = down[body.vertex_id("left_middle_tip")]
    assert tip[1] < shoulder[1] - 0.6 and 0.2 < tip[0] < 0.5
    # The widest place at the height of the deltoids lies beyond the joint by a deltoid, no more.
    level = (np.abs(down[:, 1] - shoulder[1] + 0.05) < 0.05) & (down[:, 0] > 0)
    assert 0.03 < down[level, 0].max() - shoulder[0] < 0.09


@pytest.mark.parametrize("joint", ["left_hip", "left_knee", "left_shoulder", "left_elbow", "neck", "spine2"])
def test_nothing_bulges_over_the_range_of_a_joint(body, arrays, joint):
    """A vertex that turns about one joint keeps its distance: plain skinning shortens it, bad correctives stretch it."""
    rig = pytest.importorskip("smpl_jax.default_body.rig")
    k = body.joint_names.index(joint)
    rotations = np.tile(np.eye(3, dtype=np.float32), (24, 24, 1, 1))
    rotations[:, k] = rig.sample_rotations(joint, 24)
    center = np.asarray(body.joint_template)[k]
    rest = np.linalg.norm(arrays["v_template"] - center, axis=1)
    change = np.linalg.norm(np.asarray(body_functions.vertices(body, rotations)) - center, axis=2) - rest
    assert change.max() < 0.010
    assert change.min() > -0.060
    uncorrected = {name: np.zeros_like(v) if name == "posedirs" else v for name, v in arrays.items()}
    plain = body_functions.vertices(body_functions.BodyModel.from_arrays(uncorrected), rotations)
    lost = np.linalg.norm(np.asarray(plain) - center, axis=2) - rest
    assert np.square(change).sum() < 0.25 * np.square(lost).sum()


def test_shape_directions_do_what_they_are_named(body, arrays, file):
    names = file["shape_names"].tolist()
    rest = arrays["v_template"].astype(np.float64)
    change = {n: rest + arrays["shapedirs"][:, :, k].astype(np.float64) * 2 for k, n in enumerate(names)}
    assert np.ptp(change["stature"][:, 1]) > np.ptp(rest[:, 1]) + 0.08
    assert volume(change["girth"], arrays["f"]) > 1.15 * volume(rest, arrays["f"])
    assert np.ptp(change["arm_length"][:, 0]) > np.ptp(rest[:, 0]) + 0.05
    assert abs(np.ptp(change["arm_length"][:, 1]) - np.ptp(rest[:, 1])) < 1e-3
    assert np.ptp(change["leg_length"][:, 1]) > np.ptp(rest[:, 1]) + 0.05
    waist = np.abs(rest[:, 1] + 0.10) < 0.03
    assert change["belly"][waist, 2].max() > rest[waist, 2].max() + 0.02
    # Smooth: along an edge a direction changes by a small part of the edge.
    edges = arrays["f"][:, :2]
    length = np.linalg.norm(rest[edges[:, 0]] - rest[edges[:, 1]], axis=1)
    for name, shaped in change.items():
        shift = (shaped - rest)[edges]
        assert (np.linalg.norm(shift[:, 0] - shift[:, 1], axis=1) / length).max() < 0.6, name


def test_joints_follow_the_shape(body, file):
    still = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))

    def bone(a, b, **coefficients):
        betas = np.array([coefficients.get(n, 0) for n in file["shape_names"].tolist()], np.float32)
        joints = np.asarray(body_functions.joints(body, still, betas))
        return np.linalg.norm(joints[body.joint_names.index(a)] - joints[body.joint_names.index(b)])

    for a, b, name in (("left_elbow", "left_wrist", "arm_length"), ("left_knee", "left_ankle", "leg_length")):
        assert bone(a, b, **{name: 2}) == pytest.approx(1.1 * bone(a, b), rel=0.02)
    assert bone("pelvis", "head", stature=2) == pytest.approx(1.06 * bone("pelvis", "head"), rel=0.01)
    assert bone("left_shoulder", "right_shoulder", belly=2) == pytest.approx(bone("left_shoulder", "right_shoulder"))


def test_extreme_shapes_stay_turned_outwards(body, arrays):
    faces = arrays["f"]
    rest = arrays["v_template"].astype(np.float64)[faces]
    normal = np.cross(rest[:, 1] - rest[:, 0], rest[:, 2] - rest[:, 0])
    rng = np.random.default_rng(0)
    still = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    for betas in rng.choice([-2.0, 2.0], (6, 10)).astype(np.float32):
        shaped = np.asarray(body_functions.vertices(body, still, betas), np.float64)[faces]
        turned = np.cross(shaped[:, 1] - shaped[:, 0], shaped[:, 2] - shaped[:, 0])
        assert ((normal * turned).sum(1) < 0).mean() < 0.002


def test_building_without_its_packages_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['fast_simplification'] = None\n"
        "from smpl_jax.default_body import generate\n"
        f"sys.argv = ['generate', {str(tmp_path / 'x.npz')!r}]\n"
        "generate.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "'.[body]'" in result.stderr and "fast-simplification" in result.stderr
    assert not (tmp_path / "x.npz").exists()


def distances(ours, theirs):
    """Of each vertex of theirs from our surface, by the plane of our nearest vertex, and of its shape directions from that vertex's: metres."""
    place, faces = ours["v_template"].astype(np.float64), ours["f"]
    normals = np.zeros_like(place)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], np.cross(*(place[faces[:, k]] - place[faces[:, 0]] for k in (1, 2))))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    _, nearest = pytest.importorskip("scipy.spatial").cKDTree(place).query(theirs["v_template"])
    away = np.abs(np.sum((theirs["v_template"] - place[nearest]) * normals[nearest], axis=1))
    return away, np.abs(theirs["shapedirs"] - ours["shapedirs"][nearest]).max(axis=(1, 2))


@pytest.mark.slow
def test_generating_again_gives_the_same_body(tmp_path, file):
    for module in ("skimage", "scipy", "fast_simplification"):
        pytest.importorskip(module)
    from smpl_jax.default_body import generate

    again = dict(np.load(generate.write(tmp_path / "again.npz"), allow_pickle=False))
    assert sorted(again) == sorted(file)
    old, new = load_body_arrays(), load_body_arrays(tmp_path / "again.npz")
    place = [a["v_template"].astype(np.float64) for a in (old, new)]
    assert volume(place[1], new["f"]) == pytest.approx(volume(place[0], old["f"]), rel=2e-3)
    np.testing.assert_allclose(place[1].min(0), place[0].min(0), atol=2e-3)
    np.testing.assert_allclose(new["J_regressor"] @ place[1], old["J_regressor"] @ place[0], atol=3e-4)
    for ours, theirs in ((old, new), (new, old)):
        away, shape_away = distances(ours, theirs)
        assert np.median(away) < 2e-4 and np.percentile(away, 99) < 2e-3
        assert np.percentile(shape_away, 99) < 2e-3
    for name, value in file.items():
        if value.dtype.kind == "U" and name != "built_with":
            np.testing.assert_array_equal(again[name], value, err_msg=name)
    if not np.array_equal(new["f"], old["f"]):
        return  # other versions, or a processor that rounds otherwise, thin the mesh in another order: the same shape in other triangles
    for name, value in file.items():
        if value.dtype.kind == "U" or name in ("f", "vert_sym_idxs", "vertex_ids", "kintree_table"):
            np.testing.assert_array_equal(again[name], value, err_msg=name)
        elif f"{name}_scale" in file:
            assert np.abs(again[name].astype(int) - value.astype(int)).max() <= 2, name
        else:
            np.testing.assert_allclose(again[name], value, atol=1e-4, err_msg=name)
