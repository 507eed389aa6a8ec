"""Families of language models: settings, tied weights, biases and norms, in and out, on small random models.

The peers are transformers' classes of each family, and peft over them.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import chatpose_jax  # noqa: E402
from chatpose_jax.errors import UserError  # noqa: E402
from chatpose_jax.models.chatpose import abstract_params, bind  # noqa: E402
from chatpose_jax.models.config import ModelConfig, RopeScaling, TextConfig  # noqa: E402
from chatpose_jax.train.run_config import load_config  # noqa: E402
from chatpose_jax.weights.backbones import LANGUAGES, TOWERS, choose_language, language  # noqa: E402
from chatpose_jax.weights.convert import convert, load_source  # noqa: E402
from chatpose_jax.weights.export import export  # noqa: E402
from chatpose_jax.weights.folder import load_model_config, load_params  # noqa: E402
from chatpose_jax.weights.layouts import layouts  # noqa: E402
from chatpose_jax.weights.paths import by_path  # noqa: E402
from chatpose_jax.weights.plan import plan_conversion  # noqa: E402
from chatpose_jax.weights.spec import SourceSpec  # noqa: E402

from .. import byte_level  # noqa: E402
from ..numerics import agree, rounded  # noqa: E402
from .sources import randomise, write_tokenizer  # noqa: E402
from .test_export import trained, weights  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.1,  # switched off outside of training
    "initializer_range": 0.041,  # nothing that we read
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model of a family. spare: rows of the embedding behind the tokenizer's."""

    config: type[PreTrainedConfig]
    tokenizer: str | None
    settings: Mapping[str, Any]
    spare: int = 0
    control: tuple[str, ...] = ()


KINDS = {
    "llama2": Kind(LlamaConfig, None, {"rms_norm_eps": 1e-5, "bos_token_id": 1}),
    "llama3": Kind(LlamaConfig, "llama3", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    "llama3_1": Kind(
        LlamaConfig,
        "llama3",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
        control=("<|eom_id|>",),
    ),
    "smollm2": Kind(LlamaConfig, "smollm2", {"tie_word_embeddings": True}),
    "mistral": Kind(
        MistralConfig,
        "gpt2",
        {"sliding_window": None, "head_dim": 32},
        control=("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "qwen2": Kind(Qwen2Config, "qwen", {"sliding_window": 64, "max_window_layers": 1}, spare=7),
    "qwen3": Kind(Qwen3Config, "qwen", {"tie_word_embeddings": True, "head_dim": 32}, spare=7),
}
FAMILIES = list(KINDS)


def make(folder: Path, family: str, dtype: Any = torch.float32, **changes: Any) -> Any:
    """A model of the family, as ``save_pretrained`` writes it, with a tokenizer; returns the torch model."""
    kind = KINDS[family]
    folder.mkdir(parents=True)
    if kind.tokenizer is None:
        write_tokenizer(folder, pose=None)
        rows = 1024
    else:
        byte_level.write(folder, kind.tokenizer, pose=False)
        data = json.loads((folder / "tokenizer.json").read_text())
        last = max(token["id"] for token in data["added_tokens"])
        last = max(last, *data["model"]["vocab"].values())
        for number, literal in enumerate(kind.control):
            new = {**data["added_tokens"][0], "content": literal, "id": last + 1 + number}
            data["added_tokens"].append(new)
        (folder / "tokenizer.json").write_text(json.dumps(data))
        rows = last + 1 + len(kind.control)
    config = kind.config(**{**SIZES, **kind.settings, "vocab_size": rows + kind.spare, **changes})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.tie_weights()
    model = model.to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=[2, 1], temperature=0.6, do_sample=True)
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))


