"""BVH files: a HIERARCHY of joints with offsets and channels, then one line of channel values per frame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from smpl_jax.errors import PoseFileError
from smpl_jax.mocap.clip import MAX_JOINTS, Clip, numbers, read_text, turn_about

_CHANNELS = {f"{axis}{kind}" for axis in "XYZ" for kind in ("position", "rotation")}


def read_bvh(path: str | os.PathLike[str]) -> Clip:
    """Reads a BVH file.

    A joint's rotation is the product of the rotations of its channels in their order, the first outermost. The format has no unit of length. A first
    frame without any rotation is a rest pose that a converter inserted (cgspeed's files of CMU's clips); it is not ``trusted``.

    Raises:
        PoseFileError: the file is missing, malformed or cut off, or a joint other than the root has position channels that change.
    """
    file = Path(path)
    head, found, motion = read_text(file).partition("MOTION")
    words = head.split()
    if not found or words[:1] != ["HIERARCHY"]:
        raise PoseFileError(f"{file}: expected BVH, HIERARCHY and then MOTION; found {head[:40].strip()!r}")
    names, parents, offsets, channels = _hierarchy(words[1:], file)
    values, rate = _motion(motion, sum(map(len, channels)), file)

    rotations = np.tile(np.eye(3), (len(values), len(names), 1, 1))
    translation = np.tile(offsets[0], (len(values), 1))
    column = 0
    for joint, kinds in enumerate(channels):
        for kind in kinds:
            value, axis = values[:, column], kind[0].lower()
            column += 1
            if kind.endswith("rotation"):
                rotations[:, joint] = rotations[:, joint] @ turn_about(axis, value)
            elif joint == 0:
                translation[:, "xyz".index(axis)] = value
            elif np.ptp(value) > 0.02 * np.abs(offsets).max():
                raise PoseFileError(
                    f"{file}: the channel {kind} of {names[joint]} changes over time; only the root may change its position, "
                    "because bones have constant lengths"
                )
    still = np.abs(rotations[0] - np.eye(3)).max() < 1e-6
    trusted = np.arange(len(values)) >= (1 if still and len(values) > 1 else 0)
    return Clip(file, tuple(names), np.array(parents), offsets, rotations, translation, rate, trusted)


def _hierarchy(words: list[str], file: Path) -> tuple[list[str], list[int], np.ndarray, list[list[str]]]:
    """Names, parents, offsets (J, 3) and channels of the joints, in the file's order."""
    names: list[str] = []
    parents: list[int] = []
    offsets: dict[int, np.ndarray] = {}
    channels: list[list[str]] = []
    stack: list[int] = []  # the joints whose braces are open
    at = 0

    def take(count: int) -> list[str]:
        nonlocal at
        if at + count > len(words):
            raise PoseFileError(f"{file}: the hierarchy is cut off after {' '.join(words[-4:])!r:.80}")
        at += count
        return words[at - count : at]

    while at < len(words):
        (word,) = take(1)
        where = f"{file}: {names[stack[-1]] if stack else 'the hierarchy'}"
        if word in ("ROOT", "JOINT", "End"):
            if (word == "ROOT") != (not names) or (word != "ROOT" and not stack):
                raise PoseFileError(f"{file}: expected one ROOT with all joints inside it; found another {word}")
            called = []
            while (found := take(1)[0]) != "{":
                called.append(found)
            name = f"{names[stack[-1]]} end" if word == "End" else " ".join(called)
            if not name or (name in names and word != "End"):
                raise PoseFileError(f"{file}: expected a unique name for each joint; found {name!r:.60}")
            if len(names) >= MAX_JOINTS:
                raise PoseFileError(f"{file}: expected at most {MAX_JOINTS} joints; found more")
            parents.append(stack[-1] if stack else -1)
            stack.append(len(names))
            names.append(name)
            channels.append([])
        elif word == "}" and stack:
            if stack.pop() not in offsets:
                raise PoseFileError(f"{where} has no OFFSET")
        elif word == "OFFSET" and stack:
            offsets[stack[-1]] = numbers(take(3), f"{where}, OFFSET")
        elif word == "CHANNELS" and stack:
            (count,) = take(1)
            kinds = take(int(count)) if count in tuple("0123456") else []
            if str(len(kinds)) != count or not set(kinds) <= _CHANNELS or len(set(kinds)) != len(kinds):
                raise PoseFileError(
                    f"{where}, CHANNELS: expected up to six of {', '.join(sorted(_CHANNELS))}; "
                    f"found {' '.join([count, *kinds])!r:.120}"
                )
            channels[stack[-1]] = kinds
        else:
            raise PoseFileError(f"{where}: expected OFFSET, CHANNELS, JOINT, End Site or a brace; found {word!r:.60}")
    if stack or not names:
        raise PoseFileError(f"{file}: the hierarchy is cut off: {len(stack)} braces are open")
    return names, parents, np.stack([offsets[joint] for joint in range(len(names))]), channels


def _motion(text: str, columns: int, file: Path) -> tuple[np.ndarray, float]:
    """Channel values (T, columns) and frames a second."""
    words = text.split()
    if words[:1] != ["Frames:"] or words[2:4] != ["Frame", "Time:"] or len(words) < 5:
        raise PoseFileError(
            f"{file}: expected MOTION, Frames: N, Frame Time: seconds; found {' '.join(words[:5])!r:.80}"
        )
    frames, seconds = numbers([words[1], words[4]], f"{file}, Frames and Frame Time")
    if not (frames >= 1 and frames.is_integer() and 1e-4 <= seconds <= 10 and columns):
        raise PoseFileError(
            f"{file}: expected a number of frames, a time between 0.0001 and 10 seconds, and channels; "
            f"found {words[1]}, {words[4]}, {columns}"
        )
    if len(words) - 5 != frames * columns:
        raise PoseFileError(
            f"{file}: expected {words[1]} frames of {columns} values; found {len(words) - 5} values in all"
        )
    return numbers(words[5:], f"{file}, MOTION").reshape(int(frames), columns), float(1 / seconds)
