"""Writes the files of RPE-Refined, with images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from .threedpw_files import jpeg

WORDS = {"behaviour": "behavior", "outfit": "outfits", "pose": "pose", "shape": "shape"}
IMAGES = ("3DPW/imageFiles/walk_00/image_00326.jpg", "3DPW/imageFiles/bus_01/image_00012.jpg")


def truth(seed: int) -> dict[str, Any]:
    """As RPE-Refined has it: numbers in nested lists."""
    rng = np.random.default_rng(seed)
    pose = rng.normal(0, 0.3, 72)
    pose[:3] = (Rotation.from_rotvec([np.pi, 0, 0]) * Rotation.from_euler("y", seed)).as_rotvec()  # upright
    return {
        "id": 36452 + seed,
        "image_id": 29095,
        "person_id": seed % 2,
        "joint_cam": rng.normal(size=(24, 3)).tolist(),
        "joint_img": rng.uniform(0, 60, (24, 2)).tolist(),
        "fitted_joint_cam": rng.normal(size=(24, 3)).tolist(),
        "openpose_result": rng.uniform(0, 60, (18, 3)).tolist(),
        "smpl_param": {
            "shape": rng.normal(size=10).tolist(),
            "pose": pose.tolist(),
            "trans": [0.1, 0.2, 5.0],
            "gender": "male",
        },
        "bbox": [10.5, 5, 20, 40],
    }


def refined(number: int, kind: str, **changes: Any) -> dict[str, Any]:
    """Record number 2 is of the image of number 0, and of the same person, as in the release."""
    question = f"<image>\nThe man with {kind} {number}, can you give the SMPL pose of this person?"
    return {
        "id": f"{number:06d}",
        "image": f"{number:06d}.png",
        "real_image": IMAGES[number % 2],
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Sure, it is <POSE>."}],
        "ground_truth": truth(number % 2),
        **changes,
    }


def write_refined(source: Path, **changed: list[Any]) -> dict[str, list[Any]]:
    folder = source / "RPE-refined"
    folder.mkdir(parents=True, exist_ok=True)
    entries = {kind: changed.get(kind) or [refined(n, kind) for n in range(3)] for kind in WORDS}
    for kind, rows in entries.items():
        (folder / f"refine_vqa_{WORDS[kind]}_withGT.json").write_text(json.dumps(rows, indent=4))
    for number, name in enumerate(IMAGES):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(jpeg(number))
    return entries
