import io
import itertools
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from unet_ray.pixels.images import (
    ImageHeader,
    ImageRefused,
    count_values,
    decode_frame,
    decode_mask,
    encode_png,
    frame_size,
    read_header,
    resize_nearest,
)

HEIGHT, WIDTH = 33, 49
RGB = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
SMOOTH = np.stack(np.meshgrid(np.arange(49) * 4, np.arange(33) * 6), -1).astype(np.uint8)[..., [0, 1, 0]]
IDS = np.random.default_rng(8).integers(0, 11, (HEIGHT, WIDTH)).astype(np.uint8)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_by_hand(height, width, bits, kind, scanlines, extra=b""):
    """A PNG without Pillow: `kind` 0 grey, 2 RGB, 3 palette; `extra` holds whole chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in scanlines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def refused(function, data, **options):
    with pytest.raises(ImageRefused) as caught:
        function(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_lossless_formats_give_the_pixels_back(file_format, options):
    data = encoded(Image.fromarray(RGB), file_format, **options)
    frame = decode_frame(data)
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, RGB)
    np.testing.assert_array_equal(decode_mask(data), RGB)
    assert frame_size(data) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(("file_format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
def test_lossy_formats_come_close(file_format, options):
    data = encoded(Image.fromarray(SMOOTH), file_format, **options)
    assert np.abs(decode_frame(data).astype(int) - SMOOTH).mean() < 5
    assert frame_size(data) == (HEIGHT, WIDTH)


def test_a_frame_written_without_pillow():
    data = png_by_hand(HEIGHT, WIDTH, 8, 2, [row.tobytes() for row in RGB])
    np.testing.assert_array_equal(decode_frame(data), RGB)


def test_grey_is_repeated():
    data = encoded(Image.fromarray(IDS), "PNG")
    np.testing.assert_array_equal(decode_frame(data), np.stack([IDS, IDS, IDS], -1))
    np.testing.assert_array_equal(decode_mask(data), IDS)


def test_a_palette_gives_a_frame_its_colors_and_a_mask_its_indices():
    colors = np.random.default_rng(1).integers(0, 256, (16, 3)).astype(np.uint8)
    rows = [bytes(pair[0] << 4 | pair[1] for pair in row.reshape(-1, 2)) for row in np.pad(IDS, ((0, 0), (0, 1)))]
    transparent = chunk(b"tRNS", bytes([0, 128]))
    data = png_by_hand(HEIGHT, WIDTH, 4, 3, rows, chunk(b"PLTE", colors.tobytes()) + transparent)
    np.testing.assert_array_equal(decode_frame(data), colors[IDS])
    np.testing.assert_array_equal(decode_mask(data), IDS)


def test_an_index_outside_the_palette_is_black():
    data = png_by_hand(1, 3, 8, 3, [bytes([0, 1, 2])], chunk(b"PLTE", bytes([9, 8, 7, 6, 5, 4])))
    assert decode_frame(data).tolist() == [[[9, 8, 7], [6, 5, 4], [0, 0, 0]]]
    assert decode_mask(data).tolist() == [[0, 1, 2]]


def test_alpha_is_dropped_and_the_colors_under_it_stay():
    alpha = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
    data = encoded(Image.fromarray(np.concatenate([RGB, alpha], -1)), "PNG")
    np.testing.assert_array_equal(decode_frame(data), RGB)
    np.testing.assert_array_equal(decode_mask(data), RGB)
    grey = encoded(Image.fromarray(np.concatenate([IDS[..., None], alpha], -1), "LA"), "PNG")
    np.testing.assert_array_equal(decode_frame(grey), np.stack([IDS, IDS, IDS], -1))
    np.testing.assert_array_equal(decode_mask(grey), IDS)


def test_one_bit_is_black_and_white_in_a_frame_and_0_and_1_in_a_mask():
    bits = (IDS % 2).astype(np.uint8)
    data = png_by_hand(HEIGHT, WIDTH, 1, 0, [np.packbits(row).tobytes() for row in bits])
    np.testing.assert_array_equal(decode_mask(data), bits)
    np.testing.assert_array_equal(decode_frame(data), np.stack([bits * 255] * 3, -1))


def test_four_bit_grey_is_a_frame_and_no_mask():
    data = png_by_hand(1, 2, 4, 0, [bytes([0x3F])])
    assert decode_frame(data).tolist() == [[[51] * 3, [255] * 3]]
    assert refused(decode_mask, data) == (
        "unsupported",
        "PNG mask of 4-bit grey: a reader may take its values as ids or as shares of white; write it with 8 bits",
    )


def test_exif_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    for file_format in ("PNG", "JPEG", "WEBP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        plain = encoded(Image.fromarray(SMOOTH), file_format, **options)
        turned = encoded(Image.fromarray(SMOOTH), file_format, exif=exif, **options)
        np.testing.assert_array_equal(decode_frame(turned), decode_frame(plain))
        assert frame_size(turned) == (HEIGHT, WIDTH)
        assert (read_header(plain).orientation, read_header(turned).orientation) == (1, 6)


def test_a_turned_tiff_is_refused():
    data = encoded(Image.fromarray(RGB), "TIFF", tiffinfo={0x0112: 6})
    assert refused(decode_frame, data) == ("unsupported", "TIFF with orientation 6; write its pixels upright")


def test_the_header_tells_format_and_kind():
    half = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    header = read_header(encoded(Image.fromarray(np.concatenate([RGB, half], -1)), "WEBP", lossless=True))
    assert header == ImageHeader(
        format="WebP", height_px=HEIGHT, width_px=WIDTH, mode="RGBA", bits=8, animated=False, orientation=1
    )


RGB_16 = png_by_hand(2, 3, 16, 2, [bytes(18)] * 2)
DEEP = "with 16 bits a channel; allowed are 8, write it with 8"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(IDS.astype(np.uint16) * 99), "PNG"), f"PNG {DEEP}"),
        (RGB_16, f"PNG {DEEP}"),
        (encoded(Image.fromarray(IDS.astype(np.uint16) * 99), "TIFF"), f"TIFF {DEEP}"),
        (
            encoded(Image.fromarray(IDS.astype(np.float32)), "TIFF"),
            "TIFF with 32 bits a channel; allowed are 8, write it with 8",
        ),
        (
            encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
            "JPEG with pixels of kind CMYK; allowed are RGB, grey and palette, write it as RGB",
        ),
        (
            encoded(Image.fromarray(RGB), "GIF"),
            "GIF is not read; allowed are PNG, JPEG, WebP, BMP, TIFF",
        ),
    ],
)
def test_what_would_be_a_guess_is_refused(data, message):
    assert refused(decode_frame, data) == ("unsupported", message)
    assert refused(decode_mask, data) == ("unsupported", message)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_several_pictures_in_one_file_are_refused(file_format):
    data = encoded(Image.fromarray(RGB), file_format, save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    reason, message = refused(decode_frame, data)
    assert reason == "unsupported"
    assert message.endswith("with several pictures in one file; one file is one frame, write them one by one")
    assert read_header(data).animated


def test_a_phones_jpeg_with_a_second_picture_is_its_first():
    data = encoded(Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[Image.fromarray(RGB)])
    assert np.abs(decode_frame(data).astype(int) - SMOOTH).mean() < 8


def test_what_is_no_image():
    assert refused(decode_frame, b"") == (
        "not_an_image",
        "empty file (0 bytes); allowed are PNG, JPEG, WebP, BMP, TIFF",
    )
    assert refused(decode_frame, b"hello, world") == (
        "not_an_image",
        "12 bytes that begin with 68 65 6c 6c 6f 2c 20 77; allowed are PNG, JPEG, WebP, BMP, TIFF",
    )
    for function in (decode_mask, frame_size, read_header):
        assert refused(function, b"RIFF\0\0\0\0WAVEfmt ")[0] == "not_an_image"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow, of a TIFF; the refusal says it
def test_a_file_that_is_cut_short_is_refused(file_format, share):
    data = encoded(Image.fromarray(RGB), file_format)
    cut = data[: int(len(data) * share)]
    reason, message = refused(decode_frame, cut)
    name = {"WEBP": "WebP"}.get(file_format, file_format)
    assert reason == "truncated"
    assert message.startswith(f"{name} of {len(cut):,} bytes that is cut short or damaged: ")


@pytest.mark.filterwarnings("ignore")  # Pillow's own, of damaged tags
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_damaged_bytes_give_an_array_or_a_reason_and_nothing_else(file_format):
    data = encoded(Image.fromarray(RGB), file_format)
    rng = np.random.default_rng(5)
    for _ in range(200):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        for _ in range(3):
            damaged[rng.integers(0, min(len(damaged), rng.choice([60, len(data)])))] = rng.integers(0, 256)
        for function in (decode_frame, decode_mask, frame_size, read_header):
            try:
                function(bytes(damaged), **({} if function is frame_size else {"max_pixels": 100_000}))
            except ImageRefused as refusal:
                assert refusal.reason in ("not_an_image", "truncated", "too_large", "unsupported")


@pytest.mark.parametrize("function", [decode_frame, decode_mask])
def test_no_flipped_byte_of_a_pngs_pixels_passes_for_other_pixels(function):
    data = encoded(Image.fromarray(RGB), "PNG")
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 4  # with the sum at their end
    for position in range(start, end):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert refused(function, bytes(damaged))[0] == "truncated", position


def kinds():
    """A file of every kind that a decoder other than Pillow's may take, and near misses."""
    image = Image.fromarray(RGB)
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        yield encoded(image.convert(mode), "PNG")
    yield encoded(image, "PNG", transparency=(1, 2, 3))
    yield encoded(image.convert("L"), "PNG", transparency=7)
    yield encoded(image, "PNG", icc_profile=b"no profile", exif=b"Exif\0\0MM\0*")
    yield encoded(image.convert("L"), "JPEG")
    for subsampling in (0, 1, 2):
        for options in ({}, {"progressive": True}, {"restart_marker_blocks": 3}, {"quality": 30}):
            yield encoded(image, "JPEG", subsampling=subsampling, **options)


