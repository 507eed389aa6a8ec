"""The crop of 4D-Humans: pixels against an independent implementation in float64, poses against pictures of them."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import smpl_jax
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.crop import Change
from chatpose_jax.errors import UserError
from smpl_jax.pose import Pose
from smpl_jax.raster import Camera
from smpl_jax.render import render_mesh


def published(image, center, side, size, scale=1.0, rot=0.0, flip=False):
    """4D-Humans' crop in float64, by its three points and pixel by pixel: not a line in common with ``crop``.

    Returns pixels and the matrix. As there, the image is flipped first.
    """
    x, y = center
    if flip:
        image, x = image[:, ::-1], image.shape[1] - x - 1
    angle, half = np.deg2rad(rot), side * scale / 2
    # the middle, and the middles of the lower and of the right side of the box; and where they come to lie
    source = [
        (x, y),
        (x - half * np.sin(angle), y + half * np.cos(angle)),
        (x + half * np.cos(angle), y + half * np.sin(angle)),
    ]
    target = [(size / 2, size / 2), (size / 2, size), (size, size / 2)]
    forward = np.linalg.solve(np.c_[source, np.ones(3)], np.array(target)).T
    backward = np.linalg.solve(np.c_[target, np.ones(3)], np.array(source)).T
    out = np.zeros((size, size, 3))
    for v in range(size):
        for u in range(size):
            a, b = backward @ (u, v, 1.0)
            for i in (int(np.floor(a)), int(np.floor(a)) + 1):
                for j in (int(np.floor(b)), int(np.floor(b)) + 1):
                    if 0 <= i < image.shape[1] and 0 <= j < image.shape[0]:
                        out[v, u] += max(0, 1 - abs(a - i)) * max(0, 1 - abs(b - j)) * image[j, i]
    return out, forward


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("center", "side", "scale", "rot"),
    [
        ((30.0, 25.0), 40.0, 1.0, 0.0),
        ((31.3, 20.8), 77.7, 1.0, 0.0),  # larger than the image
        ((2.5, 48.0), 20.4, 1.25, 0.0),  # over its edge
        ((28.6, 22.2), 33.3, 0.8, 37.0),
        ((500.0, -300.0), 30.0, 1.0, -50.0),  # beside it
    ],
)
def test_pixels_within_one_grey_level(center, side, scale, rot, flip):
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    expected, forward = published(image, center, side, 32, scale, rot, flip)
    matrix = Change(scale=scale, turn=rot, flip=flip).matrix(center, side, 32, 61)
    found = crop.warp(image, matrix, 32)
    assert found.dtype == np.uint8 and np.abs(found - expected).max() < 0.51  # only rounded
    points = np.array([[3.0, 4.0, 0.5], [40.0, 30.0, 0.9]])
    mirrored = points.copy()
    if flip:
        mirrored[:, 0] = 61 - 1 - mirrored[:, 0]
    moved = crop.moved(points, matrix)
    np.testing.assert_allclose(moved[:, :2], np.c_[mirrored[:, :2], np.ones(2)] @ forward.T, atol=2e-5)
    np.testing.assert_array_equal(moved[:, 2], np.float32([0.5, 0.9]))


def test_the_warp_takes_no_more_memory_than_the_image():
    image = np.full((4, 4, 3), 255, np.uint8)
    tracemalloc.start()
    out = crop.warp(image, Change().matrix((2, 2), 1e6, 16, 4), 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e5 and out[8, 8].tolist() == [255] * 3 and out.astype(bool).sum() == 3


def test_boxes_that_are_none():
    for side in (0.5, np.nan, 1e7, -3):
        with pytest.raises(UserError, match="at least one pixel"):
            crop.check_box(np.zeros(2), side, (9, 9))
    with pytest.raises(UserError, match="at least one pixel"):
        crop.check_box(np.array([np.inf, 0]), 3, (9, 9))
    for x, y in ((-2, 5), (22, 5), (5, -2), (5, 12)):
        with pytest.raises(UserError, match=f"in the image of 20 × 10 pixels, found 4 pixels around \\[{x}, {y}\\]"):
            crop.check_box(np.array([x, y]), 4, (20, 10))
    crop.check_box(np.array([21, 11]), 4, (20, 10))


def test_box_side():
    assert crop.box_side([1.0, 2.0]) == 400 and crop.box_side(1.5) == crop.box_side([1.5]) == 300
    assert crop.box_side([1.0, 2.0], tall=True) == 400
    assert crop.box_side([1.8, 2.0], tall=True) == pytest.approx(360 * 256 / 192)
    assert crop.box_side([2.0, 1.0], tall=True) == pytest.approx(400 * 256 / 192)


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, colour in (("RGB", "red"), ("L", 200), ("CMYK", (9, 9, 9, 9))):
        file = io.BytesIO()
        Image.new(mode, (30, 20), colour).save(file, "JPEG", exif=exif)
        assert crop.stored_pixels(file.getvalue(), "x").shape == (20, 30, 3)
    with pytest.raises(UserError, match=r"^x"):
        crop.stored_pixels(file.getvalue()[:300], "x")


def test_colours():
    pixels = np.array([[[100, 100, 250]]], np.uint8)
    np.testing.assert_array_equal(crop.coloured(pixels, (1.2, 0.8, 1.2)), [[[120, 80, 255]]])


def test_twins_are_pairs():
    assert (crop.TWINS[crop.TWINS] == np.arange(44)).all() and (np.arange(44) == crop.TWINS).sum() == 3 + 7


def test_axis_angle():
    vectors = np.random.default_rng(0).normal(size=(50, 3)) * np.logspace(-9, 0.8, 50)[:, None]
    vectors[0] = 0
    np.testing.assert_allclose(
        crop.to_matrices(vectors), smpl_jax.axis_angle_to_matrix(vectors.astype(np.float32)), atol=1e-6
    )


# Poses and their pictures -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def body():
    return smpl_jax.load_body()


@pytest.fixture(scope="module")
def pose():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(24, 3)) * 0.35
    vectors[0] = [np.pi - 0.3, 0.2, 0.5]
    return Pose(crop.to_matrices(vectors), "camera", betas=np.zeros(10, np.float32), measured=np.arange(24) != 10)


SIZE = 120


def picture(body, pose, shift=0.0):
    """The body seen by a camera straight ahead, with light from there, so that nothing but the pose tells left from right or up from down."""
    vertices = np.asarray(smpl_jax.vertices(body, **smpl_jax.for_body(pose, body)))
    camera = Camera(SIZE, SIZE, 130.0, (SIZE / 2 + shift, SIZE / 2 + shift), (0, 0, 3))
    return render_mesh(
        vertices, body.faces, frame="camera", camera=camera, light=(0, 0, -1), background=(0, 0, 0)
    ).astype(float)


def apart(a, b):
    """Sum of differences by the sum of the first."""
    return np.abs(a - b).sum() / a.sum()


def test_the_picture_of_a_mirrored_pose_is_the_mirrored_picture(body, pose):
    first, second = picture(body, pose), picture(body, smpl_jax.mirror_pose(pose))
    assert apart(first[:, ::-1], second) < 0.01
    assert apart(first, second) > 0.3 and apart(first[:, ::-1], picture(body, pose)) > 0.3
    half = pose.replace(rotations=smpl_jax.mirror_pose(pose).rotations[[0, *range(1, 24)]])
    half = half.replace(rotations=np.concatenate([half.rotations[:1], pose.rotations[1:]]))  # the root alone
    assert apart(first[:, ::-1], picture(body, half)) > 0.2


def test_mirroring_twice_gives_the_same(pose):
    for name in ("shared", "smpl", "smplh", "smplx"):
        rng = np.random.default_rng(1)
        count = {"shared": 22, "smpl": 24, "smplh": 52, "smplx": 55}[name]
        whole = Pose(
            crop.to_matrices(rng.normal(size=(2, count, 3))),
            "camera",
            translation=rng.normal(size=(2, 3)),
            measured=rng.random((2, count)) < 0.5,
        )
        once = smpl_jax.mirror_pose(whole)
        twice = smpl_jax.mirror_pose(once)
        for field in ("rotations", "translation", "measured"):
            np.testing.assert_array_equal(getattr(twice, field), getattr(whole, field))
        assert not np.array_equal(once.rotations, whole.rotations)
    assert smpl_jax.mirror_pose(pose).measured.tolist() == (np.arange(24) != 11).tolist()


def test_mirrored_joints_change_names(body, pose):
    """By names of the joints, which the permutation does not come from."""
    names = [str(name) for name in smpl_jax.load_body_arrays()["joint_names"]]
    other = [names.index(n.replace("left", "?").replace("right", "left").replace("?", "right")) for n in names]
    first = np.asarray(smpl_jax.joints(body, **smpl_jax.for_body(pose, body)))
    second = np.asarray(smpl_jax.joints(body, **smpl_jax.for_body(smpl_jax.mirror_pose(pose), body)))
    np.testing.assert_allclose(second, first[other] * [-1, 1, 1], atol=1e-5)


@pytest.mark.parametrize(
    "change", [Change(turn=25), Change(flip=True), Change(flip=True, turn=-40)], ids=["turn", "flip", "both"]
)
def test_the_changed_image_shows_the_changed_pose(body, pose, change):
    middle = SIZE / 2 - 0.5  # of pixels whose first centre is 0
    matrix = change.matrix((middle, middle), SIZE, SIZE, SIZE)

    # The published matrix puts the middle of the box half a pixel to the right of and below the middle of the crop. The root turns about the
    # pelvis, the image about its middle, so the body is put where the camera looks.
    def centred(pose):
        joints = np.asarray(smpl_jax.joints(body, **smpl_jax.for_body(pose, body)))
        return pose.replace(translation=-joints[0])

    warped = crop.warp(picture(body, centred(pose)).astype(np.uint8), matrix, SIZE)
    changed = change.pose(pose)
    assert apart(picture(body, centred(changed), shift=0.5), warped) < 0.12
    for wrong in (Change(turn=-change.turn, flip=change.flip), Change(turn=change.turn, flip=not change.flip)):
        if wrong != change:
            assert apart(picture(body, centred(wrong.pose(pose)), shift=0.5), warped) > 0.35


def test_keypoints_follow_the_pose(body, pose):
    """Four keypoints of each side that are joints of SMPL."""
    where = {25: 8, 26: 5, 29: 4, 30: 7, 31: 21, 36: 20, 32: 19, 35: 18}  # keypoint: joint

    def points(pose):
        out = np.zeros((44, 4), np.float32)
        out[list(where), :3] = np.asarray(smpl_jax.joints(body, **smpl_jax.for_body(pose, body)))[list(where.values())]
        out[list(where), 3] = 1
        return out

    for change in (Change(flip=True), Change(turn=30), Change(flip=True, turn=-20)):
        first, second = change.points(points(pose)), points(change.pose(pose))
        # relative to one of them, because the root turns about the pelvis
        kept = list(where)
        np.testing.assert_allclose(first[kept, :3] - first[25, :3], second[kept, :3] - second[25, :3], atol=1e-5)
        assert (first[:, 3] == second[:, 3]).all()


def test_draws_are_those_of_the_release():
    rng = np.random.default_rng(0)
    draws = [Change.draw(rng) for _ in range(4000)]
    assert np.mean([d.flip for d in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.turn != 0 for d in draws]) == pytest.approx(0.6, abs=0.03)
    assert max(abs(d.turn) for d in draws) == 60
    assert {min(d.scale for d in draws), max(d.scale for d in draws)} == {0.7, 1.3}
    assert max(abs(x) for d in draws for x in d.shift) == 0.02
    assert min(min(d.colours) for d in draws) >= 0.8 and max(max(d.colours) for d in draws) <= 1.2
