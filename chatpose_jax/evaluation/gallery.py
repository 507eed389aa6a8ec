"""Draws the best, median and worst answers of a system: the image of the question, the true body, the answered one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from chatpose_jax.data.example import Example
from chatpose_jax.evaluation.boxes import best_overlap, person_box
from chatpose_jax.evaluation.results import DrawnAnswer, write_drawn
from chatpose_jax.evaluation.scores import Scores
from chatpose_jax.evaluation.system import Answer, Question, images_in, words_of
from chatpose_jax.processing.images import load_image
from smpl_jax import render
from smpl_jax.body import BodyModel
from smpl_jax.errors import PoseFileError
from smpl_jax.pose import Pose, known
from smpl_jax.posed import PosedBody

PANEL, CAPTION = 192, 28
"""Pixels of a side of a panel, and of the height of the words below it."""
PLACES = ("best", "median", "worst")
POINTS = {"smpl24": (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)}
"""Named sets of joints that are drawn as lines: for each point the point to which a line leads, -1 for none."""
FOLDER = "gallery"


def write_gallery(
    folder: Path,
    rows: Sequence[Example],
    questions: Sequence[Question],
    answers: Sequence[Answer],
    scores: Sequence[Scores],
    body: BodyModel,
    each: int = 2,
) -> list[DrawnAnswer]:
    """Draws answers for each table whose ``Scores.rank`` names a measure, and writes ``gallery.json`` and PNG files into a system's folder.

    rows, questions, answers: the N of the task. scores: with their samples. body: draws the poses, with β = 0. each: answers of each place. A row
    that several tables choose is drawn once. If no answer has a pose, the task is about words, and "no pose" is drawn for none.
    Images of an earlier call that are not drawn again are removed.
    """
    poses = any(answer.pose is not None or answer.joints for answer in answers)
    shown: list[DrawnAnswer] = []
    images: dict[str, np.ndarray | None] = {}
    for table in scores:
        if not table.rank:
            continue
        value = table.values.get(table.rank)
        for place, index in chosen(table.samples[table.rank], table.better == "higher", each):
            row, answer = rows[index], answers[index]
            name = f"{FOLDER}/{_name(row.id)}.png"
            if name not in images:
                images[name] = draw_panels(row, answer, body, questions[index], poses)
            image = name if images[name] is not None else ""
            sample, unit = float(table.samples[table.rank][index]), value.unit if value else ""
            asked = words_of(questions[index].messages[-1]["content"])
            shown.append(DrawnAnswer(table.table, place, row.id, table.rank, sample, unit, asked, answer.text, image))
    for name, drawn in images.items():
        if drawn is not None:
            render.save_png(folder / name, drawn)
    for path in (folder / FOLDER).glob("*.png"):
        if images.get(f"{FOLDER}/{path.name}") is None:
            path.unlink()
    write_drawn(folder, shown)
    return shown


def chosen(samples: np.ndarray, higher: bool, each: int) -> list[tuple[str, int]]:
    """Places and row numbers of the best, the median and the worst of (N,) values without NaN. No row is chosen twice; equal values keep the order
    of rows.
    """
    counted = np.flatnonzero(np.isfinite(samples))
    order = counted[np.argsort(-samples[counted] if higher else samples[counted], kind="stable")]
    each = min(each, math.ceil(len(order) / len(PLACES)))
    start = (len(order) - each) // 2
    parts = (order[:each], order[start : start + each], order[len(order) - each :][::-1])
    seen: set[int] = set()
    found = []
    for place, part in zip(PLACES, parts):
        for index in map(int, part):
            if index not in seen:
                seen.add(index)
                found.append((place, index))
    return found


def draw_panels(
    row: Example, answer: Answer, body: BodyModel, question: Question | None = None, poses: bool = True
) -> np.ndarray | None:
    """The images of the question, the true body and the answered body, beside each other, (H, W, 3) uint8. None where there is nothing to draw.

    Of an answer with several people, the one is drawn whose box overlaps that of the row.
    question: what was asked; by default the first question of the row. poses: whether an answer without a pose lacks something.
    """
    panels, labels = [], []
    for part in images_in((question or Question.of(row)).messages[-1:]):
        panels.append(np.asarray(ImageOps.pad(load_image(part["image"]), (PANEL, PANEL), color="white")))
        labels.append("image")
    has_truth = bool(len(row.poses.rotations)) and bool(np.any(known(row.poses[0])))
    if has_truth:
        panels.append(_body(row.poses[0], body))
        labels.append("true")
    answered = _answered(answer, row, body)
    if answered is not None or (has_truth and poses):
        panels.append(_no_pose() if answered is None else answered)
        labels.append("answer")
    captioned = [np.concatenate([panel, _caption(label)]) for panel, label in zip(panels, labels)]
    return render.contact_sheet(captioned, len(panels)) if panels else None


def _answered(answer: Answer, row: Example, body: BodyModel) -> np.ndarray | None:
    if answer.pose is not None and answer.boxes is None:
        return _body(answer.pose, body)
    if answer.pose is not None and answer.boxes is not None:
        person = best_overlap(answer.boxes, person_box(row.extras, row.id))
        return None if person is None else _body(answer.pose[person], body)
    for name, parents in POINTS.items():
        if name in answer.joints:
            return _lines(np.asarray(answer.joints[name]), parents)
    return None


def _body(pose: Pose, body: BodyModel) -> np.ndarray:
    """Without shape and place: those of other bodies do not fit this one."""
    bare = pose.replace(betas=None, has_betas=None, shape_space=None, translation=None, has_translation=None)
    try:
        return PosedBody(bare, body).render(PANEL)
    except (ValueError, PoseFileError):
        return _no_pose()


def _lines(points: np.ndarray, parents: Sequence[int]) -> np.ndarray:
    """Points (K, 3) of the camera frame, seen by the camera from afar."""
    image = Image.new("RGB", (PANEL, PANEL), "white")
    flat = points[:, :2]
    if not np.isfinite(flat).all():
        return _no_pose()
    middle, reach = (flat.max(0) + flat.min(0)) / 2, max(float(np.ptp(flat, axis=0).max()), 1e-6)
    places = [tuple(place) for place in ((flat - middle) / reach * 0.85 * PANEL + PANEL / 2).tolist()]
    draw = ImageDraw.Draw(image)
    for point, parent in enumerate(parents):
        if parent >= 0:
            draw.line([places[parent], places[point]], (70, 95, 130), 4)
    for x, y in places:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], (150, 70, 50))
    return np.asarray(image)


def _caption(words: str) -> np.ndarray:
    """A strip below a panel. Its letters can be read where three panels share the width of a phone."""
    image = Image.new("RGB", (PANEL, CAPTION), "white")
    ImageDraw.Draw(image).text((PANEL / 2, CAPTION / 2), words, "black", ImageFont.load_default(20), anchor="mm")
    return np.asarray(image)


def _no_pose() -> np.ndarray:
    image = Image.new("RGB", (PANEL, PANEL), (238, 238, 238))
    font = ImageFont.load_default(22)
    ImageDraw.Draw(image).text((PANEL / 2, PANEL / 2), "no pose", (90, 90, 90), font, anchor="mm")
    return np.asarray(image)


def _name(key: str) -> str:
    """A file name for a row, which any system takes: its letters and digits, and a hash that tells alike ones apart."""
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in key)
    return f"{plain[-40:].strip('-')}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}"
