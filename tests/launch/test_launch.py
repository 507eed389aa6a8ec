"""Launchers, as far as they can be tried without a cloud: their syntax, their fields, and the scripts under stand-ins."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatpose_jax.cli import train
from chatpose_jax.train.hosts import Hosts, find_processes
from chatpose_jax.train.run_config import load_config

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("jobset_*.yaml"))

TEXT, NUMBER = str, int
NAMES = {"*": TEXT}
POD = {
    "restartPolicy": TEXT, "terminationGracePeriodSeconds?": NUMBER, "nodeSelector": NAMES,
    "containers": [{
        "name": TEXT, "image": TEXT, "args": [TEXT],
        "env?": [{"name": TEXT, "value?": TEXT, "valueFrom?": {"fieldRef": {"fieldPath": TEXT}}}],
        "ports?": [{"containerPort": NUMBER}],
        "resources": {"limits": {"*": NUMBER}},
        "volumeMounts?": [{"name": TEXT, "mountPath": TEXT}],
    }],
    "volumes?": [{"name": TEXT, "emptyDir": {"medium": TEXT}}],
}  # fmt: skip
EXITS = {"rules": [{"action": TEXT, "onExitCodes": {"operator": TEXT, "values": [NUMBER]}}]}
JOB = {
    "parallelism": NUMBER, "completions": NUMBER, "backoffLimit": NUMBER, "podFailurePolicy": EXITS,
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": TEXT, "kind": TEXT, "metadata": {"name": TEXT, "annotations?": NAMES},
    "spec": {
        "network?": {"enableDNSHostnames": bool}, "failurePolicy": {
            "maxRestarts": NUMBER, "rules": [{"action": TEXT, "onJobFailureReasons": [TEXT]}],
        },
        "replicatedJobs": [{"name": TEXT, "replicas": NUMBER, "template": {"spec": JOB}}],
    },
}  # fmt: skip
"""The fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 that the manifests use, with their types; ? is optional."""


def check(value, schema, where="manifest"):
    """Raises AssertionError for a field that is missing, unknown or of another type."""
    if isinstance(schema, list):
        assert isinstance(value, list) and value, f"{where}: expected a list"
        for index, item in enumerate(value):
            check(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), f"{where}: expected fields"
        fields = {name.rstrip("?"): kind for name, kind in schema.items()}
        for name, item in value.items():
            assert name in fields or "*" in fields, f"{where}: unknown field {name}"
            check(item, fields.get(name, fields.get("*")), f"{where}.{name}")
        missing = [name for name in schema if name != "*" and not name.endswith("?") and name not in value]
        assert not missing, f"{where}: no {missing[0]}"
    else:
        assert type(value) is schema, f"{where}: expected {schema.__name__}, found {value!r}"


def read(path):
    return yaml.safe_load(path.read_text())


def pod(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    assert os.access(script, os.X_OK)
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_hold_what_kubernetes_knows(path):
    manifest = read(path)
    check(manifest, JOBSET)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, spec = pod(manifest)
    assert job["parallelism"] == job["completions"] > 1
    assert job["backoffLimit"] == 0, "JobSet restarts all pods together, or none"
    mounts = {mount["name"] for mount in spec["containers"][0].get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in spec.get("volumes", [])}
    command, *arguments = spec["containers"][0]["args"]
    assert command == "train"
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    assert [str(path).rpartition("/")[0] for path in (parsed.init, parsed.out)] == ["gs://BUCKET"] * 2
    limits = spec["containers"][0]["resources"]["limits"]
    devices = job["completions"] * next(n for name, n in limits.items() if name in ("google.com/tpu", "nvidia.com/gpu"))
    assert load_config(parsed.config, parsed.overrides).train.batch_size % (devices // tensor_of(parsed)) == 0


def tensor_of(parsed):
    """Devices along the mesh's third axis; the default leaves the rest to fsdp, which splits rows."""
    mesh = load_config(parsed.config, parsed.overrides).train.mesh
    assert (mesh.data, mesh.fsdp) == (1, -1)
    return mesh.tensor