def ids_for(rows: int, count: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(3, rows, (count,), dtype=np.int32)


def our_logits(config: ModelConfig, params: Any, ids: np.ndarray) -> Any:
    def run(params: Any) -> jax.Array:
        model = bind(config, params)
        return model.logits(model(ids[None]).hidden[0])

    with jax.default_matmul_precision("highest"):
        return rounded(jax.jit(run), params)


@torch.no_grad()
def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    return model.eval()(torch.from_numpy(ids).long()[None]).logits[0].float().numpy()


def folder_logits(folder: Path, ids: np.ndarray) -> Any:
    config = load_model_config(folder).replace(dtype="float32", param_dtype="float32")
    return our_logits(config, load_params(folder, abstract_params(config)), ids)


# ------------------------------------------------------------------------------------------------------------- families


def test_a_family_is_named_like_its_module() -> None:
    for name in (*LANGUAGES, *TOWERS):
        module = importlib.import_module(f"chatpose_jax.weights.backbones.{name}")
        assert getattr(module, "LANGUAGE", None) or module.TOWER
    for name, family in LANGUAGES.items():
        assert family.name == name
        for size, text in family.sizes.items():
            assert text.backbone == name, size
            ours = ModelConfig(vision=None, text=text, bos_token_id=1, eos_token_id=2)
            # Its config.json says what the table of sizes says, and reads back.
            shapes = shapes_of(ours)
            found = family.settings(family.config_json(ours), shapes, "model.", "")
            rows = {"vocab_size": text.vocab_size, "base_vocab_size": text.base_vocab_size}
            assert TextConfig(**found, **rows) == text, size
    with pytest.raises(UserError, match="no family of language models 'qwen4'; did you mean qwen"):
        language("qwen4")


def test_the_walk_through_shows_a_family_as_it_is() -> None:
    root = Path(__file__).parents[2]
    family = (root / "chatpose_jax/weights/backbones/mistral.py").read_text()
    assert f"```python\n{family}```" in (root / "docs/extending.md").read_text()


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model's checkpoint, without reading or making any."""
    family = language(config.text.backbone)
    tree = by_path(abstract_params(config))
    found = {}
    for rule in family.rules("model.", "lm_head."):
        if rule.target in tree and rule.rows != "added":
            shape = tuple(tree[rule.target].shape[1:] if rule.stacked else tree[rule.target].shape)
            shape = rule.transform.source_shape(shape)
            rows = (config.text.vocab_size, *shape[1:]) if rule.rows == "base" else shape
            found |= dict.fromkeys(rule.sources(config.text.num_layers), rows)
    return found


def test_families_of_one_model_type_are_told_apart_by_control_tokens() -> None:
    for literals, name in {
        (): "llama2",
        ("<s>", "</s>", "<unk>"): "llama2",
        ("<s>", "<|im_start|>", "<|im_end|>"): "llama2",
        LANGUAGES["smollm2"].control: "smollm2",
        LANGUAGES["llama3"].control: "llama3",
        (*LANGUAGES["llama3"].control, "<|python_tag|>", "<|eom_id|>"): "llama3_1",
    }.items():
        assert choose_language({"model_type": "llama"}, literals).name == name
    assert choose_language({"model_type": "llama"}, LANGUAGES["smollm2"].control, "llama2").name == "llama2"
    assert choose_language({}).name == "llama2"
    with pytest.raises(UserError, match=r"model_type='gemma' is not supported; the families .* qwen3"):
        choose_language({"model_type": "gemma"})
    with pytest.raises(UserError, match="model_type='qwen2', but --backbone llama3 has 'llama'"):
        choose_language({"model_type": "qwen2"}, (), "llama3")


def test_names_of_every_layout_are_distinct() -> None:
    for family in LANGUAGES.values():
        for layout in layouts(family):
            assert layout.language in (family, None)
            assert len({rule.target for rule in layout.rules}) == len(layout.rules)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_answers_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    model = make(tmp_path / "src", family)
    plan, params = load_source(tmp_path / "src")
    text = plan.config.text
    assert plan.language.name == text.backbone == family
    assert plan.config.vision is None
    assert not any(path.startswith(("vision/", "projector/")) for path in by_path(params))
    assert text.tied == ("decoder/lm_head/kernel" not in by_path(params))
    rows = model.config.vocab_size
    spare = KINDS[family].spare
    assert (text.vocab_size, text.base_vocab_size) == ((rows, rows - spare) if spare else (rows + 1, rows))
    ids = ids_for(rows)
    logits = our_logits(plan.config, params, ids)
    expected = torch_logits(model, ids)
    agree(dataclasses.replace(logits, value=logits.value[:, :rows], noise=logits.noise[:, :rows]), expected)
    assert np.abs(logits.value[:, :rows] - expected).max() <= 2e-5 * np.abs(expected).max()

    chat = chatpose_jax.load(tmp_path / "src")
    messages = [{"role": "user", "content": "Who sits?"}]
    reply = chat.chat(messages, max_new_tokens=12)
    prompt = chat.processor.encode(messages).input_ids
    answer = np.concatenate([prompt, np.asarray(reply.ids, np.int32)])
    steps = torch_logits(model, answer)[len(prompt) - 1 :][: len(reply.ids)]
    assert len(reply.ids) > 2
    np.testing.assert_array_equal(reply.ids, steps.argmax(-1))


def test_other_ends_of_answers(sources: Mapping[str, Path], tmp_path: Path) -> None:
    """Llama 3 lists several. generation_config.json comes before config.json, as in transformers."""
    shutil.copytree(sources["llama3"], tmp_path / "src")
    held = plan_conversion(SourceSpec(tmp_path / "src")).vocabulary.tokens.control
    for said, told in (([held["<|end_of_text|>"], held["<|eot_id|>"]], True), (held["<|eot_id|>"], False)):
        (tmp_path / "src/generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        plan = plan_conversion(SourceSpec(tmp_path / "src"))
        notes = plan.vocabulary.template.notes
        expected = "answers end at <|eot_id|>, and as in transformers at <|end_of_text|> (eos_token_id"
        assert [note.startswith(expected) for note in notes] == [True] * told
        assert plan.config.eos_token_id == held["<|eot_id|>"]
        assert plan.config.other_eos_token_ids == (held["<|end_of_text|>"],) * told
        assert ModelConfig.from_json(json.loads(json.dumps(plan.config.to_json()))) == plan.config


def test_padding_is_no_text(sources: Mapping[str, Path]) -> None:
    """Id 0 is LLaMA-2's ``<unk>``. In a byte-level vocabulary it is a text, so padding is the tokenizer's own, or what ends an answer."""
    for family, name in {"llama2": "<unk>", "llama3": "<|eot_id|>", "qwen2": "<|endoftext|>"}.items():
        plan = plan_conversion(SourceSpec(sources[family]))
        assert plan.config.pad_token_id == plan.vocabulary.tokens.control[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_not_trained_comes_back_bit_by_bit(tmp_path: Path, family: str, dtype: str) -> None:
    model = make(tmp_path / "src", family, getattr(torch, dtype))
    convert(tmp_path / "src", tmp_path / "jax")
    export(tmp_path / "jax", tmp_path / "back", "transformers")
    found, expected = weights(tmp_path / "back"), weights(tmp_path / "src")
    assert found.keys() == expected.keys()
    assert ("lm_head.weight" in found) != load_model_config(tmp_path / "jax").text.tied
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name][: len(tensor)], tensor), name
        new = 0 if KINDS[family].spare or ("embed" not in name and "lm_head" not in name) else 1
        assert len(found[name]) == len(tensor) + new, name

    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("src", "back"))
    for changed in ("vocab_size", "_name_or_path", "transformers_version"):
        before.pop(changed, None), after.pop(changed, None)
    assert after.pop("eos_token_id") in (before.pop("eos_token_id"), [2, plan_end(tmp_path / "jax")])
    assert after == before
    generation = [GenerationConfig.from_pretrained(tmp_path / name).to_dict() for name in ("src", "back")]
    assert {2, 1} <= set(generation[1].pop("eos_token_id"))
    del generation[0]["eos_token_id"]
    assert generation[0] == generation[1]
    texts = ["Who sits, and why? 12345 naïve\n\n  <|im_end|> end"]
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(texts)["input_ids"] for name in ("src", "back")]
    assert ids[0] == ids[1]

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(model)
    if dtype == "float32":  # where torch's angles are not rounded
        probe = ids_for(model.config.vocab_size)
        same = torch_logits(again, probe)[:, : model.config.vocab_size]
        np.testing.assert_allclose(same, torch_logits(model, probe), atol=1e-5)


