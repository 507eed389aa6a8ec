"""Emulators of the two object stores, each in a process of its own, and faults on the way to them.

``python tests/emulators.py gs COMMAND …`` runs a command, such as ``bash``, with the variables that lead all clients to an emulator with the empty
bucket ``tests``. The emulator ends with the command.

``python tests/emulators.py gs`` prints its address and serves until its standard input ends. Each line that it reads there is a JSON object that says
which requests fail from now on: ``{"every": 7, "kinds": ["503", "reset"], "pause": 0.05}``; see ``KINDS``.

``gcp-storage-emulator`` for ``gs://``, ``moto`` for ``s3://``. The former serves one connection at a time, ignores preconditions, does not name the
generation of what it sends, keeps uploads in parts that are given up, and does not tell who asks to go on with a large upload (``Expect:
100-continue``), so that curl waits a second each time. ``_serve_gs`` mends this: TensorStore, gcsfs and the lock depend on it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "tests"
PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto")}
KINDS = ("503", "reset", "lost", "slow")
"""503: the answer of a busy store. reset: the connection breaks before anything is done; lost: after it was done, so that nobody hears of it. slow:
the answer comes in pieces of at most 64 KiB, with a pause before each."""


def environment(scheme: str, address: str) -> dict[str, str]:
    """The variables that lead all clients to a server: gcsfs, s3fs and TensorStore. Some are read only once, when the client is imported."""
    if scheme == "gs":
        # The last four spare waiting for Google's credentials, and for a service that the emulator does not have.
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": address, "AWS_EC2_METADATA_DISABLED": "true", **keys}


class Emulator:
    """A running emulator, with the ``environment`` of its clients."""

    def __init__(self, scheme: str, process: subprocess.Popen[str]):
        assert process.stdout is not None
        self.scheme, self.process, self.address = scheme, process, process.stdout.readline().strip()
        self.environment = environment(scheme, self.address)

    def fail(self, every: int, kinds: Sequence[str] = KINDS, pause: float = 0.05) -> None:
        """From now on every n-th request fails, in one of ``kinds`` after the other; ``every=0``: none. Returns when that holds."""
        assert set(kinds) <= set(KINDS) and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"every": every, "kinds": list(kinds), "pause": pause}) + "\n")
        self.process.stdin.flush()
        self.failed = int(self.process.stdout.readline())


@contextlib.contextmanager
def running_store(scheme: str) -> Iterator[Emulator]:
    command = [sys.executable, os.path.abspath(__file__), scheme]
    # In a session of its own: a Ctrl-C is for the programs that use it.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield Emulator(scheme, process)
    finally:
        process.kill()
        process.communicate()


class Faults:
    """Counts requests and says which fail."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.set({"every": 0, "kinds": KINDS, "pause": 0.0})

    def set(self, wanted: dict[str, Any]) -> None:
        with self.lock:
            self.every, self.kinds, self.pause = wanted["every"], itertools.cycle(wanted["kinds"]), wanted["pause"]
            self.requests = self.failed = 0

    def next(self) -> str | None:
        with self.lock:
            self.requests += 1
            if not self.every or self.requests % self.every:
                return None
            self.failed += 1
            return next(self.kinds)


FAULTS = Faults()


class Faulty:
    """To be mixed into a request handler."""

    def parse_request(self: Any) -> bool:
        if not super().parse_request():  # type: ignore[misc]
            return False
        self.fault = FAULTS.next()
        if self.fault == "503":
            self.go_on()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(HTTPStatus.SERVICE_UNAVAILABLE)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            return False
        if self.fault == "reset":
            self._break()
            return False
        if self.fault == "lost":
            self.wfile = io.BytesIO()
        if self.fault == "slow":
            self.wfile = Slow(self.wfile)
        return True

    def go_on(self: Any) -> None:
        """Tells who asks that a large body may come; curl waits a second for it."""

    def handle_one_request(self: Any) -> None:
        self.fault = None
        super().handle_one_request()  # type: ignore[misc]
        if self.fault == "lost":
            self._break()

    def _break(self: Any) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())


class Slow:
    def __init__(self, out: Any):
        self.out = out

    def write(self, data: bytes) -> int:
        for start in range(0, len(data), 1 << 16):
            time.sleep(FAULTS.pause)
            self.out.write(data[start : start + (1 << 16)])
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)


