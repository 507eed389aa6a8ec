"""AMASS: finds motion files by their names in either release, and reads single frames.

Readers of data sets that are built on AMASS share this module.

Data sets name a frame by a file of the SMPL-H release and its number, ``["AMASS", "BioMotionLab_NTroje/rub055/0027_x_poses.npz", 321]``. On disk
the first folder has its old or its new name, and the SMPL-X release writes ``_stageii`` for ``_poses`` and ``_`` for spaces.

The SMPL-X release is another fit to the same markers (AMASS's news of 14 February 2022), so its poses differ somewhat from those that people saw
and described. Its frame rate is often wrong: it says 120 where SMPL-H says 60, for the same number of frames (nghorbani/amass issue 49,
IDEA-Research/Motion-X issue 43). So frames of the two releases seem to have the same numbers, but no file proves it. Therefore a SMPL-X file is read
only on demand.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.untrusted import inside
from chatpose_jax.errors import UserError
from smpl_jax.errors import PoseFileError
from smpl_jax.pose import JOINTS, SHARED, Pose, to_family, to_frame
from smpl_jax.poses import PoseFile, read_poses

SETS: tuple[tuple[str, ...], ...] = (
    ("ACCAD",),
    ("BMLhandball",),
    ("BMLmovi",),
    ("BMLrub", "BioMotionLab_NTroje"),
    ("CMU",),
    ("CNRS",),
    ("DanceDB",),
    ("DFaust", "DFaust_67", "DFaust67"),
    ("EKUT",),
    ("EyesJapanDataset", "Eyes_Japan_Dataset"),
    ("GRAB",),
    ("HDM05", "MPI_HDM05", "MPIHDM05"),
    ("HUMAN4D",),
    ("HumanEva",),
    ("KIT",),
    ("MoSh", "MPI_mosh", "MPImosh"),
    ("PosePrior", "MPI_Limits", "MPILimits", "MPI_Limits_PosePrior"),
    ("SFU",),
    ("SOMA",),
    ("SSM", "SSM_synced", "SSMsynced"),
    ("TCDHands", "TCD_handMocap", "TCDhandMocap"),
    ("TotalCapture",),
    ("Transitions", "Transitions_mocap", "Transitionsmocap"),
    ("WEIZMANN",),
)
"""The names of each part of AMASS: first that of its web page, then those of its folders in some release, in BABEL and in PoseScript."""
_NAMES = {name: names for names in SETS for name in names}
_SMPLH, _SMPLX = "_poses.npz", "_stageii.npz"
_FEET = (10, 11)
_LOOKS = 8  # frames that show whether a joint moves

LICENCE = "AMASS: its own, for non-commercial research; https://amass.is.tue.mpg.de"
OPTION = (
    "--set amass=FOLDER is the folder with the parts of AMASS (ACCAD, BMLrub, CMU and others, of the download 'SMPL+H G'), by default AMASS in "
    f"the source folder ({LICENCE})"
)
"""The line of ``About.options`` for readers with the options ``amass`` and ``smplx``."""


class Place(NamedTuple):
    """A frame of AMASS. file: its name in the SMPL-H release, with the first folder as in ``SETS``. frame: counts that file's frames from 0."""

    file: str
    frame: int


def file_name(name: str) -> str:
    """The one name for a file of AMASS: relative, of the SMPL-H release, with one first folder, named as in ``SETS``.

    Only the first folder is renamed. Raises UserError for a name that leads out of the folder, or is no file of motion.
    """
    parts = list(inside(Path(), name).parts)
    if len(parts) < 2 or not parts[-1].endswith((_SMPLH, _SMPLX)):
        raise UserError(f"expected a file of AMASS, such as CMU/01/01_01{_SMPLH}; found {name!r:.200}")
    names = _NAMES.get(parts[0], parts[:1])
    rest = parts[2:] if len(parts) > 2 and parts[1] in names else parts[1:]
    if rest[-1].endswith(_SMPLX):
        rest[-1] = rest[-1].removesuffix(_SMPLX) + _SMPLH
    return "/".join([names[0], *rest])


def place_of(entry: Any) -> Place:
    """The place that ``["AMASS", file, frame]`` names. Raises UserError for anything else."""
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] != "AMASS" or not isinstance(entry[1], str):
        raise UserError(f'expected ["AMASS", file, frame]; found {entry!r:.200}')
    frame = entry[2]
    if not isinstance(frame, int) or isinstance(frame, bool) or frame < 0:
        raise UserError(f"expected the number of a frame, from 0 on; found {frame!r:.100}")
    return Place(file_name(entry[1]), frame)


def yaw_of(pose: Pose) -> np.ndarray:
    """The yaw (...) of poses in the z-up frame, in radians, float64: θz of the root R = Rz(θz) Ry(θy) Rx(θx), as PoseScript defines it."""
    root = np.asarray(pose.rotations[..., 0, :, :], np.float64)
    return np.arctan2(root[..., 1, 0], root[..., 0, 0])


def to_view(pose: Pose, angle: np.ndarray) -> Pose:
    """Poses in the z-up frame, turned by minus `angle` (...) radians about the vertical, in the camera frame.

    With ``angle = yaw_of(pose)`` a person who stands upright faces the camera, and the root is near Rx(π).
    """
    cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    back = np.stack([np.stack(row, -1) for row in ((cos, sin, zero), (-sin, cos, zero), (zero, zero, one))], -2)
    rotations = np.array(pose.rotations)
    rotations[..., 0, :, :] = back @ np.asarray(rotations[..., 0, :, :], np.float64)
    return to_frame(pose.replace(rotations=rotations), "camera")


