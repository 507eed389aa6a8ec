"""Make the embedded tokenizer of the preset ``tiny`` again: ``python tools/tiny_tokenizer.py``.

It learns from the conversations of the generated training split. After a change of captions or questions the file may
be made anew, but checkpoints trained with the old one need the old one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatpose_jax.data.synthetic import questions
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.processing.train_tokenizer import tokens_a_word, write_tokenizer_files

OUT = Path(__file__).parent.parent / "chatpose_jax" / "processing" / "data" / "tiny_tokenizer"
# Tasks without an image: what is asked about images is added from the lists, so none has to be drawn.
WORDS_ONLY = {"text": 18, "text_short": 4, "situation": 6, "text_turns": 7, "words": 15}


def texts(split: str, size: int) -> Iterator[str]:
    """Questions and answers as the tokenizer meets them: behind a space, or at a line's start after an image."""
    for example in SyntheticDataset(split, size, tasks=WORDS_ONLY):  # type: ignore[arg-type]
        for message in example.messages:
            yield from (f" {stretch.strip()}" for stretch in message["content"].split(POSE))


def about_images() -> Iterator[str]:
    for question in (*questions.IMAGE_TO_POSE, *questions.DESCRIBE, *questions.SUMMARISE, *questions.ARMS):
        yield from 300 * [f"\n{question}"]


def main() -> None:
    def corpus() -> Iterator[str]:
        yield from texts("train", 8000)
        yield from about_images()

    tokenizer = write_tokenizer_files(corpus(), OUT)
    ratio = tokens_a_word(tokenizer, texts("val", 500))
    print(f"{OUT.name}: {tokenizer.size} rows, {ratio:.2f} tokens a word of the validation split")


if __name__ == "__main__":
    main()
