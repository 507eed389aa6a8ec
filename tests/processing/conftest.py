"""Processors to test with: the embedded tiny one, and one laid out as CHATPOSE-V0 over a real SentencePiece model."""

import json
import shutil
from pathlib import Path

import pytest

from chatpose_jax.models.config import ModelConfig, TextConfig, VisionConfig, preset
from chatpose_jax.processing.processor import ModelIds, Processor, tiny_processor
from chatpose_jax.processing.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def tiny() -> Processor:
    return tiny_processor(preset("tiny"))


@pytest.fixture(scope="session")
def chatpose_config() -> ModelConfig:
    """CHATPOSE-V0's ids (pose 32000, no row for the image) with a small image of 2 x 2 patches."""
    return ModelConfig(
        vision=VisionConfig(image_size=28),
        text=TextConfig(vocab_size=32001, hidden_size=64, num_heads=2, num_kv_heads=2, max_position_embeddings=256),
    )


@pytest.fixture(scope="session")
def chatpose_folder(tmp_path_factory, shared_data) -> Path:
    """A tokenizer folder as the released checkpoint has it: SentencePiece model, legacy config, one added token."""
    folder = tmp_path_factory.mktemp("chatpose-v0")
    shutil.copyfile(shared_data / "tokenizer" / "tokenizer.model", folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>", "unk_token": "<unk>"}))
    (folder / "added_tokens.json").write_text('{"[SEG]": 32000}')
    return folder


@pytest.fixture(scope="session")
def chatpose(chatpose_folder, chatpose_config) -> Processor:
    """Its tokenizer with LLaVA-1.5's template; ``Processor.load`` would choose that of the released program."""
    return Processor(TextTokenizer.read(chatpose_folder), ModelIds.of(chatpose_config), "vicuna_v1")


@pytest.fixture(scope="session")
def sentencepiece_model(chatpose_folder):
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(chatpose_folder / "tokenizer.model"))
