"""Plans: counts against counting by hand, the compiler's words, and the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax
import pytest

from chatpose_jax.cli.main import main
from chatpose_jax.cli.plan import fitting
from chatpose_jax.errors import UserError
from chatpose_jax.models.config import preset
from chatpose_jax.planning import collectives, targets
from chatpose_jax.planning.flops import decode_cost, train_cost
from chatpose_jax.planning.plan import mesh_sizes
from chatpose_jax.train.config import MeshConfig, TrainConfig
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


@pytest.mark.parametrize("name", ["v5e", "v5e:64", "v9:2x2", "h100:2x2", "h100:0", "v5e:0x8", ""])
def test_a_target_that_is_none_is_one_clear_error(name: str) -> None:
    with pytest.raises(UserError, match="expected a chip"):
        targets.parse(name)


def test_meshes_that_suit_a_target() -> None:
    model = preset("chatpose_13b")
    assert mesh_sizes(targets.parse("v5e:2x4"), model, 32) == (1, 8, 1)
    assert mesh_sizes(targets.parse("v5e:16x16"), model, 32) == (1, 32, 8)
    assert mesh_sizes(targets.parse("v5e:2x4"), model, 1, decode=True) == (1, 1, 8)


def plan(*arguments: str) -> int:
    return main(["plan", "--config", "tiny", *arguments])


def test_a_plan_for_this_machine(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    count = min(4, jax.device_count())
    out = tmp_path / "plan.json"
    status = plan("--target", f"cpu:{count}", "--batch", "8", "--length", "64", "--json", str(out))
    printed = capsys.readouterr().out
    assert status == 0 and "peak per chip:" in printed and "GiB" in printed
    data = json.loads(out.read_text())
    assert data["mesh"] == {"data": 1, "fsdp": count, "tensor": 1}
    assert data["batch"] == 8 and data["cost"]["useful"] > 0
    assert data["seconds"] is None  # of this machine no peaks are known
    if count > 1:
        assert data["sent"]["all-gather"] > 0
    model = preset("tiny").replace(lora=None)
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(abstract(model)))
    assert data["arguments"] > weights / count


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "v5e:2x4", "--mesh", "8"], "DATAxFSDPxTENSOR"),
        (["--target", "cpu:1", "--batch", "0"], "at least 1"),
        (["--target", "cpu:1", "--length", "16"], "no place for 1 picture"),
        (["--target", "cpu:1", "--mesh", "1x2x1"], "does not fit the 1 chips of cpu:1"),
        (["--target", "cpu:8", "--mesh", "2x2x1"], "does not fit the 8 chips of cpu:8"),
        (["--target", "cpu:999"], "xla_force_host_platform_device_count=999"),
    ],
)
def test_a_wrong_request_is_one_clear_line(arguments, words, capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan(*arguments) == 2
    assert words in capsys.readouterr().err


def test_plans_for_tpus_ask_for_the_least_effort():  # most of a compiler's time goes into a fast program
    assert targets.compiler_options(targets.parse("v5e:2x4")) == {"exec_time_optimization_effort": -1.0}
    assert targets.compiler_options(targets.parse("v5e:2x4"), 0) == {"exec_time_optimization_effort": 0.0}
    assert targets.compiler_options(targets.parse("cpu:1")) is None


def test_a_missing_compiler_says_what_to_install(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan("--target", "v5e:2x4", "--batch", "8") == 2
    assert 'pip install "chatpose-jax[tpu]"' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the compiler for TPUs")
def test_13b_fits_eight_v5e(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The paper's recipe, compiled by the real compiler for a machine that is not here."""
    out = tmp_path / "plan.json"
    assert main(["plan", "--config", "chatpose_13b", "--target", "v5e:2x4", "--batch", "32", "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["peak"] <= 7.5 * 2**30
    assert data["compile_cpu_seconds"] < 2 * 60  # of two cores, however many others use them
    assert data["sent"]["all-gather"] > 2 * 20e9  # the weights, forward and backward
