"""2D keypoints as text, as language models write them, and a tolerant reader of such text.

``KeypointText`` is the one place that defines the text: training (the source "keypoints") and evaluation (the system "keypoints") use it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from chatpose_jax.errors import UserError
from chatpose_jax.settings import one_line, whole
from smpl_jax.keypoints import keypoint_set

SCALE = 1000
"""Coordinates go from 0 to this number."""
LONGEST = 20_000
"""Characters of a text that are read."""
BROKEN = 100
"""Brackets that may open something else than JSON. Each is tried, which takes as long as the rest of the text."""
_LABELS = ("name", "keypoint", "label", "joint", "part")
_CONFIDENCE = ("confidence", "score", "visibility", "visible", "v", "c")
_LINKS = r"[\s_\-.*\"'`]*"
"""What may stand between the words of a name."""


class Read(NamedTuple):
    """points: (K, 3) float32, x and y in pixels and the confidence 1; zeros for a point that the text does not give. unread: how many things of
    the text look like a point and are not used: an unknown name, a second place for one point, a place outside the image, a lone number."""

    points: np.ndarray
    unread: int

    def __repr__(self) -> str:
        return one_line(self)


@dataclasses.dataclass(frozen=True)
class KeypointText:
    """The text ``nose 480 112, left eye 495 98, …``: names of a set of keypoints, each with x and y.

    x goes from 0 at the left side of the image to ``scale`` at its right side, y from 0 at the top to ``scale`` at the bottom, both rounded to
    whole numbers. So a place does not depend on the size to which a model resizes the image. If the model crops images that are not square
    (``ImageSettings.fit``), coordinates are still those of the whole image. left and right are those of the person.

    points: the set, a key of ``smpl_jax.keypoints.KEYPOINT_SETS``. scale: with 100, a small model has two digits to learn instead of three.
    """

    points: str = "coco17"
    scale: int = SCALE

    def __post_init__(self) -> None:
        try:
            keypoint_set(self.points)
        except ValueError as error:
            raise UserError(str(error)) from None
        whole("scale", self.scale, 10, 100_000)

    @property
    def names(self) -> tuple[str, ...]:
        """What the text calls each point of the set, in order."""
        return tuple(point.name.replace("_", " ") for point in keypoint_set(self.points))

    def question(self, description: str = "") -> str:
        """The question of the training rows. description: says which person is meant."""
        asked = f"Where are the keypoints of this person? Give x and y from 0 to {self.scale}."
        return f"{description} {asked}".strip()

    def instructions(self, description: str = "") -> str:
        """A longer question, for a language model that was not trained for this answer."""
        whom = description or "The person in the middle of the image is meant."
        return (
            f"{whom} Estimate where the keypoints of this person are in the image. Keypoints: {', '.join(self.names)}. "
            "Left and right are those of the person, not of the viewer. "
            f"x goes from 0 at the left side of the image to {self.scale} at its right side, y from 0 at the top to {self.scale} at the bottom. "
            "Write one line of the form 'name x y, name x y' and nothing else. Guess the place of a keypoint that is hidden; leave out a "
            "keypoint that is outside the image."
        )

    def write(self, points: np.ndarray, size: tuple[int, int]) -> str:
        """The text for (K, 3): x and y in pixels, and a confidence. Points without confidence or outside the image are left out.

        size: width and height of the image. The text is empty if no point is left.
        """
        points = np.asarray(points, np.float64)
        if points.shape != (len(self.names), 3):
            raise UserError(f"{self.points} has {len(self.names)} points of x, y and confidence, found {points.shape}")
        places = points[:, :2] / size
        seen = (points[:, 2] > 0) & (places >= 0).all(1) & (places <= 1).all(1)
        whole_numbers = np.rint(np.where(seen[:, None], places, 0) * self.scale).astype(int)
        return ", ".join(f"{self.names[i]} {x} {y}" for i, (x, y) in enumerate(whole_numbers) if seen[i])

    def read(self, text: str, size: tuple[int, int]) -> Read:
        """The points of a text, in pixels of an image of width and height ``size``.

        It reads names with their numbers in any order of the points, as a line, a list, a table or JSON. A third number is a confidence, of which
        0 says that the point is not seen. It also reads fractions of the image, if all coordinates lie in [0, 1] and one has a decimal point,
        and per cent with its sign. Numbers without any name are the points of the set in order, if there are just as many. Any text is
        read: one without points gives none.
        """
        entries = self._entries(text[:LONGEST])
        places: dict[int, list[float]] = {}
        unread = 0
        for name, numbers in entries:
            point = self._number(name)
            if len(numbers) < 2:  # "left wrist: not visible"; the number of a line; half of a place
                unread += point is not None and len(numbers) == 1
            elif point is None or point in places:
                unread += 1
            elif len(numbers) == 2 or numbers[2] != 0:
                places[point] = numbers[:2]
        values = [value for place in places.values() for value in place]
        fractions = all(0 <= value <= 1 for value in values) and any(value % 1 for value in values)
        top = 1 if fractions else self.scale
        points = np.zeros((len(self.names), 3), np.float32)
        for point, (x, y) in places.items():
            if 0 <= x <= top and 0 <= y <= top:
                points[point] = x / top * size[0], y / top * size[1], 1
            else:
                unread += 1
        return Read(points, unread)

    def _number(self, name: str) -> int | None:
        return self._spellings.get(_one_word(name))

    def _entries(self, text: str) -> list[tuple[str, list[float]]]:
        """What a text calls points, with the numbers of each."""
        json_entries, entries = _of_json(text), self._of_words(text)
        for found in (json_entries, entries):
            if any(self._number(name) is not None and len(numbers) > 1 for name, numbers in found):
                return found
        for found in (json_entries, entries):
            bare = [numbers for _, numbers in found if numbers]
            if len(bare) == 1 and len(bare[0]) == 2 * len(self.names):
                bare = [bare[0][i : i + 2] for i in range(0, len(bare[0]), 2)]
            if len(bare) == len(self.names) and all(len(numbers) in (2, 3) for numbers in bare):
                return list(zip(self.names, bare))
        return max(entries, json_entries, key=len)

    def _of_words(self, text: str) -> list[tuple[str, list[float]]]:
        """What a text calls points, each with the numbers that follow it; "" is the name of numbers before any."""
        found: list[tuple[str, list[float]]] = [("", [])]
        starts = [0]
        for match in self._tokens.finditer(text):
            numbers = found[-1][1]
            if match["number"]:
                numbers.append(float(match["number"]) * (self.scale / 100 if match["percent"] else 1))
            elif (
                match["name"] or len(numbers) > 1
            ):  # after a complete point, numbers behind another word do not belong to it
                found.append((match[0], []))
                starts.append(match.start())
        named = [i for i, (name, _) in enumerate(found) if self._number(name) is not None]
        before = len(named) > 1 and named[0] == 1 and len(found[0][1]) == 2 and not found[named[-1]][1]
        if before and "\n" not in text[: starts[1]].strip():  # "(480, 112) nose, (495, 98) left eye"
            return [(found[i][0], found[i - 1][1]) for i in named]
        return found

    @functools.cached_property
    def _spellings(self) -> dict[str, int]:
        """A name in one word, in each way of ``_variants`` -> number of the point."""
        found: dict[str, int] = {}
        for number, name in enumerate(self.names):
            for variant in _variants(name):
                found.setdefault(_one_word(variant), number)
        return found

    @functools.cached_property
    def _tokens(self) -> re.Pattern[str]:
        """Names, numbers and other words of a text. Words for x, y and the confidence are left out."""
        variants = sorted({variant for name in self.names for variant in _variants(name)}, key=len, reverse=True)
        names = "|".join(_LINKS.join(variant.split()) for variant in variants)
        number = r"(?P<number>(?:(?<!\w)-)?(?:\d+(?:\.\d+)?|\.\d+))(?P<percent>\s?%)?"
        return re.compile(
            rf"(?<![a-z])(?P<name>{names})(?![a-z])|{number}|(?<![a-z])(?!(?:x|y|px|pixels|conf|confidence|score)(?![a-z]))[a-z]+",
            re.IGNORECASE,
        )


def _one_word(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _variants(name: str) -> list[str]:
    """The ways that people write a name."""
    side, _, rest = name.partition(" ")
    return [name, f"{side[0]} {rest}", f"{rest} {side}", f"{rest} {side[0]}"] if side in ("left", "right") else [name]


def _of_json(text: str) -> list[tuple[str, list[float]]]:
    """The points of all JSON in a text, also inside a Markdown fence or among words. A text with many brackets that open no JSON is left."""
    found: list[tuple[str, list[float]]] = []
    place, broken, decoder = 0, 0, json.JSONDecoder()
    while broken < BROKEN and (start := re.compile(r"[\[{]").search(text, place)):
        try:
            value, place = decoder.raw_decode(text, start.start())
            found += _walk(value)
        except (ValueError, RecursionError, OverflowError):
            place, broken = start.end(), broken + 1
    return found


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, list[float]]]:
    """Names and numbers of the points in JSON. name: of the object or list that holds ``value``."""
    if isinstance(value, dict):
        known = {str(key).lower(): item for key, item in value.items()}
        label = next((known[key] for key in _LABELS if isinstance(known.get(key), str)), "")
        if "x" in known and "y" in known:
            rest = [known[key] for key in _CONFIDENCE if key in known]
            yield label or name, _floats([known["x"], known["y"], *rest[:1]])
            return
        for key, item in value.items():
            yield from _walk(item, label or str(key))
    elif isinstance(value, list) and value and isinstance(value[0], str):
        yield from _walk(value[1] if len(value) == 2 else value[1:], value[0])
    elif isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        for item in value:
            yield from _walk(item)
    elif isinstance(value, list):
        yield name, _floats(value)


def _floats(values: list[Any]) -> list[float]:
    """The numbers of a place; none unless x and y are numbers."""
    numbers = [float(value) if isinstance(value, int | float) else None for value in values]
    kept = list(itertools.takewhile(lambda value: value is not None, numbers))
    return kept if len(kept) > 1 else []  # type: ignore[return-value]
