"""One pose: its frames, families, batches and checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import smpl_jax
from smpl_jax import Pose, load_body
from smpl_jax.frames import turn
from smpl_jax.pose import JOINTS, family_of, unmeasured

from .models import random_arrays, random_rotations

RNG = np.random.default_rng(3)


def rotations(*shape):
    return random_rotations(RNG, *shape)


def numbers(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """Random bodies of each family; their pelvis is off the origin."""
    folder, out = tmp_path_factory.mktemp("bodies"), {}
    for kind in ("smpl", "smplh", "smplx"):
        np.savez(folder / f"{kind}.npz", **random_arrays(kind, 60))
        out[kind] = load_body(folder / f"{kind}.npz")
    return out


def same(a, b, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


def test_the_families_have_the_joints_that_the_field_gives_them():
    assert JOINTS == {"shared": 22, "smpl": 24, "smplh": 52, "smplx": 55}
    assert [family_of(n) for n in (22, 24, 52, 55)] == list(JOINTS)
    with pytest.raises(ValueError, match=r"22 \(shared\), 24 \(smpl\), 52 \(smplh\), 55 \(smplx\); found 23"):
        family_of(23)


def test_a_pose_passes_through_jax_and_keeps_its_kind():
    pose = Pose(rotations(4, 24), "camera", betas=numbers(4, 10))
    doubled = jax.jit(lambda p: p.replace(betas=2 * p.betas))(pose)
    assert doubled.frame == "camera" and doubled.shape == (4,) and doubled.family == "smpl"
    np.testing.assert_array_equal(doubled.betas, 2 * pose.betas)
    assert pose[1:3].shape == (2,) and pose[0].shape == () and pose[0].betas.shape == (10,)
    assert repr(pose) == (
        "Pose(rotations=float32 (4, 24, 3, 3), frame='camera', betas=float32 (4, 10), translation=None, measured=None, "
        "has_betas=None, has_translation=None, shape_space=None)"
    )
    assert jax.tree.map(lambda x: None, pose).rotations is None, "the constructor takes what JAX puts in"
    assert pose.hands is None
    np.testing.assert_array_equal(Pose(rotations(55), "model").hands.shape, (30, 3, 3))


FRAMES = ("camera", "model", "z-up")


@pytest.mark.parametrize("target", FRAMES)
@pytest.mark.parametrize("source", FRAMES)
def test_a_turned_pose_poses_the_turned_body(source, target, bodies):
    """Vertices of the turned pose are the turned vertices: the pelvis is off the origin, so turning the translation alone would not do."""
    body = bodies["smpl"]
    pose = Pose(rotations(5, 24), source, numbers(5, 7), numbers(5, 3))
    turned = smpl_jax.to_frame(pose, target, body)
    before = np.asarray(smpl_jax.vertices(body, **smpl_jax.for_body(pose, body)))
    after = np.asarray(smpl_jax.vertices(body, **smpl_jax.for_body(turned, body)))
    np.testing.assert_allclose(after, before @ turn(source, target).T, atol=2e-5)
    assert turned.frame == target and isinstance(turned.rotations, np.ndarray) and turned.rotations.dtype == np.float32
    same(smpl_jax.to_frame(turned, source, body), pose, 1e-5)
    jitted = jax.jit(smpl_jax.to_frame, static_argnums=1)(pose, target, body)
    same(jitted, turned, 1e-5)
    np.testing.assert_array_equal(jitted.rotations, turned.rotations)


def test_a_translation_without_a_body_is_not_turned():
    pose = Pose(rotations(24), "z-up", translation=numbers(3))
    with pytest.raises(ValueError, match=r"about the pelvis, so the body is needed: to_frame\(pose, 'camera', body\)"):
        smpl_jax.to_frame(pose, "camera")
    assert smpl_jax.to_frame(pose, "z-up") is pose
    alone = smpl_jax.to_frame(pose.replace(translation=None), "camera")
    np.testing.assert_array_equal(alone.rotations[0], (turn("z-up", "camera") @ pose.rotations[0]).astype(np.float32))
    np.testing.assert_array_equal(alone.rotations[1:], pose.rotations[1:])
    with pytest.raises(ValueError, match="frame must be one of"):
        smpl_jax.to_frame(pose, "world")


def test_a_pose_without_a_translation_in_a_batch_keeps_zeros(bodies):
    pose = Pose(rotations(2, 24), "z-up", translation=numbers(2, 3), has_translation=np.array([True, False]))
    pose.translation[1] = 0
    turned = smpl_jax.to_frame(pose, "camera", bodies["smpl"])
    assert np.abs(turned.translation[0]).max() > 0 and not turned.translation[1].any()


KEPT = {  # joints of the source that the target takes, and which of the target's were measured
    ("shared", "smpl"): (range(22), range(22)),
    ("smpl", "shared"): (range(22), range(22)),
    ("smpl", "smplh"): (range(22), range(22)),
    ("smpl", "smplx"): (range(22), range(22)),
    ("smplh", "smpl"): (range(22), range(22)),
    ("smplx", "smpl"): (range(22), range(22)),
    ("smplh", "smplx"): ([*range(22), *range(22, 52)], [*range(22), *range(25, 55)]),
    ("smplx", "smplh"): ([*range(22), *range(25, 55)], range(52)),
    ("smplx", "shared"): (range(22), range(22)),
    ("smplh", "shared"): (range(22), range(22)),
    ("shared", "smplx"): (range(22), range(22)),
}


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(("source", "target"), KEPT)
def test_a_family_keeps_what_both_have_and_marks_what_it_fills_in(source, target, convert):
    pose = Pose(convert(rotations(2, JOINTS[source])), "model")
    out = smpl_jax.to_family(pose, target)
    taken, places = KEPT[source, target]
    np.testing.assert_array_equal(out.rotations[:, np.array(places)], pose.rotations[:, np.array(taken)])
    rest = sorted(set(range(JOINTS[target])) - set(places))
    np.testing.assert_array_equal(out.rotations[:, rest], np.broadcast_to(np.eye(3), (2, len(rest), 3, 3)))
    if rest:
        assert np.flatnonzero(out.measured[1]).tolist() == list(places)
    else:
        assert out.measured is None, "all joints were measured, as before"
    assert type(out.rotations) is type(pose.rotations)
    some = np.zeros((2, JOINTS[source]), bool)
    some[:, 3] = True
    marked = smpl_jax.to_family(pose.replace(measured=some), target)
    assert np.argwhere(marked.measured).tolist() == [[0, 3], [1, 3]]
    same(smpl_jax.to_family(out, target), out)


def test_betas_stay_where_they_mean_the_same_shape(bodies):
    pose = Pose(rotations(2, 24), "camera", betas=numbers(2, 10), has_betas=np.ones(2, bool))
    assert smpl_jax.to_family(pose, "smplh").betas is pose.betas
    other = smpl_jax.to_family(pose, "smplx")
    assert other.betas is None and other.has_betas is None
    with pytest.raises(ValueError, match=r"betas of SMPL, which mean another shape for body 'smplx' of SMPL-X"):
        smpl_jax.for_body(pose, bodies["smplx"])
    with pytest.raises(ValueError, match="family must be one of 'shared', 'smpl', 'smplh', 'smplx'; found 'mano'"):
        smpl_jax.to_family(pose, "mano")


def test_betas_of_a_named_shape_space_are_refused_by_other_bodies_of_as_many_joints(bodies):
    default, smpl = smpl_jax.load_body(), bodies["smpl"]
    assert (default.shape_space, smpl.shape_space) == (default.name, "SMPL")
    assert (bodies["smplh"].shape_space, bodies["smplx"].shape_space) == ("SMPL", "SMPL-X")
    pose = Pose(rotations(2, 24), "camera", betas=numbers(2, 10), shape_space="SMPL")
    smpl_jax.for_body(pose, smpl)
    smpl_jax.for_body(pose, bodies["smplh"])
    with pytest.raises(ValueError, match=rf"betas of SMPL, .* for body '{default.name}' of {default.name}"):
        smpl_jax.for_body(pose, default)
    with pytest.raises(ValueError, match=rf"betas of {default.name}, .* for body 'smpl' of SMPL"):
        smpl_jax.PosedBody(pose.replace(shape_space=default.name)[0], smpl)
    jitted = jax.jit(lambda p: smpl_jax.joints(smpl, **smpl_jax.for_body(p, smpl)))
    with pytest.raises(ValueError, match="which mean another shape"):
        jitted(pose.replace(shape_space=default.name))
    smpl_jax.for_body(pose.replace(shape_space=None), default)  # unknown: the number of joints fits
    smpl_jax.for_body(pose.replace(betas=None), default)
    with pytest.raises(ValueError, match="shape_space must be the name of a shape space or None, found 3"):
        smpl_jax.check(pose.replace(shape_space=3))


def test_a_shape_space_goes_with_its_betas(bodies):
    pose = Pose(rotations(24), "camera", betas=numbers(10), shape_space="SMPL")
    assert smpl_jax.to_family(pose, "smplh").shape_space == "SMPL"
    other = smpl_jax.to_family(pose, "smplx")
    assert other.betas is None and other.shape_space is None
    shared = smpl_jax.to_family(pose.replace(rotations=rotations(55), shape_space="SMPL-X"), "shared")
    assert shared.shape_space == "SMPL-X" and smpl_jax.to_family(shared, "smpl").betas is None
    mine = smpl_jax.to_family(smpl_jax.to_family(pose.replace(shape_space="mine"), "shared"), "smpl")
    assert mine.betas is not None and mine.shape_space == "mine"
    bare = Pose(rotations(24), "camera")
    assert smpl_jax.stack([bare, pose]).shape_space == "SMPL"
    assert smpl_jax.stack([pose, pose.replace(shape_space=None)]).shape_space is None
    assert smpl_jax.stack([pose, pose.replace(betas=None, shape_space="mine")]).shape_space == "SMPL"
    with pytest.raises(ValueError, match="stack takes poses of one shape space, found betas of SMPL and mine"):
        smpl_jax.stack([pose, pose.replace(shape_space="mine")])
    assert smpl_jax.to_frame(smpl_jax.complete(pose), "model", bodies["smpl"]).shape_space == "SMPL"


def test_a_body_takes_the_pose_with_its_shape_and_place(bodies):
    body = bodies["smplh"]
    pose = Pose(rotations(3, 24), "model", numbers(3, 4), numbers(3, 3))
    rest = np.concatenate([pose.rotations[:, :22], np.broadcast_to(np.eye(3), (3, 30, 3, 3))], 1)
    expected = smpl_jax.joints(body, rest, pose.betas, pose.translation)
    np.testing.assert_array_equal(smpl_jax.joints(body, **smpl_jax.for_body(pose, body)), expected)
    jitted = jax.jit(lambda p, b: smpl_jax.joints(b, **smpl_jax.for_body(p, b)))(pose, body)
    np.testing.assert_allclose(jitted, expected, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"the pose has 12 betas, body 'smplh' was loaded with 10: .*to_betas\(pose, 10\)"
    ):
        smpl_jax.for_body(pose.replace(betas=numbers(3, 12)), body)
    cut = smpl_jax.to_betas(pose.replace(betas=numbers(3, 12)), 10)
    assert smpl_jax.for_body(cut, body)["betas"].shape == (3, 10)
    np.testing.assert_array_equal(smpl_jax.to_betas(pose, 6).betas[:, 4:], 0)


def test_the_pelvis_is_joint_0_of_the_resting_body(bodies):
    body, betas = bodies["smplx"], numbers(3, 5)
    rest = smpl_jax.joints(body, np.tile(np.eye(3), (55, 1, 1)), betas)
    np.testing.assert_allclose(smpl_jax.pelvis(body, betas), rest[:, 0], atol=1e-6)
    np.testing.assert_allclose(smpl_jax.pelvis(body), body.joint_template[0], atol=0)


def test_a_stack_says_what_each_pose_had():
    bare = Pose(rotations(24), "camera")
    shaped = Pose(rotations(24), "camera", betas=numbers(10))
    wide = Pose(rotations(24), "camera", betas=numbers(16), translation=numbers(3), measured=np.arange(24) < 5)
    batch = smpl_jax.stack([bare, shaped, wide])
    assert batch.shape == (3,) and batch.frame == "camera" and isinstance(batch.rotations, np.ndarray)
    np.testing.assert_array_equal(batch.rotations[1], shaped.rotations)
    assert batch.has_betas.tolist() == [False, True, True] and batch.has_translation.tolist() == [False, False, True]
    np.testing.assert_array_equal(batch.betas[1], np.pad(shaped.betas, (0, 6)))
    np.testing.assert_array_equal(batch.betas[2], wide.betas)
    assert not batch.betas[0].any() and not batch.translation[:2].any()
    assert batch.measured.sum(1).tolist() == [24, 24, 5]
    again = smpl_jax.stack([batch, batch], axis=1)
    assert again.shape == (3, 2) and again.betas.shape == (3, 2, 16)
    alike = smpl_jax.stack([shaped, shaped])
    assert alike.has_betas is None and alike.translation is None and alike.measured is None
    assert isinstance(smpl_jax.stack([bare, jax.tree.map(jnp.asarray, bare)]).rotations, jax.Array)


def test_rows_of_different_length_become_one_batch():
    rows = [Pose(rotations(n, 24), "camera", betas=numbers(n, 10)) for n in (1, 3)] + [smpl_jax.unmeasured((0,))]
    rows = [smpl_jax.concatenate([row, smpl_jax.unmeasured((3 - row.shape[0],))]) for row in rows]
    batch = smpl_jax.stack([smpl_jax.complete(row) for row in rows])
    assert batch.shape == (3, 3) and batch.betas.shape == (3, 3, 10) and batch.translation.shape == (3, 3, 3)
    assert batch.has_betas.sum(1).tolist() == [1, 3, 0] and not batch.has_translation.any()
    assert batch.measured.all(-1).sum(1).tolist() == [1, 3, 0]
    smpl_jax.check(batch)
    assert jax.tree.structure(smpl_jax.complete(Pose(rotations(2, 24), "camera"))) == jax.tree.structure(batch)
    with pytest.raises(ValueError, match=r"at most 10 betas, found 16; to_betas\(pose, 10\)"):
        smpl_jax.complete(Pose(rotations(24), "camera", betas=numbers(16)))


@pytest.mark.parametrize(
    ("poses", "words"),
    [
        (lambda p: [], "needs at least one pose"),
        (lambda p: [p, p.rotations], r'takes smpl_jax.Pose, found ndarray; Pose\(rotations, "camera"\)'),
        (lambda p: [p, p.replace(frame="z-up")], "equal frames, found camera and z-up; to_frame"),
        (
            lambda p: [p, p.replace(rotations=p.rotations[:, :22])],
            "equal numbers of joints, found 24 and 22; to_family",
        ),
        (lambda p: [p, p[0]], r"equal batch shapes, found \(2,\) and \(\)"),
    ],
)
def test_what_does_not_stack_is_one_line(poses, words):
    with pytest.raises(ValueError, match=words):
        smpl_jax.stack(poses(Pose(rotations(2, 24), "camera")))
    with pytest.raises(ValueError, match="axis must be one of the batch axes, 0 to 0; found 1"):
        smpl_jax.concatenate([Pose(rotations(2, 24), "camera")], axis=1)


def spoilt(index, value):
    array = rotations(2, 24)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("pose", "words"),
    [
        (rotations(24), "expected a smpl_jax.Pose, found ndarray"),
        (Pose(rotations(23), "camera"), "number of joints of .*; found 23"),
        (Pose(rotations(24)[..., 0], "camera"), r"rotations must have shape \(..., J, 3, 3\), found float32 \(24, 3\)"),
        (Pose("standing", "camera"), "rotations must have shape"),
        (
            Pose(np.tile(np.eye(3, dtype=int), (24, 1, 1)), "camera"),
            "rotations must be floating-point numbers, found int64",
        ),
        (Pose(rotations(24), "world"), "frame must be one of"),
        (Pose(rotations(24), None), "frame must be one of"),
        (Pose(spoilt((1, 3), np.nan), "camera"), "rotations must be finite numbers"),
        (Pose(spoilt((1, 3), 0.0), "camera"), "joint 3 of pose 1 is not one"),
        (Pose(spoilt((1, 3), np.diag([1, 1, -1.0])), "camera"), "joint 3 of pose 1 is not one"),
        (Pose(np.diag([1, 1, 1.01]) * np.ones((24, 1, 1)), "camera"), "joint 0 is not one"),
        (Pose(rotations(2, 24), "camera", betas=numbers(10)), r"betas must have shape \(2, n\), found float32 \(10,\)"),
        (Pose(rotations(24), "camera", translation=numbers(2)), r"translation must have shape \(3\), found"),
        (Pose(rotations(24), "camera", translation=np.full(3, np.inf)), "translation must be finite"),
        (Pose(rotations(24), "camera", measured=np.ones(24)), "measured must be bool, found float64"),
        (Pose(rotations(24), "camera", measured=np.ones(22, bool)), r"measured must have shape \(24\)"),
        (Pose(rotations(24), "camera", has_betas=np.array(True)), "has_betas is given, but betas is None"),
    ],
)
def test_what_is_no_pose_is_one_line(pose, words):
    with pytest.raises(ValueError, match=words) as caught:
        smpl_jax.check(pose)
    assert "\n" not in str(caught.value)


def test_a_pose_passes_its_check():
    for shape in ((), (2,), (0,), (2, 3)):
        pose = smpl_jax.complete(Pose(rotations(*shape, 52), "z-up", betas=numbers(*shape, 4)))
        assert smpl_jax.check(pose) is pose
        smpl_jax.check(jax.tree.map(jnp.asarray, pose))


def test_a_batch_has_a_length_and_a_single_pose_has_none() -> None:
    batch = unmeasured((3, 2))
    assert len(batch) == 3
    assert [pose.shape for pose in batch] == [(2,)] * 3
    with pytest.raises(TypeError, match="no length"):
        len(batch[0][0])
