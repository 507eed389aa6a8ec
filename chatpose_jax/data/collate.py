"""Makes arrays of rows: encodes an ``Example``, packs several into one row, pads rows to one shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from chatpose_jax import named
from chatpose_jax.data.example import Example
from chatpose_jax.errors import UserError
from chatpose_jax.processing.processor import IGNORE, Processor, Sizes
from smpl_jax.pose import (
    Family,
    Pose,
    check,
    complete,
    concatenate,
    to_betas,
    to_family,
    to_frame,
    unmeasured,
)

Batch = dict[str, Any]
"""Arrays by name, and under "poses" a ``Pose`` of arrays."""
BETAS = 10
"""Shape coefficients of a pose in a batch."""


def encode_example(
    processor: Processor, example: Example, max_length: int, *, family: Family = "smpl", normalise: bool = True
) -> dict[str, Any]:
    """Encodes one row, without padding.

    Args:
        family: the body family of the poses, that of the pose head (``smpl_jax.pose.to_family``). Joints that are filled in are not measured.
        normalise: False leaves images as uint8.

    Returns:
        ``input_ids`` (T,) and ``labels`` (T,) int32 with T <= max_length; ``images``, a list of (S, S, 3) float32; ``pose_positions`` (P,)
        int32; ``poses``, a ``Pose`` of batch shape (P,) in the camera frame, float32, with all fields. Images and poses after the cut are
        dropped.

    Raises:
        UserError, which names the row, where it is malformed or has not one pose for each ``<POSE>`` of its answers.
    """
    with _named(example):
        encoded = processor.encode(
            example.messages, add_generation_prompt=False, max_length=max_length, normalise=normalise
        )
        found = len(encoded.pose_positions)
        poses = _poses(example, found, encoded.truncated)
        try:
            poses = as_trained(poses, family)[:found]
        except ValueError as error:
            raise UserError(f"poses: {error}") from None
    return {
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "images": encoded.images,
        "pose_positions": encoded.pose_positions,
        "poses": complete(poses, BETAS),
    }


def as_trained(poses: Pose, family: Family = "smpl") -> Pose:
    """Poses as batches hold them: in the camera frame, with the joints of a body family and ``BETAS`` betas.

    Raises ValueError for poses that are not valid (``smpl_jax.pose.check``), and for a translation in another frame, which needs the body.
    """
    poses = to_betas(to_family(to_frame(check(poses), "camera"), family), BETAS)
    return poses.replace(shape_space=None)  # it is static, and batches of all sources need one structure


def measure_example(processor: Processor, example: Example, max_length: int) -> tuple[int, int, int]:
    """(tokens, images, poses) of the row that ``encode_example`` gives. No image is opened.

    Raises UserError as ``encode_example`` does, but not for images.
    """
    return count_example(processor, example, max_length)[:3]


def count_example(processor: Processor, example: Example, max_length: int | None = None) -> Sizes:
    """As ``measure_example``, with all that ``Processor.measure`` counts; without ``max_length`` of the whole conversation."""
    with _named(example):
        sizes = processor.measure(example.messages, max_length)
        _check(example, sizes.poses, sizes.truncated)
    return sizes


def collate(
    rows: Sequence[Mapping[str, Any]],
    length: int,
    *,
    max_images: int,
    max_poses: int,
    pad_id: int,
    image_size: int | None = None,
) -> Batch:
    """Pads rows of ``encode_example`` or ``pack`` on the right to one shape.

    Returns:
        ``input_ids`` (B, T) int32; ``attention_mask`` (B, T) bool; ``labels`` (B, T) int32, not shifted, -100 where there is no loss.
        ``pixel_values`` (B, I, S, S, 3) float32, zeros where a row has fewer than I images; absent where no row has one, unless
        ``image_size`` S is given.
        ``pose_index`` (B, P) int32: p - 1 for a pose token at p, where the hidden state predicts it; ``pose_mask`` (B, P) bool: where there
        is a pose; ``poses``: a ``Pose`` of batch shape (B, P) with all fields. Unused poses have index 0, identities and zeros, and no joint
        is measured.
        ``segment_ids`` (B, T) int32, of packed rows: 1, 2, … for the conversations of a row, 0 for padding.
    """
    for row in rows:
        for name, size, limit in (
            ("tokens", len(row["input_ids"]), length),
            ("images", len(row["images"]), max_images),
            ("poses", len(row["pose_positions"]), max_poses),
        ):
            if size > limit:
                raise UserError(f"a row has {size} {name}, more than the {limit} that the batch has room for")
    count = len(rows)
    poses = complete(unmeasured((count, max_poses), rows[0]["poses"].family), BETAS)
    batch: Batch = {
        "input_ids": np.full((count, length), pad_id, np.int32),
        "attention_mask": np.zeros((count, length), bool),
        "labels": np.full((count, length), IGNORE, np.int32),
        "pose_index": np.zeros((count, max_poses), np.int32),
        "poses": poses,
        "pose_mask": np.zeros((count, max_poses), bool),
    }
    shape = next((image.shape for row in rows for image in row["images"]), None)
    if shape is None and image_size is not None and max_images:
        shape = (image_size, image_size, 3)
    if shape is not None:
        batch["pixel_values"] = np.zeros((count, max_images, *shape), np.float32)
    if any("segment_ids" in row for row in rows):
        batch["segment_ids"] = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        tokens, found = len(row["input_ids"]), len(row["pose_positions"])
        batch["input_ids"][i, :tokens] = row["input_ids"]
        batch["attention_mask"][i, :tokens] = True
        batch["labels"][i, :tokens] = row["labels"]
        batch["pose_index"][i, :found] = row["pose_positions"] - 1
        batch["pose_mask"][i, :found] = True
        for array, values in zip(jax.tree.leaves(poses), jax.tree.leaves(row["poses"]), strict=True):
            array[i, :found] = values
        for j, image in enumerate(row["images"]):
            batch["pixel_values"][i, j] = image
        if "segment_ids" in batch:
            batch["segment_ids"][i, :tokens] = row["segment_ids"]
    return batch


def pack(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins rows of ``encode_example`` into one, with ``segment_ids`` (T,) int32 from 1 on.

    The first token of each has no label, since the token before it belongs to another conversation.
    """
    starts = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    labels = np.concatenate([row["labels"] for row in rows])
    labels[starts[:-1]] = IGNORE
    return {
        "input_ids": np.concatenate([row["input_ids"] for row in rows]),
        "labels": labels,
        "images": [image for row in rows for image in row["images"]],
        "pose_positions": np.concatenate([row["pose_positions"] + start for row, start in zip(rows, starts)]),
        "poses": concatenate([row["poses"] for row in rows]),
        "segment_ids": np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), np.diff(starts)),
    }


def weightless(row: dict[str, Any]) -> dict[str, Any]:
    """The row without labels and poses, which fills a batch and does not count."""
    return {
        **row,
        "labels": np.full_like(row["labels"], IGNORE),
        "pose_positions": row["pose_positions"][:0],
        "poses": row["poses"][:0],
    }


@contextlib.contextmanager
def _named(example: Example) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError) as error:  # a LazyImage may raise an OSError, after which a run can be resumed
        raise named.raised(example.place, error) from error


def _poses(example: Example, found: int, truncated: bool) -> Pose:
    """The poses of an example whose tokens hold ``found`` of them, as NumPy arrays in float32; the example is checked."""
    _check(example, found, truncated)
    return jax.tree.map(lambda x: np.asarray(x, bool if x.dtype == bool else np.float32), example.poses)


def _check(example: Example, found: int, truncated: bool) -> None:
    example.check()
    poses = len(example.poses)
    if found > poses or (found < poses and not truncated):
        raise UserError(f"its answers hold {found} <POSE>, but it has {poses} poses; there must be one for each")
