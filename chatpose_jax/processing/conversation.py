"""Checks the messages of a user, and holds the templates that turn them into one prompt.

Messages are those of OpenAI's chat API and of transformers: ``{"role": …, "content": str | [parts]}``. A part is
``{"type": "text", "text": str}``, ``{"type": "image", "image": path | bytes | PIL image | array}`` (transformers also
writes ``"path"``, ``"url"`` or ``"base64"`` for the key) or ``{"type": "image_url", "image_url": {"url": path or data:
URI}}``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line

POSE = "<POSE>"
"""Stands for a pose in every text that a user sees or writes. The token in the vocabulary may have another name."""

Role = Literal["user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Template:
    """The words around the turns: ``{system} {user}: question {assistant}: answer</s>{user}: …``.

    A generation prompt ends with ``{assistant}:`` and no space.

    Source: Vicuna v1 as LLaVA-1.5 uses it (its conversation mode "v1": separators " " and "</s>").
    """

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"


_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(_SYSTEM.format("user")),  # what LLaVA-1.5 was tuned with
    "llava_v1": Template(_SYSTEM.format("human")),  # what LISA and its descendants choose
    "plain": Template("A chat about human poses."),  # short, for small models
}


def template(name: str) -> Template:
    """The named template; raises UserError that lists the names."""
    if name not in TEMPLATES:
        raise UserError(f"no conversation template {name!r}; the templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An image in a message, not yet opened.

    value: path, bytes, PIL image, array or ``data:`` URI. where: names it in errors.
    """

    value: Any
    where: str

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Turn:
    """One checked message of the user or the assistant.

    ids: the exact token ids of an answer; they replace its text.
    """

    role: Role
    parts: tuple[str | ImageSource, ...]
    ids: tuple[int, ...] | None = None

    __repr__ = one_line

    @property
    def text(self) -> str:
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Conversation:
    system: str | None
    turns: tuple[Turn, ...]

    __repr__ = one_line


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Checks ``messages`` and gives them one form. White space around a text is dropped.

    Raises UserError, which names the message (``messages[i]``), for: an unknown role, a system message that is not the first, two turns
    of one role in a row, a conversation that the assistant begins, empty content, an unknown part, an image outside a user turn.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UserError(
            f"messages: expected a list of {{'role', 'content'}} tables, found {type(messages).__name__}; "
            "wrap one message in a list"
        )
    system: str | None = None
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: expected a table with 'role' and 'content', found {type(message).__name__}")
        role = message.get("role")
        if role == "system":
            if index:
                raise UserError(f"{where}: a system message must be the first message")
            system = _only_text(message, where)
        elif role == "user" or role == "assistant":
            if turns and turns[-1].role == role:
                raise UserError(
                    f"{where}: two {role} messages in a row; user and assistant must alternate, so join them into one"
                )
            if not turns and role == "assistant":
                raise UserError(
                    f"{where}: the conversation begins with an assistant message; the user must speak first"
                )
            turns.append(_parse_turn(role, message, where))
        else:
            raise UserError(f"{where}: unknown role {role!r}; the roles are 'system', 'user' and 'assistant'")
    if not turns:
        raise UserError("messages: no user message; expected at least one {'role': 'user', 'content': …}")
    return Conversation(system, tuple(turns))


def _parse_turn(role: Role, message: Mapping[str, Any], where: str) -> Turn:
    ids = message.get("ids")
    if ids is not None:
        if role != "assistant":
            raise UserError(f"{where}: only an assistant message may have 'ids', the token ids of its answer")
        return Turn(role, (), _parse_ids(ids, where))
    parts = _parse_parts(message, where)
    if role == "assistant" and any(isinstance(part, ImageSource) for part in parts):
        raise UserError(f"{where}: an assistant message cannot hold an image; move it to a user message")
    return Turn(role, parts)


def _parse_ids(ids: Any, where: str) -> tuple[int, ...]:
    try:
        values = tuple(operator.index(token) for token in ids)
    except TypeError:
        raise UserError(f"{where}: 'ids' must be a list of integers, found {ids!r:.80}") from None
    return values


def _only_text(message: Mapping[str, Any], where: str) -> str:
    parts = _parse_parts(message, where)
    if any(isinstance(part, ImageSource) for part in parts):
        raise UserError(f"{where}: a system message cannot hold an image; move it to a user message")
    return "\n".join(str(part) for part in parts)


def _parse_parts(message: Mapping[str, Any], where: str) -> tuple[str | ImageSource, ...]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"{where}: 'content' must be a string or a list of parts, found {type(content).__name__}")
    parts = [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    kept = tuple(part for part in parts if part)
    if not kept:
        raise UserError(f"{where}: empty content; write some text or add an image")
    return kept


def _parse_part(part: Any, where: str) -> str | ImageSource:
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: expected a part such as {{'type': 'text', 'text': …}}, found {type(part).__name__}")
    match part.get("type"):
        case "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise UserError(f"{where}: a text part needs 'text': str, found {type(text).__name__}")
            return _encodable(text.strip(), where)
        case "image":
            value = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
            if value is None and isinstance(text := part.get("base64"), str):
                value = text if text.startswith("data:") else f"data:;base64,{''.join(text.split())}"
        case "image_url":
            value = part.get("image_url")
            value = value.get("url") if isinstance(value, Mapping) else value
        case kind:
            raise UserError(f"{where}: unknown part type {kind!r}; the types are 'text', 'image' and 'image_url'")
    if value is None:
        raise UserError(
            f"{where}: the part holds no image; give 'image': path, PIL image or array, "
            "or 'image_url': {'url': path or data: URI}"
        )
    return ImageSource(value, where)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text is no valid Unicode ({error.reason} at character {error.start})") from None
    return text
