"""``chatpose evaluate``, and the free path from motion capture to its report as docs/prepared-data.md types it."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from chatpose_jax.cli.evaluate import LINE, LINES, draw_answer
from chatpose_jax.cli.main import main
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder
from smpl_jax import PosedBody, load_body

from ..motion_files import write_acclaim

ROOT = Path(__file__).resolve().parents[2]
CONFIG = preset("tiny").replace(lora=None)


def clips(folder):
    """Ten clips in which the left thigh rises, and an index that describes some of them."""
    arms = {"lhumerus": (0, 0, -80), "rhumerus": (0, 0, 80)}
    for number in range(1, 11):
        frames = [{**arms, "lfemur": (-number - 2.0 * i, 0.1, 0)} for i in range(40)]
        write_acclaim(folder, {f"{number:02}_01": frames})
    (folder / "cmu-mocap-index-text.txt").write_text("Subject #1\n\n01_01\traise a leg\n02_01\tUnknown\n")
    return folder


@pytest.mark.slow
def test_the_free_path_of_the_docs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/prepared-data.md").read_text()
    block = re.search(r"```sh\n(chatpose data prepare cmu.*?)```", text, flags=re.S)
    assert block[0] in (ROOT / "README.md").read_text()
    commands = [shlex.split(line)[1:] for line in block[1].splitlines()]
    assert [words[0] for words in commands] == ["data", "train", "evaluate", "chat"]
    monkeypatch.chdir(tmp_path)
    clips(tmp_path / "clips")
    few = {
        "train": ["--set", "train.steps=2", "--set", "train.eval_every=2", "--set", "data.buckets=1"],
        "evaluate": ["--rows", "5"],
    }
    for words in commands:
        assert main([*words, *few.get(words[0], [])]) == 0, words
    report = json.loads((tmp_path / "out/cmu/report/report.json").read_text())
    assert report["split"] == "test" and report["sources"] == [{"name": "cmu", "weight": 1.0, "options": {}}]
    found = report["evaluation"]["text"]
    assert found["count"] == 5 and 0 < found["baseline_pa_mpjpe"] < found["pa_mpjpe"]
    with Image.open(tmp_path / "out/cmu/report/text.png") as image:
        assert image.width > 700
    assert "text → pose" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_folder("model", CONFIG, init_params(CONFIG, jax.random.key(0)), processor=tiny_processor(CONFIG))
    for words, error in (
        (["model", "--set", "data.sources=cmu"], "chatpose data prepare cmu"),
        (["model", "--rows", "0"], "--rows of at least 1"),
        (["nowhere", "--set", "data.sources=synthetic"], "nowhere"),
    ):
        assert main(["evaluate", *words, "--out", "report"]) == 2
        assert error in capsys.readouterr().err
    assert not Path("report").exists()


def test_data_without_training_rows(tmp_path, monkeypatch, capsys):
    """Evaluation sets have a test split only; of some, nothing is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("only_test.py").write_text(
        "import dataclasses\n"
        "from chatpose_jax.data.synthetic.dataset import SyntheticDataset\n"
        "from smpl_jax.pose import unmeasured\n"
        "def rows(split, *, blind: bool = False):\n"
        "    found = list(SyntheticDataset('test', 3, tasks={'text': 1})) if split == 'test' else []\n"
        "    return [dataclasses.replace(row, poses=unmeasured((1,))) for row in found] if blind else found\n"
    )
    save_folder("model", CONFIG, init_params(CONFIG, jax.random.key(0)), processor=tiny_processor(CONFIG))
    true = [PosedBody(row.poses[0], load_body()) for row in SyntheticDataset("test", 3, tasks={"text": 1})]
    replies = [type("Reply", (), {"poses": [body]})() for body in true]
    monkeypatch.setattr("chatpose_jax.cli.evaluate.answer_poses", lambda *args, **words: (replies, 1.0))
    words = ["evaluate", "model", "--out", "report", "--drawings", "0", "--set", "data.sources=only_test:rows"]
    assert main(words) == 0
    assert "the mean pose is that of the split 'test' itself" in capsys.readouterr().out
    report = json.loads(Path("report/report.json").read_text())
    assert report["mean_pose_of"] == "test" and report["evaluation"]["text"]["baseline_mpjpe"] > 10
    assert main([*words, "--set", "data.sources.only_test:rows.blind=true"]) == 2
    assert "none of the 3 text rows of the split 'test' has a measured joint" in capsys.readouterr().err


def test_an_answer_is_drawn_beside_the_truth_and_the_image():
    body = load_body()
    for task in ("text", "image"):
        row = SyntheticDataset("test", 1, tasks={task: 1})[0]
        reply = type("Reply", (), {"poses": [PosedBody(row.poses[0], body)]})()
        panel = draw_answer(type("Model", (), {"body": body})(), row, reply)
        count = 3 if task == "image" else 2
        assert panel.shape[1] == count * 192 + 4 * (count + 1) and panel.dtype == np.uint8
        truth, answer = (panel[4:196, 4 + (192 + 4) * i :][:, :192] for i in (count - 2, count - 1))
        assert np.abs(truth.astype(int) - answer).mean() < 2  # the same body
        inked = np.flatnonzero((panel[-LINES * LINE :] < 128).any((0, 2)))
        assert inked.size and inked.max() < panel.shape[1] - 4  # no line runs over the edge
