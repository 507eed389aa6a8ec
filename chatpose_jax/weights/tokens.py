"""Reads ids from a tokenizer's files without building the tokenizer: the number of pieces, and the added tokens with their ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import (
    POSE_LITERALS,
)
from chatpose_jax.settings import one_line
from chatpose_jax.weights.readers import demand_native, describe_folder, read_json_object


@dataclasses.dataclass(frozen=True)
class Tokens:
    """base_size: number of pieces of the base vocabulary. added: literal -> id of the tokens after it."""

    folder: Path
    base_size: int
    added: Mapping[str, int]

    __repr__ = one_line

    @property
    def size(self) -> int:
        """The first free id."""
        return max((self.base_size, *(id + 1 for id in self.added.values())))

    @property
    def pose_token_id(self) -> int | None:
        """Id of the pose token; None if the vocabulary has none."""
        return next((self.added[literal] for literal in POSE_LITERALS if literal in self.added), None)


def read_tokens(folder: str | Path) -> Tokens:
    """Reads ``tokenizer.model`` (SentencePiece) or ``tokenizer.json``, and the lists of added tokens. The base vocabulary is SentencePiece's: 32 000
    pieces for LLaMA, LLaMA-2 and Vicuna. Raises UserError if there is no tokenizer.
    """
    folder = Path(folder)
    try:
        return _read_tokens(folder)
    except UserError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: the tokenizer's JSON files are not as transformers writes them ({type(error).__name__}: {error}); fetch them again"
        ) from None


def _read_tokens(folder: Path) -> Tokens:
    fast = read_json_object(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    pieces = (fast.get("model") or {}).get("vocab") or []
    added = {str(token["content"]): int(token["id"]) for token in fast.get("added_tokens") or []}
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        demand_native(folder / "tokenizer.model")
        try:
            base = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{folder / 'tokenizer.model'}: not a SentencePiece model ({error}); fetch it again"
            ) from None
    elif pieces:
        base = len(pieces)
    elif what := describe_folder(folder):
        raise UserError(f"{folder}: no tokenizer, but {what}")
    else:
        raise UserError(
            f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json; "
            "name the folder that has it with --tokenizer (Vicuna's or LLaMA-2's fits every LLaVA-1.5)"
        )
    if (folder / "added_tokens.json").is_file():
        added |= {str(literal): int(id) for literal, id in read_json_object(folder / "added_tokens.json").items()}
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {str(token["content"]): int(id) for id, token in decoder.items()}
    return Tokens(folder, base, {literal: id for literal, id in added.items() if id >= base})
