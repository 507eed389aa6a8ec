"""LoRA adapters as PEFT stores them: in a folder of their own, or inside a checkpoint of a training run.

PEFT prefixes the base's names with ``base_model.model.`` and adds to the names of modules that it wraps; ``unwrapped`` takes that off. The
rest is in the table of the base's layout: adapters by ``Layout.lora``, ``modules_to_save`` under their names in the base.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import LoRAConfig, LoRATarget
from chatpose_jax.weights.layouts import Layout, Shape
from chatpose_jax.weights.layouts.configs import llava_projector_settings
from chatpose_jax.weights.readers import Checkpoint, TensorEntry

ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

# What PEFT puts around a wrapped module. An adapter's own name stands in memory and in merged runs, not in its folder.
_WRAPPING = (
    (re.compile(r"^base_model\.model\."), ""),
    (re.compile(r"\.(token_adapter\.)?base_layer\.(weight|bias)$"), r".\2"),
    (re.compile(r"\.modules_to_save\.[^.]+\."), "."),
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"(\.token_adapter\.trainable_tokens_delta)\.[^.]+$"), r"\1"),
)
# Of a resized table that it also trains, PEFT 0.21 writes the new values under two names, and the old ones besides.
_SAVED = ".modules_to_save."
_COPIES = re.compile(r"\.original_module\.|\.trainable_tokens_original(\.|$)")
_LORA = re.compile(r"\.(\w+)\.lora_([AB])\.weight$")
# Settings of PEFT and the values under which an adapter is plain LoRA. Those that say where adapters are, how they were trained, or what
# is read elsewhere in here, change nothing. All others, those of later releases too, must be off.
_PLAIN = {"peft_type": "LORA", "bias": "none"}
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules",
    "task_type", "trainable_token_indices", "use_rslora", "velora_config",
}  # fmt: skip
_MERGE = "merge the adapter into its base in PyTorch first (merge_and_unload)"
_SHOWN = 4
# Initialisations that also change the base's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the base's own names. Raises UserError where two tensors get one name: a file of several adapters."""
    if not any(name.startswith(PREFIX) or _LORA.search(name) for name in checkpoint.tensors):
        return checkpoint
    tensors: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if _COPIES.search(name) or (_SAVED in name and name.replace(_SAVED, ".") in checkpoint.tensors):
            continue
        plain = name
        for pattern, replacement in _WRAPPING:
            plain = pattern.sub(replacement, plain)
        if plain in tensors:
            raise UserError(
                f"{checkpoint.folder}: {name!r} and {tensors[plain].name!r} are both {plain!r}; expected one adapter, keep one of them"
            )
        tensors[plain] = entry
    return dataclasses.replace(checkpoint, tensors=tensors)


def with_adapters(layout: Layout, names: Mapping[str, Shape]) -> Layout:
    """The layout with rows for the adapters that are there."""
    everything = dataclasses.replace(layout, rules=layout.lora)
    found = {place[0].target for name in names if (place := everything.locate(name))}
    return dataclasses.replace(layout, rules=layout.rules + tuple(r for r in layout.lora if r.target in found))


def alone(layout: Layout, names: Mapping[str, Shape]) -> Layout:
    """The layout of an adapter by itself, over a base of ``layout``: only rows that something is there for."""
    full = dataclasses.replace(layout, rules=layout.rules + layout.lora)
    found = {place[0].source for name in names if (place := full.locate(name))}
    return dataclasses.replace(
        full,
        name=f"peft over {layout.name}",
        title="PEFT adapter",
        family="peft",
        rules=tuple(rule for rule in full.rules if rule.source in found),
        settings=lambda config, shapes: llava_projector_settings(config),
        config_json=None,
    )


