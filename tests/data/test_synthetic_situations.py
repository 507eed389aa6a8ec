"""Situations that fit a pose."""

import numpy as np

from chatpose_jax.data.synthetic.families import sample_poses
from chatpose_jax.data.synthetic.situations import SITUATIONS, situations_of
from chatpose_jax.data.synthetic.skeleton import mirror, remove_yaw, rotation


def test_a_body_of_a_situation_is_recognised_and_others_are_not():
    rows = [
        row
        for row in SITUATIONS
        if row.words in ("waits impatiently for a late bus", "proposes marriage", "sunbathes at the beach")
    ]
    for row in rows:
        poses = remove_yaw(sample_poses(12, 5, row.posture, row.arms).rotations)
        found = [situations_of(pose) for pose in (*poses, *remove_yaw(mirror(poses)))]
        assert sum(row in names for names in found) >= 12, row.words
        assert all(each.posture == row.posture for names in found for each in names if row in names)
    upside_down = np.array(poses[0])
    upside_down[0] = rotation("z", np.array(120.0)) @ upside_down[0]
    assert situations_of(upside_down) == []
    assert situations_of(np.tile(np.eye(3), (24, 1, 1)))[0].words == "plays a scarecrow"
