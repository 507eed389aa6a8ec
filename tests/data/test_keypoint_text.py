"""Keypoints as text: what is written is read again, in the ways in which language models write it, and nothing is misread in silence."""

import json
import time

import numpy as np
import pytest

from chatpose_jax.data.keypoint_text import LONGEST, KeypointText
from chatpose_jax.errors import UserError

TEXT = KeypointText()
SIZE = (500, 250)
PLACES = {"nose": (480, 112), "left eye": (495, 98), "right wrist": (10, 1000)}
"""Of 1000 parts."""
ALL = {name: (20 * i, 1000 - 30 * i) for i, name in enumerate(TEXT.names)}


def points(places):
    out = np.zeros((17, 3), np.float32)
    for name, (x, y) in places.items():
        out[TEXT.names.index(name)] = x / 1000 * SIZE[0], y / 1000 * SIZE[1], 1
    return out


def objects(key="name", places=PLACES):
    return [{"x": x, "y": y, key: name} for name, (x, y) in places.items()]


MAPPINGS = {name.replace(" ", "_"): {"x": x, "y": y} for name, (x, y) in PLACES.items()}
WAYS = {
    "as it is written": "nose 480 112, left eye 495 98, right wrist 10 1000",
    "another order, capitals, brackets": "Here they are:\n- **Right Wrist**: (10, 1000)\n- **Left Eye**: (495, 98)\n- **Nose**: (480, 112)",
    "numbered lines": "1. nose: (480, 112)\n2. left eye: (495, 98)\n3. right wrist: (10, 1000)",
    "a table": "| keypoint | x | y |\n|---|---|---|\n| nose | 480 | 112 |\n| left_eye | 495 | 98 |\n| right_wrist | 10 | 1000 |",
    "names of x and y": "nose: x=480, y=112; left-eye: x: 495 y: 98; rightWrist x 10 px, y 1000 px",
    "lines of YAML": "nose:\n  x: 480\n  y: 112\nleft_eye:\n  x: 495\n  y: 98\nright_wrist:\n  x: 10\n  y: 1000",
    "short sides": "nose 480 112, L eye 495 98, r_wrist 10 1000",
    "sides behind": "nose 480 112, eye_left 495 98, wrist R 10 1000",
    "sentences": "The nose is located at (480, 112). The left eye, which is open, is at 495, 98 and the right wrist near 10, 1000.",
    "numbers first": "(480, 112) nose, (495, 98) left eye, (10, 1000) right wrist",
    "what is not seen": "nose 480 112, left eye 495 98, right eye: not visible, right wrist 10 1000, left wrist: none",
    "confidences": "nose 480 112 0.9, left eye 495 98 1, right eye 3 4 0, right wrist 10 1000 0.2, left hip 7 7 confidence 0",
    "fractions": "nose 0.48 0.112, left eye 0.495 0.098, right wrist 0.01 1",
    "per cent": "nose 48% 11.2%, left eye 49.5 % 9.8 %, right wrist 1% 100%",
    "JSON": json.dumps(PLACES),
    "JSON in a fence": f"Sure!\n```json\n{json.dumps({'keypoints': MAPPINGS}, indent=1)}\n```",
    "JSON of a list": json.dumps(objects()),
    "JSON of a list with other words": json.dumps({"person": objects("label")}),
    "JSON of lists": json.dumps([[name, *place] for name, place in PLACES.items()]),
    "JSON of pairs": json.dumps([[name, place] for name, place in PLACES.items()]),
    "JSON lines": "\n".join(map(json.dumps, objects())),
    "JSON with nothing for a point": json.dumps({**PLACES, "right eye": None, "left ear": [3, 4, 0], "left hip": {"x": None, "y": None}}),
    "JSON of text": json.dumps({name: f"{x}, {y}" for name, (x, y) in PLACES.items()}),
    "no valid JSON": "{nose: [480, 112], 'left eye': [495, 98], right_wrist: [10, 1000],}",
}  # fmt: skip


@pytest.mark.parametrize("text", WAYS.values(), ids=WAYS.keys())
def test_ways_to_write(text):
    found = TEXT.read(text, SIZE)
    np.testing.assert_allclose(found.points, points(PLACES), atol=1e-3)
    assert found.unread == 0


