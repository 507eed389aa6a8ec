"""Chat templates of strangers: what they give, and that a hostile one ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.weights.render_templates import render
from chatpose_jax.weights.templates import choose_template
from chatpose_jax.weights.tokens import tokens_of

from ..byte_level import files

ASKED = [[{"role": "user", "content": "Hi"}], [{"role": "system", "content": "S"}]]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


def test_texts_and_errors() -> None:
    text = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    first, second = render(text, ASKED, {"bos_token": "<s>"})
    assert first == "<s>Hi"
    assert isinstance(second, ValueError) and str(second) == "TemplateError: no"


def test_an_endless_template_ends() -> None:
    held = tokens_of({**files("smollm2"), "chat_template.jinja": LOOP.encode()}, Path("somewhere"))
    with pytest.raises(
        UserError, match=r"somewhere: .* cannot be compared: it was ended .*5 seconds of processor.*--ignore"
    ):
        choose_template(held, "chatml")


def test_a_template_cannot_fill_the_memory() -> None:
    [found] = render("{{ 'x' * 10 ** 11 }}", ASKED[:1], {})
    assert isinstance(found, ValueError) and "MemoryError" in str(found)
