"""``chatpose render``: a pose file as a picture, or in another format."""

from __future__ import annotations

import argparse
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from chatpose_jax.chat import Pose
from chatpose_jax.errors import UserError
from smpl_jax import io, render, rotations

NAMES = ("matrices", "axis_angle", "poses", "body_pose")
"""Arrays that a pose is looked for in."""
VIEWS = ("front", "side", "back", "three_quarter")
# What brings a root orientation into the camera frame (x right, y down, z away).
FRAMES = {
    "camera": np.eye(3),
    "y-up": np.diag([1.0, -1.0, -1.0]),
    "z-up": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose render``."""
    parser.add_argument(
        "pose",
        type=Path,
        help="npz of chatpose (axis_angle, matrices), of AMASS (poses), or .npy of (24, 3), (72,) or (24, 3, 3)",
    )
    parser.add_argument("--out", required=True, type=Path, help=".png, .glb, .obj or .npz")
    parser.add_argument("--frame", choices=FRAMES, help="of the root orientation; default: z-up for AMASS, else camera")
    parser.add_argument("--index", type=int, default=0, help="frame of a sequence")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=["front", "side"])
    parser.add_argument("--size", type=int, default=512, help="side of one view in pixels")
    parser.add_argument(
        "--body", type=Path, help="SMPL, SMPL-H or SMPL-X file; default: the body that comes with the package"
    )


def run(args: argparse.Namespace) -> int:
    """Draw or export one pose."""
    if not 16 <= args.size <= 4096:
        raise UserError(f"--size must lie between 16 and 4096, found {args.size}")
    pose = Pose(read_pose(args.pose, args.index, args.frame), io.load_body(args.body))
    if args.out.suffix == ".png":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        render.save_png(args.out, pose.render(args.size, args.views))
    else:
        pose.save(args.out)
    print(args.out)
    return 0


def read_pose(path: Path, index: int = 0, frame: str | None = None) -> np.ndarray:
    """(24, 3, 3) float32 rotations in the camera frame from a pose file; raises UserError that says what was found."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name, array = _read_array(path)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: {name or 'the array'} must be numbers, found {array.dtype}")
    if array.shape[-2:] == (3, 3) and array.shape[-3:-2] >= (22,):
        poses = array.reshape(-1, *array.shape[-3:])
    else:
        width = 3 * math.prod(array.shape[-2:-1]) if array.shape[-1:] == (3,) else math.prod(array.shape[-1:])
        if array.size == 0 or width < 66 or width % 3:
            raise UserError(
                f"{path}: expected rotations of at least 22 joints, found {name or 'an array'} of shape {array.shape}"
            )
        poses = array.reshape(-1, width // 3, 3)
    if not 0 <= index < len(poses):
        raise UserError(f"{path}: --index {index}, but there are {len(poses)} poses")
    turns = poses[index].astype(np.float32)
    if not np.isfinite(turns).all():
        raise UserError(f"{path}: {name or 'the array'} must be finite numbers; pose {index} is not")
    turns = turns if poses.ndim == 4 else np.asarray(rotations.axis_angle_to_matrix(turns))
    apart = np.abs(turns @ turns.swapaxes(-1, -2) - np.eye(3)).max(axis=(-1, -2))
    if wrong := np.flatnonzero((apart > 1e-3) | (np.linalg.det(turns) < 0)).tolist():
        raise UserError(
            f"{path}: {name or 'the array'} must be rotations (R Rᵀ = 1 within 1e-3, det R = 1); joint {wrong[0]} of pose {index} is none"
        )
    pose = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    count = 24 if len(turns) == 24 else 22  # joints 22 and 23 of SMPL-H and SMPL-X are fingers, not SMPL's hands
    pose[:count] = turns[:count]
    turn = FRAMES[frame or ("z-up" if name == "poses" and len(turns) > 24 else "camera")]
    pose[0] = turn.astype(np.float32) @ pose[0]
    return pose


def _read_array(path: Path) -> tuple[str, np.ndarray]:
    """The first of ``NAMES`` in an npz, with its name, or the array of a .npy (mapped, not read) with the name ""."""
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(data, np.ndarray):
            return "", data
        with data:  # members are read when asked for: what else lies in the file is not looked at
            name = next((name for name in NAMES if name in data.files), None)
            if name is None:
                raise UserError(
                    f"{path}: expected an array {', '.join(NAMES)}; found {', '.join(data.files)[:200] or 'none'}"
                )
            member = name if name in data.zip.namelist() else f"{name}.npy"
            if (size := data.zip.getinfo(member).file_size) > io.MAX_BYTES:
                raise UserError(f"{path}: {name} would unpack to {size:,} bytes; the limit is {io.MAX_BYTES:,}")
            return name, np.asarray(data[name])
    except UserError:
        raise
    except (ValueError, OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{path}: no .npy or .npz file of plain arrays, or cut off{reason}") from error