def test_numbers_without_names_are_in_order_if_there_are_just_as_many():
    rows = [list(place) for place in ALL.values()]
    for text in (json.dumps(rows), "\n".join(f"({x}, {y})" for x, y in rows), json.dumps({"keypoints": rows})):
        np.testing.assert_allclose(TEXT.read(text, SIZE).points, points(ALL), atol=1e-3)
    for some in (rows[:-1], [*rows, [1, 2]]):
        found = TEXT.read(json.dumps(some), SIZE)
        assert not found.points.any() and found.unread == len(some)


@pytest.mark.parametrize(
    ("text", "read", "unread"),
    [
        ("", (), 0),
        ("I cannot see a person.", (), 0),
        ("nose 480 112, left eye 495", ("nose",), 1),
        ("nose 480 112, nose 300 300", ("nose",), 1),
        ("nose 480 112, left eye 1495 98", ("nose",), 1),
        ("nose 480 112, left eye -4 98", ("nose",), 1),
        ("nose 480 112, left tentacle 1 2, tail 3 4", ("nose",), 2),
        (json.dumps({"nose": [480, 112], "tail": [3, 4]}), ("nose",), 1),
        ('{"nose": [480, 112], "left eye": [NaN, 98]}', ("nose",), 1),
        ('{"nose": [480, 112], "left eye": [1' + "0" * 400 + ", 98]}", ("nose",), 1),
        ("[" * 3000, (), 0),
        ("nose 480 112 " * 1, ("nose",), 0),
    ],
)
def test_what_cannot_be_read_is_counted(text, read, unread):
    found = TEXT.read(text, SIZE)
    expected = points({name: PLACES[name] for name in read})
    np.testing.assert_allclose(found.points, expected, atol=1e-3)
    assert found.unread == unread


def test_what_is_written_is_read():
    random = np.random.default_rng(0)
    for name, scale in (("coco17", 100), ("humans44", 1000), ("lsp14", 1000), ("openpose25", 1000), ("smpl24", 400)):
        text = KeypointText(name, scale)
        given = np.concatenate([random.uniform(0, 1, (len(text.names), 2)) * SIZE, np.ones((len(text.names), 1))], 1)
        given[3, 2] = 0
        given[4, 0], given[5, 1] = -1, SIZE[1] + 1
        found = text.read(text.write(given, SIZE), SIZE)
        seen = np.ones(len(given), bool)
        seen[3:6] = False
        assert found.unread == 0 and (found.points[:, 2] == seen).all()
        assert (np.abs(found.points[seen, :2] - given[seen, :2]) <= 0.501 * np.array(SIZE) / scale).all()
    assert TEXT.write(np.zeros((17, 3)), SIZE) == ""


def test_any_text_is_read_in_finite_numbers():
    random = np.random.default_rng(1)
    letters = [*"nose left eye 0123456789.,-:()[]{}\"'%\n", "nose ", "left eye ", "right_hip", "NaN", "1e9", "é"]
    for _ in range(300):
        text = "".join(random.choice(letters, random.integers(0, 80)))
        found = TEXT.read(text, SIZE).points
        assert np.isfinite(found).all() and (found[:, :2] <= SIZE).all() and (found >= 0).all()


@pytest.mark.parametrize("letters", ["[", "[1,", '{"a":', "nose [", " nose"])
def test_a_model_that_repeats_itself_takes_no_time(letters):
    start = time.process_time()
    TEXT.read(letters * LONGEST, SIZE)
    assert time.process_time() - start < 2


def test_questions_name_the_scale_and_the_person():
    assert "from 0 to 100." in KeypointText(scale=100).question()
    assert KeypointText().question("The man in red.").startswith("The man in red. Where")
    assert (
        all(name in TEXT.instructions() for name in TEXT.names) and "from 0 at the top to 1000" in TEXT.instructions()
    )
    with pytest.raises(UserError, match="the set of keypoints must be one of coco17"):
        KeypointText("coco")
    with pytest.raises(UserError, match="scale"):
        KeypointText(scale=1)
    with pytest.raises(UserError, match=r"coco17 has 17 points of x, y and confidence, found \(17, 2\)"):
        TEXT.write(np.zeros((17, 2)), SIZE)
