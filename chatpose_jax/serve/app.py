"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatpose_jax import __version__
from chatpose_jax import engine as engines
from chatpose_jax.chat import ChatPose
from chatpose_jax.errors import UserError
from chatpose_jax.serve import page
from chatpose_jax.serve import poses as pose_files
from chatpose_jax.serve.api import document
from chatpose_jax.serve.metrics import Metrics
from chatpose_jax.serve.openai import ApiError, Completions, Limits, invalid, read_request
from chatpose_jax.serve.poses import KINDS, MESHES, PoseStore
from chatpose_jax.serve.worker import Answering, Full, Piece, Stopped, Worker
from smpl_jax.pose import Pose
from smpl_jax.posed import PosedBody

LOG = logging.getLogger("uvicorn.error")

FAILURES = 3
"""Steps that fail in a row, after which the server is not healthy until one writes a token."""
OPEN = re.compile(r"/(health|page/.*)?")
"""Paths that need no key: the page's files hold nothing of the model, and what the page asks for needs one."""


class Server:
    """The application around one model."""

    def __init__(
        self,
        load: Callable[[], ChatPose],
        name: str,
        *,
        key: str | None = None,
        limits: Limits = Limits(),  # noqa: B008
        queue: int = 64,
        patience: float = 600.0,
        share_body: bool = False,
        hosts: Sequence[str] | None = None,
        origins: Sequence[str] = (),
        fetch: Callable[[str, str], bytes] | None = None,
        failed: Callable[[], None] = lambda: None,
        note: str | None = None,
    ):
        """
        Args:
            load: gives the model. It runs beside the server, which says 503 meanwhile.
            name: of the model, for clients.
            key: what a caller must send as ``Authorization: Bearer``; None for none.
            queue, patience, failed: see ``Worker``.
            share_body: whether meshes of a licensed body may leave the server.
            hosts: names under which the server may be asked; None for any. Without a key, they keep a web page out whose domain leads here.
            origins: of web pages elsewhere that may ask.
            fetch: gets the bytes of a picture from an address and its place in the request; None: no address is fetched.
            note: what people should know about the model. The page shows it; ``/v1/models`` has it as ``description``.
        """
        self.name, self.key, self.limits, self.share_body = name, key, limits, share_body
        self.hosts, self.origins, self.fetch, self.note = hosts, tuple(origins), fetch, note
        self.metrics, self.poses = Metrics(), PoseStore()
        self.worker = Worker(load, self.metrics, queue=queue, samples=limits.samples, patience=patience, failed=failed)
        self.created = int(time.time())
        self.document = document(name, limits)
        # Fetching pictures may take long; so it has threads of its own.
        self._reading, self._readers = asyncio.Semaphore(limits.bodies), ThreadPoolExecutor(limits.bodies, "request")
        self._drawing = asyncio.Semaphore(2)
        routes = [
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/v1/poses/{file}", self.pose),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/version", self.version),
            Route("/openapi.json", self.describe),
            *page.routes(),
        ]
        cross = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"]
        )  # fmt: skip
        app = Starlette(
            routes=routes,
            middleware=[*([cross] if origins else []), Middleware(Guard, server=self)],
            lifespan=self.lifespan,
            exception_handlers={ApiError: self.api_error, 404: self.no_route, 405: self.no_method, Exception: self.failure},
        )  # fmt: skip
        app.router.redirect_slashes = False
        self.app: ASGIApp = Counted(app, self.metrics, {route.endpoint: route.path for route in routes})

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.close)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def stop(self) -> None:
        """Takes no more questions; those under way are answered."""
        self.worker.closing = True

    def ready(self) -> ChatPose:
        worker = self.worker
        if worker.error is not None:
            raise ApiError(503, "the model failed; the server's log says why", "model_failed")
        if worker.closing:
            raise ApiError(503, "the server is about to stop", "stopping", Retry_After="30")
        if worker.model is None:
            raise ApiError(503, "the model is being loaded", "model_loading", Retry_After="5")
        if worker.stalled:
            raise ApiError(503, "the device does not answer", "stalled", Retry_After="60")
        return worker.model

    async def body_of(self, request: Request) -> bytes:
        most, seconds = self.limits.body, self.limits.upload
        large = ApiError(413, f"a request may have at most {most} bytes", "request_too_large", Connection="close")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise large
        data = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise large
        except TimeoutError:
            raise ApiError(
                408, f"the request was not there within {seconds:.0f} s", "timeout", Connection="close"
            ) from None
        return bytes(data)

    # --- routes

    async def health(self, request: Request) -> Response:
        if (failures := self.ready().engine.failures) >= FAILURES:
            raise ApiError(503, f"the last {failures} steps of the model failed; the log says why", "failing")
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def describe(self, request: Request) -> Response:
        return JSONResponse(self.document)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def described(self) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "chatpose-jax"}
        return model if self.note is None else {**model, "description": self.note}

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.described()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self.name:
            raise ApiError(404, f"there is no such model; it is {self.name!r}", "model_not_found", "model")
        return JSONResponse(self.described())

    async def pose(self, request: Request) -> Response:
        name, _, kind = request.path_params["file"].rpartition(".")
        if kind not in KINDS:
            message = f"a pose is there as {', '.join('.' + each for each in KINDS)}"
            raise ApiError(404, message, "unknown_format", "file")
        found = self.poses.get(name)
        if found is None:
            raise ApiError(404, "there is no such pose, or no more", "pose_not_found", "file")
        if kind in MESHES and not self.may_share(found):
            body = found.body.name
            message = f"the mesh of {body} is licensed: start the server with --share-body if you may pass it on"
            raise ApiError(403, message, "licensed_body", "file", kind="permission_error")
        async with self._drawing:
            data = await asyncio.to_thread(pose_files.file_of, found, kind)
        return Response(data, media_type=KINDS[kind], headers={"Cache-Control": "private, max-age=3600"})

    def may_share(self, pose: PosedBody) -> bool:
        return self.share_body or pose.body.name == "chatpose-default"

    async def completions(self, request: Request) -> Response:
        model = self.ready()
        async with self._reading:
            data = await self.body_of(request)
            loop = asyncio.get_running_loop()
            asked, questions = await loop.run_in_executor(self._readers, self.understood, data, model)
        self.ready()
        try:
            answers = self.worker.submit(questions, asked.stop)
        except Full as full:
            seconds = f"{full.seconds:.0f}"
            raise ApiError(429, str(full), "queue_full", kind="rate_limit_error", Retry_After=seconds) from None
        writer = Writer(self, asked, answers)
        if asked.stream:
            return Events(writer)
        try:
            return await unless_gone(request.receive, writer.whole()) or Response(status_code=499)
        finally:
            writer.leave()

    def understood(self, data: bytes, model: ChatPose) -> tuple[Completions, list[engines.Request]]:
        """A request, and the questions to the engine: one for each of its choices."""
        asked = read_request(decoded(data), self.name, self.limits, model.processor.images, self.fetch)
        try:
            settings = model.settings(**asked.settings)
            first = model.request(asked.messages, every=0, **settings)
            model.engine.check(first)
        except UserError as error:
            text = str(error).replace("max_new_tokens", "max_tokens")
            param = next((name for name in ("samples", "max_tokens") if text.startswith(name)), "messages")
            code = "context_length_exceeded" if "context" in text else "invalid_value"
            raise invalid(param, text, code) from None
        seeds = [(first.sampling.seed + i) % 2**32 for i in range(asked.choices)]
        draws = [dataclasses.replace(first.sampling, seed=seed) for seed in seeds]
        return asked, [dataclasses.replace(first, sampling=draw) for draw in draws]

    def named(self, pose: Pose) -> dict[str, Any]:
        """A pose of an answer as JSON; from now on the server has its files. pose: of batch shape (samples,)."""
        self.metrics.poses.inc()
        assert self.worker.model is not None
        samples = [PosedBody(pose[i], self.worker.model.body) for i in range(pose.shape[0])]
        return pose_files.pose_json([self.poses.put(each) for each in samples], samples)

    # --- errors

    def refused(self, error: ApiError) -> Response:
        self.metrics.errors.labels(error.code).inc()
        return JSONResponse(error.to_json(), error.status, headers=error.headers)

    async def api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return self.refused(error)

    async def no_route(self, request: Request, error: Exception) -> Response:
        return self.refused(ApiError(404, f"there is no route {request.url.path!r:.200}", "not_found"))

    async def no_method(self, request: Request, error: Exception) -> Response:
        allowed = (getattr(error, "headers", None) or {}).get("Allow", "GET")
        message = f"{request.method} is not a method of this route; it has {allowed}"
        return self.refused(ApiError(405, message, "method_not_allowed", Allow=allowed))

    async def failure(self, request: Request, error: Exception) -> Response:
        return self.refused(internal())


