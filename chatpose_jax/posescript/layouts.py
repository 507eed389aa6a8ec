"""The tensor names of PoseScript's checkpoints, as a table: they are also the names in folders that this package writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.transformer_encoder import positions
from chatpose_jax.settings import did_you_mean
from chatpose_jax.weights.readers import TensorEntry
from chatpose_jax.weights.table import Ignored, NameRule, Transform

_T = Transform.TRANSPOSE


def _linear(source: str, target: str, weight: str = ".weight", bias: str = ".bias") -> tuple[NameRule, NameRule]:
    return NameRule(f"{source}{weight}", f"{target}/kernel", _T), NameRule(f"{source}{bias}", f"{target}/bias")


def _norm(source: str, target: str) -> tuple[NameRule, NameRule]:
    return NameRule(f"{source}.weight", f"{target}/scale"), NameRule(f"{source}.bias", f"{target}/bias")


def _batch_norm(source: str, target: str) -> tuple[NameRule, ...]:
    running = (NameRule(f"{source}.running_{name}", f"{target}/{name}") for name in ("mean", "var"))
    return (*_norm(source, target), *running)


def pose_trunk(source: str, target: str) -> tuple[NameRule, ...]:
    """``PoseTrunk``. source: such as ``pose_encoder.encoder``; its layers are numbered."""
    return (
        *_batch_norm(f"{source}.1", f"{target}/norm_in"),
        *_linear(f"{source}.2", f"{target}/linear_in"),
        *_batch_norm(f"{source}.4", f"{target}/norm"),
        *_linear(f"{source}.6", f"{target}/linear_1"),
        *_linear(f"{source}.7", f"{target}/linear_2"),
    )


def word_encoder(source: str, target: str) -> tuple[NameRule, ...]:
    """``WordEncoder``."""
    return (
        NameRule(f"{source}.embed.weight", f"{target}/embedding"),
        *(
            rule
            for direction, suffix in (("forward", ""), ("backward", "_reverse"))
            for ours, theirs in (("inputs", "ih"), ("hidden", "hh"))
            for rule in _linear(
                f"{source}.sent_enc.",
                f"{target}/{direction}/{ours}",
                f"weight_{theirs}_l0{suffix}",
                f"bias_{theirs}_l0{suffix}",
            )
        ),
    )


def distilbert(source: str, target: str) -> tuple[NameRule, ...]:
    """``DistilBert``, by the names of transformers. source ends with a dot, target with a slash, or they are empty."""
    layer, out = f"{source}transformer.layer.{{i}}.", f"{target}layers"
    return (
        NameRule(f"{source}embeddings.word_embeddings.weight", f"{target}words"),
        NameRule(f"{source}embeddings.position_embeddings.weight", f"{target}positions"),
        *_norm(f"{source}embeddings.LayerNorm", f"{target}norm"),
        *(rule for name in ("q", "k", "v") for rule in _linear(f"{layer}attention.{name}_lin", f"{out}/{name}")),
        *_linear(f"{layer}attention.out_lin", f"{out}/o"),
        *_norm(f"{layer}sa_layer_norm", f"{out}/attention_norm"),
        *_linear(f"{layer}ffn.lin1", f"{out}/fc1"),
        *_linear(f"{layer}ffn.lin2", f"{out}/fc2"),
        *_norm(f"{layer}output_layer_norm", f"{out}/norm"),
    )


def transformer_encoder(source: str, target: str) -> tuple[NameRule, ...]:
    """``TransformerEncoder``."""
    layer, out = f"{source}.transformer_encoder.layers.{{i}}", f"{target}/layers"
    return (
        *distilbert(f"{source}.pretrained_text_encoder.", f"{target}/distilbert/"),
        *_linear(f"{source}.projection.1", f"{target}/projection"),
        *_linear(f"{layer}.self_attn.", f"{out}/qkv", "in_proj_weight", "in_proj_bias"),
        *_linear(f"{layer}.self_attn.out_proj", f"{out}/o"),
        *_linear(f"{layer}.linear1", f"{out}/fc1"),
        *_linear(f"{layer}.linear2", f"{out}/fc2"),
        *_norm(f"{layer}.norm1", f"{out}/norm1"),
        *_norm(f"{layer}.norm2", f"{out}/norm2"),
    )


def normal_output(source: str, target: str) -> tuple[NameRule, ...]:
    """``NormalOutput``. PoseScript calls the linear in front of its softplus ``logvar``."""
    return (*_linear(f"{source}.mu", f"{target}/mean"), *_linear(f"{source}.logvar", f"{target}/spread"))


RETRIEVER: tuple[NameRule, ...] = (
    *pose_trunk("pose_encoder.encoder", "pose_encoder/trunk"),
    *_linear("pose_encoder.encoder.8", "pose_encoder/narrow"),
    *_linear("pose_encoder.encoder.10", "pose_encoder/out"),
    *word_encoder("text_encoder", "text_encoder"),
    *transformer_encoder("text_encoder", "text_encoder"),
    NameRule("loss_weight", "loss_weight"),
)
"""``Retrieval``, with either text encoder."""
POSE_VAE: tuple[NameRule, ...] = (
    *pose_trunk("pose_encoder.encoder", "pose_encoder"),
    *normal_output("pose_encoder.encoder.8", "pose_output"),
    *word_encoder("text_encoder", "text_encoder"),
    *transformer_encoder("text_encoder", "text_encoder"),
    *normal_output("text_encoder.output_layer", "text_output"),
    *_linear("pose_decoder.decoder.0", "decoder/linear_1"),
    *_linear("pose_decoder.decoder.3", "decoder/linear_2"),
    *_linear("pose_decoder.decoder.5", "decoder/linear_3"),
    NameRule("decsigma_v2v", "log_scale_vertices"),
    NameRule("decsigma_jts", "log_scale_joints"),
    NameRule("decsigma_rot", "log_variance_rotations"),
)
"""``PoseVae``, with either text encoder."""
IGNORED = (
    Ignored(r".*\.num_batches_tracked", "counts the steps of training"),
    Ignored(r".*\.embeddings\.position_ids", "a constant range"),
)
POSITIONS = "positional_encoding.pe"
"""The end of the name of a tensor that is computed here, and compared."""


def to_tensors(model: nnx.Module, rules: Sequence[NameRule]) -> dict[str, np.ndarray]:
    """All parameters and statistics of a network, float32, by their names in PyTorch. Raises ValueError for one without a rule."""
    leaves = {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    found: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.target not in leaves:  # of the other text encoder
            continue
        leaf = leaves.pop(rule.target)
        for name, layer in zip(rule.sources(len(leaf)), leaf if rule.stacked else [leaf]):
            found[name] = np.ascontiguousarray(rule.transform.inverse(layer))
    if leaves:
        raise ValueError(f"no rule for {', '.join(leaves)}")
    return found


def filled(model: Any, rules: Sequence[NameRule], tensors: Mapping[str, TensorEntry], where: object) -> Any:
    """The network with all parameters and statistics from tensors by their names in PyTorch.

    model: its arrays may be shapes alone (``nnx.eval_shape``). where: begins the errors.
    Raises UserError for a tensor that is missing, has another shape, holds NaN or infinities, or has no place.
    """
    rest, leaves = dict(tensors), {}
    graph, state = nnx.split(model)
    for path, leaf in nnx.to_flat_state(state):
        target = "/".join(map(str, path))
        rule = next((rule for rule in rules if rule.target == target), None)
        if rule is None:
            raise ValueError(f"no rule for {target}")
        shape = leaf.shape[1:] if rule.stacked else leaf.shape
        found = [
            rule.transform.forward(_values(rest, name, rule.transform.source_shape(shape), where))
            for name in rule.sources(leaf.shape[0])
        ]
        leaves[path] = leaf.replace(jnp.asarray(np.stack(found) if rule.stacked else found[0]))
    for name in [name for name in rest if any(each.matches(name) for each in IGNORED)]:
        del rest[name]
    for name in [name for name in rest if name.endswith(POSITIONS)]:
        length, _, width = shape = rest[name].shape
        if np.abs(_values(rest, name, shape, where)[:, 0] - positions(length, width)).max() > 1e-3:
            raise UserError(f"{where}: {name} does not hold the usual sines of positions, and no others are supported")
    if rest:
        raise UserError(f"{where}: {len(rest)} tensors have no place in this network, such as {sorted(rest)[0]!r}")
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _values(rest: dict[str, TensorEntry], name: str, shape: Sequence[int], where: object) -> np.ndarray:
    if name not in rest:
        raise UserError(f"{where}: there is no tensor {name!r}{did_you_mean(name, rest)}")
    entry = rest.pop(name)
    if entry.shape != tuple(shape):
        raise UserError(f"{where}: {name} has the shape {entry.shape}; expected {tuple(shape)}")
    values = np.asarray(entry.read(), np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: {name} holds NaN or infinities; fetch the file again")
    return values
