"""Small random torch peers, and their weights in our tree: written apart from the converter, which it thus checks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from chatpose_jax.models.config import ModelConfig  # noqa: E402


def randomize(module: Any, seed: int = 0) -> Any:
    """Weights of standard deviation 1/sqrt(fan_in); norms and biases random too, so that none can go missing unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1 and "embed" not in name:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            elif weight.ndim > 1:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def llava(config: ModelConfig, seed: int = 0) -> Any:
    """transformers' LLaVA-1.5 of this configuration, float32, eager attention."""
    vision, text = config.vision, config.text
    settings = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            hidden_act="quick_gelu",
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text_config=LlamaConfig(
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
        ),
        image_token_index=config.image_token_id,
        vision_feature_layer=vision.select_layer,
        attn_implementation="eager",
    )
    return randomize(LlavaForConditionalGeneration(settings), seed)


def pose_head(config: ModelConfig, seed: int = 1) -> Any:
    """The released head: Linear, ReLU, Linear (``text_hidden_fcs.0``)."""
    width = config.text.hidden_size
    return randomize(
        torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 144)), seed
    )


def to_tree(model: Any, config: ModelConfig, head: Any | None = None) -> dict[str, Any]:
    """The torch weights (a PEFT wrapper's adapters included) as unrolled or stacked parameters of ``config``."""
    state = {
        k.replace("base_model.model.", "").replace(".base_layer", ""): v.detach().numpy()
        for k, v in model.state_dict().items()
    }

    def linear(path: str) -> dict[str, Any]:
        tree = {"kernel": state[f"{path}.weight"].T}
        for ours, theirs in (
            ("bias", "bias"),
            ("lora_a", "lora_A.default.weight"),
            ("lora_b", "lora_B.default.weight"),
        ):
            if f"{path}.{theirs}" in state:
                tree[ours] = state[f"{path}.{theirs}"].T
        return tree

    def norm(path: str) -> dict[str, Any]:
        return {
            ours: state[f"{path}.{name}"]
            for ours, name in (("scale", "weight"), ("bias", "bias"))
            if f"{path}.{name}" in state
        }

    def text_layer(path: str) -> dict[str, Any]:
        return {
            "input_norm": norm(f"{path}.input_layernorm"),
            "post_attention_norm": norm(f"{path}.post_attention_layernorm"),
            "attn": {name: linear(f"{path}.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "mlp": {name: linear(f"{path}.mlp.{name}") for name in ("gate_proj", "up_proj", "down_proj")},
        }

    def vision_layer(path: str) -> dict[str, Any]:
        names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "out_proj"}
        return {
            "norm1": norm(f"{path}.layer_norm1"),
            "norm2": norm(f"{path}.layer_norm2"),
            "attn": {ours: linear(f"{path}.self_attn.{theirs}") for ours, theirs in names.items()},
            "mlp": {name: linear(f"{path}.mlp.{name}") for name in ("fc1", "fc2")},
        }

    def layers(create: Any, path: str, count: int) -> Any:
        unrolled = {i: create(f"{path}.{i}") for i in range(count)}
        return stack(list(unrolled.values())) if config.scan_layers else unrolled

    base, vision = config.text.base_vocab_size, "model.vision_tower"
    patches = state[f"{vision}.embeddings.patch_embedding.weight"]  # (D, 3, P, P); our patches are (P, P, 3)
    embedding, output = state["model.language_model.embed_tokens.weight"], state["lm_head.weight"].T
    tree: dict[str, Any] = {
        "vision": {
            "patch_embed": {"kernel": patches.transpose(2, 3, 1, 0).reshape(-1, patches.shape[0])},
            "class_embedding": state[f"{vision}.embeddings.class_embedding"],
            "position_embedding": state[f"{vision}.embeddings.position_embedding.weight"],
            "pre_norm": norm(f"{vision}.pre_layrnorm"),
            "layers": layers(vision_layer, f"{vision}.encoder.layers", config.vision.num_used_layers),
        },
        "projector": {f"fc{i}": linear(f"model.multi_modal_projector.linear_{i}") for i in (1, 2)},
        "decoder": {
            "embed_tokens": {"embedding": embedding[:base], "added": embedding[base:]},
            "layers": layers(text_layer, "model.language_model.layers", config.text.num_layers),
            "norm": norm("model.language_model.norm"),
            "lm_head": {"kernel": output[:, :base], "added": output[:, base:]},
        },
    }
    first, second = (head or pose_head(config))[0::2]
    tree["pose_head"] = {
        name: {"kernel": part.weight.detach().numpy().T, "bias": part.bias.detach().numpy()}
        for name, part in (("fc1", first), ("fc2", second))
    }
    return as_arrays(tree)


def stack(trees: list[Any]) -> Any:
    """Dicts of one structure -> one dict with a leading axis."""
    if isinstance(trees[0], dict):
        return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)


def as_arrays(tree: Any) -> Any:
    return (
        {k: as_arrays(v) for k, v in tree.items()}
        if isinstance(tree, dict)
        else jnp.asarray(np.ascontiguousarray(tree))
    )


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray, images: np.ndarray | None) -> np.ndarray:
    """(B, T, V) of the peer; ``images`` (K, S, S, 3) in order of rows and appearance."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            pixel_values=None if images is None else torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        )
    return output.logits.numpy()
