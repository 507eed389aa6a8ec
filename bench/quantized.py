"""What a quantised base costs in answers: logits and poses of a model folder in int8, int4 and NF4, against its own weights.

    python bench/quantized.py FOLDER [--rows 32] [--json quantized.json]

Each row is a question of chatpose_jax/data/talk with an answer that holds <POSE>. All models compute in float32, so that the difference is that
of the weights; the row "bfloat16" computes with the folder's own weights in bfloat16, as answers are given, and shows what its rounding costs. NF4
is computed here for comparison, in the groups of int4 with scales in bfloat16, hence of the same size; the program does not have it
(docs/scaling.md says why).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatpose_jax.models.chatpose import abstract_params, bind
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.quantize import QUANTIZATIONS, dequantize, group_size
from chatpose_jax.processing.processor import Processor
from chatpose_jax.weights.folder import TOKENIZER, load_model_config, load_params
from chatpose_jax.weights.paths import by_path, nested

# The quantiles of a normal distribution, as Dettmers et al. 2023 give them.
_NEGATIVE = (-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004)
_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)
NF4 = np.array((*_NEGATIVE, 0, *_POSITIVE), np.float32)


def nf4(kernel: np.ndarray) -> np.ndarray:
    """The values of a kernel (..., in, out) in NF4, in the groups of int4."""
    grouped = kernel.reshape(*kernel.shape[:-2], -1, group_size(kernel.shape[-2]), kernel.shape[-1])
    scale = np.abs(grouped).max(-2, keepdims=True).astype(jnp.bfloat16).astype(np.float32)
    nearest = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, grouped / np.where(scale > 0, scale, 1))
    return (NF4[nearest] * scale).reshape(kernel.shape)


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "int8": lambda kernel: dequantize(*QUANTIZATIONS["int8"](kernel)),
    "nf4": nf4,
    "int4": lambda kernel: dequantize(*QUANTIZATIONS["int4"](kernel)),
}


def questions(processor: Processor, count: int) -> list[np.ndarray]:
    lines = (resources.files("chatpose_jax.data.talk") / "ask_pose.txt").read_text().splitlines()[:count]
    answers = [{"role": "assistant", "content": "It is <POSE>."}]
    return [
        processor.encode([{"role": "user", "content": line}, *answers], add_generation_prompt=False).input_ids
        for line in lines
    ]


Answers = list[tuple[np.ndarray, np.ndarray]]
"""Of each row: logits (T, V) of its tokens, less their mean, in float16; and rotations (J, 3, 3) of its pose."""


def run(config: ModelConfig, params: Any, ids: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> Answers:
    @jax.jit
    def forward(params: Any, ids: jax.Array, length: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = bind(config, params)
        hidden = model(ids[None], attention_mask=(jnp.arange(len(ids)) < length)[None]).hidden
        logits = model.logits(hidden)[0]
        poses = model.poses(model.states(hidden, place[None, None]), jax.random.key(0))
        return logits - logits.mean(-1, keepdims=True), poses.rotations[0, 0]

    answers = []
    for row, length, place in zip(ids, lengths, places):
        logits, rotations = map(np.asarray, forward(params, row, length, place))
        answers.append((logits[:length].astype(np.float16), rotations))
    return answers


def errors(found: Answers, expected: Answers) -> dict[str, float]:
    square = total = kl = same = tokens = 0.0
    angles = []
    for (ours, turned), (theirs, true) in zip(found, expected):
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        square, total = square + float(np.sum((ours - theirs) ** 2)), total + float(np.sum(theirs**2))
        same, tokens = same + float(np.sum(ours.argmax(-1) == theirs.argmax(-1))), tokens + len(ours)
        ours, theirs = (np.asarray(jax.nn.log_softmax(x)) for x in (ours, theirs))
        kl += float(np.sum(np.exp(theirs) * (theirs - ours)))
        cosine = (np.einsum("jki,jki->j", turned, true) - 1) / 2
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return {
        "logits": (square / total) ** 0.5,
        "kl": kl / tokens,
        "same_token": same / tokens,
        "degrees": float(np.mean(angles)),
        "degrees_worst": float(np.max(angles)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = load_model_config(args.folder)
    exact = config.replace(dtype="float32", param_dtype="float32", scan_layers=True)
    processor = Processor.load(args.folder / TOKENIZER, config)
    flat = by_path(jax.tree.map(np.asarray, load_params(args.folder, abstract_params(exact))))

    rows = questions(processor, args.rows)
    lengths = np.array(list(map(len, rows)), np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    places = (np.argmax(ids == config.pose_token_id, axis=1) - 1).astype(np.int32)
    batch = ids, lengths, places

    expected = run(exact, nested(flat), *batch)
    found = {"bfloat16": errors(run(exact.replace(dtype="bfloat16"), nested(flat), *batch), expected)}
    kernels = [path for path in flat if path.startswith("decoder/layers/") and path.endswith("/kernel")]
    for kind, change in KINDS.items():
        changed = flat | {path: change(np.asarray(flat[path], np.float32)) for path in kernels}
        squares = sum(float(np.sum((changed[path] - flat[path]) ** 2)) for path in kernels)
        size = (squares / sum(float(np.sum(np.square(flat[path]))) for path in kernels)) ** 0.5
        found[kind] = {"weights": size} | errors(run(exact, nested(changed), *batch), expected)
    print(f"{len(rows)} rows, {int(lengths.sum())} tokens of {args.folder}")
    print(
        "| base | error of the weights | of the logits | KL, nats | same next token | poses, mean ° | worst joint ° |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind, row in found.items():
        cells = [f"{100 * row['weights']:.2f} %" if "weights" in row else "–", f"{100 * row['logits']:.2f} %"]
        cells += [
            f"{row['kl']:.2g}",
            f"{100 * row['same_token']:.1f} %",
            f"{row['degrees']:.2f}",
            f"{row['degrees_worst']:.1f}",
        ]
        print(f"| {kind} | {' | '.join(cells)} |")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
