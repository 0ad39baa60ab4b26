"""Good pixels among broken, endless or truncated metadata are read, and upright where that is known."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from flux_trainer.data.bad import BadSample
from flux_trainer.data.image import decode
from flux_trainer.data.metadata import without_metadata

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
ORIENTATION, MAKE, GPS = 0x0112, 0x010F, 0x8825
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} | options if kind == "WEBP" else options
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.array(decode(data, 10**6))


def exif() -> bytes:
    """EXIF that says: turn right to see me upright."""
    table = Image.Exif()
    table[ORIENTATION] = 6
    table[MAKE] = "a camera"
    table.get_ifd(GPS)[1] = "N"
    return table.tobytes()


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def png(extra: bytes, at_the_end: bool = False) -> bytes:
    """A PNG with more chunks before its pixels, or behind them."""
    plain = encoded("PNG")
    place = len(plain) - 12 if at_the_end else 33  # before IEND, or after IHDR
    return plain[:place] + extra + plain[place:]


LONG = zlib.compress(b"x" * 2_000_000)
CHUNKS = {
    "a long zTXt": chunk(b"zTXt", b"workflow\0\0" + LONG),
    "a long iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "long compressed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "long EXIF in text": chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),
    "all text too long": 70 * chunk(b"tEXt", b"workflow\0" + bytes(10**6)),
    "an unknown compression": chunk(b"zTXt", b"workflow\0\7abc"),
    "EXIF in text that is none": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
    "EXIF that is none": chunk(b"eXIf", b"MM\0\0\0\0\0\0"),
    "a long profile": chunk(b"iCCP", b"p\0\0" + LONG),
    "a profile that is none": chunk(b"iCCP", b"p\0\1abc"),
    "a short gAMA": chunk(b"gAMA", b"\0"),
    "a short cHRM": chunk(b"cHRM", b"\0"),
    "a short pHYs": chunk(b"pHYs", b"\0"),
    "an empty sRGB": chunk(b"sRGB", b""),
    "a short acTL": chunk(b"acTL", b"\0"),
    "frames out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fdAT", bytes(4)),
    "a wrong checksum of text": chunk(b"tEXt", b"a\0b", checksum=0),
    "a wrong checksum of EXIF": chunk(b"eXIf", exif()[6:], checksum=0),
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_no_chunk_that_is_not_needed_spoils_a_png(name: str, at_the_end: bool) -> None:
    assert np.array_equal(pixels(png(CHUNKS[name], at_the_end)), PIXELS)


def test_a_png_may_end_within_its_last_text() -> None:
    data = png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), at_the_end=True)
    assert np.array_equal(pixels(data[: -12 - 40]), PIXELS)


UPRIGHT = np.rot90(PIXELS, -1)
ORIENTED = {
    "eXIf": chunk(b"eXIf", exif()[6:]),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "XMP of 2 MB": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP + b" " * 2_000_000),
    "compressed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "EXIF in zTXt": chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + exif().hex().encode())
    ),
    "EXIF amid what is broken": CHUNKS["a long profile"] + chunk(b"eXIf", exif()[6:]) + CHUNKS["a long zTXt"],
}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("name", ORIENTED)
def test_a_png_is_turned_upright(name: str, at_the_end: bool) -> None:
    assert np.array_equal(pixels(png(ORIENTED[name], at_the_end)), UPRIGHT)


def test_a_png_whose_pixels_are_broken_is_bad() -> None:
    plain = encoded("PNG")
    for data in (plain[:-40], plain[:60], plain[:8], plain[:30] + b"\1" + plain[31:]):
        with pytest.raises(BadSample, match="corrupt image"):
            decode(data, 10**6)


SEGMENTS = {
    "EXIF that is none": segment(0xE1, b"Exif\0\0MM\0\0rubbish"),
    "empty EXIF": segment(0xE1, b"Exif\0\0"),
    "a profile of no length": segment(0xE2, b"ICC_PROFILE\0"),
    "an index of pictures that is none": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\1\0\1\xb0"),
    "Photoshop's resources, cut off": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed"),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "a comment": segment(0xFE, b"\xff\xd8" * 9),
    "fill bytes": b"\xff\xff" + segment(0xEC, b"Ducky"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_no_segment_that_is_not_needed_spoils_a_jpeg(name: str) -> None:
    plain = encoded("JPEG")
    assert np.array_equal(pixels(plain[:2] + SEGMENTS[name] + plain[2:]), pixels(plain))


XMP_IN_JPEG = pytest.param(
    b"http://ns.adobe.com/xap/1.0/\0" + XMP,
    id="XMP",
    marks=pytest.mark.skipif(PIL.__version__ < "11.2", reason="Pillow before 11.2 looks at EXIF only"),
)


@pytest.mark.parametrize("body", [pytest.param(exif(), id="EXIF"), XMP_IN_JPEG])
def test_a_jpeg_is_turned_upright(body: bytes) -> None:
    plain = encoded("JPEG")
    for broken in (b"", *SEGMENTS.values()):
        if b"Exif" not in broken:
            data = plain[:2] + broken + segment(0xE1, body) + plain[2:]
            assert np.array_equal(pixels(data), np.rot90(pixels(plain), -1))


def test_maker_notes_and_places_may_be_rubbish() -> None:
    """The orientation before them still counts, in each format that has EXIF."""
    good = exif()
    where = good.index(b"a camera")
    for seed in range(20):
        rubbish = good[: where + 8] + random.Random(seed).randbytes(len(good) - where - 8)
        assert np.array_equal(pixels(png(chunk(b"eXIf", rubbish[6:]))), UPRIGHT)
        assert np.array_equal(pixels(encoded("WEBP", exif=rubbish)), UPRIGHT)


def test_a_webp_may_have_broken_metadata_and_end_within_them() -> None:
    data = encoded("WEBP", exif=b"Exif\0\0rubbish", xmp=b"<x/>" * 9)
    assert np.array_equal(pixels(data), PIXELS)
    for end in range(data.index(b"EXIF", 30) + 1, len(data)):
        assert np.array_equal(pixels(data[:end]), PIXELS)
    with pytest.raises(BadSample, match="corrupt image"):
        decode(data[: data.index(b"VP8L", 30) + 60], 10**6)


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="Pillow before 11.3 has no AVIF")
def test_an_avif_with_exif_that_is_none() -> None:
    good = encoded("AVIF", exif=exif())
    start = max(good.find(b"MM\0*"), good.find(b"II*\0"))
    broken = good[:start] + b"\xff" * 4 + good[start + 4 :]
    assert np.array_equal(pixels(broken), pixels(good))
    assert pixels(good).shape == UPRIGHT.shape


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_tags_of_a_tiff_may_lead_nowhere(compression: str) -> None:
    table = Image.Exif()
    table[ORIENTATION] = 6
    table.get_ifd(GPS)[1] = "N"
    table.get_ifd(0x8769)[0x927C] = bytes(100)
    data = bytearray(encoded("TIFF", exif=table, compression=compression))
    (start,) = struct.unpack_from("<I", data, 4)
    for entry in range(struct.unpack_from("<H", data, start)[0]):
        tag = start + 2 + 12 * entry
        if struct.unpack_from("<H", data, tag)[0] in (GPS, 0x8769):
            struct.pack_into("<I", data, tag + 8, 2**32 - 5)
    assert np.array_equal(pixels(bytes(data)), UPRIGHT)


def test_files_without_metadata_stay_as_they_are() -> None:
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        assert without_metadata(encoded(kind)) == encoded(kind)
    for data in (b"", b"rubbish", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"):
        without_metadata(data)  # the decoder complains, not this
