"""``chatpose posescript train``: from settings to a retriever that finds poses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.posescript.config import FOLDER, load_posescript_config
from chatpose_jax.posescript.retriever import load_retriever
from chatpose_jax.train.run_config import config_names
from smpl_jax.pose import stack

SMALL = (
    "data.sources=(('synthetic', 1.0, {'tasks': {'text_short': 1}, 'train_size': 96, 'val_size': 32}),)",
    "model.latent=32", "model.pose_width=64", "model.text.word_width=16", "train.batch_size=32", "train.epochs=4",
)  # fmt: skip


def command(out: Path, *more: str) -> list[str]:
    settings = [word for setting in (*SMALL, *more) for word in ("--set", setting)]
    return ["posescript", "train", "--config", "retriever_tiny", "--out", str(out), *settings]


def test_a_run_gives_a_folder_that_says_what_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "one")) == 0
    assert "train: 96 poses with 96 captions" in capsys.readouterr().out
    one = load_retriever(tmp_path / "one")
    trained_on = one.settings["trained_on"]
    assert (
        trained_on["sources"][0]["name"] == "synthetic" and trained_on["split"] == "train" and trained_on["poses"] == 96
    )
    assert trained_on["val"]["gallery"] == 32 and 0 <= trained_on["val"]["mRecall"] <= 100

    rows = SyntheticDataset("val", size=32, tasks={"text_short": 1})[:32]
    poses, texts = stack([row.poses[0] for row in rows]), [row.extras["caption"] for row in rows]
    scores = one.embed_texts(texts) @ one.embed_poses(poses).T
    found = (scores > np.diag(scores)[:, None] + 1e-6).sum(1) < 10
    assert found.mean() * 100 == pytest.approx(trained_on["val"]["t2p@10"])

    (tmp_path / "one" / "config.json").unlink()  # as if it had been stopped before the folder was written
    assert main(command(tmp_path / "one")) == 0
    assert load_retriever(tmp_path / "one").settings == one.settings

    assert main([*command(tmp_path / "two", "train.epochs=1"), "--init", str(tmp_path / "one")]) == 0
    two = load_retriever(tmp_path / "two")
    assert two.settings["trained_on"]["init"] == one.settings["fingerprint"] != two.settings["fingerprint"]


@pytest.mark.parametrize("name", config_names(FOLDER))
def test_the_configurations_are_valid(name: str) -> None:
    assert load_posescript_config(name).kind


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.epoch=3", "no such setting; did you mean train.epochs"),
        ("train.epochs=0", "train.epochs must be at least 1"),
        ("model.latent=33", "model.latent must be a multiple of 2"),
        ("model.text.encoder=bert", "text.encoder"),
        ("model.text.encoder=distilbert", "text.distilbert: expected the folder"),
        ("data.sources.synthetic.tasks={'words': 1}", "has a pose and a caption"),
        ("text.vectors=none.txt", "none.txt"),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
) -> None:
    assert main(command(tmp_path, setting)) == 2
    assert words in capsys.readouterr().err


def test_word_vectors_are_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vector = np.arange(16) / 8
    (tmp_path / "vectors.txt").write_text(f"other {' '.join(['1'] * 16)}\nleft {' '.join(map(str, vector))}\n")
    assert (
        main(
            command(
                tmp_path / "out",
                f"text.vectors={tmp_path / 'vectors.txt'}",
                "train.epochs=1",
                "train.learning_rate=1e-9",
            )
        )
        == 0
    )
    assert "1 of" in capsys.readouterr().out
    found = load_retriever(tmp_path / "out")
    row = np.asarray(found.model.text_encoder.embedding[...])[found.tokens.ids["left"]]  # type: ignore[attr-defined]
    np.testing.assert_allclose(row, vector, atol=1e-6)
