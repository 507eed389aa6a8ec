"""Writes small originals of the paper's evaluation sets, in the layout of the real files: ``docs/evaluation.md`` names these folders."""

import json
from pathlib import Path
from typing import Any

from tests.data.readers import amass_files, humans4d_eval_files, llava_bench_files, rpe_files, threedpw_files

FILE = "BioMotionLab_NTroje/rub055/{:04d}_jump_poses.npz"
TRAIN, VAL, TEST = range(40), range(40, 48), range(48, 64)
WAYS = ("jumps", "kneels", "bows", "waves", "sits", "runs", "crouches", "lies")
LIMBS = ("left arm", "right arm", "left leg", "right leg", "head", "back", "left knee", "right foot")


def write_originals(data: Path) -> None:
    """Folders ``3dpw``, ``4d-humans``, ``rpe``, ``posescript`` and ``llava`` in ``data``."""
    for number, split in enumerate(("train", "validation", "test")):
        threedpw_files.write(data / "3dpw", threedpw_files.sequence(seed=number), split)
    humans4d_eval_files.write_3dpw(data / "4d-humans")
    humans4d_eval_files.write_h36m(data / "4d-humans")
    both = data / "4d-humans" / "hmr2_evaluation_data"
    (data / "4d-humans" / "h36m_val_p2.npz").rename(both / "h36m_val_p2.npz")
    rpe_files.write_refined(data / "rpe")
    write_posescript(data / "posescript")
    llava_bench_files.write_llava_bench(data / "llava")


def write_posescript(folder: Path) -> None:
    """64 poses of four files of AMASS, each with captions that differ, and two questions of SPG for each."""
    ids = range(len(TRAIN) + len(VAL) + len(TEST))
    places = {str(n): ["AMASS", FILE.format(n // 16), n % 16] for n in ids}
    human = {str(n): f"The person {WAYS[n % 8]} and lifts the {LIMBS[n // 8]}." for n in ids}
    amass_files.write_v1(folder, places, human, {"train": list(TRAIN), "val": list(VAL), "test": list(TEST)})
    for number in range(4):
        path = folder / "AMASS" / "BMLrub" / "rub055" / f"{number:04d}_jump_poses.npz"
        amass_files.write_smplh(path, amass_files.motion(20, number))
    rows: list[dict[str, Any]] = []
    for split, members in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        for n in members:
            for query in (f"Someone {WAYS[n % 8]} at a wedding.", f"What does a hurt {LIMBS[n // 8]} look like?"):
                rows.append({"pose_id": n, "query": query, "source": "posescript", "version": "v1", "split": split})
    (folder / "spg.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
