"""Exports in the versions of transformers that their readers pin: LLaVA's and ChatPose's own code 4.31 and 4.37, others
4.57, and 5.

The slow tests make an environment for each version with pip, and compare what it reads in an export with what the same program
reads in the source.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from chatpose_jax.processing.tokenizer import TOKENIZER_FILES, TextTokenizer
from chatpose_jax.weights.export import FORMATS, export
from chatpose_jax.weights.folder import TOKENIZER
from chatpose_jax.weights.tokenizer_writer import write_tokenizer
from chatpose_jax.weights.tokens import read_tokens

from .sources import (
    VOCAB,
    Sizes,
    make_chatpose,
    make_llava_original,
    make_llava_transformers,
    write_sentencepiece,
)
from .test_export import model_folder, trained

slow = pytest.mark.slow
READER = Path(__file__).with_name("reader.py")
VERSIONS = ["4.31.0", "4.37.2", "4.57.6", "5"]
SMALL = Sizes(width=16, heads=2, kv_heads=1, mlp=32, layers=1)
PARAGRAPH = (
    "A chat. USER: {image}\nHow do  they stand? ASSISTANT: It is {pose}. Or {pose}, {pose} and</s>USER: é🙂 x{pose}y"
)
# The literals of a source's own; and the ids of those that it gets, in the export for transformers.
SOURCES: dict[str, tuple[list[str], dict[str, int]]] = {
    "sentencepiece": (["[SEG]"], {"<image>": 1025}),  # as CHATPOSE-V0
    "both": (["<image>"], {"<POSE>": 1026}),  # as LLaVA for transformers
    "pairs": (["<image>"], {"<POSE>": 1026}),  # the same, saved by transformers 4.45 or later
    "json": (["<POSE>", "<image>"], {}),  # as our demo; and what transformers 5 leaves of a tokenizer
}


def make_source(folder: Path, name: str) -> Path | None:
    """Writes ``folder / name``; returns where its CLIP is, if not inside."""
    if name == "sentencepiece":
        make_chatpose(folder / name, folder / "clip", sizes=SMALL)
        write_sentencepiece(folder / name, {"[SEG]": VOCAB})
        return folder / "clip"
    if name == "json":
        make_llava_original(folder / name, pose="<POSE>", sizes=SMALL)
        return None
    make_llava_transformers(folder / name, image_token_id=VOCAB, sizes=SMALL)
    write_sentencepiece(folder / name, {"<image>": VOCAB, "<pad>": VOCAB + 1}, fast=True)
    if name == "pairs":
        data = json.loads((folder / name / "tokenizer.json").read_text())
        data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]
        (folder / name / "tokenizer.json").write_text(json.dumps(data))
    return None


def make_exports(folder: Path, name: str, formats: Sequence[str]) -> None:
    """NAME, NAME-converted, NAME-trained, and NAME-converted-FORMAT, NAME-trained-FORMAT."""
    vision = make_source(folder, name)
    converted = model_folder(folder / name, folder / f"{name}-converted", vision=vision)
    moved = trained(converted, folder / f"{name}-trained")
    for format in formats:
        if format != "peft":
            export(converted, folder / f"{name}-converted-{format}", format)
        export(moved, folder / f"{name}-trained-{format}", format)


def exported(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*-*"))


# --------------------------------------------------------------------------------------------------------- by their fields


@pytest.mark.parametrize("name", ["pairs", pytest.param("sentencepiece", marks=slow), pytest.param("json", marks=slow)])
def test_files_hold_what_old_versions_need(tmp_path: Path, name: str) -> None:
    make_exports(tmp_path, name, ["llava"])
    source, folders = tmp_path / name, exported(tmp_path, name)
    for folder in [*folders, *(tmp_path / f"{name}-{how}" / TOKENIZER for how in ("converted", "trained"))]:
        files = {file for file in TOKENIZER_FILES if (folder / file).is_file()}
        assert files == {file for file in TOKENIZER_FILES if (source / file).is_file()}, folder
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        before = json.loads((source / "tokenizer_config.json").read_text())
        decoder, decoder_before = (data.pop("added_tokens_decoder", {}) for data in (settings, before))
        more = settings.pop("additional_special_tokens", [])
        assert settings == before
        assert more == ([] if decoder or "tokenizer.json" in files else list(read_tokens(folder).added)[1:])
        assert settings["tokenizer_class"] in ("LlamaTokenizer", "PreTrainedTokenizerFast")
        assert decoder_before.items() <= decoder.items()
        tokens = read_tokens(folder)
        if "tokenizer.model" in files:
            assert (folder / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
            assert json.loads((folder / "added_tokens.json").read_text()) == tokens.added
            assert sorted(tokens.added.values()) == list(range(VOCAB, tokens.size))  # 4.31 takes no other
        if "tokenizer.json" in files:
            data = json.loads((folder / "tokenizer.json").read_text())
            assert all(isinstance(merge, str) for merge in data["model"]["merges"])
            assert data["pre_tokenizer"] is None
            assert tokens.added.items() <= {t["content"]: t["id"] for t in data["added_tokens"]}.items()
            assert not decoder or {t["content"] for t in decoder.values()} >= set(tokens.added)


def test_words_that_only_transformers_5_knows_are_said_in_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_sentencepiece(tmp_path / "source", {"<image>": VOCAB})
    file = tmp_path / "source" / "tokenizer_config.json"
    new = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | new | {"extra_special_tokens": ["<image>"]}))
    write_tokenizer(read_tokens(tmp_path / "source"), tmp_path / "out", ["<POSE>"])
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert settings["additional_special_tokens"] == ["<image>", "<POSE>"]
    assert not {"backend", "is_local", "extra_special_tokens"} & settings.keys()
    assert read_tokens(tmp_path / "out").added == {"<image>": VOCAB, "<POSE>": VOCAB + 1}


def test_a_tokenizer_of_our_own_making_has_settings(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_sentencepiece(tmp_path / "source", {"<POSE>": VOCAB})
    TextTokenizer(TextTokenizer.read(tmp_path / "source").backend).save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = TextTokenizer.read(tmp_path)
    assert again.encode("Two  spaces.") == TextTokenizer.read(tmp_path / "source").encode("Two  spaces.")
    assert again.pose_token_id == VOCAB


# ----------------------------------------------------------------------------------------------------- by their programs


def environment(version: str, folder: Path) -> str:
    """A Python with that transformers; skips where none can be made."""
    if version == "5":
        return sys.executable
    why = "no python3.10 to python3.12 was found"
    for name in (sys.executable, "python3.11", "python3.10", "python3.12"):
        if (python := shutil.which(name)) is None:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        packages = [f"transformers=={version}", "sentencepiece>=0.2", "protobuf", "numpy<2", "pillow"]
        made = subprocess.run([python, "-m", "venv", str(folder)], capture_output=True, text=True)
        inside = str(folder / "bin" / "python")
        if made.returncode == 0:
            command = [inside, "-m", "pip", "install", "-q", "--only-binary", ":all:", *packages]
            made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode == 0:
            return inside
        why = (made.stderr.strip().splitlines() or ["?"])[-1]
    pytest.skip(f"no environment with transformers {version}: {why}")


def read(python: str, requests: list[list[Any]]) -> dict[str, Any]:
    """What ``reader.py`` says, run by that Python without this one's packages."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([python, READER], input=json.dumps(requests), capture_output=True, text=True, env=clean)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return all(found[key] == expected[key] for key in ("class", "ids", "special"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in SOURCES:
        make_exports(folder, name, FORMATS)
    return folder


