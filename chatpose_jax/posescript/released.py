"""Converts the checkpoints that PoseScript's authors released, or that their code wrote, without running code of theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from chatpose_jax.data.readers.untrusted import load_pickle, read_bytes
from chatpose_jax.errors import UserError
from chatpose_jax.posescript.distilbert import DistilBertConfig
from chatpose_jax.posescript.folder import KINDS, write_folder
from chatpose_jax.posescript.layouts import filled
from chatpose_jax.posescript.network import RetrieverConfig, TextEncoderConfig
from chatpose_jax.posescript.pairs import PoseInput
from chatpose_jax.posescript.pose_vae import PoseVaeConfig
from chatpose_jax.posescript.tokens import WordPieces, WordVocabulary
from chatpose_jax.posescript.transformer_encoder import TransformerConfig
from chatpose_jax.weights.readers import read_torch_objects

Shapes = Mapping[str, tuple[int, ...]]
_CLASSES = ("argparse.Namespace", "torch.device")
_VOCABULARY_CLASSES = tuple(f"{module}.Vocabulary" for module in ("text2pose.vocab", "vocab", "__main__"))
_HEAD_WIDTH = 64  # of DistilBERT; a checkpoint does not say it
_ABOUT = ("dataset", "generated_pose_samples", "pretrained", "seed", "text_encoder_name")


def convert_released(file: Path, out: Path, tokens: Path) -> Path:
    """Writes the folder of a retriever or a generator.

    Args:
        file: ``best_model.pth``, ``checkpoint_last.pth`` or another, of the branches ``posescript``, ``posefix`` or ``main``.
        out: folder to write.
        tokens: for a network over words, the vocabulary file of its name (``vocab3893.pkl`` for ``vocA1H1``), or a JSON list of words; for one over
            DistilBERT, the folder of ``distilbert-base-uncased`` with its ``tokenizer.json``.

    A joint of a pose that is not measured gets the mean of the training data, which batch norm has kept.

    Raises UserError for another file, a network that is not supported, and a vocabulary that does not fit.
    """
    tensors, value = read_torch_objects(file, _CLASSES)
    settings = _settings(file, value)
    shapes = {name: entry.shape for name, entry in tensors.items()}
    kind = next(
        (kind for name, kind in (("loss_weight", "retriever"), ("decsigma_v2v", "pose_vae")) if name in shapes), ""
    )
    if not kind:
        raise UserError(
            f"{file}: neither a retriever (PoseText) nor a generator (CondTextPoser) of PoseScript; its first tensors are "
            f"{', '.join(list(shapes)[:4]) or 'missing'}"
        )
    try:
        sizes: Any = (_retriever if kind == "retriever" else _pose_vae)(shapes, _text(file, shapes, settings))
    except KeyError as error:
        raise UserError(f"{file}: there is no tensor {error}") from None
    mean = np.asarray(tensors["pose_encoder.encoder.1.running_mean"].read(), np.float32).reshape(-1, 3)
    model = filled(
        nnx.eval_shape(lambda: KINDS[kind].network(sizes, rngs=nnx.Rngs(0))), KINDS[kind].rules, tensors, file
    )
    most = sizes.text.transformer.distilbert.positions
    found = read_vocabulary(tokens) if sizes.text.encoder == "words" else WordPieces.load(tokens, most)
    if len(found) != sizes.text.count:
        raise UserError(
            f"{tokens} has {len(found):,} token ids, and {file} was trained with {sizes.text.count:,}"
            + f": it needs those of {settings.get('text_encoder_name', 'its own')}"
        )
    about = {name: settings[name] for name in _ABOUT if isinstance(settings.get(name), str | int)}
    epoch = value.get("epoch")
    trained_on = {"released": file.name, "epoch": epoch if isinstance(epoch, int) else None, **about}
    return write_folder(out, kind, model, found, PoseInput(mean, np.ones(len(mean), bool)), trained_on)


def read_vocabulary(path: Path) -> WordVocabulary:
    """PoseScript's vocabulary, a pickle of its class or of that class's dictionary; or a JSON list of words. Raises UserError."""
    data = read_bytes(path)
    found = json.loads(data) if data[:1] == b"[" else load_pickle(data, path, classes=_VOCABULARY_CLASSES)
    if isinstance(found, dict):
        ids = found.get("word2idx")
        if not isinstance(ids, dict) or sorted(map(repr, ids.values())) != sorted(map(repr, range(len(ids)))):
            raise UserError(f"{path}: expected a vocabulary with word2idx, ids from 0 on without gaps")
        found = sorted(ids, key=lambda word: ids[word])
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UserError(f"{path}: expected a vocabulary of PoseScript, or a JSON list of words")
    try:
        return WordVocabulary(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _settings(file: Path, value: Any) -> dict[str, Any]:
    """The arguments of the training. Raises UserError for a value that is not followed."""
    args = value.get("args") if isinstance(value, dict) else None
    settings = getattr(args, "state", None)
    if not isinstance(settings, dict):
        raise UserError(f"{file}: expected a checkpoint of PoseScript, with the arguments of its training under 'args'")
    name, topping = settings.get("text_encoder_name", ""), settings.get("transformer_topping")
    if not str(name).startswith(("glovebigru", "distilbertUncased")):
        raise UserError(
            f"{file}: the text encoder {name!r:.60} is not supported; expected glovebigru_… or distilbertUncased"
        )
    if str(name).startswith("distilbert") and topping != "avgp":
        raise UserError(f"{file}: transformer_topping {topping!r:.60} is not supported; expected 'avgp'")
    return settings


def _text(file: Path, shapes: Shapes, settings: Mapping[str, Any]) -> TextEncoderConfig:
    if str(settings["text_encoder_name"]).startswith("glovebigru"):
        words, width = shapes["text_encoder.embed.weight"]
        return TextEncoderConfig("words", words=words, word_width=width)
    bert = "text_encoder.pretrained_text_encoder."
    vocabulary, width = shapes[f"{bert}embeddings.word_embeddings.weight"]
    if width % _HEAD_WIDTH:
        raise UserError(f"{file}: a DistilBERT of width {width}; expected a multiple of {_HEAD_WIDTH}")
    pretrained = DistilBertConfig(
        vocabulary=vocabulary,
        positions=shapes[f"{bert}embeddings.position_embeddings.weight"][0],
        width=width,
        layers=_layers(shapes, f"{bert}transformer.layer."),
        heads=width // _HEAD_WIDTH,
        mlp=shapes[f"{bert}transformer.layer.0.ffn.lin1.weight"][0],
    )
    layers = "text_encoder.transformer_encoder.layers."
    mlp = shapes[f"{layers}0.linear1.weight"][0]
    return TextEncoderConfig(
        "distilbert", transformer=TransformerConfig(layers=_layers(shapes, layers), mlp=mlp, distilbert=pretrained)
    )


def _layers(shapes: Shapes, prefix: str) -> int:
    return 1 + max(
        (int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)), default=-1
    )


def _retriever(shapes: Shapes, text: TextEncoderConfig) -> RetrieverConfig:
    latent, bottleneck = shapes["pose_encoder.encoder.10.weight"]
    width, inputs = shapes["pose_encoder.encoder.2.weight"]
    return RetrieverConfig(inputs // 3, latent, width, bottleneck, text)  # type: ignore[arg-type]


def _pose_vae(shapes: Shapes, text: TextEncoderConfig) -> PoseVaeConfig:
    width, inputs = shapes["pose_encoder.encoder.2.weight"]
    latent = shapes["pose_decoder.decoder.0.weight"][1]
    return PoseVaeConfig(inputs // 3, latent, width, text)  # type: ignore[arg-type]
