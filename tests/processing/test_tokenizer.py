"""Ids are those of the slow tokenizer that the released model was tuned with; text streams in whole characters."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import StreamDecoder, TextTokenizer

TEXTS = [
    "It is",
    "The left arm is raised above the head.",
    "a  b",
    "is   fine,    really",
    "x" + " " * 15 + "y",
    " leading and trailing ",
    "\nWhat is\tthis?\n\n",
    "naïve café 日本語 🙂🏽 \u200b\x00",
    "</s><s><unk> <0x0A> [SEG] <POSE> <image>",
    "1234567890 3.14159",
    "▁ already marked ▁",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece(chatpose, sentencepiece_model, text):
    assert chatpose.tokenizer.encode(text) == sentencepiece_model.encode(text)


def test_ids_of_random_text_equal_sentencepiece(chatpose, sentencepiece_model):
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abeilnorst  \n.,'é語🙂ABE<>/s19", k=draw.randrange(1, 60)))
        assert chatpose.tokenizer.encode(text) == sentencepiece_model.encode(text), text


def test_space_beside_the_pose_token_is_the_slow_tokenizers(chatpose, sentencepiece_model):
    """'is [SEG].' was learnt as ▁is, 32000, ▁. — other pipelines give a lone ▁ before, or a bare . behind."""
    encoded = chatpose.encode(
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Sure, it is <POSE>."}], False
    )
    pieces = ["▁Sure", ",", "▁it", "▁is", 32000, "▁.", 2]
    expected = [p if isinstance(p, int) else sentencepiece_model.piece_to_id(p) for p in pieces]
    assert encoded.labels[encoded.labels != -100].tolist() == expected


def test_bare_sentencepiece_model_is_read_right(chatpose, chatpose_folder, tmp_path):
    """Without tokenizer_config.json transformers' AutoTokenizer gives no BOS and loses the space of the first word."""
    for name in ("tokenizer.model", "added_tokens.json"):
        shutil.copyfile(chatpose_folder / name, tmp_path / name)
    bare = TextTokenizer.read(tmp_path)
    assert (bare.bos_token_id, bare.pose_token_id, bare.size) == (1, 32000, 32001)
    assert bare.encode("It is  on.") == chatpose.tokenizer.encode("It is  on.")


def test_saved_folder_gives_the_same_ids(chatpose, chatpose_folder, chatpose_config, tmp_path):
    chatpose.save(tmp_path)
    again = type(chatpose).load(tmp_path, chatpose_config)
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (tmp_path / name).read_bytes() == (chatpose_folder / name).read_bytes()
    assert again.pose_token == "[SEG]"
    assert (again.template, again.images, again.markers) == (chatpose.template, chatpose.images, chatpose.markers)
    for text in TEXTS:
        assert again.tokenizer.encode(text) == chatpose.tokenizer.encode(text)


@pytest.mark.parametrize("text", [*TEXTS, "\U0010ffff\u0378"])
def test_tiny_tokenizer_has_ids_for_any_text(tiny, text):
    ids = tiny.tokenizer.encode(text)
    assert max(ids) < 1024
    assert not {0, 1, 2} & set(ids)
    assert tiny.decode(ids) == text.replace("▁", " ")


def test_tiny_tokenizer_keeps_captions_short(tiny):
    text = "The left arm is raised above the head, the right knee is bent at a right angle, the person faces forward."
    assert len(tiny.tokenizer.encode(text)) <= 1.3 * len(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "<POSE>",
        "<POSE>.",
        "Sure, it is <POSE>.",
        "Left: <POSE>, right: <POSE>; and (<POSE>) too",
        "<POSE> <POSE> are twins",
        "日本語 <POSE> 🙂",
        "Line one\nline two: <POSE>",
    ],
)
def test_decode_inverts_answers(tiny, chatpose, text):
    for processor in (tiny, chatpose):
        encoded = processor.encode([{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}], False)
        assert processor.decode(encoded.labels[encoded.labels != -100]) == text


def test_stream_never_breaks_a_character(tiny):
    text = "A 🙂 and é, then <POSE>. 語"
    ids = tiny.encode([{"role": "user", "content": "Q"}, {"role": "assistant", "content": text}], False).labels
    ids = ids[ids != -100]
    stream = tiny.stream()
    pieces = [stream.push(index) for index in ids]
    assert "".join(pieces) + stream.flush() == text == tiny.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces) >= 3 + 1 + 2  # bytes that wait for the rest of 🙂, é, 語


def test_unfinished_character_is_shown_as_replacement(tiny):
    stream = StreamDecoder(tiny.tokenizer)
    shown = [stream.push(index) for index in tiny.tokenizer.encode("🙂")[:-1]]
    assert "".join(shown).strip() == ""
    assert stream.flush() == "\ufffd"
    half = tiny.tokenizer.encode("🙂")[:-1]
    assert tiny.decode([*half, tiny.ids.pose_token_id]) == "\ufffd <POSE>"


def test_decode_is_silent_about_control_ids(tiny, chatpose):
    assert tiny.decode(np.array([1, *tiny.tokenizer.encode("ok"), 0, 1025, 2, 2])) == "ok"
    assert chatpose.decode([-200, *chatpose.tokenizer.encode("ok"), 40000]) == "ok"


def test_no_tokenizer_says_which_file(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*expected tokenizer.json or tokenizer.model"):
        TextTokenizer.read(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x0a\xff\xff\xff cut off", b'{"model": 3}'])
def test_damaged_tokenizer_is_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        TextTokenizer.read(tmp_path)


def test_other_layouts_are_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="expected BPE"):
        TextTokenizer.read(tmp_path)


def test_tokenizer_without_bos_is_refused(tiny, tmp_path):
    data = json.loads(tiny.tokenizer.backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<s>"]
    data["model"]["vocab"]["<bos>"] = data["model"]["vocab"].pop("<s>")
    data["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"'<s>'.*BOS"):
        TextTokenizer.read(tmp_path)


QUIET = """
import logging, os, sys
sys.modules["torch"] = None  # as where PyTorch is not installed
before = dict(os.environ)
from chatpose_jax.processing.processor import tiny_tokenizer
tiny_tokenizer().save(sys.argv[1])
assert "transformers" in sys.modules
assert dict(os.environ) == before
"""


def test_nobody_is_told_that_pytorch_is_missing(tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    command = [sys.executable, "-c", QUIET, tmp_path / "out"]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
