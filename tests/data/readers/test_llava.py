import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.llava import FILE, Llava, image_group
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.images import load_image
from chatpose_jax.processing.processor import tiny_processor

QUESTION = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A dog."}
IMAGES = {
    "coco/train2017/000000033471.jpg": "JPEG",
    "gqa/images/2354786.jpg": "JPEG",
    "vg/VG_100K/2354786.jpg": "JPEG",
    "ocr_vqa/images/006213.gif": "GIF",
    "textvqa/train_images/ab12.png": "PNG",
}


def image(kind: str, size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def row(name: str | None = None, *turns: dict[str, str], id: Any = "x") -> dict[str, Any]:
    return {"id": id, **({"image": name} if name else {}), "conversations": list(turns or (QUESTION, ANSWER))}


def write(folder: Path, rows: list[Any], name: str = FILE) -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, kind in IMAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image(kind))
    words = row(None, {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}, id="share_0")
    return write(tmp_path, [*map(row, IMAGES), {**words, "model": ""}])


def read(reader: Llava) -> list[Record | Skipped]:
    reader.parts("train")
    worker = pickle.loads(pickle.dumps(reader))
    return [item for part in reader.parts("train") for item in worker.read("train", part)]


def records(reader: Llava) -> list[Record]:
    return [item for item in read(reader) if isinstance(item, Record)]


def only(folder: Path, entry: Any, **options: Any) -> Record | Skipped:
    [item] = read(Llava(write(folder, [entry]), **options))
    return item


def test_all_kinds_of_rows(source: Path) -> None:
    found = records(Llava(source))
    assert len(found) == 6 and Llava(source).parts("val") == () and Llava(source).parts("test") == ()
    assert {item.kind for item in found} == {"instruction"} and len({item.key for item in found}) == 6
    for item, name in zip(found, IMAGES):
        assert item.images == ((source / name).read_bytes(),) and item.extras == {"image": name}
    user, assistant = found[0].conversations[0]
    assert user == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    assert assistant == {"role": "assistant", "content": "A dog."}
    assert found[-1].images == () and found[-1].conversations[0][0]["content"] == "Hello"
    for item in found:
        encoded = encode_example(tiny_processor(preset("tiny")), from_bytes(to_bytes(item)).example(), 512)
        assert len(encoded["images"]) == len(item.images) and len(encoded["pose_positions"]) == 0


def test_subsets(source: Path) -> None:
    reader = Llava(source, subset="released")
    assert [item.extras["image"] for item in records(reader)] == list(IMAGES)[:3]
    left_out = [item for item in read(reader) if isinstance(item, Skipped)]
    assert len(left_out) == 3 and not any(item.broken for item in left_out)
    assert len(records(Llava(source, text_only=False))) == 5


def test_groups_are_images() -> None:
    names = ("coco/train2017/000000033471.jpg", "000000033471.jpg", "COCO_train2014_000000033471.jpg")
    assert {image_group(name) for name in names} == {"000000033471"}
    assert image_group("gqa/images/1.jpg") == image_group("vg/VG_100K_2/1.jpg") != image_group("textvqa/1.jpg")


