"""``chatpose render``: a pose file as a picture, or in another format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from chatpose_jax.chat import Pose
from chatpose_jax.settings import whole
from smpl_jax import body, io, render
from smpl_jax.frames import Frame, turn
from smpl_jax.poses import PoseFile, read_poses

VIEWS = ("front", "side", "back", "three_quarter")
FRAMES: dict[str, Frame] = {"camera": "camera", "y-up": "model", "model": "model", "z-up": "z-up"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose render``."""
    parser.add_argument(
        "pose",
        type=Path,
        help="npz of chatpose, AMASS (poses), smplx or 4D-Humans (global_orient, body_pose), …, or .npy of (24, 3), (72,) "
        "or (24, 3, 3); docs/body.md lists what is read",
    )
    parser.add_argument("--out", required=True, type=Path, help=".png, .glb, .obj or .npz")
    parser.add_argument(
        "--frame",
        choices=FRAMES,
        help="of the root orientation; default: what the file says, z-up for AMASS, else camera",
    )
    parser.add_argument("--index", type=int, default=0, help="frame of a sequence")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=["front", "side"])
    parser.add_argument("--size", type=int, default=512, help="side of one view in pixels")
    parser.add_argument(
        "--skinned",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a .glb with the skeleton in it; without, the posed mesh alone, for programs that do not skin",
    )
    parser.add_argument(
        "--body", type=Path, help="SMPL, SMPL-H or SMPL-X file; default: the body that comes with the package"
    )


def run(args: argparse.Namespace) -> int:
    """Draw or export one pose; what the file was taken to mean goes to standard error."""
    whole("--size", args.size, 16, 4096)
    file = read_poses(args.pose)
    frame = FRAMES[args.frame] if args.frame else file.frame or "camera"
    pose = Pose(camera_pose(file, args.index, frame), io.load_body(args.body))
    if args.out.suffix == ".png":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        render.save_png(args.out, pose.render(args.size, args.views))
    else:
        pose.save(args.out, skinned=args.skinned)
    print(_said(file, frame, chosen=args.frame is not None), file=sys.stderr)
    print(args.out)
    return 0


def camera_pose(file: PoseFile, index: int, frame: Frame) -> np.ndarray:
    """(24, 3, 3) float32 rotations of one pose in the camera frame; `frame` is that of the file's root."""
    pose = np.array(body.to_smpl_pose(file.rotations(index)))
    pose[0] = turn(frame, "camera") @ pose[0]
    return pose


def _said(file: PoseFile, frame: Frame, chosen: bool) -> str:
    """One line: which arrays were read as what, and what was not."""
    name = next(name for name, value in FRAMES.items() if value == frame)
    source = (
        "by --frame" if chosen else "by the file" if file.frame else "assumed; upside down? --frame y-up, as in smplx"
    )
    rest = f"; joints left out: {file.num_joints - 22} of hands and face" if file.num_joints > 24 else ""
    rest += f"; not used: {', '.join(file.unused)[:200]}" if file.unused else ""
    what = " + ".join(filter(None, file.names)) or "the array"
    return f"read {what} as {file.num_joints} joints, {file.kind}, frame {name} ({source}){rest}"
