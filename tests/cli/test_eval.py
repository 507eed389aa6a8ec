"""``chatpose eval``, and the free path from motion capture to its report as docs/prepared-data.md types it."""

import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.data.datasets import DATA_SETS
from chatpose_jax.evaluation.suite import ANY_ROWS, SUITE
from chatpose_jax.evaluation.task import TASKS
from chatpose_jax.models.chatpose import init_params
from chatpose_jax.models.config import preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.weights.save import save_folder

from ..evaluation.given_systems import Drawn
from ..motion_files import write_acclaim

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.evaluation.given_systems"
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
    assert [words[0] for words in commands] == ["data", "train", "eval", "chat"]
    monkeypatch.chdir(tmp_path)
    clips(tmp_path / "clips")
    few = {
        "train": ["--set", "train.steps=2", "--set", "train.eval_every=2", "--set", "data.buckets=1"],
        "eval": ["--subset", "5"],
    }
    for words in commands:
        assert main([*words, *few.get(words[0], [])]) == 0, words
    found = json.loads((tmp_path / "out/cmu/report/poses/cmu-5/cmu/scores.json").read_text())
    [scores] = found["scores"]
    assert scores["table"] == "poses/cmu-5/text" and scores["facts"]["samples"] == "5"
    assert scores["values"]["PA-MPJPE"]["value"] > 10
    assert scores_of("out/cmu/report", "cmu-5", "mean_pose")["scores"][0]["values"]["PA-MPJPE"]["value"] > 1
    assert "Poses of cmu-5, text rows" in capsys.readouterr().out


def scores_of(out, data, system, task="poses"):
    return json.loads((Path(out) / task / data / system / "scores.json").read_text())