def _serve_gs() -> Any:
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    asked = threading.local()

    class Refused(Exception):
        pass

    class Store(Storage):
        """Objects in memory."""

        lock = threading.RLock()
        complete: ClassVar[dict[str, Any]] = {}
        """Objects by the id of the upload that wrote them: its last request may be repeated, because the answer was lost."""

        def create_file(self, bucket: str, name: str, content: bytes, obj: Any, *rest: Any) -> None:
            with self.lock:
                before = self.generation(bucket, name)
                if asked.generation not in (None, before):
                    raise Refused
                # Two versions within one tick of the emulator's clock would have the same generation.
                obj["generation"] = str(max(int(obj["generation"]), int(before) + 1))
                super().create_file(bucket, name, content, obj, *rest)

        def delete_file(self, bucket: str, name: str) -> None:
            with self.lock:
                if asked.generation not in (None, self.generation(bucket, name)):
                    raise Refused
                super().delete_file(bucket, name)

        def generation(self, bucket: str, name: str) -> str:
            try:
                return self.get_file_obj(bucket, name)["generation"]
            except NotFound:
                return "0"

        def get_file_list(self, *args: Any, **options: Any) -> Any:
            with self.lock:
                return super().get_file_list(*args, **options)

        def delete_resumable_file_obj(self, upload: str) -> None:
            self.complete[upload] = self.resumable[upload]
            super().delete_resumable_file_obj(upload)

        def _write_config_to_file(self) -> None:
            pass  # with all objects, after each write

    class Handler(Faulty, server.RequestHandler):
        def go_on(self) -> None:
            if self.headers.get("Expect", "").lower() == "100-continue":
                if self.fault == "slow":
                    time.sleep(FAULTS.pause)
                self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

        def _answer(self, method: str) -> None:
            self.go_on()
            parts = urlsplit(self.path)
            asked.generation = parse_qs(parts.query).get("ifGenerationMatch", [None])[0]
            asked.bucket, _, asked.name = parts.path.partition("/b/")[2].partition("/o/")
            try:
                upload = parse_qs(parts.query).get("upload_id", [""])[0]
                if method != "DELETE" and upload in self.storage.complete:
                    self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    answer = json.dumps(self.storage.complete[upload]).encode()
                    self.send_response(HTTPStatus.OK)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                elif method == "DELETE" and parts.path.startswith("/upload/"):
                    self.send_error(499)  # an upload in parts was given up
                else:
                    server.Router(self).handle(method)
            except Refused:
                self.send_error(HTTPStatus.PRECONDITION_FAILED)

        def end_headers(self) -> None:
            if getattr(asked, "name", "") and "alt=media" in self.path:
                self.send_header("x-goog-generation", self.storage.generation(asked.bucket, unquote(asked.name)))
            super().end_headers()

        do_GET = functools.partialmethod(_answer, "GET")
        do_POST = functools.partialmethod(_answer, "POST")
        do_PUT = functools.partialmethod(_answer, "PUT")
        do_DELETE = functools.partialmethod(_answer, "DELETE")
        do_PATCH = functools.partialmethod(_answer, "PATCH")

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            pass  # a client that was killed, or that needed no answer

    storage = Store(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    return Server(("127.0.0.1", 0), functools.partial(Handler, storage))


def _serve_s3() -> Any:
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(Faulty, WSGIRequestHandler):
        pass

    app = DomainDispatcherApplication(create_backend_app)
    serving = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    return serving


def run(scheme: str, command: Sequence[str]) -> int:
    """Runs a command beside an emulator, and returns its exit status."""
    with running_store(scheme) as store:
        print(f"an emulator with the empty bucket {scheme}://{BUCKET} runs at {store.address}", file=sys.stderr)
        before = signal.signal(signal.SIGINT, lambda *_: None)  # a Ctrl-C is for the command
        try:
            return subprocess.run(command, env=os.environ | store.environment, check=False).returncode
        finally:
            signal.signal(signal.SIGINT, before)


def serve(scheme: str) -> None:
    logging.disable(logging.CRITICAL)
    serving = {"gs": _serve_gs, "s3": _serve_s3}[scheme]()
    serving.handle_error = lambda *_: None  # clients break connections too
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{serving.server_address[1]}", flush=True)
    for line in sys.stdin:
        failed = FAULTS.failed
        FAULTS.set(json.loads(line))
        print(failed, flush=True)


def main(words: Sequence[str]) -> int:
    if not words or words[0] not in PACKAGES:
        sys.exit(__doc__)
    if missing := [package for package in PACKAGES[words[0]] if importlib.util.find_spec(package) is None]:
        sys.exit(f"needs {' and '.join(missing)}: pip install '.[dev]' in the checkout")
    if words[1:]:
        return run(words[0], words[1:])
    serve(words[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
