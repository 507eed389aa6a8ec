"""The description of where a model's weights come from. Everything that reads PyTorch weights takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType
from chatpose_jax.processing.images import Fit
from chatpose_jax.settings import check_types
from chatpose_jax.storage import is_bucket
from chatpose_jax.weights.readers import fetch_hint

Quantize = Literal["none", "int8", "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """PyTorch weights, and how to read them. Paths are files or folders.

    path: the main checkpoint; ``docs/weights.md`` has the layouts.
    vision, projector, tokenizer: CLIP, the projector and the tokenizer, if ``path`` has none.
    adapter: a PEFT folder. Its adapters are not merged; its other tensors replace those of the base.
    lora_alpha: alpha of adapters without an ``adapter_config.json``.
    layout: one of ``layouts.FAMILIES``; default: recognised by the tensor names.
    backbone: the family of the language model, one of ``backbones.LANGUAGES``; default: by ``config.json`` and the tokenizer.
    template: the conversation template, one of ``processing.conversation.TEMPLATES``; default: the family's, or another that agrees with the
        checkpoint's ``chat_template``.
    ignore_chat_template: do not compare with the checkpoint's ``chat_template``.
    dtype: dtype of the base, in storage and in computation; default: as stored. Added token rows and the pose head are always float32.
    quantize: "int8" stores the projections of the decoder's layers in int8, with one scale for each output channel.
    init_missing: parts ("vision", "projector") to initialise at random if no source has them.
    pose_head: "auto" takes the source's, or initialises one if it has none; "init" always initialises one.
    head: the pose head as "package.module:Class" or the class, if it is not part of this program; see
        ``models.heads.trusted_head``.
    seed: seed of random initialisation.
    allow_nonfinite: count NaN and infinities (``plan.nonfinite``) instead of raising. int8 cannot hold them.
    image_fit: how images become squares; default: the setting of the sources.

    Raises UserError for a value of the wrong type.
    """

    path: str | Path = dataclasses.field(kw_only=False)
    vision: str | Path | None = None
    projector: str | Path | None = None
    adapter: str | Path | None = None
    lora_alpha: float | None = None
    tokenizer: str | Path | None = None
    layout: str | None = None
    backbone: str | None = None
    template: str | None = None
    ignore_chat_template: bool = False
    dtype: DType | None = None
    quantize: Quantize = "none"
    init_missing: tuple[Literal["vision", "projector"], ...] = ()
    pose_head: Literal["auto", "init"] = "auto"
    head: str | type | None = None
    seed: int = 0
    allow_nonfinite: bool = False
    image_fit: Fit | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_missing", tuple(self.init_missing))
        check_types(self, "source")

    @classmethod
    def of(cls, source: SourceSpec | str | Path) -> SourceSpec:
        """``source`` itself, or ``SourceSpec(source)`` for a path."""
        return source if isinstance(source, SourceSpec) else cls(source)

    @property
    def given(self) -> Mapping[str, Path]:
        """The given paths, by the names of their command-line options."""
        named = {"the source": self.path} | {
            f"--{name}": getattr(self, name) for name in ("vision", "projector", "adapter", "tokenizer")
        }
        return {what: Path(path) for what, path in named.items() if path is not None}

    def demand_paths(self) -> None:
        """Raises one UserError for all paths that do not exist, or that are not on a disk. For a name on the Hugging Face Hub it gives the command
        that fetches it.
        """
        named = (self.path, self.vision, self.projector, self.adapter, self.tokenizer)
        if stored := [path for path in map(str, filter(None, named)) if is_bucket(path)]:
            raise UserError(
                f"{', '.join(stored)}: PyTorch weights are read from a disk; copy them there first (gcloud storage cp -r, aws s3 cp --recursive)"
            )
        if missing := [
            f"{path}: no such file or folder ({what}){fetch_hint(path)}"
            for what, path in self.given.items()
            if not path.exists()
        ]:
            raise UserError("; ".join(missing))
