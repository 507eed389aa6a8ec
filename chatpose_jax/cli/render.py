"""``chatpose render``: draws a pose file, or writes it in another format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax import io, render
from smpl_jax.body import BodyModel
from smpl_jax.frames import Frame
from smpl_jax.pose import FAMILIES, PARTS, Pose, family_of, to_betas, to_family, to_frame
from smpl_jax.posed import PosedBody
from smpl_jax.poses import PoseFile, read_poses

VIEWS = ("front", "side", "back", "three_quarter")
FRAMES: dict[str, Frame] = {"camera": "camera", "y-up": "model", "model": "model", "z-up": "z-up"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose render``."""
    parser.add_argument(
        "pose",
        type=Path,
        help="npz of chatpose, AMASS (poses), smplx or 4D-Humans (global_orient, body_pose), …, or .npy of (24, 3), (72,) "
        "or (24, 3, 3); docs/body.md lists all formats",
    )
    parser.add_argument("--out", required=True, type=Path, help=".png, .glb, .obj or .npz")
    parser.add_argument(
        "--frame",
        choices=FRAMES,
        help="frame of the root orientation; default: the file's, z-up for AMASS, else camera",
    )
    parser.add_argument("--index", type=int, default=0, help="frame of a sequence")
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=["front", "side"])
    parser.add_argument("--size", type=int, default=512, help="side of one view in pixels")
    parser.add_argument(
        "--skinned",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the skeleton into a .glb; without it only the posed mesh, for programs without skinning",
    )
    parser.add_argument(
        "--body", type=Path, help="SMPL, SMPL-H or SMPL-X file; default: the body that comes with the package"
    )


def run(args: argparse.Namespace) -> int:
    """Draws or exports one pose. Prints to standard error how the file was read."""
    whole("--size", args.size, 16, 4096)
    chosen = FRAMES[args.frame] if args.frame else None
    told = read_poses(args.pose, chosen)
    file = told if told.frame else read_poses(args.pose, "camera")
    body = io.load_body(args.body)
    pose = file[args.index]
    fitted, left_out = fit(pose, body, shaped=args.body is not None)
    try:
        posed = PosedBody(fitted, body)
        if args.out.suffix == ".png":
            args.out.parent.mkdir(parents=True, exist_ok=True)
            render.save_png(args.out, posed.render(args.size, args.views))
        else:
            posed.save(args.out, skinned=args.skinned)
    except ValueError as error:
        raise UserError(str(error)) from None
    source = (
        "by --frame" if chosen else "by the file" if told.frame else "assumed; upside down? --frame y-up, as in smplx"
    )
    print(_said(file, source, left_out), file=sys.stderr)
    print(args.out)
    return 0


def fit(pose: Pose, body: BodyModel, shaped: bool) -> tuple[Pose, list[str]]:
    """The pose in the camera frame with the body's joints, and a note for each part of it that the body cannot show.

    shaped: whether betas of an unknown shape space may belong to this body. The one in the package has betas of its own.
    """
    family = family_of(body.num_joints)
    dropped = [part for part in FAMILIES[pose.family] if part not in FAMILIES[family]]
    left_out = [f"joints left out: {sum(map(PARTS.__getitem__, dropped))} of {', '.join(dropped)}"] if dropped else []
    betas = pose.betas
    space = pose.shape_space
    if betas is not None and not (space == body.shape_space if space else shaped):
        pose = pose.replace(betas=None, shape_space=None)
        left_out.append(
            f"betas not used: they belong to {space or 'the body that the pose was made with'}; --body takes its file"
        )
    shown = pose.betas is not None
    pose = to_family(pose, family)
    if shown and pose.betas is None:
        left_out.append(f"betas not used: they are not those of {family}")
    elif pose.betas is not None and len(betas) > body.num_betas:
        pose = to_betas(pose, body.num_betas)
        left_out.append(f"betas used: the first {body.num_betas} of {len(betas)}")
    return to_frame(pose, "camera", body), left_out


def _said(file: PoseFile, source: str, left_out: list[str]) -> str:
    """One line: how the arrays were read, and which were not used."""
    name = next(name for name, value in FRAMES.items() if value == file.frame)
    what = " + ".join(filter(None, file.names)) or "the array"
    rest = [*left_out, *([f"not used: {', '.join(file.unused)[:200]}"] if file.unused else [])]
    return "; ".join([f"read {what} as {file.num_joints} joints, {file.kind}, frame {name} ({source})", *rest])
