"""Pose priors: mixtures of Gaussians over axis-angles."""

from __future__ import annotations

import dataclasses
import os
import pickle
import zipfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from smpl_jax.errors import PoseFileError
from smpl_jax.pose import SHARED
from smpl_jax.unpickle import PickledArray, RestrictedUnpickler, numpy_table

_HIGHEST = jax.lax.Precision.HIGHEST
_SIZE = 3 * (SHARED - 1)
_DEFAULT = Path(__file__).with_name("prior.npz")
_MAX_BYTES = 2**26


@partial(jax.tree_util.register_dataclass, data_fields=["means", "whiten", "offsets"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PosePrior:
    """A mixture of K Gaussians over the axis-angles (63,) of the 21 body joints after the root. :func:`load_prior` makes it; a pytree.

    means: (K, 63) radians. whiten: (K, 63, 63), the inverses of the covariances' Cholesky factors. offsets: (K,) negative logarithms of weight
    times height, with the smallest at 0.
    """

    means: jax.Array
    whiten: jax.Array
    offsets: jax.Array

    def __repr__(self) -> str:
        return f"PosePrior({np.shape(self.means)[0]} Gaussians)"

    def residuals(self, angles: jax.Array) -> jax.Array:
        """Residuals (64,) of one pose (63,): half their sum of squares is the negative log density of the nearest Gaussian, plus a constant."""
        apart = jnp.einsum("kij,kj->ki", self.whiten, angles - self.means, precision=_HIGHEST)
        energies = 0.5 * jnp.sum(apart**2, axis=-1) + self.offsets
        nearest = jax.lax.stop_gradient(jnp.argmin(energies))
        return jnp.append(apart[nearest], jnp.sqrt(2 * self.offsets[nearest]))

    def energy(self, angles: ArrayLike) -> jax.Array:
        """Negative log density of poses (..., 63) under the nearest Gaussian, plus a constant: (...)."""
        apart = jnp.einsum(
            "kij,...kj->...ki", self.whiten, jnp.asarray(angles)[..., None, :] - self.means, precision=_HIGHEST
        )
        return jnp.min(0.5 * jnp.sum(apart**2, axis=-1) + self.offsets, axis=-1)


def load_prior(path: str | os.PathLike[str] | None = None) -> PosePrior:
    """Loads a pose prior.

    path: an ``.npz`` as ``tools/pose_prior.py`` writes it, or SMPLify's ``gmm_08.pkl``, which has a licence of its own. Both hold ``weights`` (K,),
        ``means`` (K, D) and ``covars`` (K, D, D) with D = 63 or 69 (with SMPL's two rigid hands, which are integrated out). No code of the file is
        run. None is the prior of the package, fitted to CMU's motion capture and to
        generated poses.

    Raises:
        PoseFileError: the file is missing, or is no such mixture.
    """
    return _default() if path is None else _load(Path(path))


@cache
def _default() -> PosePrior:
    return _load(_DEFAULT)


def _load(file: Path) -> PosePrior:
    found = _read(file)
    arrays: dict[str, np.ndarray] = {}
    for name in ("weights", "means", "covars"):
        value = found.get(name)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not np.isfinite(value).all():
            raise PoseFileError(
                f"{file}: expected a mixture with arrays weights, means and covars of finite numbers; {name} is not such an array"
            )
        arrays[name] = value.astype(np.float64)
    weights, means, covars = arrays["weights"].reshape(-1), arrays["means"], arrays["covars"]
    count, size = means.shape if means.ndim == 2 else (0, 0)
    if not count or size not in (_SIZE, _SIZE + 6) or covars.shape != (count, size, size) or weights.shape != (count,):
        raise PoseFileError(
            f"{file}: expected weights (K,), means (K, D) and covars (K, D, D) with D = {_SIZE} or {_SIZE + 6}; "
            f"found {weights.shape}, {means.shape}, {covars.shape}"
        )
    try:
        whiten = np.linalg.inv(np.linalg.cholesky(covars[:, :_SIZE, :_SIZE]))
    except np.linalg.LinAlgError:
        whiten = None
    if whiten is None or not (weights > 0).all():
        raise PoseFileError(f"{file}: expected positive weights and positive definite covars")
    offsets = -np.log(weights / weights.sum()) - np.log(np.einsum("kii->ki", whiten)).sum(-1)
    return PosePrior(*(jnp.asarray(x, jnp.float32) for x in (means[:, :_SIZE], whiten, offsets - offsets.min())))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise PoseFileError(
                f"{file}: expected a pose prior of at most {_MAX_BYTES >> 20} MB; found {file.stat().st_size >> 20} MB"
            )
        if zipfile.is_zipfile(file):
            with np.load(file, allow_pickle=False) as archive:
                return dict(archive)
        with file.open("rb") as stream:
            content = RestrictedUnpickler(stream, numpy_table()).load()
    except PoseFileError:
        raise
    except OSError as error:
        raise PoseFileError(f"{file}: expected a pose prior, .npz or gmm_08.pkl; {error.strerror or error}") from None
    except (
        pickle.UnpicklingError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
    ) as error:
        raise PoseFileError(f"{file}: expected a pose prior, .npz or gmm_08.pkl; {error}") from None
    if not isinstance(content, dict):
        raise PoseFileError(
            f"{file}: expected a dictionary with weights, means and covars; found {type(content).__name__}"
        )
    return {name: _plain(value) for name, value in content.items()}


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, PickledArray) else value
    return np.asarray(value) if isinstance(value, list) and all(isinstance(x, int | float) for x in value) else value
