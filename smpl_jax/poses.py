"""Reads pose files of this and other programs. The name and the shape of an array together determine its meaning.

A shape alone is ambiguous: one program writes 24 joints as 72 numbers, another writes the root as 3 and the other 23 joints as 69. So a table
lists which arrays make up a pose, and how many joints each may have. A file that fits no row, or fits several with different results, is an
error that lists the choices. Nothing in a file is executed; only plain arrays are read.
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
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from smpl_jax import frames, io
from smpl_jax.body import SHAPE_SPACES
from smpl_jax.errors import PoseFileError
from smpl_jax.frames import Frame
from smpl_jax.pose import HANDS, JOINTS, PARTS, SHARED, Pose, no_rotations
from smpl_jax.rotations import axis_angle_to_matrix

Notation = Literal["matrices", "axis-angle"]
_WHOLE = tuple(JOINTS.values())  # number of joints with the root
_BODY = (JOINTS["smpl"] - 1, SHARED - 1)  # number of joints without the root: 23 in SMPL, 21 in SMPL-H and SMPL-X

# A row is one way to write a pose: its arrays in the order of the joints, and how many joints each may have. An array in
# brackets is optional.
_Row = tuple[tuple[str, tuple[int, ...]], ...]
_ROWS: tuple[_Row, ...] = (
    (("matrices", _WHOLE),),  # smpl_jax, ChatPose-JAX
    (("axis_angle", _WHOLE),),
    (("poses", _WHOLE),),  # AMASS, 3DPW, EasyMocap
    (("pose", _WHOLE),),  # SPIN's data sets
    (("full_pose", _WHOLE),),  # smplx
    (("fullpose", _WHOLE),),  # GRAB
    (("global_orient", (1,)), ("body_pose", _BODY)),  # smplx, 4D-Humans (HMR2), NeuMan
    (("body_pose", (JOINTS["smpl"],)),),  # data sets of 4D-Humans: the root is its first joint
    (  # AMASS for SMPL-X
        ("root_orient", (1,)),
        ("pose_body", (SHARED - 1,)),
        ("pose_jaw", (1,)),
        ("pose_eye", (2,)),
        ("pose_hand", (HANDS,)),
    ),
    (("root_orient", (1,)), ("pose_body", _BODY), ("[pose_hand]", (HANDS, PARTS["rigid hands"]))),  # human_body_prior
)
_KINDS: dict[str, tuple[Notation, ...]] = {"matrices": ("matrices",), "axis_angle": ("axis-angle",)}
_ROOTS = ("global_orient", "root_orient")
_RATES = ("mocap_framerate", "mocap_frame_rate")  # AMASS's two releases write one of them each; no other program does
# Names of other fields in files of different programs. The first one that exists and has a fitting shape is used.
_BETAS = ("betas", "shape")  # SPIN's data sets write shape
_TRANSLATIONS = ("translation", "trans", "transl")  # smpl_jax; AMASS, 3DPW; smplx, NeuMan
_POSE_FLAGS = ("has_body_pose", "has_smpl")  # 4D-Humans, SPIN: 0 if the pose is a placeholder
_BETAS_FLAGS = ("has_betas", "has_smpl")
_TRANSLATION_FLAGS = ("has_translation",)
_TEXTS = ("frame", "gender", "body", "shape_space")
_BESIDE = {*_BETAS, *_TRANSLATIONS, *_POSE_FLAGS, *_BETAS_FLAGS, *_TRANSLATION_FLAGS, *_TEXTS, *_RATES, "measured"}
READ = {name.strip("[]") for row in _ROWS for name, _ in row} | _BESIDE
"""Names of the arrays that are read."""


_to_matrix = jax.jit(axis_angle_to_matrix)  # jit compiles one program for each shape instead of a dozen


class _Reading(NamedTuple):
    """One interpretation of the arrays of a row."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    kind: Notation
    poses: int


