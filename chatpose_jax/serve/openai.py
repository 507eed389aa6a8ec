"""Requests and answers in the shapes of OpenAI's API (chat completions). What a request asks for and this server does not do is an error that
names it; nothing is left out silently.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from chatpose_jax.chat import check_settings
from chatpose_jax.errors import UserError

ROLES = {"developer": "system"}
"""OpenAI's newer name of a role, and the template's."""
IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no answer."""
ONLY = {
    "frequency_penalty": (0, 0.0, None), "presence_penalty": (0, 0.0, None), "logprobs": (False, None), "top_logprobs": (0, None),
    "logit_bias": ({}, None), "tools": ([], None), "tool_choice": ("none", "auto", None), "functions": ([], None), "function_call": ("none", None),
    "response_format": ({"type": "text"}, None), "modalities": (["text"], None), "audio": (None,), "prediction": (None,), "reasoning_effort": (None,),
    "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
"""Fields that this server knows, but follows only at these values."""


REFUSED = ("refusal", "audio", "tool_calls", "function_call")
"""Fields of a message that are known, but may hold nothing."""


class ApiError(Exception):
    """An error as OpenAI's API reports it. code: a word for programs. param: the field that is wrong."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, kind: str = "", **headers: str):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


class Limits(NamedTuple):
    """What a request may ask for at most. body: bytes. pixels: of one picture. images, messages: of a conversation. tokens: of an answer.
    answers: ``n``. samples: of each pose. stops: strings of ``stop``.
    """

    body: int = 20 << 20
    pixels: int = 32_000_000
    images: int = 8
    messages: int = 256
    tokens: int = 1024
    answers: int = 8
    samples: int = 16
    stops: int = 4
    stop_length: int = 200


class Completions(NamedTuple):
    """A valid request. settings: of ``ChatPose.request``, without the seed of the answers after the first, which take the next ones."""

    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    choices: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool


def parse(body: Any, model: str, limits: Limits, fetch: Any = None) -> Completions:
    """A request of ``POST /v1/chat/completions``.

    Args:
        body: the JSON value.
        model: the name of the model that answers; a request may name it or leave it out.
        fetch: a function from an address to the bytes of a picture, if the server may fetch any.

    Raises ApiError (400, or 404 for another model) that names the field.
    """
    if not isinstance(body, Mapping):
        raise invalid(None, f"the body must be a JSON object, found {_kind(body)}")
    known = {
        "model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop",
        "force_pose", "samples",
    }  # fmt: skip
    for name, value in body.items():
        if name in ONLY:
            if not any(value == each and type(value) is type(each) for each in ONLY[name]):
                allowed = ", ".join(repr(each) for each in ONLY[name] if each is not None) or "null"
                raise invalid(name, f"{name} is not supported here other than {allowed}", "unsupported_value")
        elif name not in known | IGNORED:
            raise invalid(str(name)[:100], f"there is no field {name!r:.100}", "unknown_parameter")
    given = {name: value for name, value in body.items() if value is not None}
    if (named := given.get("model", model)) != model:
        raise ApiError(
            404, f"the model {named!r:.100} does not exist here; it is {model!r}", "model_not_found", "model"
        )
    stream = _flag(given, "stream", False)
    return Completions(
        messages=_messages(given.get("messages"), limits, fetch),
        settings=_settings(given, limits),
        choices=_whole(given, "n", 1, 1, limits.answers),
        stop=_stops(given.get("stop", ()), limits),
        stream=stream,
        usage=_usage(given, stream),
    )


def _settings(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens are one setting; give one of them")
    name = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    settings: dict[str, Any] = {
        "max_new_tokens": _whole(given, name, min(128, limits.tokens), 1, limits.tokens),
        "temperature": _number(given, "temperature", 0.0, 0, 2),
        "top_p": max(_number(given, "top_p", 1.0, 0, 1), 1e-6),
        "seed": _whole(given, "seed", 0, -(2**63), 2**63 - 1) % 2**32,
        "force_pose": _flag(given, "force_pose", False),
        "samples": _whole(given, "samples", 1, 1, limits.samples),
    }
    if 0 < settings["temperature"] < 1e-6:
        settings["temperature"] = 0.0
    try:
        return check_settings(**settings)
    except UserError as error:
        raise invalid(None, str(error)) from None


def _messages(value: Any, limits: Limits, fetch: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise invalid("messages", f"messages must be a list of at least one message, found {_kind(value)}")
    if len(value) > limits.messages:
        raise invalid("messages", f"at most {limits.messages} messages are allowed, found {len(value)}")
    counted = [0]
    return [_message(message, f"messages[{i}]", limits, fetch, counted) for i, message in enumerate(value)]


def _message(value: Any, where: str, limits: Limits, fetch: Any, counted: list[int]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(where, f"{where} must be an object, found {_kind(value)}")
    role = value.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise invalid(
            f"{where}.role", f"{where}.role must be system, developer, user or assistant, found {role!r:.100}"
        )
    if unknown := set(value) - {"role", "content", "name", "poses", "annotations", *REFUSED}:
        name = min(unknown, key=str)
        raise invalid(f"{where}.{name!s:.100}", f"{where} has no field {name!r:.100}", "unknown_parameter")
    for name in REFUSED:
        if value.get(name):
            raise invalid(f"{where}.{name}", f"{where}.{name} is not supported here", "unsupported_value")
    content = value.get("content")
    if isinstance(content, str):
        return {"role": ROLES.get(role, role), "content": content}
    if not isinstance(content, list) or not content:
        raise invalid(
            f"{where}.content", f"{where}.content must be a string or a list of parts, found {_kind(content)}"
        )
    parts = [_part(part, f"{where}.content[{i}]", limits, fetch, counted) for i, part in enumerate(content)]
    return {"role": ROLES.get(role, role), "content": parts}


def _part(value: Any, where: str, limits: Limits, fetch: Any, counted: list[int]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(where, f"{where} must be an object, found {_kind(value)}")
    kind = value.get("type")
    if kind == "text" and isinstance(value.get("text"), str):
        return {"type": "text", "text": value["text"]}
    if kind == "image_url":
        counted[0] += 1
        if counted[0] > limits.images:
            raise invalid(where, f"a conversation may have at most {limits.images} pictures")
        url = value.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        return {"type": "image", "image": picture(url, f"{where}.image_url", limits, fetch)}
    if kind == "pose":
        return {"type": "text", "text": pose_in_words(value.get("pose"), f"{where}.pose")}
    raise invalid(
        where, f"{where}.type must be text, image_url or pose, with a field of that name; found {kind!r:.100}"
    )


def picture(url: Any, where: str, limits: Limits, fetch: Any = None) -> np.ndarray:
    """(H, W, 3) uint8 of a ``data:`` address. Raises ApiError 400 for any other, for what is no picture, and for one that is too large."""
    if not isinstance(url, str):
        raise invalid(where, f"{where} must be an address, found {_kind(url)}")
    if url.startswith("data:"):
        head, comma, text = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise invalid(where, f"{where} must be data:image/…;base64,…, found {url[:40]!r}")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(where, f"{where} is no base64 ({error})", "invalid_image") from None
    elif fetch is not None and url.startswith("https://"):
        data = fetch(url, where)
    else:
        message = (
            f"{where} must be a data: address; this server reads no file and fetches no address, found {url[:40]!r}"
        )
        raise invalid(where, message, "invalid_image_url")
    return decode_picture(data, where, limits)


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def decode_picture(data: bytes, where: str, limits: Limits) -> np.ndarray:
    """(H, W, 3) uint8. Raises ApiError 400 for what is no picture or too large; its size is looked at before it is unpacked."""
    from PIL import ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.pixels:
                raise invalid(where, f"{where} has {width} × {height} pixels, at most {limits.pixels} are allowed", "image_too_large")  # fmt: skip
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except ApiError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files
        message = f"{where} is no picture that can be read ({', '.join(FORMATS)}): {error!s:.100}"
        raise invalid(where, message, "invalid_image") from None


def pose_in_words(value: Any, where: str) -> str:
    """The description of a pose that was sent; the model reads words and pictures only.

    value: {"axis_angle": 24 × 3 radians, "frame": "camera"}, as an answer has them.
    """
    from chatpose_jax.data.synthetic.captions import describe
    from smpl_jax.pose import Pose, to_frame
    from smpl_jax.rotations import axis_angle_to_matrix

    if not isinstance(value, Mapping) or not isinstance(value.get("axis_angle"), list):
        raise invalid(where, f"{where} must be an object with axis_angle, a list of 24 × 3 numbers")
    if value.get("frame", "camera") != "camera":
        raise invalid(f"{where}.frame", f"{where}.frame must be camera, found {value.get('frame')!r:.100}")
    try:
        angles = np.asarray(value["axis_angle"], np.float32).reshape(24, 3)
    except (TypeError, ValueError):
        raise invalid(f"{where}.axis_angle", f"{where}.axis_angle must be 24 × 3 numbers") from None
    if not np.isfinite(angles).all() or np.abs(angles).max() > 100:
        raise invalid(f"{where}.axis_angle", f"{where}.axis_angle must be finite, in radians")
    return describe(to_frame(Pose(np.asarray(axis_angle_to_matrix(angles)), "camera"), "model").rotations)


def _stops(value: Any, limits: Limits) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    fits = isinstance(texts, list | tuple) and all(
        isinstance(t, str) and 0 < len(t) <= limits.stop_length for t in texts
    )
    if not fits or len(texts) > limits.stops:
        raise invalid(
            "stop", f"stop must be a string, or at most {limits.stops} of them, of 1 to {limits.stop_length} characters"
        )
    return tuple(texts)


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, Mapping) or set(options) - {"include_usage", "include_obfuscation"} or not stream:
        raise invalid("stream_options", "stream_options goes with stream, and holds include_usage")
    return _flag(options, "include_usage", False)


def _flag(given: Mapping[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise invalid(name, f"{name} must be true or false, found {_kind(value)}")
    return value


def _whole(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(name, f"{name} must be a whole number from {least} to {most}, found {value!r:.100}")
    return value


def _number(given: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise invalid(name, f"{name} must be a number from {least} to {most}, found {value!r:.100}")
    return float(value)


def _kind(value: Any) -> str:
    names = {Mapping: "an object", Sequence: "a list", bool: "true or false", int: "a number", float: "a number"}
    if value is None or isinstance(value, str):
        return "nothing" if value is None else "a string"
    return next((words for kind, words in names.items() if isinstance(value, kind)), type(value).__name__)
