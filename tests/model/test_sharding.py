"""The sharding table: 13B without allocating it, and a sharded model that computes what one device computes."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from chatpose_jax import generate
from chatpose_jax.errors import UserError
from chatpose_jax.models import layers
from chatpose_jax.models.chatpose import abstract_params, bind, fake_batch, init_params, unstack_layers
from chatpose_jax.models.config import HeadConfig, LoRAConfig, LoRATarget, preset
from chatpose_jax.models.layers import Linear
from chatpose_jax.models.sharding import ShardingRules, make_mesh, on_mesh, partition_specs, place, shardings
from chatpose_jax.planning import collectives
from chatpose_jax.planning.plan import trace_decoding
from chatpose_jax.train.trainable import flatten

from ..numerics import agree, rounded

GOLDEN = Path(__file__).with_name("sharding_13b.json")


def mesh(fsdp, tensor):
    if jax.device_count() < fsdp * tensor:
        pytest.skip(f"needs {fsdp * tensor} devices")
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_13b_splits_every_large_array():
    abstract = abstract_params(preset("chatpose_13b"))
    on = mesh(4, 2)
    layers = partition_specs(abstract, on)["decoder"]["layers"]
    assert layers["attn"]["q_proj"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layers["mlp"]["down_proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["input_norm"]["scale"] == PartitionSpec(None, None)
    per_device = 0
    for leaf in jax.tree.leaves(place(abstract, on)):
        per_device += np.prod(leaf.sharding.shard_shape(leaf.shape))
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    assert total / 8 < per_device < 1.1 * total / 8


def test_13b_lies_as_the_golden_file_says():
    """A changed rule shows here as a diff to read. To write the file anew: python tests/model/test_sharding.py"""
    expected = json.loads(GOLDEN.read_text())
    assert golden() == expected


def golden():
    on = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    config = preset("chatpose_13b")
    specs = {}
    for kind in ("int4", "int8"):
        config = config.replace(lora=LoRAConfig(targets=get_args(LoRATarget)), quantize=kind)
        specs |= flatten(partition_specs(abstract_params(config), on))
    return {path: str(spec) for path, spec in sorted(specs.items())}


def test_other_backbones_lie_by_the_same_table():
    """A model without a tower lies as one with it; biases, norms of heads and the newline are small, and lie whole on every device."""
    on = AbstractMesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    config = preset("tiny")
    text = dataclasses.replace(config.text, tied=True, qkv_bias=True, qk_norm=True)
    vision = dataclasses.replace(config.vision, class_token=False, pre_norm=False, patch_bias=True)
    config = config.replace(text=text, vision=vision, image_newline=True)
    specs = flatten(partition_specs(abstract_params(config), on))
    small = {path: spec for path, spec in specs.items() if path.endswith(("bias", "scale", "newline"))}
    assert {"projector/newline", "vision/patch_embed/bias", "decoder/layers/attn/q_norm/scale"} <= set(small)
    assert not any(axis for spec in small.values() for axis in spec)
    assert specs["decoder/embed_tokens/embedding"] == PartitionSpec("tensor", "fsdp")
    blind = flatten(partition_specs(abstract_params(config.replace(vision=None, image_newline=False)), on))
    assert blind == {path: spec for path, spec in specs.items() if not path.startswith(("vision/", "projector/"))}


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_a_sharded_model_computes_the_same(shape):
    config = preset("tiny")
    params, batch = init_params(config, jax.random.key(0)), fake_batch(config, batch=8, length=12)

    @jax.jit
    def hidden(params):
        return bind(config, params)(batch["input_ids"], pixel_values=batch["pixel_values"]).hidden

    on = mesh(*shape)
    shards = jax.tree.map(lambda leaf: leaf.sharding, place(abstract_params(config), on))
    agree(rounded(hidden, params), hidden(jax.device_put(params, shards)))


@pytest.mark.parametrize(
    ("sizes", "head"),
    [
        *((sizes, "mlp") for sizes in [(1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 2)]),
        ((2, 1, 2), "tests.model.toy_heads:Looking"),
    ],
)
def test_what_is_planned_is_what_answers_over_a_mesh(sizes, head, monkeypatch):
    """The loop that answers over a mesh is the program that ``chatpose plan --decode`` compiles; it says what one device says."""
    count = math.prod(sizes)
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    on = make_mesh(*sizes, devices=jax.devices()[:count])
    stacked = preset("tiny").replace(head=HeadConfig(head))
    config, whole = stacked.replace(scan_layers=False), init_params(stacked, jax.random.key(0))
    spread = jax.device_put(whole, shardings(whole, on))
    prompts = [np.arange(5, 16, dtype=np.int32), np.arange(9, 16, dtype=np.int32)]
    expected = generate.generate(config, unstack_layers(whole), prompts, max_new_tokens=16)
    lowered, decode = [], generate.decode

    def spy(*args, **kwargs):
        lowered.append(decode.lower(*args, **kwargs))
        return decode(*args, **kwargs)

    monkeypatch.setattr(generate, "decode", spy)
    found = generate.generate(config, unstack_layers(spread), prompts, max_new_tokens=16)
    for new, old in zip(found.tokens, expected.tokens):
        np.testing.assert_array_equal(new, old)
    for new, old in zip(found.hidden, expected.hidden):
        np.testing.assert_allclose(new, old, atol=1e-4)  # up to 384 products of about 1, summed in another order
    monkeypatch.undo()
    planned = trace_decoding(stacked, on, 2, generate.CAPACITY_STEP).lower()
    assert planned.as_text() == lowered[0].as_text()
    sent = collectives.count(lowered[0].compile().as_text())
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(whole["decoder"]["layers"]))
    assert 0 < sum(sent.values()) < 0.1 * weights  # tokens travel, weights stay


class Chip:
    """A TPU chip of a slice, as far as a mesh looks at it."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU", 0, 0

    def __init__(self, slice_index, x, y):
        self.slice_index, self.coords = slice_index, (x, y, 0)


