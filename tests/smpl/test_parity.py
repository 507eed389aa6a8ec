"""The body against smplx (PyTorch, Max Planck) and body-models (JAX and PyTorch), values and gradients, on random
models of SMPL's formats.
"""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpl_jax import BodyModel, axis_angle_to_matrix, forward, load_body, load_body_arrays

from ..numerics import EPS, MARGIN, near
from .models import random_arrays

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

FLOAT64 = 1e-8  # metres

POSES = {
    "moderate": lambda rng, shape: rng.normal(0, 0.3, shape),
    "up to pi": lambda rng, shape: directions(rng, shape) * rng.uniform(0, np.pi, (*shape[:-1], 1)),
    "up to 2.2 pi": lambda rng, shape: directions(rng, shape) * rng.uniform(0, 2.2 * np.pi, (*shape[:-1], 1)),
    "zero": lambda rng, shape: np.zeros(shape),
}


def directions(rng, shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def smpl_file(tmp_path_factory):
    """A random model with SMPL's 6 890 vertices (smplx picks keypoints by their numbers), rounded to float32 as smplx
    does on loading.
    """
    path = tmp_path_factory.mktemp("model") / "SMPL_NEUTRAL.pkl"
    arrays = random_arrays(num_vertices=6890)
    content = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    path.write_bytes(pickle.dumps(content, 4))
    return path


def lbs(arrays, pose, betas, gradient_of=None):
    """smplx's skinning function in float64, which serves all of its models; with the gradient of <vertices, g> +
    <joints, h>.

    Poses are axis-angle (N, J, 3) or matrices (N, J, 3, 3). Its axis-angle formula adds 1e-8 to the vector, which shows
    in float64.
    """
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("smplx.lbs")
    pose, betas = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (pose, betas))
    model = {
        k: torch.tensor(np.asarray(v, np.float64))
        for k, v in arrays.items()
        if k not in ("f", "parents") and v.dtype.kind == "f"
    }
    shapedirs = torch.cat([model["shapedirs"], model["expressiondirs"]], dim=-1)
    posedirs = model["posedirs"].reshape(-1, model["posedirs"].shape[-1]).T
    parents = torch.tensor(np.asarray(arrays["parents"], np.int64))
    vertices, joints = module.lbs(
        betas,
        pose if pose.ndim == 4 else pose.reshape(len(pose), -1),
        model["v_template"],
        shapedirs,
        posedirs,
        model["J_regressor"],
        parents,
        model["weights"],
        pose2rot=pose.ndim == 3,
    )
    gradients = ()
    if gradient_of is not None:
        g, h = (torch.tensor(x) for x in gradient_of)
        ((vertices * g).sum() + (joints * h).sum()).backward()
        gradients = (pose.grad.numpy(), betas.grad.numpy())
    return vertices.detach().numpy(), joints.detach().numpy(), *gradients


def poses(rng, joints):
    """(N, J, 3): two of each kind, the exactly zero pose among them."""
    return np.concatenate([make(rng, (2, joints, 3)) for make in POSES.values()])


