"""``adapter_config.json`` of PEFT: the rank and alpha of the adapters, and the modules that have one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import LoRAConfig, LoRATarget
from chatpose_jax.weights.adapters import LORA_NAME, TOKEN_ROWS
from chatpose_jax.weights.table import Shape

ADAPTER_CONFIG = "adapter_config.json"
# Values of PEFT's settings for plain LoRA. The settings in _NEUTRAL may have any value: they say where adapters are or how they were trained, or
# they are checked below. All other settings must be off, those of later releases too.
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


def lora_config(
    names: Mapping[str, Shape], settings: Mapping[str, Any], where: Path, alpha: float | None
) -> LoRAConfig | None:
    """The settings of the adapters in a checkpoint; ``None`` if it has none.

    names: unwrapped tensor names. alpha: overrides ``lora_alpha`` of the settings.

    Rank-stabilised LoRA (Kalajdzievski 2023) becomes plain LoRA with ``alpha * sqrt(rank)``. Raises UserError if the adapters are not plain LoRA
    with one rank and one alpha for all targets, or if their alpha is not known.
    """
    parts = [(match[1], match[2], shape) for name, shape in names.items() if (match := LORA_NAME.search(name))]
    if not parts:
        return None
    targets, known = {target for target, _, _ in parts}, get_args(LoRATarget)
    if foreign := sorted(targets.difference(known)):
        raise UserError(
            f"{where}: adapters on {', '.join(foreign)}; this model supports adapters on {', '.join(known)} of the decoder; {_MERGE}"
        )
    odd = [key for key, value in settings.items() if value and key not in _NEUTRAL and value != _PLAIN.get(key)]
    if str(settings.get("init_lora_weights")).lower().startswith(_CHANGES_THE_BASE):
        odd.append("init_lora_weights")
    if odd:
        raise UserError(
            f"{where / ADAPTER_CONFIG}: {', '.join(f'{key}={settings[key]!r}' for key in odd)} is not supported; expected "
            f"plain LoRA with one rank and one alpha; {_MERGE}"
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
            f"{where}: adapters of rank {rank}, and no {ADAPTER_CONFIG} with their lora_alpha; give it with --lora-alpha "
            "(it is in the training command)"
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
    """A function that says whether a module of the base has an adapter, by PEFT's rules; ``None`` if the settings have no ``target_modules``.
    Raises UserError for settings that PEFT would refuse, or that could take too long to evaluate.
    """
    targets, chosen = settings.get("target_modules"), settings.get("layers_to_transform")
    excluded, pattern = settings.get("exclude_modules") or [], settings.get("layers_pattern") or []
    if targets is None:
        return None
    if isinstance(targets, str) and chosen is not None:
        raise UserError(
            f"{where / ADAPTER_CONFIG}: layers_to_transform={chosen!r} needs a list as target_modules, found the text {targets!r}; "
            "PEFT refuses this too; set one of the two to null, as in training"
        )
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ".*"  # PEFT excludes the LM head, which is not asked for here
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
        raise UserError(
            f"{where / ADAPTER_CONFIG}: the settings of which modules have adapters are invalid ({error}); correct them"
        ) from None
    return targeted


def _demand_quick(pattern: str) -> None:
    """Raises ValueError if a regular expression could take exponential time: if it repeats a group, or has many repetitions. The adapter may be
    from an unknown source.
    """
    many = len(re.findall(r"[*+{]", pattern)) > 6 or len(re.findall(r"(?<!\()\?", pattern)) > 12
    if many or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"the regular expression {pattern!r:.100} repeats a group or has too many repetitions, so it may never end; write a list of names instead"
        )


def demand_all(
    names: Mapping[str, Shape],
    settings: Mapping[str, Any],
    targeted: Callable[[str], bool] | None,
    where: Path,
    tied: bool = False,
) -> None:
    """Raises UserError if the settings list modules that have no tensors in the adapter's file, or if the file has adapters that the settings do
    not list, which PEFT would silently skip.

    tied: whether the base may tie its LM head to the embedding. PEFT then stores rows that are listed for both once, for the embedding.
    """
    saved, rows = settings.get("modules_to_save") or [], _listed_rows(settings, where)
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise UserError(f"{where / ADAPTER_CONFIG}: expected a list of names as modules_to_save, found {saved!r:.100}")
    if tied and len(rows) == 2 and "lm_head" in rows and len({tuple(ids) for ids in rows.values()}) == 1:
        rows = {module: ids for module, ids in rows.items() if module != "lm_head"}
    # PEFT saves every module whose name ends with a listed name, with all its tensors.
    whole = [name for name in names if TOKEN_ROWS not in name and not LORA_NAME.search(name)]
    for key, lost in {
        "modules_to_save": [module for module in saved if not any(f"{module}." in name for name in whole)],
        "trainable_token_indices": [
            module for module, ids in rows.items() if ids and not any(_is_rows_of(name, module) for name in names)
        ],
    }.items():
        if lost:
            raise UserError(
                f"{where}: {key} in {ADAPTER_CONFIG} lists {', '.join(lost)}, but the adapter's file has no tensors of them; fetch the "
                "adapter again, or remove them from the list if the base has no such modules"
            )
    modules = (name.rpartition(".lora_")[0] for name in names if LORA_NAME.search(name))
    if targeted and (foreign := sorted({module for module in modules if not targeted(module)})):
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise UserError(
            f"{where}: adapters on {', '.join(foreign[:_SHOWN])}{more}, which {ADAPTER_CONFIG} does not list (target_modules, "
            "exclude_modules, layers_to_transform); PEFT would silently skip them; fetch the adapter again, or correct the settings"
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
    """Tensor name → the vocabulary rows that it replaces. Raises UserError if the settings list another number of rows."""
    listed, rows = _listed_rows(settings, where), {}
    for name, shape in names.items():
        if not name.endswith(TOKEN_ROWS):
            continue
        ids: list[Any] = next((ids for module, ids in listed.items() if _is_rows_of(name, module)), [])
        if shape[:1] != (len(ids),) or not all(isinstance(id, int) and id >= 0 for id in ids):
            raise UserError(
                f"{where}: {name} has {shape[0] if shape else 'no'} rows, but trainable_token_indices in {ADAPTER_CONFIG} lists {len(ids)} for it; "
                "the two files do not belong together"
            )
        rows[name] = tuple(ids)
    return rows
