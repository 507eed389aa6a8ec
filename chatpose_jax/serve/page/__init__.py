"""The page of the server: a conversation and the bodies of its answers. Static files, without a build step.

A browser that shows it asks this server only: the files name no other address, and the policy that is sent with them (Content-Security-Policy)
forbids it. They need no key; what they ask for does.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Files that a browser may have, by their suffix."""


def routes() -> list[Route]:
    """``/`` and ``/page/…``. The files are read once; a path that is not one of theirs is the application's 404."""
    index = (FOLDER / "index.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": policy(index),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    files = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES and path.name != "index.html"]
    served = [_served(f"/page/{path.relative_to(FOLDER).as_posix()}", path, headers) for path in files]
    return [_served("/", FOLDER / "index.html", headers), *served]


def policy(index: str) -> str:
    """What the page may do: run and show files of this server, and the import map that stands in ``index``, which is known by its hash."""
    [inline] = re.findall(r'<script type="importmap">(.*?)</script>', index, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "script-src": f"'self' 'sha256-{digest}'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _served(address: str, path: Path, headers: dict[str, str]) -> Route:
    data = path.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    answered = {**headers, "ETag": tag}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=answered)
        return Response(data, media_type=TYPES[path.suffix], headers=answered)

    return Route(address, answer)
