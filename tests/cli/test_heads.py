"""Model folders whose pose head is of a package of one's own: found where the user names it, and never imported because a folder says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import chatpose_jax
from chatpose_jax.cli.main import main
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import HeadConfig, preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.export import export
from chatpose_jax.weights.save import save_folder

ROOT = Path(__file__).resolve().parents[2]
HEAD = "my_heads:Drawing"
BASE = preset("tiny").replace(lora=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as a training with ``my_heads`` on PYTHONPATH leaves it."""
    config = BASE.replace(head=HeadConfig("tests.model.toy_heads:Drawing"))
    params = init_params(config, jax.random.key(0))
    named = config.replace(head=HeadConfig(HEAD))
    return save_folder(tmp_path_factory.mktemp("models") / "own", named, params, processor=tiny_processor(BASE))


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The same as PyTorch weights with pose_head.json beside them."""
    from tests.model import toy_heads

    out = tmp_path_factory.mktemp("exported") / "hf"
    export(folder, out, "transformers", head=toy_heads.Drawing)
    about = json.loads((out / "pose_head.json").read_text())
    (out / "pose_head.json").write_text(json.dumps({**about, "name": HEAD}))
    return out


@pytest.fixture
def package(tmp_path):
    """A folder with ``my_heads``, which leaves a file behind when it is imported."""
    touch = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/my_heads.py").write_text((ROOT / "tests/model/toy_heads.py").read_text() + touch)
    return tmp_path / "lib"


def chatpose(*arguments, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-m", "chatpose_jax.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_chat_finds_the_head_that_the_user_names(folder, package, tmp_path):
    ask = ["chat", folder, "--prompt", "Kneel.", "--force-pose", "--max-new-tokens", 8, "--json"]
    done = chatpose(*ask, "--head", HEAD, "--samples", 2, "--seed", 3, "--out", tmp_path / "answer", path=package)
    assert done.returncode == 0, done.stderr
    turn = json.loads(done.stdout)
    assert [len(drawn) for drawn in turn["samples"]] == [2] * len(turn["poses"])
    assert [drawn[0] for drawn in turn["samples"]] == turn["poses"]
    assert turn["samples"][0][0]["axis_angle"] != turn["samples"][0][1]["axis_angle"]
    assert len(turn["poses"][0]["betas"]) == 10
    assert (tmp_path / "answer/reply.jsonl").read_text() == done.stdout
    saved = {file.name for file in (tmp_path / "answer").glob("*.npz")}
    assert {"turn-1-pose-1.npz", "turn-1-pose-1-sample-2.npz"} <= saved
    second = np.load(tmp_path / "answer/turn-1-pose-1-sample-2.npz")["axis_angle"]
    np.testing.assert_array_equal(second, np.float32(turn["samples"][0][1]["axis_angle"]))


def test_a_head_that_is_not_named_is_one_line_and_is_not_imported(folder, package):
    done = chatpose("chat", folder, "--prompt", "Kneel.", path=package)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"its pose head {HEAD!r} is not part of this program" in done.stderr
    assert f"--head {HEAD}" in done.stderr
    assert not (package / "imported").exists()


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("no_heads:Drawing", "pose head 'no_heads:Drawing' cannot be imported: No module named 'no_heads'"),
        ("my_heads:Drawin", "the module my_heads has no function or class 'Drawin'"),
        ("my_heads:Pose", "expected a class derived from chatpose_jax.models.heads.base.PoseHead"),
    ],
)
def test_what_is_wrong_with_a_named_head_is_one_line(folder, package, monkeypatch, capsys, head, words):
    monkeypatch.syspath_prepend(str(package))
    assert main(["chat", str(folder), "--head", head, "--prompt", "Kneel."]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    sys.modules.pop("my_heads", None)


def test_another_head_than_the_one_of_the_folder_is_said_first(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    head = "tests.model.toy_heads:Looking"
    assert main(["chat", str(folder), "--head", head, "--prompt", "Kneel."]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} was trained with the pose head {HEAD!r}, and --head names {head!r}")
    assert error.count("\n") == 1


COMMANDS = {
    "chat": ["chat", "{folder}", "--prompt", "x"],
    "export": ["export", "{folder}", "{tmp}/out", "--format", "transformers"],
    "export peft": ["export", "{folder}", "{tmp}/out", "--format", "peft"],
    "verify": ["verify", "{exported}", "{folder}"],
    "inspect": ["inspect", "{folder}"],
    "inspect weights": ["inspect", "{exported}"],
    "convert": ["convert", "{exported}", "{tmp}/out"],
    "chat with weights": ["chat", "{exported}", "--prompt", "x"],
    "train with another head": ["train", "--init", "{folder}", "--out", "{tmp}/run", "--set", "train.steps=1", "--set", "model.lora=none",
                                "--set", "train.batch_size=2", "--set", "train.eval_every=0", "--set", "data.sources.synthetic.train_size=4"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_what_a_folder_names(folder, exported, package, tmp_path, monkeypatch, capsys, command):
    monkeypatch.syspath_prepend(str(package))
    status = main([word.format(folder=folder, exported=exported, tmp=tmp_path) for word in COMMANDS[command]])
    out, error = capsys.readouterr()
    assert not (package / "imported").exists()
    assert "my_heads" not in sys.modules
    if command == "inspect" or command.startswith("train"):
        assert status == 0, error
        assert HEAD in out or HEAD in error
    else:
        assert status == 2
        assert error.count("\n") == 1


def test_load_takes_the_name_or_the_class(folder, package, monkeypatch):
    from tests.model import toy_heads

    with pytest.raises(UserError, match=r"load\(…, head=…\)"):
        chatpose_jax.load(folder)
    model = chatpose_jax.load(folder, head=toy_heads.Drawing)
    question = [{"role": "user", "content": "Kneel."}]
    reply = model.chat(question, max_new_tokens=8, force_pose=True)
    monkeypatch.syspath_prepend(str(package))
    named = chatpose_jax.load(folder, head=HEAD)
    again = named.chat(question, max_new_tokens=8, force_pose=True)
    np.testing.assert_array_equal(reply.poses[0].matrices, again.poses[0].matrices)
    sys.modules.pop("my_heads", None)
