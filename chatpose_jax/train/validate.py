"""Validation while training: losses and pose errors with the true answer given up to the pose token (teacher forcing)."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.models.chatpose import bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.loss import loss
from smpl_jax import body as bodies
from smpl_jax import metrics
from smpl_jax.body import BodyModel


def make_validation(
    model_config: ModelConfig,
    config: TrainConfig,
    batches: Mapping[str, Iterable[Mapping[str, np.ndarray]]],
    body: BodyModel,
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function of the parameters. ``batches``: for each name (such as "text", "image") a finite list of batches.

    Returns scalars ``val_{name}_…``: each part of the loss, and ``pa_mpjpe``, ``mpjpe`` in mm of each row's first pose.
    """

    @jax.jit
    def run(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        model = bind(model_config, dict(params))
        _, parts = loss(model, batch, lambda_text=config.lambda_text, lambda_pose=config.lambda_pose)
        hidden = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch.get("pixel_values")
        ).hidden
        states = jnp.take_along_axis(hidden, batch["pose_index"][:, :1, None], axis=1)[:, 0]
        matrices = jnp.stack([model.poses(states), batch["pose_targets"][:, 0]])
        joints = bodies.joints(body, bodies.from_smpl_pose(body, matrices))[..., :24, :]
        return parts, jnp.stack([metrics.mpjpe(*joints), metrics.pa_mpjpe(*joints)])

    def validate(params: Mapping[str, Any]) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for name, group in batches.items():
            parts: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
            errors = []
            for batch in group:
                values, distance = run(params, batch)
                for key, value in values.items():
                    parts[key].append(float(value))
                errors.append(np.asarray(distance)[:, np.asarray(batch["pose_mask"])[:, 0]])
            scalars |= {f"val_{name}_{key}": float(np.mean(values)) for key, values in parts.items()}
            mpjpe, pa_mpjpe = np.concatenate(errors, axis=1).mean(axis=1)
            scalars |= {f"val_{name}_mpjpe": float(mpjpe), f"val_{name}_pa_mpjpe": float(pa_mpjpe)}
        return scalars

    return validate
