"""Motion capture: ASF/AMC and BVH clips become poses that are described in words. CMU's database is free for everyone."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.record import Conversation, Record, seeded
from chatpose_jax.data.synthetic import captions, situations, skeleton
from chatpose_jax.data.synthetic.posecodes import Codes, encode
from chatpose_jax.errors import UserError
from chatpose_jax.settings import did_you_mean, whole
from smpl_jax import mocap
from smpl_jax.errors import PoseFileError
from smpl_jax.pose import Pose

INDEX = "cmu-mocap-index-text.txt"
"""Descriptions of clips: lines of a clip's name, a tab, and what it shows. Lines without a tab are headings."""
DEFAULT_TASKS: dict[str, float] = {"detailed": 4, "short": 2, "summary": 1, "motion": 2, "situation": 1}


class MotionCapture:
    """Reads all ``.bvh`` and ``.amc`` files below a folder, each ``.amc`` with the ``.asf`` beside it.

    A record is a key pose: rotations in the frame "model", turned to face +z, and ``variants`` questions that ask for it. SMPL's two rigid
    hands, and joints that a skeleton lacks, are not measured. There are no betas, and no translation, because the body was turned.
    ``group`` is the clip, for ``cmu`` by the name of its file in AMASS.
    ``extras``: ``frame`` (its number in the clip), ``subject``, ``description`` (text, "" if there is none), and ``caption``, a detailed
    description of the pose, whatever the questions are.

    Options:
        rate: frames per second of a clip that are considered.
        spacing: of these, poses are chosen farthest first, until all others are nearer to a chosen one than this: the mean distance of the 24
            joints in metres, both bodies facing +z with the pelvis at the origin. 0 takes all.
        by: "clip" or "subject": what is in one split only. The subject is the number before the underscore of CMU's names (``02_01``), and for
            other names the folder that holds the file. Files of one name (``02_01.amc``, ``02_01.bvh``) are one clip.
        folds, fold: the clips or subjects, in the order of a hash of their names, are cut into ``folds`` parts of equal size. Part ``fold`` is the
            test split, the next one "val", the others "train". The seed changes nothing here, and files that are added move few others.
        tasks: weights of ``TASKS``. A question of a task that does not suit a pose is drawn from the others.
        variants: questions for each pose, each with its own task, caption and wording.
        seed: of tasks, captions and wording.

    Raises UserError where there are no clips, or fewer clips or subjects than folds; where the file ``INDEX`` in the folder describes none of them.
    """

    about: ClassVar[About]

    def __init__(
        self,
        source: Path,
        *,
        rate: float = 30.0,
        spacing: float = 0.04,
        by: Literal["clip", "subject"] = "clip",
        folds: int = 5,
        fold: int = 0,
        tasks: Mapping[str, float] = DEFAULT_TASKS,
        variants: int = 1,
        seed: int = 0,
    ) -> None:
        whole("folds", folds, 3)
        whole("fold", fold, 0)
        whole("variants", variants, 1)
        if fold >= folds or not rate > 0 or not spacing >= 0:
            raise UserError(
                f"expected fold < folds, rate > 0 and spacing >= 0; found fold={fold}, folds={folds}, rate={rate}, spacing={spacing}"
            )
        if unknown := set(tasks) - set(TASKS):
            hint = did_you_mean(min(unknown), TASKS) or f"; the tasks are {', '.join(TASKS)}"
            raise UserError(f"tasks: there is no {min(unknown)!r}{hint}")
        if not any(weight > 0 for weight in tasks.values()) or any(weight < 0 for weight in tasks.values()):
            raise UserError(f"tasks: weights must not be negative, nor all 0, found {dict(tasks)}")
        self.source, self.rate, self.spacing = Path(source).expanduser(), rate, spacing
        self.tasks, self.variants, self.seed = (
            {name: weight for name, weight in tasks.items() if weight},
            variants,
            seed,
        )
        self.clips = sorted(
            path.relative_to(self.source).as_posix()
            for path in self.source.rglob("*")
            if path.suffix.lower() in mocap.SUFFIXES
        )
        if not self.clips:
            raise missing(self.about, *(self.source / f"**/*{suffix}" for suffix in mocap.SUFFIXES))
        self.descriptions = read_index(self.source / INDEX, self.clips)
        units = {clip: subject(clip) if by == "subject" else Path(clip).stem for clip in self.clips}
        order = sorted(set(units.values()), key=lambda unit: hashlib.blake2b(unit.encode()).digest())
        if len(order) < folds:
            less = "fewer folds (at least 3)" if len(order) > 2 else "more clips" if by == "clip" else "by=clip"
            raise UserError(
                f"{self.source}: {len(order)} {by}s cannot be cut into {folds} folds, of which one is the test split and one 'val'; choose {less}"
            )
        parts: dict[str, Split] = {}
        for place, unit in enumerate(order):
            number = (place * folds // len(order) - fold) % folds
            parts[unit] = "test" if number == 0 else "val" if number == 1 else "train"
        self.splits: dict[str, Split] = {clip: parts[unit] for clip, unit in units.items()}

    def parts(self, split: Split) -> Sequence[str]:
        """The clips of a split, by their paths below the folder."""
        return [clip for clip in self.clips if self.splits[clip] == split]

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        """The key poses of a clip in the order of time. A clip that cannot be read is one broken item."""
        try:
            clip = mocap.read_clip(self.source / part)
            pose = mocap.retarget(clip)
        except PoseFileError as error:
            yield Skipped(
                part, "clips that cannot be read", broken=True, detail=str(error).replace(f"{self.source}/", "")
            )
            return
        frames = np.arange(0, len(clip), max(1, round(clip.rate / self.rate)))
        trusted = frames[clip.trusted[frames]]
        rotations = skeleton.remove_yaw(np.asarray(pose.rotations, float)[trusted])
        rows = key_poses(rotations, self.spacing)
        chosen = dict(zip(trusted[rows].tolist(), self._records(part, trusted[rows], rotations[rows], pose)))
        for frame in frames.tolist():
            if not clip.trusted[frame]:
                yield Skipped(f"{part}#{frame}", "frames that the clip shows to be wrong")
            else:
                yield chosen.get(frame) or Skipped(f"{part}#{frame}", "frames near a key pose")

    def group(self, part: str) -> str:
        """The name of a clip in ``Record.group``: its path without suffix."""
        return part.rpartition(".")[0]

    def _records(self, part: str, frames: np.ndarray, rotations: np.ndarray, pose: Pose) -> Iterator[Record | Skipped]:
        if not len(frames):
            return
        description = self.descriptions.get(Path(part).stem, "")
        noisy = [encode(rotations, seeded(self.seed, part, variant)) for variant in range(self.variants)]
        for row, frame in enumerate(frames.tolist()):
            key = f"{part}#{frame}"
            asked = [
                self._question(_Moment(codes, row, rotations[row], description, seeded(self.seed, key, variant)))
                for variant, codes in enumerate(noisy)
            ]
            if None in asked:
                yield Skipped(key, "poses that suit none of the tasks")
                continue
            caption = captions.caption(noisy[0], row, seeded(self.seed, key, "caption"), "detailed")
            yield Record(
                key,
                "text",
                tuple(conversation for conversation in asked if conversation),
                poses=Pose(rotations[row : row + 1].astype(np.float32), "model", measured=pose.measured[[frame]]),
                group=self.group(part),
                extras={"frame": frame, "subject": subject(part), "description": description, "caption": caption},
            )

    def _question(self, moment: _Moment) -> Conversation | None:
        """A question of a task that suits the pose, and its answer; None if none does."""
        left = dict(self.tasks)
        while left:
            weights = np.array(list(left.values()), float)
            task = list(left)[int(moment.rng.choice(len(left), p=weights / weights.sum()))]
            if question := TASKS[task](moment):
                answer = moment.pick(questions.POSE_ANSWERS)
                return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            del left[task]
        return None


class Cmu(MotionCapture):
    """CMU's database, as ASF/AMC or as one of its conversions to BVH."""

    about = About(
        title="CMU Graphics Lab Motion Capture Database",
        licence="free for all uses; the data itself must not be resold, and CMU asks for an acknowledgement",
        page="http://mocap.cs.cmu.edu",
        files=(
            "clips at any depth: 02_01.amc with its 02.asf in the same folder, or 02_01.bvh",
            f"{INDEX} (optional): what the clips show, from the conversions to BVH by B. Hahne",
        ),
    )

    def group(self, part: str) -> str:
        """The file of AMASS that has the same recording, so that ``chatpose data check`` finds what is also in PoseScript's test split."""
        clip = Path(part).stem
        found = re.fullmatch(r"(\d+)_\d+", clip)
        return f"CMU/{found[1]}/{clip}_poses.npz" if found else super().group(part)


class Bvh(MotionCapture):
    """Clips from anywhere."""

    about = About(
        title="A folder of motion capture (BVH, ASF/AMC)",
        licence="that of the clips",
        page="where the clips are from",
        files=(
            "clips at any depth: .bvh, or .amc with its .asf in the same folder",
            f"{INDEX} (optional): a line for each clip with its name, a tab, and what it shows",
        ),
    )


def subject(clip: str) -> str:
    """The person in a clip: the number before the underscore of CMU's names, otherwise the folder, "." for the folder of the data set."""
    path = Path(clip)
    found = re.fullmatch(r"(\d+)_\d+.*", path.stem)
    return found[1] if found else path.parent.as_posix()


def key_poses(rotations: np.ndarray, spacing: float) -> np.ndarray:
    """Indices (K,), ascending, of poses that are chosen farthest first, until no other is farther than ``spacing`` from all of them.

    rotations: (N, 24, 3, 3) in the body frame, facing +z. spacing: mean distance of the joints in metres; 0 takes all.
    """
    if not len(rotations) or not spacing:
        return np.arange(len(rotations))
    joints, _ = skeleton.forward_kinematics(rotations)
    chosen, nearest = [0], np.full(len(joints), np.inf)
    while True:
        nearest = np.minimum(nearest, np.linalg.norm(joints - joints[chosen[-1]], axis=-1).mean(-1))
        farthest = int(nearest.argmax())
        if nearest[farthest] <= spacing:
            return np.sort(chosen)
        chosen.append(farthest)


_SAYS_NOTHING = re.compile(
    r"unknown|clean(ed)?|no movie|lost marker|movie and trial dont match|(subject )?calibration|[\d_ .]+(amc|lbs?\.?)?",
    re.IGNORECASE,
)
_PERSON = re.compile(r"\((?:2 )?subjects - subject ([AB])\)")
_NOTES = re.compile(r"cleaned ?grs|(?<=[a-z])\d{3}$", re.IGNORECASE)


def read_index(path: Path, clips: Sequence[str]) -> dict[str, str]:
    """What clips show, by their file names without suffix; {} if there is no such file.

    Notes on the recording are left out, joined words are parted ("LeftTightTurn"), and descriptions that say nothing ("Unknown") are not there.
    Raises UserError if the file describes none of the clips.
    """
    if not path.is_file():
        return {}
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    listed = {name.strip(): words for name, tab, words in lines if tab}
    if clips and not any(Path(clip).stem in listed for clip in clips):
        raise UserError(
            f"{path}: expected lines of a clip's name, a tab and what it shows; it describes none of the {len(clips)} clips, such as {clips[0]}"
        )
    found = {}
    for name, words in listed.items():
        words = _PERSON.sub(r"(the person is \1)", _NOTES.sub("", words.strip()).replace("_", " "))
        words = " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).split()).strip(" .")
        if words and not _SAYS_NOTHING.fullmatch(words):
            found[name] = words
    return found


@dataclasses.dataclass
class _Moment:
    """What a task needs for a question: codes and the row in them, rotations (24, 3, 3) in the body frame, what the clip shows ("" if unknown)."""

    codes: Codes
    row: int
    rotations: np.ndarray
    description: str
    rng: np.random.Generator

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def ask(self, caption: str) -> str:
        return self.pick(questions.TEXT_TO_POSE).format(caption=caption)

    def caption(self, detail: captions.Detail) -> str:
        return captions.caption(self.codes, self.row, self.rng, detail)


def _summary(moment: _Moment) -> str:
    words = captions.summary(moment.codes, moment.row, moment.rng)
    return moment.ask(f"{words[0].upper()}{words[1:]}.")


def _motion(moment: _Moment) -> str:
    if not moment.description:
        return ""
    return moment.ask(
        f"{moment.pick(questions.MOTIONS).format(motion=moment.description)} {moment.caption('detailed')}"
    )


def _situation(moment: _Moment) -> str:
    if fitting := situations.situations_of(moment.rotations):
        return moment.pick(situations.QUESTIONS).format(situation=moment.pick(fitting).words)
    return moment.description and moment.pick(questions.MOTION_TO_POSE).format(motion=moment.description)


TASKS: dict[str, Callable[[_Moment], str]] = {
    "detailed": lambda moment: moment.ask(moment.caption("detailed")),
    "short": lambda moment: moment.ask(moment.caption("short")),
    "summary": _summary,
    "motion": _motion,
    "situation": _situation,
}
"""Task -> its question about a pose, "" if it has none. ``summary`` names the posture, ``short`` the arms too, ``detailed`` every part of the body,
``motion`` also what the clip shows. ``situation`` implies the pose: a situation that fits it, or else what the clip shows."""
