"""Writes the tokenizer of a model folder or an export, in a format that transformers 4.x and 5.x read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import (
    ADDED,
    ANY_FAST,
    FAST,
    SETTINGS,
    SLOW,
    complete_vocabulary,
    import_transformers,
    json_bytes,
)
from chatpose_jax.weights.tokens import Tokens

_ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
# Keys that transformers 5 writes, and that 4.x does not know or misreads.
_ONLY_IN_5 = ("backend", "is_local", "local_files_only")
_CLASSES_OF_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
# Adds a space before the text unless it has one: as a pre-tokenizer, which tokenizers 0.13 to 0.15 cannot read, and as a
# normalizer, which all versions read.
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
_SPACE_IN_FRONT = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Replace", "pattern": {"Regex": r"\A(?!▁)"}, "content": "▁"},
    ],
}


def write_tokenizer(tokens: Tokens, out: Path, added: Sequence[str]) -> None:
    """Writes a complete tokenizer: the source's files, with the ``added`` literals after the vocabulary in each of their lists, in a format that
    transformers 4.x reads too. A lone ``tokenizer.model`` gets LLaMA's settings. The settings of this program's processor are copied.

    Raises UserError if transformers reads other ids than ``tokens`` and ``added`` say, or finds no BOS token in LLaMA's layout.
    """
    out.mkdir(parents=True, exist_ok=True)
    new = {literal: tokens.size + offset for offset, literal in enumerate(added)}
    for name, content in _files(tokens, new).items():
        (out / name).write_bytes(content)
    import_transformers()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(out), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers passes on any error of its parsers
        raise UserError(
            f"{tokens.folder}: transformers cannot read this tokenizer ({type(error).__name__}: {error})"
        ) from None
    for literal, id in new.items():
        if tokenizer.convert_tokens_to_ids(literal) != id:
            raise UserError(f"{tokens.folder}: cannot add {literal!r} as id {id}; the vocabulary has it already")
    if len(tokenizer) != tokens.size + len(new):
        raise UserError(
            f"{tokens.folder}: transformers counts {len(tokenizer) - len(new)} tokens, the files have {tokens.size}; the tokenizer is "
            "incomplete; fetch it again"
        )
    if tokenizer.bos_token_id is None and not tokens.byte_level:
        raise UserError(
            f"{tokens.folder}: the tokenizer has no BOS token, which LLaMA needs; set bos_token in tokenizer_config.json"
        )


def _files(tokens: Tokens, new: Mapping[str, int]) -> dict[str, bytes]:
    files = complete_vocabulary(tokens.files)
    settings = _settings(json.loads(files[SETTINGS]), new, SLOW in files)
    if tokens.byte_level:
        settings["tokenizer_class"] = ANY_FAST  # those of single families put their own pre-tokenizer before the file's
    files[SETTINGS] = json_bytes(settings)
    if FAST in files:
        files[FAST] = json_bytes(_fast(json.loads(files[FAST]), new))
    if SLOW in files or ADDED in files:  # the slow tokenizer's only list before 4.34
        inside = json.loads(files[ADDED]) if tokens.byte_level else {}
        files[ADDED] = json_bytes({**inside, **tokens.added, **new})
    return files


def _settings(settings: dict[str, Any], new: Mapping[str, int], slow: bool) -> dict[str, Any]:
    """``tokenizer_config.json`` in the format that 4.x and 5.x share, with ``new`` in its list of added tokens."""
    settings = {name: value for name, value in settings.items() if name not in _ONLY_IN_5}
    if settings.get("tokenizer_class") in (None, *_CLASSES_OF_5):
        settings["tokenizer_class"] = "LlamaTokenizer" if slow else ANY_FAST
    if isinstance(settings.get("extra_special_tokens"), list):  # a dict in 4.x
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {str(id): {"content": literal, **_ADDED} for literal, id in new.items()}
    elif slow and new:
        # Without the list above, 4.x matches a token in the raw text only if it is special: the second one of
        # "<image><image>" would be split into letters.
        settings["additional_special_tokens"] = [*(settings.get("additional_special_tokens") or []), *new]
    return settings


def _fast(fast: dict[str, Any], new: Mapping[str, int]) -> dict[str, Any]:
    """``tokenizer.json`` with ``new``, as far as possible in a format that tokenizers 0.13 and newer read."""
    fast["added_tokens"] = [
        *(fast.get("added_tokens") or []),
        *({"id": id, "content": literal, **_ADDED} for literal, id in new.items()),
    ]
    model = fast.get("model") or {}
    merges = model.get("merges") or []
    pairs = [merge for merge in merges if not isinstance(merge, str)]
    if not any(" " in piece for pair in pairs for piece in pair):
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if fast.get("normalizer") is None and fast.get("pre_tokenizer") == _METASPACE:
        fast["normalizer"], fast["pre_tokenizer"] = _SPACE_IN_FRONT, None
        for token in fast["added_tokens"]:  # found in the text as it was
            token["normalized"] = False
    return fast
