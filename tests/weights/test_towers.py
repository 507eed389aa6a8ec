"""SigLIP, LLaVA-1.6 and LLaVA-OneVision: against transformers, there and back. And bases without a tower."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor  # noqa: E402

from chatpose_jax.chat import ChatPose  # noqa: E402
from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.generate import generate  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params, bind  # noqa: E402
from chatpose_jax.processing.processor import Encoded  # noqa: E402
from chatpose_jax.train.trainable import flatten  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import PASSENGERS, load_model_config  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .sources import (  # noqa: E402
    IMAGE_ID,
    Names,
    Sizes,
    make_llava_next,
    make_llava_onevision,
    make_llava_original,
    make_siglip,
    make_vicuna,
    transformers_name,
)
from .test_backbones import make as make_language  # noqa: E402
from .test_export import assert_same, model_folder, weights  # noqa: E402
from .test_parity import PHOTO, load, ours, torch_pixels, user  # noqa: E402

SCALE = 2e-5
"""Largest difference of float32, of the largest value."""
VICUNA = {"template": "vicuna_v1"}
"""The small models have the tiny tokenizer, which lacks Qwen2's control tokens."""
MAKERS: dict[str, Callable[..., Any]] = {"next": make_llava_next, "onevision": make_llava_onevision}
ASKED = [
    user("How do they stand?", PHOTO),
    {"role": "assistant", "content": "It is <POSE>."},
    user("And here?", PHOTO[:, ::2]),
]


def close(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() <= SCALE * np.abs(expected).max()


@torch.no_grad()
def features_of(peer: Any, encoded: Encoded) -> Any:
    """(I, N, D), the features of images that each have one view, by transformers."""
    pixels, sizes = torch_pixels(encoded), torch.tensor([PHOTO.shape[:2]] * len(encoded.images))
    if peer.config.model_type == "llava_onevision":
        # As it treats several images in one conversation.
        found = peer.get_image_features(
            pixel_values=pixels[:, None], image_sizes=sizes, batch_num_images=torch.tensor([max(2, len(pixels))])
        )
        return torch.stack(list(found.pooler_output))
    # LLaVA-1.6 always gives an image several views there. Packing one view is a branch of its own.
    states = peer.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    projected = peer.model.multi_modal_projector(states[peer.config.vision_feature_layer][:, 1:])
    packed, _ = peer.model.pack_image_features(
        projected[:, None], sizes, peer.config.vision_feature_select_strategy, peer.model.image_newline
    )
    return torch.stack(packed)


@torch.no_grad()
def embedded(peer: Any, encoded: Encoded) -> Any:
    ids = torch.from_numpy(encoded.input_ids).long()
    embeds = peer.get_input_embeddings()(ids).clone()
    embeds[ids == IMAGE_ID] = features_of(peer, encoded).flatten(0, 1)
    return embeds[None]


def ask(model: ChatPose, peer: Any) -> None:
    """Features, logits, and a greedy answer of 16 tokens."""
    encoded = model.processor.encode(ASKED)
    assert (encoded.input_ids == IMAGE_ID).sum() == 2 * model.config.image_tokens == 2 * 17
    pixels = np.stack(encoded.images)[None]
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda params: bind(model.config, params).encode_images(pixels)[0])(model.params)
        close(found, features_of(peer, encoded).flatten(0, 1))
        logits, _ = ours(model, encoded)
        embeds = embedded(peer, encoded)
        with torch.no_grad():
            close(logits.value, peer(inputs_embeds=embeds).logits[0])
        greedy = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": model.config.eos_token_id}
        expected = peer.generate(inputs_embeds=embeds, pad_token_id=0, suppress_tokens=[IMAGE_ID], **greedy)
        answer = generate(model.config, model.params, [encoded.input_ids], [encoded.images], max_new_tokens=16)
    assert answer.tokens[0].tolist() == expected[0].tolist()
    assert len(set(answer.tokens[0].tolist())) > 3


@pytest.mark.parametrize("kind", MAKERS)
def test_features_logits_and_answers_are_transformers(kind: str, tmp_path: Path) -> None:
    peer = MAKERS[kind](tmp_path / "src")
    model = load(tmp_path / "src", tmp_path / "out", **VICUNA)
    assert model.config.image_newline
    assert {"projector/newline"} <= set(flatten(model.params))
    ask(model, peer)


