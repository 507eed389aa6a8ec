"""The model that comes with the package: small, without traces of the machine that made it, and as good as the figures beside it say."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import chatpose_jax
from chatpose_jax.chat import DEMO, TOY
from chatpose_jax.cli.demo import evaluate, generated
from chatpose_jax.cli.main import main
from chatpose_jax.evaluation.poses import evaluate_chat, mean_pose
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.run_config import load_config
from chatpose_jax.weights.arrays import read_metadata
from chatpose_jax.weights.folder import PARAMS, load_model_config, read_folder
from chatpose_jax.weights.save import save_folder
from smpl_jax.pose import stack

ROOT = Path(__file__).resolve().parent.parent
FIGURES = json.loads((DEMO / "figures.json").read_text())
CONFIG = load_config("tiny")
KNEELS = "A person kneels on both knees. Both arms hang down at the sides. What is the pose in SMPL?"


@pytest.fixture(scope="module")
def model():
    with pytest.warns(UserWarning, match="the toy that comes with the package") as told:
        model = chatpose_jax.load()
    assert [str(warning.message) for warning in told if warning.filename == __file__] == [TOY]
    return model


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("demo_model", ROOT / "tools/demo_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_small_and_names_no_machine():
    files = [file for file in DEMO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 3e6
    for file in files:
        assert not re.search(rb"/(work|home|root|tmp|Users)/", file.read_bytes()), file
    assert all(any(folder.iterdir()) for folder in DEMO.rglob("*") if folder.is_dir()), "git keeps no empty folder"
    if (ROOT / ".git").exists():
        kept = subprocess.run(
            ["git", "ls-files", DEMO], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split()
        assert sorted(ROOT / name for name in kept) == sorted(files)


def test_it_is_the_model_of_the_demo_in_bfloat16():
    stored = load_model_config(DEMO)
    assert stored == CONFIG.model.replace(dtype="bfloat16", param_dtype="bfloat16")
    dtypes = {
        str(leaf.dtype)
        for path, leaf in read_metadata(DEMO / PARAMS).items()
        if "added" not in path and not path.startswith("pose_head")
    }
    assert dtypes == {"bfloat16"}


def test_its_answers_are_near_the_bodies_that_are_described(model):
    """A few of the rows that the figures are from, with room for what a few rows differ from all."""
    rows = generated(CONFIG, "test", {"text": 1.0}, FIGURES["rows"])
    train = generated(CONFIG, "train", {"text": 1.0}, 100)
    found = evaluate_chat(
        model, [rows[i] for i in range(16)], mean_pose(stack([row.poses[0] for row in train])), label="text"
    )
    assert found["pose_rate"] == 1
    assert found["ratio_pa_mpjpe"] < FIGURES["evaluation"]["text"]["ratio_pa_mpjpe"] + 0.2


def test_a_picture_and_a_follow_up_work(model):
    drawn = np.asarray(generated(CONFIG, "test", {"image": 1.0}, 4)[0].messages[0]["content"][0]["image"])
    asked = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": drawn},
                {"type": "text", "text": "Please estimate the SMPL pose of the person shown here."},
            ],
        }
    ]
    first = model.chat(asked, max_new_tokens=48)
    assert len(first.poses) == 1
    later = model.chat(
        [*asked, first.message, {"role": "user", "content": "And what if you raise the right arm above the head?"}],
        max_new_tokens=48,
    )
    assert len(later.poses) == 1
    assert np.abs(later.poses[0].joints - first.poses[0].joints).max() > 0.05


def test_the_command_says_that_it_is_a_toy(tmp_path, capsys):
    assert main(["chat", "--prompt", KNEELS, "--json", "--out", str(tmp_path / "answer")]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == f"note: {TOY}" and "\n" not in TOY
    [turn] = [json.loads(line) for line in out.splitlines()]
    assert len(turn["poses"]) == 1
    assert (tmp_path / "answer/turn-1-pose-1.glb").exists()
    assert main(["chat", str(DEMO), "--prompt", KNEELS, "--json"]) == 0
    named, err = capsys.readouterr()
    assert named == out and TOY not in err


def test_a_question_in_the_place_of_a_model_is_told_its_own(capsys):
    assert main(["chat", "Show me someone who kneels."]) == 2
    assert (
        capsys.readouterr().err
        == "error: Show me someone who kneels.: no such model folder; a question goes behind --prompt\n"
    )


def test_the_page_beside_it_holds_its_figures(tool):
    page = (DEMO / "README.md").read_text()
    assert tool.table(FIGURES["evaluation"]) in page
    assert f"{FIGURES['parameters']:,} parameters" in page


@pytest.mark.slow
def test_the_figures_are_measured_again(model):
    """Another processor rounds otherwise, so a few answers differ in words."""
    found = evaluate(model, CONFIG, FIGURES["rows"])
    for kind, expected in FIGURES["evaluation"].items():
        assert found[kind]["pa_mpjpe"] == pytest.approx(expected["pa_mpjpe"], abs=3)
        assert found[kind]["baseline_pa_mpjpe"] == pytest.approx(expected["baseline_pa_mpjpe"], abs=0.1)


@pytest.mark.slow
def test_the_tool_writes_the_folder(tool, tmp_path):
    """Of a model that a demo of no steps would leave."""
    trained, folder = tmp_path / "demo/model", tmp_path / "folder"
    trained.parent.mkdir()
    params = init_params(CONFIG.model, jax.random.key(0))
    origin = {"trained": {"steps": 0}}
    save_folder(trained, CONFIG.model, params, processor=tiny_processor(CONFIG.model), provenance=origin)
    tool.write(trained, folder)
    figures = tool.describe(folder, CONFIG, 4, trained="a", measured="b")
    assert {file.name for file in folder.iterdir()} == {file.name for file in DEMO.iterdir()}
    for file in folder.rglob("*"):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    assert json.loads((folder / "figures.json").read_text()) == figures and figures.keys() == FIGURES.keys()
    assert figures["evaluation"]["text"]["count"] == 4 and figures["evaluation"]["text"]["ratio_pa_mpjpe"] > 0.7
    assert read_folder(folder)["provenance"] == origin
