"""Commands as a user types them: files they leave, exit status, one clear line for bad input."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.chat import DEMO
from chatpose_jax.cli.main import COMMANDS, main
from chatpose_jax.cli.terminal import drawing
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig, preset
from chatpose_jax.train.run_config import config_names, load_config
from smpl_jax import Pose, PosedBody, axis_angle_to_matrix, load_body

from ..smpl.models import random_arrays

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder():
    return DEMO


def lines(capsys):
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out, _ = lines(capsys)
    assert [name for name in COMMANDS if not re.search(rf"^    {name}\s", out, re.M)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0


def test_interrupted_while_its_modules_load(monkeypatch, capsys):
    def pressed(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("chatpose_jax.cli.main.importlib.import_module", pressed)
    assert main(["pretrained"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_chat_answers_and_writes_every_format(folder, tmp_path, capsys):
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save(tmp_path / "photo.jpg")
    arguments = [
        "--prompt",
        "What pose is this?",
        "--image",
        str(tmp_path / "photo.jpg"),
        "--prompt",
        "And now?",
        "--force-pose",
    ]
    status = main(
        ["chat", str(folder), *arguments, "--max-new-tokens", "12", "--json", "--out", str(tmp_path / "answer")]
    )
    out, _ = lines(capsys)
    turns = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [turn["prompt"] for turn in turns] == ["What pose is this?", "And now?"]
    assert len(turns[0]["poses"][0]["axis_angle"]) == 24
    assert (tmp_path / "answer/reply.jsonl").read_text() == out, "the file holds what --json prints"
    assert [turn["turn"] for turn in turns] == [1, 2]
    assert {f"turn-1-pose-1{s}" for s in (".png", ".obj", ".glb", ".npz")} <= {
        file.name for file in (tmp_path / "answer").iterdir()
    }
    assert (
        main(["render", str(tmp_path / "answer/turn-1-pose-1.npz"), "--out", str(tmp_path / "r.png"), "--size", "64"])
        == 0
    )
    assert Image.open(tmp_path / "r.png").size == (128, 64)


def test_a_conversation_in_the_terminal(folder, tmp_path, capsys, monkeypatch):
    Image.fromarray(np.full((90, 70, 3), 128, np.uint8)).save(tmp_path / "photo.jpg")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    wrong = ["/image nowhere.png", f"/image {'long' * 99}", "/save early", "/what"]
    first = [
        "/help",
        *wrong,
        "/image ~/photo.jpg",
        "/pose",
        "Hello",
        "/save ~/saved",
        "/save ~/file",
        "/image ~/photo.jpg",
    ]
    more = ["/pose", "And then?", "/save ~/second", "/reset", "/pose", "Again", "/save ~/third"]
    typed = iter([*first, *more, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", str(folder), "--max-new-tokens", "12"]) == 0
    out, _ = lines(capsys)
    assert out.count("error: ") == len(wrong) + 1
    assert "/image: no image file at 'nowhere.png'" in out
    assert "File name too long" in out
    assert "there must be one" in out
    assert "no command /what" in out
    assert f"{tmp_path / 'file'}: cannot be written" in out
    for name, turn in (("saved", 1), ("second", 2), ("third", 1)):
        assert (tmp_path / name / f"turn-{turn}-pose-1.glb").exists()
        assert json.loads((tmp_path / name / "reply.jsonl").read_text())["turn"] == turn


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["chat", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["chat", "{folder}", "--prompt", "x", "--image", "nowhere.jpg"], "--image: no image file at 'nowhere.jpg'"),
        (
            ["chat", "{folder}", "--prompt", "x", "--image", "https://example.org/a.png"],
            "--image: 'https://example.org/a.png' is a web address",
        ),
        (["chat", "{folder}", "--prompt", "x", "--out", "{answered}"], "answered already holds an answer (reply.json)"),
        (["chat", "nowhere", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens must be a whole number"),
        (["chat", "nowhere", "--prompt", "x", "--temperature", "nan"], "temperature must be 0 (greedy) or between"),
        (["chat", "nowhere", "--seed", "-1"], "seed must be a whole number in [0, 4294967295]"),
        (["chat", "{folder}", "--image", "{text}"], "--image needs --prompt"),
        (["chat", "{folder}", "--prompt", "x", "--image", "{text}"], "notes.txt"),
        (["chat", "{folder}", "--prompt", "x", "--body", "{text}"], "notes.txt"),
        (["chat", "{folder}", "--prompt", "word " * 1500], "context"),
        (["chat", "{folder}", "--prompt", "x", "--top-p", "7"], "top_p"),
        (["chat", "{folder}", "--prompt", "x", "--out", "{text}/answer"], "notes.txt/answer: cannot be written"),
        (["chat", "{folder}", "--out", "{tmp}/answer"], "--out needs --prompt"),
        (["chat", "{folder}", "--prompt", "x", "--image", "long" * 99], "File name too long"),
        (["render", "{pose}", "--out", "{text}/x.png"], "notes.txt"),
        (["render", "{pose}", "--out", "{tmp}/folder.png"], "folder.png: Is a directory"),
        (["train", "--config", "nothing", "--out", "{tmp}/run"], "no configuration 'nothing'"),
        (["train", "--out", "{tmp}/run", "--set", "train.stepz=3"], "did you mean train.steps"),
        (["train", "--out", "{tmp}/run", "--config.train.stepz=3"], "did you mean train.steps"),
        (["demo", "--out", "{tmp}/demo", "--config=tiny", "--config.train.stepz", "3"], "did you mean train.steps"),
        (["plan", "--target", "cpu:1", "--config.train.stepz=3"], "did you mean train.steps"),
        (["train", "--config", "chatpose_13b", "--out", "{tmp}/run"], "give --init"),
        (["train", "--out", "{text}"], "notes.txt is a file: expected a folder"),
        (["train", "--out", "{tmp}/run", "--set", "model.head.name=nothing"], "no pose head 'nothing'"),
        (["train", "--out", "{tmp}/run", "--set", "train.trainable=[['pose_head',1.0]]"], "no row matches"),
        (["convert", "{tmp}", "{tmp}/out"], "{tmp}"),
        (["render", "{text}", "--out", "{tmp}/x.png"], "notes.txt"),
        (["demo", "--out", "{tmp}/demo", "--rows", "0"], "--rows 0: expected at least 1"),
        (["demo", "--out", "{tmp}/demo", "--set", "model.head.name=nothing"], "no pose head 'nothing'"),
        (["render", "nowhere.npz", "--out", "{tmp}/x.png"], "no such file"),
        (
            ["render", "{pose}", "--out", "{tmp}/x.png", "--index", "1"],
            "expected the index of a pose in [0, 1), found 1",
        ),
        (["render", "{rootless}", "--out", "{tmp}/x.png"], "{rootless}: body_pose does not contain the root"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, words, folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("not an image, not a body, not a pose")
    (tmp_path / "folder.png").mkdir()
    np.save(tmp_path / "pose.npy", np.zeros((24, 3)))
    np.savez(tmp_path / "rootless.npz", body_pose=np.zeros((23, 3)))
    (tmp_path / "answered").mkdir()
    (tmp_path / "answered/reply.json").write_text("[]")
    names = {"folder": folder, "pose": tmp_path / "pose.npy", "text": tmp_path / "notes.txt", "tmp": tmp_path}
    names |= {"answered": tmp_path / "answered", "rootless": tmp_path / "rootless.npz"}
    status = main([argument.format(**names) for argument in arguments])
    out, err = lines(capsys)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words.format(**names) in err
    assert "reading data" not in out  # found at once


@pytest.mark.parametrize(
    ("arguments", "usage", "words"),
    [
        (["chat", "m", "--promt", "x"], "usage: chatpose chat ", "no option --promt; did you mean --prompt?"),
        (["chat", "--promt=x y", "m"], "usage: chatpose chat ", "no option --promt; did you mean --prompt?"),
        (["chat", "-prompt", "x"], "usage: chatpose chat ", "no option -prompt; did you mean --prompt?"),
        (["chat", "m", "--quagga"], "usage: chatpose chat ", "no option --quagga\n"),
        (["render", "pose.npz", "--uot", "x.png"], "usage: chatpose render ", "no option --uot; did you mean --out?"),
        (["train", "--confg", "tiny"], "usage: chatpose train ", "no option --confg; did you mean --config?"),
        (["demo", "--rowz", "3"], "usage: chatpose demo ", "did you mean --rows?"),
        (["convert", "a", "b", "--visoin", "c"], "usage: chatpose convert ", "did you mean --vision?"),
        (["export", "a", "b", "--fromat", "c"], "usage: chatpose export ", "did you mean --format?"),
        (["inspect", "a", "--hepl"], "usage: chatpose inspect ", "did you mean --help?"),
        (["verify", "a", "b", "--visoin", "c"], "usage: chatpose verify ", "did you mean --vision?"),
        (["plan", "--taregt", "h100"], "usage: chatpose plan ", "did you mean --target?"),
        (["--versoin"], "usage: chatpose [-h]", "did you mean --version?"),
        (["chta", "m"], "usage: chatpose [-h]", "no command 'chta'; did you mean chat?"),
        (["zebra"], "usage: chatpose [-h]", "no command 'zebra'; expected one of demo, pretrained, data, train"),
    ],
)
def test_a_mistyped_flag_shows_its_command_and_the_nearest_flag(arguments, usage, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    _, err = lines(capsys)
    assert stop.value.code == 2
    assert err.startswith(usage)
    assert words in err


def test_a_warning_is_one_line_without_code(monkeypatch):
    def warn(**_):
        said.append(warnings.formatwarning(UserWarning("slow"), UserWarning, "a.py", 3))
        raise UserError("that is all")

    said = []
    monkeypatch.setattr("chatpose_jax.cli.chat.check_settings", warn)
    assert main(["chat", "model"]) == 2
    assert said == ["warning: slow\n"]
    assert "a.py" in warnings.formatwarning(UserWarning("slow"), UserWarning, "a.py", 3)


def test_abbreviations_negative_numbers_and_words_with_dashes_are_no_mistakes(folder, capsys):
    assert main(["chat", str(folder), "--pro", "- a dash", "--max-new", "2", "--temp", "-1"]) == 2
    assert lines(capsys)[1].startswith("error: temperature must be 0")


class Terminal(io.StringIO):
    """Standard output as a terminal has it."""

    encoding = "UTF-8"

    def isatty(self):
        return True


def test_an_answer_in_a_terminal_is_drawn(folder, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "model")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    shown = {}
    for name, value in (("colour", None), ("plain", "1"), ("dumb", "1")):
        monkeypatch.setenv("NO_COLOR", value) if value else monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "dumb" if name == "dumb" else "xterm")
        monkeypatch.setattr(sys, "stdout", Terminal())
        command = ["chat", str(tmp_path / "run"), "--prompt", "Kneel.", "--force-pose", "--max-new-tokens", "8"]
        assert main(command) == 0, "the folder of a run holds its model"
        shown[name] = sys.stdout.getvalue()
    assert "\x1b[38;5;" in shown["colour"]
    assert "\x1b" not in shown["plain"]
    assert "█" in shown["plain"]
    assert not set("█▀▄\x1b") & set(shown["dumb"])
    assert re.sub(r"\x1b\[[\d;]*m", "", shown["colour"]).replace("█", "▀") == shown["plain"].replace("█", "▀")


def test_a_drawing_is_the_image_in_blocks():
    """Head up and narrow, arms to both sides, two legs with a gap: an upright person with arms held out."""
    matrices = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
    matrices[0] = np.diag([1, -1, -1])
    pose = PosedBody(Pose(matrices, "camera"), load_body())
    both, one = drawing(pose, 80, False).split("\n"), drawing(pose, 40, False).split("\n")
    assert drawing(pose, 20, False) == ""
    assert max(map(len, both)) > 40 > max(map(len, one))
    widths = [len(line.strip()) for line in one]
    middle = [line.find(line.strip()) + len(line.strip()) / 2 for line in one]
    assert np.ptp(middle) <= 2, "left and right are alike"
    assert max(widths) > 25 > 6 > widths[0], "arms wide, head narrow"
    assert len(one[-2].split()) == 2, "two legs"


def _bomb(folder, path):
    """A PNG of 10¹⁰ pixels in a hundred bytes."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def _hostile_body(folder, path):
    path.write_bytes(b"cos\nsystem\n(Vexit 1\ntR.")


