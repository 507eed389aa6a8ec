"""Writes files of AMASS and PoseScript as the releases have them: names, shapes, dtypes, and the kinds of text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

HAND = np.array([0.1117, 0.0429, -0.4164, 0.1088, -0.0660, -0.7562])  # the start of the mean hand, which fills fingers


def upright(yaw: float) -> np.ndarray:
    """Axis-angle of the root of an upright person in the z-up frame, who faces -y where yaw (radians) is 0."""
    return (Rotation.from_euler("z", yaw) * Rotation.from_rotvec([np.pi / 2, 0, 0])).as_rotvec()


def motion(frames: int, seed: int = 0, roots: Any = None, fingers: bool = False, feet: bool = False) -> np.ndarray:
    """Poses (T, 156) float64 of SMPL-H, with filled-in fingers and feet unless they are asked for."""
    rng = np.random.default_rng(seed)
    poses = rng.normal(0, 0.4, (frames, 52, 3))
    poses[:, 0] = Rotation.random(frames, random_state=seed).as_rotvec() if roots is None else roots
    if not feet:
        poses[:, 10:12] = 0
    if not fingers:
        poses[:, 22:] = np.tile(HAND, 15).reshape(30, 3)
    return poses.reshape(frames, 156)


def write_smplh(path: Path, poses: np.ndarray, gender: Any = "male", rate: Any = 120.0, **more: Any) -> np.ndarray:
    """``*_poses.npz`` of the download 'SMPL+H G'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(poses)
    np.savez_compressed(
        path,
        trans=np.zeros((count, 3)),
        gender=np.array(gender),
        mocap_framerate=np.array(rate),
        betas=np.zeros(16),
        dmpls=np.zeros((count, 8)),
        poses=poses,
        **more,
    )
    return poses


def write_smplx(path: Path, poses: np.ndarray, gender: Any = "neutral", rate: Any = 120.0) -> np.ndarray:
    """``*_stageii.npz`` of the download 'SMPL-X N', of the same body, with still jaw and eyes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(poses)
    root, body, hands = poses[:, :3], poses[:, 3:66], poses[:, 66:]
    face = np.zeros((count, 9))
    np.savez_compressed(
        path,
        gender=np.array(gender),
        surface_model_type=np.array("smplx"),
        mocap_frame_rate=np.array(rate),
        mocap_time_length=np.array(count / 120),
        markers_latent=np.zeros((53, 3)),
        latent_labels=np.array(["ARIEL", "C7"]),
        markers_latent_vids=np.array({"ARIEL": 8994, "C7": 3832}, dtype=object),  # a dictionary, pickled
        trans=np.zeros((count, 3)),
        poses=np.concatenate([root, body, face, hands], 1),
        betas=np.zeros(16),
        num_betas=np.array(16),
        root_orient=root,
        pose_body=body,
        pose_hand=hands,
        pose_jaw=face[:, :3],
        pose_eye=face[:, 3:],
    )
    return poses


def write_json(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))


def write_v1(folder: Path, places: dict[str, Any], human: dict[str, Any], split: dict[str, list[int]]) -> None:
    """PoseScript V1: one string for each caption, six files of automatic captions with every id."""
    automatic = {
        f"automatic_{letter}.json": {key: f"Automatic {letter} of {key}." for key in places} for letter in "ABCDEF"
    }
    ids = {f"{name}_ids.json": split.get(name, []) for name in ("train", "val", "test")}
    write_json(
        folder, {"ids_2_dataset_sequence_and_frame_index.json": places, "human6293.json": human, **automatic, **ids}
    )


def write_v2(folder: Path, places: dict[str, Any], human: dict[str, Any], split: dict[str, list[int]]) -> None:
    """PoseScript V2: lists of strings."""
    automatic = {key: [f"Automatic {n} of {key}" for n in ("N2", "N6", "N7")] for key in places}
    ids = {f"{name}_ids_100k.json": split.get(name, []) for name in ("train", "val", "test")}
    write_json(
        folder,
        {
            "ids_2_dataset_sequence_and_frame_index_100k.json": places,
            "posescript_human_6293.json": human,
            "posescript_auto_100k.json": automatic,
            **ids,
        },
    )


def without_yaw(rotvec: np.ndarray, yaw_of: np.ndarray | None = None) -> np.ndarray:
    """SciPy's account of PoseScript's root in the camera frame, (3, 3): Euler angles about fixed axes x, y, z; z set to 0; Rx(+90°).

    yaw_of: the axis-angle whose yaw is removed; by default its own.
    """
    z = Rotation.from_rotvec(rotvec if yaw_of is None else yaw_of).as_euler("xyz")[2]
    if yaw_of is None:
        x, y, _ = Rotation.from_rotvec(rotvec).as_euler("xyz")
        turned = Rotation.from_euler("xyz", [x, y, 0.0])
    else:
        turned = Rotation.from_euler("z", -z) * Rotation.from_rotvec(rotvec)
    return (Rotation.from_euler("x", 90, degrees=True) * turned).as_matrix()
