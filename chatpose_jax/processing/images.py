"""Opens images safely and preprocesses them as CLIP and SigLIP do, with Pillow and NumPy only."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import urllib.parse
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from chatpose_jax import named
from chatpose_jax.errors import UserError
from chatpose_jax.settings import check_types, require

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that ``load_image`` decodes. Pillow knows more, and some of those (EPS) start other programs."""

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Preprocessing to ``size`` × ``size`` pixels.

    fit: ``crop`` resizes the shortest side to ``size`` and takes the centre, as CLIP and ChatPose's released code do. ``pad`` first pads
        the image to a square with the mean colour, as LLaVA-1.5 and LLaVA-OneVision (several pictures) do; this keeps people at the sides of a
        landscape photograph. ``stretch`` resizes both sides to ``size``, as SigLIP and LLaVA-1.6 (its view of the whole image) do; people get
        wider or thinner.
    mean, std: of each RGB channel, for pixels in [0, 1].
    """

    size: int = 336
    fit: Fit = "crop"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        check_types(self, "images")
        require(self, "images", "at least 1", lambda size: size >= 1, "size")
        require(self, "images", "above 0", lambda std: min(std) > 0, "std")

    @classmethod
    def from_json(cls, stored: Any, where: object) -> ImageSettings:
        """From a JSON object with these fields. Raises UserError, which begins with ``where``, for anything else."""
        try:
            numbers = {name: tuple(map(float, stored[name])) for name in ("mean", "std") if name in stored}
            return cls(**{**stored, **numbers})
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: expected settings of images ({error})") from None

    def __call__(self, source: Any) -> np.ndarray:
        """Loads an image (``load_image``) and gives (size, size, 3) float32, normalised RGB."""
        return self.normalise(self.square(source))

    def square(self, source: Any, where: str = "") -> np.ndarray:
        """Loads an image and gives (size, size, 3) uint8 RGB: resized, and cropped, padded or stretched. ``normalise`` is the next step."""
        image = load_image(source, where)
        if self.fit == "stretch":
            return np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        if self.fit == "pad":
            image = _pad_to_square(image, tuple(int(255 * channel) for channel in self.mean))
        image = _crop_to_aspect(image)
        width, height = image.size
        short = min(width, height)
        width, height = self.size * width // short, self.size * height // short
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """(..., 3) uint8 RGB -> (..., 3) float32: ``(pixels / 255 - mean) / std``."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        levels = (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - mean) / std
        result = np.empty(pixels.shape, np.float32)
        for channel in range(3):  # a table is twice as fast as the formula
            np.take(levels[:, channel], pixels[..., channel], out=result[..., channel], mode="clip")
        return result


def load_image(source: Any, where: str = "") -> Image.Image:
    """Loads an upright RGB image.

    EXIF orientation is applied. Transparent pixels become white. 16-bit grey becomes 8-bit. The first frame or page of a file is taken.
    Nothing is fetched from a network.

    Args:
        source: a path, bytes, a ``data:`` URI, a PIL image, or an array of NumPy, JAX or PyTorch: (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4), uint8 or float in [0, 1] (float16, bfloat16, float32, float64).
        where: begins the errors, such as the part of a message.

    Raises:
        UserError for what is no image, is damaged or cut off, has values of unknown range (32-bit integers, floats in a file), or has more
        pixels than Pillow considers safe.
    """
    prefix = f"{where}: " if where else ""
    if isinstance(source, Image.Image):
        return _decode(source, f"{prefix}the PIL image")
    if isinstance(source, bytes | bytearray):
        return _open(io.BytesIO(source), f"{prefix}the image ({len(source)} bytes)")
    if isinstance(source, str) and source[:64].lstrip()[:5].lower() == "data:":
        return _open(io.BytesIO(data_uri(source, prefix)), f"{prefix}the data: URI")
    if isinstance(source, str) and "://" in source[:16]:
        raise UserError(
            f"{prefix}{source!r:.120} is a web address, and images are never fetched; download it and give the path"
        )
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        name = f"{prefix}{str(path)!r:.120}"
        # File names have at most 255 characters, so a longer text is probably an image in base64.
        hint = "; an image as text must be a URI: 'data:image/png;base64,…'" if len(str(path)) > 255 else ""
        try:
            found = path.is_file()
        except OSError as error:
            raise UserError(f"{name} cannot be opened: {error.strerror}{hint}") from None
        if not found:
            raise UserError(f"{prefix}no image file at {str(path)!r:.120}{hint}")
        return _open(path, name)
    if hasattr(source, "__array__"):
        return _from_array(_as_array(source, f"{prefix}the array"), f"{prefix}the array")
    raise UserError(f"{prefix}expected an image as path, bytes, PIL image or array, found {type(source).__name__}")


def upright_size(source: Any, where: str = "") -> tuple[int, int]:
    """Width and height of the image that ``load_image`` gives. Of a file or bytes only the header is read, of an array only the shape.

    Raises UserError as ``load_image`` does.
    """
    shape = getattr(source, "shape", None)
    if shape is not None and len(shape) >= 2:
        return int(shape[1]), int(shape[0])
    if isinstance(source, bytes | bytearray | os.PathLike) or (isinstance(source, str) and ":" not in source[:16]):
        file = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
        with contextlib.suppress(Exception), Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    return load_image(source, where).size  # also for its errors


