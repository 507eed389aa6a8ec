"""PoseScript: descriptions of poses of AMASS, by people and by rules."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.amass import OPTION, Amass, Place, place_of, to_view, yaw_of
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

    ``extras``: ``pose_id`` (int), ``version`` ("v1" or "v2", the release of the id), ``frame`` (int, of the AMASS file), ``human``
    and ``automatic`` (all captions of the pose, tuples of strings).

    Options:
        amass: the folder of AMASS; by default ``AMASS`` in the source folder. smplx: read SMPL-X files where SMPL-H files are not there
            (``readers.amass``).
        version: "v1" or "v2"; "auto" is the one that is there.
        captions: "human-first" is the paper's rule: one by a person where there is one, else one of the automatic ones. "coin-flip" is that
            of the code which the authors released: where there are both, each has probability ½. "human" and "automatic" take one kind only.
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
        self.release = Release(ABOUT, source, version)
        self.amass = Amass.open(ABOUT, source, amass, smplx)
        self._plans: dict[Split, list[list[tuple[str, Place | Skipped]]]] = {}

    def parts(self, split: Split) -> Sequence[int]:
        """Numbers, one for each ``FILES_A_PART`` files of AMASS in the order of their names."""
        return range(len(self._plan(split)))

    def read(self, split: Split, part: int) -> Iterator[Record | Skipped]:
        """The poses of some files of AMASS, by file and frame."""
        rows = self._plan(split)[part]
        poses = self.amass.read(place for _, place in rows)
        for key, place in rows:
            pose = poses[place]
            if isinstance(pose, Skipped):
                yield dataclasses.replace(pose, key=key)
            else:
                assert isinstance(place, Place)
                yield self._record(split, key, place, pose)

    def _plan(self, split: Split) -> list[list[tuple[str, Place | Skipped]]]:
        if split not in self._plans:
            rows = [(key, self.release.place(key)) for key in self.release.split(split)]
            self._plans[split] = in_parts(rows, lambda row: row[1])
        return self._plans[split]

    def _record(self, split: Split, key: str, place: Place, pose: Pose) -> Record | Skipped:
        try:
            captions = self.release.captions(key)
        except UserError as error:
            return Skipped(key, "a caption is not text", True, f"{error}")
        talks = []
        for variant in range(self.variants if split == "train" else 1):
            rng = seeded(self.seed, "posescript", key, variant)
            caption = draw_text(rng, _ORDER[self.captions], captions)
            if caption is None:
                return Skipped(key, "no caption of the chosen kind")
            question = pick(rng, questions.TEXT_TO_POSE).format(caption=caption)
            talks.append(exchange(question, pick(rng, questions.POSE_ANSWERS)))
        extras: dict[str, Any] = {"pose_id": int(key), "version": self.release.version, "frame": place.frame}
        return Record(
            key,
            "text",
            tuple(talks),
            poses=stack([to_view(pose, yaw_of(pose))]),
            group=place.file,
            extras=extras | captions,
        )


class Tables:
    """JSON files of a folder. Each process reads them when it needs them, and once."""

    def __init__(self, about: About, folder: Path, names: Sequence[str]) -> None:
        """Raises UserError that lists those of the files `names` which are not there."""
        self.folder = folder
        self._found: dict[str, Mapping[str, Any]] = {}
        if absent := [folder / name for name in names if not (folder / name).is_file()]:
            raise missing(about, *absent)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": {}}

    def table(self, name: str) -> Mapping[str, Any]:
        """A file of values by id; a list counts its values from 0. Raises UserError for another file."""
        if name not in self._found:
            found = read_json(self.folder / name)
            if isinstance(found, list):
                found = {str(number): value for number, value in enumerate(found)}
            if not isinstance(found, dict):
                raise UserError(f"{self.folder / name}: expected values by id, found a {type(found).__name__}")
            self._found[name] = found
        return self._found[name]

    def ids(self, name: str) -> list[str]:
        """A list of ids, as digits, each once. Raises UserError for another file."""
        found = read_json(self.folder / name)
        if not isinstance(found, list):
            raise UserError(f"{self.folder / name}: expected a list of ids, found a {type(found).__name__}")
        return list(dict.fromkeys(id_of(each, self.folder / name) for each in found))

    def place_in(self, name: str, key: str) -> Place | Skipped:
        """The place of a pose in a file of places by id; or, where there is none, why."""
        entry = self.table(name).get(key)
        if entry is None:
            return Skipped(key, "no pose of this id", True, f"{self.folder / name}: no pose {key}")
        try:
            return place_of(entry)
        except UserError as error:
            return Skipped(key, "the place of a pose is damaged", True, f"{self.folder / name}: pose {key}: {error}")

    def texts(self, names: Sequence[str], key: str) -> tuple[str, ...]:
        """The texts of an id in files that have one string or a list of strings for each. Empty ones are left out, white space becomes one space,
        and each ends with a mark. Raises UserError for other values."""
        found = []
        for name in names:
            value = self.table(name).get(key, [])
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str):
                    where = f"{self.folder / name}, id {key}"
                    raise UserError(f"{where}: expected text or a list of texts; found {value!r:.100}")
                if words := " ".join(text.split()):
                    found.append(words if words[-1] in ".!?" else f"{words}.")
        return tuple(found)


class Release(Tables):
    """The files of a release of PoseScript, in a folder or in the folder ``posescript_release`` of it."""

    def __init__(self, about: About, source: Path, version: Version = "auto") -> None:
        """Raises UserError where files are not there, or where there are two releases and none is chosen."""
        folder = subfolder(source, FOLDER)
        there = [name for name, files in RELEASES.items() if (folder / files.places).is_file()]
        if version == "auto" and not there:
            raise missing(about, *(folder / files.places for files in RELEASES.values()))
        if version == "auto" and len(there) > 1:
            raise UserError(f"{folder} has both releases of PoseScript: choose one, --set version=v1 or version=v2")
        self.version = there[0] if version == "auto" else version
        self.files = RELEASES[self.version]
        super().__init__(about, folder, self.files.all())

    def split(self, split: Split) -> list[str]:
        """The ids of a split."""
        return self.ids(self.files.split.format(split))

    def place(self, key: str) -> Place | Skipped:
        """The place of a pose; or, where there is none, why."""
        return self.place_in(self.files.places, key)

    def captions(self, key: str) -> dict[str, tuple[str, ...]]:
        """All captions of a pose, under "human" and "automatic"; maybe none. Raises UserError where one is not text."""
        return {"human": self.texts(self.files.human, key), "automatic": self.texts(self.files.automatic, key)}


def subfolder(source: Path, name: str) -> Path:
    """The folder of this name in a folder, which the archive unpacks to; or the folder itself, where there is none."""
    return source / name if (source / name).is_dir() else source


def id_of(value: Any, where: object) -> str:
    """An id, which files write as a number or as its digits, as digits. Raises UserError for anything else."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch("0|[1-9][0-9]{0,8}", text):
        raise UserError(f"{where}: expected an id, a whole number from 0 on; found {value!r:.100}")
    return text


def in_parts(rows: Iterable[Row], place: Callable[[Row], Place | Skipped]) -> list[list[Row]]:
    """Rows in the order of their files and frames, in parts of ``FILES_A_PART`` files. Rows without a place come first."""

    def order(row: Row) -> tuple[str, int]:
        found = place(row)
        return found if isinstance(found, Place) else ("", -1)

    ordered = sorted(rows, key=order)  # stable
    files = [list(group) for _, group in itertools.groupby(ordered, lambda row: order(row)[0])]
    return [list(itertools.chain(*files[at : at + FILES_A_PART])) for at in range(0, len(files), FILES_A_PART)]


def draw_text(
    rng: np.random.Generator, orders: Sequence[Sequence[str]], texts: Mapping[str, Sequence[str]]
) -> str | None:
    """One text: an order is drawn, and of its first kind that has texts, one; None where it has none."""
    order = orders[int(rng.integers(len(orders)))]
    return next((pick(rng, texts[kind]) for kind in order if texts[kind]), None)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of several."""
    return options[int(rng.integers(len(options)))]


def exchange(question: str, answer: str) -> tuple[dict[str, Any], ...]:
    """One turn of a conversation."""
    return {"role": "user", "content": question}, {"role": "assistant", "content": answer}
