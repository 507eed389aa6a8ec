"""The training data of 4D-Humans: people in tars of webdataset, each with a fit of SMPL. One class for each data set in them.

Facts from shubham-goel/4D-Humans: ``hmr2/datasets/image_dataset.py``, ``hmr2/configs/datasets_tar.yaml``, ``data_filtering/low1.yaml``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.plausible import HISTOGRAM, Plausible
from chatpose_jax.data.readers.untrusted import load_pickle, tar_samples
from chatpose_jax.data.record import Conversation, Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line, real, whole
from smpl_jax.pose import SHAPE_SPACES, Pose

PAGE = "https://github.com/shubham-goel/4D-Humans#training"
TARS = "dataset_tars"
KEYPOINTS = 44
_IMAGES = ("jpg", "jpeg", "png")
_ANNOTATION = "data.pyd"
_HANDS = (22, 23)
_TOES = {10: [19, 20], 11: [22, 23]}
"""SMPL's joints that bend the toes, and the keypoints beyond them (big and small toe)."""


def ask_for_pose(rng: np.random.Generator) -> Conversation:
    """A question about the image of a record, and an answer that is one pose."""
    question, answer = (str(rng.choice(choices)) for choices in (questions.IMAGE_TO_POSE, questions.POSE_ANSWERS))
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})


@dataclasses.dataclass(frozen=True)
class Person:
    """One checked entry of an annotation, in pixels of the image and metres in the camera frame.

    axis_angle: (24, 3), zeros without a pose. betas: (10,), or None. keypoints_2d: (44, 3), keypoints_3d: (44, 4) or None, both with a confidence.
    reprojection: the loss of the fit, where the file has it.
    """

    center: np.ndarray
    scale: np.ndarray
    axis_angle: np.ndarray
    betas: np.ndarray | None
    keypoints_2d: np.ndarray
    keypoints_3d: np.ndarray | None
    reprojection: float | None

    __repr__ = one_line

    @classmethod
    def read(cls, entry: Any) -> Person:
        """Raises UserError for an entry that is not in the published form."""
        if not isinstance(entry, Mapping):
            raise UserError(f"expected a dictionary for each person, found {type(entry).__name__}")
        has_pose = _flag(entry, "has_body_pose")
        extra = entry.get("extra_info", {})
        losses = extra.get("fitting_loss", {}) if isinstance(extra, Mapping) else {}
        losses = losses.item() if isinstance(losses, np.ndarray) and losses.size == 1 else losses
        reprojection = losses.get("reprojection_loss") if isinstance(losses, Mapping) else None
        points = _array(entry, "keypoints_3d", (KEYPOINTS, 4)) if "keypoints_3d" in entry else None
        return cls(
            center=_array(entry, "center", (2,)),
            scale=_array(entry, "scale", (1,), (2,)),
            axis_angle=_array(entry, "body_pose", (72,)).reshape(24, 3) if has_pose else np.zeros((24, 3)),
            betas=_array(entry, "betas", (10,)) if _flag(entry, "has_betas") else None,
            keypoints_2d=_array(entry, "keypoints_2d", (KEYPOINTS, 3)),
            keypoints_3d=points if points is not None and (points[:, 3] > 0).any() else None,
            reprojection=None if reprojection is None else _number(reprojection),
        )


def _array(entry: Mapping[Any, Any], name: str, *shapes: tuple[int, ...]) -> np.ndarray:
    if name not in entry:
        raise UserError(f"a person has no {name}; there is {', '.join(map(str, entry)):.200}")
    try:
        array = np.atleast_1d(np.asarray(entry[name], np.float64))
    except (TypeError, ValueError):
        raise UserError(f"{name} must be numbers, found {type(entry[name]).__name__}") from None
    if array.shape not in shapes or not np.isfinite(array).all():
        raise UserError(f"{name} must be finite numbers of shape {' or '.join(map(str, shapes))}, found {array.shape}")
    return array


def _number(value: Any) -> float:
    try:
        return float(np.asarray(value, np.float64).reshape(()))
    except (TypeError, ValueError):
        raise UserError(f"reprojection_loss must be a number, found {type(value).__name__}") from None


def _flag(entry: Mapping[Any, Any], name: str) -> bool:
    return bool(_array(entry, name, (1,))[0] > 0)