@pytest.mark.parametrize("name", ["tpu_vm.sh", "xpk.sh"])
def test_examples_of_scripts_fit_64_chips(name):
    """Their default slice: what stands in the comment must start."""
    text = re.sub(r"\\\n#", "", (LAUNCH / name).read_text())
    assert "v5litepod-64" in text
    (line,) = [line for line in text.splitlines() if line.startswith("#") and "--config" in line and "--init" in line]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    parsed = parser.parse_args(line[line.index("--config") :].split("#")[0].split())
    assert load_config(parsed.config, parsed.overrides).train.batch_size % (64 // tensor_of(parsed)) == 0


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.suffix == ".sh"], ids=lambda s: s.name)
def test_scripts_without_arguments_say_how(script):
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and f"launch/{script.name}" in done.stdout


def test_a_broken_manifest_is_noticed():
    manifest = read(LAUNCH / "jobset_tpu.yaml")
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    with pytest.raises(AssertionError, match="unknown field backofLimit"):
        check(manifest, JOBSET)


def test_a_tpu_slice_has_as_many_hosts_as_pods():
    job, spec = pod(read(LAUNCH / "jobset_tpu.yaml"))
    chips = math.prod(map(int, spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelism"] * spec["containers"][0]["resources"]["limits"]["google.com/tpu"]


def test_gpu_pods_find_each_other(tmp_path):
    manifest = read(LAUNCH / "jobset_gpu.yaml")
    job, spec = pod(manifest)
    known = {
        "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": manifest["metadata"]["name"],
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": "2",
    }
    environment: dict[str, str] = {}
    for variable in spec["containers"][0]["env"]:
        value = variable.get("value") or known[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        environment[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], value)
    assert find_processes(environ=environment, dev=tmp_path) == Hosts("chatpose-workers-0-0.chatpose:8476", 4, 2)
    assert environment["JAX_NUM_PROCESSES"] == str(job["parallelism"])


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a program of a name on PATH; each call of it is a line of ``calls``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, body="exit 0"):
        file = folder / name
        file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n{body}\n')
        file.chmod(0o755)

    return make


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("status", "queued"), [(0, False), (2, False), (1, True), (75, True), (134, True), (137, True), (143, True)]
)
def test_slurm_queues_again_what_can_go_on(tmp_path, stand_in, monkeypatch, status, queued):
    stand_in("srun", f"exit {status}")
    stand_in("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    done = subprocess.run(["bash", LAUNCH / "slurm.sh", "--out", "a b"], capture_output=True, text=True)
    assert done.returncode == status
    assert calls(tmp_path) == ["srun --kill-on-bad-exit=1 chatpose train --out a b"] + queued * [
        "scontrol requeue 4711"
    ]


@pytest.mark.parametrize(("bucket", "folder"), [("gs://mine", "gs://mine/compiled"), ("", "none")])
def test_a_new_tpu_slice_finds_what_the_last_one_compiled(tmp_path, stand_in, monkeypatch, bucket, folder):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("BUCKET", bucket)
    body = "for word; do [[ $word != --command=* ]] || command=${word#--command=}; done"
    stand_in("gcloud", f'{body}\ncd {tmp_path}; exec bash -c "$command"')
    program = tmp_path / "env" / "bin" / "chatpose"
    program.parent.mkdir(parents=True)
    program.write_text(
        f'#!/usr/bin/env bash\necho "${{JAX_COMPILATION_CACHE_DIR-none}} $*" > {tmp_path}/cache\nexit 75\n'
    )
    program.chmod(0o755)
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "run", "--out", "a b"])
    assert (done.returncode, (tmp_path / "cache").read_text()) == (75, f"{folder} train --out a b\n")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_new_pods_find_what_the_last_ones_compiled(path):
    container = pod(read(path))[1]["containers"][0]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "gs://BUCKET/compiled"


