"""BEDLAM and BEDLAM2: rendered people with the exact SMPL-X pose, in the npz of the training code, with the images beside them.

Facts from pixelite1201/BEDLAM: ``data_processing/df_full_body*.py``, ``train/dataset/dataset*.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.humans4d import ask_for_pose
from chatpose_jax.data.readers.untrusted import MAX_MEMBER, inside, load_npz, read_bytes
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.pose import JOINTS, SHAPE_SPACES, Pose

_REQUIRED = ("imgname", "center", "scale", "pose_cam", "shape", "trans_cam", "cam_ext", "cam_int")
_OPTIONAL = ("gtkps", "gender", "sub")
_RATES = ("_6fps", "_30fps")
_OF_NEUTRAL = 11
"""The most betas of BEDLAM."""


class Bedlam:
    """A part is a scene (an npz), a record is a person in an image, in the frame "camera".

    Arrays of an npz: ``imgname`` (N,), such as ``seq_000000/seq_000000_0005.png``; ``center`` (N, 2) and ``scale`` (N,) of the box, in pixels and in
    200 pixels; ``pose_cam`` (N, 165), axis-angle of the 55 joints of SMPL-X with the root in the camera frame (N, 72 in the version for SMPL);
    ``shape`` (N, n) betas, n = 10 or 11, in BEDLAM2 16; ``trans_cam`` (N, 3) and ``cam_ext`` (N, 4, 4), whose last column is added to it; ``cam_int``
    (N, 3, 3); ``gtkps`` (N, K, 2 or 3), joints in pixels; ``gender``, ``sub``. All of them belong to the upright image. The images of scenes named
    ``closeup`` (BEDLAM2: ``portrait``) are stored turned by 90°, and only they must be turned back. Which ones those are is read from the principal
    point of ``cam_int``, which is the middle of the upright image.

    Options: labels, images: the folders with the npz and with the images, in ``source`` unless they are absolute. size: side of the crop in pixels.
    variants: conversations of each record. seed: of their wording.

    All joints are measured, because the images show exactly this pose; only SMPL's rigid hands are not.

    Betas and translation are part of the pose where they belong to the neutral body, as those of all data do that trains. That holds in BEDLAM,
    whose 10 or 11 betas are the neutral body's whatever the gender. More betas (BEDLAM2) are those of the body of ``gender``; unless it is neutral,
    they are in ``extras``: betas (n,) and trans_cam (3,), metres. The translation is that of the original camera.

    ``extras``: cam_int (3, 3) and keypoints_2d (K, 2 or 3), both in pixels of the crop; box (3,), x, y of its middle and its side in pixels of the
    upright image; image_size (2,), its width and height; gender, sub (the subject): text.
    """

    about: ClassVar[About] = About(
        title="BEDLAM",
        licence="BEDLAM: its own, for non-commercial research, on registration; https://bedlam.is.tue.mpg.de/license.html",
        page="https://bedlam.is.tue.mpg.de",
        files=(
            "training_labels/all_npz_12_training/SCENE.npz",
            "training_images/SCENE/png/SEQUENCE/IMAGE.png",
        ),
        options=(
            "--set labels=FOLDER has the npz (BEDLAM2: the output of its data_processing scripts)",
            "--set images=FOLDER has SCENE/png/…",
        ),
    )

    def __init__(
        self,
        source: Path,
        *,
        labels: str = "training_labels/all_npz_12_training",
        images: str = "training_images",
        size: int = 256,
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        self.labels, self.images = source / Path(labels).expanduser(), source / Path(images).expanduser()
        self.size, self.variants, self.seed = whole("size", size, 16, 4096), whole("variants", variants, 1), seed
        self.scenes = sorted(path.stem for path in self.labels.glob("*.npz"))
        if not self.scenes:
            raise missing(self.about, self.labels / "*.npz")
        if not any((self.images / scene / "png").is_dir() for scene in self.scenes):
            raise missing(self.about, *(self.images / scene / "png" for scene in self.scenes))

    def parts(self, split: Split) -> Sequence[str]:
        """All scenes are for training."""
        return self.scenes if split == "train" else ()

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        folder = self.images / part / "png"
        if not folder.is_dir():
            yield Skipped(part, "a scene without images")
            return
        arrays = _checked(load_npz(self.labels / f"{part}.npz", (*_REQUIRED, *_OPTIONAL)), self.labels / f"{part}.npz")
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in arrays["imgname"].tolist()]
        last, image = None, None
        for row in sorted(range(len(names)), key=names.__getitem__):  # an image of several people is read once
            name, key = names[row], f"{part}/{names[row]}#{row}"
            try:
                if name != last:
                    last, image = name, None
                    image = crop.stored_pixels(read_bytes(inside(folder, name), MAX_MEMBER), name)
                if image is None:
                    raise UserError(f"{name}: cannot be read; an earlier item says why")
                yield self._record(key, part, name, {field: array[row] for field, array in arrays.items()}, image)
            except UserError as error:
                yield Skipped(key, "damaged or missing image or label", broken=True, detail=str(error))

    def _record(self, key: str, scene: str, name: str, label: dict[str, Any], stored: np.ndarray) -> Record:
        numbers = {
            field: np.asarray(value, np.float64)
            for field, value in label.items()
            if field not in ("imgname", "gender", "sub")
        }
        for field, value in numbers.items():
            if not np.isfinite(value).all():
                raise UserError(f"{field} must be finite numbers")
        pixels = _upright(stored, numbers["cam_int"])
        height, width = pixels.shape[:2]
        side = crop.box_side(numbers["scale"])
        crop.check_box(numbers["center"], side, (width, height))
        matrix = crop.Change().matrix(numbers["center"], side, self.size, width)
        extras: dict[str, Any] = {
            "box": np.array([*numbers["center"], side], np.float32),
            "image_size": np.array([width, height], np.int32),
            "cam_int": (np.vstack([matrix, [0, 0, 1]]) @ numbers["cam_int"]).astype(np.float32),
        }
        if "gtkps" in numbers:
            extras["keypoints_2d"] = crop.moved(numbers["gtkps"], matrix)
        for field in ("gender", "sub"):
            if field in label:
                extras[field] = label[field].decode() if isinstance(label[field], bytes) else str(label[field])
        axis_angle = numbers["pose_cam"].reshape(1, -1, 3)
        joints = axis_angle.shape[1]
        measured = np.arange(joints)[None] < 22 if joints == JOINTS["smpl"] else None
        pose = Pose(crop.to_matrices(axis_angle), "camera", measured=measured)
        betas = numbers["shape"].astype(np.float32)
        translation = (numbers["trans_cam"] + numbers["cam_ext"][:3, 3]).astype(np.float32)
        if len(betas) <= _OF_NEUTRAL or extras.get("gender") == "neutral":
            space = SHAPE_SPACES["smpl" if joints == JOINTS["smpl"] else "smplx"]
            pose = pose.replace(betas=betas[None], translation=translation[None], shape_space=space)
        else:
            extras |= {"betas": betas, "trans_cam": translation}
        rng = seeded(self.seed, key, "words")
        base = next((scene.removesuffix(rate) for rate in _RATES if scene.endswith(rate)), scene)
        return Record(
            key=key,
            kind="image",
            conversations=tuple(ask_for_pose(rng) for _ in range(self.variants)),
            images=(crop.to_jpeg(crop.warp(pixels, matrix, self.size)),),
            poses=pose,
            group=f"{base}/{name.rpartition('/')[0]}",
            extras=extras,
        )


def _checked(arrays: dict[str, np.ndarray], where: Path) -> dict[str, np.ndarray]:
    """Raises UserError, which names the file, unless all arrays are there and fit together."""
    if absent := [name for name in _REQUIRED if name not in arrays]:
        raise UserError(f"{where}: expected an npz of BEDLAM; it has no {', '.join(absent)}")
    count, joints = len(arrays["imgname"]), JOINTS.values()
    tails: dict[str, tuple[tuple[int, ...], ...]] = {
        "center": ((2,),),
        "scale": ((), (1,), (2,)),
        "pose_cam": tuple(shape for n in joints for shape in ((3 * n,), (n, 3))),
        "trans_cam": ((3,),),
        "cam_ext": ((4, 4),),
        "cam_int": ((3, 3),),
    }
    for name, array in arrays.items():
        allowed = tails.get(name)
        text = name in ("imgname", "gender", "sub")
        ok = array.shape[:1] == (count,) and (array.dtype.kind in "USO" if text else array.dtype.kind in "fiu")
        if name == "shape":
            ok = ok and array.ndim == 2
        if name == "gtkps":
            ok = ok and array.ndim == 3 and array.shape[2] in (2, 3)
        if not ok or (allowed is not None and array.shape[1:] not in allowed) or (text and array.ndim != 1):
            raise UserError(
                f"{where}: {name} is {array.dtype} of shape {array.shape}, which is not BEDLAM's for {count} people"
            )
    return arrays


def _upright(stored: np.ndarray, cam_int: np.ndarray) -> np.ndarray:
    """The image in the orientation that its labels belong to."""
    width, height = np.rint(2 * cam_int[:2, 2]).astype(int).tolist()
    if stored.shape[:2] == (height, width):
        return stored
    if stored.shape[:2] == (width, height):
        return np.rot90(stored, -1)  # clockwise
    raise UserError(
        f"expected an image of {width} × {height} pixels, or of {height} × {width} turned by 90°, by its cam_int; "
        f"found {stored.shape[1]} × {stored.shape[0]}"
    )
