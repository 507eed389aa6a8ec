"""The layer with smplx's keywords, against smplx itself where it is installed, and body-models."""

import pickle
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smpl_jax
from smpl_jax import BodyFileError, axis_angle_to_matrix, create
from smpl_jax.layer import _PARTS as PARTS
from smpl_jax.layer import _VERTEX_JOINTS as VERTEX_JOINTS

from .models import random_arrays

ROOT = Path(__file__).resolve().parents[2]
METRES = 2e-6  # float32 on a body of some two metres, the bound of test_parity
VERTICES = {"smpl": 6890, "smplh": 6890, "smplx": 10475}  # smplx knows vertices by number


def body_arrays(kind, num_vertices, seed=0):
    """What a file of this kind holds: hands and landmarks too, as their files name them, float32 as smplx rounds them."""
    rng = np.random.default_rng(seed)
    arrays = random_arrays(kind, num_vertices, 20 if kind == "smplx" else 10, seed)
    if kind != "smpl":
        for side in "lr":
            arrays[f"hands_components{side}"] = rng.normal(0, 0.3, (45, 45))
            arrays[f"hands_mean{side}"] = rng.normal(0, 0.3, 45)
    if kind == "smplx":
        arrays["lmk_faces_idx"] = rng.integers(0, len(arrays["f"]), 51)
        arrays["lmk_bary_coords"] = rng.dirichlet(np.ones(3), 51)
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as smplx lays it out, with small bodies: NEUTRAL of each kind, and a male SMPL."""
    root = tmp_path_factory.mktemp("bodies")
    for kind, gender in (("smpl", "NEUTRAL"), ("smpl", "MALE"), ("smplh", "NEUTRAL"), ("smplx", "NEUTRAL")):
        (root / kind).mkdir(exist_ok=True)
        arrays = body_arrays(kind, 120, seed=len(gender))
        if kind == "smplx":
            np.savez(root / kind / f"SMPLX_{gender}.npz", **arrays)
        else:
            (root / kind / f"{kind.upper()}_{gender}.pkl").write_bytes(pickle.dumps(arrays, 4))
    return root


def arguments(kind, batch, rng, components=6):
    widths = {"betas": 10, "global_orient": 3, "body_pose": 69 if kind == "smpl" else 63, "transl": 3}
    if kind != "smpl":
        widths |= {"left_hand_pose": components, "right_hand_pose": components}
    if kind == "smplx":
        widths |= {"expression": 10, "jaw_pose": 3, "leye_pose": 3, "reye_pose": 3}
    return {name: rng.normal(0, 0.4, (batch, n)).astype(np.float32) for name, n in widths.items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("smpl", {}),
        ("smplh", {}),
        ("smplh", {"use_pca": False}),
        ("smplx", {}),
        ("smplx", {"use_pca": True, "num_pca_comps": 12, "flat_hand_mean": True}),
        ("smplx", {"use_pca": False}),
    ],
)
def test_the_same_call_gives_what_smplx_gives(kind, options, tmp_path):
    torch, smplx = pytest.importorskip("torch"), pytest.importorskip("smplx")
    ids = smplx.vertex_ids.vertex_ids["smplx" if kind == "smplx" else "smplh"]
    ext = "npz" if kind == "smplx" else "pkl"
    path = tmp_path / kind / f"{kind.upper()}_NEUTRAL.{ext}"
    path.parent.mkdir()
    arrays = body_arrays(kind, VERTICES[kind])
    if ext == "npz":
        np.savez(path, **arrays)
    else:
        path.write_bytes(pickle.dumps(arrays, 4))
    given = arguments(
        kind, 3, np.random.default_rng(1), options.get("num_pca_comps", 6) if options.get("use_pca", True) else 45
    )
    theirs = smplx.create(tmp_path, kind, ext=ext, batch_size=3, **options)(
        **{k: torch.tensor(v) for k, v in given.items()}, return_full_pose=True
    )
    model = create(tmp_path, kind, ext=ext, batch_size=3, vertex_ids=ids, **options)
    ours = model(**given, return_full_pose=True)
    assert ours.joints.shape[-2] == len(model.joint_names) == {"smpl": 45, "smplh": 73, "smplx": 127}[kind]
    for name in ("vertices", "joints", "full_pose"):
        assert getattr(ours, name).shape == getattr(theirs, name).shape
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name).detach(), atol=METRES, rtol=0)
    lean = model(**given, return_verts=False)
    assert lean.vertices is None and lean.full_pose is None
    np.testing.assert_allclose(lean.joints, theirs.joints.detach(), atol=METRES, rtol=0)


def test_the_same_call_gives_what_body_models_gives(folder):
    convert = pytest.importorskip("torch").tensor
    peer = pytest.importorskip("body_models.smpl.torch").SMPL(model_path=folder / "smpl/SMPL_NEUTRAL.pkl")
    given = arguments("smpl", 4, np.random.default_rng(2))
    ours = create(folder)(**given)
    keywords = {"pelvis_rotation": "global_orient", "shape": "betas", "global_translation": "transl"}
    keywords = {theirs: convert(given[name]) for theirs, name in keywords.items()}
    pose = convert(given["body_pose"].reshape(4, 23, 3))
    np.testing.assert_allclose(ours.vertices, peer.forward_vertices(pose, **keywords), atol=METRES, rtol=0)
    skeleton = peer.forward_skeleton(pose, **keywords)
    np.testing.assert_allclose(ours.joints, skeleton[..., :3, 3], atol=METRES, rtol=0)


@pytest.mark.parametrize("kind", ["smpl", "smplh", "smplx"])
def test_parts_are_the_joints_in_order(kind, folder):
    """Peer: `forward` with the pose put together by hand, hands from components and mean."""
    model = create(folder, kind)
    given = arguments(kind, 2, np.random.default_rng(3))
    arrays = smpl_jax.load_body_arrays(next((folder / kind).glob("*NEUTRAL*")))
    hands = [
        given[f"{side}_hand_pose"] @ arrays[f"hands_components{side[0]}"][:6] + arrays[f"hands_mean{side[0]}"]
        for side in ("left", "right")
        if kind != "smpl"
    ]
    face = [given[name] for name in ("jaw_pose", "leye_pose", "reye_pose") if name in given]
    pose = np.concatenate([given["global_orient"], given["body_pose"], *face, *hands], axis=-1)
    body = smpl_jax.load_body(next((folder / kind).glob("*NEUTRAL*")))
    rotations = axis_angle_to_matrix(pose.reshape(2, -1, 3))
    expected = smpl_jax.forward(body, rotations, given["betas"], given["transl"], expression=given.get("expression"))
    output = model(**given, return_full_pose=True)
    np.testing.assert_allclose(output.vertices, expected.vertices, atol=METRES, rtol=0)
    np.testing.assert_allclose(output.joints[:, : body.num_joints], expected.joints, atol=METRES, rtol=0)
    np.testing.assert_allclose(output.full_pose, pose, atol=1e-6)
    assert model.joint_names[: body.num_joints] == body.joint_names

    ends = np.cumsum([1, 23 if kind == "smpl" else 21, *[1] * len(face), *[15] * len(hands)])
    parts = dict(zip([name for name, _ in PARTS[body.num_joints][1]], np.split(rotations, ends[:-1], axis=1)))
    shape = {name: given[name] for name in ("betas", "transl", "expression") if name in given}
    matrices = model(**parts, **shape, pose2rot=False)
    np.testing.assert_allclose(matrices.vertices, expected.vertices, atol=METRES, rtol=0)


def test_appended_joints_are_vertices_and_landmarks(folder):
    ids = {name: 5 * k for k, name in enumerate(VERTEX_JOINTS)}
    model = create(folder, "smplx", vertex_ids=ids)
    output = model(**arguments("smplx", 2, np.random.default_rng(4)))
    assert output.joints.shape == (2, 55 + 21 + 51, 3)
    assert model.joint_names[55:57] == ("nose", "right_eye") and model.joint_names[-1] == "face_landmark50"
    np.testing.assert_array_equal(output.joints[:, 55:76], output.vertices[:, list(ids.values())])
    with np.load(folder / "smplx/SMPLX_NEUTRAL.npz") as file:
        corners = np.asarray(output.vertices)[:, file["f"].astype(int)[file["lmk_faces_idx"]]]
        landmarks = np.einsum("blkc,lk->blc", corners, file["lmk_bary_coords"])
    np.testing.assert_allclose(output.joints[:, 76:], landmarks, atol=METRES, rtol=0)
    plain = create(folder, "smpl")
    assert plain.joint_names == plain.body.joint_names  # SMPL's own files name no vertex
    assert create().joint_names[24:26] == ("nose", "right_eye") and len(create().joint_names) == 45


def test_defaults_and_shapes(folder):
    model = create(folder, gender="male", batch_size=2)
    rest = model()
    assert rest.vertices.shape == (2, 120, 3) and rest.joints.shape == (2, 24, 3)
    male = smpl_jax.load_body(folder / "smpl/SMPL_MALE.pkl")
    np.testing.assert_allclose(rest.vertices[1], male.template.T, atol=METRES)
    pose = np.random.default_rng(5).normal(0, 0.3, (1, 69)).astype(np.float32)
    one = create(folder, gender="male")
    wide = one(body_pose=pose, betas=np.ones((4, 10)))  # broadcasts where smplx repeats
    assert wide.vertices.shape == (4, 120, 3)
    same = one(body_pose=pose.reshape(1, 23, 3), global_orient=np.zeros((1, 1, 3)), betas=np.ones(10))
    np.testing.assert_allclose(same.vertices, wide.vertices[:1], atol=METRES)
    fast = jax.jit(lambda layer, pose: layer(body_pose=pose, betas=jnp.ones(10), return_verts=False).joints)
    np.testing.assert_allclose(fast(one, pose), same.joints, atol=METRES)
    gradient = jax.grad(lambda pose: one(body_pose=pose).vertices.sum())(jnp.zeros((1, 69)))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    assert one.faces.shape == (236, 3) and repr(one) == "Layer('smpl', 120 vertices, 24 joints)"
    for thing in (one, one.body, wide, smpl_jax.forward(one.body, np.tile(np.eye(3), (24, 1, 1)))):
        assert len(repr(thing)) < 100 and "\n" not in repr(thing)


@pytest.mark.parametrize(
    ("make", "call", "words"),
    [
        ({"model_type": "smplz"}, {}, "model_type must be smpl, smplh or smplx"),
        ({"gender": "female"}, {}, "found no female smpl body; expected one of .*SMPL_FEMALE.npz"),
        ({"use_face_contour": True}, {}, "use_face_contour=True is not supported"),
        ({"v_template": np.zeros((3, 3))}, {}, "is not supported: replace v_template"),
        ({"vertex_ids": {"nose": 3}}, {}, "it lacks reye, leye"),
        ({"vertex_ids": {"nose": 3000}}, {}, r"vertex 'nose' must be a number in \[0, 120\)"),
        ({"vertex_ids": {"nose": "3"}}, {}, r"vertex 'nose' must be a number in \[0, 120\); found '3'"),
        ({"batch_size": 1.5}, {}, "batch_size must be a whole number of at least 1; found 1.5"),
        ({"batch_size": 0}, {}, "batch_size must be a whole number of at least 1; found 0"),
        ({"gender": None}, {}, "gender must be text; found None"),
        ({"model_type": "smplx", "num_pca_comps": 46}, {}, "num_pca_comps must be 1 to 45"),
        ({}, {"body_pose": np.zeros((1, 63))}, r"body_pose must have shape \(B, 69\) or \(B, 23, 3\), axis-angle; got"),
        ({}, {"body_pose": np.zeros((1, 23, 3, 3))}, "pose2rot=False takes matrices"),
        ({}, {"body_pose": np.zeros((1, 69)), "pose2rot": False}, r"must have shape \(B, 23, 3, 3\)"),
        ({}, {"jaw_pose": np.zeros((1, 3))}, "has no jaw_pose"),
        ({}, {"expression": np.zeros((1, 3))}, "expression of body .* must have shape"),
        ({"model_type": "smplx"}, {"left_hand_pose": np.zeros((1, 45))}, r"\(B, 6\) of components"),
        ({}, {"body_pose": np.zeros((3, 69)), "global_orient": np.zeros((2, 3))}, "do not broadcast"),
    ],
)
def test_what_does_not_fit_is_named(make, call, words, folder):
    with pytest.raises(ValueError, match=words):
        create(folder, **make)(**call)


def test_files_go_by_what_is_in_them(folder, tmp_path):
    assert create(folder / "smplx/SMPLX_NEUTRAL.npz").body.num_joints == 55
    with pytest.raises(ValueError, match=r"has the 55 joints of smplx, not of smplh"):
        create(folder / "smplx/SMPLX_NEUTRAL.npz", "smplh")
    with pytest.raises(BodyFileError, match="No such file"):
        create(folder / "nothing.npz")
    with pytest.raises(TypeError, match="unexpected keyword argument 'genre'"):
        create(folder, genre="male")
    create(folder, create_transl=False, use_face_contour=False, joint_mapper=None)
    (tmp_path / "handless.pkl").write_bytes(pickle.dumps(random_arrays("smplh", 50), 4))
    with pytest.raises(ValueError, match="lacks hands_componentsl, hands_componentsr; use_pca=False"):
        create(tmp_path / "handless.pkl")
    create(tmp_path / "handless.pkl", use_pca=False, flat_hand_mean=True)


@pytest.mark.parametrize("page", ["coming-from-smplx.md", "body.md"])
def test_the_pages_examples_run(page, tmp_path, monkeypatch):
    """But for the one that needs a clip of motion capture, which tests/smpl/test_mocap.py reads."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.S)
    code = "\n".join(block for block in blocks if "read_clip" not in block)
    exec(code.replace('load_body("SMPL_NEUTRAL.pkl")', "load_body()"), {})
    written = {
        "coming-from-smplx.md": {"rest.png", "rest.obj", "rest.glb", "mine.npz"},
        "body.md": {"posed.png", "pose.png", "pose.glb", "pose.obj", "rig.glb", "pose.npz", "clip_poses.npz"},
    }
    assert {path.name for path in tmp_path.iterdir()} == written[page]
