"""The body as pure functions: a plain NumPy statement of the paper, batching, transformations, subsets."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smpl_jax
from smpl_jax import BodyModel, Pose, axis_angle_to_matrix, load_body, load_body_arrays

from ..numerics import agree, near, rounded
from .models import random_arrays


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    path = tmp_path_factory.mktemp("body") / "body.pkl"
    path.write_bytes(pickle.dumps(random_arrays()))
    extra = {
        "regressor_tips": np.eye(200)[[3, 50]],
        "vertex_id_names": np.array(["nose", "heel"]),
        "vertex_ids": np.array([50, 9]),
    }
    return load_body_arrays(path) | extra


@pytest.fixture(scope="module")
def body(arrays):
    return BodyModel.from_arrays(arrays)


@pytest.fixture(scope="module")
def smplx_body(tmp_path_factory):
    path = tmp_path_factory.mktemp("body") / "x.pkl"
    path.write_bytes(pickle.dumps(random_arrays("smplx", num_vertices=50, num_shapes=20)))
    return load_body(path)


def random_pose(*batch, joints=24, seed=0):
    return np.random.default_rng(seed).normal(0, 0.7, (*batch, joints, 3)).astype(np.float32)


rotations_of = jax.jit(axis_angle_to_matrix)


def plain(arrays, rotations, betas, translation):
    """One body, joint by joint and in float64, as section 3 of the SMPL paper states it."""
    shaped = arrays["v_template"] + arrays["shapedirs"] @ betas
    rest = arrays["J_regressor"] @ shaped
    shaped = shaped + arrays["posedirs"] @ (rotations[1:] - np.eye(3)).ravel()
    world = []
    for joint, parent in enumerate(arrays["parents"]):
        local = np.eye(4)
        local[:3, :3] = rotations[joint]
        local[:3, 3] = rest[joint] - (rest[parent] if parent >= 0 else 0)
        world.append(world[parent] @ local if parent >= 0 else local)
    posed = np.zeros_like(shaped)
    for joint, transform in enumerate(world):
        moved = (shaped - rest[joint]) @ transform[:3, :3].T + transform[:3, 3]
        posed += arrays["weights"][:, joint : joint + 1] * moved
    return posed + translation, np.stack(world)[:, :3, 3] + translation


def test_against_a_plain_statement_of_the_paper(arrays, body):
    rng = np.random.default_rng(3)
    rotations = np.asarray(rotations_of(random_pose()))
    betas, translation = rng.normal(size=10), rng.normal(size=3)
    output = smpl_jax.forward(body, rotations, betas, translation)
    vertices, joints = plain(arrays, np.float64(rotations), betas, translation)
    near(output.vertices, vertices)
    near(output.joints, joints)


def test_rest_pose_is_the_template(arrays, body):
    output = smpl_jax.forward(body, np.broadcast_to(np.eye(3), (24, 3, 3)))
    np.testing.assert_allclose(output.vertices, arrays["v_template"], atol=1e-6)
    np.testing.assert_allclose(output.joints, arrays["J_regressor"] @ arrays["v_template"], atol=1e-6)


def test_root_turns_the_body_about_the_pelvis(body):
    pose = random_pose()
    turned = pose.copy()
    turned[0] = [np.pi, 0, 0]
    pose[0] = 0
    before, after = (smpl_jax.forward(body, rotations_of(p)) for p in (pose, turned))
    pelvis = np.asarray(before.joints[0])
    flip = np.array([1, -1, -1])  # x right, y up, z forward -> the camera frame's y down, z away
    assert np.linalg.norm(pelvis) > 0.01
    np.testing.assert_allclose(after.vertices, (before.vertices - pelvis) * flip + pelvis, atol=2e-6)
    np.testing.assert_allclose(after.joints, (before.joints - pelvis) * flip + pelvis, atol=2e-6)


def test_batch_shapes_broadcast(body):
    rotations = rotations_of(random_pose(2, 3))
    betas = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)  # fewer than the body's 10
    translation = np.ones((2, 1, 3), np.float32)
    output = smpl_jax.forward(body, rotations, betas, translation)
    assert output.vertices.shape == (2, 3, 200, 3) and output.joints.shape == (2, 3, 24, 3)
    one = smpl_jax.forward(body, rotations[1, 2], np.pad(betas[2], (0, 6)), translation[1, 0])
    np.testing.assert_allclose(output.vertices[1, 2], one.vertices, atol=1e-6)
    np.testing.assert_allclose(output.joints[1, 2], one.joints, atol=1e-6)
    np.testing.assert_allclose(smpl_jax.joints(body, rotations, betas, translation), output.joints, atol=1e-6)
    assert smpl_jax.vertices(body, rotations[:, :0]).shape == (2, 0, 200, 3)


@pytest.mark.parametrize("size", [5, 6, 7])
def test_chunks_change_nothing(size, body):
    """Sizes that do and do not divide into chunks of 3; gradients pass through too."""
    rotations, translation = (
        rotations_of(random_pose(size)),
        np.random.default_rng(1).normal(size=(size, 3)).astype(np.float32),
    )

    def run(chunk):
        def value(r):
            output = smpl_jax.forward(body, r, translation=translation, chunk=chunk)
            return jnp.sum(output.vertices**2) + jnp.sum(output.joints**2), output

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    jax.tree.map(agree, rounded(run(None), rotations), run(3)(rotations))


def test_large_batches_are_chunked_on_cpu(body):
    rotations = rotations_of(random_pose(65))
    traced = str(jax.make_jaxpr(lambda r: smpl_jax.vertices(body, r))(rotations))
    assert ("scan" in traced) == (jax.default_backend() == "cpu")
    assert "scan" not in str(jax.make_jaxpr(lambda r: smpl_jax.vertices(body, r[:64]))(rotations))


def test_jit_vmap_grad(body):
    pose = random_pose(3)

    def height(body, pose):
        return smpl_jax.vertices(body, axis_angle_to_matrix(pose))[..., 1].max(-1)

    together = jax.jit(height)(body, pose)
    np.testing.assert_allclose(jax.jit(jax.vmap(height, (None, 0)))(body, pose), together, atol=1e-6)
    by_pose = jax.jit(jax.vmap(jax.grad(height, argnums=1), (None, 0)))(body, jnp.zeros((2, 24, 3)))
    assert jnp.isfinite(by_pose).all() and jnp.abs(by_pose).max() > 0
    direction = random_pose(3, seed=1)
    forward_mode = jax.jit(lambda p: jax.jvp(lambda p: height(body, p), (p,), (direction,))[1])(pose)
    reverse_mode = jax.jit(jax.grad(lambda p: height(body, p).sum()))(pose)
    np.testing.assert_allclose(forward_mode, (reverse_mode * direction).sum((1, 2)), rtol=1e-4, atol=1e-5)
    by_body = jax.jit(jax.grad(lambda b: height(b, pose[0]), allow_int=True))(
        body
    )  # the template is a parameter like any other
    assert by_body.template.shape == (3, 200) and jnp.abs(by_body.template).max() > 0


def test_subset_of_vertices(body, arrays):
    ids = np.array([50, 3, 120, 7])
    part = body.subset(ids)
    rotations = rotations_of(random_pose(2))
    np.testing.assert_allclose(
        smpl_jax.vertices(part, rotations), smpl_jax.vertices(body, rotations)[:, ids], atol=1e-6
    )
    np.testing.assert_allclose(smpl_jax.joints(part, rotations), smpl_jax.joints(body, rotations), atol=1e-6)
    assert part.vertex_ids == (("nose", 0),) and "tips" in part.regressors
    whole = smpl_jax.regress(body, smpl_jax.vertices(body, rotations), "tips")
    np.testing.assert_allclose(smpl_jax.regress(part, smpl_jax.vertices(part, rotations), "tips"), whole, atol=1e-6)
    np.testing.assert_allclose(whole, smpl_jax.vertices(body, rotations)[:, [3, 50]], atol=1e-6)
    assert not body.subset(np.array([50, 9])).regressors
    face = np.asarray(body.faces)[4]
    corner = body.subset(np.unique(face))
    assert any(np.array_equal(np.unique(face)[f], face) for f in np.asarray(corner.faces))


def test_smplx_takes_smpl_poses_and_expressions(smplx_body):
    pose = random_pose(2)
    pose[:, 22:] = 5.0  # SMPL's rigid hands have no counterpart
    rotations = smpl_jax.for_body(Pose(rotations_of(pose), "model"), smplx_body)["rotations"]
    assert rotations.shape == (2, 55, 3, 3)
    np.testing.assert_array_equal(rotations[:, :22], rotations_of(pose)[:, :22])
    np.testing.assert_array_equal(rotations[:, 22:], np.broadcast_to(np.eye(3), (2, 33, 3, 3)))
    still = smpl_jax.vertices(smplx_body, rotations)
    smiling = smpl_jax.vertices(smplx_body, rotations, expression=np.ones(3))
    assert jnp.abs(smiling - still).max() > 1e-3
    bigger = jnp.concatenate([jnp.zeros(10), jnp.ones(3)])
    all_betas = BodyModel(
        **{f: getattr(smplx_body, f) for f in smplx_body.__dataclass_fields__} | {"num_betas": 20, "num_expression": 0}
    )
    np.testing.assert_allclose(smpl_jax.vertices(all_betas, rotations, bigger), smiling, atol=1e-6)


EYE = np.broadcast_to(np.eye(3), (24, 3, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda b, x: smpl_jax.joints(b, np.zeros((24, 3))),
            ValueError,
            r"must have shape \(\.\.\., 24, 3, 3\); got \(24, 3\)",
        ),
        (
            lambda b, x: smpl_jax.joints(x, EYE),
            ValueError,
            r"\(\.\.\., 55, 3, 3\); got \(24, 3, 3\); smpl_jax.for_body",
        ),
        (lambda b, x: smpl_jax.joints(b, np.zeros((8, 24, 3))), ValueError, "axis_angle_to_matrix converts axis-angle"),
        (lambda b, x: smpl_jax.joints(b, np.zeros((8, 72))), ValueError, "axis_angle_to_matrix converts axis-angle"),
        (
            lambda b, x: smpl_jax.joints(b, EYE, np.zeros(11)),
            ValueError,
            r"betas of body .* must have shape \(\.\.\., n\) with n <= 10",
        ),
        (lambda b, x: smpl_jax.joints(b, EYE, expression=np.zeros(1)), ValueError, "expression of body .* n <= 0"),
        (
            lambda b, x: smpl_jax.joints(b, EYE, translation=np.zeros(2)),
            ValueError,
            r"translation must have shape \(\.\.\., 3\)",
        ),
        (lambda b, x: smpl_jax.joints(b, np.stack([EYE] * 2), np.zeros((3, 10))), ValueError, "do not broadcast"),
        (lambda b, x: smpl_jax.vertices(b, EYE, chunk=0), ValueError, "chunk must be a positive number"),
        (lambda b, x: b.subset([0, 0]), ValueError, "without repeats"),
        (lambda b, x: b.subset([200]), ValueError, r"\[0, 200\); got 200 to 200"),
        (
            lambda b, x: smpl_jax.regress(b, np.zeros((200, 3)), "h36m"),
            ValueError,
            r"no regressor 'h36m'; its regressors are tips\. To add one: body.with_keypoints",
        ),
    ],
)
def test_bad_arguments(call, error, message, body, smplx_body):
    with pytest.raises(error, match=message):
        call(body, smplx_body)


def test_names_and_regressors_are_added_by_name():
    body = BodyModel.from_arrays({k: v for k, v in load_body_arrays().items() if not k.startswith("vertex_id")})
    with pytest.raises(
        ValueError,
        match=r"no vertex named 'nose'; its named vertices are none\. To name one: body.with_keypoints\(vertex_ids=",
    ):
        body.vertex_id("nose")
    weights = np.zeros((2, body.num_vertices))
    weights[[0, 1], [3, 5]] = 1
    named = body.with_keypoints(vertex_ids={"nose": 114}, regressors={"h36m": weights})
    assert named.vertex_id("nose") == 114 and body.vertex_ids == ()
    np.testing.assert_array_equal(named.regressors["h36m"] @ body.template.T, body.template.T[np.array([3, 5])])
    with pytest.raises(ValueError, match="its named vertices are nose"):
        named.vertex_id("tail")
    for wrong in ({"vertex_ids": {"nose": 6890}}, {"vertex_ids": {"nose": 1.5}}, {"regressors": {"x": weights[:, :9]}}):
        with pytest.raises(ValueError, match="must"):
            body.with_keypoints(**wrong)