def lora_config(
    names: Mapping[str, Shape], settings: Mapping[str, Any], where: Path, alpha: float | None
) -> LoRAConfig | None:
    """The adapters of a checkpoint with these (unwrapped) names; ``None`` where it has none. ``alpha`` replaces what the settings say.

    Rank-stabilised LoRA (Kalajdzievski 2023) is plain LoRA of ``alpha * sqrt(rank)``. Raises UserError for an adapter that is not
    plain LoRA of one rank and one alpha over all targets, or that nothing says the alpha of.
    """
    parts = [(match[1], match[2], shape) for name, shape in names.items() if (match := _LORA.search(name))]
    if not parts:
        return None
    targets, known = {target for target, _, _ in parts}, get_args(LoRATarget)
    if foreign := sorted(targets.difference(known)):
        raise UserError(
            f"{where}: adapters on {', '.join(foreign)}; this model has them on {', '.join(known)} of the decoder: {_MERGE}"
        )
    odd = [key for key, value in settings.items() if value and key not in _NEUTRAL and value != _PLAIN.get(key)]
    if str(settings.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        odd.append("init_lora_weights")
    if odd:
        raise UserError(
            f"{where / ADAPTER_CONFIG}: {', '.join(f'{key}={settings[key]!r}' for key in odd)}: this model holds plain LoRA "
            f"of one rank and one alpha; {_MERGE}"
        )
    ranks = {shape[0 if side == "A" else -1] for _, side, shape in parts if len(shape) == 2}
    if len(ranks) != 1 or settings.get("r", min(ranks)) not in list(ranks):
        said = f" and r={settings['r']} in {ADAPTER_CONFIG}" if "r" in settings else ""
        raise UserError(
            f"{where}: adapters of rank {', '.join(map(str, sorted(ranks)))}{said}; expected one rank for all"
        )
    (rank,) = ranks
    if alpha is None and "lora_alpha" not in settings:
        raise UserError(
            f"{where}: adapters of rank {rank}, and no {ADAPTER_CONFIG} that says their alpha; give it with --lora-alpha "
            "(it stands in the training command)"
        )
    try:
        alpha = float(settings["lora_alpha"] if alpha is None else alpha)
        dropout = float(settings.get("lora_dropout") or 0.0)
    except (OverflowError, TypeError, ValueError):
        raise UserError(f"{where / ADAPTER_CONFIG}: expected numbers as lora_alpha and lora_dropout") from None
    return LoRAConfig(
        rank=rank,
        alpha=alpha * rank**0.5 if settings.get("use_rslora") else alpha,
        dropout=dropout,
        targets=tuple(target for target in known if target in targets),
    )


def targeting(settings: Mapping[str, Any], where: Path) -> Callable[[str], bool] | None:
    """PEFT's rule of which modules have an adapter, by their names in the base; ``None`` where the settings do not say. Raises
    UserError for settings that are no such rule."""
    targets, chosen = settings.get("target_modules"), settings.get("layers_to_transform")
    excluded, pattern = settings.get("exclude_modules") or [], settings.get("layers_pattern") or []
    if targets is None:
        return None
    if isinstance(targets, str) and chosen is not None:
        raise UserError(
            f"{where / ADAPTER_CONFIG}: layers_to_transform={chosen!r} beside target_modules={targets!r}, which PEFT refuses: "
            "layers_to_transform chooses among a list of target_modules; make one of the two null, as it was trained"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ".*"  # PEFT leaves out the LM head, which is none of the projections
    layers = chosen if isinstance(chosen, list) else [] if chosen is None else [chosen]
    patterns = [pattern] if isinstance(pattern, str) else pattern
    numbered = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns] or [r".*?\.[^.]*\.(\d+)\."]

    def named(module: str, names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def targeted(module: str) -> bool:
        if (excluded and named(module, excluded)) or not named(module, targets):
            return False
        if not layers or isinstance(targets, str) or module in targets:
            return True
        found = next((match for each in numbered if (match := re.match(each, module))), None)
        return found is not None and int(found[1]) in layers

    try:
        for names in (targets, excluded):
            if isinstance(names, str):
                _demand_quick(names)
        if odd := [name for name in patterns if not re.fullmatch(r"[\w.]+", name)]:
            raise ValueError(f"layers_pattern {odd[0]!r:.100}: expected the name of a list of layers")
        targeted("model.layers.0.self_attn.q_proj")
    except (re.error, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{where / ADAPTER_CONFIG}: no rule of which modules are adapted ({error})") from None
    return targeted


def _demand_quick(pattern: str) -> None:
    """Raises ValueError for a regular expression that a stranger's adapter brings and that Python may never finish: repetitions of a
    group, which nest, or too many of them."""
    many = len(re.findall(r"[*+{]", pattern)) > 6 or len(re.findall(r"(?<!\()\?", pattern)) > 12
    if many or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"the regular expression {pattern!r:.100} repeats a group, or repeats too often to be sure that it ends; write a list of names instead"
        )


def demand_all(
    names: Mapping[str, Shape], settings: Mapping[str, Any], targeted: Callable[[str], bool] | None, where: Path
) -> None:
    """Raises UserError where the settings list modules of which an adapter's file has nothing, or the file has adapters
    that PEFT, which goes by the settings, would leave out without a word."""
    saved, rows = settings.get("modules_to_save") or [], _listed_rows(settings, where)
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise UserError(f"{where / ADAPTER_CONFIG}: expected a list of names as modules_to_save, found {saved!r:.100}")
    # PEFT takes every module whose name ends so, with all that is in it.
    whole = [name for name in names if TOKEN_ROWS not in name and not _LORA.search(name)]
    for key, lost in {
        "modules_to_save": [module for module in saved if not any(f"{module}." in name for name in whole)],
        "trainable_token_indices": [
            module for module, ids in rows.items() if ids and not any(_is_rows_of(name, module) for name in names)
        ],
    }.items():
        if lost:
            raise UserError(
                f"{where}: {key} in {ADAPTER_CONFIG} lists {', '.join(lost)}, of which the adapter's file has nothing; fetch the "
                "adapter again, or take it off the list if the base has no such module"
            )
    modules = (name.rpartition(".lora_")[0] for name in names if _LORA.search(name))
    if targeted and (foreign := sorted({module for module in modules if not targeted(module)})):
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise UserError(
            f"{where}: adapters on {', '.join(foreign[:_SHOWN])}{more}, where {ADAPTER_CONFIG} has none (target_modules, "
            "exclude_modules, layers_to_transform); PEFT would leave them out: fetch the adapter again, or correct the settings"
        )


def _is_rows_of(name: str, module: str) -> bool:
    """Whether a tensor replaces rows of a module of the vocabulary, as ``trainable_token_indices`` names it."""
    return f".{name}".endswith(f".{module}{TOKEN_ROWS}")


def _listed_rows(settings: Mapping[str, Any], where: Path) -> dict[str, list[Any]]:
    """Module → the ids that ``trainable_token_indices`` lists for it."""
    listed = settings.get("trainable_token_indices") or {}
    if isinstance(listed, list):
        listed = {"embed_tokens": listed}
    if not isinstance(listed, dict) or not all(isinstance(ids, list) for ids in listed.values()):
        raise UserError(f"{where / ADAPTER_CONFIG}: expected lists of ids as trainable_token_indices")
    return listed


def token_ids(names: Mapping[str, Shape], settings: Mapping[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → the vocabulary rows that it replaces. Raises UserError where the settings name more or fewer than it has."""
    listed, rows = _listed_rows(settings, where), {}
    for name, shape in names.items():
        if not name.endswith(TOKEN_ROWS):
            continue
        ids: list[Any] = next((ids for module, ids in listed.items() if _is_rows_of(name, module)), [])
        if shape[:1] != (len(ids),) or not all(isinstance(id, int) and id >= 0 for id in ids):
            raise UserError(
                f"{where}: {name} has {shape[0] if shape else 'no'} rows, trainable_token_indices in {ADAPTER_CONFIG} names {len(ids)} for it; "
                "the two files do not belong together"
            )
        rows[name] = tuple(ids)
    return rows


def in_words(lora: LoRAConfig) -> str:
    """``rank 8, alpha 16, on q_proj, v_proj``."""
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def row_module(name: str) -> str:
    """``embed_tokens`` or ``lm_head``, of the name of a tensor that replaces rows of one."""
    return name.removesuffix(TOKEN_ROWS).rsplit(".", 1)[-1]
