"""The containers of images (PNG's chunks, JPEG's segments, …): a file with only what its pixels need.

What stands beside the pixels (text, profiles, sums and lengths of other chunks) is left out before a decoder sees it.
So no damage there refuses a picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

PNG_BITS, _PNG_COLORS, _PNG_INTERLACE = 24, 25, 28  # where they stand in a PNG
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_PALETTE = 3
_PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_ADAM7 = ((8, 0, 8, 0), (8, 0, 8, 4), (8, 4, 4, 0), (4, 0, 4, 2), (4, 2, 2, 0), (2, 0, 2, 1), (2, 1, 1, 0))
"""Step and start of rows and of columns in each pass of an interlaced PNG."""
_MOST_LOST = 8  # times that the next chunk of a damaged file is looked for
_MOST_CANDIDATES = (
    64  # places at which a chunk of a damaged file is looked for; each may cost as much as the whole file
)

_JPEG_APPLICATION = (*range(0xE0, 0xF0), 0xFE)  # APP0 to APP15 and comments
_JPEG_FRAMES = (0xC0, 0xC1)  # of those, the ones of which a scan without an end mark can be told to be whole
_JPEG_SCAN = 0xDA
_JPEG_END = b"\xff\xd9"
_TIFF_TAGS = {
    *range(254, 260),  # kind, size, bits, compression
    *(262, 266, 273, 274, 277, 278, 279, 284),  # colours, bit order, strips, orientation, channels
    *(292, 293, 317, 320, *range(322, 326), 332, 338, 339, 347, *range(529, 533)),  # fax, predictor, palette, tiles, …
}
"""Of TIFF, what pixels are decoded by. Pillow passes over all tags behind one whose value it cannot read."""
_TIFF_ENTRY_BYTES = 12


def without_extras(format_name: str, data: bytes) -> bytes:
    """A file with what its pixels need: text, profiles and the like are no reason to unpack them, or to refuse it."""
    match format_name:
        case "PNG":
            return _png_without_extras(data)
        case "JPEG":
            return _jpeg_without_extras(data)
        case "WebP":
            return _webp_without_extras(data)
        case "TIFF":
            return _tiff_without_extras(data)
        case _:
            return data


def _png_without_extras(data: bytes) -> bytes:
    kept = (
        (b"IHDR", b"PLTE", b"IDAT")
        if data[_PNG_COLORS : _PNG_COLORS + 1] == bytes([_PNG_PALETTE])
        else (b"IHDR", b"IDAT")
    )
    return b"".join([data[:8], *(chunk for kind, chunk in png_chunks(data) if kind in kept), _PNG_END])


def require_png_rows(kept: bytes) -> None:
    """Raises ValueError where the sum of a chunk does not agree, or where there are fewer rows than the header says."""
    pixels = []
    for kind, chunk in png_chunks(kept):
        if kind == b"IDAT":
            if zlib.crc32(chunk[4:-4]).to_bytes(4) != chunk[-4:]:
                raise ValueError("the checksum of its pixels does not agree")
            pixels.append(chunk[8:-4])
    n_bytes = _png_raw_bytes(kept)
    n_present = len(zlib.decompressobj().decompress(b"".join(pixels), n_bytes))
    if n_present < n_bytes:
        raise ValueError(f"rows are missing: {n_present:,} of {n_bytes:,} bytes of pixels")


def _png_raw_bytes(kept: bytes) -> int:
    """Bytes of all rows with their filters, before they are compressed."""
    width_px, height_px = struct.unpack_from(">II", kept, 16)
    bits = kept[PNG_BITS] * _PNG_CHANNELS[kept[_PNG_COLORS]]
    passes = _ADAM7 if kept[_PNG_INTERLACE] else ((1, 0, 1, 0),)
    sizes = ((-(-(height_px - top) // down), -(-(width_px - left) // right)) for down, top, right, left in passes)
    return sum(n_rows * (1 + (n_columns * bits + 7) // 8) for n_rows, n_columns in sizes if n_rows > 0 < n_columns)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yields kind and bytes (length, kind, content, checksum) of each chunk up to the end; the last may be cut short.

    Where the length of a chunk that the pixels do not need leads nowhere, the next one that they need is looked for.
    """
    whole, offset, n_lost = memoryview(data), 8, 0
    while offset + 12 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, offset), data[offset + 4 : offset + 8]
        end = offset + 12 + length
        if kind not in _PNG_CRITICAL and not (kind.isalpha() and data[end + 4 : end + 8].isalpha()):
            n_lost += 1
            offset = _next_png_chunk(data, offset + 4) if n_lost <= _MOST_LOST else len(data)
            continue
        yield kind, whole[offset:end]
        if kind == b"IEND":
            return
        offset = end


