"""Messages to ids, labels and pixels, and ids back to text.

A ``conversation.Template`` lays a conversation out, here Vicuna v1. ``□`` is one image token; an image has ``num_patches`` of them::

    <s> {system} USER: □□…□ \\n question ASSISTANT: answer </s> USER: …

Each stretch of text between control tokens is tokenised by itself, and has none of them. Generated ids are never decoded and tokenised again. So the
prompt of the next turn begins with exactly the ids of the last prompt, the generated ids and ``</s>``: the KV cache can be kept. In a template with
another beginning of past answers, this holds up to the last answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.processing import conversation
from chatpose_jax.processing.conversation import Control, ImageSource, Template, Turn, parse_messages
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.tokenizer import (
    IMAGE_LITERAL,
    MARKER_LITERALS,
    POSE_LITERALS,
    RELEASED_POSE,
    StreamDecoder,
    TextTokenizer,
)
from chatpose_jax.settings import one_line, whole
from chatpose_jax.storage import location, write_bytes

IGNORE = -100
"""Label of a position that does not count in the loss."""

SETTINGS_FILE = "processor.json"

_WORDS = "A person kneels, 3.5 m away: the left arm (bent at 90°) isn't near the body -- naïve, 我, é, 🙂\n\tbrown fox_jumps; Zürich?"
_PROBE = (
    {"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": _WORDS}]},
    {"role": "assistant", "content": "It is <POSE>. And this one <POSE>"},
    {"role": "user", "content": _WORDS.upper()},
    {"role": "assistant", "content": _WORDS[::-1]},
)
"""A conversation in which tokenizers, templates and markers show."""

NO_TOWER = "this model has no vision tower, so it cannot take images"
"""The error of an image given to such a model; what to do follows it."""

Markers = Literal["auto", "always", "never"]
"""Whether ``<im_start>`` and ``<im_end>`` stand around an image: "auto", where the vocabulary has them; "always", as ordinary text where it
has not; "never". CHATPOSE-V0's released chat program does "always", with a vocabulary that has not."""


