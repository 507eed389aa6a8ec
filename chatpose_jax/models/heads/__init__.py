"""Pose heads, found by name. ``models.heads.base`` defines the interface; ``docs/extending.md`` has an example."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from chatpose_jax import named
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import HeadConfig
from chatpose_jax.models.heads.base import Distance, PoseHead, States
from chatpose_jax.settings import did_you_mean
from smpl_jax.pose import JOINTS, Family, Pose, family_of

HEADS: dict[str, str] = {
    "mlp": "chatpose_jax.models.heads.mlp:MLPHead",
    "shape": "chatpose_jax.models.heads.shape:ShapeHead",
    "queries": "chatpose_jax.models.heads.queries:QueriesHead",
    "flow": "chatpose_jax.models.heads.flow:FlowHead",
    "gaussian": "chatpose_jax.models.heads.gaussian:GaussianHead",
}
"""Name, as in ``model.head.name``, to "module:Class". A module is imported only when its head is used."""
RESERVED = {"loss", "text", "token_accuracy", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"}
"""Names of the other metrics of a step. No part of a head's loss may use them."""
GROUP = "chatpose_jax.heads"
"""The group of entry points through which an installed package offers heads."""
_GIVEN: dict[str, type[PoseHead]] = {}
"""Classes that were passed as objects, by the name that they have in a configuration."""
WIDTH = 1024
"""Width of hidden states where only names and output shapes of a head are needed. It divides LLaMA's widths, which a user's own head may need."""


def head_class(name: str) -> type[PoseHead]:
    """The class of a head. Its name is in ``HEADS``, or is an entry point of an installed package, or is ``package.module:Class``, which is imported.

    Raises UserError if there is no such class, it cannot be imported, or it is not a PoseHead. A name from a file must go through
    ``trusted_head`` first.
    """
    where = f"pose head {name!r}"
    known = HEADS if name in HEADS or ":" in name else {**_offered(), **HEADS}
    if name not in known and ":" not in name:
        raise UserError(
            f"no {where}{did_you_mean(name, known)}; the heads are {', '.join(sorted(known))}, or package.module:Class of your own "
            "(model.head.name)"
        )
    found = _GIVEN.get(name) or named.find(where, name, known)
    if not (isinstance(found, type) and issubclass(found, PoseHead)):
        raise UserError(f"{where}: expected a class derived from {PoseHead.__module__}.PoseHead, found {found!r:.100}")
    return found


@functools.cache
def _offered() -> dict[str, str]:
    """The entry points of ``GROUP``: name to "module:Class"."""
    offered: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if offered.setdefault(point.name, point.value) != point.value:
            raise UserError(
                f"two installed packages offer a pose head {point.name!r}, {offered[point.name]} and {point.value}: uninstall one"
            )
    return offered


def is_own(name: str) -> bool:
    """Whether a head is neither in this package nor an entry point of an installed package."""
    return name not in HEADS and name not in _offered()


def trusted_head(where: str, head: HeadConfig, given: str | type[PoseHead] | None = None) -> HeadConfig:
    """Checks the head that a file names, before anything is imported: the file may come from a stranger.

    Args:
        where: the start of error messages, such as the file.
        head: the head that the file names.
        given: the head that the user names, "package.module:Class" or the class. It replaces the name in the file, because classes may move.

    Raises UserError if the file needs a user's own head that the user did not name, and if the user names one but the file needs none.
    """
    if given is None:
        if is_own(head.name):
            raise UserError(
                f"{where}: its pose head {head.name!r} is not part of this program, and a file alone never imports code. If you trust that code, "
                f"name its class: --head {head.name if ':' in head.name else 'package.module:Class'}, or load(…, head=…)"
            )
        return head
    name = given if isinstance(given, str) else f"{given.__module__}:{given.__qualname__}"
    if not isinstance(given, str):
        _GIVEN[name] = given
    if not is_own(head.name) and name != head.name:
        raise UserError(
            f"{where}: its pose head is {head.name!r}, which needs no --head; --head {name} names another one"
        )
    return dataclasses.replace(head, name=name)


def create_head(config: HeadConfig, width: int, *, rngs: nnx.Rngs) -> PoseHead:
    """Creates the head that ``config`` names, for hidden states of ``width``. Raises UserError for options that it does not have."""
    kind, options, where = head_class(config.name), dict(config.options), f"pose head {config.name!r}"
    takes = named.signature(where, kind.__init__)
    takes = takes.replace(parameters=[each for name, each in takes.parameters.items() if name != "rngs"])
    named.check_options(where, takes, options)
    try:
        return kind(width, rngs=rngs, **options)
    except TypeError as error:
        raise UserError(f"{where} cannot be created as (width, *, rngs, **options) with {options}: {error}") from error


