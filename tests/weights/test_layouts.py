"""Every layout becomes the same tree, bit by bit, as torch's own tensors stacked and transposed by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")

from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params  # noqa: E402
from chatpose_jax.models.config import ModelConfig  # noqa: E402
from chatpose_jax.processing.processor import Processor  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.folder import TOKENIZER, load_model_config, load_params  # noqa: E402
from chatpose_jax.weights.layouts import layouts  # noqa: E402
from chatpose_jax.weights.sources import open_sources  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402
from chatpose_jax.weights.table import Transform  # noqa: E402

from .sources import (  # noqa: E402
    IMAGE_ID,
    POSE_ID,
    VOCAB,
    FlatModels,
    Format,
    Names,
    Sizes,
    make_chatpose,
    make_clip,
    make_llava_original,
    make_llava_transformers,
    make_vicuna,
    write_config,
)

State = Mapping[str, Any]


def array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def llama_tree(state: State, lm_head: Any) -> dict[str, np.ndarray]:
    """state: names without prefix (``embed_tokens.weight``, ``layers.0.…``)."""
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))

    def stack(name: str) -> np.ndarray:
        return np.stack([array(state[f"layers.{i}.{name}.weight"]).T for i in range(layers)])

    embed, head = array(state["embed_tokens.weight"]), array(lm_head)
    tree = {
        "embed_tokens/embedding": embed[:VOCAB],
        "embed_tokens/added": embed[VOCAB:].astype(np.float32),
        "layers/input_norm/scale": stack("input_layernorm"),
        "layers/post_attention_norm/scale": stack("post_attention_layernorm"),
        "norm/scale": array(state["norm.weight"]),
        "lm_head/kernel": head[:VOCAB].T,
        "lm_head/added": head[VOCAB:].T.astype(np.float32),
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tree[f"layers/attn/{name}/kernel"] = stack(f"self_attn.{name}")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tree[f"layers/mlp/{name}/kernel"] = stack(f"mlp.{name}")
    return {f"decoder/{path}": leaf for path, leaf in tree.items()}


def clip_tree(state: State, used: int) -> dict[str, np.ndarray]:
    """state: names without ``vision_model.``."""
    conv = array(state["embeddings.patch_embedding.weight"])
    # (D, 3, P, P) against patches flattened as (py, px, channel).
    kernel = np.stack([np.moveaxis(filter, 0, -1).ravel() for filter in conv], axis=1)
    tree = {
        "patch_embed/kernel": kernel,
        "class_embedding": array(state["embeddings.class_embedding"]),
        "position_embedding": array(state["embeddings.position_embedding.weight"]),
        "pre_norm/scale": array(state["pre_layrnorm.weight"]),
        "pre_norm/bias": array(state["pre_layrnorm.bias"]),
    }
    for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        for leaf, name in (("scale", "weight"), ("bias", "bias")):
            tree[f"layers/{ours}/{leaf}"] = np.stack(
                [array(state[f"encoder.layers.{i}.{theirs}.{name}"]) for i in range(used)]
            )
    linears = {f"attn/{n}_proj": f"self_attn.{n}_proj" for n in "qkv"} | {"attn/o_proj": "self_attn.out_proj"}
    linears |= {f"mlp/{n}": f"mlp.{n}" for n in ("fc1", "fc2")}
    for ours, theirs in linears.items():
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            tree[f"layers/{ours}/{leaf}"] = np.stack(
                [array(state[f"encoder.layers.{i}.{theirs}.{name}"]).T for i in range(used)]
            )
    return {f"vision/{path}": leaf for path, leaf in tree.items()}


def pair_tree(part: str, first: Any, second: Any) -> dict[str, np.ndarray]:
    return {
        f"{part}/{name}/{leaf}": values
        for name, linear in (("fc1", first), ("fc2", second))
        for leaf, values in (("kernel", array(linear.weight).T), ("bias", array(linear.bias)))
    }


def strip(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def transformers_tree(model: Any) -> dict[str, np.ndarray]:
    state = model.state_dict()
    projector = model.model.multi_modal_projector
    return (
        llama_tree(strip(state, "model.language_model."), state["lm_head.weight"])
        | clip_tree(strip(state, "model.vision_tower."), used=3)
        | pair_tree("projector", projector.linear_1, projector.linear_2)
    )


def flat_tree(models: FlatModels) -> dict[str, np.ndarray]:
    llama, clip, extra = models.llama, models.clip, models.extra
    head = extra.text_hidden_fcs[0]
    state = {name.removeprefix("vision_model."): tensor for name, tensor in clip.state_dict().items()}
    return (
        llama_tree(strip(llama.state_dict(), "model."), llama.lm_head.weight)
        | clip_tree(state, used=3)
        | pair_tree("projector", extra.mm_projector[0], extra.mm_projector[2])
        | {path: leaf.astype(np.float32) for path, leaf in pair_tree("pose_head", head[0], head[2]).items()}
    )


def converted(source: Path, out: Path, **options: Any) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    convert(SourceSpec(source, **options), out)
    config = load_model_config(out)
    params = flatten_dict(load_params(out, abstract_params(config)), sep="/")
    return config, {path: np.asarray(leaf) for path, leaf in params.items()}


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Equal in names, dtype and every bit; ``expected`` may leave out the pose head."""
    assert {path for path in found if not path.startswith("pose_head")} == {
        path for path in expected if not path.startswith("pose_head")
    }
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        assert found[path].shape == leaf.shape, path
        assert found[path].tobytes() == np.ascontiguousarray(leaf).tobytes(), path