def _no_weights(folder, path):
    shutil.copytree(folder, path)
    shutil.rmtree(path / "params")


def _another_tokenizer(folder, path):
    shutil.copytree(folder, path)
    file = path / "tokenizer" / "tokenizer.json"
    data = json.loads(file.read_text())
    for token in data["added_tokens"]:
        token["content"] = {"<POSE>": "<image>", "<image>": "<POSE>"}.get(token["content"], token["content"])
    file.write_text(json.dumps(data))


def _no_tokenizer(folder, path):
    shutil.copytree(folder, path)
    (path / "tokenizer" / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (_bomb, ["chat", "{folder}", "--prompt", "x", "--image", "{made}"], "too many pixels"),
        (
            _hostile_body,
            ["chat", "{folder}", "--prompt", "x", "--body", "{made}"],
            "system, which no official body file does",
        ),
        (_hostile_body, ["render", "{pose}", "--out", "{pose}.png", "--body", "{made}"], "Nothing was run"),
        (_no_weights, ["chat", "{made}", "--prompt", "x"], "params missing"),
        (_no_tokenizer, ["chat", "{made}", "--prompt", "x"], "no tokenizer in '{made}/tokenizer'"),
        (_another_tokenizer, ["chat", "{made}", "--prompt", "x"], "the tokenizer belongs to another checkpoint"),
    ],
)
def test_a_damaged_or_hostile_file_is_one_line_and_status_2(make, arguments, words, folder, tmp_path, capsys):
    make(folder, tmp_path / "made")
    np.save(tmp_path / "pose.npy", np.zeros((24, 3)))
    names = {"folder": folder, "made": tmp_path / "made", "pose": tmp_path / "pose.npy"}
    assert main([argument.format(**names) for argument in arguments]) == 2
    _, err = lines(capsys)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words.format(**names) in err


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_weights_are_one_line_of_a_real_process(folder, tmp_path):
    """Readers that work in the background write logs and tracebacks of their own: nothing but the one line may be seen."""
    damages = {
        "halved": ("d/*", _halve, "not a complete Orbax checkpoint (ValueError: OUT_OF_RANGE"),
        "halved data": ("ocdbt.process_0/d/*", _halve, "the stored parameters are damaged"),
        "no data": ("ocdbt.process_0/d/*", Path.unlink, "the stored parameters are damaged"),
        "no manifest": ("manifest.ocdbt", Path.unlink, "manifest.ocdbt is missing"),
        "no metadata": ("_METADATA", Path.unlink, "_METADATA is missing"),
    }
    for name, (files, change, _) in damages.items():
        shutil.copytree(folder, tmp_path / name)
        for file in list((tmp_path / name / "params").glob(files)):
            change(file)
    each = "import sys; from chatpose_jax.cli.main import main; print(*(main(['chat', m, '--prompt', 'x']) for m in sys.argv[1:]))"
    command = [sys.executable, "-c", each, *(tmp_path / name for name in damages)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["2"] * len(damages))
    said = done.stderr.splitlines()
    assert len(said) == len(damages), done.stderr
    for line, (name, (_, _, words)) in zip(said, damages.items()):
        assert line.startswith(f"error: {tmp_path / name / 'params'}: ") and words in line


