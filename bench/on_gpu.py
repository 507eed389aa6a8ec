"""Runs the parts of ``bench/on_gpu.sh`` one after another, each as a process with its own time limit, and writes one table and one JSON file.

A part that fails or runs out of time costs itself only: what it had measured until then is kept, and the others run. The JSON file
is written after every part. This process imports neither JAX nor torch, so that each part has the card to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
GiB = 2**30
PEERS = ("torch", "transformers", "peft")
MINUTES = 9.0
LEAST = 10.0
"""Seconds without which no part is started."""
GRACE = 5.0
"""Seconds in which a part that ran out of time may end by itself."""
LEFT_OUT = "left out"


@dataclasses.dataclass(frozen=True)
class Part:
    """One process. words: script of ``bench/`` and its arguments. seconds: its time limit, where all may take ``MINUTES``. peers: packages without
    which it is left out.

    on_cpu: it runs without the card.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    peers: tuple[str, ...] = ()
    on_cpu: bool = False


CARD = "CARD"
"""Stands for the row of ``train.chips.CHIPS`` that the first part finds."""


def parts(preset: str) -> list[Part]:
    """All parts, the short and the most telling ones first: the last ones are those that a slow machine leaves out."""
    size, small = ("--preset", preset), preset == "small"
    batch = "4" if small else "16"
    step = ("train_gpu.py", *size, "--batch", batch, "--steps", "2" if small else "8")
    decode = ("decode_gpu.py", *size)
    bodies = ("8", "64") if small else ("1024", "16384")
    return [
        Part("card", ("card.py", *size), 60),
        Part("tests", ("pytest",), 120),
        Part("body", ("body_gpu.py", "--batch", *bodies), 60),
        Part("step", (*step, "--only", "jax"), 150),
        Part("step, torch", (*step, "--only", "torch"), 90, PEERS),
        Part("decoding", (*decode, "--only", "jax"), 150),
        Part("decoding, transformers", (*decode, "--only", "torch"), 90, PEERS[:2]),
        Part("plan", (*step, "--only", "plan", "--card", CARD), 90, on_cpu=True),
        Part("decoding, int4", (*decode, "--only", "jax", "--quantize", "int4", "--batch", "1"), 75),
        Part("step, kept", (*step, "--only", "jax", "--remat", "dots", "--batch", "2" if small else "8"), 90),
        Part("decoding, int8", (*decode, "--only", "jax", "--quantize", "int8", "--batch", "1"), 75),
    ]


def command(part: Part, result: Path, card: str) -> list[str]:
    """The command of a part, which writes its figures to ``result``."""
    if part.words == ("pytest",):
        tests = ["-m", "gpu", "-rs", "-p", "no:cacheprovider", "tests/gpu", f"--junitxml={result}"]
        return [sys.executable, "-m", "pytest", *tests]
    words = [card if word == CARD else word for word in part.words[1:]]
    return [sys.executable, str(BENCH / part.words[0]), *words, "--json", str(result)]


def environment(part: Part, platform: str, cache: str) -> dict[str, str]:
    """Of a part: JAX computes on ``platform``, takes memory as it needs it, and finds what it compiled in an earlier run."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu" if part.on_cpu or platform == "cpu" else "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "HF_HUB_OFFLINE": "1",
    }


def run(words: Sequence[str], env: dict[str, str], log: Path, seconds: float) -> tuple[int | None, str]:
    """Exit status, None after a time-out, and what the command printed, which ``log`` holds while it runs."""
    with log.open("w+") as written:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A job in the background inherits that SIGINT is ignored; a part must hear it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status: int | None = process.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = None
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
                process.wait(timeout=GRACE)
        finally:  # whatever it started, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the card's driver does not die
                process.wait(timeout=10)
        written.seek(0)
        return status, written.read()


def read(part: Part, path: Path) -> Any:
    """What a part wrote until it ended; None if it wrote nothing."""
    try:
        if part.words == ("pytest",):
            return read_tests(path)
        return json.loads(path.read_text())
    except (OSError, ValueError, xml.ParseError):
        return None


def read_tests(path: Path) -> dict[str, Any]:
    """Counts and the names of tests that did not pass, from pytest's XML."""
    counts: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    for case in xml.parse(path).getroot().iter("testcase"):
        name = case.get("name", "")
        if case.find("skipped") is not None:
            counts["skipped"].append(f"{name}: {case.find('skipped').get('message')}")  # type: ignore[union-attr]
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"].append(name)
        else:
            counts["passed"] += 1
    return counts


