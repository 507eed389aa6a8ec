"""Byte-level tokenizers as they are written: the ids that this program and transformers 4.x and 5 read in them. Those in LLaMA's layout are in
``test_export_readers.py``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chatpose_jax.errors import UserError
from chatpose_jax.processing.tokenizer import ANY_FAST, TextTokenizer, json_bytes
from chatpose_jax.weights.tokenizer_writer import write_tokenizer
from chatpose_jax.weights.tokens import read_tokens, tokens_of

from ..byte_level import KINDS, backend, files, settings, text_tokenizer, write
from .test_export_readers import environment

TEXT = "Isn't it  1234 m\n\n of naïve e\u0301 日本語 🙂?"


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write(tmp_path / "source", request.param, pose=False)
    return tmp_path / "source"


@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_the_pose_token_is_the_first_free_id(source: Path, tmp_path: Path) -> None:
    kind = next(
        kind for kind in KINDS if files(kind, pose=False)["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    )
    tokens = read_tokens(source)
    size = backend(kind, False).get_vocab_size()
    assert (tokens.byte_level, tokens.base_size, tokens.size, tokens.pose_token_id, tokens.added) == (
        True,
        size,
        size,
        None,
        {},
    )
    assert tokens.control == {name: backend(kind).token_to_id(name) for name in KINDS[kind][2]}
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write_tokenizer(read_tokens(source), tmp_path / "out", ["<POSE>"])
    ours, theirs = TextTokenizer.read(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.pose_token_id == size == theirs.convert_tokens_to_ids("<POSE>")
    for other in (TEXT, "<POSE> a"):
        assert ours.encode(other) == text_tokenizer(kind).encode(other)
    assert theirs.encode(TEXT, add_special_tokens=False) == ours.encode(TEXT)
    assert theirs.encode("a<POSE><POSE>", add_special_tokens=False) == [*ours.encode("a"), size, size]
    assert theirs.chat_template == "{{ messages }}"
    again = read_tokens(tmp_path / "out")
    assert (again.base_size, again.added, again.pose_token_id, again.size) == (size, {"<POSE>": size}, size, size + 1)
    said = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert said == settings(kind) | {"tokenizer_class": ANY_FAST}


@pytest.mark.parametrize("source", ["qwen"], indirect=True)
def test_the_lists_of_older_programs_have_all_tokens(source: Path, tmp_path: Path) -> None:
    """Qwen's repositories hold the vocabulary twice, and their added tokens in a list."""
    data = json.loads((source / "tokenizer.json").read_text())
    held = {token["content"]: token["id"] for token in data["added_tokens"]}
    (source / "added_tokens.json").write_text(json.dumps(held))
    (source / "vocab.json").write_text(json.dumps(data["model"]["vocab"]))
    (source / "merges.txt").write_text("\n".join(map(" ".join, data["model"]["merges"])))
    decoder = {str(id): {"content": name, "special": True} for name, id in held.items()}
    (source / "tokenizer_config.json").write_bytes(json_bytes(settings("qwen") | {"added_tokens_decoder": decoder}))
    tokens = read_tokens(source)
    write_tokenizer(tokens, tmp_path / "out", ["<POSE>"])
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == held | {"<POSE>": tokens.size}
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(id): token["content"] for id, token in written.items()} == {id: name for name, id in held.items()} | {
        tokens.size: "<POSE>"
    }
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert TextTokenizer.read(tmp_path / "out").encode(TEXT) == text_tokenizer("qwen").encode(TEXT)


def test_a_tokenizer_may_lie_in_no_folder(tmp_path: Path) -> None:
    """As in a GGUF file."""
    tokens = tokens_of(files("llama3", pose=False), tmp_path / "model.gguf")
    write_tokenizer(tokens, tmp_path / "out", ["<POSE>"])
    assert TextTokenizer.read(tmp_path / "out").pose_token_id == tokens.size
    with pytest.raises(UserError, match=r"model\.gguf: no tokenizer: expected tokenizer\.json or tokenizer\.model"):
        tokens_of({}, tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model\.gguf/tokenizer\.json: not readable as JSON"):
        tokens_of({"tokenizer.json": b"{"}, tmp_path / "model.gguf")


READ = """
import json, sys, transformers
answers = []
for folder, texts in json.load(sys.stdin):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
print(json.dumps([transformers.__version__, answers]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.57.6", "5"])
def test_every_version_reads_the_same_ids(tmp_path: Path, version: str) -> None:
    """Alone and beside the config.json of a model: transformers 5 chooses the tokenizer's class by that too."""
    requests: list[Any] = []
    expected = []
    for kind, model_type in (
        ("gpt2", "llama"),
        ("smollm2", "llama"),
        ("llama3", "llama"),
        ("qwen", "qwen2"),
        ("qwen", "qwen3"),
    ):
        write(tmp_path / kind, kind, pose=False)
        tokens, ours = read_tokens(tmp_path / kind), text_tokenizer(kind)
        for beside in (False, True):
            out = tmp_path / f"{kind}-{model_type}-{beside}"
            write_tokenizer(tokens, out, ["<POSE>"])
            if beside:
                (out / "config.json").write_text(json.dumps({"model_type": model_type}))
            requests.append([str(out), [TEXT, "a<POSE><POSE>"]])
            expected.append([ours.encode(TEXT), [*ours.encode("a"), tokens.size, tokens.size]])
    python = environment(version, tmp_path / "environment")
    run = subprocess.run([python, "-c", READ], input=json.dumps(requests), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, answers = json.loads(run.stdout)
    assert found.startswith(version)
    assert answers == expected