class Humans4D:
    """Reads the tars of one data set. A part is a tar, a record is a person, in the frame "camera".

    Options (the defaults are the filters that 4D-Humans trains with, ``low1``; the paper's inputs are its crops without augmentation):

    size: side of the crop in pixels. 256 is 4D-Humans'; CLIP's preprocessing enlarges it later.
    tall: widen boxes to 192 : 256 first (``crop.box_side``).
    augment: changed copies of each person, as further records.
    variants: conversations of each record.
    min_confidence: keypoints of less confidence count as not seen. min_keypoints: a person needs more than so many seen keypoints.
    max_reprojection: a fit with a larger reprojection loss is left out; 0 for any.
    max_beta: a fit with a larger shape coefficient has no shape; 0 for any. need_shape: a fit without shape is left out, because it went wrong.
    plausible: leave out poses that are improbable in AMASS (``plausible.Plausible``); needs the file of its histogram.
    seed: of wording and augmentation.

    ``measured`` leaves out SMPL's two hands, because no keypoint lies beyond the wrists and fits fill them from a prior. It leaves out a foot
    (joint 10 or 11, which bends the toes only) unless ``markers`` (motion capture with markers on the toes) or a keypoint of its toes was seen.

    ``extras``: keypoints_2d (44, 3) in pixels of the crop with confidence, and keypoints_3d (44, 4) metres in the camera frame with confidence, if
    there are any (25 of OpenPose, then 19); box (3,), x, y of its middle and its side in pixels of the original image; image_size (2,), its width
    and height.
    """

    about: ClassVar[About]
    folder: ClassVar[str]
    markers: ClassVar[bool] = False
    group: ClassVar[str]
    """A regular expression. The first match in a key gives the group by its bracketed parts; without match the last part of the key does."""

    def __init__(
        self,
        source: Path,
        *,
        size: int = 256,
        tall: bool = False,
        augment: int = 0,
        variants: int = 1,
        min_confidence: float = 0.3,
        min_keypoints: int = 4,
        max_reprojection: float = 31000.0,
        max_beta: float = 3.0,
        need_shape: bool = True,
        plausible: bool = True,
        seed: int = 0,
    ) -> None:
        self.size, self.tall, self.seed = whole("size", size, 16, 4096), tall, seed
        self.augment, self.variants = whole("augment", augment, 0), whole("variants", variants, 1)
        self.min_confidence, self.min_keypoints = min_confidence, whole("min_keypoints", min_keypoints, 0)
        for name, value in (("max_reprojection", max_reprojection), ("max_beta", max_beta)):
            real(name, value, lambda x: x >= 0, "at least 0")
        self.max_reprojection, self.max_beta, self.need_shape = max_reprojection, max_beta, need_shape
        self.source, tars = source, source / TARS / self.folder
        self.tars = sorted(path.name for path in tars.glob("*.tar") if not path.name.startswith("."))
        if not self.tars:
            raise missing(self.about, tars / "000000.tar")
        self.histogram = source / HISTOGRAM if plausible else None
        if self.histogram is not None and not self.histogram.is_file():
            raise UserError(f"{missing(self.about, self.histogram)}; or read without it, by --set plausible=false")

    def parts(self, split: Split) -> Sequence[str]:
        """All tars are for training."""
        return self.tars if split == "train" else ()

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        path, found = self.source / TARS / self.folder / part, False
        for key, files in tar_samples(path, (*_IMAGES, _ANNOTATION)):
            found, name = True, f"{part}/{key}"
            try:
                images = [files[suffix] for suffix in _IMAGES if suffix in files]
                if len(images) != 1 or _ANNOTATION not in files:
                    raise UserError(f"expected one image and one {_ANNOTATION}, found {', '.join(files) or 'nothing'}")
                people = load_pickle(files[_ANNOTATION], name)
                if not isinstance(people, list | tuple):
                    raise UserError(f"expected a list of people, found {type(people).__name__}")
                pixels = crop.stored_pixels(images[0], name)
            except UserError as error:
                yield Skipped(name, "damaged image or annotation", broken=True, detail=str(error))
                continue
            for number, entry in enumerate(people):
                yield from self._person(f"{name}#{number}", self._group(key), entry, pixels)
        if not found:
            raise UserError(f"{path}: expected files KEY.jpg and KEY.{_ANNOTATION}, found none")

    def _group(self, key: str) -> str:
        found = re.search(self.group, key)
        return "_".join(found.groups()) if found else key.rpartition("/")[2]

    def _person(self, key: str, group: str, entry: Any, pixels: np.ndarray) -> Iterator[Record | Skipped]:
        try:
            person = self._filtered(Person.read(entry))
            side = crop.box_side(person.scale, self.tall)
            crop.check_box(person.center, side, pixels.shape[1::-1])
            pose = self._pose(person)
        except UserError as error:
            yield Skipped(key, "damaged annotation of a person", broken=True, detail=str(error))
            return
        if reason := self._reason(person):
            yield Skipped(key, reason)
            return
        for copy in range(1 + self.augment):
            name = f"{key}+{copy}" if copy else key
            change = crop.Change.draw(seeded(self.seed, name, "change")) if copy else crop.Change()
            yield self._record(name, group, person, pixels, side, pose, change)

    def _filtered(self, person: Person) -> Person:
        """The person without keypoints of low confidence, and without an extreme shape."""
        points, betas = np.array(person.keypoints_2d), person.betas
        points[points[:, 2] < self.min_confidence, 2] = 0
        if betas is not None and self.max_beta and np.abs(betas).max() > self.max_beta:
            betas = None
        return dataclasses.replace(person, keypoints_2d=points, betas=betas)

    def _pose(self, person: Person) -> Pose:
        measured = np.ones((1, 24), bool)
        measured[:, _HANDS] = False
        for joint, beyond in _TOES.items():
            measured[:, joint] = self.markers or (person.keypoints_2d[beyond, 2] > 0).any()
        betas = None if person.betas is None else person.betas[None].astype(np.float32)
        space = None if betas is None else SHAPE_SPACES["smpl"]
        return Pose(crop.to_matrices(person.axis_angle[None]), "camera", betas, measured=measured, shape_space=space)

    def _reason(self, person: Person) -> str:
        """Why a person is left out, or nothing."""
        if not person.axis_angle.any():  # a flag of a pose of zeros alone would be wrong: the body stands on its head
            return "no pose"
        if self.need_shape and person.betas is None:
            return "no shape, or an extreme one"
        if (person.keypoints_2d[:, 2] > 0).sum() <= self.min_keypoints:
            return "too few keypoints"
        limit, loss = self.max_reprojection, person.reprojection
        if limit and loss is not None and not loss < limit:
            return "large reprojection loss"
        if self._plausible is not None and not self._plausible(person.axis_angle[1:22]):
            return "improbable pose"
        return ""

    @cached_property
    def _plausible(self) -> Plausible | None:
        return None if self.histogram is None else Plausible.load(self.histogram)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name != "_plausible"
        }  # it is large; each process reads it again

    def _record(
        self,
        key: str,
        group: str,
        person: Person,
        pixels: np.ndarray,
        side: float,
        pose: Pose,
        change: crop.Change,
    ) -> Record:
        height, width = pixels.shape[:2]
        matrix = change.matrix(person.center, side, self.size, width)
        image = crop.coloured(crop.warp(pixels, matrix, self.size), change.colours)
        moved = crop.moved(person.keypoints_2d, matrix)
        extras: dict[str, Any] = {
            "keypoints_2d": moved[crop.TWINS] if change.flip else moved,
            "box": np.array([*person.center, side], np.float32),
            "image_size": np.array([width, height], np.int32),
        }
        if person.keypoints_3d is not None:
            extras["keypoints_3d"] = change.points(person.keypoints_3d).astype(np.float32)
        rng = seeded(self.seed, key, "words")
        return Record(
            key=key,
            kind="image",
            conversations=tuple(ask_for_pose(rng) for _ in range(self.variants)),
            images=(crop.to_jpeg(image),),
            poses=change.pose(pose),
            group=group,
            extras=extras,
        )