Cells = tuple[str, str, str, str, str]
"""A row of the table: what, ours, the other program's, the bound or the plan, and a comparison."""
HEAD: Cells = ("what", "ours", "peer", "bound", "ours to bound · peer's time / ours")


def table(results: dict[str, dict[str, Any]]) -> list[Cells]:
    """The rows of all that was measured, and one for each part that gave nothing."""
    found = {name: part["result"] for name, part in results.items() if part["result"] is not None}
    rows: list[Cells] = []
    for make in (_card, _tests, _step, _decoding, _body):
        try:
            rows += make(found)
        except Exception as error:  # a part that wrote something unforeseen; its figures are in the JSON file
            rows.append((f"rows of {make.__name__.strip('_')}", "cannot be made", "–", "–", repr(error)))
    for name, part in results.items():
        if part["status"] != "ok":
            last = part["error"].strip().splitlines()[-1:] or [""]
            rows.append((name, part["status"], "–", "–", last[0][:160]))
    return rows


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _share(part: float | None, whole: float | None) -> str:
    return "" if part is None or whole is None else f"{100 * part / whole:.0f} %"


def _both(*words: str) -> str:
    return " · ".join(word for word in words if word) or "–"


def _card(found: dict[str, Any]) -> Iterator[Cells]:
    card = found.get("card", {})
    for what, key, maker, unit in (
        ("copies, TB/s", "bandwidth", "makers_bandwidth", 1e12),
        ("bfloat16 products, TFLOP/s", "flops", "makers_flops", 1e12),
        ("float32 products, TFLOP/s", "flops_float32", "", 1e12),
    ):
        if key in card:
            peak = card.get(maker)
            yield (
                what,
                f"{card[key] / unit:.2f}",
                "–",
                _number(peak and peak / unit, ".2f"),
                _share(card[key], peak) or "–",
            )


def _tests(found: dict[str, Any]) -> Iterator[Cells]:
    if "tests" in found:
        tests = found["tests"]
        counts = f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped"
        yield "tests", counts, "–", "–", ", ".join(tests["failed"]) or "–"


def _step(found: dict[str, Any]) -> Iterator[Cells]:
    peer, plan = found.get("step, torch", {}).get("torch", {}), found.get("plan", {}).get("plan") or {}
    other, others, torchs = (peer.get(key) for key in ("tokens_per_second", "mfu", "peak_bytes"))
    for part in ("step", "step, kept"):
        about = found.get(part) or (found.get("step, torch") if part == "step" else None)
        ours = found.get(part, {}).get("jax", {})
        if about is None or not (ours or (peer and part == "step")):
            continue
        rate, mfu, most = (ours.get(key) for key in ("tokens_per_second", "mfu", "peak_bytes"))
        best = about["batch"] * about["length"] / about["bound_seconds"] if about["bound_seconds"] else None
        name = f"LoRA step, {about['preset']}, {about['batch']} × {about['length']}, remat {about['remat']}"
        planned = plan.get("peak") if part == "step" else None
        yield (
            f"{name}: tokens/s", *(_number(x, ",.0f") for x in (rate, other, best)),
            _both(_share(rate, best), f"{rate / other:.2f}" if rate and other else ""),
        )  # fmt: skip
        yield f"{name}: LoRA-MFU, %", *(_number(x and 100 * x, ".1f") for x in (mfu, others)), "–", "–"
        yield (
            f"{name}: peak memory, GiB (bound: plan)", *(_number(x and x / GiB, ".2f") for x in (most, torchs, planned)),
            _share(most, planned) or "–",
        )  # fmt: skip
        yield f"{name}: first step, s", *(_number(x.get("first_step"), ".0f") for x in (ours, peer)), "–", "–"


def _decoding(found: dict[str, Any]) -> Iterator[Cells]:
    peers = {row["batch"]: row for row in found.get("decoding, transformers", {}).get("rows", [])}
    for part in ("decoding", "decoding, int8", "decoding, int4"):
        about = found.get(part)
        own = {row["batch"]: row for row in about["rows"]} if about else {}
        for batch in own if part != "decoding" else {**own, **peers}:
            row, peer = own.get(batch, {}), peers.get(batch, {})
            each, other, bound = row.get("token_seconds"), peer.get("token_seconds"), (row or peer).get("bound_seconds")
            base = "" if part == "decoding" else f", {about['quantize']} base"
            yield (
                f"decoding{base}, batch {batch}: ms a token",
                *(_number(x and 1e3 * x, ".2f") for x in (each, other, bound)),
                _both(_share(bound, each), f"{other / each:.2f}" if other and each else ""),
            )
            yield (
                f"decoding{base}, batch {batch}: prefill, ms",
                *(_number(x.get("prefill_seconds") and 1e3 * x["prefill_seconds"], ".0f") for x in (row, peer)),
                "–", "–",
            )  # fmt: skip


