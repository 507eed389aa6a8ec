"""Weak-perspective cameras, as predicted by networks for a crop, and translations in metres.

HMR, SPIN and HMR2 (4D-Humans) predict (s, tx, ty) for a square crop. s scales metres such that the crop spans -1 to 1; tx and ty, in metres, are
added to the body first. A pinhole camera with a focal length of f pixels shows a body at the same size at the depth 2 f / (size s), where one
metre spans s size / 2 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def weak_to_translation(
    camera: ArrayLike, focal: ArrayLike, size: ArrayLike, offset: ArrayLike | Sequence[float] = (0.0, 0.0)
) -> jax.Array:
    """The translation of a body in the camera frame that corresponds to a weak-perspective camera.

    It is computed as in SPIN (``train/trainer.py``) and HMR2 (``hmr2/models/hmr2.py``) for the crop, and as in HMR2's ``cam_crop_to_full``
    (``hmr2/utils/renderer.py``) for the whole image, but without the 1e-9 that they add to the denominator.

    Args:
        camera: (..., 3), s > 0, tx, ty.
        focal: (...) focal length of the pinhole camera in pixels. HMR2 uses 5000 for a crop of 256, and 5000 / 256 times the longer
            side for the whole image.
        size: (...) side of the crop, in the same pixels as ``focal``.
        offset: (..., 2) pixels from the principal point, usually the centre of the image, to the centre of the crop, x right, y down;
            zeros for a camera of the crop itself.

    Returns:
        (..., 3) metres: ``Pose.translation`` in the frame "camera".
    """
    camera, focal, size, offset = (jnp.asarray(x, jnp.result_type(float)) for x in (camera, focal, size, offset))
    metres = 2 / (size * camera[..., 0])  # metres per pixel at the body's depth
    return _joined(camera[..., 1:] + offset * metres[..., None], (focal * metres)[..., None])


def translation_to_weak(
    translation: ArrayLike, focal: ArrayLike, size: ArrayLike, offset: ArrayLike | Sequence[float] = (0.0, 0.0)
) -> jax.Array:
    """The weak-perspective camera (..., 3) of a translation (..., 3) with z > 0: the inverse of ``weak_to_translation``."""
    translation, focal, size, offset = (
        jnp.asarray(x, jnp.result_type(float)) for x in (translation, focal, size, offset)
    )
    metres = translation[..., 2] / focal
    return _joined((2 / (size * metres))[..., None], translation[..., :2] - offset * metres[..., None])


def _joined(a: jax.Array, b: jax.Array) -> jax.Array:
    """Concatenates along the last axis; the other axes broadcast."""
    lead = jnp.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (a, b)], -1)
