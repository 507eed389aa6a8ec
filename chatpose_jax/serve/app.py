"""The routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chatpose_jax import __version__
from chatpose_jax.chat import ChatPose
from chatpose_jax.errors import UserError
from chatpose_jax.generate import Sampling
from chatpose_jax.serve import page
from chatpose_jax.serve import poses as pose_files
from chatpose_jax.serve.metrics import Metrics
from chatpose_jax.serve.openai import ApiError, Completions, Limits, invalid, parse
from chatpose_jax.serve.poses import KINDS, PoseStore
from chatpose_jax.serve.worker import Full, Piece, Worker
from smpl_jax.posed import PosedBody


class Server:
    """The application around one model. key: what a caller must send as ``Authorization: Bearer``; None for none."""

    def __init__(
        self,
        load: Any,
        name: str,
        *,
        key: str | None = None,
        limits: Limits = Limits(),  # noqa: B008
        queue: int = 64,
        patience: float = 600.0,
        share_body: bool = False,
    ):
        """load: a function that gives the ChatPose; it runs beside the server, which says 503 meanwhile."""
        self.load, self.name, self.key, self.limits = load, name, key, limits
        self.options = {"queue": queue, "patience": patience}
        self.metrics, self.poses, self.share_body = Metrics(), PoseStore(), share_body
        self.worker: Worker | None = None
        self.failed: str | None = None
        self.created = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/v1/poses/{name}", self.pose),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                Route("/version", self.version),
                *page.routes(),
            ],
            lifespan=self.lifespan,
            exception_handlers={
                ApiError: self.api_error,
                404: self.no_route,
                405: self.no_method,
                Exception: self.failure,
            },
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(self.begin())
        try:
            yield
        finally:
            loading.cancel()
            if self.worker is not None:
                self.worker.close()
                await asyncio.to_thread(self.worker.join, 60)

    async def begin(self) -> None:
        try:
            model: ChatPose = await asyncio.to_thread(self.load)
        except Exception as error:
            self.failed = str(error)
            raise
        self.worker = Worker(model, self.metrics, **self.options)  # type: ignore[arg-type]
        self.worker.start()

    # --- who may ask, and when

    def demand_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise ApiError(
                401,
                "send the server's key as Authorization: Bearer KEY",
                "invalid_api_key",
                kind="authentication_error",
            )

    def ready(self) -> Worker:
        if self.failed is not None:
            raise ApiError(503, f"the model could not be loaded: {self.failed}", "model_failed")
        if self.worker is None:
            raise ApiError(503, "the model is being loaded", "model_loading", **{"Retry-After": "5"})
        if self.worker.closing:
            raise ApiError(503, "the server is about to stop", "stopping", **{"Retry-After": "30"})
        return self.worker

    async def body_of(self, request: Request) -> Any:
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.limits.body:
            raise ApiError(
                413, f"a request may have at most {self.limits.body} bytes, found {length}", "request_too_large"
            )
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > self.limits.body:
                raise ApiError(413, f"a request may have at most {self.limits.body} bytes", "request_too_large")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise invalid(None, f"the body is no JSON: {error!s:.200}", "invalid_json") from None

    # --- routes

    async def health(self, request: Request) -> Response:
        self.ready()
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        self.demand_key(request)
        return JSONResponse({"version": __version__})

    async def show_metrics(self, request: Request) -> Response:
        self.demand_key(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "chatpose-jax"}

    async def models(self, request: Request) -> Response:
        self.demand_key(request)
        return JSONResponse({"object": "list", "data": [self.described()]})

    async def model(self, request: Request) -> Response:
        self.demand_key(request)
        if request.path_params["model"] != self.name:
            raise ApiError(404, f"there is no such model; it is {self.name!r}", "model_not_found", "model")
        return JSONResponse(self.described())

    async def pose(self, request: Request) -> Response:
        self.demand_key(request)
        name, _, kind = request.path_params["name"].rpartition(".")
        if kind not in KINDS:
            raise ApiError(404, f"a pose is there as {', '.join('.' + each for each in KINDS)}", "unknown_format", "id")
        found = self.poses.get(name)
        if found is None:
            raise ApiError(404, "there is no such pose, or no more", "pose_not_found", "id")
        if kind in ("glb", "obj") and not self.may_share(found):
            message = (
                f"the mesh of {found.body.name} is licensed: start the server with --share-body if you may pass it on"
            )
            raise ApiError(403, message, "licensed_body", "id", kind="permission_error")
        data = await asyncio.to_thread(pose_files.file_of, found, kind)
        return Response(data, media_type=KINDS[kind], headers={"Cache-Control": "private, max-age=3600"})

    def may_share(self, pose: PosedBody) -> bool:
        return self.share_body or pose.body.name == "chatpose-default"

    async def completions(self, request: Request) -> Response:
        self.demand_key(request)
        worker = self.ready()
        body = await self.body_of(request)
        asked = await asyncio.to_thread(parse, body, self.name, self.limits)
        answers = [Answering(self, worker, asked, index) for index in range(asked.choices)]
        try:
            for answer in answers:
                answer.request = await asyncio.to_thread(answer.encode)
                worker.model.engine.check(answer.request)
        except UserError as error:
            raise invalid(
                "messages", str(error), "context_length_exceeded" if "context" in str(error) else "invalid_value"
            ) from None
        name, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        if asked.stream:
            return await streamed(self, answers, asked, name, created)
        choices = await _unless_gone(request, _all([answer.whole() for answer in answers]))
        if choices is None:
            return Response(status_code=499)  # nobody reads it
        usage = usage_of(answers)
        return JSONResponse(
            {
                "id": name,
                "object": "chat.completion",
                "created": created,
                "model": self.name,
                "choices": choices,
                "usage": usage,
            }
        )

    # --- errors

    async def api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        self.metrics.errors.labels(error.code).inc()
        return JSONResponse(error.to_json(), error.status, headers=error.headers)

    async def no_route(self, request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(404, f"there is no route {request.url.path!r:.200}", "not_found").to_json(), 404)

    async def no_method(self, request: Request, error: Exception) -> Response:
        headers = dict(getattr(error, "headers", None) or {})
        wrong = ApiError(405, f"{request.method} is not a method of this route", "method_not_allowed")
        return JSONResponse(wrong.to_json(), 405, headers=headers)

    async def failure(self, request: Request, error: Exception) -> Response:
        self.metrics.errors.labels("internal").inc()
        return JSONResponse(ApiError(500, "the server failed; its log says why", "internal").to_json(), 500)


class Answering:
    """One choice of a request."""

    def __init__(self, server: Server, worker: Worker, asked: Completions, index: int):
        self.server, self.worker, self.asked, self.index = server, worker, asked, index
        self.request: Any = None
        self.tokens = 0

    def encode(self) -> Any:
        settings = dict(self.asked.settings)
        first: Sampling = settings.pop("sampling")
        sampling = Sampling(first.temperature, first.top_p, (first.seed + self.index) % 2**32)
        return self.worker.model.request(self.asked.messages, sampling=sampling, every=1, **settings)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        try:
            async with contextlib.aclosing(self.worker.answer(self.request, self.asked.stop)) as pieces:
                async for piece in pieces:
                    self.tokens += piece.tokens
                    self.server.metrics.tokens.inc(piece.tokens)
                    yield piece
        except Full as error:
            raise ApiError(
                429, str(error), "queue_full", kind="rate_limit_error", **{"Retry-After": f"{error.seconds:.0f}"}
            ) from None
        except TimeoutError:
            raise ApiError(504, "the answer took too long", "timeout") from None
        except UserError as error:
            raise ApiError(500, str(error), "model_error") from None

    def named(self, poses: list[list[PosedBody]]) -> list[dict[str, Any]]:
        """Poses as JSON; from now on the server has their files."""
        self.server.metrics.poses.inc(len(poses))
        return [pose_files.to_json([self.server.poses.put(each) for each in samples], samples) for samples in poses]

    async def whole(self) -> dict[str, Any]:
        text, poses, finish = "", list[dict[str, Any]](), "stop"
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                text += piece.text
                poses += await asyncio.to_thread(self.named, piece.poses) if piece.poses else []
                finish = piece.finish or finish
        message = {"role": "assistant", "content": text, "refusal": None, "poses": poses}
        return {"index": self.index, "message": message, "logprobs": None, "finish_reason": finish}


def usage_of(answers: list[Answering]) -> dict[str, int]:
    prompt = len(answers[0].request.ids)
    written = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


async def _all(work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of coroutines that run together. The first error ends all of them."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Any]]) -> list[Any] | None:
    """The result of ``work``; None, and its end, if the client goes away before."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)

    task, watching = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait({task, watching}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        watching.cancel()
        task.cancel()


async def streamed(server: Server, answers: list[Answering], asked: Completions, name: str, created: int) -> Response:
    """Server-sent events. What goes wrong before the first piece is an answer with its status; later, an event."""
    events: asyncio.Queue[Any] = asyncio.Queue()

    async def run(answer: Answering) -> None:
        try:
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    await events.put((answer, piece))
        except Exception as error:
            await events.put((answer, error))

    tasks = [asyncio.create_task(run(answer)) for answer in answers]
    first = await events.get()
    if isinstance(first[1], Exception):
        for task in tasks:
            task.cancel()
        raise first[1]

    def event(choices: list[Any], **more: Any) -> bytes:
        value = {
            "id": name,
            "object": "chat.completion.chunk",
            "created": created,
            "model": server.name,
            "choices": choices,
            **more,
        }
        return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"

    def choice(answer: Answering, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": finish}

    async def write() -> AsyncIterator[bytes]:
        try:
            for answer in answers:
                yield event([choice(answer, {"role": "assistant", "content": ""})])
            left, following = len(answers), first
            while True:
                answer, piece = following
                if isinstance(piece, Exception):
                    error = (
                        piece
                        if isinstance(piece, ApiError)
                        else ApiError(500, "the server failed; its log says why", "internal")
                    )
                    yield b"data: " + json.dumps(error.to_json()).encode() + b"\n\n"
                    return
                delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
                if piece.poses:
                    delta["poses"] = await asyncio.to_thread(answer.named, piece.poses)
                if delta:
                    yield event([choice(answer, delta)])
                if piece.finish:
                    yield event([choice(answer, {}, piece.finish)])
                    left -= 1
                if not left:
                    break
                following = await events.get()
            if asked.usage:
                yield event([], usage=usage_of(answers))
            yield b"data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()

    return StreamingResponse(
        write(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
