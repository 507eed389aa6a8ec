"""Every command of docs/paper-tables.md, on small files in the layout of the real ones, with random models and a stand-in for language models."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.endpoint import KEY, URL
from chatpose_jax.evaluation.published import PAPER, PUBLISHED
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder

from .data.readers import rpe_files
from .evaluation import small_smpl
from .paper_files import write_originals
from .stand_in import running

PAGE = Path(__file__).resolve().parent.parent / "docs/paper-tables.md"
IN_SMALL = {
    "/data/": "originals/",
    "--config retriever ": "--config retriever_tiny --set data.sources=posescript --set train.epochs=1 --set train.batch_size=8 ",
    "--config pose_vae ": "--config pose_vae_tiny --set data.sources=posescript --set train.epochs=1 --set train.batch_size=8 ",
    "--subset 200": "--subset 3",
    "keypoints,writer": "keypoints,batch_size=4,writer",
}
KEYPOINTS = "nose: (30, 10), left shoulder: (36, 20), right shoulder: (24, 20), left hip: (33, 36), right hip: (27, 36), left knee: (33, 46)"


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def answer(messages: list[dict[str, Any]]) -> str:
    """A judge's scores, keypoints, or a description of a pose: whichever is asked for."""
    words = json.dumps(messages).lower()
    if "assistant 1" in words:
        return "8 6\nThe first is more exact."
    return KEYPOINTS if "keypoint" in words else "The person kneels on the left knee."


def write_predictions() -> None:
    """Files of SPIN and HMR2 for the rows of the small data sets, with any pose."""
    rng = np.random.default_rng(0)
    Path("predictions").mkdir()
    evaluation = Path("originals/4d-humans/hmr2_evaluation_data")
    for data, names in (
        ("3dpw", np.load(evaluation / "3dpw_test.npz")["imgname"]),
        ("h36m", np.load(evaluation / "h36m_val_p2.npz")["imgname"].astype(str)),
        ("rpe", np.array([name.removeprefix("3DPW/") for name in rpe_files.IMAGES])),
    ):
        count = len(names)
        turns = np.tile(np.eye(3), (count, 24, 1, 1))
        more = {"bbox": np.tile([10.5, 5.0, 20, 40], (count, 1))} if data == "rpe" else {}
        spin = {"pose": rng.normal(0, 0.3, (count, 72)), "betas": np.zeros((count, 10)), "camera": np.ones((count, 3))}
        np.savez(f"predictions/spin_{data}.npz", **spin, **({"imgname": names} if data == "rpe" else {}), **more)
        hmr = {"global_orient": turns[:, :1], "body_pose": turns[:, 1:], "betas": np.zeros((count, 10))}
        np.savez(f"predictions/hmr2_{data}.npz", **hmr, imgname=names, **more)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_originals(Path("originals"))
    Path("originals/smpl").mkdir()
    small_smpl.write(Path("originals/smpl"))
    write_predictions()
    config = preset("tiny").replace(lora=None)
    save_folder(
        Path("out/chatpose-v0"), config, init_params(config, jax.random.key(0)), processor=tiny_processor(config)
    )
    for name in ("llava-1.5-13b", "llava-star"):
        shutil.copytree("out/chatpose-v0", f"out/{name}")
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(commands()) >= 15
    with running() as server:
        server.answers(answer)
        monkeypatch.setenv(URL, server.url)
        monkeypatch.delenv(KEY, raising=False)
        for command in commands():
            for real, small in IN_SMALL.items():
                command = command.replace(real, small)
            words = shlex.split(command)
            more = ["--workers", "1"] if words[1:3] == ["data", "prepare"] else []
            assert words[0] == "chatpose" and main([*words[1:], *more]) == 0, command
    done = set()
    for file in Path("out/tables").rglob("scores.json"):
        about = json.loads(file.read_text())
        system = {"chatpose-v0": "ChatPose"}.get(about["system"], about["system"])
        done.add((about["task"], about["data"].partition("-")[0], system))
    page = Path("out/tables/report.md").read_text()
    for row in PUBLISHED:
        if row.source.startswith(PAPER):
            assert {(row.task, data, row.system) for data in row.data} & done, row
            assert row.source in page
    assert not Path("out/tables/not_run.json").exists()
