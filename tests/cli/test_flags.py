"""A configuration is changed by --set KEY=VALUE, and by --config.KEY=VALUE as other JAX code bases have it."""

import importlib
from pathlib import Path

import pytest

from chatpose_jax.cli.flags import as_overrides
from chatpose_jax.cli.main import COMMANDS, Parser, main
from chatpose_jax.train.run_config import load_config

WITH_CONFIG = [
    name
    for name, (module, _) in COMMANDS.items()
    if "add_config" in Path(importlib.import_module(module).__file__).read_text()
]


def parsed(name, *words):
    parser = Parser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    needed = {
        "train": ["--out", "run"],
        "plan": ["--target", "cpu:1"],
    }.get(name, [])
    return parser.parse_args([*needed, *words])


def test_every_command_with_a_configuration_takes_both_forms():
    assert WITH_CONFIG == ["demo", "pretrained", "train", "plan"]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_both_forms_say_the_same_in_their_order(name):
    args = parsed(
        name,
        "--config=tiny",
        "--config.train.steps=5",
        "--set",
        "train.steps=6",
        "--config.train.seed",
        "-1",
        "--config.train.remat=none",
    )
    assert args.config == "tiny"
    assert args.overrides == ["train.steps=5", "train.steps=6", "train.seed=-1", "train.remat=none"]
    assert load_config(args.config, args.overrides[:2]).train.steps == 6


def test_values_keep_their_spaces_and_equals_signs(tmp_path, monkeypatch):
    """Through the whole command line, whose first parser sees the words of a command too."""
    train = importlib.import_module("chatpose_jax.cli.train")
    seen = {}
    monkeypatch.setattr(
        train, "load_config", lambda name, overrides: seen.update({name: overrides}) or load_config(name, overrides)
    )
    rows = "(('pose_head/.*', 1), ('.*=?', None))"
    words = [
        "train",
        "--config",
        "tiny",
        f"--config.train.trainable={rows}",
        "--config.train.wandb",
        "a b",
        "--config.train.stepz=1",
    ]
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert seen == {"tiny": [f"train.trainable={rows}", "train.wandb=a b", "train.stepz=1"]}


@pytest.mark.parametrize("words", [["--config.train.steps"], ["--config.train.steps", "--out", "x"]])
def test_a_key_without_a_value_is_said_so(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("train", *words)
    assert stop.value.code == 2
    assert "--config.train.steps: expected a value, such as --config.train.steps=100" in capsys.readouterr().err


def test_what_follows_two_dashes_is_left_alone():
    assert as_overrides(["--config.a=1", "--", "--config.b=2"]) == ["--set=a=1", "--", "--config.b=2"]


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_help_names_both(name, capsys):
    with pytest.raises(SystemExit):
        parsed(name, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--set train." in said and "--config.train." in said


@pytest.mark.parametrize(
    "words", ["eval poses --out gs://bucket/x", "chat model --out s3://bucket/x", "demo --out file:///x"]
)
def test_an_address_is_no_path_on_a_disk(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert (
        f"argument --out: expected a path on a disk, found {words.split()[-1].split('/')[0]}//…"
        in capsys.readouterr().err
    )