@dataclasses.dataclass(frozen=True, eq=False)
class PoseFile:
    """An opened pose file. ``file[3]`` is a pose; ``file[10:20]`` and ``file.poses()`` are a batch of poses. Only the requested poses are converted.
    ``len(file)`` is their number.

    names: the arrays of the poses. unused: the other arrays of the file. num_joints: 22, 24, 52 or 55, the root first. kind: how the file writes a
    rotation. frame: frame of root and translation; None if the file does not state it, and then ``read_poses(path, frame=…)`` must. shape: the
    batch shape of the poses in the file. gender, rate (poses per second), body (whose joints and betas these are): None if the file does not state
    them. shape_space: ``Pose.shape_space`` of the betas: what the file states, or else that of ``body``.
    """

    path: Path
    names: tuple[str, ...]
    unused: tuple[str, ...]
    num_joints: int
    kind: Notation
    frame: Frame | None
    shape: tuple[int, ...]
    gender: str | None
    rate: float | None
    body: str | None
    shape_space: str | None
    _readings: tuple[_Reading, ...] = dataclasses.field(repr=False)
    _arrays: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    _fields: Mapping[str, np.ndarray] = dataclasses.field(
        repr=False
    )  # fields of ``Pose``, each with one row or one row per pose

    def __len__(self) -> int:
        return self._readings[0].poses

    def __iter__(self) -> Iterator[Pose]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Pose:
        """One pose, or several of batch shape (n,): float32 NumPy arrays, rotations as matrices, in the file's frame.

        In a pose that the file marks as a placeholder (``has_body_pose`` of 4D-Humans) no joint is measured.

        Raises:
            PoseFileError: there is no such pose, it is not finite, its matrices are not rotations, the frame is unknown, or two arrays
                of the file contradict each other.
        """
        if self.frame is None:
            raise PoseFileError(
                f"{self.path}: the file does not state its frame; pass it to read_poses(path, frame=…), "
                f"one of {', '.join(get_args(Frame))}"
            )
        count = len(self)
        if isinstance(index, slice):
            which = np.arange(count)[index]
        elif 0 <= index < count:
            which = np.array([index])
        else:
            raise PoseFileError(f"{self.path}: expected the index of a pose in [0, {count}), found {index}")
        fields = {name: rows[which if len(rows) > 1 else np.zeros_like(which)] for name, rows in self._fields.items()}
        for name in ("betas", "translation"):
            if (has := fields.get(f"has_{name}")) is not None:
                fields[name] = np.where(has[:, None], fields[name], 0)
        space = self.shape_space if "betas" in fields else None
        pose = Pose(self._rotations(which), self.frame, shape_space=space, **fields)
        for name in ("betas", "translation"):
            if name in fields and not (finite := np.isfinite(fields[name]).all(-1)).all():
                raise PoseFileError(
                    f"{self.path}: {name} must be finite numbers; found NaN or infinity in pose {which[finite.argmin()]}"
                )
        if isinstance(index, slice):
            return pose
        pose = pose[0]
        for name in ("betas", "translation"):
            if (has := getattr(pose, f"has_{name}")) is not None:
                pose = pose.replace(**{name: getattr(pose, name) if has else None, f"has_{name}": None})
        return pose

    def poses(self) -> Pose:
        """All poses, of batch shape ``shape``."""
        return jax.tree.map(lambda x: x.reshape(*self.shape, *x.shape[1:]), self[:])

    def _rotations(self, which: np.ndarray) -> np.ndarray:
        """Rotations (n, J, 3, 3) float32 of the poses `which`."""
        first, *others = self._readings
        pose = self._matrices(first, which)
        for other in others:
            again = self._matrices(other, np.minimum(which, other.poses - 1))
            shared = again.shape[1] if again.shape[1] in (1, pose.shape[1]) else SHARED
            apart = np.abs(pose[:, :shared] - again[:, :shared]).max(initial=0)
            if other.poses != len(self) or apart > 1e-3:
                raise PoseFileError(
                    f"{self.path}: {_listed(first.names)} and {_listed(other.names)} are different poses; "
                    "remove the wrong one from the file"
                )
        return pose

    def _matrices(self, reading: _Reading, which: np.ndarray) -> np.ndarray:
        parts = []
        for name, count in zip(reading.names, reading.counts):
            tail = (count, 3, 3) if reading.kind == "matrices" else (count, 3)
            parts.append(np.asarray(self._arrays[name].reshape(-1, *tail)[which], np.float32))
        turns = np.concatenate(parts, 1)
        bad = ~np.isfinite(turns).reshape(len(turns), -1).all(1)
        if bad.any():
            names = _listed(reading.names) or "the array"
            raise PoseFileError(
                f"{self.path}: {names} must be finite numbers; found NaN or infinity in pose {which[bad.argmax()]}"
            )
        if reading.kind == "axis-angle":
            return np.asarray(_to_matrix(turns))
        for at, joint in no_rotations(turns):
            raise PoseFileError(
                f"{self.path}: {_listed(reading.names) or 'the array'} must be rotation matrices "
                f"(R Rᵀ = 1 within 1e-3, det R = 1); joint {joint} of pose {which[at]} is not one"
            )
        return turns


