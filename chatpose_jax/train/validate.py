"""The evaluator "validation": losses and pose errors with the true answer given up to the pose token (teacher forcing)."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chatpose_jax.data.config import Split
from chatpose_jax.models.chatpose import abstract_params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh
from chatpose_jax.settings import whole
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.evaluators import Context
from chatpose_jax.train.held_out import held_out_batches, held_out_rows
from chatpose_jax.train.loss import counts, final_states, loss, weighted
from chatpose_jax.train.pose_loss import PoseLoss
from smpl_jax import io, metrics, render
from smpl_jax.body import BodyModel
from smpl_jax.pose import to_family

DRAWING_SIZE = 128
ERRORS = ("mpjpe", "pa_mpjpe")


def validation(
    context: Context, *, split: Split = "val", rows: int = 128, batch_size: int = 32, drawings: int = 4
) -> Validation:
    """Losses and pose errors on held-out rows.

    split: the split of the rows. rows: number of rows of each kind, each with a pose. batch_size: rows of a batch, rounded up so that the mesh
    splits them evenly. drawings: number of rows of each kind for which the true and the predicted body are drawn.
    """
    for name, value, least in (("rows", rows, 1), ("batch_size", batch_size, 1), ("drawings", drawings, 0)):
        whole(f"the option {name} of the evaluator validation", value, least)
    held_out = context.rows(split)
    groups, read = held_out_rows(held_out, rows)
    found = ", ".join(f"{len(group)} of kind {kind}" for kind, group in groups.items())
    context.say(f"validation on {found} ({read} of the {len(held_out)} rows of {split!r} were read)")
    shards, config = feed.row_shards(context.mesh), context.config
    size = shards * -(-batch_size // shards)
    batches = {kind: held_out_batches(context, group, size) for kind, group in groups.items()}
    return Validation(
        config.model, config.train, batches, io.load_body(), mesh=context.mesh, rows=size, drawings=drawings
    )


class Validation:
    """A function of the parameters. Every process calls it.

    For each named group of batches it returns ``{name}_…``: the loss and each of its parts, as one batch of all rows has them; ``mpjpe`` and
    ``pa_mpjpe`` in mm, the means over the first poses of all rows that have measured joints; and, in process 0 if ``drawings`` > 0, the drawing
    ``{name}_poses`` (H, W, 3) uint8. A value of which the rows measure nothing is left out. A head that draws samples uses the same key every time.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        batches: Mapping[str, Sequence[Mapping[str, Any]]],
        body: BodyModel,
        *,
        mesh: Mesh | None = None,
        rows: int = 0,
        drawings: int = 0,
    ) -> None:
        """batches: a list of batches for each name (such as "text", "image"); on a mesh, this process's rows of them.

        mesh: the mesh of the parameters. rows: number of rows of a global batch, on a mesh. drawings: number of rows of each name for which the
        true and the predicted body are drawn side by side.
        """
        distance = PoseLoss(config.pose_loss)
        self._batches, self._body, self._mesh, self._rows, self._drawings = batches, body, mesh, rows, drawings
        self._config = config

        def run(params: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, jax.Array], Any]:
            with on_mesh(mesh):
                model = bind(model_config, dict(params))
                hidden = final_states(model, batch)
                _, parts = loss(
                    model,
                    hidden,
                    batch,
                    lambda_text=config.lambda_text,
                    lambda_pose=config.lambda_pose,
                    distance=distance,
                )
                poses = model.poses(model.states(hidden, batch["pose_index"][:, :1]), jax.random.key(0))
                predicted, target = poses[:, 0], batch["poses"][:, 0]
                found = metrics.pose_metrics(predicted, target, body)
                errors = {name: found[name] for name in ERRORS}
                matrices = jnp.stack([to_family(pose, "smpl").rotations for pose in (predicted, target)])
                held = counts(model.pose_head, batch)
                held.parts.update(distance.counts(batch["poses"], batch["pose_mask"]))
                del parts["loss"]
            return parts, ({name: held.of(name) for name in parts}, errors, matrices, batch["pose_mask"][:, 0])

        # Every process reads all results, so they are replicated.
        self._run = jax.jit(run, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))
        params = abstract_params(model_config)
        self.names = [
            f"{name}_{key}"
            for name, group in batches.items()
            for key in _scalars(self._run.eval_shape(params, self._put(group[0])))
        ]

    def __call__(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Scalars and drawings by name."""
        values: dict[str, Any] = {}
        for name, group in self._batches.items():
            sums: collections.defaultdict[str, float] = collections.defaultdict(float)
            held: collections.Counter[str] = collections.Counter()
            drawn: list[np.ndarray] = []
            for batch in group:
                means, (sizes, errors, matrices, present) = jax.device_get(self._run(params, self._put(batch)))
                finite = np.isfinite(matrices[0]).all(axis=(1, 2, 3))
                for key, value in errors.items():  # NaN where the row has nothing measured, or the model diverged
                    counted = value[present & ~(np.isnan(value) & finite)]
                    means[key], sizes[key] = counted.mean() if len(counted) else 0.0, len(counted)
                for key, value in means.items():
                    sums[key] += float(value) * int(sizes[key])
                    held[key] += int(sizes[key])
                drawn += list(matrices[:, present].swapaxes(0, 1))[: self._drawings - len(drawn)]
            found = {key: sums[key] / held[key] for key in sums if held[key]}
            parts = {key: value for key, value in found.items() if key not in ERRORS}
            total = weighted(parts, self._config.lambda_text, self._config.lambda_pose)
            values |= {f"{name}_{key}": value for key, value in {"loss": total, **found}.items()}
            if drawn and hosts.primary():
                values[f"{name}_poses"] = side_by_side(self._body, np.stack(drawn))
        return values

    def _put(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return feed.put(batch, self._mesh, self._rows)


def _scalars(results: Any) -> list[str]:
    parts, _ = results
    return ["loss", *parts, *ERRORS]


def side_by_side(body: BodyModel, poses: np.ndarray) -> np.ndarray:
    """(N, 2, 24, 3, 3) predicted and true poses -> a sheet (H, W, 3) uint8, with the true body on the left."""
    panels = [
        render.render_body(body, pose, size=DRAWING_SIZE, supersample=1, frame="camera")
        for pair in poses
        for pose in (pair[1], pair[0])
    ]
    return render.contact_sheet(panels, 4, ["true", "predicted"] * len(poses))