def _about(title: str, licence: str, folder: str, tars: int) -> About:
    return About(
        title=f"{title}, as 4D-Humans packs it for training",
        licence=licence,
        page=PAGE,
        files=(
            f"{TARS}/{folder}/000000.tar … {tars - 1:06d}.tar (as many as you have; from hmr2_training_data)",
            f"{HISTOGRAM} (of the same download; not needed with --set plausible=false)",
        ),
    )


_COCO = "images: Flickr's terms of use, annotations: CC BY 4.0; https://cocodataset.org"


class H36M(Humans4D):
    """Human3.6M. Its fits are MoSh's to markers, on the toes too."""

    about = _about(
        "Human3.6M",
        "Human3.6M: its own, for academic use only, on registration; http://vision.imar.ro/human3.6m",
        "h36m-train",
        313,
    )
    folder = "h36m-train"
    markers = True
    group = r"(S\d+)_(.+?)[._]\d{8}[._]"  # a subject and an action, seen by four cameras


class MpiInf3dhp(Humans4D):
    """MPI-INF-3DHP, with SPIN's fits to keypoints."""

    about = _about(
        "MPI-INF-3DHP",
        "MPI-INF-3DHP: its own, for non-commercial research; https://vcai.mpi-inf.mpg.de/3dhp-dataset",
        "mpi-inf-train-pruned",
        7,
    )
    folder = "mpi-inf-train-pruned"
    group = r"(S\d+)[_/](Seq\d+)"  # seen by many cameras


class Coco(Humans4D):
    """COCO 2014, with SPIN's fits to keypoints."""

    about = _about("COCO 2014", _COCO, "coco-train-2014-pruned", 18)
    folder = "coco-train-2014-pruned"
    group = r"(\d{12})$"


class CocoVitpose(Coco):
    """COCO 2014, with 4D-Humans' own fits to keypoints of ViTPose."""

    about = _about("COCO 2014 with fits to ViTPose", _COCO, "coco-train-2014-vitpose-pruned", 45)
    folder = "coco-train-2014-vitpose-pruned"


class Mpii(Humans4D):
    """MPII Human Pose, with SPIN's fits to keypoints."""

    about = _about(
        "MPII Human Pose",
        "MPII: Simplified BSD for the annotations, images for research; http://human-pose.mpi-inf.mpg.de",
        "mpii-train",
        10,
    )
    folder = "mpii-train"
    group = r"(\d+)$"
