"""The ablations of docs/training.md: every line parses, builds a model, and changes what its row says."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from chatpose_jax.cli.train import add_arguments
from chatpose_jax.data.sources import check_sources
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.train.run_config import load_config
from chatpose_jax.train.trainable import HEAD, PAPER, PROJECTOR, assign

DOCS = Path(__file__).resolve().parents[2] / "docs"
SECTION = (DOCS / "training.md").read_text().split("## Ablations")[1].split("\n## ")[0]
LINES = dict(re.findall(r"^\| (.*?) \| `(--set .*)` \|$", SECTION, flags=re.M))
TRAINS = {"the pose head alone": HEAD, "the projector trains too": PROJECTOR}


def test_every_row_of_the_table_is_read():
    assert len(LINES) == SECTION.count("\n| ") - 1 == 8


@pytest.mark.parametrize("name", LINES)
def test_ablations_are_overrides_that_fit(name):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(["--config", "chatpose_13b", "--out", "run", *shlex.split(LINES[name])])
    paper, config = load_config("chatpose_13b"), load_config("chatpose_13b", parsed.overrides)
    tables = {override.split(".")[0] for override in parsed.overrides}
    assert {table for table in ("model", "data", "train") if getattr(config, table) != getattr(paper, table)} == tables
    params = abstract_params(config.model)
    found, expected = assign(params, config.train.trainable), assign(params, TRAINS.get(name, PAPER))
    assert {path: row[1:] for path, row in found.items()} == {path: row[1:] for path, row in expected.items()}
    check_sources(config.data)
