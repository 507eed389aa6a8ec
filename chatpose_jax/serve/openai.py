"""Requests and answers in the shapes of OpenAI's API (chat completions). What a request asks for and this server does not do is an error that
names it; nothing is left out silently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from chatpose_jax.data.synthetic.captions import describe
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import ImageSettings, data_uri, upright_size
from chatpose_jax.processing.processor import NO_TOWER
from chatpose_jax.serve.schema import Mismatch, Schema, check_json
from chatpose_jax.settings import one_line
from smpl_jax.frames import parse_frame
from smpl_jax.pose import Pose, to_frame
from smpl_jax.rotations import axis_angle_to_matrix

_matrices = jax.jit(axis_angle_to_matrix)

IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer."""
ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logprobs": (False, None), "top_logprobs": (0, None), "logit_bias": ({}, None),
    "tools": ([], None), "tool_choice": ("none", "auto", None), "functions": ([], None), "function_call": ("none", None),
    "response_format": ({"type": "text"}, None), "modalities": (["text"], None), "audio": (None,), "prediction": (None,),
    "reasoning_effort": (None,), "verbosity": (None,), "web_search_options": (None,),
}  # fmt: skip
"""Fields that this server knows, but follows only at these values."""
EMPTY = ("refusal", "audio", "tool_calls", "function_call")
"""Fields of a message that are known, but may hold nothing."""
FALLBACK = 128
"""Tokens of an answer whose request does not say how many, at most."""


UNPACKING = threading.Semaphore(4)
"""Pictures that are unpacked at a time: each may take a hundred megabytes."""


