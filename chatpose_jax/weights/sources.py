"""The sources of a conversion: the main checkpoint, and checkpoints of other parts. Only headers are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import LoRAConfig
from chatpose_jax.settings import one_line
from chatpose_jax.weights import adapter_config, adapters, pose_head
from chatpose_jax.weights.adapter_config import ADAPTER_CONFIG
from chatpose_jax.weights.backbones import TOWERS
from chatpose_jax.weights.layouts import layouts, recognise
from chatpose_jax.weights.readers import (
    ADAPTER_FILES,
    Checkpoint,
    TensorEntry,
    find_projector,
    open_checkpoint,
    read_json_object,
)
from chatpose_jax.weights.spec import SourceSpec
from chatpose_jax.weights.table import Layout, Shape
from chatpose_jax.weights.tokens import control_tokens


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint with its layout.

    lora: settings of the adapters in it. token_rows: tensor name → the rows of the vocabulary that it replaces. targeted: says whether a module has
    an adapter; ``None`` if the adapter's settings do not say it.
    """

    checkpoint: Checkpoint
    layout: Layout
    lora: LoRAConfig | None = None
    token_rows: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    targeted: Callable[[str], bool] | None = None
    unties: bool = False
    """Whether it is an adapter with an embedding that its program would not use for a tied LM head."""

    __repr__ = one_line

    @property
    def title(self) -> str:
        """Its name in errors and reports."""
        return self.checkpoint.folder.name or str(self.checkpoint.folder)

    def may_lack(self, name: str) -> bool:
        """Whether a LoRA tensor may be missing: the settings put no adapter on its module, and the file has none."""
        module, lora, _ = name.rpartition(".lora_")
        if not lora or self.targeted is None or self.targeted(module):
            return False
        return not any(f"{module}.lora_{side}.weight" in self.checkpoint.tensors for side in "AB")

    @property
    def targets(self) -> set[str]:
        """The paths of the leaves that it contains."""
        return {rule.target for rule in self.layout.rules}

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter without its base. Its tensors replace those of other sources."""
        return self.layout.family == "peft"


def open_sources(spec: SourceSpec) -> list[Source]:
    """Opens all sources of a conversion, the main checkpoint first. The others, if there are any: a separate projector (given, or found in the
    folder), a separate pose head (found in the folder), CLIP (given), and an adapter (given) with its pose head.

    Raises UserError: what ``open_checkpoint`` raises; tensors of an unknown layout; an adapter that the model does not support.
    """
    spec.demand_paths()
    path, adapter, projector = Path(spec.path), spec.adapter, spec.projector
    main = _source(
        path,
        spec.layout and [spec.layout],
        spec.lora_alpha,
        control=lambda checkpoint: control_tokens(checkpoint, spec.tokenizer),
        backbone=spec.backbone,
    )
    if main.is_adapter:
        raise UserError(
            f"{path}: a PEFT adapter ({describe_adapters(main)}), which needs its base: chatpose convert BASE OUT --adapter {path}"
        )
    beside = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if beside and (adapter is None or not Path(adapter).is_file()):
        raise UserError(
            f"{path}: {beside.name} lies beside complete weights; convert with --adapter {beside}, or move the file away"
        )
    sources = [main]
    if projector is None and "projector" not in main.layout.parts and path.is_dir():
        projector = find_projector(path)
    if projector is not None:
        # Only the projector of a folder is read, whatever else it contains.
        inside = find_projector(Path(projector)) if Path(projector).is_dir() else None
        sources.append(_source(inside or Path(projector), ["llava_projector"]))
    if "pose_head" not in main.layout.parts:
        sources += _pose_head(path, spec.head)
    if spec.vision is not None:
        try:
            sources.append(_source(Path(spec.vision), TOWERS))
        except UserError as error:
            raise UserError(f"--vision: {error}") from None
    if adapter is not None:
        sources += open_adapter(adapter, spec.lora_alpha, spec.head, main)
    return sources


def open_adapter(
    path: str | Path,
    lora_alpha: float | None = None,
    head: str | type | None = None,
    base: Source | None = None,
) -> list[Source]:
    """Opens a PEFT folder: the adapter, and the pose head beside it. base: the source that it belongs to, if that is known.

    Raises UserError if it is not an adapter.
    """
    path = Path(path)
    source = _source(path, None, lora_alpha, base=base)
    if not source.is_adapter:
        raise UserError(f"{path}: {source.layout.title}, not a PEFT adapter; give it as the source, not as --adapter")
    heads = [] if "pose_head" in source.layout.parts else _pose_head(path, head)
    # A head beside an adapter belongs to the adapter, so it replaces the base's head.
    return [
        source,
        *(dataclasses.replace(head, layout=dataclasses.replace(head.layout, family="peft")) for head in heads),
    ]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder or file contains an adapter without its base. Raises what ``open_checkpoint`` raises."""
    return _base_of_adapter(_open(path).shapes) is not None


