"""What stands beside the pixels refuses no picture; damage of the pixels always does. By hand, format by format."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unet_ray.pixels.images import ImageRefused, decode_frame, decode_mask, read_header

HEIGHT, WIDTH = 61, 83
RGB = np.asarray(
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 12, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
)
MODES = {mode: Image.fromarray(RGB).convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")}
NOISE = np.random.default_rng(4).bytes(1000)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(ImageRefused) as caught:
        decode_frame(data)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def assert_same(data: bytes, plain: bytes) -> None:
    np.testing.assert_array_equal(decode_frame(data), decode_frame(plain))
    np.testing.assert_array_equal(decode_mask(data), decode_mask(plain))
    header = read_header(data)
    assert (header.height_px, header.width_px, header.orientation) == (HEIGHT, WIDTH, 1)


# --- PNG ---


def chunk(kind: bytes, content: bytes, *, flip: int = 0, length: int | None = None) -> bytes:
    size = struct.pack(">I", len(content) if length is None else length)
    return size + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ flip)


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    at, parts = 8, []
    while at < len(png):
        length = struct.unpack(">I", png[at : at + 4])[0]
        parts.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


EXTRAS = {
    "text of over a megabyte": chunk(b"zTXt", b"p\0\0" + zlib.compress(NOISE * 1200)),
    "profile of over a megabyte": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(1_500_000))),
    "profile that does not unpack": chunk(b"iCCP", b"p\0\0no zlib"),
    "profile without end of its name": chunk(b"iCCP", b"xxxx"),
    "text with a wrong sum": chunk(b"tEXt", b"c\0hello", flip=1),
    "text by an unknown method": chunk(b"zTXt", b"c\0\5xxxx"),
    "short international text": chunk(b"iTXt", b"c\0\1"),
    "short pHYs": chunk(b"pHYs", b"\1\2"),
    "short gAMA": chunk(b"gAMA", b"\1"),
    "short cHRM": chunk(b"cHRM", b"abc"),
    "empty sRGB": chunk(b"sRGB", b""),
    "no EXIF": chunk(b"eXIf", b"garbage"),
    "EXIF that leads nowhere": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "short acTL": chunk(b"acTL", b"\0\0"),
    "acTL of nothing": chunk(b"acTL", bytes(8)),
    "private chunk with a wrong sum": chunk(b"prVt", b"abc", flip=1),
    "length into the pixels": chunk(b"tEXt", b"c\0hello", length=400),
    "length beyond the file": chunk(b"tEXt", b"c\0hello", length=2**31 - 1),
    "length of less": chunk(b"tEXt", b"c\0hello there", length=2),
    "many": chunk(b"tEXt", b"c\0" + bytes(100)) * 2000,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, of `read_header`
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_png_with_an_odd_chunk(extra: str, mode: str) -> None:
    plain = encoded(MODES[mode], "PNG")
    for before in (b"IHDR", b"IDAT"):  # before and behind the pixels
        parts = [chunk(*part) + EXTRAS[extra] * (part[0] == before) for part in chunks(plain)]
        assert_same(plain[:8] + b"".join(parts), plain)


def png(mode: str, rows: bytes, *, interlaced: bool = False) -> bytes:
    (_, head), *others = chunks(encoded(MODES[mode], "PNG"))
    palette = b"".join(chunk(*part) for part in others if part[0] == b"PLTE")
    head = chunk(b"IHDR", head[:-1] + bytes([interlaced]))
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rows_of(mode: str) -> bytes:
    return zlib.decompress(
        b"".join(content for kind, content in chunks(encoded(MODES[mode], "PNG")) if kind == b"IDAT")
    )


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_png_that_are_missing(mode: str) -> None:
    rows = rows_of(mode)
    whole = png(mode, rows)
    assert_same(png(mode, rows + rows[:300]), whole)
    for n_bytes in (0, len(rows) // 3, len(rows) - 1):
        assert refusal(png(mode, rows[:n_bytes])) == "truncated"


def test_passes_of_an_interlaced_png_that_are_missing() -> None:
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = [b"\0" + row.tobytes() for y, x, down, right in adam7 for row in RGB[y::down, x::right]]
    np.testing.assert_array_equal(decode_frame(png("RGB", b"".join(lines), interlaced=True)), RGB)
    for n_lines in (0, 8, len(lines) // 2, len(lines) - 1):
        assert refusal(png("RGB", b"".join(lines[:n_lines]), interlaced=True)) == "truncated"


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_a_png(mode: str) -> None:
    plain = encoded(MODES[mode], "PNG")
    for data in (plain[:-12], plain[:-6], plain[:-4] + b"abcd", plain + NOISE, plain + plain):
        assert_same(data, plain)
    for data in (plain[:-20], plain[: len(plain) // 2]):
        assert refusal(data) == "truncated"


def test_a_png_of_several_pictures_stays_refused_whatever_stands_beside_it() -> None:
    data = encoded(MODES["RGB"], "PNG", save_all=True, append_images=[MODES["RGB"].rotate(180)])
    odd = data[:33] + EXTRAS["short gAMA"] + data[33:]
    assert refusal(odd) == "unsupported" and read_header(odd).animated


# --- JPEG ---


def segment(marker: int, content: bytes, length: int | None = None) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2 if length is None else length) + content


SEGMENTS = {
    "short Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\4\4"),
    "no EXIF": segment(0xE1, b"Exif\0\0garbage"),
    "empty EXIF": segment(0xE1, b"Exif\0\0"),
    "EXIF in a circle": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\0\0\0\0"),
    "damaged profile": segment(0xE2, b"ICC_PROFILE\0\1\2abc"),
    "short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "no MPF": segment(0xE2, b"MPF\0garbage"),
    "short JFIF": segment(0xE0, b"JFIF\0\1"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "AVI1": segment(0xE0, b"AVI1" + bytes(10)),
    "comments": segment(0xFE, b"hello\0" * 1000),
    "no length": segment(0xE5, b"", 0),
    "short length": segment(0xE5, b"abcdefgh", 4),
    "fill bytes": b"\xff\xff\xff",
}
KINDS = {
    "RGB": ("RGB", {}),
    "grey": ("L", {}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"subsampling": 0, "restart_marker_blocks": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", SEGMENTS)
def test_a_jpeg_with_an_odd_segment(extra: str, kind: str) -> None:
    mode, options = KINDS[kind]
    plain = encoded(MODES[mode], "JPEG", **options)
    assert_same(plain[:2] + SEGMENTS[extra] + plain[2:], plain)
    assert_same(plain[:20] + SEGMENTS[extra] + plain[20:], plain)  # behind JFIF


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_jpeg(kind: str) -> None:
    mode, options = KINDS[kind]
    plain = encoded(MODES[mode], "JPEG", **options)
    for data in (plain + NOISE, plain + bytes(4000), plain + plain, plain[:-2] + bytes(4) + b"\xff\xd9"):
        assert_same(data, plain)
    if kind == "progressive":  # another scan may have followed
        assert refusal(plain[:-2]) == "truncated"
    else:
        assert_same(plain[:-2], plain)
        assert_same(plain[:-1], plain)
    scan = plain.index(b"\xff\xda")
    for share in (0.1, 0.5, 0.9):
        cut = scan + 14 + int((len(plain) - scan - 14) * share)
        for end in (b"", b"\xff\xd9", bytes(len(plain) - cut - 2) + b"\xff\xd9"):
            assert refusal(plain[:cut] + end) == "truncated", (share, end[:3])
    assert refusal(plain[:scan]) == "truncated"


def test_a_jpeg_whose_pixels_lost_their_way_is_refused() -> None:
    """Most flipped bytes mean something else; where the decoder is left with bytes at the end, it has noticed."""
    plain = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)), "JPEG")
    scan, n_refused = plain.index(b"\xff\xda") + 14, 0
    for at in range(scan, len(plain) - 2, 31):
        damaged = bytearray(plain)
        damaged[at] ^= 0x20
        try:
            decode_frame(bytes(damaged))
        except ImageRefused as error:
            assert error.reason == "truncated"
            n_refused += 1
    assert n_refused > 10


def test_orientation_is_read_beside_odd_segments() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format, start, extra in (("PNG", 33, EXTRAS["short gAMA"]), ("JPEG", 2, SEGMENTS["short Photoshop"])):
        turned = encoded(MODES["RGB"], file_format, exif=exif)
        assert read_header(turned[:start] + extra + turned[start:]).orientation == 6


# --- WebP, TIFF, BMP ---


def riff(body: bytes, n_bytes: int | None = None) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 4 if n_bytes is None else n_bytes) + b"WEBP" + body


def riff_chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    return kind + struct.pack("<I", len(content) if length is None else length) + content + bytes(len(content) % 2)


@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("RGB", {"lossless": True}), ("RGBA", {})])
def test_a_webp_with_odd_chunks(mode: str, options: dict[str, object]) -> None:
    plain = encoded(MODES[mode], "WEBP", **options)
    pixels = plain[12:] if plain[12:16] != b"VP8X" else plain[30:]
    size = (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")
    alpha = 0x10 * (mode == "RGBA")
    for flags, before, behind in (
        (0x20, riff_chunk(b"ICCP", b"garbage"), b""),
        (0x20, b"", b""),  # announced, and not there
        (0x08, b"", riff_chunk(b"EXIF", b"garbage")),
        (0x08, b"", riff_chunk(b"EXIF", b"garb", 100)),
        (0x04, b"", riff_chunk(b"XMP ", b"<x")),
        (0, riff_chunk(b"ABCD", b"xyz"), riff_chunk(b"EFGH", b"1", 5000)),
    ):
        extended = riff_chunk(b"VP8X", bytes([flags | alpha, 0, 0, 0]) + size)
        assert_same(riff(extended + before + pixels + behind), plain)
    for data in (plain + NOISE, riff(plain[12:], len(plain) + 50), riff(plain[12:], 0)):
        assert_same(data, plain)
    assert refusal(plain[: len(plain) * 9 // 10]) == "truncated"


@pytest.mark.filterwarnings("ignore")  # Pillow's own
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_a_tiff_with_odd_tags(compression: str, byte_order: str) -> None:
    plain = encoded(MODES["RGB"], "TIFF", compression=compression)
    if byte_order == ">":
        raw = RGB.tobytes()
        values = [(256, WIDTH), (257, HEIGHT), (259, 1), (262, 2), (273, 8), (277, 3), (278, HEIGHT), (279, len(raw))]
        tags = [struct.pack(">HHII", tag, 4, 1, value) for tag, value in values]
        tags.insert(2, struct.pack(">HHIHH", 258, 3, 1, 8, 0))
        plain = (
            b"MM\0*" + struct.pack(">I", 8 + len(raw)) + raw + struct.pack(">H", len(tags)) + b"".join(tags) + bytes(4)
        )
    begin = struct.unpack_from(f"{byte_order}I", plain, 4)[0]
    n_tags = struct.unpack_from(f"{byte_order}H", plain, begin)[0]
    tags = [plain[begin + 2 + 12 * n : begin + 14 + 12 * n] for n in range(n_tags)]
    for tag, kind, number, value in (
        (270, 2, 500, 10**8),  # a description that lies beyond the file
        (282, 5, 1, 10**8),
        (34665, 4, 1, 9),
        (34675, 7, 1000, 10**8),
        (65001, 99, 1, 1),
        (65001, 1, 2**32 - 1, 8),
    ):
        odd = [entry for entry in tags if entry[:2] != struct.pack(f"{byte_order}H", tag)]
        odd = sorted([*odd, struct.pack(f"{byte_order}HHII", tag, kind, number, value)])
        odd.sort(key=lambda entry: struct.unpack_from(f"{byte_order}H", entry))
        listed = struct.pack(f"{byte_order}H", len(odd)) + b"".join(odd) + bytes(4)
        data = plain[:4] + struct.pack(f"{byte_order}I", len(plain)) + plain[8:] + listed
        assert_same(data, plain)
    assert_same(plain + NOISE, plain)
    assert refusal(plain[: len(plain) // 2]) == "truncated"


def test_a_bmp_with_odd_counts() -> None:
    plain = encoded(MODES["RGB"], "BMP")
    for offset, value in ((2, 0), (2, 10**9), (6, 0xDEADBEEF), (34, 0), (34, 10**9), (38, 2**32 - 1)):
        odd = bytearray(plain)
        struct.pack_into("<I", odd, offset, value)
        assert_same(bytes(odd), plain)
    assert_same(plain + NOISE, plain)
    assert refusal(plain[:-100]) == "truncated"
