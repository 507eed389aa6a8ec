"""Make the model that comes with the package again: ``python tools/demo_model.py``.

Runs the demo (``chatpose demo``, in ``out/demo_model``), writes what it trained as the model folder ``chatpose_jax/demo_model``, in bfloat16, and
evaluates that folder as the demo evaluates its own. The figures and the commits stand in the folder: ``figures.json``, ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from chatpose_jax.chat import DEMO, load
from chatpose_jax.cli import demo
from chatpose_jax.cli.main import main as chatpose
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.processing.processor import Processor
from chatpose_jax.train.run_config import RunConfig, load_config
from chatpose_jax.weights.folder import TOKENIZER, load_model_config, load_params, read_folder
from chatpose_jax.weights.save import save_folder

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("chatpose_jax") / DEMO.name
DTYPE = "bfloat16"

README = """# The model that comes with the package

`chatpose chat`, `chatpose serve` and `chatpose_jax.load()` answer with it if no model is named. It is the model of `make demo`, stored in {dtype}:
{parameters:,} parameters that learned from nothing, on generated descriptions and on drawings of the package's own body. No data of others is in
it. Its licence is the project's, Apache-2.0.

**It is a toy.** It follows descriptions of postures and changes of them. It often confuses left and right. Of a drawn body it sees the posture, and
the arms only sometimes. It is of no use on photographs, and knows no words but those of its descriptions.

`python tools/demo_model.py` makes this folder. The model was trained at commit {trained}, and measured as it lies here at commit {measured}
({machine}; it computed in {computed}), on {rows} held-out rows of each kind. The baseline answers every question with the mean pose of the
training rows. For a change of a pose, the other one repeats the model's first answer.

| held-out answers | MPJPE | PA-MPJPE | MPJRE | PA-MPJPE / mean pose | offers a pose |
|---|---|---|---|---|---|
{table}
"""


def commit() -> str:
    """The commit of the checkout. Ends the program if tracked files differ from it."""
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", f":!{OUT}"], cwd=ROOT).returncode:
        raise SystemExit("commit first: the figures name the commit that they are from")
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=True, text=True).stdout[:7]


def write(trained: Path, folder: Path) -> None:
    """Writes the model folder of a demo again, in bfloat16."""
    config = load_model_config(trained).replace(dtype=DTYPE, param_dtype=DTYPE)
    params = load_params(trained, abstract_params(config))
    processor = Processor.load(trained / TOKENIZER, config)
    origin = read_folder(trained)["provenance"]
    save_folder(folder, config, params, processor=processor, provenance=origin, overwrite=True)


def describe(folder: Path, config: RunConfig, rows: int, **commits: str) -> dict[str, Any]:
    """Evaluates a folder that ``write`` wrote, and adds ``figures.json`` and ``README.md`` to it."""
    model = load(folder)
    results = demo.evaluate(model, config, rows)
    figures: dict[str, Any] = {
        **commits,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "machine": f"{platform.machine()}, {demo.cpu_workers()} cores, Python {platform.python_version()}, jax {jax.__version__}",
        "computed": model.config.dtype,
        "rows": rows,
        "evaluation": results,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = README.format(**figures, dtype=DTYPE, table=table(results))
    (folder / "README.md").write_text(text)
    return figures


def table(results: dict[str, Any]) -> str:
    """The figures as rows of Markdown."""
    rows = []
    for kind, r in results.items():
        rows.append(
            f"| {kind} → pose | {r['mpjpe']:.0f} mm | {r['pa_mpjpe']:.0f} mm | {r['mpjre']:.1f} | {r['ratio_pa_mpjpe']:.2f} | {r['pose_rate']:.0%} |"
        )
        for name, prefix in (("mean pose", "baseline"), ("first answer", "kept")):
            if f"{prefix}_mpjpe" in r:
                values = [r[f"{prefix}_{measure}"] for measure in ("mpjpe", "pa_mpjpe", "mpjre")]
                rows.append("| … {} | {:.0f} mm | {:.0f} mm | {:.1f} | | |".format(name, *values))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out/demo_model", help="folder of the demo; a finished one is used"
    )
    args = parser.parse_args()
    begun = args.out / "commit"
    if not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(commit())
    if status := chatpose(["demo", "--out", str(args.out)]):
        raise SystemExit(status)
    write(args.out / "model", ROOT / OUT)
    describe(ROOT / OUT, load_config("tiny"), demo.TEST_ROWS, trained=begun.read_text(), measured=commit())


if __name__ == "__main__":
    main()
