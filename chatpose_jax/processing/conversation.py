"""Checks the messages of a user, and holds the templates that turn them into one prompt.

Messages are those of OpenAI's chat API and of transformers: ``{"role": …, "content": str | [parts]}``. A part is
``{"type": "text", "text": str}``, ``{"type": "image", "image": path | bytes | PIL image | array}`` (transformers also
writes ``"path"``, ``"url"`` or ``"base64"`` for the key) or ``{"type": "image_url", "image_url": {"url": path or data:
URI}}``.

For training there are rows of plain text too: a single message of the role "text". Of a template only the beginning stands before it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, one_line

POSE = "<POSE>"
"""Stands for a pose in every text that a user sees or writes. The token in the vocabulary may have another name."""

Role = Literal["user", "assistant", "text"]


@dataclasses.dataclass(frozen=True)
class Template:
    """What stands around the turns of a conversation, as literal texts in which ``control`` tokens may occur::

        {begin}{system_turn}{user_turn}{answer}It is <POSE>.{end}{after}{user_turn}{answer}

    A prompt ends with ``answer``. Only ``end`` is learnt, with the answer before it.

    system: the system text of a conversation that brings none; None: such a conversation has no system turn.
    begin: stands before everything.
    system_turn: contains ``{system}``.
    user_turn: contains ``{content}``, the texts and images of a message in order, each on a new line; or ``{images}`` and ``{text}``, its images
        and then its texts.
    answer: stands before an answer.
    past: stands before all answers but the newest, if that is not ``answer``. Then a prompt does not begin with the prompt before it and its answer.
    end: the control token that ends an answer.
    after: stands between ``end`` and the next turn.
    control: the control tokens among these texts. Each is one id. In the texts of a conversation their names are ordinary characters.
    """

    system: str | None
    system_turn: str
    user_turn: str
    answer: str
    end: str
    control: tuple[str, ...]
    begin: str = ""
    after: str = ""
    past: str | None = None

    def __post_init__(self) -> None:
        check_types(self, "template")
        if "{system}" not in self.system_turn:
            raise UserError(f"template.system_turn={self.system_turn!r}: expected {{system}} in it")
        if "{content}" not in self.user_turn and not ("{images}" in self.user_turn and "{text}" in self.user_turn):
            raise UserError(
                f"template.user_turn={self.user_turn!r}: expected {{content}} in it, or {{images}} and {{text}}"
            )
        if self.end not in self.control:
            raise UserError(f"template.end={self.end!r}: expected one of template.control, {', '.join(self.control)}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Template:
        """The inverse of ``dataclasses.asdict``. It also reads the three fields of earlier versions: system, user and assistant of Vicuna v1.

        Raises TypeError for other fields, UserError for their values.
        """
        if "user_turn" not in data:
            return vicuna(**data)
        return cls(**{**data, "control": tuple(data["control"])})

    def pieces(self, conversation: Conversation, add_generation_prompt: bool) -> Iterator[Piece]:
        """The conversation in the order in which a model reads it: texts, control tokens, images, and turns of the assistant, which ``end`` ends."""
        turns = conversation.turns
        system = self.system if conversation.system is None else conversation.system
        yield from self._filled(self.begin)
        if turns[0].role == "text":
            yield turns[0]
            return
        if system is not None:
            yield from self._filled(self.system_turn, system=[system])
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                yield turn
                continue
            images = [part for part in turn.parts if isinstance(part, ImageSource)]
            texts = [part for part in turn.parts if isinstance(part, str)]
            yield from self._filled(self.after if index else "")
            yield from self._filled(self.user_turn, content=_lines(turn.parts), images=images, text=_lines(texts))
            if add_generation_prompt or index + 1 < len(turns):
                newest = self.past is None or index + 2 >= len(turns)
                yield from self._filled(self.answer if newest else self.past or "")

    def render(self, conversation: Conversation, add_generation_prompt: bool, image: str = "<image>") -> str:
        """The conversation as one text, with ``image`` for each image. For reports and comparisons: a model never reads it."""
        shown = []
        for piece in self.pieces(conversation, add_generation_prompt):
            match piece:
                case Control(name):
                    shown.append(name)
                case Turn():
                    shown += [piece.text] if piece.role == "text" else [piece.text, self.end]
                case ImageSource():
                    shown.append(image)
                case _:
                    shown.append(piece)
        return "".join(shown)

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        names = ["{system}", "{content}", "{images}", "{text}", *self.control]
        return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    def _filled(self, literal: str, **fields: Iterable[Piece]) -> Iterator[Piece]:
        """A literal text with its control tokens found and its fields filled in. What is filled in is not looked at."""
        for part in self._marks.split(literal):
            if part in self.control:
                yield Control(part)
            elif part[1:-1] in fields and self._marks.fullmatch(part):
                yield from fields[part[1:-1]]
            elif part:
                yield part


def vicuna(system: str, user: str = "USER", assistant: str = "ASSISTANT") -> Template:
    """Vicuna v1 as LLaVA-1.5 uses it (its conversation mode "v1": separators " " and "</s>"): ``{system} USER: question ASSISTANT: answer</s>``."""
    return Template(
        system=system or None,
        begin="<s>",
        system_turn="{system} ",
        user_turn=f"{user}: {{content}}",
        answer=f" {assistant}:",
        end="</s>",
        control=("<s>", "</s>"),
    )


def _llama3(system: str | None, head: str) -> Template:
    def turn(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    return Template(
        system=system,
        begin="<|begin_of_text|>",
        system_turn=turn("system", head + "{system}<|eot_id|>"),
        user_turn=turn("user", "{content}<|eot_id|>"),
        answer=turn("assistant", ""),
        end="<|eot_id|>",
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )


_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_CHATML = Template(
    system=None,
    system_turn="<|im_start|>system\n{system}<|im_end|>\n",
    user_turn="<|im_start|>user\n{content}<|im_end|>\n",
    answer="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    control=("<|im_start|>", "<|im_end|>"),
)
# Llama 3.2's own template writes the date of the day. Ids must not depend on it, so this is the date in Llama 3.1's, which is fixed.
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

TEMPLATES: dict[str, Template] = {
    "vicuna_v1": vicuna(_SYSTEM.format("user")),  # what LLaVA-1.5 was tuned with
    "llava_v1": vicuna(_SYSTEM.format("human")),  # what LISA and its descendants choose
    "plain": vicuna("A chat about human poses."),  # short, for small models
    "llama3": _llama3(None, ""),
    "llama3_1": _llama3("", _DATES),  # Llama 3.1, 3.2 and 3.3: a system turn in every conversation
    "chatml": _CHATML,  # SmolLM2, Qwen2, Qwen2.5, LLaVA-OneVision as its authors train it; each has a system text of its own
    "qwen3": dataclasses.replace(  # without thinking: the newest answer follows an empty thought
        _CHATML,
        past=_CHATML.answer,
        answer=_CHATML.answer + "<think>\n\n</think>\n\n",
        control=(*_CHATML.control, "<think>", "</think>"),
    ),
    "llava_onevision": dataclasses.replace(  # as transformers writes it
        _CHATML,
        user_turn="<|im_start|>user {images}\n{text}<|im_end|>",
        system_turn="<|im_start|>system \n{system}<|im_end|>",
        past="<|im_start|>assistant \n",
        after="",
    ),
}


def template(name: str, system: str | None = None) -> Template:
    """The named template, with another default system text where one is given. Raises UserError that lists the names."""
    if name not in TEMPLATES:
        raise UserError(f"no conversation template {name!r}; the templates are {', '.join(TEMPLATES)}")
    return TEMPLATES[name] if system is None else dataclasses.replace(TEMPLATES[name], system=system)


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
    """One checked message of the user or the assistant, or a row of plain text.

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


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token of a template, by its name in the vocabulary."""

    name: str


Piece = str | Control | ImageSource | Turn
"""A part of a conversation as a template lays it out."""


def parse_messages(messages: Sequence[Mapping[str, Any]], empty_answers: bool = False) -> Conversation:
    """Checks ``messages`` and gives them one form. White space around a text is dropped.

    empty_answers: an assistant's message may be empty. A model may have said nothing, and its conversation should go on; no one should train on it.

    Raises UserError, which names the message (``messages[i]``), for: an unknown role, a system message that is not the first, two turns
    of one role in a row, a conversation that the assistant begins, empty content, an unknown part, an image outside a user turn, a message of plain
    text ("text") that is not alone.
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
        elif role == "text":
            if len(messages) > 1:
                raise UserError(
                    f"{where}: plain text must be the only message; text in a conversation has another role"
                )
            turns.append(Turn("text", (_only_text(message, where),)))
        elif role == "user" or role == "assistant":
            if turns and turns[-1].role == role:
                raise UserError(
                    f"{where}: two {role} messages in a row; user and assistant must alternate, so join them into one"
                )
            if not turns and role == "assistant":
                raise UserError(
                    f"{where}: the conversation begins with an assistant message; the user must speak first"
                )
            turns.append(_parse_turn(role, message, where, empty_answers))
        else:
            raise UserError(
                f"{where}: unknown role {role!r}; the roles are 'system', 'user' and 'assistant', or 'text' alone"
            )
    if not turns:
        raise UserError("messages: no user message; expected at least one {'role': 'user', 'content': …}")
    return Conversation(system, tuple(turns))


def _lines(parts: Sequence[str | ImageSource]) -> Iterator[Piece]:
    for index, part in enumerate(parts):
        yield from ("\n", part) if index else (part,)


def _parse_turn(role: Role, message: Mapping[str, Any], where: str, empty_answers: bool) -> Turn:
    ids = message.get("ids")
    if ids is not None:
        if role != "assistant":
            raise UserError(f"{where}: only an assistant message may have 'ids', the token ids of its answer")
        return Turn(role, (), _parse_ids(ids, where))
    parts = _parse_parts(message, where, empty=empty_answers and role == "assistant")
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
        raise UserError(f"{where}: a {message['role']} message cannot hold an image; move it to a user message")
    return "\n".join(str(part) for part in parts)


def _parse_parts(message: Mapping[str, Any], where: str, empty: bool = False) -> tuple[str | ImageSource, ...]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"{where}: 'content' must be a string or a list of parts, found {type(content).__name__}")
    parts = [_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    kept = tuple(part for part in parts if part)
    if not kept and not empty:
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
