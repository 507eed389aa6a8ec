"""Adapters out and in: what peft loads gives our logits, and what peft writes gives peft's.

The peer is peft over transformers' LLaVA-1.5 and LLaMA.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax.traverse_util import unflatten_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration  # noqa: E402

from chatpose_jax.cli.inspect import describe_conversion  # noqa: E402
from chatpose_jax.cli.main import main  # noqa: E402
from chatpose_jax.cli.verify import TOLERANCE  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params  # noqa: E402
from chatpose_jax.models.config import LoRAConfig  # noqa: E402
from chatpose_jax.processing.processor import Processor  # noqa: E402
from chatpose_jax.verify import verify  # noqa: E402
from chatpose_jax.weights import adapter_config, adapters  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import TOKENIZER, load_model_config, load_params  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.save import save_folder  # noqa: E402
from chatpose_jax.weights.sources import open_adapter  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from ..numerics import agree  # noqa: E402
from .sources import (  # noqa: E402
    POSE_ID,
    VOCAB,
    PoseProjection,
    Sizes,
    make_chatpose,
    make_clip,
    make_llava_original,
    make_llava_transformers,
    make_vicuna,
    randomise,
    write_config,
    write_state,
    write_tokenizer,
)
from .test_export import answers, head_on_its_own, llava_answers, model_folder, trained  # noqa: E402
from .test_parity import flat_forward, gram_schmidt, poses_of, user  # noqa: E402

TEXT = [user("Who kneels?"), {"role": "assistant", "content": "It is <POSE>."}]


def params_of(folder: Path) -> dict[str, np.ndarray]:
    loaded = load_params(folder, abstract_params(load_model_config(folder)))
    return {path: np.asarray(leaf) for path, leaf in by_path(loaded).items()}


@pytest.fixture(autouse=True)
def _seed() -> None:
    """peft draws A from torch's global generator: without this each run tests another model."""
    torch.manual_seed(0)