def internal() -> ApiError:
    return ApiError(500, "the server failed; its log says why", "internal", **NO_RETRY)


NO_RETRY = {"X_Should_Retry": "false"}
"""Tells OpenAI's client that the same would happen again."""


def api_error_of(error: BaseException) -> ApiError | None:
    """What a client hears of an error of its answer; None for one that nobody foresaw."""
    match error:
        case ApiError():
            return error
        case TimeoutError():
            return ApiError(504, "the answer took too long", "timeout", **NO_RETRY)
        case Stopped():
            return ApiError(503, str(error), "stopping", Retry_After="30")
        case UserError():
            return ApiError(500, str(error), "model_error", **NO_RETRY)
    return None


def decoded(data: bytes) -> Any:
    """The JSON value of a body. Raises ApiError 400 for what is no JSON, or holds what is no text (half of a surrogate pair)."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(data, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is no JSON: {ascii(str(error))[1:-1][:200]}", "invalid_json") from None
    return value


class Guard:
    """Lets in who may ask: with the key, under one of the server's names, and from no web page elsewhere."""

    def __init__(self, app: ASGIApp, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self.check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                return await self.server.refused(error)(scope, receive, send)
        return await self.app(scope, receive, send)

    def check(self, path: str, headers: Headers) -> None:
        server, host, origin = self.server, headers.get("host", ""), headers.get("origin")
        if OPEN.fullmatch(path):
            return
        if server.hosts is not None and without_port(host) not in server.hosts:
            message = "this server answers without a key, so only under the name of this machine itself; give it a key for others"
            raise ApiError(403, message, "wrong_host", kind="permission_error")
        if origin is not None and origin not in server.origins and origin.partition("://")[2] != host:
            message = "a web page elsewhere may not ask this server: --allow-origin names those that may"
            raise ApiError(403, message, "wrong_origin", kind="permission_error")
        if server.key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), server.key.encode()):
                message = "send the server's key as Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key", kind="authentication_error", WWW_Authenticate="Bearer")


