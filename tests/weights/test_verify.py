"""``chatpose verify``: right conversions pass in every layout, a changed value fails, and what cannot be compared is said."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from chatpose_jax.cli import verify as cli  # noqa: E402
from chatpose_jax.cli.inspect import describe_conversion  # noqa: E402
from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params  # noqa: E402
from chatpose_jax.processing.processor import Processor  # noqa: E402
from chatpose_jax.verify import Difference, verify  # noqa: E402
from chatpose_jax.weights import adapter_config  # noqa: E402
from chatpose_jax.weights.convert import convert  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import load_model_config, load_params  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.save import save_folder  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .sources import (  # noqa: E402
    make_chatpose,
    make_clip,
    make_llava_next,
    make_llava_onevision,
    make_llava_original,
    make_llava_transformers,
    make_siglip,
    make_vicuna,
)
from .test_backbones import make as make_family  # noqa: E402
from .test_export import model_folder, trained  # noqa: E402
from .test_templates import ASK, DEFAULT, LLAMA3_1, TURNS  # noqa: E402


def converted(source: Path, out: Path, **options: Any) -> Path:
    convert(SourceSpec(source, **options), out)
    return out


@pytest.fixture(scope="module")
def chatpose(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Source, CLIP, and the converted folder."""
    folder = tmp_path_factory.mktemp("verify")
    make_chatpose(folder / "src", folder / "clip")
    return folder / "src", folder / "clip", converted(folder / "src", folder / "out", vision=folder / "clip")


def run(*args: Any) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(list(map(str, args))))


