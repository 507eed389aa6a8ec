import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from chatpose_jax.cli.main import main
from chatpose_jax.data.collate import encode_example
from chatpose_jax.data.config import Split
from chatpose_jax.data.prepare import prepare
from chatpose_jax.data.prepared import prepared
from chatpose_jax.data.reader import Skipped
from chatpose_jax.data.readers.json_schema import JsonSchema
from chatpose_jax.data.readers.jsonlines import JsonLines, schema_text
from chatpose_jax.data.record import Record, from_bytes, to_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor

VECTORS = np.random.default_rng(0).normal(0, 0.5, (24, 3))
MATRICES = Rotation.from_rotvec(VECTORS).as_matrix()
POSE = {"frame": "camera", "axis_angle": VECTORS.tolist()}
ASK = [
    {"role": "user", "content": "A person sits. Which pose is it?"},
    {"role": "assistant", "content": "It is <POSE>."},
]
TEXT = {"id": "sit", "messages": ASK, "poses": [POSE], "captions": ["Sits.", "A person sits."]}
LOOK = {
    "role": "user",
    "content": [{"type": "image", "image": "photos/a.jpg"}, {"type": "text", "text": "Which pose?"}],
}
IMAGE = {"id": "look", "messages": [LOOK, ASK[1]], "poses": [POSE | {"betas": [0.5] * 10, "shape_space": "SMPL"}]}
URL = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "photos/a.jpg"}}]}
WORDS = {
    "id": "talk",
    "messages": [{"role": "system", "content": "Be brief."}, URL, {"role": "assistant", "content": "A dog."}],
    "group": "clip 7",
}
GOOD = [TEXT, IMAGE, WORDS]


