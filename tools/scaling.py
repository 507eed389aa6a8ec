"""Make the tables and the plot of docs/scaling.md, and the README's table of what fits: every row is one run of ``chatpose plan``.

JAX_PLATFORMS=cpu python tools/scaling.py [--folder out/plans] [--only v5e-8 …]

A plan that stands in the folder is not made again. Needs the compilers: pip install ".[tpu,gpu]"; no TPU, no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAIN = "--config chatpose_13b --length 1024"
ROWS: dict[str, str] = {
    "v5e-8": f"{TRAIN} --target v5e:2x4 --batch 32",
    "v5e-4": f"{TRAIN} --target v5e:2x2 --batch 16",
    "v5e-64": f"{TRAIN} --target v5e:8x8 --batch 32",
    "v5e-256": f"{TRAIN} --target v5e:16x16 --batch 32",
    "v5p-64": f"{TRAIN} --target v5p:4x4x4 --batch 32",
    "v6e-8": f"{TRAIN} --target v6e:2x4 --batch 32",
    "h100-1": f"{TRAIN} --target h100 --batch 16",
    "h100-8": f"{TRAIN} --target h100:8 --batch 32",
    "v5e-4-int8": f"{TRAIN} --target v5e:2x2 --batch 16 --set model.quantize=int8",
    "v5e-8-decode": "--config chatpose_13b --length 1024 --target v5e:2x4 --decode",
    "h100-decode": "--config chatpose_13b --length 1024 --target h100 --decode",
    "v5e-16": f"{TRAIN} --target v5e:4x4 --batch 32",
    "7b-v5e-4": "--config chatpose_7b --length 1024 --target v5e:2x2 --batch 16",
    "v5e-64x2": f"{TRAIN} --target v5e:8x8*2 --batch 64",
    "v5e-64x4": f"{TRAIN} --target v5e:8x8*4 --batch 128",
    "v5e-64x2-32": f"{TRAIN} --target v5e:8x8*2 --batch 32",
    "v5p-64x2": f"{TRAIN} --target v5p:4x4x4*2 --batch 64",
    "h100-8x2": f"{TRAIN} --target h100:8*2 --batch 64",
    "24gb-int4": f"{TRAIN} --target rtx4090 --batch 4 --set model.quantize=int4",
    "12gb-int4-decode": "--config chatpose_13b --length 1024 --target rtx3060 --decode --set model.quantize=int4",
    "8gb-int4-decode": "--config chatpose_7b --length 1024 --target rtx4060 --decode --set model.quantize=int4",
    "v5e-1-int4": f"{TRAIN} --target v5e:1x1 --batch 4 --set model.quantize=int4",
    "v5e-1-int4-decode": "--config chatpose_13b --length 1024 --target v5e:1x1 --decode --set model.quantize=int4",
}
GiB = 2**30
ROOT = Path(__file__).resolve().parent.parent
IN_README = {
    "h100-1": "train, 16 rows × 1024 tokens, one H100 of 80 GB",
    "h100-8": "train, 32 rows, eight H100",
    "v5e-4": "train, 16 rows, v5e-4",
    "v5e-4-int8": "train, 16 rows, v5e-4, int8 base",
    "v5e-8": "train, 32 rows, v5e-8",
    "v5e-64": "train, 32 rows, v5e-64",
    "h100-decode": "answer, 1024 tokens, one H100",
    "v5e-8-decode": "answer, 1024 tokens, v5e-8",
}
SMALL = {
    "24gb-int4": "13B trains, 4 rows × 1024 tokens, a card of 24 GB",
    "12gb-int4-decode": "13B answers, 1024 tokens, a card of 12 GB",
    "8gb-int4-decode": "7B answers, 1024 tokens, a card of 8 GB",
    "v5e-1-int4": "13B trains, 4 rows × 1024 tokens, one chip of v5e",
    "v5e-1-int4-decode": "13B answers, 1024 tokens, one chip of v5e",
}


def make(name: str, folder: Path) -> None:
    """The plan of a row, made now if the folder lacks it."""
    path = folder / f"{name}.json"
    if not path.exists():
        command = [sys.executable, "-m", "chatpose_jax.cli", "plan", *ROWS[name].split(), "--json", str(path)]
        print(f"chatpose plan {ROWS[name]}", flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout or done.stderr[-2000:], flush=True)


def line(name: str, plan: dict[str, Any]) -> str:
    mesh = " × ".join(str(plan["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
    peak = "does not fit" if plan["peak"] is None else f"{plan['peak'] / GiB:.2f} GiB"
    parts = [f"{(plan[key] or 0) / GiB:.2f}" for key in ("arguments", "temporaries")]
    sent = f"{sum(plan['sent'].values()) / GiB:.2f}"
    times = ["–" if plan[key] is None else f"{plan[key]:.3g}" for key in ("compute", "memory", "network", "seconds")]
    mfu = "–" if plan["mfu"] is None else f"{100 * plan['mfu']:.0f} %"
    row = [name, mesh, f"{plan['batch']} × {plan['length']}", *parts, f"**{peak}**", sent, *times, mfu]
    busy = f" ({plan['compile_cpu_seconds']:.0f})" if "compile_cpu_seconds" in plan else ""
    return f"| {' | '.join(row)} | {plan['compile_seconds']:.0f}{busy} |"


def table(plans: dict[str, dict[str, Any]]) -> str:
    head = ["plan", "data × fsdp × tensor", "rows × tokens", "arguments, GiB", "temporaries, GiB", "peak per chip"]
    head += [
        "sent per chip, GiB",
        "compute, s",
        "memory, s",
        "network, s",
        "roofline, s",
        "MFU at most",
        "compiled in, s (processors)",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [line(name, plan) for name, plan in plans.items() if plan.get("slices", 1) == 1]
    lines += ["", *(f"- {name}: `chatpose plan {ROWS[name]}`" for name in plans)]
    if missing := [name for name in ROWS if name not in plans]:
        lines += ["", f"Rows that have not been made yet: {', '.join(missing)}; the same command makes them."]
    if len(over_chips(plans)) > 1:
        lines += ["", "![step time and share of collectives against chips](images/scaling.png)"]
    return "\n".join(lines)


def slices_table(plans: dict[str, dict[str, Any]]) -> str:
    """Plans for several slices, each beside that for one of them where there is one."""
    head = ["plan", "slice × data × fsdp × tensor", "rows × tokens", "peak per chip", "one slice's", "sent inside, GiB"]
    head += ["to other slices, GiB", "in collectives", "compute, s", "memory, s", "network inside, s", "between, s"]
    head += ["roofline, s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, plan in plans.items():
        if plan.get("slices", 1) > 1:
            one = plans.get(name.rpartition("x")[0])
            one = one if one is not None and one["batch"] * plan["slices"] == plan["batch"] else None
            row = [name, " × ".join(str(size) for size in plan["mesh"].values()), f"{plan['batch']} × {plan['length']}"]
            row += [f"**{plan['peak'] / GiB:.2f} GiB**", "–" if one is None else f"{one['peak'] / GiB:.2f} GiB"]
            row += [f"{sum(plan['sent'].values()) / GiB:.2f}", f"{sum(plan['across'].values()) / GiB:.3f}"]
            row += [f"{plan['crossings']:.0f}"]
            row += [f"{plan[key]:.3g}" for key in ("compute", "memory", "network", "between", "seconds")]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def over_chips(plans: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Training plans of one chip and one batch, by their number of chips."""
    chosen = [
        p
        for n, p in plans.items()
        if n.startswith("v5e")
        and p["what"] == "train"
        and p["batch"] == 32
        and p["seconds"]
        and p.get("slices", 1) == 1
    ]
    return sorted(chosen, key=lambda plan: plan["chips"])


