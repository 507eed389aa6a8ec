"""Rows of a batch reach the devices that they belong to, whichever process made them."""

import jax
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.models.sharding import batch_sharding, make_mesh
from chatpose_jax.train import feed
from smpl_jax.pose import Pose

BATCH = {
    "input_ids": np.arange(48).reshape(24, 2),
    "pose_mask": np.arange(24) % 3 == 0,
    "poses": Pose(
        np.arange(24 * 2 * 22 * 9.0).reshape(24, 2, 22, 3, 3), "camera", betas=np.arange(48.0).reshape(24, 2, 1)
    ),
}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 4, 1, 2), (2, 1, 1, 4)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_global_batch_is_the_batch(sizes, accumulate):
    mesh = make_mesh(*sizes)
    placed = feed.put(BATCH, mesh, 24 // accumulate, accumulate)
    assert jax.tree.structure(placed) == jax.tree.structure(BATCH)
    for found, x in zip(jax.tree.leaves(placed), jax.tree.leaves(BATCH)):
        whole = x if accumulate == 1 else x.reshape(accumulate, 24 // accumulate, *x.shape[1:])
        np.testing.assert_array_equal(found, whole)
        assert found.sharding == batch_sharding(mesh, stacked=accumulate > 1)
    np.testing.assert_array_equal(feed.local_rows(mesh, 24 // accumulate, accumulate), np.arange(24))


def test_without_a_mesh_arrays_stay_as_they_are():
    assert feed.local_rows(None, 24) is None
    assert feed.put(BATCH, None, 24)["input_ids"] is BATCH["input_ids"]
    assert feed.put(BATCH, None, 8, 3)["pose_mask"].shape == (3, 8)


def test_rows_that_cannot_be_split_are_one_clear_error():
    with pytest.raises(UserError, match=r"train\.batch_size=12 must be a multiple of slices × data × fsdp = 8"):
        feed.local_rows(make_mesh(4, 2, 1), 12)