def move(model: Any, seed: int = 3) -> Any:
    """Adapters, token rows and saved modules as training leaves them: nothing zero, nothing the base's."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = (0.2 if "lora_B" in name else 1.0) * (parameter.shape[-1] if parameter.ndim == 2 else 400) ** -0.5
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------ out


def test_peft_loads_the_adapter_onto_the_original_base(tmp_path: Path) -> None:
    """And convert reads it back over the same base: rank, alpha, dropout, targets, token rows and head, bit by bit."""
    make_llava_transformers(tmp_path / "base")
    folder = trained(model_folder(tmp_path / "base", tmp_path / "jax"), tmp_path / "lora")
    result = export(folder, tmp_path / "adapter", "peft", base_name=str(tmp_path / "base"))
    assert "adapters: rank 4, alpha 12, on q_proj, v_proj, down_proj" in result.notes
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert config.trainable_token_indices == {"embed_tokens": [1024, 1025], "lm_head": [1024, 1025]}

    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    held = {name for name, _ in model.named_parameters() if "lora_" in name or "trainable_tokens" in name}
    assert len(held) == 3 * 3 * 2 + 2  # none in CLIP, whose projections have the same names
    encoded, logits, matrices = answers(folder)
    expected, poses = llava_answers(model, encoded, -1, head_on_its_own(tmp_path / "adapter"))
    agree(logits, expected)
    agree(matrices, poses)
    with model.disable_adapter():
        plain, _ = llava_answers(model, encoded, -1, head_on_its_own(tmp_path / "adapter"))
    assert np.abs(plain - expected).max() > 0.1

    model_folder(tmp_path / "base", tmp_path / "back", adapter=tmp_path / "adapter")
    assert load_model_config(tmp_path / "back") == load_model_config(folder)
    back, there = params_of(tmp_path / "back"), params_of(folder)
    for path, leaf in there.items():
        assert back[path].tobytes() == leaf.tobytes(), path


def test_a_base_with_fewer_rows_is_resized_first(tmp_path: Path) -> None:
    """Vicuna as a LlamaForCausalLM: ``<POSE>`` is a new row, which the adapter brings."""
    vicuna = make_vicuna(tmp_path / "base")
    clip = make_llava_original(tmp_path / "llava").clip
    make_clip(tmp_path / "clip", clip)
    converted = model_folder(tmp_path / "base", tmp_path / "jax", vision=tmp_path / "clip", init_missing=["projector"])
    folder = trained(converted, tmp_path / "lora")
    result = export(folder, tmp_path / "adapter", "peft", base_class="llama")
    assert any("needs resize_token_embeddings(1025) first" in note for note in result.notes)
    assert "contains: rows 1024 of embed_tokens, rows 1024 of lm_head" in result.notes
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCAB + 1)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    encoded, logits, _ = answers(folder, TEXT)
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(encoded.input_ids).long()[None]).logits[0].numpy()
    agree(logits, expected)
    assert vicuna.lm_head.weight.shape[0] == VOCAB

    options: dict[str, Any] = {"vision": tmp_path / "clip", "init_missing": ["projector"]}
    model_folder(tmp_path / "base", tmp_path / "back", adapter=tmp_path / "adapter", **options)
    back, there = params_of(tmp_path / "back"), params_of(folder)
    assert all(back[path].tobytes() == leaf.tobytes() for path, leaf in there.items())


@pytest.mark.slow
def test_a_trained_projector_goes_along(tmp_path: Path) -> None:
    make_llava_transformers(tmp_path / "base", seed=0)
    make_llava_transformers(tmp_path / "other", seed=9)
    folder = trained(model_folder(tmp_path / "other", tmp_path / "jax"), tmp_path / "lora")
    export(folder, tmp_path / "adapter", "peft", with_projector=True)
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = model.base_model.model.model.multi_modal_projector.modules_to_save["default"].linear_1.weight
    there = params_of(folder)
    np.testing.assert_array_equal(found.detach().numpy(), there["projector/fc1/kernel"].T)
    model_folder(tmp_path / "base", tmp_path / "back", adapter=tmp_path / "adapter")
    back = params_of(tmp_path / "back")
    np.testing.assert_array_equal(back["projector/fc2/bias"], there["projector/fc2/bias"])
    assert not np.array_equal(back["decoder/norm/scale"], there["decoder/norm/scale"])
    with pytest.raises(UserError, match="a LlamaForCausalLM has no projector"):
        export(folder, tmp_path / "x", "peft", base_class="llama", with_projector=True)


# ------------------------------------------------------------------------------------------------------------------- in


def peft_over_llava(folder: Path, **settings: Any) -> Any:
    """An adapter that peft trains (as it were) and writes, over the LLaVA in ``folder / "base"``."""
    if not (folder / "base").exists():
        make_llava_transformers(folder / "base")
    base = LlavaForConditionalGeneration.from_pretrained(folder / "base")
    options = {"r": 8, "lora_alpha": 4, "lora_dropout": 0.05, "init_lora_weights": "gaussian"}
    options["target_modules"] = r".*language_model.*\.(q_proj|k_proj|gate_proj)"
    model = move(peft.get_peft_model(base, peft.LoraConfig(**options | settings)))
    model.save_pretrained(folder / "adapter")
    write_tokenizer(folder / "adapter")
    return model


@pytest.mark.parametrize("kind", ["token rows", "modules_to_save", pytest.param("rslora", marks=pytest.mark.slow)])
def test_an_adapter_that_peft_wrote(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {
        "token rows": {"trainable_token_indices": {"embed_tokens": [5, POSE_ID], "lm_head": [POSE_ID]}},
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head", "multi_modal_projector"]},
        "rslora": {"use_rslora": True},
    }[kind]
    model = peft_over_llava(tmp_path, **settings)
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter")
    lora = load_model_config(tmp_path / "jax").lora
    alpha = 4 * 8**0.5 if kind == "rslora" else 4.0
    assert lora == LoRAConfig(8, alpha, 0.05, ("q_proj", "k_proj", "gate_proj"))
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 144))
    encoded, logits, _ = answers(tmp_path / "jax")
    expected, _ = llava_answers(model, encoded, -1, head)
    agree(logits, expected)
    with model.disable_adapter():
        assert np.abs(llava_answers(model, encoded, -1, head)[0] - expected).max() > 0.05

    # What comes in goes out, bit by bit: adapters, rows of the base vocabulary, replaced modules.
    export(tmp_path / "jax", tmp_path / "out", "peft")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    written = peft.LoraConfig.from_pretrained(tmp_path / "out")
    if kind == "token rows":
        assert written.trainable_token_indices == {"embed_tokens": [5, 1024, 1025], "lm_head": [1024, 1025]}
        rows = "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"
        assert torch.equal(ours[rows][:2], theirs[rows])
    elif kind == "modules_to_save":
        assert set(written.modules_to_save) == set(settings["modules_to_save"])
        assert ours.keys() == theirs.keys()
    assert sum("lora_" in name for name in theirs) == 18
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if "trainable_tokens" not in name)
    # And peft takes it back.
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    agree(logits, llava_answers(again, encoded, -1, head)[0])


@pytest.mark.parametrize(
    ("dtype", "settings", "quantize"),
    [
        ("float16", {"modules_to_save": ["embed_tokens", "lm_head", "multi_modal_projector"]}, "none"),
        ("bfloat16", {"trainable_token_indices": {"embed_tokens": [9, 5, POSE_ID], "lm_head": [7, POSE_ID]}}, "none"),
        ("bfloat16", {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [9, 5]}}, "int4"),
    ],
    ids=["modules", "rows", "both over int4"],
)
def test_float32_over_a_base_in_half_precision_goes_out_as_it_came(
    tmp_path: Path, dtype: str, settings: dict[str, Any], quantize: str
) -> None:
    """The model computes with what the base's dtype holds, as peft does; on the way out stand the bits that came, until
    something trains them."""
    make_llava_transformers(tmp_path / "base", dtype=getattr(torch, dtype))
    model = peft_over_llava(tmp_path, **settings).float()
    move(model, 4)  # in float32, which half precision does not hold
    model.save_pretrained(tmp_path / "adapter")
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter", quantize=quantize)
    came = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def exported(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
        """By name; of rows, those that the adapter had brought, in its order."""
        out = folder.with_name(f"{folder.name}-out{len(options)}")
        export(folder, out, "peft", **options)
        ours = load_file(out / "adapter_model.safetensors")
        listed = peft.LoraConfig.from_pretrained(out).trainable_token_indices or {}
        for module, ids in (settings.get("trainable_token_indices") or {}).items():
            name = next(name for name in ours if name.endswith(module + adapters.TOKEN_ROWS))
            ours[name] = ours[name][[listed[module].index(id) for id in ids]]
        return {name: ours[name] for name in came}

    def assert_came(found: dict[str, torch.Tensor], but: str = "-") -> None:
        for name, tensor in came.items():
            assert found[name].dtype == torch.float32 and (but in name or torch.equal(found[name], tensor)), name

    assert_came(exported(tmp_path / "jax"))
    half = exported(tmp_path / "jax", dtype=dtype)
    assert all(torch.equal(half[name], tensor.to(getattr(torch, dtype))) for name, tensor in came.items())

    # A training that leaves the parts alone, in its own dtype even, hands them on.
    config = load_model_config(tmp_path / "jax")
    wider = config.replace(param_dtype="float32")
    params = load_params(tmp_path / "jax", abstract_params(wider))
    processor = Processor.load(tmp_path / "jax" / TOKENIZER, config)
    hand_on = {"processor": processor, "passengers": tmp_path / "jax"}
    save_folder(tmp_path / "again", wider, params, **hand_on)
    assert_came(exported(tmp_path / "again"))

    # What was trained goes out as trained, the rest as it came.
    flat = by_path(params) | {path: np.array(leaf) for path, leaf in by_path(params).items() if "lm_head" in path}
    flat["decoder/lm_head/kernel"][:, 7] += 0.25
    save_folder(tmp_path / "moved", wider, unflatten_dict(flat, sep="/"), **hand_on)
    found = exported(tmp_path / "moved")
    assert_came(found, but="lm_head")
    name = next(name for name in came if "lm_head" in name)
    row = 7 if "lm_head" in settings.get("modules_to_save", ()) else 0
    assert torch.equal(found[name][row], torch.from_numpy(flat["decoder/lm_head/kernel"][:, 7]))
    rest = [other for other in range(len(came[name])) if other != row]
    assert torch.equal(found[name][rest], came[name][rest])

    # Other formats write the weights that the model computes with.
    export(tmp_path / "jax", tmp_path / "whole", "transformers")
    embedding = load_file(tmp_path / "whole" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    table = params_of(tmp_path / "jax")["decoder/embed_tokens/embedding"].astype(np.float32)
    assert torch.equal(embedding[:VOCAB].float(), torch.from_numpy(table))

    # peft, too, computes with what the base's dtype holds.
    if quantize == "none":
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()
        ids = torch.tensor([[5, 9, 7]])
        theirs = loaded.get_input_embeddings()(ids)[0].detach()
        assert theirs.dtype == getattr(torch, dtype)
        assert torch.equal(theirs.float(), torch.from_numpy(table[[5, 9, 7]]))


def test_rows_in_float32_beside_their_whole_table(tmp_path: Path) -> None:
    """As peft saves them where the table was resized: the table in the base's dtype, and the rows that were trained."""
    make_llava_transformers(tmp_path / "base", dtype=torch.float16)
    model = peft_over_llava(tmp_path, trainable_token_indices={"embed_tokens": [9, 5]}).float()
    move(model, 4).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    came = load_file(file)
    rows = next(name for name in came if name.endswith(adapters.TOKEN_ROWS))
    whole = rows.replace(adapters.TOKEN_ROWS, ".weight")
    table = model.get_input_embeddings().original_module.weight.detach().half() * 2
    save_file(came | {whole: table}, file)
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter")
    export(tmp_path / "jax", tmp_path / "out", "peft")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[whole]
    expected = table.float()
    expected[[9, 5]] = came[rows]
    assert torch.equal(found, expected)


