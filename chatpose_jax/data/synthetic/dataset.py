"""The generated data set: conversations about generated poses, in words and images. A row is made when it is asked for."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from chatpose_jax.data import questions
from chatpose_jax.data.config import Split
from chatpose_jax.data.example import NO_POSES, Example, Kind, LazyImage
from chatpose_jax.data.synthetic import asks, captions, edits, skeleton
from chatpose_jax.data.synthetic.families import (
    COLUMN,
    POSTURES,
    PoseSet,
    draw_arm,
    from_angles,
    plausible,
    sample_poses,
)
from chatpose_jax.data.synthetic.posecodes import Codes, encode
from chatpose_jax.data.synthetic.scene import MAX_YAW, Scene, Studio, draw_scene
from chatpose_jax.data.synthetic.situations import QUESTIONS, SITUATIONS, Situation
from chatpose_jax.errors import UserError
from chatpose_jax.settings import did_you_mean, whole
from smpl_jax.keypoints import keypoint_set
from smpl_jax.pose import Pose

SPLITS: dict[str, int] = {"train": 8000, "val": 512, "test": 512}  # rows when no size is given
DEFAULT_TASKS: dict[str, float] = {
    "text": 18, "text_short": 4, "situation": 6, "text_turns": 7, "image": 40, "image_turns": 10,
    "image_words": 10, "words": 5,
}  # fmt: skip
_BLOCK = 256  # poses drawn together


def to_camera(rotations: np.ndarray, yaw: float = 0.0, pitch: float = 0.0) -> np.ndarray:
    """Poses (..., 24, 3, 3) from the body frame (y up, facing +z) to the camera frame (x right, y down, z away), float32. Joint 0 changes.

    yaw: degrees by which the body turns to its left; at 0 it faces the camera. pitch: degrees by which the camera looks down.
    """
    out = np.array(rotations, np.float32)
    view = (
        skeleton.rotation("x", np.asarray(pitch))
        @ skeleton.rotation("x", np.asarray(180.0))
        @ skeleton.rotation("y", np.asarray(yaw))
    )
    out[..., 0, :, :] = view @ np.asarray(rotations[..., 0, :, :], float)
    return out


@dataclasses.dataclass
class _Draft:
    """A row without its image.

    turns: (question, answer). poses: in the body frame. shown: the pose in the image, if there is one. extras: words of the first pose.
    """

    id: str
    kind: Kind
    turns: list[tuple[str, str]]
    poses: list[np.ndarray]
    shown: np.ndarray | None = None
    scene: Scene | None = None
    extras: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Row:
    """What a task needs for a conversation: one pose, its codes, a generator of random numbers."""

    rng: np.random.Generator
    pose: PoseSet
    codes: Codes
    index: int
    max_yaw: float

    @property
    def family(self) -> str:
        return str(self.pose.family[0])

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def caption(self, detail: captions.Detail = "detailed") -> str:
        return captions.caption(self.codes, self.index, self.rng, detail, self.family)

    def words(self) -> tuple[str, str]:
        """A question that words answer, and the answer."""
        draw = self.rng.random()
        if draw < 0.4:
            return self.pick(questions.SUMMARISE), sentence(
                captions.summary(self.codes, self.index, self.rng, self.family)
            )
        if draw < 0.7:
            return self.pick(questions.ARMS), captions.arms(self.codes, self.index, self.rng)
        return self.pick(questions.DESCRIBE), self.caption("detailed" if draw < 0.8 else "short")


class Shown(NamedTuple):
    """What an image shows: the scene, the codes of the pose and its row in them, the posture's name."""

    scene: Scene
    codes: Codes
    row: int
    family: str


def synthetic(
    split: Split,
    *,
    image_size: int,
    seed: int,
    kind: Kind | None = None,
    tasks: Mapping[str, float] = DEFAULT_TASKS,
    train_size: int = SPLITS["train"],
    val_size: int = SPLITS["val"],
    test_size: int = SPLITS["test"],
    max_yaw: float = MAX_YAW,
    keypoints: str = "",
) -> SyntheticDataset:
    """The source "synthetic" of ``data.sources``. Its options are those of ``SyntheticDataset``, the size of each split apart.

    kind: of ``tasks``, those whose rows are of this kind alone.

    Raises UserError as ``SyntheticDataset`` does, and where no task of that kind has a weight.
    """
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    for name, size in sizes.items():
        whole(f"{name}_size", size, 1)
    if kind is not None:
        tasks = {task: weight for task, weight in tasks.items() if task not in TASKS or TASKS[task][0] == kind}
    return SyntheticDataset(split, sizes[split], seed, image_size, tasks, max_yaw, keypoints)


