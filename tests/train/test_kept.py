"""Kept states: computed once for each conversation, the same losses, and never where something before them trains."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from chatpose_jax.data.batches import BatchLoader
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.models.chatpose import abstract_params, init_params
from chatpose_jax.models.config import LoRAConfig, preset
from chatpose_jax.models.sharding import make_mesh
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train import trainable as table
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.flops import utilisation
from chatpose_jax.train.kept import KeptStates, not_kept
from chatpose_jax.train.layout import lay_out
from chatpose_jax.train.trainer import train
from tests.numerics import TRAINED

TINY = preset("tiny")
CONFIG = TINY.replace(
    vision=dataclasses.replace(TINY.vision, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2),
    text=dataclasses.replace(TINY.text, hidden_size=32, intermediate_size=48, num_layers=3, head_dim=8),
    lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.5, last_layers=1),
    scan_layers=False,
)
BEHIND = tuple(rule for rule in table.PAPER if "embed_tokens" not in rule.pattern)
SETTINGS = TrainConfig(
    steps=9, batch_size=2, accumulate=2, warmup_steps=2, learning_rate=1e-2, remat="none", log_every=1, trainable=BEHIND
)


def loader(packing=False):
    rows = SyntheticDataset("train", 8, tasks={"text_short": 1, "image": 1})
    processor = tiny_processor(CONFIG)
    return BatchLoader(rows, processor, 4, max_length=512, packing=packing, buckets=2)


@pytest.mark.parametrize("packing", [False, True])
def test_training_with_kept_states_gives_the_same_losses(tmp_path, monkeypatch, packing):
    ran = []
    states = KeptStates._states
    monkeypatch.setattr(KeptStates, "_states", lambda self, *args: ran.append(1) or states(self, *args))
    stacked = CONFIG.replace(scan_layers=True)
    losses = []
    for keep in (False, True):
        params = init_params(stacked, jax.random.key(0))
        out = tmp_path / str(keep)
        train(CONFIG, SETTINGS, params, loader(packing), out, progress=False, keep_states=keep)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[1], losses[0], rtol=TRAINED)
    assert 0 < len(ran) < 2 * SETTINGS.steps, "no more than the micro-batches with new rows"


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_conversation_comes_again_in_another_batch(monkeypatch, mesh):
    """Beside other rows, in longer padding or in a pack: found again, the same up to rounding as computed there."""
    where = None if mesh is None else make_mesh(*mesh)
    settings = dataclasses.replace(SETTINGS, batch_size=4, accumulate=1)
    stacked = CONFIG.replace(scan_layers=True)
    frozen = table.split(init_params(stacked, jax.random.key(0), where), BEHIND)[1]
    frozen = lay_out(frozen, CONFIG)
    kept, plain, packed = KeptStates(CONFIG, settings, frozen, where), loader(), loader(packing=True)
    for step in range(4):
        kept(plain.batch(step))
    held = len(kept._held)
    assert held == 8
    monkeypatch.setattr(kept, "_states", None)  # nothing is computed again
    batch = packed.batch(0)
    assert batch["segment_ids"].max() > 1
    found = kept(batch)
    assert "pixel_values" not in found and found["led"].shape == (*batch["input_ids"].shape, 32)
    fresh = KeptStates(CONFIG, settings, frozen, where)(batch)["led"]
    np.testing.assert_allclose(found["led"], fresh, atol=1e-5)
    assert np.abs(fresh).max() > 0.1 and len(kept._held) == held


def test_other_images_are_other_states():
    frozen = lay_out(table.split(init_params(CONFIG.replace(scan_layers=True), jax.random.key(0)), BEHIND)[1], CONFIG)
    settings = dataclasses.replace(SETTINGS, batch_size=4)
    kept, batches = KeptStates(CONFIG, settings, frozen, None), loader()
    batch = next(b for b in map(batches.batch, range(4)) if "pixel_values" in b)
    first = kept(batch)["led"].copy()
    other = {**batch, "pixel_values": batch["pixel_values"] + 1.0}
    assert np.abs(kept(other)["led"] - first).max() > 1e-3
    np.testing.assert_array_equal(kept(batch)["led"], first)


def test_why_a_run_keeps_none():
    params = abstract_params(CONFIG.replace(scan_layers=True))

    def why(config=CONFIG, epoch=8, tokens=1000, **changes):
        return not_kept(config, dataclasses.replace(SETTINGS, **changes), params, epoch, tokens)

    assert why() is None
    assert "decoder/embed_tokens/added trains" in why(trainable=table.PAPER)
    assert why(trainable=(table.Rule("projector/.*", 1.0), *BEHIND)).startswith("projector/")
    assert why(trainable=table.EVERYTHING) is not None
    assert why(epoch=SETTINGS.steps) == "every row comes once"
    assert why(tokens=1 << 20, keep_states_mib=127) == "they take 128 MiB, more than train.keep_states_mib=127"
    assert why(tokens=1 << 20, keep_states_mib=128) is None
    everywhere = CONFIG.replace(lora=dataclasses.replace(CONFIG.lora, last_layers=None))
    assert why(everywhere) == "every layer has adapters (model.lora.last_layers)"


def test_what_does_not_run_does_not_count():
    batch = {"input_ids": np.zeros((4, 64), np.int32), "pixel_values": np.zeros((4, 1, 64, 64, 3), np.float32)}
    count = utilisation(CONFIG, SETTINGS)
    whole, part = count(batch), count({"input_ids": batch["input_ids"], "led": 0})
    tokens, text = 4 * 64, CONFIG.text
    layer = 2 * tokens * 4 * text.hidden_size**2 + 2 * tokens * 3 * 32 * 48 + 2 * 4 * 32 * 64**2
    seen = count({"input_ids": batch["input_ids"]})
    assert seen["mfu"] - part["mfu"] == 2 * layer
    assert whole["mfu"] > seen["mfu"]
