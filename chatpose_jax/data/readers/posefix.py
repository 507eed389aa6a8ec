"""PoseFix: two poses of AMASS, and how to get from the first to the second in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped
from chatpose_jax.data.readers.amass import OPTION, Amass, Place, to_view, yaw_of
from chatpose_jax.data.readers.posescript import Release, Tables, draw_text, exchange, id_of, in_parts, pick, subfolder
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.data.synthetic import captions
from chatpose_jax.errors import UserError
from chatpose_jax.settings import whole
from smpl_jax.pose import Pose, stack, to_family, to_frame

Texts = Literal["human-first", "human", "human-or-paraphrase", "automatic"]
Pairs = Literal["all", "in", "out"]
FOLDER = "posefix_release"
_PLACES = "ids_2_dataset_sequence_and_frame_index_100k.json"
_PAIRS = "pair_id_2_pose_ids.json"
_SPLIT = "{}_{}_sequence_pair_ids.json"
_KINDS = {
    "human": "posefix_human_6157.json",
    "paraphrases": "posefix_paraphrases_4284.json",
    "automatic": "posefix_auto_135305.json",
}
_ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "human-first": (("human", "paraphrases", "automatic"),),
    "human": (("human",),),
    "human-or-paraphrase": (("human", "paraphrases"), ("paraphrases", "human")),
    "automatic": (("automatic",),),
}
"""Rule of texts -> orders of kinds, of which one is drawn."""
_ALL = (
    _PLACES,
    _PAIRS,
    *_KINDS.values(),
    *(_SPLIT.format(s, k) for s in ("train", "val", "test") for k in ("in", "out")),
)


class Pair(NamedTuple):
    """A pair of poses: ids of the pair and of the poses, and their places."""

    key: str
    poses: tuple[str, str]
    first: Place | Skipped
    second: Place | Skipped


class PoseFix:
    """Reads PoseFix. A row has two turns: a description of the first pose, which is answered with it, and then the change in words, which is
    answered with the second pose.

    A model does not see the numbers of an earlier answer. So the first pose must be described in words, and PoseFix describes only changes:
    the description is a caption of PoseScript V2, whose poses these are (option ``posescript``); without it, one by this package's rules
    (``data.synthetic.captions``).

    Poses are as PoseScript's. Where both poses are of one AMASS file, the yaw of the first is removed from both, so that turns of the body stay.
    ``group`` is the AMASS file of the second pose.

    ``extras``: ``pair_id`` (int), ``pose_ids`` ((2,) int64), ``in_sequence`` (bool, both poses are of one AMASS file), ``first_group`` (the
    AMASS file of the first pose). In "val" and "test" also ``human``, ``paraphrases`` and ``automatic``: all texts of the change, tuples of
    strings.

    Options:
        amass, smplx: as PoseScript's.
        posescript: the folder of PoseScript V2.
        pairs: "in" and "out" take only the pairs that are listed as in-sequence or out-of-sequence.
        captions: of the change. "human-first" is one by a person, or else a paraphrase of one, or else an automatic one;
            "human-or-paraphrase" has half of each. "human" and "automatic" take one kind only.
        variants: rows for each pair of "train", with different draws. "val" and "test" have one.
        seed: of the draws.

    Source: the repository naver/posescript (``src/text2pose/{data,utils,config}.py``).
    """

    about: ClassVar[About] = About(
        title="PoseFix",
        licence="CC BY-NC-SA 4.0, not for commercial use",
        page="https://github.com/naver/posescript",
        files=(f"the JSON files of posefix_dataset_release.zip, or a folder {FOLDER} of them",),
        options=(
            OPTION,
            "--set posescript=FOLDER is PoseScript V2, whose captions describe the first poses (not necessary)",
        ),
    )

    def __init__(
        self,
        source: Path,
        *,
        amass: str = "",
        smplx: bool = False,
        posescript: str = "",
        pairs: Pairs = "all",
        captions: Texts = "human-first",
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        self.tables = Tables(self.about, subfolder(source, FOLDER), _ALL)
        self.pairs, self.captions = pairs, captions
        self.variants, self.seed = whole("variants", variants, 1), seed
        self.descriptions = Release(self.about, Path(posescript).expanduser(), "v2") if posescript else None
        self.amass = Amass.open(self.about, source, amass, smplx)
        self._plans: dict[Split, list[list[Pair]]] = {}

    def parts(self, split: Split) -> Sequence[int]:
        """Numbers, one for some files of AMASS in the order of the names of the second poses' files."""
        return range(len(self._plan(split)))

    def read(self, split: Split, part: int) -> Iterator[Record | Skipped]:
        """The pairs of a part, by file and frame of the second pose."""
        pairs = self._plan(split)[part]
        poses = self.amass.read(place for pair in pairs for place in (pair.first, pair.second))
        for pair in pairs:
            first, second = poses[pair.first], poses[pair.second]
            if isinstance(first, Skipped):
                yield dataclasses.replace(first, key=pair.key)
            elif isinstance(second, Skipped):
                yield dataclasses.replace(second, key=pair.key)
            else:
                yield self._record(split, pair, first, second)

    def _plan(self, split: Split) -> list[list[Pair]]:
        if split not in self._plans:
            kinds = ("in", "out") if self.pairs == "all" else (self.pairs,)
            keys = dict.fromkeys(key for kind in kinds for key in self.tables.ids(_SPLIT.format(split, kind)))
            self._plans[split] = in_parts(map(self._pair, keys), lambda pair: pair.second)
        return self._plans[split]

    def _pair(self, key: str) -> Pair:
        entry, where = self.tables.table(_PAIRS).get(key), f"{self.tables.folder / _PAIRS}, pair {key}"
        try:
            if not isinstance(entry, list) or len(entry) != 2:
                raise UserError(f"{where}: expected the ids of two poses; found {entry!r:.100}")
            first, second = (id_of(each, where) for each in entry)
        except UserError as error:
            fault = Skipped(key, "a pair is damaged", True, f"{error}")
            return Pair(key, ("", ""), fault, fault)
        places = (self.tables.place_in(_PLACES, each) for each in (first, second))
        return Pair(key, (first, second), *places)

    def _record(self, split: Split, pair: Pair, first: Pose, second: Pose) -> Record | Skipped:
        a, b, key = pair.first, pair.second, pair.key
        assert isinstance(a, Place) and isinstance(b, Place)
        in_sequence = a.file == b.file
        poses = stack([to_view(first, yaw_of(first)), to_view(second, yaw_of(first if in_sequence else second))])
        try:
            changes = {kind: self.tables.texts([name], key) for kind, name in _KINDS.items()}
            known = self.descriptions.captions(pair.poses[0]) if self.descriptions else {}
        except UserError as error:
            return Skipped(key, "a caption is not text", True, f"{error}")
        talks = []
        for variant in range(self.variants if split == "train" else 1):
            rng = seeded(self.seed, "posefix", key, variant)
            change = draw_text(rng, _ORDER[self.captions], changes)
            if change is None:
                return Skipped(key, "no text of the chosen kind")
            start = draw_text(rng, (("human", "automatic"),), known) if known else described(rng, poses[0])
            if start is None:
                return Skipped(key, "PoseScript has no caption of the first pose")
            talks.append(
                exchange(pick(rng, questions.TEXT_TO_POSE).format(caption=start), pick(rng, questions.POSE_ANSWERS))
                + exchange(pick(rng, questions.CHANGES).format(change=change), pick(rng, questions.EDIT_ANSWERS))
            )
        extras: dict[str, Any] = {
            "pair_id": int(key),
            "pose_ids": np.array(pair.poses, np.int64),
            "in_sequence": in_sequence,
            "first_group": a.file,
        }
        return Record(
            key,
            "text",
            tuple(talks),
            poses=poses,
            group=b.file,
            extras=extras if split == "train" else extras | changes,
        )


def described(rng: np.random.Generator, pose: Pose) -> str:
    """A caption of a pose by this package's rules."""
    rotations = to_frame(to_family(pose, "smpl"), "model").rotations
    return captions.describe(rotations, seed=int(rng.integers(2**31)))