def test_originals_of_an_adapter_that_has_its_bases_names(tmp_path: Path) -> None:
    """In a LLaMA the replaced tensor and its replacement are called the same."""
    vicuna = make_vicuna(tmp_path / "base").half()
    write_state(tmp_path / "base", dict(vicuna.state_dict()), "bin")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = move(peft.get_peft_model(vicuna.float(), peft.LoraConfig(**settings)))
    model.save_pretrained(tmp_path / "adapter")
    options: dict[str, Any] = {"init_missing": ["vision", "projector"]}
    plan = plan_conversion(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter", **options))
    assert "rounded     1 tensors of adapter: float32 to float16" in "\n".join(describe_conversion(plan))
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter", **options)
    export(tmp_path / "jax", tmp_path / "out", "peft", base_class="llama")
    came, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    head = "base_model.model.lm_head.weight"
    assert torch.equal(found[head][:VOCAB], came[head])


@pytest.mark.parametrize("named", [False, True])
def test_new_tokens_of_an_adapter(tmp_path: Path, named: bool) -> None:
    """A base without ``<POSE>``, resized; the adapter brings tokenizer, embedding, LM head and text_hidden_fcs.

    named: peft knows where the base is, sees that its vocabulary has grown, and writes the tables under several names.
    """
    vicuna = make_vicuna(tmp_path / "base")
    if named:
        vicuna = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    make_clip(tmp_path / "clip", make_llava_original(tmp_path / "llava").clip)
    vicuna.resize_token_embeddings(VOCAB + 2)
    extra = randomise(PoseProjection(Sizes()), 5)
    vicuna.model.mm_projector, vicuna.model.text_hidden_fcs = extra.mm_projector, extra.text_hidden_fcs
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens", "lm_head", "mm_projector", "text_hidden_fcs.0"],
    )
    model = move(peft.get_peft_model(vicuna, config))
    model.save_pretrained(tmp_path / "adapter")
    head = "base_model.model.lm_head."
    names = {name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if name.startswith(head)}
    assert (head + "modules_to_save.weight" in names) == named  # as of peft 0.21; else this tests one case twice
    write_tokenizer(tmp_path / "adapter")
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter", vision=tmp_path / "clip")
    assert load_model_config(tmp_path / "jax").pose_token_id == POSE_ID
    encoded, logits, matrices = answers(tmp_path / "jax", TEXT)
    ids = torch.from_numpy(encoded.input_ids).long()[None]
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        hidden = out.hidden_states[-1][0, encoded.pose_positions - 1]
        first, _, second = vicuna.model.text_hidden_fcs[0].modules_to_save["default"]
        poses = gram_schmidt(second(torch.relu(first(hidden))).reshape(-1, 24, 6))
    agree(logits, out.logits[0].numpy())
    agree(matrices, poses)


