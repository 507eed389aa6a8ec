"""Acclaim's pair of files: a skeleton (ASF) and its motion (AMC), as in CMU's database."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smpl_jax.errors import PoseFileError
from smpl_jax.mocap.clip import MAX_JOINTS, Clip, numbers, read_text, turn_about

RATE = 120.0
"""Frames per second of CMU's clips. The files do not state it."""
INCH = 0.0254
LEGS = tuple(f"{side}{bone}" for side in "lr" for bone in ("femur", "tibia", "foot"))
LIMIT_MARGIN = 15.0
"""Degrees by which a leg may exceed the skeleton's limits. Beyond that the frame is a capture error (a flipped foot)."""
UPPER = ("lfemur", "rfemur", "lhumerus", "rhumerus")
"""Bones whose angles are all 0 only if they were not captured (both arms in the first frames of CMU's 03_02)."""


@dataclasses.dataclass(frozen=True)
class _Bone:
    """direction: unit (3,). length: in the file's unit. frame: (3, 3), the axes of its angles. order: order of the rotations. limits: (n, 2)."""

    direction: NDArray[np.float64]
    length: float
    frame: NDArray[np.float64]
    order: str
    dof: tuple[str, ...]
    limits: NDArray[np.float64] | None


@dataclasses.dataclass(frozen=True)
class _Skeleton:
    """root: AMC's names of its channels ("tx", "rz", …). unit: in metres. degrees: degrees per unit of angle. Parents precede children."""

    root: tuple[str, ...]
    position: NDArray[np.float64]
    frame: NDArray[np.float64]
    order: str
    unit: float
    degrees: float
    bones: dict[str, _Bone]
    parents: dict[str, str]


def read_amc(path: str | os.PathLike[str], skeleton: str | os.PathLike[str] | None = None) -> Clip:
    """Reads an AMC file with its skeleton.

    skeleton: the ASF file. By default the one beside the clip whose name is a prefix of the clip's: ``02.asf`` for ``02_01.amc``. A joint has the
    name of the ASF bone that starts at it. Lengths are in metres. A frame is not ``trusted`` if its legs exceed the skeleton's own limits by more
    than ``LIMIT_MARGIN``, or if all angles of a thigh or an upper arm are 0.

    Raises:
        PoseFileError: a file is missing, malformed or cut off, or uses an unsupported part of the format (lengths that change).
    """
    file = Path(path)
    asf = Path(skeleton) if skeleton is not None else _beside(file)
    bones = _read_asf(asf)
    values, degrees = _read_frames(file, {"root": bones.root, **{n: b.dof for n, b in bones.bones.items() if b.dof}})
    degrees = bones.degrees if degrees is None else degrees
    frames = len(values["root"])

    names, parents, offsets = ["root"], [-1], [np.zeros(3)]
    rotations, trusted = [], np.ones(frames, bool)
    turns = {kind: values["root"][:, i] * degrees for i, kind in enumerate(bones.root)}
    translation = np.stack([turns[f"t{axis}"] / degrees for axis in "xyz"], 1) + bones.position
    rotations.append(_turned(turns, bones.frame, bones.order, frames))
    for name, bone in bones.bones.items():
        parent = bones.parents[name]
        names.append(name)
        parents.append(names.index(parent))
        offsets.append(np.zeros(3) if parent == "root" else _vector(bones.bones[parent]))
        angles = {kind: values[name][:, i] * degrees for i, kind in enumerate(bone.dof)}
        rotations.append(_turned(angles, bone.frame, bone.order, frames))
        if name in UPPER and bone.dof:
            trusted &= values[name].any(1)
        if name in LEGS and bone.limits is not None:
            beyond = np.stack(list(angles.values()), 1)[:, :, None] * (-1, 1) - bone.limits * (-1, 1)
            trusted &= (beyond <= LIMIT_MARGIN).all((1, 2))
    for name, bone in bones.bones.items():
        if name not in bones.parents.values():
            names.append(f"{name} end")
            parents.append(names.index(name))
            offsets.append(_vector(bone))
            rotations.append(np.tile(np.eye(3), (frames, 1, 1)))
    return Clip(
        file,
        tuple(names),
        np.array(parents),
        np.stack(offsets) * bones.unit,
        np.stack(rotations, 1),
        translation * bones.unit,
        RATE,
        trusted,
    )


def _vector(bone: _Bone) -> NDArray[np.float64]:
    return bone.direction * bone.length


def _turned(angles: dict[str, np.ndarray], frame: np.ndarray, order: str, frames: int) -> np.ndarray:
    """Rotations (T, 3, 3) by ``angles`` (degrees) about the axes of ``frame``, the first of ``order`` innermost."""
    inner = np.tile(np.eye(3), (frames, 1, 1))
    for axis in order:
        if (angle := angles.get(f"r{axis}")) is not None:
            inner = turn_about(axis, angle) @ inner
    return frame @ inner @ frame.T


