"""LLaMA's tokenizer: text to ids, and ids to text as they are generated. It gives the ids of the slow tokenizer, which Vicuna was tuned with.

Special tokens are never part of a text. The tokenizers of transformers differ in the space beside an added token (legacy or not, before or
after they are saved and read), so only vocabulary and merges come from there. The rules around them are here.
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
"""Names of the pose token in vocabularies: the paper's, and that of CHATPOSE-V0."""
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
"""The files of a tokenizer, as transformers 4.x and 5.x write them. One of the first two is needed."""
ANY_FAST = "PreTrainedTokenizerFast"
"""The class of transformers 4.x and 5.x that changes nothing in ``tokenizer.json``."""
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
    """A tokenizer in LLaMA's layout: BPE with byte fallback, ``▁`` for a space.

    bos_token_id, eos_token_id, pad_token_id: ids of ``<s>``, ``</s>`` and ``<unk>``, with which LLaVA pads.
    pose_token, pose_token_id: the pose token in this vocabulary and its id, or None.
    files: name -> content of the files that it was read from; ``save`` writes the same bytes.
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
        self.files = complete_vocabulary({_FAST: backend.to_str().encode()} if files is None else files)
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

        # No text of a user may become a control id, so added tokens go, and all merges that could make one.
        control = {"<s>", "</s>", "<unk>", *added}
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in control]
        data.update(
            added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None, truncation=None, padding=None
        )
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(data))

    @classmethod
    def read(cls, folder: str | Path) -> TextTokenizer:
        """Reads a folder with ``tokenizer.json``, or with ``tokenizer.model`` and ``added_tokens.json``. Nothing is downloaded.

        Raises UserError for a folder without either, a damaged file, or a layout that is not LLaMA's.
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
        except Exception as error:  # its parsers may raise anything
            raise UserError(
                f"{found[0]} in {str(folder)!r} is damaged or no tokenizer ({type(error).__name__}: {error!s:.200})"
            ) from error
        return cls(backend, f"the tokenizer in {str(folder)!r}", files)

    def save(self, folder: str | Path) -> None:
        """Writes ``files``, which ``read`` and transformers can read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with SentencePiece's leading space and without BOS. Names of special tokens in it are ordinary characters."""
        if not text:
            return []
        # The fast method works out no offsets: half of the time.
        return self._bpe.encode_batch_fast([_SPACE + text.replace(" ", _SPACE)], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids. A pose token becomes ``<POSE>``, other control ids become nothing."""
        stream = StreamDecoder(self)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def piece(self, index: int) -> bytes | None:
        """The UTF-8 bytes of an id, with real spaces; None for a control id or a row without a piece."""
        piece = self._pieces.get(index)
        if piece is None or index in self._silent:
            return None
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(_SPACE, " ").encode()


class StreamDecoder:
    """Decodes one id at a time. It never gives half a UTF-8 character, and its texts joined are those of ``decode``.

    SentencePiece puts a space before each stretch of text. It is dropped at the start, and after a pose unless a word follows:
    "It is <POSE>."
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = ""
        self._prefix = True  # the next text begins a stretch, so its first space is SentencePiece's
        self._gap = False  # a pose came last, so a word needs a space before it

    def push(self, index: int) -> str:
        """The text that is complete with this id; may be empty."""
        if index == self._tokenizer.pose_token_id:
            before = self._text(self._bytes.decode(b"", final=True))
            last = (before or self._last)[-1:]
            pose = POSE if not last or last.isspace() or last in _OPENING else " " + POSE
            self._last, self._prefix, self._gap = pose, True, True
            return before + pose
        piece = self._tokenizer.piece(int(index))
        return self._text(self._bytes.decode(piece)) if piece is not None else ""

    def flush(self) -> str:
        """The rest, when no id follows: a replacement character where a UTF-8 character is not complete."""
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
    """Imports transformers without its printed advice that PyTorch is missing, which nothing here needs.

    The environment and the logging of the calling program do not change.
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
    """The files of the tokenizer in a folder: name -> content."""
    return {name: (Path(folder) / name).read_bytes() for name in TOKENIZER_FILES if (Path(folder) / name).is_file()}


def complete_vocabulary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Adds LLaMA's settings (BOS, no EOS) where there are none. Without them transformers adds no BOS."""
    if SETTINGS in files:
        return dict(files)
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True} if _SLOW in files else {"tokenizer_class": ANY_FAST}
    return {**files, SETTINGS: json_bytes(kind | _LLAMA)}


def json_bytes(data: Any) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _with_exact_merges(backend: tokenizers.Tokenizer, path: Path) -> tokenizers.Tokenizer:
    """Orders merges by the scores of ``tokenizer.model``, as SentencePiece does.

    transformers (5.23) orders them by id. That differs where a greater id has a greater score, as for several spaces ("a  b").
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
