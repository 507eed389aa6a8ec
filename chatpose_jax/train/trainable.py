"""The table of what trains: path pattern -> learning-rate multiplier and weight decay, or frozen. The first row that matches a path applies."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import preset
from chatpose_jax.models.quantize import QUANTIZATIONS

Flat = dict[str, Any]
"""Arrays by path, such as ``decoder/norm/scale``."""


class Rule(NamedTuple):
    """One row: a regular expression that must match the whole path. ``lr`` multiplies the learning rate; None freezes the parameter.

    tokens: which rows of added tokens train: "all", or "pose" for only the pose token's. Vocabularies are often padded with unused rows.
    """

    pattern: str
    lr: float | None
    weight_decay: float = 0.0
    tokens: str = "all"


PAPER: tuple[Rule, ...] = (
    Rule(r"decoder/layers/.*/lora_[ab]", 1.0),
    Rule(r"pose_head/.*", 1.0),
    Rule(r"decoder/(embed_tokens|lm_head)/added", 1.0, tokens="pose"),
    Rule(r".*", None),
)
"""LoRA, the pose head, and the rows of the new token; everything else is frozen."""

HEAD: tuple[Rule, ...] = (Rule(r"pose_head/.*", 1.0), Rule(r".*", None))
"""Only the pose head."""

PROJECTOR: tuple[Rule, ...] = (*PAPER[:-1], Rule(r"projector/.*", 0.1), PAPER[-1])
"""The paper's table, and the projector at a tenth of the rate."""

EVERYTHING: tuple[Rule, ...] = (Rule(r".*/(kernel|embedding)", 1.0, 0.01), Rule(r".*", 1.0))
"""All parameters, with a little weight decay for matrices: for models without pretrained weights."""


TOKEN_AXIS = {"decoder/embed_tokens/added": 0, "decoder/lm_head/added": 1}
"""The arrays of added tokens, and their token axis."""


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Flat:
    """Nested dicts -> {path: leaf}."""
    flat: Flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def assign(params: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, Rule]:
    """The row that applies to each path. Raises UserError for a path without a row, a row that matches nothing, and an invalid pattern."""
    compiled = []
    for row in rules:
        try:
            compiled.append((re.compile(row.pattern), row))
        except re.error as error:
            raise UserError(f"train.trainable: {row.pattern!r} is not a valid regular expression: {error}") from error
    assigned: dict[str, Rule] = {}
    for path, leaf in flatten(params).items():
        found = next((row for regex, row in compiled if regex.fullmatch(path)), None)
        if found is None:
            raise UserError(
                f"train.trainable: no row matches {path!r}; end the table with ('.*', None) to freeze the rest"
            )
        of_codes = path.endswith(tuple(f"/{quantization.scale}" for quantization in QUANTIZATIONS.values()))
        if found.lr is not None and (of_codes or jnp.issubdtype(leaf.dtype, jnp.integer)):
            raise UserError(
                f"train.trainable: {path} is {'a scale of codes' if of_codes else leaf.dtype} and cannot train: freeze it in a row before "
                f"{found.pattern!r}, or set model.quantize=none"
            )
        if found.tokens != "all" and path not in TOKEN_AXIS:
            raise UserError(
                f"train.trainable: the row {found.pattern!r} has tokens={found.tokens!r}, but {path} has no rows of tokens: "
                f"only {' and '.join(TOKEN_AXIS)} have them"
            )
        assigned[path] = found
    paths = [*assigned, *_absent(assigned)]
    for regex, row in compiled:
        if row.lr is not None and not any(regex.fullmatch(path) for path in paths):
            raise UserError(f"train.trainable: the row {row.pattern!r} matches no parameter of this model")
    if not any(row.lr for row in assigned.values()):
        raise UserError("train.trainable freezes every parameter: nothing would train")
    return assigned


def _absent(held: Mapping[str, Any]) -> list[str]:
    """Parameters that a model of another kind has: a row may be about the tower of a model without one, or the LM head of a tied one."""
    parts = ("vision/", "projector/", "decoder/lm_head/")
    lacking = tuple(part for part in parts if not any(path.startswith(part) for path in held))
    return [path for path in flatten(abstract_params(preset("tiny"))) if path.startswith(lacking)] if lacking else []


