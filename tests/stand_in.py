"""A stand-in for the server of a language model, for tests of what asks one."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def good(text: str, **choice: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}]}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers with the functions of ``script`` one after another, then with ``then``. Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.then: Any = lambda handler: handler.send(200, good("fine"))
        self.asked: list[tuple[dict, dict]] = []

    def answers(self, text: Callable[[list[dict[str, Any]]], str]) -> None:
        """From now on, answers with a function of the messages."""
        self.then = lambda handler: handler.send(200, good(text(handler.body["messages"])))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((dict(self.headers), {"path": self.path, **self.body}))
        (self.server.script.pop(0) if self.server.script else self.server.then)(self)

    def send(self, code: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Server]:
    """A server that answers until the end of the block."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
