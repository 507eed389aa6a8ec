"""The configuration that the sources of a conversion imply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType, HeadConfig, LoRAConfig, ModelConfig, TextConfig, VisionConfig
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.processing.tokenizer import TOKENIZER_FILES, named_token
from chatpose_jax.settings import one_line
from chatpose_jax.weights.adapters import adapted_layers
from chatpose_jax.weights.backbones import LANGUAGES
from chatpose_jax.weights.layouts.decoder import FAMILY as PLAIN
from chatpose_jax.weights.readers import Checkpoint, read_json_object
from chatpose_jax.weights.sources import Source
from chatpose_jax.weights.spec import SourceSpec
from chatpose_jax.weights.templates import ChosenTemplate, choose_template
from chatpose_jax.weights.tokens import Tokens, read_tokens, tokens_in

_SPARE_ROWS = 1024
"""Largest number of rows without a token. Some embeddings are padded to a round size."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    tokens: those of the source. added: tokens that the written tokenizer gets in addition. pose_is_new: whether the pose token is one of these.
    template: what stands around the turns of a conversation.
    """

    tokens: Tokens
    added: tuple[str, ...]
    pose_token_id: int
    rows: int
    """Rows of the embedding in the result."""
    template: ChosenTemplate

    __repr__ = one_line

    @property
    def pose_is_new(self) -> bool:
        return self.tokens.pose_token_id is None


def infer_config(sources: Sequence[Source], spec: SourceSpec) -> tuple[ModelConfig, Vocabulary]:
    """The configuration that the sources' ``config.json``, tensor shapes and tokenizer imply. The dtype is that of ``spec``, or
    else that of most of the main source (float64 becomes float32).

    Raises UserError: a setting that the model does not support, or files that contradict each other.
    """
    settings: dict[str, Any] = {}
    for source in sources:
        stored = source.checkpoint.config()
        decoder = any(name.endswith("embed_tokens.weight") for name in source.checkpoint.tensors)
        if decoder and not stored and not source.is_adapter:
            raise UserError(
                f"{source.checkpoint.folder}: no config.json beside the weights; the number of heads and the settings of norms and RoPE are not in "
                "the tensors; fetch it from where the weights came from"
            )
        try:
            found = source.layout.settings(stored, source.checkpoint.shapes)
        except UserError as error:
            raise UserError(f"{source.checkpoint.folder}: {error}") from None
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise UserError(
                f"{source.checkpoint.folder}: a setting in config.json has the wrong type ({error}); fetch it again"
            ) from None
        settings = settings | found if source.is_adapter else found | settings
    main = sources[0].checkpoint
    if "text" not in settings:
        raise UserError(
            f"{main.folder}: {sources[0].layout.title}, without a language model; give the checkpoint of a language model as the source"
        )
    rows = embedding_rows(sources)
    nested = main.config().get("text_config")
    nested = {name: value for name, value in nested.items() if value is not None} if isinstance(nested, dict) else {}
    flat = main.config() | nested
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, Any] = {
        name: int(flat[name]) for name in special if isinstance(flat.get(name), int) and flat[name] >= 0
    }
    image_token_id = settings.get("image_token_id", -200)
    tokens = read_tokens(spec.tokenizer) if spec.tokenizer else tokens_in(tokenizer_source(sources).checkpoint)
    if rows > tokens.size + _SPARE_ROWS:
        raise UserError(
            f"{tokens.folder}: the tokenizer has {tokens.size} tokens, the embedding {rows} rows, far more; this tokenizer "
            "belongs to another checkpoint"
        )
    listed = [id for source in sources for ids in source.token_rows.values() for id in ids]
    if listed and max(listed) >= max(rows, tokens.size) + len(listed):
        raise UserError(
            f"the adapter has a row for token {max(listed)}, the embedding has {rows} rows and the tokenizer {tokens.size} "
            "tokens; the adapter belongs to another base"
        )
    vision = settings.get("vision") or (VisionConfig() if sees(sources, spec) else None)
    if vision is not None:
        vision = dataclasses.replace(vision, select_layer=settings.get("select_layer", vision.select_layer))
    family = sources[0].layout.language or LANGUAGES["llama2"]
    template = choose_template(
        tokens,
        settings.get("template", family.template),
        None if "template" in settings else family.system,
        named=spec.template,
        check=not spec.ignore_chat_template,
        images=vision is not None,
    )
    ids["eos_token_id"] = tokens.control[template.template.end]
    if others := _other_ends(main, flat, tokens, template):
        ids["other_eos_token_ids"] = tuple(tokens.control[name] for name in others)
        note = f"answers end at {template.template.end}, and as in transformers at {', '.join(others)} (eos_token_id of the source)"
        template = dataclasses.replace(template, notes=(*template.notes, note))
    if tokens.byte_level:
        bos, pad = (named_token(tokens.files, name) or "" for name in ("bos_token", "pad_token"))
        ids.setdefault("bos_token_id", tokens.control.get(bos, -1))
        ids.setdefault("pad_token_id", tokens.control.get(pad, ids["eos_token_id"]))  # 0 is a text there
    vocabulary = _vocabulary(
        tokens, max([rows, *(id + 1 for id in listed)]), image_token_id, ids.get("pad_token_id", 0), template
    )
    param_dtype = spec.dtype or cast(DType, "float32" if main.dtype == np.float64 else main.dtype.name)
    config = ModelConfig(
        vision=vision,
        image_newline=vision is not None and settings.get("image_newline", False),
        text=TextConfig(vocab_size=vocabulary.rows, base_vocab_size=vocabulary.tokens.base_size, **settings["text"]),
        lora=_lora(sources, settings["text"]["num_layers"]),
        head=settings.get("head", HeadConfig()),
        pose_token_id=vocabulary.pose_token_id,
        image_token_id=image_token_id,
        dtype=param_dtype,
        param_dtype=param_dtype,
        **ids,
    )
    return config, vocabulary


def _other_ends(main: Checkpoint, config: Mapping[str, Any], tokens: Tokens, template: ChosenTemplate) -> list[str]:
    """Control tokens at which transformers ends an answer besides the template's: Llama 3 and Qwen name several."""
    file = main.folder / "generation_config.json"
    said = read_json_object(file).get("eos_token_id") if file.is_file() else None
    said = config.get("eos_token_id") if said is None else said
    ends = said if isinstance(said, list) else [said]
    return [name for name, id in tokens.control.items() if id in ends and name != template.template.end]


