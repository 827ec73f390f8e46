import io

import numpy as np
import pytest
from PIL import Image

from unet_ray.classes import IGNORED_ID, PRESETS
from unet_ray.pixels.images import decode_frame, decode_mask, read_header
from unet_ray.pixels.mask_png import encode_mask_png

HEIGHT, WIDTH = 33, 49


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_mask_png_holds_ids_and_shows_the_classes_colors(name):
    class_set = PRESETS[name]
    mask = np.random.default_rng(2).integers(0, class_set.n_classes, (HEIGHT, WIDTH)).astype(np.uint8)
    data = encode_mask_png(mask, class_set.palette_K3)
    assert (read_header(data).mode, read_header(data).bits) == ("P", 8)
    np.testing.assert_array_equal(decode_mask(data), mask)
    np.testing.assert_array_equal(decode_frame(data), class_set.colorize(mask))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), class_set.colorize(mask))


def test_a_mask_png_of_two_classes_has_8_bits_and_keeps_ignored_pixels():
    mask = np.array([[0, 1, IGNORED_ID]], np.uint8)
    data = encode_mask_png(mask, np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    assert read_header(data).bits == 8
    assert decode_mask(data).tolist() == mask.tolist()
    assert decode_frame(data).tolist() == [[[1, 2, 3], [4, 5, 6], [0, 0, 0]]]
    assert read_header(encode_mask_png(mask[:, :2], np.zeros((2, 3), np.uint8))).bits == 8


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (129, 257), (1280, 1920)])
@pytest.mark.parametrize("n_classes", [1, 23, 256])
def test_masks_of_any_size_survive(size, n_classes):
    """Blobs, as masks have them, with noise in one corner, which does not compress."""
    blobs = np.random.default_rng(5).integers(0, n_classes, (size[0] // 16 + 1, size[1] // 16 + 1)).astype(np.uint8)
    mask = blobs.repeat(16, axis=0).repeat(16, axis=1)[: size[0], : size[1]]
    mask[:99, :99] = np.random.default_rng(6).integers(0, n_classes, mask[:99, :99].shape)
    data = encode_mask_png(mask, np.zeros((n_classes, 3), np.uint8))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), mask)
    np.testing.assert_array_equal(decode_mask(data), mask)


def test_a_mask_that_is_part_of_another_array_survives():
    array = np.random.default_rng(3).integers(0, 5, (20, 30)).astype(np.uint8)
    for mask in (array[::2, 3:], array.T, array[:, ::-1]):
        np.testing.assert_array_equal(decode_mask(encode_mask_png(mask, np.zeros((5, 3), np.uint8))), mask)


def test_what_is_no_mask_is_refused():
    palette = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a mask is uint8 of shape \(2, 3, 3\), allowed is uint8 \[H, W\]"):
        encode_mask_png(np.zeros((2, 3, 3), np.uint8), palette)
    with pytest.raises(ValueError, match=r"a mask is int64 of shape \(2, 3\), allowed is uint8 \[H, W\]"):
        encode_mask_png(np.zeros((2, 3), np.int64), palette)
    with pytest.raises(ValueError, match=r"a mask is uint8 of shape \(0, 3\), allowed is uint8 \[H, W\]"):
        encode_mask_png(np.zeros((0, 3), np.uint8), palette)
