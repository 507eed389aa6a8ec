"""Pose files of other programs: what their arrays mean goes by name and shape together.

A shape alone says little: 72 numbers are 24 joints with the root for one program and 23 joints beside it are 69 for
another. So a table lists which arrays make a pose and how many joints each may hold; what fits no row, or fits in two
ways that differ, is an error that lists the choices. Nothing in a file is run: plain arrays only.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from smpl_jax import frames, io
from smpl_jax.errors import PoseFileError
from smpl_jax.frames import Frame
from smpl_jax.rotations import axis_angle_to_matrix

Kind = Literal["matrices", "axis-angle"]
WHOLE = (22, 24, 52, 55)
"""Joints of a pose with its root: what the family shares, SMPL, SMPL-H, SMPL-X."""

# A row is one way to write a pose: the arrays of its joints in order, and how many joints each may hold. An array in
# brackets may be missing.
_Row = tuple[tuple[str, tuple[int, ...]], ...]
_ROWS: tuple[_Row, ...] = (
    (("matrices", WHOLE),),  # smpl_jax, ChatPose-JAX
    (("axis_angle", WHOLE),),
    (("poses", WHOLE),),  # AMASS, 3DPW, EasyMocap
    (("pose", WHOLE),),  # SPIN's data sets
    (("full_pose", WHOLE),),  # smplx
    (("fullpose", WHOLE),),  # GRAB
    (("global_orient", (1,)), ("body_pose", (23, 21))),  # smplx, 4D-Humans (HMR2), NeuMan
    (("body_pose", (24,)),),  # data sets of 4D-Humans: the root is its first joint
    (("root_orient", (1,)), ("pose_body", (21, 23)), ("[pose_hand]", (30, 2))),  # AMASS for SMPL-X, human_body_prior
)
_KINDS: dict[str, tuple[Kind, ...]] = {"matrices": ("matrices",), "axis_angle": ("axis-angle",)}
_ROOTS = ("global_orient", "root_orient")
_RATES = ("mocap_framerate", "mocap_frame_rate")  # AMASS's two releases write one of them, and nobody else does


class _Reading(NamedTuple):
    """One meaning of the arrays of a row."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    kind: Kind
    poses: int


@dataclasses.dataclass(frozen=True, eq=False)
class PoseFile:
    """A pose file of which it is known what it means.

    names: the arrays that make its poses. unused: what else lies in the file. num_joints: 22, 24, 52 or 55, the root
    first. kind: how the file writes a rotation. frame: of the root, None where the file does not say.
    """

    path: Path
    names: tuple[str, ...]
    unused: tuple[str, ...]
    num_joints: int
    kind: Kind
    frame: Frame | None
    _readings: tuple[_Reading, ...] = dataclasses.field(repr=False)
    _arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return self._readings[0].poses

    def rotations(self, index: int = 0) -> np.ndarray:
        """Pose `index` of the file as (J, 3, 3) float32 matrices relative to the parents, joint 0 in the file's frame.

        Raises:
            PoseFileError: there is no such pose, it is not finite or no rotations, or arrays of the file that should
                say the same differ.
        """
        if not 0 <= index < len(self):
            raise PoseFileError(f"{self.path}: pose {index} was asked for, but there are {len(self)} poses")
        first, *others = self._readings
        pose = self._pose(first, index)
        for other in others:
            again = self._pose(other, min(index, other.poses - 1))
            shared = len(again) if len(again) in (1, len(pose)) else 22
            if other.poses != len(self) or np.abs(pose[:shared] - again[:shared]).max() > 1e-3:
                raise PoseFileError(
                    f"{self.path}: {_listed(first.names)} and {_listed(other.names)} give different poses; "
                    "save the one that you mean without the other"
                )
        return pose

    def _pose(self, reading: _Reading, index: int) -> np.ndarray:
        parts = []
        for name, count in zip(reading.names, reading.counts):
            tail = (count, 3, 3) if reading.kind == "matrices" else (count, 3)
            parts.append(np.asarray(self._arrays[name].reshape(-1, *tail)[index], np.float32))
        turns, names = np.concatenate(parts), _listed(reading.names) or "the array"
        if not np.isfinite(turns).all():
            raise PoseFileError(f"{self.path}: {names} must be finite numbers; pose {index} is not")
        if reading.kind == "axis-angle":
            return np.asarray(axis_angle_to_matrix(turns))
        apart = np.abs(turns @ turns.swapaxes(-1, -2) - np.eye(3)).max(axis=(-1, -2))
        if wrong := np.flatnonzero((apart > 1e-3) | (np.linalg.det(turns) < 0)).tolist():
            raise PoseFileError(
                f"{self.path}: {names} must be rotations (R Rᵀ = 1 within 1e-3, det R = 1); "
                f"joint {wrong[0]} of pose {index} is none"
            )
        return turns