def read_poses(path: str | os.PathLike[str], frame: Frame | None = None) -> PoseFile:
    """Opens an ``.npz`` or ``.npy`` of poses and determines its layout.

    An ``.npz`` is read by the names of its arrays. Each may contain rotation matrices (..., J, 3, 3), or axis-angle (..., J, 3) or (..., 3 J) in
    radians:

    * ``matrices``, ``axis_angle``, ``poses``, ``pose``, ``full_pose``, ``fullpose``: 22, 24, 52 or 55 joints;
    * ``global_orient`` with ``body_pose`` of 23 or 21 joints; or only ``body_pose`` of 24;
    * ``root_orient`` with ``pose_body`` of 21 or 23 joints, and optionally ``pose_hand`` of 2 or 30.

    An ``.npy`` is one array of 22, 24, 52 or 55 joints.

    Other fields are read if they exist and fit the poses: ``betas``; ``translation``, ``trans`` or ``transl``; ``measured``; the flags of
    placeholders ``has_betas``, ``has_translation``, ``has_body_pose``; and the texts and numbers of `PoseFile`. Each has one row for all poses or
    one row per pose. Arrays that are not read are listed in ``unused``.

    Args:
        path: the file.
        frame: frame of root and translation. It overrides the file's. If the file has none, it is required before poses are read.

    Returns:
        The opened file. Its ``frame`` is its text ``frame`` (``write_poses``); "z-up" for AMASS, which is recognised by its frame rate or by
        ``poses`` of 52 or 55 joints; otherwise None.

    Raises:
        PoseFileError: the file is missing, cut off or not a file of plain arrays; no array in it is a pose; or two
            interpretations fit.
        ValueError: an unknown frame.
    """
    if frame is not None:
        frames.turn(frame)
    path = Path(path)
    if not path.is_file():
        raise PoseFileError(
            f"{path}: expected an .npz or .npy file, found {'a folder' if path.is_dir() else 'no such file'}"
        )
    return _interpret(path, *_load(path), frame)


def poses_in(arrays: Mapping[str, np.ndarray], where: str | os.PathLike[str], frame: Frame | None = None) -> PoseFile:
    """`read_poses` for arrays that another program gave or that were read in another way.

    Args:
        arrays: by the names that an ``.npz`` would have; "" for the only array of an ``.npy``.
        where: begins errors, such as the name of the file.
        frame: as in `read_poses`.

    Raises:
        PoseFileError: no array is a pose, or two interpretations fit.
        ValueError: an unknown frame.
    """
    if frame is not None:
        frames.turn(frame)
    known = {name: np.asarray(array) for name, array in arrays.items() if name in READ or not name}
    return _interpret(Path(where), known, tuple(name for name in arrays if name not in known), frame)


