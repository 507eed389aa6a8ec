"""Listens for HTTP: uvicorn, with limits for connections that send or read too slowly."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatpose_jax.errors import UserError
from chatpose_jax.serve.app import Server

HEADER_SECONDS = 10.0
"""Until the head of a request is there, from the connection or its first byte on."""
STALLED_SECONDS = 60.0
"""That a client may leave what was sent to it unread."""
KEEP_ALIVE_SECONDS = 15
CONNECTIONS = 1000


class Patient(H11Protocol):
    """uvicorn's protocol, whose patience with one connection is bounded."""

    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def _wait(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head of the request is there
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flow()

    def _flow(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._flow()
        if self._waiting is not None:
            self._waiting.cancel()


class Listener(uvicorn.Server):
    """Serves an application until a signal, or until its model fails. grace: seconds that answers under way have after a signal."""

    def __init__(self, server: Server, *, grace: int = 60, **settings: Any):
        config = uvicorn.Config(
            server.app, http=Patient, ws="none", lifespan="on", timeout_keep_alive=KEEP_ALIVE_SECONDS, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=grace, server_header=False, proxy_headers=False, **settings,
        )  # fmt: skip
        super().__init__(config)
        # A probe every few seconds would fill the log.
        logging.getLogger("uvicorn.access").addFilter(lambda record: '"GET /health ' not in record.getMessage())
        self.served = server
        server.worker.failed = self.give_up

    def give_up(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.served.stop()
        await super().shutdown(sockets)

    def listen(self, where: socket.socket) -> None:
        """Serves on a socket. Returns after SIGTERM or SIGINT. Raises the model's error if it failed."""
        handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:  # uvicorn raises the signal again when it is done, for a handler that was there before
            self.run(sockets=[where])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.served.worker.error is not None:
            raise self.served.worker.error
        if self.served.worker.alive:  # it loads or compiles, which nothing can stop; Python's own end crashes beside it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        why = f"{error.strerror or error}".partition(" (while")[0]
        raise UserError(f"{host}:{port} cannot be listened at: {why}; --host and --port name another") from None
