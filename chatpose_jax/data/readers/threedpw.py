"""3DPW: people outdoors, filmed by a hand-held camera and measured by sensors on their bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.humans4d import ask_for_pose
from chatpose_jax.data.readers.untrusted import MAX_MEMBER, inside, load_pickle, read_bytes
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line, whole
from smpl_jax.pose import Pose

PAGE = "https://virtualhumans.mpi-inf.mpg.de/3DPW"
LICENCE = "3DPW: its own, for non-commercial research"
MARGIN = 1.2
"""Sides of a box around keypoints grow by this factor, as ProHMR's and 4D-Humans' boxes of 3DPW do."""
_FOLDERS: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}
_UNMEASURED = (10, 11, 22, 23)
_GENDERS = {"m": "male", "f": "female", "n": "neutral"}


def measured(count: int) -> np.ndarray:
    """(count, 24) bool, the joints of SMPL that 3DPW measures: all but the toes (10, 11) and the rigid hands (22, 23).

    People wore 17 sensors where one was filmed, and 9 or 10 each where two were (von Marcard et al. 2018, section 5.3). None is beyond the ball of
    the foot or on the fingers, and the 18 keypoints of the images end at ankles and wrists. So the fits fill these joints from a prior. Positions of
    all 24 joints still count, because they depend on the joints before them only.
    """
    flags = np.ones((count, 24), bool)
    flags[:, _UNMEASURED] = False
    return flags


def gender_of(value: Any) -> str:
    """ "male", "female" or "neutral", from the word or its first letter, as text or bytes. Raises UserError for anything else."""
    text = value.decode("latin1") if isinstance(value, bytes) else str(value)
    gender = _GENDERS.get(text.lower()[:1])
    if gender is None or text.lower() not in (gender, gender[0]):
        raise UserError(f"expected a gender, m or f or the word, found {text!r:.60}")
    return gender


@dataclasses.dataclass(frozen=True)
class Actor:
    """What a sequence of T frames says of a person, in the world frame.

    poses: (T, 72) axis-angle. trans: (T, 3) metres. joints: (T, 24, 3) metres. detected: (T, 18, 3) pixels and confidence. valid: (T,) bool,
    whether the camera was aligned to the image by this person. betas: (10,).
    """

    poses: np.ndarray
    trans: np.ndarray
    joints: np.ndarray
    detected: np.ndarray
    valid: np.ndarray
    betas: np.ndarray
    gender: str

    __repr__ = one_line


@dataclasses.dataclass(frozen=True)
class Sequence3DPW:
    """A file of ``sequenceFiles``. cam_poses: (T, 4, 4) from the world to the camera. cam_int: (3, 3). frame_ids: (T,), frames of the 60 Hz data."""

    actors: tuple[Actor, ...]
    cam_poses: np.ndarray
    cam_int: np.ndarray
    frame_ids: np.ndarray

    __repr__ = one_line

    @classmethod
    def load(cls, path: Path) -> Sequence3DPW:
        """Raises UserError, which names the file, for one that is not in the published form. Nothing in it is run."""
        data = load_pickle(read_bytes(path, MAX_MEMBER), path)
        if not isinstance(data, Mapping) or not isinstance(data.get("genders"), list | tuple):
            raise UserError(f"{path}: expected a dictionary of 3DPW with lists for each person")
        count = len(np.atleast_1d(data.get("img_frame_ids", ())))

        def array(name: str, *shape: int, person: int | None = None) -> np.ndarray:
            """One array of the file, or of one person in it, as float64."""
            try:
                value = data[name] if person is None else data[name][person]
                found = np.asarray(value, np.float64)
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(f"{path}: has no numbers {name} for each person and frame") from None
            if found.shape != shape:
                raise UserError(f"{path}: {name} must have the shape {shape}, found {found.shape}")
            return found

        def actor(person: int) -> Actor:
            try:
                betas = np.asarray(data["betas"][person], np.float64).ravel()[:10]
            except (KeyError, IndexError, TypeError, ValueError):
                betas = np.empty(0)
            if betas.shape != (10,):
                raise UserError(f"{path}: betas must be at least 10 numbers for each person")
            return Actor(
                poses=array("poses", count, 72, person=person),
                trans=array("trans", count, 3, person=person),
                joints=array("jointPositions", count, 72, person=person).reshape(count, 24, 3),
                detected=array("poses2d", count, 3, 18, person=person).swapaxes(1, 2),
                valid=array("campose_valid", count, person=person) != 0,
                betas=betas,
                gender=genders[person],
            )

        try:
            genders = [gender_of(gender) for gender in data["genders"]]
        except UserError as error:
            raise UserError(f"{path}: genders: {error}") from None
        return cls(
            actors=tuple(map(actor, range(len(genders)))),
            cam_poses=array("cam_poses", count, 4, 4),
            cam_int=array("cam_intrinsics", 3, 3),
            frame_ids=array("img_frame_ids", count).astype(np.int64),
        )


class ThreeDPW:
    """Reads the sequences of 3DPW in its own three splits. A part is a sequence, a record is a person in a frame whose ``campose_valid`` is set.

    The pose is in the camera frame: the root is R_cam · R_root. ``group`` is the sequence. The key is ``SEQUENCE/image_00000.jpg#PERSON``.

    ``measured`` leaves out toes and hands (the function of this name says why). SMPL turns the root about the pelvis of the body, and that body
    is of the person's gender and needs SMPL's licensed file. So the translation in the camera frame is not given; with the rest pelvis p
    (``smpl_jax.pelvis(body, betas)``), and R and t of ``cam_ext``, it is R (trans_world + p) + t - p. Betas, which mean another shape for the
    bodies of other data, are not part of the pose.

    ``extras``:

    ============  ====================================================================================================
    joint_cam     (24, 3) ``jointPositions`` in metres, camera frame. They are not exactly those of the SMPL body with these betas: for the
                  two men whom RPE shows, the pelvis is 5 and 32 mm away from it
    poses2d       (18, 3) keypoints detected in the image, COCO-18: pixels of the record's image, and confidence
    detected      whether ``poses2d`` is not all zero. The official evaluation (protocol D) counts only such frames
    cam_int       (3, 3) intrinsics in pixels of the record's image
    cam_ext       (4, 4) from the world to the camera, metres
    trans_world   (3,) SMPL's translation in metres in the world; pose_world: (3,) axis-angle of the root in the world
    betas         (10,) of the SMPL body of ``gender``
    gender        "male" or "female"
    actor, frame  number of the person, and of the image, from 0
    img_frame_id  frame of the 60 Hz data
    box           (3,) x, y of the middle and side of the box in pixels of the original image; image_size: (2,) its width and height
    ============  ====================================================================================================

    The box is that of 4D-Humans and ProHMR: around ``poses2d``, or the projected joints where nothing was detected, with ``MARGIN``.

    Options: stride: take one of so many frames. crop: the image is the square box, resized to size × size pixels; if false, it is the whole image
    as it is stored, in which two people may be seen. variants: conversations of each record in "train". seed: of their wording.

    Source: the data set's readme, its evaluation code (aymenmir1/3dpw-eval), nkolot/ProHMR ``dataset_preprocessing/preprocess_3dpw.py``.
    """

    about: ClassVar[About] = About(
        title="3DPW",
        licence=LICENCE,
        page=PAGE,
        files=(
            "sequenceFiles/{train,validation,test}/SEQUENCE.pkl",
            "imageFiles/SEQUENCE/image_00000.jpg …",
        ),
    )

    def __init__(
        self, source: Path, *, stride: int = 1, crop: bool = True, size: int = 256, variants: int = 1, seed: int = 0
    ) -> None:
        self.source, self.stride, self.crop = source, whole("stride", stride, 1), crop
        self.size, self.variants, self.seed = whole("size", size, 16, 4096), whole("variants", variants, 1), seed
        paths = [source / "sequenceFiles", source / "imageFiles"]
        if absent := [path for path in paths if not path.is_dir()]:
            raise missing(self.about, *absent)

    def parts(self, split: Split) -> Sequence[str]:
        folder = self.source / "sequenceFiles" / _FOLDERS[split]
        return sorted(path.stem for path in folder.glob("*.pkl") if not path.name.startswith("."))

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        sequence = Sequence3DPW.load(self.source / "sequenceFiles" / _FOLDERS[split] / f"{part}.pkl")
        for frame in range(0, len(sequence.frame_ids), self.stride):
            name = f"{part}/image_{frame:05d}.jpg"
            image: tuple[bytes, np.ndarray] | UserError | None = None
            for number, actor in enumerate(sequence.actors):
                key = f"{name}#{number}"
                if not actor.valid[frame]:
                    yield Skipped(key, "the camera was not aligned by this person")
                    continue
                if image is None:
                    image = self._image(name)
                if isinstance(image, UserError):
                    yield Skipped(key, "damaged or missing image", broken=True, detail=str(image))
                else:
                    yield self._record(key, split, sequence, frame, number, *image)

    def _image(self, name: str) -> tuple[bytes, np.ndarray] | UserError:
        try:
            data = read_bytes(inside(self.source / "imageFiles", name), MAX_MEMBER)
            return data, crop.stored_pixels(data, name)
        except UserError as error:
            return error

    def _record(
        self, key: str, split: Split, sequence: Sequence3DPW, frame: int, number: int, data: bytes, pixels: np.ndarray
    ) -> Record | Skipped:
        actor, camera, cam_int = sequence.actors[number], sequence.cam_poses[frame], sequence.cam_int
        values = (
            camera,
            cam_int,
            *(array[frame] for array in (actor.poses, actor.trans, actor.joints, actor.detected)),
        )
        if not all(np.isfinite(value).all() for value in values):
            return Skipped(key, "damaged pose or camera", broken=True, detail="numbers are not finite")
        joints = actor.joints[frame] @ camera[:3, :3].T + camera[:3, 3]
        detected = actor.detected[frame]
        seen = detected[detected[:, 2] > 0, :2]
        box = around(seen if len(seen) else _projected(joints, cam_int))
        height, width = pixels.shape[:2]
        if box is None or not crop.meets(box[:2], box[2], (width, height)):
            return Skipped(key, "outside the image")
        if self.crop:
            matrix = crop.Change().matrix(box[:2], box[2], self.size, width)
            data = crop.to_jpeg(crop.warp(pixels, matrix, self.size))
        else:
            matrix = np.eye(2, 3)
        rotations = crop.to_matrices(actor.poses[frame].reshape(1, 24, 3))
        rotations[:, 0] = camera[:3, :3] @ rotations[:, 0].astype(np.float64)
        rng = seeded(self.seed, key, "words")
        return Record(
            key=key,
            kind="image",
            conversations=tuple(ask_for_pose(rng) for _ in range(self.variants if split == "train" else 1)),
            images=(data,),
            poses=Pose(rotations, "camera", measured=measured(1)),
            group=key.partition("/")[0],
            extras={
                "joint_cam": joints.astype(np.float32),
                "poses2d": crop.moved(detected, matrix),
                "detected": bool(detected.any()),
                "cam_int": (np.vstack([matrix, [0, 0, 1]]) @ cam_int).astype(np.float32),
                "cam_ext": camera.copy(),
                "trans_world": actor.trans[frame].copy(),
                "pose_world": actor.poses[frame, :3].copy(),
                "betas": actor.betas.astype(np.float32),
                "gender": actor.gender,
                "actor": number,
                "frame": frame,
                "img_frame_id": int(sequence.frame_ids[frame]),
                "box": box.astype(np.float32),
                "image_size": np.array([width, height], np.int32),
            },
        )


def around(points: np.ndarray) -> np.ndarray | None:
    """(3,) x, y of the middle and side of the square box around points (n, 2), with ``MARGIN``; None for no points, or a box below a pixel."""
    if not len(points):
        return None
    low, high = points.min(0), points.max(0)
    side = MARGIN * (high - low).max()
    return np.array([*(low + high) / 2, side]) if 1 <= side <= 1e6 else None


def _projected(joints: np.ndarray, cam_int: np.ndarray) -> np.ndarray:
    """(n, 2) pixels of joints (24, 3) in the camera frame; none if one is behind the camera or nearly so."""
    if joints[:, 2].min() < 0.1:
        return np.empty((0, 2))
    points = joints @ cam_int.T
    return points[:, :2] / points[:, 2:]
