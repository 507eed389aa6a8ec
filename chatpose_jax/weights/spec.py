"""Where a model's weights come from: one description, for everything that reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType
from chatpose_jax.processing.images import Fit
from chatpose_jax.settings import check_types
from chatpose_jax.weights.readers import fetch_hint

Quantize = Literal["none", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """PyTorch weights, and how they are taken. Paths are files or folders.

    path: the main checkpoint; ``docs/weights.md`` has the layouts.
    vision, projector, tokenizer: CLIP, the projector and the tokenizer, where ``path`` has none.
    adapter: a PEFT folder. Its adapters stay adapters; what else it holds replaces the base's.
    lora_alpha: alpha of adapters that no ``adapter_config.json`` describes.
    layout: one of ``layouts.FAMILIES``; by default the tensor names tell.
    dtype: of the base, stored and computed in; by default as stored. Added token rows and the pose head are always float32.
    quantize: "int8" stores the projections of the decoder's layers in int8, with one scale an output channel.
    init_missing: parts ("vision", "projector") to start at random where no source has them.
    pose_head: "auto" takes the source's, or starts a new one where it has none; "init" always starts one.
    head: the pose head of files that name one of somebody's own package, "package.module:Class" or the class: see
        ``models.heads.trusted_head``.
    seed: of what is started at random.
    allow_nonfinite: count NaN and infinities (``plan.nonfinite``) instead of raising. int8 cannot hold them.
    image_fit: how pictures become squares, instead of what the sources say.

    Raises UserError for a value of the wrong kind.
    """

    path: str | Path = dataclasses.field(kw_only=False)
    vision: str | Path | None = None
    projector: str | Path | None = None
    adapter: str | Path | None = None
    lora_alpha: float | None = None
    tokenizer: str | Path | None = None
    layout: str | None = None
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
        """A path alone is a description too."""
        return source if isinstance(source, SourceSpec) else cls(source)

    @property
    def given(self) -> Mapping[str, Path]:
        """The paths that it names, by what the command line calls them."""
        named = {"the source": self.path} | {
            f"--{name}": getattr(self, name) for name in ("vision", "projector", "adapter", "tokenizer")
        }
        return {what: Path(path) for what, path in named.items() if path is not None}

    def demand_there(self) -> None:
        """Raises one UserError for all paths that are not there; of a name on the Hugging Face Hub it says how to fetch it."""
        if missing := [
            f"{path}: no such file or folder ({what}){fetch_hint(path)}"
            for what, path in self.given.items()
            if not path.exists()
        ]:
            raise UserError("; ".join(missing))
