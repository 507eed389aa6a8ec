"""The source "keypoints": images of another source, each with a question that is answered with 2D keypoints in words (LLaVA*-S of the paper)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.example import NO_POSES, Example
from chatpose_jax.data.keypoint_text import SCALE, KeypointText
from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import upright_size
from smpl_jax.keypoints import keypoint_set

NAMED = "keypoint_set"
"""The extra that names the set of ``keypoints_2d``."""
EXTRAS = {("keypoints_2d", 44): "humans44", ("poses2d", 18): "coco18", ("openpose_result", 18): "coco18"}
"""(name of the extra, number of its points) -> its set, where ``NAMED`` says nothing."""
LEAST = 4
"""A row needs so many points in its image."""
LOOKED = 1000
"""Rows that are looked at for one with keypoints."""


def keypoints(
    split: Split,
    *,
    of: str,
    open_source: Callable[..., Sequence[Example]],
    points: str = "coco17",
    scale: int = SCALE,
    **options: Any,
) -> KeypointRows:
    """The source "keypoints" of ``data.sources``.

    of: the source whose images and keypoints are used. options: its options. points, scale: of ``KeypointText``. open_source: given by
    ``data.sources``.

    Raises UserError as ``KeypointText`` and that source do.
    """
    text = KeypointText(points, scale)
    wished = {"kind": "image", "keypoints": points}  # where the source has such options, as the generated set does
    return KeypointRows(open_source(of, split, options, wished), text)


class KeypointRows(Sequence[Example]):
    """Row i has the image of row i of ``rows``, the question of ``KeypointText``, and the keypoints of the row in words.

    A row without image, or with fewer than ``LEAST`` keypoints in it, is replaced by the next that has them. The rows have no ``<POSE>`` and no
    pose. Their kind is "instruction", their id that of the image's row and ``:keypoints``.
    """

    def __init__(self, rows: Sequence[Example], text: KeypointText) -> None:
        self.rows, self.text = rows, text

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Row ``index``, or the rows of a slice; IndexError beyond the size. Raises UserError if no row near it has keypoints."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        looked = min(LOOKED, len(self))
        for step in range(looked):
            row = self.rows[(index + step) % len(self)]
            if (found := self._rewritten(row)) is not None:
                return found
        raise UserError(
            f"{self.rows[index].place}: none of {looked} rows from here on has an image and {LEAST} keypoints in it that {self.text.points} "
            f"knows; expected them in the extras {', '.join(sorted({name for name, _ in EXTRAS}))}"
        )

    def _rewritten(self, row: Example) -> Example | None:
        content = row.messages[0]["content"]
        images = [] if isinstance(content, str) else [part for part in content if part["type"] == "image"]
        points = keypoints_of(row.extras, self.text.points) if len(images) == 1 else None
        if points is None:
            return None
        answer = self.text.write(points, upright_size(images[0]["image"], row.place))
        if answer.count(",") < LEAST - 1:
            return None
        question = {"type": "text", "text": self.text.question(str(row.extras.get("description", "")))}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*images, question]},
            {"role": "assistant", "content": answer},
        ]
        return dataclasses.replace(row, id=f"{row.id}:keypoints", kind="instruction", messages=messages, poses=NO_POSES)


def keypoints_of(extras: Mapping[str, Any], points: str) -> np.ndarray | None:
    """(K, 3) the 2D keypoints of a row as those of the set ``points``: pixels and confidence, zeros for points that are not known; None if
    the row has no keypoints of a known set.

    A point is that of the same name. Of 4D-Humans' 44 points, which have some twice, it is the annotated one where the detector saw none.
    """
    for name, count in EXTRAS:
        given = np.asarray(extras.get(name, ()))
        known = str(extras.get(NAMED) or (EXTRAS[name, count] if len(given) == count else ""))
        if known and len(given):
            places = {point.name: i for i, point in enumerate(keypoint_set(known))}
            found = np.zeros((len(keypoint_set(points)), 3), np.float32)
            for i, point in enumerate(keypoint_set(points)):
                same = [places[other] for other in (point.name, f"lsp_{point.name}") if other in places]
                seen = [given[place] for place in same if given[place][2] > 0]
                found[i] = seen[0] if seen else 0
            return found
    return None
