"""The image preprocessing of a model's sources, as ``ImageSettings``. It is read from their files; an option overrides it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import CLIP_MEAN, CLIP_STD, Fit, ImageSettings
from chatpose_jax.processing.processor import SETTINGS_FILE
from chatpose_jax.weights.readers import read_json_object
from chatpose_jax.weights.sources import Source

_REMEDY = "choose --image-fit crop, pad or stretch to ignore this setting"
_HALF = (0.5, 0.5, 0.5)


class _Kind(NamedTuple):
    """An image processor of transformers: what it does to an image, and its defaults.

    fit: of the one view that this model takes. stretched: ``size`` are two equal sides, because the image is resized to both. crops: whether a
    ``crop_size`` follows, which must be ``size``. views: it also makes views of parts of the image.
    """

    fit: Fit
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stretched: bool = False
    crops: bool = True
    views: bool = False


_CLIP = _Kind("crop", 224, CLIP_MEAN, CLIP_STD)
_SIGLIP = _Kind("stretch", 224, _HALF, _HALF, stretched=True, crops=False)
_KINDS = {
    "CLIPImageProcessor": _CLIP,
    "CLIPFeatureExtractor": _CLIP,
    "LlavaImageProcessor": _CLIP,  # and "pad" with do_pad
    "SiglipImageProcessor": _SIGLIP,
    # The first view is the whole image, stretched; "size" is the shortest edge of the others.
    "LlavaNextImageProcessor": _CLIP._replace(fit="stretch", views=True),
    # With several images, each is padded to a square and seen once.
    "LlavaOnevisionImageProcessor": _Kind("pad", 384, CLIP_MEAN, CLIP_STD, stretched=True, crops=False, views=True),
}
_PADS = "LlavaImageProcessor"
# The values that this model supports. They are the defaults of transformers' classes.
_DEMANDED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True, None),
    "do_rescale": (True, None),
    "do_normalize": (True, None),
    "resample": (3, None),  # bicubic, as Pillow numbers it
}
_OTHER_STEPS_ALLOWED = ("do_convert_rgb", "do_pad", "do_center_crop")
_WORDS = {"crop": "the middle square", "pad": "padded to a square", "stretch": "stretched to a square"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """settings: the processor's. origin: a description of where they come from."""

    settings: ImageSettings
    origin: str

    def describe(self) -> str:
        """A description for a report."""
        return f"{_WORDS[self.settings.fit]}, {self.settings.size} px ({self.origin})"


def infer_image_settings(
    sources: Sequence[Source], config: ModelConfig, tokenizer: Path, fit: Fit | None = None
) -> Preprocessing | None:
    """The preprocessing that the sources apply to an image before the vision tower; None for a model without one.

    ``processor.json`` beside the tokenizer, which this program writes, has all settings. Otherwise ``preprocessor_config.json`` (or
    ``processor_config.json``) beside the vision tower has size, mean, standard deviation and, for transformers, whether images are padded. In
    LLaVA's own layout ``image_aspect_ratio`` in ``config.json`` says whether they are padded; an adapter or a projector may have its own
    ``config.json``. ChatPose's released program crops, whatever its ``config.json`` says.

    tokenizer: folder of the tokenizer. fit: overrides the source's.

    Raises UserError for a setting that ``ImageSettings`` cannot express, or if the size differs from the tower's.
    """
    if config.vision is None:
        if fit is not None:
            raise UserError(
                f"--image-fit {fit}: the model has no vision tower; leave the option out, or give the tower (--vision FOLDER)"
            )
        return None
    said = _from_processor(tokenizer) or _from_sources(sources, config, fit)
    settings, origin = said.settings, said.origin
    if fit is not None:
        settings, origin = dataclasses.replace(settings, fit=fit), f"--image-fit; the rest: {origin}"
    if settings.size != config.image_size:
        raise UserError(
            f"{origin}: images of {settings.size} pixels, but the vision tower takes {config.image_size}; the files belong to different models"
        )
    return Preprocessing(settings, origin)


def write_image_settings(folder: Path, settings: ImageSettings | None) -> None:
    """Writes the settings into ``processor.json`` of a tokenizer's folder. Its other keys stay. None: the model takes no images."""
    file = folder / SETTINGS_FILE
    data = read_json_object(file) if file.is_file() else {}
    data["images"] = settings and dataclasses.asdict(settings)
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _from_processor(folder: Path) -> Preprocessing | None:
    file = folder / SETTINGS_FILE
    stored = read_json_object(file).get("images") if file.is_file() else None
    return None if stored is None else Preprocessing(ImageSettings.from_json(stored, file), str(file))


