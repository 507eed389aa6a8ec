"""The files of an export from which transformers makes its processor: how images are preprocessed, and how many tokens they take."""

from __future__ import annotations

from typing import Any

from chatpose_jax.models.config import ModelConfig
from chatpose_jax.processing.images import ImageSettings
from chatpose_jax.processing.tokenizer import IMAGE_LITERAL


def grid_pinpoints(config: ModelConfig) -> list[list[int]]:
    """The sizes (height, width) to which LLaVA-1.6 resizes an image before it takes views of parts of it, in pixels."""
    side = config.image_size
    return [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def processor_files(config: ModelConfig, images: ImageSettings | None, pinpoints: Any) -> dict[str, Any]:
    """The files that transformers' ``AutoProcessor`` reads, by name.

    LLaVA-1.6 and LLaVA-OneVision have image processors of their own, which take several views of an image; the first is this model's, where the
    second is asked about several images.

    pinpoints: ``image_grid_pinpoints`` of ``config.json``, which says what views these are; not used by other models.
    """
    vision = config.vision
    assert vision is not None and images is not None
    strategy = "default" if vision.class_token else "full"
    side = {"height": images.size, "width": images.size}
    cropped: dict[str, Any] = {"size": {"shortest_edge": images.size}, "do_center_crop": True, "crop_size": side}
    if config.image_newline:
        kind, steps = ("LlavaNext", cropped) if vision.class_token else ("LlavaOnevision", {"size": side})
        image_processor, processor_class = f"{kind}ImageProcessor", f"{kind}Processor"
        steps = {**steps, "image_grid_pinpoints": pinpoints, "do_pad": True}
    else:
        image_processor, processor_class = "CLIPImageProcessor", "LlavaProcessor"
        steps = cropped
        if images.fit == "pad":
            image_processor, steps = "LlavaImageProcessor", {**steps, "do_pad": True}
        elif images.fit == "stretch":
            image_processor, steps = "SiglipImageProcessor", {"size": side}
    preprocessor = {
        "image_processor_type": image_processor,
        "processor_class": processor_class,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        **steps,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    processor: dict[str, Any] = {
        "processor_class": processor_class,
        "image_token": IMAGE_LITERAL,
        "vision_feature_select_strategy": strategy,
    }
    if processor_class == "LlavaOnevisionProcessor":
        processor["num_image_tokens"] = vision.num_patches
    else:
        processor |= {"patch_size": vision.patch_size, "num_additional_image_tokens": int(vision.class_token)}
    return {"preprocessor_config.json": preprocessor, "processor_config.json": processor}
