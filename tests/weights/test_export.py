"""Out and back: PyTorch → model folder → PyTorch is the same, bit by bit and logit by logit.

The peers are transformers (LLaVA-1.5, LLaMA, CLIP), peft, and plain torch for CHATPOSE-V0's own parts.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from PIL import Image

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration  # noqa: E402

from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params, bind  # noqa: E402
from chatpose_jax.models.config import HeadConfig, LoRAConfig, ModelConfig  # noqa: E402
from chatpose_jax.models.heads import HEADS  # noqa: E402
from chatpose_jax.models.heads.base import PoseHead, States  # noqa: E402
from chatpose_jax.models.layers import Linear  # noqa: E402
from chatpose_jax.models.quantize import QUANTIZATIONS, dequantize  # noqa: E402
from chatpose_jax.processing.processor import Encoded, Processor  # noqa: E402
from chatpose_jax.weights import writers  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import PASSENGERS, TOKENIZER, load_model_config, load_params  # noqa: E402
from chatpose_jax.weights.initial import initial  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402
from chatpose_jax.weights.save import save_folder  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402
from smpl_jax.pose import Pose  # noqa: E402
from smpl_jax.rotations import rotation_6d_to_matrix  # noqa: E402
from tests.heads import matrices  # noqa: E402

from ..numerics import Rounded, agree, rounded  # noqa: E402
from .sources import (  # noqa: E402
    POSE_ID,
    VOCAB,
    Names,
    Sizes,
    make_chatpose,
    make_clip,
    make_llava_original,
    make_llava_transformers,
    make_vicuna,
    transformers_name,
)
from .test_parity import (  # noqa: E402
    PHOTO,
    flat_forward,
    gram_schmidt,
    poses_of,
    torch_pixels,
    user,
)

LORA = LoRAConfig(rank=4, alpha=12.0, dropout=0.1, targets=("q_proj", "v_proj", "down_proj"))
slow = pytest.mark.slow
DTYPES = ["float32", "bfloat16", "float16"]
CONVERSATION = [
    user("How do they stand?", PHOTO),
    {"role": "assistant", "content": "It is <POSE>."},
    user("And who sits?"),
    {"role": "assistant", "content": "<POSE> or <POSE>."},
]


def model_folder(source: Path, out: Path, **options: Any) -> Path:
    convert(SourceSpec(source, **options), out)
    return out


def trained(folder: Path, out: Path, lora: LoRAConfig | None = LORA, *, passengers: bool = True) -> Path:
    """A model folder as training leaves it: adapters, the added rows and the head moved; the base as it was."""
    config = load_model_config(folder)
    wanted = dataclasses.replace(config, lora=lora)
    held = by_path(load_params(folder, abstract_params(config)))
    rng = np.random.default_rng(7)
    params: dict[str, Any] = {}
    for path, leaf in by_path(abstract_params(wanted)).items():
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 100
        noise = rng.standard_normal(leaf.shape).astype(np.float32) * fan_in**-0.5
        if path.endswith(("/lora_a", "/added")):
            params[path] = noise
        elif path.endswith("/lora_b"):
            params[path] = 0.2 * noise
        elif path.startswith("pose_head/"):
            params[path] = np.asarray(held[path]) + 0.2 * noise
        else:
            params[path] = held[path]
    processor = Processor.load(folder / TOKENIZER, config)
    return save_folder(
        out, wanted, unflatten_dict(params, sep="/"), processor=processor, passengers=folder if passengers else None
    )


def weights(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Equal in names, dtypes and every bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name


def answers(folder: Path, messages: Any = CONVERSATION) -> tuple[Encoded, Rounded, Rounded]:
    """(the encoded conversation, our logits, our matrices) of a model folder, in float32."""
    config = load_model_config(folder).replace(dtype="float32", param_dtype="float32")
    encoded = Processor.load(folder / TOKENIZER, config).encode(messages, add_generation_prompt=False)
    pixels = np.stack(encoded.images)[None] if encoded.images else None
    params = load_params(folder, abstract_params(config))
    with jax.default_matmul_precision("highest"):
        run = functools.partial(
            forward(config), ids=encoded.input_ids[None], pixels=pixels, positions=encoded.pose_positions - 1
        )
        return encoded, *rounded(run, params)


@functools.lru_cache
def forward(config: ModelConfig) -> Any:
    """Compiled once for all folders of a configuration."""

    def run(params: Any, ids: Any, pixels: Any, positions: Any) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        hidden = model(ids, pixel_values=pixels).hidden[0]
        return model.logits(hidden), matrices(model, hidden[positions])

    return jax.jit(run)


def head_on_its_own(folder: Path) -> Any:
    """The exported head in torch, as its description says."""
    about = json.loads((folder / "pose_head.json").read_text())
    assert about["layers"] == ["Linear", "ReLU", "Linear"]
    width, inner, outer = about["sizes"]
    head = torch.nn.Sequential(torch.nn.Linear(width, inner), torch.nn.ReLU(), torch.nn.Linear(inner, outer))
    head.load_state_dict(load_file(folder / "pose_head.safetensors"))
    return head


@torch.no_grad()
def llava_answers(model: Any, encoded: Encoded, image_token_id: int, head: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = torch.from_numpy(encoded.input_ids).long()
    # A vocabulary without the placeholder has it as -200.
    ids[ids < 0] = image_token_id
    out = model(input_ids=ids[None], pixel_values=torch_pixels(encoded), output_hidden_states=True)
    hidden = out.hidden_states[-1][0, encoded.pose_positions - 1]
    return out.logits[0].numpy(), gram_schmidt(head(hidden.float()).reshape(-1, 24, 6))


# --------------------------------------------------------------------------------------------------------- bit by bit


@pytest.mark.parametrize(("dtype", "names"), list(zip(DTYPES, ["4", "5", "state_dict"])))
def test_llava_for_transformers_comes_back_bit_by_bit(tmp_path: Path, dtype: str, names: Names) -> None:
    """Whichever of its names it came in, in those that every release reads."""
    model = make_llava_transformers(tmp_path / "src", names, "bin", dtype=getattr(torch, dtype), shards=2)
    model_folder(tmp_path / "src", tmp_path / "jax")
    result = export(tmp_path / "jax", tmp_path / "back", "transformers", max_shard_size="300KB")
    expected = {transformers_name(name, "4"): tensor for name, tensor in model.state_dict().items()}
    assert_same(weights(tmp_path / "back"), expected)
    files = [file for file in result.files if file.startswith("model")]
    assert len(files) > 2
    assert all((tmp_path / "back" / file).stat().st_size < 310_000 for file in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize(
    ("tower", "projector"),
    [
        (True, "inside"),
        (False, "beside"),
        pytest.param(True, "beside", marks=slow),
        pytest.param(False, "inside", marks=slow),
    ],
)
def test_original_llava_comes_back_bit_by_bit(tmp_path: Path, tower: bool, projector: Any) -> None:
    models = make_llava_original(
        tmp_path / "src", "bin", tower=tower, projector=projector, pose="<POSE>", dtype=torch.float16,
        sizes=Sizes(rows=VOCAB + 2),
    )  # fmt: skip
    if not tower:
        make_clip(tmp_path / "clip", models.clip)
    model_folder(tmp_path / "src", tmp_path / "jax", vision=None if tower else tmp_path / "clip")
    export(tmp_path / "jax", tmp_path / "back", "llava")
    prefix = "model.vision_tower.vision_tower.vision_model."
    expected = dict(models.llama.state_dict())
    expected |= {f"model.{name}": t for name, t in models.extra.state_dict().items() if "mm_projector" in name}
    expected |= {prefix + name.removeprefix("vision_model."): t for name, t in models.clip.state_dict().items()}
    assert_same(weights(tmp_path / "back"), expected)


def test_vicuna_and_clip_come_back_bit_by_bit(tmp_path: Path) -> None:
    """A decoder alone and CLIP, which the layout ``llava`` puts together; all that is new is the projector and ``<POSE>``."""
    vicuna = make_vicuna(tmp_path / "src")
    clip = make_llava_original(tmp_path / "llava").clip
    make_clip(tmp_path / "clip", clip)
    model_folder(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "clip", init_missing=["projector"])
    export(tmp_path / "jax", tmp_path / "back", "llava")
    found = weights(tmp_path / "back")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == VOCAB + 1
        found[name] = found[name][:VOCAB]
    prefix = "model.vision_tower.vision_tower.vision_model."
    expected = dict(vicuna.state_dict())
    expected |= {prefix + name.removeprefix("vision_model."): t for name, t in clip.state_dict().items()}
    assert_same({name: tensor for name, tensor in found.items() if "mm_projector" not in name}, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=slow)])
def test_chatpose_comes_back_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    """Buffers of RoPE and SMPL-X too, which the model does not use: in their own dtype."""
    make_chatpose(tmp_path / "src", tmp_path / "clip", "safetensors", dtype=getattr(torch, dtype))
    model_folder(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "clip")
    export(tmp_path / "jax", tmp_path / "back", "chatpose")
    expected = weights(tmp_path / "src")
    assert any(name.endswith("inv_freq") for name in expected)
    assert "model.smplx.v_template" in expected
    assert_same(weights(tmp_path / "back"), expected)


def test_layouts_change_hands_bit_by_bit(tmp_path: Path) -> None:
    """LLaVA for transformers → original names → transformers, passengers of the tower included."""
    model = make_llava_transformers(tmp_path / "src", dtype=torch.bfloat16)
    model_folder(tmp_path / "src", tmp_path / "jax")
    export(tmp_path / "jax", tmp_path / "llava", "llava")
    model_folder(tmp_path / "llava", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "back", "transformers")
    expected = {transformers_name(name, "4"): tensor for name, tensor in model.state_dict().items()}
    found = weights(tmp_path / "back")
    assert_same(found, expected)
    mine, theirs = load_model_config(tmp_path / "jax"), load_model_config(tmp_path / "again")
    assert theirs == mine.replace(image_token_id=-200)
    head = (load_file(tmp_path / name / "pose_head.safetensors") for name in ("llava", "back"))
    assert_same(next(head), next(head))


# ----------------------------------------------------------------------------------------------- whole, in transformers


@pytest.mark.parametrize("passengers", [True, False], ids=["whole tower", "tower cut"])
def test_transformers_gives_the_same_logits_with_the_adapters_merged(tmp_path: Path, passengers: bool) -> None:
    make_llava_transformers(tmp_path / "src")
    folder = trained(model_folder(tmp_path / "src", tmp_path / "jax"), tmp_path / "lora", passengers=passengers)
    result = export(folder, tmp_path / "hf", "transformers")
    assert "adapters merged: rank 4, alpha 12, on q_proj, v_proj, down_proj" in result.notes
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vision_config.num_hidden_layers == (4 if passengers else 3)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    encoded, logits, matrices = answers(folder)
    expected, poses = llava_answers(model.eval(), encoded, -1, head_on_its_own(tmp_path / "hf"))
    assert expected.std() > 0.1
    agree(logits, expected)
    agree(matrices, poses)
    if not passengers:
        return
    # A model without adapters is merged already.
    model_folder(tmp_path / "hf", tmp_path / "back")
    assert load_model_config(tmp_path / "back").lora is None
    again = export(tmp_path / "back", tmp_path / "hf2", "transformers")
    assert "the model has no adapters" in again.notes
    assert_same(weights(tmp_path / "hf2"), weights(tmp_path / "hf"))
    _, same, poses = answers(tmp_path / "back")
    agree(same, logits)
    agree(poses, matrices)


def test_a_placeholder_outside_the_vocabulary_moves_into_it_for_transformers(tmp_path: Path) -> None:
    """CHATPOSE-V0, whose placeholder is -200, with a row for ``<image>``: the logits stay; transformers' own processor
    finds tokenizer, placeholder and image."""
    models = make_chatpose(tmp_path / "src", tmp_path / "clip")
    folder = model_folder(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "clip")
    export(folder, tmp_path / "hf", "transformers")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    image_id = model.config.image_token_id
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == image_id >= VOCAB
    assert processor.tokenizer.convert_tokens_to_ids("[SEG]") == POSE_ID
    inputs = processor(images=Image.fromarray(PHOTO), text="USER: <image>\nHi ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == image_id).sum() == 16
    mine = Processor.load(folder / TOKENIZER, load_model_config(folder)).encode([user("Hi", PHOTO)])
    np.testing.assert_allclose(inputs["pixel_values"][0], torch_pixels(mine)[0], atol=1e-6)
    encoded, logits, matrices = answers(folder)
    expected, poses = llava_answers(model.eval(), encoded, image_id, head_on_its_own(tmp_path / "hf"))
    agree(logits, expected[:, : logits.value.shape[1]])
    agree(matrices, poses)
    reference, hidden = flat_forward(models, encoded, -200)
    agree(logits, reference)
    with torch.no_grad():
        agree(matrices, poses_of(models, hidden[encoded.pose_positions - 1]))


def test_a_new_image_row_is_the_mean_of_the_others(tmp_path: Path) -> None:
    models = make_llava_original(tmp_path / "src", tower=True)  # 1024 rows; the conversion adds the pose token
    folder = model_folder(tmp_path / "src", tmp_path / "jax")
    result = export(folder, tmp_path / "hf", "transformers")
    assert any("a row for <image>: id 1025" in note for note in result.notes)
    tensors = weights(tmp_path / "hf")
    for name, matrix in (("model.embed_tokens", models.llama.model.embed_tokens), ("lm_head", models.llama.lm_head)):
        found = tensors[f"language_model.{name}.weight"]
        assert found.shape == (VOCAB + 2, 64)
        np.testing.assert_allclose(found[-1], matrix.weight.detach().mean(0), atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids(["<POSE>", "<image>"]) == [1024, 1025]
    assert load_model_config(model_folder(tmp_path / "hf", tmp_path / "back")).image_token_id == 1025


@pytest.mark.parametrize("format", [pytest.param("llava", marks=slow), "chatpose"])
def test_flat_layouts_give_the_same_logits_and_poses(tmp_path: Path, format: str) -> None:
    models = make_chatpose(tmp_path / "src", tmp_path / "clip")
    folder = trained(model_folder(tmp_path / "src", tmp_path / "jax", vision=tmp_path / "clip"), tmp_path / "lora")
    export(folder, tmp_path / "flat", format)
    state = weights(tmp_path / "flat")
    if format == "llava":
        head = load_file(tmp_path / "flat" / "pose_head.safetensors")
        state |= {f"model.text_hidden_fcs.0.{name}": tensor for name, tensor in head.items()}
        assert any("vision_tower" in name for name in state)
        assert any(name.endswith("post_layernorm.weight") for name in state)
    state = {name: t for name, t in state.items() if "vision_tower" not in name and "smplx" not in name}
    state = {name: t for name, t in state.items() if not name.endswith("inv_freq")}
    mine = {
        name.removeprefix("model."): t for name, t in state.items() if "mm_projector" in name or "text_hidden" in name
    }
    models.extra.load_state_dict(mine)
    models.llama.load_state_dict({name: t for name, t in state.items() if name.removeprefix("model.") not in mine})
    encoded, logits, matrices = answers(folder)
    expected, hidden = flat_forward(models, encoded, -200)
    agree(logits, expected)
    with torch.no_grad():
        agree(matrices, poses_of(models, hidden[encoded.pose_positions - 1]))
    config = json.loads((tmp_path / "flat" / "config.json").read_text())
    assert (config["vocab_size"], config["mm_vision_select_layer"]) == (VOCAB + 2, -2)


def test_a_tower_without_its_end_comes_back(tmp_path: Path) -> None:
    """A model that started here has no passengers; LLaVA's own code, which takes CLIP by name, is given none."""
    make_llava_original(tmp_path / "src", tower=True)
    folder = model_folder(tmp_path / "src", tmp_path / "jax")
    shutil.rmtree(folder / PASSENGERS)
    result = export(folder, tmp_path / "llava", "llava")
    assert any("the vision tower ends after block 3" in note for note in result.notes)
    assert "mm_vision_tower" not in json.loads((tmp_path / "llava" / "config.json").read_text())
    back = model_folder(tmp_path / "llava", tmp_path / "back")
    there, found = (by_path(load_params(f, abstract_params(load_model_config(f)))) for f in (folder, back))
    assert there.keys() == found.keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in there.items())
    assert load_model_config(back).vision.num_used_layers == 3


