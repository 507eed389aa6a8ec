"""Asks language models behind any OpenAI-compatible endpoint, with answers kept on disk."""

from __future__ import annotations

import dataclasses
import email.utils
import hashlib
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line
from smpl_jax._files import write_whole

Messages = Sequence[Mapping[str, Any]]
"""As OpenAI's API takes them."""
URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
"""Environment variables of the endpoint, as OpenAI's own clients read them."""
ATTEMPTS = 6
LONGEST_WAIT = 60.0
MAX_BYTES = 1 << 24
"""Largest answer that is read."""
_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class NoAnswer(Exception):
    """The endpoint gave no usable answer to this question, and asking again would not help."""


class NoServer(NoAnswer):
    """All attempts failed: the server is not there, is broken, or is no endpoint."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind an endpoint.

    url: without ``/chat/completions``, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``. key: sent as a bearer
    token; empty sends none, as local servers want. model: its name there. temperature: of sampling. max_tokens: of an answer. timeout: seconds
    for one answer. cache: a folder; an answer to the same question of the same model is read from it and not asked for again.

    Temporary errors (a busy server, a lost connection, an answer that is not JSON) are retried, ``ATTEMPTS`` times in all, at the time
    that the server names or after waits that double.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    temperature: float = 0.7
    max_tokens: int = 512
    timeout: float = 120.0
    cache: Path | None = None
    sleep: Callable[[float], object] = dataclasses.field(default=time.sleep, repr=False, compare=False)

    __repr__ = one_line

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{self.url!r} is no web address of an endpoint; expected https://HOST/v1 in {URL}")
        if parts.scheme == "http" and self.key and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise UserError(f"{self.url!r} would send the key of {KEY} unencrypted; use https")

    @classmethod
    def from_environment(cls, model: str, **settings: Any) -> Endpoint:
        """The endpoint of ``OPENAI_BASE_URL`` (by default OpenAI's own) with the key of ``OPENAI_API_KEY``.

        Raises UserError where neither is set.
        """
        url, key = os.environ.get(URL, ""), os.environ.get(KEY, "")
        if not url and not key:
            raise UserError(
                f"no endpoint: set {KEY} (and {URL} for another server than OpenAI's, for example http://localhost:8000/v1)"
            )
        return cls((url or "https://api.openai.com/v1").rstrip("/"), model, key, **settings)

    def known(self, messages: Messages, turn: int = 0) -> str | None:
        """The answer that the cache has, or None. A damaged file counts as none."""
        if self.cache is None:
            return None
        try:
            return _answer(json.loads(self._file(messages, turn).read_bytes())["response"])
        except (OSError, ValueError, KeyError, TypeError, NoAnswer):
            return None

    def ask(self, messages: Messages, turn: int = 0) -> str:
        """The text of an answer.

        turn: another number asks the same question anew, instead of reading the cached answer.

        Raises:
            NoAnswer: the model refused, or its answer was cut off at ``max_tokens``.
            NoServer, which is a NoAnswer: all attempts failed.
            UserError: the endpoint refuses the request itself: a wrong key, model or address, or no money left.
        """
        if (known := self.known(messages, turn)) is not None:
            return known
        failure, wait = "", 0.0
        for attempt in range(ATTEMPTS):
            if attempt:
                self.sleep(
                    max(wait, min(2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1))
                )  # random, so that clients do not retry together
            try:
                response = self._post(self._body(messages))
                text = _answer(response)
            except urllib.error.HTTPError as error:
                words = _words(error)
                if error.code not in _TRY_AGAIN or "insufficient_quota" in words:
                    raise UserError(
                        f"{self.url} refuses the request for {self.model!r}: {error.code} {words}"
                    ) from None
                failure, wait = f"{error.code} {words}", min(_retry_after(error.headers), LONGEST_WAIT)
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure, wait = f"{type(error).__name__}: {getattr(error, 'reason', error)}", 0.0
            else:
                self._keep(messages, turn, response)
                return text
        raise NoServer(f"{ATTEMPTS} attempts failed, the last with {failure}")

    def _keep(self, messages: Messages, turn: int, response: Any) -> None:
        if self.cache is not None:
            stored = json.dumps({"model": self.model, "messages": messages, "response": response}).encode()
            write_whole(self._file(messages, turn), lambda file: file.write(stored))

    def _body(self, messages: Messages) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def _file(self, messages: Messages, turn: int) -> Path:
        assert self.cache is not None
        question = json.dumps([self._body(messages), turn], sort_keys=True).encode()
        name = hashlib.sha256(question).hexdigest()
        return self.cache / name[:2] / f"{name}.json"

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "chatpose-jax"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self.timeout) as response:
            data = response.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"an answer of more than {MAX_BYTES} bytes")
        try:
            return json.loads(data)
        except ValueError:
            raise ValueError(f"an answer that is no JSON: {data[:100].decode(errors='replace')!r}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _answer(response: Any) -> str:
    """The text of a response. Raises ValueError for what is no response, and NoAnswer for one without a whole answer."""
    try:
        choice = response["choices"][0]
        text, reason, refusal = (
            choice["message"]["content"],
            choice.get("finish_reason"),
            choice["message"].get("refusal"),
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"a response without choices: {response!r:.200}") from None
    if refusal or reason == "content_filter":
        raise NoAnswer(f"the model refused: {refusal or 'content filter'!s:.200}")
    if reason == "length":
        raise NoAnswer("the answer was cut off at max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("a response without text")
    return text


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, in at most 300 characters."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        found = json.loads(text)["error"]
        text = found if isinstance(found, str) else f"{found.get('message', '')} {found.get('code') or ''}"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return " ".join(text.split())[:300] or str(error.reason)


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, or 0."""
    value = (headers or {}).get("Retry-After") or ""
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0
