"""Writes the files of an evaluation, for tests of the report."""

import json

import numpy as np

from chatpose_jax.evaluation.scores import Scores, Value


def scores(
    table="estimation/3dpw_test/B",
    *,
    pa=58.4,
    facts=None,
    counts=None,
    title="Pose estimation, 3dpw_test, protocol B",
    **values,
):
    """A table of two columns; pa is PA-MPJPE in mm."""
    facts = {"protocol": "B", "betas": "0 on both sides", "samples": "35,515"} if facts is None else facts
    columns = {
        "MPJPE": Value(pa + 30, pa + 28, pa + 33, "mm"),
        "PA-MPJPE": Value(pa, pa - 1, pa + 1, "mm"),
        **values,
    }
    return Scores(table, title, facts, columns, counts=counts or {})


def write(out, system, found, *, task="estimation", data="3dpw_test", command="", folder=None, note=""):
    """Writes ``scores.json`` as ``chatpose eval`` does. Returns its folder."""
    place = out / task / data / (folder or system)
    place.mkdir(parents=True)
    nulls = [each.to_json() for each in found]
    for each in nulls:
        for value in each["values"].values():
            value.update({name: None for name in ("value", "low", "high") if not np.isfinite(value[name] or 0)})
    about = {
        "task": task,
        "data": data,
        "system": system,
        "command": command or f"chatpose eval {task} --system {system}",
        **({"note": note} if note else {}),
    }
    (place / "scores.json").write_text(json.dumps({**about, "scores": nulls}))
    return place