def test_onevision_as_a_whole_takes_several_images_as_we_do(tmp_path: Path) -> None:
    """One call, ids and pixels in, by the path for several images."""
    peer = make_llava_onevision(tmp_path / "src", tied=True)
    model = load(tmp_path / "src", tmp_path / "out", **VICUNA)
    assert model.config.text.tied and model.config.text.qkv_bias and "lm_head" not in model.params["decoder"]
    encoded = model.processor.encode(ASKED)
    logits, _ = ours(model, encoded)
    with torch.no_grad():
        found = peer(
            input_ids=torch.from_numpy(encoded.input_ids).long()[None],
            pixel_values=torch_pixels(encoded)[:, None],
            image_sizes=torch.tensor([PHOTO.shape[:2]] * 2),
            batch_num_images=torch.tensor([2]),
        )
    close(logits.value, found.logits[0])


@pytest.mark.parametrize(
    ("kind", "names", "dtype"),
    [
        ("next", "4", "float16"),
        ("next", "state_dict", "float32"),
        ("onevision", "5", "bfloat16"),
        ("onevision", "4_state_dict", "float32"),
    ],
)
def test_they_come_back_bit_by_bit(kind: str, names: Names, dtype: str, tmp_path: Path) -> None:
    """And transformers loads what was written, with its processor, and gives the same."""
    peer = MAKERS[kind](tmp_path / "src", names, dtype=getattr(torch, dtype))
    model_folder(tmp_path / "src", tmp_path / "jax", **VICUNA)
    export(tmp_path / "jax", tmp_path / "back", "transformers")
    expected = {transformers_name(name, "4"): tensor for name, tensor in peer.state_dict().items()}
    assert_same(weights(tmp_path / "back"), expected)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(again) is type(peer)
    model = load(tmp_path / "back", tmp_path / "again", **VICUNA)
    assert (
        dataclasses.replace(load_model_config(tmp_path / "jax"), dtype="float32")
        == dataclasses.replace(model.config, scan_layers=True)
        or dtype != "float32"
    )
    with torch.no_grad():
        encoded = model.processor.encode(ASKED)
        embeds = embedded(again, encoded)
        source = AutoModelForImageTextToText.from_pretrained(tmp_path / "src", dtype=torch.float32)
        assert torch.equal(again(inputs_embeds=embeds).logits, source(inputs_embeds=embeds).logits)
    first, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "back"))
    kept = ("image_grid_pinpoints", "vision_aspect_ratio", "video_token_index", "model_type", "vision_feature_layer")
    assert {key: back.get(key) for key in kept} == {key: first.get(key) for key in kept}
    about = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert about["image_grid_pinpoints"] == back["image_grid_pinpoints"]  # transformers counts the views in both
    about = json.loads((tmp_path / "back/processor_config.json").read_text())
    assert about["processor_class"] == type(peer).__name__.replace("ForConditionalGeneration", "Processor")
    if kind == "next":  # that of LLaVA-OneVision needs torchvision, for videos
        assert type(AutoProcessor.from_pretrained(tmp_path / "back")).__name__ == about["processor_class"]
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "back")
    pixels = theirs([[PHOTO, PHOTO]] if kind == "onevision" else PHOTO, return_tensors="np")
    first = pixels["pixel_values"][0][0].transpose(1, 2, 0)
    assert np.abs(first - encoded.images[0]).max() < 1e-3


@pytest.mark.parametrize("head", [False, True])
def test_siglips_pooling_head_is_a_passenger(head: bool, tmp_path: Path) -> None:
    peer = make_llava_onevision(tmp_path / "src", "5", head=head)
    model_folder(tmp_path / "src", tmp_path / "jax", **VICUNA)
    held = list((tmp_path / "jax" / PASSENGERS).glob("*.safetensors"))
    with safe_open(held[0], "np") as file:
        assert len(list(file.keys())) == (13 if head else 2)
    export(tmp_path / "jax", tmp_path / "back", "transformers")
    assert_same(
        weights(tmp_path / "back"), {transformers_name(name, "4"): tensor for name, tensor in peer.state_dict().items()}
    )
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["vision_config"]["vision_use_head"] is head


def test_a_tower_and_a_fresh_projector_for_a_base_without_one(tmp_path: Path) -> None:
    """Google's file has two towers; the features are those of the block before the last, as in LLaVA-OneVision."""
    peer = make_siglip(tmp_path / "siglip")
    make_vicuna(tmp_path / "src")
    model = load(tmp_path / "src", tmp_path / "out", vision=tmp_path / "siglip", init_missing=["projector"])
    vision = model.config.vision
    assert vision is not None and (vision.backbone, vision.select_layer, vision.image_size) == ("siglip", -2, 30)
    assert not model.config.image_newline and model.config.image_tokens == 16
    images = model.processor.encode([user("Who?", PHOTO)])
    assert np.abs(images.images[0]).max() <= 1
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda params, x: bind(model.config, params).vision(x))(model.params, np.stack(images.images))
    with torch.no_grad():
        states = peer.vision_model(torch_pixels(images), output_hidden_states=True).hidden_states
    close(found, states[-2])
    assert not np.allclose(found, states[-1], atol=1e-2)


