"""Configuration files: Python files with ``get_config()``. Command-line overrides are applied, and the result becomes typed frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from chatpose_jax import named
from chatpose_jax.data import moved
from chatpose_jax.data.config import DataConfig, SourceRow
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import PRESETS, ModelConfig, preset
from chatpose_jax.settings import did_you_mean, parse_value
from chatpose_jax.train.config import EvaluatorRow, HeadStart, MeshConfig, TrainConfig
from chatpose_jax.train.trainable import Rule
from chatpose_jax.weights.backbones import published

ROWS = {
    "train.trainable": ("(pattern, rate or None, decay, 'all' or 'pose' tokens), the last two optional", (2, 3, 4)),
    "train.pose_loss": ("(term, weight)", (2,)),
}
"""Settings that are tables: a description of a row, and its allowed lengths."""
NAMED = {"data.sources": SourceRow, "train.evaluators": EvaluatorRow}
"""Tables whose rows name code with options. ``data.sources.NAME.OPTION`` sets one option."""
HEAD_OPTIONS = "model.head.options"
"""Pairs of (name, value). ``model.head.options.NAME`` sets one."""
OPTIONAL = ("model.lora", "model.vision", "model.text.rope_scaling")
"""The tables that may be none."""
PACKAGE = Path(__file__).resolve().parent.parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""The configurations that come with the package; a wheel has them inside it."""
Frozen = TypeVar("Frozen")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All settings of a training run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig


def named_model(name: str) -> ModelConfig:
    """A model preset, or a published language model such as "llama3.2_1b" (``weights.backbones``). Raises UserError for any other name."""
    if name in PRESETS:
        return preset(name)
    try:
        return published(name)
    except UserError as error:
        raise UserError(f"no model preset {name!r}; the presets are {', '.join(PRESETS)}; and {error}") from None


def run_config(model: str) -> Any:
    """A ``ConfigDict`` with the model of this name (``named_model``) and every other setting at its default. Files in ``configs/`` start from it."""
    from ml_collections import ConfigDict

    table = {
        "model": named_model(model).to_json(),
        "data": dataclasses.asdict(DataConfig()),
        "train": dataclasses.asdict(TrainConfig()),
    }
    for key in (*ROWS, *NAMED):
        part, _, name = key.partition(".")
        table[part][name] = [list(row) for row in table[part][name]]
    return ConfigDict(table)


