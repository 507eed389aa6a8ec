"""``chatpose serve``: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from chatpose_jax.storage import location

KEY = "CHATPOSE_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose serve``."""
    parser.add_argument(
        "model", type=location, help="model folder, or the folder of a training or demo; also gs://…, s3://…"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; other than loopback needs a key")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="the name of the model for clients; default: that of its folder")
    parser.add_argument("--key-file", type=Path, help=f"file with the key that clients must send; else {KEY}, if set")
    parser.add_argument("--slots", type=int, default=8, help="answers that are written at the same time")
    parser.add_argument(
        "--context", type=int, help="tokens of a conversation with its answer, at most; default: what the model holds"
    )
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait; more get status 429")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of an answer, at most")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that an answer may take")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: the folder's, or float32 where that is faster",
    )
    parser.add_argument("--head", metavar="MODULE:CLASS", help="the model's pose head, if it is from your own package")
    parser.add_argument("--body", type=Path, help="SMPL, SMPL-H or SMPL-X file; default: the body of the package")
    parser.add_argument(
        "--share-body",
        action="store_true",
        help="clients may fetch meshes of --body: its licence must allow you to pass them on",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; what is under way is finished first."""
    for name, least in (("slots", 1), ("queue", 0), ("max_tokens", 1), ("timeout", 1), ("port", 0)):
        whole(f"--{name.replace('_', '-')}", getattr(args, name), least)
    key = args.key_file.read_text().strip() if args.key_file else os.environ.get(KEY, "").strip()
    if args.key_file and not key:
        raise UserError(f"--key-file {args.key_file}: the file is empty")
    if args.host not in LOOPBACK and not key:
        raise UserError(f"--host {args.host} lets others in: give a key in --key-file FILE, or in {KEY}")
    try:
        import uvicorn

        from chatpose_jax.serve.app import Server
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'chatpose-jax[serve]'") from None
    from chatpose_jax.chat import ChatPose, load
    from chatpose_jax.engine import Engine
    from chatpose_jax.serve.openai import Limits

    def ready() -> ChatPose:
        model = load(args.model, dtype=args.dtype, body=args.body, head=args.head)
        context = model.config.text.max_position_embeddings
        capacity = context if args.context is None else min(whole("--context", args.context, 64), context)
        model.engine = Engine(
            model.config, model.params, model.engine.tail.tolist(), slots=args.slots, capacity=capacity
        )
        return model

    server = Server(
        ready,
        args.name or args.model.name or "chatpose",
        key=key or None,
        limits=Limits(tokens=args.max_tokens),
        queue=args.queue,
        patience=args.timeout,
        share_body=args.share_body,
    )
    print(f"http://{args.host}:{args.port}/v1 answers as {server.name!r}; the model is being loaded", flush=True)
    uvicorn.run(server.app, host=args.host, port=args.port, log_level="info", timeout_graceful_shutdown=args.timeout)
    return 0