def read_poses(path: str | os.PathLike[str]) -> PoseFile:
    """Open an ``.npz`` or ``.npy`` of poses and find out what it means.

    An ``.npz`` is read by the names of its arrays; each may be rotation matrices (..., J, 3, 3) or axis-angle (..., J, 3)
    or (..., 3 J), radians:

    * ``matrices``, ``axis_angle``, ``poses``, ``pose``, ``full_pose``, ``fullpose``: 22, 24, 52 or 55 joints;
    * ``global_orient`` with ``body_pose`` of 23 or 21 joints; or ``body_pose`` alone of 24;
    * ``root_orient`` with ``pose_body`` of 21 or 23 joints, and ``pose_hand`` of 2 or 30 where it is there.

    An ``.npy`` is one array of 22, 24, 52 or 55 joints.

    Returns:
        The file; its `frame` is what its text ``frame`` says (``smpl_jax.export.write_npz``); "z-up" for AMASS, told by
        its frame rate or by ``poses`` of SMPL-H's or SMPL-X's 52 or 55 joints; else None.

    Raises:
        PoseFileError: the file is missing, cut off or no file of plain arrays; no array in it is a pose; or two
            meanings fit.
    """
    path = Path(path)
    if not path.is_file():
        raise PoseFileError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected an .npz or .npy")
    arrays, others = _load(path)
    rows: tuple[_Row, ...] = ((("", WHOLE),),) if "" in arrays else _ROWS
    found = [reading for row in rows for reading in _readings(row, arrays)]
    if not found:
        raise PoseFileError(f"{path}: {_no_pose(arrays, others)}")
    first = found[0]
    used = {name for reading in found for name in reading.names}
    for root in _ROOTS:  # beside a whole pose, a root has to be that pose's
        if root in arrays and root not in used:
            reading = next((r for r in _readings(((root, (1,)),), arrays, whole=(1,)) if r.poses == first.poses), None)
            if reading is None:
                raise PoseFileError(
                    f"{path}: {root} has shape {arrays[root].shape}, which is no root for the {first.poses} poses of "
                    f"{_listed(first.names)}; save the one that you mean without the other"
                )
            found.append(reading)
            used.add(root)
    return PoseFile(
        path=path,
        names=first.names,
        unused=tuple(sorted({*arrays, *others} - used - {"frame", *_RATES})),
        num_joints=sum(first.counts),
        kind=first.kind,
        frame=_frame(path, first, arrays, others),
        _readings=tuple(found),
        _arrays=arrays,
    )


def _readings(row: _Row, arrays: Mapping[str, np.ndarray], whole: tuple[int, ...] = WHOLE) -> Iterator[_Reading]:
    """The meaning that fits names and shapes of a row: as many poses of one kind in each part, `whole` joints in all.

    There is one at most: numbers in a last axis of 3 or of 3 J and a last but one of 3 or of J tell the kinds apart, and
    a root, which alone can be read in several ways, takes its kind and number from the body beside it.
    """
    parts = [(name.strip("[]"), counts) for name, counts in row if not name.startswith("[") or name[1:-1] in arrays]
    if any(name not in arrays for name, _ in parts):
        return
    names = tuple(name for name, _ in parts)
    seen = set()
    for meaning in itertools.product(*(_shapes(name, arrays[name], counts) for name, counts in parts)):
        counts, kinds, poses = zip(*meaning)
        fits = sum(counts) in whole and len(set(kinds)) == len(set(poses)) == 1 and poses[0] > 0
        if fits and meaning not in seen:
            seen.add(meaning)
            yield _Reading(names, counts, kinds[0], poses[0])


