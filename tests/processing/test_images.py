"""Preprocessing against transformers' CLIPImageProcessor; files that are no images, and images that lie."""

import base64
import io
import struct
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from PIL import Image

from chatpose_jax.errors import UserError
from chatpose_jax.processing.images import CLIP_MEAN, CLIP_STD, ImageSettings, load_image

SIZES = [(64, 48), (48, 64), (336, 336), (500, 333), (333, 500), (37, 301), (20, 20), (1023, 767)]


def make_image(width: int, height: int) -> Image.Image:
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
    return _chunks(chunks)


def _chunks(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def one_row(bits: int, colour: int, row: bytes, width: int, *, transparent: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG of one row, of any depth and colour type, with a transparent level or palette."""
    extra = [(name, data) for name, data in ((b"PLTE", palette), (b"tRNS", transparent)) if data]
    head = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    return _chunks([(b"IHDR", head), *extra, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")])


def one_row_tiff(bits: int, photometric: int, row: bytes, width: int) -> bytes:
    """A little-endian TIFF of one row of grey, uncompressed, which no writer at hand makes: 12 bits, or white as 0."""
    tags = [
        (256, width),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(row)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + len(row) + len(row) % 2
    return (
        b"II*\0"
        + struct.pack("<I", start)
        + row.ljust(start - 8, b"\0")
        + struct.pack("<H", len(tags))
        + directory
        + bytes(4)
    )


@pytest.mark.parametrize("size", [28, 336])
@pytest.mark.parametrize("shape", SIZES)
def test_crop_equals_clip_image_processor(size, shape):
    clip = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = clip(make_image(*shape), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    settings = ImageSettings(size)
    grey_levels = np.abs(settings(make_image(*shape)) - expected) * np.array(CLIP_STD) * 255
    assert settings(make_image(*shape)).dtype == np.float32
    assert grey_levels.max() <= 1.01
    assert (grey_levels > 0.5).mean() < 0.01


@pytest.mark.parametrize("size", [28, 384])
@pytest.mark.parametrize("shape", SIZES)
def test_stretch_equals_siglip_image_processor(size, shape):
    siglip = transformers.SiglipImageProcessorPil(size={"height": size, "width": size})
    expected = siglip(make_image(*shape), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    settings = ImageSettings(size, "stretch", mean=(0.5,) * 3, std=(0.5,) * 3)
    found = settings(make_image(*shape))
    assert found.shape == expected.shape == (size, size, 3)
    assert np.abs(found - expected).max() * 0.5 * 255 < 0.01


@pytest.mark.parametrize("shape", SIZES)
def test_pad_equals_llava_onevision_with_several_pictures(shape):
    """The path that gives each picture one square view."""
    onevision = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = onevision([[make_image(*shape), make_image(30, 40)]], return_tensors="np")["pixel_values"][0][0]
    found = ImageSettings(56, "pad", mean=(0.5,) * 3, std=(0.5,) * 3)(make_image(*shape))
    assert np.abs(found - expected.transpose(1, 2, 0)).max() * 0.5 * 255 < 0.01


@pytest.mark.parametrize("shape", SIZES)
def test_stretch_equals_the_whole_view_of_llava_next(shape):
    """The first of its views; the others are crops of a larger image."""
    following = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112], [112, 56]]
    )
    expected = following(make_image(*shape), return_tensors="np")["pixel_values"][0][0].transpose(1, 2, 0)
    found = ImageSettings(56, "stretch")(make_image(*shape))
    assert np.abs((found - expected) * np.array(CLIP_STD)).max() * 255 < 0.01


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
    image = make_image(40, 30)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    floats = np.asarray(image).astype(np.float64) / 255
    for form in (image, np.asarray(image), floats, data, uri, tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(np.asarray(load_image(form)), np.asarray(image))


def test_orientation_of_a_phone_image():
    image = make_image(40, 30)
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


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # A transparent level, the same four pixels at every depth: the last but one is hidden.
        (one_row(1, 0, bytes([0b01010000]), 4, transparent=struct.pack(">H", 1)), [0, 255, 0, 255]),
        (one_row(1, 0, bytes([0b01010000]), 4, transparent=struct.pack(">H", 0)), [255, 255, 255, 255]),
        (one_row(2, 0, bytes([0b00010111]), 4, transparent=struct.pack(">H", 1)), [0, 255, 255, 255]),
        (one_row(4, 0, bytes([0x01, 0x5F]), 4, transparent=struct.pack(">H", 5)), [0, 17, 255, 255]),
        (one_row(8, 0, bytes([0, 17, 85, 255]), 4, transparent=struct.pack(">H", 85)), [0, 17, 255, 255]),
        (one_row(16, 0, struct.pack(">4H", 0, 17 * 257, 85 * 257, 65535), 4, transparent=struct.pack(">H", 85 * 257)), [0, 17, 255, 255]),
        (one_row(16, 0, struct.pack(">4H", 0, 17 * 257, 85 * 257 + 1, 65535), 4, transparent=struct.pack(">H", 85 * 257)), [0, 17, 85, 255]),
        # A transparent colour, a palette with levels of transparency, grey and colour with alpha.
        (one_row(8, 2, bytes([0] * 3 + [17] * 3 + [85] * 3), 3, transparent=struct.pack(">3H", 85, 85, 85)), [0, 17, 255]),
        (one_row(8, 3, bytes([0, 1, 2]), 3, transparent=bytes([255, 0]), palette=bytes([0] * 3 + [17] * 3 + [85] * 3)), [0, 255, 85]),
        (one_row(8, 3, bytes([0, 1, 2]), 3, transparent=bytes([255, 255, 51]), palette=bytes([0] * 3 + [17] * 3 + [85] * 3)), [0, 17, 221]),
        (one_row(8, 4, bytes([0, 255, 17, 0, 85, 51]), 3), [0, 255, 221]),
        (one_row(16, 4, struct.pack(">6H", 0, 65535, 17 * 257, 0, 85 * 257, 51 * 257), 3), [0, 255, 221]),
        (one_row(16, 6, struct.pack(">8H", *[17 * 257] * 3, 0, *[85 * 257] * 3, 51 * 257), 2), [255, 221]),
        (one_row(16, 2, struct.pack(">6H", *[17 * 257] * 3, *[85 * 257] * 3), 2), [17, 85]),
        # TIFF: 12 bits, and white stored as 0.
        (one_row_tiff(16, 1, struct.pack("<4H", 0, 17 * 257, 85 * 257, 65535), 4), [0, 17, 85, 255]),
        (one_row_tiff(16, 0, struct.pack("<4H", 0, 17 * 257, 85 * 257, 65535), 4), [255, 238, 170, 0]),
        (one_row_tiff(12, 1, bytes([0x00, 0x05, 0x55, 0xAA, 0xAF, 0xFF]), 4), [0, 85, 170, 255]),
        (one_row_tiff(8, 0, bytes([0, 17, 85, 255]), 4), [255, 238, 170, 0]),
    ],
)  # fmt: skip
def test_a_level_is_white_or_hidden_at_every_depth(data, expected):
    pixels = np.asarray(load_image(data))
    assert pixels.shape == (1, len(expected), 3)
    np.testing.assert_array_equal(pixels[0], np.repeat(np.array(expected)[:, None], 3, 1))


def test_a_transparent_colour_of_16_bits_is_refused():
    """Pillow keeps 8 of them, in which a neighbour of the hidden colour looks like it."""
    data = one_row(16, 2, struct.pack(">6H", 1, 2, 3, 1, 2, 4), 2, transparent=struct.pack(">3H", 1, 2, 3))
    with pytest.raises(UserError, match=r"16 bits a channel and one transparent colour.*alpha channel"):
        load_image(data)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_laid_on_white(mode):
    image = Image.new("RGBA" if mode == "RGBa" else "LA", (2, 2), (85, 85, 85, 51) if mode == "RGBa" else (85, 51))
    np.testing.assert_allclose(np.asarray(load_image(image.convert(mode))), 221, atol=1)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 98}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_orientation_is_applied_once_in_every_format(kind, options):
    image = Image.fromarray(np.repeat(np.uint8([[[10], [90], [200]], [[40], [120], [250]]]), 3, 2)).resize((48, 32), 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.asarray(load_image(encoded(image, kind, exif=exif, **options)))
    np.testing.assert_allclose(turned, np.asarray(image.rotate(-90, expand=True)), atol=12)


def test_orientation_keeps_the_hidden_level():
    image = Image.fromarray(np.uint16([[0, 85 * 257, 65535]]))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, transparency=85 * 257, exif=exif)
    assert np.asarray(load_image(data))[:, 0, 0].tolist() == [0, 255, 255]


def test_the_first_image_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0], kind


def test_an_image_of_a_user_stays_as_it_is():
    image = Image.open(io.BytesIO(one_row(4, 0, bytes([0x01, 0x5F]), 4, transparent=struct.pack(">H", 5))))
    before = dict(image.info)
    load_image(image)
    assert image.info == before


def test_bfloat16_and_foreign_arrays():
    values = np.linspace(0, 1, 48).reshape(4, 4, 3)
    for kind in (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn):
        narrow = values.astype(kind)
        expected = np.rint(narrow.astype(np.float32) * 255)
        np.testing.assert_array_equal(np.asarray(load_image(narrow)), expected)
    given = jnp.asarray(values, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(load_image(given)), np.rint(np.asarray(given, np.float32) * 255))
    with pytest.raises(UserError, match="outside"):
        load_image((values * 200).astype(ml_dtypes.bfloat16))


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    values = torch.linspace(0, 1, 48).reshape(4, 4, 3)
    narrow = values.to(torch.bfloat16)
    expected = np.rint(narrow.float().numpy() * 255)
    np.testing.assert_array_equal(np.asarray(load_image(narrow)), expected)
    np.testing.assert_array_equal(np.asarray(load_image(narrow.requires_grad_())), expected)
    np.testing.assert_array_equal(np.asarray(load_image((values * 255).byte())), (values * 255).byte().numpy())
    with pytest.raises(UserError, match=r"shape \(3, 4, 5\).*channels come last"):
        load_image(torch.zeros(3, 4, 5))
    with pytest.raises(UserError, match=r"the array \(Tensor\) cannot be converted to NumPy"):
        load_image(torch.zeros(4, 4, 3, device="meta"))


def test_data_uris_as_programs_write_them():
    image = make_image(40, 30)
    payload = base64.b64encode(encoded(image)).decode()
    lines = "\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    for uri in (
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64,\r\n{lines}\r\n",
        f"\n  DATA:image/png;charset=utf-8;BASE64,{payload}",
        f"data:image/png;base64,{payload.rstrip('=')}",
        f"data:image/png;base64,{payload.replace('+', '%2B').replace('/', '%2f').replace('=', '%3D')}",
    ):
        np.testing.assert_array_equal(np.asarray(load_image(uri)), np.asarray(image))


def test_sixteen_bit_png_is_scaled():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.asarray(load_image(encoded(Image.fromarray(ramp))))
    np.testing.assert_allclose(pixels[..., 0].ravel(), np.linspace(0, 255, 64), atol=1)


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("text.png", b"this is no image", "is no image"),
        ("empty.jpg", b"", "is no image"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
        ("cut.png", encoded(make_image(64, 64))[:2000], "damaged or cut off"),
        ("cut.jpg", encoded(make_image(64, 64), "JPEG")[:700], "damaged or cut off"),
        ("cut.webp", encoded(make_image(64, 64), "WEBP")[:700], "cannot be read|damaged or cut off|is no image"),
        ("lies.png", png(300, 300), "damaged or cut off"),
        ("large.png", png(12_000, 12_000), "144000000|pixels"),
        ("bomb.png", png(100_000, 100_000), "too many pixels"),
        ("zero.png", png(0, 5), "is no image|damaged|no pixels|cannot be read"),
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
        ("nowhere.png", "no image file at 'nowhere.png'"),
        ("https://example.org/a.png", "never fetched"),
        ("file:///etc/hostname", "never fetched"),
        ("data:image/png;base64,%%%", "no valid base64"),
        ("iVBORw0KGgo" * 400, "File name too long; an image as text must be a URI: 'data:"),
        ("iVBORw0KGgo/" * 100, "no image file at .*an image as text must be a URI: 'data:"),
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
def test_no_images(source, error):
    with pytest.raises(UserError, match=error) as raised:
        load_image(source, "messages[0].content[1]")
    assert "messages[0].content[1]" in str(raised.value)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_long_thin_image_stays_small(fit):
    thin = np.arange(20_000, dtype=np.uint32).astype(np.uint8)[None, :, None].repeat(3, 2)
    if fit == "crop":
        assert ImageSettings(336).square(thin).shape == (336, 336, 3)
    else:
        with pytest.raises(UserError, match="too long to be padded"):
            ImageSettings(336, "pad").square(thin)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fit": "squeeze"}, r"images\.fit: expected 'crop' or 'pad' or 'stretch', found 'squeeze'"),
        ({"size": 0}, "images.size must be at least 1"),
        ({"size": 28.0}, "images.size: expected int"),
        ({"size": True}, "images.size: expected int"),
        ({"mean": (0.5, 0.5)}, "images.mean: expected"),
        ({"std": (0.5, float("nan"), 0.5)}, "images.std: expected"),
        ({"std": (0.5, 0.0, 0.5)}, "images.std must be above 0"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(UserError, match=words):
        ImageSettings(**{"size": 28, **settings})
