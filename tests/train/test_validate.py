"""Validation says what the loss and the metrics say."""

import jax
import numpy as np
import pytest

from chatpose_jax.models.chatpose import ChatPoseModel, bind, fake_batch, init_params
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.train.loss import final_states, loss
from chatpose_jax.train.validate import Validation
from smpl_jax import body as bodies
from smpl_jax import io, metrics
from tests.heads import matrices
from tests.numerics import GRADIENT, LOSS
from tests.train.test_step import CONFIG, SETTINGS, run_model


def test_validation_is_the_mean_over_rows_that_hold_a_pose():
    params, body = init_params(CONFIG, jax.random.key(0)), io.load_body()
    batch = fake_batch(CONFIG, batch=3, length=12)
    batch["pose_mask"][1] = False
    found = Validation(CONFIG, SETTINGS, {"image": [batch]}, body)(params)
    model = bind(CONFIG, params)
    weights = {"lambda_text": SETTINGS.lambda_text, "lambda_pose": SETTINGS.lambda_pose}

    @jax.jit
    def expected(params):
        model = bind(CONFIG, params)
        return loss(model, final_states(model, batch), batch, **weights)[1]

    parts = expected(params)
    np.testing.assert_allclose(found["image_pose_body"], parts["pose_body"], rtol=LOSS)
    hidden = run_model(params, batch)[[0, 2], batch["pose_index"][0, 0]]
    predicted, true = (
        bodies.joints(body, poses) for poses in (matrices(model, hidden), batch["poses"].rotations[[0, 2], 0])
    )
    np.testing.assert_allclose(found["image_pa_mpjpe"], np.mean(metrics.pa_mpjpe(predicted, true)), rtol=1e-3)


def test_batches_count_by_what_they_hold():
    """Ragged ones: of tokens, of poses, of measured joints. All together they say what one batch of all rows says."""
    halves = [fake_batch(CONFIG, batch=2, length=12, seed=seed) for seed in range(2)]
    halves[0]["labels"][:, :-2] = -100
    halves[0]["pose_mask"][0] = False
    halves[0]["poses"].measured[:, :, 10:] = False
    halves[1]["poses"].measured[0] = False
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *halves)
    params = init_params(CONFIG, jax.random.key(0))
    found = Validation(CONFIG, SETTINGS, {"text": [whole], "image": halves}, io.load_body())(params)
    assert all(np.isfinite(value) for value in found.values())
    names = [name.removeprefix("text_") for name in found if name.startswith("text_")]
    assert {"loss", "text", "token_accuracy", "pose_root", "pose_body", "mpjpe", "pa_mpjpe"} == set(names)
    for name in names:
        np.testing.assert_allclose(found[f"image_{name}"], found[f"text_{name}"], rtol=GRADIENT, err_msg=name)


def test_rows_that_measure_nothing_give_no_errors_and_diverged_ones_nan():
    batch = fake_batch(CONFIG, batch=2, length=12)
    batch["poses"].measured[:] = False
    params = init_params(CONFIG, jax.random.key(0))
    validation = Validation(CONFIG, SETTINGS, {"image": [batch]}, io.load_body())
    assert set(validation(params)) == {"image_loss", "image_text", "image_token_accuracy"}
    batch["poses"].measured[0] = True
    head = params["pose_head"]
    broken = params | {"pose_head": jax.tree.map(lambda x: x * np.nan, head)}
    assert np.isfinite(validation(params)["image_mpjpe"]) and np.isnan(validation(broken)["image_mpjpe"])


def test_a_batch_goes_through_the_model_once(monkeypatch):
    passes = []
    once = ChatPoseModel.__call__
    monkeypatch.setattr(
        ChatPoseModel, "__call__", lambda self, *args, **kw: passes.append(1) or once(self, *args, **kw)
    )
    batch = fake_batch(CONFIG, batch=2, length=12)
    validation = Validation(CONFIG, SETTINGS, {"image": [batch, batch]}, io.load_body())
    values = validation(init_params(CONFIG, jax.random.key(0)))
    assert sum(passes) == 1, "traced once, for the names and for all batches"
    assert set(values) == set(validation.names)


@pytest.mark.slow
def test_a_mesh_validates_to_the_same_and_draws():
    batch = fake_batch(CONFIG, batch=8, length=12)
    batch["pose_mask"][3:] = False
    mesh, body = make_mesh(2, 2, 2), io.load_body()
    alone = Validation(CONFIG, SETTINGS, {"text": [batch]}, body)(init_params(CONFIG, jax.random.key(0)))
    there = Validation(CONFIG, SETTINGS, {"text": [batch, batch]}, body, mesh=mesh, rows=8, drawings=4)
    found = there(init_params(CONFIG, jax.random.key(0), mesh))
    drawing = found.pop("text_poses")
    assert found.keys() == alone.keys()
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=GRADIENT)
    assert drawing.dtype == np.uint8
    assert drawing.shape[1] > 4 * 128, "two pairs side by side"
    assert drawing.shape[0] > 2 * 128, "four rows with a pose: two lines"