def _interpret(path: Path, arrays: dict[str, np.ndarray], others: tuple[str, ...], frame: Frame | None) -> PoseFile:
    rows: tuple[_Row, ...] = ((("", _WHOLE),),) if "" in arrays else _ROWS
    found = [reading for row in rows for reading in _readings(row, arrays)]
    if not found:
        raise PoseFileError(f"{path}: {_no_pose(arrays, others)}")
    first = found[0]
    used = {name for reading in found for name in reading.names}
    for root in _ROOTS:  # the root of a complete pose may be repeated in an array of its own; they must agree
        if root in arrays and root not in used:
            reading = next((r for r in _readings(((root, (1,)),), arrays, whole=(1,)) if r.poses == first.poses), None)
            if reading is None:
                raise PoseFileError(
                    f"{path}: expected one {root} for each of the {first.poses} poses of {_listed(first.names)}, "
                    f"found shape {arrays[root].shape}; remove the wrong one from the file"
                )
            found.append(reading)
            used.add(root)
    fields, beside = _beside(first, arrays)
    texts = {name: text for name in _TEXTS if (text := _text(arrays.get(name))) is not None}
    rates = {name: float(arrays[name]) for name in _RATES if name in arrays and _is_number(arrays[name])}
    return PoseFile(
        path=path,
        names=first.names,
        unused=tuple(sorted({*arrays, *others} - used - beside - set(texts) - set(_RATES) - {"frame"})),
        num_joints=sum(first.counts),
        kind=first.kind,
        frame=frame or _frame(path, first, arrays, others),
        shape=_batch(first, arrays),
        gender=texts.get("gender"),
        rate=next(iter(rates.values()), None),
        body=(body := texts.get("body")),
        shape_space=texts.get("shape_space") or SHAPE_SPACES.get(body or "", body),
        _readings=tuple(found),
        _arrays=arrays,
        _fields=fields,
    )


def _beside(first: _Reading, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], set[str]]:
    """The other fields of ``Pose`` in the file, each with one row or one row per pose, and the names of their arrays."""
    fields: dict[str, np.ndarray] = {}
    used: set[str] = set()

    def take(names: tuple[str, ...], kinds: str, axes: int, width: int | None = None) -> np.ndarray | None:
        """The first array that exists and fits, as (1 or number of poses, width). axes: 1 for rows, 0 for single numbers."""
        for name in names:
            array = arrays.get(name)
            if array is None or array.dtype.kind not in kinds or array.ndim < axes or not array.size:
                continue
            rows = array.reshape(-1, *array.shape[array.ndim - axes :])
            fits = len(rows) in (1, first.poses) and width in (None, *array.shape[-1:])
            if fits and (name != "shape" or first.names == ("pose",)):
                used.add(name)
                return rows
        return None

    for field, names, width, marks in (
        ("betas", _BETAS, None, _BETAS_FLAGS),
        ("translation", _TRANSLATIONS, 3, _TRANSLATION_FLAGS),
    ):
        rows, has = take(names, "fiu", 1, width), take(marks, "fiub", 0)
        if rows is None or (has is not None and not (has > 0).any()):
            continue
        fields[field] = rows.astype(np.float32)
        if has is not None and not (has > 0).all():
            fields[f"has_{field}"] = has > 0
    joints = sum(first.counts)
    measured = take(("measured",), "b", 1, joints)
    flags = take(_POSE_FLAGS, "fiub", 0)
    if measured is None and flags is not None and not (flags > 0).all():
        measured = np.broadcast_to((flags > 0)[:, None], (len(flags), joints))
    if measured is not None:
        fields["measured"] = measured
    return fields, used