def test_merging_is_done_in_float32_and_rounded_once(tmp_path: Path) -> None:
    make_llava_transformers(tmp_path / "src", dtype=torch.bfloat16)
    folder = trained(model_folder(tmp_path / "src", tmp_path / "jax"), tmp_path / "lora")
    export(folder, tmp_path / "hf", "transformers")
    params = by_path(load_params(folder, abstract_params(load_model_config(folder))))
    kernel, a, b = (np.asarray(params[f"decoder/layers/mlp/down_proj/{n}"][1]) for n in ("kernel", "lora_a", "lora_b"))
    exact = kernel.astype(np.float64) + 3.0 * a.astype(np.float64) @ b.astype(np.float64)
    found = weights(tmp_path / "hf")["language_model.model.layers.1.mlp.down_proj.weight"]
    assert found.dtype == torch.bfloat16
    exact = torch.from_numpy(exact.T.copy())
    rounded = exact.to(torch.bfloat16)
    # Where float32's own rounding decides between two neighbours, either is right.
    differs = found != rounded
    assert differs.float().mean() < 1e-3
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8).all()
    # Without merging the base comes out as it went in.
    export(folder, tmp_path / "base", "transformers", merge=False)
    base = weights(tmp_path / "base")["language_model.model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(base.float().numpy(), kernel.T.astype(np.float32))


def test_dtype_of_the_result(tmp_path: Path) -> None:
    model = make_llava_transformers(tmp_path / "src", dtype=torch.float32)
    folder = model_folder(tmp_path / "src", tmp_path / "jax")
    export(folder, tmp_path / "hf", "transformers", dtype="float16")
    expected = {transformers_name(name, "4"): t.to(torch.float16) for name, t in model.state_dict().items()}
    assert_same(weights(tmp_path / "hf"), expected)
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.float16
    assert load_file(tmp_path / "hf" / "pose_head.safetensors")["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_goes_out_as_the_numbers_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    make_llava_transformers(tmp_path / "src", dtype=torch.float16)
    folder = model_folder(tmp_path / "src", tmp_path / "jax", quantize=kind)
    params = by_path(load_params(folder, abstract_params(load_model_config(folder))))

    def values(name: str, layer: int) -> np.ndarray:
        codes, scale = (np.asarray(params[path])[layer] for path in (name, QUANTIZATIONS[kind].scale_path(name)))
        assert codes.dtype == QUANTIZATIONS[kind].codes
        return dequantize(codes, scale)

    export(folder, tmp_path / "hf", "transformers", dtype="float32")
    found = weights(tmp_path / "hf")["language_model.model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_array_equal(found.numpy(), values("decoder/layers/mlp/up_proj/kernel", 2).T)
    # With adapters on top.
    lora = by_path(load_params(folder, abstract_params(load_model_config(folder))))
    config = load_model_config(folder).replace(lora=LORA)
    for path, leaf in by_path(abstract_params(config)).items():
        lora.setdefault(path, np.full(leaf.shape, 0.01, np.float32))
    processor = Processor.load(folder / TOKENIZER, config)
    save_folder(tmp_path / "lora", config, unflatten_dict(lora, sep="/"), processor=processor)
    export(tmp_path / "lora", tmp_path / "merged", "transformers", dtype="float32")
    found = weights(tmp_path / "merged")["language_model.model.layers.0.self_attn.q_proj.weight"]
    expected = values("decoder/layers/attn/q_proj/kernel", 0) + LORA.scale * LORA.rank * 1e-4
    np.testing.assert_allclose(found.numpy(), expected.T, atol=1e-6)


def test_images_padded_here_are_padded_there(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "jax")
    file = tmp_path / "jax" / TOKENIZER / "processor.json"
    settings = json.loads(file.read_text())
    settings["images"]["fit"] = "pad"
    file.write_text(json.dumps(settings))
    export(tmp_path / "jax", tmp_path / "hf", "transformers")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    found = processor.image_processor(Image.fromarray(PHOTO), return_tensors="pt")["pixel_values"][0]
    mine = Processor.load(tmp_path / "jax" / TOKENIZER, load_model_config(plain)).images(Image.fromarray(PHOTO))
    np.testing.assert_allclose(found, mine.transpose(2, 0, 1), atol=0.05)
    back = model_folder(tmp_path / "hf", tmp_path / "back")
    assert Processor.load(back / TOKENIZER, load_model_config(back)).images.fit == "pad"
    # LLaVA's own code asks its config.json.
    export(tmp_path / "jax", tmp_path / "llava", "llava")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["image_aspect_ratio"] == "pad"
    export(plain, tmp_path / "cropped", "llava")
    assert "image_aspect_ratio" not in json.loads((tmp_path / "cropped" / "config.json").read_text())


class ListedHead(PoseHead):
    """A head whose layers are a list, with an option."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, hidden: int = 8):
        self.layers = nnx.List(
            [Linear(width, hidden, bias=True, rngs=rngs), Linear(hidden, self.num_joints * 6, bias=True, rngs=rngs)]
        )

    def __call__(self, states: States, key: jax.Array) -> Pose:
        x = states.token
        for layer in self.layers:
            x = layer(x)
        return Pose(rotation_6d_to_matrix(x.reshape(*x.shape[:-1], self.num_joints, 6), order="columns"), "camera")


def test_a_head_of_another_kind_goes_out_and_comes_back(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, "listed_in_test_export", f"{__name__}:ListedHead")
    config = load_model_config(plain).replace(head=HeadConfig("listed_in_test_export", (("hidden", 12),)))
    params = by_path(load_params(plain, abstract_params(load_model_config(plain))))
    params = {path: leaf for path, leaf in params.items() if not path.startswith("pose_head/")}
    head = initial("pose_head", config, 3)
    processor = Processor.load(plain / TOKENIZER, config)
    save_folder(tmp_path / "jax", config, unflatten_dict(params | head, sep="/"), processor=processor)
    with pytest.raises(
        UserError,
        match=r"supports only the pose head 'mlp' with 6D .*, this model has .*'listed_in_test_export'",
    ):
        export(tmp_path / "jax", tmp_path / "out", "chatpose")
    export(tmp_path / "jax", tmp_path / "hf", "transformers")
    assert "layers.1.kernel" in load_file(tmp_path / "hf" / "pose_head.safetensors")
    back = model_folder(tmp_path / "hf", tmp_path / "back")
    assert load_model_config(back).head == config.head
    found = by_path(load_params(back, abstract_params(load_model_config(back))))
    assert {path for path in found if path.startswith("pose_head/")} == head.keys()
    for path, leaf in head.items():
        np.testing.assert_array_equal(found[path], leaf)
    quantised, _ = load_source(SourceSpec(tmp_path / "hf", quantize="int8"))
    assert head.keys() < quantised.leaves.keys()


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_llava_transformers(folder / "src", sizes=Sizes(width=16, heads=2, kv_heads=1, mlp=32, layers=1))
    return model_folder(folder / "src", folder / "jax")


def test_refusals(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for message, options in {
        "no format 'onnx'; expected one of transformers, llava, chatpose, peft": {"format": "onnx"},
        "there exists already; choose another folder": {"out": tmp_path / "there"},
        "no adapters to write for peft; choose --format transformers": {"format": "peft"},
        "'5 pounds' is not a file size": {"max_shard_size": "5 pounds"},
        "dtype 'int8': expected one of": {"dtype": "int8"},
        "a PyTorch checkpoint, not a model folder": {"folder": plain.parent / "src"},
    }.items():
        arguments: dict[str, Any] = {"folder": plain, "out": tmp_path / "out", "format": "transformers"} | options
        with pytest.raises(UserError, match=message):
            export(**arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_an_export_that_fails(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is full after the first shard, then an interrupt."""
    whole, written = writers.write_safetensors, []

    def full(file: Path, *args: Any) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(file)
        whole(file, *args)

    monkeypatch.setattr(writers, "write_safetensors", full)
    command = ["export", str(plain), str(tmp_path / "out"), "--format", "transformers", "--max-shard-size", "20KB"]
    assert main([*command, "--quiet"]) == 2
    assert re.search(
        r"the disk is full; the export needs [\d.e-]+ GB; nothing was left behind", capsys.readouterr().err
    )
    assert len(written) == 1
    assert list(tmp_path.iterdir()) == []

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writers, "write_safetensors", interrupted)
    assert main(command) == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(writers, "write_safetensors", whole)
    assert main(command) == 0
    assert "model-00001-of-" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--max-shard-size", "20KB"]], ids=["one file", "shards"])
def test_a_limit_on_file_sizes_says_where(plain: Path, tmp_path: Path, options: list[str]) -> None:
    """The system's own error, of a process with ``ulimit -f``, names no file."""
    script = (
        "import resource, sys; from chatpose_jax.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = ["export", str(plain), str(tmp_path / "out"), "--format", "llava", "--quiet", *options]
    run = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    message = (
        r"out: a file would pass the limit on file sizes .*needs [\d.e-]+ GB; --max-shard-size makes smaller files"
    )
    assert re.search(message, run.stderr), run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["EDQUOT", "EROFS", "EACCES", "EIO"])
def test_what_the_system_refuses_is_one_line(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def refused(*args: Any) -> None:
        raise OSError(getattr(errno, reason), "without a path")

    monkeypatch.setattr(writers, "write_safetensors", refused)
    with pytest.raises(UserError, match=r"out: .*; the export needs .* GB; nothing was left behind"):
        export(plain, tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_not_said_of_what_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(plain / "params" / "d"))

    monkeypatch.setattr(writers, "write_safetensors", refused)
    with pytest.raises(PermissionError, match="params/d"):
        export(plain, tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_description_must_stand_beside_the_head(plain: Path, tmp_path: Path) -> None:
    export(plain, tmp_path / "hf", "transformers")
    shutil.copytree(tmp_path / "hf", tmp_path / "bare")
    (tmp_path / "bare" / "pose_head.json").unlink()
    with pytest.raises(UserError, match=r"pose_head\.safetensors without pose_head\.json"):
        convert(tmp_path / "bare", tmp_path / "out")
    (tmp_path / "bare" / "pose_head.json").write_text('{"format": "chatpose-pose-head", "version": 1}')
    with pytest.raises(UserError, match="not a description of a pose head"):
        convert(tmp_path / "bare", tmp_path / "out")
    good = json.loads((tmp_path / "hf" / "pose_head.json").read_text())
    for change, message in (
        ({"version": 2}, r"expected 'chatpose-pose-head' in version 1"),
        ({"num_joints": 1e999}, "not a description of a pose head"),
        ({"num_joints": 52}, "num_joints is 52, but this head gives 24"),
        ({"name": "../mlp"}, r"its pose head '\.\./mlp' is not part of this program"),
        ({"options": {"a": {"b": []}}}, r"not a description of a pose head .*model.head.options: expected rows"),
    ):
        (tmp_path / "bare" / "pose_head.json").write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "bare", tmp_path / "out")


def test_passengers_of_an_unknown_layout_are_an_error(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "jax")
    (file,) = (tmp_path / "jax" / PASSENGERS).iterdir()
    file.rename(file.with_stem("someone_elses"))
    with pytest.raises(UserError, match="its name is not a known layout"):
        export(tmp_path / "jax", tmp_path / "out", "transformers")


def test_a_file_of_announced_size(tmp_path: Path) -> None:
    """The writer refuses to write a file that its header does not describe."""
    short = writers.Tensor("x", np.dtype(np.float32), (4,), lambda: iter([np.zeros(3, np.float32)]))
    with pytest.raises(ValueError, match="12 bytes were written, expected 16"):
        writers.write_safetensors(tmp_path / "x.safetensors", [short])
    wrong = dataclasses.replace(short, blocks=lambda: iter([np.zeros(4, np.float16)]))
    with pytest.raises(ValueError, match="float16, expected float32"):
        writers.write_safetensors(tmp_path / "x.safetensors", [wrong])


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "BLOCK", 64)
    boxes = list(writers.row_blocks((10, 4), 4, multiple=3))
    assert [(box[0].start, box[0].stop) for box in boxes] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [box[0].stop for box in writers.row_blocks((5,), 4)] == [5]


def test_small_blocks_write_the_same(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(plain, tmp_path / "one", "transformers")
    monkeypatch.setattr(writers, "BLOCK", 1000)
    export(plain, tmp_path / "two", "transformers")
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"))
