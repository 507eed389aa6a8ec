"""Writes files of 3DPW as the release has them: pickles of Python 2 (protocol 2, text as latin1), lists for each person, JPEGs."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

SIZE = (96, 64)
CAM_INT = np.array([[80.0, 0, 48], [0, 80, 32], [0, 0, 1]])


class _Python2(pickle._Pickler):  # type: ignore[name-defined]  # the pickler in Python, which can be changed
    """Writes text and bytes as Python 2 writes its strings."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def _string(self, value: Any) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = _string


def python2(value: Any) -> bytes:
    """The bytes that Python 2 with NumPy 1 would write for a value of plain Python and NumPy arrays."""
    file = io.BytesIO()
    _Python2(file, 2).dump(value)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def jpeg(seed: int = 0, size: tuple[int, int] = SIZE) -> bytes:
    """A smooth image, so that JPEG changes little: red is 2x, green 3y, blue differs by the seed."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([2 * x, 3 * y, np.full_like(x, 20 * seed % 256)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=98, subsampling=0)
    return file.getvalue()


def sequence(frames: int = 4, people: int = 2, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A sequence in a world of which the camera sees all joints. Keypoints are the first 18 joints, seen exactly."""
    rng = np.random.default_rng(seed)
    cameras = np.tile(np.eye(4), (frames, 1, 1))
    cameras[:, :3, :3] = Rotation.random(frames, random_state=seed).as_matrix()
    cameras[:, :3, 3] = rng.normal(size=(frames, 3))
    seen = rng.uniform([-0.5, -0.5, 2.5], [0.5, 0.5, 3.5], (people, frames, 24, 3))
    world = np.einsum("tji,ptkj->ptki", cameras[:, :3, :3], seen - cameras[:, None, :3, 3])
    pixels = seen[..., :18, :] @ CAM_INT.T
    points = np.concatenate([pixels[..., :2] / pixels[..., 2:], np.full((people, frames, 18, 1), 0.9)], -1)
    return {
        "sequence": f"street_{seed:02d}",
        "poses": list(rng.normal(0, 0.5, (people, frames, 72))),
        "trans": list(rng.normal(size=(people, frames, 3))),
        "betas": [np.concatenate([rng.normal(size=10), np.zeros(290 * (n % 2))]) for n in range(people)],
        "poses_60Hz": list(rng.normal(size=(people, 2 * frames, 72))),
        "trans_60Hz": list(rng.normal(size=(people, 2 * frames, 3))),
        "betas_clothed": list(rng.normal(size=(people, 10))),
        "v_template_clothed": list(rng.normal(size=(people, 50, 3))),
        "genders": ["m", "f"][:people],
        "texture_maps": [],
        "poses2d": list(points.swapaxes(2, 3)),
        "jointPositions": list(world.reshape(people, frames, 72)),
        "campose_valid": list(np.ones((people, frames), np.uint8)),
        "img_frame_ids": 2 * np.arange(frames),
        "cam_poses": cameras,
        "cam_intrinsics": CAM_INT,
        **changes,
    }


def write(folder: Path, data: dict[str, Any], split: str = "test", images: bool = True) -> dict[str, Any]:
    """One sequence, with its images."""
    path = folder / "sequenceFiles" / split / f"{data['sequence']}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2(data))
    (folder / "imageFiles").mkdir(exist_ok=True)
    for frame in range(len(data["img_frame_ids"]) if images else 0):
        image = folder / "imageFiles" / data["sequence"] / f"image_{frame:05d}.jpg"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(jpeg(frame))
    return data
