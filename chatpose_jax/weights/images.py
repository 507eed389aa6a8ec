"""The image preprocessing of a model's sources, as ``ImageSettings``. It is read from their files; an option overrides it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import Fit, ImageSettings
from chatpose_jax.processing.processor import SETTINGS_FILE
from chatpose_jax.weights.readers import read_json_object
from chatpose_jax.weights.sources import Source

_REMEDY = "choose --image-fit crop or pad to ignore this setting"
_CLIP = ("CLIPImageProcessor", "CLIPFeatureExtractor")
_LLAVA = ("LlavaImageProcessor",)
# The values that this model supports. They are the defaults of transformers' classes.
_DEMANDED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True, None),
    "do_center_crop": (True, None),
    "do_rescale": (True, None),
    "do_normalize": (True, None),
    "resample": (3, None),  # bicubic, as Pillow numbers it
}
_OTHER_STEPS_ALLOWED = ("do_convert_rgb", "do_pad")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """settings: the processor's. origin: a description of where they come from."""

    settings: ImageSettings
    origin: str

    def describe(self) -> str:
        """A description for a report."""
        how = "padded to a square" if self.settings.fit == "pad" else "the middle square"
        return f"{how}, {self.settings.size} px ({self.origin})"


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
    main = sources[0]
    tower = next((source for source in sources if "vision" in source.layout.parts), main)
    file, said = _preprocessor(tower.checkpoint.folder)
    settings, padded = _settings(file, said, config.image_size)
    origin = (
        f"{file.name} in {tower.title}"
        if said
        else f"CLIP's defaults, because {tower.title} has no preprocessor_config.json"
    )
    fit: Fit = "crop"
    if main.layout.family == "chatpose":
        origin += "; cropped, as ChatPose's program does whatever config.json says"
    elif main.layout.family in ("llava_original", "vicuna"):
        # An adapter, or a projector for a plain LLaMA, has LLaVA's config.json beside it. As in infer_config an adapter's comes first.
        first = sorted(sources, key=lambda source: not source.is_adapter)
        teller = next((source for source in first if "image_aspect_ratio" in source.checkpoint.config()), main)
        fit = "crop" if chosen else _aspect(teller)
        if fit == "pad":
            origin += f"; image_aspect_ratio in config.json of {teller.title}"
    elif padded:
        fit = "pad"
    return Preprocessing(dataclasses.replace(settings, fit=fit), origin)


def _aspect(source: Source) -> Fit:
    """``image_aspect_ratio`` of LLaVA's own code: "pad" pads to a square with the mean colour; none or "square" leaves it to CLIP's processor."""
    stored, where = source.checkpoint.config(), source.checkpoint.folder / "config.json"
    for key, allowed in (("image_aspect_ratio", (None, "square", "pad")), ("mm_patch_merge_type", (None, "flat"))):
        if stored.get(key) not in allowed:
            raise UserError(f"{where}: {key}={stored[key]!r}: this model takes one square view of an image; {_REMEDY}")
    return "pad" if stored.get("image_aspect_ratio") == "pad" else "crop"


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


def _settings(file: Path, said: Mapping[str, Any], tower: int) -> tuple[ImageSettings, bool]:
    """Settings of a CLIPImageProcessor or LlavaImageProcessor, and whether it pads."""
    if not said:
        return ImageSettings(tower), False
    kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or _CLIP[0])
    plain = kind.removesuffix("Fast").removesuffix("Pil")
    if plain not in _CLIP + _LLAVA:
        raise UserError(f"{file}: {kind}: expected one of {', '.join(_CLIP + _LLAVA)}")
    pads = plain in _LLAVA and bool(said.get("do_pad"))
    for key, allowed in _DEMANDED.items():
        if key in said and said[key] not in allowed and not (key == "do_center_crop" and pads):
            raise UserError(f"{file}: {key}={said[key]!r} is not supported; expected {allowed[0]!r}")
    for key, value in said.items():
        if key.startswith("do_") and value and key not in (*_DEMANDED, *_OTHER_STEPS_ALLOWED):
            raise UserError(f"{file}: {key}={value!r} is not supported: this model has no such step")
    if abs(float(said.get("rescale_factor") or 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"{file}: rescale_factor={said['rescale_factor']!r} is not supported; expected 1/255")
    size = _side(file, "size", said.get("size"), stretched=pads)
    crop = size if pads and said.get("do_center_crop") is False else _side(file, "crop_size", said.get("crop_size"))
    if size != crop:
        raise UserError(f"{file}: resized to {size} pixels and cropped to {crop}; expected one size for both")
    stored = {"size": crop} | {
        ours: said[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if said.get(theirs)
    }
    return ImageSettings.from_json(stored, file), pads


def _side(file: Path, key: str, value: Any, stretched: bool = True) -> int:
    """A side in pixels: a number, ``shortest_edge``, or two equal sides. For the target of a resize, two sides mean that the image is stretched,
    which changes every image that is not square.
    """
    if value is None:
        return 224  # default of transformers' classes
    if isinstance(value, dict):
        held = {name: side for name, side in value.items() if side is not None}
        if set(held) == {"shortest_edge"}:
            value = held["shortest_edge"]
        elif set(held) == {"height", "width"} and held["height"] == held["width"] and stretched:
            value = held["height"]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key}={value!r}: expected the side of a square, without stretching")
    return value