def sees(sources: Sequence[Source], spec: SourceSpec) -> bool:
    """Whether the result takes images. A plain decoder does only if a tower or a projector is given or asked for."""
    parts = {"vision", "projector"}
    return sources[0].layout.family != PLAIN or bool(
        parts & {*spec.init_missing, *(part for source in sources for part in source.layout.parts)}
    )


def _lora(sources: Sequence[Source], layers: int) -> LoRAConfig | None:
    """The settings of the adapters. They begin with the first layer of the decoder that has one."""
    found = [source for source in sources if source.lora is not None]
    if len(found) > 1:
        raise UserError(
            f"{found[0].title} and {found[1].title} both have adapters, but a model can have only one set; "
            "merge one of them in PyTorch first (merge_and_unload)"
        )
    if not found or found[0].lora is None:
        return None
    first = min(adapted_layers(found[0].checkpoint.shapes), default=0)
    return dataclasses.replace(found[0].lora, last_layers=layers - first if 0 < first < layers else None)


def tokenizer_source(sources: Sequence[Source]) -> Source:
    """The adapter if it has a tokenizer, because that has the added tokens; else the main source."""
    folders = ((source, source.checkpoint.folder) for source in sources if source.is_adapter)
    has = (source for source, folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES[:2]))
    return next(has, sources[0])


def _vocabulary(
    tokens: Tokens, rows: int, image_token_id: int, pad_token_id: int, template: ChosenTemplate
) -> Vocabulary:
    if tokens.size > rows:
        raise UserError(
            f"{tokens.folder}: the tokenizer has {tokens.size} tokens, the embedding {rows} rows; this tokenizer belongs to another checkpoint"
        )
    named = [(image_token_id, "<image>"), (pad_token_id, "<pad>")]
    if image_token_id == tokens.base_size:
        # transformers' conversion of LLaVA adds both tokens after the base vocabulary, but not every config.json names the second.
        named.insert(0, (image_token_id + 1, "<pad>"))
    special = {id: literal for id, literal in named if tokens.size <= id < rows}
    first_free = max([tokens.size, *(id + 1 for id in special)])
    pose = tokens.pose_token_id if tokens.pose_token_id is not None else first_free
    special |= {pose: POSE}
    added = [special.get(id, f"<unused_{id}>") for id in range(tokens.size, max(pose + 1, first_free))]
    return Vocabulary(tokens, tuple(added), pose, max(rows, pose + 1), template)


def embedding_rows(sources: Sequence[Source]) -> int:
    """Number of rows of the sources' embedding; an adapter's embedding replaces the base's."""
    held = [
        math.prod(source.checkpoint.tensors[rule.source].shape[:1])  # a scalar is reported as misshaped later
        for source in sources
        for rule in source.layout.rules
        if rule.target == "decoder/embed_tokens/embedding" and rule.source in source.checkpoint.tensors
    ]
    return held[-1]