def without_port(host: str) -> str:
    """The name in a Host header; of an IPv6 address without its brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


class Counted:
    """Counts requests by route and status, and logs those that failed. 499 stands for a client that went away before its answer began."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Mapping[Any, str]):
        """paths: of each route, by its endpoint."""
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 499

        async def hear(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, hear)
        except ClientDisconnect:
            pass
        except Exception:  # it has been answered; uvicorn would close the connection without a word
            LOG.exception("a request failed")
        finally:
            self.metrics.requests.labels(self.paths.get(scope.get("endpoint"), "none"), status).inc()
        return None


async def unless_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of ``work``; None, and its end, if the client goes away before. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.create_task(watch())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Writer:
    """Writes the answers of one request, whole or as events."""

    def __init__(self, server: Server, asked: Completions, answers: list[Answering]):
        self.server, self.asked, self.answers = server, asked, answers
        self.name, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def leave(self) -> None:
        for answer in self.answers:
            answer.leave()

    @property
    def usage(self) -> dict[str, Any]:
        prompt, written = len(self.answers[0].request.ids), sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.answers[0].completion.reused},
        }

    def object(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        named = {"id": self.name, "object": kind, "created": self.created, "model": self.server.name}
        return {**named, "choices": choices, **more}

    async def poses(self, piece: Piece) -> list[dict[str, Any]]:
        return [await asyncio.to_thread(self.server.named, pose) for pose in piece.poses]

    async def whole(self) -> Response:
        async def choice(index: int, answer: Answering) -> dict[str, Any]:
            text, poses, finish = "", list[Any](), None
            async for piece in answer.pieces():
                text, finish = text + piece.text, piece.finish
                poses += await self.poses(piece)
            message = {"role": "assistant", "content": text, "refusal": None, "poses": poses}
            return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(choice(*each)) for each in enumerate(self.answers)]
        except ExceptionGroup as errors:
            raise api_error_of(errors.exceptions[0]) or errors.exceptions[0] from None
        return JSONResponse(self.object("chat.completion", [task.result() for task in tasks], usage=self.usage))

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of all choices, as they come. Raises the first error."""
        heard: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        more = {"usage": None} if self.asked.usage else {}

        async def run(index: int, answer: Answering) -> None:
            try:
                async for piece in answer.pieces():
                    await heard.put((index, piece))
            except Exception as error:
                await heard.put((index, error))

        def event(index: int, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            return self.object("chat.completion.chunk", [choice], **more)

        tasks = [asyncio.create_task(run(*each)) for each in enumerate(self.answers)]
        try:
            left, begun = len(tasks), set[int]()
            while left:
                index, piece = await heard.get()
                if isinstance(piece, Exception):
                    raise piece
                if index not in begun:
                    begun.add(index)
                    yield event(index, {"role": "assistant", "content": ""})
                delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
                if piece.poses:
                    delta["poses"] = await self.poses(piece)
                if delta:
                    yield event(index, delta)
                if piece.finish:
                    left -= 1
                    yield event(index, {}, piece.finish)
            if self.asked.usage:
                yield self.object("chat.completion.chunk", [], usage=self.usage)
        finally:
            for task in tasks:
                task.cancel()


class Events(Response):
    """Server-sent events. What goes wrong before the first one is an answer with its status; later, an event."""

    media_type = "text/event-stream"

    def __init__(self, writer: Writer):
        self.writer, self.status_code = writer, 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.write(send))
        finally:
            self.writer.leave()

    async def write(self, send: Send) -> None:
        begun = False

        async def put(data: bytes, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with contextlib.aclosing(self.writer.events()) as events:
                async for event in events:
                    await put(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")
            await put(b"data: [DONE]\n\n")
        except Exception as error:
            known = api_error_of(error) or internal()
            if not begun:
                raise api_error_of(error) or error from None
            self.writer.server.metrics.errors.labels(known.code).inc()
            await put(b"data: " + json.dumps(known.to_json()).encode() + b"\n\n")
            await put(b"", more=False)
            if api_error_of(error) is None:
                raise
            return
        await put(b"", more=False)