def plan_end(folder: Path) -> int:
    return load_model_config(folder).eos_token_id


# ----------------------------------------------------------------------------------------------- settings of config.json


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE of type 'yarn' is not supported"),
        ("mistral", {"sliding_window": 64}, "sliding_window=64 is not supported"),
        ("llama3", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
        ("llama3_1", {"rope_scaling": LLAMA3 | {"factor": 8.0}}, "some versions of transformers read the first"),
        ("llama3_1", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is missing"),
        ("llama3_1", {"rope_parameters": LLAMA3 | {"truncate": True}}, "truncate=True is not supported with type 'll"),
        ("smollm2", {"model_type": "smollm3"}, "model_type='smollm3' is not supported"),
        ("smollm2", {"tie_word_embeddings": False}, r"missing \(1\): lm_head.weight"),
        (
            "qwen2",
            {"model_type": "llama"},
            r"model_type='llama' has no biases of q, k and v, but the tensors have them \(model.layers.0.self_attn.q_proj.bias\)",
        ),
        ("qwen3", {"model_type": "qwen2"}, r"model_type='qwen2' has biases of q, k and v, but the tensors have none"),
        ("smollm2", {"model_type": "qwen3"}, r"model_type='qwen3' has norms of q and k, but the tensors have none"),
    ],
)
def test_settings_that_the_decoder_does_not_follow(
    sources: Mapping[str, Path], tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(sources[family], tmp_path / "src")
    change_config(tmp_path / "src", **changes)
    with pytest.raises(UserError, match=message):
        plan_conversion(SourceSpec(tmp_path / "src"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, to be read or copied."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make(folder / family, family)
    return {family: folder / family for family in FAMILIES}


def test_a_switch_that_config_json_leaves_out(sources: Mapping[str, Path], tmp_path: Path) -> None:
    """It has the default of transformers' class: a window of 4096 tokens."""
    shutil.copytree(sources["mistral"], tmp_path / "src")
    data = json.loads((tmp_path / "src/config.json").read_text())
    del data["sliding_window"]
    (tmp_path / "src/config.json").write_text(json.dumps(data))
    assert AutoConfig.from_pretrained(tmp_path / "src").sliding_window == 4096
    with pytest.raises(UserError, match="sliding_window=4096 is not supported"):
        plan_conversion(SourceSpec(tmp_path / "src"))


def test_the_same_settings_in_files_of_transformers_4(sources: Mapping[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["llama3_1"], tmp_path / "src")
    data = json.loads((tmp_path / "src/config.json").read_text())
    scaling = {key: value for key, value in data.pop("rope_parameters").items() if key != "rope_theta"}
    data |= {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": data.pop("dtype")}
    (tmp_path / "src/config.json").write_text(json.dumps(data))
    found = plan_conversion(SourceSpec(tmp_path / "src")).config
    assert found == plan_conversion(SourceSpec(sources["llama3_1"])).config
    assert found.text.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 64)
    named = plan_conversion(SourceSpec(tmp_path / "src", backbone="llama3"))
    assert (named.language.name, named.vocabulary.template.name) == ("llama3", "llama3")


# ---------------------------------------------------------------------------------------------------------- tied weights


def with_head(source: Path, folder: Path, head: Any) -> Path:
    """The checkpoint with a stored LM head."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    save_file(state | {"lm_head.weight": head(state["model.embed_tokens.weight"])}, folder / "model.safetensors")
    return folder


def test_a_stored_lm_head_of_tied_weights_must_be_the_embedding(sources: Mapping[str, Path], tmp_path: Path) -> None:
    equal = with_head(sources["smollm2"], tmp_path / "equal", lambda table: table.clone())
    plan, params = load_source(equal)
    assert plan.ignored["lm_head.weight"] == "the same as the embedding, to which it is tied"
    _, expected = load_source(sources["smollm2"])
    assert by_path(params).keys() == by_path(expected).keys()
    assert all(np.array_equal(leaf, by_path(expected)[path]) for path, leaf in by_path(params).items())

    def moved(table: Any) -> Any:
        table = table.clone()
        table[-1, -1] += 1
        return table

    other = with_head(sources["smollm2"], tmp_path / "other", moved)
    with pytest.raises(UserError, match=r"lm_head.weight and model.embed_tokens.weight have different values"):
        convert(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shorter = with_head(sources["smollm2"], tmp_path / "shorter", lambda table: table[:-1].clone())
    with pytest.raises(UserError, match=r"misshaped .*lm_head.weight is .* the embedding to which it is tied"):
        plan_conversion(SourceSpec(shorter))


def test_the_new_tokens_row_is_one_array(sources: Mapping[str, Path]) -> None:
    """The mean of all rows; with spare rows behind the tokenizer's, the first of those as it is stored."""
    for family in ("smollm2", "qwen3"):
        plan, params = load_source(sources[family])
        table = load_file(sources[family] / "model.safetensors")["model.embed_tokens.weight"].numpy()
        added = by_path(params)["decoder/embed_tokens/added"]
        base = plan.config.text.base_vocab_size
        expected = table[base:] if KINDS[family].spare else table.mean(0, keepdims=True)
        np.testing.assert_allclose(added, expected, atol=1e-6)
        assert "decoder/lm_head/added" not in by_path(params)
        assert plan.config.pose_token_id == base


# -------------------------------------------------------------------------------------------------------------- adapters

PEFT_FAMILIES = ["llama3", "smollm2", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", PEFT_FAMILIES)
def test_a_trained_model_leaves_as_an_adapter_and_merged(
    sources: Mapping[str, Path], tmp_path: Path, family: str
) -> None:
    """Over the family's class, its tied LM head included; and the adapter comes back bit by bit."""
    peft = pytest.importorskip("peft")
    convert(sources[family], tmp_path / "jax")
    folder = trained(tmp_path / "jax", tmp_path / "trained")
    config = load_model_config(folder)
    ids = ids_for(config.text.vocab_size)
    logits = folder_logits(folder, ids)

    result = export(folder, tmp_path / "adapter", "peft")
    tokens = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["trainable_token_indices"]
    assert tokens.keys() == ({"embed_tokens"} if config.text.tied else {"embed_tokens", "lm_head"})
    assert any("peft 0.15 and later" in note for note in result.notes)
    base = AutoModelForCausalLM.from_pretrained(sources[family])
    base.resize_token_embeddings(config.text.vocab_size)
    agree(logits, torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), ids))

    convert(SourceSpec(sources[family], adapter=tmp_path / "adapter"), tmp_path / "again")
    assert load_model_config(tmp_path / "again") == config
    there, back = (
        {path: np.asarray(leaf) for path, leaf in by_path(load_params(each, abstract_params(config))).items()}
        for each in (folder, tmp_path / "again")
    )
    assert all(back[path].tobytes() == leaf.tobytes() for path, leaf in there.items())

    export(folder, tmp_path / "merged", "transformers")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == config.text.tied
    assert type(merged).__name__ == language(family).architecture
    agree(logits, torch_logits(merged, ids))


@pytest.mark.parametrize("listed", [["embed_tokens"], {"embed_tokens": [3, 8], "lm_head": [3, 8]}])
def test_rows_that_peft_trained_over_tied_weights(sources: Mapping[str, Path], tmp_path: Path, listed: Any) -> None:
    """peft stores them once; an adapter that lists both modules with the same rows says the same."""
    peft = pytest.importorskip("peft")
    listed = {"embed_tokens": [3, 8]} if isinstance(listed, list) else listed
    base = AutoModelForCausalLM.from_pretrained(sources["smollm2"])
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=listed)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    plan, params = load_source(SourceSpec(sources["smollm2"], adapter=tmp_path / "adapter"))
    rows = base.config.vocab_size
    logits = our_logits(plan.config, params, ids_for(rows))
    held = dataclasses.replace(logits, value=logits.value[:, :rows], noise=logits.noise[:, :rows])
    agree(held, torch_logits(model, ids_for(rows)))


def test_a_table_that_would_untie_the_weights_is_refused(sources: Mapping[str, Path], tmp_path: Path) -> None:
    """Whole embeddings without ``ensure_weight_tying``, and rows of the LM head, which the embedding would not get."""
    peft = pytest.importorskip("peft")

    def adapter(folder: Path, **settings: Any) -> SourceSpec:
        base = AutoModelForCausalLM.from_pretrained(sources["smollm2"])
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], **settings)
        peft.get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
        return SourceSpec(sources["smollm2"], adapter=folder)

    with pytest.raises(UserError, match="trained apart from the LM head, to which it is tied"):
        plan_conversion(adapter(tmp_path / "embedding", modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match="rows of the LM head, which is tied"):
        plan_conversion(adapter(tmp_path / "rows", trainable_token_indices={"lm_head": [5]}))
    if "ensure_weight_tying" in peft.LoraConfig.__dataclass_fields__:
        tied = adapter(tmp_path / "tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        assert plan_conversion(tied).config.text.tied


# ----------------------------------------------------------------------------------------------------- published models


def test_published_models_are_settings_of_a_run() -> None:
    config = load_config("tiny", ["model=qwen3_0.6b", "model.lora.rank=4"]).model
    assert (config.vision, config.text) == (None, language("qwen3").sizes["qwen3_0.6b"])
    assert config.lora is not None and config.lora.rank == 4
    assert config.pose_token_id == config.text.base_vocab_size
    count = sum(int(np.prod(leaf.shape)) for leaf in by_path(abstract_params(config.replace(lora=None))).values())
    assert 0.59e9 < count < 0.61e9  # as it is called
    with pytest.raises(UserError, match=r"no language model 'qwen3_06b'; did you mean qwen3_0.6b\?"):
        load_config("tiny", ["model=qwen3_06b"])