def test_a_right_conversion_passes(chatpose: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    source, clip, out = chatpose
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    assert run(source, out, "--vision", clip, "--prompt", "Who is it?", "--image", tmp_path / "p.png") == 0
    table = capsys.readouterr().out
    stages = (
        "pixels",
        "image features",
        "embeddings",
        "layer 0",
        "layer 1",
        "layer 2",
        "final norm",
        "logits",
        "poses",
    )
    for stage in stages[2:]:
        assert f"text 1    {stage}" in table
    for stage in stages:
        assert f"image 1   {stage}" in table
    assert "equal: the largest relative difference" in table


MAKERS: dict[str, Callable[[Path], Any]] = {
    "4.x, float16": lambda folder: make_llava_transformers(folder, "4", dtype=torch.float16),
    "5.x, bin shards": lambda folder: make_llava_transformers(folder, "5", "bin", shards=2),
    "state_dict": lambda folder: make_llava_transformers(folder, "state_dict"),
    "original, bfloat16": lambda folder: make_llava_original(folder, dtype=torch.bfloat16),
    "original, projector beside": lambda folder: make_llava_original(folder, projector="beside"),
    "vicuna": make_vicuna,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_layout(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "src")
    missing = ["vision", "projector"] if make is make_vicuna else []
    if missing:
        from .sources import Sizes, _flat_models, make_clip

        make_clip(tmp_path / "clip", _flat_models(Sizes(), torch.float32, 0).clip)
        missing = ["projector"]
    vision = tmp_path / "clip" if missing else None
    out = converted(tmp_path / "src", tmp_path / "out", init_missing=missing, vision=vision)
    comparison = verify(SourceSpec(tmp_path / "src", vision=vision), out)
    stages = list(comparison.stages)
    assert not comparison.left_out
    assert {stage.prompt for stage in stages} == {"text 1", "image 1", "image 2", "tokens 1", "tokens 2", "tokens 3"}
    assert {"pixels", "vision tower" if missing else "image features"} <= {stage.stage for stage in stages}
    assert {"layer 0", "layer 2", "logits"} <= {stage.stage for stage in stages}
    assert not [stage for stage in stages if not stage.within(cli.TOLERANCE)]
    assert min(stage.largest for stage in stages) > 0.1


@pytest.mark.parametrize(
    ("path", "index", "first"),
    [
        ("decoder/layers/mlp/up_proj/kernel", (1, 3, 5), "layer 1"),
        ("decoder/layers/input_norm/scale", (2, 7), "layer 2"),
        ("vision/layers/attn/q_proj/bias", (0, 1), "image features"),
        ("projector/fc2/kernel", (3, 4), "image features"),
        ("decoder/lm_head/kernel", (2, 100), "logits"),
        ("pose_head/fc2/bias", (9,), "poses"),
    ],
)
def test_one_changed_value_fails(
    chatpose: tuple[Path, Path, Path], tmp_path: Path, capsys: Any, path: str, index: Any, first: str
) -> None:
    source, clip, out = chatpose
    config = load_model_config(out)
    params = load_params(out, abstract_params(config))
    *keys, last = path.split("/")
    node = params
    for key in keys:
        node = node[key]
    node[last] = node[last].at[index].add(0.2)
    save_folder(tmp_path / "changed", config, params, processor=Processor.load(out / "tokenizer", config))
    assert run(source, tmp_path / "changed", "--vision", clip) == 1
    table = capsys.readouterr().out
    wrong = [line for line in table.splitlines() if line.endswith("above tolerance")]
    assert first in wrong[0]
    assert "differs: " in table


def test_a_sample_of_layers_names_the_one_that_is_wrong(chatpose: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, clip, out = chatpose
    good = [
        stage.stage
        for stage in verify(SourceSpec(source, vision=clip), out, layers=2).stages
        if stage.prompt == "text 1"
    ]
    assert good == ["embeddings", "layer 0", "layer 2", "final norm", "logits", "poses"]
    config = load_model_config(out)
    params = load_params(out, abstract_params(config))
    kernel = params["decoder"]["layers"]["attn"]["v_proj"]
    kernel["kernel"] = kernel["kernel"].at[0, 1, 1].add(0.5)
    save_folder(tmp_path / "changed", config, params, processor=Processor.load(out / "tokenizer", config))
    stages = verify(SourceSpec(source, vision=clip), tmp_path / "changed", layers=2).stages
    assert {stage.stage for stage in stages if not stage.within(cli.TOLERANCE)} == {"layer 0"}


def test_a_cast_needs_its_tolerance(chatpose: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, clip, _ = chatpose
    out = converted(source, tmp_path / "half", vision=clip, dtype="bfloat16")
    worst = max(stage.relative for stage in verify(SourceSpec(source, vision=clip), out).stages)
    assert cli.TOLERANCE < worst < 0.2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_folder_is_compared_with_weights_rounded_alike(
    kind: Any, chatpose: tuple[Path, Path, Path], tmp_path: Path, capsys: Any
) -> None:
    """By the tolerance of weights that are not rounded. A fault in the codes of one input shows."""
    source, clip, _ = chatpose
    folder = converted(source, tmp_path / "out", vision=clip, quantize=kind)
    assert main(["inspect", str(folder)]) == 0
    assert f"float32, the decoder's projections {kind}; computes in float32" in capsys.readouterr().out
    assert run(source, folder, "--vision", clip, "--layers", "1") == 0
    said = capsys.readouterr().out
    assert f"the folder holds its decoder's projections in {kind}, and those of the source were rounded alike" in said
    config = load_model_config(folder)
    params = load_params(folder, abstract_params(config))
    kernel = params["decoder"]["layers"]["mlp"]["down_proj"]["kernel"]
    params["decoder"]["layers"]["mlp"]["down_proj"]["kernel"] = kernel.at[0, 3].set(-kernel[0, 3])
    save_folder(tmp_path / "wrong", config, params, processor=Processor.load(folder / "tokenizer", config))
    assert run(source, tmp_path / "wrong", "--vision", clip, "--layers", "1") == 1
    assert re.search("layer 0 .*above tolerance", capsys.readouterr().out)


def test_a_tower_in_another_dtype_than_the_decoder(tmp_path: Path, capsys: Any) -> None:
    """As the released files are: LLaVA and ChatPose in half precision, CLIP in float32, which all of them load in half."""
    models = make_chatpose(tmp_path / "src", tmp_path / "clip", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in models.clip.float().parameters():  # float32 proper, not what bfloat16 had left
            parameter += 1e-4 * torch.randn(parameter.shape)
    make_clip(tmp_path / "clip", models.clip)
    vision = ("--vision", tmp_path / "clip")
    assert main(["convert", *map(str, (tmp_path / "src", tmp_path / "half", *vision))]) == 0
    assert re.search(r"rounded     \d\d tensors of clip: float32 to bfloat16", capsys.readouterr().out)
    assert run(tmp_path / "src", tmp_path / "half", *vision) == 0
    assert main(["convert", *map(str, (tmp_path / "src", tmp_path / "whole", *vision, "--dtype", "float32"))]) == 0
    assert "rounded" not in capsys.readouterr().out
    assert run(tmp_path / "src", tmp_path / "whole", *vision) == 0
    # The rounding is no way round the comparison.
    converted(tmp_path / "src", tmp_path / "cut", dtype="float16", vision=tmp_path / "clip")
    assert run(tmp_path / "src", tmp_path / "cut", *vision) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens", "lm_head", "multi_modal_projector"]},
        {"trainable_token_indices": {"embed_tokens": [5, 1024], "lm_head": [7, 1024]}},
    ],
    ids=["modules", "rows"],
)
def test_an_adapter_in_float32_over_a_base_in_half_precision(tmp_path: Path, settings: Any) -> None:
    """Its tables are rounded with the base, and the report says so; its rows of new tokens are not."""
    pytest.importorskip("peft")
    from .test_export_peft import peft_over_llava

    make_llava_transformers(tmp_path / "base", dtype=torch.bfloat16)
    model = peft_over_llava(tmp_path, **settings)
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():  # float32 proper, not what bfloat16 had left
            if parameter.requires_grad:
                parameter += 1e-4 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    converted(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter")
    report = "\n".join(
        describe_conversion(plan_conversion(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter")))
    )
    assert re.search(r"rounded     \d tensors of adapter: float32 to bfloat16", report)
    assert not wrong(verify(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter"), tmp_path / "jax").stages)


def test_nothing_is_above_or_below_nan() -> None:
    stage = Difference.of("p", "s", np.ones(3), np.array([1, np.nan, 1]))
    assert not stage.within(1e9)


def test_without_torch_and_other_mistakes(chatpose: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    source, clip, out = chatpose
    with pytest.raises(UserError, match=r"--layers 9: the decoder has 3 layers; expected 1 to 3"):
        list(verify(SourceSpec(source, vision=clip), out, layers=9).stages)
    make_llava_transformers(tmp_path / "src")
    with pytest.raises(UserError, match=r"not a model folder|convert it first"):
        list(verify(source, tmp_path / "src").stages)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install '\.\[torch\]' in the checkout"):
        list(verify(SourceSpec(source, vision=clip), out).stages)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``adapter``: LoRA and token rows in a PEFT folder."""
    folder = tmp_path_factory.mktemp("adapted")
    make_llava_transformers(folder / "base")
    export(trained(model_folder(folder / "base", folder / "jax"), folder / "lora"), folder / "adapter", "peft")
    return folder


def wrong(stages: Iterable[Difference]) -> set[str]:
    return {stage.stage for stage in stages if not stage.within(cli.TOLERANCE)}


def test_an_adapter_over_its_base(adapted: Path, tmp_path: Path) -> None:
    """The torch side adds LoRA and token rows itself."""
    base, adapter = adapted / "base", adapted / "adapter"
    out = converted(base, tmp_path / "out", adapter=adapter)
    stages = list(verify(SourceSpec(base, adapter=adapter), out).stages)
    assert "poses" in {stage.stage for stage in stages}
    assert not wrong(stages)
    assert {"layer 0", "logits"} <= wrong(verify(base, out).stages)


def test_a_wrong_alpha_fails(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was changed afterwards; and one that the conversion read wrongly, which the torch side does not share."""
    base, adapter = adapted / "base", adapted / "adapter"
    out = converted(base, tmp_path / "out", adapter=adapter)
    data = json.loads((out / "config.json").read_text())
    data["model"]["lora"]["alpha"] *= 1.5
    (out / "config.json").write_text(json.dumps(data))
    assert {"layer 0", "layer 2"} <= wrong(verify(SourceSpec(base, adapter=adapter), out).stages)

    real = adapter_config.lora_config

    def doubled(*args: Any) -> Any:
        lora = real(*args)
        return lora and dataclasses.replace(lora, alpha=2 * lora.alpha)

    monkeypatch.setattr(adapter_config, "lora_config", doubled)
    out = converted(base, tmp_path / "doubled", adapter=adapter)
    assert {"layer 0", "layer 2"} <= wrong(verify(SourceSpec(base, adapter=adapter), out).stages)


def test_rows_of_another_token_fail(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion lays an adapter's rows over the wrong tokens: the torch side reads their ids itself."""
    base, adapter = adapted / "base", adapted / "adapter"
    real = adapter_config.token_ids
    monkeypatch.setattr(
        adapter_config,
        "token_ids",
        lambda *args: {name: tuple(i - 1 for i in ids) for name, ids in real(*args).items()},
    )
    out = converted(base, tmp_path / "out", adapter=adapter)
    assert {"embeddings", "logits"} <= wrong(verify(SourceSpec(base, adapter=adapter), out).stages)


def test_what_is_not_compared_is_said(chatpose: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    """Converted with CLIP, verified without: equal in words alone is not equal."""
    source, _, out = chatpose
    assert run(source, out) == cli.INCOMPLETE
    said = capsys.readouterr().out
    assert "incomplete: the compared parts are equal" in said and "not compared: vision of" in said
    assert "equal: the largest" not in said


def test_two_sets_of_weights_in_one_folder_are_not_equal(tmp_path: Path) -> None:
    """Shards converted; then a merged model saved beside them, which transformers takes."""
    make_llava_transformers(tmp_path / "src", shards=3)
    out = converted(tmp_path / "src", tmp_path / "out")
    assert not wrong(verify(tmp_path / "src", out).stages)
    make_llava_transformers(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "src")
    try:
        assert {"layer 0", "logits"} <= wrong(verify(tmp_path / "src", out).stages)
    except UserError as error:  # or both are named, and none is chosen
        assert "model.safetensors" in str(error)


def write_settings(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | changes))


def test_images_are_prepared_as_the_source_says(tmp_path: Path) -> None:
    """LLaVA pads, by its config.json, with CLIP's mean beside the tower: the image path is compared, and seen to differ."""
    models = make_llava_original(tmp_path / "src", tower=False)
    make_clip(tmp_path / "clip", models.clip)
    clip = {"size": 28, "crop_size": 28, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    write_settings(tmp_path / "clip/preprocessor_config.json", feature_extractor_type="CLIPFeatureExtractor", **clip)
    write_settings(tmp_path / "src/config.json", image_aspect_ratio="pad")
    options = {"vision": tmp_path / "clip"}
    out = converted(tmp_path / "src", tmp_path / "out", **options)
    images = Processor.load(out / "tokenizer", load_model_config(out)).images
    assert (images.fit, images.mean, images.std) == ("pad", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    left = np.zeros((30, 90, 3), np.uint8)
    left[:, :20] = 255
    assert images.square(left).max() == 255
    assert "image_aspect_ratio" in json.loads((out / "config.json").read_text())["provenance"]["images"]
    assert not wrong(verify(SourceSpec(tmp_path / "src", **options), out).stages)

    cropped = converted(tmp_path / "src", tmp_path / "cropped", image_fit="crop", **options)
    assert Processor.load(cropped / "tokenizer", load_model_config(cropped)).images.fit == "crop"
    assert "pixels" in wrong(verify(SourceSpec(tmp_path / "src", **options), cropped).stages)
    assert not wrong(verify(SourceSpec(tmp_path / "src", image_fit="crop", **options), cropped).stages)
    # What export writes for LLaVA's own code says so, and comes back.
    export(out, tmp_path / "llava", "llava")
    assert json.loads((tmp_path / "llava/config.json").read_text())["image_aspect_ratio"] == "pad"


def test_chatpose_crops_whatever_its_config_says(chatpose: tuple[Path, Path, Path], tmp_path: Path) -> None:
    source, clip, _ = chatpose
    shutil.copytree(source, tmp_path / "src")
    write_settings(tmp_path / "src/config.json", image_aspect_ratio="pad")
    out = converted(tmp_path / "src", tmp_path / "out", vision=clip)
    assert Processor.load(out / "tokenizer", load_model_config(out)).images.fit == "crop"
    assert not wrong(verify(SourceSpec(tmp_path / "src", vision=clip), out).stages)


HF = {
    "image_processor_type": "LlavaImageProcessorFast",
    "do_pad": True,
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_transformers_own_settings_of_images(file: str, tmp_path: Path) -> None:
    make_llava_transformers(tmp_path / "src")
    write_settings(tmp_path / "src" / file, **(HF if file.startswith("pre") else {"image_processor": HF}))
    out = converted(tmp_path / "src", tmp_path / "out")
    assert Processor.load(out / "tokenizer", load_model_config(out)).images.fit == "pad"
    assert not wrong(verify(tmp_path / "src", out).stages)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio='anyres_max_9': this model takes"),
        ("config.json", {"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type='spatial'"),
        ("preprocessor_config.json", {"resample": 2}, "resample=2 is not supported; expected 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize=False"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize=False"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop=False"),
        ("preprocessor_config.json", {"do_thumbnail": True}, "do_thumbnail=True"),
        ("preprocessor_config.json", {"size": {"height": 28, "width": 28}}, "without stretching"),
        ("preprocessor_config.json", {"crop_size": {"height": 28, "width": 14}}, "crop_size=.*the side of a square"),
        ("preprocessor_config.json", {"size": 32}, "resized to 32 pixels and cropped to 28"),
        (
            "preprocessor_config.json",
            {"size": 56, "crop_size": 56},
            "images of 56 pixels, but the vision tower takes 28",
        ),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor=1.0"),
        ("preprocessor_config.json", {"image_std": [1, 0, 1]}, "std.*above 0"),
        ("preprocessor_config.json", {"image_processor_type": "ViltImageProcessor"}, "ViltImageProcessor"),
    ],
)
def test_settings_of_images_that_cannot_be_followed(
    file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    make_llava_original(tmp_path / "src")
    write_settings(tmp_path / "src/preprocessor_config.json", size=28, crop_size=28)
    plan_conversion(SourceSpec(tmp_path / "src"))
    write_settings(tmp_path / "src" / file, **changes)
    with pytest.raises(UserError, match=said):
        plan_conversion(SourceSpec(tmp_path / "src"))
    if file == "config.json":
        assert plan_conversion(SourceSpec(tmp_path / "src", image_fit="pad")).images.settings.fit == "pad"


@pytest.mark.parametrize("family", ["llama3_1", "smollm2", "qwen2", "qwen3"])
def test_families_of_language_models(family: str, tmp_path: Path, capsys: Any) -> None:
    """Scaled RoPE, tied weights, biases, norms of q and k; ids by the tokenizer and the chat template of the source."""
    make_family(tmp_path / "src", family)
    chats = {"smollm2": DEFAULT + TURNS + ASK, "qwen2": DEFAULT + TURNS + ASK, "llama3_1": LLAMA3_1}
    if family in chats:
        (tmp_path / "src/chat_template.jinja").write_text(chats[family])
    out = converted(tmp_path / "src", tmp_path / "out")
    assert run(tmp_path / "src", out) == 0
    table = capsys.readouterr().out
    assert all(f"{stage} " in table for stage in ("layer 0", "layer 1", "final norm", "logits", "tokens 1  text"))
    assert table.count("conversation") == (3 if family in chats else 0)
    assert "image" not in table


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_llavas_with_a_newline(kind: str, tmp_path: Path) -> None:
    """The features of one view and the newline; pixels by the image processor of each."""
    maker = {"next": make_llava_next, "onevision": make_llava_onevision}[kind]
    maker(tmp_path / "src", "4", **({"tied": True, "head": True} if kind == "onevision" else {}))
    side = 28 if kind == "next" else 30
    square = {"height": side, "width": side}
    settings: dict[str, Any] = {"image_grid_pinpoints": [[side, 2 * side], [2 * side, side]]}
    settings |= {"size": {"shortest_edge": side}, "crop_size": square} if kind == "next" else {"size": square}
    name = {"next": "LlavaNextImageProcessor", "onevision": "LlavaOnevisionImageProcessor"}[kind]
    write_settings(tmp_path / "src/preprocessor_config.json", image_processor_type=name, **settings)
    out = converted(tmp_path / "src", tmp_path / "out", template="vicuna_v1")
    comparison = verify(SourceSpec(tmp_path / "src", template="vicuna_v1"), out)
    stages = list(comparison.stages)
    assert not comparison.left_out and not [stage for stage in stages if not stage.within(cli.TOLERANCE)]
    assert {"pixels", "image features", "layer 2", "logits"} <= {stage.stage for stage in stages}
    config = load_model_config(out)
    params = load_params(out, abstract_params(config))
    params["projector"]["newline"] = params["projector"]["newline"] + 0.2
    save_folder(tmp_path / "changed", config, params, processor=Processor.load(out / "tokenizer", config))
    changed = verify(SourceSpec(tmp_path / "src", template="vicuna_v1"), tmp_path / "changed")
    assert next(stage.stage for stage in changed.stages if not stage.within(cli.TOLERANCE)) == "image features"


def test_siglip_beside_a_language_model(tmp_path: Path) -> None:
    make_siglip(tmp_path / "siglip")
    make_vicuna(tmp_path / "src")
    options: dict[str, Any] = {"vision": tmp_path / "siglip"}
    out = converted(tmp_path / "src", tmp_path / "out", init_missing=["projector"], **options)
    stages = list(verify(SourceSpec(tmp_path / "src", **options), out).stages)
    assert {"pixels", "vision tower"} <= {stage.stage for stage in stages}
    assert not [stage for stage in stages if not stage.within(cli.TOLERANCE)]


def test_other_ids_are_a_difference(tmp_path: Path) -> None:
    """Another template than that of the source's chat template, and a tokenizer with another table of merges."""
    make_family(tmp_path / "src", "smollm2")
    (tmp_path / "src/chat_template.jinja").write_text(DEFAULT + TURNS + ASK)
    out = converted(tmp_path / "src", tmp_path / "out", template="llava_onevision", ignore_chat_template=True)
    wrong = [stage for stage in verify(tmp_path / "src", out).stages if not stage.within(cli.TOLERANCE)]
    assert {stage.stage for stage in wrong} == {"conversation"} and len(wrong) == 3
    data = json.loads((out / "tokenizer/tokenizer.json").read_text())
    del data["model"]["merges"][5]
    (out / "tokenizer/tokenizer.json").write_text(json.dumps(data))
    spec = SourceSpec(tmp_path / "src", template="llava_onevision")
    wrong = [stage for stage in verify(spec, out).stages if not stage.within(cli.TOLERANCE)]
    assert {stage.stage for stage in wrong} == {"text"}


def test_a_gguf_file_that_transformers_dequantises(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from . import gguf_files, test_gguf

    tokenizer = gguf_files.byte_level("smollm", test_gguf.CONTROL, first=True)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    source = tmp_path / "model.gguf"
    test_gguf.write(source, "llama_tied", gguf_files.byte_level_metadata(tokenizer, "smollm", 512, **ids), "Q4_1")
    out = converted(source, tmp_path / "out", dtype="float32")
    comparison = verify(source, out)
    stages = list(comparison.stages)
    assert not comparison.left_out and {"embeddings", "layer 1", "logits"} <= {stage.stage for stage in stages}
    assert not [stage for stage in stages if not stage.within(cli.TOLERANCE)]
