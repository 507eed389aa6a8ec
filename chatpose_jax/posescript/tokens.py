"""Texts become token ids: by a vocabulary of words, as in PoseScript's paper, or by DistilBERT's word pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.words import word_tokens

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
"""The first words of a vocabulary, in this order."""
MOST = 500
"""Most tokens of a text, start and end included. Later words are left out."""


class TextTokens(Protocol):
    """Makes token ids. ``len`` is the number of ids."""

    def __len__(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(T,) int32 for each text; 0 is the padding."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the one file from which ``load`` makes an equal object."""
        ...


class WordVocabulary:
    """Words and their ids: ``SPECIAL``, then others. A text is split as NLTK's ``word_tokenize`` splits it in small letters (``words``).

    Raises UserError for words that do not begin with ``SPECIAL``, or that are there twice.
    """

    FILE = "vocabulary.json"

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        self.ids = {word: number for number, word in enumerate(self.words)}
        if self.words[: len(SPECIAL)] != SPECIAL or len(self.ids) < len(self.words):
            raise UserError(f"a vocabulary must begin with {', '.join(SPECIAL)} and have no word twice")

    @classmethod
    def of(cls, texts: Iterable[str], least: int = 1) -> WordVocabulary:
        """The words that are in the texts at least so often, in the order of their first appearance."""
        counts: dict[str, int] = {}
        for text in texts:
            for word in word_tokens(text.lower()):
                counts[word] = counts.get(word, 0) + 1
        return cls((*SPECIAL, *(word for word, count in counts.items() if count >= least and word not in SPECIAL)))

    @classmethod
    def load(cls, folder: Path) -> WordVocabulary:
        """Reads ``save``. Raises UserError."""
        path = folder / cls.FILE
        try:
            words = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected a vocabulary, a JSON list of words ({error})") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{path}: expected a vocabulary, a JSON list of words")
        return cls(words)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(self.words, ensure_ascii=False) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        start, end, unknown = (SPECIAL.index(name) for name in ("<start>", "<end>", "<unk>"))
        return [
            np.array(
                [start, *(self.ids.get(word, unknown) for word in word_tokens(text.lower())[: MOST - 2]), end], np.int32
            )
            for text in texts
        ]


class WordPieces:
    """The tokenizer of DistilBERT, from a folder with ``tokenizer.json``. Texts of more than ``most`` tokens are cut before the last one."""

    FILE = "tokenizer.json"

    def __init__(self, tokenizer: Tokenizer, most: int = 512) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(most)

    @classmethod
    def load(cls, folder: Path, most: int = 512) -> WordPieces:
        """Raises UserError where the file is not there, or is no tokenizer."""
        path = folder / cls.FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; the tokenizer of distilbert-base-uncased is expected there")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{path}: expected a tokenizer of the library tokenizers ({error})") from None
        if tokenizer.token_to_id("[PAD]") != 0:
            raise UserError(f"{path}: expected the token [PAD] with the id 0, found {tokenizer.token_to_id('[PAD]')}")
        return cls(tokenizer, most)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / self.FILE))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(found.ids, np.int32) for found in self.tokenizer.encode_batch(list(texts))]


def pad(tokens: Sequence[np.ndarray], multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as (N, T) int32 with zeros at the end, T a multiple, so that few programs are compiled; and their lengths (N,) int32."""
    lengths = np.array([len(each) for each in tokens], np.int32)
    width = -(-int(lengths.max(initial=1)) // multiple) * multiple
    ids = np.zeros((len(tokens), width), np.int32)
    for row, each in zip(ids, tokens):
        row[: len(each)] = each
    return ids, lengths
