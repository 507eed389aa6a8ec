"""Will it fit, and how fast could it be? The real step, compiled ahead of time for a machine that is not here."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from chatpose_jax import generate
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params, fake_batch
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import init_cache
from chatpose_jax.models.sharding import RULES, batch_sharding, make_mesh, on_mesh, place
from chatpose_jax.planning import collectives
from chatpose_jax.planning.flops import StepCost, decode_cost, train_cost
from chatpose_jax.planning.targets import CHIPS, EFFORT, GiB, Target, compiler_options, devices
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.step import abstract_state, make_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a step, in bytes a chip, and what follows from the chip's peaks, in seconds.

    peak: most bytes in use at once; None where the compiler gave up because it does not fit. error: its words then.
    sent: bytes that each chip sends in a step, by kind of collective.
    compute, memory, network: seconds that operations, memory traffic and collectives would take at the chip's peaks.
    seconds: the longest of the three, were all else hidden behind it. mfu: ``cost.useful`` over what the chips could do in that time.
    compile_seconds, compile_cpu_seconds: by the clock, and of all processors.
    """

    what: str
    target: str
    chips: int
    mesh: dict[str, int]
    batch: int
    length: int
    fits: bool
    error: str
    capacity: float | None
    arguments: float | None
    temporaries: float | None
    peak: float | None
    sent: dict[str, float]
    cost: StepCost
    compile_seconds: float
    compile_cpu_seconds: float
    compute: float | None = None
    memory: float | None = None
    network: float | None = None
    seconds: float | None = None
    mfu: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def mesh_sizes(target: Target, model: ModelConfig, batch: int, *, decode: bool = False) -> tuple[int, int, int]:
    """(data, fsdp, tensor) that suits a target. Training: fsdp as far as rows go round, then tensor. Decoding, which reads all weights for each
    token: tensor as far as heads go round, then data.
    """
    if decode:
        tensor = math.gcd(target.chips, model.text.num_kv_heads)
        return target.chips // tensor, 1, tensor
    fsdp = math.gcd(target.chips, batch)
    return 1, fsdp, target.chips // fsdp


def plan_training(
    model: ModelConfig,
    train: TrainConfig,
    target: Target,
    mesh: tuple[int, int, int],
    length: int,
    images: int = 1,
    *,
    effort: float = EFFORT,
) -> Plan:
    """A training step of ``train.batch_size × train.accumulate`` rows of ``length`` tokens, of which pictures take their share.
    effort: see ``compiler_options``.

    Raises UserError for rows or heads that the mesh cannot divide, and for a target whose compiler is not installed.
    """
    model = _without_cudnn(model, target)
    patches = model.vision.num_patches * images
    if length < patches + 8:
        raise UserError(
            f"a row of {length} tokens has no place for {images} picture(s) of {patches} tokens and a conversation"
        )
    where = _mesh(target, mesh, train.batch_size)
    params = abstract_params(model)
    state, frozen = abstract_state(train, params, where)
    stacked = train.accumulate > 1
    leading = (train.accumulate, train.batch_size) if stacked else (train.batch_size,)
    rows = batch_sharding(where, stacked=stacked)
    batch = {
        name: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype, sharding=rows)
        for name, x in fake_batch(model, 1, length - patches, images).items()
    }
    step: Any = make_step(model, train, params, where)
    total = train.batch_size * train.accumulate
    cost = train_cost(model, train, total, length, images)
    return _compile("train", step, (state, frozen, batch), target, where, total, length, cost, effort)


