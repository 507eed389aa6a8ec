"""Answers that another program has written: HMR2, SPIN, a submission to 3DPW's challenge, any arrays of poses, or an earlier run."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chatpose_jax.data.readers.jsonlines import MOST_RADIANS
from chatpose_jax.data.readers.untrusted import (
    MAX_FILE,
    MAX_MEMBER,
    load_npz,
    load_pickle,
    parse_json,
    read_bytes,
    read_lines,
)
from chatpose_jax.errors import UserError
from chatpose_jax.evaluation.boxes import best_overlap, person_box
from chatpose_jax.evaluation.protocols import ORIENTATIONS
from chatpose_jax.evaluation.system import Answer, Question
from chatpose_jax.settings import check_value
from smpl_jax.errors import PoseFileError
from smpl_jax.frames import Frame
from smpl_jax.keypoints import KEYPOINT_SETS
from smpl_jax.pose import Pose
from smpl_jax.poses import poses_in

MISSING, DAMAGED = "no prediction", "the prediction has numbers that are not finite"
"""Notes of answers without a pose, which tables count."""
ALIASES = {
    "pred_pose": "pose",
    "pred_betas": "betas",
    "pred_rotmat": "matrices",
    "rotmat": "matrices",
    "pred_body_pose": "body_pose",
    "pred_global_orient": "global_orient",
    "keys": "key",
    "image": "imgname",
    "image_name": "imgname",
    "image_path": "imgname",
    "img_name": "imgname",
    "img_path": "imgname",
    "person_id": "person",
    "personid": "person",
}
"""Names in files of other programs -> the names here. A file that has both keeps the one that is named here."""
NESTED = ("pred_smpl_params", "smpl_params", "smpl")
"""Dictionaries in a file whose arrays are taken as if they stood beside it: the output of HMR2."""
_REGRESSED = tuple(int(point.source.removeprefix("h36m[").removesuffix("]")) for point in KEYPOINT_SETS["h36m17"])
JOINTS = {"pred_joints": ("h36m17", _REGRESSED), "pred_keypoints_3d": ("humans44", tuple(range(44)))}
"""Positions (N, K, 3) in files of SPIN and HMR2 -> the set of ``smpl_jax.keypoints``, and for each of its points the place in the file. SPIN's are in
the order of its regressor, with the left leg first.
"""
TALLEST = 20.0
"""Metres. Positions of larger bodies are in another unit."""
SMALLEST = 12.0
"""If most boxes have a smaller ``scale``, its unit is 200 pixels, as in SPIN's files; in those of 4D-Humans it is a pixel."""
_POSED = {
    "matrices",
    "axis_angle",
    "poses",
    "pose",
    "full_pose",
    "fullpose",
    "global_orient",
    "body_pose",
    "root_orient",
    "pose_body",
}
_SUBMITTED = {"jointPositions": ("smpl24", (24, 3)), "orientations": (ORIENTATIONS, (9, 3, 3))}
_PICKLES = (".pkl", ".pickle", ".p")
_IMAGE = re.compile(r"\.(jpe?g|png|webp|bmp)$", re.IGNORECASE)

Columns = dict[str, np.ndarray]


class Lookup(NamedTuple):
    """find: the prediction for a question. names: by which predictions are found. kind: of these names, in words."""

    find: Callable[[Question], Answer]
    names: Iterable[str]
    kind: str


