"""Text to ids, and ids to text as they are generated, for tokenizers with BPE: LLaMA's, and byte-level ones (GPT-2's, Llama 3's, Qwen's).

Control tokens are never part of a text, whether they are in the base vocabulary or added to it. LLaMA's gives the ids of the slow tokenizer, which
Vicuna was tuned with: the tokenizers of transformers differ in the space beside an added token (legacy or not, before or after they are saved and
read), so only vocabulary and merges come from there, and the rules around them are here. A byte-level one keeps its normaliser and pre-tokenizer.
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
from chatpose_jax.storage import local, location, write_bytes

RELEASED_POSE = "[SEG]"
POSE_LITERALS = (POSE, RELEASED_POSE)
"""Names of the pose token in vocabularies: the paper's, and that of CHATPOSE-V0."""
IMAGE_LITERAL = "<image>"
MARKER_LITERALS = ("<im_start>", "<im_end>")

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_OPENING, _CLOSING = "([{\"'“‘", ".,;:!?)]}%\"'”’…"
FAST, SLOW, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
ADDED = "added_tokens.json"
TOKENIZER_FILES = (
    FAST,
    SLOW,
    SETTINGS,
    "special_tokens_map.json",
    ADDED,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a tokenizer, as transformers 4.x and 5.x write them. One of the first two is needed."""
LLAMA_CONTROL = ("<s>", "</s>", "<unk>")
"""LLaMA's BOS, EOS and the token for what has no piece, with which LLaVA pads."""
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
    """A tokenizer with BPE: in LLaMA's layout (byte fallback, ``▁`` for a space), or of bytes.

    spaced: each stretch of text begins with SentencePiece's space, as in LLaMA's layout.
    control: name -> id of all control tokens. A text never gives one of these ids, whatever it says.
    bos_token_id: None where the settings name no BOS, as Qwen's.
    pose_token, pose_token_id: the pose token in this vocabulary and its id, or None.
    size: the number of rows that it needs.
    files: name -> content of the files that it was read from; ``save`` writes the same bytes.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, where: str = "the tokenizer", files: Mapping[str, bytes] | None = None
    ) -> None:
        data = json.loads(backend.to_str())
        model = data["model"]
        self.spaced = model["type"] == "BPE" and bool(model.get("byte_fallback"))
        if not self.spaced:
            _demand_byte_level(data, where)
        self.backend = backend
        self.files = complete_vocabulary({FAST: backend.to_str().encode()} if files is None else files)
        added = {token["content"]: token["id"] for token in data["added_tokens"]}
        # Some byte-level vocabularies hold runs of spaces as added tokens: these are text.
        blank = [] if self.spaced else [each for each in data["added_tokens"] if _is_blank(each)]
        self.control: dict[str, int] = {
            name: id for name, id in added.items() if id not in {each["id"] for each in blank}
        }
        if self.spaced:
            self.control |= {name: _need(model["vocab"] | added, name, where) for name in LLAMA_CONTROL}
            bos: str | None = LLAMA_CONTROL[0]
        else:
            bos = named_token(self.files, "bos_token")
        self.bos_token_id = self.control.get(bos) if bos else None
        self.pose_token = next((literal for literal in POSE_LITERALS if literal in added), None)
        self.pose_token_id = added.get(self.pose_token) if self.pose_token else None
        self.image_token_id = added.get(IMAGE_LITERAL)
        start, end = (added.get(literal) for literal in MARKER_LITERALS)
        self.marker_ids = (start, end) if start is not None and end is not None else None
        self._silent = set(self.control.values())
        self._pieces: dict[int, str] = {index: piece for piece, index in (model["vocab"] | added).items()}
        self.size = 1 + max(self._pieces)
        self._as_written = {each["id"] for each in blank}

        # No text of a user may become a control id. So control tokens go from the list of added tokens, from the vocabulary, where
        # ignore_merges would find them, and from the merges.
        if self.spaced:
            data |= {"normalizer": None, "pre_tokenizer": None}
        else:
            model["unk_token"] = None  # transformers too gives nothing for bytes that an incomplete vocabulary lacks
        gone = self.control.keys() - {model["unk_token"]}
        model["vocab"] = {piece: index for piece, index in model["vocab"].items() if piece not in gone}
        model["vocab"] |= {each["content"]: each["id"] for each in blank}  # else they get other ids
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [pair for pair in merges if self.control.keys().isdisjoint((*pair, "".join(pair)))]
        model["dropout"] = None
        data |= {"added_tokens": blank, "post_processor": None, "truncation": None, "padding": None}
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(data))
        # A whole text is one word here. The library would keep the first 10,000 for ever, 50 MB of a server.
        if self.spaced and (resize := getattr(self._bpe.model, "_resize_cache", None)) is not None:
            resize(0)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> TextTokenizer:
        """Reads a folder with ``tokenizer.json``, or with ``tokenizer.model`` and ``added_tokens.json``. Nothing is downloaded.

        Raises UserError for a folder without either, a damaged file, or another kind of tokenizer.
        """
        folder = location(folder)
        with local(folder) as here:
            return cls._read(here, str(folder))

    @classmethod
    def _read(cls, folder: Path, name: str) -> TextTokenizer:
        files = read_files(folder)
        found = [name for name in (FAST, SLOW) if name in files]
        if not found:
            raise UserError(
                f"no tokenizer in {name!r}: expected {FAST} or {SLOW}; copy it from the checkpoint's original folder"
            )
        import_transformers()
        from transformers import LlamaTokenizer, PreTrainedTokenizerFast

        loader = PreTrainedTokenizerFast if FAST in files else LlamaTokenizer
        try:
            backend = loader.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
            if SLOW in files:
                backend = _with_exact_merges(backend, folder / SLOW)
        except Exception as error:  # its parsers may raise anything
            raise UserError(
                f"{found[0]} in {name!r} is damaged or no tokenizer ({type(error).__name__}: {error!s:.200})"
            ) from error
        return cls(backend, f"the tokenizer in {name!r}", files)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``files``, which ``read`` and transformers can read."""
        for name, content in self.files.items():
            write_bytes(location(folder) / name, content)

    def encode(self, text: str) -> list[int]:
        """Ids of a stretch of text, without BOS; in LLaMA's layout with SentencePiece's leading space. Names of control tokens in it are ordinary
        characters. Bytes that the vocabulary lacks give nothing, as in transformers: LLaMA's, Llama 3's and Qwen's have all, SmolLM2's lacks some
        that are in no usual text."""
        if not text:
            return []
        if self.spaced:
            text = _SPACE + text.replace(" ", _SPACE)
        # The fast method works out no offsets: half of the time.
        return self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def stretches(self, answer: str) -> list[str]:
        """The texts of an answer between each ``<POSE>``, to be encoded one by one. In LLaMA's layout white space around a pose is dropped, as the
        slow tokenizer does around added tokens. In a byte-level one only spaces before it: the text after it keeps its own."""
        stretches = answer.split(POSE)
        if self.spaced:
            return [stretch.strip() for stretch in stretches]
        return [*(stretch.rstrip(" ") for stretch in stretches[:-1]), stretches[-1]]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids. A pose token becomes ``<POSE>``, other control ids become nothing."""
        stream = StreamDecoder(self)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def piece(self, index: int) -> bytes | None:
        """The UTF-8 bytes of an id, with real spaces; None for a control id or a row without a piece."""
        piece = self._pieces.get(index)
        if piece is None or index in self._silent:
            return None
        if self.spaced:
            byte = _BYTE.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()
        if index in self._as_written or not _BYTES.keys() >= set(piece):
            return piece.encode()
        return bytes([_BYTES[character] for character in piece])


class StreamDecoder:
    """Decodes one id at a time. It never gives half a UTF-8 character, and its texts joined are those of ``decode``.

    A pose is set apart from the word before it by a space. In LLaMA's layout SentencePiece puts a space before each stretch of text: it is dropped at
    the start, and after a pose unless a word follows: "It is <POSE>." In a byte-level vocabulary texts have their own spaces.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = ""
        self._prefix = tokenizer.spaced  # the next text begins a stretch, so its first space is SentencePiece's
        self._gap = False  # a pose came last, so a word needs a space before it

    def push(self, index: int) -> str:
        """The text that is complete with this id; may be empty."""
        if index == self._tokenizer.pose_token_id:
            before = self._text(self._bytes.decode(b"", final=True))
            last = (before or self._last)[-1:]
            pose = POSE if not last or last.isspace() or last in _OPENING else " " + POSE
            self._last, self._prefix, self._gap = pose, self._tokenizer.spaced, self._tokenizer.spaced
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


def read_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder: name -> content."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def complete_vocabulary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Adds settings where there are none. In LLaMA's layout they name BOS and EOS: without them transformers adds no BOS."""
    if SETTINGS in files:
        return dict(files)
    if SLOW not in files and is_byte_level(json.loads(files[FAST])):
        return {**files, SETTINGS: json_bytes({"tokenizer_class": ANY_FAST, "clean_up_tokenization_spaces": False})}
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": True} if SLOW in files else {"tokenizer_class": ANY_FAST}
    return {**files, SETTINGS: json_bytes(kind | _LLAMA)}


def is_byte_level(fast: Mapping[str, Any]) -> bool:
    """Whether the content of a ``tokenizer.json`` is a byte-level tokenizer: its last pre-tokenizer turns bytes into characters."""
    last = _pre_tokenizers(fast)[-1:]
    return bool(last) and last[0].get("type") == "ByteLevel"


def named_token(files: Mapping[str, bytes], key: str) -> str | None:
    """A special token that the settings name, as a text or as transformers' table of an added token; None where they name none."""
    for name in (SETTINGS, "special_tokens_map.json"):
        value = json.loads(files[name]).get(key) if name in files else None
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return None


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


def _pre_tokenizers(fast: Mapping[str, Any]) -> list[dict[str, Any]]:
    step = fast.get("pre_tokenizer") or {}
    return step.get("pretokenizers") or [] if step.get("type") == "Sequence" else [step]


def _demand_byte_level(data: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a tokenizer that is neither in LLaMA's layout nor byte-level BPE as GPT-2's descendants have it."""
    model, kinds = data["model"], [step.get("type") for step in _pre_tokenizers(data)]
    if model["type"] != "BPE" or not is_byte_level(data):
        raise UserError(
            f"{where}: expected BPE with byte fallback (LLaMA's layout) or over bytes (GPT-2's, Llama 3's, Qwen's), found {model['type']}"
            f" behind the pre-tokenizer {', '.join(filter(None, kinds)) or 'none'}; give the tokenizer that belongs to the checkpoint"
        )
    odd = {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)}
    if any(step.get("add_prefix_space") for step in _pre_tokenizers(data)):
        odd["add_prefix_space"] = True
    if odd:
        name, value = next(iter(odd.items()))
        raise UserError(f"{where}: {name}={value!r} is not supported; expected a byte-level tokenizer without it")


def _is_blank(token: Mapping[str, Any]) -> bool:
    return token["content"].isspace() and not token["special"]


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte: itself if Latin-1 prints it, else the next one from 256 on. Source: GPT-2 (Radford et al. 2019)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printed)
    return {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_characters()