def split(params: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Flat, Flat]:
    """(trainable, frozen), both by path. Works for arrays and for abstract shapes."""
    rows, flat = assign(params, rules), flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if rows[path].lr is not None}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def trains_before_adapters(params: Mapping[str, Any], rules: Sequence[Rule]) -> str | None:
    """The path of a parameter that trains and that the decoder's layers before the first with adapters depend on; None if there is none."""
    before = re.compile(r"(vision|projector|decoder/embed_tokens)/.*|decoder/layers/.*(?<!/lora_[ab])")
    return next(
        (path for path, row in assign(params, rules).items() if row.lr is not None and before.fullmatch(path)), None
    )


def merge(trainable: Flat, frozen: Flat) -> dict[str, Any]:
    """The inverse of ``split``: the whole tree."""
    return unflatten({**trainable, **frozen})


def masks(params: Mapping[str, Any], rules: Sequence[Rule], pose_token: int) -> Flat:
    """Masks of the arrays of which only a part trains: path -> bool, broadcastable to the array. pose_token: its index among the added tokens."""
    rows, flat = assign(params, rules), flatten(params)
    axes = {path: axis for path, axis in TOKEN_AXIS.items() if path in flat}  # a tied model has one of the two
    for path, axis in axes.items():
        wanted = rows[path].lr is not None and rows[path].tokens == "pose"
        if wanted and not 0 <= pose_token < flat[path].shape[axis]:
            raise UserError(
                f"train.trainable: the pose token is not among the {flat[path].shape[axis]} added tokens of {path}: "
                "set tokens='all' in its row, or freeze it"
            )
    return {
        path: np.expand_dims(np.arange(flat[path].shape[axis]) == pose_token, 1 - axis)
        for path, axis in axes.items()
        if rows[path].lr is not None and rows[path].tokens == "pose"
    }


def select(masks: Flat, new: Flat, old: Flat) -> Flat:
    """``new`` where the mask is true or an array has no mask, and exactly ``old`` elsewhere."""
    return {path: jnp.where(masks[path], x, old[path]) if path in masks else x for path, x in new.items()}


def describe_trainable(params: Mapping[str, Any], rules: Sequence[Rule]) -> str:
    """The table with counts, printed when a run starts."""
    rows, flat = assign(params, rules), flatten(params)

    def size(path: str) -> int:
        """Parameters of an array that train, or are frozen."""
        tokens = flat[path].shape[TOKEN_AXIS[path]] if rows[path].tokens == "pose" else 1
        return math.prod(flat[path].shape) // max(tokens, 1)

    lines = [f"{'what trains':48} {'arrays':>7} {'parameters':>15} {'lr ×':>7} {'decay':>7}"]
    for rule in dict.fromkeys(rules):
        sizes = [size(path) for path, row in rows.items() if row == rule]
        lr = "frozen" if rule.lr is None else f"{rule.lr:g}"
        pattern = rule.pattern if rule.tokens == "all" else f"{rule.pattern} (of {rule.tokens})"
        lines.append(f"{pattern:48} {len(sizes):7d} {sum(sizes):15,d} {lr:>7} {rule.weight_decay:7g}")
    total = sum(math.prod(leaf.shape) for leaf in flat.values())
    active = sum(size(path) for path, row in rows.items() if row.lr is not None)
    lines.append(f"{active:,d} of {total:,d} parameters train ({100 * active / total:.3g} %)")
    return "\n".join(lines)


def rates(rules: Sequence[Rule]) -> dict[str, float]:
    """The learning-rate multiplier of each row that trains. Names are the row's index and the words of its pattern, as in ``{"3_projector": 0.1}``.
    Empty if all multipliers are 1.
    """
    found = {
        f"{index}_{'_'.join(re.findall('[a-zA-Z0-9]+', row.pattern))}".rstrip("_"): row.lr
        for index, row in enumerate(rules)
        if row.lr is not None
    }
    return found if set(found.values()) != {1.0} else {}


def scale_by_rows(rows: Mapping[str, Rule], schedule: optax.Schedule) -> optax.GradientTransformation:
    """The last part of AdamW, with a rate for each path: −lr(step) · row.lr · (u + row.weight_decay · p) (Loshchilov & Hutter 2019)."""

    def init(params: Flat) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Flat, state: optax.ScaleByScheduleState, params: Flat | None = None) -> tuple[Flat, Any]:
        assert params is not None
        lr = schedule(state.count)
        scaled = {
            path: -lr * (rows[path].lr or 0.0) * (u + rows[path].weight_decay * params[path])
            for path, u in updates.items()
        }
        return scaled, optax.ScaleByScheduleState(count=state.count + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
