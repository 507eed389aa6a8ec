"""The tokenizer in the metadata of a GGUF file, as the files that transformers would have for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.weights.readers.gguf_file import Value, shown

# Types of tokens in llama.cpp.
_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "▁"
_LONGEST = 256
"""Largest number of characters of a token. Merges are found by trying every place to cut one."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(split: bool) -> dict[str, Any]:
    """split: also split the text into words, as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split}


def _words(digits: str) -> list[dict[str, Any]]:
    """The steps of Llama 3 and Qwen2, which differ in how they split numbers."""
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_REST}"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = {"steps": _words(r"\p{N}{1,3}"), "ignore_merges": True, "add_bos": True}
# ``tokenizer.ggml.pre`` → how the text is split before merges apply, as the tokenizer.json of the models with this name says.
_PRE: dict[str, dict[str, Any]] = {
    "gpt-2": {"steps": [_byte_level(True)]},
    "smollm": {"steps": [_DIGITS, _byte_level(True)]},
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": {"steps": _words(r"\p{N}"), "normalizer": {"type": "NFC"}},
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_files(path: Path, metadata: Mapping[str, Value]) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` (if there is one): name → content.

    Raises UserError for a kind of tokenizer or a splitting of the text that this program does not know, and for lists that contradict each other.
    """
    return _Tokenizer(path, metadata).files()


