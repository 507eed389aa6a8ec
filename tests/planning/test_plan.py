"""Plans: counts against counting by hand, the compiler's words, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from chatpose_jax.cli.main import main
from chatpose_jax.cli.plan import fitting
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.models.layers import matmul
from chatpose_jax.models.sharding import batch_sharding, gather_weight, make_mesh, on_mesh
from chatpose_jax.planning import collectives, targets
from chatpose_jax.planning.plan import StepPlan, _roofline, describe_plan, mesh_sizes
from chatpose_jax.train.config import MeshConfig, TrainConfig
from chatpose_jax.train.flops import decode_cost, train_cost
from chatpose_jax.train.trainable import EVERYTHING, HEAD

PAPER = TrainConfig(batch_size=16, accumulate=1)


def test_lora_takes_about_four_operations_a_parameter_and_token() -> None:
    model = preset("chatpose_13b")
    cost = train_cost(model, PAPER, 16, 1024)
    tokens, decoder = 16 * 1024, 13.0e9
    attention = 3 * 2 * 16 * 40 * 40 * 128 * 1024**2
    assert 4.0 < (cost.useful - attention) / (tokens * decoder) < 4.2  # LoRA's own products and CLIP come on top
    assert 5.9 < (cost.six_n - attention) / (tokens * decoder) < 6.2
    layer = 4 * 5120**2 + 3 * 5120 * 13824 + 2 * 2 * 5120 * 128
    assert cost.hardware - cost.useful == pytest.approx(2 * tokens * 40 * layer + attention / 3, rel=1e-6)


def test_what_trains_decides_what_is_counted() -> None:
    model = preset("chatpose_13b")
    head = train_cost(model, dataclasses.replace(PAPER, trainable=HEAD), 16, 1024)
    lora = train_cost(model, PAPER, 16, 1024)
    everything = train_cost(model.replace(lora=None), dataclasses.replace(PAPER, trainable=EVERYTHING), 16, 1024)
    assert head.useful < 0.6 * lora.useful < lora.useful < 0.75 * everything.useful
    none, qkv = (train_cost(model, dataclasses.replace(PAPER, remat=name), 16, 1024) for name in ("none", "save_qkv"))
    assert none.hardware == none.useful == lora.useful
    assert lora.useful < qkv.hardware < lora.hardware


def test_decoding_reads_all_weights_for_each_token() -> None:
    cost = decode_cost(preset("chatpose_13b"), 1, 1000)
    assert cost.weights == pytest.approx(2 * 12.85e9 + 4 * 104_857_600, rel=0.01)
    assert cost.activations == 2 * 40 * 40 * 128 * 1000 * 2
    assert 25e9 < cost.useful < 28e9


HLO = """HloModule step

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %w = bf16[2,4]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], bf16[8,4]{1,0}) tuple(%p, %all-gather.1)
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(40)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %while.3 = (s32[], bf16[8,4]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"40"}}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %end = f32[16]{0} all-gather-done(%start)
  %rs = f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%sum
  ROOT %all-reduce.9 = f32[16]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
}
"""


@pytest.mark.parametrize("note", ["", ', backend_config={"known_trip_count":{"n":"40"}}'])
def test_collectives_are_counted_as_often_as_their_loop_runs(note: str) -> None:
    """Compilers for GPUs note how often a loop runs; for TPUs the condition tells."""
    sent = collectives.count(HLO.replace(', backend_config={"known_trip_count":{"n":"40"}}', note))
    assert sent == {
        "all-gather": 40 * 8 * 4 * 2 * 3 / 4 + 16 * 4 * 3 / 4,
        "reduce-scatter": 16 * 4 * 3 / 4,
        "all-reduce": 2 * 16 * 4 * 7 / 8,
    }
    assert collectives.number(HLO) == (40 + 1 + 1 + 1, 0)


SLICED = """HloModule step