UPRIGHT = np.zeros((2, 24, 3))
UPRIGHT[:, 4], UPRIGHT[:, 18], UPRIGHT[1, 1] = (0.6, 0, 0), (0, -0.8, 0), (-0.7, 0, 0)  # left knee, elbow; later, hip
CAMERA = np.array(axis_angle_to_matrix(UPRIGHT))
CAMERA[:, 0] = np.diag([1, -1, -1])
HALF_TURN, AMASS = np.tile([np.pi, 0, 0], (2, 1)), np.zeros((2, 156))
AMASS[:, :66], AMASS[:, 66:], AMASS[:, 0] = UPRIGHT.reshape(2, 72)[:, :66], 0.5, np.pi / 2


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        (
            {"global_orient": CAMERA[:, :1], "body_pose": CAMERA[:, 1:], "betas": np.zeros((2, 10))},
            [],
            "read global_orient + body_pose as 24 joints, matrices, frame camera (assumed; upside down? --frame y-up, as in smplx); "
            "betas not used: they belong to the body that the pose was made with",
        ),
        ({"global_orient": HALF_TURN, "body_pose": UPRIGHT[:, 1:].reshape(2, 69)}, [], "as 24 joints, axis-angle"),
        ({"global_orient": np.zeros((2, 3)), "body_pose": UPRIGHT[:, 1:22]}, ["--frame", "y-up"], "y-up (by --frame)"),
        (
            {"poses": AMASS, "mocap_framerate": 120.0},
            [],
            "frame z-up (by the file); joints left out: 30 of fingers",
        ),
        ({"axis_angle": UPRIGHT, "frame": np.array("model")}, [], "frame y-up (by the file)"),
    ],
)
def test_render_takes_a_pose_as_its_file_means_it(arrays, options, said, tmp_path, capsys):
    """What goes out, in the camera frame, is what went in: no joint shifted, no root lost, nobody upside down."""
    np.savez(tmp_path / "in.npz", **arrays)
    command = ["render", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out.npz"), "--index", "1", *options]
    assert main(command) == 0
    out, err = lines(capsys)
    assert out == f"{tmp_path / 'out.npz'}\n" and said in err and err.count("\n") == 1
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_allclose(file["matrices"], CAMERA[1], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "joints", "betas", "shaped", "words", "kept"),
    [
        ("smpl", 24, 10, True, [], 10),
        ("smpl", 24, 4, True, [], 4),
        ("smpl", 24, 16, True, ["betas used: the first 10 of 16"], 10),
        ("smpl", 24, 10, False, ["betas not used: they belong to the body"], None),
        ("smpl", 55, 10, True, ["joints left out: 33 of jaw and eyes, fingers", "betas not used: they are not those of smpl"], None),
        ("smplh", 52, 16, True, ["betas used: the first 10 of 16"], 10),
        ("smplh", 24, 10, True, ["joints left out: 2 of rigid hands"], 10),
        ("smplx", 55, 10, True, [], 10),
    ],
)  # fmt: skip
def test_render_says_what_a_body_cannot_show(kind, joints, betas, shaped, words, kept, tmp_path):
    from chatpose_jax.cli.render import fit
    from smpl_jax import Pose, PosedBody, load_body

    np.savez(tmp_path / "body.npz", **random_arrays(kind, 60))
    body = load_body(tmp_path / "body.npz")
    pose = Pose(np.tile(np.eye(3), (joints, 1, 1)), "z-up", np.ones(betas, np.float32), np.ones(3, np.float32))
    fitted, left_out = fit(pose, body, shaped=shaped)
    assert fitted.frame == "camera" and (None if fitted.betas is None else len(fitted.betas)) == kept
    assert len(left_out) == len(words) and all(said.startswith(word) for said, word in zip(left_out, words))
    assert PosedBody(fitted, body).joints.shape == (body.num_joints, 3)


