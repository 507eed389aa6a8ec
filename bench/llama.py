"""The peers' model: a random LLaMA in torch, and the same weights in this project's parameter tree."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chatpose_jax.models.chatpose import Params, init_params
from chatpose_jax.models.config import HeadConfig, LoRAConfig, ModelConfig, TextConfig, VisionConfig

SIZES = {
    "full": TextConfig(
        vocab_size=32000,
        base_vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=20,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "small": TextConfig(
        vocab_size=256,
        base_vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
    ),
}
"""``full`` has 322 M parameters; ``small`` only shows that a script runs."""

_LINEARS = {
    "self_attn": ("attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mlp": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def cores() -> int:
    """Cores that this process may use; torch is given as many threads, as XLA takes by itself."""
    return len(os.sched_getaffinity(0))


def our_config(text: TextConfig, dtype: str, *, scan: bool, lora: LoRAConfig | None = None) -> ModelConfig:
    """A model of this decoder with a least vision tower and no end of sequence: every run decodes the same count."""
    vision = VisionConfig(image_size=16, patch_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1)
    return ModelConfig(
        vision=vision,
        text=text,
        lora=lora,
        head=HeadConfig(),
        pose_token_id=text.vocab_size - 1,
        eos_token_id=-1,
        scan_layers=scan,
        dtype=dtype,
        param_dtype=dtype,
    )


def torch_llama(text: TextConfig, dtype: str, seed: int = 0) -> LlamaForCausalLM:
    """transformers' LLaMA with weights of standard deviation 1/sqrt(fan_in), sdpa attention, eval mode."""
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        rms_norm_eps=text.rms_norm_eps,
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model.to(getattr(torch, dtype)).eval()


def to_jax(tensor: torch.Tensor, dtype: Any) -> jax.Array:
    return jnp.asarray(tensor.detach().float().numpy(), dtype)


def our_params(model: Any, config: ModelConfig) -> Params:
    """The torch model's weights (a PEFT wrapper's adapters included) in the layout that ``config`` asks for."""
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
    }
    text, dtype = config.text, config.param_dtype

    def layer(index: int) -> Params:
        prefix = f"model.layers.{index}"
        tree: Params = {
            "input_norm": {"scale": to_jax(state[f"{prefix}.input_layernorm.weight"], dtype)},
            "post_attention_norm": {"scale": to_jax(state[f"{prefix}.post_attention_layernorm.weight"], dtype)},
        }
        for theirs, (ours, names) in _LINEARS.items():
            tree[ours] = {}
            for name in names:
                path = f"{prefix}.{theirs}.{name}"
                tree[ours][name] = {"kernel": to_jax(state[f"{path}.weight"].T, dtype)}
                for factor in "AB":
                    adapter = state.get(f"{path}.lora_{factor}.default.weight")
                    if adapter is not None:
                        tree[ours][name][f"lora_{factor.lower()}"] = to_jax(adapter.T, jnp.float32)
        return tree

    params = init_params(dataclasses.replace(config, text=dataclasses.replace(text, num_layers=1)), jax.random.key(0))
    layers = {i: layer(i) for i in range(text.num_layers)}
    decoder = params["decoder"]
    decoder["embed_tokens"]["embedding"] = to_jax(state["model.embed_tokens.weight"], dtype)
    if not text.tied:
        decoder["lm_head"]["kernel"] = to_jax(state["lm_head.weight"].T, dtype)
    decoder["norm"]["scale"] = to_jax(state["model.norm.weight"], dtype)
    decoder["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers.values()) if config.scan_layers else layers
    return params


def random_ids(batch: int, length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """(batch, length) int32 ids above the special ones."""
    return np.random.default_rng(seed).integers(3, vocabulary, (batch, length), dtype=np.int32)