class Predictions:
    """Looks up the prediction for each question. If it is missing or not finite, the answer has no pose; reports count such answers, and
    ``answers.jsonl`` names them.

    Options:
        path: a file or folder, one of

            * ``.npz``, ``.npy`` or a pickle (``.pkl``, ``.pickle``, ``.p``) of poses by the names and shapes of ``smpl_jax.read_poses``, or
              ``pred_pose``, ``pred_betas``, ``pred_rotmat``; a pickle may also be a list with a dictionary for each person, or a dictionary of
              these by image. Arrays of HMR2 may stand in ``pred_smpl_params``. A file without poses may have ``pred_joints`` (N, 17, 3) or
              ``pred_keypoints_3d`` (N, 44, 3) in metres.
            * a folder or ``.zip`` with ``SEQUENCE.pkl`` of ``jointPositions`` (P, N, 24, 3) and ``orientations`` (P, N, 9, 3, 3): a submission to
              3DPW's challenge. It gives positions and no pose, for rows of the data set ``3dpw``, which name actor and frame.
            * ``answers.jsonl`` or the folder that holds it: answers of an earlier run, by the ids of rows.
        names: for a file that does not name its rows: the ``.npz`` in whose order it was written, with ``imgname``, such as SPIN's
            ``3dpw_test.npz``; or a text file with an id of a row in each line. The lengths must agree.
        frame: of a file that does not say it; that of these programs is "camera".
        name: of the row in tables.

    Rows of a file are found by ``key`` (ids of rows), or by ``imgname`` and the person: by ``person`` (its number in the image), or the box. Boxes
    are ``boxes`` (N, 4), two corners; ``bbox`` (N, 4), left, top, width, height; ``center`` and ``scale``; or ``box_center`` and ``box_size``; all in
    pixels of the whole image. If most of ``scale`` is below ``SMALLEST``, its unit is 200 pixels, as in SPIN's files. Without any of these, people of
    an image are counted in the order of the file. Names of images are compared by their last two parts.

    No code of a file is run. Raises UserError, which names the file, where it cannot be read or understood.
    """

    batch_size = 1024

    def __init__(self, *, path: str, names: str = "", frame: Frame = "camera", name: str = "") -> None:
        check_value("the option frame", frame, Frame)
        source, order = Path(path).expanduser(), Path(names).expanduser() if names else None
        if not source.exists():
            raise UserError(f"there is no file or folder {source}")
        self.name = name or source.stem
        hashed = {"predictions": _hash(source), "names": _hash(order) if order else ""}
        self.settings: Mapping[str, Any] = {**hashed, "frame": frame}
        self.source, self.lookup = source, _open(source, order, frame)

    def answer(self, questions: Sequence[Question]) -> Sequence[Answer]:
        """Raises UserError where a question lacks what the predictions are found by."""
        return [self.lookup.find(question) for question in questions]

    def check_questions(self, questions: Sequence[Question]) -> None:
        """Raises UserError where no question of a data set has a prediction: the file is of other rows. The first that has one ends the search."""
        if not len(questions) or any(MISSING not in self.lookup.find(question).notes for question in questions):
            return
        names = list(self.lookup.names)
        raise UserError(
            f"{self.source}: none of the {len(names):,} {self.lookup.kind}, such as {next(iter(names), 'none')!r}, fits a row of the data set; "
            f"the {len(questions):,} rows have ids such as {questions[0].key!r}"
        )


def _open(source: Path, order: Path | None, frame: Frame) -> Lookup:
    kept = source / "answers.jsonl" if source.is_dir() else source
    if kept.suffix == ".jsonl" and kept.is_file():
        return _answers(kept)
    if source.is_dir() or source.suffix == ".zip":
        entry = _Submission(source)
        return Lookup(entry, entry.arrays, "sequences")
    if source.suffix in (".npz", ".npy", *_PICKLES):
        rows = _Rows(source, order, frame)
        return Lookup(rows, rows.keys or rows.images, "keys" if rows.keys else "images")
    raise UserError(f"{source}: expected .npz, .npy, {', '.join(_PICKLES)}, .jsonl, .zip or a folder of predictions")