@slow
@pytest.mark.parametrize("version", VERSIONS)
def test_every_format_is_read_as_its_source_is(exports: Path, tmp_path: Path, version: str) -> None:
    python = environment(version, tmp_path / "environment")
    requests = []
    for name, (own, new) in SOURCES.items():
        pose = next((literal for literal in own if literal != "<image>"), "she")
        text = PARAGRAPH.format(pose=pose, image="<image>" if "<image>" in own else "it")
        for folder in exported(exports, name):
            # transformers 5 chooses the tokenizer's class by config.json too.
            reference = tmp_path / "references" / folder.name
            reference.mkdir(parents=True)
            for file in [exports / name / file for file in TOKENIZER_FILES] + [folder / "config.json"]:
                if file.is_file():
                    shutil.copy(file, reference)
            requests += [[str(folder), text, own + list(new)], [str(reference), text, own]]
    answer = read(python, requests)
    assert answer["version"].split(".")[0] == version.split(".")[0]
    # tokenizer.json of these two sources is too new before 4.45: there we compare with what 5 reads in it.
    newest = read(sys.executable, requests)["folders"] if version in VERSIONS[:2] else answer["folders"]
    for name, (own, new) in SOURCES.items():
        for folder in exported(exports, name):
            found = answer["folders"][str(folder)]
            reference = str(tmp_path / "references" / folder.name)
            for way in ("auto", "auto slow", "slow", "fast"):
                where, expected = f"{folder.name}, {way}", answer["folders"][reference][way]
                if way == "slow" and name == "json" and version != "5":
                    assert "must be specified" in found[way], where  # no sentencepiece file, there as here
                    continue
                assert isinstance(found[way], dict), (where, found[way])
                if isinstance(expected, dict):
                    assert same(found[way], expected), (where, found[way], expected)
                elif name == "pairs":
                    assert same(found[way], answer["folders"][str(exports / folder.name.replace("pairs", "both"))][way])
                else:
                    assert found[way]["ids"] == newest[reference]["auto"]["ids"], where
                literals = own + [literal for literal in new if literal != "<image>" or "transformers" in folder.name]
                ids = {"[SEG]": 1024, "<image>": 1024 if "<image>" in own and name != "json" else 1025}
                ids["<POSE>"] = new.get("<POSE>", 1024)
                held = dict(zip(own + list(new), zip(found[way]["literals"], found[way]["twice"])))
                assert {literal: held[literal][0] for literal in literals} == {l: ids[l] for l in literals}, where
                assert all(held[literal][1] == 2 for literal in literals if literal in new), where
            if folder.name.endswith("-transformers") and version != "4.31.0":
                rows = 1024 + len({"[SEG]", "<POSE>", "<image>"} & {*own, *new}) + ("<POSE>" in new)
                assert found["config"] == {"class": "LlavaConfig", "rows": rows, "rope_theta": 10000.0}, where
                if version != "4.37.2":  # which knows no processor_config.json, and wants torch
                    assert isinstance(found["processor"], dict), found["processor"]
                    assert found["processor"]["class"] == "LlavaProcessor"
                    assert found["processor"]["pixels"] == [1, 3, 28, 28]
                    assert found["processor"]["ids"].count(ids["<image>"]) == 16