class Amass:
    """A folder of AMASS.

    folder: with the parts of AMASS, each under any of its names, and once or twice (``CMU/01/…`` or ``CMU/CMU/01/…``). smplx: where a
    SMPL-H file is not there, the frame of the same number of the SMPL-X file is taken.
    """

    def __init__(self, folder: Path, smplx: bool = False) -> None:
        self.folder, self.smplx = folder, smplx
        self._bases: dict[str, list[Path]] = {}

    @classmethod
    def open(cls, about: About, source: Path, amass: str, smplx: bool) -> Amass:
        """The folder that the option ``amass`` names, or ``AMASS`` in the source folder.

        Raises UserError where there is none, or it has no part of AMASS.
        """
        folder = Path(amass).expanduser() if amass else source / "AMASS"
        if not folder.is_dir():
            raise missing(about, folder)
        if not any(entry.name in _NAMES and entry.is_dir() for entry in os.scandir(folder)):
            raise UserError(
                f"{folder} has no folder that is named as a part of AMASS ({', '.join(names[0] for names in SETS[:5])}, …). "
                "The option amass names the folder that holds them"
            )
        return cls(folder, smplx)

    def read(self, places: Iterable[Place | Skipped]) -> dict[Place | Skipped, Pose | Skipped]:
        """The poses of frames. Each file is opened once, and one after another.

        Returns:
            For a ``Skipped`` itself. For a place a ``Pose`` of SMPL-H, without batch axes, in the z-up frame, float32, NumPy, without
            betas and translation; or a ``Skipped`` without key that says why there is none. Feet and fingers that never move in a file were
            not captured: AMASS fills them in, and they are not ``measured``.
        """
        by_file = defaultdict(set)
        found: dict[Place | Skipped, Pose | Skipped] = {}
        for each in places:
            if isinstance(each, Place):
                by_file[each.file].add(each.frame)
            else:
                found[each] = each
        for name in sorted(by_file):
            frames = sorted(by_file[name])
            try:
                path = self._find(name)
                file = path if isinstance(path, Skipped) else _open(path)
            except PoseFileError as error:
                file = Skipped("", "an AMASS file cannot be read", True, f"{error}")
            if isinstance(file, Skipped):
                found |= {Place(name, frame): file for frame in frames}
                continue
            moves = _moves(file)
            for frame in frames:
                found[Place(name, frame)] = _pose(file, frame, moves)
        return found

    def _find(self, name: str) -> Path | Skipped:
        part, _, rest = name.partition("/")
        bases = self._bases.get(part)
        if bases is None:
            names = _NAMES.get(part, (part,))
            outer = [self.folder / each for each in names]
            bases = [path for path in (*outer, *(path / each for path in outer for each in names)) if path.is_dir()]
            self._bases[part] = bases
        stem = rest.removesuffix(_SMPLH)
        fitted = stem.removesuffix(_SMPLH.removesuffix(".npz")) + _SMPLX
        for base in bases:
            if (path := base / rest).is_file():
                return path
        for base in bases:
            for other in (fitted, fitted.replace(" ", "_")):
                if (path := base / other).is_file():
                    if self.smplx:
                        return path
                    return Skipped(
                        "",
                        "AMASS has only the SMPL-X file",
                        detail=f"{path}: the number of the frame is that of {name} of the download 'SMPL+H G'; "
                        "--set smplx=true takes the SMPL-X file's frame of the same number",
                    )
        return Skipped("", "not in the AMASS folder", detail=f"no {name} below {self.folder}")


def _open(path: Path) -> PoseFile:
    file = read_poses(path)
    if file.frame != "z-up" or file.num_joints not in (JOINTS["smplh"], JOINTS["smplx"]):
        raise PoseFileError(f"{path}: expected a file of AMASS, with 52 or 55 joints; found {file.num_joints}")
    return file


def _moves(file: PoseFile) -> np.ndarray:
    """(J,) bool: body joints, and those of feet, face and fingers that move between frames."""
    looks = []
    for frame in np.unique(np.linspace(0, len(file) - 1, _LOOKS).round().astype(int)).tolist():
        try:
            looks.append(file[frame].rotations)
        except PoseFileError:  # only the frames that a data set names must be readable
            continue
    rotations = np.stack(looks) if looks else np.zeros((1, file.num_joints, 3, 3))
    moves = np.abs(rotations - rotations[:1]).max((0, 2, 3)) > 1e-6
    body = [joint for joint in range(SHARED) if joint not in _FEET]
    moves[body] = True
    return moves


def _pose(file: PoseFile, frame: int, moves: np.ndarray) -> Pose | Skipped:
    if frame >= len(file):
        detail = f"{file.path}: frame {frame} was asked for, but it has only {len(file)}"
        return Skipped("", "a frame beyond the end of the AMASS file", True, detail)
    try:
        pose = file[frame]
    except PoseFileError as error:
        return Skipped("", "an AMASS file cannot be read", True, f"{error}")
    return to_family(Pose(np.asarray(pose.rotations), pose.frame, measured=moves), "smplh")
