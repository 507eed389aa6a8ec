"""Reads ids from a tokenizer's files without building the tokenizer: the size of the base vocabulary, and the added tokens with their ids."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import SETTINGS_FILE
from chatpose_jax.processing.tokenizer import (
    ADDED,
    FAST,
    LLAMA_CONTROL,
    POSE_LITERALS,
    SETTINGS,
    SLOW,
    is_byte_level,
    read_files,
)
from chatpose_jax.settings import one_line
from chatpose_jax.storage import Location, local, location
from chatpose_jax.weights.readers import Checkpoint, demand_native_start, describe_folder, parse_json_object


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The ids of a tokenizer.

    folder: where it comes from, for errors; a GGUF file has its tokenizer inside.
    files: name → content, as ``processing.tokenizer.TOKENIZER_FILES`` names them, and ``processor.json`` where there is one.
    base_size: rows of the base vocabulary. A SentencePiece vocabulary has its pieces there. A byte-level one has all tokens, control tokens
        too, up to the first pose token.
    added: literal → id of the tokens after it.
    control: literal → id of all control tokens, those inside the base vocabulary too.
    byte_level: whether it is a byte-level tokenizer, and not in LLaMA's layout.
    """

    folder: Location
    files: Mapping[str, bytes]
    base_size: int
    added: Mapping[str, int]
    control: Mapping[str, int]
    byte_level: bool

    __repr__ = one_line

    @property
    def size(self) -> int:
        """The first free id."""
        return max((self.base_size, *(id + 1 for id in self.added.values())))

    @property
    def pose_token_id(self) -> int | None:
        """Id of the pose token; None if the vocabulary has none."""
        return next((self.added[literal] for literal in POSE_LITERALS if literal in self.added), None)


def read_tokens(folder: str | os.PathLike[str]) -> Tokens:
    """``tokens_of`` the files of a folder. Raises UserError if there is no tokenizer."""
    folder = location(folder)
    with local(folder) as here:
        files = read_files(here)
        if (here / SETTINGS_FILE).is_file():
            files[SETTINGS_FILE] = (here / SETTINGS_FILE).read_bytes()
    if SLOW not in files and FAST not in files and (what := describe_folder(folder)):
        raise UserError(f"{folder}: no tokenizer, but {what}")
    return tokens_of(files, folder)


def tokens_of(files: Mapping[str, bytes], where: Location) -> Tokens:
    """Reads ``tokenizer.model`` (SentencePiece) or ``tokenizer.json``, and the lists of added tokens. The base vocabulary of LLaMA, LLaMA-2 and
    Vicuna is SentencePiece's: 32 000 pieces.

    Raises UserError if there is no tokenizer, or a damaged one; ``where`` names it.
    """
    try:
        return _tokens_of(files, where)
    except UserError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the tokenizer's JSON files are not as transformers writes them ({type(error).__name__}: {error}); fetch them again"
        ) from None


def tokens_in(checkpoint: Checkpoint) -> Tokens:
    """``tokens_of`` the tokenizer of a checkpoint: in its folder, or inside its file. Raises UserError if there is none."""
    files = checkpoint.tokenizer_files()
    return read_tokens(checkpoint.folder) if files is None else tokens_of(files, checkpoint.folder)


def control_tokens(checkpoint: Checkpoint, folder: str | os.PathLike[str] | None = None) -> set[str]:
    """The literals of the control tokens of a checkpoint's tokenizer, or of the one in ``folder``; empty if it has none that can be read, which
    ``infer_config`` reports.
    """
    try:
        return set((tokens_in(checkpoint) if folder is None else read_tokens(folder)).control)
    except UserError:
        return set()


def _tokens_of(files: Mapping[str, bytes], where: Location) -> Tokens:
    def json_file(name: str) -> dict:
        return parse_json_object(files[name], where / name) if name in files else {}

    fast = json_file(FAST)
    byte_level = SLOW not in files and is_byte_level(fast)
    pieces = (fast.get("model") or {}).get("vocab") or {}
    added = {str(token["content"]): int(token["id"]) for token in fast.get("added_tokens") or []}
    added |= {str(literal): int(id) for literal, id in json_file(ADDED).items()}
    decoder = json_file(SETTINGS).get("added_tokens_decoder") or {}
    added |= {str(token["content"]): int(id) for id, token in decoder.items()}
    control = {literal: int(pieces[literal]) for literal in LLAMA_CONTROL if literal in pieces} | added
    if SLOW in files:
        from sentencepiece import SentencePieceProcessor

        demand_native_start(files[SLOW], where / SLOW)
        try:
            model = SentencePieceProcessor(model_proto=files[SLOW])
            base = model.get_piece_size()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{where / SLOW}: not a SentencePiece model ({error}); fetch it again") from None
        held = (id for id in range(base) if model.is_control(id) or model.is_unknown(id))
        control = {model.id_to_piece(id): id for id in held} | control
    elif pieces and byte_level:
        pose = [added[literal] for literal in POSE_LITERALS if literal in added]
        base = min([1 + max((*pieces.values(), *added.values())), *pose])
    elif pieces:
        base = len(pieces)
    else:
        raise UserError(
            f"{where}: no tokenizer: expected {FAST} or {SLOW}; fetch it from where the weights came from, or name a folder that has it with "
            "--tokenizer: that of the same model, or of the language model in it (of LLaVA-1.5: Vicuna or LLaMA-2)"
        )
    behind = {literal: id for literal, id in added.items() if id >= base}
    return Tokens(where, files, base, behind, control, byte_level)
