"""Kill a training run again and again, and see that nothing is lost.

    python bench/kill_and_resume.py --kills 50
    python bench/kill_and_resume.py --kills 10 --bucket gs      (or s3, or the address of a folder on a bucket of yours)

Two processes train the tiny preset on the CPU. They run once unbroken; then again, while SIGKILL strikes at random: both
processes, anywhere from the first import on; both in a step; both in the middle of a save; one alone. After every kill
all processes are started again with the same command. In the end each step's losses, of every one of the steps, and the
trained weights must be those of the unbroken run to the last bit; on the way, no step that was saved may get lost, and
whoever survives must stop by itself, soon, and say why. Exit status 1 on any difference.

With ``--bucket`` the run folders are on a bucket: that of an emulator which also refuses, drops and delays requests (the
packages of the extra "dev" that the tests use), or a real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chatpose_jax.orbax_s3 import COMMIT
from chatpose_jax.storage import Location, is_bucket, location, remove_tree
from chatpose_jax.train.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("any time", "in a step", "in a save", "one in a step", "one in a save")
SAVE_EVERY = 4
STEPS_PER_KILL = 2 * SAVE_EVERY
PATIENCE = 30.0
"""Seconds within which survivors must have stopped."""
LOST = 75
"""Exit status that asks for another start."""
MEASURED = ("samples_per_second", "tokens_per_second", "step_p50", "step_p90", "data_wait")
"""What depends on the clock."""
# `chatpose`, but its processes share compiled code: JAX lets process 0 alone write its cache, under a key that on the CPU
# names the process, so that any other would compile anew after every kill. Each step that is logged is also told in a file,
# because on a bucket the log appears with the checkpoints only.
START = """
import os, sys
from jax._src import cache_key
from chatpose_jax.cli.main import main
from chatpose_jax.train import log
cache_key._hash_accelerator_config = lambda digest, *ignored: digest.update(b"cpu")
write = log.Log.__call__
def tell(self, step, values, **options):
    write(self, step, values, **options)
    if log.hosts.primary():
        with open(os.environ["REACHED"] + ".new", "w") as file:
            file.write(str(step))
        os.replace(file.name, os.environ["REACHED"])
log.Log.__call__ = tell
sys.exit(main())
"""
SETTINGS = (
    "data.sources.synthetic.train_size=64", "data.sources.synthetic.tasks={'image': 1}", "data.buckets=1", "train.eval_every=0",
    "train.optimizer=adamw",  # cheap steps: most of the time goes into starting anyway
    "train.log_every=1000000",  # every step has its line in any case
    f"train.save_every={SAVE_EVERY}", "train.keep=2",
)  # fmt: skip


class Difference(Exception):
    """The run is not what it should be."""


class Lost(Exception):
    """Processes lost each other though nobody was killed, as they may on a crowded machine: they are started again."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of several processes in one folder.

    folder: output of the processes. out: the run folder.
    """

    folder: Path
    out: Location
    steps: int
    processes: int
    cache: Path

    def start(self, attempt: int) -> list[subprocess.Popen[bytes]]:
        """All processes, on a port that is free now; their output goes to files."""
        (self.folder / "reached").unlink(missing_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "REACHED": str(self.folder / "reached"),
        }
        settings = [*SETTINGS, f"train.steps={self.steps}"]
        settings += [f"train.batch_size={self.processes}", f"train.mesh.data={self.processes}"]
        command = [sys.executable, "-c", START, "train", "--config", "tiny", "--out", str(self.out)]
        command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(self.processes)]
        command += [word for setting in settings for word in ("--set", setting)]
        started = []
        for rank in range(self.processes):
            with self.output(attempt, rank).open("wb") as output:
                words = [*command, "--process-id", str(rank)]
                started.append(subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment))
        return started

    def output(self, attempt: int, rank: int) -> Path:
        return self.folder / f"{attempt:03d}-{rank}.txt"

    def reached(self) -> int:
        """The last step that the processes under way have logged; 0 before the first."""
        file = self.folder / "reached"
        return int(file.read_text()) if file.exists() else 0

    def losses(self) -> dict[int, dict[str, float]]:
        """Step -> all that the log tells of it and no clock had a hand in."""
        found: dict[int, dict[str, float]] = {}
        for values in read_metrics(self.out):
            step = values.pop("step")
            if step in found:
                raise Difference(f"the log in {self.out} holds step {step} twice")
            found[step] = {name: value for name, value in values.items() if name not in MEASURED}
        return found

    def checkpoints(self) -> dict[str, bool]:
        """Each folder of a checkpoint, and whether it is whole: renamed on a disk, with Orbax's last object on a bucket."""
        folders = (self.out / "checkpoints").glob("*")
        return {
            folder.name: (folder / COMMIT).exists() if is_bucket(folder) else folder.name.isdigit()
            for folder in folders
        }

    def newest(self) -> int:
        """The newest whole checkpoint; 0 without one."""
        return max((int(name) for name, whole in self.checkpoints().items() if whole), default=0)

    def saving(self) -> bool:
        return not all(self.checkpoints().values())