def by_pillow_alone(monkeypatch, data):
    with monkeypatch.context() as patch:
        patch.setattr("unet_ray.pixels.images.decode_image_png_u8", None)
        patch.setattr("unet_ray.pixels.images._jpeg_pixels", lambda data: None)
        return frame_or_reason(data)


def frame_or_reason(data):
    try:
        return decode_frame(data, max_pixels=100_000)
    except ImageRefused as refusal:
        return np.array([refusal.reason, str(refusal)])


@pytest.mark.parametrize("data", list(kinds()), ids=len)
def test_every_decoder_gives_the_pixels_or_the_refusal_that_pillow_gives(monkeypatch, capfd, data):
    np.testing.assert_array_equal(frame_or_reason(data), by_pillow_alone(monkeypatch, data))
    assert capfd.readouterr() == ("", "")  # of a million frames with an odd profile, not a word in the log
    rng = np.random.default_rng(len(data))
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(30, len(data))] if rng.random() < 0.2 else data)
        damaged[rng.integers(8, len(damaged))] ^= 1 << rng.integers(8)
        if data.startswith(b"\x89PNG"):
            mend_the_sums(damaged)
        np.testing.assert_array_equal(frame_or_reason(bytes(damaged)), by_pillow_alone(monkeypatch, bytes(damaged)))


