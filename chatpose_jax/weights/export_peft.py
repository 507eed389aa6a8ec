"""The adapters of a model folder as a PEFT folder."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from chatpose_jax.errors import UserError
from chatpose_jax.weights import adapters, pose_head
from chatpose_jax.weights.export_model import ExportPlan, StoredModel, head_weights, lora_words
from chatpose_jax.weights.layouts import LAYOUTS

BaseClass = Literal["llava", "llama"]
BASE_CLASSES: tuple[BaseClass, ...] = get_args(BaseClass)
# PEFT knows modules by their names in memory.
_LAYOUT = {
    "llava": next(layout for layout in LAYOUTS if layout.name == "llava_transformers_5_state_dict"),
    "llama": next(layout for layout in LAYOUTS if layout.name == "vicuna"),
}


def adapter_plan(
    model: StoredModel, dtype: str, base_name: str | None, base_class: BaseClass, with_projector: bool
) -> ExportPlan:
    config, layout = model.config, _LAYOUT[base_class]
    lora, text = config.lora, config.text
    if lora is None:
        raise UserError(
            f"{model.folder}: no adapters in this model, so there is nothing for peft; choose --format transformers, llava or "
            "chatpose (adapters come from training with model.lora, or from convert --adapter)"
        )
    if with_projector and "projector" not in layout.parts:
        raise UserError("a LlamaForCausalLM has no projector; leave --with-projector out, or say --base-class llava")
    rules = [rule for rule in layout.lora if rule.target in model.shapes]
    ids = list(range(text.base_vocab_size, text.vocab_size))
    for rule in layout.rules if ids else ():
        if rule.rows == "added":
            name = rule.source.removesuffix(".weight") + adapters.TOKEN_ROWS
            rules.append(dataclasses.replace(rule, source=name, rows="all"))
    if with_projector:
        rules += [rule for rule in layout.rules if rule.target.startswith("projector/")]
    tensors = [
        dataclasses.replace(tensor, name=adapters.PREFIX + tensor.name) for tensor in model.tensors(rules, dtype)
    ]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if base_class == "llama" else None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        # CLIP has projections of the same names, so the decoder's are said in full.
        "target_modules": rf".*layers\.\d+\.(self_attn|mlp)\.({'|'.join(lora.targets)})"
        if base_class == "llama"
        else rf".*language_model.*\.({'|'.join(lora.targets)})",
        "modules_to_save": ["multi_modal_projector"] if with_projector else None,
        "trainable_token_indices": {"embed_tokens": ids, "lm_head": ids} if ids else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    files = {
        pose_head.DESCRIPTION: pose_head.describe(config, model.pose_token),
        adapters.ADAPTER_CONFIG: settings,
    }
    notes = [
        f"adapters: {lora_words(config)}",
        "the base is not in it: peft loads it onto the base that you started from",
    ]
    if ids:
        notes.append(
            f"token rows {ids[0]} to {ids[-1]} of embedding and LM head; a base with fewer than {text.vocab_size} rows needs "
            f"resize_token_embeddings({text.vocab_size}) first"
        )
    if not with_projector and base_class == "llava":
        notes.append("the projector is the base's; if it was trained, say --with-projector")
    return ExportPlan({"adapter_model": tensors, **head_weights(model)}, files, notes)