@pytest.mark.parametrize(("whole", "alone"), [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")])
def test_an_exported_table_of_more_rows_goes_back_onto_its_base(tmp_path: Path, whole: str, alone: str) -> None:
    """Trained without ``<POSE>``; the conversion adds its row, and export writes one table whole and of the other the row alone."""
    vicuna = make_vicuna(tmp_path / "base")
    write_tokenizer(tmp_path / "base", pose=None)
    make_clip(tmp_path / "clip", make_llava_original(tmp_path / "llava").clip)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": [whole.split(".")[-1]],
    }
    move(peft.get_peft_model(vicuna, peft.LoraConfig(**settings))).save_pretrained(tmp_path / "adapter")
    options = {"vision": tmp_path / "clip", "init_missing": ["projector"]}
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter", **options)
    export(tmp_path / "jax", tmp_path / "out", "peft", base_class="llama")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written[f"base_model.model.{whole}.weight"].shape == (VOCAB + 1, 64)
    assert written[f"base_model.model.{alone}{adapters.TOKEN_ROWS}"].shape == (1, 64)
    model_folder(tmp_path / "base", tmp_path / "again", adapter=tmp_path / "out", **options)
    first, second = params_of(tmp_path / "jax"), params_of(tmp_path / "again")
    assert all(second[path].tobytes() == leaf.tobytes() for path, leaf in first.items())


def test_an_lm_head_of_more_rows_than_tokens_is_refused(tmp_path: Path) -> None:
    """A row that no embedding belongs to is not taken for that of a token which the conversion makes up."""
    vicuna = make_vicuna(tmp_path / "base")
    write_tokenizer(tmp_path / "base", pose=None)
    vicuna.lm_head = torch.nn.Linear(64, VOCAB + 1, bias=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    peft.get_peft_model(vicuna, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"misshaped \(1\): \S*lm_head.weight is \(1025, 64\), expected \(1024, 64\)"):
        convert(
            SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter", init_missing=["vision", "projector"]),
            tmp_path / "out",
        )


def test_what_llavas_own_training_lays_beside_an_adapter(tmp_path: Path) -> None:
    """Over Vicuna: the projector stands in ``non_lora_trainables.bin``; and the same without a folder in between."""
    vicuna = make_vicuna(tmp_path / "base")
    make_clip(tmp_path / "clip", make_llava_original(tmp_path / "llava").clip)
    model = move(
        peft.get_peft_model(vicuna, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"]))
    )
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    projector = randomise(PoseProjection(Sizes()), 5).mm_projector
    rows = {f"base_model.model.model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    torch.save(rows, tmp_path / "adapter" / "non_lora_trainables.bin")
    options = {"adapter": tmp_path / "adapter", "vision": tmp_path / "clip"}
    # Its config.json is LLaVA's: Vicuna's has no settings of images.
    said = {"image_aspect_ratio": "pad", "mm_vision_select_layer": -3}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(said))
    out = model_folder(tmp_path / "base", tmp_path / "jax", **options)
    assert Processor.load(out / "tokenizer", load_model_config(out)).images.fit == "pad"
    assert load_model_config(out).vision.select_layer == -3
    found = params_of(out)
    np.testing.assert_array_equal(found["projector/fc2/kernel"], projector[2].weight.detach().numpy().T)
    adapted = model.base_model.model.model.layers[1].mlp.down_proj
    for name, linear in (("lora_a", adapted.lora_A["default"]), ("lora_b", adapted.lora_B["default"])):
        there = linear.weight.detach().numpy().T
        np.testing.assert_array_equal(found[f"decoder/layers/mlp/down_proj/{name}"][1], there)
    plan, params = load_source(SourceSpec(tmp_path / "base", **options))
    assert plan.config == load_model_config(tmp_path / "jax")
    assert all(np.array_equal(leaf, found[path]) for path, leaf in by_path(params).items())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_training_run_put_together_by_deepspeed(tmp_path: Path, shards: int) -> None:
    """``pytorch_model.bin``, or shards with an index, with peft's names, adapters unmerged, CLIP inside; alpha is in no file."""
    models = make_chatpose(tmp_path / "src", tmp_path / "clip")
    llama = models.llama
    llama.model.mm_projector, llama.model.text_hidden_fcs = models.extra.mm_projector, models.extra.text_hidden_fcs
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    wrapped = move(peft.get_peft_model(llama, config))
    state = dict(wrapped.state_dict())
    tower = "base_model.model.model.vision_tower.vision_tower.vision_model."
    state |= {tower + name.removeprefix("vision_model."): t for name, t in models.clip.state_dict().items()}
    folder = tmp_path / "merged"
    folder.mkdir()
    write_state(folder, state, "bin", shards)
    assert len(list(folder.glob("pytorch_model*.bin"))) == shards
    shutil.copy(tmp_path / "src" / "config.json", folder)
    write_tokenizer(folder, pose="[SEG]")
    with pytest.raises(UserError, match=r"adapters of rank 4, and no adapter_config\.json .* --lora-alpha"):
        convert(folder, tmp_path / "jax")
    model_folder(folder, tmp_path / "jax", lora_alpha=8)
    assert load_model_config(tmp_path / "jax").lora == LoRAConfig(4, 8.0, 0.0, ("q_proj", "v_proj"))
    encoded, logits, matrices = answers(tmp_path / "jax")
    expected, hidden = flat_forward(models, encoded, -200)  # peft has changed the modules in place
    agree(logits, expected)
    with torch.no_grad():
        agree(matrices, poses_of(models, hidden[encoded.pose_positions - 1]))
    # Old releases of peft keep the adapted weight's own name.
    old = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    write_state(folder, old, "bin", shards)
    model_folder(folder, tmp_path / "old", lora_alpha=8)
    there, found = params_of(tmp_path / "jax"), params_of(tmp_path / "old")
    assert all(found[path].tobytes() == leaf.tobytes() for path, leaf in there.items())
    stages = list(verify(SourceSpec(folder, lora_alpha=8), tmp_path / "jax").stages)
    assert {"image features", "layer 2", "poses"} <= {stage.stage for stage in stages}
    assert not [stage for stage in stages if not stage.within(TOLERANCE)]


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    peft_over_llava(folder)
    return folder


def changed(written: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(written / "adapter", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_an_adapter_in_half_precision_comes_back_bit_by_bit(written: Path, tmp_path: Path, dtype: str) -> None:
    adapter = changed(written, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    model_folder(written / "base", tmp_path / "jax", adapter=adapter)
    export(tmp_path / "jax", tmp_path / "out", "peft", dtype=dtype)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in tensors.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": [8]}, r"adapters of rank 8 and r=\[8\]"),
        ({"lora_alpha": 10**400}, "expected numbers as lora_alpha and lora_dropout"),
        (
            {"alora_invocation_tokens": [5, 6]},
            r"alora_invocation_tokens=\[5, 6\] is not supported; expected plain LoRA",
        ),
        ({"r": 16}, r"adapters of rank 8 and r=16 in adapter_config\.json; expected one rank for all"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern=\{'q_proj': 4\} is not supported; expected plain LoRA"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"use_what_a_later_peft_has": True}, "use_what_a_later_peft_has=True"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"lora_alpha": "much"}, "expected numbers as lora_alpha and lora_dropout"),
        ({"trainable_token_indices": "all"}, "expected lists of ids as trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
    ],
)
def test_adapters_that_cannot_be_held(written: Path, tmp_path: Path, settings: Any, message: str) -> None:
    adapter = changed(written, tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=message):
        convert(SourceSpec(written / "base", adapter=adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head", "multi_modal_projector"]}, "modules_to_save .* lists lm_head, multi_modal_projector, but the"),
        ({"modules_to_save": "lm_head"}, "expected a list of names as modules_to_save, found 'lm_head'"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices in .* lists embed_tokens, but the"),
        ({"trainable_token_indices": {"embed_tokens": [], "lm_head": [5]}}, "lists lm_head, but the"),
        ({"target_modules": ["k_proj", "gate_proj"]}, r"adapters on model\S*0\.self_attn\.q_proj, .*2\.self_attn\.q_proj, which"),
        ({"target_modules": ["q_proj", "k_proj", "gate_proj"], "layers_to_transform": [1]}, r"layers\.0\.mlp\.gate_proj, .* and 2 more, which"),
        ({"exclude_modules": ["q_proj"], "target_modules": "all-linear"}, "puts adapters on v_proj, but the file has no tensors"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, r"layers_to_transform=\[0\] needs a list .* found the text 'all-linear'"),
        ({"layers_to_transform": 0}, r"layers_to_transform=0 needs a list as target_modules"),
    ],
)  # fmt: skip
def test_settings_and_file_belong_together(written: Path, tmp_path: Path, settings: Any, message: str) -> None:
    """What the settings list and the file lacks, or the file has and the settings do not target, is named."""
    with pytest.raises(UserError, match=message):
        open_adapter(changed(written, tmp_path / "adapter", **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": r"(([a-z_.0-9]+)+)+X"}, "repeats a group"),
        ({"target_modules": ".*" * 7 + "X"}, "has too many repetitions"),
        ({"exclude_modules": r"(a|b)*c"}, "repeats a group"),
        ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "expected the name of a list of layers"),
        ({"target_modules": "("}, "the settings of which modules have adapters are invalid"),
    ],
)
def test_a_strangers_regular_expression_ends(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapter_config.targeting({"target_modules": ["q_proj"], **settings}, Path("adapter"))
    long = r".*language_model.*\.layers\.[\d]{1,}\..*(q_proj|v_proj)"  # as peft and others write it
    assert adapter_config.targeting({"target_modules": long}, Path("adapter"))(
        "language_model.layers.1.self_attn.q_proj"
    )


def test_an_adapter_on_all_linear_modules(tmp_path: Path) -> None:
    """``all-linear``, without CLIP and projector: what PEFT calls so beside the LM head."""
    vicuna = make_vicuna(tmp_path / "base")
    settings = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}
    move(peft.get_peft_model(vicuna, peft.LoraConfig(**settings))).save_pretrained(tmp_path / "adapter")
    changed(tmp_path, tmp_path / "literal", target_modules="all-linear")
    for name in ("adapter", "literal"):
        (source,) = open_adapter(tmp_path / name)
        assert source.lora is not None and len(source.lora.targets) == 7


def test_an_adapter_of_another_base(written: Path, tmp_path: Path) -> None:
    for name, sizes, message in (
        ("wider", Sizes(width=128), r"misshaped \(15\).*q_proj.lora_A.weight is \(8, 64\), expected \(8, 128\)"),
        ("deeper", Sizes(layers=4), r"missing \(6\): model.language_model.layers.3.self_attn.q_proj.lora_A.weight"),
        ("shallower", Sizes(layers=2), r"unknown \(6\): .*layers.2."),
    ):
        make_llava_transformers(tmp_path / name, sizes=sizes)
        with pytest.raises(UserError, match=message):
            convert(SourceSpec(tmp_path / name, adapter=written / "adapter"), tmp_path / "out")


def test_an_adapter_of_the_vision_tower_is_not_dropped(tmp_path: Path) -> None:
    """A list of target names takes CLIP's projections along; this model has no adapters there, and says so."""
    peft_over_llava(tmp_path, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"unknown \(8\): model.vision_tower.encoder"):
        convert(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter"), tmp_path / "out")


def test_an_adapter_is_told_from_its_base(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"a PEFT adapter \(rank 8, alpha 4, on q_proj, k_proj, gate_proj, made for .*base"
    ):
        convert(written / "adapter", tmp_path / "out")
    with pytest.raises(UserError, match="not a PEFT adapter; give it as the source"):
        convert(SourceSpec(written / "base", adapter=written / "base"), tmp_path / "out")
    assert main(["inspect", str(written / "adapter")]) == 1
    said = capsys.readouterr().out
    assert "rank 8, alpha 4, on q_proj, k_proj, gate_proj" in said
    assert f"chatpose convert BASE OUT --adapter {written / 'adapter'}" in said
    command = ["convert", str(written / "base"), str(tmp_path / "out"), "--adapter", str(written / "adapter")]
    assert main([*command, "--no-hash"]) == 0
    assert "rank 8, alpha 4" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "hf"), "--format", "transformers"]) == 0
    assert "adapters merged: rank 8, alpha 4" in capsys.readouterr().out


def test_token_rows_and_their_ids_belong_together(tmp_path: Path) -> None:
    make_llava_transformers(tmp_path / "base")
    folder = trained(model_folder(tmp_path / "base", tmp_path / "jax"), tmp_path / "lora")
    export(folder, tmp_path / "adapter", "peft")
    adapter = changed(tmp_path, tmp_path / "short", trainable_token_indices={"embed_tokens": [1024]})
    with pytest.raises(UserError, match=r"embed_tokens.* has 2 rows, but trainable_token_indices .* lists 1 for it"):
        open_adapter(adapter)


def test_rows_without_a_shape() -> None:
    with pytest.raises(UserError, match="has no rows, but trainable_token_indices"):
        adapter_config.token_ids(
            {"embed_tokens" + adapters.TOKEN_ROWS: ()}, {"trainable_token_indices": [5]}, Path("adapter")
        )


def test_a_row_far_behind_the_vocabulary(tmp_path: Path) -> None:
    peft_over_llava(tmp_path, trainable_token_indices={"embed_tokens": [5]})
    adapter = changed(tmp_path, tmp_path / "far", trainable_token_indices={"embed_tokens": [10**9]})
    with pytest.raises(
        UserError, match="a row for token 1000000000, the embedding has 1026 rows and the tokenizer 1026"
    ):
        convert(SourceSpec(tmp_path / "base", adapter=adapter), tmp_path / "out")


def test_an_adapter_beside_its_base_is_not_overlooked(written: Path, tmp_path: Path) -> None:
    """As some training programs leave it: both in one folder."""
    both = tmp_path / "both"
    shutil.copytree(written / "base", both)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(written / "adapter" / name, both)
    with pytest.raises(
        UserError, match=r"adapter_model\.safetensors lies beside complete weights; convert with --adapter"
    ):
        convert(both, tmp_path / "out")
    convert(SourceSpec(both, adapter=both / "adapter_model.safetensors"), tmp_path / "out")
    lora = load_model_config(tmp_path / "out").lora
    assert lora is not None and (lora.rank, lora.alpha) == (8, 4.0)


def test_two_adapters_in_one_file(written: Path, tmp_path: Path) -> None:
    adapter = changed(written, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name.replace("lora_A.", "lora_A.second.").replace("lora_B.", "lora_B.second.")] = tensors[name].clone()
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="expected one adapter"):
        open_adapter(adapter)


def test_one_set_of_adapters(written: Path, tmp_path: Path) -> None:
    """Adapters inside the base, and others over it."""
    base = LlavaForConditionalGeneration.from_pretrained(written / "base")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    shutil.copytree(written / "base", tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(dict(wrapped.state_dict()), tmp_path / "base" / "pytorch_model.bin")
    write_config(tmp_path / "base", base.config.to_dict())
    with pytest.raises(UserError, match="both have adapters, but a model can have only one set"):
        convert(SourceSpec(tmp_path / "base", adapter=written / "adapter", lora_alpha=4), tmp_path / "out")


@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": r".*language_model.*layers\.(0\.self_attn\.q_proj|2\.mlp\.up_proj)"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    ],
    ids=["layers_to_transform", "pattern", "last layers"],
)
def test_an_adapter_on_some_layers(tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A = B = 0 where there is none, and nothing at all before the first: exact, and it goes out as it came."""
    exclude = {"exclude_modules": r".*vision_tower.*"}
    model = peft_over_llava(tmp_path, **exclude | chosen)
    theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len([name for name in theirs if "lora_" in name]) < 3 * 2 * 2
    model_folder(tmp_path / "base", tmp_path / "jax", adapter=tmp_path / "adapter")
    head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 144))
    encoded, logits, _ = answers(tmp_path / "jax")
    agree(logits, llava_answers(model, encoded, -1, head)[0])
    lora = load_model_config(tmp_path / "jax").lora
    assert lora is not None
    if chosen.get("layers_to_transform") == [1, 2]:
        assert lora.last_layers == 2
        assert {leaf.shape[0] for path, leaf in params_of(tmp_path / "jax").items() if "/lora_" in path} == {2}
        export(tmp_path / "jax", tmp_path / "whole", "transformers")
        whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole").eval()
        agree(logits, llava_answers(whole, encoded, -1, head)[0])
    else:
        assert lora.last_layers is None
    stages = list(verify(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter"), tmp_path / "jax").stages)
    assert all(stage.within(TOLERANCE) for stage in stages)

    export(tmp_path / "jax", tmp_path / "out", "peft")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name for name in ours if "lora_" in name} == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert sum("lora_" in name for name, _ in again.named_parameters()) == len(theirs)
    agree(logits, llava_answers(again, encoded, -1, head)[0])

    # A layer that the settings do adapt and the file lacks is still missing.
    lost = next(name for name in theirs if ".layers.2." in name).split(".lora_")[0]
    kept = {name: tensor for name, tensor in theirs.items() if not name.startswith(lost)}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"missing \(2\): .*layers\.2\.|adapters on up_proj, but the file has no tensors"
    ):
        convert(SourceSpec(tmp_path / "base", adapter=tmp_path / "adapter"), tmp_path / "x")