def test_where_the_image_stands(source: Path) -> None:
    name, begin = next(iter(IMAGES)), [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    for value in ("What is it?\n<image>", "<image>What is it?", " <image> What is it?  "):
        item = only(source, row(name, {"from": "human", "value": value}, ANSWER))
        assert isinstance(item, Record) and item.conversations[0][0]["content"] == begin
    item = only(source, row(name, {"from": "human", "value": "<image>"}, ANSWER))
    assert isinstance(item, Record) and item.conversations[0][0]["content"] == [{"type": "image"}]
    words = only(source, row(None, {"from": "human", "value": "In HTML, <image> is no tag."}, ANSWER))
    assert isinstance(words, Record) and words.conversations[0][0]["content"] == "In HTML, <image> is no tag."
    assert not encode_example(tiny_processor(preset("tiny")), words.example(), 512)["images"]
    for entry in (
        row(name, {"from": "human", "value": "What?"}, ANSWER),
        row(name, QUESTION, ANSWER, QUESTION, ANSWER),
    ):
        item = only(source, entry)
        assert isinstance(item, Skipped) and item.broken and "for each of 1 images" in item.detail


def test_turns(source: Path) -> None:
    human = {"from": "human", "value": "And then?"}
    cases = {
        2: (ANSWER, human, ANSWER),
        4: (human, ANSWER, human, ANSWER, human),
        0: (human, {"from": "gpt", "value": " "}, human, ANSWER),
    }
    for count, turns in cases.items():
        item = only(source, row(None, *turns))
        if count:
            assert isinstance(item, Record) and len(item.conversations[0]) == count
        else:
            assert isinstance(item, Skipped) and not item.broken and item.reason == "no question with an answer"
    for turns in (
        (human, human),
        (human, {"from": "system", "value": "x"}),
        (human, {"from": "gpt", "value": 3}),
        (human, {"from": []}),
    ):
        item = only(source, row(None, *turns))
        assert isinstance(item, Skipped) and item.broken and "expected a turn of gpt" in item.detail


def test_missing_images(source: Path, tmp_path: Path) -> None:
    for name in IMAGES:
        if not name.startswith("gqa"):
            (source / name).unlink()
    found = [item for item in read(Llava(source)) if isinstance(item, Skipped)]
    assert [item.reason for item in found] == [
        f"an image of {folder} is not there" for folder in ("coco", "vg", "ocr_vqa", "textvqa")
    ]
    assert not any(item.broken for item in found) and "000000033471.jpg" in found[0].detail
    (source / "gqa/images/2354786.jpg").unlink()
    with pytest.raises(UserError, match=r"000000033471\.jpg not found.*train_images.*--set images=FOLDER.*CC BY"):
        Llava(source).parts("train")
    with pytest.raises(UserError, match=r"mix665k\.json not found"):
        Llava(source / "coco")
    (source / "other").mkdir()
    write(source / "other", [row("a.jpg")], "mine.json")
    (source / "coco" / "a.jpg").write_bytes(image("JPEG"))
    assert len(records(Llava(source / "other", file="mine.json", images=str(source / "coco")))) == 1


def test_large_images(source: Path) -> None:
    small, large = image("JPEG", (64, 48)), image("PNG", (128, 60))
    (source / "coco/s.jpg").write_bytes(small)
    (source / "coco/l.png").write_bytes(large)
    write(source, [row("coco/s.jpg"), row("coco/l.png")])
    first, second = records(Llava(source, max_side=64))
    reduced = Image.open(io.BytesIO(second.images[0]))
    assert first.images == (small,) and reduced.format == "JPEG" and reduced.size == (64, 30)
    expected = np.asarray(load_image(large).resize((64, 30), Image.Resampling.LANCZOS), np.float64)
    assert np.abs(np.asarray(reduced, np.float64) - expected).mean() < 8
    assert records(Llava(source))[1].images == (large,)


def test_damaged_rows_and_images(source: Path) -> None:
    name = next(iter(IMAGES))
    whole = (source / name).read_bytes()
    cases: dict[str, tuple[Any, str]] = {
        "outside": (row("../secret.jpg"), "inside"),
        "names": (row(None) | {"image": 7}, "expected a name"),
        "turns": ({"id": "x"}, "expected a list of turns"),
        "long": (row("x" * 300), "File name too long"),
    }
    for entry, words in cases.values():
        item = read(Llava(write(source, [row(name), entry])))[1]
        assert isinstance(item, Skipped) and item.broken and words in item.detail
    (source / name).write_bytes(whole[: len(whole) // 2])
    item = only(source, row(name))
    assert isinstance(item, Skipped) and item.broken and "000000033471.jpg" in item.detail
    assert isinstance(only(source, row(name), decode=False), Record)
    (source / name).write_bytes(b"<html>not found</html>")
    item = only(source, row(name), decode=False)
    assert isinstance(item, Skipped) and item.broken and "expected an image" in item.detail
