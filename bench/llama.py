"""The peers' model: a random LLaMA in torch, and the same weights in this project's parameter tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chatpose_jax.models.chatpose import Params, init_params
from chatpose_jax.models.config import ModelConfig, TextConfig

_LINEARS = {
    "self_attn": ("attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    "mlp": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def llama_settings(text: TextConfig) -> LlamaConfig:
    """transformers' configuration of this decoder, with sdpa attention and no end of sequence."""
    return LlamaConfig(
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


def torch_llama(text: TextConfig, dtype: str, seed: int = 0) -> LlamaForCausalLM:
    """transformers' LLaMA with weights of standard deviation 1/sqrt(fan_in), eval mode."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_settings(text))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model.to(getattr(torch, dtype)).eval()


def llama_on_card(text: TextConfig) -> LlamaForCausalLM:
    """transformers' LLaMA in bfloat16 with its own random weights, made on the card where there is one."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(llama_settings(text))
    finally:
        torch.set_default_dtype(torch.float32)


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
