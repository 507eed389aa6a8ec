"""Which pose head? Every head of the box on generated poses and on real motion, at one budget, several seeds each: the table of docs/heads.md.

    JAX_PLATFORMS=cpu python bench/heads.py --clips FOLDER [--out heads.jsonl]

A model of one decoder layer, 128 wide, learns to turn a description into a pose from nothing; only the head and its loss differ. All runs of a
set and seed have the same rows in the same order, steps, batch, optimiser and schedule; of ``RATES`` each head has the one that is better on
validation rows with the first seed. The words of the answers are not trained, so no head's loss competes with theirs.
Poses are read at the answer's pose token, given the true words before it.

FOLDER holds .bvh and .amc files. Clips are dealt into five parts; seed s tests part s, and trains on three others: a clip is trained on or tested,
never both. Each run is a line of --out; what stands there is not run again. ``--table`` prints the table of what there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pairs import paired

from chatpose_jax.data.collate import collate, encode_example
from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.mocap import Bvh
from chatpose_jax.data.record import Record
from chatpose_jax.data.synthetic.dataset import SyntheticDataset
from chatpose_jax.evaluation.poses import mean_pose
from chatpose_jax.models.chatpose import attend_evenly, bind, init_params
from chatpose_jax.models.config import HeadConfig, ModelConfig, preset
from chatpose_jax.processing.processor import tiny_processor
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.optimizer import optimizer
from chatpose_jax.train.pose_loss import PoseLoss
from chatpose_jax.train.trainable import EVERYTHING, Rule, merge, split
from smpl_jax import body as bodies
from smpl_jax import io, metrics
from smpl_jax.body import BodyModel
from smpl_jax.pose import SHARED


class Case(NamedTuple):
    """A head, its options, and the terms of the loss where it is not its own."""

    head: str
    options: tuple[tuple[str, Any], ...] = ()
    pose_loss: tuple[tuple[str, float], ...] = (("matrices", 1.0),)


def _mlp(rotation: str = "6d", loss: tuple[tuple[str, float], ...] = (("matrices", 1.0),)) -> Case:
    return Case("mlp", (("rotation", rotation), ("start", "upright")), loss)


BASE = "mlp, 6d"
CASES: dict[str, Case] = {
    BASE: _mlp(),
    "mlp, 6d, starts upside down": Case("mlp", (("start", "identity"),)),
    "mlp, svd9d": _mlp("svd9d"),
    "mlp, quaternion": _mlp("quaternion"),
    "mlp, axis-angle": _mlp("axis_angle"),
    "mlp, 6d, geodesic loss": _mlp(loss=(("geodesic", 1.0),)),
    "mlp, 6d, matrices and joints": _mlp(loss=(("matrices", 1.0), ("joints", 1.0))),
    "queries": Case("queries", (("hidden", 128), ("heads", 4))),
    "flow": Case("flow", (("hidden", 256),)),
    "gaussian": Case("gaussian"),
}
SETS = ("generated", "clips")
RATES = (2e-3, 5e-3)
MEASURES = {
    "pa_mpjpe": "PA-MPJPE, mm",
    "mpjpe": "MPJPE, mm",
    "mpjre": "MPJRE",
    "degrees": "joints, °",
    "root": "root, °",
}
MEAN_POSE = "mean pose"
SAMPLES = 8
BATCH, LENGTH = 16, 80
"""Rows of a batch, and their tokens; rows that are longer are left out (none of the generated set, an eighth of the clips')."""
STEPS, TRIAL = 400, 200
"""Updates of a run, and of those that choose a head's rate."""
ROWS = {"train": 8000, "val": 256, "test": 512}
"""Of the generated set; of clips, ten frames a second."""
T_975 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for 95 %, by degrees of freedom."""

Arrays = dict[str, Any]


class Rows(NamedTuple):
    """Rows of a split as whole arrays, and which clip each is of (each row its own of the generated set)."""

    batch: Arrays
    groups: np.ndarray


def model_config(case: Case) -> ModelConfig:
    tiny = preset("tiny")
    text = dataclasses.replace(tiny.text, num_layers=1)
    return dataclasses.replace(tiny, lora=None, text=text, head=HeadConfig(case.head, options=case.options))


def train_config(steps: int, rate: float) -> TrainConfig:
    frozen = tuple(Rule(path, None) for path in ("vision/.*", "projector/.*", "decoder/lm_head/.*"))
    return TrainConfig(
        steps=steps,
        optimizer="muon",
        learning_rate=rate,
        warmup_steps=steps // 15,
        b2=0.98,
        trainable=(*frozen, *EVERYTHING),
    )


@functools.cache
def rows(name: str, split: Any, fold: int, folder: str, limit: int) -> Rows:
    """Encoded once, for all heads. limit: rows at most, 0 for all."""
    processor = tiny_processor(preset("tiny"))
    examples: Sequence[Example]
    if name == "generated":
        examples = SyntheticDataset(split, limit or ROWS[split], 0, 64, {"text": 1.0})
        groups = np.arange(len(examples))
    else:
        reader = Bvh(Path(folder), rate=10, spacing=0, tasks={"detailed": 1}, fold=fold % 5)
        read = [
            (record.example(), number)
            for number, clip in enumerate(reader.parts(split))
            for record in reader.read(split, clip)
            if isinstance(record, Record)
        ]
        read = read[:: max(1, len(read) // limit)] if limit else read
        examples, groups = [example for example, _ in read], np.array([number for _, number in read])
    encoded = [encode_example(processor, example, 128) for example in examples]
    short = [i for i, row in enumerate(encoded) if len(row["input_ids"]) <= LENGTH]
    encoded, groups = [encoded[i] for i in short], groups[short]
    return Rows(collate(encoded, LENGTH, max_images=0, max_poses=1, pad_id=0), groups)


def pick(batch: Arrays, index: np.ndarray) -> Arrays:
    return jax.tree.map(lambda x: x[index], batch)


def batches(data: Rows, seed: int) -> Iterator[Arrays]:
    """Endless, in an order that the seed gives: the same for every head."""
    random, count = np.random.default_rng(seed), len(data.groups)
    while True:
        order = random.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            yield pick(data.batch, order[start : start + BATCH])


Update = Callable[[Any, Any, Arrays, jax.Array], tuple[Any, Any, jax.Array]]


def start(case: Case, settings: TrainConfig, seed: int) -> tuple[Update, Any, Any, Any]:
    """A step ``(trainable, moments, batch, key) -> (trainable, moments, loss)``, the first two at step 0, and what is frozen.

    It is the package's step but for the answers' words and their vocabulary, which are not trained here.
    """
    config = model_config(case)
    params = attend_evenly(init_params(config, jax.random.key(seed)))
    trainable, frozen = split(params, settings.trainable)
    tx, distance = optimizer(settings, params), PoseLoss(case.pose_loss)

    def objective(trainable: Any, batch: Arrays, key: jax.Array, frozen: Any) -> jax.Array:
        model = bind(config, merge(trainable, frozen))
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).hidden
        states = model.states(hidden, batch["pose_index"])
        return sum(model.pose_head.loss(states, batch["poses"], batch["pose_mask"], key, distance).values())

    @jax.jit
    def update(trainable: Any, moments: Any, batch: Arrays, key: jax.Array, frozen: Any) -> Any:
        value, slopes = jax.value_and_grad(objective)(trainable, batch, key, frozen)
        changes, moments = tx.update(slopes, moments, trainable)
        return optax.apply_updates(trainable, changes), moments, value

    return functools.partial(update, frozen=frozen), trainable, tx.init(trainable), frozen


def train(case: Case, data: Rows, *, steps: int, seed: int, rate: float) -> Any:
    """The parameters after ``steps``."""
    update, trainable, moments, frozen = start(case, train_config(steps, rate), seed)
    key = jax.random.key(seed)
    for step, batch in zip(range(steps), batches(data, seed)):
        trainable, moments, loss = update(trainable, moments, batch, jax.random.fold_in(key, step))
    if not np.isfinite(loss):
        raise SystemExit(f"{case}: the loss is {loss}")
    return merge(trainable, frozen)


@jax.jit
def _errors(predicted: jax.Array, target: jax.Array, body: BodyModel) -> dict[str, jax.Array]:
    a, b = (bodies.joints(body, rotations) for rotations in (predicted, target))
    angles = metrics.geodesic_degrees(predicted, target)
    return {
        "pa_mpjpe": metrics.pa_mpjpe(a, b),
        "mpjpe": metrics.mpjpe(a, b),
        "mpjre": metrics.mpjre(predicted, target, num_joints=SHARED - 1),
        "degrees": angles[:, 1:SHARED].mean(-1),
        "root": angles[:, 0],
    }


def errors(predicted: Any, target: Any) -> dict[str, np.ndarray]:
    """Of rotations (N, 24, 3, 3), by measure (N,); rotations over the 21 joints that captures measure, joints at β = 0."""
    found = jax.device_get(_errors(predicted, target, io.load_body().subset(np.zeros(0, int))))
    return {name: value.astype(np.float64) for name, value in found.items()}


def answer(case: Case, params: Any, data: Rows, seed: int) -> dict[str, Any]:
    """Errors of each row; of a head that draws also those of the best of ``SAMPLES`` draws, and the likelihood where it has one."""
    config = model_config(case)
    draws = bind(config, params).pose_head.draws

    @jax.jit
    def run(params: Any, batch: Arrays, key: jax.Array) -> Any:
        model = bind(config, params)
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).hidden
        states = model.states(hidden, batch["pose_index"])
        one, many = jax.random.split(key)
        out = {"pose": model.poses(states, one).rotations[:, 0]}
        if draws:
            out["samples"] = model.pose_head.sample(states, many, SAMPLES).rotations[:, :, 0]
        if hasattr(model.pose_head, "log_likelihood"):
            counts = batch["poses"].measured[:, 0]
            likely = model.pose_head.log_likelihood(states, batch["poses"])[:, 0]
            out["log_likelihood"] = jnp.where(counts, likely, 0).sum(-1) / counts.sum(-1)
        return out

    count, size = len(data.groups), 128
    parts = []
    for number, start in enumerate(range(0, count, size)):
        index = np.arange(start, start + size) % count  # the last batch is filled up, so that one program does
        parts.append(jax.device_get(run(params, pick(data.batch, index), jax.random.key(seed * 1000 + number))))
    whole = {name: np.concatenate([p[name] for p in parts], axis=1 if name == "samples" else 0) for name in parts[0]}
    target = np.asarray(data.batch["poses"].rotations)[:, 0]
    out: dict[str, Any] = dict(errors(whole["pose"][:count], target))
    if draws:
        each = [errors(sample, target) for sample in whole["samples"][:, :count]]
        out |= {f"best_{name}": np.min([e[name] for e in each], axis=0) for name in MEASURES}
    if "log_likelihood" in whole:
        out["log_likelihood"] = whole["log_likelihood"][:count]
    return out


def constants(data: Rows, test: Rows, seed: int) -> dict[str, Any]:
    """What an answer without reading gives: the mean training pose, and the best of ``SAMPLES`` training poses drawn at random."""
    poses, target = (np.asarray(part.batch["poses"].rotations)[:, 0] for part in (data, test))
    mean = mean_pose(data.batch["poses"][:, 0]).rotations
    out: dict[str, Any] = dict(errors(np.broadcast_to(mean, target.shape), target))
    random = np.random.default_rng(seed)
    each = [errors(poses[random.integers(len(poses), size=len(target))], target) for _ in range(SAMPLES)]
    return out | {f"best_{name}": np.min([e[name] for e in each], axis=0) for name in MEASURES}


class Log:
    """Runs that were done, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [run for run in self.runs if all(run.get(key) == value for key, value in wanted.items())]

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")


def choose_rates(args: argparse.Namespace, log: Log) -> None:
    """Short runs of every head at each of ``RATES``, on generated poses with the first seed."""
    data, val = (rows("generated", split, 0, "", args.rows) for split in ("train", "val"))
    for case in args.cases:
        for rate in RATES:
            if not log.find(stage="rate", case=case, rate=rate, steps=args.trial):
                params = train(CASES[case], data, steps=args.trial, seed=0, rate=rate)
                error = float(answer(CASES[case], params, val, 0)["pa_mpjpe"].mean())
                log.add({"stage": "rate", "case": case, "rate": rate, "steps": args.trial, "pa_mpjpe": error})
                print(f"rate {rate:.0e} {case:30} PA-MPJPE {error:6.1f} mm on validation rows", flush=True)


def best_rate(log: Log, case: str, steps: int) -> float:
    return float(min(log.find(stage="rate", case=case, steps=steps), key=lambda run: run["pa_mpjpe"])["rate"])


def study(args: argparse.Namespace, log: Log) -> None:
    """All runs that are not in the log yet, seed by seed."""
    for seed, name in itertools.product(range(args.seeds), args.sets):
        data, test = (
            rows(name, split, seed if name == "clips" else 0, args.clips, args.rows) for split in ("train", "test")
        )
        for case in (MEAN_POSE, *args.cases):
            key = {"stage": "run", "set": name, "case": case, "seed": seed, "steps": args.steps}
            if case != MEAN_POSE:
                key["rate"] = best_rate(log, case, args.trial)
            if log.find(**key):
                continue
            start = time.perf_counter()
            if case == MEAN_POSE:
                found = constants(data, test, seed)
            else:
                params = train(CASES[case], data, steps=args.steps, seed=seed, rate=key["rate"])
                found = answer(CASES[case], params, test, seed)
            values = {measure: np.round(value, 4).tolist() for measure, value in found.items()}
            log.add({**key, "rows": len(data.groups), "test": values, "groups": test.groups.tolist()})
            words = ", ".join(f"{title} {found[measure].mean():.1f}" for measure, title in MEASURES.items())
            print(f"{name:9} seed {seed} {case:28} {time.perf_counter() - start:4.0f} s: {words}", flush=True)


class Interval(NamedTuple):
    mean: float
    half: float

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}"


