"""Language models behind an endpoint: several questions at a time, with images, in the form of OpenAI's API."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from chatpose_jax.endpoint import Endpoint, Messages, NoAnswer, NoServer
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import load_image
from chatpose_jax.settings import one_line

CACHE = "out/answers"
"""Folder of the answers of endpoints, if no other is named."""
_MEDIA = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}
"""First bytes of images that endpoints take as they are."""


class Written(NamedTuple):
    """text: what a model wrote, "" if nothing. why: why there is nothing."""

    text: str
    why: str = ""

    def __repr__(self) -> str:
        return one_line(self)


def ask_all(endpoint: Endpoint, questions: Sequence[tuple[Messages, int]], parallel: int) -> list[Written]:
    """The answers to (messages, turn), ``parallel`` at a time.

    Raises UserError where the endpoint refuses a request, or does not answer. What was answered is in the endpoint's cache.
    """
    pool = concurrent.futures.ThreadPoolExecutor(parallel)
    try:
        return list(pool.map(lambda question: _ask(endpoint, *question), questions))
    except NoServer as error:
        raise UserError(f"{endpoint.model!r}: {error}; run the same command again to resume") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(endpoint: Endpoint, messages: Messages, turn: int) -> Written:
    try:
        return Written(endpoint.ask(messages, turn))
    except NoServer:
        raise
    except NoAnswer as error:
        return Written("", str(error))


def as_openai(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as those of ``Example``, with images as ``image_url`` parts. JPEG and PNG bytes are sent as they are, other images as PNG."""
    return [
        {"role": message["role"], "content": content if isinstance(content, str) else [_part(part) for part in content]}
        for message in messages
        for content in [message["content"]]
    ]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    data = part["image"]
    media = next((kind for start, kind in _MEDIA.items() if isinstance(data, bytes) and data.startswith(start)), "")
    if not media:
        file, media = io.BytesIO(), "png"
        load_image(data).save(file, "PNG")
        data = file.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/{media};base64,{base64.b64encode(data).decode()}"}}
