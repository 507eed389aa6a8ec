"""4D-Humans' evaluation files: boxes and keypoints of 3DPW's test split and of Human3.6M's protocol 2, beside the images.

Facts from shubham-goel/4D-Humans (``hmr2/datasets/image_dataset.py``, ``hmr2/configs/datasets_eval.yaml``) and nkolot/ProHMR, whose
``dataset_preprocessing`` wrote the files.
"""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.humans4d import ask_for_pose
from chatpose_jax.data.readers.posescript import subfolder
from chatpose_jax.data.readers.threedpw import LICENCE, PAGE, gender_of, measured
from chatpose_jax.data.readers.untrusted import MAX_MEMBER, inside, load_npz, read_bytes
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, unmeasured

FOLDER = "hmr2_evaluation_data"
_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "imgname": ((),),
    "center": ((2,),),
    "scale": ((), (1,), (2,)),
    "body_pose": ((72,),),
    "has_body_pose": ((), (1,)),
    "betas": ((10,),),
    "has_betas": ((), (1,)),
    "body_keypoints_2d": ((25, 3),),
    "extra_keypoints_2d": ((19, 3),),
    "body_keypoints_3d": ((25, 4),),
    "extra_keypoints_3d": ((19, 4),),
    "gender": ((),),
}
"""Arrays of a file -> shapes of one row."""
_TEXT = ("imgname", "gender")
_BODY_3D = slice(1, 15)


class Row(NamedTuple):
    """A person: the image, which of its people in the order of the file, and the row of the file."""

    image: str
    person: int
    row: int

    @property
    def key(self) -> str:
        return f"{self.image}#{self.person}"


