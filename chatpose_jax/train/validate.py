"""Validation while training: losses and pose errors with the true answer given up to the pose token (teacher forcing)."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.sharding import on_mesh
from chatpose_jax.train import feed, hosts
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.loss import loss
from chatpose_jax.train.pose_loss import PoseLoss
from smpl_jax import metrics, render
from smpl_jax.body import BodyModel

PICTURE_SIZE = 128


def make_validation(
    model_config: ModelConfig,
    config: TrainConfig,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    body: BodyModel,
    *,
    mesh: Mesh | None = None,
    rows: int = 0,
    pictures: int = 0,
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function of the parameters, which every process calls.

    Args:
        batches: for each name (such as "text", "image") a finite list of batches; on a mesh, this process's rows of them.
        mesh: where the parameters lie.
        rows: of a whole batch, on a mesh.
        pictures: rows of each name whose true and predicted bodies are drawn side by side.

    Returns:
        Scalars ``val_{name}_…``: each part of the loss, and ``pa_mpjpe``, ``mpjpe`` in mm of each row's first pose; and
        on process 0 pictures ``val_{name}_poses`` (H, W, 3) uint8, where ``pictures`` asks for them.
    """

    distance = PoseLoss(config.pose_loss)

    def run(params: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, jax.Array], Any]:
        with on_mesh(mesh):
            model = bind(model_config, dict(params))
            _, parts = loss(
                model, batch, lambda_text=config.lambda_text, lambda_pose=config.lambda_pose, distance=distance
            )
            hidden = model(
                batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch.get("pixel_values")
            ).hidden
            poses = model.poses(model.states(hidden, batch["pose_index"][:, :1]), jax.random.key(0))
            matrices = jnp.stack([poses.rotations[:, 0], batch["poses"].rotations[:, 0]])
            found = metrics.pose_metrics(poses[:, 0], batch["poses"][:, 0], body)
            distances = jnp.stack([found["mpjpe"], found["pa_mpjpe"]])
        return parts, (distances, matrices, batch["pose_mask"][:, 0])

    # Every process reads all results, so they stand whole on each.
    jitted = jax.jit(run, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))

    def validate(params: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, group in batches.items():
            parts: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
            errors: list[np.ndarray] = []
            drawn: list[np.ndarray] = []
            for batch in group:
                scalars, poses = jitted(params, feed.put(batch, mesh, rows))
                for key, value in scalars.items():
                    parts[key].append(float(value))
                distances, matrices, present = map(np.asarray, poses)
                errors.append(distances[:, present])
                drawn += list(matrices[:, present].swapaxes(0, 1))[: pictures - len(drawn)]
            values |= {f"val_{name}_{key}": float(np.mean(means)) for key, means in parts.items()}
            mpjpe, pa_mpjpe = np.nanmean(np.concatenate(errors, axis=1), axis=1)
            values |= {f"val_{name}_mpjpe": float(mpjpe), f"val_{name}_pa_mpjpe": float(pa_mpjpe)}
            if drawn and hosts.primary():
                values[f"val_{name}_poses"] = side_by_side(body, np.stack(drawn))
        return values

    return validate


def side_by_side(body: BodyModel, poses: np.ndarray) -> np.ndarray:
    """(N, 2, 24, 3, 3) predicted and true poses -> a sheet (H, W, 3) uint8, the true one left of the predicted."""
    panels = [
        render.render_body(body, pose, size=PICTURE_SIZE, supersample=1, frame="camera")
        for pair in poses
        for pose in (pair[1], pair[0])
    ]
    return render.contact_sheet(panels, 4, ["true", "predicted"] * len(poses))