def _beside(file: Path) -> Path:
    found = sorted(p for p in file.parent.glob("*.[aA][sS][fF]") if file.stem.startswith(p.stem))
    if not found:
        raise PoseFileError(
            f"{file}: no skeleton in the same folder; expected an .asf file whose name is a prefix of the clip's, "
            f"such as {file.stem.split('_')[0]}.asf"
        )
    return max(found, key=lambda p: len(p.stem))


def _read_frames(file: Path, dof: dict[str, tuple[str, ...]]) -> tuple[dict[str, np.ndarray], float | None]:
    """Values (T, n) of the root and each moving bone, and their factor to degrees, None if the file does not state the unit."""
    rows: dict[str, list[list[str]]] = {name: [] for name in dof}
    frames, degrees = 0, None

    def whole() -> None:
        for name, found in rows.items():
            if len(found) != frames:
                raise PoseFileError(f"{file}: frame {frames} has {'no' if len(found) < frames else 'two'} {name}")

    for number, line in _lines(read_text(file)):
        words = line.split()
        where = f"{file}, line {number}"
        if words[0].startswith(":"):
            word = words[0].upper()
            if word in (":DEGREES", ":RADIANS"):
                degrees = 1.0 if word == ":DEGREES" else 180 / np.pi
            elif word != ":FULLY-SPECIFIED":
                raise PoseFileError(f"{where}: expected :FULLY-SPECIFIED, :DEGREES or :RADIANS; found {words[0]:.60}")
        elif words[0].isdecimal() and len(words) == 1:
            whole()
            frames += 1
        else:
            known = dof.get(words[0])
            if known is None or not frames or len(words) != 1 + len(known):
                wanted = (
                    f"{len(known)} values of {words[0]}" if known else "a bone of the skeleton with degrees of freedom"
                )
                raise PoseFileError(f"{where}: expected {wanted}, after the number of a frame; found {line!r:.80}")
            rows[words[0]].append(words[1:])
    if not frames:
        raise PoseFileError(f"{file}: expected AMC, numbered frames of bones and angles; found no frames")
    whole()
    values = {}
    for name, found in rows.items():
        flat = numbers([word for row in found for word in row], f"{file}, {name}")
        values[name] = flat.reshape(frames, len(dof[name]))
    return values, degrees


def _read_asf(file: Path) -> _Skeleton:
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for _, line in _lines(read_text(file)):
        if line.startswith(":"):
            name, _, rest = line[1:].partition(" ")
            current = sections.setdefault(name.lower(), [])
            line = rest
        current.append(line)
    unknown = set(sections) - {"version", "name", "units", "documentation", "root", "bonedata", "hierarchy", "skin"}
    missing = {"units", "root", "bonedata", "hierarchy"} - set(sections)
    if unknown or missing:
        words = f"has no :{min(missing)}" if missing else f":{min(unknown):.60} is not supported"
        raise PoseFileError(f"{file}: expected ASF with :units, :root, :bonedata and :hierarchy; {words}")

    units = _fields(sections["units"])
    root = _fields(sections["root"])
    where = f"{file}, :root"
    order = tuple(word.lower() for word in _field(root, "order", where))
    if sorted(order) != ["rx", "ry", "rz", "tx", "ty", "tz"]:
        raise PoseFileError(f"{where}: expected an order of TX TY TZ RX RY RZ; found {' '.join(order)!r:.60}")
    turns = "".join(word[1] for word in order if word[0] == "r")
    length = _three([*units.get("length", ["1"]), "1", "1"][:3], f"{file}, :units")[0]
    angle = units.get("angle", ["deg"])[0].lower()
    if length <= 0 or angle not in ("deg", "rad"):
        raise PoseFileError(
            f"{file}, :units: expected a positive length and an angle of deg or rad; found {length:g}, {angle:.20}"
        )
    degrees = 1.0 if angle == "deg" else 180 / np.pi
    bones = _bones(sections["bonedata"], degrees, file)
    parents = _parents(sections["hierarchy"], bones, file)
    return _Skeleton(
        root=order,
        position=_three(root.get("position", ["0"] * 3), f"{where}, position"),
        frame=_frame(root.get("orientation", ["0"] * 3), (root.get("axis") or ["XYZ"])[0], degrees, where),
        order=turns,
        unit=INCH / length,
        degrees=degrees,
        bones={name: bones[name] for name in parents},
        parents=parents,
    )