def config_names(folder: Path = CONFIGS) -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration by its name in ``configs/`` or the path of a Python file, apply ``key=value`` overrides, check everything.

    Raises UserError for an unknown configuration or key, and for a value of the wrong kind.
    """
    return config_from_file(name, overrides, freeze)


def config_from_file(
    name: str, overrides: Sequence[str], freeze: Callable[[Any], Frozen], folder: Path = CONFIGS
) -> Frozen:
    """``load_config`` for settings of any kind. freeze: ``ConfigDict`` -> checked settings. folder: has the configurations by their names."""
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        names = ", ".join(config_names(folder))
        raise UserError(
            f"there is no configuration {name!r}: expected {names}, or the path of a Python file with get_config()"
        )
    spec = importlib.util.spec_from_file_location(f"chatpose_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(
                f"{path} has no function get_config(), which must return the configuration (docs/training.md has an example)"
            )
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        moved = getattr(error, "name", None) == "chatpose_jax.cli.config"
        hint = "; run_config is in chatpose_jax.train.run_config now" if moved else ""
        raise UserError(f"{path}: {type(error).__name__}: {error}{hint}") from error
    if not hasattr(config, "lock"):
        raise UserError(
            f"{path}: get_config() returned {config!r:.80}; expected a ConfigDict, as chatpose_jax.train.run_config.run_config makes one"
        )
    config.lock()
    alone = _complaint(config, freeze)
    for override in overrides:
        _apply(config, override)
    try:
        return freeze(config)
    except UserError as error:
        if str(error) == alone:  # of the file, not of an override
            raise UserError(f"{path}: {error}") from None
        raise


def _complaint(config: Any, freeze: Callable[[Any], Any]) -> str:
    """The error message of an invalid configuration; empty if it is valid."""
    try:
        freeze(config)
    except UserError as error:
        return str(error)
    return ""


def _apply(config: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected KEY=VALUE, such as train.steps=100")
    try:
        value = parse_value(text)
    except UserError as error:
        raise UserError(f"--set {override}: {error}") from None
    table_name, _, name = key.partition(".")
    if table_name == "data" and name in moved.MOVED:
        raise UserError(moved.in_an_override(name, value))
    for rows in NAMED:
        if key.startswith(f"{rows}."):
            key, value = rows, _with_option(config, rows, key, value)
    if key == "model" and isinstance(value, str):
        with config.unlocked():
            config.model = type(config)(named_model(value).to_json())
        return
    if key in NAMED and isinstance(value, str):  # a single name
        value = [[value]]
    if key.startswith(f"{HEAD_OPTIONS}."):
        given = dict(config.model.head.options) | {key.removeprefix(f"{HEAD_OPTIONS}."): value}
        key, value = HEAD_OPTIONS, tuple(given.items())
    *parents, name = key.split(".")
    table = config
    for parent in parents:
        table = table.get(parent) if hasattr(table, "get") else None
    if not hasattr(table, "keys") or name not in table:
        near = difflib.get_close_matches(key, list(_keys(config)), n=3, cutoff=0.5)
        raise UserError(f"--set {key}: no such setting" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    if hasattr(table[name], "keys") and not (key in OPTIONAL and value is None):
        raise UserError(
            f"--set {key}: this is a table of settings ({', '.join(table[name])}); set one of them"
            + (", or none to leave it out" if key in OPTIONAL else "")
        )
    if isinstance(table[name], str) and value is None:  # the setting has a choice named "none"
        value = text
    try:
        table[name] = value
    except (TypeError, ValueError, KeyError) as error:
        example = '(("hidden", 64),)' if key == HEAD_OPTIONS else repr(_plain(table[name]))
        raise UserError(
            f"--set {override}: expected {type(table[name]).__name__}, such as {example}, found {value!r}"
        ) from error


def _with_option(config: Any, where: str, key: str, value: Any) -> list[list[Any]]:
    """The rows of a table in ``NAMED`` with one option changed, for ``--set TABLE.NAME.OPTION=VALUE``."""
    table, _, setting = where.partition(".")
    rows = named.rows(where, config[table][setting], NAMED[where])
    name, _, option = key.removeprefix(f"{where}.").rpartition(".")
    names = [row.name for row in rows]
    if not name:
        raise UserError(
            f"--set {key}: expected {where}.NAME.OPTION=VALUE, such as {where}.{[*names, 'NAME'][0]}.{option}=…"
        )
    if (count := names.count(name)) != 1:
        if not count:
            hint = did_you_mean(name, names) or f"; the names are {', '.join(names)}"
            raise UserError(f"--set {key}: no row of {where} has the name {name!r}{hint}")
        raise UserError(
            f'--set {key}: {count} rows have the name {name!r}, so give all rows: --set "{where}={tuple(map(tuple, rows))!r}"'
        )
    return [list(row._replace(options={**row.options, option: value}) if row.name == name else row) for row in rows]


def _plain(value: Any) -> Any:
    """The value in its written form: named tuples as plain tuples."""
    return (
        type(value)(map(tuple, value))
        if value and isinstance(value, list | tuple) and isinstance(value[0], Rule)
        else value
    )


def _keys(config: Any, prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")


def freeze(config: Any) -> RunConfig:
    """``ConfigDict`` -> dataclasses. Raises a UserError that names an invalid setting."""
    table = config.to_dict()
    if unknown := sorted(set(table) - {"model", "data", "train"}):
        near = did_you_mean(unknown[0], ("model", "data", "train")) or "; the tables are model, data, train"
        raise UserError(f"configuration: unknown table {unknown[0]!r}{near}")
    for name in ("model", "data", "train"):
        if not isinstance(table.get(name), dict):
            raise UserError(f"configuration: expected a table of settings {name!r}, found {table.get(name)!r:.100}")
    rows = {key: _rows(table, key) for key in ROWS}
    if set(moved.MOVED) & set(table["data"]):
        raise UserError(moved.in_a_file(table["data"]))
    rules = tuple(Rule(*row) for row in rows["train.trainable"])
    data = _typed(DataConfig, table["data"], "data")
    tables = {"mesh": MeshConfig, "head_start": HeadStart}
    inner = {name: _typed(kind, table["train"].pop(name, {}), f"train.{name}") for name, kind in tables.items()}
    train = _typed(TrainConfig, {**table["train"], **inner}, "train")
    return RunConfig(
        ModelConfig.from_json(table["model"]),
        data,
        dataclasses.replace(train, trainable=rules, pose_loss=rows["train.pose_loss"]),
    )


def _rows(table: Mapping[str, Any], key: str) -> tuple[tuple[Any, ...], ...]:
    """Removes the rows of a table setting from ``table`` and returns them. Raises UserError for anything that is not a row."""
    words, sizes = ROWS[key]
    part, _, name = key.partition(".")
    rows = table[part].pop(name, None)
    if not isinstance(rows, list | tuple):
        raise UserError(f"{key}: expected rows of {words}, found {rows!r:.100}")
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) not in sizes:
            raise UserError(
                f"{key}: expected rows of {words}, found {row!r:.100} instead of a row; a single row needs a comma "
                "after its bracket, ((…),)"
            )
    return tuple(map(tuple, rows))


def _typed(cls: Any, values: dict[str, Any], where: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{where}: unknown setting {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    return cls(**values)