def test_siglip_exports_in_llavas_class(tmp_path: Path) -> None:
    """A plain base with SigLIP and a projector is a LlavaForConditionalGeneration, whose tower keeps all patches."""
    make_siglip(tmp_path / "siglip")
    make_vicuna(tmp_path / "src")
    model = load(tmp_path / "src", tmp_path / "out", vision=tmp_path / "siglip", init_missing=["projector"])
    export(tmp_path / "out", tmp_path / "back", "transformers")
    peer = AutoModelForImageTextToText.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert (type(peer).__name__, peer.config.vision_feature_select_strategy) == (
        "LlavaForConditionalGeneration",
        "full",
    )
    encoded = model.processor.encode(ASKED)
    ids = torch.from_numpy(encoded.input_ids).long()
    ids[ids == model.config.image_token_id] = peer.config.image_token_id
    with torch.no_grad():
        expected = peer(input_ids=ids[None], pixel_values=torch_pixels(encoded)).logits[
            0, :, : model.config.text.vocab_size
        ]
    logits, _ = ours(model, encoded)
    close(logits.value, expected)
    for format in ("llava", "chatpose"):
        with pytest.raises(UserError, match="SigLIP"):
            export(tmp_path / "out", tmp_path / format, format)


def test_llava_1_6_under_its_authors_names(tmp_path: Path) -> None:
    """One view with the newline; config.json asks for more views, which the report says."""
    make_llava_original(tmp_path / "src", "safetensors", shards=1)
    newline = torch.randn(Sizes().width)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "src/model.safetensors")
    save_file({**state, "model.image_newline": newline}, tmp_path / "src/model.safetensors")
    config = json.loads((tmp_path / "src/config.json").read_text())
    config |= {
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[28, 56]],
    }
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    plan = plan_conversion(SourceSpec(tmp_path / "src", **VICUNA))
    assert plan.config.image_newline and plan.images is not None
    assert plan.images.settings.fit == "stretch"
    assert "one view of the whole image, 17 tokens" in plan.images.describe()
    model = load(tmp_path / "src", tmp_path / "out", **VICUNA)
    np.testing.assert_array_equal(model.params["projector"]["newline"], newline)
    export(tmp_path / "out", tmp_path / "back", "llava")
    expected = {**state, "model.image_newline": newline}
    back = weights(tmp_path / "back")
    grown = ("model.embed_tokens.weight", "lm_head.weight")  # by the pose token's row
    assert_same(
        {name: tensor[: len(expected[name])] if name in grown else tensor for name, tensor in back.items()}, expected
    )
    about = json.loads((tmp_path / "back/config.json").read_text())
    assert (about["mm_patch_merge_type"], about["image_aspect_ratio"]) == ("spatial_unpad", "anyres")
    assert plan_conversion(SourceSpec(tmp_path / "back")).config.image_newline


def test_llava_1_6_from_one_class_to_the_other_and_back(tmp_path: Path) -> None:
    """Each gets a config.json of its own, without keys of the other's: transformers would take a text_config in a flat one for the whole model's."""
    make_llava_next(tmp_path / "src", "4")
    model_folder(tmp_path / "src", tmp_path / "jax", **VICUNA)
    export(tmp_path / "jax", tmp_path / "flat", "llava")
    flat = json.loads((tmp_path / "flat/config.json").read_text())
    assert flat["hidden_size"] == Sizes().width and not {"text_config", "vision_config"} & set(flat)
    model_folder(tmp_path / "flat", tmp_path / "again", **VICUNA)
    export(tmp_path / "again", tmp_path / "back", "transformers")
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert not {"hidden_size", "mm_patch_merge_type", "image_aspect_ratio"} & set(back)
    assert back["text_config"]["hidden_size"] == Sizes().width
    assert_same(weights(tmp_path / "back"), weights(tmp_path / "src"))
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "back")).__name__.startswith("LlavaNext")


