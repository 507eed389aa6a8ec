"""Messages to ids, labels and pixels, and ids back to text.

Layout of one conversation (Vicuna v1 as LLaVA-1.5 uses it; ``□`` is one image token, of which a picture has
``num_patches``)::

    <s> {system} USER: □□…□ \\n question ASSISTANT: answer </s> USER: …

Every stretch of text is tokenised alone and ids are spliced between, never written as text and tokenised again. Hence
the ids of a chat's history, followed by the generated ids and ``</s>``, are exactly the beginning of the next turn's
prompt, which is what lets a KV cache be kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.processing import conversation
from chatpose_jax.processing.conversation import POSE, ImageSource, Template, parse_messages
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

IGNORE = -100
"""Label of a position that takes no part in the loss."""

SETTINGS_FILE = "processor.json"

Markers = Literal["auto", "always", "never"]
"""``<im_start>`` and ``<im_end>`` around a picture: where the vocabulary has them, always (then as ordinary text where
it lacks them, which is what CHATPOSE-V0's released chat program does with its vocabulary of 32001), or never."""


@dataclasses.dataclass(frozen=True)
class ModelIds:
    """What processing must know of a model; ``of`` reads it from a ``ModelConfig``."""

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
        """config: a ``chatpose_jax.models.config.ModelConfig`` (not imported: processing stands below the model)."""
        return cls(
            vocab_size=config.text.vocab_size,
            context=config.text.max_position_embeddings,
            num_patches=config.vision.num_patches,
            image_size=config.vision.image_size,
            pose_token_id=config.pose_token_id,
            image_token_id=config.image_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as arrays.

    input_ids, labels: (T,) int32, images expanded; ``labels`` equal ``input_ids`` on answers and their ``</s>`` and
        are -100 elsewhere (not shifted).
    images: one (S, S, 3) float32 normalised RGB array for each picture in order (uint8 and not normalised where asked
        for).
    pose_positions: (P,) int32, position p of each pose token; the hidden state that predicts it is at p - 1.
    truncated: whether ``max_length`` cut something off.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[np.ndarray]
    pose_positions: np.ndarray
    truncated: bool = False

    __repr__ = one_line


class Sizes(NamedTuple):
    """How many tokens, pictures and pose tokens a conversation has, and whether it was cut."""

    tokens: int
    pictures: int
    poses: int
    truncated: bool


class Processor:
    """Tokenizer, conversation template and image preprocessing of one model.

    Raises UserError where the tokenizer does not fit the model: no BOS, no pose token, another id than the model's,
    more rows than the model.
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
        self.images = images or ImageSettings(size=ids.image_size)
        self.markers = markers
        self._check()

    @classmethod
    def load(cls, folder: str | Path, config: Any) -> Processor:
        """The processor of a checkpoint folder: its tokenizer, and ``processor.json`` where there is one.

        What that file leaves out: centre crop and the template that the vocabulary's maker used, which for ``[SEG]`` is
        that of CHATPOSE-V0's released chat program (``llava_v1``, with markers), for any other LLaVA-1.5's.
        """
        folder = Path(folder)
        tokenizer, ids = TextTokenizer.read(folder), ModelIds.of(config)
        file = folder / SETTINGS_FILE
        released = tokenizer.pose_token == RELEASED_POSE
        template: Template | str = "llava_v1" if released else "vicuna_v1"
        markers: Markers = "always" if released else "auto"
        images = None
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if "template" in settings:
                template = Template(**settings["template"])
            if "images" in settings:
                images = ImageSettings.from_json(settings["images"], repr(str(file)))
            return cls(tokenizer, ids, template, images, settings.get("markers", markers))
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(file)!r} is no processor file ({type(error).__name__}: {error}); convert the checkpoint again"
            ) from None

    def save(self, folder: str | Path) -> None:
        """Write what ``load`` reads: the tokenizer's files as they came, and ``processor.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder)
        settings = {
            "template": dataclasses.asdict(self.template),
            "images": dataclasses.asdict(self.images),
            "markers": self.markers,
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def pose_token(self) -> str:
        """The pose token's literal in the vocabulary: ``<POSE>`` or ``[SEG]``. Users see and write ``<POSE>`` in
        either case.
        """
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
        """Encode a conversation.

        messages: see ``conversation``. An assistant message may carry ``"ids"``, the exact ids that were generated
            (pose tokens in, ``</s>`` out), which then stand instead of its text.
        add_generation_prompt: end with ``ASSISTANT:``; the last message must then be the user's.
        max_length: cut what is longer (training), never within a picture; a picture or a pose token behind the cut is
            dropped. Without it, a conversation that exceeds the model's context is a UserError.
        normalise: False leaves images as uint8, for ``images.normalise`` later.
        """
        ids, labels, sources = self._layout(messages, add_generation_prompt)
        length = len(ids)
        if max_length is not None:
            length = self._cut(ids, min(whole("max_length", max_length, 1), self.ids.context))
        elif length > self.ids.context:
            pictures = f" ({len(sources)} × {self.ids.num_patches} of them for pictures)" if sources else ""
            raise UserError(
                f"the conversation has {length} tokens{pictures}, but the model's context holds {self.ids.context}; "
                "shorten it or drop early turns"
            )
        input_ids = np.asarray(ids[:length], np.int32)
        kept = int(np.count_nonzero(input_ids == self.ids.image_token_id)) // self.ids.num_patches
        pixels = [self.images.square(source.value, source.where) for source in sources[:kept]]
        return Encoded(
            input_ids=input_ids,
            labels=np.asarray(labels[:length], np.int32),
            images=[self.images.normalise(picture) for picture in pixels] if normalise else pixels,
            pose_positions=np.flatnonzero(input_ids == self.ids.pose_token_id).astype(np.int32),
            truncated=length < len(ids),
        )

    def measure(self, messages: Sequence[Mapping[str, Any]], max_length: int | None = None) -> Sizes:
        """What ``encode`` would give of a whole conversation, without opening its pictures."""
        ids, _, _ = self._layout(messages, add_generation_prompt=False)
        length = len(ids) if max_length is None else self._cut(ids, min(max_length, self.ids.context))
        kept = ids[:length]
        pictures = kept.count(self.ids.image_token_id) // self.ids.num_patches
        return Sizes(length, pictures, kept.count(self.ids.pose_token_id), length < len(ids))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of generated ids: poses read ``<POSE>``, other control tokens read nothing, no stray spaces."""
        return self.tokenizer.decode(map(int, ids))

    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one by one."""
        return StreamDecoder(self.tokenizer)

    def _layout(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[list[int], list[int], list[ImageSource]]:
        parsed = parse_messages(messages)
        if add_generation_prompt and parsed.turns[-1].role == "assistant":
            raise UserError(
                "the last message is the assistant's, so there is nothing to answer; end with a user message"
            )
        template, ids = self.template, self.ids
        system = parsed.system or template.system
        writer = _Writer(self.tokenizer, ids.bos_token_id)
        sources: list[ImageSource] = []
        writer.text(f"{system} " if system else "")
        for index, turn in enumerate(parsed.turns):
            if turn.role == "user":
                writer.text(f"{template.user}: ")
                sources += self._write_user(writer, turn.parts)
                if add_generation_prompt or index + 1 < len(parsed.turns):
                    writer.text(f" {template.assistant}:")
            elif turn.ids is not None:
                writer.answer([*self._checked(turn.ids, index), ids.eos_token_id])
            else:
                writer.answer([*self._answer_ids(turn.text), ids.eos_token_id])
        writer.flush()
        return writer.ids, writer.labels, sources

    def _write_user(self, writer: _Writer, parts: Sequence[str | ImageSource]) -> list[ImageSource]:
        sources = []
        for index, part in enumerate(parts):
            writer.text("\n" if index else "")
            if isinstance(part, str):
                writer.text(part)
                continue
            sources.append(part)
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
        return sources

    def _answer_ids(self, text: str) -> list[int]:
        first, *rest = split_pose(text)
        return self.tokenizer.encode(first) + [
            token for stretch in rest for token in (self.ids.pose_token_id, *self.tokenizer.encode(stretch))
        ]

    def _checked(self, answer: Sequence[int], index: int) -> Sequence[int]:
        ids = self.ids
        for token in answer:
            if not 0 <= token < ids.vocab_size or token in (ids.eos_token_id, ids.image_token_id):
                raise UserError(
                    f"messages[{index}]: 'ids' holds {token}; expected ids of text and poses in [0, {ids.vocab_size}) "
                    f"without </s> ({ids.eos_token_id}) and image tokens ({ids.image_token_id})"
                )
        return answer

    def _cut(self, ids: list[int], max_length: int) -> int:
        """The greatest length <= max_length that does not end within a picture."""
        if len(ids) <= max_length:
            return len(ids)
        seen = sum(token == self.ids.image_token_id for token in ids[:max_length])
        return max_length - seen % self.ids.num_patches

    def _check(self) -> None:
        tokenizer, ids = self.tokenizer, self.ids
        if tokenizer.pose_token_id is None:
            raise UserError(
                f"the tokenizer has no pose token: expected {' or '.join(map(repr, POSE_LITERALS))} with id "
                f"{ids.pose_token_id} among its added tokens, found {tokenizer.size} rows without; convert the "
                "checkpoint with 'chatpose convert', or add it to added_tokens.json"
            )
        expected = {"pose": ids.pose_token_id, "BOS": ids.bos_token_id, "</s>": ids.eos_token_id}
        found = {"pose": tokenizer.pose_token_id, "BOS": tokenizer.bos_token_id, "</s>": tokenizer.eos_token_id}
        for name, index in expected.items():
            if found[name] != index:
                raise UserError(
                    f"the tokenizer's {name} token has id {found[name]}, the model's {index}; "
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
        if self.images.size != ids.image_size:
            raise UserError(f"images.size={self.images.size}, but the vision tower takes {ids.image_size} pixels")
        if self.markers not in ("auto", "always", "never"):
            raise UserError(f"markers={self.markers!r}: expected 'auto', 'always' or 'never'")


class _Writer:
    """Collects text until ids come between; a stretch of text is tokenised as a whole."""

    def __init__(self, tokenizer: TextTokenizer, bos_token_id: int) -> None:
        self.ids = [bos_token_id]
        self.labels = [IGNORE]
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
        """Ids without loss. ``strip``: they are added tokens of the vocabulary, beside which the slow tokenizer drops
        white space.
        """
        self.flush(strip)
        self.ids += ids
        self.labels += [IGNORE] * len(ids)

    def answer(self, ids: list[int]) -> None:
        self.flush()
        self.ids += ids
        self.labels += ids


def split_pose(text: str) -> list[str]:
    """Stretches of text around each ``<POSE>``; white space beside a pose is dropped, as LLaMA's slow tokenizer does
    beside added tokens.
    """
    return [stretch.strip() for stretch in text.split(POSE)]


@functools.cache
def tiny_tokenizer() -> TextTokenizer:
    """The embedded tokenizer of the preset ``tiny``: 1024 rows made by ``processing.train_tokenizer``, then ``<POSE>``
    and ``<image>``.
    """
    with resources.as_file(resources.files("chatpose_jax.processing") / "data" / "tiny_tokenizer") as folder:
        return TextTokenizer.read(folder)


def tiny_processor(config: Any, template: Template | str = "plain") -> Processor:
    """The processor of the preset ``tiny``, from package data. ``config``: ``preset("tiny")`` or one with its token
    ids.
    """
    return Processor(tiny_tokenizer(), ModelIds.of(config), template)