@pytest.mark.parametrize("names", ["4", "5", "state_dict", "4_state_dict"])
@pytest.mark.parametrize(("fmt", "dtype"), [("safetensors", "bfloat16"), ("bin", "float16")])
def test_llava_for_transformers(tmp_path: Path, names: Names, fmt: Format, dtype: str) -> None:
    model = make_llava_transformers(tmp_path / "src", names, fmt, dtype=getattr(torch, dtype), shards=2)
    config, params = converted(tmp_path / "src", tmp_path / "out")
    assert_same(params, transformers_tree(model))
    assert (config.param_dtype, config.dtype) == (dtype, dtype)
    assert (config.pose_token_id, config.image_token_id) == (POSE_ID, IMAGE_ID)
    assert (config.text.num_heads, config.text.num_kv_heads, config.text.rms_norm_eps) == (4, 2, 1e-5)
    assert (config.vision.image_size, config.vision.patch_size, config.vision.num_heads) == (28, 7, 2)


def wrapped_with_module(name: str) -> str:
    """DataParallel, and DeepSpeed's engine."""
    return f"module.{name}"


def wrapped_by_compile(name: str) -> str:
    """The whole, and each layer."""
    return "_orig_mod." + re.sub(r"(layers[.][0-9]+[.])", r"\1_orig_mod.", name)