class SyntheticDataset(Sequence[Example]):
    """Generated conversations, by random access. Row i of a split and seed is the same for any size.

    split: "train", "val" or "test". Their poses are drawn independently. size: number of rows, by default that of ``SPLITS``. image_size: side
    of the square images in pixels. tasks: weights of ``TASKS``, by default ``DEFAULT_TASKS``. ``{"text": 1}`` gives detailed descriptions only,
    ``{"image": 1}`` images only. max_yaw: images show the body turned by up to so many degrees; more is harder to learn. keypoints: a set of
    ``smpl_jax.keypoints``; rows with images then have the extras ``keypoints_2d`` (K, 3), in pixels and with a confidence, and ``keypoint_set``.

    ``extras`` hold words of the first pose: ``caption``, which the question gives or which describes the pose of an image; of the task "situation"
    ``query``, the question; of the task "figure" too.

    Images are ``LazyImage``s. ``precompute`` renders all of them at once, in batches. Raises UserError for an unknown split, task or set
    of keypoints.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int | None = None,
        seed: int = 0,
        image_size: int = 64,
        tasks: Mapping[str, float] | None = None,
        max_yaw: float = MAX_YAW,
        keypoints: str = "",
    ):
        if split not in SPLITS:
            raise UserError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
        tasks = DEFAULT_TASKS if tasks is None else tasks
        if unknown := set(tasks) - set(TASKS):
            hint = did_you_mean(min(unknown), TASKS) or f"; the tasks are {', '.join(TASKS)}"
            raise UserError(f"tasks: there is no {min(unknown)!r}{hint}")
        if not any(w > 0 for w in tasks.values()) or any(w < 0 for w in tasks.values()):
            raise UserError(f"tasks: weights must not be negative, nor all 0, found {dict(tasks)}")
        if keypoints:
            try:
                keypoint_set(keypoints)
            except ValueError as error:
                raise UserError(str(error)) from None
        self.split, self.seed, self.image_size, self.max_yaw = split, seed, image_size, max_yaw
        self.keypoints = keypoints
        self.size = SPLITS[split] if size is None else size
        self.tasks = dict(tasks)
        self._entropy = [seed, list(SPLITS).index(split)]
        self._blocks: dict[int, tuple[PoseSet, Codes]] = {}
        self._images: dict[int, np.ndarray] = {}
        self._places: dict[int, dict[int, np.ndarray]] = {}
        self._studio: Studio | None = None

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Row ``index``; IndexError beyond the size."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        index = operator.index(index)
        if not -self.size <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        index %= self.size
        draft = self._draft(index)
        image: np.ndarray | LazyImage | None = self._images.get(index)
        if draft.shown is not None and image is None:
            image = LazyImage(lambda: self._draw([draft])[0], (self.image_size, self.image_size, 3))
        row = _finish(draft, image)
        if self.keypoints and image is not None:
            found = {"keypoints_2d": self._keypoints(index // _BLOCK)[index], "keypoint_set": self.keypoints}
            row = dataclasses.replace(row, extras={**row.extras, **found})
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_studio": None}

    def kind(self, index: int) -> Kind:
        """The kind of a row. The row is not made."""
        return TASKS[self._task(np.random.default_rng([*self._entropy, 1, index]))][0]

    def poses(self, indices: Sequence[int] | None = None) -> np.ndarray:
        """Body-frame rotations (N, 24, 3, 3) that the rows start from. Rows of the task "situation" have others."""
        rows = range(self.size) if indices is None else indices
        return np.stack([self._block(i // _BLOCK)[0].rotations[i % _BLOCK] for i in rows])

    def shown(self, index: int) -> Shown:
        """What the image of a row shows. Raises UserError for a row without image."""
        poses, codes = self._block(index // _BLOCK)
        if (scene := self._draft(index).scene) is None:
            raise UserError(f"row {index} has no image")
        return Shown(scene, codes, index % _BLOCK, str(poses.family[index % _BLOCK]))

    def precompute(self, workers: int = 1) -> SyntheticDataset:
        """Renders all images and keeps them, 3·image_size² bytes each. workers: threads that render. Returns the data set itself."""
        missing = [
            (i, d) for i in range(self.size) if i not in self._images and (d := self._draft(i)).shown is not None
        ]
        images = self._draw([d for _, d in missing], workers)
        self._images.update((i, p) for (i, _), p in zip(missing, images))
        return self

    def _draw(self, drafts: Sequence[_Draft], workers: int = 1) -> list[np.ndarray]:
        poses, scenes = self._shown(drafts)
        return self.studio.render_batch(poses, scenes, self.image_size, workers)

    def _keypoints(self, block: int) -> dict[int, np.ndarray]:
        """(K, 3) keypoints by row, of the rows with an image in a block. They are computed together, because it is faster."""
        if block not in self._places:
            rows = range(block * _BLOCK, min((block + 1) * _BLOCK, self.size))
            drafts = {row: draft for row in rows if (draft := self._draft(row)).shown is not None}
            poses, scenes = self._shown(list(drafts.values()))
            found = self.studio.keypoints(poses, scenes, self.image_size, self.keypoints)
            self._places[block] = dict(zip(drafts, found))
        return self._places[block]

    @property
    def studio(self) -> Studio:
        if self._studio is None:
            self._studio = Studio()
        return self._studio

    @staticmethod
    def _shown(drafts: Sequence[_Draft]) -> tuple[list[np.ndarray], list[Scene]]:
        """Poses in the camera frame and scenes of rows with images."""
        scenes = [d.scene for d in drafts if d.scene is not None]
        return [to_camera(d.shown, s.yaw, s.pitch) for d, s in zip(drafts, scenes) if d.shown is not None], scenes

    def _block(self, number: int) -> tuple[PoseSet, Codes]:
        if number not in self._blocks:
            entropy = [*self._entropy, 0, number]
            poses = sample_poses(_BLOCK, entropy)
            self._blocks[number] = poses, encode(poses.rotations, np.random.default_rng([*entropy, 1]))
        return self._blocks[number]

    def _task(self, rng: np.random.Generator) -> str:
        weights = np.array([self.tasks.get(name, 0.0) for name in TASKS])
        return list(TASKS)[int(rng.choice(len(TASKS), p=weights / weights.sum()))]

    def _draft(self, index: int) -> _Draft:
        rng = np.random.default_rng([*self._entropy, 1, index])
        task = self._task(rng)
        poses, codes = self._block(index // _BLOCK)
        row = index % _BLOCK
        kind, build = TASKS[task]
        draft = build(_Row(rng, poses[row : row + 1], codes, row, self.max_yaw))
        draft.id, draft.kind = f"{self.split}-{self.seed}-{index}-{task}", kind
        return draft


def sentence(clause: str) -> str:
    """A clause with its capital and full stop."""
    return f"{clause[0].upper()}{clause[1:]}."


def _finish(draft: _Draft, image: np.ndarray | LazyImage | None) -> Example:
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(draft.turns):
        content: Any = question
        if number == 0 and image is not None:
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    yaw, pitch = (draft.scene.yaw, draft.scene.pitch) if draft.scene else (0.0, 0.0)
    poses = Pose(to_camera(np.stack(draft.poses), yaw, pitch), "camera") if draft.poses else NO_POSES
    return Example(draft.id, draft.kind, messages, poses, draft.extras)


def _text(row: _Row, detail: captions.Detail = "detailed", asked: Sequence[str] = questions.TEXT_TO_POSE) -> _Draft:
    template, caption = row.pick(asked), row.caption(detail)
    turn = (template.format(caption=caption), row.pick(questions.POSE_ANSWERS))
    return _Draft("", "text", [turn], [row.pose.rotations[0]], extras={"caption": caption})


def _text_short(row: _Row) -> _Draft:
    return _text(row, "short")


def _situation(row: _Row) -> _Draft:
    return _implied(row, SITUATIONS, QUESTIONS, "situation")


def _implied(row: _Row, situations: Sequence[Situation], asked: Sequence[str], slot: str) -> _Draft:
    """A pose of one of ``situations``, asked for by one of the sentences ``asked``, which have a ``{slot}`` for its words."""
    situation = situations[int(row.rng.integers(len(situations)))]
    arms = situation.arms if row.rng.random() < 0.5 else situation.arms[::-1]
    pose = sample_poses(1, int(row.rng.integers(2**31)), situation.posture, arms)
    question = row.pick(asked).format(**{slot: situation.words})
    question = question[0].upper() + question[1:]
    turn = (question, row.pick(questions.POSE_ANSWERS))
    return _Draft("", "text", [turn], [pose.rotations[0]], extras={"query": question})


def _figure(row: _Row) -> _Draft:
    return _implied(row, asks.FIGURES, asks.FIGURE_ASKS, "figure")


def _asked(row: _Row) -> _Draft:
    return _text(row, "detailed" if row.rng.random() < 0.5 else "short", asks.ASKS)


def _image(row: _Row) -> _Draft:
    turn = (row.pick(questions.IMAGE_TO_POSE), row.pick(questions.POSE_ANSWERS))
    pose, scene = row.pose.rotations[0], draw_scene(row.rng, row.max_yaw)
    caption = dataclasses.replace(row, rng=copy.deepcopy(row.rng)).caption()  # later draws stay as they are
    return _Draft("", "image", [turn], [pose], pose, scene, {"caption": caption})


def _turns(start: Callable[[_Row], _Draft]) -> Callable[[_Row], _Draft]:
    """Adds a second turn: a change of the pose, or words about it."""

    def build(row: _Row) -> _Draft:
        draft = start(row)
        edited = _edit(row) if row.rng.random() < 0.6 else None
        if edited is None:
            draft.turns.append(row.words())
        else:
            words, pose = edited
            question = row.pick(questions.EDIT_QUESTIONS).format(edit=words)
            draft.turns.append((question, row.pick(questions.EDIT_ANSWERS)))
            draft.poses.append(pose)
        return draft

    return build


def _image_words(row: _Row) -> _Draft:
    return _Draft("", "instruction", [row.words()], [], row.pose.rotations[0], draw_scene(row.rng, row.max_yaw))


def _words(row: _Row) -> _Draft:
    question = f"{row.caption()} {row.pick(questions.SUMMARISE)}"
    return _Draft(
        "", "instruction", [(question, sentence(captions.summary(row.codes, row.index, row.rng, row.family)))], []
    )


def _edit(row: _Row, tries: int = 8) -> tuple[str, np.ndarray] | None:
    """A change of the pose in words, and the changed pose (24, 3, 3); None where no body can take any of ``tries`` changes."""
    allowed = POSTURES[row.family].arms
    for _ in range(tries):
        angles, arms = row.pose.angles.copy(), row.pose.arms.copy()
        if row.rng.random() < 0.3:
            words = row.pick(tuple(edits.BODY_EDITS))
            for column, value in edits.BODY_EDITS[words].items():
                angles[0, COLUMN[column]] = value
        else:
            name = row.pick(tuple(edits.ARM_EDITS))
            side = row.pick(("left", "right", "both"))
            sides = ("left", "right") if side == "both" else (side,)
            if name not in allowed or any(arms[0, ("left", "right").index(s)] == name for s in sides):
                continue
            one, both = edits.ARM_EDITS[name]
            words = both if side == "both" else one.format(side=side)
            for s in sides:
                start = COLUMN[f"{s}_elevation"]
                angles[0, start : start + 6] = draw_arm(name, row.rng)
                arms[0, ("left", "right").index(s)] = name
        edited = from_angles(angles, row.pose.family, arms)
        if plausible(edited)[0]:
            return words, edited.rotations[0]
    return None


# Task -> the kind of its rows, and the function that makes one.
TASKS: dict[str, tuple[Kind, Callable[[_Row], _Draft]]] = {
    "text": ("text", _text),
    "text_short": ("text", _text_short),
    "situation": ("text", _situation),
    "text_turns": ("text", _turns(_text)),
    "image": ("image", _image),
    "image_turns": ("image", _turns(_image)),
    "image_words": ("instruction", _image_words),
    "words": ("instruction", _words),
    "asked": ("text", _asked),  # new tasks come last: the draw of the others stays as it is
    "figure": ("text", _figure),
}
