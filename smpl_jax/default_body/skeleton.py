"""The default body's skeleton: SMPL's 24 joints and tree, with published proportions of body segments.

Heights and lengths follow the segment fractions of stature in Drillis & Contini (1966) as tabulated by Winter,
"Biomechanics and Motor Control of Human Movement", for a stature of 1.72 m; joints are centres of rotation, not
landmarks on the skin. Here the floor is at y = 0; `generate` moves the origin to `ORIGIN`, which is not the pelvis, as in
published body files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# fmt: off
JOINT_NAMES = (
    "pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle",
    "spine3", "left_foot", "right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder",
    "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand",
)
# fmt: on
PARENTS = np.array([-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21])
ORIGIN = np.array([0.0, 1.170, -0.025])

_PLACES = {
    "pelvis": (0.0, 0.945, 0.008),
    "left_hip": (0.086, 0.900, 0.006),
    "spine1": (0.0, 1.045, -0.012),
    "left_knee": (0.101, 0.492, 0.008),
    "spine2": (0.0, 1.165, -0.016),
    "left_ankle": (0.096, 0.078, -0.022),
    "spine3": (0.0, 1.235, -0.006),
    "left_foot": (0.112, 0.026, 0.108),
    "neck": (0.0, 1.445, -0.022),
    "left_collar": (0.072, 1.372, -0.012),
    "head": (0.0, 1.540, 0.006),
    "left_shoulder": (0.176, 1.398, -0.016),
    "left_elbow": (0.440, 1.398, -0.022),
    "left_wrist": (0.690, 1.398, -0.014),
    "left_hand": (0.774, 1.396, -0.010),
}


def swap_sides(name: str) -> str:
    """The name of the joint on the other side, such as `left_knee` for `right_knee`. Other names are returned unchanged."""
    if name.startswith("left_"):
        return "right_" + name[5:]
    return "left_" + name[6:] if name.startswith("right_") else name


def joint_positions() -> NDArray[np.float64]:
    """(24, 3) metres, floor at y = 0, exactly mirrored."""
    mirror = np.array([-1.0, 1.0, 1.0])
    return np.array(
        [_PLACES[n] if n in _PLACES else np.array(_PLACES[swap_sides(n)]) * mirror for n in JOINT_NAMES], np.float64
    )


MIRROR_JOINTS = np.array([JOINT_NAMES.index(swap_sides(n)) for n in JOINT_NAMES])
"""(24,) the joint on the other side."""