def data_uri(uri: str, prefix: str = "") -> bytes:
    """What a ``data:`` URI in base64 holds. prefix: begins the errors. Raises UserError for any other text."""
    header, _, payload = uri.partition(",")
    if not (header[:64].lstrip()[:5].lower() == "data:" and header.rstrip().lower().endswith(";base64")):
        raise UserError(f"{prefix}expected 'data:image/…;base64,…', found {uri!r:.60}")
    # Programs break lines, escape what a URL may not hold, and leave the padding out.
    payload = "".join(urllib.parse.unquote(payload).split())
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{prefix}the data: URI is no valid base64 ({error})") from None


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return _decode(image, name)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is no image; expected one of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} would unpack to too many pixels ({error}); scale it down first") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error}") from None


def _decode(image: Image.Image, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise UserError(
            f"{name} has {image.width} × {image.height} pixels, more than the {limit} that Pillow considers safe; "
            "scale it down first"
        )
    if min(image.size) < 1:
        raise UserError(f"{name} has no pixels ({image.width} × {image.height})")
    try:
        white, inverted = _grey_levels(image)
        transparent = _transparent(image, name)
        image.load()
        image = ImageOps.exif_transpose(image)  # a copy, so it may be changed
        if transparent is not None:
            image.info["transparency"] = transparent
        if image.mode.startswith("I;16"):
            image = _grey_of_16_bits(image, white, inverted)
        return _to_rgb(image, name)
    except UserError:
        raise
    except Exception as error:  # decoders raise anything for damaged files (SyntaxError, struct.error, IndexError…)
        raise UserError(f"{name} is damaged or cut off: {error}") from None


def _grey_levels(image: Image.Image) -> tuple[int, bool]:
    """The largest value of grey with more than 8 bits, and whether it is black. TIFF files say both, and Pillow ignores it."""
    tags = getattr(image, "tag_v2", {})
    bits, photometric = tags.get(258, (16,)), tags.get(262, 1)
    return 2 ** int(bits[0]) - 1, photometric == 0


def _transparent(image: Image.Image, name: str) -> Any:
    """The transparent level, palette index or colour of a PNG or GIF, in the values that Pillow decodes to; or None.

    Pillow scales grey of 2 and 4 bits to 0 … 255, but not its transparent level.
    """
    level = image.info.get("transparency")
    tile = getattr(image, "tile", None)  # of a file not yet decoded: how its pixels are packed
    packing = tile[0][3] if tile else None
    if level is not None and packing == "RGB;16B":
        raise UserError(
            f"{name} has 16 bits a channel and one transparent colour, which 8 bits cannot tell from similar ones; save it with an alpha channel"
        )
    levels = {"L;2": 3, "L;4": 15}.get(packing) if isinstance(packing, str) else None
    return level * 255 // levels if levels and isinstance(level, int) else level


def _grey_of_16_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """8 bits of 16-bit or 12-bit grey, with the transparent level as alpha."""
    values = np.asarray(image).astype(np.int64)
    grey = np.minimum(values, white) * 255 // white
    result = Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    if (level := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == level, 0, 255).astype(np.uint8)))
    return result


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "I":
        raise UserError(f"{name} holds 32-bit values of unknown range; convert it to 8 or 16 bits first")
    if image.mode == "F":
        raise UserError(f"{name} holds floating-point values of unknown range; convert it to 8 bits first")
    if image.mode == "La":  # premultiplied alpha: Pillow converts it to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_array(source: Any, name: str) -> np.ndarray:
    """A NumPy array of an array of NumPy, JAX or PyTorch; float16 and bfloat16 become float32."""
    try:
        if hasattr(source, "detach"):  # a PyTorch tensor: it may need a gradient, be on a device, or be bfloat16
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source
        array = np.asarray(source)
        narrow = array.dtype == np.float16 or (array.dtype.kind == "V" and array.dtype.names is None)
        return array.astype(np.float32) if narrow else array
    except Exception as error:  # another library, or the user's own code (data.LazyImage), may raise anything
        raise named.raised(f"{name} ({type(source).__name__}) cannot be converted to NumPy", error) from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        hint = "; channels come last: move the first axis to the end" if array.shape[:1] in ((1,), (3,), (4,)) else ""
        raise UserError(f"{name} has shape {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4){hint}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
            raise UserError(f"{name} holds floats outside [0, 1]; give uint8 in [0, 255] or floats in [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"{name} has dtype {array.dtype}; expected uint8 in [0, 255] or floats in [0, 1]")
    return _decode(Image.fromarray(np.ascontiguousarray(array)), name)


def _crop_to_aspect(image: Image.Image, aspect: int = 16) -> Image.Image:
    """The middle of a very long image. Resized whole, 1 × 100000 pixels would take gigabytes before they are cropped."""
    width, height = image.size
    limit = aspect * min(width, height)
    left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    if side * side > (Image.MAX_IMAGE_PIXELS or side * side):
        raise UserError(
            f"an image of {width} × {height} pixels is too long to be padded to a square; "
            "crop it or set images.fit='crop'"
        )
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
