"""The pose head on its own: ``pose_head.safetensors`` and, in ``pose_head.json``, what it is.

It stands beside checkpoints whose layout has no place for a head. The head ``mlp`` has the names of a torch
``Sequential(Linear, ReLU, Linear)``, any other head those of its own parameters, as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig, ModelConfig
from chatpose_jax.models.heads import abstract_head
from chatpose_jax.weights.layouts import Layout, NameRule, parts
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.readers import read_json

WEIGHTS, DESCRIPTION = "pose_head.safetensors", "pose_head.json"
FORMAT = "chatpose-pose-head"


def rules(head: HeadConfig, paths: Iterable[str]) -> tuple[NameRule, ...]:
    """Name in the file → leaf. paths: the leaves ``pose_head/…`` of such a head."""
    if head.name == "mlp":
        return parts.pose_head("0", "2")
    return tuple(NameRule(path.removeprefix("pose_head/").replace("/", "."), path) for path in paths)


def describe(config: ModelConfig, pose_token: str) -> dict[str, Any]:
    """The description: all that a program in another framework needs to use the weights."""
    head, width = config.head, config.text.hidden_size
    joints = abstract_head(head).num_joints
    layers = {
        "layers": ["Linear", "ReLU", "Linear"],
        "sizes": [width, width, 6 * joints],
        "output": "6 numbers a joint: the first column of its rotation matrix, then the second, before Gram-Schmidt",
    }
    return {
        "format": FORMAT,
        "version": 1,
        "name": head.name,
        "num_joints": joints,
        "options": dict(head.options),
        **(layers if head.name == "mlp" else {}),
        "input": "hidden state after the final norm, at the position before the pose token",
        "joints": "SMPL's order; joint 0 is the global orientation in the camera frame: x right, y down, z away",
        "pose_token": pose_token,
        "pose_token_id": config.pose_token_id,
    }


def write_description(folder: Path, config: ModelConfig, pose_token: str) -> None:
    """Writes ``pose_head.json``."""
    text = json.dumps(describe(config, pose_token), indent=2, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def layout(folder: Path) -> Layout:
    """How to read the head in ``folder``. Raises UserError where its description is missing or another program's."""
    file = folder / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{folder}: {WEIGHTS} without {DESCRIPTION}, which says what head it is; copy that too")
    data = read_json(file)
    if (data.get("format"), data.get("version")) != (FORMAT, 1):
        raise UserError(f"{file}: expected format {FORMAT!r} in version 1; upgrade this program")
    try:
        options = tuple((str(key), _frozen(value)) for key, value in dict(data["options"]).items())
        head = HeadConfig(str(data["name"]), options)
        hash(head)  # a configuration is a key of caches
        paths = head_paths(head)
        if int(data["num_joints"]) != (found := abstract_head(head).num_joints):
            raise UserError(f"num_joints is {data['num_joints']}, but this head gives {found}")
    except Exception as error:  # whatever a head makes of its options
        raise UserError(f"{file}: not a description of a pose head ({type(error).__name__}: {error})") from None
    return Layout(
        name="pose_head",
        title="pose head on its own",
        family="pose_head",
        rules=rules(head, paths),
        ignored=(),
        recognise=lambda shapes: True,
        settings=lambda config, shapes: {"head": head},
    )


def head_paths(head: HeadConfig) -> list[str]:
    """The leaves of a head, ``pose_head/…``."""
    # The names do not depend on the width.
    state = nnx.to_pure_dict(nnx.state(abstract_head(head)))
    return [f"pose_head/{path}" for path in by_path(state)]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
