"""The pose head in files of its own: ``pose_head.safetensors``, and its description, ``pose_head.json``.

They lie beside checkpoints whose layout has no names for a pose head. The tensors of the head ``mlp`` have the names of a torch
``Sequential(Linear, ReLU, Linear)``. Those of any other head have the names of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig, ModelConfig, frozen
from chatpose_jax.models.heads import abstract_head, head_output, is_own, trusted_head
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.models.heads.mlp import MLPHead
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.readers import read_json_object
from chatpose_jax.weights.table import Layout, NameRule

WEIGHTS, DESCRIPTION = "pose_head.safetensors", "pose_head.json"
FORMAT = "chatpose-pose-head"


def rules(head: HeadConfig, paths: Iterable[str]) -> tuple[NameRule, ...]:
    """The name rules of a head. paths: its leaves, ``pose_head/…``."""
    if head.name == "mlp":
        return parts.pose_head("0", "2")
    return tuple(NameRule(path.removeprefix("pose_head/").replace("/", "."), path) for path in paths)


OUTPUT = {
    "6d": "6 numbers a joint: the first column of its rotation matrix, then the second, before Gram-Schmidt",
    "svd9d": "9 numbers a joint, a matrix row by row; its rotation is the one nearest to that",
    "quaternion": "4 numbers a joint, a quaternion (w, x, y, z) of any length",
    "axis_angle": "3 numbers a joint, axis times angle in radians",
}
"""What the head ``mlp`` gives, by its option ``rotation``."""
READS = {
    "token": "hidden state after the final norm, at the position before the pose token",
    "conversation": "hidden states after the final norm: at the position before the pose token, and at all up to it",
}


def rotation_of(head: HeadConfig) -> str:
    """The option ``rotation`` of the head ``mlp``, a key of ``OUTPUT``; "" for other heads."""
    return str(dict(head.options).get("rotation", "6d")) if head.name == "mlp" else ""


def describe_head(config: ModelConfig, pose_token: str) -> dict[str, Any]:
    """The description, from which a program in another framework can use the weights."""
    head, width = config.head, config.text.hidden_size
    made = abstract_head(head, width)
    given = head_output(head, width)
    layers = {}
    if isinstance(made, MLPHead) and head.name == "mlp":
        sizes = [width, width, made.fc2.kernel.shape[-1]]
        layers = {"layers": ["Linear", "ReLU", "Linear"], "sizes": sizes, "output": OUTPUT[rotation_of(head)]}
    fields = {name: getattr(given, name) for name in ("rotations", "betas", "translation")}
    return {
        "format": FORMAT,
        "version": 1,
        "name": head.name,
        "num_joints": made.num_joints,
        "options": dict(head.options),
        **layers,
        "reads": made.reads,
        "draws": made.draws,
        "gives": {name: list(array.shape[2:]) for name, array in fields.items() if array is not None},
        "input": READS[made.reads],
        "joints": "SMPL's order; joint 0 is the global orientation in the camera frame: x right, y down, z away",
        "pose_token": pose_token,
        "pose_token_id": config.pose_token_id,
    }


def layout(folder: Path, given: str | type[PoseHead] | None = None) -> Layout:
    """The layout of the head in ``folder``.

    given: the head as the user names it, if it is not part of this program. The folder may be a stranger's, so its description never imports code;
        see ``models.heads.trusted_head``.

    Raises UserError if the description is missing or has another format, or if the user has to name the head.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise UserError(f"{folder}: {WEIGHTS} without {DESCRIPTION}, which describes the head; copy that file too")
    data = read_json_object(file)
    if (data.get("format"), data.get("version")) != (FORMAT, 1):
        raise UserError(
            f"{file}: format {data.get('format')!r} in version {data.get('version')!r}; expected {FORMAT!r} in version 1; upgrade this program"
        )
    try:
        options = tuple((str(key), frozen(value)) for key, value in dict(data["options"]).items())
        head = HeadConfig(str(data["name"]), options)
    except Exception as error:
        raise UserError(f"{file}: not a description of a pose head ({type(error).__name__}: {error})") from None
    head = trusted_head(str(file), head, given if is_own(head.name) else None)
    try:
        paths = head_paths(head)
        if int(data["num_joints"]) != (found := abstract_head(head).num_joints):
            raise UserError(f"num_joints is {data['num_joints']}, but this head gives {found}")
    except Exception as error:  # a head may raise any error for its options
        raise UserError(f"{file}: not a description of a pose head ({type(error).__name__}: {error})") from None
    return Layout(
        name="pose_head",
        title="pose head on its own",
        family="pose_head",
        rules=rules(head, paths),
        ignored=(),
        settings=lambda config, shapes: {"head": head},
    )


def head_paths(head: HeadConfig) -> list[str]:
    """The leaves of a head, ``pose_head/…``."""
    # The names do not depend on the width.
    state = nnx.to_pure_dict(nnx.state(abstract_head(head)))
    return [f"pose_head/{path}" for path in by_path(state)]