class _Tokenizer:
    def __init__(self, path: Path, metadata: Mapping[str, Value]):
        self.path, self.metadata = path, metadata
        self.tokens = self._texts("tokens")
        kinds = metadata.get("tokenizer.ggml.token_type")
        self.kinds = [1] * len(self.tokens) if kinds is None else self._numbers("token_type", len(self.tokens)).tolist()
        if empty := [id for id, token in enumerate(self.tokens) if not token]:
            raise UserError(f"{path}: token {empty[0]} of the vocabulary is empty; the file is damaged")
        # Rows that only pad the embedding to a round size are spare, not tokens.
        while self.kinds and self.kinds[-1] == _UNUSED:
            self.kinds.pop()
            self.tokens.pop()
        self.vocabulary = {token: id for id, token in enumerate(self.tokens)}
        if len(self.vocabulary) < len(self.tokens):
            twice = next(token for id, token in enumerate(self.tokens) if self.vocabulary[token] != id)
            raise UserError(f"{path}: the vocabulary holds the token {shown(twice)} twice; the file is damaged")
        self.special = {name: token for name, key in _SPECIAL.items() if (token := self._special(key)) is not None}

    def files(self) -> dict[str, bytes]:
        kind = self._get("tokenizer.ggml.model")
        if kind not in ("gpt2", "llama"):
            raise UserError(
                f"{self.path}: tokenizer.ggml.model={shown(kind)} is not supported; expected 'gpt2' (byte level) or 'llama' (SentencePiece)"
            )
        fast = self._byte_level() if kind == "gpt2" else self._sentencepiece()
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special,
            "clean_up_tokenization_spaces": False,
        }
        files = {"tokenizer.json": _json(fast), "tokenizer_config.json": _json(settings)}
        template = self._get("tokenizer.chat_template")
        if template is not None:
            files["chat_template.jinja"] = template.encode()
        return files

    def _byte_level(self) -> dict[str, Any]:
        """GPT-2's kind: bytes written as characters, merged in the order of a list."""
        pre = self._get("tokenizer.ggml.pre")
        if pre not in _PRE:
            raise UserError(
                f"{self.path}: tokenizer.ggml.pre={shown(pre)}: it is not known how the text is split; expected one of {', '.join(_PRE)}; "
                "name a folder with the model's own tokenizer with --tokenizer"
            )
        rules = _PRE[pre]
        merges = [merge.split(" ") for merge in self._texts("merges")]
        for merge in merges:
            if len(merge) != 2 or not all(piece in self.vocabulary for piece in (*merge, "".join(merge))):
                raise UserError(
                    f"{self.path}: the merge {shown(' '.join(merge))} is not of two tokens into one; the file is damaged"
                )
        steps = rules["steps"]
        model = {
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.get("ignore_merges", False),
        }
        return self._fast(
            model,
            merges,
            normalizer=rules.get("normalizer"),
            pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
            post_processor=self._bos(rules.get("add_bos", False)) or _byte_level(True),
            decoder=_byte_level(True) | {"add_prefix_space": True},
        )

    def _sentencepiece(self) -> dict[str, Any]:
        """LLaMA's kind: characters, and bytes for those without a token, merged in the order of scores."""
        for key, allowed in (
            ("tokenizer.ggml.add_space_prefix", True),
            ("tokenizer.ggml.remove_extra_whitespaces", False),
            ("tokenizer.ggml.precompiled_charsmap", None),
        ):
            value = self.metadata.get(key, allowed)
            if value is not allowed:
                raise UserError(f"{self.path}: {key}={shown(value)} is not supported; expected {allowed!r}")
        if "unk_token" not in self.special and _UNKNOWN in self.kinds:
            self.special["unk_token"] = self.tokens[self.kinds.index(_UNKNOWN)]
        scores = dict(zip(self.tokens, self._numbers("scores", len(self.tokens)).tolist(), strict=False))
        merged = {
            token: scores[token]
            for token, kind in zip(self.tokens, self.kinds)
            if kind not in (_UNKNOWN, _CONTROL, _USER, _BYTE)
        }
        if longest := [token for token in merged if len(token) > _LONGEST]:
            raise UserError(f"{self.path}: a token of {len(longest[0])} characters; expected {_LONGEST} at most")
        merges = [
            [piece[:cut], piece[cut:]]
            for piece in sorted(merged, key=lambda piece: (-merged[piece], len(piece)))
            for cut in range(1, len(piece))
            if piece[:cut] in merged and piece[cut:] in merged
        ]
        model = {
            "unk_token": self.special.get("unk_token"),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
        }
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        return self._fast(
            model,
            merges,
            normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, replace]},
            pre_tokenizer=None,
            post_processor=self._bos(True),
            decoder={
                "type": "Sequence",
                "decoders": [
                    restore,
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
        )

    def _fast(self, model: Mapping[str, Any], merges: Sequence[Sequence[str]], **rules: Any) -> dict[str, Any]:
        """``tokenizer.json``. Every token is in the vocabulary, so that each keeps its id; control tokens are added tokens besides."""
        special = {self.vocabulary[token] for token in self.special.values()}
        kinds = {id: kind for id, kind in enumerate(self.kinds) if kind in (_UNKNOWN, _CONTROL, _USER) or id in special}
        added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": id, "content": self.tokens[id], **added, "special": kind != _USER} for id, kind in kinds.items()
            ],
            **rules,
            "model": {
                "type": "BPE",
                "dropout": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                **model,
                "vocab": self.vocabulary,
                "merges": merges,
            },
        }

    def _bos(self, default: bool) -> dict[str, Any] | None:
        """The step that puts BOS before a text, if the file wants one."""
        adds = self.metadata.get("tokenizer.ggml.add_bos_token", default)
        bos = self.special.get("bos_token")
        if self.metadata.get("tokenizer.ggml.add_eos_token", False) is not False:
            raise UserError(f"{self.path}: tokenizer.ggml.add_eos_token=True is not supported; expected False")
        if adds is not True or bos is None:
            return None
        first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, *second],
            "special_tokens": {bos: {"id": bos, "ids": [self.vocabulary[bos]], "tokens": [bos]}},
        }

    def _special(self, key: str) -> str | None:
        name = f"tokenizer.ggml.{key}_token_id"
        id = self.metadata.get(name)
        if id is None:
            return None
        if type(id) is not int or not 0 <= id < len(self.tokens):
            raise UserError(
                f"{self.path}: {name}={shown(id)}; expected one of the {len(self.tokens)} tokens; the file is damaged"
            )
        return self.tokens[id]

    def _get(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.path}: {key}={shown(value)}; expected text")
        return value

    def _texts(self, name: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list):
            what = "nothing" if value is None else shown(value)
            raise UserError(
                f"{self.path}: tokenizer.ggml.{name} holds {what}; expected a list of texts; name a folder with the tokenizer with --tokenizer"
            )
        return list(value)

    def _numbers(self, name: str, count: int) -> np.ndarray:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, np.ndarray) or len(value) < count or not np.isfinite(value).all():
            what = f"{len(value)} values" if isinstance(value, np.ndarray) else "no numbers"
            raise UserError(
                f"{self.path}: tokenizer.ggml.{name} holds {what}; expected a number for each of the {count} tokens"
            )
        return value


def _json(data: Any) -> bytes:
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()
