"""Name tables of parts, from which layouts are built. Each takes the prefix of the part's tensor names."""

from __future__ import annotations

from chatpose_jax.weights.layouts.table import Ignored, NameRule, Transform

_T = Transform.TRANSPOSE


def _linear(source: str, target: str) -> tuple[NameRule, NameRule]:
    return NameRule(f"{source}.weight", f"{target}/kernel", _T), NameRule(f"{source}.bias", f"{target}/bias")


def _norm(source: str, target: str) -> tuple[NameRule, NameRule]:
    return NameRule(f"{source}.weight", f"{target}/scale"), NameRule(f"{source}.bias", f"{target}/bias")


def llama(model: str, lm_head: str) -> tuple[NameRule, ...]:
    """LLaMA decoder; ``model`` and ``lm_head`` are prefixes such as ``"model."`` and ``"lm_head."``."""
    layer, out = f"{model}layers.{{i}}.", "decoder/layers/"
    return (
        NameRule(f"{model}embed_tokens.weight", "decoder/embed_tokens/embedding", rows="base"),
        NameRule(f"{model}embed_tokens.weight", "decoder/embed_tokens/added", rows="added"),
        NameRule(f"{layer}input_layernorm.weight", f"{out}input_norm/scale"),
        NameRule(f"{layer}post_attention_layernorm.weight", f"{out}post_attention_norm/scale"),
        *(
            NameRule(f"{layer}self_attn.{n}.weight", f"{out}attn/{n}/kernel", _T)
            for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        ),
        *(
            NameRule(f"{layer}mlp.{n}.weight", f"{out}mlp/{n}/kernel", _T)
            for n in ("gate_proj", "up_proj", "down_proj")
        ),
        NameRule(f"{model}norm.weight", "decoder/norm/scale"),
        NameRule(f"{lm_head}weight", "decoder/lm_head/kernel", _T, rows="base"),
        NameRule(f"{lm_head}weight", "decoder/lm_head/added", _T, rows="added"),
    )


def clip(tower: str) -> tuple[NameRule, ...]:
    """CLIP vision tower under a prefix such as ``"vision_model."``. (``pre_layrnorm`` is CLIP's own spelling.)"""
    layer, out = f"{tower}encoder.layers.{{i}}.", "vision/layers/"
    return (
        NameRule(f"{tower}embeddings.patch_embedding.weight", "vision/patch_embed/kernel", Transform.PATCHES),
        NameRule(f"{tower}embeddings.class_embedding", "vision/class_embedding"),
        NameRule(f"{tower}embeddings.position_embedding.weight", "vision/position_embedding"),
        *_norm(f"{tower}pre_layrnorm", "vision/pre_norm"),
        *_norm(f"{layer}layer_norm1", f"{out}norm1"),
        *_norm(f"{layer}layer_norm2", f"{out}norm2"),
        *_linear(f"{layer}self_attn.q_proj", f"{out}attn/q_proj"),
        *_linear(f"{layer}self_attn.k_proj", f"{out}attn/k_proj"),
        *_linear(f"{layer}self_attn.v_proj", f"{out}attn/v_proj"),
        *_linear(f"{layer}self_attn.out_proj", f"{out}attn/o_proj"),
        *_linear(f"{layer}mlp.fc1", f"{out}mlp/fc1"),
        *_linear(f"{layer}mlp.fc2", f"{out}mlp/fc2"),
    )


def clip_unused(tower: str) -> tuple[NameRule, NameRule]:
    """The norm after CLIP's last block, which this model does not use."""
    return _norm(f"{tower}post_layernorm", "vision/post_norm")


def projector(first: str, second: str) -> tuple[NameRule, ...]:
    """The two linears between vision tower and decoder."""
    return (*_linear(first, "projector/fc1"), *_linear(second, "projector/fc2"))


def pose_head(first: str, second: str) -> tuple[NameRule, ...]:
    """The two linears of the pose head ``mlp``."""
    return (*_linear(first, "pose_head/fc1"), *_linear(second, "pose_head/fc2"))


# Buffers that older releases stored; both are computed.
BUFFERS = (
    Ignored(r".*rotary_emb\.inv_freq", "computed from rope_theta"),
    Ignored(r".*embeddings\.position_ids", "a constant range"),
)
