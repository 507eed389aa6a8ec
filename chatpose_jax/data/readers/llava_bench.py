"""LLaVA-Bench (COCO): 90 questions about 30 images, with reference answers and what a judge needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chatpose_jax.data.config import Split
from chatpose_jax.data.reader import About, Skipped, missing
from chatpose_jax.data.readers.llava import image_group, read_image, row_of
from chatpose_jax.data.readers.untrusted import inside, read_json, read_lines
from chatpose_jax.data.record import Record
from chatpose_jax.errors import UserError

QUESTIONS = "playground/data/coco2014_val_qa_eval/qa90_questions.jsonl"
ANSWERS = "playground/data/coco2014_val_qa_eval/qa90_gpt4_answer.jsonl"
CONTEXT = "llava/eval/table/caps_boxes_coco2014_val_80.jsonl"
RULES = "llava/eval/table/rule.json"
_TEXTS = (QUESTIONS, ANSWERS, CONTEXT, RULES)
Row = Mapping[str, Any]
Table = Mapping[Any, Any]


class LlavaBench:
    """Reads LLaVA-Bench (COCO). A row shows an image and asks a question; GPT-4's answer, given to captions and boxes, is the reference.

    The text files have their places in the repository of LLaVA, or lie in the source folder itself:

    - ``qa90_questions.jsonl``: ``{"question_id", "image": "000000441147.jpg", "text", "category": "conv" | "detail" | "complex"}``
    - ``qa90_gpt4_answer.jsonl``: ``{"question_id", "text", "category"}``
    - ``caps_boxes_coco2014_val_80.jsonl``: ``{"id", "image", "captions": [5 texts], "instances": [{"category", "bbox": [4 numbers]}]}``
    - ``rule.json``: ``{category: {"role", "prompt"}}``

    All rows are of the split "test" and of kind "instruction". ``group`` is the image.

    ``extras``, all that the judge is shown: ``question_id`` (int), ``category``, ``question``, ``reference``; ``captions`` (a tuple of strings);
    ``boxes`` ((n, 4) float64, x and y of two corners, as parts of the width and height) and ``box_names`` (a tuple of n strings); ``role`` and
    ``prompt`` (of the category's rule); ``image`` (its name).

    Options: images: the folder of COCO's images of val2014, which are named ``COCO_val2014_000000441147.jpg`` or ``000000441147.jpg``; by default
    ``val2014`` in the source folder.

    Source: the repository haotian-liu/LLaVA (``llava/eval/eval_gpt_review_visual.py``).
    """

    about: ClassVar[About] = About(
        title="LLaVA-Bench (COCO)",
        licence="text: Apache 2.0 (repository of LLaVA); images: Flickr's terms of use, https://cocodataset.org",
        page="https://github.com/haotian-liu/LLaVA",
        files=(
            f"{', '.join(_TEXTS)} (a copy of the repository, or these four files)",
            "val2014 with COCO's images of val2014 (30 of them are needed)",
        ),
        options=("--set images=FOLDER is the folder of COCO's images of val2014",),
    )

    def __init__(self, source: Path, *, images: str = "") -> None:
        self.images = Path(images).expanduser() if images else source / "val2014"
        places = {
            name: next((path for path in (source / name, source / Path(name).name) if path.is_file()), None)
            for name in _TEXTS
        }
        absent = [source / name for name, path in places.items() if path is None]
        absent += [] if self.images.is_dir() else [self.images]
        if absent:
            raise missing(self.about, *absent)
        self.files = {name: path for name, path in places.items() if path is not None}

    def parts(self, split: Split) -> Sequence[str]:
        """One part: all questions."""
        return ("questions",) if split == "test" else ()

    def read(self, split: Split, part: str) -> Iterator[Record | Skipped]:
        """The questions, in their order."""
        answers = {row.get("question_id"): row for row in self._rows(ANSWERS)}
        context = {row.get("image"): row for row in self._rows(CONTEXT)}
        rules = read_json(self.files[RULES])
        if not isinstance(rules, Mapping):
            raise UserError(f"{self.files[RULES]}: expected rules by category, found a {type(rules).__name__}")
        for row in self._rows(QUESTIONS):
            key = str(row.get("question_id"))
            try:
                yield self._record(key, row, answers, context, rules)
            except (UserError, OSError) as error:  # OSError: a name that no file can have
                yield Skipped(key, "a damaged question, or what belongs to it", True, f"question {key}: {error}")

    def _rows(self, name: str) -> Iterator[Row]:
        path = self.files[name]
        return (row_of(line, f"{path}, line {number}") for number, line in read_lines(path))

    def _record(self, key: str, row: Row, answers: Table, context: Table, rules: Table) -> Record | Skipped:
        number, image = row.get("question_id"), _text(row, "image")
        if not isinstance(number, int) or isinstance(number, bool):
            raise UserError(f"question_id: expected a whole number, found {number!r:.100}")
        category = _text(row, "category")
        answer, shown, rule = (
            self._entry(*place)
            for place in ((ANSWERS, answers, number), (CONTEXT, context, image), (RULES, rules, category))
        )
        path = next((each for each in self._paths(image) if each.is_file()), None)
        if path is None:
            return Skipped(key, "the image is not there", detail=f"no {self._paths(image)[0]}")
        names, boxes = _boxes(shown.get("instances"))
        question, reference = _text(row, "text"), _text(answer, "text")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return Record(
            key,
            "instruction",
            (({"role": "user", "content": content}, {"role": "assistant", "content": reference}),),
            images=(read_image(path),),
            group=image_group(image),
            extras={
                "question_id": number,
                "category": category,
                "question": question,
                "reference": reference,
                "captions": _texts(shown.get("captions")),
                "boxes": boxes,
                "box_names": names,
                "role": _text(rule, "role"),
                "prompt": _text(rule, "prompt"),
                "image": image,
            },
        )

    def _entry(self, file: str, table: Table, key: Any) -> Row:
        entry = table.get(key)
        if not isinstance(entry, Mapping):
            raise UserError(f"nothing in {self.files[file]} belongs to it")
        return entry

    def _paths(self, image: str) -> Sequence[Path]:
        return [inside(self.images, name) for name in (f"COCO_val2014_{image}", image)]


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}: expected text, found {value!r:.100}")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"captions: expected a list of texts, found {value!r:.100}")
    return tuple(value)


def _boxes(value: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Names, and boxes (n, 4). Raises UserError for anything else."""
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise UserError(f"instances: expected a list of boxes, found {value!r:.100}")
    try:
        boxes = np.array([each.get("bbox") for each in value], np.float64).reshape(len(value), 4)
    except (ValueError, TypeError):
        raise UserError(f"instances: expected 4 numbers as bbox of each, found {value!r:.100}") from None
    return tuple(_text(each, "category") for each in value), boxes
