"""Bodies fitted to points: poses come back from their own points, and no input gives a NaN."""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smpl_jax
from smpl_jax import PoseFileError, axis_angle_to_matrix, check, load_body, pa_mpjpe
from smpl_jax.fit import FitSettings, fit_joints, fit_keypoints, fit_markers, load_prior
from smpl_jax.fit.solver import levenberg_marquardt
from smpl_jax.keypoints import keypoint_set, locate

from .models import python2_pickle

PEOPLE, SIZE, FOCAL = 8, 1000, 1200.0
CLEAR, NOISY, PART, GARBAGE, NOTHING = 0, 1, 2, 3, 4
LEFT_ARM = ["left_elbow", "left_wrist"]


@pytest.fixture(scope="module")
def people() -> dict[str, np.ndarray]:
    """Poses near the means of the prior, in front of the camera."""
    rng = np.random.default_rng(3)
    means = np.asarray(load_prior().means)[rng.permutation(len(load_prior().means))[:PEOPLE]]
    angles = means.reshape(PEOPLE, 21, 3) + rng.normal(0, 0.1, (PEOPLE, 21, 3))
    roots = np.diag([1.0, -1, -1]) @ np.asarray(axis_angle_to_matrix(rng.uniform(-1, 1, (PEOPLE, 1)) * np.eye(3)[1]))
    rotations = np.tile(np.eye(3), (PEOPLE, 24, 1, 1))
    rotations[:, 0], rotations[:, 1:22] = roots, axis_angle_to_matrix(angles)
    translation = rng.normal((0, 0, 3.5), 0.2, (PEOPLE, 3))
    body = load_body()
    points = np.asarray(locate(body, "openpose25")(rotations, None, translation))
    pixels = points[..., :2] / points[..., 2:] * FOCAL + SIZE / 2
    return {
        "rotations": rotations.astype(np.float32),
        "joints": np.asarray(smpl_jax.joints(body, rotations, None, translation)),
        "vertices": np.asarray(smpl_jax.vertices(body, rotations, None, translation)),
        "pixels": np.concatenate([pixels, np.ones((PEOPLE, 25, 1))], -1),
    }


@pytest.fixture(scope="module")
def fitted(people):
    """One program fits them all: clear points, points with noise, and points that are wrong in every way."""
    rng = np.random.default_rng(4)
    keypoints = people["pixels"].copy()
    names = [point.name for point in keypoint_set("openpose25")]
    keypoints[NOISY, :, :2] += rng.normal(0, 3, (25, 2))
    keypoints[PART, [names.index(name) for name in LEFT_ARM], 2] = 0
    keypoints[PART, [names.index(name) for name in LEFT_ARM], :2] = np.nan
    keypoints[GARBAGE, :, :2] = rng.uniform(-SIZE, 2 * SIZE, (25, 2))
    keypoints[GARBAGE, :4, :2] = [[1e30, 0], [np.nan, 3], [4, np.inf], [-1e5, 1e5]]
    keypoints[NOTHING] = 0
    keypoints[5, :, :2] = 500.0  # all in one place
    keypoints[6, 3:, 2] = 0  # three points
    return keypoints, fit_keypoints(
        keypoints, "openpose25", image_size=(SIZE, SIZE), focal=FOCAL, betas=np.zeros(10)
    )  # fmt: skip


def test_poses_come_back_from_their_projections(people, fitted) -> None:
    _, fit = fitted
    check(fit.pose)
    assert fit.pose.frame == "camera" and fit.pose.shape_space == load_body().shape_space
    joints = smpl_jax.joints(load_body(), **smpl_jax.for_body(fit.pose, load_body()))
    errors = np.asarray(pa_mpjpe(joints, people["joints"]))
    assert errors[CLEAR] < 40 and errors[7] < 40 and errors[NOISY] < 70, errors
    assert fit.converged[[CLEAR, NOISY, PART, 7]].all()
    assert fit.errors[CLEAR].max() < 1 and fit.errors[7].max() < 1
    assert not np.asarray(fit.pose.betas).any()
    # The mean of the prior, seen from the front, is what a guess would give.
    assert errors[[CLEAR, 7]].max() < np.asarray(pa_mpjpe(people["joints"][::-1], people["joints"])).mean() / 2


