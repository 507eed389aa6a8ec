"""Folders of trained networks: ``config.json``, ``model.safetensors`` with PoseScript's tensor names, and the file of ``tokens``."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from chatpose_jax.errors import UserError
from chatpose_jax.posescript.layouts import POSE_VAE, RETRIEVER, filled, to_tensors
from chatpose_jax.posescript.network import Retrieval, RetrieverConfig, RetrieverLossConfig, retriever_recipe
from chatpose_jax.posescript.pairs import PoseInput
from chatpose_jax.posescript.pose_vae import PoseVae, PoseVaeConfig, VaeLossConfig, pose_vae_recipe
from chatpose_jax.posescript.tokens import TextTokens, WordPieces, WordVocabulary
from chatpose_jax.posescript.trainer import Recipe
from chatpose_jax.settings import one_line
from chatpose_jax.weights.readers import open_checkpoint
from chatpose_jax.weights.readers.checkpoint import read_json_object
from chatpose_jax.weights.table import NameRule
from chatpose_jax.weights.writers import Tensor, write_safetensors

CONFIG, ARRAYS = "config.json", "model.safetensors"
VERSION = 1
_FILL, _SEEN = "pose_input.fill", "pose_input.seen"


class Kind(NamedTuple):
    """A kind of network.

    config: dataclass of its sizes, with ``from_json``. network: called with it and ``rngs``. rules: its tensors. loss: dataclass of the settings of
    its loss. recipe: how it trains, from these settings.
    """

    config: Any
    network: Callable[..., Any]
    rules: Sequence[NameRule]
    loss: Any
    recipe: Callable[[Any], Recipe]

    def __repr__(self) -> str:
        return one_line(self)


KINDS: dict[str, Kind] = {
    "retriever": Kind(RetrieverConfig, Retrieval, RETRIEVER, RetrieverLossConfig, retriever_recipe),
    "pose_vae": Kind(PoseVaeConfig, PoseVae, POSE_VAE, VaeLossConfig, pose_vae_recipe),
}
"""Kinds of networks in a folder, by the name in ``config.json``."""


class Opened(NamedTuple):
    """A folder that was read. settings: JSON: kind, fingerprint, model (its sizes), trained_on."""

    name: str
    model: Any
    tokens: TextTokens
    pose_input: PoseInput
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return one_line(self)


def write_folder(
    folder: Path, kind: str, model: Any, tokens: TextTokens, pose_input: PoseInput, trained_on: Mapping[str, Any]
) -> Path:
    """Writes a network; ``config.json`` comes last, so a folder with one is whole. The same network gives the same bytes.

    trained_on: JSON: data sources, split, and what else a report should say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    arrays = to_tensors(model, KINDS[kind].rules)
    arrays |= {_FILL: pose_input.fill, _SEEN: pose_input.seen}
    tensors = [
        Tensor(name, value.dtype, value.shape, functools.partial(_once, value)) for name, value in arrays.items()
    ]
    write_safetensors(folder / ARRAYS, tensors)
    for old in (WordVocabulary.FILE, WordPieces.FILE):
        (folder / old).unlink(missing_ok=True)
    tokens.save(folder)
    found = {
        "kind": kind,
        "version": VERSION,
        "fingerprint": _fingerprint(folder),
        "model": dataclasses.asdict(model.config),
        "trained_on": dict(trained_on),
    }
    (folder / CONFIG).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def open_folder(folder: str | Path, kind: str) -> Opened:
    """Reads a folder of this kind; no code of it is run. Raises UserError for another folder, a damaged one, and one of another kind."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: no {CONFIG}; expected a folder that 'chatpose posescript train' or 'chatpose posescript convert' wrote"
        )
    config = read_json_object(folder / CONFIG)
    if config.get("kind") != kind:
        raise UserError(f"{folder / CONFIG}: expected the kind {kind!r}, found {config.get('kind')!r:.60}")
    if config.get("version") != VERSION:
        raise UserError(f"{folder / CONFIG}: version {config.get('version')!r:.20} is not known; expected {VERSION}")
    if config.get("fingerprint") != (found := _fingerprint(folder)):
        raise UserError(
            f"{folder}: its files have the fingerprint {found}, and {CONFIG} says {config.get('fingerprint')!r:.60}: "
            "they do not belong together, or one is damaged"
        )
    sizes = KINDS[kind].config.from_json(config.get("model", {}))
    tensors = dict(open_checkpoint(folder / ARRAYS).tensors)
    try:
        pose_input = PoseInput(tensors.pop(_FILL).read(), tensors.pop(_SEEN).read())
    except KeyError as error:
        raise UserError(f"{folder / ARRAYS}: there is no tensor {error}") from None
    joints = sizes.joints
    if pose_input.fill.shape != (joints, 3) or pose_input.seen.shape != (joints,) or pose_input.seen.dtype != np.bool_:
        raise UserError(f"{folder / ARRAYS}: {_FILL} and {_SEEN} do not fit {joints} joints")
    model = nnx.eval_shape(lambda: KINDS[kind].network(sizes, rngs=nnx.Rngs(0)))
    model = filled(model, KINDS[kind].rules, tensors, folder / ARRAYS)
    tokens = open_tokens(folder, sizes.text.transformer.distilbert.positions)
    if len(tokens) > sizes.text.count:
        raise UserError(f"{folder}: {len(tokens)} token ids, and the network knows {sizes.text.count}")
    return Opened(folder.resolve().name, model, tokens, pose_input, config)


def open_tokens(folder: Path, most: int) -> TextTokens:
    """The vocabulary of a folder, or its tokenizer for texts of at most so many tokens. Raises UserError."""
    return WordVocabulary.load(folder) if (folder / WordVocabulary.FILE).is_file() else WordPieces.load(folder, most)


def _once(value: np.ndarray) -> Iterator[np.ndarray]:
    yield value


def _fingerprint(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in (ARRAYS, WordVocabulary.FILE, WordPieces.FILE):
        if (folder / name).is_file():
            digest.update(name.encode())
            with (folder / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
