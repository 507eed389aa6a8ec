"""Preprocessing against transformers' CLIPImageProcessor; pictures that are none, and pictures that lie."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import CLIP_MEAN, CLIP_STD, ImageSettings, load_image

SIZES = [(64, 48), (48, 64), (336, 336), (500, 333), (333, 500), (37, 301), (20, 20), (1023, 767)]


def picture(width: int, height: int) -> Image.Image:
    """Smooth shapes, hard edges and noise."""
    rng = np.random.default_rng(width * 10007 + height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11)], -1) * 80 + 128
    noise = rng.integers(-40, 40, (height, width, 3))
    block = 90 * ((x // 9 + y // 9) % 2)[..., None]
    return Image.fromarray(np.clip(waves + noise - block, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int) -> bytes:
    """A valid PNG header that claims a size, with almost no data behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("size", [28, 336])
@pytest.mark.parametrize("shape", SIZES)
def test_crop_equals_clip_image_processor(size, shape):
    clip = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = clip(picture(*shape), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    settings = ImageSettings(size)
    grey_levels = np.abs(settings(picture(*shape)) - expected) * np.array(CLIP_STD) * 255
    assert settings(picture(*shape)).dtype == np.float32
    assert grey_levels.max() <= 1.01
    assert (grey_levels > 0.5).mean() < 0.01


def test_pad_keeps_the_sides():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20, 0] = wide[:, 40:, 1] = 255
    padded, cropped = (ImageSettings(60, fit).square(wide) for fit in ("pad", "crop"))
    assert padded[30, 5].tolist() == [255, 0, 0]
    assert padded[30, 55].tolist() == [0, 255, 0]
    assert padded[2, 30].tolist() == [int(255 * mean) for mean in CLIP_MEAN]
    assert not cropped[:, 5:-5].any()


def test_normalise_is_clips():
    settings = ImageSettings(8)
    grey = np.full((8, 8, 3), 128, np.uint8)
    np.testing.assert_allclose(settings(grey)[0, 0], (128 / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD), atol=1e-6)


def test_every_form_gives_the_same_pixels(tmp_path):
    image = picture(40, 30)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    floats = np.asarray(image).astype(np.float64) / 255
    for form in (image, np.asarray(image), floats, data, uri, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(load_image(form)), np.asarray(image))


def test_orientation_of_a_phone_picture():
    image = picture(40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the sensor lay on its side
    turned = load_image(encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(image.rotate(-90, expand=True)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_modes_become_rgb(mode):
    grey = Image.fromarray(np.full((6, 6), 200, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 200 * 257, np.uint16))
    else:
        image = grey.convert("L").convert("P").convert("PA") if mode == "PA" else grey.convert("RGB").convert(mode)
    pixels = np.asarray(load_image(image))
    assert pixels.shape == (6, 6, 3)
    assert abs(pixels.mean() - (255 if mode == "1" else 200)) < (60 if mode == "1" else 3)


def test_transparency_is_white():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(load_image(encoded(clear))).min() == 255
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 4)
    assert np.asarray(load_image(encoded(palette, "PNG", transparency=0))).min() == 255


def test_sixteen_bit_png_is_scaled():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.asarray(load_image(encoded(Image.fromarray(ramp))))
    np.testing.assert_allclose(pixels[..., 0].ravel(), np.linspace(0, 255, 64), atol=1)


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("text.png", b"this is no picture", "is no picture"),
        ("empty.jpg", b"", "is no picture"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
        ("cut.png", encoded(picture(64, 64))[:2000], "damaged or cut off"),
        ("cut.jpg", encoded(picture(64, 64), "JPEG")[:700], "damaged or cut off"),
        ("cut.webp", encoded(picture(64, 64), "WEBP")[:700], "cannot be read|damaged or cut off|is no picture"),
        ("lies.png", png(300, 300), "damaged or cut off"),
        ("large.png", png(12_000, 12_000), "144000000|pixels"),
        ("bomb.png", png(100_000, 100_000), "too many pixels"),
        ("zero.png", png(0, 5), "is no picture|damaged|no pixels|cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_files(tmp_path, name, data, error):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=error) as raised:
        load_image(tmp_path / name)
    assert name in str(raised.value)
    with pytest.raises(UserError, match=error):
        load_image(data)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("nowhere.png", "no picture file at 'nowhere.png'"),
        ("https://example.org/a.png", "never fetched"),
        ("file:///etc/hostname", "never fetched"),
        ("data:image/png;base64,%%%", "no valid base64"),
        ("iVBORw0KGgo" * 400, "File name too long; a picture as text must be a URI: 'data:"),
        ("iVBORw0KGgo/" * 100, "no picture file at .*a picture as text must be a URI: 'data:"),
        ("data:image/png,abc", "expected 'data:image"),
        (3, "found int"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
        (np.full((4, 4, 3), 200.0), "outside"),
        (np.full((4, 4, 3), np.nan), "outside"),
        (Image.new("F", (4, 4)), "floating-point"),
        (Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "32-bit"),
    ],
)
def test_no_pictures(source, error):
    with pytest.raises(UserError, match=error) as raised:
        load_image(source, "messages[0].content[1]")
    assert "messages[0].content[1]" in str(raised.value)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_long_thin_picture_stays_small(fit):
    thin = np.arange(20_000, dtype=np.uint32).astype(np.uint8)[None, :, None].repeat(3, 2)
    if fit == "crop":
        assert ImageSettings(336).square(thin).shape == (336, 336, 3)
    else:
        with pytest.raises(UserError, match="too long to be padded"):
            ImageSettings(336, "pad").square(thin)


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"images\.fit='stretch'"):
        ImageSettings(28, "stretch")  # type: ignore[arg-type]