def mend_the_sums(png):
    """Makes the sums of all chunks right again but the pixels': where that one holds, they are what was written."""
    position = 8
    while position + 12 <= len(png):
        end = position + 8 + int.from_bytes(png[position : position + 4])
        if end + 4 <= len(png) and png[position + 4 : position + 8] != b"IDAT":
            png[end : end + 4] = zlib.crc32(png[position + 4 : end]).to_bytes(4)
        position = end + 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pillow_decodes_no_whole_png_of_8_bits(monkeypatch, mode):
    image = Image.fromarray(RGB).convert(mode)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    np.testing.assert_array_equal(
        decode_mask(encoded(image, "PNG")), np.asarray(image if mode == "L" else image.convert("RGB"))
    )


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_lines_of_a_png_with_right_sums_are_what_pillow_takes_them_for(monkeypatch, kind, channels):
    """With every filter and unknown ones, too few and too many lines, however they are compressed and cut up."""
    rng, n_taken = np.random.default_rng(kind), 0
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, kind, 0, 0, 0))
    for _ in range(100):
        lines = rng.integers(0, 256, (HEIGHT, 1 + WIDTH * channels)).astype(np.uint8)
        lines[:, 0] = rng.integers(0, 5, HEIGHT)
        if rng.random() < 0.2:
            lines[rng.integers(HEIGHT), 0] = 5
        raw = lines.tobytes()
        if rng.random() < 0.4:
            raw = (raw + raw)[: rng.integers(len(raw) - 200, len(raw) + 200)]
        compress = zlib.compressobj(int(rng.integers(0, 10)), zlib.DEFLATED, int(rng.integers(9, 16)))
        pixels = compress.compress(raw) + compress.flush()
        cuts = [0, *sorted(rng.integers(0, len(pixels), rng.integers(0, 4))), len(pixels)]
        parts = [chunk(b"IDAT", pixels[start:end]) for start, end in itertools.pairwise(cuts)]
        data = b"".join([b"\x89PNG\r\n\x1a\n", header, *parts, chunk(b"IEND", b"")])
        ours = frame_or_reason(data)
        np.testing.assert_array_equal(ours, by_pillow_alone(monkeypatch, data))
        n_taken += ours.dtype == np.uint8
    assert 30 < n_taken < 90


