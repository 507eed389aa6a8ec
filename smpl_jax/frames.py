"""Coordinate frames of poses and meshes.

Body files define the rest pose in the model frame: with an identity root rotation, a body is upright in it. Other programs
use other frames for the root. All frames are right-handed and in metres.
"""

import re
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Frame = Literal["model", "camera", "z-up"]

_WORDS: dict[str, Frame] = {"camera": "camera", "model": "model", "y-up": "model", "z-up": "z-up"}
_DESCRIBED: dict[str, str] = {
    "camera": "camera (x right, y down, z away; metres)",
    "model": "model (y up, a resting body faces +z; metres)",
    "z-up": "z-up (a resting body that stands up faces -y; metres)",
}
_TO_MODEL: dict[str, NDArray[np.float64]] = {
    "model": np.eye(3),  # y up, a resting body faces +z: SMPL's files, smplx, PoseScript, OBJ and glTF
    "camera": np.diag([1.0, -1.0, -1.0]),  # x right, y down, z away: ChatPose, 4D-Humans
    "z-up": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),  # AMASS
}


def parse_frame(words: str) -> Frame:
    """The frame named by the first word of a text: "camera", "model" or "y-up", or "z-up". Raises ValueError for another word."""
    first = re.match(r"[\w-]*", words.lower())
    frame = _WORDS.get(first[0]) if first else None
    if frame is None:
        raise ValueError(f"frame must start with one of {', '.join(_WORDS)}; found {words!r:.100}")
    return frame


def describe_frame(frame: Frame) -> str:
    """The name and the axes of a frame, as text for a file; ``parse_frame`` reads it back."""
    return _DESCRIBED[frame]


def turn(source: str, target: str = "model") -> NDArray[np.float64]:
    """(3, 3) rotation from `source` to `target`, for column vectors; each is one of `Frame`. ValueError for another name."""
    for name in (source, target):
        if not isinstance(name, str) or name not in _TO_MODEL:
            raise ValueError(f"frame must be one of {', '.join(map(repr, _TO_MODEL))}; found {name!r}")
    return _TO_MODEL[target].T @ _TO_MODEL[source]
