from __future__ import annotations

import numpy as np

from unet_ray.preview import choose_rows


def test_every_drive_is_shown_and_both_ends_of_confidence():
    drives = np.repeat([0, 1, 2], [10, 20, 5])
    confidence = np.linspace(0, 1, 35)
    confidence[3] = np.nan
    chosen = choose_rows(drives, confidence)
    assert len(chosen) == len(set(chosen)) == 12 and 3 not in chosen
    assert np.bincount(drives[chosen]).tolist() == [4, 4, 4]
    assert {0, 9} <= set(chosen)  # the least and the most confident of the first drive


def test_of_many_drives_a_dozen_are_shown_spread_over_all():
    chosen = choose_rows(np.arange(100), np.full(100, 0.5))
    assert chosen == [i * 100 // 12 for i in range(12)]


def test_fewer_frames_than_places_are_shown_once_each():
    assert choose_rows(np.zeros(3, int), np.array([0.2, np.nan, 0.9])) == [0, 2]
    assert choose_rows(np.zeros(2, int), np.array([np.nan, np.nan])) == []
