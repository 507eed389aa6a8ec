"""Pose heads, found by name. ``models.heads.base`` defines the interface; ``docs/extending.md`` has an example."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import traceback
from collections.abc import Callable, Iterator
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
    """Creates the head that ``config`` names, for hidden states of ``width``.

    Raises UserError for options that it does not have, for methods that cannot be called as ``PoseHead`` says, and for an exception in its
    constructor.
    """
    kind, options, where = head_class(config.name), dict(config.options), _where(config)
    takes = named.signature(where, kind.__init__)
    takes = takes.replace(parameters=[each for name, each in takes.parameters.items() if name != "rngs"])
    named.check_options(where, takes, options)
    _check_signature(where, kind, "__init__", 1, rngs=None, **options)
    _check_signature(where, kind, "__call__", 2)
    _check_signature(where, kind, "sample", 3)
    _check_signature(where, kind, "loss", 5)
    with _running(config, "__init__", f"width={width}"):
        return kind(width, rngs=rngs, **options)


def abstract_head(config: HeadConfig, width: int = WIDTH) -> PoseHead:
    """The head without weights, for its attributes (``num_joints``, ``reads``, ``draws``) and the names of its parameters."""
    return nnx.eval_shape(lambda: create_head(config, width, rngs=nnx.Rngs(0)))


def head_family(config: HeadConfig) -> Family:
    """The body family of the head's output. Data is converted to it."""
    return family_of(abstract_head(config).num_joints)


def head_output(config: HeadConfig, width: int = WIDTH) -> Any:
    """The output of a head as abstract shapes: a ``Pose``, if the head is correct. Raises UserError for an exception in its ``__call__``."""
    head = abstract_head(config, width)
    states, key = _input(head.reads, width)

    def hint() -> str:
        if head.reads != "token" or not _runs_on_conversation(head, width):
            return ""
        return "its reads is 'token', so states.conversation and states.before are None; set reads = 'conversation' in the class"

    with _running(config, "__call__", f"states.token float32 {states.token.shape}", hint):
        return nnx.eval_shape(lambda head, *given: head(*given), head, states, key)


def head_loss(config: HeadConfig, distance: Distance, width: int = WIDTH) -> Any:
    """The loss of a head as abstract shapes: scalars by name, unless the head is wrong. Raises UserError for an exception in its ``loss``."""
    head = abstract_head(config, width)
    states, key = _input(head.reads, width)
    target = Pose(
        _floats(*_BATCH, head.num_joints, 3, 3),
        "camera",
        betas=_floats(*_BATCH, 10),
        translation=_floats(*_BATCH, 3),
        measured=_flags(*_BATCH, head.num_joints),
        has_betas=_flags(*_BATCH),
        has_translation=_flags(*_BATCH),
    )
    with _running(
        config, "loss", f"states.token float32 {states.token.shape}, target.rotations {target.rotations.shape}"
    ):
        return nnx.eval_shape(
            lambda head, *given: head.loss(*given, distance), head, states, target, _flags(*_BATCH), key
        )


def check_head(config: HeadConfig, width: int) -> None:
    """Raises UserError unless a head returns poses of ``num_joints`` joints in the camera frame, its samples have the same fields, and its
    loss returns scalars with names that are not reserved. Nothing is computed: the methods run on abstract arrays.
    """
    where, head = _where(config), abstract_head(config, width)
    if head.reads not in ("token", "conversation") or head.num_joints not in JOINTS.values():
        raise UserError(
            f"{where} has reads={head.reads!r} and num_joints={head.num_joints!r}; expected 'token' or 'conversation', and one of "
            f"{', '.join(map(str, JOINTS.values()))}"
        )
    if (head.reads, head.draws) != (type(head).reads, type(head).draws):
        raise UserError(
            f"{where} sets reads or draws in its constructor; they belong to the class, and are looked up there"
        )
    made = head_output(config, width)
    _check_pose(f"{where} gives", made, _BATCH, head.num_joints)
    _check_sample(config, head, made, width)
    parts = head_loss(config, lambda *_: {"distance": jnp.zeros(())}, width)
    _check_parts(f"the loss of {where}", parts)


def _check_pose(gives: str, made: Any, batch: tuple[int, ...], joints: int) -> None:
    if not isinstance(made, Pose):
        raise UserError(f"{gives} {_words(made)}; expected a smpl_jax.pose.Pose in the camera frame")
    betas = tuple(getattr(made.betas, "shape", ()))
    count = betas[-1] if len(betas) == len(batch) + 1 else "n"
    for name, shape in (("rotations", (joints, 3, 3)), ("betas", (count,)), ("translation", (3,))):
        found, expected = getattr(made, name), f"float32 ({', '.join(map(str, batch + shape))})"
        if (found is not None or name == "rotations") and _brief(found) != expected:
            raise UserError(f"{gives} {name} {_brief(found)} for {_BATCH} pose tokens; expected {expected}")
    if made.frame != "camera":
        raise UserError(f"{gives} poses in the frame {made.frame!r}; expected 'camera'")


