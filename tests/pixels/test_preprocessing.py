"""What a network is shown: fitting, padding, reading JPEGs at a part of their size, and the options of a model."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from unet_ray.classes import IGNORED_ID
from unet_ray.pixels import images
from unet_ray.pixels.preprocessing import (
    Preprocessing,
    dct_divisor,
    decode_input,
    frame_box,
    network_input,
    network_mask,
    normalized,
    padding_color,
)
from unet_ray.pixels.resampling import resample

RESIZES = ("nearest", "bilinear", "bilinear-antialias", "area", "area-dct")
DCT = Preprocessing(resize="area-dct")


def picture(height, width):
    """Smooth, so that JPEG changes little."""
    small = np.random.default_rng(3).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


# --- options ---


def test_the_defaults_are_those_of_the_first_model_folders():
    frame = picture(33, 49)
    picture_hwC = network_input(frame, (16, 32), Preprocessing())
    np.testing.assert_array_equal(picture_hwC, images.resize_nearest(frame, 16, 32))
    np.testing.assert_array_equal(
        normalized(picture_hwC, Preprocessing()), picture_hwC.astype(np.float32) * np.float32(1 / 255)
    )


def test_options_survive_json():
    options = Preprocessing(resize="area", fit="pad", mean=(123, 116.5, 103), std=(58.5, 57, 57.25), channels="BGR")
    document = json.loads(json.dumps(options.to_dict()))
    assert Preprocessing.from_dict(document) == options
    assert document["mean"] == [123.0, 116.5, 103.0] and json.dumps(document["mean"]) == "[123.0, 116.5, 103.0]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize": "cubic"}, "resize is 'cubic'; allowed are nearest, bilinear, bilinear-antialias, area, area-dct"),
        ({"fit": None}, "fit is None; allowed are stretch, pad"),
        ({"channels": ["RGB"]}, "channels is ['RGB']; allowed are RGB, BGR"),
        (
            {"std": [0.229, 0.224, 0.225]},
            "std is (0.229, 0.224, 0.225); allowed are three numbers from 1 to 255"
            " (those of a network that takes values from 0 to 1, times 255)",
        ),
        ({"mean": [0, 0, float("nan")]}, "mean is (0, 0, nan); allowed are three numbers from 0 to 255"),
        ({"mean": [0, 0]}, "mean is (0, 0); allowed are three"),
        ({"mean": 0.5}, "mean is 0.5; allowed are three"),
        ({"mean": [True, 0, 0]}, "mean is (True, 0, 0); allowed are three"),
        ({"size": 3}, "preprocessing has the keys resize, fit, mean, std, channels, size; it needs resize, fit, mean,"),
    ],
)
def test_what_is_not_allowed_is_one_line(change, message):
    with pytest.raises(ValueError) as caught:
        Preprocessing.from_dict({**Preprocessing().to_dict(), **change})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [{}, {"resize": "area"}, [], None])
def test_a_document_needs_every_key(document):
    with pytest.raises(ValueError, match="it needs resize, fit, mean, std, channels"):
        Preprocessing.from_dict(document)


def test_colours_are_normalised_in_the_networks_order():
    options = Preprocessing(mean=(10, 20, 30), std=(2, 4, 5), channels="BGR")
    blue_first = normalized(np.array([[35, 28, 12]], np.uint8), options)
    assert blue_first.dtype == np.float32
    np.testing.assert_allclose(blue_first, [[1, 2, 1]], rtol=1e-6)


# --- fitting ---


@pytest.mark.parametrize(
    ("frame_size", "size", "box"),
    [
        ((1280, 1920), (96, 128), (0, 0, 85, 128)),  # 85.33 rows
        ((1920, 1280), (96, 128), (0, 0, 96, 64)),
        ((30, 40), (96, 128), (0, 0, 96, 128)),  # enlarged
        ((10, 40), (96, 128), (0, 0, 32, 128)),
        ((5, 4), (10, 16), (0, 0, 10, 8)),
        ((1000, 3), (96, 128), (0, 0, 96, 1)),  # never empty
        ((2, 4), (96, 5), (0, 0, 3, 5)),  # 2.5 rows: halves up
    ],
)
def test_a_padded_frame_keeps_its_aspect_ratio(frame_size, size, box):
    assert frame_box(frame_size, size, Preprocessing(fit="pad")) == box
    assert frame_box(frame_size, size, Preprocessing()) == (0, 0, *size)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("frame_size", [(36, 80), (80, 36), (7, 9), (24, 32)])
def test_padding_is_the_means_colour_below_and_at_the_right(resize, frame_size):
    options = Preprocessing(resize=resize, fit="pad", mean=(103.5, 116.28, 123.675), channels="BGR")
    frame, size = picture(*frame_size), (24, 32)
    padded = network_input(frame, size, options)
    _, _, h, w = frame_box(frame_size, size, options)
    stretched = Preprocessing(resize=resize)
    np.testing.assert_array_equal(padded[:h, :w], network_input(frame, (h, w), stretched))
    assert padding_color(options).tolist() == [124, 116, 104]
    beside = np.concatenate([padded[h:].reshape(-1, 3), padded[:, w:].reshape(-1, 3)])
    assert (beside == padding_color(options)).all() and padded.shape == (*size, 3) and padded.dtype == np.uint8
    assert np.abs(normalized(padded, options)[h:]).max(initial=0) < 0.51 / 255


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("resize", RESIZES)
def test_a_mask_lies_where_its_frame_lies(fit, resize):
    options = Preprocessing(resize=resize, fit=fit)
    mask = np.zeros((40, 96), np.uint8)
    mask[:24, 36:] = 1  # edges that fall between pixels of the network's, at 24 x 32 as at 24 x 48
    frame = (mask * np.uint8(255))[..., None].repeat(3, axis=2)
    small = network_mask(mask, (24, 32), options)
    shows_frame = small != IGNORED_ID
    top, left, h, w = frame_box((40, 96), (24, 32), options)
    assert shows_frame[top : top + h, left : left + w].all() and shows_frame.sum() == h * w
    seen = network_input(frame, (24, 32), options)[..., 0]
    is_clear = shows_frame & ((seen < 100) | (seen > 155))
    assert is_clear[shows_frame].mean() > 0.9
    np.testing.assert_array_equal((seen > 127)[is_clear], small[is_clear] == 1)


def test_a_mask_is_filled_with_what_is_ignored_and_gains_no_other_id():
    mask = np.full((10, 40), 7, np.uint8)
    small = network_mask(mask, (24, 32), Preprocessing(fit="pad", resize="area"), fill=254)
    assert (small[:8] == 7).all() and (small[8:] == 254).all()
    np.testing.assert_array_equal(network_mask(mask, (5, 9), Preprocessing()), images.resize_nearest(mask, 5, 9))


# --- reading ---


@pytest.mark.parametrize(
    ("frame_size", "size", "divisor"),
    [
        ((1280, 1920), (96, 128), 8),
        ((900, 1600), (113, 200), 8),  # 112.5 rows are 113
        ((900, 1600), (114, 200), 4),
        ((480, 640), (96, 128), 4),
        ((480, 640), (120, 161), 2),
        ((480, 640), (241, 1), 1),
        ((96, 128), (96, 128), 1),
        ((20, 30), (96, 128), 1),
    ],
)
def test_a_jpeg_is_read_at_the_smallest_scale_that_suffices(frame_size, size, divisor):
    assert dct_divisor(frame_size, size, DCT) == divisor


def test_a_padded_jpeg_need_only_be_as_large_as_its_box():
    padded = Preprocessing(resize="area-dct", fit="pad")
    assert (dct_divisor((640, 1600), (128, 96), DCT), dct_divisor((640, 1600), (128, 96), padded)) == (4, 8)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}], ids=["4:2:0", "4:4:4", "progressive"]
)
@pytest.mark.parametrize(("size", "divisor"), [((12, 20), 8), ((25, 40), 4), ((50, 41), 2)])
def test_a_reduced_jpeg_is_what_pillow_decodes_by_area_weights_of_the_frame(size, divisor, options):
    data = encoded(picture(101, 163), **options)
    draft = Image.open(io.BytesIO(data))
    draft.draft(None, (163 // divisor, 101 // divisor))
    reduced = np.asarray(draft)
    assert reduced.shape == (-(-101 // divisor), -(-163 // divisor), 3)
    frame = reduced.repeat(divisor, axis=0).repeat(divisor, axis=1)[:101, :163]
    picture_hwC, frame_size = decode_input(data, size, DCT)
    assert frame_size == (101, 163)
    np.testing.assert_array_equal(picture_hwC, resample(frame, size, "area"))
    whole = decode_input(data, size, Preprocessing(resize="area"))[0].astype(int)
    assert 0 < np.abs(picture_hwC - whole).mean() < 8  # levels; the sharp edges of a tiny picture


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 7, 8, 9, 17])
def test_small_jpegs_are_read_at_the_scale_that_was_meant(side):
    data = encoded(picture(side, 1), subsampling=0)
    for divisor in (2, 4, 8):
        frame = images.decode_reduced_frame(data, lambda _, divisor=divisor: divisor)
        assert frame.divisor == (divisor if side >= 8 else 1)
        assert frame.pixels.shape == (-(-side // frame.divisor), 1, 3) and frame.frame_size == (side, 1)


def test_a_grey_jpeg_is_reduced_too():
    data = encoded(picture(80, 64)[..., 1])
    picture_hwC, _ = decode_input(data, (10, 8), DCT)
    reduced = simplejpeg.decode_jpeg(data, "GRAY", min_height=10, min_width=8)
    np.testing.assert_array_equal(picture_hwC, reduced.repeat(3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "WEBP"])
def test_other_files_are_read_whole(file_format):
    frame = picture(80, 64)
    data = encoded(frame, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    np.testing.assert_array_equal(decode_input(data, (9, 7), DCT)[0], resample(frame, (9, 7), "area"))


@pytest.mark.parametrize("resize", RESIZES)
def test_bytes_and_arrays_give_one_picture(resize):
    frame, options = picture(60, 83), Preprocessing(resize=resize, fit="pad")
    from_bytes, frame_size = decode_input(encoded(frame, "PNG"), (24, 32), options)
    np.testing.assert_array_equal(from_bytes, network_input(frame, (24, 32), options))
    assert frame_size == (60, 83)


def damaged(data):
    """One JPEG in ways that cameras and disks know; of some, libjpeg only warns."""
    rng = np.random.default_rng(5)
    scan = data.index(b"\xff\xda") + 14
    yield from (data[:at] for at in (0, 1, 30, scan, scan + 5, len(data) // 2, len(data) - 3, len(data) - 2))
    yield data[:-2] + bytes(10) + data[-2:]  # a few bytes too many: a whole frame
    yield data[:-2] + bytes(99) + data[-2:]
    for at in rng.integers(2, len(data), 60):
        yield data[:at] + rng.bytes(1) + data[at + 1 :]
    for at in rng.integers(scan, len(data), 20):
        yield data[:at] + data[at + 5 :]


def verdict(read):
    try:
        read()
    except images.ImageRefused as refusal:
        return refusal.reason, refusal.detail
    return None


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=["baseline", "progressive", "restarts"]
)
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_a_frame_is_refused_at_every_scale_or_at_none(divisor, options):
    frames = [encoded(picture(72, 56), quality=85, **options), encoded(picture(72, 56)[..., 0], **options)]
    verdicts = []
    for data in (variant for frame in frames for variant in damaged(frame)):
        verdicts.append(verdict(lambda data=data: images.decode_frame(data)))
        assert verdict(lambda data=data: images.decode_reduced_frame(data, lambda _: divisor)) == verdicts[-1]
    reasons = {refusal and refusal[0] for refusal in verdicts}
    assert {None, "truncated", "not_an_image"} <= reasons


def test_a_jpeg_of_which_libjpeg_only_warns_is_read_whole():
    data = encoded(picture(72, 56))
    data = data[:-2] + bytes(10) + data[-2:]
    frame = images.decode_reduced_frame(data, lambda _: 8)
    assert frame.divisor == 1
    np.testing.assert_array_equal(frame.pixels, images.decode_frame(data))


def test_a_frame_with_too_many_pixels_is_refused_before_it_is_reduced():
    data = encoded(picture(72, 56))
    expected = verdict(lambda: images.decode_frame(data, max_pixels=4000))
    assert expected is not None and expected[0] == "too_large"
    assert verdict(lambda: decode_input(data, (9, 7), DCT, max_pixels=4000)) == expected