def _from_sources(sources: Sequence[Source], config: ModelConfig, chosen: Fit | None) -> Preprocessing:
    main, vision = sources[0], config.vision
    assert vision is not None
    tower = next((source for source in sources if "vision" in source.layout.parts), main)
    file, said = _preprocessor(tower.checkpoint.folder)
    if said:
        settings, views = _settings(file, said)
        origin = f"{file.name} in {tower.title}"
    else:
        kind = _CLIP if vision.class_token else _SIGLIP
        settings, views = ImageSettings(vision.image_size, kind.fit, kind.mean, kind.std), False
        if config.image_newline:
            settings = dataclasses.replace(settings, fit="stretch" if vision.class_token else "pad")
        name = "CLIP" if vision.class_token else "SigLIP"
        origin = f"{name}'s defaults, because {tower.title} has no preprocessor_config.json"
    if main.layout.family == "chatpose":
        settings = dataclasses.replace(settings, fit="crop")
        origin += "; cropped, as ChatPose's program does whatever config.json says"
    elif main.layout.family in ("llava_original", "vicuna"):
        # An adapter, or a projector for a plain decoder, has LLaVA's config.json beside it. As in infer_config an adapter's comes first.
        first = sorted(sources, key=lambda source: not source.is_adapter)
        teller = next((source for source in first if "image_aspect_ratio" in source.checkpoint.config()), main)
        if (aspect := None if chosen else _aspect(teller)) is not None:
            settings, views = dataclasses.replace(settings, fit=aspect), aspect == "stretch"
            origin += f"; image_aspect_ratio in config.json of {teller.title}"
    if views or config.image_newline:
        origin += (
            f"; one view of the whole image, {config.image_tokens} tokens; its program also takes views of parts of it"
        )
    return Preprocessing(settings, origin)


def _aspect(source: Source) -> Fit | None:
    """``image_aspect_ratio`` of LLaVA's own code: "pad" pads to a square with the mean colour, "anyres" stretches the whole image to one and then
    takes parts of it; none or "square" leaves it to the tower's processor: None.
    """
    stored, where = source.checkpoint.config(), source.checkpoint.folder / "config.json"
    aspect, merge = stored.get("image_aspect_ratio"), stored.get("mm_patch_merge_type")
    for key, value, allowed in (
        ("image_aspect_ratio", aspect, (None, "square", "pad", "anyres")),
        ("mm_patch_merge_type", merge, (None, "flat", "spatial_unpad")),
    ):
        if value not in allowed:
            raise UserError(f"{where}: {key}={value!r}: this model takes one square view of an image; {_REMEDY}")
    found: dict[Any, Fit] = {"pad": "pad", "anyres": "stretch"}
    return found.get(aspect)


def _preprocessor(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """The file that transformers would read, in its order of preference, and its contents; ``{}`` if there is none."""
    file = folder / "processor_config.json"
    nested = read_json_object(file).get("image_processor") if file.is_file() else None
    if nested is not None:
        if not isinstance(nested, dict):
            raise UserError(f"{file}: image_processor={nested!r}; expected a table")
        return file, nested
    file = folder / "preprocessor_config.json"
    return file, read_json_object(file) if file.is_file() else {}


def _settings(file: Path, said: Mapping[str, Any]) -> tuple[ImageSettings, bool]:
    """Settings of one of ``_KINDS``, and whether it makes views of parts too."""
    named = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "CLIPImageProcessor")
    plain = named.removesuffix("Fast").removesuffix("Pil")
    if plain not in _KINDS:
        raise UserError(f"{file}: {named}: expected one of {', '.join(_KINDS)}")
    kind = _KINDS[plain]
    if plain == _PADS and said.get("do_pad"):
        kind = kind._replace(fit="pad", stretched=True, crops=said.get("do_center_crop") is not False)
    crops: tuple[Any, ...] = (True, None) if kind.crops else (False, None)
    for key, allowed in {**_DEMANDED, "do_center_crop": crops}.items():
        if key in said and said[key] not in allowed:
            raise UserError(f"{file}: {key}={said[key]!r} is not supported; expected {allowed[0]!r}")
    for key, value in said.items():
        if key.startswith("do_") and value and key not in (*_DEMANDED, *_OTHER_STEPS_ALLOWED):
            raise UserError(f"{file}: {key}={value!r} is not supported: this model has no such step")
    if abs(float(said.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{file}: rescale_factor={said['rescale_factor']!r} is not supported; expected 1/255")
    size = _side(file, "size", said.get("size"), kind, resizes=True)
    if kind.crops and size != (crop := _side(file, "crop_size", said.get("crop_size"), kind)):
        raise UserError(f"{file}: resized to {size} pixels and cropped to {crop}; expected one size for both")
    stored = {
        "size": size,
        "fit": kind.fit,
        "mean": said.get("image_mean") or kind.mean,
        "std": said.get("image_std") or kind.std,
    }
    return ImageSettings.from_json(stored, file), kind.views


def _side(file: Path, key: str, value: Any, kind: _Kind, resizes: bool = False) -> int:
    """A side in pixels: a number, ``shortest_edge``, or two equal sides. For the target of a resize, two sides mean that the image is stretched,
    which changes every image that is not square, and one side that it is not.
    """
    if value is None:
        return kind.size
    both = kind.stretched or kind.views or not resizes
    if isinstance(value, dict):
        held = {name: side for name, side in value.items() if side is not None}
        if set(held) == {"shortest_edge"} and not (resizes and kind.fit == "stretch" and not kind.views):
            value = held["shortest_edge"]
        elif set(held) == {"height", "width"} and held["height"] == held["width"] and both:
            value = held["height"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        how = (
            "two equal sides"
            if kind.fit == "stretch" and not kind.views
            else "the side of a square, without stretching"
        )
        raise UserError(f"{file}: {key}={value!r}: expected {how}")
    return value
