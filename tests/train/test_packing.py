"""Packed rows train as unpacked ones do: no conversation sees another."""

import dataclasses

import jax
import numpy as np

from chatpose_jax.data.collate import collate, encode_example, pack
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.models.chatpose import bind, init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train import trainable as table
from chatpose_jax.train.loss import final_states, loss
from tests.numerics import GRADIENT, LOSS

TINY = preset("tiny")
CONFIG = TINY.replace(
    vision=dataclasses.replace(TINY.vision, num_layers=2), text=dataclasses.replace(TINY.text, num_layers=2)
)


def test_packed_is_unpacked():
    processor = tiny_processor(CONFIG)
    tasks = {"text": 1, "image": 1, "text_turns": 1, "image_words": 1, "words": 1}
    examples = SyntheticDataset("train", 10, tasks=tasks, image_size=CONFIG.vision.image_size)
    rows = [encode_example(processor, example, 512) for example in examples]
    options = {"pad_id": processor.ids.pad_token_id, "image_size": CONFIG.vision.image_size}
    unpacked = collate(rows, 320, max_images=1, max_poses=2, **options)
    packed = collate([pack(rows[:3]), pack(rows[3:7]), pack(rows[7:])], 960, max_images=4, max_poses=8, **options)
    assert packed["segment_ids"].max() == 4
    assert packed["pose_mask"].sum() == unpacked["pose_mask"].sum() > 5
    assert 0 < packed["pixel_values"].any(axis=(2, 3, 4)).sum() < 10

    flat = table.flatten(init_params(CONFIG, jax.random.key(0)))
    # Larger weights than fresh ones, so that attention tells tokens apart and a leak would show.
    params = table.unflatten({path: 3 * x if path.endswith("_proj/kernel") else x for path, x in flat.items()})

    @jax.jit
    def value(batch):
        model = bind(CONFIG, params)
        return loss(model, final_states(model, batch), batch, lambda_text=1.0, lambda_pose=1.0)

    (expected, parts), (found, others) = value(unpacked), value(packed)
    np.testing.assert_allclose(found, expected, rtol=LOSS)
    for name, part in parts.items():
        np.testing.assert_allclose(others[name], part, rtol=GRADIENT, err_msg=name)
    leaking, _ = value({name: x for name, x in packed.items() if name != "segment_ids"})
    assert abs(float(leaking) - float(expected)) > 1e-3, "else this shows nothing"
