"""``chatpose render``: a pose file as a picture, or in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from chatpose_jax.chat import Pose
from chatpose_jax.errors import UserError
from smpl_jax import io, render, rotations

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
    try:
        data = np.load(path, allow_pickle=False)
        arrays = {"": data} if isinstance(data, np.ndarray) else {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: no .npy or .npz file of plain arrays ({error})") from error
    name = next((name for name in ("matrices", "axis_angle", "poses", "body_pose", "") if name in arrays), None)
    if name is None:
        raise UserError(f"{path}: expected an array matrices, axis_angle or poses; found {', '.join(arrays)}")
    array = np.asarray(arrays[name])
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(f"{path}: {name or 'the array'} must be finite numbers, found {array.dtype}")
    if array.shape[-2:] == (3, 3) and array.shape[-3:-2] >= (22,):
        matrices = array.reshape(-1, *array.shape[-3:])
    else:
        width = array.shape[-1] if array.shape[-1:] != (3,) else 3 * (array.shape[-2] if array.ndim > 1 else 1)
        if array.size == 0 or width < 66 or width % 3:
            raise UserError(
                f"{path}: expected rotations of at least 22 joints, found {name or 'an array'} of shape {array.shape}"
            )
        matrices = np.asarray(rotations.axis_angle_to_matrix(array.reshape(-1, width // 3, 3).astype(np.float32)))
    if not 0 <= index < len(matrices):
        raise UserError(f"{path}: --index {index}, but there are {len(matrices)} poses")
    pose = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    count = 24 if matrices.shape[1] == 24 else 22  # joints 22 and 23 of SMPL-H and SMPL-X are fingers, not SMPL's hands
    pose[:count] = matrices[index, :count]
    turn = FRAMES[frame or ("z-up" if name == "poses" and matrices.shape[1] > 24 else "camera")]
    pose[0] = turn.astype(np.float32) @ pose[0]
    return pose
