"""Pose heads, found by name: ``models.heads.base`` says what one is, ``docs/extending.md`` shows one."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads.base import PoseHead, States
from smpl_jax.pose import JOINTS, Pose

HEADS: dict[str, str] = {
    "mlp": "chatpose_jax.models.heads.mlp:MLPHead",
}
"""Name, as in ``model.head.name``, to "module:Class". A module is imported when its head is asked for."""
RESERVED = {"loss", "text", "token_accuracy"}
"""Names of the rest of the loss, which no part of a head's may have."""


def head_class(name: str) -> type[PoseHead]:
    """The class that ``model.head.name`` names; UserError lists the names that there are."""
    if name not in HEADS:
        raise UserError(f"no pose head {name!r}; the heads are {', '.join(sorted(HEADS))} (model.head.name)")
    module, _, attribute = HEADS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def create_head(config: HeadConfig, width: int, *, rngs: nnx.Rngs) -> PoseHead:
    """The head that ``config.name`` names, for hidden states of ``width``; UserError lists the known names or options."""
    kind, options = head_class(config.name), dict(config.options)
    try:
        return kind(width, rngs=rngs, **options)
    except TypeError as error:
        keywords = [p.name for p in inspect.signature(kind.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known = ", ".join(name for name in keywords if name != "rngs") or "none"
        raise UserError(
            f"pose head {config.name!r} refuses its options {options}: {error}; it knows {known} (model.head.options)"
        ) from error


def abstract_head(config: HeadConfig, width: int = 8) -> PoseHead:
    """The head without weights: for what it says of itself (``num_joints``, ``reads``, ``draws``) and the names of its parameters."""
    return nnx.eval_shape(lambda: create_head(config, width, rngs=nnx.Rngs(0)))


def check_head(head: PoseHead, config: HeadConfig, width: int) -> None:
    """Raises UserError where a head, which may be abstract, gives anything but poses of its ``num_joints`` in the camera frame, or its
    loss anything but scalars by names that are free.
    """
    where = f"pose head {config.name!r}"
    if head.reads not in ("token", "conversation") or head.num_joints not in JOINTS.values():
        raise UserError(
            f"{where} has reads={head.reads!r} and num_joints={head.num_joints!r}; expected 'token' or 'conversation', and one of "
            f"{', '.join(map(str, JOINTS.values()))}"
        )
    batch, length = (2, 3), 5

    def floats(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def flags(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bool)

    whole = head.reads == "conversation"
    states = States(
        floats(*batch, width),
        floats(batch[0], length, width) if whole else None,
        flags(*batch, length) if whole else None,
    )
    key = jax.eval_shape(jax.random.key, 0)
    made = nnx.eval_shape(lambda head, *given: head(*given), head, states, key)
    rotations = floats(*batch, head.num_joints, 3, 3)
    if not isinstance(made, Pose):
        raise UserError(f"{where} gives {type(made).__name__}; expected a smpl_jax.pose.Pose in the camera frame")
    betas = getattr(made.betas, "shape", (0,))[-1:]
    for name, expected in (
        ("rotations", rotations),
        ("betas", None if made.betas is None else floats(*batch, *betas)),
        ("translation", None if made.translation is None else floats(*batch, 3)),
    ):
        found = getattr(made, name)
        if (_shape(found), _dtype(found)) != (_shape(expected), _dtype(expected)):
            raise UserError(
                f"{where} gives {name} {_dtype(found)} {_shape(found)} for {batch} pose tokens; expected {_dtype(expected)} {_shape(expected)}"
            )
    if made.frame != "camera":
        raise UserError(f"{where} gives poses in the frame {made.frame!r}; expected 'camera'")
    target = Pose(
        rotations,
        "camera",
        betas=floats(*batch, 10),
        translation=floats(*batch, 3),
        measured=flags(*batch, head.num_joints),
        has_betas=flags(*batch),
        has_translation=flags(*batch),
    )
    parts = nnx.eval_shape(
        lambda head, *given: head.loss(*given, lambda *_: {"distance": jnp.zeros(())}),
        head,
        states,
        target,
        flags(*batch),
        key,
    )
    if not isinstance(parts, dict) or any(_shape(part) != () for part in parts.values()) or RESERVED & parts.keys():
        raise UserError(
            f"the loss of {where} is {parts}; expected a dict of scalars, none called {', '.join(sorted(RESERVED))}"
        )


def _shape(array: Any) -> Any:
    return getattr(array, "shape", type(array).__name__)


def _dtype(array: Any) -> Any:
    return getattr(array, "dtype", "")
