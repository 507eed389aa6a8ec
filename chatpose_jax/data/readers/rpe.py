"""RPE, reasoning about pose estimation: an image of several people, a description of one of them, and that person's pose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers import crop
from chatpose_jax.data.readers.llava import image_group, messages_of
from chatpose_jax.data.readers.posescript import pick, subfolder
from chatpose_jax.data.readers.threedpw import gender_of, measured
from chatpose_jax.data.readers.untrusted import MAX_MEMBER, inside, parse_json, read_bytes, read_json, read_lines
from chatpose_jax.data.record import Conversation, Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.processing.conversation import POSE
from chatpose_jax.settings import whole
from smpl_jax.pose import SHARED, Pose

TYPES = ("behaviour", "shape", "outfit", "pose", "summary")
"""What a description is about."""
FILE = "rpe.jsonl"
FOLDER = "RPE-refined"
_REFINED = {"behaviour": "behavior", "shape": "shape", "outfit": "outfits", "pose": "pose"}
"""Type -> its word in the names of the refined release."""
_ENDING = ", can you give the SMPL pose of this person?"


class RpeRefined:
    """Reads RPE as others corrected it (Kim et al. 2025, arXiv 2507.13314): four files of 50 records over 46 images of 3DPW's test split.

    A part is a type of description, a record is a record of its file: the whole image and the question, answered with the pose in the camera
    frame. Images repeat, so the key is ``TYPE/ID``, for example ``behaviour/000007``. ``group`` is the sequence of 3DPW.

    A record of a file: ``id``; ``real_image``, ``3DPW/imageFiles/SEQUENCE/image_00000.jpg``; ``conversations`` of a human and a gpt, the question
    after ``<image>``; ``ground_truth`` with ``smpl_param`` (``pose`` 72, ``shape`` 10, ``trans`` 3, ``gender``), ``joint_cam`` and
    ``fitted_joint_cam`` (24, 3), ``joint_img`` (24, 2), ``openpose_result`` (18, 3), ``bbox`` (4).

    Joints that 3DPW does not measure are not measured here (``threedpw.measured``). ``extras``, of which those that belong to the SMPL body of
    ``gender`` are here and not in the pose, because training takes all betas for those of one body:

    ================  ====================================================================================================
    id, type          text; type is one of ``TYPES``
    description       the question without its last clause, "can you give …"
    image             its name, such as ``imageFiles/SEQUENCE/image_00000.jpg``
    bbox              (4,) left, top, width and height in pixels
    image_size        (2,) width and height
    joint_cam         (24, 3) 3DPW's joints in metres, camera frame
    fitted_joint_cam  (24, 3) those of the SMPL body, in metres, camera frame; the release evaluates with the first 22
    joint_img         (24, 2) joint_cam in pixels
    openpose_result   (18, 3) detected keypoints in pixels with their confidence, zeros where there are none; the order of COCO-18
    betas, trans_cam  (10,) and (3,) metres in the camera frame
    gender            "male" or "female"
    ================  ====================================================================================================

    Options: images: the folder of 3DPW; by default ``3DPW`` in the source folder.

    Source: the repository jjunsss/RPE-Refined.
    """

    about: ClassVar[About] = About(
        title="RPE, refined",
        licence="none is stated; the images and poses are 3DPW's, for non-commercial research",
        page="https://github.com/jjunsss/RPE-Refined, and the images from https://virtualhumans.mpi-inf.mpg.de/3DPW",
        files=(f"refine_vqa_*_withGT.json, or a folder {FOLDER} of them", "3DPW/imageFiles/SEQUENCE/image_00000.jpg …"),
        options=("--set images=FOLDER is the folder of 3DPW, which has imageFiles",),
    )

    def __init__(self, source: Path, *, images: str = "") -> None:
        folder = subfolder(source, FOLDER)
        self.files = {kind: folder / f"refine_vqa_{word}_withGT.json" for kind, word in _REFINED.items()}
        self.images = Path(images).expanduser() if images else source / "3DPW"
        paths = [*self.files.values(), self.images / "imageFiles"]
        if absent := [path for path in paths if not path.exists()]:
            raise missing(self.about, *absent)

    def parts(self, split: Split) -> Sequence[str]:
        """All rows are for testing."""
        return tuple(self.files) if split == "test" else ()

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        entries = read_json(self.files[part])
        if not isinstance(entries, list):
            raise UserError(f"{self.files[part]}: expected a list of records, found a {type(entries).__name__}")
        seen: set[str] = set()
        for number, entry in enumerate(entries):
            key = f"{part}, record {number}"
            try:
                entry = _mapping({"record": entry}, "record")
                key = f"{part}/{_text(entry, 'id')}"
                if key in seen:
                    raise UserError("an earlier record has this id")
                seen.add(key)
                yield self._record(key, part, entry)
            except UserError as error:
                yield Skipped(
                    key, "a damaged record or image", True, f"{self.files[part].name}, record {number}: {error}"
                )

    def _record(self, key: str, kind: str, entry: Mapping[str, Any]) -> Record:
        name = _text(entry, "real_image").removeprefix("3DPW/")
        image, width, height = _image(self.images, name)
        messages, question = _turn(entry.get("conversations"))
        truth = _mapping(entry, "ground_truth")
        body = _mapping(truth, "smpl_param")
        joints = {
            name: _numbers(truth, name, (24, n))
            for name, n in (("joint_cam", 3), ("fitted_joint_cam", 3), ("joint_img", 2))
        }
        extras = joints | {
            "id": _text(entry, "id"),
            "type": kind,
            "description": question.removesuffix(_ENDING),
            "image": name,
            "bbox": _numbers(truth, "bbox", (4,)),
            "image_size": np.array([width, height], np.int32),
            "openpose_result": _numbers(truth, "openpose_result", (18, 3)),
            "betas": _numbers(body, "shape", (10,)),
            "trans_cam": _numbers(body, "trans", (3,)),
            "gender": gender_of(body.get("gender")),
        }
        rotations = crop.to_matrices(_numbers(body, "pose", (72,), np.float64).reshape(1, 24, 3))
        return Record(
            key=key,
            kind="image",
            conversations=(messages,),
            images=(image,),
            poses=Pose(rotations, "camera", measured=measured(1)),
            group=name.split("/")[-2] if "/" in name else "",
            extras=extras,
        )


class Rpe:
    """Reads RPE in a format of this package; ``chatpose data build rpe`` writes it.

    The file ``rpe.jsonl`` has one JSON object in each line (UTF-8). All records of one person have one ``id``, and each has another ``type``:

    ===========  ====================================================================================================
    id           names the person in the image; text that is not empty
    type         what the description is about: "behaviour", "shape", "outfit", "pose" or "summary"
    image        the file of the whole image, inside the folder of ``rpe.jsonl``
    description  sentences that tell the person from the others in the image
    box          [left, top, width, height] of the person in pixels of the image
    pose         72 numbers: axis-angle in radians of the 24 joints of SMPL, the root in the camera frame (x right, y down)
    measured     optional: 24 times true or false; without it all joints but SMPL's rigid hands (22, 23) are measured
    split        optional: "train", "val" or "test"; without it, "test"
    group        optional: the sequence or clip, which belongs to one split; without it, the image
    ===========  ====================================================================================================

    Other fields are for people and are not read.

    A row shows the whole image, asks with the description, and is answered with the pose. Its key is ``TYPE/ID``. ``extras``: id, type,
    description, image, bbox (4,) and image_size (2,) as in ``RpeRefined``.

    Options: variants: rows of each record in "train", with other words around the description; "val" and "test" have one. seed: of the
    words.
    """

    about: ClassVar[About] = About(
        title="RPE in this package's format",
        licence="that of the images and poses from which it was made",
        page="docs/data-sets.md, which defines the format",
        files=(f"{FILE} (chatpose data build rpe makes one)", "the images that it names"),
    )

    def __init__(self, source: Path, *, variants: int = 1, seed: int = 0) -> None:
        self.source, self.variants, self.seed = source, whole("variants", variants, 1), seed
        if not (source / FILE).is_file():
            raise missing(self.about, source / FILE)

    def parts(self, split: Split) -> Sequence[str]:
        """The types."""
        return TYPES

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        seen: set[str] = set()
        for number, line in read_lines(self.source / FILE):
            key, place = f"line {number}", ("test", TYPES[0])  # where a line without type or split is reported
            try:
                entry = _mapping({FILE: parse_json(line, FILE)}, FILE)
                place = _choice(entry, "split", ("train", "val", "test"), "test"), _choice(entry, "type", TYPES)
                if place != (split, part):
                    continue
                key = f"{part}/{_text(entry, 'id')}"
                if key in seen:
                    raise UserError("an earlier line has this id and type")
                seen.add(key)
                yield self._record(key, part, split, entry)
            except UserError as error:
                if place == (split, part):
                    yield Skipped(key, "a damaged line or image", True, f"{FILE}, line {number}: {error}")

    def _record(self, key: str, kind: str, split: Split, entry: Mapping[str, Any]) -> Record:
        name, description = _text(entry, "image"), " ".join(_text(entry, "description").split())
        image, width, height = _image(self.source, name)
        rotations = crop.to_matrices(_numbers(entry, "pose", (72,), np.float64).reshape(1, 24, 3))
        talks = []
        for variant in range(self.variants if split == "train" else 1):
            rng = seeded(self.seed, "rpe", key, variant)
            question = pick(rng, questions.PERSON_TO_POSE).format(caption=description)
            talks.append(_ask(question, pick(rng, questions.POSE_ANSWERS)))
        return Record(
            key=key,
            kind="image",
            conversations=tuple(talks),
            images=(image,),
            poses=Pose(rotations, "camera", measured=_measured(entry)),
            group=_text(entry, "group") if "group" in entry else image_group(name),
            extras={
                "id": _text(entry, "id"),
                "type": kind,
                "description": description,
                "image": name,
                "bbox": _numbers(entry, "box", (4,)),
                "image_size": np.array([width, height], np.int32),
            },
        )


def _image(folder: Path, name: str) -> tuple[bytes, int, int]:
    """An image as it is stored, its width and its height. Raises UserError where it is not there or damaged."""
    data = read_bytes(inside(folder, name), MAX_MEMBER)
    height, width = crop.stored_pixels(data, name).shape[:2]
    return data, width, height


def _ask(question: str, answer: str) -> Conversation:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})


def _turn(conversations: Any) -> tuple[Conversation, str]:
    """A conversation of LLaVA's form, and its question. Raises UserError unless it is one turn with an image and a pose."""
    messages = messages_of(conversations, 1)
    if len(messages) != 2 or len(messages[0]["content"]) != 2 or messages[1]["content"].count(POSE) != 1:
        raise UserError(f"conversations must be one question, answered with one {POSE}; found {conversations!r:.200}")
    return messages, messages[0]["content"][1]["text"]


def _mapping(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = entry.get(name)
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be an object, found {value!r:.60}")
    return value


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name} must be text, found {value!r:.60}")
    return value


def _choice(entry: Mapping[str, Any], name: str, options: Sequence[str], default: str | None = None) -> str:
    value = entry.get(name, default)
    if value not in options:
        raise UserError(f"{name} must be one of {', '.join(options)}; found {value!r:.60}")
    return value


def _numbers(entry: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Raises UserError unless these are finite numbers of this shape."""
    try:
        array = np.asarray(entry.get(name), np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all():
        raise UserError(f"{name} must be finite numbers of shape {shape}, found {entry.get(name)!r:.60}")
    return array.astype(dtype)


def _measured(entry: Mapping[str, Any]) -> np.ndarray:
    value = entry.get("measured", [joint < SHARED for joint in range(24)])
    if not isinstance(value, list) or len(value) != 24 or not all(isinstance(flag, bool) for flag in value):
        raise UserError(f"measured must be 24 times true or false, found {value!r:.60}")
    return np.array([value])
