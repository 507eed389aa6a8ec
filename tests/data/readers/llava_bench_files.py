"""Writes the files of LLaVA-Bench (COCO), with images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from chatpose_jax.data.readers.llava_bench import ANSWERS, CONTEXT, QUESTIONS, RULES

IMAGES = ("000000441147.jpg", "000000353536.jpg")
CATEGORIES = ("conv", "detail", "complex")


def lines(rows: list[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write_llava_bench(folder: Path) -> Path:
    """The files as they lie in the repository of LLaVA."""
    pairs = [(image, category) for image in IMAGES for category in CATEGORIES]
    bases = [{"question_id": n, "category": category} for n, (_, category) in enumerate(pairs)]
    boxes = [
        {"category": "donut", "bbox": [0.37, 0.584, 0.504, 0.709]},
        {"category": "cup", "bbox": [0, 0.1, 1.0, 0.2]},
    ]
    files = {
        QUESTIONS: lines(
            [base | {"image": image, "text": f"Q{n}?"} for n, (base, (image, _)) in enumerate(zip(bases, pairs))]
        ),
        ANSWERS: lines([base | {"text": f"A{n}."} for n, base in enumerate(bases)]),
        CONTEXT: lines(
            [
                {"id": name[:-4], "image": name, "captions": [f"C{n}" for n in range(5)], "instances": some}
                for name, some in zip(IMAGES, (boxes, []))
            ]
        ),
        RULES: json.dumps(
            {name: {"role": "Assistant", "prompt": f"Judge {name}."} for name in (*CATEGORIES, "coding")}
        ),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "val2014").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "val2014" / f"COCO_val2014_{IMAGES[0]}")
    Image.new("RGB", (40, 30)).save(folder / "val2014" / IMAGES[1])
    return folder
