"""Print the README's memory table: bytes of weights, cache and optimiser, computed from shapes; nothing is allocated.

python tools/memory_table.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from chatpose_jax.models import quantize
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import PRESETS, ModelConfig
from chatpose_jax.models.decoder import init_cache
from chatpose_jax.train.trainable import PAPER, Flat, assign, flatten

COLUMNS = ("tiny", "chatpose_7b", "chatpose_13b")
ADAM_MOMENTS = 2
UNITS = ("B", "KiB", "MiB", "GiB")


def human(size: float) -> str:
    """Bytes in the largest binary unit that leaves at least one before the point."""
    power = min(int(math.log2(size)) // 10, 3)
    size /= 1024**power
    return f"{size:.0f} {UNITS[power]}" if size >= 100 else f"{size:.1f} {UNITS[power]}"


def count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def entries(tree: object) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def nbytes(tree: object) -> int:
    return sum(map(quantize.nbytes, jax.tree.leaves(tree)))


def shapes(config: ModelConfig, param_dtype: str) -> Flat:
    return flatten(abstract_params(config.replace(param_dtype=param_dtype)))


def quantized_bytes(config: ModelConfig, quantize: str) -> int:
    """The decoder layers' projections in few bits, with their scales; the rest as in bfloat16."""
    return nbytes(shapes(config.replace(quantize=quantize), "bfloat16"))


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    return nbytes(jax.eval_shape(lambda: init_cache(config.replace(dtype="bfloat16"), 1, tokens)))


def trained(config: ModelConfig) -> Flat:
    """What the paper's table trains: adapters, the pose head, the rows of new tokens; all float32."""
    params = abstract_params(config)
    rules = assign(params, PAPER)
    return {path: x for path, x in flatten(params).items() if rules[path].lr is not None}


def training_bytes(config: ModelConfig) -> int:
    """Weights with a bfloat16 base, and for what trains the gradient and Adam's two moments beside it."""
    return nbytes(shapes(config, "bfloat16")) + (1 + ADAM_MOMENTS) * nbytes(trained(config))


ROWS: dict[str, Callable[[ModelConfig], str]] = {
    "parameters, adapters and head included": lambda c: count(entries(abstract_params(c))),
    "weights, base in float32": lambda c: human(nbytes(shapes(c, "float32"))),
    "weights, base in bfloat16": lambda c: human(nbytes(shapes(c, "bfloat16"))),
    "weights, the decoder's projections in int8": lambda c: human(quantized_bytes(c, "int8")),
    "weights, the decoder's projections in int4": lambda c: human(quantized_bytes(c, "int4")),
    "KV cache in bfloat16, 1000 tokens of one conversation": lambda c: human(cache_bytes(c, 1000)),
    "tokens that an image takes": lambda c: str(c.vision.num_patches),
    "parameters that the paper trains": lambda c: count(entries(trained(c))),
    "those with gradients and Adam's moments, float32": lambda c: human((2 + ADAM_MOMENTS) * nbytes(trained(c))),
    "training state in all, base in bfloat16": lambda c: human(training_bytes(c)),
}


def table() -> str:
    """The Markdown table, presets in columns."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {label} | " + " | ".join(cell(PRESETS[name]) for name in COLUMNS) + " |" for label, cell in ROWS.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
