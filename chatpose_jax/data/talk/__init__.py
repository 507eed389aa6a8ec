"""Questions and texts for a model that talks: what it practises on, and what it is tested with.

``questions``: general questions to practise on. ``held_out``: general questions of the test. ``ask_pose``, ``ask_words``: a mixed test of messages
that want a pose and of messages that want words, many of them about bodies. ``openings``: first words of texts, for a model to continue.
``plain``: paragraphs of plain English, for the test. No line is in two of them.
"""

from __future__ import annotations

from importlib import resources
from typing import Literal

Name = Literal["questions", "held_out", "ask_pose", "ask_words", "openings", "plain"]


def texts(name: Name) -> list[str]:
    """The texts of a file: one a line, without empty lines."""
    content = (resources.files("chatpose_jax.data.talk") / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line]
