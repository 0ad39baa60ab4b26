"""An image file without its metadata: nothing is left but what decides its pixels and which way is up.

Text, colour profiles, thumbnails and maker's notes come from many programs, and Pillow refuses a file
where one of them is broken, or longer than its limit. What the pixels need passes through untouched: whether
that is sound is for the decoder to say.
"""

from __future__ import annotations

import re
import struct
import zlib

_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # how an APP1 segment of a JPEG begins
_ORIENTED_BY = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # keywords of a PNG's texts
_LONGEST_TEXT = 2**20  # bytes, decompressed: Pillow's limit
_LONGEST_PLAIN_TEXT = 2**24  # bytes: well below what Pillow allows all texts together


def without_metadata(data: bytes) -> bytes:
    """The file with the same pixels and orientation. Formats other than these four come back as they are."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data[4:12] in (b"ftypavif", b"ftypavis"):  # the orientation is a property of the image, not in Exif
        return re.sub(rb"(infe.{8})Exif", rb"\1skip", data, flags=re.DOTALL)
    return data


def _png(data: bytes) -> bytes:
    """A PNG's critical chunks, its transparency, and sound chunks that may hold an orientation."""
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if not kind.isalpha():
            return b"".join([*kept, data[position:]])
        body, end = data[position + 8 : position + 8 + length], position + 12 + length
        critical = kind[:1].isupper() or kind == b"tRNS"
        if critical or (_may_hold_orientation(kind, body) and data[end - 4 : end] == _checksum(kind, body)):
            kept.append(data[position:end])
        position = len(data) if kind == b"IEND" else end
    return b"".join(kept)


def _checksum(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(kind + body))


def _may_hold_orientation(kind: bytes, body: bytes) -> bool:
    """Whether Pillow looks for an orientation in a chunk of a PNG, and takes it without complaint."""
    keyword, _, rest = body.partition(b"\0")
    if kind == b"eXIf":
        return True
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in _ORIENTED_BY:
        return False
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(rest) <= _LONGEST_PLAIN_TEXT
    compressed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(compressed, _LONGEST_TEXT)
    except zlib.error:
        return False
    return unpacker.eof


def _jpeg(data: bytes) -> bytes:
    """A JPEG without comments and the segments of applications, but for those of colour and orientation."""
    kept, position = [data[:2]], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker == 0xFF:  # may come any number of times
            position += 1
            continue
        end = position + 2 + length
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2 or end > len(data):
            break  # the pixels, or what is no segment
        if _decides_colour(marker, length) or data.startswith((_EXIF, _XMP), position + 4):
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def _decides_colour(marker: int, length: int) -> bool:
    """Whether a JPEG's segment decides what its samples mean. JFIF's and Adobe's do if they are complete."""
    if marker == 0xE0:
        return length >= 16
    if marker == 0xEE:
        return length >= 14
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


def _webp(data: bytes) -> bytes:
    """A WebP without metadata that are cut off at the end of the file."""
    (size,) = struct.unpack_from("<I", data, 4)
    data = data[: 8 + size]
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        end = position + 8 + length + length % 2
        if end > len(data):
            if kind not in (b"EXIF", b"XMP ", b"ICCP"):
                return data
            break
        position = end
    return b"RIFF" + struct.pack("<I", position - 8) + data[8:position]