def plan_decoding(
    model: ModelConfig,
    target: Target,
    mesh: tuple[int, int, int],
    batch: int,
    length: int,
    *,
    effort: float = EFFORT,
) -> Plan:
    """One step of the decode loop: a token for each of ``batch`` conversations whose cache holds ``length`` tokens."""
    where = _mesh(target, mesh, batch)
    params = place(abstract_params(model), where)
    cache = jax.eval_shape(lambda: init_cache(model, batch, length))

    def put(x: Any, *logical: Any) -> Any:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(where, RULES.spec(logical, x.shape, where))
        )

    heads = ("batch", "heads", None, None)
    cache = dataclasses.replace(
        cache,
        keys=jax.tree.map(lambda x: put(x, *heads), cache.keys),
        values=jax.tree.map(lambda x: put(x, *heads), cache.values),
        valid=put(cache.valid, "batch", None),
        cursor=put(cache.cursor),
    )
    new = 64  # answers of so many tokens: only their ids and states depend on it
    width = model.text.hidden_size

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        rows = ("batch", *(None,) * (len(shape) - 1)) if shape else ()
        return put(jax.ShapeDtypeStruct(shape, dtype), *rows)

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = generate.DecodeState(
        cache=cache,
        key=put(key),
        token=array((batch,), jnp.int32),
        tokens=array((batch, new), jnp.int32),
        hidden=array((batch, new, width), jnp.float32),
        step=array((), jnp.int32),
        done=array((batch,), bool),
        lengths=array((batch,), jnp.int32),
        has_pose=array((batch,), bool),
        forced=array((batch,), jnp.int32),
        finite=array((batch,), bool),
    )
    settings = {
        "temperature": array((), jnp.float32),
        "top_p": array((), jnp.float32),
        "force_pose": array((), bool),
        "tail": put(jax.ShapeDtypeStruct((2,), jnp.int32), None),
    }

    def decode(params: Any, state: Any, until: Any, settings: Any) -> Any:
        with on_mesh(where):
            loop: Any = generate.decode
            return loop.__wrapped__(model, params, state, until, settings, greedy=True)

    step = jax.jit(decode, donate_argnums=1)
    arguments = (params, state, array((), jnp.int32), settings)
    return _compile("decode", step, arguments, target, where, batch, length, decode_cost(model, batch, length), effort)


def _without_cudnn(model: ModelConfig, target: Target) -> ModelConfig:
    """cuDNN's attention is built by cuDNN on the card itself: elsewhere plain attention stands in, which takes more memory."""
    return model.replace(attention="xla") if target.chip is not None and target.chip.platform == "gpu" else model


def _mesh(target: Target, sizes: tuple[int, int, int], batch: int) -> Mesh:
    mesh = make_mesh(*sizes, devices=devices(target))
    ways = math.prod(mesh.shape[axis] for axis in RULES.axes("batch", mesh))
    if batch % ways:
        raise UserError(f"{batch} rows do not divide among data × fsdp = {ways}: change --batch or --mesh")
    return mesh


def _compile(
    what: str,
    step: Any,
    arguments: Any,
    target: Target,
    mesh: Mesh,
    batch: int,
    length: int,
    cost: StepCost,
    effort: float,
) -> Plan:
    chip, error, compiled = target.chip, "", None
    begin, busy = time.perf_counter(), time.process_time()
    try:
        lowered = step.trace(*arguments).lower(lowering_platforms=(_platform(mesh),))
        compiled = lowered.compile(compiler_options=compiler_options(target, effort))
    except jax.errors.JaxRuntimeError as problem:
        error = " ".join(str(problem).split())
        if "RESOURCE_EXHAUSTED" not in error:
            raise UserError(f"the compiler for {target.name} failed: {error[:500]}") from problem
    taken, busy = time.perf_counter() - begin, time.process_time() - busy
    capacity = None if chip is None else chip.memory
    memory = None if compiled is None else compiled.memory_analysis()
    peak = None if memory is None else float(memory.peak_memory_in_bytes)
    fits = peak is not None and (capacity is None or peak <= capacity)
    sent = {} if compiled is None else collectives.count(compiled.as_text())
    times = _roofline(cost, target, mesh, sent) if compiled is not None else {}
    return Plan(
        what=what,
        target=target.name,
        chips=target.chips,
        mesh=dict(mesh.shape),
        batch=batch,
        length=length,
        fits=fits,
        error=error if compiled is None else "",
        capacity=capacity,
        arguments=None if memory is None else float(memory.argument_size_in_bytes),
        temporaries=None if memory is None else float(memory.temp_size_in_bytes),
        peak=peak,
        sent=sent,
        cost=cost,
        compile_seconds=taken,
        compile_cpu_seconds=busy,
        **times,
    )