def _check_sample(config: HeadConfig, head: PoseHead, made: Pose, width: int) -> None:
    """Raises UserError unless ``sample`` gives what ``__call__`` gave, with one more axis in front."""
    states, key = _input(head.reads, width)
    with _running(config, "sample", f"states.token float32 {states.token.shape}, count={_COUNT}"):
        drawn = nnx.eval_shape(lambda head, *given: head.sample(*given, _COUNT), head, states, key)
    gives = f"{_where(config)}: sample(states, key, {_COUNT}) gives"
    _check_pose(gives, drawn, (_COUNT, *_BATCH), head.num_joints)
    for name in ("betas", "translation"):
        found, one = getattr(drawn, name), getattr(made, name)
        expected = None if one is None else _floats(_COUNT, *one.shape)
        if _brief(found) != _brief(expected):
            raise UserError(
                f"{gives} {name} {_brief(found)}; expected {_brief(expected)}, because __call__ gives {_brief(one)}"
            )


def _check_parts(where: str, parts: Any) -> None:
    if not isinstance(parts, dict):
        raise UserError(f"{where} is {_words(parts)}; expected a dict of scalars by name")
    for name, part in parts.items():
        if _shape(part) != ():
            raise UserError(f"{where} has the part {name!r}, which is {_words(part)}; expected a scalar, of shape ()")
        if name in RESERVED:
            raise UserError(
                f"{where} has a part {name!r}, the name of another metric; none may be called {', '.join(sorted(RESERVED))}"
            )


_BATCH = (2, 3)
_COUNT = 4
_CALLED = {
    "__init__": "self, width, *, rngs, **options",
    "__call__": "self, states, key",
    "sample": "self, states, key, count",
    "loss": "self, states, target, mask, key, distance",
}
"""How the methods of a head are called."""


def _check_signature(where: str, kind: type[PoseHead], name: str, count: int, **options: Any) -> None:
    """Raises UserError unless a method can be called with ``count`` arguments in order, and ``options`` by name."""
    method, expected = getattr(kind, name), f"expected def {name}({_CALLED[name]})"
    if name in ("__init__", "__call__") and method is getattr(PoseHead, name):
        raise UserError(f"{where} has no {name}; {expected}{_defined(kind)}")
    try:
        takes = inspect.signature(method)
    except (TypeError, ValueError):  # of a callable that Python cannot look into
        return
    try:
        takes.bind(None, *[None] * count, **options)
    except TypeError as error:
        bare = [each.replace(annotation=inspect.Parameter.empty) for each in takes.parameters.values()]
        plain = inspect.Signature(bare)
        raise UserError(f"{where} has {name}{plain}; {expected} ({error}){_defined(method)}") from error


@contextlib.contextmanager
def _running(config: HeadConfig, name: str, given: str, hint: Callable[[], str] = str) -> Iterator[None]:
    """Turns an exception in a method of the user's own head into one line, which names the method and the last line of the user's file.

    hint: gives what is wrong, or "" for the exception's own words.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = head_class(config.name)
        methods = [each for base in kind.__mro__ if issubclass(base, PoseHead) for each in vars(base).values()]
        files = {
            each.__code__.co_filename
            for each in methods
            if inspect.isfunction(each) and not each.__module__.startswith("chatpose_jax.")
        }
        lines = [
            f"{frame.f_code.co_filename}:{line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename in files
        ]
        place = f", {lines[-1]}" if lines else _defined(getattr(kind, name))
        where = f"{_where(config)}: {name} with {given}{place}"
        if "nnx.List" in str(error):  # Flax explains it in twenty lines
            what = "a list of layers must be an nnx.List([…]), and a dict of them an nnx.Dict"
            raise UserError(f"{where}: {what} ({type(error).__name__}: {str(error).split('. ')[0]})") from error
        if what := hint():
            raise UserError(f"{where}: {what}") from error
        raise named.raised(where, error) from error


def _runs_on_conversation(head: PoseHead, width: int) -> bool:
    try:
        nnx.eval_shape(lambda head, *given: head(*given), head, *_input("conversation", width))
    except Exception:
        return False
    return True


def _where(config: HeadConfig) -> str:
    return f"pose head {config.name!r}"


def _defined(thing: Any) -> str:
    """ ", file:line" of a class or function, or "" where Python does not know."""
    try:
        thing = inspect.unwrap(thing)
        return f", {inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError, ValueError):
        return ""


def _input(reads: str, width: int) -> tuple[States, Any]:
    """Abstract states of a small batch, and a key."""
    token, key = _floats(*_BATCH, width), jax.eval_shape(jax.random.key, 0)
    if reads == "token":
        return States(token), key
    return States(token, _floats(_BATCH[0], 5, width), _flags(*_BATCH, 5)), key


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _flags(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bool)


def _shape(array: Any) -> Any:
    return getattr(array, "shape", None)


def _words(value: Any) -> str:
    if value is None:
        return "nothing"
    shape = _shape(value)
    return (
        f"a {type(value).__name__}" if shape is None or isinstance(value, Pose) else f"an array {value.dtype} {shape}"
    )


def _brief(value: Any) -> str:
    return _words(value).removeprefix("an array ")