@pytest.mark.parametrize(
    ("statuses", "starts"),
    [((0,), 1), ((1, 75, 0), 3), ((143,), 1), ((2,), 1), ((127,), 1), ((1, 1, 1, 1), 3)],
    ids=str,
)
def test_one_machine_starts_again_after_a_crash(tmp_path, stand_in, monkeypatch, statuses, starts):
    stand_in(
        "chatpose", f'statuses=({" ".join(map(str, statuses))})\nexit "${{statuses[$(wc -l < {tmp_path}/calls) - 1]}}"'
    )
    monkeypatch.setenv("PAUSE", "0")
    monkeypatch.setenv("TRIES", "3")
    done = subprocess.run(["bash", LAUNCH / "one_machine.sh", "--out", "run"], capture_output=True, text=True)
    assert done.returncode == statuses[starts - 1]
    assert calls(tmp_path) == ["chatpose train --out run"] * starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_machine_hands_a_signal_on(tmp_path, stand_in, number):
    """Once, also a Ctrl-C, which a terminal sends to the whole group: a second signal would end the run before it has saved."""
    body = f"""
    trap 'echo got >> {tmp_path}/calls; stop=1' TERM INT
    touch {tmp_path}/up
    for i in {{1..400}}; do sleep 0.05; [[ ${{stop:-}} ]] && break; done
    sleep 0.3; exit 143"""
    stand_in("chatpose", body)
    script = subprocess.Popen(
        ["bash", LAUNCH / "one_machine.sh", "--out", "run"],
        start_new_session=True,
        # A job in the background inherits that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(200):
        if (tmp_path / "up").exists():
            break
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(script.pid, number)
    else:
        script.terminate()
    assert script.wait(timeout=30) == 143
    assert calls(tmp_path) == ["chatpose train --out run", "got"]


GCLOUD = r"""
case "$*" in
  *" describe "*) step=describe ;;
  *" create "*) step=create ;;
  *" delete "*) step=delete ;;
  *" scp "*) step=scp ;;
  *" --command="*"chatpose train"*) step=run ;;
  *" --command="*) step=ssh ;;
esac
cd "$CLOUD"
if [[ $step == describe ]]; then
  [[ -e state ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
  grep -q "^describe" events && { sed -i "0,/^describe/{/^describe/d}" events; echo "no network" >&2; exit 1; }
  cat state; exit
fi
echo $step >> steps
next=$(sed -n "/^$step /{s/^$step //p;q}" events)    # the first that is left for this step
sed -i "0,/^$step /{/^$step /d}" events
case $step:${next:-0} in
  create:0) [[ ! -e state ]] && echo ACTIVE > state; exit ;;
  delete:0) rm state; exit ;;
  run:preempted) echo SUSPENDED > state; exit 255 ;;
esac
exit "${next:-0}"
"""
"""Google's side of tpu_vm.sh: one slice, whose steps succeed but for the ``events``: STEP STATUS, or ``run preempted``."""

INSTALL, RUN = ["scp", "ssh"], ["run"]
ONCE = [*INSTALL, *RUN]


@pytest.mark.parametrize(
    ("state", "events", "status", "steps"),
    [
        ("", "", 0, ["create", *ONCE]),
        ("ACTIVE", "", 0, ONCE),
        ("SUSPENDED", "", 0, ["delete", "create", *ONCE]),
        ("", "run preempted", 0, ["create", *ONCE, "delete", "create", *ONCE]),
        ("ACTIVE", "run 75, run 143", 0, ONCE * 3),
        ("ACTIVE", "run 2", 2, ONCE),
        ("", "create 1, scp 1", 0, ["create", "create", "scp", *ONCE]),
        ("ACTIVE", "ssh 255", 0, [*INSTALL, *ONCE]),
        ("ACTIVE", "scp 2", 0, ["scp", *ONCE]),
        ("SUSPENDED", "delete 1", 0, ["delete", "delete", "create", *ONCE]),
        ("", "create 1, create 1, create 1", 1, ["create"] * 3),
        ("FAILED", "create 1, scp 1", 1, ["delete", "create", "create", "scp"]),
        ("ACTIVE", "run 1, run 1, run 1", 1, ONCE * 3),
        ("SUSPENDED", "delete 1, delete 1, delete 1", 1, ["delete"] * 3),
        ("ACTIVE", "describe 1, describe 1, describe 1, describe 1", 0, ONCE),
    ],
)
def test_tpu_vm_keeps_a_run_going(tmp_path, stand_in, monkeypatch, state, events, status, steps):
    """Whatever fails is tried again until the third failure; nothing runs where the installation has not ended."""
    stand_in("gcloud", GCLOUD)
    stand_in("git")
    (tmp_path / "events").write_text("".join(f"{event}\n" for event in events.split(", ")))
    if state:
        (tmp_path / "state").write_text(state)
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setenv("PAUSE", "0")
    monkeypatch.setenv("TRIES", "3")
    command = ["bash", LAUNCH / "tpu_vm.sh", "keep", "--out", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, (tmp_path / "steps").read_text().split()) == (status, steps), done.stderr
    assert all(r"chatpose train --out a\ b" in line for line in calls(tmp_path) if "chatpose train" in line)


def test_tpu_vm_forgives_failures_once_a_run_has_lasted(tmp_path, stand_in, monkeypatch):
    stand_in("gcloud", GCLOUD)
    stand_in("git")
    (tmp_path / "events").write_text("run 1\n" * 5)
    (tmp_path / "state").write_text("ACTIVE")
    for name, value in (("CLOUD", str(tmp_path)), ("PAUSE", "0"), ("TRIES", "3"), ("LASTING", "0")):
        monkeypatch.setenv(name, value)
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "keep", "--out", "run"], timeout=60)
    assert (done.returncode, (tmp_path / "steps").read_text().split()) == (0, ONCE * 6)


