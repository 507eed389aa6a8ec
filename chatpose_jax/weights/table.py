"""Name tables: which source tensor becomes which leaf of the parameter tree, and back. Families (``backbones``) and ``layouts`` are written in them.

A ``NameRule`` maps one name template to one leaf. If the template contains ``{i}``, the number of the layer, the leaf has a leading layer axis. A
tensor that becomes two leaves (rows of the base vocabulary, and added rows) has two rules with different ``rows``. Every transform has an inverse, so
the same table also writes checkpoints.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from chatpose_jax.models.config import ModelConfig
from chatpose_jax.settings import one_line

Shape = tuple[int, ...]
Read = Callable[[tuple[slice, ...]], np.ndarray]


class Transform(enum.Enum):
    """How a source tensor becomes a leaf, or one layer of it."""

    SAME = "same"
    TRANSPOSE = "transpose"
    """torch Linear (out, in) → kernel (in, out)."""
    PATCHES = "patches"
    """torch Conv2d (D, 3, P, P) → kernel (P·P·3, D), rows in the order (py, px, channel) of a flattened NHWC patch."""

    def source_shape(self, shape: Shape) -> Shape:
        """The shape of the source for a leaf (or layer) of ``shape``."""
        if self is Transform.TRANSPOSE:
            return shape[::-1]
        if self is Transform.PATCHES:
            side = round((shape[0] / 3) ** 0.5)
            return (shape[1], 3, side, side)
        return shape

    @property
    def row_axis(self) -> int:
        """The axis of a leaf (or layer) that corresponds to the first axis of the source."""
        return 0 if self is Transform.SAME else -1

    def read(self, read: Read, shape: Shape, index: tuple[slice, ...]) -> np.ndarray:
        """The part ``index`` of a leaf (or layer) of ``shape``; ``read`` takes an index into the source. May return a
        view with any strides."""
        if self is Transform.TRANSPOSE:
            return read(index[::-1]).T
        if self is Transform.PATCHES:
            source = self.source_shape(shape)
            kernels = read((index[1], *(slice(0, n) for n in source[1:])))
            return self.forward(kernels)[index[0]]
        return read(index)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Source → leaf (or layer), whole."""
        if self is Transform.TRANSPOSE:
            return array.T
        if self is Transform.PATCHES:
            return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        return array

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Leaf (or layer) → source, whole; ``inverse(forward(x)) == x``."""
        if self is Transform.PATCHES:
            _, channels, side, _ = self.source_shape(array.shape)
            return array.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
        return self.forward(array)


@dataclasses.dataclass(frozen=True)
class NameRule:
    """One row of a table: source name template → leaf path and transform. rows: which rows of a vocabulary tensor."""

    source: str
    target: str
    transform: Transform = Transform.SAME
    rows: Literal["all", "base", "added"] = "all"

    @property
    def stacked(self) -> bool:
        return "{i}" in self.source

    def sources(self, num_layers: int) -> list[str]:
        """Source names in the order of the leaf's layer axis; one name if the leaf is not stacked."""
        return [self.source.replace("{i}", str(i)) for i in range(num_layers)] if self.stacked else [self.source]


_T = Transform.TRANSPOSE


def linear(source: str, target: str) -> tuple[NameRule, NameRule]:
    """The rules of a torch Linear with a bias."""
    return NameRule(f"{source}.weight", f"{target}/kernel", _T), NameRule(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[NameRule, NameRule]:
    """The rules of a LayerNorm."""
    return NameRule(f"{source}.weight", f"{target}/scale"), NameRule(f"{source}.bias", f"{target}/bias")


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Source tensors that are not used, by pattern (``re.fullmatch``), with the reason."""

    pattern: str
    why: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


Settings = dict[str, Any]
_ADAPTED = r"decoder/layers/(attn|mlp)/"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names in one checkpoint: its kind, with the families of its language model and its vision tower.

    A rule whose leaf the model does not have applies to no tensor: tied weights have no LM head, few families have biases.

    name: of its kind; passengers are stored under it. family: the name for the user (``--layout``), which several kinds may share.
    unused: tensors that this model does not use but other layouts have names for, under paths of their own. They become passengers.
    ``settings(config_json, shapes)`` returns any of the keys ``vision`` (VisionConfig), ``text`` (TextConfig fields without the vocabulary split),
    ``head`` (HeadConfig), ``select_layer``, ``image_newline``, ``image_token_id`` and ``template`` (a name, where it is
    not the language model's). It raises UserError for a setting that the model does not support.
    config_json: makes ``config.json`` of an export; ``None`` if nothing is exported in this layout.
    language, tower: the families; ``None`` if it contains none.
    """

    name: str
    title: str
    rules: tuple[NameRule, ...]
    ignored: tuple[Ignored, ...]
    settings: Callable[[Mapping[str, Any], Mapping[str, Shape]], Settings]
    family: str = ""
    unused: tuple[NameRule, ...] = ()
    config_json: Callable[[ModelConfig], dict[str, Any]] | None = None
    language: Any = None
    """The ``backbones.Language`` in it, if any. Families are written in these tables, so they cannot be imported here."""
    tower: Any = None
    """The ``backbones.Tower`` in it, if any."""

    __repr__ = one_line

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the model that it contains, of ``vision``, ``projector``, ``decoder``, ``pose_head``."""
        return frozenset(rule.target.split("/")[0] for rule in self.rules)

    @property
    def lora(self) -> tuple[NameRule, ...]:
        """Rules for PEFT's adapters of the decoder's projections, which are stored beside their weights."""
        return tuple(
            NameRule(f"{rule.source.removesuffix('weight')}lora_{name}.weight", f"{parent}/lora_{name.lower()}", _T)
            for rule in self.rules
            if (parent := rule.target.removesuffix("/kernel")) != rule.target and re.match(_ADAPTED, rule.target)
            for name in "AB"
        )

    def locate(self, name: str) -> tuple[NameRule, int] | None:
        """The rule of a source tensor, and its layer (0 if the leaf is not stacked); ``None`` if no rule has the name."""
        for rule in (*self.rules, *self.unused):
            before, _, after = rule.source.partition("{i}")
            if rule.stacked and name.startswith(before) and name.endswith(after):
                if (layer := name[len(before) : len(name) - len(after)]).isdecimal():
                    return rule, int(layer)
            elif name == rule.source:
                return rule, 0
        return None

    def translate(self, name: str, other: Layout) -> str | None:
        """The name that a tensor of this layout has in ``other``; ``None`` if it has none."""
        if found := self.locate(name):
            rule, layer = found
            rows = (match for match in (*other.rules, *other.unused) if match.target == rule.target)
            return next((match.source.replace("{i}", str(layer)) for match in rows), None)
        return name if self.family == other.family else None
