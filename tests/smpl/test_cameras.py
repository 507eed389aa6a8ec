"""Weak-perspective cameras of crops, and translations of bodies."""

import numpy as np
import pytest

import smpl_jax
from smpl_jax.raster import Camera

RNG = np.random.default_rng(2)
CAMERAS = np.stack([RNG.uniform(0.4, 1.4, 6), *RNG.uniform(-0.3, 0.3, (2, 6))], -1)


def test_a_body_is_seen_where_the_weak_camera_says():
    """A flat body, at the depth of its translation, projects to the crop's middle plus s (x + t) half sizes, however long the lens."""
    points = RNG.normal(0, 0.5, (9, 3)) * [1, 1, 0]
    for focal in (500.0, 5000.0):
        places = np.asarray(smpl_jax.weak_to_translation(CAMERAS, focal, 256))
        for (s, *t), place in zip(CAMERAS, places):
            seen = Camera(256, 256, focal, (128, 128), tuple(place)).project(points)
            np.testing.assert_allclose(seen, 128 + 128 * s * (points[:, :2] + t), atol=1e-2)


def test_a_crop_is_seen_at_its_place_in_the_image():
    """The same pixels, whether in the crop's own camera or in that of a 1280 x 720 image that the crop is cut from, at full size."""
    points, offset = RNG.normal(0, 0.5, (9, 3)) * [1, 1, 0], np.array([-300.0, 120.0])
    place = np.asarray(smpl_jax.weak_to_translation(CAMERAS[0], 2000.0, 400.0, offset))
    seen = Camera(1280, 720, 2000.0, (640, 360), tuple(place)).project(points)
    s, *t = CAMERAS[0]
    np.testing.assert_allclose(seen, np.array([640, 360]) + offset + 200 * s * (points[:, :2] + t), atol=1e-2)


def peers_crop(camera, focal, size):
    """What SPIN and HMR2 compute for a crop."""
    return np.stack([camera[:, 1], camera[:, 2], 2 * focal / (size * camera[:, 0] + 1e-9)], -1)


def test_the_convention_is_that_of_spin_and_hmr2():
    np.testing.assert_allclose(
        smpl_jax.weak_to_translation(CAMERAS, 5000.0, 256), peers_crop(CAMERAS, 5000.0, 256), rtol=1e-6
    )
    # cam_crop_to_full of HMR2 for one camera, worked out by hand: s = 0.8, box of 200 px at (500, 100), image of 640 x 480
    place = smpl_jax.weak_to_translation([0.8, 0.1, -0.2], 1000.0, 200.0, [500 - 320, 100 - 240])
    np.testing.assert_allclose(place, [2 * 180 / 160 + 0.1, -2 * 140 / 160 - 0.2, 2000 / 160], rtol=1e-6)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (50.0, -20.0), RNG.normal(0, 100, (6, 2))])
def test_there_and_back(offset):
    focal, size = RNG.uniform(500, 5000, 6), RNG.uniform(100, 400, 6)
    places = smpl_jax.weak_to_translation(CAMERAS, focal, size, offset)
    assert places.shape == (6, 3)
    np.testing.assert_allclose(smpl_jax.translation_to_weak(places, focal, size, offset), CAMERAS, rtol=2e-5, atol=2e-6)
    one = smpl_jax.weak_to_translation(CAMERAS[0], focal, size, offset)
    assert one.shape == (6, 3), "a camera broadcasts over images"
