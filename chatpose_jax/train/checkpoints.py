"""Checkpoints of a run: trainable state, optimiser, step, data position, and the settings that they belong to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from chatpose_jax.errors import UserError
from chatpose_jax.train.step import TrainState


class Checkpoints:
    """Orbax checkpoints in ``folder/<step>``, written in the background; a step is visible only when it is whole."""

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        """identity: JSON that a resumed run must share, such as the model's configuration and the table of what trains."""
        logging.getLogger("absl").setLevel(logging.WARNING)
        self.folder, self.identity = folder, identity
        self.manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Returns once the state is copied; ``wait`` says when it is on disk. A step that stands already is kept."""
        step = int(state.step)
        if step != self.latest():
            items = {
                "state": ocp.args.StandardSave(state),
                "run": ocp.args.JsonSave({"data": data, "identity": self.identity}),
            }
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, placed as ``like`` is (arrays or abstract shapes with shardings).

        Raises UserError when it belongs to another model or table, or cannot be read.
        """
        step = self.latest()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: no readable checkpoint ({error}); delete this folder to resume from an older one"
            ) from error
        saved = run["identity"]
        differing = [
            f"{table}.{key}"
            for table, values in self.identity.items()
            for key in sorted({*values, *saved.get(table, {})})
            if saved.get(table, {}).get(key) != values.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder}: the checkpoint at step {step} was made with other settings of {', '.join(differing)}; "
                "give --out another folder, or go back to those settings"
            )
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state
        except Exception as error:
            raise UserError(
                f"{self.folder / str(step)}: the state cannot be read ({error}); delete this folder to resume from an older one"
            ) from error
        return state, run["data"]

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()