def test_slices_are_what_tpus_say_and_equal_parts_of_other_devices():
    """Devices of a slice stay together, in whatever order they come."""
    chips = [Chip(part, x, y) for x in range(2) for y in range(2) for part in range(2)]
    found = make_mesh(1, 2, 2, devices=chips)
    assert dict(found.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert [[chip.slice_index for chip in part.flat] for part in found.devices] == [[0] * 4, [1] * 4]
    assert make_mesh(slices=2, devices=chips) == make_mesh(devices=chips)
    for wrong in (1, 4):
        with pytest.raises(UserError, match=rf"train.mesh.slices={wrong}: these TPUs are 2 slice"):
            make_mesh(slices=wrong, devices=chips)
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    assert make_mesh().shape["slice"] == 1
    for part, expected in zip(make_mesh(slices=2).devices, (range(4), range(4, 8)), strict=True):
        assert [device.id for device in part.flat] == list(expected)
    with pytest.raises(UserError, match="a mesh of slice 3 × data 1 × fsdp -1 × tensor 1 does not fit 8 devices"):
        make_mesh(slices=3)


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(UserError, match="mesh axis 'fsdp'"):
        partition_specs(abstract_params(preset("tiny")), mesh(4, 2), ShardingRules(heads=("fsdp",)))


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("axes", [("mlp", "embed"), ("embed", "mlp")])
def test_codes_of_int4_stay_where_they_are_though_a_shard_ends_within_a_group(axes, gathers, monkeypatch):
    """Three groups of 128 inputs over two devices: the product is that of one device, and moves no codes (but what ``fsdp`` gathers)."""
    monkeypatch.setattr(layers, "platform", lambda: "tpu")  # there few rows are multiplied group by group
    on = (
        make_mesh(1, 1, 2, devices=jax.devices()[:2])
        if axes[0] == "mlp"
        else make_mesh(1, 2, 1, devices=jax.devices()[:2])
    )
    layer = Linear(384, 64, quantize="int4", axes=axes, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    name = "down_proj" if axes[0] == "mlp" else "up_proj"
    flat = {f"decoder/layers/0/mlp/{name}/{path}": leaf for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    spread = {path.split("/")[-1]: jax.device_put(flat[path], place) for path, place in shardings(flat, on).items()}
    assert spread["kernel"].addressable_shards[0].data.shape == (192, 64)

    def run(params, x, mesh):
        with on_mesh(mesh, gathers=gathers):
            own = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(own, params)
            return nnx.merge(graph, own)(x)

    for rows in (2, 40):
        x = jax.random.normal(jax.random.key(1), (1, rows, 384))
        sharded = jax.jit(lambda params, x: run(params, x, on))
        expected = jax.jit(lambda params, x: run(params, x, None))(nnx.to_pure_dict(state), x)
        np.testing.assert_allclose(sharded(spread, x), expected, atol=1e-5)
        text = sharded.lower(spread, x).compile().as_text()
        moved = [line for line in text.splitlines() if re.search(r"= \(?[su][48]\[.* all-gather", line)]
        assert bool(moved) == (gathers and axes[0] == "embed"), moved


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
