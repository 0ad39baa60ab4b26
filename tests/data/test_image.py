"""Decoding and cutting, against pixels known in advance and against Pillow's own slower ways."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from flux_trainer.data.bad import BadSample
from flux_trainer.data.image import decode, square

LIMIT = 10**6


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: smooth, and different everywhere."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = decode(data, LIMIT)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    image = gradient(20, 12)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(np.array(decode(encoded(image, kind, **options), LIMIT)), np.array(image))


def test_exif_orientation_is_applied() -> None:
    image = gradient(24, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to see it upright"
    upright = decode(encoded(image, "PNG", exif=exif), LIMIT)
    assert np.array_equal(np.array(upright), np.rot90(np.array(image), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    black = Image.new("RGB", (3, 1), 0).convert(mode)
    black.putalpha(Image.fromarray(np.array([[0, 51, 255]], dtype=np.uint8)))
    data = encoded(black)
    assert [pixel(data, x)[0] for x in range(3)] == [255, 204, 0]


def test_palette_and_key_colour_transparency_become_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    data = encoded(palette, "PNG", transparency=0)
    assert (pixel(data, 0), pixel(data, 1)) == ((255, 255, 255), (0, 0, 255))
    keyed = encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixel(keyed) == (255, 255, 255)


RAMP = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)


PPM = b"P5 3 1 65535\n" + RAMP.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data", [encoded(Image.fromarray(RAMP), "PNG"), encoded(Image.fromarray(RAMP), "TIFF"), PPM]
)
def test_16_bit_grey_keeps_its_range(data: bytes) -> None:
    assert [pixel(data, x)[0] for x in range(3)] == [0, 100, 255]


def tiff(pixels: np.ndarray, bits: int, **tags: int) -> bytes:
    """A grey TIFF in one strip. `tags`: values of `white_is_zero` and of `sample_format`."""
    height, width = pixels.shape
    body = pixels.tobytes()
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: 0 if tags.get("white_is_zero") else 1,
        273: 0,
        277: 1,
        278: height,
        279: len(body),
        339: tags.get("sample_format", 1),
    }
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4) + body


def test_16_bit_grey_may_count_from_white_or_have_a_transparent_value() -> None:
    inverted = tiff(RAMP, 16, white_is_zero=1)
    assert [pixel(inverted, x)[0] for x in range(3)] == [255, 155, 0]
    plain = encoded(Image.fromarray(RAMP), "PNG")
    body = b"tRNS" + struct.pack(">H", 257 * 100)
    keyed = plain[:33] + struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body)) + plain[33:]
    assert [pixel(keyed, x)[0] for x in range(3)] == [0, 255, 255]


def test_12_bit_grey_has_a_range_of_its_own() -> None:
    packed = np.array([[0x00, 0x08, 0x00, 0xFF, 0xF0]], dtype=np.uint8)  # 000 800 FFF, padded
    data = bytearray(tiff(packed, 12))
    struct.pack_into("<I", data, 10 + 8, 3)  # its width
    assert [pixel(bytes(data), x)[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("data", "numbers"),
    [
        (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "signed integers"),
        (tiff(RAMP.astype(np.uint32), 32), "32-bit integers"),
        (tiff(RAMP.astype(np.int16), 16, sample_format=2), "signed integers"),
        (tiff(RAMP.astype(np.int8), 8, sample_format=2), "signed integers"),
        (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point numbers"),
    ],
    ids=["int32", "uint32", "int16", "int8", "float32"],
)
def test_numbers_without_an_agreed_range_are_refused(data: bytes, numbers: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode(data, LIMIT)
    sentence = f"pixels of {numbers} have no agreed range: save the image with 8 or 16 bits"
    assert str(caught.value) == sentence


def test_grey_bilevel_and_cmyk_become_rgb() -> None:
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)


def test_truncated_rubbish_and_empty_files_are_bad() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(gradient(64, 64), kind)
        with pytest.raises(BadSample, match="corrupt image"):
            decode(data[: len(data) // 2], LIMIT)
    for data in (b"", b"rubbish", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(BadSample, match="no known image format; these are JPEG, PNG, "):
            decode(data, LIMIT)
    with pytest.raises(BadSample, match="this TIFF has a broken header, or pixels of a kind"):
        decode(tiff(RAMP, 10), LIMIT)


def test_a_bomb_is_refused_from_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match=r"100000 x 100000 pixels, data\.max_pixels is 1000000"):
            decode(bomb, LIMIT)
    with pytest.raises(BadSample, match="too large"):
        decode(encoded(gradient(11, 10)), 109)
    assert decode(encoded(gradient(11, 10)), 110).size == (11, 10)


@pytest.mark.parametrize("size", [8, 16, 40])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_square_is_resize_then_crop(shape: tuple[int, int], size: int) -> None:
    image = gradient(*shape)
    scale = size / min(shape)
    whole = image.resize((round(shape[0] * scale), round(shape[1] * scale)), Image.Resampling.LANCZOS)
    for position, corner in ((0.0, (0, 0)), (1.0, (whole.width - size, whole.height - size))):
        expected = np.array(whole.crop((*corner, corner[0] + size, corner[1] + size))).astype(int)
        cut = square(image, size, position)
        assert cut.dtype == torch.uint8
        assert cut.shape == (3, size, size)
        assert np.abs(cut.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert torch.equal(square(image, size, 0.3, flip=True), square(image, size, 0.3).flip(2))


def test_shrinking_does_not_alias() -> None:
    lines = np.zeros((64, 64, 3), dtype=np.uint8)
    lines[:, ::2] = 255  # one pixel on, one off: nothing but grey remains at a quarter of the size
    small = square(Image.fromarray(lines), 16).float()
    assert (small[:, :, 2:-2] - 127.5).abs().max() < 3


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same() -> None:
    data = encoded(gradient(800, 600), "JPEG", quality=95)
    reduced = decode(data, LIMIT, size=64)
    assert reduced.size == (200, 150)  # a quarter; an eighth would be less than twice 64
    difference = square(reduced, 64).float() - square(decode(data, LIMIT), 64).float()
    assert difference.abs().max() <= 4


def test_an_icc_profile_is_no_obstacle() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixel(encoded(Image.new("RGB", (2, 2), (9, 8, 7)), "PNG", icc_profile=profile)) == (9, 8, 7)