def _next_png_chunk(data: bytes, start: int) -> int:
    """Where the next chunk with a right sum begins that the pixels need; the end of the file where there is none."""
    names = re.compile(b"PLTE|IDAT|IEND")
    for match, _ in zip(names.finditer(data, start + 4), range(_MOST_CANDIDATES), strict=False):
        begin = match.start() - 4
        end = begin + 12 + int.from_bytes(data[begin : begin + 4])
        if end <= len(data) and zlib.crc32(memoryview(data)[begin + 4 : end - 4]).to_bytes(4) == data[end - 4 : end]:
            return begin
    return len(data)


def png_is_animated(data: bytes) -> bool:
    """Whether there are several pictures in a PNG: those that its first chunks announce, and one beside them."""
    n_pictures, is_first_of_them = 0, False
    for kind, chunk in png_chunks(data):
        if kind == b"acTL" and len(chunk) >= 20:
            n_pictures = int.from_bytes(chunk[8:12])
        is_first_of_them |= kind == b"fcTL"
        if kind == b"IDAT":
            break
    return n_pictures > 0 and n_pictures + (not is_first_of_them) > 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and bytes of each segment before the pixels, and then all that is left as one of a scan."""
    at = 2
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0, 0xFF):
            at += 1  # what lies between segments, decoders pass over
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _JPEG_SCAN or end < at + 4:
            break
        yield marker, data[at:end]
        at = end
    yield _JPEG_SCAN, data[at:]


def _jpeg_without_extras(data: bytes) -> bytes:
    parts, n_components, is_baseline = [data[:2]], 0, False
    for marker, segment in jpeg_segments(data):
        if marker in _JPEG_APPLICATION and not _says_colors(marker, segment):
            continue
        if marker in _JPEG_FRAMES and len(segment) > 9:
            n_components, is_baseline = segment[9], True
        parts.append(segment)
    is_one_scan = is_baseline and parts[-1][4:5] == bytes([n_components])
    if is_one_scan and parts[-1].rfind(_JPEG_END) < 0:
        parts.append(_JPEG_END)  # whether all pixels came before it, the decoder says
    return b"".join(parts)


def _says_colors(marker: int, segment: bytes) -> bool:
    """Whether a segment says what the channels mean, as decoders understand it: `JFIF` and `Adobe`."""
    is_jfif = marker == 0xE0 and len(segment) >= 18 and segment[4:9] == b"JFIF\0"
    return is_jfif or (marker == 0xEE and len(segment) >= 16 and segment[4:9] == b"Adobe")


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields kind and content of each chunk; one that is cut short ends it, or a length that leads nowhere."""
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > len(data):
            return
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def _webp_without_extras(data: bytes) -> bytes:
    chunks = dict(webp_chunks(data))
    pixels: bytes | None = next((kind for kind in (b"VP8L", b"VP8 ") if kind in chunks), None)
    if pixels is None or b"ANMF" in chunks or b"ANIM" in chunks:
        return data
    kept = [pixels]
    if b"ALPH" in chunks and len(chunks.get(b"VP8X", b"")) >= 10 and pixels == b"VP8 ":
        kept = [b"VP8X", b"ALPH", pixels]
        chunks[b"VP8X"] = bytes([0x10, 0, 0, 0]) + chunks[b"VP8X"][4:10]  # of its flags that of alpha alone
    packed = b"".join(
        kind + len(chunks[kind]).to_bytes(4, "little") + chunks[kind] + bytes(len(chunks[kind]) % 2) for kind in kept
    )
    return b"RIFF" + (4 + len(packed)).to_bytes(4, "little") + b"WEBP" + packed


def _tiff_without_extras(data: bytes) -> bytes:
    """The file with another list of tags for its first picture behind it."""
    byte_order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    begin = int.from_bytes(data[4:8], byte_order)
    n_entries = int.from_bytes(data[begin : begin + 2], byte_order)
    starts = range(begin + 2, begin + 2 + n_entries * _TIFF_ENTRY_BYTES, _TIFF_ENTRY_BYTES)
    entries = [data[start : start + _TIFF_ENTRY_BYTES] for start in starts]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], byte_order) in _TIFF_TAGS]
    if len(kept) == n_entries or len(data) < starts.stop + 4:
        return data
    even = data + bytes(len(data) % 2)
    following = data[starts.stop : starts.stop + 4]
    head = even[:4] + len(even).to_bytes(4, byte_order) + even[8:]
    return head + len(kept).to_bytes(2, byte_order) + b"".join(kept) + following
