"""The template of a conversion agrees with the checkpoint's own, or an error shows both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import TEMPLATES, vicuna
from chatpose_jax.processing.processor import tiny_tokenizer
from chatpose_jax.processing.tokenizer import json_bytes
from chatpose_jax.weights import templates
from chatpose_jax.weights.render_templates import rendered
from chatpose_jax.weights.templates import ChosenTemplate, choose_template
from chatpose_jax.weights.tokens import Tokens, tokens_of

from ..byte_level import files

# Chat templates in the words of this test, which give the texts of the families' own.
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nI am Q.<|im_end|>\n{% endif %}"
THINKING = ASK.replace("assistant\n", "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")
HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}" + HEADER + "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATES = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% set said = '' %}{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
)
LLAMA3_1 = DATES + LLAMA3.replace(
    "{% for",
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{ said }}<|eot_id|>"
    "{% for",
)
PARTS = "{% for p in m.content if p.type == 'image' %}{{ IMAGE }}{% endfor %}{% for p in m.content if p.type == 'text' %}{{ TEXT }}{% endfor %}"
ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    + PARTS.replace("IMAGE", "'<image>'").replace("TEXT", "'\n' + p.text")
    + "<|im_end|>{% endfor %}"
    + ASK
)
LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    + PARTS.replace("IMAGE", "'<image>\n'").replace("TEXT", "p.text + ' '")
    + "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders in this process, which is faster."""

    def render_here(template: str, conversations: Any, values: Mapping[str, Any]) -> list[str | Exception]:
        answers = rendered({"template": template, "conversations": conversations, "values": values})
        return [each["text"] if "text" in each else ValueError(each["error"]) for each in answers]

    monkeypatch.setattr(templates, "render", render_here)


def tokens(kind: str, template: str | None, **more: Any) -> Tokens:
    said = {} if template is None else {"chat_template.jinja": template.encode()}
    base = dict(tiny_tokenizer().files) if kind == "tiny" else files(kind, pose=False, **more)
    return tokens_of({**base, **said}, Path("somewhere"))


def chosen(kind: str, template: str | None, *args: Any, **options: Any) -> ChosenTemplate:
    return choose_template(tokens(kind, template), *args, **{"images": False, **options})


@pytest.mark.parametrize(
    ("kind", "text", "default", "name"),
    [
        ("smollm2", TURNS + ASK, "chatml", "chatml"),
        ("qwen", TURNS + THINKING, "qwen3", "qwen3"),
        ("llama3", LLAMA3, "llama3", "llama3"),
        ("llama3", LLAMA3_1, "llama3_1", "llama3_1"),
        # Another than the family's, if it is the checkpoint's.
        ("qwen", TURNS + ASK, "qwen3", "chatml"),
        ("llama3", LLAMA3_1, "llama3", "llama3_1"),
        ("smollm2", TURNS + ASK, "vicuna_v1", "chatml"),
    ],
)
def test_the_template_that_agrees_is_chosen(kind, text, default, name):
    found = chosen(kind, text, default)
    assert (found.name, found.template, found.notes) == (name, TEMPLATES[name], ())


def test_images_are_compared():
    found = chosen("qwen", ONEVISION, "chatml", "I am Q.", images=True)
    assert (found.name, found.template, found.notes) == ("llava_onevision", TEMPLATES["llava_onevision"], ())
    wrong = ONEVISION.replace("'<image>'", "'<image> '")
    with pytest.raises(UserError, match=r"for an image the first gives .*<image> .*, the second .*<image>"):
        chosen("qwen", wrong, "chatml", images=True, named="llava_onevision")


def test_the_checkpoints_system_text_is_taken():
    for said in (None, "I am someone else."):
        found = chosen("smollm2", DEFAULT + TURNS + ASK, "chatml", said)
        assert found.template == dataclasses.replace(TEMPLATES["chatml"], system="I am Q.")
        assert found.notes == ("the default system text is the checkpoint's: 'I am Q.'",)
    same = chosen("smollm2", DEFAULT + TURNS + ASK, "chatml", "I am Q.")
    assert (same.template.system, same.notes) == ("I am Q.", ())
    none = chosen("smollm2", TURNS + ASK, "chatml", "I am Q.")
    assert none.template.system is None


def test_a_family_may_bring_a_template_of_its_own():
    own = dataclasses.replace(
        TEMPLATES["chatml"], user_turn="<|im_start|>user: {content}<|im_end|>\n", system="I am Q."
    )
    text = TURNS.replace("{{ m.role }}\n", "{{ m.role }}{{ ': ' if m.role == 'user' else '\n' }}") + ASK
    assert chosen("smollm2", DEFAULT + text, own) == ChosenTemplate(own, "the family's own")
    assert chosen("smollm2", text, own).template == dataclasses.replace(own, system=None)
    assert chosen("smollm2", None, own).template == own
    assert chosen("smollm2", TURNS + ASK, own).name == "chatml"


def test_llava_1_5_for_transformers_keeps_its_template():
    """Its chat_template has no system text and does not end answers."""
    found = chosen("tiny", LLAVA, "vicuna_v1", images=True)
    assert (found.name, found.template) == ("vicuna_v1", TEMPLATES["vicuna_v1"])
    silent, unknown = found.notes
    assert silent.startswith("the chat_template has no default system text; 'vicuna_v1' has one")
    assert unknown.endswith("three questions, an image and three questions: it does not know these")