def interval(values: Sequence[np.ndarray], groups: Sequence[np.ndarray]) -> Interval:
    """Mean over seeds of the mean over rows, and half of its 95 % interval.

    Two sources of chance are added as squares: seeds, by Student's t over the seeds' means, and the choice of test rows, by a bootstrap of
    whole groups (a clip's frames are no independent rows). Where each seed tests other clips the first holds the second already.
    """
    means = [float(v.mean()) for v in values]
    seeds = T_975[len(means) - 1] * statistics.stdev(means) / len(means) ** 0.5 if len(means) > 2 else float("nan")
    if any(len(g) != len(groups[0]) or (g != groups[0]).any() for g in groups):
        return Interval(float(np.mean(means)), seeds)
    rows = np.mean(values, axis=0)
    totals, sizes = np.bincount(groups[0], rows), np.bincount(groups[0])
    drawn = np.random.default_rng(0).integers(len(sizes), size=(2000, len(sizes)))
    spread = np.std(totals[drawn].sum(1) / sizes[drawn].sum(1))
    return Interval(float(np.mean(means)), float(np.hypot(seeds, 1.96 * spread)))


def table(log: Log, args: argparse.Namespace) -> Iterator[str]:
    """Markdown, a table a set. Bold beats ``BASE``, italics lose to it; the rest is noise."""
    times = {case: ratio for run in log.find(stage="times") for case, ratio in run["ratios"].items()}
    for name in SETS:
        base = _runs(log, name, BASE, args)
        if not base:
            continue
        yield f"\n**{name}**, {len(base)} seeds\n"
        yield f"| head | rate | {' | '.join(MEASURES.values())} | PA-MPJPE, less {BASE}'s | best of {SAMPLES}, PA-MPJPE | time of a step |"
        yield "|---|---|" + "---|" * (len(MEASURES) + 3)
        for case in (*CASES, MEAN_POSE):
            runs = _runs(log, name, case, args)
            if [run["seed"] for run in runs] != [run["seed"] for run in base]:
                continue
            cells = []
            for measure in MEASURES:
                apart = _interval(runs, measure, base)
                mark = "" if case == BASE or not apart.sure else "**" if apart.mean < 0 else "*"
                cells.append(f"{mark}{_interval(runs, measure)}{mark}")
            apart = _interval(runs, "pa_mpjpe", base)
            cells.append("" if case == BASE else f"{apart.mean:+.1f} ± {apart.half:.1f}")
            cells.append(str(_interval(runs, "best_pa_mpjpe")) if "best_pa_mpjpe" in runs[0]["test"] else "")
            cells.append(f"{times[case]:.2f}" if case in times else "")
            yield f"| {case} | {runs[0].get('rate', '')} | {' | '.join(cells)} |"
        if runs := _runs(log, name, "gaussian", args):
            found = _interval(runs, "log_likelihood")
            yield f"\ngaussian: {found.mean:.2f} ± {found.half:.2f} nats a joint; 0 is a uniform distribution of rotations."


