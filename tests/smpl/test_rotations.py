"""Conversions against SciPy, and finite values and gradients at the rotations where textbook formulas break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpl_jax import rotations as rot

Rotation = pytest.importorskip("scipy.spatial.transform").Rotation

AXES = np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1], [0.6, 0, 0.8], [-1 / 3, 2 / 3, 2 / 3]])
ANGLES = {
    "zero": 0.0,
    "1e-8": 1e-8,
    "1e-3": 1e-3,
    "0.0632": 0.0632,
    "one": 1.0,
    "nearly pi": np.pi - 1e-4,
    "pi": np.pi,
    "2 pi": 2 * np.pi,
}
TOLERANCE = {dtype: 32 * np.finfo(dtype).eps for dtype in (np.float32, np.float64)}
"""A rotation is some thirty products and sums of numbers of at most 1."""


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param is np.float64):
        yield request.param


@pytest.fixture
def rotvecs(dtype):
    random = np.random.default_rng(0).normal(size=(5, 20, 3))
    special = [angle * AXES for angle in ANGLES.values()]
    return np.concatenate([random.reshape(-1, 3), *special]).reshape(7, -1, 3).astype(dtype)


def as_matrix(rotvecs):
    return (
        Rotation.from_rotvec(rotvecs.reshape(-1, 3).astype(np.float64)).as_matrix().reshape(*rotvecs.shape[:-1], 3, 3)
    )


def test_axis_angle_against_scipy(rotvecs, dtype):
    expected = as_matrix(rotvecs)
    tolerance = TOLERANCE[dtype]
    matrix = rot.axis_angle_to_matrix(rotvecs)
    assert matrix.dtype == dtype
    np.testing.assert_allclose(matrix, expected, atol=tolerance)
    quaternion = rot.axis_angle_to_quaternion(rotvecs)
    expected_quaternion = (
        Rotation.from_matrix(expected.reshape(-1, 3, 3)).as_quat(scalar_first=True).reshape(quaternion.shape)
    )
    assert np.abs(np.sum(np.asarray(quaternion) * expected_quaternion, axis=-1)).min() > 1 - tolerance
    np.testing.assert_allclose(rot.quaternion_to_matrix(3 * quaternion), expected, atol=tolerance)


def test_matrix_to_axis_angle_against_scipy(rotvecs, dtype):
    matrix = as_matrix(rotvecs).astype(dtype)
    found = np.asarray(rot.matrix_to_axis_angle(matrix))
    assert np.linalg.norm(found, axis=-1).max() <= np.pi + 1e-6
    np.testing.assert_allclose(as_matrix(found), matrix, atol=2 * TOLERANCE[dtype])
    expected = Rotation.from_matrix(matrix.reshape(-1, 3, 3)).as_rotvec().reshape(found.shape)
    away_from_pi = np.linalg.norm(expected, axis=-1) < np.pi - 1e-3  # at pi both signs are right
    np.testing.assert_allclose(found[away_from_pi], expected[away_from_pi], atol=5e-6 if dtype == np.float32 else 1e-13)


def test_tiny_rotations_keep_their_axis(dtype):
    vector = np.array([1e-8, -2e-8, 3e-8], dtype)
    for name in ("matrix -> axis-angle", "quaternion -> axis-angle"):
        np.testing.assert_allclose(jax.jit(INVERSES[name])(vector), vector, rtol=1e-6)


def test_gradient_of_rodrigues_against_scipy(dtype):
    """At every special angle, against central differences in float64."""
    vectors = (np.array(list(ANGLES.values()))[:, None, None] * AXES).reshape(-1, 3)
    jacobian = jax.jit(jax.vmap(jax.jacrev(rot.axis_angle_to_matrix)))(vectors.astype(dtype))
    step = 1e-6 * np.eye(3)
    numeric = np.stack([(as_matrix(vectors + d) - as_matrix(vectors - d)) / 2e-6 for d in step], axis=-1)
    np.testing.assert_allclose(jacobian, numeric, atol=2e-6 if dtype == np.float32 else 1e-8)


INVERSES = {
    "matrix -> axis-angle": lambda v: rot.matrix_to_axis_angle(rot.axis_angle_to_matrix(v)),
    "matrix -> quaternion": lambda v: rot.matrix_to_quaternion(rot.axis_angle_to_matrix(v)),
    "quaternion -> axis-angle": lambda v: rot.quaternion_to_axis_angle(rot.axis_angle_to_quaternion(v)),
    "quaternion -> matrix": lambda v: rot.quaternion_to_matrix(rot.axis_angle_to_quaternion(v)),
    "6D": lambda v: rot.rotation_6d_to_matrix(rot.matrix_to_rotation_6d(rot.axis_angle_to_matrix(v))),
    "distance to identity": lambda v: rot.geodesic_distance(rot.axis_angle_to_matrix(v), jnp.eye(3, dtype=v.dtype)),
    "distance to itself": lambda v: rot.geodesic_distance(rot.axis_angle_to_matrix(v), rot.axis_angle_to_matrix(v)),
}


@pytest.mark.parametrize("function", INVERSES.values(), ids=INVERSES.keys())
def test_every_conversion_is_finite_everywhere(function, rotvecs):
    flat = jnp.asarray(rotvecs.reshape(-1, 3))
    jacobian, value = jax.jit(jax.vmap(lambda v: (jax.jacrev(function)(v), function(v))))(flat)
    assert jnp.isfinite(value).all() and jnp.isfinite(jacobian).all()


def test_there_and_back_has_unit_gradient_at_zero(dtype):
    for name in ("matrix -> axis-angle", "quaternion -> axis-angle"):
        np.testing.assert_allclose(jax.jit(jax.jacrev(INVERSES[name]))(jnp.zeros(3, dtype)), np.eye(3), atol=1e-6)


@pytest.mark.parametrize("order", ["columns", "interleaved", "rows"])
def test_6d_orders(order, rotvecs, dtype):
    matrix = as_matrix(rotvecs).astype(dtype)
    packed = {
        "columns": np.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1),
        "interleaved": matrix[..., :2].reshape(*matrix.shape[:-2], 6),
        "rows": np.concatenate([matrix[..., 0, :], matrix[..., 1, :]], axis=-1),
    }[order]
    np.testing.assert_array_equal(rot.matrix_to_rotation_6d(matrix, order), packed)
    np.testing.assert_allclose(rot.rotation_6d_to_matrix(packed, order), matrix, atol=TOLERANCE[dtype])


def test_6d_gram_schmidt_of_any_two_vectors():
    x = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    matrix = np.asarray(rot.rotation_6d_to_matrix(x))
    np.testing.assert_allclose(matrix.swapaxes(-1, -2) @ matrix, np.broadcast_to(np.eye(3), matrix.shape), atol=5e-6)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=TOLERANCE[np.float32])
    np.testing.assert_allclose(matrix[..., 0], x[:, :3] / np.linalg.norm(x[:, :3], axis=-1, keepdims=True), atol=1e-6)
    assert (np.sum(matrix[..., 1] * x[:, 3:], axis=-1) > 0).all()


@pytest.mark.parametrize("x", [[0] * 6, [1, 0, 0, 2, 0, 0], [0, 0, 0, 0, 1, 0]], ids=["zero", "parallel", "half zero"])
def test_6d_without_a_frame_is_finite(x):
    x = jnp.asarray(x, jnp.float32)
    assert jnp.isfinite(rot.rotation_6d_to_matrix(x)).all()
    assert jnp.isfinite(jax.jit(jax.jacrev(rot.rotation_6d_to_matrix))(x)).all()


def test_geodesic_distance(dtype):
    a, b = (Rotation.from_rotvec(np.random.default_rng(s).normal(size=(50, 3))) for s in (2, 3))
    found = rot.geodesic_distance(a.as_matrix().astype(dtype), b.as_matrix().astype(dtype))
    np.testing.assert_allclose(found, (a.inv() * b).magnitude(), atol=2e-6 if dtype == np.float32 else 1e-13)
    against_one = rot.geodesic_distance(a.as_matrix().astype(dtype), np.eye(3, dtype=dtype))
    np.testing.assert_allclose(against_one, a.magnitude(), atol=2e-6 if dtype == np.float32 else 1e-13)


def test_upright_root_in_three_frames():
    """An upright person who faces the viewer, turned from AMASS (z up) and PoseScript (y up) into the camera frame (y
    down).
    """
    up_in = {(np.pi / 2, 0, 0): [0, 0, 1], (0, 0, 0): [0, 1, 0], (np.pi, 0, 0): [0, -1, 0]}
    for root, up in up_in.items():
        np.testing.assert_allclose(rot.axis_angle_to_matrix(np.array(root)) @ np.array([0.0, 1, 0]), up, atol=1e-6)


def procrustes(matrix):
    """The nearest rotation, by SciPy's Kabsch: it turns the unit vectors onto the matrix's columns."""
    return Rotation.align_vectors(matrix.T, np.eye(3))[0].as_matrix()


NINES = {
    "a rotation": as_matrix(np.array([0.3, -1.0, 2.0])),
    "the identity": np.eye(3),
    "of equal singular values": 0.2 * as_matrix(np.array([0.3, -1.0, 2.0])),
    "of two equal ones": as_matrix(np.array([1.0, 0, 0])) @ np.diag([3.0, 0.5, 0.5]),
    "of two large equal ones": np.diag([2.0, 2.0, 1e-3]) @ as_matrix(np.array([0, 1.0, 0])),
    "of rank 2": np.diag([2.0, 1.0, 0.0]) @ as_matrix(np.array([0, 1.0, 2.0])),
    "a reflection": as_matrix(np.array([0.0, 1, 1])) @ np.diag([1.0, -0.3, 2.0]),
    "tiny": 1e-12 * np.arange(9.0).reshape(3, 3) ** 2,
}


def test_9d_against_scipy(dtype):
    random = np.random.default_rng(0).normal(size=(4, 10, 3, 3))
    found = jax.jit(rot.matrix_9d_to_rotation)(random.astype(dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(jnp.linalg.det(found), 1, atol=TOLERANCE[dtype])
    expected = np.stack([procrustes(m) for m in random.reshape(-1, 3, 3)]).reshape(random.shape)
    # A rounding of the matrix turns the rotation by as much over the least sum of singular values.
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype] * 50)
    for name, matrix in NINES.items():
        found = rot.matrix_9d_to_rotation(matrix.astype(dtype))
        np.testing.assert_allclose(found, procrustes(matrix), atol=TOLERANCE[dtype] * 50, err_msg=name)


@pytest.mark.parametrize("matrix", NINES.values(), ids=NINES.keys())
def test_gradient_of_9d_against_differences(matrix):
    """In float64, where JAX's own SVD has no gradient as well: at equal singular values."""
    with jax.enable_x64(True):
        scale = np.linalg.norm(matrix)
        function = jax.jit(lambda d: rot.matrix_9d_to_rotation(jnp.asarray(matrix) + scale * d))
        forward, reverse = (jax.jit(of(function))(jnp.zeros((3, 3))) for of in (jax.jacfwd, jax.jacrev))
        step = 1e-6 * np.eye(9).reshape(9, 3, 3)
        numeric = np.stack([(function(d) - function(-d)) / 2e-6 for d in step], axis=-1).reshape(3, 3, 3, 3)
    np.testing.assert_allclose(forward, numeric, atol=1e-7 * np.abs(numeric).max())
    np.testing.assert_allclose(reverse, forward, atol=1e-12 * np.abs(numeric).max())


