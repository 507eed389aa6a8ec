"""LLaMA's tokenizer, as the slow one that Vicuna was tuned with: text to ids piece by piece, and ids back to text as
they stream.

Special tokens never pass through text. transformers' own pipelines disagree about the space beside an added token
(legacy or not, before or after a round trip through a folder), so only the vocabulary and the merges are taken from
them; the rules around them are written out here.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import POSE

RELEASED_POSE = "[SEG]"
POSE_LITERALS = (POSE, RELEASED_POSE)
"""Spellings of the pose token in vocabularies: the paper's, and the one that CHATPOSE-V0's tokenizer holds."""
IMAGE_LITERAL = "<image>"
MARKER_LITERALS = ("<im_start>", "<im_end>")

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_OPENING, _CLOSING = "([{\"'“‘", ".,;:!?)]}%\"'”’…"
_FAST, _SLOW, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TOKENIZER_FILES = (
    _FAST,
    _SLOW,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What makes up a tokenizer in a folder of transformers, 4.x or 5.x; either of the first two is needed."""
ANY_FAST = "PreTrainedTokenizerFast"
"""The class that reads ``tokenizer.json`` as it stands, in 4.x and 5.x."""
_LLAMA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


class TextTokenizer:
    """Vocabulary and merges of a LLaMA-layout tokenizer (BPE with byte fallback over ``▁``-marked words).

    bos_token_id, eos_token_id, pad_token_id: ids of ``<s>``, ``</s>`` and ``<unk>`` (rows are padded with unk, as
        LLaVA does).
    pose_token, pose_token_id: the pose token's literal in this vocabulary and its id, or None.
    files: name -> content, what it was read from; ``save`` writes them again, byte for byte.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, where: str = "the tokenizer", files: Mapping[str, bytes] | None = None
    ) -> None:
        data = json.loads(backend.to_str())
        model = data["model"]
        if model["type"] != "BPE" or not model.get("byte_fallback"):
            raise UserError(
                f"{where}: expected LLaMA's layout (BPE with byte fallback), found {model['type']}; "
                "ChatPose needs Vicuna's tokenizer"
            )
        self.backend = backend
        self.files = complete({_FAST: backend.to_str().encode()} if files is None else files)
        self.size = backend.get_vocab_size()
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocabulary = {**model["vocab"], **added}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            _need(vocabulary, token, where) for token in ("<s>", "</s>", "<unk>")
        )
        self.pose_token = next((literal for literal in POSE_LITERALS if literal in added), None)
        self.pose_token_id = added.get(self.pose_token) if self.pose_token else None
        self.image_token_id = added.get(IMAGE_LITERAL)
        start, end = (added.get(literal) for literal in MARKER_LITERALS)
        self.marker_ids = (start, end) if start is not None and end is not None else None
        self._silent = set(added.values()) | {self.bos_token_id, self.eos_token_id, self.pad_token_id}
        self._pieces = {index: piece for piece, index in vocabulary.items()}

        # Without added tokens, and without merges that could build one, no text of a user can become a control id.
        control = {"<s>", "</s>", "<unk>", *added}
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in control]
        data.update(
            added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None, truncation=None, padding=None
        )
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(data))

    @classmethod
    def read(cls, folder: str | Path) -> TextTokenizer:
        """The tokenizer of a checkpoint folder: ``tokenizer.json``, or ``tokenizer.model`` with ``added_tokens.json``;
        nothing is downloaded.

        Raises UserError for a folder without one, a damaged file, or another layout than LLaMA's.
        """
        folder = Path(folder)
        files = read_files(folder)
        found = [name for name in (_FAST, _SLOW) if name in files]
        if not found:
            raise UserError(
                f"no tokenizer in {str(folder)!r}: expected {_FAST} or {_SLOW}; "
                "copy it from the checkpoint's original folder"
            )
        import_transformers()
        from transformers import LlamaTokenizer, PreTrainedTokenizerFast

        loader = PreTrainedTokenizerFast if _FAST in files else LlamaTokenizer
        try:
            backend = loader.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
            if _SLOW in files:
                backend = _with_exact_merges(backend, folder / _SLOW)
        except Exception as error:  # transformers raises whatever its parsers stumble on
            raise UserError(
                f"{found[0]} in {str(folder)!r} is damaged or no tokenizer ({type(error).__name__}: {error!s:.200})"
            ) from error
        return cls(backend, f"the tokenizer in {str(folder)!r}", files)

    def save(self, folder: str | Path) -> None:
        """Write ``files``, which ``read`` and transformers take."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with SentencePiece's leading space and no BOS; special tokens written in it are ordinary
        characters.
        """
        return self._bpe.encode(_SPACE + text.replace(" ", _SPACE), add_special_tokens=False).ids if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids; the pose token reads ``<POSE>``, other control ids read nothing."""
        stream = StreamDecoder(self)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def piece(self, index: int) -> bytes | None:
        """UTF-8 bytes that a text id stands for (spaces real), or None for a control id or a row without a piece."""
        piece = self._pieces.get(index)
        if piece is None or index in self._silent:
            return None
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, " ").encode()