def test_an_image_token_inside_the_base_vocabulary(tmp_path: Path) -> None:
    """The tokenizer of a plain language model may have it already, as the small Qwen's here: transformers gets that one, and no new row."""
    make_siglip(tmp_path / "siglip")
    make_language(tmp_path / "src", "qwen2")
    spec = {"vision": tmp_path / "siglip", "init_missing": ["projector"]}
    model_folder(tmp_path / "src", tmp_path / "jax", **spec)
    export(tmp_path / "jax", tmp_path / "back", "transformers")
    config = json.loads((tmp_path / "back/config.json").read_text())
    data = json.loads((tmp_path / "src/tokenizer.json").read_text())
    held = {token["content"]: token["id"] for token in data["added_tokens"]}
    assert config["image_token_index"] == held["<image>"]
    assert config["text_config"]["vocab_size"] == load_model_config(tmp_path / "jax").text.vocab_size


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "onevision",
            {"vision_feature_select_strategy": "default"},
            "vision_feature_select_strategy='default'.*'full'",
        ),
        ("next", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'.*'default'"),
        # config.json of LLaVA-1.5 or -1.6 that leaves it out means "default", which would drop the first of SigLIP's patches.
        (
            "onevision",
            {"model_type": "llava_next", "vision_feature_select_strategy": ...},
            "vision_feature_select_strategy='default'.*'full'",
        ),
        ("next", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer"),
        ("next", {"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ("next", {"model_type": "vipllava"}, "model_type='vipllava' is not supported; expected one of llava,"),
        ("next", {"model_type": "llava"}, r"not in the model \(1\): image_newline"),
        ("onevision", {"vision_config.hidden_act": "gelu"}, "vision_config.hidden_act='gelu'"),
        ("onevision", {"vision_config.image_size": 40}, "image_size=40 has 5 patches of 7"),
    ],
)
def test_what_is_not_followed_is_an_error(kind: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / "src")
    config = json.loads((tmp_path / "src/config.json").read_text())
    for key, value in change.items():
        *parents, name = key.split(".")
        table = config
        for parent in parents:
            table = table[parent]
        table[name] = value
        if value is ...:
            del table[name]
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        plan_conversion(SourceSpec(tmp_path / "src", **VICUNA))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("SiglipImageProcessor", {"size": {"shortest_edge": 30}}, "two equal sides"),
        ("SiglipImageProcessor", {"size": {"height": 30, "width": 20}}, "two equal sides"),
        (
            "SiglipImageProcessor",
            {"size": {"height": 28, "width": 28}},
            "images of 28 pixels, but the vision tower takes 30",
        ),
        ("SiglipImageProcessor", {"do_center_crop": True}, "do_center_crop=True is not supported"),
        ("SiglipImageProcessor", {"resample": 2}, "resample=2 is not supported; expected 3"),
        ("SiglipImageProcessor", {"do_normalize": False}, "do_normalize=False"),
        ("LlavaOnevisionImageProcessor", {"do_center_crop": True}, "do_center_crop=True is not supported"),
        ("Siglip2ImageProcessor", {}, "Siglip2ImageProcessor: expected one of"),
    ],
)
def test_steps_of_an_image_processor_that_are_not_taken(
    kind: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    make_llava_onevision(tmp_path / "src")
    stored = {"image_processor_type": kind, "size": {"height": 30, "width": 30}, **settings}
    (tmp_path / "src/preprocessor_config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=words):
        plan_conversion(SourceSpec(tmp_path / "src", **VICUNA))


@pytest.mark.parametrize(
    ("kind", "fit", "mean"),
    [
        ("SiglipImageProcessor", "stretch", 0.5),
        ("LlavaOnevisionImageProcessorFast", "pad", 0.48145466),
        ("LlavaNextImageProcessor", "stretch", 0.48145466),
        ("CLIPImageProcessor", "crop", 0.48145466),
    ],
)
def test_what_an_image_processor_does_with_the_whole_image(kind: str, fit: str, mean: float, tmp_path: Path) -> None:
    make_llava_onevision(tmp_path / "src")
    square = {"height": 30, "width": 30}
    size = (
        {"size": square}
        if "Siglip" in kind or "Onevision" in kind
        else {"size": {"shortest_edge": 30}, "crop_size": square}
    )
    (tmp_path / "src/preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **size}))
    images = plan_conversion(SourceSpec(tmp_path / "src", **VICUNA)).images
    assert images is not None
    assert (images.settings.fit, images.settings.size, images.settings.mean[0]) == (fit, 30, mean)


def test_a_base_without_a_tower_converts_to_a_model_without_one(tmp_path: Path, capsys: Any) -> None:
    make_vicuna(tmp_path / "src")
    assert main(["convert", str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert "vision      none: the model takes no images" in capsys.readouterr().out
    config = load_model_config(tmp_path / "out")
    assert config.vision is None
    assert not [path for path in flatten(abstract_params(config)) if path.startswith(("vision", "projector"))]
    assert json.loads((tmp_path / "out/tokenizer/processor.json").read_text())["images"] is None
    for options, words in (
        ({"image_fit": "pad"}, "--image-fit pad: the model has no vision tower"),
        ({"init_missing": ["projector"]}, r"parts without a source \(1\): vision|vision \(give --vision"),
    ):
        with pytest.raises(UserError, match=words):
            plan_conversion(SourceSpec(tmp_path / "src", **options))