def write(path: Path, marker: str, text: str) -> None:
    """Put ``text`` between ``<!-- marker … -->`` and ``<!-- end -->``."""
    page = path.read_text()
    pattern = rf"(<!-- {marker}[^>]*-->\n).*?(<!-- end -->)"
    if not re.search(pattern, page, flags=re.S):
        raise SystemExit(f"{path} has lost the marker <!-- {marker} … -->")
    path.write_text(re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", page, flags=re.S))


def readme(plans: dict[str, dict[str, Any]], rows: dict[str, str], title: str) -> str:
    lines = [f"| {title} | peak per chip | made by |", "|---|---|---|"]
    for name, words in rows.items():
        if name in plans and plans[name]["peak"] is not None:
            plan = plans[name]
            lines.append(
                f"| {words} | {plan['peak'] / GiB:.1f} GiB of {plan['capacity'] / GiB:.1f} | `chatpose plan {ROWS[name]}` |"
            )
    return "\n".join(lines)


def plot(plans: dict[str, dict[str, Any]], path: Path) -> None:
    """Step time and the share that collectives would take of it, over chips of one kind with one batch."""
    import matplotlib.pyplot as plt

    chosen = over_chips(plans)
    chips = [plan["chips"] for plan in chosen]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key, label in (("seconds", "roofline"), ("compute", "compute"), ("memory", "memory"), ("network", "network")):
        wide = {"linewidth": 6, "alpha": 0.4} if key == "seconds" else {}  # it lies on the longest of the others
        left.loglog(chips, [plan[key] for plan in chosen], "o-", label=label, **wide)
    right.semilogx(chips, [100 * plan["network"] / plan["seconds"] for plan in chosen], "o-")
    left.set(xlabel="v5e chips", ylabel="seconds a step", title="13B LoRA, 32 rows × 1024 tokens")
    right.set(xlabel="v5e chips", ylabel="network time, % of the roofline", ylim=(0, 105), title="share of collectives")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xticks(chips, [str(n) for n in chips])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/plans"))
    parser.add_argument(
        "--only", nargs="+", choices=ROWS, help="make these alone; the tables hold every plan that stands in the folder"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only or ROWS:
        make(name, args.folder)
    plans = {name: json.loads(path.read_text()) for name in ROWS if (path := args.folder / f"{name}.json").exists()}
    write(ROOT / "docs/scaling.md", "plans", table(plans))
    write(ROOT / "docs/scaling.md", "slices", slices_table(plans))
    write(ROOT / "README.md", "what fits", readme(plans, IN_README, "`chatpose_13b`, the paper's recipe"))
    write(ROOT / "README.md", "small cards", readme(plans, SMALL, "an int4 base"))
    if len(over_chips(plans)) > 1:
        plot(plans, ROOT / "docs/images/scaling.png")


if __name__ == "__main__":
    main()