class StreamDecoder:
    """Ids in, text out, one by one: never half a UTF-8 character, and the pieces joined are what ``decode`` gives.

    The space that SentencePiece puts before every stretch of text is not shown at the start, and after a pose only
        before a word: "It is <POSE>."
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = ""
        self._prefix = True  # the next text begins a stretch: its first space is SentencePiece's, not the writer's
        self._gap = False  # a pose was shown last: a word needs a space before it

    def push(self, index: int) -> str:
        """The text that became certain with this id; may be empty."""
        if index == self._tokenizer.pose_token_id:
            before = self._text(self._bytes.decode(b"", final=True))
            last = (before or self._last)[-1:]
            pose = POSE if not last or last.isspace() or last in _OPENING else " " + POSE
            self._last, self._prefix, self._gap = pose, True, True
            return before + pose
        piece = self._tokenizer.piece(int(index))
        return self._text(self._bytes.decode(piece)) if piece is not None else ""

    def flush(self) -> str:
        """What is left when no id follows: the replacement character where a UTF-8 character was never finished."""
        return self._text(self._bytes.decode(b"", final=True))

    def _text(self, text: str) -> str:
        if text and self._prefix:
            text, self._prefix = text.removeprefix(" "), False
        if text and self._gap:
            self._gap = False
            if not text[0].isspace() and text[0] not in _CLOSING:
                text = " " + text
        self._last = text[-1:] or self._last
        return text


def import_transformers() -> None:
    """Load transformers without its advice, printed on loading, that PyTorch is missing: nothing here needs it. The environment and the
    logging of the program that calls stay as they are.
    """
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers  # noqa: F401
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def read_files(folder: str | Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder, by name."""
    return {name: (Path(folder) / name).read_bytes() for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}


def complete(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """With LLaMA's settings (BOS in front, no EOS) where there are none: without them transformers writes no BOS."""
    if SETTINGS in files:
        return dict(files)
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True} if _SLOW in files else {"tokenizer_class": ANY_FAST}
    return {**files, SETTINGS: json_bytes(kind | _LLAMA)}


def json_bytes(data: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _with_exact_merges(backend: tokenizers.Tokenizer, path: Path) -> tokenizers.Tokenizer:
    """Order merges by the scores of ``tokenizer.model``.

    SentencePiece merges the pair with the highest score first. transformers (5.23) orders by id, which differs where
    scores do not fall with ids: runs of spaces, for one ("a  b").
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    scores = {
        model.id_to_piece(i): model.get_score(i)
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    }
    data: dict[str, Any] = json.loads(backend.to_str())
    if missing := scores.keys() - data["model"]["vocab"].keys():
        raise ValueError(f"tokenizer.model holds {min(missing)!r}, which tokenizer.json lacks")
    data["model"]["merges"] = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(scores, key=lambda piece: (-scores[piece], len(piece)))
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _need(vocabulary: dict[str, int], token: str, where: str) -> int:
    if token not in vocabulary:
        raise UserError(f"{where} has no {token!r}; expected LLaMA's vocabulary with '<unk>', '<s>' (BOS) and '</s>'")
    return vocabulary[token]