def _batch(reading: _Reading, arrays: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The batch shape of the array with the most joints."""
    count, name = max(zip(reading.counts, reading.names))
    shape = arrays[name].shape
    tails = [tail for _, tail in _tails(count) if shape[len(shape) - len(tail) :] == tail]
    return shape[: len(shape) - len(tails[0])]


def _text(array: np.ndarray | None) -> str | None:
    """A string, which some programs write as bytes."""
    if array is None or array.ndim or array.dtype.kind not in "US":
        return None
    return str(array) if array.dtype.kind == "U" else array.item().decode("utf-8", "replace")


def _is_number(array: np.ndarray) -> bool:
    return array.size == 1 and array.ndim == 0 and array.dtype.kind in "fiu" and bool(np.isfinite(array))


def _readings(row: _Row, arrays: Mapping[str, np.ndarray], whole: tuple[int, ...] = _WHOLE) -> Iterator[_Reading]:
    """The interpretation that fits names and shapes of a row: the same number of poses of one kind in each part, and `whole` joints in total.

    At most one fits. The kinds differ in the last axis (3 or 3 J) and the one before it (3 or J). Only a root is ambiguous; it takes its kind and
    its number of poses from the body beside it.
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


def _shapes(name: str, array: np.ndarray, counts: tuple[int, ...]) -> Iterator[tuple[int, Notation, int]]:
    """The possible interpretations of an array, as (joints, kind, poses)."""
    if array.dtype.kind not in "fiu":
        return
    for count in counts:
        for kind, tail in _tails(count):
            lead = array.ndim - len(tail)
            if lead >= 0 and array.shape[lead:] == tail and kind in _KINDS.get(name, (kind,)):
                yield count, kind, math.prod(array.shape[:lead])


def _tails(count: int) -> list[tuple[Notation, tuple[int, ...]]]:
    """The possible last axes of an array of this many rotations."""
    tails: list[tuple[Notation, tuple[int, ...]]] = [
        ("matrices", (count, 3, 3)),
        ("axis-angle", (count, 3)),
        ("axis-angle", (3 * count,)),
    ]
    return [*tails, ("matrices", (3, 3))] if count == 1 else tails


def _frame(path: Path, reading: _Reading, arrays: Mapping[str, np.ndarray], others: tuple[str, ...]) -> Frame | None:
    if (text := _text(arrays.get("frame"))) is not None:
        try:
            return frames.parse_frame(text)
        except ValueError as error:
            raise PoseFileError(f"{path}: its {error}") from None
    amass = reading.names == ("poses",) and reading.counts[0] in (JOINTS["smplh"], JOINTS["smplx"])
    return "z-up" if amass or any(rate in arrays or rate in others for rate in _RATES) else None


def _no_pose(arrays: Mapping[str, np.ndarray], others: tuple[str, ...]) -> str:
    """The error message for a file without a pose: what was expected and what was found."""
    candidates = [f"{name} {a.dtype} of shape {a.shape}".strip() for name, a in arrays.items() if name not in _TEXTS]
    found = "; ".join([*candidates, ", ".join(others)] if others else candidates)[:300] or "nothing"
    if "body_pose" in arrays and "global_orient" not in arrays and any(_shapes("", arrays["body_pose"], _BODY)):
        return f"body_pose does not contain the root; expected global_orient (1 joint) as well; found {found}"
    if "" in arrays and any(_shapes("", arrays[""], _BODY)):
        return f"an array of 23 or 21 joints lacks the root; expected 22, 24, 52 or 55 joints, the root first; found {found}"
    choices = (
        "matrices, axis_angle, poses, pose, full_pose or fullpose of 22, 24, 52 or 55 joints; global_orient with "
        "body_pose of 23 or 21, or body_pose alone of 24; root_orient with pose_body of 21 or 23"
    )
    expected = "an array of 22, 24, 52 or 55 joints" if "" in arrays else choices
    return f"expected {expected}, each (…, J, 3, 3), or (…, J, 3) or (…, 3 J) in radians; found {found}"


def _listed(names: tuple[str, ...]) -> str:
    return " + ".join(names)


def _load(path: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Arrays whose names can belong to a pose, and the names of all others. A ``.npy`` (memory-mapped, not read) has
    the name "".
    """
    try:
        data: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(data, np.ndarray):
            return {"": data}, ()
        arrays: dict[str, np.ndarray] = {}
        with data:  # members are read on demand; the others are not read at all
            members = data.zip.namelist()
            infos = {
                name: data.zip.getinfo(name if name in members else f"{name}.npy")
                for name in data.files
                if name in READ
            }
            sizes = {name: info.file_size for name, info in infos.items()}
            if other := [name for name, info in infos.items() if info.compress_type not in io.BOUNDED_PACKING]:
                raise PoseFileError(f"{path}: {', '.join(other)} is packed in a way that NumPy does not write")
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
            f"{path}: expected a complete .npy or .npz file of plain arrays{reason}. Pickles (.pkl, .pt) can run code and "
            "are not opened: if you trust the file, load it yourself and save its arrays with np.savez"
        ) from error