def _answers(path: Path) -> Lookup:
    """Answers of an earlier run."""
    lines = [(number, parse_json(line, f"{path}, line {number}")) for number, line in read_lines(path)]
    found = {}
    try:
        for (_, line), answer in zip(lines, Answer.from_jsons([line for _, line in lines])):
            found[str(line["key"])] = answer
    except (UserError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected answers of chatpose eval ({type(error).__name__}: {error})") from None
    _check_once([str(line["key"]) for _, line in lines], path)
    return Lookup(lambda question: found.get(question.key, Answer(notes={MISSING: True})), found, "keys")


# Submissions to 3DPW's challenge -----------------------------------------------------------------------------------------------------------------


class _Submission:
    """Positions and orientations by sequence, actor and frame."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        for name, data in _pickles(source):
            sequence = name.rpartition("/")[2].removesuffix(".pkl")
            if sequence in self.arrays:
                raise UserError(f"{source}: the sequence {sequence} is there twice, the second time as {name}")
            self.arrays[sequence] = self._read(f"{source}: {name}", load_pickle(data, f"{source}: {name}"))
        if not self.arrays:
            raise UserError(
                f"{source}: expected answers.jsonl, or a submission to 3DPW's challenge with SEQUENCE.pkl for each sequence; found neither"
            )

    def _read(self, where: str, found: Any) -> dict[str, np.ndarray]:
        names = [name for name in _SUBMITTED if isinstance(found, Mapping) and name in found]
        if not names:
            raise UserError(
                f"{where}: expected a dictionary with {' or '.join(_SUBMITTED)}, as in a submission to 3DPW's challenge"
            )
        arrays = {}
        for name in names:
            shape = _SUBMITTED[name][1]
            array = _numbers(found[name], f"{where}: {name}")
            if array.ndim != 2 + len(shape) or array.shape[2:] != shape:
                raise UserError(
                    f"{where}: {name} must have the shape (P, N, {', '.join(map(str, shape))}), found {array.shape}"
                )
            arrays[name] = array
        if "jointPositions" in arrays:
            _check_metres(arrays["jointPositions"].reshape(-1, 24, 3), f"{where}: jointPositions")
        return arrays

    def __call__(self, question: Question) -> Answer:
        about = question.about
        if "actor" not in about or "frame" not in about:
            raise UserError(
                f"{self.source}: predictions by sequence, actor and frame fit the data set 3dpw, whose rows name them; "
                f"the row {question.key!r} does not"
            )
        actor, frame = int(about["actor"]), int(about["frame"])
        joints = {}
        for name, array in self.arrays.get(question.group, {}).items():
            if actor < array.shape[0] and frame < array.shape[1]:
                joints[_SUBMITTED[name][0]] = array[actor, frame].reshape(-1, 3)
        if not joints:
            return Answer(notes={MISSING: True})
        if not all(np.isfinite(points).all() for points in joints.values()):
            return Answer(notes={DAMAGED: True})
        return Answer(joints=joints)


def _pickles(source: Path) -> Iterable[tuple[str, bytes]]:
    """The pickles of a folder or zip, in the order of their names."""
    if source.is_dir():
        for path in sorted(source.rglob("*.pkl")):
            yield path.relative_to(source).as_posix(), read_bytes(path, MAX_MEMBER)
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for info in sorted(archive.infolist(), key=lambda each: each.filename):
                if not info.filename.endswith(".pkl") or info.filename.startswith("__MACOSX/"):
                    continue
                if info.file_size > MAX_MEMBER:
                    raise UserError(
                        f"{source}: {info.filename:.120} would unpack to {info.file_size:,} bytes; the limit is {MAX_MEMBER:,}"
                    )
                with archive.open(info) as member:
                    yield info.filename, member.read(MAX_MEMBER)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{source}: the zip is damaged or cut off ({error})") from None


# Arrays ------------------------------------------------------------------------------------------------------------------------------------------


class _Rows:
    """Poses or positions of N people, by ids of rows, or by image and person."""

    def __init__(self, source: Path, order: Path | None, frame: Frame) -> None:
        self.source = source
        columns = _columns(source)
        self.poses, self.joints, self.damaged = _poses(columns, source, frame)
        self.count = len(self.damaged)
        if order is not None:
            columns |= self._order(order)
        for name in ("key", "imgname", "person"):
            if name in columns and columns[name].shape != (self.count,):
                raise UserError(
                    f"{source}: {name} has the shape {columns[name].shape}, and there are {self.count:,} predictions"
                )
        self.boxes = _boxes(columns, self.count, source)
        self.people = _whole(columns["person"], source) if "person" in columns else None
        self.keys: dict[str, int] = {}
        self.images: dict[str, list[int]] = {}
        if "key" in columns:
            self.keys = {_text(key): row for row, key in enumerate(columns["key"])}
            _check_once(list(map(_text, columns["key"])), source)
        elif "imgname" in columns:
            self._by_image([_text(name) for name in columns["imgname"]])
        else:
            raise UserError(
                f"{source}: nothing says which rows its {self.count:,} predictions belong to. Expected key or imgname beside the poses, or the "
                "option names: the .npz of the data set that was predicted, or a text file with an id of a row in each line"
            )

    def _order(self, order: Path) -> Columns:
        """What names rows, from the file of the option names."""
        if order.suffix == ".npz":
            found = {
                name: array for name, array in _columns(order).items() if name in ("key", "imgname", "person", *_BOXES)
            }
        else:
            lines = read_bytes(order, MAX_MEMBER).decode("utf-8", "replace").splitlines()
            found = {"key": np.array([line.strip() for line in lines if line.strip()], object)}
        first = next((found[name] for name in ("key", "imgname") if name in found), None)
        if first is None or first.ndim != 1:
            raise UserError(f"{order}: expected imgname or key, with a name for each prediction")
        if len(first) != self.count:
            raise UserError(
                f"{order} names {len(first):,} rows, and {self.source} has {self.count:,} predictions; they must be of the same run"
            )
        return found

    def _by_image(self, names: Sequence[str]) -> None:
        """Names are compared by their last two parts. A name without a folder is known by its last part, if that is unique."""
        whole: dict[str, str] = {}
        self.single: dict[str, str] = {}
        for row, name in enumerate(names):
            tail = _tail(name, 2)
            self.images.setdefault(tail, []).append(row)
            if whole.setdefault(tail, name) != name:
                raise UserError(
                    f"{self.source}: the images {whole[tail]} and {name} differ in more than their last two parts"
                )
            last = _tail(name, 1)
            self.single[last] = tail if self.single.get(last, tail) == tail else ""
        self.bare = next((name for name in names if "/" not in _tail(name, 2)), "")

    def __call__(self, question: Question) -> Answer:
        if self.keys:
            row = self.keys.get(question.key)
            return Answer(notes={MISSING: True}) if row is None else self._answer(row)
        image, number = _image_of(question)
        if not image:
            raise UserError(
                f"{self.source}: predictions by image do not fit the row {question.key!r}, which names no image; give key instead"
            )
        rows = self._rows_of(image)
        if not rows:
            return Answer(notes={MISSING: True})
        if self.boxes is not None and "bbox" in question.about:
            return self._people(rows)
        if self.boxes is not None and "box" in question.about:
            found = best_overlap(self.boxes[rows], person_box(question.about, question.key))
            return Answer(notes={MISSING: True}) if found is None else self._answer(rows[found])
        if number is None:
            if len(rows) > 1:
                raise UserError(
                    f"{self.source}: {image} has {len(rows)} predictions, and nothing says which is the one of the row {question.key!r}; give boxes"
                )
            return self._answer(rows[0])
        if self.people is None and "actor" in question.about:
            raise UserError(
                f"{self.source}: rows such as {question.key!r} count the people of a sequence, and the file those of an image; "
                "give person (the number of the actor) or boxes"
            )
        given = self.people[rows].tolist() if self.people is not None else list(range(len(rows)))
        return self._answer(rows[given.index(number)]) if number in given else Answer(notes={MISSING: True})

    def _rows_of(self, image: str) -> list[int]:
        """The predictions of an image, in the order of the file. Raises UserError where a name could mean several images."""
        tail = _tail(image, 2)
        if "/" in tail:
            if self.bare:
                raise UserError(
                    f"{self.source}: the image {self.bare} has no folder in its name, and images of several folders have the same name here, "
                    f"such as {tail}; name images with their folder"
                )
            return self.images.get(tail, [])
        if self.single.get(tail) == "":
            raise UserError(f"{self.source}: several folders have an image {tail}, and the rows do not name a folder")
        return self.images.get(self.single.get(tail, ""), [])

    def _answer(self, row: int) -> Answer:
        if self.damaged[row]:
            return Answer(notes={DAMAGED: True})
        if self.poses is None:
            return Answer(joints={name: points[row] for name, points in self.joints.items()})
        return Answer(pose=_one(self.poses, row))

    def _people(self, rows: Sequence[int]) -> Answer:
        """All people of an image that have a pose, for a task that looks for one of them."""
        kept = [row for row in rows if not self.damaged[row]]
        assert self.boxes is not None
        if self.poses is None:
            raise UserError(
                f"{self.source}: has positions and no poses; rows that ask for one of several people need poses"
            )
        if not kept:
            return Answer(notes={DAMAGED: True})
        return Answer(pose=self.poses[kept], boxes=self.boxes[kept])


def _columns(source: Path) -> Columns:
    """The arrays of a file, by the names that are used here."""
    if source.suffix == ".npy":
        try:
            return {"": np.load(source, allow_pickle=False)}
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{source}: expected an .npy of numbers ({error})") from None
    if source.suffix == ".npz":
        found: Any = {name: _inner(array) for name, array in load_npz(source).items()}
    else:
        found = load_pickle(read_bytes(source, MAX_FILE), source, MAX_FILE)
    if isinstance(found, Mapping) and found and all(isinstance(name, str) and _IMAGE.search(name) for name in found):
        found = [
            {**_flat(person, source), "imgname": image}
            for image, people in found.items()
            for person in (people if isinstance(people, list | tuple) else [people])
        ]
    if isinstance(found, list | tuple):
        return _stacked([_flat(person, source) for person in found], source)
    return {name: np.asarray(value) for name, value in _flat(found, source).items()}


def _inner(array: np.ndarray) -> Any:
    """What an array of one Python object holds."""
    return array.item() if array.dtype == object and array.ndim == 0 else array


def _flat(found: Any, source: Path) -> dict[str, Any]:
    """One dictionary of arrays, without those that stand inside another, by the names that are used here."""
    if not isinstance(found, Mapping):
        raise UserError(
            f"{source}: expected a dictionary of arrays, or a list of such for each person; found {type(found).__name__}"
        )
    whole = {str(name): value for name, value in found.items() if name not in NESTED or not isinstance(value, Mapping)}
    for name in NESTED:
        if isinstance(found.get(name), Mapping):
            whole = {**{str(inner): value for inner, value in found[name].items()}, **whole}
    return {
        ALIASES.get(name, name): value
        for name, value in whole.items()
        if name not in ALIASES or ALIASES[name] not in whole
    }


def _stacked(people: Sequence[Mapping[str, Any]], source: Path) -> Columns:
    if not people:
        raise UserError(f"{source}: holds no predictions")
    names = [name for name in people[0] if all(name in person for person in people)]
    if lost := {name for person in people for name in person} & {
        "matrices",
        "pose",
        "poses",
        "body_pose",
        "global_orient",
        "betas",
    } - set(names):
        raise UserError(f"{source}: {', '.join(sorted(lost))} is there for some people and not for others")
    columns = {}
    for name in names:
        values = [np.asarray(person[name]) for person in people]
        if len({value.shape for value in values}) == 1 and values[0].dtype != object:
            columns[name] = np.stack(values)
    return columns


def _poses(columns: Columns, source: Path, frame: Frame) -> tuple[Pose | None, dict[str, np.ndarray], np.ndarray]:
    """Poses (N,), or positions where there are none, and (N,) bool, which of them are not finite."""
    try:
        shape = poses_in(columns, source)
    except PoseFileError as error:
        joints = {
            name: _numbers(columns[key], f"{source}: {key}")[:, places]
            for key, (name, places) in JOINTS.items()
            if key in columns and columns[key].ndim == 3 and columns[key].shape[1:] == (len(places), 3)
        }
        if not joints or columns.keys() & _POSED:
            raise UserError(str(error)) from None
        if len({len(points) for points in joints.values()}) > 1:
            raise UserError(f"{source}: {', '.join(joints)} differ in the number of people") from None
        for name, points in joints.items():
            _check_metres(points, f"{source}: {name}")
        finite = [np.isfinite(points).all((1, 2)) for points in joints.values()]
        return None, joints, ~np.logical_and.reduce(finite)
    count = len(shape)
    damaged = np.zeros(count, bool)
    cleaned = dict(columns)
    for name in (*shape.names, *(each for each in ("betas", "shape") if each in columns)):
        rows = np.array(columns[name], np.float64).reshape(-1, *columns[name].shape[len(shape.shape) :])
        if len(rows) == count and not np.isfinite(rows).all():
            if name in shape.names and shape.kind == "axis-angle":
                _no_turns(rows)
            bad = ~np.isfinite(rows.reshape(count, -1)).all(1)
            rows[bad] = np.eye(3) if shape.kind == "matrices" and name in shape.names else 0
            damaged |= bad
            cleaned[name] = rows.astype(np.float32)
    if shape.kind == "axis-angle":
        _check_radians([np.asarray(cleaned[name], np.float64) for name in shape.names], source)
    try:
        file = poses_in(cleaned, source, shape.frame or frame)
        return file[:], {}, damaged
    except PoseFileError as error:
        raise UserError(str(error)) from None


def _check_metres(points: np.ndarray, where: str) -> None:
    """Raises UserError where most bodies (N, K, 3) are larger than ``TALLEST``. Bodies of zeros, as submissions have them, do not count."""
    sizes = np.ptp(points, axis=1).max(-1)
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if len(sizes) and np.median(sizes) > TALLEST:
        raise UserError(
            f"{where}: expected metres; half of the bodies are larger than {np.median(sizes):.0f}. Divide millimetres by 1000"
        )


def _check_radians(arrays: Sequence[np.ndarray], source: Path) -> None:
    """Raises UserError for axis-angle vectors that turn further than ``MOST_RADIANS``, as rows of ``jsonlines`` may not."""
    largest = max(np.linalg.norm(array.reshape(-1, 3), axis=1).max(initial=0) for array in arrays)
    if largest > MOST_RADIANS:
        raise UserError(
            f"{source}: expected rotations as axis-angle vectors in radians, found one of {largest:.3g}, "
            "probably in degrees; multiply degrees by π/180"
        )


def _no_turns(rows: np.ndarray) -> None:
    """Sets joints whose three numbers are all NaN to zero. SPIN writes the identity so: its conversion to axis-angle divides by the angle."""
    angles = rows.reshape(len(rows), -1, 3)
    angles[np.isnan(angles).all(-1)] = 0


def _one(poses: Pose, row: int) -> Pose:
    """One pose of a batch, without betas or a place that it does not have."""
    fields: dict[str, Any] = {}
    for name in ("betas", "translation"):
        values, has = getattr(poses, name), getattr(poses, f"has_{name}")
        if values is not None and (has is None or bool(has[row])):
            fields[name] = values[row]
    if poses.measured is not None:
        fields["measured"] = poses.measured[row]
    space = poses.shape_space if "betas" in fields else None
    return Pose(poses.rotations[row], poses.frame, shape_space=space, **fields)


# Boxes and names ---------------------------------------------------------------------------------------------------------------------------------

_BOXES = ("boxes", "bbox", "box_center", "box_size", "center", "scale")


def _boxes(columns: Columns, count: int, source: Path) -> np.ndarray | None:
    """(N, 4) left, top, width, height in pixels, or None. A ``bbox`` of zeros, a placeholder, gives way to the other forms."""
    if "bbox" in columns and (found := _shaped(columns["bbox"], (count, 4), f"{source}: bbox"))[:, 2:].any():
        return found
    if "boxes" in columns:
        corners = _shaped(columns["boxes"], (count, 4), f"{source}: boxes")
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    for center, size in (("box_center", "box_size"), ("center", "scale")):
        if center in columns and size in columns:
            middle = _shaped(columns[center], (count, 2), f"{source}: {center}")
            side = _numbers(columns[size], f"{source}: {size}")
            if side.shape not in ((count,), (count, 1), (count, 2)):
                raise UserError(f"{source}: {size} must have the shape ({count},) or ({count}, 2), found {side.shape}")
            if size == "scale" and np.median(side) < SMALLEST:
                side = 200 * side
            sides = np.broadcast_to(side.reshape(count, -1), (count, 2))
            return np.concatenate([middle - sides / 2, sides], 1)
    return None


def _image_of(question: Question) -> tuple[str, int | None]:
    """The image of a question and the number of its person, "" and None where they are not told."""
    if "image" in question.about:
        return str(question.about["image"]), None
    name, mark, number = question.key.rpartition("#")
    if mark and number.isdecimal():
        return name, int(number)
    return (question.key, None) if _IMAGE.search(question.key) else ("", None)


def _tail(name: str, parts: int) -> str:
    return "/".join(re.split(r"[/\\]", name)[-parts:])


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _whole(array: np.ndarray, source: Path) -> np.ndarray:
    found = _numbers(array, f"{source}: person")
    if not np.isfinite(found).all() or (found != np.round(found)).any():
        raise UserError(f"{source}: person must be whole numbers")
    return found.astype(np.int64)


def _shaped(array: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    found = _numbers(array, where)
    if found.shape != shape:
        raise UserError(f"{where} must have the shape {shape}, found {found.shape}")
    return found


def _check_once(keys: Sequence[str], source: Path) -> None:
    """Raises UserError for ids of rows that are there twice."""
    if twice := [key for key, count in collections.Counter(keys).items() if count > 1]:
        more = f", and {len(twice) - 1:,} more are" if len(twice) > 1 else ""
        raise UserError(f"{source}: the id {twice[0]!r} of a row is there twice{more}; one prediction belongs to a row")


def _numbers(value: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected numbers, in one shape") from None


def _hash(source: Path) -> str:
    """Of the contents of a file, or of a folder's files and their names."""
    digest = hashlib.blake2b(digest_size=16)
    paths = (
        [source]
        if source.is_file()
        else sorted(path for path in source.rglob("*") if path.suffix in (".pkl", ".jsonl"))
    )
    for path in paths:
        name = "" if source.is_file() else path.relative_to(source).as_posix()
        digest.update(json.dumps([name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while data := file.read(2**20):
                digest.update(data)
    return digest.hexdigest()