@contextmanager
def ending(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Whatever happens, none of them outlives the block."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[bytes]], patience: float = 300.0) -> bool:
    """Wait for a condition; False when a process ended before."""
    start = time.perf_counter()
    while not condition():
        if any(process.poll() is not None for process in processes):
            return False
        if time.perf_counter() - start > patience:
            raise Difference(f"nothing happened for {patience:.0f} s")
        time.sleep(0.002)
    return True


def unbroken(job: Job) -> float:
    """Run to the end; returns the seconds it took."""
    start = time.perf_counter()
    processes = job.start(0)
    with ending(processes):
        status = [process.wait() for process in processes]
    if any(status):
        tail = job.output(0, 0).read_text(errors="replace")[-2000:]
        raise Difference(f"the unbroken run ended with status {status}:\n{tail}")
    return time.perf_counter() - start


@dataclasses.dataclass
class Strike:
    """What one kill did."""

    kind: str
    began: int
    reached: int
    newest: int
    seconds: float
    survivor: float | None = None


def strike(job: Job, attempt: int, kind: str, draw: random.Random, startup: float) -> Strike | None:
    """Start the job, kill, and wait for the end of all. None when the job was complete before the kill."""
    start = time.perf_counter()
    began = job.newest()
    processes = job.start(attempt)
    survivor = None
    with ending(processes):
        if kind == "any time":
            moment = start + draw.uniform(0.2, 1.3 * startup)
            happened = until(lambda: time.perf_counter() > moment, processes)
        else:
            goal = began + (1 if kind.endswith("save") else draw.randint(1, SAVE_EVERY + 1))
            happened = until(lambda: job.reached() >= goal, processes)
            if happened and kind.endswith("save"):
                happened = until(job.saving, processes)
        if not happened:
            status = [process.wait() for process in processes]
            if not any(status):
                return None
            if LOST in status:
                raise Lost
            raise Difference(f"attempt {attempt} ended by itself with status {status}: see {job.output(attempt, 0)}")
        time.sleep(draw.uniform(0.0, 0.05))
        if kind.startswith("one"):
            survivor = kill_one(job, attempt, processes, draw)
    reached = max(job.reached(), began)
    return Strike(kind, began, reached, job.newest(), time.perf_counter() - start, survivor)


def kill_one(job: Job, attempt: int, processes: list[subprocess.Popen[bytes]], draw: random.Random) -> float:
    """Kill one process; the others must stop by themselves and say why. Returns the seconds that took."""
    victim = draw.randrange(len(processes))
    processes[victim].send_signal(signal.SIGKILL)
    struck = time.perf_counter()
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        try:
            status = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Difference(f"process {rank} still ran {PATIENCE:.0f} s after process {victim} was killed") from None
        said = job.output(attempt, rank).read_text(errors="replace")
        if status == 0 or not any(words in said for words in ("lost another one", "distributed service")):
            raise Difference(
                f"process {rank} ended with status {status} and no clear error: {job.output(attempt, rank)}"
            )
    return time.perf_counter() - struck


def check(job: Job, expected: dict[int, dict[str, float]], saved: int) -> None:
    """No saved step may be lost, and every step that stands must be the unbroken run's."""
    found = job.losses()
    if job.newest() < saved:
        raise Difference(f"the checkpoint of step {saved} is gone")
    if missing := [step for step in range(1, job.newest() + 1) if step not in found]:
        raise Difference(f"step {missing[0]} is saved, but no line tells of it")
    for step, values in found.items():
        if values != expected.get(step):
            names = [name for name in values if values[name] != expected.get(step, {}).get(name)]
            raise Difference(f"step {step} differs in {', '.join(names)}: {values} is not {expected.get(step)}")


def weights(job: Job) -> dict[str, str]:
    """Fingerprints of the trained model."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from chatpose_jax.models.chatpose import abstract_params
    from chatpose_jax.train.fingerprint import fingerprint
    from chatpose_jax.train.trainable import flatten
    from chatpose_jax.weights import folder

    model = job.out / "model"
    return fingerprint(flatten(folder.load_params(model, abstract_params(folder.load_model_config(model)))))


@contextmanager
def place(bucket: str, folder: Path, faults: int) -> Iterator[Location]:
    """Where the run folders are made: in ``folder``, or on a bucket."""
    if not bucket:
        yield folder
    elif "://" in bucket:
        root = location(bucket) / folder.name
        yield root
        remove_tree(root)
    else:
        sys.path.insert(0, str(ROOT))
        from tests.emulators import BUCKET, running_store

        with running_store(bucket) as emulator:
            os.environ.update(emulator.environment)
            emulator.fail(faults)
            yield location(f"{bucket}://{BUCKET}/kill-and-resume")
            emulator.fail(0)
            print(f"{emulator.failed} requests were refused, dropped or delayed: every {faults}th")


def run(arguments: argparse.Namespace, folder: Path, root: Location) -> None:
    """The whole experiment; raises Difference."""
    draw = random.Random(arguments.seed)
    steps = arguments.steps or arguments.kills * STEPS_PER_KILL + SAVE_EVERY
    jobs = []
    for name in ("unbroken", "killed"):
        (folder / name).mkdir(parents=True)
        jobs.append(Job(folder / name, root / name / "run", steps, arguments.processes, folder / "cache"))
    whole, broken = jobs
    print(f"unbroken: {steps} steps by {arguments.processes} processes ...", flush=True)
    seconds = unbroken(whole)
    expected = whole.losses()
    if sorted(expected) != list(range(1, steps + 1)):
        raise Difference(f"the unbroken run logged {len(expected)} of {steps} steps")
    print(f"          {seconds:.1f} s, last loss {expected[steps]['loss']!r}", flush=True)

    kinds = [KINDS[i % len(KINDS)] for i in range(arguments.kills)]
    draw.shuffle(kinds)
    strikes: list[Strike] = []
    startup = 8.0
    print(
        "kill   where            from step   reached   newest checkpoint   seconds   survivors stopped after",
        flush=True,
    )
    attempt = 0
    for number, kind in enumerate(kinds, 1):
        while True:
            attempt += 1
            try:
                done = strike(broken, attempt, kind, draw, startup)
                break
            except Lost:
                print(f"       attempt {attempt} lost a process by itself and is started again", flush=True)
                if attempt > number + 5:
                    raise Difference("processes lose each other without being killed") from None
        if done is None:
            raise Difference(f"the run was complete after {number - 1} kills: give it more --steps")
        check(broken, expected, done.began)
        strikes.append(done)
        if done.reached > done.began:
            startup = 0.5 * startup + 0.5 * done.seconds
        after = "" if done.survivor is None else f"{done.survivor:.1f} s"
        print(
            f"{number:4d}   {done.kind:14s} {done.began:11d} {done.reached:9d} {done.newest:19d} {done.seconds:9.1f}   {after}",
            flush=True,
        )
    print("the last attempt, undisturbed ...", flush=True)
    processes = broken.start(attempt + 1)
    with ending(processes):
        status = [process.wait() for process in processes]
    if any(status):
        raise Difference(f"the last attempt ended with status {status}: see {broken.output(attempt + 1, 0)}")
    check(broken, expected, steps)
    if weights(whole) != weights(broken):
        raise Difference("the losses are the same, the trained weights are not")
    report(strikes, steps, arguments, seconds)


def report(strikes: list[Strike], steps: int, arguments: argparse.Namespace, unbroken_seconds: float) -> None:
    """What happened, in words and, if asked for, as JSON."""
    counts = Counter(strike.kind for strike in strikes)
    repeated = sum(strike.reached - strike.newest for strike in strikes)
    survivors = [strike.survivor for strike in strikes if strike.survivor is not None]
    print(
        f"\n{len(strikes)} kills: {', '.join(f'{count} {kind}' for kind, count in counts.items())}\n"
        f"{steps} steps; {repeated} of them computed again after a kill; every loss and the weights equal to the last bit\n"
        f"{sum(strike.seconds for strike in strikes) / max(len(strikes), 1):.1f} s a kill (unbroken: {unbroken_seconds:.1f} s)"
    )
    if survivors:
        print(f"survivors stopped by themselves after at most {max(survivors):.1f} s")
    if arguments.json:
        data = {"steps": steps, "unbroken_seconds": unbroken_seconds, "kills": [dataclasses.asdict(s) for s in strikes]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help=f"of the run; {STEPS_PER_KILL} a kill by default")
    parser.add_argument(
        "--bucket", default="", help="gs or s3 for an emulator, or gs://BUCKET/FOLDER, s3://BUCKET/FOLDER"
    )
    parser.add_argument(
        "--faults", type=int, default=40, metavar="N", help="every N-th request to an emulator fails; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and kinds of kills")
    parser.add_argument("--folder", type=Path, help="keep everything here, output of all processes included")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    try:
        with place(arguments.bucket, folder, arguments.faults) as root:
            run(arguments, folder, root)
    except Difference as difference:
        print(f"FAILED: {difference}\nEverything is kept in {folder}.", file=sys.stderr)
        return 1
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
