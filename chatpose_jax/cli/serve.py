"""``chatpose serve``: an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

from chatpose_jax.cli.compiled import keep_compiled
from chatpose_jax.cli.flags import add_model, model_or_toy, read_mesh
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole

KEY = "CHATPOSE_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``chatpose serve``."""
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; other than loopback needs a key")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the output names it")
    parser.add_argument("--name", help="the name of the model for clients; default: that of its folder")
    parser.add_argument("--key-file", type=Path, help=f"file with the key that clients must send; else {KEY}, if set")
    parser.add_argument("--slots", type=int, default=8, help="answers that are written at the same time")
    parser.add_argument(
        "--context", type=int, help="tokens of a conversation with its answer, at most; default: what the model holds"
    )
    parser.add_argument("--queue", type=int, default=64, help="answers that may wait; more get status 429")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of an answer, at most")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that an answer may take, waiting included")
    parser.add_argument(
        "--grace", type=int, default=60, help="seconds that answers under way have after SIGTERM or SIGINT"
    )
    parser.add_argument(
        "--mesh", help="DATAxFSDPxTENSOR, such as 1x1x4: the devices that share the model; default: one device"
    )
    parser.add_argument(
        "--allow-media-domain",
        action="append",
        default=[],
        metavar="DOMAIN",
        help="fetch pictures from https://DOMAIN/…; may be repeated. Without it no address is fetched",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of ORIGIN (https://example.org) may ask from a browser; may be repeated",
    )
    parser.add_argument(
        "--share-body",
        action="store_true",
        help="clients may fetch meshes of --body: its licence must allow you to pass them on",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; what is under way is finished first."""
    for name, least in (("slots", 1), ("queue", 0), ("max_tokens", 1), ("timeout", 1), ("grace", 0)):
        whole(f"--{name.replace('_', '-')}", getattr(args, name), least)
    whole("--port", args.port, 0, 65535)
    mesh_sizes = None if args.mesh is None else read_mesh(args.mesh)
    key = read_key(args.key_file)
    for origin in args.allow_origin:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise UserError(f"--allow-origin {origin}: expected a scheme and a host, such as https://example.org")
    for domain in args.allow_media_domain:
        if not re.fullmatch(r"[\w.-]+", domain):
            raise UserError(f"--allow-media-domain {domain}: expected the name of a host, such as pictures.example.org")
    if args.host not in LOOPBACK and key is None:
        raise UserError(f"--host {args.host} lets others in: give a key in --key-file FILE, or in {KEY}")
    try:
        from chatpose_jax.serve.app import Server
        from chatpose_jax.serve.listen import Listener, open_socket
        from chatpose_jax.serve.media import Media
        from chatpose_jax.serve.openai import Limits
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: in the checkout, pip install '.[serve]'") from None
    import jax

    from chatpose_jax.chat import TOY, ChatPose, load
    from chatpose_jax.engine import Engine
    from chatpose_jax.models.sharding import make_mesh

    folder = model_or_toy(args.model)

    def ready() -> ChatPose:
        mesh = None
        if mesh_sizes is not None:
            needed, found = math.prod(mesh_sizes), jax.device_count()
            if min(mesh_sizes) < 1 or needed > found:
                raise UserError(f"--mesh {args.mesh} needs {needed} devices, and there are {found}")
            mesh = make_mesh(*mesh_sizes, slices=1)
        model = load(folder, dtype=args.dtype, body=args.body, head=args.head, mesh=mesh)
        most = model.config.text.max_position_embeddings
        context = most if args.context is None else whole("--context", args.context, 64, most)
        tail = model.engine.tail.tolist()
        model.engine = Engine(model.config, model.params, tail, slots=args.slots, capacity=context)
        return model

    keep_compiled()
    limits = Limits(tokens=args.max_tokens, answers=min(Limits().answers, args.slots + args.queue))
    server = Server(
        ready,
        args.name or folder.name or "chatpose",
        key=key,
        limits=limits,
        queue=args.queue,
        patience=args.timeout,
        share_body=args.share_body,
        hosts=LOOPBACK if key is None else None,
        origins=args.allow_origin,
        fetch=Media(args.allow_media_domain, most=limits.body) if args.allow_media_domain else None,
        note=TOY if args.model is None else None,
    )
    with open_socket(args.host, args.port) as where:
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{where.getsockname()[1]}"
        print(f"{address}/v1 answers as {server.name!r}, {address} is a page; the model is being loaded", flush=True)
        Listener(server, grace=args.grace).listen(where)
    return 0


def read_key(file: Path | None) -> str | None:
    """The key of a file, or of the environment; None for none. Raises UserError for a file without one, and for one that no header can hold."""
    key = (file.read_text(errors="replace") if file else os.environ.get(KEY, "")).strip()
    where = f"--key-file {file}" if file else KEY
    if file and not key:
        raise UserError(f"{where}: the file is empty")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{where}: a key must be one word of ASCII characters")
    return key or None