def wrapped_by_fsdp(name: str) -> str:
    """Root and layers, with activation checkpointing inside, beneath DDP."""
    inner = re.sub(r"(layers[.][0-9]+[.])", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
    return f"module._fsdp_wrapped_module.{inner}"


@pytest.mark.parametrize("wrap", [wrapped_with_module, wrapped_by_compile, wrapped_by_fsdp])
def test_names_of_wrappers_are_seen_through(tmp_path: Path, wrap: Any) -> None:
    """A raw ``state_dict`` of whatever a training run had around the model."""
    model = make_llava_transformers(tmp_path / "src", "state_dict", "bin")
    file = tmp_path / "src" / "pytorch_model.bin"
    state = torch.load(file)
    torch.save({wrap(name): tensor for name, tensor in state.items()}, file)
    _, params = converted(tmp_path / "src", tmp_path / "out")
    assert_same(params, transformers_tree(model))
    name = next(iter(state))
    torch.save(state | {wrap(name): state[name]}, file)
    with pytest.raises(UserError, match="with and without a wrapper's prefix; remove one of them"):
        open_sources(SourceSpec(tmp_path / "src"))


def test_torchs_own_wrappers_have_these_names() -> None:
    linear = torch.nn.Linear(2, 2)
    assert "module.weight" in torch.nn.DataParallel(linear).state_dict()
    assert "_orig_mod.weight" in torch.compile(linear).state_dict()


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize("projector", ["inside", "beside"])
def test_llava_original(tmp_path: Path, tower: bool, projector: Any) -> None:
    sizes = Sizes(rows=VOCAB + 2)
    models = make_llava_original(
        tmp_path / "src", tower=tower, projector=projector, sizes=sizes, pose="<POSE>", dtype=torch.float16
    )
    if not tower:
        make_clip(tmp_path / "clip", models.clip)
    config, params = converted(tmp_path / "src", tmp_path / "out", vision=None if tower else tmp_path / "clip")
    expected = {path: leaf for path, leaf in flat_tree(models).items() if not path.startswith("pose_head")}
    assert_same(params, expected)
    assert config.image_token_id == -200


@pytest.mark.parametrize("fmt", ["bin", "safetensors"])
def test_chatpose(tmp_path: Path, fmt: Format) -> None:
    models = make_chatpose(tmp_path / "src", tmp_path / "clip", fmt, dtype=torch.bfloat16)
    config, params = converted(tmp_path / "src", tmp_path / "out", vision=tmp_path / "clip")
    assert_same(params, flat_tree(models))
    assert params["pose_head/fc2/kernel"].shape == (64, 144)
    assert config.pose_token_id == POSE_ID
    assert Processor.load(tmp_path / "out" / TOKENIZER, config).pose_token == "[SEG]"


def test_a_vocabulary_without_pose_token_gets_one(tmp_path: Path) -> None:
    """One new row, the mean of the others; the head as training starts it: every joint at rest."""
    models = make_llava_original(tmp_path / "src")
    config, params = converted(tmp_path / "src", tmp_path / "out")
    assert (config.text.vocab_size, config.text.base_vocab_size, config.pose_token_id) == (VOCAB + 1, VOCAB, VOCAB)
    embed, head = array(models.llama.model.embed_tokens.weight), array(models.llama.lm_head.weight)
    np.testing.assert_allclose(params["decoder/embed_tokens/added"], embed.mean(0, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(params["decoder/lm_head/added"], head.mean(0, keepdims=True).T, atol=1e-6)
    upright = np.tile([1, 0, 0, 0, 1, 0], (24, 1))
    upright[0, 4] = -1  # the root of a person who stands before the camera: half a turn about x
    np.testing.assert_array_equal(params["pose_head/fc2/bias"].reshape(24, 6), upright)
    assert Processor.load(tmp_path / "out" / TOKENIZER, config).pose_token == "<POSE>"


def test_padded_rows_are_used_before_new_ones_are_added(tmp_path: Path) -> None:
    """As LLaVA for transformers pads 32 002 tokens to 32 064 rows: ``<image>`` keeps its id, the pose token is next."""
    model = make_llava_transformers(tmp_path / "src", sizes=Sizes(rows=VOCAB + 8), pose=None)
    config, params = converted(tmp_path / "src", tmp_path / "out")
    assert (config.image_token_id, config.pose_token_id, config.text.vocab_size) == (IMAGE_ID, IMAGE_ID + 1, VOCAB + 8)
    assert_same(params, transformers_tree(model))


@pytest.mark.parametrize("said", ["nowhere", "config.json", "text_config: none"])
def test_the_pose_token_never_takes_the_pads_id(tmp_path: Path, said: str) -> None:
    """A tokenizer without its added tokens, beside LLaVA for transformers: ``<image>`` and ``<pad>`` come first behind the base
    vocabulary, whether or not config.json names the second."""
    make_llava_transformers(tmp_path / "src", sizes=Sizes(rows=VOCAB + 8), pose=None, image_token_id=VOCAB)
    settings = json.loads((tmp_path / "src" / "config.json").read_text())
    settings.pop("pad_token_id", None)
    settings["text_config"].pop("pad_token_id", None)
    if said != "nowhere":
        settings["pad_token_id"] = VOCAB + 1
    if said == "text_config: none":
        settings["text_config"]["pad_token_id"] = None
    write_config(tmp_path / "src", settings)
    config, _ = converted(tmp_path / "src", tmp_path / "out")
    assert (config.image_token_id, config.pose_token_id, config.text.vocab_size) == (VOCAB, VOCAB + 2, VOCAB + 8)
    assert config.pad_token_id == (0 if said == "nowhere" else VOCAB + 1)
    backend = Processor.load(tmp_path / "out" / TOKENIZER, config).tokenizer.backend
    assert [backend.id_to_token(VOCAB + i) for i in range(3)] == ["<image>", "<pad>", "<POSE>"]


def test_a_decoder_alone_says_what_it_lacks(tmp_path: Path) -> None:
    model = make_vicuna(tmp_path / "src")
    with pytest.raises(UserError, match=r"vision \(give --vision FOLDER, or --init-missing vision\)"):
        convert(SourceSpec(tmp_path / "src", init_missing=["projector"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    clip = make_llava_original(tmp_path / "llava").clip
    make_clip(tmp_path / "clip", clip)
    _, params = converted(
        tmp_path / "src", tmp_path / "out", vision=tmp_path / "clip", init_missing=["projector"], dtype="float32"
    )
    head = array(model.lm_head.weight)
    np.testing.assert_array_equal(params["decoder/lm_head/kernel"], head.T)
    assert np.abs(params["projector/fc1/kernel"]).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casting_rounds_as_numpy_does(tmp_path: Path, dtype: str) -> None:
    model = make_llava_transformers(tmp_path / "src", dtype=torch.float16)
    config, params = converted(tmp_path / "src", tmp_path / "out", dtype=dtype)
    assert config.param_dtype == config.dtype == dtype
    for path, leaf in transformers_tree(model).items():
        wanted = leaf if path.endswith("added") else leaf.astype(jax.numpy.dtype(dtype))
        np.testing.assert_array_equal(params[path], wanted, err_msg=path)


def test_float64_becomes_float32(tmp_path: Path) -> None:
    model = make_llava_transformers(tmp_path / "src", dtype=torch.float64)
    plan, params = load_source(tmp_path / "src")
    assert plan.config.param_dtype == plan.config.dtype == "float32"
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    assert_same(found, {path: leaf.astype(np.float32) for path, leaf in transformers_tree(model).items()})


def test_loading_a_source_directly_gives_the_same(tmp_path: Path) -> None:
    models = make_chatpose(tmp_path / "src", tmp_path / "clip")
    plan, params = load_source(SourceSpec(tmp_path / "src", vision=tmp_path / "clip"))
    found = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}
    assert_same(found, flat_tree(models))
    assert plan.ignored["model.smplx.v_template"] == "the body model comes from a body file"


def test_shared_tokenizer_model_is_completed(tmp_path: Path, shared_data: Path) -> None:
    """A bare ``tokenizer.model`` of 32 000 pieces becomes a tokenizer with BOS and the pose token."""
    sizes = dataclasses.replace(Sizes(), rows=32000, width=16, heads=2, kv_heads=1, layers=1)
    make_llava_original(tmp_path / "src", sizes=sizes)
    config, _ = converted(tmp_path / "src", tmp_path / "out", tokenizer=shared_data / "tokenizer")
    assert (config.text.base_vocab_size, config.text.vocab_size, config.pose_token_id) == (32000, 32001, 32000)
    processor = Processor.load(tmp_path / "out" / TOKENIZER, config)
    assert processor.tokenizer.pose_token_id == 32000


@pytest.mark.parametrize(
    ("transform", "shape"), [(Transform.SAME, (3, 4)), (Transform.TRANSPOSE, (3, 4)), (Transform.PATCHES, (5, 3, 2, 2))]
)
def test_transforms_have_inverses(transform: Transform, shape: tuple[int, ...]) -> None:
    """What export will stand on: inverse(forward(x)) is x, and any box read is that box of the whole."""
    source = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    leaf = transform.forward(source)
    assert transform.source_shape(leaf.shape) == shape
    np.testing.assert_array_equal(transform.inverse(leaf), source)
    box = (slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(transform.read(lambda index: source[index], leaf.shape, box), leaf[box])


@pytest.mark.parametrize("layout", list(layouts()), ids=lambda layout: layout.name)
def test_tables_are_invertible(layout: Any) -> None:
    """No leaf has two rows, and rows that share a source take different parts of it."""
    targets = [rule.target for rule in layout.rules]
    assert len(set(targets)) == len(targets)
    parts = [(rule.source, rule.rows) for rule in layout.rules]
    assert len(set(parts)) == len(parts)


def test_layouts_are_told_apart_by_names(tmp_path: Path) -> None:
    make_chatpose(tmp_path / "chatpose", tmp_path / "clip")
    make_llava_transformers(tmp_path / "hf", "4")
    make_llava_original(tmp_path / "llava", projector="beside", tower=False)
    make_vicuna(tmp_path / "vicuna")
    names = {
        folder.name: [source.layout.name for source in open_sources(SourceSpec(folder))]
        for folder in tmp_path.iterdir()
    }
    assert names == {
        "chatpose": ["chatpose"],
        "clip": ["clip"],
        "hf": ["llava_transformers_4"],
        "llava": ["llava_original_decoder", "llava_projector"],
        "vicuna": ["vicuna"],
    }
    assert (
        open_sources(SourceSpec(tmp_path / "llava", layout="llava_original"))[0].layout.name == "llava_original_decoder"
    )
    assert open_sources(SourceSpec(tmp_path / "llava", layout="vicuna"))[0].layout.name == "vicuna"


def test_a_projector_beside_a_decoder(tmp_path: Path) -> None:
    """As a file, in its folder, and in a folder that holds more; what config.json beside it says is followed."""
    make_vicuna(tmp_path / "vicuna")
    models = make_llava_original(tmp_path / "llava", projector="beside", tower=False)
    make_clip(tmp_path / "clip", models.clip)
    for projector in (tmp_path / "llava" / "mm_projector.bin", tmp_path / "llava"):
        plan, params = load_source(SourceSpec(tmp_path / "vicuna", vision=tmp_path / "clip", projector=projector))
        assert plan.config.vision.select_layer == -2
        np.testing.assert_array_equal(
            params["projector"]["fc1"]["kernel"], array(models.extra.mm_projector[0].weight).T
        )
    settings = json.loads((tmp_path / "llava" / "config.json").read_text())
    write_config(tmp_path / "llava", settings | {"mm_vision_select_layer": -3})
    for main in ("vicuna", "llava"):
        plan, _ = load_source(
            SourceSpec(tmp_path / main, vision=tmp_path / "clip", projector=tmp_path / "llava" / "mm_projector.bin")
        )
        assert plan.config.vision.select_layer == -3
    write_config(tmp_path / "llava", settings | {"mm_projector_type": "linear"})
    for main in ("vicuna", "llava"):
        with pytest.raises(UserError, match="mm_projector_type='linear' is not supported"):
            load_source(SourceSpec(tmp_path / main, vision=tmp_path / "clip", projector=tmp_path / "llava"))