def test_without_a_chat_template_the_familys_is_taken():
    assert chosen("smollm2", None, "chatml", "I am S.").template.system == "I am S."
    assert chosen("tiny", None, "vicuna_v1") == ChosenTemplate(TEMPLATES["vicuna_v1"], "vicuna_v1")
    assert chosen("tiny", None, "vicuna_v1", named="llava_v1").name == "llava_v1"
    with pytest.raises(
        UserError, match=r"'vicuna_v1' needs the control token '<s>', which the tokenizer lacks; .*--template"
    ):
        chosen("smollm2", None, "vicuna_v1")


def test_a_difference_shows_both_texts():
    wrong = TURNS.replace("<|im_end|>\n", "<|im_end|>") + ASK
    with pytest.raises(UserError) as raised:
        chosen("smollm2", wrong, "chatml")
    assert str(raised.value).startswith(
        "somewhere: the checkpoint's chat_template and the template 'chatml' differ: for one question the first gives "
    )
    assert "squat?<|im_end|><|im_start|>assistant" in str(raised.value)
    assert r"squat?<|im_end|>\n<|im_start|>assistant" in str(raised.value)
    assert "--template (chatml" in str(raised.value) and "--ignore-chat-template" in str(raised.value)
    assert "vicuna_v1" not in str(raised.value) and "llama3" not in str(raised.value)  # it lacks their tokens
    assert chosen("smollm2", wrong, "chatml", check=False).name == "chatml"
    with pytest.raises(UserError, match="for three questions"):
        chosen(
            "smollm2", TURNS.replace("m.content", "m.content + (' ' if m.role == 'assistant' else '')") + ASK, "chatml"
        )
    with pytest.raises(UserError, match=r"'llama3' differ.* Leave --template out, or"):  # compared too
        chosen("llama3", LLAMA3_1, "llama3_1", named="llama3")


def test_another_end_of_answers_is_a_difference():
    """Llama 3's with the end of a text instead of the end of a turn."""
    with pytest.raises(UserError, match=r"end_of_text"):
        chosen(
            "llama3",
            LLAMA3.replace("<|eot_id|>", "{{ '<|end_of_text|>' if m.role == 'assistant' else '<|eot_id|>' }}"),
            "llama3",
        )


def test_a_template_without_system_messages():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS + ASK
    found = chosen("smollm2", strict, "chatml")
    assert found.notes == (
        "the checkpoint's chat_template was not compared for a system message and a question, a system message and three questions: "
        "it does not know these",
    )


def test_bos_that_the_tokenizer_writes_itself():
    bare = LLAMA3.replace("{{ bos_token }}", "")
    assert chosen("llama3", bare, "llama3").name == "llama3"  # its tokenizer.json writes BOS
    silent = tokens("llama3", bare)
    data = json.loads(silent.files["tokenizer.json"]) | {"post_processor": None}
    with pytest.raises(UserError, match="differ"):
        choose_template(
            dataclasses.replace(silent, files={**silent.files, "tokenizer.json": json_bytes(data)}),
            "llama3",
            images=False,
        )


@pytest.mark.parametrize(
    "more",
    [
        {"tokenizer_config.json": {"chat_template": LLAMA3_1}},
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA3_1}]
            }
        },
        {"chat_template.json": {"chat_template": LLAMA3_1}, "tokenizer_config.json": {"chat_template": "x"}},
    ],
)
def test_where_chat_templates_lie(more):
    held = files("llama3", pose=False)
    for name, data in more.items():
        held[name] = json_bytes(json.loads(held.get(name, b"{}")) | data)
    assert choose_template(tokens_of(held, Path("x")), "llama3", images=False).name == "llama3_1"


def test_processor_json_has_the_last_word():
    own = vicuna("Own.")
    said = {"processor.json": json_bytes({"template": dataclasses.asdict(own)})}
    held = tokens_of({**tiny_tokenizer().files, **said, "chat_template.jinja": b"other"}, Path("x"))
    assert choose_template(held, "chatml").template == own
    old = {"processor.json": json_bytes({"template": {"system": "Own.", "user": "USER", "assistant": "ASSISTANT"}})}
    assert choose_template(dataclasses.replace(held, files={**held.files, **old}), "chatml").template == own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("processor.json", b"{"),
        ("processor.json", b'{"template": {"user_turn": 1}}'),
        ("processor.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
    ],
)
def test_damaged_files(name, content):
    held = {**files("smollm2", pose=False), name: content}
    with pytest.raises(UserError, match=r"^somewhere: the template in the tokenizer's files is not as "):
        choose_template(tokens_of(held, Path("somewhere")), "chatml")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'x' * 2000000 }}", "ValueError: 2000000 characters"),
        ("{% for %}", "TemplateSyntaxError"),
        ("", "the question is not in what it gives"),
    ],
)
def test_templates_that_give_nothing(text, error):
    with pytest.raises(UserError, match=rf"the chat_template gives nothing for one question \({error}"):
        chosen("smollm2", text, "chatml")