def test_points_that_were_not_seen_do_not_count(fitted) -> None:
    keypoints, fit = fitted
    names = list(fit.names)
    assert (
        fit.seen == (np.isfinite(keypoints).all(-1) & (keypoints[..., 2] > 0) & (np.abs(keypoints[..., 0]) < 1e6))
    ).all()
    assert not fit.errors[~fit.seen].any()
    measured = np.asarray(fit.pose.measured)
    hidden = [load_body().joint_names.index(name) for name in ("left_shoulder", "left_elbow", "left_wrist")]
    assert not measured[PART, hidden].any() and measured[CLEAR, hidden[:2]].all()
    assert measured[PART, [0, 1, 2, 4, 5, 17, 19]].all() and not measured[:, 22:].any()
    assert names[0] == "nose"


def test_garbage_gives_finite_poses_that_have_not_converged(fitted) -> None:
    _, fit = fitted
    for leaf in jax.tree.leaves((fit.pose, fit.points, fit.errors, fit.energy, fit.noise)):
        assert np.isfinite(leaf).all()
    assert not fit.converged[[GARBAGE, NOTHING, 6]].any()
    assert (np.asarray(fit.pose.translation)[:, 2] > 0).all()


def test_joints_come_back(people) -> None:
    few = people["joints"][:4].copy()
    few[3, 16:] = np.nan
    fit = fit_joints(few, betas=np.zeros(10), settings=FitSettings(rounds=2))
    joints = np.asarray(smpl_jax.joints(load_body(), **smpl_jax.for_body(fit.pose, load_body())))
    assert np.linalg.norm(joints - few, axis=-1)[:3].max() < 0.01 and fit.converged[:3].all()
    assert np.isfinite(joints).all() and (fit.seen.sum(-1) == [24, 24, 24, 16]).all()
    assert fit.errors[:3].max() < 0.01


def test_markers_come_back(people) -> None:
    rng = np.random.default_rng(5)
    ids = [int(i) for i in rng.choice(6890, 60, replace=False)]
    fit = fit_markers(people["vertices"][0, ids], ids, betas=np.zeros(10), settings=FitSettings(rounds=2))
    assert fit.pose.shape == () and bool(fit.converged)
    joints = np.asarray(smpl_jax.joints(load_body(), **smpl_jax.for_body(fit.pose, load_body())))
    assert np.linalg.norm(joints - people["joints"][0], axis=-1)[:22].mean() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "coco19"}, "coco17"),
        ({"keypoints": np.zeros((2, 24, 2))}, "25"),
        ({"keypoints": np.zeros((25, 4))}, "2 or 3"),
        ({"image_size": (0, 10)}, "image_size"),
        ({"focal": [1.0, 2.0, 3.0]}, "focal"),
        ({"focal": -1.0}, "positive"),
        ({"confidence": np.full(25, 2.0)}, "from 0 to 1"),
        ({"betas": np.zeros(11)}, "betas"),
        ({"noise": 0.0}, "noise"),
        ({"keypoints": np.zeros((25, 3)), "confidence": np.zeros(25)}, "third"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    given = {"keypoints": np.zeros((25, 2)), "name": "openpose25", "image_size": (100, 100)} | change
    with pytest.raises(ValueError, match=message):
        fit_keypoints(**given)
    with pytest.raises(ValueError, match="steps"):
        FitSettings(steps=(0, 1))


def test_levenberg_marquardt_finds_what_scipy_finds() -> None:
    optimize = pytest.importorskip("scipy.optimize")

    def residuals(x, xp):  # Rosenbrock's valley, and an exponential fit beside it
        t = np.linspace(0, 1, 8)
        return xp.concatenate(
            [xp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]), x[2] * xp.exp(x[3] * t) - 2 * np.exp(-1.5 * t)]
        )

    start = np.array([-1.2, 1.0, 1.0, 0.0])
    found, energy, _ = levenberg_marquardt(lambda x: residuals(x, jnp), jnp.asarray(start, jnp.float32), 60)
    expected = optimize.least_squares(residuals, start, method="lm", args=(np,)).x
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert energy < 1e-6