def describe_adapters(source: Source) -> str:
    """A short description of the adapters of a source."""
    lora = source.lora
    if lora is None:
        return "no LoRA"
    over = _adapter_config(source.checkpoint).get("base_model_name_or_path")
    return f"{adapters.in_words(lora)}{f', made for {over}' if over else ''}"


def _source(
    path: Path,
    families: Collection[str] | None,
    lora_alpha: float | None = None,
    *,
    control: Callable[[Checkpoint], Collection[str]] = lambda checkpoint: (),
    backbone: str | None = None,
    base: Source | None = None,
) -> Source:
    """families, backbone: as in ``recognise``. control: finds what it takes as ``control``. base: the source that an adapter belongs to, if that is
    known.
    """
    checkpoint = _open(path)
    shapes = checkpoint.shapes
    settings = _adapter_config(checkpoint)
    lora = adapter_config.lora_config(shapes, settings, checkpoint.folder, lora_alpha)
    rows = adapter_config.token_ids(shapes, settings, checkpoint.folder)
    targeted = adapter_config.targeting(settings, checkpoint.folder) if lora is not None else None
    if lora is not None and families is None:
        over = _base_of_adapter(shapes, base)
        if over is not None:
            _demand_all_projections(over, shapes, targeted, checkpoint.folder)
            adapter_config.demand_all(shapes, settings, targeted, checkpoint.folder, tied=base is None or _ties(base))
            layout, head = adapters.alone(over, shapes), any("lm_head." in name for name in shapes)
            unties = not head and not settings.get("ensure_weight_tying")
            return Source(checkpoint, layout, lora, rows, targeted, unties)
    try:
        layout = recognise(shapes, checkpoint.config(), families, control(checkpoint), backbone)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Source(checkpoint, adapters.with_adapters(layout, shapes), lora, rows)


# Prefixes that DataParallel, DeepSpeed, torch.compile, FSDP and activation checkpointing add to names in a raw state dict.
_WRAPPERS = re.compile(
    r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(module\.)*"
)


def _open(path: str | Path) -> Checkpoint:
    """The checkpoint without the prefixes of wrappers. Raises UserError if two tensors get the same name."""
    checkpoint, tensors = open_checkpoint(path), dict[str, TensorEntry]()
    for name, entry in checkpoint.tensors.items():
        bare = _WRAPPERS.sub("", name)
        if bare in tensors:
            raise UserError(
                f"{checkpoint.folder}: {tensors[bare].name!r} and {name!r} are both {bare!r}, with and without a wrapper's prefix; remove one of them"
            )
        tensors[bare] = entry
    return adapters.unwrapped(dataclasses.replace(checkpoint, tensors=tensors))


def _ties(source: Source) -> bool:
    """Whether ``config.json`` of a language model, or of a larger model with one, ties the LM head to the embedding."""
    config = source.checkpoint.config()
    nested = config.get("text_config")
    return bool((config | (nested if isinstance(nested, dict) else {})).get("tie_word_embeddings"))


def _demand_all_projections(
    over: Layout, shapes: Mapping[str, Shape], targeted: Callable[[str], bool] | None, folder: Path
) -> None:
    """Raises UserError if the settings put adapters on a projection that has none in the file, in any layer."""
    held = {place[0].target for name in shapes if (place := dataclasses.replace(over, rules=over.lora).locate(name))}
    for rule in over.lora:
        module = rule.source.rpartition(".lora_")[0]
        if targeted and rule.target not in held and any(targeted(module.replace("{i}", str(n))) for n in range(200)):
            raise UserError(
                f"{folder}: {ADAPTER_CONFIG} puts adapters on {module.split('.')[-1]}, but the file has no tensors of them; "
                "fetch the adapter again"
            )


def _base_of_adapter(shapes: Mapping[str, Shape], base: Source | None = None) -> Layout | None:
    """The layout of an adapter's base, found by the names of the adapter's modules; ``None`` if the base's weights are there too. If several
    layouts fit, the one with the most rules is taken, because ``modules_to_save`` may contain any part.
    """
    if any(name.endswith(".q_proj.weight") for name in shapes):
        return None
    language = base.layout.language if base is not None else None
    fitting = [layout for layout in layouts(language) if adapters.with_adapters(layout, shapes) != layout]
    return max(fitting, key=lambda layout: len(layout.rules), default=None)


def _pose_head(folder: Path, head: str | type | None) -> list[Source]:
    file = folder / pose_head.WEIGHTS
    return [Source(open_checkpoint(file), pose_head.layout(folder, head))] if file.is_file() else []


def _adapter_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.folder / ADAPTER_CONFIG
    return read_json_object(file) if file.is_file() else {}