def _roofline(cost: StepCost, target: Target, mesh: Mesh, sent: dict[str, float]) -> dict[str, float]:
    """Seconds at the chip's peaks, and the share of its operations that are useful then."""
    chip = target.chip
    if chip is None:
        return {}
    # Weights split by fsdp are gathered: written once more before they are read.
    times = 2 if mesh.shape["fsdp"] > 1 else 1
    traffic = (
        cost.passes * times * cost.weights / mesh.shape["tensor"] + (cost.activations + cost.optimizer) / target.chips
    )
    compute = cost.hardware / target.chips / chip.flops
    memory, network = traffic / chip.bandwidth, sum(sent.values()) / chip.network
    seconds = max(compute, memory, network)
    mfu = cost.useful / (target.chips * chip.flops * seconds)
    return {"compute": compute, "memory": memory, "network": network, "seconds": seconds, "mfu": mfu}


def _platform(mesh: Mesh) -> str:
    name = mesh.devices.flat[0].platform
    return {"gpu": "cuda"}.get(name, name)


def describe(plan: Plan) -> str:
    """The plan in words, for people."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    kind = "a training step" if plan.what == "train" else "a decoded token"
    lines = [f"{kind} of {plan.batch} rows × {plan.length} tokens on {plan.target} ({plan.chips} chips: {mesh})"]
    if plan.peak is None:
        needed = re.search(r"Used ([\d.]+\w+) of|\(([\d.]+\w)\) exceeds", plan.error)
        lines.append(
            "does not fit: " + (plan.error[:300] if needed is None else f"needs {next(filter(None, needed.groups()))}")
        )
        return "\n".join(lines)
    assert plan.arguments is not None and plan.temporaries is not None
    room = (
        "" if plan.capacity is None else f" of {plan.capacity / GiB:.2f} GiB" + ("" if plan.fits else ": DOES NOT FIT")
    )
    lines += [
        f"arguments:       {plan.arguments / GiB:8.2f} GiB",
        f"temporaries:     {plan.temporaries / GiB:8.2f} GiB",
        f"peak per chip:   {plan.peak / GiB:8.2f} GiB{room}",
        f"operations:      {plan.cost.useful:.3g} useful, {plan.cost.hardware:.3g} executed; {plan.cost.six_n:.3g} if counted as 6N",
        f"sent per chip:   {sum(plan.sent.values()) / GiB:8.2f} GiB"
        + "".join(f"  {name} {size / GiB:.2f}" for name, size in sorted(plan.sent.items())),
    ]
    if plan.seconds is not None:
        rate = plan.batch * (plan.length if plan.what == "train" else 1) / plan.seconds
        lines += [
            f"at the chips' peaks: compute {plan.compute:.4f} s, memory {plan.memory:.4f} s, network {plan.network:.4f} s",
            f"roofline:        {plan.seconds:.4f} s, {rate:,.0f} tokens/s, MFU at most {100 * (plan.mfu or 0):.0f} %",
        ]
    chip = CHIPS.get(plan.target.partition(":")[0])
    if plan.what == "train" and chip is not None and chip.platform == "gpu":
        lines.append("attention is plain XLA here, for cuDNN's needs the card: the real run takes less memory")
    lines.append(f"compiled in      {plan.compile_seconds:.1f} s ({plan.compile_cpu_seconds:.0f} s of processor time)")
    return "\n".join(lines)
