"""``chatpose chat``: a conversation in the terminal, or one question from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.chat import ChatPose, Reply, check_settings, load
from chatpose_jax.cli.flags import add_model, model_or_toy
from chatpose_jax.cli.terminal import can_draw, drawing
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import load_image
from chatpose_jax.processing.processor import NO_TOWER

HELP = """Type a question. Commands:
  /image FILE   show an image with the next question
  /pose         add a pose to the next answer even if the model gives none
  /save FOLDER  write the poses of the last answer as PNG, GLB, OBJ and npz
  /reset        start over
  /quit         leave (also Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose chat``."""
    add_model(parser)
    parser.add_argument("--prompt", action="append", default=[], help="ask this and leave; repeat for further turns")
    parser.add_argument(
        "--image", action="append", default=[], help="image file to show with the first prompt; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="write reply.jsonl (what --json prints) and each pose as PNG, GLB, OBJ and npz to this folder, which must not contain an answer yet",
    )
    parser.add_argument("--json", action="store_true", help="print the answers to --prompt as JSON, one object a turn")
    parser.add_argument(
        "--force-pose", action="store_true", help="add a pose at the end of an answer that contains none"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled text and of sampled poses")
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="samples of each pose; more than 1 needs a head that draws samples",
    )


def run(args: argparse.Namespace) -> int:
    """Chat; returns the exit status."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "force_pose", "samples")
    settings = {name: getattr(args, name) for name in names}
    check_settings(**settings)
    if args.image and not args.prompt:
        raise UserError("--image needs --prompt; in a conversation, type /image FILE")
    for image in args.image:
        load_image(image, "--image")
    if args.json and not args.prompt:
        raise UserError("--json needs --prompt")
    if args.out:
        if not args.prompt:
            raise UserError("--out needs --prompt; in a conversation, type /save FOLDER")
        make_writable(args.out)
        refuse_answered(args.out)
    if args.model is not None and " " in args.model.name and not args.model.exists():
        raise UserError(f"{args.model}: no such model folder; a question goes behind --prompt")
    model = load(model_or_toy(args.model), dtype=args.dtype, body=args.body, head=args.head)
    if not args.prompt:
        return converse(model, settings)
    messages: list[dict[str, Any]] = []
    replies = []
    for turn, prompt in enumerate(args.prompt, 1):
        images = args.image if turn == 1 else []
        messages.append(question(prompt, images))
        reply = answer(model, messages, settings, quiet=args.json)
        messages.append(reply.message)
        replies.append(reply)
        if args.json:
            print(json.dumps(reply_json(turn, prompt, reply)), flush=True)
    if args.out:
        save_replies(list(zip(args.prompt, replies)), args.out)
        print(f"written to {args.out}", file=sys.stderr if args.json else sys.stdout)
        if not any(reply.poses for reply in replies):
            print("no pose in the answer, so no drawing or mesh: --force-pose adds one", file=sys.stderr)
    elif not args.json and (count := sum(len(reply.poses) for reply in replies)):
        print(f"[{count} pose{'s' if count > 1 else ''}: --out FOLDER writes PNG, GLB, OBJ and npz]", file=sys.stderr)
    return 0


def question(prompt: str, images: Sequence[str]) -> dict[str, Any]:
    """A user message, images first."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def answer(model: ChatPose, messages: list[dict[str, Any]], settings: dict[str, Any], *, quiet: bool = False) -> Reply:
    """Stream an answer to the terminal, and draw its poses there."""
    stream = model.stream(messages, **settings)
    for piece in stream:
        if not quiet:
            print(piece, end="", flush=True)
    if not quiet:
        print(flush=True)
        for pose in stream.reply.poses if can_draw(sys.stdout) else []:
            print(drawing(pose), flush=True)
    return stream.reply


def reply_json(turn: int, prompt: str, reply: Reply) -> dict[str, Any]:
    """One turn as JSON values; turns count from 1. ``samples`` is there where poses have more than one."""
    values = {
        "turn": turn,
        "prompt": prompt,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "poses": [pose.to_json() for pose in reply.poses],
    }
    if any(len(drawn) > 1 for drawn in reply.samples):
        values["samples"] = [[pose.to_json() for pose in drawn] for drawn in reply.samples]
    return values


def save_replies(turns: Sequence[tuple[str, Reply]], out: Path, first: int = 1) -> list[Path]:
    """``reply.jsonl``, one line a turn, and, for each pose, ``turn-T-pose-P`` as PNG, GLB, OBJ and npz, its further samples as
    ``turn-T-pose-P-sample-2`` and so on; ``first`` is the number of the first turn.
    """
    make_writable(out)
    numbered = list(enumerate(turns, first))
    lines = [json.dumps(reply_json(t, prompt, reply)) + "\n" for t, (prompt, reply) in numbered]
    (out / "reply.jsonl").write_text("".join(lines))
    written = [out / "reply.jsonl"]
    for t, (_, reply) in numbered:
        for p, drawn in enumerate(reply.samples, 1):
            for s, pose in enumerate(drawn, 1):
                stem = out / (f"turn-{t}-pose-{p}" + (f"-sample-{s}" if s > 1 else ""))
                written += [pose.save(f"{stem}{suffix}") for suffix in (".png", ".glb", ".obj", ".npz")]
    return written


def make_writable(out: Path) -> None:
    """Create a folder and try to write into it: minutes of answering must not end in an error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error


def refuse_answered(out: Path) -> None:
    """Raises UserError where a folder holds an answer: it is neither written over nor mixed with another."""
    if found := [*out.glob("reply.json*"), *out.glob("turn-*-pose-*")]:
        raise UserError(f"{out} already holds an answer ({found[0].name}): name another folder")


def converse(model: ChatPose, settings: dict[str, Any]) -> int:
    """The interactive loop. A message that cannot be used is reported and the conversation goes on."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    print(f"ChatPose, body: {model.body.name}. /help lists the commands.")
    messages: list[dict[str, Any]] = []
    images: list[str] = []
    last: tuple[str, Reply] | None = None
    force = False
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        command, _, rest = line.partition(" ")
        if not line:
            continue
        try:
            if command == "/quit":
                return 0
            if command == "/help":
                print(HELP)
            elif command == "/reset":
                messages, images, last, force = [], [], None, False
            elif command == "/pose":
                force = True
            elif command == "/image":
                image = os.path.expanduser(rest.strip())
                if not image:
                    raise UserError("/image FILE: name an image file")
                if model.config.vision is None:
                    raise UserError(f"/image: {NO_TOWER}; ask without it")
                load_image(image, "/image")
                images.append(image)
            elif command == "/save":
                if last is None or not rest:
                    raise UserError("/save FOLDER writes the last answer; there must be one, and a folder")
                folder = Path(os.path.expanduser(rest.strip()))
                refuse_answered(folder)
                turn = sum(message["role"] == "user" for message in messages)
                print("\n".join(map(str, save_replies([last], folder, first=turn))))
            elif command.startswith("/"):
                raise UserError(f"no command {command}; /help lists them")
            else:
                asked = [*messages, question(line, images)]
                reply = answer(model, asked, {**settings, "force_pose": force or settings["force_pose"]})
                messages, images, force, last = [*asked, reply.message], [], False, (line, reply)
                if reply.poses:
                    print(f"[{len(reply.poses)} pose{'s' if len(reply.poses) > 1 else ''}: /save FOLDER writes it]")
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n[stopped]")
