"""Settings of the model → ``config.json`` of the known layouts. ``configs`` reads these files."""

from __future__ import annotations

import dataclasses
from typing import Any

from chatpose_jax.models.config import ModelConfig, VisionConfig


def llama_json(config: ModelConfig) -> dict[str, Any]:
    """A LlamaConfig, of transformers 4.x and 5.x; ``llama_settings`` reads it back."""
    text = config.text
    return {
        "model_type": "llama",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "max_position_embeddings": text.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.param_dtype,
    }


def llava_json(config: ModelConfig) -> dict[str, Any]:
    """A LlavaConfig of transformers, with the layers of the tower and the selected one from ``config.vision``."""
    vision = config.vision
    assert vision is not None
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.num_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": config.param_dtype,
        "text_config": {"architectures": ["LlamaForCausalLM"]} | llama_json(config),
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": vision.layer_norm_eps,
            "torch_dtype": config.param_dtype,
        },
    }


def llava_flat_json(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The flat ``config.json`` of the original LLaVA. It has no sizes of CLIP, only the name of LLaVA-1.5's CLIP, which is written if the tower has
    its shape.
    """
    vision = config.vision
    assert vision is not None
    known = dataclasses.replace(VisionConfig(), select_layer=vision.select_layer)
    tower = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"} if vision == known else {}
    return (
        llama_json(config)
        | {
            "architectures": [architecture],
            "model_type": model_type,
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_layer": vision.select_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
        }
        | tower
    )
