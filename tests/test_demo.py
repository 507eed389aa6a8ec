"""The demo end to end with a handful of steps."""

import json
import re
from pathlib import Path

import pytest

from chatpose_jax.cli.demo import draw_curve, generated
from chatpose_jax.cli.main import main
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.data.synthetic.scene import MAX_YAW
from chatpose_jax.train.run_config import load_config

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["train.steps=3", "train.eval_every=3", "train.batch_size=8"]
FEW = ["data.sources.synthetic.train_size=48", "data.sources.synthetic.val_size=48"]


def sets(*settings, few=FEW):
    return [word for setting in (*QUICK, *few, *settings) for word in ("--set", setting)]


@pytest.mark.slow
def test_the_demo_leaves_answers_and_a_report(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--rows", "8", *sets()]) == 0
    report = json.loads((out / "report.json").read_text())
    for kind in ("text", "image"):
        assert report["evaluation"][kind]["count"] == 8
        assert 100 < report["evaluation"][kind]["baseline_pa_mpjpe"] < 300
    assert report["evaluation"]["follow-up"]["count"] == 8
    assert report["evaluation"]["follow-up"]["kept_pa_mpjpe"] > 0
    assert report["learning_curve"][-1]["step"] == 3
    assert [answer["name"] for answer in report["answers"][:3]] == ["description", "image", "follow-up"]
    assert len(report["answers"][2]["turns"]) == 2
    for answer in report["answers"]:
        assert all(Path(file).stat().st_size > 0 for file in answer["files"])
    assert (out / "learning-curve.png").exists()
    assert (
        main(["chat", str(out / "model"), "--prompt", "Kneel.", "--force-pose", "--out", str(tmp_path / "answer")]) == 0
    )
    assert (tmp_path / "answer/turn-1-pose-1.glb").exists()
    printed = capsys.readouterr().out
    assert "PA-MPJPE" in printed
    assert main(["demo", "--out", str(out), "--rows", "8", *sets()]) == 0, "a finished demo goes on from its checkpoint"


@pytest.mark.slow
def test_the_data_set_of_the_docs_trains(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.S)
    (tmp_path / "mydata.py").write_text(next(block for block in blocks if "class Waves" in block))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["train", "--out", str(tmp_path / "run"), *sets("data.sources=mydata:make", few=())]) == 0


def test_rows_of_the_demo_are_of_the_configured_source():
    options = ("max_yaw=90.0", "seed=5", "image_size=32")
    config = load_config("tiny", [f"data.sources.synthetic.{option}" for option in options])
    rows = generated(config, "test", {"image": 1.0}, 20)
    assert (rows.max_yaw, rows.image_size, len(rows)) == (90, 32, 20)
    expected = SyntheticDataset("test", 20, 5, 32, {"image": 1.0}, 90)
    assert all(a.poses.rotations.tobytes() == b.poses.rotations.tobytes() for a, b in zip(rows, expected))
    assert rows[0].messages != generated(config, "test", {"image": 1.0}, seed=1)[0].messages
    assert generated(load_config("tiny"), "test", {"text": 1.0}).max_yaw == MAX_YAW


def test_the_curve_of_a_head_with_a_loss_of_its_own_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log = [{"step": step, "loss": 1.0, "text": 0.5, "mine": 0.5} for step in range(1, 4)]
    results = {kind: {"baseline_pa_mpjpe": 180.0} for kind in ("text", "image")}
    assert draw_curve(log, results, tmp_path / "curve.png") == tmp_path / "curve.png"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
