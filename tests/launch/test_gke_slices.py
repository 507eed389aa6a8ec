"""launch/gke_slices.sh under a stand-in for kubectl: how many slices it starts, and when it changes their number."""

import os
import subprocess
from pathlib import Path

import pytest

from chatpose_jax.train.run_config import load_config

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

KUBECTL = r"""#!/usr/bin/env bash
cd "$CLOUD"
case "$*" in
  "get nodes "*)
    [[ $* == *"-l cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice,cloud.google.com/gke-tpu-topology=8x8 "* ]] || exit 9
    look=$(head -1 looks); [[ $(wc -l < looks) == 1 ]] || sed -i 1d looks
    case $look in
      broken) exit 1 ;;
      done) echo Completed > state; look=0 ;;
      failed) echo Failed > state; look=0 ;;
    esac
    for ((pool = 0; pool < look; pool++)); do for node in {1..16}; do echo "pool-$pool True"; done; done
    for node in {1..15}; do echo "pool-broken True"; done; echo "pool-broken False" ;;
  *terminalState*) cat state 2>/dev/null || true ;;
  *replicas*) cat replicas 2>/dev/null || true ;;
  "delete jobset chatpose "*) rm replicas; echo delete >> steps ;;
  "apply -f -") sed -n 's/^ *replicas: *\([0-9]*\).*/\1/p' | tee replicas >> steps ;;
  *) exit 8 ;;
esac
"""
"""A cluster whose numbers of complete slices are the lines of ``looks``, one for each look; one more slice lacks a node."""


@pytest.mark.parametrize(
    ("looks", "slices", "patience", "status", "steps"),
    [
        ("2 2 done", 2, 0, 0, "2"),
        ("0 0 1 1 done", 2, 0, 0, "1"),
        ("2 1 1 done", 2, 0, 0, "2 delete 1"),  # a slice is lost
        ("1 1 2 done", 2, 0, 0, "1 delete 2"),  # and comes back
        ("2 1 2 1 2 done", 2, 100, 0, "2"),  # it was away for a moment
        ("4 3 3 done", 4, 0, 0, "4 delete 2"),  # three do not divide the rows
        ("5 5 done", 4, 0, 0, "4"),
        ("2 0 0 done", 2, 0, 0, "2"),  # none is left: the JobSet waits
        ("broken 2 broken done", 2, 0, 0, "2"),
        ("2 2 failed", 2, 0, 1, "2"),
    ],
)
def test_a_run_goes_on_with_the_slices_that_are_there(tmp_path, looks, slices, patience, status, steps):
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    (tmp_path / "looks").write_text(looks.replace(" ", "\n") + "\n")
    settings = {"CLOUD": tmp_path, "SLICES": slices, "PATIENCE": patience, "PAUSE": 0}
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **{k: str(v) for k, v in settings.items()}}
    command = ["bash", LAUNCH / "gke_slices.sh", LAUNCH / "jobset_tpu.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "steps").read_text().split() == steps.split()


def test_xpk_asks_for_several_slices(tmp_path):
    program = tmp_path / "xpk"
    program.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    program.chmod(0o755)
    settings = {"CLUSTER": "mine", "IMAGE": "chatpose:tpu", "BUCKET": "gs://mine", "SLICES": "2"}
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    subprocess.run(["bash", LAUNCH / "xpk.sh", "--config", "tiny"], env=environment, check=True)
    assert "--num-slices=2" in (tmp_path / "arguments").read_text().splitlines()


@pytest.mark.parametrize(("slices", "asked"), [(1, []), (2, ["train.batch_size=64"]), (2, ["train.mesh.tensor=4"])])
def test_the_manifest_says_how_rows_divide_among_slices(slices, asked):
    """Its own settings, and those that its comment names for two slices."""
    yaml = pytest.importorskip("yaml")
    text = (LAUNCH / "jobset_tpu.yaml").read_text()
    assert all(setting in text for setting in asked)
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    words = job["containers"][0]["args"]
    settings = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    train = load_config("chatpose_13b", settings + asked).train
    assert train.mesh.slices == -1 and (train.mesh.data, train.mesh.fsdp) == (1, -1)
    assert train.batch_size % (slices * 64 // train.mesh.tensor) == 0