def test_systems_stand_side_by_side_on_a_saved_subset(tmp_path, monkeypatch, capsys):
    """The subset that one run saved is the list that another takes; the command in the scores makes the same scores."""
    monkeypatch.chdir(tmp_path)
    save_folder("model", CONFIG, init_params(CONFIG, jax.random.key(0)), processor=tiny_processor(CONFIG))
    drawn = ["--system", f"{HERE}:Drawn,silent=true"]
    words = ["--data", f"{HERE}:rows", "--quiet", "--drawings", "0", "--subset", "6", "--out"]
    assert main(["eval", "poses", "model", *drawn, *words, "out"]) == 0
    ids = Path("out/poses/rows-6/subset.txt").read_text().splitlines()
    answers = Path(f"out/poses/rows-6/{tmp_path.name}/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in answers] == ids and len(ids) == 6
    found = scores_of("out", "rows-6", tmp_path.name)
    command = shlex.split(found["command"])
    assert command == ["chatpose", "eval", "poses", "model", *words[:2], "--subset", "6", "--out", "OUT"]
    assert main([*command[1:-1], "again", "--drawings", "0"]) == 0
    assert scores_of("again", "rows-6", tmp_path.name) == found
    assert "Poses of rows-6, text rows" in capsys.readouterr().out
    words[6] = "out/poses/rows-6/subset.txt"
    assert main(["eval", "poses", *drawn, *words, "third"]) == 0
    one, other = scores_of("out", "rows-6", "drawn"), scores_of("third", "rows-subset", "drawn")
    assert one["scores"][0]["values"] == other["scores"][0]["values"]
    assert one["command"].startswith(f"chatpose eval poses --system {HERE}:Drawn,silent=true --data")


def test_what_cannot_be_scored_is_printed(tmp_path, capsys):
    words = ["eval", "poses", "--system", f"{HERE}:Drawn,silent=true", "--data", f"{HERE}:rows", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "samples: 24 of 30; interval: 95 % bootstrap over 7 groups" in said
    assert "drawn: 6 × keypoints not parsed" in said and "no pose and no positions" not in said
    line = next(line for line in said.splitlines() if line.startswith("drawn "))
    assert re.search(r"drawn +\d+\.\d \[\d+\.\d, \d+\.\d\] mm", line)


def test_predictions_of_other_rows_or_few_rows_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "poses", "--system", "predictions,path=p.npz", "--data", f"{HERE}:rows,count=3", "--out", "out"]
    np.savez("p.npz", axis_angle=np.zeros((2, 24, 3)), key=["a0", "a1"])
    assert main(words) == 2
    assert "none of the 2 keys, such as 'a0', fits a row" in capsys.readouterr().err
    np.savez("p.npz", axis_angle=np.zeros((1, 24, 3)), key=["test-0-0-text"])
    assert main(words) == 0
    told = capsys.readouterr()
    assert "warning: p: 2 of the 3 rows of rows have no prediction" in told.err and "p: 2 × no prediction" in told.out


def test_all_splits_stand_in_one_table(tmp_path):
    words = [
        "eval",
        "poses",
        "--system",
        "mean,rows=20",
        "--data",
        "synthetic,kind=text,train_size=20,val_size=4,test_size=3",
    ]
    assert main([*words, "--split", "all", "--quiet", "--out", str(tmp_path)]) == 0
    found = scores_of(tmp_path, "synthetic-all", "mean pose".replace(" ", "_"))
    assert found["scores"][0]["facts"]["samples"] == "27" and "--split all" in found["command"]


def test_a_task_of_ones_own_may_refuse_a_system(tmp_path, capsys):
    words = ["eval", f"{HERE}:Picky", "--data", f"{HERE}:rows", "--quiet", "--out", str(tmp_path), "--system"]
    before = Drawn.asked
    assert main([*words, f"{HERE}:Drawn,silent=true"]) == 2
    assert "error: system 'drawn' is not judged here" in capsys.readouterr().err
    assert Drawn.asked == before and not list(tmp_path.rglob("*.jsonl")), "refused before it is asked"
    assert main([*words, f"{HERE}:Drawn"]) == 0
    found = scores_of(tmp_path, "rows", "drawn", f"{HERE}_Picky")
    assert found["command"].startswith(f"chatpose eval {HERE}:Picky --system")


def test_all_says_what_was_not_run_and_how_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "all", "--system", f"{HERE}:Drawn", "--data", f"{HERE}:rows", "--out", "out"]
    assert main([*words, "--set", "estimation.protocols=C"]) == 0
    said = capsys.readouterr().out
    assert "Poses of rows, text rows" in said
    for row in SUITE:
        for data in row.data:
            assert f"not run: {row.task}, {data}: " in said
    assert not np.isnan(scores_of("out", "rows", "drawn")["scores"][0]["values"]["MPJPE"]["value"])
    assert main(["eval", "all", "--system", f"{HERE}:Drawn", "--out", "none"]) == 1
    assert "not run: rpe, rpe_refined: " in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows, system = ["--data", f"{HERE}:rows"], ["--system", f"{HERE}:Drawn"]
    Path("afile").touch()
    for words, error in (
        (["poses", *rows], "expected a MODEL folder, or --system SPEC: chatpose, "),
        (["poses", "nowhere", *rows], "nowhere"),
        (["poses", *system], "--data SPEC is needed"),
        (["poses", *system, *rows, "--out", "afile/under"], "--out afile/under: afile is a file; choose a folder"),
        (["poses", *system, "--data", "cmu"], "chatpose data prepare cmu"),
        (["poses", *system, "--data", f"{HERE}:rows,blind=true,name=blind"], "none of the 30 text rows of blind has a measured joint"),
        (["poses", *system, *rows, "--split", "val"], "none of the 0 rows of rows-val has a pose"),
        (["poses", *system, *rows, "--subset", "0"], "--subset must be a whole number of at least 1"),
        (["poses", *system, *rows, "--subset", "ids.txt"], "--subset ids.txt: expected a number, or a file"),
        (["poses", *system, *rows, "--part", "3/2"], "--part 3/2: expected I/N"),
        (["poses", *system, *rows, "--set", "protocol=C"], "task 'poses' has no option 'protocol'"),
        (["poses", *system, *system, *rows], f"two systems are called '{HERE}:Drawn': set name="),
        (["poses", *system, "--system", f"{HERE}:Drawn,again=true", *rows], "two systems are called 'drawn': set name="),
        (["poses", *system, *rows, *rows], "two data sets of poses are called 'rows': set name="),
        (["pose", *system, *rows], "did you mean poses"),
        (["all", *system, "--set", "protocols=C"], "expected TASK.OPTION=VALUE, with a TASK of estimation"),
        (["poses", *system, *rows, "--part", "1/2", "--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "0"],
         "--part is for separate processes"),
    ):  # fmt: skip
        assert main(["eval", "--quiet", "--out", "out", *words]) == 2, words
        said = capsys.readouterr().err
        assert error in said and len(said.strip().splitlines()) == 1, said
    assert main(["eval", "poses", "model"]) == 2
    assert "expected --out FOLDER" in capsys.readouterr().err
    assert main(["evaluate", "out/cmu", "--out", "out"]) == 2
    assert "chatpose eval poses MODEL --data SOURCE --out FOLDER" in capsys.readouterr().err


def test_every_table_of_the_suite_has_a_task_and_data_sets():
    for row in SUITE:
        assert row.task in TASKS and set(row.data) <= set(DATA_SETS)
    assert set(ANY_ROWS) <= set(TASKS) and set(TASKS) == {row.task for row in SUITE} | set(ANY_ROWS)
