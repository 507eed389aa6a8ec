"""A small configuration and ragged batches for it."""

from __future__ import annotations

import numpy as np

from chatpose_jax.models.config import LoRAConfig, ModelConfig, TextConfig, VisionConfig

IMAGE, POSE = 61, 60


def config(kv_heads: int = 4, *, scan: bool = True, lora: LoRAConfig | None = None, eps: float = 1e-5) -> ModelConfig:
    """Four query heads, two layers of text, three of vision, 9 patches an image; ids 60 and 61 are added rows."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=24, patch_size=8, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4
        ),
        text=TextConfig(
            vocab_size=62,
            base_vocab_size=60,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            num_kv_heads=kv_heads,
            head_dim=16,
            rms_norm_eps=eps,
            max_position_embeddings=512,
        ),
        lora=lora,
        pose_token_id=POSE,
        image_token_id=IMAGE,
        scan_layers=scan,
        dtype="float32",
        param_dtype="float32",
    )


def pixels(config: ModelConfig, images: int, seed: int = 0) -> np.ndarray:
    """(images, S, S, 3) normalised pixels."""
    size = config.vision.image_size
    return np.random.default_rng(seed).standard_normal((images, size, size, 3)).astype(np.float32)


def row(config: ModelConfig, *parts: int, seed: int = 0) -> list[int]:
    """Ids: a positive part is that many words, 0 is an image."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for part in parts:
        ids += rng.integers(3, 60, part).tolist() if part else [config.image_token_id] * config.vision.num_patches
    return ids


def pad(rows: list[list[int]], side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows -> (B, T) ids and mask, padded with 0 on this side."""
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, ids_row in enumerate(rows):
        place = slice(0, len(ids_row)) if side == "right" else slice(width - len(ids_row), width)
        ids[i, place], mask[i, place] = ids_row, 1
    return ids, mask
