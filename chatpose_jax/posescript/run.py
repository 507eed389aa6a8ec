"""A complete run of ``chatpose posescript train``: from settings to the folder of a network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from chatpose_jax.data.example import Example
from chatpose_jax.data.readers.untrusted import read_lines
from chatpose_jax.data.sources import examples
from chatpose_jax.errors import UserError
from chatpose_jax.posescript.config import PoseScriptConfig, TextSourceConfig
from chatpose_jax.posescript.distilbert import DistilBert, DistilBertConfig
from chatpose_jax.posescript.folder import KINDS, Opened, open_folder, write_folder
from chatpose_jax.posescript.layouts import distilbert, filled
from chatpose_jax.posescript.pairs import Pairs, PoseInput, captions_of, pairs
from chatpose_jax.posescript.tokens import TextTokens, WordPieces, WordVocabulary
from chatpose_jax.posescript.trainer import Examples, print_line, train_network
from chatpose_jax.weights.readers import open_checkpoint, read_json_object

RUN = "training"
"""Folder of checkpoints and metrics, in the folder of the network."""


def run_posescript(
    config: PoseScriptConfig,
    out: Path,
    *,
    init: Path | None = None,
    say: Callable[[str], Any] = print_line,
    progress: bool = True,
) -> Path:
    """Trains a network and writes its folder ``out``, with the run in ``out/training``. The same call goes on with a run that was stopped.

    init: a folder of the same kind to start from, with its sizes and its token ids. Returns ``out``.

    Raises UserError for data without captions or without held-out rows ("val"), and as ``train_network`` does.
    """
    start = open_folder(init, config.kind) if init else None
    joints = start.model.config.joints if start else config.model.joints
    words: dict[str, None] = {}
    rows = _noted(examples(config.data, "train", 8), words)
    found = pairs(rows, captions=config.text.captions, joints=joints)
    held_out = pairs(examples(config.data, "val", 8), captions=config.text.captions, joints=joints)
    say(
        f"train: {len(found):,} poses with {sum(map(len, found.captions)):,} captions ({found.skipped:,} rows without); val: {len(held_out):,} poses"
    )
    if start is None:
        start = _fresh(config, found, list(words), say)
    trained_on = {
        "sources": json.loads(json.dumps([row._asdict() for row in config.data.sources])),
        "split": "train",
        "captions": config.text.captions,
        "poses": len(found),
        "seed": config.train.seed,
        "init": start.settings.get("fingerprint", ""),
    }
    fixed = {field.name: getattr(config.train, field.name) for field in dataclasses.fields(config.train)}
    fixed = {name: value for name, value in fixed.items() if name not in ("epochs", "result")}
    identity = {**trained_on, "model": dataclasses.asdict(start.model.config)}
    identity |= {"text": dataclasses.asdict(config.text), "loss": dataclasses.asdict(config.loss), "train": fixed}
    model, metrics = train_network(
        start.model,
        KINDS[config.kind].recipe(config.loss),
        _examples(found, start),
        config.train,
        out / RUN,
        validation=_examples(held_out, start),
        identity=json.loads(json.dumps(identity)),
        say=say,
        progress=progress,
    )
    metrics = {"gallery": len(held_out), **metrics}
    write_folder(out, config.kind, model, start.tokens, start.pose_input, {**trained_on, "val": metrics})
    return out


def _noted(rows: Iterable[Example], texts: dict[str, None]) -> Iterator[Example]:
    """The rows, one at a time, because they may have images. All of their captions become keys of ``texts``."""
    for row in rows:
        texts.update(dict.fromkeys(captions_of(row)))
        yield row


def _examples(found: Pairs, start: Opened) -> Examples:
    tokens = [start.tokens.encode(captions) for captions in found.captions]
    return Examples(start.pose_input(found.poses, found.measured), tokens, found.measured & start.pose_input.seen)


def _fresh(config: PoseScriptConfig, found: Pairs, texts: list[str], say: Callable[[str], Any]) -> Opened:
    """A network with random weights, but for pretrained words or DistilBERT."""
    source, sizes = config.text, config.model
    tokens: TextTokens
    if sizes.text.encoder == "words":
        tokens = WordVocabulary.of(texts, source.least)
        text = dataclasses.replace(sizes.text, words=len(tokens))
    else:
        if not source.distilbert:
            raise UserError(
                "text.distilbert: expected the folder of distilbert-base-uncased; --set model.text.encoder=words needs none"
            )
        pretrained, tokens = read_distilbert(Path(source.distilbert))
        transformer = dataclasses.replace(sizes.text.transformer, distilbert=pretrained.config)
        text = dataclasses.replace(sizes.text, transformer=transformer)
    model = KINDS[config.kind].network(dataclasses.replace(sizes, text=text), rngs=nnx.Rngs(config.train.seed))
    if sizes.text.encoder == "words":
        _set_vectors(model, tokens, source, say)  # type: ignore[arg-type]
    else:
        nnx.update(model.text_encoder.distilbert, nnx.state(pretrained))
    return Opened("", model, tokens, PoseInput.of(found), {})


def _set_vectors(model: Any, words: WordVocabulary, source: TextSourceConfig, say: Callable[[str], Any]) -> None:
    """Word vectors of a text file: in each line a word and its numbers, with spaces between."""
    if not source.vectors:
        return
    vectors = np.array(model.text_encoder.embedding[...])
    width, known = vectors.shape[1], 0
    for number, line in read_lines(Path(source.vectors)):
        word, *values = line.decode("utf-8", "replace").rstrip().split(" ")
        if word in words.ids and len(values) == width:
            try:
                vectors[words.ids[word]] = [float(value) for value in values]
            except ValueError:
                raise UserError(f"{source.vectors}: line {number}: expected a word and {width} numbers") from None
            known += 1
    if not known:
        raise UserError(
            f"{source.vectors}: no line has a word of the captions and {width} numbers; model.text.word_width must be that of the file"
        )
    model.text_encoder.embedding[...] = jax.numpy.asarray(vectors)
    say(f"{known:,} of {len(words):,} words have vectors in {source.vectors}")


def read_distilbert(folder: Path) -> tuple[DistilBert, WordPieces]:
    """A DistilBERT as transformers writes it, and its tokenizer. Raises UserError for another folder, or a setting that is not followed."""
    settings = read_json_object(folder / "config.json")
    fixed = {"model_type": "distilbert", "activation": "gelu", "sinusoidal_pos_embds": False}
    for name, expected in fixed.items():
        if settings.get(name, expected) != expected:
            raise UserError(
                f"{folder / 'config.json'}: {name}={settings[name]!r:.60} is not supported; expected {expected!r}"
            )
    names = {
        "vocab_size": "vocabulary", "max_position_embeddings": "positions", "dim": "width", "n_layers": "layers",
        "n_heads": "heads", "hidden_dim": "mlp",
    }  # fmt: skip
    config = DistilBertConfig(**{ours: settings[theirs] for theirs, ours in names.items() if theirs in settings})
    tensors = open_checkpoint(folder).tensors
    prefix = "distilbert." if any(name.startswith("distilbert.") for name in tensors) else ""
    heads = ("vocab_", "pre_classifier", "classifier", "qa_outputs")  # of what it was pretrained or tuned for
    tensors = {name: entry for name, entry in tensors.items() if not name.startswith(heads)}
    network = nnx.eval_shape(lambda: DistilBert(config, rngs=nnx.Rngs(0)))
    return filled(network, [*distilbert(prefix, "")], tensors, folder), WordPieces.load(folder, config.positions)
