"""What conversions refuse, how they end when interrupted, and where values land on eight devices."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

torch = pytest.importorskip("torch")

import chatpose_jax  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params, bind, init_params  # noqa: E402
from chatpose_jax.models.config import preset  # noqa: E402
from chatpose_jax.models.quantize import QUANTIZATIONS  # noqa: E402
from chatpose_jax.weights import arrays, devices, stream  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.folder import load_model_config, load_params, read_folder  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.readers import TensorEntry  # noqa: E402
from chatpose_jax.weights.save import save_folder  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .sources import (  # noqa: E402
    make_chatpose,
    make_llava_original,
    make_llava_transformers,
    make_vicuna,
    sha256,
    write_state,
    write_tokenizer,
)

State = dict[str, Any]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole LLaVA for transformers, one safetensors file; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("llava") / "llava"
    make_llava_transformers(folder, dtype=torch.bfloat16)
    return folder


def broken(llava: Path, folder: Path, change: Callable[[State], Any]) -> Path:
    from safetensors.torch import load_file

    shutil.copytree(llava, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    write_state(folder, state)
    return folder


def test_all_problems_come_in_one_error_and_nothing_is_written(llava: Path, tmp_path: Path) -> None:
    def change(state: State) -> None:
        del state["language_model.model.layers.1.mlp.up_proj.weight"]
        del state["multi_modal_projector.linear_1.bias"]
        state["multi_modal_projector.linear_2.weight"] = torch.zeros(64, 63)
        state["language_model.model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
        state["language_model.model.layers.0.self_attn.q_proj.g_idx"] = torch.zeros(4, 64)
        state["vision_tower.encoder.layers.9.mlp.fc3.weight"] = torch.zeros(1)

    source = broken(llava, tmp_path / "src", change)
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    for part in (
        "missing (2): ",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "multi_modal_projector.linear_1.bias",
        "misshaped (1): multi_modal_projector.linear_2.weight is (64, 63), expected (64, 64)",
        "not floating point (1): language_model.model.norm.weight is int8",
        "unknown (2): ",
        "language_model.model.layers.0.self_attn.q_proj.g_idx",
        "vision_tower.encoder.layers.9.mlp.fc3.weight",
        "nothing was written",
    ):
        assert part in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_part_from_two_sources_is_an_error(llava: Path, tmp_path: Path) -> None:
    make_chatpose(tmp_path / "chatpose", tmp_path / "clip")
    with pytest.raises(
        UserError, match=r"duplicate .*vision/patch_embed/kernel comes from clip and from another source"
    ):
        convert(SourceSpec(llava, vision=tmp_path / "clip"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not supported"),
        ({"vision_feature_layer": [-2, -5]}, "expected one negative number"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act='gelu'"),
        ({"text_config": {"rope_parameters": {"rope_type": "llama3"}}}, "rope_parameters: factor is missing"),
        ({"text_config": {"num_attention_heads": 5}}, "num_attention_heads=5"),
        ({"text_config": {"num_hidden_layers": 7}}, r"missing \(36\): language_model\.model\.layers\.3\."),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act='gelu'"),
    ],
)
def test_settings_that_the_model_cannot_follow(
    llava: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(llava, tmp_path / "src")
    config = json.loads((tmp_path / "src/config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "src", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "rope_scaling: RoPE of type 'linear'",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}, "rope_scaling": {"rope_type": "default"}},
            "rope_parameters: RoPE of type 'yarn'",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta=10000.0, .*rope_theta=500000.0"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: factor=2.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_rope_that_versions_of_transformers_read_differently(
    llava: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    shutil.copytree(llava, tmp_path / "src")
    config = json.loads((llava / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key not in ("rope_parameters", "rope_theta")}
    (tmp_path / "src/config.json").write_text(json.dumps(config | {"text_config": text | settings}))
    with pytest.raises(UserError, match=said):
        plan_conversion(SourceSpec(tmp_path / "src"))


def test_names_of_the_hub_are_told_from_folders_and_all_at_once(llava: Path, tmp_path: Path) -> None:
    clip, words = "openai/clip-vit-large-patch14-336", "lmsys/vicuna-13b-v1.5"
    with pytest.raises(UserError) as error:
        convert(SourceSpec(llava, vision=clip, tokenizer=words, adapter=tmp_path / "none"), tmp_path / "out")
    for part in (
        f"hf download {clip} --local-dir clip-vit-large-patch14-336",
        f"hf download {words} --local-dir vicuna-13b-v1.5",
        f"{tmp_path / 'none'}: no such file or folder (--adapter)",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match=rf"{words}: no such folder; .*hf download {words} --local-dir vicuna-13b-v1.5"):
        read_folder(words)


def test_a_missing_tokenizer_does_not_hide_a_missing_tower(tmp_path: Path) -> None:
    make_vicuna(tmp_path / "src")
    (tmp_path / "src/tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"no tokenizer.*Parts without a source: vision \(give --vision .*, or --init-missing vision\)"
    ):
        plan_conversion(SourceSpec(tmp_path / "src", init_missing=["projector"]))


def test_rope_theta_of_old_and_new_configs(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "src")
    config = json.loads((tmp_path / "src/config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
    for settings in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}):
        (tmp_path / "src/config.json").write_text(json.dumps(config | {"text_config": text | settings}))
        plan, _ = load_source(tmp_path / "src")
        assert plan.config.text.rope_theta == 5e5


def test_tokenizers_that_do_not_fit(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "src")
    (tmp_path / "src/tokenizer.json").unlink()
    (tmp_path / "src/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer: expected tokenizer.json or tokenizer.model"):
        convert(tmp_path / "src", tmp_path / "out")
    (tmp_path / "large").mkdir()
    write_tokenizer(tmp_path / "large")
    (tmp_path / "large/added_tokens.json").write_text(json.dumps({"<extra>": 5000}))
    with pytest.raises(UserError, match="5001 tokens, the embedding 1026 rows"):
        convert(SourceSpec(tmp_path / "src", tokenizer=tmp_path / "large"), tmp_path / "out")


def test_a_tokenizer_that_brings_code_is_refused_unasked(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal whether to run it."""
    shutil.copytree(llava, tmp_path / "src")
    (tmp_path / "src/tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", None]}})
    )
    (tmp_path / "src/hostile.py").write_text("class Hostile: pass\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(UserError, match="transformers cannot read this tokenizer"):
        convert(tmp_path / "src", tmp_path / "out")
    assert not asked


def test_a_hostile_shard_stops_the_conversion(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "src", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"w": torch.optim.SGD}, tmp_path / "src/pytorch_model.bin")
    with pytest.raises(UserError, match=r"refused: the pickle refers to torch\.optim"):
        convert(tmp_path / "src", tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing_and_can_be_repeated(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, real = [], TensorEntry.read

    def failing(self: TensorEntry, index: Any = None, **options: Any) -> np.ndarray:
        reads.append(self.name)
        if len(reads) > 20:
            raise RuntimeError("stopped")
        return real(self, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TensorEntry, "read", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            convert(llava, tmp_path / "out")
    assert not list(tmp_path.iterdir())

    # A killed process cannot clean up: its half folder does not load, and the next run replaces it.
    half = tmp_path / ".out.partial"
    (half / "params").mkdir(parents=True)
    with pytest.raises(UserError, match="not a model folder"):
        read_folder(half)
    convert(llava, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_model_config(tmp_path / "out").text.num_layers == 3


def test_a_full_disk_is_one_clear_error(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chatpose_jax.weights.convert.write_leaves", full)
    with pytest.raises(UserError, match="the disk is full"):
        convert(llava, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_existing_folders_are_kept_unless_told(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        convert(llava, tmp_path / "out", progress=True)
    assert not capsys.readouterr().err, "no progress bar of what does not begin"
    with pytest.raises(UserError, match="is not a model folder"):
        convert(llava, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/mine.txt").read_text() == "keep"

    # Every checkpoint of the Hugging Face world has a config.json: that alone makes no folder ours.
    shutil.copytree(llava, tmp_path / "foreign")
    with pytest.raises(UserError, match="is not a model folder, so it is not overwritten"):
        convert(llava, tmp_path / "foreign", overwrite=True)
    assert sha256(tmp_path / "foreign/model.safetensors") == sha256(llava / "model.safetensors")

    convert(SourceSpec(llava, dtype="float32"), tmp_path / "model")
    convert(llava, tmp_path / "model", overwrite=True)
    assert load_model_config(tmp_path / "model").param_dtype == "bfloat16"


@pytest.mark.parametrize("out", ["src", "src/../src", "linked", "."])
def test_a_conversion_never_replaces_its_own_source(llava: Path, tmp_path: Path, out: str) -> None:
    """Neither the source, nor a folder around it, under whatever name; not even one that says that it is ours."""
    folder = tmp_path / "work"
    shutil.copytree(llava, folder / "src")
    (folder / "linked").symlink_to("src")
    (folder / "config.json").write_text(json.dumps({"format": "chatpose-jax"}))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="which the conversion reads; choose another folder"):
            convert(folder / "src", folder / out, overwrite=overwrite)
    assert {path.name for path in folder.iterdir()} == {"src", "linked", "config.json"}
    assert (folder / "src/model.safetensors").is_file()


def test_provenance_names_files_and_hashes(llava: Path, tmp_path: Path) -> None:
    convert(llava, tmp_path / "out")
    record = read_folder(tmp_path / "out")["provenance"]["sources"][0]
    file = llava / "model.safetensors"
    assert record["layout"] == "llava_transformers_5"
    assert record["files"] == [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}]


def shard(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layers whole, input over fsdp and output over tp wherever they divide."""
    axes: list[str | None] = [None] * len(shape)
    for axis, name in zip(range(len(shape) - 1, max(len(shape) - 3, -1), -1), ("tp", "fsdp"), strict=False):
        if shape[axis] % mesh.shape[name] == 0:
            axes[axis] = name
    return NamedSharding(mesh, P(*axes))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_eight_devices_hold_what_one_holds(tmp_path: Path, shape: tuple[int, int], fmt: Any, monkeypatch: Any) -> None:
    """Straight from the source in small blocks, and through a folder; every byte is read once for all devices."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    make_llava_transformers(tmp_path / "src", "4", fmt)
    plan, single = load_source(tmp_path / "src")
    read, real = [], TensorEntry.read

    def counting(self: TensorEntry, index: Any = None, **options: Any) -> np.ndarray:
        values = real(self, index, **options)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(TensorEntry, "read", counting)
    monkeypatch.setattr(devices, "BLOCK", 5000)
    _, direct = load_source(tmp_path / "src", shardings=lambda path, size: shard(path, size, mesh))
    assert sum(read) <= plan.nbytes
    assert max(read) <= 5000
    convert(tmp_path / "src", tmp_path / "out")
    abstract = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shard(str(path), leaf.shape, mesh)),
        abstract_params(plan.config),
    )
    restored = load_params(tmp_path / "out", abstract)
    q_proj = direct["decoder"]["layers"]["attn"]["q_proj"]["kernel"]
    assert q_proj.addressable_shards[0].data.shape == (3, 64 // shape[0], 64 // shape[1])
    for tree in (direct, restored):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), tree, single)


class NoTokenizer:
    """A processor that writes one file."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")


def test_folder_round_trip_and_its_errors(tmp_path: Path) -> None:
    config = preset("tiny")
    params = init_params(config, jax.random.key(0))
    save_folder(tmp_path / "m", config, params, processor=NoTokenizer(), provenance={"by": "test"})
    assert load_model_config(tmp_path / "m") == config
    restored = load_params(tmp_path / "m", abstract_params(config))
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16"), abstract_params(config))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_params(tmp_path / "m", half))} == {"bfloat16"}

    other = flatten_dict(abstract_params(config.replace(lora=None)), sep="/")
    other["decoder/norm/scale"] = jax.ShapeDtypeStruct((5,), "float32")
    other["decoder/extra"] = jax.ShapeDtypeStruct((5,), "float32")
    from flax.traverse_util import unflatten_dict

    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "m", unflatten_dict(other, sep="/"))
    misshaped = f"decoder/norm/scale is ({config.text.hidden_size},), expected (5,)"
    for part in ("missing (1): decoder/extra", "extra (4): ", "lora_a", misshaped):
        assert part in str(caught.value)


def test_folders_that_do_not_load(llava: Path, tmp_path: Path) -> None:
    config = preset("tiny")
    good = save_folder(tmp_path / "m", config, init_params(config, jax.random.key(0)), processor=NoTokenizer())
    with pytest.raises(UserError, match="no such folder"):
        load_model_config(tmp_path / "absent")
    with pytest.raises(UserError, match="convert it first: chatpose convert"):
        load_model_config(llava)
    with pytest.raises(UserError, match="not a model folder"):
        load_model_config(tmp_path)

    shutil.copytree(good, tmp_path / "cut")
    for file in (tmp_path / "cut/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"not a complete Orbax checkpoint|are damaged"):
        load_params(tmp_path / "cut", abstract_params(config))

    shutil.copytree(good, tmp_path / "half")
    shutil.rmtree(tmp_path / "half/params")
    with pytest.raises(UserError, match="incomplete model folder: params missing"):
        load_model_config(tmp_path / "half")

    data = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps(data | {"version": 99}))
    with pytest.raises(UserError, match="version is 99"):
        load_model_config(good)


def test_a_failed_read_ends_when_all_reads_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that outlives Orbax's event loop prints a traceback of its own, behind the one error."""
    ended = []

    async def deserialize(self: Any, infos: Any, args: Any = None) -> Any:
        async def slow() -> None:
            await asyncio.sleep(0.05)
            ended.append(True)
            raise OSError("late")

        async def fast() -> None:
            raise OSError("first")

        await asyncio.gather(slow(), fast())

    arrays.write_arrays(tmp_path / "params", {"a": np.zeros(3, np.float32)})
    monkeypatch.setattr(arrays.ocp.type_handlers.ArrayHandler, "deserialize", deserialize)
    with pytest.raises(UserError, match=r"are damaged \(OSError: first\)"):
        arrays.read_arrays(tmp_path / "params", {"a": jax.ShapeDtypeStruct((3,), "float32")})
    assert ended == [True]


def test_small_blocks_and_compression_change_nothing(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves split into many chunks and blocks, as large models are."""
    plan, whole = load_source(llava)
    monkeypatch.setattr(stream, "_CHUNK", 2000)
    monkeypatch.setattr(stream, "BLOCK", 5000)
    monkeypatch.setattr(stream, "_IN_FLIGHT", 9000)
    convert(llava, tmp_path / "out", compress=True)
    split = load_params(tmp_path / "out", abstract_params(plan.config))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), split, whole)


def run(command: str, *args: str) -> int:
    parser = argparse.ArgumentParser()
    module = importlib.import_module(f"chatpose_jax.cli.{command}")
    module.add_arguments(parser)
    return module.run(parser.parse_args(args))


def test_commands_say_what_they_find(llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(llava)) == 0
    found = capsys.readouterr().out
    assert "LLaVA for transformers, names of 5.x" in found
    assert "1026 rows, 1024 of them base" in found
    assert "initialised pose_head" in found
    assert "tokenizer   1024 pieces, and <POSE> 1024, <image> 1025" in found
    assert "language_model.model.layers.*.mlp.up_proj.weight  (160, 64)  bfloat16  × 3" in found

    assert run("convert", str(llava), str(tmp_path / "out"), "--dtype", "float32") == 0
    assert "16 tensors: follows the last block" in capsys.readouterr().out
    assert run("inspect", str(tmp_path / "out"), "--tensors") == 0
    found = capsys.readouterr().out
    assert "decoder/layers/attn/q_proj/kernel  (3, 64, 64)  float32" in found
    assert "from        llava (llava_transformers_5, 1 files, " in found
    assert f"{sha256(llava / 'model.safetensors')}  model.safetensors" in found
    assert "initialised pose_head" in found


@pytest.mark.parametrize("provenance", ["me", {"sources": 3}, {"sources": [{"name": "x"}]}, {"initialised": [1]}])
def test_provenance_that_was_tampered_with(llava: Path, tmp_path: Path, provenance: Any) -> None:
    convert(llava, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"provenance": provenance}))
    with pytest.raises(UserError, match=r"config\.json: the provenance is not as this program writes it .* restore it"):
        run("inspect", str(tmp_path / "out"))


def test_inspect_shows_the_image_settings_of_earlier_folders(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are stored under the key ``pictures``."""
    convert(llava, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    data = json.loads(file.read_text())
    data["provenance"]["pictures"] = data["provenance"].pop("images")
    file.write_text(json.dumps(data))
    assert run("inspect", str(tmp_path / "out")) == 0
    assert f"images      {data['provenance']['pictures']}" in capsys.readouterr().out


def test_inspect_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chatpose(tmp_path / "src", tmp_path / "clip")
    assert run("inspect", str(tmp_path / "src")) == 1
    found = capsys.readouterr().out
    assert "has not     vision" in found
    assert "--vision FOLDER" in found


def test_inspect_of_what_will_be_started_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_vicuna(tmp_path / "src")
    assert run("inspect", str(tmp_path / "src"), "--init-missing", "vision", "--init-missing", "projector") == 0
    assert "initialised pose_head, projector, vision" in capsys.readouterr().out


def test_load_takes_a_source_as_it_is(tmp_path: Path) -> None:
    """What ``load`` makes of PyTorch weights is what it makes of the converted folder; nothing is written."""
    make_chatpose(tmp_path / "src", tmp_path / "clip")
    before = sorted(tmp_path.rglob("*"))
    direct = chatpose_jax.load(tmp_path / "src", vision=tmp_path / "clip", dtype="float32")
    assert sorted(tmp_path.rglob("*")) == before
    convert(SourceSpec(tmp_path / "src", vision=tmp_path / "clip"), tmp_path / "out")
    folder = chatpose_jax.load(tmp_path / "out")
    assert direct.config == folder.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), direct.params, folder.params)
    question = [{"role": "user", "content": "Who kneels?"}]
    replies = [model.chat(question, max_new_tokens=8, force_pose=True) for model in (direct, folder)]
    np.testing.assert_array_equal(replies[0].ids, replies[1].ids)
    np.testing.assert_array_equal(replies[0].poses[0].matrices, replies[1].poses[0].matrices)

    with pytest.raises(UserError, match="--vision FOLDER"):
        chatpose_jax.load(tmp_path / "src")
    with pytest.raises(UserError, match="is a complete model folder; vision is only for PyTorch weights"):
        chatpose_jax.load(tmp_path / "out", vision=tmp_path / "clip")


@pytest.mark.parametrize(("fit", "other"), [("crop", "pad"), ("pad", "crop")])
def test_load_passes_the_image_fit_on(tmp_path: Path, fit: str, other: str) -> None:
    """Over what ``config.json`` says: of a wide image whose left is red, the middle alone is grey."""
    make_llava_original(tmp_path / "src")
    config = json.loads((tmp_path / "src/config.json").read_text())
    (tmp_path / "src/config.json").write_text(json.dumps(config | {"image_aspect_ratio": other}))
    image = np.full((28, 84, 3), 127, np.uint8)
    image[:, :28] = (255, 0, 0)
    model = chatpose_jax.load(tmp_path / "src", image_fit=fit)
    assert model.processor.images.fit == fit
    red = model.processor.images(image)[..., 0]
    assert (red.max() > 1.5) == (fit == "pad")


def test_load_spreads_a_source_over_a_mesh(llava: Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    model, single = chatpose_jax.load(llava, mesh=mesh, dtype="float32"), chatpose_jax.load(llava, dtype="float32")
    kernel = model.params["decoder"]["layers"][0]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64 // 4, 160 // 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), model.params, single.params)


def test_what_int8_and_int4_cost_in_logits_and_poses(llava: Path) -> None:
    """Against the same weights in bfloat16, on a model of natural scale. Its weights are random: a trained model's errors are in docs/scaling.md."""
    ids = np.arange(5, 45)[None]

    def answers(kind: Any) -> tuple[np.ndarray, np.ndarray]:
        plan, params = load_source(SourceSpec(llava, dtype="bfloat16", quantize=kind))
        config = plan.config.replace(dtype="float32")

        @jax.jit
        def run(params: Any) -> Any:
            model = bind(config, params)
            hidden = model(ids).hidden
            poses = model.poses(model.states(hidden, np.arange(40)[None]), jax.random.key(0))
            return model.logits(hidden), poses.rotations

        logits, rotations = map(np.asarray, run(params))
        return logits - logits.mean(-1, keepdims=True), rotations

    exact, errors = answers("none"), {}
    for kind in ("int8", "int4"):
        logits, rotations = answers(kind)
        cosine = (np.einsum("bpjki,bpjki->bpj", rotations, exact[1]) - 1) / 2
        turned = np.degrees(np.arccos(np.clip(cosine, -1, 1))).mean()
        errors[kind] = np.linalg.norm(logits - exact[0]) / np.linalg.norm(exact[0]), turned
    assert errors["int8"][0] < 0.03 and errors["int8"][1] < 0.3, errors
    assert errors["int8"][0] * 5 < errors["int4"][0] < 0.4 and errors["int4"][1] < 4, errors


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_what_the_model_makes_of_the_weights(kind: Any, llava: Path, tmp_path: Path) -> None:
    """Converted, and loaded straight onto a mesh: codes and scales as the model makes them, all else as it was."""
    quantization = QUANTIZATIONS[kind]
    plan, single = load_source(llava)
    convert(SourceSpec(llava, quantize=kind), tmp_path / "out")
    config = load_model_config(tmp_path / "out")
    assert config == plan.config.replace(quantize=kind)
    params = by_path(load_params(tmp_path / "out", abstract_params(config)))
    for path, array in by_path(single).items():
        if path.startswith("decoder/layers/") and path.endswith("/kernel"):
            kernel, scale = quantization(np.asarray(array))
            np.testing.assert_array_equal(params[path], kernel)
            np.testing.assert_array_equal(params[quantization.scale_path(path)], scale)
            assert params[path].dtype == quantization.codes
        else:
            np.testing.assert_array_equal(np.asarray(params[path]), np.asarray(array))
    assert len(params) == len(by_path(single)) + 7

    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))
    _, spread = load_source(SourceSpec(llava, quantize=kind), mesh=mesh)
    for path, array in by_path(spread).items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(params[path]), err_msg=path)
    assert spread["decoder"]["layers"]["mlp"]["up_proj"]["kernel"].addressable_shards[0].data.shape == (3, 16, 80)

    question = [{"role": "user", "content": "Who kneels?"}]
    reply = chatpose_jax.load(tmp_path / "out").chat(question, max_new_tokens=6, force_pose=True)
    assert len(reply.poses) == 1
    with pytest.raises(UserError, match=r"source\.quantize: expected 'none' or 'int8' or 'int4', found 'int3'"):
        convert(SourceSpec(llava, quantize="int3"), tmp_path / "other")