def test_priors_of_others_load_without_running_code(tmp_path) -> None:
    rng = np.random.default_rng(6)
    factor = rng.normal(size=(8, 69, 69)) * 0.1
    mixture = {
        "weights": rng.dirichlet(np.ones(8)),
        "means": rng.normal(size=(8, 69)),
        "covars": factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(69),
    }
    (tmp_path / "gmm_08.pkl").write_bytes(python2_pickle(mixture, 2))
    prior = load_prior(tmp_path / "gmm_08.pkl")
    stats = pytest.importorskip("scipy.stats")
    poses = rng.normal(size=(5, 63))
    densities = [
        stats.multivariate_normal(mean[:63], cov[:63, :63]).logpdf(poses) + np.log(weight)
        for mean, cov, weight in zip(mixture["means"], mixture["covars"], mixture["weights"])
    ]
    expected = -np.max(densities, axis=0)
    energies = np.asarray(prior.energy(poses))
    np.testing.assert_allclose(energies - energies[0], expected - expected[0], rtol=1e-3, atol=1e-2)
    half = [0.5 * float(jnp.sum(prior.residuals(jnp.asarray(pose, jnp.float32)) ** 2)) for pose in poses]
    np.testing.assert_allclose(half, energies, rtol=1e-4)

    class Hostile:
        def __reduce__(self):
            return print, ("code ran",)

    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps({"means": Hostile()}))
    for name, content, message in [
        ("hostile.pkl", None, "print"),
        ("text.pkl", b"nothing", "gmm_08"),
        ("none.npz", None, "No such file"),
        ("few.pkl", pickle.dumps({"weights": np.ones(2)}), "means"),
        ("odd.pkl", pickle.dumps(mixture | {"means": np.zeros((8, 60))}), "63 or 69"),
        ("flat.pkl", pickle.dumps(mixture | {"covars": np.zeros((8, 69, 69))}), "positive definite"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PoseFileError, match=message):
            load_prior(tmp_path / name)


def test_the_prior_of_the_package_is_symmetric_and_names_its_source() -> None:
    prior = load_prior()
    rng = np.random.default_rng(7)
    rotations = np.tile(np.eye(3, dtype=np.float32), (20, 22, 1, 1))
    rotations[:, 1:] = axis_angle_to_matrix(rng.normal(0, 0.3, (20, 21, 3)))
    pose = smpl_jax.Pose(rotations, "model")
    both = [
        np.asarray(prior.energy(np.asarray(smpl_jax.matrix_to_axis_angle(p.rotations[:, 1:])).reshape(20, 63)))
        for p in (pose, smpl_jax.mirror_pose(pose))
    ]
    assert np.corrcoef(*both)[0, 1] > 0.95
    knees = [3 * 4 - 3, 3 * 5 - 3]
    bent, broken = (np.array(prior.means[0]) for _ in range(2))
    bent[knees], broken[knees] = 0.8, -0.8
    assert prior.energy(bent) < prior.energy(broken)
    from smpl_jax.fit import prior as module

    assert "mocap.cs.cmu.edu" in str(np.load(module._DEFAULT)["source"])


def test_the_body_alone_does_not_load_the_fit() -> None:
    code = "import sys, smpl_jax; assert not any(m.startswith('smpl_jax.fit') or m == 'optax' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_points_that_fit_no_body_have_not_converged(people) -> None:
    """Seventeen random points of an image, from several seeds, and people of whose points two are wrong. The shape is fitted too."""
    keypoints = people["pixels"].copy()
    names = [point.name for point in keypoint_set("openpose25")]
    keypoints[
        :, [k for k, name in enumerate(names) if name in ("neck", "mid_hip") or "toe" in name or "heel" in name], 2
    ] = 0
    for seed in range(5):
        keypoints[seed, :, :2] = np.random.default_rng(seed).uniform(0, SIZE, (25, 2))
    for person in range(5, PEOPLE):
        keypoints[person, [names.index(name) for name in ("left_wrist", "right_ear")], :2] = [
            [100, 900],
            [850, 80 * person],
        ]
    fit = fit_keypoints(keypoints, "openpose25", image_size=(SIZE, SIZE), focal=FOCAL)
    assert (fit.seen.sum(-1) == 17).all()
    assert fit.converged.tolist() == [False] * 5 + [True] * 3, fit.reasons
    assert ((fit.reasons == "") == fit.converged).all()