def test_an_interlaced_png():
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # Adam7
    lines = [row.tobytes() for y, x, down, right in passes for row in RGB[y::down, x::right]]
    data = bytearray(png_by_hand(HEIGHT, WIDTH, 8, 2, lines))
    data[28] = 1
    mend_the_sums(data)
    np.testing.assert_array_equal(decode_frame(bytes(data)), RGB)


def test_a_bomb_is_refused_by_its_header():
    bomb = png_by_hand(10_000, 20_000, 8, 2, [])
    assert frame_size(bomb) == (10_000, 20_000)
    expected = "PNG of 10000 x 20000 = 200,000,000 pixels (height x width); allowed are 100,000,000"
    assert refused(decode_frame, bomb) == ("too_large", expected)
    assert refused(decode_mask, bomb)[0] == "too_large"
    assert refused(read_header, bomb)[0] == "too_large"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_the_limit_is_inclusive_and_stands_for_every_format(file_format):
    data = encoded(Image.fromarray(RGB), file_format)
    assert decode_frame(data, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    assert refused(decode_frame, data, max_pixels=HEIGHT * WIDTH - 1)[0] == "too_large"


def test_pillows_own_limit_plays_no_part(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for file_format in ("PNG", "JPEG", "BMP"):
        assert decode_frame(encoded(Image.fromarray(RGB), file_format)).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}])
def test_the_size_of_a_webp_is_read_from_its_first_bytes(options):
    data = encoded(Image.fromarray(RGB), "WEBP", **options)
    assert frame_size(data[:30]) == (HEIGHT, WIDTH)
    assert refused(frame_size, data[:22])[0] == "truncated"


def test_a_refusal_survives_pickle():
    refusal = ImageRefused("too_large", "one line")
    again = pickle.loads(pickle.dumps(refusal))
    assert (again.reason, again.detail, str(again)) == ("too_large", "one line", "one line")


def test_a_png_gives_the_pixels_back():
    np.testing.assert_array_equal(decode_frame(encode_png(RGB)), RGB)
    np.testing.assert_array_equal(decode_mask(encode_png(IDS)), IDS)
    with pytest.raises(ValueError, match=r"an image is float64 of shape \(2, 3\), allowed is uint8 \[H, W, 3\] or"):
        encode_png(np.zeros((2, 3)))


def test_resize_by_hand():
    # 5 -> 3: floor(0.5 * 5/3), floor(1.5 * 5/3), floor(2.5 * 5/3); 3 -> 4: floor of 0.375, 1.125, 1.875, 2.625
    image = np.arange(15, dtype=np.uint8).reshape(5, 3)
    np.testing.assert_array_equal(resize_nearest(image, 3, 4), image[[0, 2, 4]][:, [0, 1, 1, 2]])


@pytest.mark.timeout(300)
def test_resize_equals_tensorflows():
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(11)
    sizes = [(480, 640, 96, 128), (360, 480, 96, 128), (1024, 2048, 96, 128), (96, 128, 480, 640), (720, 1280, 97, 131)]
    sizes += [tuple(int(n) for n in rng.integers(1, 701, 4)) for _ in range(250)]
    for height, width, out_height, out_width in sizes:
        rows = np.arange(height, dtype=np.int32)[:, None]
        columns = np.arange(width, dtype=np.int32)[None]
        for image, out_hw in ((rows, (out_height, 1)), (columns, (1, out_width))):
            expected = tf.image.resize(image[..., None], out_hw, method="nearest").numpy()[..., 0]
            np.testing.assert_array_equal(resize_nearest(image, *out_hw), expected, str((image.shape, out_hw)))
    expected = tf.image.resize(RGB, (20, 64), method="nearest").numpy()
    assert resize_nearest(RGB, 20, 64).dtype == np.uint8
    np.testing.assert_array_equal(resize_nearest(RGB, 20, 64), expected)


def test_values_are_counted_as_numpy_counts_them():
    mask_HW = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    mask_HW.setflags(write=False)
    for view_HW in (mask_HW, mask_HW[::2, 3:], mask_HW.T):
        np.testing.assert_array_equal(count_values(view_HW), np.bincount(view_HW.ravel(), minlength=256))
