"""A vision tower by itself, with or without its text half."""

from __future__ import annotations

from chatpose_jax.weights.backbones import TOWERS, Tower
from chatpose_jax.weights.layouts import parts
from chatpose_jax.weights.layouts.wrapper import Wrapper
from chatpose_jax.weights.table import Layout


def _wrapper(tower: Tower, number: int, prefix: str) -> Wrapper:
    name, title = f"{tower.name}_{number}" if number else tower.name, f"{tower.title}, a vision tower"
    layout = Layout(
        name=name,
        title=title,
        family=tower.name,
        rules=tower.rules(prefix),
        ignored=(*parts.BUFFERS, *tower.ignored),
        unused=tower.unused(prefix),
        settings=lambda config, shapes: {
            "vision": tower.settings(config.get("vision_config", config), shapes, prefix, "")
        },
        tower=tower,
    )
    return Wrapper(
        name=name,
        title=title,
        family=tower.name,
        towers=(tower,),
        recognise=lambda shapes, tower: tower is not None and tower.recognise(shapes, prefix),
        text=None,
        layout=lambda language, tower: layout,
    )


# 5 is the version of transformers that left the first prefix out.
WRAPPERS = tuple(
    _wrapper(tower, number, prefix)
    for tower in TOWERS.values()
    for number, prefix in zip((0, *range(5, 9)), tower.prefixes)
)