def test_render_gives_a_body_of_its_own_the_shape_it_had(tmp_path, capsys):
    from smpl_jax import Pose, PosedBody, load_body, read_poses

    pose = Pose(CAMERA[0].astype(np.float32), "camera", betas=np.float32([1, -1]), translation=np.float32([0, 0, 3]))
    PosedBody(pose, load_body()).save(tmp_path / "in.npz")
    assert main(["render", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out.npz")]) == 0
    assert "betas" not in lines(capsys)[1]
    again = read_poses(tmp_path / "out.npz")[0]
    np.testing.assert_array_equal(again.betas, pose.betas)
    np.testing.assert_array_equal(again.translation, pose.translation)
    np.savez(tmp_path / "body.npz", **random_arrays("smpl", 60))
    other = ["--out", str(tmp_path / "other.npz"), "--body", str(tmp_path / "body.npz")]
    assert main(["render", str(tmp_path / "in.npz"), *other]) == 0
    assert "betas not used: they belong to chatpose-default" in lines(capsys)[1]
    assert read_poses(tmp_path / "other.npz")[0].betas is None


def test_render_writes_a_glb_with_and_without_skin(tmp_path):
    np.save(tmp_path / "pose.npy", UPRIGHT[0])
    for option, name in (("--skinned", "rig"), ("--no-skinned", "static")):
        out = tmp_path / f"{name}.glb"
        assert main(["render", str(tmp_path / "pose.npy"), "--out", str(out), option]) == 0
        assert (b'"skins"' in out.read_bytes()) == (name == "rig")


@pytest.mark.parametrize(
    ("name", "layers", "width"), [("tiny", None, None), ("chatpose_7b", 32, 4096), ("chatpose_13b", 40, 5120)]
)
def test_configurations_load_and_train_what_they_say(name, layers, width):
    """The paper's: LoRA of rank 128 on q and v, the head's two matrices and biases, one added row of two tables."""
    from chatpose_jax.models.chatpose import abstract_params
    from chatpose_jax.train.trainable import describe_trainable, flatten

    assert name in config_names()
    config = load_config(name)
    params = abstract_params(config.model)
    total = sum(leaf.size for leaf in flatten(params).values())
    if layers is None:
        trains = total
    else:
        trains = layers * 2 * 2 * width * 128 + (width + 1) * width + (width + 1) * 24 * 6 + 2 * width
        assert trains < total / 50
    assert f"\n{trains:,d} of {total:,d} parameters train" in describe_trainable(params, config.train.trainable)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", "KEY=VALUE"),
        ("train.steps=1.5", "expected int"),
        ("train.steps=0", "at least 1"),
        ("model=3", "table of settings"),
        ("model.lora.rang=4", "did you mean model.lora.rank"),
        ("train.schedule=step", "linear"),
        ("train.optimizer=sgd", "adamw"),
        ("train.trainable=[1]", "rows of"),
        ("data.sources=[3]", "data.sources: expected rows of .name, weight, .*, found 3 instead of a row"),
        ("model.head.options={'hidden': 64}", r"such as \(\(.hidden., 64\),\), found"),
        ("train.steps=none", "train.steps: expected int, found None"),
        ("train.steps={[]:1}", "not valid Python"),
        ("train.learning_rate=none", "train.learning_rate: expected a finite number, found None"),
        ("train.learning_rate=1e999", "expected a finite number, found inf"),
        ("train.remat=none of it", "expected 'none' or"),
        ("train.warmup_steps=-1", "train.warmup_steps must be at least 0, found -1"),
        ("train.b2=1.0", "less than 1"),
        ("train.seed=-1", "train.seed must be at least 0"),
        ("train.trainable=none", "rows of"),
        ("train.trainable=[['.*','x',0]]", "each .pattern, lr, weight_decay, tokens.,"),
        (
            "train.trainable=(('pose_head/.*', 1))",
            "found 'pose_head/.*' instead of a row; a single row needs a comma",
        ),
        ("train.trainable=(('.*', 1) ('.*', None))", "not valid Python; look for a missing comma"),
        ("train.trainable=(('.*', 1)", "not valid Python; look for a missing comma"),
        ("train.trainable=everything", "such as .*pose_head.*found 'everything'"),
        ("train.trainable=[['.*',-1.0,0]]", "negative rate"),
        ("train.trainable=[['.*',1.0,0,'some']]", "'all' or 'pose'"),
        ("train.max_length=5", "train.max_length must be at least 64, found 5"),
        ("train=none", "table of settings"),
        ("data.cache_mib=-3", "data.cache_mib must be at least 0, found -3"),
        ("data.buckets=0", "data.buckets must be at least 1"),
        ("data.sources=none", "data.sources: expected rows of .name, weight, .*, found None"),
        ("data.sources=(('synthetic', 1))", "found 'synthetic' instead of a row; a single row needs a comma"),
        ("data.sources=(('synthetic', 'x'),)", "data.sources.0.: weight: expected a finite number, found 'x'"),
        ("data.sources=(('synthetic', -1),)", "weights must be positive"),
        ("data.sources.synthetic=3", "expected data.sources.NAME.OPTION=VALUE"),
        (
            "data.sources.posscript.folder=a",
            "no row of data.sources has the name 'posscript'; did you mean posescript?",
        ),
        (
            "data.sources.mine:rows.seed=3",
            "no row of data.sources has the name 'mine:rows'; the names are posescript, llava",
        ),
        ("data.source=mine:rows", "--set data.source: data.sources says this now; type --set data.sources=mine:rows"),
        ("data.source=mixture", "type --set .data.sources=...synthetic., 1.0, {'kind': 'text'}., .*'image'}.."),
        ("data.train_size=3", "type --set data.sources.synthetic.train_size=3"),
        ("data.mixture=(('image',1),)", "type --set .data.sources.synthetic.tasks={'image': 1}"),
        ("data.mixture=3", "type --set .data.sources.synthetic.tasks=3"),
        ("model.dtype=float33", "'float32' or 'bfloat16' or 'float16', found 'float33'"),
        ("model.text=none", "model.text: this is a table of settings"),
        ("model.text.num_heads=0", "model.text.num_heads must be at least 1"),
        ("model.text.head_dim=7", "even"),
        ("model.text.num_kv_heads=3", "must divide"),
        ("model.text.vocab_size=9", "must not exceed"),
        ("model.vision.patch_size=0", "model.vision.patch_size must be at least 1"),
        ("model.vision.num_heads=3", "must divide model.vision.hidden_size"),
        ("model.vision.select_layer=-99", "must lie between"),
        ("model.lora.rank=0", "model.lora.rank must be at least 1"),
        ("model.lora.targets=['q']", "'q_proj' or"),
        ("model.head=none", "table of settings"),
        ("model.pose_token_id=99999", "vocabulary of 32001 rows"),
    ],
)
def test_a_wrong_override_is_one_clear_error(override, words):
    with pytest.raises(UserError, match=words):
        load_config("chatpose_7b", [override])