def test_tpu_vm_waits_for_a_slice_that_is_asked_for(tmp_path, stand_in, monkeypatch):
    """Also after `keep` was started anew: a second request would lose the place in the queue."""
    count = f'$(grep -c " describe " {tmp_path}/calls)'
    stand_in(
        "gcloud", f'[[ $* != *" describe "* ]] || {{ (({count} > 3)) && echo ACTIVE || echo WAITING_FOR_RESOURCES; }}'
    )
    stand_in("git")
    monkeypatch.setenv("PAUSE", "0")
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "keep", "--out", "run"], timeout=60)
    assert done.returncode == 0
    words = [line.split()[4] for line in calls(tmp_path) if line.startswith("gcloud")]
    assert words == ["describe"] * 4 + ["scp", "ssh", "ssh"]


def test_xpk_gets_the_command_in_one_piece(tmp_path, stand_in, monkeypatch):
    stand_in("xpk", f'printf "%s\\n" "$@" > {tmp_path}/arguments')
    monkeypatch.setenv("CLUSTER", "mine")
    monkeypatch.setenv("IMAGE", "registry/chatpose:tpu")
    monkeypatch.setenv("BUCKET", "gs://mine")
    words = ["--config", "chatpose_13b", "--out", "gs://mine/a b", "--set", "data.sources='mine:rows'"]
    subprocess.run(["bash", LAUNCH / "xpk.sh", *words], check=True)
    *options, command = (tmp_path / "arguments").read_text().splitlines()
    assert options == [
        "workload", "create", "--cluster=mine", "--workload=chatpose", "--docker-image=registry/chatpose:tpu",
        "--tpu-type=v5litepod-64", "--num-slices=1", "--max-restarts=100",
        "--restart-on-user-code-failure",
    ]  # fmt: skip
    compiled = "JAX_COMPILATION_CACHE_DIR=gs://mine/compiled"
    assert shlex.split(command.removeprefix("--command=")) == ["exec", "env", compiled, "chatpose", "train", *words]
    monkeypatch.delenv("IMAGE")
    done = subprocess.run(["bash", LAUNCH / "xpk.sh", *words], capture_output=True, text=True)
    assert done.returncode != 0 and "IMAGE: made by launch/Dockerfile" in done.stderr


SRUN = """
shift
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_NTASKS=2
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "${status:-0}"
"""


@pytest.mark.slow
def test_two_processes_train_under_slurm(tmp_path, stand_in, monkeypatch):
    stand_in("srun", SRUN)
    stand_in("chatpose", f'exec "{sys.executable}" -m chatpose_jax.cli "$@"')
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    settings = ("steps=2", "batch_size=4", "eval_every=0", "mesh.data=2", "optimizer='adamw'")
    command = [
        "bash",
        LAUNCH / "slurm.sh",
        "--config",
        "tiny",
        "--out",
        tmp_path / "run",
        "--set",
        "data.sources.synthetic.train_size=16",
    ]
    command += [word for setting in settings for word in ("--set", f"train.{setting}")]
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert done.stdout.count("parameters train") == 1, "two runs of one process, not one of two"
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert list((tmp_path / "compiled").glob("jit_step-*")), "the step was not kept for the next start"