@pytest.mark.parametrize("kind", ["smpl", "smplh", "smplx"])
def test_against_smplx_lbs(kind, tmp_path):
    (tmp_path / "body.pkl").write_bytes(
        pickle.dumps(random_arrays(kind, num_vertices=300, num_shapes=20 if kind == "smplx" else 10))
    )
    arrays = load_body_arrays(tmp_path / "body.pkl")
    rng = np.random.default_rng(1)
    pose = poses(rng, len(arrays["parents"]))
    batch = len(pose)
    betas = rng.normal(size=(batch, arrays["shapedirs"].shape[-1] + arrays["expressiondirs"].shape[-1]))
    cotangents = rng.normal(size=(batch, 300, 3)), rng.normal(size=(batch, pose.shape[1], 3))
    *expected, d_pose, d_betas = lbs(arrays, pose, betas, cotangents)
    exact = lbs(arrays, Rotation.from_rotvec(pose.reshape(-1, 3)).as_matrix().reshape(*pose.shape, 3), betas)

    def check(dtype, expected, tolerance, gradient_tolerance):
        body = BodyModel.from_arrays(arrays, dtype=dtype)

        def value(pose, shape):
            betas, expression = shape[:, : body.num_betas], shape[:, body.num_betas :]
            output = forward(body, axis_angle_to_matrix(pose), betas, expression=expression)
            return sum(jnp.vdot(o, c.astype(dtype)) for o, c in zip(output, cotangents)), output

        (_, output), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(
            pose.astype(dtype), betas.astype(dtype)
        )
        np.testing.assert_allclose(output.vertices, expected[0], atol=tolerance, rtol=0)
        np.testing.assert_allclose(output.joints, expected[1], atol=tolerance, rtol=0)
        for ours, theirs in zip(gradients, (d_pose, d_betas)):
            np.testing.assert_allclose(ours, theirs, atol=gradient_tolerance * np.abs(theirs).max(), rtol=0)

    largest, eps = np.abs(expected[0]).max(), np.finfo(np.float32).eps
    check(np.float32, expected, MARGIN * eps * largest, 4 * MARGIN * eps)  # a gradient sums 900 terms
    with jax.enable_x64(True):
        check(np.float64, exact, FLOAT64, 1e-6)


@pytest.fixture(scope="module")
def posed(smpl_file):
    """(pose, betas, translation, vertices, joints, gradient by pose, gradient by betas) as we compute them."""
    rng = np.random.default_rng(2)
    pose = poses(rng, 24).astype(np.float32)
    betas, translation = (rng.normal(size=(len(pose), n)).astype(np.float32) for n in (10, 3))
    body = load_body(smpl_file)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(pose, betas):
        output = forward(body, axis_angle_to_matrix(pose), betas, translation)
        return jnp.sum(output.vertices**2), output

    (_, output), gradients = run(pose, betas)
    return pose, betas, translation, *output, *gradients


def test_against_smplx_model(smpl_file, posed):
    """The module that people use, loaded from the same file; its first 24 of 45 joints are the kinematic ones."""
    torch = pytest.importorskip("torch")
    smplx = pytest.importorskip("smplx")
    peer = smplx.SMPL(str(smpl_file), batch_size=len(posed[0]))
    pose, betas, translation = (torch.tensor(x, requires_grad=True) for x in posed[:3])
    output = peer(
        betas=betas, global_orient=pose[:, :1].flatten(1), body_pose=pose[:, 1:].flatten(1), transl=translation
    )
    (output.vertices**2).sum().backward()
    near(posed[3], output.vertices.detach())
    near(posed[4], output.joints[:, :24].detach())
    for ours, theirs in zip(posed[5:], (pose.grad, betas.grad)):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=4 * MARGIN * EPS * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_against_body_models(backend, smpl_file, posed):
    module = pytest.importorskip(f"body_models.smpl.{backend}")
    convert = jnp.asarray if backend == "jax" else pytest.importorskip("torch").tensor
    peer = module.SMPL(model_path=smpl_file)
    pose, betas, translation = (convert(x) for x in posed[:3])
    keywords = {"pelvis_rotation": pose[:, 0], "shape": betas, "global_translation": translation}
    vertices = peer.forward_vertices(pose[:, 1:], **keywords)
    near(posed[3], vertices)
    skeleton = peer.forward_skeleton(pose[:, 1:], **keywords)
    near(posed[4], skeleton[..., :3, 3])


def test_gradients_against_body_models(smpl_file, posed):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("body_models.smpl.torch").SMPL(model_path=smpl_file)
    pose, betas, translation = (torch.tensor(x, requires_grad=True) for x in posed[:3])
    vertices = peer.forward_vertices(
        pose[:, 1:], pelvis_rotation=pose[:, 0], shape=betas, global_translation=translation
    )
    (vertices**2).sum().backward()
    for ours, theirs in zip(posed[5:], (pose.grad.numpy(), betas.grad.numpy())):
        assert np.isfinite(theirs).all()
        np.testing.assert_allclose(ours, theirs, atol=4 * MARGIN * EPS * np.abs(theirs).max(), rtol=0)
