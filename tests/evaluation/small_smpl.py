"""Small bodies and regressors in the format of the licensed files, and SMPL's formula for them, written apart from the package's code."""

import pickle

import numpy as np
from scipy.spatial.transform import Rotation

from ..smpl.models import SMPL_PARENTS, random_arrays

SEEDS = {"neutral": 1, "male": 2, "female": 3}


def weights(rng, rows, columns=200):
    found = np.zeros((rows, columns))
    for row in found:
        row[rng.integers(0, columns, 5)] = rng.uniform(0.1, 1, 5)
    return found / found.sum(1, keepdims=True)


def write(path):
    """Fills what the option smpl names, with both kinds of body file. The regressors have left and right as these bodies have."""
    rng = np.random.default_rng(7)
    for gender, seed in SEEDS.items():
        arrays = random_arrays(seed=seed)
        if gender == "male":
            np.savez(path / "SMPL_MALE.npz", **arrays)
        else:
            (path / f"SMPL_{gender.upper()}.pkl").write_bytes(pickle.dumps(arrays))
    np.save(path / "J_regressor_h36m.npy", weights(rng, 17))
    (path / "SMPL_to_J19.pkl").write_bytes(pickle.dumps(weights(rng, 19)))
    return path


def matrices(angles):
    return Rotation.from_rotvec(angles.reshape(-1, 3)).as_matrix().reshape(*angles.shape[:-1], 3, 3).astype(np.float32)


def smpl(gender, rotations, betas):
    """Joints, vertices and orientations of SMPL's formula, for one body."""
    model = random_arrays(seed=SEEDS[gender])
    rotations = np.asarray(rotations, np.float64)
    shaped = model["v_template"] + model["shapedirs"] @ np.asarray(betas, np.float64)
    rest = model["J_regressor"] @ shaped
    shaped = shaped + model["posedirs"] @ (rotations[1:] - np.eye(3)).ravel()
    transforms = []
    for joint, parent in enumerate(SMPL_PARENTS):
        local = np.eye(4)
        local[:3, :3] = rotations[joint]
        local[:3, 3] = rest[joint] - (rest[parent] if parent >= 0 else 0)
        transforms.append(local if parent < 0 else transforms[parent] @ local)
    places = np.array([t[:3, 3] for t in transforms])
    turns = np.array([t[:3, :3] for t in transforms])
    moved = np.einsum("jab,vjb->vja", turns, shaped[:, None] - rest) + places
    return places, np.einsum("vj,vja->va", model["weights"], moved), turns
