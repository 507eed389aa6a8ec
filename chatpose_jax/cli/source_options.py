"""Options that say where PyTorch weights come from: shared by ``convert``, ``inspect`` and ``verify``."""

from __future__ import annotations

import argparse
import dataclasses

from chatpose_jax.processing.conversation import TEMPLATES
from chatpose_jax.processing.images import FITS
from chatpose_jax.weights.backbones import LANGUAGES
from chatpose_jax.weights.layouts import FAMILIES
from chatpose_jax.weights.spec import SourceSpec


def add_source_options(parser: argparse.ArgumentParser, *, planned: bool = True) -> None:
    """Adds the options. planned: include the parts to initialise, which ``verify`` does not use."""
    group = parser.add_argument_group("parts in other folders")
    group.add_argument(
        "--vision",
        metavar="FOLDER",
        help="CLIP (openai/clip-vit-large-patch14-336) or SigLIP (google/siglip-so400m-patch14-384), for weights without a vision tower: "
        "CHATPOSE-V0, liuhaotian/…, a language model",
    )
    group.add_argument(
        "--projector",
        metavar="FILE",
        help="mm_projector.bin or .safetensors, or its folder; found automatically beside the weights",
    )
    group.add_argument("--adapter", metavar="FOLDER", help="PEFT adapter over these weights; it stays an adapter")
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="ALPHA",
        help="lora_alpha of adapters without an adapter_config.json, such as DeepSpeed's",
    )
    group.add_argument(
        "--layout",
        choices=FAMILIES,
        help="layout of the weights; default: detected from the contents of the folder",
    )
    group.add_argument(
        "--backbone",
        choices=tuple(LANGUAGES),
        help="family of the language model; default: by config.json and the tokenizer",
    )
    group.add_argument(
        "--head",
        metavar="MODULE:CLASS",
        help="the pose head, if it is from a package of your own: files alone never import code",
    )
    group.add_argument(
        "--image-fit",
        choices=FITS,
        help="how images become squares: crop takes the centre, pad adds a border, stretch changes proportions; default: the source's setting",
    )
    group.add_argument(
        "--tokenizer", metavar="FOLDER", help="tokenizer.model or tokenizer.json, if not with the weights"
    )
    group.add_argument(
        "--template",
        choices=tuple(TEMPLATES),
        help="conversation template; default: that of the family or of the checkpoint's chat_template",
    )
    group.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="go on although the checkpoint's chat_template differs from the template, or cannot be compared",
    )
    if planned:
        group.add_argument(
            "--init-missing",
            action="append",
            default=[],
            choices=("vision", "projector"),
            metavar="PART",
            help="initialise vision or projector at random if no source has it, for training; may be repeated",
        )


def source_of(args: argparse.Namespace) -> SourceSpec:
    """The ``SourceSpec`` that the options describe. Raises UserError."""
    names = {field.name for field in dataclasses.fields(SourceSpec)}
    return SourceSpec(**{name: value for name, value in vars(args).items() if name in names})
