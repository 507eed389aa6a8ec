"""Parity with transformers' ``LlavaForConditionalGeneration`` and with a ChatPose assembled of torch modules."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")


import torch

from chatpose_jax.models.chatpose import bind, stack_layers, unstack_layers
from chatpose_jax.models.config import ModelConfig
from tests.heads import matrices

from ..numerics import Rounded, agree, rounded
from . import peers, small


def our_logits(
    config: ModelConfig, params: Any, ids: np.ndarray, mask: np.ndarray, images: np.ndarray | None
) -> Rounded:
    def run(params: Any) -> jax.Array:
        model = bind(config, params)
        return model.logits(model(ids, attention_mask=mask, pixel_values=images).hidden)

    with jax.default_matmul_precision("highest"):
        return rounded(jax.jit(run), params)


def by_row(config: ModelConfig, rows: list[list[int]], images: np.ndarray) -> np.ndarray:
    """(K, …) images in order -> (B, I, …), rows with fewer images filled with noise that must not be read."""
    counts = [ids.count(config.image_token_id) // config.vision.num_patches for ids in rows]
    out = np.full((len(rows), max(counts), *images.shape[1:]), 9.0, np.float32)
    parts = np.split(images, np.cumsum(counts)[:-1])
    for place, part in zip(out, parts):
        place[: len(part)] = part
    return out


# A positive number is that many words, 0 is an image. All rows of a batch run in one forward.
BATCHES = {
    "text": [(12,)],
    "ragged text": [(12,), (5,), (9,)],
    "image first": [(0, 7)],
    "image later": [(8, 0, 3)],
    "mixed": [(3, 0, 9), (14,), (2, 0, 4)],
    "two images": [(2, 0, 3, 0, 4), (6,), (5, 0, 1)],
}


@pytest.mark.parametrize(
    ("name", "side", "kv_heads"),
    [(name, "right", 2) for name in BATCHES]
    + [("ragged text", "left", 2), ("mixed", "left", 2), ("mixed", "right", 4), ("two images", "left", 4)],
)
def test_logits_match_transformers(name: str, side: str, kv_heads: int) -> None:
    config = small.config(kv_heads)
    model = peers.llava(config)
    rows = [small.row(config, *parts, seed=i) for i, parts in enumerate(BATCHES[name])]
    ids, mask = small.pad(rows, side)
    count = sum(parts.count(0) for parts in BATCHES[name])
    images = small.pixels(config, count) if count else None
    expected = peers.torch_logits(model, ids, mask, images)
    found = our_logits(
        config, peers.to_tree(model, config), ids, mask, None if images is None else by_row(config, rows, images)
    )
    assert np.abs(expected[mask == 1]).max() > 1
    agree(found[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("wrong", ["rms_norm_eps", "rope_theta", "select_layer", "image_order"])
def test_the_comparison_sees_a_wrong_detail(wrong: str) -> None:
    config = small.config(2)
    model = peers.llava(config)
    rows = [small.row(config, 4, 0, 3, 0, 6)]
    ids, mask = small.pad(rows)
    images = small.pixels(config, 2)
    expected = peers.torch_logits(model, ids, mask, images)
    params, given = peers.to_tree(model, config), by_row(config, rows, images)
    if wrong == "rms_norm_eps":
        # The embeddings' scale sets how much the epsilon shows; a released model's first norm sees rows of a like size.
        config = small.config(2, eps=1e-6)
        embeddings = params["decoder"]["embed_tokens"]
        params["decoder"]["embed_tokens"] = {name: table * 0.1 for name, table in embeddings.items()}
        with torch.no_grad():
            model.model.language_model.embed_tokens.weight.mul_(0.1)
        expected = peers.torch_logits(model, ids, mask, images)
        agree(our_logits(small.config(2), params, ids, mask, given), expected)
    elif wrong == "rope_theta":
        config = ModelConfig.from_json(config.to_json() | {"text": config.to_json()["text"] | {"rope_theta": 10100.0}})
    elif wrong == "select_layer":
        params["vision"]["layers"] = jax.tree.map(lambda x: x.at[-1].set(x[0]), params["vision"]["layers"])
    else:
        given = given[:, ::-1]
    found = our_logits(config, params, ids, mask, given)
    assert np.abs(found.value - expected).max() > 2 * found.bound


def test_poses_match_the_released_head() -> None:
    """CHATPOSE-V0: the normed state at p-1, Linear-ReLU-Linear, 6D columns, Gram–Schmidt: written here in torch."""
    config = small.config()
    model, head = peers.llava(config), peers.pose_head(config)
    rows = [
        [*small.row(config, 0, 6), small.POSE, 5],
        [*small.row(config, 4, seed=3), small.POSE, *small.row(config, 3), small.POSE],
    ]
    ids, mask = small.pad(rows)
    images = small.pixels(config, 1)
    places = [(b, p - 1) for b, row in enumerate(rows) for p, token in enumerate(row) if token == small.POSE]
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask),
            pixel_values=torch.from_numpy(images.transpose(0, 3, 1, 2).copy()),
        ).last_hidden_state
        columns = head(torch.stack([hidden[b, p] for b, p in places])).reshape(len(places), 24, 2, 3)
        x = torch.nn.functional.normalize(columns[:, :, 0], dim=-1)
        y = columns[:, :, 1] - (x * columns[:, :, 1]).sum(-1, keepdim=True) * x
        y = torch.nn.functional.normalize(y, dim=-1)
        expected = torch.stack([x, y, torch.linalg.cross(x, y)], dim=-1).numpy()

    def run(params: Any) -> jax.Array:
        ours = bind(config, params)
        hidden = ours(ids, attention_mask=mask, pixel_values=by_row(config, rows, images)).hidden
        return matrices(ours, hidden[tuple(np.array(places).T)])

    with jax.default_matmul_precision("highest"):
        found = rounded(jax.jit(run), peers.to_tree(model, config, head))
    assert found.value.shape == (3, 24, 3, 3)
    agree(found, expected)


def test_scanned_and_unrolled_layers_agree() -> None:
    stacked, unrolled = small.config(2), small.config(2, scan=False)
    model = peers.llava(stacked)
    rows = [small.row(stacked, 3, 0, 5)]
    ids, mask = small.pad(rows)
    images = small.pixels(stacked, 1)[None]
    params = peers.to_tree(model, stacked)
    apart = unstack_layers(params)
    agree(our_logits(stacked, params, ids, mask, images), our_logits(unrolled, apart, ids, mask, images))
    jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), params)
    jax.tree.map(np.testing.assert_array_equal, peers.to_tree(model, unrolled), apart)