def _shapes(name: str, array: np.ndarray, counts: tuple[int, ...]) -> Iterator[tuple[int, Kind, int]]:
    """(joints, kind, poses) that an array may mean."""
    if array.dtype.kind not in "fiu":
        return
    for count in counts:
        tails: list[tuple[Kind, tuple[int, ...]]] = [
            ("matrices", (count, 3, 3)),
            ("axis-angle", (count, 3)),
            ("axis-angle", (3 * count,)),
        ]
        tails += [("matrices", (3, 3))] if count == 1 else []
        for kind, tail in tails:
            lead = array.ndim - len(tail)
            if lead >= 0 and array.shape[lead:] == tail and kind in _KINDS.get(name, (kind,)):
                yield count, kind, math.prod(array.shape[:lead])


def _frame(path: Path, reading: _Reading, arrays: Mapping[str, np.ndarray], others: tuple[str, ...]) -> Frame | None:
    told = arrays.get("frame")
    if told is not None and told.dtype.kind == "U" and told.ndim == 0:
        try:
            return frames.told(str(told))
        except ValueError as error:
            raise PoseFileError(f"{path}: its {error}") from None
    amass = reading.names == ("poses",) and reading.counts[0] in (52, 55)
    return "z-up" if amass or any(rate in arrays or rate in others for rate in _RATES) else None


def _no_pose(arrays: Mapping[str, np.ndarray], others: tuple[str, ...]) -> str:
    """What is wrong with a file that holds no pose, and what one would be."""
    candidates = [f"{name} {a.dtype} of shape {a.shape}".strip() for name, a in arrays.items() if name != "frame"]
    found = "; ".join([*candidates, ", ".join(others)] if others else candidates)[:300] or "nothing"
    if "body_pose" in arrays and "global_orient" not in arrays and any(_shapes("", arrays["body_pose"], (23, 21))):
        return f"body_pose has no root: save global_orient (1 joint) beside it; found {found}"
    if "" in arrays and any(_shapes("", arrays[""], (23, 21))):
        return (
            f"23 or 21 joints are a body without its root: save 22, 24, 52 or 55 joints, the root first; found {found}"
        )
    choices = (
        "matrices, axis_angle, poses, pose, full_pose or fullpose of 22, 24, 52 or 55 joints; global_orient with "
        "body_pose of 23 or 21, or body_pose alone of 24; root_orient with pose_body of 21 or 23"
    )
    expected = "an array of 22, 24, 52 or 55 joints" if "" in arrays else choices
    return f"no pose; expected {expected}, each (…, J, 3, 3), or (…, J, 3) or (…, 3 J) in radians; found {found}"


def _listed(names: tuple[str, ...]) -> str:
    return " + ".join(names)


def _load(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays whose names can belong to a pose, and the names of what else there is; a ``.npy`` (mapped, not read) has
    the name "".
    """
    wanted = {name.strip("[]") for row in _ROWS for name, _ in row} | {"frame"}
    try:
        data: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(data, np.ndarray):
            return {"": data}, ()
        arrays: dict[str, np.ndarray] = {}
        with data:  # members are read when asked for: what else lies in the file is not looked at
            members = data.zip.namelist()
            sizes = {
                name: data.zip.getinfo(name if name in members else f"{name}.npy").file_size
                for name in data.files
                if name in wanted
            }
            if (total := sum(sizes.values())) > io.MAX_BYTES:
                raise PoseFileError(
                    f"{path}: {', '.join(sizes)} would unpack to {total:,} bytes; the limit is {io.MAX_BYTES:,}"
                )
            others = [name for name in data.files if name not in sizes]
            for name in sizes:
                try:
                    arrays[name] = np.asarray(data[name])
                except ValueError as error:
                    if "allow_pickle" not in str(error):
                        raise
                    others.append(f"{name} (Python objects)")
            return arrays, tuple(others)
    except PoseFileError:
        raise
    except (ValueError, OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise PoseFileError(
            f"{path}: no .npy or .npz file of plain arrays, or cut off{reason}. A pickle (.pkl, .pt) is not opened: "
            "load it where you trust it, and np.savez its arrays under their names"
        ) from error
