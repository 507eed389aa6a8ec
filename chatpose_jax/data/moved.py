"""Settings of earlier versions, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatpose_jax.data.config import DataConfig, SourceRow, source_rows

SIZES = ("train_size", "val_size", "test_size")
MOVED = ("source", "mixture", *SIZES)
"""Fields that ``DataConfig`` had."""
KINDS = {"synthetic-text": "text", "synthetic-instruction": "instruction", "synthetic-image": "image"}
"""Names of earlier sources -> the option ``kind`` of "synthetic"."""
PREPARED = {
    "motion": "clips are prepared once: type chatpose data prepare cmu --source FOLDER --out data/cmu (bvh for clips that are not CMU's), "
    "then --set data.sources=cmu; the options rate, folds and fold go to prepare, detail is now tasks, and all frames are spacing=0"
}
"""Names of earlier sources -> what to do instead."""
_MIXTURE = (("synthetic-text", 1.0), ("synthetic-instruction", 1.0), ("synthetic-image", 2.0))


def in_a_file(data: Mapping[str, Any]) -> str:
    """One line that names the earlier settings in ``data`` and says what to write."""
    gone = ", ".join(f"data.{name}" for name in MOVED if name in data)
    return f"{gone}: data.sources says this now; write config.data.sources = {_rows(data)!r}"


def in_an_override(name: str, value: Any) -> str:
    """One line that says what to type instead of ``--set data.NAME=VALUE``, for a name of ``MOVED``."""
    if name == "source":
        told = f'"data.sources={_rows({name: value})!r}"' if value == "mixture" else f"data.sources={value}"
    elif name == "mixture":
        told = f'"data.sources.synthetic.tasks={_tasks(value)!r}"'
    else:
        told = f"data.sources.synthetic.{name}={value}"
    return f"--set data.{name}: data.sources says this now; type --set {told}"


def _rows(data: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    options = {name: data[name] for name in SIZES if data.get(name)}
    if data.get("mixture"):
        options["tasks"] = _tasks(data["mixture"])
    rows = source_rows(data.get("source", "synthetic"))
    if data.get("source") == "mixture":
        given = source_rows(data.get("sources", _MIXTURE))
        rows = source_rows(_MIXTURE) if given == DataConfig().sources else given
    return tuple(tuple(_row(row, options)) for row in rows)


def _row(row: SourceRow, options: Mapping[str, Any]) -> SourceRow:
    if row.name not in KINDS:
        return row._replace(options={**row.options, **options})
    return SourceRow("synthetic", row.weight, {"kind": KINDS[row.name], **options})


def _tasks(value: Any) -> Any:
    try:
        return dict(value)
    except (TypeError, ValueError):  # no rows of (task, weight)
        return value
