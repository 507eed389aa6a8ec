"""Pose heads, found by name: ``models.heads.base`` says what one is, ``docs/extending.md`` shows one."""

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
"""Name, as in ``model.head.name``, to "module:Class". A module is imported when its head is asked for."""
RESERVED = {"loss", "text", "token_accuracy", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"}
"""Names of the other metrics of a step, which no part of a head's loss may have."""
GROUP = "chatpose_jax.heads"
"""Entry points by which a package that is installed offers heads."""
_GIVEN: dict[str, type[PoseHead]] = {}
"""Classes that were handed over instead of named, by the name that they have in a configuration."""
WIDTH = 1024
"""Of hidden states where only a head's names and outputs are asked for: it divides LLaMA's widths, as a head of one's own may need."""


def head_class(name: str) -> type[PoseHead]:
    """The class of a head: a name of ``HEADS`` or of an installed package's entry point, or ``package.module:Class``, which is imported.

    Raises UserError where there is none, it cannot be imported, or it is no PoseHead. A name that stands in a file goes through
    ``trusted_head`` first.
    """
    where = f"pose head {name!r}"
    known = HEADS if name in HEADS or ":" in name else {**_offered(), **HEADS}
    if name not in known and ":" not in name:
        raise UserError(
            f"no {where}{did_you_mean(name, known)}; the heads are {', '.join(sorted(known))}, and package.module:Class of your own "
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
    """Whether a head is neither of this program nor of an installed package's entry points."""
    return name not in HEADS and name not in _offered()


def trusted_head(where: str, head: HeadConfig, given: str | type[PoseHead] | None = None) -> HeadConfig:
    """The head that a file names, checked before anything is imported: the file may be a stranger's.

    Args:
        where: what errors begin with, such as the file.
        head: as the file has it.
        given: the head as the user names it, "package.module:Class" or the class; takes the place of the file's name, for classes move.

    Raises UserError for a head of one's own that the user did not name, and where the user names one but the file does not need it.
    """
    if given is None:
        if is_own(head.name):
            raise UserError(
                f"{where}: its pose head {head.name!r} is not part of this program, and no file makes it import code. If you trust that code, "
                f"name its class: --head {head.name if ':' in head.name else 'package.module:Class'}, or load(…, head=…)"
            )
        return head
    name = given if isinstance(given, str) else f"{given.__module__}:{given.__qualname__}"
    if not isinstance(given, str):
        _GIVEN[name] = given
    if not is_own(head.name) and name != head.name:
        raise UserError(
            f"{where}: its pose head is {head.name!r}, which is found by that name; --head {name} is another's"
        )
    return dataclasses.replace(head, name=name)


def create_head(config: HeadConfig, width: int, *, rngs: nnx.Rngs) -> PoseHead:
    """The head that ``config`` names, for hidden states of ``width``. Raises UserError for options that it does not take."""
    kind, options, where = head_class(config.name), dict(config.options), f"pose head {config.name!r}"
    takes = named.signature(where, kind.__init__)
    takes = takes.replace(parameters=[each for name, each in takes.parameters.items() if name != "rngs"])
    named.check_options(where, takes, options)
    try:
        return kind(width, rngs=rngs, **options)
    except TypeError as error:
        raise UserError(f"{where} cannot be made as (width, *, rngs, **options) with {options}: {error}") from error


def abstract_head(config: HeadConfig, width: int = WIDTH) -> PoseHead:
    """The head without weights: for what it says of itself (``num_joints``, ``reads``, ``draws``) and the names of its parameters."""
    return nnx.eval_shape(lambda: create_head(config, width, rngs=nnx.Rngs(0)))


def head_family(config: HeadConfig) -> Family:
    """The body family whose joints the head gives: what data is turned into for it."""
    return family_of(abstract_head(config).num_joints)


def head_output(head: PoseHead, width: int = WIDTH) -> Any:
    """What a head, which may be abstract, gives, as abstract shapes: a ``Pose``, unless the head is wrong."""
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
    """Raises UserError where a head, which may be abstract, gives anything but poses of its ``num_joints`` in the camera frame, or its
    loss anything but scalars by names that are free.
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
