"""``chatpose plan``: whether a step fits a machine, and how fast it could be. The real step is compiled ahead of time; the machine is not needed."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from chatpose_jax import generate
from chatpose_jax.errors import UserError
from chatpose_jax.models.chatpose import abstract_params, fake_batch
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.decoder import init_cache
from chatpose_jax.models.sharding import RULES, batch_sharding, make_mesh, place
from chatpose_jax.planning import collectives
from chatpose_jax.planning.targets import EFFICIENCY, EFFORT, Target, compiler_options, devices
from chatpose_jax.train.chips import CHIPS
from chatpose_jax.train.config import TrainConfig
from chatpose_jax.train.flops import StepCost, decode_cost, train_cost
from chatpose_jax.train.layout import at_run_time, lay_out
from chatpose_jax.train.step import abstract_state, make_step

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiler reports about a step, in bytes for each chip, and times derived from the chip's peaks, in seconds.

    peak: most bytes in use at once; None where compilation failed because the step does not fit, and then ``error`` is the compiler's message.
    sent: bytes that each chip sends inside its slice in a step, by kind of collective. across: those that it sends to other slices.
    crossings: number of collectives that cross slices.
    compute, memory, network, between: time of the operations, of the memory traffic, of the collectives inside a slice and of those between slices
        at the chip's peaks.
    seconds: the longest of these four, as if the others overlapped with it. mfu: ``cost.useful`` / (peak operations in that time).
    forecast: the expected time, at ``targets.EFFICIENCY`` instead of the peaks.
    options: description of the compiler options; "" where there are none.
    compile_seconds, compile_cpu_seconds: wall-clock time and processor time of the compilation.
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
    forecast: float | None = None
    slices: int = 1
    across: dict[str, float] = dataclasses.field(default_factory=dict)
    crossings: float = 0.0
    between: float | None = None
    options: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def mesh_sizes(target: Target, model: ModelConfig, batch: int, *, decode: bool = False) -> tuple[int, int, int]:
    """A mesh (data, fsdp, tensor) for each slice of a target. Training: the largest fsdp that divides the slice's rows, the rest tensor. Decoding
    reads all weights for each token, so: the largest tensor that divides the heads, the rest data.
    """
    chips = target.chips // target.slices
    if decode:
        tensor = math.gcd(chips, model.text.num_kv_heads)
        return chips // tensor, 1, tensor
    fsdp = math.gcd(chips, batch // target.slices)
    return 1, fsdp, chips // fsdp


def plan_training(
    model: ModelConfig,
    train: TrainConfig,
    target: Target,
    mesh: tuple[int, int, int],
    length: int,
    images: int = 1,
    *,
    effort: float = EFFORT,
) -> StepPlan:
    """Plan a training step of ``train.batch_size × train.accumulate`` rows of ``length`` tokens, image tokens included.

    effort: see ``compiler_options``. Raises UserError where the mesh does not divide rows or heads, and where the target's compiler is not
    installed.
    """
    model = _without_cudnn(model, target)
    patches = model.image_tokens * images
    if length < patches + 8:
        raise UserError(
            f"a row of {length} tokens has no place for {images} image(s) of {patches} tokens and a conversation"
        )
    where = make_mesh(*mesh, slices=target.slices, devices=devices(target))
    ways = math.prod(where.shape[axis] for axis in RULES.axes("batch", where))
    if train.batch_size % ways:
        raise UserError(
            f"{train.batch_size} rows do not divide among slices × data × fsdp = {ways}: change --batch or --mesh"
        )
    params = abstract_params(model)
    state, frozen = abstract_state(train, params, where)
    model = at_run_time(model, train, where)
    frozen = place(jax.eval_shape(lambda frozen: lay_out(frozen, model), frozen), where)
    stacked = train.accumulate > 1
    leading = (train.accumulate, train.batch_size) if stacked else (train.batch_size,)
    rows = batch_sharding(where, stacked=stacked)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*leading, *x.shape[1:]), x.dtype, sharding=rows),
        fake_batch(model, 1, length - patches, images),
    )
    step: Any = make_step(model, train, params, where)
    total = train.batch_size * train.accumulate
    cost = train_cost(model, train, total, length, images)
    return _compile("train", lambda: step.trace(state, frozen, batch), target, where, total, length, cost, effort)


def plan_decoding(
    model: ModelConfig,
    target: Target,
    mesh: tuple[int, int, int],
    batch: int,
    length: int,
    *,
    effort: float = EFFORT,
) -> StepPlan:
    """Plan one step of the decode loop: a token for each of ``batch`` conversations whose cache holds ``length`` tokens."""
    where = make_mesh(*mesh, slices=target.slices, devices=devices(target))
    cost = decode_cost(model, batch, length)
    return _compile(
        "decode", lambda: trace_decoding(model, where, batch, length), target, where, batch, length, cost, effort
    )


def trace_decoding(model: ModelConfig, mesh: Mesh, batch: int, length: int, tail: int = 1) -> Any:
    """``generate.decode`` of a model that was loaded over ``mesh``, traced as answers call it: layers unrolled, the cache sharded.

    tail: tokens that end a forced answer.
    """
    model = model.replace(scan_layers=False)
    params = place(abstract_params(model), mesh)

    def start() -> generate.DecodeState:
        rows = generate.begin([0] * batch, [generate.Sampling()] * batch, [1] * batch, [False] * batch)
        return generate.DecodeState(init_cache(model, batch, length), rows)

    state = jax.eval_shape(start)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        generate.decode_shardings(state, mesh),
    )
    one, ids = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((tail,), jnp.int32)
    return generate.decode.trace(model, params, state, one, ids, greedy=True, mesh=mesh)


def _without_cudnn(model: ModelConfig, target: Target) -> ModelConfig:
    """The configuration with portable attention for GPU targets: cuDNN's can only be compiled on the card. It takes more memory than cuDNN's."""
    return model.replace(attention="xla") if target.chip is not None and target.chip.platform == "gpu" else model


def _compile(
    what: str,
    trace: Callable[[], Any],
    target: Target,
    mesh: Mesh,
    batch: int,
    length: int,
    cost: StepCost,
    effort: float,
) -> StepPlan:
    chip, error, compiled = target.chip, "", None
    options, words = compiler_options(target, effort)
    begin, busy = time.perf_counter(), time.process_time()
    try:
        lowered = trace().lower(lowering_platforms=(_platform(mesh),))
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as problem:
        error = " ".join(str(problem).split())
        if "RESOURCE_EXHAUSTED" not in error:
            raise UserError(f"the compiler for {target.name} failed: {error[:500]}") from problem
    taken, busy = time.perf_counter() - begin, time.process_time() - busy
    capacity = None if chip is None else chip.memory
    memory = None if compiled is None else compiled.memory_analysis()
    peak = None if memory is None else float(memory.peak_memory_in_bytes)
    fits = peak is not None and (capacity is None or peak <= capacity)
    text = "" if compiled is None else compiled.as_text()
    apart = target.chips // target.slices if target.slices > 1 else 0
    sent, across = collectives.count(text, apart), collectives.across(text, apart)
    numbers = collectives.number(text, apart)
    times = _roofline(what, cost, target, mesh, batch, sent, across, numbers) if text else {}
    return StepPlan(
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
        slices=target.slices,
        across=across,
        crossings=numbers[1],
        cost=cost,
        compile_seconds=taken,
        compile_cpu_seconds=busy,
        options=words,
        **times,
    )


def _roofline(
    what: str,
    cost: StepCost,
    target: Target,
    mesh: Mesh,
    batch: int,
    sent: Mapping[str, float],
    across: Mapping[str, float],
    numbers: tuple[float, float],
) -> dict[str, float]:
    """Times at the chip's peaks, MFU, and the expected time. numbers: of collectives inside a slice, and across slices."""
    chip = target.chip
    if chip is None:
        return {}
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    # Rows that the mesh does not divide are computed by every data-parallel copy.
    copies = target.chips // (fsdp * tensor)
    rows = copies * fsdp if batch % (copies * fsdp) == 0 else 1
    if (
        what == "decode"
    ):  # weights stay sharded: each chip reads its shard, and the part of the cache of its rows and heads
        copies = 1 if rows > 1 else copies
        traffic = cost.weights / (fsdp * tensor) + cost.activations / (rows * tensor)
    else:  # fsdp: each all-gathered weight is written once more before it is read
        copies = 1
        traffic = cost.passes * (2 if fsdp > 1 else 1) * cost.weights / tensor
        traffic += cost.activations / target.chips + cost.optimizer / (fsdp * tensor)
    compute = cost.hardware * copies / target.chips / chip.flops
    memory, network = traffic / chip.bandwidth, sum(sent.values()) / chip.network
    between = sum(across.values()) / chip.between if chip.between else 0.0
    seconds = max(compute, memory, network, between)
    real = EFFICIENCY
    return {
        "compute": compute,
        "memory": memory,
        "network": network,
        "between": between,
        "seconds": seconds,
        "mfu": cost.useful / (target.chips * chip.flops * seconds),
        "forecast": max(compute / real.products, memory / real.memory, max(network, between) / real.network)
        + numbers[0] * real.wait
        + numbers[1] * real.wait_between,
    }


