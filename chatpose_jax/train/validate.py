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
from chatpose_jax.train.loss import final_states, loss
from chatpose_jax.train.pose_loss import PoseLoss
from smpl_jax import io, metrics, render
from smpl_jax.body import BodyModel
from smpl_jax.pose import to_family

PICTURE_SIZE = 128


def validation(
    context: Context, *, split: Split = "val", rows: int = 128, batch_size: int = 32, pictures: int = 4
) -> Validation:
    """Losses and pose errors on held-out rows.

    split: the split of the rows. rows: number of rows of each kind, each with a pose. batch_size: rows of a batch, rounded up so that the mesh
    splits them evenly. pictures: number of rows of each kind for which the true and the predicted body are drawn.
    """
    for name, value, least in (("rows", rows, 1), ("batch_size", batch_size, 1), ("pictures", pictures, 0)):
        whole(f"the option {name} of the evaluator validation", value, least)
    held_out = context.rows(split)
    groups, read = held_out_rows(held_out, rows)
    found = ", ".join(f"{len(group)} of kind {kind}" for kind, group in groups.items())
    context.say(f"validation on {found} ({read} of the {len(held_out)} rows of {split!r} were read)")
    shards, config = feed.row_shards(context.mesh), context.config
    size = shards * -(-batch_size // shards)
    batches = {kind: held_out_batches(context, group, size) for kind, group in groups.items()}
    return Validation(
        config.model, config.train, batches, io.load_body(), mesh=context.mesh, rows=size, pictures=pictures
    )


class Validation:
    """A function of the parameters. Every process calls it.

    For each named group of batches it returns ``{name}_…``: each part of the loss; ``mpjpe`` and ``pa_mpjpe`` in mm, of the first pose of each
    row; and, in process 0 if ``pictures`` > 0, the drawing ``{name}_poses`` (H, W, 3) uint8. A head that draws samples uses the same key every
    time.
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
        pictures: int = 0,
    ) -> None:
        """batches: a list of batches for each name (such as "text", "image"); on a mesh, this process's rows of them.

        mesh: the mesh of the parameters. rows: number of rows of a global batch, on a mesh. pictures: number of rows of each name for which the
        true and the predicted body are drawn side by side.
        """
        distance = PoseLoss(config.pose_loss)
        self._batches, self._body, self._mesh, self._rows, self._pictures = batches, body, mesh, rows, pictures

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
                errors = {name: found[name] for name in ("mpjpe", "pa_mpjpe")}
                matrices = jnp.stack([to_family(pose, "smpl").rotations for pose in (predicted, target)])
            return parts, (errors, matrices, batch["pose_mask"][:, 0])

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
            parts: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
            errors: collections.defaultdict[str, list[np.ndarray]] = collections.defaultdict(list)
            drawn: list[np.ndarray] = []
            for batch in group:
                scalars, (distances, matrices, present) = jax.device_get(self._run(params, self._put(batch)))
                for key, value in scalars.items():
                    parts[key].append(float(value))
                for key, value in distances.items():
                    errors[key].append(value[present])
                drawn += list(matrices[:, present].swapaxes(0, 1))[: self._pictures - len(drawn)]
            values |= {f"{name}_{key}": float(np.mean(means)) for key, means in parts.items()}
            values |= {f"{name}_{key}": float(np.nanmean(np.concatenate(each))) for key, each in errors.items()}
            if drawn and hosts.primary():
                values[f"{name}_poses"] = side_by_side(self._body, np.stack(drawn))
        return values

    def _put(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return feed.put(batch, self._mesh, self._rows)


def _scalars(results: Any) -> list[str]:
    parts, (errors, *_) = results
    return [*parts, *errors]


def side_by_side(body: BodyModel, poses: np.ndarray) -> np.ndarray:
    """(N, 2, 24, 3, 3) predicted and true poses -> a sheet (H, W, 3) uint8, with the true body on the left."""
    panels = [
        render.render_body(body, pose, size=PICTURE_SIZE, supersample=1, frame="camera")
        for pair in poses
        for pose in (pair[1], pair[0])
    ]
    return render.contact_sheet(panels, 4, ["true", "predicted"] * len(poses))