class ApiError(Exception):
    """An error as OpenAI's API reports it. code: a word for programs. param: the field that is wrong."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, kind: str = "", **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param)


class Limits(NamedTuple):
    """What a request may ask for at most. body: bytes. upload: seconds until the body is there. bodies: requests that are read at a time.
    pixels: of one picture. images, messages, parts (of a message): in a conversation. tokens: of an answer. answers: ``n``. samples: of each pose.
    stops: strings of ``stop``. stop_length: characters of each.
    """

    body: int = 20 << 20
    upload: float = 30.0
    bodies: int = 32
    pixels: int = 32_000_000
    images: int = 8
    messages: int = 256
    parts: int = 64
    tokens: int = 1024
    answers: int = 8
    samples: int = 16
    stops: int = 4
    stop_length: int = 200


class Completions(NamedTuple):
    """A valid request. settings: those of ``ChatPose.chat``. choices: answers, whose seeds follow each other."""

    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    choices: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool

    def __repr__(self) -> str:
        return one_line(self)


def request_schema(limits: Limits) -> dict[str, Any]:
    """JSON Schema of the body of ``POST /v1/chat/completions``; ``read_request`` checks by it."""

    def one(*kinds: str, **more: Any) -> dict[str, Any]:
        return {"type": [*kinds, "null"], **more}

    def part(kind: str, value: Schema) -> dict[str, Any]:
        fields = {"type": {"enum": [kind]}, kind: value}
        return {"type": "object", "properties": fields, "required": ["type", kind], "additionalProperties": False}

    triple = {
        "type": "array",
        "items": {"type": "number", "minimum": -100, "maximum": 100},
        "minItems": 3,
        "maxItems": 3,
    }
    angles = {
        "type": "array",
        "items": triple,
        "minItems": 24,
        "maxItems": 24,
        "description": "radians, relative to the parent",
    }
    pose = {
        "type": "object",
        "properties": {"axis_angle": angles, "frame": {"type": "string"}},
        "required": ["axis_angle"],
    }
    url = {"type": "string", "description": "data:image/…;base64,…, or https:// where the server allows the domain"}
    address = {
        "anyOf": [
            {"type": "object", "properties": {"url": url, "detail": {"enum": ["auto", "low", "high"]}}, "required": ["url"],
             "additionalProperties": False},
            url,
        ]
    }  # fmt: skip
    parts = {"oneOf": [part("text", {"type": "string"}), part("image_url", address), part("pose", pose)]}
    content = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": parts, "minItems": 1, "maxItems": limits.parts}]
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]}, "content": content, "name": one("string"), "poses": one("array"),
            "annotations": one("array"), **{name: {"enum": [None, []], "x-code": "unsupported_value"} for name in EMPTY},
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    }  # fmt: skip
    text = {"type": "string", "minLength": 1, "maxLength": limits.stop_length}
    options = {
        "include_usage": {"type": "boolean"},
        "include_obfuscation": {"enum": [False], "x-code": "unsupported_value"},
    }
    return {
        "type": "object",
        "properties": {
            "model": one("string"),
            "messages": {"type": "array", "items": message, "minItems": 1, "maxItems": limits.messages},
            "stream": one("boolean"),
            "stream_options": one("object", properties=options, additionalProperties=False),
            "n": one("integer", minimum=1, maximum=limits.answers),
            "max_tokens": one("integer", minimum=1, maximum=limits.tokens),
            "max_completion_tokens": one("integer", minimum=1, maximum=limits.tokens),
            "temperature": one("number", minimum=0, maximum=2),
            "top_p": one("number", minimum=0, maximum=1),
            "seed": one("integer", minimum=-(2**63), maximum=2**63 - 1),
            "stop": {"anyOf": [text, {"type": "array", "items": text, "maxItems": limits.stops}, {"type": "null"}]},
            "force_pose": one("boolean", description="a pose at the end of an answer that has none"),
            "samples": one("integer", minimum=1, maximum=limits.samples, description="of each pose"),
            **{name: {"enum": list(values), "x-code": "unsupported_value"} for name, values in ONLY.items()},
            **{name: {"description": "changes no answer"} for name in IGNORED},
        },
        "required": ["messages"],
        "additionalProperties": False,
    }


def read_request(
    body: Any,
    model: str,
    limits: Limits,
    images: ImageSettings | None,
    fetch: Callable[[str, str], bytes] | None = None,
) -> Completions:
    """A request of ``POST /v1/chat/completions``.

    Args:
        body: the JSON value.
        model: the name of the model that answers; a request may name it or leave it out.
        images: how the model sees pictures: each becomes an (S, S, 3) array, so that a large one is held in memory once and shortly.
        fetch: a function from an address and its place to the bytes of a picture, if the server may fetch any.

    Raises ApiError (400, or 404 for another model) that names the field.
    """
    try:
        check_json(body, request_schema(limits))
    except Mismatch as error:
        raise invalid(error.where or None, str(error), error.code) from None
    given = {name: value for name, value in body.items() if value is not None}
    if (named := given.get("model", model)) != model:
        message = f"the model {named!r:.100} does not exist here; it is {model!r}"
        raise ApiError(404, message, "model_not_found", "model")
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens are one setting; give one of them")
    stream = given.get("stream", False)
    if "stream_options" in given and not stream:
        raise invalid("stream_options", "stream_options goes with stream")
    new = given.get("max_completion_tokens", given.get("max_tokens", min(FALLBACK, limits.tokens)))
    temperature, stop = given.get("temperature", 0.0), given.get("stop", ())
    settings = {
        "max_new_tokens": int(new),
        "temperature": 0.0 if temperature < 1e-6 else float(temperature),
        "top_p": max(float(given.get("top_p", 1.0)), 1e-6),
        "seed": int(given.get("seed", 0)) % 2**32,
        "force_pose": given.get("force_pose", False),
        "samples": int(given.get("samples", 1)),
    }
    pictures = Pictures(limits, images, fetch)
    return Completions(
        messages=[_message(message, f"messages[{i}]", pictures) for i, message in enumerate(given["messages"])],
        settings=settings,
        choices=int(given.get("n", 1)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=stream,
        usage=given.get("stream_options", {}).get("include_usage", False),
    )


def _message(message: Mapping[str, Any], where: str, pictures: Pictures) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]  # OpenAI's newer name
    content = message["content"]
    if not isinstance(content, str):
        content = [_part(part, f"{where}.content[{i}]", pictures) for i, part in enumerate(content)]
    return {"role": role, "content": content}


def _part(part: Mapping[str, Any], where: str, pictures: Pictures) -> dict[str, Any]:
    match part["type"]:
        case "image_url":
            url = part["image_url"]
            url = url if isinstance(url, str) else url["url"]
            return {"type": "image", "image": pictures.read(url, f"{where}.image_url")}
        case "pose":
            return {"type": "text", "text": pose_in_words(part["pose"], f"{where}.pose")}
    return {"type": "text", "text": part["text"]}


class Pictures:
    """Reads the pictures of one conversation."""

    def __init__(self, limits: Limits, images: ImageSettings | None, fetch: Callable[[str, str], bytes] | None):
        self.limits, self.images, self.fetch, self.count = limits, images, fetch, 0

    def read(self, url: str, where: str) -> np.ndarray:
        """(S, S, 3) uint8. Raises ApiError 400 for what is no ``data:`` address and may not be fetched, is no picture, or has too many pixels; the
        size is looked at before a picture is unpacked.
        """
        self.count += 1
        if self.count > self.limits.images:
            raise invalid(
                "messages", f"a conversation may have at most {self.limits.images} pictures", "too_many_images"
            )
        if self.images is None:
            raise invalid(where, f"{where}: {NO_TOWER}; ask without it", "no_vision")
        try:
            if url[:5].lower() == "data:":
                data = data_uri(url, f"{where}: ")
            elif self.fetch is not None:
                data = self.fetch(url, where)
            else:
                message = f"{where} must be a data: address; this server reads no file and fetches no address, found {url[:40]!r}"
                raise invalid(where, message, "invalid_image_url")
            with UNPACKING:
                width, height = upright_size(data, where)
                if width * height > self.limits.pixels:
                    message = f"{where} has {width} × {height} pixels, at most {self.limits.pixels} are allowed"
                    raise invalid(where, message, "image_too_large")
                return self.images.square(data, where)
        except UserError as error:
            raise invalid(where, str(error), "invalid_image") from None


def pose_in_words(pose: Mapping[str, Any], where: str) -> str:
    """The description of a pose that was sent; the model reads words and pictures only.

    pose: axis_angle, 24 × 3 radians, and its frame ("camera" unless it is named), as an answer has them.
    """
    try:
        frame = parse_frame(pose.get("frame", "camera"))
    except ValueError as error:
        raise invalid(f"{where}.frame", str(error)) from None
    matrices = np.asarray(_matrices(np.asarray(pose["axis_angle"], np.float32)))
    return describe(to_frame(Pose(matrices, frame), "model").rotations)
