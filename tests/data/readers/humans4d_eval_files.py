"""Writes evaluation files of 4D-Humans, with images."""

from pathlib import Path
from typing import Any

import numpy as np

from .threedpw_files import jpeg

H36M_NAMES = (
    "S9_Directions_1.60457274_000001.jpg",
    "S9_Directions_1.60457274_000006.jpg",
    "S11_Walking.60457274_000001.jpg",
)


def write_images(folder: Path, names: Any) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())


def write_3dpw(
    source: Path, count: int = 6, folder: str = "hmr2_evaluation_data", **changes: Any
) -> dict[str, np.ndarray]:
    """As ProHMR's program writes it: sequences one after the other, in each all frames of one person, then of the next."""
    rng = np.random.default_rng(0)
    names = [f"imageFiles/{seq}/image_{n % 3:05d}.jpg" for seq in ("walk_00", "bus_01") for n in range(count)]
    n = len(names)
    pose = rng.normal(0, 0.4, (n, 72))
    arrays: dict[str, Any] = {
        "imgname": np.array(names),
        "center": rng.uniform(30, 50, (n, 2)),
        "scale": rng.uniform(20, 40, n),
        "body_pose": pose,
        "has_body_pose": np.ones(n),
        "betas": rng.normal(size=(n, 10)),
        "has_betas": np.ones(n),
        "body_keypoints_2d": np.concatenate([rng.uniform(0, 60, (n, 25, 2)), np.ones((n, 25, 1))], -1),
        "extra_keypoints_3d": np.concatenate([rng.normal(size=(n, 19, 3)), np.ones((n, 19, 1))], -1).astype(np.float32),
        "gender": np.array(["m", "f"] * (n // 2)),
        **changes,
    }
    (source / folder).mkdir(parents=True, exist_ok=True)
    np.savez(source / folder / "3dpw_test.npz", **{name: value for name, value in arrays.items() if value is not None})
    write_images(source / "3DPW", names)
    return arrays


def write_h36m(source: Path, images: str = "h36m/images", **changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {
        "imgname": np.array([name.encode() for name in H36M_NAMES]),
        "center": rng.uniform(30, 50, (3, 2)),
        "scale": rng.uniform(20, 40, (3, 2)),
        "bbox": np.zeros((3, 4)),
        "body_keypoints_2d": np.zeros((3, 25, 3)),
        "extra_keypoints_2d": np.concatenate([rng.uniform(0, 60, (3, 19, 2)), np.ones((3, 19, 1))], -1),
        "extra_keypoints_3d": np.concatenate([rng.normal(size=(3, 19, 3)), np.ones((3, 19, 1))], -1),
        **changes,
    }
    np.savez(source / "h36m_val_p2.npz", **arrays)
    write_images(source / images, [name.decode() for name in arrays["imgname"].tolist() if isinstance(name, bytes)])
    return arrays
