"""Settings of ``chatpose posescript train``: Python files with ``get_config()`` in ``configs/posescript``, and overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from chatpose_jax.data.config import DataConfig
from chatpose_jax.errors import UserError
from chatpose_jax.posescript.folder import KINDS
from chatpose_jax.posescript.network import typed
from chatpose_jax.posescript.pairs import Captions
from chatpose_jax.posescript.trainer import TrainerConfig
from chatpose_jax.settings import check_types, did_you_mean, one_line, require
from chatpose_jax.train.run_config import CONFIGS, config_from_file

FOLDER = CONFIGS / "posescript"


@dataclasses.dataclass(frozen=True)
class TextSourceConfig:
    """Where captions, token ids and pretrained weights of the text encoder come from. With ``--init``, only ``captions`` counts.

    captions: of a row, which kinds of its captions train (``pairs.KINDS``). least: for the encoder "words": how often a word must be in the
    captions of "train", of all kinds, to get an id. vectors: a file of word vectors (GloVe's text format), "" for random ones.
    distilbert: for the encoder "distilbert": the folder of distilbert-base-uncased, with ``model.safetensors`` or ``pytorch_model.bin`` and
    ``tokenizer.json``.
    """

    captions: Captions = "all"
    least: int = 1
    vectors: str = ""
    distilbert: str = ""

    def __post_init__(self) -> None:
        check_types(self, "text")
        require(self, "text", "at least 1", lambda value: value >= 1, "least")


@dataclasses.dataclass(frozen=True)
class PoseScriptConfig:
    """All settings of a run. kind: of network (``folder.KINDS``). model, loss: the sizes and the settings of the loss of this kind."""

    kind: str
    model: Any
    loss: Any
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    text: TextSourceConfig = dataclasses.field(default_factory=TextSourceConfig)
    train: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)

    __repr__ = one_line


def posescript_config(kind: str) -> Any:
    """A ``ConfigDict`` with every setting at its default. Files in ``configs/posescript`` start from it."""
    from ml_collections import ConfigDict

    table = dataclasses.asdict(PoseScriptConfig(kind, KINDS[kind].config(), KINDS[kind].loss()))
    table["data"]["sources"] = [list(row) for row in table["data"]["sources"]]
    return ConfigDict(table)


def freeze_posescript(config: Any) -> PoseScriptConfig:
    """``ConfigDict`` -> dataclasses. Raises a UserError that names an invalid setting."""
    table = config.to_dict()
    if (kind := table.pop("kind", None)) not in KINDS:
        raise UserError(f"kind: expected {' or '.join(map(repr, KINDS))}, found {kind!r:.60}")
    tables = {"model": KINDS[kind].config, "loss": KINDS[kind].loss}
    parts = {**tables, "data": DataConfig, "text": TextSourceConfig, "train": TrainerConfig}
    if unknown := sorted(set(table) - set(parts)):
        raise UserError(f"configuration: unknown table {unknown[0]!r}{did_you_mean(unknown[0], parts)}")
    return PoseScriptConfig(kind, **{name: typed(part, table.get(name, {}), name) for name, part in parts.items()})


def load_posescript_config(name: str, overrides: Sequence[str] = ()) -> PoseScriptConfig:
    """A configuration by its name in ``configs/posescript`` or the path of a Python file, with ``key=value`` overrides. Raises UserError."""
    return config_from_file(name, overrides, freeze_posescript, FOLDER)