def _body(found: dict[str, Any]) -> Iterator[Cells]:
    for row in found.get("body", {}).get("rows", []):
        each, bound = row["seconds"], row["bound_seconds"]
        yield (
            f"body, {row['what']}, {row['batch']} at a time: ms", f"{1e3 * each:.3f}", "–",
            _number(bound and 1e3 * bound, ".3f"), _share(bound, each) or "–",
        )  # fmt: skip


def as_markdown(rows: Sequence[Cells]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("13b", "small"), default="13b")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu shows that the parts work")
    parser.add_argument("--card", default="h100", help="chip to plan for where the card's name says nothing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all; the limits of the parts grow with it")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "on_gpu")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    end = begin + 60 * args.minutes - 2 * GRACE  # to end and write in
    args.out.mkdir(parents=True, exist_ok=True)
    card, todo = "cpu" if args.platform == "cpu" else args.card, parts(args.preset)
    names = [part.name for part in todo]
    if unknown := sorted({*(args.only or [])} - {*names}):
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(names)}")
    report: dict[str, Any] = {
        "preset": args.preset,
        "platform": args.platform,
        "started": time.strftime("%F %T"),
        "parts": {},
    }
    # `timeout` and Ctrl-C end the part that runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or f"{tempfile.gettempdir()}/chatpose-on-gpu-{os.getuid()}"
    with tempfile.TemporaryDirectory() as folder:
        for part in todo:
            if args.only and part.name not in args.only:
                continue
            allowed = dataclasses.replace(part, seconds=part.seconds * args.minutes / MINUTES)
            done, output = one(allowed, args.platform, card, cache, Path(folder), end - time.monotonic())
            report["parts"][part.name] = done
            if args.platform == "gpu" and part.name == "card":
                card = (done["result"] or {}).get("chip") or card
            report["seconds"] = time.monotonic() - begin
            report["table"] = [HEAD, *table(report["parts"])]
            _write(args.out / "on_gpu.json", json.dumps(report, indent=1))
            _write(args.out / "table.md", as_markdown(table(report["parts"])))
            with (args.out / "log.txt").open("w" if len(report["parts"]) == 1 else "a") as log:
                log.write(f"== {part.name}: {done['status']}, {done['seconds']:.0f} s\n{output}\n")
    print(f"\n{as_markdown(table(report['parts']))}\n{report['seconds']:.0f} s in all; {args.out / 'on_gpu.json'}")
    return int(any(part["status"] not in ("ok", LEFT_OUT) for part in report["parts"].values()))


def one(part: Part, platform: str, card: str, cache: str, folder: Path, left: float) -> tuple[dict[str, Any], str]:
    """Run a part in the time that is left: its status, seconds, figures and error; and what it printed."""
    missing = [name for name in part.peers if importlib.util.find_spec(name) is None]
    if missing or left < LEAST:
        why = f"not installed here: {', '.join(missing)}" if missing else "no time was left"
        print(f"== {part.name}: left out, {why}", flush=True)
        return {"status": LEFT_OUT, "seconds": 0.0, "result": None, "error": why}, why
    seconds = min(part.seconds, left)
    print(f"== {part.name} (at most {seconds:.0f} s)", flush=True)
    result, begin = folder / "result", time.monotonic()
    result.unlink(missing_ok=True)
    words, env = command(part, result, card), environment(part, platform, cache)
    status, output = run(words, env, folder / "log", seconds)
    taken = time.monotonic() - begin
    verdict = {0: "ok", None: f"stopped after {taken:.0f} s"}.get(status, f"failed with status {status}")
    print("\n".join(output.strip().splitlines()[-12:]), f"-- {verdict}, {taken:.0f} s", sep="\n", flush=True)
    error = "" if status == 0 else output[-4000:]
    return {"status": verdict, "seconds": taken, "result": read(part, result), "error": error}, output


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