def test_sources_are_set_by_name_and_option():
    def sources(*overrides, config="tiny"):
        return tuple(map(tuple, load_config(config, overrides).data.sources))

    assert sources("data.sources=mine:rows") == (("mine:rows", 1.0, {}),)
    assert sources("data.sources=my.data:rows", "data.sources.my.data:rows.file=/a/b.json") == (
        ("my.data:rows", 1.0, {"file": "/a/b.json"}),
    )
    ((_, _, before),), ((_, _, after),) = sources(), sources("data.sources.synthetic.train_size=7")
    assert after == {**before, "train_size": 7} != before
    rows = "(('a:b', 2, {'x': [1, {'y': None}]}), ('a:b',), ('synthetic', 1.5))"
    expected = (("a:b", 2, {"x": (1, {"y": None})}), ("a:b", 1.0, {}), ("synthetic", 1.5, {}))
    assert sources(f"data.sources={rows}") == expected
    assert sources(f"data.sources={rows}", "data.sources.synthetic.seed=4") == (*expected[:2], ("synthetic", 1.5, {"seed": 4}))  # fmt: skip
    with pytest.raises(UserError, match=r"2 rows have the name 'a:b', so give all rows: --set .*\('a:b', 2, {'x'"):
        sources(f"data.sources={rows}", "data.sources.a:b.seed=3")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("d.source = 'mine:rows'", "data.source: data.sources says this now; write config.data.sources = (('mine:rows', 1.0, {}),)"),
        (
            "d.train_size = 9; d.mixture = (('text', 2), ('image', 1))",
            "data.mixture, data.train_size: data.sources says this now; "
            "write config.data.sources = (('synthetic', 1.0, {'train_size': 9, 'tasks': {'text': 2, 'image': 1}}),)",
        ),
        (
            "d.source = 'mixture'; d.val_size = 5",
            "write config.data.sources = (('synthetic', 1.0, {'kind': 'text', 'val_size': 5}), ('synthetic', 1.0, {'kind': "
            "'instruction', 'val_size': 5}), ('synthetic', 2.0, {'kind': 'image', 'val_size': 5}))",
        ),
        (
            "d.source = 'mixture'; d.sources = (('synthetic-text', 3), ('mine:rows', 1))",
            "write config.data.sources = (('synthetic', 3, {'kind': 'text'}), ('mine:rows', 1, {}))",
        ),
    ],
)  # fmt: skip
def test_a_file_of_versions_before_is_told_what_to_write(tmp_path, lines, words):
    """And what it is told to write is taken."""
    path = tmp_path / "mine.py"
    head = "from chatpose_jax.train.run_config import run_config\ndef get_config():\n    config = run_config('tiny')\n"
    text = head + "    d = config.data\n    {}\n    return config\n"
    path.write_text(text.format(lines))
    with pytest.raises(UserError) as raised:
        load_config(str(path))
    assert str(raised.value).startswith(f"{path}: data.") and str(raised.value).endswith(words)
    path.write_text(text.format(words[words.index("config.data") :]))
    assert load_config(str(path)).data.sources != load_config("tiny").data.sources


