"""SPG, speculative pose generation: questions that imply a pose of PoseScript and do not describe it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.amass import OPTION, Amass, Place, to_view, yaw_of
from chatpose_jax.data.readers.posescript import Release, Version, exchange, id_of, in_parts, pick
from chatpose_jax.data.readers.untrusted import parse_json, read_lines
from chatpose_jax.data.record import Record, seeded
from chatpose_jax.errors import UserError
from smpl_jax.pose import stack

FILE = "spg.jsonl"


class Query(NamedTuple):
    """A question, the id of its pose, and the place of the pose; or a fault."""

    key: str
    pose_id: str
    query: str
    place: Place | Skipped


class Spg:
    """Reads SPG. ChatPose's authors have not published theirs, so the format is this package's; ``chatpose data build spg`` writes it.

    The file ``spg.jsonl`` has one JSON object in each line (UTF-8):

    ========  ====================================================================================================
    pose_id   id of a pose of PoseScript, a whole number (a number or its digits as text)
    query     the user's complete question, text that is not empty. It is asked as it stands
    source    "posescript"
    version   "v1" or "v2", the release of PoseScript that the id belongs to; without it, the one that is there
    split     "train", "val" or "test"; without it, "test"
    ========  ====================================================================================================

    Other fields are for people and are not read. A pose may have several queries.

    A row asks the query and is answered with the pose, which is read as PoseScript's (``readers.posescript``). ``group`` is the AMASS file.
    ``extras``: ``pose_id`` (int), ``version`` ("v1" or "v2"), ``frame`` (int, of the AMASS file), ``query``.

    Options: posescript: the folder of PoseScript; by default the source folder. amass, smplx, version: as PoseScript's. seed: of the answers'
    words.
    """

    about: ClassVar[About] = About(
        title="SPG, speculative pose generation",
        licence="that of PoseScript, CC BY-NC-SA 4.0, not for commercial use",
        page="https://github.com/naver/posescript, and docs/data-sets.md for the questions",
        files=(f"{FILE} (chatpose data build spg makes one)", "the JSON files of PoseScript"),
        options=("--set posescript=FOLDER is the folder of PoseScript, by default the source folder", OPTION),
    )

    def __init__(
        self,
        source: Path,
        *,
        amass: str = "",
        smplx: bool = False,
        posescript: str = "",
        version: Version = "auto",
        seed: int = 0,
    ) -> None:
        self.file = source / FILE
        if not self.file.is_file():
            raise missing(self.about, self.file)
        self.seed = seed
        self.release = Release(self.about, Path(posescript).expanduser() if posescript else source, version)
        self.amass = Amass.open(self.about, source, amass, smplx)
        self._plans: dict[Split, list[list[Query]]] = {}

    def parts(self, split: Split) -> Sequence[int]:
        """Numbers, one for some files of AMASS in the order of their names."""
        return range(len(self._plan(split)))

    def read(self, split: Split, part: int) -> Iterator[Record | Skipped]:
        """The queries of a part, by file and frame of their poses."""
        rows = self._plan(split)[part]
        poses = self.amass.read(row.place for row in rows)
        for row in rows:
            pose = poses[row.place]
            if isinstance(pose, Skipped):
                yield dataclasses.replace(pose, key=row.key)
                continue
            assert isinstance(row.place, Place)
            answer = pick(seeded(self.seed, "spg", row.key), questions.POSE_ANSWERS)
            yield Record(
                row.key,
                "text",
                (exchange(row.query, answer),),
                poses=stack([to_view(pose, yaw_of(pose))]),
                group=row.place.file,
                extras={
                    "pose_id": int(row.pose_id),
                    "version": self.release.version,
                    "frame": row.place.frame,
                    "query": row.query,
                },
            )

    def _plan(self, split: Split) -> list[list[Query]]:
        if split not in self._plans:
            self._plans[split] = in_parts(self._queries(split), lambda row: row.place)
        return self._plans[split]

    def _queries(self, split: Split) -> Iterator[Query]:
        seen = set()
        for number, line in read_lines(self.file):
            where = f"{self.file}, line {number}"
            try:
                entry = parse_json(line, where)
                if _split(entry, self.release, where) != split:
                    continue
                pose_id, query = id_of(entry.get("pose_id"), f"{where}, pose_id"), entry["query"].strip()
                if (pose_id, query) in seen:
                    raise UserError(f"{where}: an earlier line has the same pose_id and query")
            except UserError as error:
                if split == "test":  # a damaged line may have no split: it is reported once
                    yield Query(f"line {number}", "", "", Skipped("", "a damaged line", True, f"{error}"))
                continue
            seen.add((pose_id, query))
            yield Query(f"{pose_id}#{number}", pose_id, query, self.release.place(pose_id))


def _split(entry: Any, release: Release, where: str) -> str:
    """The split of a line. Raises UserError for a line that is not as ``Spg`` says."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: expected an object with pose_id, query and source; found a {type(entry).__name__}")
    if entry.get("source") != "posescript":
        raise UserError(f'{where}: expected "source": "posescript"; found {entry.get("source")!r:.100}')
    if (version := entry.get("version", release.version)) != release.version:
        raise UserError(
            f"{where}: the pose is one of PoseScript {version!r:.20}, and {release.version} was read from {release.folder}"
        )
    if not isinstance(entry.get("query"), str) or not entry["query"].strip():
        raise UserError(f"{where}: expected a question as text in query; found {entry.get('query')!r:.100}")
    split = entry.get("split", "test")
    if split not in ("train", "val", "test"):
        raise UserError(f"{where}: split must be train, val or test; found {split!r:.100}")
    return split
