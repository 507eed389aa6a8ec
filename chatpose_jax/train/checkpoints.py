"""Checkpoints of a run: trainable parameters, optimiser state, step and data position, with the settings and hashes of the frozen base.

Layers are stacked in them, whatever the run does (``train.layers``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.orbax_s3 import orbax_options
from chatpose_jax.storage import Location, absolute
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.fingerprint import fingerprint
from chatpose_jax.train.step import TrainState

METRIC = "metric"


class Checkpoints:
    """Orbax checkpoints in ``folder/<step>``, written in the background. A checkpoint becomes visible when it is complete.

    Every process of a run creates this object for the same folder and calls the same methods in the same order. It keeps the newest ``keep``
    checkpoints and the one with the smallest metric.
    """

    def __init__(
        self, folder: Location, *, keep: int, identity: dict[str, Any], frozen: Mapping[str, str], result: Location
    ):
        """identity: settings as JSON that must be the same when the run resumes.
        frozen: ``fingerprint`` of the arrays that are not in the checkpoint.
        result: the model folder of the run, for error messages.
        """
        # On a full disk these loggers write a line for every array and thread, in addition to the one error that is raised.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder, self.identity, self.frozen, self.result = folder, identity, dict(frozen), result
        best = policies.BestN(get_metric_fn=_merit, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=_merit,
            **orbax_options(folder),
        )
        self.manager = ocp.CheckpointManager(absolute(folder), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The step with the smallest metric; None if no checkpoint has a metric."""
        return self.manager.best_step()

    def save(self, state: TrainState, data: dict[str, Any], metric: float | None = None) -> None:
        """Saves a checkpoint. Returns as soon as the state is copied; ``wait`` waits until it is on disk. A step that is already saved is skipped.

        metric: metric of this state, smaller is better; None if it was not measured.
        """
        step = int(state.step)
        if step != self.latest():
            run = {"data": data, "identity": self.identity, "frozen": self.frozen, "state": _fingerprints(state)}
            items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run)}
            metrics = None if metric is None else {METRIC: metric}
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def demand_settings(self, step: int | None) -> dict[str, Any]:
        """The JSON part of a checkpoint. Raises UserError if the checkpoint has other settings or cannot be read."""
        try:
            run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: no readable checkpoint ({error}); delete this folder to resume from an older one"
            ) from error
        saved = _in_todays_terms(run["identity"], self.identity)
        differing = [
            f"{table}.{key}"
            for table, values in self.identity.items()
            for key in sorted({*values, *saved.get(table, {})})
            if saved.get(table, {}).get(key) != values.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder}: the checkpoint at step {step} was made with other settings of {', '.join(differing)}: go back "
                f"to those, or begin another run from its result with chatpose train --init {self.result} --out NEW "
                f"(where there is no such folder yet, the old settings with --set train.steps={step} write it)"
            )
        return run  # type: ignore[no-any-return]

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint, or that of ``step``, with the shardings of ``like`` (arrays or abstract shapes). The mesh and the number of
        processes may differ from those of the run that saved it.

        Raises UserError if the checkpoint has other settings or another frozen base, cannot be read, or is damaged.
        """
        step = self.latest() if step is None else step
        run = self.demand_settings(step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        self._check_base(step, run.get("frozen"))
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: the state cannot be read ({error}); delete this folder to resume from an older one"
            ) from error
        if "state" in run:  # older versions did not write it
            found = _fingerprints(state)
            if damaged := sorted(path for path, words in run["state"].items() if found.get(path) != words):
                raise UserError(
                    f"{self.folder / str(step)}: {len(damaged)} of {len(found)} arrays are not what was saved ({damaged[0]}): its files "
                    "were damaged; delete this folder to resume from an older one"
                )
        return state, run["data"]

    def _check_base(self, step: int | None, saved: Mapping[str, str] | None) -> None:
        if saved is None:
            raise UserError(
                f"{self.folder}: the checkpoint at step {step} does not say which frozen base it belongs to: an older "
                "version of this program wrote it; finish the run with that version, or give --out another folder"
            )
        wrong = sorted(path for path in {*saved, *self.frozen} if saved.get(path) != self.frozen.get(path))
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"{self.folder}: the checkpoint at step {step} was trained beside another frozen base: "
                f"{', '.join(wrong[:5])}{more} of {len(self.frozen)} arrays differ; "
                "give the --init that this run started from, or --out another folder"
            )

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()


def _fingerprints(state: TrainState) -> dict[str, str]:
    return fingerprint({jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)})


def _merit(metrics: Mapping[str, float]) -> float:
    """Orbax keeps the largest value, so the metric is negated."""
    return -metrics[METRIC]


def _in_todays_terms(saved: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    """Updates the settings of an old checkpoint: those of ``today`` that did not exist have their default, and all heads had 24 joints."""
    tables = {name: dict(values) for name, values in saved.items()}
    if (head := tables.get("model", {}).get("head", {})).get("num_joints") == 24:
        tables["model"]["head"] = {name: value for name, value in head.items() if name != "num_joints"}
    defaults = {"model": ModelConfig().to_json(), "train": dataclasses.asdict(TrainConfig())}
    return _completed(tables, today, json.loads(json.dumps(defaults)))


def _completed(saved: Mapping[str, Any], today: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` with the default of every setting of ``today`` that it lacks, in inner tables too."""
    whole = {**{name: defaults[name] for name in today if name in defaults}, **saved}
    inner = {
        name: _completed(value, today[name], defaults[name])
        for name, value in saved.items()
        if all(isinstance(table.get(name), Mapping) for table in (saved, today, defaults))
    }
    return {**whole, **inner}
