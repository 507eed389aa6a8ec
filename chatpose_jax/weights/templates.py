"""The conversation template of a conversion: the family's, checked against the checkpoint's own ``chat_template``."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import TEMPLATES, Template, parse_messages
from chatpose_jax.processing.conversation import template as named_template
from chatpose_jax.processing.processor import SETTINGS_FILE
from chatpose_jax.processing.tokenizer import FAST, RELEASED_POSE, SETTINGS, named_token
from chatpose_jax.settings import one_line
from chatpose_jax.weights.readers import read_json_object
from chatpose_jax.weights.render_templates import render
from chatpose_jax.weights.tokens import Tokens

_SYSTEM, _IMAGE = "Answer in one sentence.", "<image>"
_ASKED = ("How does one squat?", "And on one leg?", "Which is harder?")
_ANSWERED = ("Knees bent, hips low.", "The same, with the other leg stretched forward.")
_SHOWN = 60
"""Characters of each text that an error shows from shortly before the first difference on."""
_OWN = "the family's own"
VALUES = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What templates may ask beside the messages: no thinking (Qwen3), and the date that ``llama3_1`` writes."""


@dataclasses.dataclass(frozen=True)
class ChosenTemplate:
    """template: of the conversion. name: its row of ``TEMPLATES``, or where it was read. notes: for the user."""

    template: Template
    name: str
    notes: tuple[str, ...] = ()

    __repr__ = one_line


def choose_template(
    tokens: Tokens,
    default: str | Template,
    system: str | None = None,
    *,
    named: str | None = None,
    check: bool = True,
    images: bool = True,
) -> ChosenTemplate:
    """The template of a conversion: ``named``, or what ``processor.json`` beside the tokenizer says, or else the default of the checkpoint's family.

    The checkpoint's own ``chat_template`` must give the same texts. Where it does not, and none is named, the first of ``TEMPLATES`` that does is
    taken. A default system text of the checkpoint replaces that of the family.

    Args:
        tokens: the tokenizer, with its files.
        default, system: the family's template, or its name, and its default system text, if that is not the template's.
        named: a name of ``TEMPLATES``.
        check: compare with ``chat_template``.
        images: whether the model takes images.

    Raises:
        UserError, which names the tokenizer: control tokens of the template that the tokenizer lacks; a ``chat_template`` that differs, cannot be
        rendered, or does not end.
    """
    try:
        return _choose(tokens, default, system, named, check, images)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{tokens.folder}: the template in the tokenizer's files is not as transformers or this program writes it "
            f"({type(error).__name__}: {error}); fetch them again"
        ) from None


def _choose(
    tokens: Tokens, default: str | Template, system: str | None, named: str | None, check: bool, images: bool
) -> ChosenTemplate:
    where = tokens.folder
    if named is None and SETTINGS_FILE in tokens.files:
        stored = json.loads(tokens.files[SETTINGS_FILE]).get("template")
        if stored is not None:
            return ChosenTemplate(Template.from_json(stored), SETTINGS_FILE)
    if named is None and RELEASED_POSE in tokens.control:
        default, system = "llava_v1", None
    if named is not None:
        first, template = named, named_template(named, system if named == default else None)
    elif isinstance(default, str):
        first, template = default, named_template(default, system)
    else:
        first, template = _OWN, default
    candidates = {first: template}
    if named is None:
        candidates |= {name: other for name, other in TEMPLATES.items() if name not in candidates}
    fitting = {name: each for name, each in candidates.items() if not _absent(tokens, each)}
    text = chat_template(tokens.files) if check else None
    if first not in fitting and (text is None or not fitting):
        others = [name for name, other in TEMPLATES.items() if not _absent(tokens, other)]
        raise UserError(
            f"{where}: the template {first!r} needs the control token {_absent(tokens, candidates[first])[0]!r}, which the tokenizer lacks; "
            f"{'leave --template out' if named else 'choose a template with --template'}; those whose tokens it has: {', '.join(others) or 'none'}"
        )
    if text is None:
        return ChosenTemplate(candidates[first], first)
    theirs = _Theirs(tokens, text, images)
    differences = {}
    for name, each in fitting.items():
        found = theirs.compare(name, each)
        if isinstance(found, ChosenTemplate):
            return found
        differences[name] = found
    name, difference = next(iter(differences.items()))
    if named:
        advice = "Leave --template out, or go on without the comparison: --ignore-chat-template"
    else:
        advice = (
            f"So do all others whose tokens it has. Choose one with --template ({', '.join(fitting)}), and go on without the comparison: "
            "--ignore-chat-template"
        )
    raise UserError(f"{where}: the checkpoint's chat_template and the template {name!r} differ: {difference}. {advice}")