@dataclasses.dataclass(frozen=True)
class ModelIds:
    """What the processor needs to know of a model; ``of`` reads it from a ``ModelConfig``."""

    vocab_size: int
    context: int
    num_patches: int
    image_size: int
    pose_token_id: int
    image_token_id: int
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    @classmethod
    def of(cls, config: Any) -> ModelIds:
        """Reads a ``chatpose_jax.models.config.ModelConfig``, which this package may not import."""
        return cls(
            vocab_size=config.text.vocab_size,
            context=config.text.max_position_embeddings,
            num_patches=config.image_tokens,
            image_size=config.image_size,
            pose_token_id=config.pose_token_id,
            image_token_id=config.image_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as arrays.

    input_ids: (T,) int32; each image is ``num_patches`` image tokens.
    labels: (T,) int32, not shifted: ``input_ids`` in answers and at the token that ends them, and in plain text; -100 elsewhere.
    images: one (S, S, 3) float32 array of normalised RGB for each image, in order; uint8 RGB where ``encode`` does not normalise.
    pose_positions: (P,) int32, position p of each pose token. The hidden state at p - 1 predicts it.
    truncated: whether ``max_length`` cut tokens off.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[np.ndarray]
    pose_positions: np.ndarray
    truncated: bool = False

    __repr__ = one_line


class Sizes(NamedTuple):
    """Numbers of tokens, images and pose tokens of a conversation, whether ``max_length`` cut tokens off, and how many tokens follow the last
    image or pose token: a cut of so many changes neither number."""

    tokens: int
    images: int
    poses: int
    truncated: bool
    tail: int


class Processor:
    """Tokenizer, conversation template and image preprocessing of one model.

    Raises UserError where the tokenizer does not fit the model or the template: no pose token, a control token of the template missing, other ids
    than the model's, or more rows.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        ids: ModelIds,
        template: Template | str = "vicuna_v1",
        images: ImageSettings | None = None,
        markers: Markers = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.ids = ids
        self.template = conversation.template(template) if isinstance(template, str) else template
        self.images = images or (ImageSettings(size=ids.image_size) if ids.num_patches else None)
        self.markers = markers
        self._control = self._check()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], config: Any) -> Processor:
        """Reads the processor of a checkpoint folder: its tokenizer, and ``processor.json`` where there is one.

        Without that file: centre crop, and LLaVA-1.5's template. If the pose token is ``[SEG]``, the template is that of CHATPOSE-V0's
        released chat program (``llava_v1``, with markers).
        """
        folder = location(folder)
        tokenizer, ids = TextTokenizer.read(folder), ModelIds.of(config)
        file = folder / SETTINGS_FILE
        released = tokenizer.pose_token == RELEASED_POSE
        template: Template | str = "llava_v1" if released else "vicuna_v1"
        markers: Markers = "always" if released else "auto"
        images = None
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if "template" in settings:
                template = Template.from_json(settings["template"])
            if settings.get("images") is not None:
                images = ImageSettings.from_json(settings["images"], repr(str(file)))
            return cls(tokenizer, ids, template, images, settings.get("markers", markers))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(file)!r} is no processor file ({type(error).__name__}: {error}); convert the checkpoint again"
            ) from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes what ``load`` reads: the tokenizer's files, unchanged, and ``processor.json``."""
        folder = location(folder)
        self.tokenizer.save(folder)
        settings = {
            "template": dataclasses.asdict(self.template),
            "images": self.images and dataclasses.asdict(self.images),
            "markers": self.markers,
        }
        write_bytes(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @property
    def pose_token(self) -> str:
        """The pose token in the vocabulary: ``<POSE>`` or ``[SEG]``. Users see and write ``<POSE>`` in both cases."""
        assert self.tokenizer.pose_token is not None  # _check
        return self.tokenizer.pose_token

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        max_length: int | None = None,
        normalise: bool = True,
    ) -> Encoded:
        """Encodes a conversation.

        Args:
            messages: see ``conversation``. An assistant message may have ``"ids"``, the token ids that were generated, with pose tokens and
                without the token that ends an answer; they replace its text.
            add_generation_prompt: end with what stands before an answer, such as ``ASSISTANT:``. The last message must then be the user's.
            max_length: cut longer conversations, for training. An image is never cut in two; images and poses after the cut are dropped.
            normalise: False leaves images as uint8; ``images.normalise`` can follow later.

        Raises:
            UserError for malformed messages or images, for an image where the model has no vision tower, and without ``max_length`` for a
            conversation longer than the model's context.
        """
        ids, labels, sources = self._layout(messages, add_generation_prompt)
        if sources and self.images is None:
            raise UserError(f"{sources[0].where}: {NO_TOWER}; ask without the image, or choose a model with a tower")
        length = len(ids)
        if max_length is not None:
            length = self._cut(ids, min(whole("max_length", max_length, 1), self.ids.context))
        elif length > self.ids.context:
            shown = "the image" if len(sources) == 1 else f"{len(sources)} images"
            images = f" ({len(sources) * self.ids.num_patches} of them for {shown})" if sources else ""
            raise UserError(
                f"the conversation has {length} tokens{images}, but the model's context holds {self.ids.context}; "
                "shorten it or drop early turns"
            )
        input_ids = np.asarray(ids[:length], np.int32)
        settings = self.images
        kept = self._images_in(input_ids.tolist(), len(sources))
        pixels = [] if settings is None else [settings.square(each.value, each.where) for each in sources[:kept]]
        return Encoded(
            input_ids=input_ids,
            labels=np.asarray(labels[:length], np.int32),
            images=[settings.normalise(image) for image in pixels] if settings and normalise else pixels,
            pose_positions=np.flatnonzero(input_ids == self.ids.pose_token_id).astype(np.int32),
            truncated=length < len(ids),
        )

    def measure(self, messages: Sequence[Mapping[str, Any]], max_length: int | None = None) -> Sizes:
        """The sizes of what ``encode`` gives for a whole conversation. No image is opened. For a model without a vision tower, which ``encode``
        gives no images, they are counted too, with no tokens."""
        ids, _, sources = self._layout(messages, add_generation_prompt=False)
        length = len(ids) if max_length is None else self._cut(ids, min(max_length, self.ids.context))
        kept = ids[:length]
        images = self._images_in(kept, len(sources))
        control = (self.ids.image_token_id, self.ids.pose_token_id)
        tail = next((place for place, token in enumerate(reversed(kept)) if token in control), length)
        return Sizes(length, images, kept.count(self.ids.pose_token_id), length < len(ids), tail)

    @property
    def fingerprint(self) -> str:
        """Names the tokenizer and template. Two processors with the same one give a conversation the same tokens, apart from those of images."""
        ids, _, _ = self._layout(_PROBE, add_generation_prompt=False)
        control = {self.ids.image_token_id: -1, self.ids.pose_token_id: -2}
        found = [control.get(token, token) for token in ids]
        one_image = [token for before, token in zip([0, *found], found) if not before == token == -1]
        return hashlib.blake2b(repr(one_image).encode(), digest_size=8).hexdigest()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of generated ids. A pose token becomes ``<POSE>``, other control tokens become nothing."""
        return self.tokenizer.decode(map(int, ids))

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self.tokenizer)

    def _images_in(self, ids: list[int], given: int) -> int:
        """How many of the given images a cut conversation keeps."""
        return ids.count(self.ids.image_token_id) // self.ids.num_patches if self.ids.num_patches else given

    def _layout(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[list[int], list[int], list[ImageSource]]:
        parsed = parse_messages(messages, empty_answers=add_generation_prompt)
        if add_generation_prompt and (role := parsed.turns[-1].role) != "user":
            last = "plain text" if role == "text" else "the assistant's"
            raise UserError(f"the last message is {last}, so there is nothing to answer; end with a user message")
        writer, sources = _Writer(self.tokenizer), list[ImageSource]()
        answer = 1 if parsed.system is None else 2  # its place among the messages
        for piece in self.template.pieces(parsed, add_generation_prompt):
            match piece:
                case str():
                    writer.text(piece)
                case Control(name):
                    writer.control([self._control[name]])
                case ImageSource():
                    sources.append(piece)
                    self._write_image(writer)
                case Turn(role="text"):
                    writer.answer(self.tokenizer.encode(piece.text))
                case Turn():
                    ids = self.answer_ids(piece.text) if piece.ids is None else self._checked(piece.ids, answer)
                    writer.answer([*ids, self.ids.eos_token_id])
                    answer += 2
        writer.flush()
        return writer.ids, writer.labels, sources

    def _write_image(self, writer: _Writer) -> None:
        patches = [self.ids.image_token_id] * self.ids.num_patches
        marks = self.tokenizer.marker_ids
        if self.markers == "never" or (marks is None and self.markers == "auto"):
            writer.control(patches)
        elif marks is not None:
            writer.control([marks[0], *patches, marks[1]], strip=True)
        else:
            writer.text(MARKER_LITERALS[0])
            writer.control(patches)
            writer.text(MARKER_LITERALS[1])

    def answer_ids(self, text: str) -> list[int]:
        """The ids of an answer, without the token that ends it. Each ``<POSE>`` is the pose token."""
        first, *rest = self.tokenizer.stretches(text)
        return self.tokenizer.encode(first) + [
            token for stretch in rest for token in (self.ids.pose_token_id, *self.tokenizer.encode(stretch))
        ]

    def _checked(self, answer: Sequence[int], index: int) -> Sequence[int]:
        ids = self.ids
        for token in answer:
            if not 0 <= token < ids.vocab_size or token in (ids.eos_token_id, ids.image_token_id):
                raise UserError(
                    f"messages[{index}]: 'ids' holds {token}; expected ids of text and poses in [0, {ids.vocab_size}) "
                    f"without {self.template.end} ({ids.eos_token_id}) and image tokens ({ids.image_token_id})"
                )
        return answer

    def _cut(self, ids: list[int], max_length: int) -> int:
        """The greatest length <= max_length that does not cut an image in two."""
        if len(ids) <= max_length or not self.ids.num_patches:
            return min(len(ids), max_length)
        seen = sum(token == self.ids.image_token_id for token in ids[:max_length])
        return max_length - seen % self.ids.num_patches

    def _check(self) -> dict[str, int]:
        """The ids of the template's control tokens. Raises UserError where tokenizer, template and model do not fit."""
        tokenizer, ids, template = self.tokenizer, self.ids, self.template
        if tokenizer.pose_token_id is None:
            raise UserError(
                f"the tokenizer has no pose token: expected {' or '.join(map(repr, POSE_LITERALS))} with id "
                f"{ids.pose_token_id} among its added tokens, and none of its {tokenizer.size} rows is one; convert the "
                "checkpoint with 'chatpose convert', or add it to added_tokens.json"
            )
        if absent := [name for name in template.control if name not in tokenizer.control]:
            raise UserError(
                f"the conversation template needs the control token {absent[0]!r}, which the tokenizer lacks; choose another template, or the "
                "tokenizer that belongs to the model"
            )
        control = {name: tokenizer.control[name] for name in template.control}
        pairs = [
            ("pose", tokenizer.pose_token_id, ids.pose_token_id),
            (template.end, control[template.end], ids.eos_token_id),
        ]
        if tokenizer.bos_token_id is not None and ids.bos_token_id >= 0:
            pairs.append(("BOS", tokenizer.bos_token_id, ids.bos_token_id))
        for name, found, expected in pairs:
            if found != expected:
                raise UserError(
                    f"the tokenizer's {name} token has id {found}, the model's {expected}; "
                    "the tokenizer belongs to another checkpoint"
                )
        if tokenizer.size > ids.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.size} rows, the model only {ids.vocab_size}; "
                "the tokenizer belongs to another checkpoint"
            )
        if ids.image_token_id >= 0 and tokenizer.piece(ids.image_token_id) is not None:
            raise UserError(
                f"image_token_id={ids.image_token_id} is {tokenizer.piece(ids.image_token_id)!r} in the tokenizer; "
                f"expected {IMAGE_LITERAL!r}, a row without a token, or a negative id"
            )
        if self.images is not None and not ids.num_patches:
            raise UserError(f"images of {self.images.size} pixels, but {NO_TOWER}")
        if self.images is not None and self.images.size != ids.image_size:
            raise UserError(f"images.size={self.images.size}, but the vision tower takes {ids.image_size} pixels")
        if self.markers not in ("auto", "always", "never"):
            raise UserError(f"markers={self.markers!r}: expected 'auto', 'always' or 'never'")
        return control


