"""PoseScript: descriptions of poses of AMASS, by people and by rules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.amass import OPTION, Amass, Place, to_view, yaw
from chatpose_jax.data.readers.amass import place as amass_place
from chatpose_jax.data.readers.untrusted import read_json
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, stack

Version = Literal["auto", "v1", "v2"]
Captions = Literal["human-first", "coin-flip", "human", "automatic"]
FOLDER = "posescript_release"
FILES_A_PART = 64  # AMASS files
_ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "human-first": (("human", "automatic"),),
    "coin-flip": (("human", "automatic"), ("automatic", "human")),
    "human": (("human",),),
    "automatic": (("automatic",),),
}
"""Rule of captions -> orders of kinds, of which one is drawn."""
Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class _Files:
    """The names of a release. Places, human and automatic captions have string ids as keys; split is a list of ids."""

    places: str
    human: tuple[str, ...]
    automatic: tuple[str, ...]
    split: str

    def all(self) -> tuple[str, ...]:
        return (self.places, *self.human, *self.automatic, *(self.split.format(s) for s in ("train", "val", "test")))


RELEASES: dict[str, _Files] = {
    "v1": _Files(
        "ids_2_dataset_sequence_and_frame_index.json",
        ("human6293.json",),
        tuple(f"automatic_{letter}.json" for letter in "ABCDEF"),
        "{}_ids.json",
    ),
    "v2": _Files(
        "ids_2_dataset_sequence_and_frame_index_100k.json",
        ("posescript_human_6293.json",),
        ("posescript_auto_100k.json",),
        "{}_ids_100k.json",
    ),
}
ABOUT = About(
    title="PoseScript",
    licence="CC BY-NC-SA 4.0, not for commercial use",
    page="https://github.com/naver/posescript",
    files=(
        f"the JSON files of V2 (posescript_release_v2.zip), or of V1 (posescript_dataset_release.zip), or a folder {FOLDER} of them",
    ),
    options=(OPTION,),
)


class PoseScript:
    """Reads PoseScript V1 (20,000 poses; the release that ChatPose was trained on) or V2 (100,000). One row gives a caption and asks for the pose.

    Poses are those of AMASS, of SMPL-H, in the camera frame and without yaw: the root is Rz(θz) Ry(θy) Rx(θx) in AMASS's z-up frame, θz is set
    to 0, and Rx(+90°) follows. SMPL's rigid hands, and feet and fingers that AMASS has filled in, are not measured. There are no betas.
    ``group`` is the AMASS file (``readers.amass.file_name``).

    ``extras``: ``pose_id`` (int), ``frame`` (int, of the AMASS file). In "val" and "test" also ``human`` and ``automatic``: all captions of the
    pose, tuples of strings.

    Options:
        amass: the folder of AMASS; by default ``AMASS`` in the source folder. smplx: read SMPL-X files where SMPL-H files are not there
            (``readers.amass``).
        version: "v1" or "v2"; "auto" is the one that is there.
        captions: "human-first" is the paper's rule: one by a person where there is one, else one of the automatic ones. "coin-flip" is that
            of the code which the authors released: where there are both, each has half. "human" and "automatic" take one kind only.
        variants: rows for each pose of "train", with different draws of caption, question and answer. "val" and "test" have one.
        seed: of the draws.

    Source: the repositories naver/posescript (``src/text2pose/{data,utils,config}.py``) and yfeng95/PoseGPT (``utils/posescript_dataset.py``).
    """

    about: ClassVar[About] = ABOUT

    def __init__(
        self,
        source: Path,
        *,
        amass: str = "",
        smplx: bool = False,
        version: Version = "auto",
        captions: Captions = "human-first",
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        self.captions, self.variants, self.seed = captions, whole("variants", variants, 1), seed
        self.release = Release.open(ABOUT, source, version)
        self.amass = Amass.open(ABOUT, source, amass, smplx)

    def parts(self, split: Split) -> Sequence[int]:
        """Numbers, one for each ``FILES_A_PART`` files of AMASS in the order of their names."""
        return range(len(self.release.parts(split)))

    def read(self, split: Split, part: int) -> Iterator[Record | Skipped]:
        """The poses of some files of AMASS, by file and frame."""
        rows = self.release.parts(split)[part]
        poses = self.amass.read(place for _, place in rows)
        for key, place in rows:
            pose = poses[place]
            if isinstance(pose, Skipped):
                yield dataclasses.replace(pose, key=key)
            else:
                assert isinstance(place, Place)
                yield self._record(split, key, place, pose)

    def _record(self, split: Split, key: str, place: Place, pose: Pose) -> Record | Skipped:
        try:
            captions = self.release.captions(key)
        except UserError as error:
            return Skipped(key, "a caption is not text", True, f"{error}")
        talks = []
        for variant in range(self.variants if split == "train" else 1):
            rng = seeded(self.seed, "posescript", key, variant)
            caption = draw(rng, _ORDER[self.captions], captions)
            if caption is None:
                return Skipped(key, "no caption of the chosen kind")
            question = pick(rng, questions.TEXT_TO_POSE).format(caption=caption)
            talks.append(turn(question, pick(rng, questions.POSE_ANSWERS)))
        extras: dict[str, Any] = {"pose_id": int(key), "frame": place.frame}
        return Record(
            key,
            "text",
            tuple(talks),
            poses=stack([to_view(pose, yaw(pose))]),
            group=place.file,
            extras=extras if split == "train" else extras | captions,
        )


@dataclasses.dataclass(frozen=True)
class Release:
    """The files of a release of PoseScript. Each process reads them when it needs them, and keeps them."""

    folder: Path
    version: str

    @classmethod
    def open(cls, about: About, source: Path, version: Version = "auto") -> Release:
        """The release in a folder, or in the folder ``posescript_release`` of it. Raises UserError where files are not there."""
        read_table.cache_clear()  # the files may have changed since
        _parts.cache_clear()
        folder = source / FOLDER if (source / FOLDER).is_dir() else source
        there = [name for name, files in RELEASES.items() if (folder / files.places).is_file()]
        if version == "auto":
            if not there:
                raise missing(about, *(folder / files.places for files in RELEASES.values()))
            if len(there) > 1:
                raise UserError(
                    f"{folder} has both releases of PoseScript: choose one, --set version=v1 or --set version=v2"
                )
            (version,) = there  # type: ignore[assignment]
        need(about, folder, RELEASES[version].all())
        return cls(folder, version)

    def place(self, key: str) -> Place | Skipped:
        """The place of a pose; or, where there is none, why."""
        return place_of(self.folder / RELEASES[self.version].places, key)

    def parts(self, split: Split) -> list[list[tuple[str, Place | Skipped]]]:
        """The ids of a split with their places, in parts."""
        return _parts(self, split)

    def captions(self, key: str) -> dict[str, tuple[str, ...]]:
        """All captions of a pose, under "human" and "automatic"; maybe none. Raises UserError where one is not text."""
        files = RELEASES[self.version]
        kinds = {"human": files.human, "automatic": files.automatic}
        return {kind: texts_of([self.folder / name for name in names], key) for kind, names in kinds.items()}


@functools.lru_cache(maxsize=4)
def _parts(release: Release, split: Split) -> list[list[tuple[str, Place | Skipped]]]:
    rows = [
        (key, release.place(key)) for key in read_ids(release.folder / RELEASES[release.version].split.format(split))
    ]
    return in_parts(rows, lambda row: row[1])


def in_parts(rows: Iterable[Row], place: Callable[[Row], Place | Skipped]) -> list[list[Row]]:
    """Rows in the order of their files, frames and ids, in parts of ``FILES_A_PART`` files. Rows without a place come first."""

    def order(row: Row) -> tuple[str, int]:
        found = place(row)
        return found if isinstance(found, Place) else ("", -1)

    ordered = sorted(rows, key=order)  # stable
    files = [list(group) for _, group in itertools.groupby(ordered, lambda row: order(row)[0])]
    return [list(itertools.chain(*files[at : at + FILES_A_PART])) for at in range(0, len(files), FILES_A_PART)]


def place_of(path: Path, key: str) -> Place | Skipped:
    """The place of a pose in a table of places; or, where there is none, why."""
    entry = read_table(path).get(key)
    if entry is None:
        return Skipped(key, "no pose of this id", True, f"{path}: no pose {key}")
    try:
        return amass_place(entry)
    except UserError as error:
        return Skipped(key, "the place of a pose is damaged", True, f"{path}: pose {key}: {error}")


def need(about: About, folder: Path, names: Sequence[str]) -> None:
    """Raises UserError that lists the files which are not in a folder."""
    absent = [folder / name for name in names if not (folder / name).is_file()]
    if absent:
        raise missing(about, *absent)


@functools.lru_cache(maxsize=16)
def read_table(path: Path) -> Mapping[str, Any]:
    """A JSON file of values by id; a list counts its values from 0. Read once. Raises UserError for another file."""
    found = read_json(path)
    if isinstance(found, list):
        return {str(number): value for number, value in enumerate(found)}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a table of values by id, found a {type(found).__name__}")
    return found


def read_ids(path: Path) -> list[str]:
    """A JSON list of ids, as digits, each once. Raises UserError for another file."""
    found = read_json(path)
    if not isinstance(found, list):
        raise UserError(f"{path}: expected a list of ids, found a {type(found).__name__}")
    return list(dict.fromkeys(id_of(each, path) for each in found))


def id_of(value: Any, where: object) -> str:
    """An id, which files write as a number or as its digits, as digits. Raises UserError for anything else."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
        raise UserError(f"{where}: expected an id, a whole number from 0 on; found {value!r:.100}")
    return text


def texts_of(paths: Sequence[Path], key: str) -> tuple[str, ...]:
    """The texts of an id in files that hold one string or a list of strings for each. Empty ones are left out, white space becomes one space, and
    each ends with a mark. Raises UserError for other values."""
    found = []
    for path in paths:
        value = read_table(path).get(key, [])
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise UserError(f"{path}: expected text or a list of texts for id {key}; found {value!r:.100}")
            if words := " ".join(text.split()):
                found.append(words if words[-1] in ".!?" else f"{words}.")
    return tuple(found)


def draw(rng: np.random.Generator, orders: Sequence[Sequence[str]], texts: Mapping[str, Sequence[str]]) -> str | None:
    """One text: an order is drawn, and of its first kind that has texts, one; None where it has none."""
    order = orders[int(rng.integers(len(orders)))]
    return next((pick(rng, texts[kind]) for kind in order if texts[kind]), None)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of several."""
    return options[int(rng.integers(len(options)))]


def turn(question: str, answer: str) -> tuple[dict[str, Any], ...]:
    """One turn of a conversation."""
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}