def write_template(folder: Path, template: Template) -> None:
    """Writes a template into ``processor.json`` of a tokenizer's folder. Its other keys stay."""
    file = folder / SETTINGS_FILE
    data = read_json_object(file) if file.is_file() else {}
    data["template"] = dataclasses.asdict(template)
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """The chat template among a tokenizer's files, in the order in which transformers looks for it; the one named "default" of several."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    for name in ("chat_template.json", SETTINGS):
        found = json.loads(files[name]).get("chat_template") if name in files else None
        if isinstance(found, list):
            found = {each.get("name"): each.get("template") for each in found}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def _absent(tokens: Tokens, template: Template) -> list[str]:
    return [name for name in template.control if name not in tokens.control]


class _Theirs:
    """What a checkpoint's chat template makes of a set of conversations."""

    def __init__(self, tokens: Tokens, text: str, images: bool):
        self.tokens = tokens
        asked = {
            "one question": _messages(1),
            "a system message and a question": _messages(1, system=True),
            "three questions": _messages(3),
            "a system message and three questions": _messages(3, system=True),
        }
        if images:
            asked |= {"an image": _messages(1, image=True), "an image and three questions": _messages(3, image=True)}
        special = ("bos_token", "eos_token", "pad_token", "unk_token")
        values = {key: name for key in special if (name := named_token(tokens.files, key)) is not None}
        # Templates of texts take a string, those of processors a list of parts.
        forms = [(name, form) for name, messages in asked.items() for form in (_plain(messages), messages) if form]
        try:
            rendered = render(text, [form for _, form in forms], {**values, **VALUES})
        except UserError as error:
            raise UserError(
                f"{tokens.folder}: the checkpoint's chat_template cannot be compared: {error}. Choose a template with --template "
                f"({', '.join(TEMPLATES)}) and --ignore-chat-template"
            ) from None
        self.asked, self.texts, self.errors = asked, dict[str, str](), dict[str, str]()
        for (name, _), found in zip(forms, rendered):
            if isinstance(found, Exception):
                self.errors.setdefault(name, str(found))
            elif name not in self.texts and _complete(found, asked[name]):
                self.texts[name] = found

    def compare(self, name: str, template: Template) -> ChosenTemplate | str:
        """The template with the checkpoint's default system text, or the first difference in words."""
        if "one question" not in self.texts:
            error = self.errors.get("one question", "the question is not in what it gives")
            return f"the chat_template gives nothing for one question ({error})"
        template, compared, notes = self._with_their_system(name, template)
        unknown = [what for what in self.asked if what not in self.texts]
        for what, theirs in self.texts.items():
            messages = self.asked[what]
            if self._ends_no_answer(theirs, messages):
                unknown.append(what)
                continue
            theirs, ours = self._begun(template, theirs), _rendered(compared, messages)
            if ours != theirs:
                return _difference(what, theirs, ours)
        if unknown:
            notes.append(
                f"the checkpoint's chat_template was not compared for {', '.join(unknown)}: it does not know these"
            )
        return ChosenTemplate(template, name, tuple(notes))

    def _with_their_system(self, name: str, template: Template) -> tuple[Template, Template, list[str]]:
        """The template with the checkpoint's default system text; what to compare without a system message; notes."""
        question = self.asked["one question"]
        theirs = self._begun(template, self.texts["one question"])
        if _rendered(template, question) == theirs:
            return template, template, []
        before, _, after = _rendered(template, self.asked["a system message and a question"]).partition(_SYSTEM)
        said = theirs.removeprefix(before).removesuffix(after)
        if len(before) + len(said) + len(after) == len(theirs) and not any(
            each in said for each in self.tokens.control
        ):
            own = dataclasses.replace(template, system=said)
            return own, own, [f"the default system text is the checkpoint's: {said!r:.200}"]
        silent = dataclasses.replace(template, system=None)
        if _rendered(silent, question) != theirs:
            return template, template, []
        if name not in TEMPLATES or TEMPLATES[name].system is None:
            return silent, silent, []
        return (
            template,
            silent,
            [f"the chat_template has no default system text; {name!r} has one, with which its models were tuned"],
        )

    def _begun(self, template: Template, theirs: str) -> str:
        """A text with the BOS that the tokenizer writes before it, where the template leaves that to it."""
        fast = json.loads(self.tokens.files.get(FAST, b"{}"))
        writes = not self.tokens.byte_level or template.begin in json.dumps(
            fast.get("post_processor"), ensure_ascii=False
        )
        return template.begin + theirs if writes and not theirs.startswith(template.begin) else theirs

    def _ends_no_answer(self, theirs: str, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a past answer is followed by no control token. A model that was tuned so would never end, so the template is not made for more
        than one question (LLaVA-1.5's for transformers)."""
        if len(messages) < 3:
            return False
        between = theirs.partition(_ANSWERED[0])[2].partition(_ASKED[1])[0]
        return not any(name in between for name in self.tokens.control)


def _messages(questions: int, system: bool = False, image: bool = False) -> list[dict[str, Any]]:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    answers = [message("assistant", text) for text in _ANSWERED]
    asked = [message("user", text) for text in _ASKED[:questions]]
    turns = [turn for pair in itertools.zip_longest(asked, answers[: questions - 1]) for turn in pair if turn]
    if image:
        turns[0]["content"].insert(0, {"type": "image", "image": ""})
    return [message("system", _SYSTEM), *turns] if system else turns


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with strings as contents; empty if there is an image."""
    if any(part["type"] == "image" for message in messages for part in message["content"]):
        return []
    return [{**message, "content": message["content"][0]["text"]} for message in messages]


def _rendered(template: Template, messages: Sequence[Mapping[str, Any]]) -> str:
    return template.render(parse_messages(messages), True, _IMAGE)


def _complete(rendered: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a rendering holds every text and image of the messages."""
    parts = [part for message in messages for part in message["content"]]
    return all((_IMAGE if part["type"] == "image" else part["text"]) in rendered for part in parts)


def _difference(what: str, theirs: str, ours: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
    start = max(0, at - _SHOWN // 3)
    shown = [f"{'…' if start else ''}{text[start : start + _SHOWN]}" for text in (theirs, ours)]
    return f"for {what} the first gives {shown[0]!r}, the second {shown[1]!r}"