class _Writer:
    """Joins text and ids. Text that comes in pieces is tokenised as a whole, once ids follow."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.ids: list[int] = []
        self.labels: list[int] = []
        self._tokenizer = tokenizer
        self._pending = ""
        self._strip = False

    def text(self, text: str) -> None:
        self._pending += text

    def flush(self, strip: bool = False) -> None:
        text = self._pending.lstrip() if self._strip else self._pending
        ids = self._tokenizer.encode(text.rstrip() if strip else text)
        self.ids += ids
        self.labels += [IGNORE] * len(ids)
        self._pending, self._strip = "", strip

    def control(self, ids: list[int], strip: bool = False) -> None:
        """Adds ids without labels. strip: drop white space around them, as the slow tokenizer does around added tokens."""
        self.flush(strip)
        self.ids += ids
        self.labels += [IGNORE] * len(ids)

    def answer(self, ids: list[int]) -> None:
        self.flush()
        self.ids += ids
        self.labels += ids


@functools.cache
def tiny_tokenizer() -> TextTokenizer:
    """The tokenizer of the preset ``tiny``, from package data: 1024 rows made by ``processing.train_tokenizer``, ``<POSE>``, ``<image>``."""
    with resources.as_file(resources.files("chatpose_jax.processing") / "data" / "tiny_tokenizer") as folder:
        return TextTokenizer.read(folder)


def tiny_processor(config: Any, template: Template | str = "plain") -> Processor:
    """The processor of the preset ``tiny``. config: ``preset("tiny")``, or one with the same token ids."""
    return Processor(tiny_tokenizer(), ModelIds.of(config), template)
