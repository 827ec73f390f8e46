"""Colours for classes that were given none: a fixed table, in an order in which neighbours are told apart.

Distances are CIEDE2000 (Sharma, Wu, Dalal 2005), in which about 2 is a difference that an eye just notices. The
distance of two colours is the least of three readers': one with normal vision, a deuteranope and a protanope, whose
sight is simulated by the matrices of Machado, Oliveira and Fernandes (2009, severity 1, on linear RGB).

Shapes: `N`, `M` colours; colours are sRGB, uint8 [N, 3].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unet_ray.classes import Color

_OKABE_ITO = "e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7"
"""Okabe and Ito (2008), "Color Universal Design", without black, which is no class in pictures."""
_OTHERS = """
    810 735 ada 31c c04 38f 175 2ef 717 957 e78 f9b 0dc 803 ea7 70f 940 0b9 c1a 995 ed8 e7c 937 843 b68 0fd 099 d46
    185 092 c5d 8ee 625 eb5 9fc 639 7cf a4c 365 279 998 f64 088 a50 8cd 0c9 068 afa 2af 846 476 89b 164 242 d97 ccb
    143 abb 519 967 dc0 344 274 93f 97b 802 5ba c77 086 e60 e95 340 63c e09 f89 d05 724 e8a ee7 6bd bd9 557 9c8 b58
    f57 ebc 636 40e 7b5 39f fdd 0cb a2d 066 c63 dc7 932 d9c 899 948 49a 163 533 8ce f9a 952 dd6 9fb 57a 38d 489 765
    a94 26d 902 7fe 047 3a8 3aa 89d cdc 763 7bf 9a9 43b add 5bb 1c0 3b8 99c 494 583 d16 055 87c eac 9eb 876 f4f cef
    dee bed 5a6 548 fae 7ca 992 f29 d02 16a 9ea 962 454 db6 ecf ea3 b21 459 c2b ca6 626 76f b16 03a 084 34a bc9 d44
    d9e b7c e2b af9 538 097 e37 ab8 985 c86 7ec 3f3 47b 875 a56 98e b04 8d8 914 50b 7ab 8c7 64c d7d 9c4 ae9 714 4a3
    a16 698 44b 62d c5c d9d b0e f75 911 477 c37 a23 d2e c08 d24 aa7 4d9 d0d 87a f9f 00d 8cb bca d6e 889 8f5 987 f22
    6dd 52c 6de 070 ad3 d8e 2da 528 5ff 073 939 c83 bcc a97 825 52e 88b a43 dc6 e76 721 60a ee8
"""
"""Each is the colour of a grid (steps of 17) that is farthest from black, white and all before it: the first 25 of
lightness 28 to 88 and a chroma of at least 30, the others of lightness 25 to 93. A digit stands for two: `812` is
`881122`. A table, since colours are part of a model's digest: no machine's rounding may change them."""

_TWO_DIGITS = " ".join("".join(2 * digit for digit in code) for code in _OTHERS.split())
PALETTE: tuple[Color, ...] = tuple(
    (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)) for code in f"{_OKABE_ITO} {_TWO_DIGITS}".split()
)
"""As many as there can be classes. Least distances: 11.6 of the first 12, 9.4 of 23, 2.2 of all 254."""

_FAR = (10.0, 7.0, 5.0, 3.0, 1.5)
"""Least distances of a colour that is chosen to those that are given, from what is best to what must do."""

_READERS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ]
)
"""What each of the readers sees of linear RGB: normal vision, deuteranopia, protanopia."""
_XYZ_OF_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE_XYZ = np.array([0.95047, 1.0, 1.08883])
"""D65, as sRGB has it (IEC 61966-2-1)."""


def free_colors(n_colors: int, taken: Sequence[Color] = ()) -> list[Color]:
    """Returns colours that no other class has, in the palette's order: those far from the taken ones first.

    Args:
        n_colors: how many.
        taken: colours that are given, of other classes or of what is ignored.

    Raises:
        ValueError: so many are taken that the palette has not enough others.
    """
    free = [color for color in PALETTE if color not in set(taken)]
    if n_colors > len(free):
        raise ValueError(f"{n_colors} classes have no colour, and {len(free)} colours are free; give some of them one")
    near_N = np.full(len(free), np.inf)
    if taken:
        near_N = color_distances(np.array(free), np.array(taken)).min(axis=1)
    for least in _FAR:
        far = [color for color, near in zip(free, near_N, strict=True) if near > least]
        if len(far) >= n_colors:
            return far[:n_colors]
    return free[:n_colors]


def color_distances(first_N3: np.ndarray, second_M3: np.ndarray) -> np.ndarray:
    """Returns the distances of colours for the reader who sees them nearest, float64 [N, M]."""
    pairs = zip(_seen(first_N3), _seen(second_M3), strict=True)
    return np.min([ciede2000(first_N3[:, None], second_M3[None]) for first_N3, second_M3 in pairs], axis=0)


def _seen(colors_N3: np.ndarray) -> np.ndarray:
    """Colours as each of the readers sees them, CIELAB, float64 [3, N, 3]."""
    parts = np.asarray(colors_N3, np.float64) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ _READERS.transpose(0, 2, 1), 0, 1) @ _XYZ_OF_RGB.T / _WHITE_XYZ
    x, y, z = np.moveaxis(np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the difference of CIELAB colours, [..., 3] each, by the formula of Sharma, Wu and Dalal (2005)."""
    (L1, a1, b1), (L2, a2, b2) = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    mean_chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * _saturation(mean_chroma)
    C1, C2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    has_hue = C1 * C2 > 0
    turn = np.where(has_hue, (h2 - h1 + 180) % 360 - 180, 0)
    hue = np.where(has_hue, h1 + turn / 2, h1 + h2) % 360
    L, C = (L1 + L2) / 2, (C1 + C2) / 2
    weight = 1 - 0.17 * _cos(hue - 30) + 0.24 * _cos(2 * hue) + 0.32 * _cos(3 * hue + 6) - 0.20 * _cos(4 * hue - 63)
    lightness = (L2 - L1) / (1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2))
    chroma = (C2 - C1) / (1 + 0.045 * C)
    arc = 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn) / 2) / (1 + 0.015 * C * weight)
    blue = np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    rotation = -2 * _saturation(C) * blue * chroma * arc
    return np.sqrt(np.maximum(lightness**2 + chroma**2 + arc**2 + rotation, 0))


def _saturation(chroma: np.ndarray) -> np.ndarray:
    return np.sqrt(chroma**7 / (chroma**7 + 25.0**7))


def _cos(degrees: np.ndarray) -> np.ndarray:
    return np.cos(np.radians(degrees))
