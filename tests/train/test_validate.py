"""Validation says what the loss and the metrics say."""

import jax
import numpy as np

from chatpose_jax.models.chatpose import bind, create, fake_batch
from chatpose_jax.train.loss import loss
from chatpose_jax.train.validate import make_validation
from smpl_jax import body as bodies
from smpl_jax import io, metrics
from tests.train.test_step import CONFIG, SETTINGS


def test_validation_is_the_mean_over_rows_that_hold_a_pose():
    params, body = create(CONFIG, jax.random.key(0)), io.load_body()
    batch = fake_batch(CONFIG, batch=3, length=12)
    batch["pose_mask"][1] = False
    found = make_validation(CONFIG, SETTINGS, {"image": [batch]}, body)(params)
    model = bind(CONFIG, params)
    _, parts = loss(model, batch, lambda_text=SETTINGS.lambda_text, lambda_pose=SETTINGS.lambda_pose)
    np.testing.assert_allclose(found["val_image_pose_body"], parts["pose_body"], rtol=1e-5)
    hidden = model(batch["input_ids"], pixel_values=batch["pixel_values"]).hidden[[0, 2], batch["pose_index"][0, 0]]
    predicted, true = (
        bodies.joints(body, matrices) for matrices in (model.poses(hidden), batch["pose_targets"][[0, 2], 0])
    )
    np.testing.assert_allclose(found["val_image_pa_mpjpe"], np.mean(metrics.pa_mpjpe(predicted, true)), rtol=1e-3)
