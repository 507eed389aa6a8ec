from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.llava_bench import ANSWERS, CONTEXT, QUESTIONS, RULES, LlavaBench
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

from .llava_bench_files import IMAGES, lines, write_llava_bench


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_llava_bench(tmp_path)


def read(reader: LlavaBench) -> list[Record | Skipped]:
    return [item for part in reader.parts("test") for item in reader.read("test", part)]


def test_rows_carry_what_the_judge_needs(source: Path) -> None:
    found = read(LlavaBench(source))
    assert len(found) == 6 and not LlavaBench(source).parts("train") and not LlavaBench(source).parts("val")
    for number, item in enumerate(found):
        assert isinstance(item, Record) and item.kind == "instruction" and item.group == IMAGES[number // 3][:-4]
        user, assistant = item.conversations[0]
        assert user["content"][1]["text"] == f"Q{number}?" and assistant["content"] == f"A{number}."
        encoded = encode_example(tiny_processor(preset("tiny")), item.example(), 512)
        assert len(encoded["images"]) == 1 and len(encoded["pose_positions"]) == 0
    first = found[0]
    assert isinstance(first, Record)
    extras = dict(from_bytes(to_bytes(first)).extras)
    boxes = extras.pop("boxes")
    assert [f"{name}: {box}" for name, box in zip(extras["box_names"], boxes.tolist())] == [
        "donut: [0.37, 0.584, 0.504, 0.709]",
        "cup: [0.0, 0.1, 1.0, 0.2]",
    ]
    assert extras == {
        "question_id": 0,
        "category": "conv",
        "question": "Q0?",
        "reference": "A0.",
        "captions": ("C0", "C1", "C2", "C3", "C4"),
        "box_names": ("donut", "cup"),
        "role": "Assistant",
        "prompt": "Judge conv.",
        "image": IMAGES[0],
    }
    last = found[-1]
    assert (
        isinstance(last, Record) and last.extras["boxes"].shape == (0, 4) and last.extras["boxes"].dtype == np.float64
    )


def test_other_places(source: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in (QUESTIONS, ANSWERS, CONTEXT, RULES):
        (source / name).rename(flat / Path(name).name)
    assert len(read(LlavaBench(flat, images=str(source / "val2014")))) == 6
    with pytest.raises(UserError, match=r"qa90_questions\.jsonl.*rule\.json not found.*LLaVA"):
        LlavaBench(source)
    with pytest.raises(UserError, match=r"val2014 not found"):
        LlavaBench(flat)


def test_faults(source: Path) -> None:
    (source / "val2014" / IMAGES[1]).unlink()
    (source / ANSWERS).write_text(lines([{"question_id": n, "text": f"A{n}."} for n in (0, 2, 3, 4, 5)]))
    found = read(LlavaBench(source))
    assert [isinstance(item, Record) for item in found] == [True, False, True, False, False, False]
    assert (
        isinstance(found[1], Skipped) and found[1].broken and "qa90_gpt4_answer.jsonl belongs to it" in found[1].detail
    )
    assert isinstance(found[3], Skipped) and not found[3].broken and f"COCO_val2014_{IMAGES[1]}" in found[3].detail
    (source / CONTEXT).write_text(
        lines([{"image": IMAGES[0], "captions": [], "instances": [{"category": "x", "bbox": [1]}]}])
    )
    item = read(LlavaBench(source))[0]
    assert isinstance(item, Skipped) and item.broken and "4 numbers" in item.detail