%all-reduce-scatter.1 (x: f32[16]) -> f32[4] {
  %x = f32[16]{0} parameter(0)
  %all-reduce.4 = f32[16]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %fusion = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %send = (f32[4]{0}, u32[], token[]) send(%fusion, %t), channel_id=2, is_host_transfer=true, NOTE
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %recv = (f32[4]{0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, NOTE
}
"""


@pytest.mark.parametrize(
    ("slices", "transfer", "kind", "size"),
    [
        ("{1,2}x{0:3}", "ALL_REDUCE", "all-reduce", 2 * 16 / 2),
        ("{1,2,3,4}x{0:3}", "ALL_REDUCE", "all-reduce", 2 * 16 * 3 / 4),
        ("{1:4}x{0:3}", "ALL_GATHER", "all-gather", 16 * 3),
        ("{1:2}x{0:3}", "ONE_TO_ONE", "collective-permute", 16),
        ("all", "ALL_REDUCE", "all-reduce", pytest.approx(2 * 16, rel=1e-5)),  # of a compiler that writes it otherwise
        ("{1,2}x{0:3}", "NEWER", "newer", 16 / 2),
    ],
)
def test_what_tpus_send_to_other_slices_is_counted_apart(slices: str, transfer: str, kind: str, size: float) -> None:
    """TPU compilers write a collective across slices as one inside each slice and a transfer between hosts."""
    note = f'frontend_attributes={{_xla_megascale_target="{slices}",_xla_megascale_transfer_type="{transfer}"}}'
    text = SLICED.replace("NOTE", note)
    assert collectives.count(text) == {"reduce-scatter": 16 * 4 * 3 / 4}
    assert collectives.across(text, 4) == {kind: size}
    assert collectives.number(text) == (1, 1)


@pytest.mark.parametrize(
    ("line", "inside", "across"),
    [
        ("all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}", 2 * 64 * 3 / 4, 2 * 16 / 2),
        ("all-reduce(%x), replica_groups=[1,8]<=[8]", 2 * 64 * 3 / 4, 2 * 16 / 2),
        ("all-reduce(%x), replica_groups=[2,4]<=[8]", 2 * 64 * 3 / 4, 0),
        ("all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 0, 2 * 64 / 2),
        ("all-reduce(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", 0, 2 * 64 / 2),
        ("all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 2 * 64 * 3 / 4, 0),
        ("all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}", 64 * 3 / 4, 16 / 2),
        ("all-to-all(%x), replica_groups={{0,1,2,3,4,5,6,7}}", 64 * 7 / 8 - 32, 32),
        ("collective-permute(%x), source_target_pairs={{0,1},{4,5}}", 64, 0),
        ("collective-permute(%x), source_target_pairs={{0,1},{3,4}}", 0, 64),
    ],
)
def test_what_others_send_to_other_slices_is_told_by_the_groups(line: str, inside: float, across: float) -> None:
    """Two slices of four chips; by hand, as the best programs send: first inside, then each chip its part."""
    text = f"ENTRY %main (x: f32[16]) -> f32[16] {{\n  ROOT %y = f32[16]{{0}} {line}\n}}\n"
    kind = line.partition("(")[0]
    assert collectives.count(text, 4) == ({kind: inside} if inside else {})
    assert collectives.across(text, 4) == ({kind: across} if across else {})
    assert collectives.number(text, 4) == (float(not across), float(bool(across)))


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:64", "v9:2x2", "h100:2x2", "h100:0", "v5e:0x8", "", "v5e-8*", "v5e-8*0", "v5e-8*x", "v5e-8*2*2"],
)
def test_a_target_that_is_none_is_one_clear_error(name: str) -> None:
    with pytest.raises(UserError, match="expected a chip"):
        targets.parse(name)


@pytest.mark.parametrize(
    ("name", "target", "chips"),
    [
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5e-1", "v5e:1x1", 1),
        ("v5p-128", "v5p:4x4x4", 64),  # TensorCores, two a chip
        ("v4-8", "v4:2x2x1", 4),
        ("V6E-8", "v6e:2x4", 8),
        ("v5e:4x8", "v5e:4x8", 32),
        ("a100", "a100:1", 1),
        ("A100-80GB:8", "a100:8", 8),
        ("a100-40:4", "a100-40:4", 4),
        ("h200:8", "h200:8", 8),
        ("v5e:8x8*2", "v5e:8x8*2", 128),
        ("v5p-128*4", "v5p:4x4x4*4", 256),
        ("v6e-8*1", "v6e:2x4", 8),
        ("h100:8*2", "h100:8*2", 16),
    ],
)
def test_targets_by_the_names_that_people_use(name: str, target: str, chips: int) -> None:
    parsed = targets.parse(name)
    assert (parsed.name, parsed.chips) == (target, chips)
    assert parsed.chip is not None
    assert targets.parse(target) == parsed


@pytest.mark.parametrize(
    ("name", "words"), [("v5p-4", "TensorCores, two a chip"), ("v5e-24", "chips, and N is one of")]
)
def test_a_slice_that_google_does_not_give_out(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        targets.parse(name)


def test_slices_of_machines_that_no_known_network_connects(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(targets.CHIPS, "a100", dataclasses.replace(targets.CHIPS["a100"], between=None))
    with pytest.raises(UserError, match="no figure is known for a network between several a100"):
        targets.parse("a100:8*2")


def test_every_card_has_a_description() -> None:
    assert {name for name, chip in targets.CHIPS.items() if chip.platform == "gpu"} == set(targets._CARDS)
    assert {name for name, chip in targets.CHIPS.items() if chip.platform == "tpu"} == set(targets.SLICES)


def test_meshes_that_suit_a_target() -> None:
    model = preset("chatpose_13b")
    assert mesh_sizes(targets.parse("v5e:2x4"), model, 32) == (1, 8, 1)
    assert mesh_sizes(targets.parse("v5e:16x16"), model, 32) == (1, 32, 8)
    assert mesh_sizes(targets.parse("v5e:2x4"), model, 1, decode=True) == (1, 1, 8)
    assert mesh_sizes(targets.parse("v5e:8x8*2"), model, 64) == (1, 32, 2)  # a slice's part, as for one slice
    assert mesh_sizes(targets.parse("v5e:8x8*2"), model, 32) == (1, 16, 4)


def plan(*arguments: str) -> int:
    return main(["plan", "--config", "tiny", *arguments])


def test_a_plan_for_this_machine(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    count = min(4, jax.device_count())
    out = tmp_path / "plan.json"
    status = plan("--target", f"cpu:{count}", "--batch", "8", "--length", "64", "--json", str(out))
    printed = capsys.readouterr().out
    assert status == 0 and "peak per chip:" in printed and " MiB" in printed
    data = json.loads(out.read_text())
    assert data["mesh"] == {"slice": 1, "data": 1, "fsdp": count, "tensor": 1}
    assert data["batch"] == 8 and data["cost"]["useful"] > 0
    assert data["seconds"] is None  # of this machine no peaks are known
    if count > 1:
        assert data["sent"]["all-gather"] > 0
    model = preset("tiny").replace(lora=None)
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract(model)))
    assert data["arguments"] > weights / count


def test_a_plan_for_slices_lists_apart_what_crosses_them(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    out = tmp_path / "plan.json"
    assert plan("--target", "cpu:4*2", "--batch", "8", "--length", "64", "--json", str(out)) == 0
    printed = capsys.readouterr().out
    assert "on cpu:4*2 (8 chips: slice 2 × data 1 × fsdp 4 × tensor 1)" in printed
    assert "to other slices:" in printed
    data = json.loads(out.read_text())
    assert data["slices"] == 2 and data["crossings"] > 0
    assert 0 < sum(data["across"].values()) < 0.2 * data["sent"]["all-gather"]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (["--set", "train.mesh.fsdp=1", "--set", "train.mesh.tensor=4"], (1, 1, 4)),
        (["--set", "train.mesh.tensor=8"], (1, 4, 1)),
        (["--set", "train.mesh.tensor=4", "--mesh", "2x2x1"], (2, 2, 1)),
        ([], (1, 4, 1)),
    ],
)
def test_a_mesh_that_was_set_is_planned_where_it_fits(settings, sizes, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def found(*arguments, **_):  # type: ignore[no-untyped-def]
        raise UserError(f"{arguments[3]}")

    monkeypatch.setattr("chatpose_jax.planning.plan.plan_training", found)
    assert plan("--target", "cpu:4", "--batch", "4", *settings) == 2
    assert capsys.readouterr().err == f"error: {sizes}\n"


@pytest.mark.parametrize(
    ("mesh", "chips", "sizes"),
    [
        (MeshConfig(tensor=4), 8, (1, 2, 4)),
        (MeshConfig(2, 2, 2), 8, (2, 2, 2)),
        (MeshConfig(), 8, (1, 8, 1)),
        (MeshConfig(tensor=3), 8, None),
        (MeshConfig(tensor=16), 8, None),
        (MeshConfig(1, 1, 1), 8, None),
        (MeshConfig(tensor=4, slices=1), 8, (1, 2, 4)),
        (MeshConfig(tensor=4, slices=2), 8, None),
    ],
)
def test_a_mesh_fits_where_it_takes_all_chips(mesh, chips, sizes) -> None:  # type: ignore[no-untyped-def]
    assert fitting(mesh, chips) == sizes


def abstract(model):  # type: ignore[no-untyped-def]
    from chatpose_jax.models.chatpose import abstract_params

    return abstract_params(model)


def test_a_plan_of_decoding(capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan("--target", "cpu:1", "--decode", "--length", "128") == 0
    assert "a decoded token of 1 rows × 128 tokens" in capsys.readouterr().out


def example(**changes):  # type: ignore[no-untyped-def]
    cost = decode_cost(preset("tiny"), 1, 128)
    known = {"fits": True, "capacity": 80.0 * 2**30, "arguments": 2.0**30, "temporaries": 2.0**30, "peak": 2.0**30}
    times = {"compute": 0.1, "memory": 0.2, "network": 0.0, "seconds": 0.2, "mfu": 0.5, "forecast": 0.4}
    fixed = {
        "what": "train",
        "target": "h100:1",
        "chips": 1,
        "mesh": {"data": 1},
        "batch": 4,
        "length": 128,
        "error": "",
    }
    measured = {"sent": {}, "cost": cost, "compile_seconds": 1.0, "compile_cpu_seconds": 1.0}
    return StepPlan(**{**known, **times, **fixed, **measured, **changes})


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "FITS: takes 1.00 GiB of 80.00 GiB a chip"),
        ({"peak": 90 * 2.0**30, "fits": False}, "DOES NOT FIT: takes 90.00 GiB of 80.00 GiB a chip"),
        (
            {"peak": None, "fits": False, "error": "RESOURCE_EXHAUSTED: Used 20.1G of 15.7G hbm"},
            "DOES NOT FIT: needs 20.1G",
        ),
        ({"peak": 3.0 * 2**20}, "FITS: takes 3.00 MiB of 80.00 GiB a chip"),
        ({"peak": 512.0}, "FITS: takes 0.50 KiB of 80.00 GiB a chip"),
        ({"capacity": None}, "UNKNOWN whether it fits"),
    ],
)
def test_the_second_line_is_the_verdict(changes, verdict) -> None:  # type: ignore[no-untyped-def]
    assert describe_plan(example(**changes)).splitlines()[1].startswith(verdict)


def test_a_forecast_stands_beside_the_bound() -> None:
    said = describe_plan(example())
    assert "roofline:        0.2 s, 2,560 tokens/s at most" in said
    assert "forecast:        0.4 s, 1,280 tokens/s, assuming 50 % of the peak for products" in said


def test_times_of_decoding_by_hand() -> None:
    """13B on v5e: each chip reads its part of the weights; rows that the mesh does not divide are answered by every copy."""
    target, cost = targets.parse("v5e-8"), decode_cost(preset("chatpose_13b"), 1, 1024)

    def times(data: int, fsdp: int, tensor: int) -> dict[str, float]:
        mesh = jax.sharding.AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))
        return _roofline("decode", cost, target, mesh, 1, {"all-reduce": 1.8e6}, {}, (80, 0))

    split = times(1, 1, 8)
    assert split["memory"] == pytest.approx((cost.weights + cost.activations) / 8 / 8.2e11)
    assert split["seconds"] == split["memory"]
    assert split["forecast"] == pytest.approx(split["memory"] / 0.65 + 80 * 20e-6)
    assert times(1, 8, 1)["memory"] == pytest.approx((cost.weights / 8 + cost.activations) / 8.2e11)
    assert times(8, 1, 1)["memory"] == pytest.approx((cost.weights + cost.activations) / 8.2e11)
    assert times(8, 1, 1)["compute"] == pytest.approx(8 * split["compute"])


def test_times_of_slices_by_hand() -> None:
    """Two slices with twice the rows take what one takes, and the time between them stands beside it."""
    model = preset("chatpose_13b")

    def times(name: str, rows: int, sizes: tuple[int, ...], across: dict[str, float]) -> dict[str, float]:
        mesh = jax.sharding.AbstractMesh(sizes, ("slice", "data", "fsdp", "tensor"))
        cost = train_cost(model, PAPER, rows, 1024)
        return _roofline("train", cost, targets.parse(name), mesh, rows, {"all-gather": 1e9}, across, (10, len(across)))

    one = times("v5e:2x4", 32, (1, 1, 8, 1), {})
    two = times("v5e:2x4*2", 64, (2, 1, 8, 1), {"all-reduce": 3.125e9})
    assert {key: two[key] for key in ("compute", "memory", "network")} == pytest.approx(
        {key: one[key] for key in ("compute", "memory", "network")}
    )
    assert (one["between"], two["between"]) == (0, 1)
    assert two["forecast"] == pytest.approx(one["forecast"] + 200e-6)
    assert times("v5e:2x4*2", 64, (2, 1, 8, 1), {"all-reduce": 3.125e10})["seconds"] == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "v5e:2x4", "--mesh", "8"], "DATAxFSDPxTENSOR"),
        (["--target", "cpu:1", "--batch", "0"], "at least 1"),
        (["--target", "cpu:1", "--length", "16"], "no place for 1 image"),
        (["--target", "cpu:1", "--mesh", "1x2x1"], "does not fit the 1 chips of cpu:1"),
        (["--target", "cpu:8", "--mesh", "2x2x1"], "does not fit the 8 chips of cpu:8"),
        (["--target", "cpu:4*2", "--mesh", "1x8x1"], "does not fit the 4 chips of cpu:4"),
        (["--target", "cpu:4*2", "--batch", "3"], "slices × data × fsdp"),
        (["--target", "cpu:4*2", "--set", "train.mesh.slices=4"], "train.mesh.slices=4: --target cpu:4*2 has 2; name"),
        (["--target", "cpu:999"], "xla_force_host_platform_device_count=999"),
    ],
)
def test_a_wrong_request_is_one_clear_line(arguments, words, capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan(*arguments) == 2
    assert words in capsys.readouterr().err


class Compiler:
    """A compiler for TPUs that knows some options: what stands in for ``targets._takes``."""

    def __init__(self, *known: str) -> None:
        self.known = known

    def __call__(self, target: targets.Target, options: dict[str, object]) -> bool:
        return set(options) <= set(self.known)


@pytest.mark.parametrize(
    ("known", "effort", "options", "words"),
    [
        ("exec_time_optimization_effort", -1, {"exec_time_optimization_effort": -1.0}, "effort=-1.0"),
        ("exec_time_optimization_effort", 0, {"exec_time_optimization_effort": 0.0}, "effort=0.0"),
        ("optimization_level", -1, {"optimization_level": "O0"}, "level=O0"),
        ("optimization_level", -0.2, {"optimization_level": "O1"}, "level=O1"),
        ("optimization_level", 0, None, "default"),
        ("", 0, None, "default"),
        ("", -1, None, "takes no option for effort, --effort -1 was not followed"),
    ],
)
def test_effort_is_asked_for_by_the_name_that_the_compiler_takes(known, effort, options, words, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(targets, "_takes", Compiler(known))
    found, said = targets.compiler_options(targets.parse("v5e:2x4"), effort)
    assert found == options and words in said
    assert targets.compiler_options(targets.parse("cpu:1"), effort) == (None, "")


LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs")


@LIBTPU
@pytest.mark.parametrize("effort", ["-1", "0"])
def test_a_plan_for_a_tpu_by_the_compiler_that_is_here(effort, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "plan.json"
    words = ("--target", "v5e-4", "--batch", "4", "--length", "128", "--effort", effort, "--json", str(out))
    assert plan("--decode", *words) == 0
    printed = capsys.readouterr().out
    assert "on v5e:2x2 (4 chips" in printed and "\nFITS: takes" in printed and "effort: " in printed
    assert "not followed" not in printed  # else a compiler takes a name that we do not know
    data = json.loads(out.read_text())
    assert data["seconds"] < data["forecast"] < 0.1 and data["sent"]["all-reduce"] > 0


@LIBTPU
def test_the_gradient_of_a_gathered_weight_is_one_reduce_scatter() -> None:
    """Left to itself, a TPU's compiler makes a loop of this product, with 17 collectives on eight chips."""
    on = make_mesh(1, 8, 1, devices=targets.devices(targets.parse("v5e:2x4")))
    rows = jax.ShapeDtypeStruct((8, 1024, 1024), jnp.bfloat16, sharding=batch_sharding(on))
    weight = jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=NamedSharding(on, PartitionSpec("fsdp")))

    def gradient(weight: jax.Array, rows: jax.Array) -> jax.Array:
        with on_mesh(on):
            return jax.grad(lambda weight: matmul(rows, gather_weight(weight, "embed", None)).sum())(weight)

    lowered = jax.jit(gradient, out_shardings=weight.sharding).trace(weight, rows).lower(lowering_platforms=("tpu",))
    text = lowered.compile(compiler_options=targets.compiler_options(targets.parse("v5e:2x4"))[0]).as_text()
    assert collectives.count(text) == {"reduce-scatter": 1024 * 128 * 2 * 7 / 8}


@LIBTPU
def test_devices_of_several_slices_form_the_mesh_that_jax_makes() -> None:
    from jax.experimental import mesh_utils

    chips = targets.devices(targets.parse("v5e:2x4*2"))
    found = make_mesh(1, 4, 2, devices=chips)
    expected = mesh_utils.create_hybrid_device_mesh((1, 1, 4, 2), (2, 1, 1, 1), chips, allow_split_physical_axes=True)
    assert (found.devices == expected).all() and found.shape["slice"] == 2


@pytest.mark.slow
@LIBTPU
def test_slices_sum_gradients_inside_first_and_take_no_more_memory(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The compiler's own program for two TPU slices: only parts of gradients cross, and a chip holds what it holds in one slice."""
    made = {}
    for name, rows in (("v5e:2x2", 16), ("v5e:2x2*2", 32)):
        out = tmp_path / "plan.json"
        words = ("--target", name, "--batch", str(rows), "--length", "128", "--json", str(out))
        assert plan(*words) == 0
        made[name] = json.loads(out.read_text())
    one, two = made.values()
    assert one["arguments"] == pytest.approx(two["arguments"], rel=0.01)
    assert two["peak"] < 1.05 * one["peak"]
    assert two["between"] > 0
    assert sum(two["across"].values()) < sum(two["sent"].values()) / 4


def test_the_probe_tells_an_unknown_option_from_a_failure(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(targets, "devices", lambda target: jax.devices("cpu"))

    def refuse(words: str) -> bool:
        class Lowered:
            def lower(self, **_):  # type: ignore[no-untyped-def]
                return self

            trace = lower

            def compile(self, compiler_options):  # type: ignore[no-untyped-def]
                raise jax.errors.JaxRuntimeError(words)

        monkeypatch.setattr(jax, "jit", lambda function: type("Jitted", (), {"trace": lambda self, x: Lowered()})())
        return targets._takes(targets.parse("v5e:2x4"), {"x": 1})

    assert not refuse("INVALID_ARGUMENT: No such compile option: 'x'")
    with pytest.raises(jax.errors.JaxRuntimeError, match="lockfile"):
        refuse("ABORTED: Internal error when accessing libtpu multi-process lockfile")


def test_devices_of_a_plan_are_never_looked_for(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A GPU's plugin without its GPU ends in a traceback: the command asks for the CPU itself."""
    script = "import sys; from chatpose_jax.cli.main import main; main(sys.argv[1:]); import jax; print(jax.default_backend())"
    command = [sys.executable, "-c", script, "plan", "--config", "tiny", "--target", "cpu:999"]
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "cpu\n" and done.stderr.startswith("error: this process has"), done.stderr


def test_a_missing_compiler_says_what_to_install(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan("--target", "v5e:2x4", "--batch", "8") == 2
    assert 'pip install ".[tpu]"' in capsys.readouterr().err


@pytest.mark.slow
@LIBTPU
def test_13b_fits_eight_v5e(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The paper's recipe, compiled by the real compiler for a machine that is not here."""
    out = tmp_path / "plan.json"
    assert main(["plan", "--config", "chatpose_13b", "--target", "v5e:2x4", "--batch", "32", "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["peak"] <= 7.5 * 2**30
    assert data["compile_cpu_seconds"] < 2 * 60  # of two cores, however many others use them
    assert data["sent"]["all-gather"] > 2 * 20e9  # the weights, forward and backward