def draw(log: Log, args: argparse.Namespace, path: Path) -> None:
    """PA-MPJPE of each head less ``BASE``'s, with its interval, a panel a set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(args.sets), figsize=(5 * len(args.sets), 3.4), sharey=True, squeeze=False)
    cases = [case for case in CASES if case != BASE]
    for axes, name in zip(panels[0], args.sets):
        base = _runs(log, name, BASE, args)
        for place, case in enumerate(cases):
            if len(runs := _runs(log, name, case, args)) == len(base):
                apart = _interval(runs, "pa_mpjpe", base)
                colour = "tab:grey" if not apart.sure else "tab:green" if apart.mean < 0 else "tab:red"
                axes.errorbar(apart.mean, place, xerr=apart.half, color=colour, marker="o", capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=name, xlabel=f"PA-MPJPE less that of {BASE}, mm", yticks=range(len(cases)), yticklabels=cases)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


def _runs(log: Log, name: str, case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """By seed."""
    runs = {run["seed"]: run for run in log.find(stage="run", set=name, case=case, steps=args.steps)}
    return [run for seed, run in sorted(runs.items()) if seed < args.seeds]


def _interval(runs: Sequence[dict[str, Any]], measure: str, base: Sequence[dict[str, Any]] | None = None) -> Interval:
    """Of a measure, or of its difference to another head's, row by row of the same seed."""
    values = [np.array(run["test"][measure]) for run in runs]
    if base is not None:
        values = [value - np.array(run["test"][measure]) for value, run in zip(values, base)]
    return interval(values, [np.array(run["groups"]) for run in runs])


