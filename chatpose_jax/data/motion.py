"""Rows of motion capture: frames of BVH and ASF/AMC clips, described in words; one asks for the pose."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import Example
from chatpose_jax.data.synthetic import captions, skeleton
from chatpose_jax.data.synthetic.dataset import to_camera
from chatpose_jax.data.synthetic.posecodes import encode
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax import mocap
from smpl_jax.errors import PoseFileError
from smpl_jax.pose import Pose


def motion(
    split: Split,
    *,
    seed: int,
    folder: str,
    rate: float = 10.0,
    folds: int = 5,
    fold: int = 0,
    detail: captions.Detail = "detailed",
) -> MotionDataset:
    """The source "motion" of ``data.sources``: the clips below a folder.

    folder: all ``.bvh`` and ``.amc`` files below it are read, an ``.amc`` with the ``.asf`` beside it.
    rate: frames a second that are taken; neighbours in time are nearly the same pose.
    folds, fold: clips are shuffled by ``seed`` and dealt into ``folds`` parts. Part ``fold`` is the test split, the next one "val", the others
        "train": no clip is in two splits, and ``folds`` runs test each clip once.
    detail: of the captions.

    Raises UserError where the folder holds too few clips, or one that cannot be read; it names the file.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"unknown split {split!r}: choose one of train, val, test")
    whole("folds", folds, 3)
    whole("fold", fold, 0)
    if fold >= folds or not rate > 0:
        raise UserError(f"expected fold < folds and a positive rate; found {fold}, {folds}, {rate}")
    files = motion_files(folder)
    if len(files) < folds:
        raise UserError(
            f"folder={folder!r} holds {len(files)} files of {' or '.join(mocap.SUFFIXES)}; "
            f"{folds} folds need at least as many (options folder, folds)"
        )
    order = np.random.default_rng(seed).permutation(len(files))
    part = (np.arange(len(files)) - fold) % folds  # 0 is tested, 1 is "val"
    wanted = {"train": part > 1, "val": part == 1, "test": part == 0}[split]
    return MotionDataset([files[i] for i in sorted(order[wanted])], rate=rate, seed=seed, detail=detail)


def motion_files(folder: str | Path) -> list[Path]:
    """All files of motion below a folder, by name; none where there is no folder."""
    root = Path(folder).expanduser()
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in mocap.SUFFIXES)


class MotionDataset(Sequence[Example]):
    """Frames of clips as conversations: a caption, told from the pose by ``synthetic.posecodes``, and the pose as the answer.

    Frames that the clip itself shows to be wrong are left out (``Clip.trusted``). Bodies are turned to face the camera, as
    the generated set's are where it describes them. Joints that SMPL has and the capture has not (its rigid hands) are not ``measured``.

    clips: file and first row of each; row i is the same for the same files and seed.
    """

    def __init__(
        self, files: Sequence[Path], *, rate: float = 10.0, seed: int = 0, detail: captions.Detail = "detailed"
    ):
        self.seed, self.detail = seed, detail
        self.clips: list[tuple[Path, int]] = []
        self._frames: list[tuple[Path, int]] = []
        rotations, measured = [], []
        for file in files:
            try:
                clip = mocap.read_clip(file)
                pose = mocap.retarget(clip)
            except PoseFileError as error:
                raise UserError(f"{error}") from None
            taken = np.arange(0, len(clip), max(1, round(clip.rate / rate)))
            taken = taken[clip.trusted[taken]]
            self.clips.append((file, len(self._frames)))
            self._frames += [(file, int(frame)) for frame in taken]
            rotations.append(skeleton.remove_yaw(np.asarray(pose.rotations, float)[taken]))
            measured.append(pose.measured[taken])
        self.rotations = np.concatenate(rotations)
        """(N, 24, 3, 3), y up, facing +z."""
        self.measured = np.concatenate(measured)
        self._codes = encode(self.rotations, np.random.default_rng([seed, 0]))

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        """Row ``index``, or the rows of a slice; IndexError beyond the size."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        rng = np.random.default_rng([self.seed, 1, index])
        words = captions.caption(self._codes, index, rng, self.detail)
        question = questions.TEXT_TO_POSE[int(rng.integers(len(questions.TEXT_TO_POSE)))].format(caption=words)
        answer = questions.POSE_ANSWERS[int(rng.integers(len(questions.POSE_ANSWERS)))]
        file, frame = self._frames[index]
        return Example(
            f"{file.stem}-{frame}",
            "text",
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            Pose(to_camera(self.rotations[index][None]), "camera", measured=self.measured[index][None]),
        )