def test_the_adapters_may_be_left_out():
    assert load_config("chatpose_7b", ["model.lora=none"]).model.lora is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": 7}, "model.dtype"),
        ({"text": None}, "model.text: expected TextConfig, found None"),
        ({"text": {"num_layers": "3"}}, "model.text.num_layers: expected int, found '3'"),
        ({"vision": {"patch_size": 0}}, "model.vision.patch_size must be at least 1"),
        ({"vision": []}, "model.vision: expected a table"),
        ({"lora": {"targets": 3}}, "model.lora.targets: expected a list"),
        ({"head": {"options": [3]}}, "model.head.options"),
        ({"scan_layers": 1}, "model.scan_layers: expected bool"),
        ({"pose_token_id": True}, "model.pose_token_id: expected int"),
    ],
)
def test_a_strangers_config_json_is_checked(change, words):
    with pytest.raises(UserError, match=words):
        ModelConfig.from_json({**preset("tiny").to_json(), **change})


def test_json_is_an_inverse():
    for name in ("tiny", "chatpose_13b"):
        assert ModelConfig.from_json(json.loads(json.dumps(preset(name).to_json()))) == preset(name)


def test_a_broken_configuration_file_is_one_clear_error(tmp_path):
    (tmp_path / "three.py").write_text("def get_config():\n    return 3\n")
    with pytest.raises(UserError, match=r"three.py: get_config\(\) returned 3; expected a ConfigDict"):
        load_config(str(tmp_path / "three.py"))
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_config(str(tmp_path / "mine.py"))
    (tmp_path / "typo.py").write_text(
        "from chatpose_jax.train.run_config import run_config\ndef get_config():\n    c = run_config('tiny')\n    c.train.stepz = 3\n    return c\n"
    )
    words = "typo.py: train: unknown setting 'stepz'; did you mean steps?"
    for overrides in ([], ["train.log_every=3"]):
        with pytest.raises(UserError, match=words):
            load_config(str(tmp_path / "typo.py"), overrides)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty.py has no function get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "old.py").write_text("from chatpose_jax.cli.config import run_config\n")
    with pytest.raises(UserError, match=r"run_config is in chatpose_jax.train.run_config now"):
        load_config(str(tmp_path / "old.py"))