def _bones(lines: Iterable[str], degrees: float, file: Path) -> dict[str, _Bone]:
    """Bones by name. Each is between ``begin`` and ``end``."""
    bones: dict[str, _Bone] = {}
    block: list[str] | None = None
    for line in lines:
        if line == "begin" and block is None:
            block = []
        elif line == "end" and block is not None:
            name, bone = _bone(_fields(block), degrees, file)
            if name in bones or name == "root" or len(bones) >= MAX_JOINTS:
                raise PoseFileError(f"{file}: expected up to {MAX_JOINTS} bones with unique names; found {name!r:.60}")
            bones[name] = bone
            block = None
        elif block is not None:
            block.append(line)
        elif line:
            raise PoseFileError(f"{file}, :bonedata: expected bones between begin and end; found {line!r:.60} outside")
    if block is not None:
        raise PoseFileError(f"{file}, :bonedata is cut off: its last bone has no end")
    return bones


def _bone(fields: dict[str, list[str]], degrees: float, file: Path) -> tuple[str, _Bone]:
    name = " ".join(fields.get("name", []))
    where = f"{file}, bone {name!r:.60}"
    known = {"id", "name", "direction", "length", "axis", "dof", "limits", "bodymass", "cofmass"}
    if not name or not set(fields) <= known:
        raise PoseFileError(
            f"{where}: expected a name, and fields of {', '.join(sorted(known))}; found {', '.join(fields)!r:.120}"
        )
    *angles, order = _field(fields, "axis", where)
    order = order.lower()
    dof = tuple(word.lower() for word in fields.get("dof", []))
    if not set(dof) <= {"rx", "ry", "rz"} or [w[1] for w in dof] != [a for a in order if f"r{a}" in dof]:
        raise PoseFileError(
            f"{where}: expected dof of rx, ry and rz in the order of its axis, {order}; found {' '.join(dof)!r:.60}"
        )
    direction = _three(_field(fields, "direction", where), f"{where}, direction")
    (length,) = numbers(_field(fields, "length", where)[:1], f"{where}, length")
    if not 0.5 < np.linalg.norm(direction) < 2 or length < 0:
        raise PoseFileError(f"{where}: expected a direction of length 1 and a positive length")
    limits = None
    if dof and "limits" in fields:
        words = re.findall(r"[^\s()]+", " ".join(fields["limits"]))
        if len(words) != 2 * len(dof):
            raise PoseFileError(f"{where}: expected (low high) limits for {' '.join(dof)}; found {len(words)} numbers")
        wide = {"-inf": "-1e9", "inf": "1e9"}
        limits = numbers([wide.get(w.lower(), w) for w in words], f"{where}, limits").reshape(-1, 2) * degrees
    frame = _frame(angles, order, degrees, where)
    return name, _Bone(direction / np.linalg.norm(direction), float(length), frame, order, dof, limits)


def _parents(lines: Iterable[str], bones: dict[str, _Bone], file: Path) -> dict[str, str]:
    """The parent of each bone; parents come before children."""
    children: dict[str, list[str]] = {}
    for line in lines:
        parent, *below = line.split() or [""]
        if below:
            children.setdefault(parent, []).extend(below)
    order: dict[str, str] = {}
    pending = ["root"]
    while pending:
        parent = pending.pop()
        for name in children.pop(parent, []):
            if name not in bones or name in order:
                raise PoseFileError(f"{file}, :hierarchy: {name!r:.60} is not a bone, or is listed twice")
            order[name] = parent
            pending.append(name)
    if lost := [*children, *(set(bones) - set(order))]:
        raise PoseFileError(f"{file}, :hierarchy: {lost[0]!r:.60} is not connected to the root")
    return order


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not empty or a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if line := line.partition("#")[0].strip():
            yield number, line


def _fields(lines: Iterable[str]) -> dict[str, list[str]]:
    """Name to words. A line that starts with a bracket continues the line before."""
    out: dict[str, list[str]] = {}
    last: list[str] = []
    for line in lines:
        words = line.split()
        if not words:
            continue
        if not words[0].startswith("("):
            last = out.setdefault(words.pop(0).lower(), [])
        last.extend(words)
    return out


def _field(fields: dict[str, list[str]], name: str, where: str) -> list[str]:
    if not (words := fields.get(name)):
        raise PoseFileError(f"{where} has no {name}")
    return words


def _three(words: list[str], where: str) -> NDArray[np.float64]:
    values = numbers(words, where)
    if len(values) != 3:
        raise PoseFileError(f"{where}: expected 3 numbers, found {len(values)}")
    return values


def _frame(words: list[str], order: str, degrees: float, where: str) -> NDArray[np.float64]:
    """(3, 3) rotation by three angles, the first of ``order`` innermost."""
    angles = _three(words, f"{where}, its angles") * degrees
    if sorted(order.lower()) != ["x", "y", "z"]:
        raise PoseFileError(f"{where}: expected an order of XYZ; found {order!r:.20}")
    out = np.eye(3)
    for axis, angle in zip(order.lower(), angles):
        out = turn_about(axis, angle) @ out
    return out