def change(row: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A row with one value changed, or taken out (...). path: keys and numbers with dots between them."""
    row = copy.deepcopy(row)
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place: Any = row
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return row


BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1], "the row: expected an object with id"),
    "no id": (change(TEXT, "id", ...), "the field 'id' is missing"),
    "an empty id": (change(TEXT, "id", ""), "id: expected text that names the row"),
    "a number as id": (change(TEXT, "id", 7), "id: expected text that names the row; found 7"),
    "another field": (TEXT | {"pose": []}, "there is no field 'pose'; did you mean poses?"),
    "a role": (
        change(TEXT, "messages.0.role", "human"),
        'messages[0].role: expected "system", "user" or "assistant"; or "text", in a message that is alone; found',
    ),
    "no content": (change(TEXT, "messages.1.content", ...), "messages[1]: the field 'content' is missing"),
    "content": (change(TEXT, "messages.0.content", 3), "messages[0].content: expected text, or a list of parts"),
    "a part": (
        change(IMAGE, "messages.0.content.0", {"type": "video", "video": "x"}),
        "messages[0].content: expected text, or",
    ),
    "a part with two": (change(IMAGE, "messages.0.content.0.text", "x"), "messages[0].content: expected text, or"),
    "no frame": (change(TEXT, "poses.0.frame", ...), "poses[0]: the field 'frame' is missing"),
    "a frame": (change(TEXT, "poses.0.frame", "y-up"), "poses[0].frame: expected the axes of the root"),
    "no rotations": (change(TEXT, "poses.0.axis_angle", ...), "poses[0]: expected an object with frame and one of"),
    "two kinds": (
        change(TEXT, "poses.0.matrices", MATRICES.tolist()),
        "poses[0]: expected an object with frame and one of",
    ),
    "23 joints": (
        change(TEXT, "poses.0.axis_angle", VECTORS[:23].tolist()),
        "or 55 (SMPL-X) joints, the root first; found",
    ),
    "flat": (
        change(TEXT, "poses.0.axis_angle", VECTORS.ravel().tolist()[:24]),
        "poses[0].axis_angle[0]: expected a list of 3 numbers",
    ),
    "text": (change(TEXT, "poses.0.axis_angle.3.1", "0.5"), "poses[0].axis_angle[3][1]: expected a list of 3 numbers"),
    "true": (change(TEXT, "poses.0.axis_angle.3.1", True), "poses[0].axis_angle[3][1]: expected"),
    "betas": (change(IMAGE, "poses.0.betas", []), "poses[0].betas: expected 1 to 300 shape coefficients"),
    "translation": (TEXT | {"poses": [POSE | {"translation": [0, 1]}]}, "translation: expected 3 numbers in metres"),
    "measured": (
        TEXT | {"poses": [POSE | {"measured": [1] * 24}]},
        "measured[0]: expected true or false for each joint",
    ),
    "captions": (TEXT | {"captions": "Sits."}, "captions: expected a list of descriptions of the first pose"),
    "group": (TEXT | {"group": None}, "group: expected text that names the recording"),
}
BEYOND: dict[str, tuple[Any, str]] = {
    "one message": (TEXT | {"messages": ASK[:1]}, "messages: expected an answer of the assistant"),
    "text and more": (TEXT | {"messages": [{"role": "text", "content": "A river."}, *ASK]}, "must be the only message"),
    "more poses": (TEXT | {"poses": [POSE, POSE]}, "poses: expected one for each of 1 <POSE>"),
    "no poses": (change(TEXT, "poses", ...), "for each of 1 <POSE> in the assistant's messages, found 0"),
    "turns": (TEXT | {"messages": [*ASK, ASK[1]]}, "two assistant messages in a row"),
    "an answer with an image": (TEXT | {"messages": [ASK[0], LOOK | {"role": "assistant"}]}, "cannot hold an image"),
    "no rotation": (
        TEXT | {"poses": [{"frame": "camera", "matrices": (2 * MATRICES).tolist()}]},
        "must be rotation matrices",
    ),
    "no columns": (TEXT | {"poses": [{"frame": "camera", "rotation_6d": [[0.0] * 6] * 24}]}, "finite"),
    "degrees": (
        change(TEXT, "poses.0.axis_angle.0", [45.0, 0, 0]),
        "vectors in radians, found one of 45; multiply degrees",
    ),
    "infinite": (change(TEXT, "poses.0.axis_angle.0.0", float("inf")), "poses: "),
    "measured of others": (TEXT | {"poses": [POSE | {"measured": [True] * 22}]}, "measured must have shape"),
    "no image": (change(IMAGE, "messages.0.content.0.image", "b.jpg"), "no image at "),
    "an image outside": (change(IMAGE, "messages.0.content.0.image", "../a.jpg"), "expected the name of a file inside"),
    "two frames": (
        {"id": "x", "messages": [*ASK, *ASK], "poses": [POSE, POSE | {"frame": "model"}]},
        "poses: stack takes poses of equal frames",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 20), "red").save(tmp_path / "photos" / "a.jpg")
    return tmp_path


def write(folder: Path, rows: list[Any], split: str = "train") -> JsonLines:
    (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return JsonLines(folder)


def read(reader: JsonLines, split: Split = "train") -> list[Record | Skipped]:
    return [item for part in reader.parts(split) for item in reader.read(split, part)]


def one(folder: Path, row: Any) -> Record:
    [item] = read(write(folder, [row]))
    assert isinstance(item, Record), item
    return item


def test_rows_of_each_kind(folder: Path) -> None:
    found = read(write(folder, GOOD))
    assert [item.kind for item in found if isinstance(item, Record)] == ["text", "image", "instruction"]
    for item, row in zip(found, GOOD):
        assert isinstance(item, Record) and item.key.endswith(f"/{row['id']}") and item.group == row.get("group", "")
        encoded = encode_example(tiny_processor(preset("tiny")), from_bytes(to_bytes(item)).example(), 512)
        assert len(encoded["images"]) == len(item.images) and len(encoded["pose_positions"]) == len(
            row.get("poses", ())
        )
    text, image = found[:2]
    assert isinstance(text, Record) and text.extras == {"caption": ("Sits.", "A person sits.")}
    assert (
        isinstance(image, Record)
        and image.extras == {}
        and image.images == ((folder / "photos" / "a.jpg").read_bytes(),)
    )
    assert image.poses.betas.tolist() == [[0.5] * 10] and image.poses.shape_space == "SMPL"
    assert not JsonLines(folder).parts("val")
    write(folder, [WORDS], "val")
    assert len(read(JsonLines(folder), "val")) == 1


@pytest.mark.parametrize("frame", ["camera", "model", "z-up"])
@pytest.mark.parametrize("joints", [22, 24, 52, 55])
def test_rotations_in_each_form(folder: Path, frame: str, joints: int) -> None:
    vectors = np.random.default_rng(joints).normal(0, 1, (joints, 3))
    expected = Rotation.from_rotvec(vectors).as_matrix()
    forms = {
        "axis_angle": vectors,
        "matrices": expected,
        "rotation_6d": np.concatenate([expected[..., 0], 3 * expected[..., 1] + 0.5 * expected[..., 0]], -1),
    }
    for name, values in forms.items():
        poses = one(folder, TEXT | {"poses": [{"frame": frame, name: values.tolist()}]}).poses
        assert poses.frame == frame and poses.measured is None
        np.testing.assert_allclose(poses.rotations[0], expected, atol=1e-6)


def test_optional_fields_of_some_poses(folder: Path) -> None:
    more = POSE | {"translation": [0.1, 0.2, 3], "betas": [1.0, 2.0], "measured": [True] * 22 + [False] * 2}
    poses = one(folder, {"id": "x", "messages": [*ASK, *ASK], "poses": [POSE, more]}).poses
    assert poses.has_translation.tolist() == poses.has_betas.tolist() == [False, True]
    assert (
        poses.measured.sum(-1).tolist() == [24, 22]
        and poses.translation[1].tolist() == np.float32([0.1, 0.2, 3]).tolist()
    )


@pytest.mark.parametrize("name", [*BAD, *BEYOND])
def test_rows_that_do_not_fit(folder: Path, name: str) -> None:
    row, words = (BAD | BEYOND)[name]
    first, item, last = read(write(folder, [TEXT, row, WORDS]))
    assert isinstance(first, Record) and isinstance(last, Record) and isinstance(item, Skipped) and item.broken
    assert item.detail.startswith("train.jsonl, line 2: ") and words in item.detail


def test_damaged_lines(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(b'{"id": \n\xff\n' + json.dumps(TEXT).encode())
    found = read(JsonLines(folder))
    assert [type(item).__name__ for item in found] == ["Skipped", "Skipped", "Record"]
    assert isinstance(found[0], Skipped) and "line 1: expected JSON" in found[0].detail
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl.*not found.*chatpose data schema"):
        JsonLines(folder)


def test_large_images_are_reduced(folder: Path) -> None:
    write(folder, [IMAGE])
    [item] = read(JsonLines(folder, max_side=30))
    assert isinstance(item, Record)
    assert item.example().messages[0]["content"][0]["image"] != (folder / "photos" / "a.jpg").read_bytes()


def test_the_schema_accepts_and_refuses_the_same_rows() -> None:
    """Another program reads the published schema: python-jsonschema."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator, ours = jsonschema.Draft202012Validator(schema), JsonSchema(schema)
    for row in (*GOOD, *(row for row, _ in BEYOND.values())):
        assert validator.is_valid(row)
        ours.check(row)
    for name, (row, _) in BAD.items():
        assert not validator.is_valid(row), name


def test_a_schema_with_other_keywords_is_refused() -> None:
    with pytest.raises(ValueError, match="'pattern' is not known"):
        JsonSchema({"properties": {"a": {"pattern": "x"}}})


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(schema_text())


def test_from_lines_to_rows_of_training(folder: Path, tmp_path: Path) -> None:
    write(folder, [*GOOD, BAD["a list"][0]])
    out = tmp_path / "prepared"
    assert (
        main(["data", "prepare", "jsonlines", "--source", str(folder), "--out", str(out), "--workers", "1", "--quiet"])
        == 0
    )
    rows = prepared("train", folder=str(out))
    assert [row.kind for row in rows] == ["text", "image", "instruction"] and rows[1].poses.frame == "camera"
    with pytest.raises(UserError, match=r"1 items are broken.*line 4: the row: expected an object"):
        prepare("jsonlines", folder, tmp_path / "b", processor=tiny_processor(preset("tiny")), max_broken=0)