def abstract_head(config: HeadConfig, width: int = WIDTH) -> PoseHead:
    """The head without weights, for its attributes (``num_joints``, ``reads``, ``draws``) and the names of its parameters."""
    return nnx.eval_shape(lambda: create_head(config, width, rngs=nnx.Rngs(0)))


def head_family(config: HeadConfig) -> Family:
    """The body family of the head's output. Data is converted to it."""
    return family_of(abstract_head(config).num_joints)


def head_output(head: PoseHead, width: int = WIDTH) -> Any:
    """The output of a head (abstract or not) as abstract shapes: a ``Pose``, if the head is correct."""
    return nnx.eval_shape(lambda head, *given: head(*given), head, *_input(head, width))


def head_loss(head: PoseHead, distance: Distance, width: int = WIDTH) -> Any:
    """The loss of a head, which may be abstract, as abstract shapes: scalars by name, unless the head is wrong."""
    states, key = _input(head, width)
    target = Pose(
        _floats(*_BATCH, head.num_joints, 3, 3),
        "camera",
        betas=_floats(*_BATCH, 10),
        translation=_floats(*_BATCH, 3),
        measured=_flags(*_BATCH, head.num_joints),
        has_betas=_flags(*_BATCH),
        has_translation=_flags(*_BATCH),
    )
    return nnx.eval_shape(lambda head, *given: head.loss(*given, distance), head, states, target, _flags(*_BATCH), key)


def check_head(head: PoseHead, config: HeadConfig, width: int) -> None:
    """Raises UserError unless a head (abstract or not) returns poses of ``num_joints`` joints in the camera frame, and its loss returns
    scalars with names that are not reserved.
    """
    where = f"pose head {config.name!r}"
    if head.reads not in ("token", "conversation") or head.num_joints not in JOINTS.values():
        raise UserError(
            f"{where} has reads={head.reads!r} and num_joints={head.num_joints!r}; expected 'token' or 'conversation', and one of "
            f"{', '.join(map(str, JOINTS.values()))}"
        )
    if (head.reads, head.draws) != (type(head).reads, type(head).draws):
        raise UserError(
            f"{where} sets reads or draws in its constructor; they belong to the class, and are looked up there"
        )
    made, batch = head_output(head, width), _BATCH
    rotations = _floats(*batch, head.num_joints, 3, 3)
    if not isinstance(made, Pose):
        raise UserError(f"{where} gives {type(made).__name__}; expected a smpl_jax.pose.Pose in the camera frame")
    betas = getattr(made.betas, "shape", (0,))[-1:]
    for name, expected in (
        ("rotations", rotations),
        ("betas", None if made.betas is None else _floats(*batch, *betas)),
        ("translation", None if made.translation is None else _floats(*batch, 3)),
    ):
        found = getattr(made, name)
        if (_shape(found), _dtype(found)) != (_shape(expected), _dtype(expected)):
            raise UserError(
                f"{where} gives {name} {_dtype(found)} {_shape(found)} for {batch} pose tokens; expected {_dtype(expected)} {_shape(expected)}"
            )
    if made.frame != "camera":
        raise UserError(f"{where} gives poses in the frame {made.frame!r}; expected 'camera'")
    parts = head_loss(head, lambda *_: {"distance": jnp.zeros(())}, width)
    if not isinstance(parts, dict) or any(_shape(part) != () for part in parts.values()) or RESERVED & parts.keys():
        raise UserError(
            f"the loss of {where} is {parts}; expected a dict of scalars, none called {', '.join(sorted(RESERVED))}"
        )


_BATCH = (2, 3)


def _input(head: PoseHead, width: int) -> tuple[States, Any]:
    """Abstract states of a small batch, and a key."""
    token, key = _floats(*_BATCH, width), jax.eval_shape(jax.random.key, 0)
    if head.reads == "token":
        return States(token), key
    return States(token, _floats(_BATCH[0], 5, width), _flags(*_BATCH, 5)), key


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool)


def _shape(array: Any) -> Any:
    return getattr(array, "shape", type(array).__name__)


def _dtype(array: Any) -> Any:
    return getattr(array, "dtype", "")