def _platform(mesh: Mesh) -> str:
    name = mesh.devices.flat[0].platform
    return {"gpu": "cuda"}.get(name, name)


def describe_plan(plan: StepPlan) -> str:
    """The plan as text for people."""
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    kind = "a training step" if plan.what == "train" else "a decoded token"
    lines = [
        f"{kind} of {plan.batch} rows × {plan.length} tokens on {plan.target} ({plan.chips} chip{'s' * (plan.chips != 1)}: {mesh})"
    ]
    lines.append(_verdict(plan))
    if plan.peak is None:
        return "\n".join(lines)
    assert plan.arguments is not None and plan.temporaries is not None
    room = "" if plan.capacity is None else f" of {_size(plan.capacity)}"
    lines += [
        f"arguments:       {_size(plan.arguments):>12}",
        f"temporaries:     {_size(plan.temporaries):>12}",
        f"peak per chip:   {_size(plan.peak):>12}{room}",
        f"operations:      {plan.cost.useful:.3g} useful, {plan.cost.hardware:.3g} executed; {plan.cost.six_n:.3g} if counted as 6N",
        f"sent per chip:   {_size(sum(plan.sent.values())):>12}{_kinds(plan.sent)}",
    ]
    if plan.slices > 1:
        lines.append(
            f"to other slices: {_size(sum(plan.across.values())):>12} in {plan.crossings:.0f} collectives{_kinds(plan.across)}"
        )
    if plan.seconds is not None and plan.forecast is not None:
        tokens = plan.batch * (plan.length if plan.what == "train" else 1)
        lines += [
            f"at the chips' peaks: compute {plan.compute:.3g} s, memory {plan.memory:.3g} s, network {plan.network:.3g} s"
            + (f", between slices {plan.between:.3g} s" if plan.slices > 1 else ""),
            f"roofline:        {plan.seconds:.3g} s, {tokens / plan.seconds:,.0f} tokens/s at most, "
            f"MFU at most {100 * (plan.mfu or 0):.0f} %",
            f"forecast:        {plan.forecast:.3g} s, {tokens / plan.forecast:,.0f} tokens/s, assuming {EFFICIENCY} (why: docs/scaling.md)",
        ]
    chip = CHIPS.get(plan.target.partition(":")[0])
    if plan.what == "train" and chip is not None and chip.platform == "gpu":
        lines.append(
            "planned with portable attention, because cuDNN's compiles only on the card: the real run takes less memory"
        )
    asked = f", effort: {plan.options}" if plan.options else ""
    lines.append(
        f"compiled in      {plan.compile_seconds:.1f} s ({plan.compile_cpu_seconds:.0f} s of processor time){asked}"
    )
    return "\n".join(lines)


def _kinds(sent: Mapping[str, float]) -> str:
    return "".join(f"  {name} {_size(size)}" for name, size in sorted(sent.items()))


def _size(count: float) -> str:
    """Bytes in the largest unit of which there is at least a tenth."""
    unit = next((unit for unit, size in _UNITS.items() if 10 * count >= size), "KiB")
    return f"{count / _UNITS[unit]:.2f} {unit}"


def _verdict(plan: StepPlan) -> str:
    if plan.peak is None:
        needed = re.search(r"Used ([\d.]+\w+) of|\(([\d.]+\w)\) exceeds", plan.error)
        return f"DOES NOT FIT: {plan.error[:300] if needed is None else f'needs {next(filter(None, needed.groups()))}'}"
    if plan.capacity is None:
        return "UNKNOWN whether it fits: the memory of this target is not known"
    return f"{'FITS' if plan.fits else 'DOES NOT FIT'}: takes {_size(plan.peak)} of {_size(plan.capacity)} a chip"
