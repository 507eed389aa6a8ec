"""SMPL's licensed bodies and the regressors that protocols need: where they come from, and reading them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatpose_jax.data.readers.untrusted import load_pickle, read_bytes
from chatpose_jax.errors import UserError
from smpl_jax import io
from smpl_jax.body import BodyModel


class File(NamedTuple):
    """A file of the folder of the option smpl: its possible names, where to get it, and its licence."""

    names: tuple[str, ...]
    page: str
    licence: str


_SMPL = "SMPL's own licence, for non-commercial research, on registration"
FILES: dict[str, File] = {
    "neutral": File(("SMPL_NEUTRAL.pkl", "SMPL_NEUTRAL.npz"), "https://smplify.is.tue.mpg.de", _SMPL),
    "male": File(("SMPL_MALE.pkl", "SMPL_MALE.npz"), "https://smpl.is.tue.mpg.de, version 1.0.0", _SMPL),
    "female": File(("SMPL_FEMALE.pkl", "SMPL_FEMALE.npz"), "https://smpl.is.tue.mpg.de, version 1.0.0", _SMPL),
    "h36m": File(
        ("J_regressor_h36m.npy",),
        "http://visiondata.cis.upenn.edu/spin/data.tar.gz, as nkolot/SPIN's fetch_data.sh fetches it",
        "none is stated; it is made from SMPL",
    ),
    "j19": File(
        ("SMPL_to_J19.pkl",),
        "https://people.eecs.berkeley.edu/~jathushan/projects/4dhumans/hmr2_data.tar.gz, as 4D-Humans fetches it",
        "none is stated; it is made from SMPL",
    ),
}
_ROWS = {"h36m": 17, "j19": 19}


class MissingFile(UserError):
    """A file that a protocol needs is not there."""


class Files:
    """Bodies and regressors of a folder, read when they are needed. folder: "" if there is none."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._read: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        """The file of a key of ``FILES``. Raises MissingFile, which says what it is and where to get it."""
        if self.absent([name]):
            raise MissingFile(self.missing([name]))
        return next(path for path in self._paths(name) if path.is_file())

    def absent(self, names: Sequence[str]) -> list[str]:
        """Those of some keys of ``FILES`` whose file is not there."""
        return [name for name in names if not any(path.is_file() for path in self._paths(name))]

    def missing(self, names: Sequence[str]) -> str:
        """Says of files that are not there what they are, where to get them, and what to do."""
        sources = dict.fromkeys(f"{FILES[name].page} (licence: {FILES[name].licence})" for name in names)
        where = f"not in {self.folder}" if self.folder else "needed"
        return (
            f"{self.words(names)}: {where}. They are from {'; '.join(sources)}. Name the folder that holds them by --set smpl=FOLDER, "
            "or choose protocols that need none, --set protocols=C"
        )

    def words(self, names: Sequence[str]) -> str:
        """The names of files."""
        return ", ".join(" or ".join(FILES[name].names) for name in names)

    def _paths(self, name: str) -> list[Path]:
        return [Path(self.folder).expanduser() / each for each in FILES[name].names] if self.folder else []

    def body(self, gender: str) -> BodyModel:
        """SMPL of a gender, with ten betas. Raises MissingFile, or UserError where the file is not SMPL's."""
        if gender not in self._read:
            path = self.path(gender)
            try:
                self._read[gender] = io.load_body(path)
            except ValueError as error:
                raise UserError(str(error)) from None
            if self._read[gender].num_joints != 24:
                raise UserError(f"{path}: expected SMPL with 24 joints, found {self._read[gender].num_joints}")
        return self._read[gender]

    def regressor(self, name: str, num_vertices: int) -> np.ndarray:
        """(K, V) of a key of ``FILES``. Raises MissingFile, or UserError where the file does not fit the body."""
        if name not in self._read:
            path = self.path(name)
            if path.suffix == ".npy":
                try:
                    array = np.load(path, allow_pickle=False)
                except (ValueError, OSError, EOFError) as error:
                    raise UserError(f"{path}: expected a .npy of numbers ({error})") from None
            else:
                array = load_pickle(read_bytes(path), path)
            if getattr(array, "shape", None) != (_ROWS[name], num_vertices) or array.dtype.kind not in "fiu":
                raise UserError(
                    f"{path}: expected numbers of shape ({_ROWS[name]}, {num_vertices}), as many columns as the body has vertices; "
                    f"found {getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}"
                )
            self._read[name] = np.asarray(array, np.float64)
        return self._read[name]
