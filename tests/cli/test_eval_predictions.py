"""``chatpose eval`` on files of other programs, from the original files of the data sets to the report."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.evaluation.systems.predictions import DAMAGED

from ..data.readers import humans4d_eval_files, rpe_files, threedpw_files


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(name, source):
    words = ["data", "prepare", name, "--source", source, "--out", f"data/{name}", "--workers", "1", "--quiet"]
    assert main(words) == 0


def evaluate(task, data, system):
    assert main(["eval", task, "--data", data, "--system", system, "--out", "out", "--quiet"]) == 0


def tables(place):
    return json.loads(Path("out", place, "scores.json").read_text())["scores"]


def test_spins_file_on_3dpws_test_split(capsys):
    arrays = humans4d_eval_files.write_3dpw(Path("source"))
    prepare("3dpw_test", "source")
    pose = arrays["body_pose"].copy()
    pose[4, 7] = np.inf
    np.savez("spin.npz", pose=pose, betas=arrays["betas"], camera=np.zeros((12, 3)), pred_joints=np.zeros((12, 17, 3)))
    np.savez("names.npz", imgname=arrays["imgname"], center=arrays["center"], scale=arrays["scale"] / 200)
    evaluate("estimation", "3dpw_test", "predictions,path=spin.npz,names=names.npz,name=SPIN")
    (scores,) = tables("estimation/3dpw_test/SPIN")
    assert scores["table"].endswith("/C") and scores["facts"]["samples"] == "11 of 12"
    for name in ("MPJPE", "PA-MPJPE", "MPJRE", "angle", "root angle"):
        assert scores["values"][name]["value"] < 0.05, "the predictions are the truth"
    assert scores["counts"][DAMAGED] == 1
    answers = [
        json.loads(line) for line in Path("out/estimation/3dpw_test/SPIN/answers.jsonl").read_text().splitlines()
    ]
    assert [answer["key"] for answer in answers if "pose" not in answer] == ["imageFiles/walk_00/image_00001.jpg#1"]
    page = Path("out/report.html").read_text()
    assert DAMAGED in page and "163.6" in page and page.count("data:image/png") == 6
    assert "names=names.npz" in page and str(Path.cwd()) not in page


def test_all_people_of_hmr2_on_rpe():
    entries = rpe_files.write_refined(Path("source"))
    prepare("rpe_refined", "source")
    true = {rpe_files.IMAGES[n % 2]: row["ground_truth"] for n, row in enumerate(entries["pose"])}
    people = [
        {
            "pose": np.array(truth["smpl_param"]["pose"]) + 0.5 * wrong,
            "bbox": np.array(truth["bbox"]) + 100 * wrong,
            "img_path": name,
        }
        for name, truth in true.items()
        for wrong in (1, 0)
    ]
    Path("hmr2.pkl").write_bytes(pickle.dumps(people))
    evaluate("rpe", "rpe_refined", "predictions,path=hmr2.pkl,name=HMR2")
    mean, *_ = tables("rpe/rpe_refined/HMR2")
    assert mean["facts"]["samples"] == "12" and mean["values"]["PA-MPJPE"]["value"] < 0.05
    report = Path("out/report.md").read_text()
    assert "| ChatPose, published" in report and "*275.0*" in report


def test_a_submission_to_3dpws_challenge():
    data = threedpw_files.write(Path("source"), threedpw_files.sequence())
    prepare("3dpw", "source")
    world = np.array(data["jointPositions"]).reshape(2, 4, 24, 3)
    camera = data["cam_poses"]
    seen = np.einsum("tij,ptkj->ptki", camera[:, :3, :3], world) + camera[None, :, None, :3, 3]
    Path("entry/test").mkdir(parents=True)
    Path("entry/test/street_00.pkl").write_bytes(pickle.dumps({"jointPositions": seen}))
    evaluate("estimation", "3dpw", "predictions,path=entry,name=mine")
    answers = [json.loads(line) for line in Path("out/estimation/3dpw/mine/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    for answer in answers:
        actor, frame = int(answer["key"][-1]), int(answer["key"][-7])
        np.testing.assert_allclose(answer["joints"]["smpl24"], seen[actor, frame], atol=1e-6)
    (scores,) = tables("estimation/3dpw/mine")
    assert scores["values"]["MPJPE"]["value"] > 0 and scores["values"]["MPJRE"]["value"] is None