class Humans4DEval:
    """Reads an evaluation file. A part is a sequence, a record is a row of the file: a crop and the question for its pose, in the frame "camera".

    Arrays of a file, of which those in brackets may be absent: ``imgname`` (N,), text or bytes; ``center`` (N, 2) and ``scale`` (N,) or (N, 2),
    the box in pixels; [``body_pose`` (N, 72) with the root in the camera frame, ``has_body_pose``, ``betas`` (N, 10), ``has_betas``, ``gender``];
    [``body_keypoints_2d`` (N, 25, 3), ``extra_keypoints_2d`` (N, 19, 3), ``body_keypoints_3d`` (N, 25, 4)]; ``extra_keypoints_3d`` (N, 19, 4).

    The key is ``IMGNAME#PERSON``; PERSON counts the rows of an image in their order. A row without a pose has no measured joint, so it counts in
    no loss and no metric of rotations, and its joints are in ``extras``. Of a pose, ``threedpw.measured`` says what counts.

    ``extras``: keypoints_2d (44, 3) in pixels of the crop with confidence; keypoints_3d (44, 4) in metres with confidence, along the axes of the
    camera frame from any origin (25 of OpenPose, then 19; protocols use 25 … 37, 43 and the pelvis 39). Points 1 … 14 have no confidence in
    3D, as in 4D-Humans. box (3,), x, y of its middle and its side in pixels of the original image; image_size (2,), its width and height. Where
    the file has them: gender, "male", "female" or "neutral", and betas (10,) of the SMPL body of this gender. They are not part of the pose,
    because other data has betas of another body.

    Options: images: the folder in which the names of ``imgname`` lie. size: side of the crop in pixels. tall: widen boxes to 192 : 256 first, as
    4D-Humans does for its released model (``crop.box_side``). subset: only so many rows; 0 for all. They are chosen by a hash of seed and key, so a
    smaller subset is part of a larger one, and the order of the file does not matter. seed: of the subset and the wording.
    """

    about: ClassVar[About]
    file: ClassVar[str]
    images: ClassVar[tuple[str, ...]]
    """Where the images are looked for, inside the source folder."""
    group: ClassVar[str]
    """A regular expression. The first match in a name gives the sequence by its bracketed parts."""
    needs: ClassVar[tuple[str, ...]] = ("imgname", "center", "scale", "extra_keypoints_3d")

    def __init__(
        self,
        source: Path,
        *,
        images: str = "",
        size: int = 256,
        tall: bool = False,
        subset: int = 0,
        seed: int = 0,
    ) -> None:
        self.size, self.tall, self.seed = whole("size", size, 16, 4096), tall, seed
        self.path = subfolder(source, FOLDER) / self.file
        if not self.path.is_file():
            raise missing(self.about, self.path)
        self.rows = self._chosen(whole("subset", subset, 0))
        folders = [Path(images).expanduser()] if images else [source / name for name in type(self).images]
        first = next(iter(self.rows.values()))[0].image
        found = [folder for folder in folders if inside(folder, first).is_file()]
        if not found:
            raise missing(self.about, *(inside(folder, first) for folder in folders))
        self.folder = found[0]

    def _chosen(self, subset: int) -> dict[str, list[Row]]:
        """The rows of each sequence, by image."""
        names = load_npz(self.path, ("imgname",)).get("imgname")
        if names is None or names.ndim != 1 or names.dtype.kind not in "USO" or not len(names):
            raise UserError(
                f"{self.path}: expected an evaluation file of 4D-Humans, with the names of images in imgname"
            )
        people: collections.Counter[str] = collections.Counter()
        rows = []
        for number, name in enumerate(names.tolist()):
            image = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
            rows.append(Row(image, people[image], number))
            people[image] += 1
        if subset:
            rows = sorted(rows, key=lambda row: _hash(self.seed, row.key))[:subset]
        groups: dict[str, list[Row]] = {}
        for row in sorted(rows):
            groups.setdefault(self._group(row.image), []).append(row)
        return dict(sorted(groups.items()))

    def _group(self, name: str) -> str:
        found = re.search(self.group, name)
        if not found:
            raise UserError(f"{self.path}: expected names of images as in {self.about.title}, found {name!r:.120}")
        return "_".join(found.groups())

    def parts(self, split: Split) -> Sequence[str]:
        """All rows are for testing."""
        return tuple(self.rows) if split == "test" else ()

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        arrays, last, image = self._arrays, "", None
        for row in self.rows[part]:
            try:
                if row.image != last:
                    last, image = row.image, None
                    image = crop.stored_pixels(read_bytes(inside(self.folder, row.image), MAX_MEMBER), row.image)
                if image is None:
                    raise UserError(f"{row.image}: cannot be read; an earlier item says why")
                yield self._record(row, part, {name: array[row.row] for name, array in arrays.items()}, image)
            except UserError as error:
                yield Skipped(row.key, "damaged or missing image or label", broken=True, detail=str(error))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the file. Raises UserError, which names it, unless they are there and fit together."""
        arrays = load_npz(self.path, _SHAPES)
        count = len(arrays["imgname"])
        pairs = [("has_body_pose", "body_pose"), ("has_betas", "betas")]
        needs = {*self.needs, *(flag for flag, name in pairs if name in arrays)}
        if absent := sorted(needs - arrays.keys()):
            raise UserError(f"{self.path}: expected an evaluation file of 4D-Humans; it has no {', '.join(absent)}")
        for name, array in arrays.items():
            kinds = "USO" if name in _TEXT else "biuf"
            if array.shape[:1] != (count,) or array.shape[1:] not in _SHAPES[name] or array.dtype.kind not in kinds:
                shapes = " or ".join(str((count, *shape)) for shape in _SHAPES[name])
                raise UserError(f"{self.path}: {name} must have the shape {shapes}, found {array.dtype} {array.shape}")
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name != "_arrays"
        }  # they are large; each process reads them again

    def _record(self, row: Row, part: str, entry: dict[str, Any], pixels: np.ndarray) -> Record:
        numbers = {name: np.asarray(value, np.float64) for name, value in entry.items() if name not in _TEXT}
        for name in ("body_pose", "betas"):
            if not (numbers.pop(f"has_{name}", np.zeros(1)) > 0).all():
                numbers.pop(name, None)
        if broken := [name for name, value in numbers.items() if not np.isfinite(value).all()]:
            raise UserError(f"{', '.join(broken)} must be finite numbers")
        height, width = pixels.shape[:2]
        side = crop.box_side(numbers["scale"] / 200, self.tall)
        crop.check_box(numbers["center"], side, (width, height))
        matrix = crop.Change().matrix(numbers["center"], side, self.size, width)
        flat = [numbers.get(f"{place}_keypoints_2d", np.zeros((n, 3))) for place, n in (("body", 25), ("extra", 19))]
        body = numbers.get("body_keypoints_3d", np.zeros((25, 4)))
        body[_BODY_3D, 3] = 0
        extras: dict[str, Any] = {
            "keypoints_2d": crop.moved(np.concatenate(flat), matrix),
            "keypoints_3d": np.concatenate([body, numbers["extra_keypoints_3d"]]).astype(np.float32),
            "box": np.array([*numbers["center"], side], np.float32),
            "image_size": np.array([width, height], np.int32),
        }
        if "gender" in entry:
            extras["gender"] = gender_of(entry["gender"])
        if "betas" in numbers:
            extras["betas"] = numbers["betas"].astype(np.float32)
        pose = unmeasured((1,))
        if "body_pose" in numbers:
            rotations = crop.to_matrices(numbers["body_pose"].reshape(1, 24, 3))
            pose = Pose(rotations, "camera", measured=measured(1))
        return Record(
            key=row.key,
            kind="image",
            conversations=(ask_for_pose(seeded(self.seed, row.key, "words")),),
            images=(crop.to_jpeg(crop.warp(pixels, matrix, self.size)),),
            poses=pose,
            group=part,
            extras=extras,
        )


def _hash(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()


_FROM = "https://github.com/shubham-goel/4D-Humans#evaluation"


class ThreeDPWTest(Humans4DEval):
    """3DPW's test split, all frames with an aligned camera. Joints are those of the gendered SMPL body."""

    about = About(
        title="3DPW's test split, as 4D-Humans packs it for evaluation",
        licence=LICENCE,
        page=f"{_FROM}, and the images from {PAGE}",
        files=(f"3dpw_test.npz, or a folder {FOLDER} of it", "3DPW/imageFiles/SEQUENCE/image_00000.jpg …"),
        options=("--set images=FOLDER is the folder of 3DPW, which has imageFiles",),
    )
    file = "3dpw_test.npz"
    images = ("3DPW",)
    group = r"imageFiles/([^/]+)/"
    needs = (*Humans4DEval.needs, "body_pose")


class H36MVal(Humans4DEval):
    """Human3.6M, subjects 9 and 11, the frontal camera, each fifth frame (protocol 2). There are joints and no rotations."""

    about = About(
        title="Human3.6M's protocol 2, as 4D-Humans packs it for evaluation",
        licence="Human3.6M: its own, for academic use only, on registration; http://vision.imar.ro/human3.6m",
        page=f"{_FROM}, and the images from http://vision.imar.ro/human3.6m",
        files=(f"h36m_val_p2.npz, or a folder {FOLDER} of it", "h36m/images/S9_Directions_1.60457274_000001.jpg …"),
        options=("--set images=FOLDER is the folder in which the names of imgname lie",),
    )
    file = "h36m_val_p2.npz"
    images = ("h36m/images", "h36m")
    group = r"(S\d+)_(.+?)[._]\d{8}[._]"
