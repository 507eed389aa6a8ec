"""What a family of pretrained networks says of itself: ``Language``, ``Tower``. Each is one module of this package."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig, TextConfig, VisionConfig
from chatpose_jax.processing.conversation import Template
from chatpose_jax.settings import one_line
from chatpose_jax.weights.table import Ignored, NameRule, Settings, Shape

_MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Language:
    """A family of language models that the decoder of this program can run.

    name: that of its module, ``TextConfig.backbone`` and ``--backbone``.
    title: for reports, as in "Llama 3".
    model_types: ``model_type`` in ``config.json``. The first is written.
    architecture: the class of transformers that loads it.
    template: the conversation's: a name in ``processing.conversation.TEMPLATES``, or the template itself.
    system: the default system text, if not the template's.
    control: control tokens by which families of one ``model_type`` are told apart: each is in the tokenizers of all its models.
    gguf: ``general.architecture`` in GGUF files.
    gguf_permuted: whether GGUF files hold the rows of q and k in another order than transformers.
    settings: ``(config, shapes, prefix, where)`` → fields of ``TextConfig`` without those of the vocabulary. config: the ``config.json`` of the
        language model. shapes: of all tensors. prefix: of the decoder's tensors, such as ``"model."``. where: prefix of the keys in errors. Raises
        UserError for every setting that the decoder does not follow.
    rules: ``(prefix, prefix of the LM head)`` → the name table. Rules without a leaf in the model, such as those of biases, do not apply.
    config_json: settings → the ``config.json`` of the language model, for transformers 4.x and 5.x.
    sizes: published models, by name.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    template: str | Template
    system: str | None = None
    control: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    gguf_permuted: bool = False
    settings: Callable[[Mapping[str, Any], Mapping[str, Shape], str, str], Settings]
    rules: Callable[[str, str], tuple[NameRule, ...]]
    config_json: Callable[[ModelConfig], dict[str, Any]]
    sizes: Mapping[str, TextConfig] = dataclasses.field(default_factory=dict)

    __repr__ = one_line


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tower:
    """A family of vision towers.

    name: that of its module, ``VisionConfig.backbone`` and, for a folder that has only a tower, ``--layout``.
    model_types: ``model_type`` in ``config.json``. The first is written.
    prefixes: of its tensors in a checkpoint that has only the tower, or the tower and its text half.
    recognise: ``(shapes, prefix)`` → whether the tensors under the prefix are of this family.
    settings: ``(config, shapes, prefix, where)`` → ``VisionConfig``, with any ``select_layer``. config: the tower's, or ``{}``.
    rules, unused: ``(prefix)`` → the name table, and that of tensors behind the last block, which the model does not use.
    ignored: what else its own checkpoints contain.
    config_json: settings, dtype → the ``config.json`` of the tower.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    prefixes: tuple[str, ...]
    recognise: Callable[[Mapping[str, Shape], str], bool]
    settings: Callable[[Mapping[str, Any], Mapping[str, Shape], str, str], VisionConfig]
    rules: Callable[[str], tuple[NameRule, ...]]
    unused: Callable[[str], tuple[NameRule, ...]]
    ignored: tuple[Ignored, ...] = ()
    config_json: Callable[[VisionConfig, str], dict[str, Any]]

    __repr__ = one_line


def demand(config: Mapping[str, Any], where: str, expected: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError if a key of ``config`` has a value other than the allowed ones. The error names the first of them."""
    for key, allowed in expected.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"config.json: {where}{key}={config[key]!r} is not supported; expected {key}={allowed[0]!r}"
            )


def agree(config: Mapping[str, Any], where: str, found: Mapping[str, int]) -> None:
    """Raises UserError if ``config`` has other sizes than the tensors."""
    if wrong := [
        f"{where}{key}={config[key]} (tensors: {size})" for key, size in found.items() if config.get(key, size) != size
    ]:
        raise UserError(
            f"config.json and the tensors disagree: {', '.join(wrong)}; the files belong to different models"
        )


def count_layers(config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape], prefix: str) -> int:
    """The number of layers under ``prefix``. ``config.json`` has priority, so that the layers of a lost shard are reported as missing."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    shown = max((int(match[1]) + 1 for name in shapes if (match := numbered.match(name))), default=0)
    layers = int(config.get("num_hidden_layers", shown))
    if layers > _MAX_LAYERS:
        raise UserError(
            f"{where}num_hidden_layers={layers}, by config.json or the tensors; expected at most {_MAX_LAYERS}"
        )
    return layers