def step_times(args: argparse.Namespace, want: int) -> dict[str, float]:
    """Time of a training step over that of ``BASE``, medians of alternating pairs."""
    batch = next(batches(rows("generated", "val", 0, "", args.rows), 0))

    def stepper(case: Case) -> Callable[[], object]:
        update, trainable, moments, _ = start(case, train_config(100, 1e-3), 0)
        held = [trainable, moments]

        def block() -> None:
            for _ in range(20):
                held[:] = update(*held, batch, jax.random.key(0))[:2]
            jax.block_until_ready(held)

        block()
        return block

    base = stepper(CASES[BASE])
    out = {BASE: 1.0}
    for case in args.cases:
        if case != BASE:
            found = paired(stepper(CASES[case]), base, want=want, tries=3 * want, patience=2.0)
            out[case] = found.ratio
            print(f"time of a step, {case}: {out[case]:.2f} of {BASE}'s ({found.tried} pairs)", flush=True)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", default="", help="folder of motion capture; without it, generated poses only")
    parser.add_argument("--out", type=Path, default=Path("out/heads.jsonl"), help="a JSON line for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=0, help="rows of each split at most")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and run nothing")
    parser.add_argument("--figure", type=Path, help="figure of the differences to write, .svg or .png")
    parser.add_argument("--quick", action="store_true", help="a few steps of each head: does it run?")
    args = parser.parse_args(argv)
    args.trial = TRIAL
    if args.quick:
        args.steps, args.trial, args.rows = 4, 2, 64
    if not args.clips:
        args.sets = [name for name in args.sets if name != "clips"]
    log = Log(args.out)
    if not args.table:
        choose_rates(args, log)
        study(args, log)
        if not log.find(stage="times"):
            log.add({"stage": "times", "ratios": step_times(args, 2 if args.quick else 9)})
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(f"\n{args.steps} steps of {BATCH} rows; commit {commit or 'unknown'}")
    print("\n".join(table(log, args)))
    if args.figure:
        draw(log, args, args.figure)


if __name__ == "__main__":
    main()
