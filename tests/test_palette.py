"""Colours of classes that were given none: how far apart they are, for readers of three kinds."""

from __future__ import annotations

import numpy as np
import pytest

from unet_ray import palette
from unet_ray.classes import MAX_CLASSES
from unet_ray.palette import PALETTE, ciede2000, color_distances, free_colors

# Of table 1 of Sharma, Wu and Dalal (2005), which has what implementations get wrong.
SHARMA = [
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.49, -0.0010), (50.0, -2.49, 0.0009), 7.1792),
    ((50.0, 2.49, -0.0010), (50.0, -2.49, 0.0011), 7.2195),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (61.0, -5.0, 29.0), 22.8977),
    ((50.0, 2.5, 0.0), (56.0, -27.0, -3.0), 31.9030),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


@pytest.mark.parametrize(("first", "second", "distance"), SHARMA)
def test_distances_are_those_of_the_papers_table(first, second, distance):
    for one, other in ((first, second), (second, first)):
        assert float(ciede2000(np.array(one), np.array(other))) == pytest.approx(distance, abs=1e-4)


def test_a_colour_blind_reader_takes_some_colours_for_each_other():
    red, green, blue = np.array([[220, 20, 60]]), np.array([[107, 142, 35]]), np.array([[40, 60, 200]])
    normal, deuteranope, protanope = (
        float(ciede2000(one[0], other[0])) for one, other in zip(palette._seen(red), palette._seen(green), strict=True)
    )
    assert normal > 60 and protanope > 20 and deuteranope < 4  # Cityscapes' person and vegetation
    assert float(color_distances(red, green)[0, 0]) == deuteranope
    assert float(color_distances(red, blue)[0, 0]) > 30
    grey = palette._seen(np.array([[0, 0, 0], [128, 128, 128], [255, 255, 255]]))
    np.testing.assert_allclose(grey[..., 1:], 0, atol=0.05)  # greys are grey to everybody
    np.testing.assert_allclose(grey[..., 0], [[0, 53.585, 100]] * 3, atol=0.01)


@pytest.mark.parametrize(("n_colors", "least"), [(2, 50.0), (7, 11.5), (12, 11.5), (23, 9.3), (40, 6.7), (254, 2.1)])
def test_the_first_colours_are_far_apart_for_each_reader(n_colors, least):
    colors = np.array(PALETTE[:n_colors])
    distances = color_distances(colors, colors)
    distances[np.diag_indices(n_colors)] = np.inf
    assert least < distances.min() < least + 5


def test_there_is_one_for_each_of_the_most_classes_and_none_is_black_or_white():
    assert len(PALETTE) == len(set(PALETTE)) == MAX_CLASSES
    assert color_distances(np.array(PALETTE), np.array([[0, 0, 0], [255, 255, 255]])).min() > 2


def test_each_of_the_first_is_the_farthest_of_the_grid_from_those_before_it():
    levels = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    lab = palette._seen(grid)[0]
    vivid = (lab[:, 0] >= 28) & (lab[:, 0] <= 88) & (np.hypot(lab[:, 1], lab[:, 2]) >= 30)
    grid = grid[vivid]
    near = color_distances(grid, np.array([(0, 0, 0), (255, 255, 255), *PALETTE[:7]])).min(axis=1)
    for color in PALETTE[7:32]:
        (index,) = np.flatnonzero((grid == color).all(axis=1))
        assert near[index] >= near.max() - 1e-3
        near = np.minimum(near, color_distances(grid, np.array([color]))[:, 0])


def test_free_colours_are_far_from_those_that_are_given():
    given = [(230, 160, 0), (0, 100, 180), (0, 0, 0)]  # near the palette's orange and blue
    free = free_colors(9, given)
    assert color_distances(np.array(free), np.array(given)).min() > 10
    assert free == [color for color in PALETTE[:20] if color in free] and PALETTE[0] not in free
    assert free_colors(3) == list(PALETTE[:3])
    every = free_colors(200, given)
    assert len(set(every)) == 200 and every[-1] in PALETTE[200:]


def test_colours_that_are_taken_are_not_given_again():
    taken = list(PALETTE[:250])
    assert free_colors(4, taken) == list(PALETTE[250:])
    with pytest.raises(ValueError) as caught:
        free_colors(5, taken)
    assert str(caught.value) == "5 classes have no colour, and 4 colours are free; give some of them one"
