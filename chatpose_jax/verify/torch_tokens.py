"""Ids by the source's own tokenizer and chat template, as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.weights.templates import VALUES

TEXTS = (
    "Show me someone who kneels.",
    "The left arm (bent at 90°) isn't near the body -- naïve, 我, é, 🙂\n\tbrown fox_jumps; Zürich?",
    "In 2023 and 1999: 3.5 m, 12 345 steps.",
)
_ASKED: tuple[Mapping[str, str], ...] = (
    {"role": "user", "content": "How does one squat?"},
    {"role": "assistant", "content": "Knees bent, hips low."},
    {"role": "user", "content": "And on 1 leg?"},
)
CONVERSATIONS = (_ASKED[:1], _ASKED, ({"role": "system", "content": "Answer in 12 words."}, *_ASKED))


class TorchTokens:
    """The tokenizer of a folder. Raises UserError if transformers cannot read it."""

    def __init__(self, folder: Path):
        import transformers

        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # transformers raises anything for files that it does not expect
            raise UserError(f"{folder}: transformers cannot read the tokenizer: {error}") from None

    def text(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """The ids of a prompt by the chat template; None if there is none, or if it takes no system message."""
        if not self.tokenizer.chat_template:
            return None
        parts = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        for form in (list(messages), parts):  # templates of processors take lists of parts
            try:
                words = self.tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True, **VALUES)
            except Exception:  # a template says by an exception what it does not take
                continue
            if all(each["content"] in words for each in messages):
                return list(self.tokenizer(words, add_special_tokens=False)["input_ids"])
        return None
