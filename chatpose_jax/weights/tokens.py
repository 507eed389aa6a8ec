"""What a tokenizer's files say about ids, read without building the tokenizer: how many pieces, which tokens were
added, where."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import POSE_LITERALS, import_transformers
from chatpose_jax.settings import one_line
from chatpose_jax.weights.readers import demand_native, describe_folder, read_json

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "processor.json",  # ours, which export lays beside the weights
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """base_size: pieces of the vocabulary proper. added: literal -> id of the tokens behind it."""

    folder: Path
    base_size: int
    added: Mapping[str, int]

    __repr__ = one_line

    @property
    def size(self) -> int:
        """The first id that is free."""
        return max((self.base_size, *(id + 1 for id in self.added.values())))

    @property
    def pose_token_id(self) -> int | None:
        """Id of the pose token, None where the vocabulary has none."""
        return next((self.added[literal] for literal in POSE_LITERALS if literal in self.added), None)


def read_tokens(folder: str | Path) -> Tokens:
    """Reads ``tokenizer.model`` (SentencePiece) or ``tokenizer.json``, and the lists of added tokens.

    The base vocabulary is the rows of the SentencePiece model: 32 000 for LLaMA, LLaMA-2 and Vicuna. Raises UserError
    where there is none.
    """
    folder = Path(folder)
    try:
        return _read_tokens(folder)
    except UserError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: the tokenizer's JSON files are not as transformers writes them ({type(error).__name__}: {error}); "
            "fetch them again"
        ) from None


def _read_tokens(folder: Path) -> Tokens:
    fast = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    pieces = (fast.get("model") or {}).get("vocab") or []
    added = {str(token["content"]): int(token["id"]) for token in fast.get("added_tokens") or []}
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        demand_native(folder / "tokenizer.model")
        try:
            base = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
        except (RuntimeError, OSError) as error:
            raise UserError(f"{folder / 'tokenizer.model'}: not a SentencePiece model ({error})") from None
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
        added |= {str(literal): int(id) for literal, id in read_json(folder / "added_tokens.json").items()}
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {str(token["content"]): int(id) for id, token in decoder.items()}
    return Tokens(folder, base, {literal: id for literal, id in added.items() if id >= base})


def new_tokens(tokens: Tokens, special: Mapping[int, str], last: int) -> list[str]:
    """Literals to add so that ids up to ``last`` exist; ``special`` names some of them, the rest become
    ``<unused_…>``."""
    return [special.get(id, f"<unused_{id}>") for id in range(tokens.size, last + 1)]


def write_tokenizer(tokens: Tokens, out: Path, added: Sequence[str]) -> None:
    """Writes a complete tokenizer to ``out``: the source's files, with ``added`` literals behind its vocabulary.

    A bare ``tokenizer.model`` is completed with LLaMA's settings (BOS in front, no EOS): without them ``transformers``
    writes no BOS. Raises UserError if the result has no BOS, or if the added literals do not get the ids that follow
    ``tokens.size``.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokens.folder / name).is_file():
            shutil.copyfile(tokens.folder / name, out / name)
    if not (out / "tokenizer_config.json").is_file():
        _write_llama_settings(out)
    import_transformers()
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(out), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(
            f"{tokens.folder}: transformers cannot read this tokenizer ({type(error).__name__}: {error})"
        ) from None
    if len(tokenizer) != tokens.size:
        raise UserError(
            f"{tokens.folder}: transformers counts {len(tokenizer)} tokens, the files {tokens.size}; the tokenizer "
            f"is incomplete"
        )
    if tokenizer.bos_token_id is None:
        raise UserError(
            f"{tokens.folder}: this tokenizer has no BOS token; LLaMA needs one (tokenizer_config.json: bos_token)"
        )
    if added:
        tokenizer.add_tokens(
            [AddedToken(literal, special=True, normalized=False) for literal in added], special_tokens=True
        )
        for offset, literal in enumerate(added):
            if tokenizer.convert_tokens_to_ids(literal) != tokens.size + offset:
                raise UserError(
                    f"{tokens.folder}: cannot add {literal!r} as id {tokens.size + offset}; the vocabulary has it "
                    f"already"
                )
        tokenizer.save_pretrained(str(out))


def _write_llama_settings(out: Path) -> None:
    import json

    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