def test_an_override_reaches_an_option_of_the_head():
    config = load_config(
        "tiny", ["model.head.name=queries", "model.head.options.layers=4", "model.head.options.heads=2"]
    )
    assert config.model.head.options == (("layers", 4), ("heads", 2))
    again = load_config("tiny", ["model.head.options.layers=4", "model.head.options.layers=1"])
    assert again.model.head.options == (("layers", 1),)


def test_an_error_of_an_override_is_not_laid_to_the_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from chatpose_jax.train.run_config import run_config\ndef get_config():\n    c = run_config('tiny')\n    c.train.steps = 0\n    return c\n"
    )
    path = str(tmp_path / "mine.py")
    with pytest.raises(UserError, match=r"mine\.py: train\.steps must be"):
        load_config(path)
    with pytest.raises(UserError, match=r"^train\.batch_size must be"):
        load_config(path, ["train.steps=3", "train.batch_size=0"])
    assert load_config(path, ["train.steps=3"]).train.steps == 3


@pytest.mark.slow
def test_train_from_a_model_folder_with_lora(folder, tmp_path, capsys):
    settings = ["train.steps=2", "train.eval_every=0", "data.sources.synthetic.train_size=24", "train.batch_size=8"]
    rows = "train.trainable=[['.*/lora_[ab]',1,0],['pose_head/.*',1,0],['.*',None,0]]"
    (tmp_path / "lora.py").write_text(
        "from chatpose_jax.train.run_config import run_config\n"
        "def get_config():\n    c = run_config('tiny')\n    c.train.accumulate = 1\n    c.train.max_length = 320\n    return c\n"
    )
    overrides = [word for setting in (*settings, rows) for word in ("--set", setting)]
    command = [
        "train",
        "--config",
        str(tmp_path / "lora.py"),
        "--init",
        str(folder),
        "--out",
        str(tmp_path / "run"),
        *overrides,
    ]
    assert main(command) == 0
    assert "new: decoder/layers/attn/q_proj/lora_a" in lines(capsys)[0]
    assert (
        main(["chat", str(tmp_path / "run/model"), "--prompt", "Kneel.", "--force-pose", "--max-new-tokens", "12"]) == 0
    )
    assert main(command) == 0, "a finished run can be run again"