@pytest.mark.parametrize(
    "matrix", [np.zeros((3, 3)), np.diag([2.0, 0, 0]), -np.eye(3)], ids=["zero", "rank 1", "inversion"]
)
def test_9d_without_one_nearest_rotation_is_finite(matrix, dtype):
    jacobian, value = jax.jit(lambda m: (jax.jacrev(rot.matrix_9d_to_rotation)(m), rot.matrix_9d_to_rotation(m)))(
        matrix.astype(dtype)
    )
    np.testing.assert_allclose(value @ value.T, np.eye(3), atol=TOLERANCE[dtype])
    np.testing.assert_allclose(jnp.linalg.det(value), 1, atol=TOLERANCE[dtype])
    assert jnp.isfinite(jacobian).all()


def test_volume_of_the_exponential_map_is_its_jacobian(rotvecs, dtype):
    """det of the left Jacobian, whose columns are the axial vectors of (dR/dv_i) Rᵀ."""

    def jacobian(v):
        spin = jnp.einsum("ijk,lj->ilk", jax.jacfwd(rot.axis_angle_to_matrix)(v), rot.axis_angle_to_matrix(v))
        return jnp.stack([spin[2, 1], spin[0, 2], spin[1, 0]])

    flat = jnp.asarray(rotvecs.reshape(-1, 3))
    volume, expected = jax.jit(jax.vmap(lambda v: (rot.exponential_volume(v), jnp.linalg.det(jacobian(v)))))(flat)
    np.testing.assert_allclose(volume, expected, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_integers_and_lists_are_taken():
    assert rot.axis_angle_to_matrix(np.zeros((2, 3), int)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rot.rotation_6d_to_matrix(np.zeros((2, 5))),
            r"6D rotations must have shape \(\.\.\., 6\); got \(2, 5\)",
        ),
        (
            lambda: rot.rotation_6d_to_matrix(np.zeros(6), "colums"),
            "unknown 6D order 'colums'; expected one of columns, interleaved, rows",
        ),
        (lambda: rot.matrix_to_rotation_6d(np.eye(3), "colums"), "unknown 6D order"),
        (lambda: rot.matrix_to_axis_angle(np.eye(4)), r"got \(4, 4\)"),
        (lambda: rot.matrix_9d_to_rotation(np.zeros(9)), r"must have shape \(\.\.\., 3, 3\); got \(9,\)"),
        (lambda: rot.quaternion_to_matrix(np.zeros(3)), r"must have shape \(\.\.\., 4\)"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
