"""The tables of the paper: which task on which data. ``chatpose eval all`` runs them all."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from chatpose_jax.evaluation.spec import folder_name


class PaperTable(NamedTuple):
    """A table of the paper. task: key of ``TASKS``. data: specs of data sets, the first one is that of ``chatpose eval TASK``."""

    task: str
    data: tuple[str, ...]


SUITE = (
    PaperTable("estimation", ("3dpw_test", "h36m_val_p2", "3dpw")),
    PaperTable("rpe", ("rpe_refined", "rpe")),
    PaperTable("generation", ("posescript",)),
    PaperTable("spg", ("spg",)),
    PaperTable("describe", ("posescript",)),
    PaperTable("judge", ("llava_bench",)),
)
ANY_ROWS = ("estimation", "generation", "spg", "describe", "poses")
"""Tasks for rows of any data set: ``chatpose eval all --data`` adds data sets to them."""


def folder_of(task: str, data: str, system: str) -> Path:
    """Where the results of a system on a data set stand, below the folder of the evaluation."""
    return Path(*map(folder_name, (task, data, system)))
