"""The street of a synthetic drive: its course, its light and materials, and what stands and moves along it.

All of it follows from (seed, drive, block of road), so that any frame can be drawn anywhere, in any order. Lengths are
metres, times seconds. World coordinates: s along the road, x across it (0 is the middle, right is positive), y up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

Color = tuple[int, int, int]

SIGHT_M = 112.0
"""Where the row of trees on the horizon begins."""
TILE_PX = 128
GRAIN, LEAVES, BRICKS, PAVING, CLOUDS = range(5)
"""The textures of a drive, by their place in `Drive.tiles`."""
SIGN_FACES: tuple[tuple[Color, Color, int], ...] = (
    ((204, 18, 26), (244, 244, 240), 20), ((204, 18, 26), (244, 244, 240), 3), ((240, 240, 240), (24, 84, 196), 4),
    ((240, 240, 240), (200, 16, 24), 8),
)  # fmt: skip
"""Rim, face and number of corners of each kind of traffic sign."""

_CELL_M = 8.0  # the street is laid out, and painted from far to near, in cells of this length
_BLOCK_CELLS = 5  # each block of road holds every kind of thing, so every drive shows every class
# What is farther is left out: nothing may be thinner than about one pixel of a 96x128 frame.
_SIGHT_BY_KIND_M = {
    "building": SIGHT_M, "tree": 90.0, "wall": 75.0, "fence": 65.0, "bush": 60.0, "car": 70.0,
    "pedestrian": 25.0, "lamp": 32.0, "sign": 32.0, "light": 42.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mood:
    """A time of day: colours of the sky, what the light multiplies, how much haze a metre adds."""

    zenith: Color
    horizon: Color
    light: tuple[float, float, float]
    haze_per_m: float
    lit_windows: float


_MOODS = (
    Mood(zenith=(64, 126, 212), horizon=(186, 212, 238), light=(1.06, 1.05, 1.0), haze_per_m=0.0016, lit_windows=0.0),
    Mood(zenith=(158, 168, 182), horizon=(204, 208, 214), light=(0.8, 0.83, 0.88), haze_per_m=0.003, lit_windows=0.1),
    Mood(zenith=(112, 158, 212), horizon=(250, 216, 176), light=(1.08, 0.94, 0.8), haze_per_m=0.003, lit_windows=0.05),
    Mood(zenith=(78, 84, 140), horizon=(232, 156, 124), light=(0.68, 0.6, 0.64), haze_per_m=0.003, lit_windows=0.5),
    Mood(zenith=(186, 192, 198), horizon=(212, 215, 218), light=(0.86, 0.88, 0.9), haze_per_m=0.011, lit_windows=0.15),
)
_FACADES: tuple[Color, ...] = (
    (214, 190, 146), (216, 168, 136), (222, 212, 190), (186, 172, 156), (206, 178, 116), (176, 188, 190),
    (190, 184, 178),
)  # fmt: skip
_CAR_COLORS: tuple[Color, ...] = (
    (176, 28, 32), (24, 62, 150), (232, 232, 234), (28, 30, 36), (206, 158, 22), (18, 116, 122), (120, 126, 136),
)  # fmt: skip
_CLOTHES: tuple[Color, ...] = ((244, 70, 44), (250, 138, 30), (236, 60, 140), (250, 110, 100), (206, 60, 196))


@dataclass(frozen=True, kw_only=True)
class Drive:
    """What stays the same through one drive: the road's course, the camera, the light and the materials."""

    seed: int
    number: int
    waves: tuple[tuple[float, float, float], ...]  # amplitude, wavelength, phase of the road's course
    lane_m: float
    sidewalk_m: float
    speed_m_s: float
    frame_s: float
    start_m: float
    camera_m: float
    focal: float  # in widths of the picture
    horizon: float  # in heights of the picture
    mood: Mood
    sun: float  # -1: the left faces of things are lit, 1: the right ones
    noise: float
    storeys: tuple[int, int]
    gables: bool
    facades: tuple[Color, ...]
    grass: Color
    leaves: Color
    asphalt: int
    paving: Color
    line: Color
    brick: Color
    fence: Color
    tiles: np.ndarray  # int8 [5, 128, 128]

    @property
    def kerb_m(self) -> float:
        """Half the road's width: a lane and a strip for parked cars."""
        return self.lane_m + 2.3

    def course(self, s: float) -> float:
        """How far the middle of the road has swung to the right at `s`."""
        return sum(a * math.sin(s * 2 * math.pi / length + phase) for a, length, phase in self.waves)

    def slope(self, s: float) -> float:
        """The derivative of `course`."""
        turns = ((a, 2 * math.pi / length, phase) for a, length, phase in self.waves)
        return sum(a * w * math.cos(s * w + phase) for a, w, phase in turns)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that stands or moves in the street; (s, x) is its corner next to the car and to the road."""

    kind: str
    s: float
    x: float
    length: float = 0.0
    depth: float = 0.0
    height: float = 0.0
    color: Color = (0, 0, 0)
    variant: int = 0
    pace: float = 0.0  # m/s, of those that move


def random_generator(*key: int) -> np.random.Generator:
    """Returns the source of all that is drawn by lot for `key`: whole numbers, not negative."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _shift(rng: np.random.Generator, color: Color, spread: int) -> Color:
    """The colour, somewhat lighter or darker and a little to one side."""
    common = int(rng.integers(-spread, spread + 1))
    r, g, b = (min(255, max(0, c + common + int(rng.integers(-spread // 3, spread // 3 + 1)))) for c in color)
    return r, g, b


def _smooth(noise: np.ndarray, reach: int) -> np.ndarray:
    """Box-blurs a tile that repeats in both directions, in whole numbers: the same on every machine."""
    for axis in (0, 1):
        shifted = [np.roll(noise, step, axis) for step in range(-reach, reach + 1)]
        noise = np.sum(shifted, axis=0) // len(shifted)
    return noise


def _tiles(rng: np.random.Generator) -> np.ndarray:
    """The drive's textures: int8 [5, 128, 128], each repeating and about -100 to 100."""
    noise = rng.integers(-4096, 4097, (TILE_PX, TILE_PX))
    leaves = _smooth(noise, 2) * 3 + _smooth(noise, 5) * 5
    clouds = _smooth(_smooth(noise, 10), 10)
    rows, columns = np.indices((TILE_PX, TILE_PX))
    brick_of = (rows // 16) * 8 + ((columns + (rows // 16 % 2) * 16) // 32) % 4
    mortar = (rows % 16 < 2) | ((columns + (rows // 16 % 2) * 16) % 32 < 2)
    bricks = np.where(mortar, 90, rng.integers(-70, 30, 64)[brick_of])
    joints = (rows % 32 < 2) | (columns % 32 < 2)
    paving = np.where(joints, -100, rng.integers(-30, 40, 16)[rows // 32 * 4 + columns // 32])
    scaled = [noise // 3 + _smooth(noise, 1), leaves, clouds * (4096 // max(1, int(np.abs(clouds).max())))]
    grain, leaves, clouds = (np.clip(tile // 32, -110, 110) for tile in scaled)
    return np.stack([grain, leaves, bricks, paving, clouds]).astype(np.int8)


@lru_cache(maxsize=32)
def lay_out_drive(seed: int, number: int) -> Drive:
    """Returns one drive of the log of `seed`."""
    rng = random_generator(seed, number, 0)
    pick = rng.uniform
    base = _MOODS[(number + seed) % len(_MOODS)]  # neighbouring drives never share a time of day
    light = base.light[0] * pick(0.92, 1.08), base.light[1] * pick(0.95, 1.05), base.light[2] * pick(0.92, 1.08)
    mood = Mood(
        zenith=_shift(rng, base.zenith, 15), horizon=_shift(rng, base.horizon, 9), light=light,
        haze_per_m=base.haze_per_m * pick(0.7, 1.3), lit_windows=base.lit_windows,
    )  # fmt: skip
    low = int(rng.integers(1, 4))
    return Drive(
        seed=seed, number=number, mood=mood, tiles=_tiles(rng), sun=float(rng.choice((-1.0, 1.0)) * pick(0.5, 1.0)),
        waves=((pick(2, 7), pick(260, 420), pick(0, 6.28)), (pick(0.5, 1.6), pick(110, 160), pick(0, 6.28))),
        lane_m=pick(3.3, 3.9), sidewalk_m=pick(2.4, 3.2), speed_m_s=pick(9, 13), frame_s=0.125, start_m=pick(0, 40),
        camera_m=pick(1.55, 1.95), focal=pick(0.72, 0.86), horizon=pick(0.42, 0.5), noise=pick(1.0, 7.0),
        storeys=(low, low + 2), gables=bool(low < 3 and rng.random() < 0.75),
        facades=tuple(_shift(rng, _FACADES[i], 14) for i in rng.permutation(len(_FACADES))[:4]),
        grass=_shift(rng, [(140, 172, 70), (160, 172, 76), (122, 164, 66)][int(rng.integers(3))], 10),
        leaves=_shift(rng, [(50, 100, 40), (70, 104, 34), (38, 94, 52)][int(rng.integers(3))], 9),
        asphalt=int(rng.integers(74, 104)), paving=_shift(rng, (172, 160, 156), 14),
        line=[(238, 238, 232), (240, 240, 236), (240, 200, 60)][int(rng.integers(3))],
        brick=_shift(rng, (148, 46, 38), 10), fence=_shift(rng, (166, 106, 44), 10),
    )  # fmt: skip


@lru_cache(maxsize=512)
def _block(seed: int, number: int, block: int) -> tuple[Thing, ...]:
    """What stands along one block of road, both sides; every kind of thing is among it."""
    drive, rng = lay_out_drive(seed, number), random_generator(seed, number, 1, block)
    things: list[Thing] = []
    for side in (-1, 1):
        lots = rng.permutation(["house", "yard", "garden", "green", "yard" if rng.random() < 0.5 else "house"])
        for cell, lot in enumerate(lots):
            things += _lot(drive, rng, str(lot), side, (block * _BLOCK_CELLS + cell) * _CELL_M)
        things += _kerbside(drive, rng, side, block * _BLOCK_CELLS * _CELL_M)
    return tuple(things)


def _lot(drive: Drive, rng: np.random.Generator, lot: str, side: int, s: float) -> Iterator[Thing]:
    """One cell behind the sidewalk: a house, a walled yard, a fenced garden or a green with trees."""
    edge = drive.kerb_m + drive.sidewalk_m
    if lot != "green":
        storeys = int(rng.integers(drive.storeys[0], drive.storeys[1] + 1))
        color = _shift(rng, drive.facades[int(rng.integers(len(drive.facades)))], 8)
        setback = edge + (2.8 if lot == "house" else 7.5)
        yield Thing(
            kind="building",
            s=s + 0.4,
            x=side * setback,
            length=_CELL_M - 0.8,
            depth=rng.uniform(7, 10),
            height=3.0 * storeys + 0.8,
            color=color,
            variant=int(rng.integers(1 << 20)),
        )
    if lot == "yard":
        yield Thing(kind="wall", s=s, x=side * (edge + 2.2), length=_CELL_M, depth=0.4, height=2.6, color=drive.brick)
    if lot in ("garden", "green"):
        yield Thing(kind="fence", s=s, x=side * (edge + 2.2), length=_CELL_M, height=1.5, color=drive.fence)
    trees = {"green": ((1.5, 4.0), (5.0, 7.0)), "garden": ((4.0, 4.6),), "yard": ((4.0, 4.6),)}.get(lot, ())
    for along, out in trees:
        yield Thing(
            kind="tree",
            s=s + along + rng.uniform(0, 1.5),
            x=side * (edge + out),
            height=rng.uniform(4.8, 7.5),
            color=_shift(rng, drive.leaves, 9),
            variant=int(rng.integers(1 << 20)),
        )
    if lot in ("yard", "house"):
        yield Thing(
            kind="bush",
            s=s + rng.uniform(1, 7),
            x=side * (edge + 1.3),
            height=rng.uniform(0.8, 1.2),
            color=_shift(rng, drive.leaves, 9),
            variant=int(rng.integers(1 << 20)),
        )


def _kerbside(drive: Drive, rng: np.random.Generator, side: int, s: float) -> Iterator[Thing]:
    """What one side of a block has on the sidewalk and in the parking strip."""
    post, gap = side * (drive.kerb_m + 0.5), _CELL_M
    places = rng.permutation(_BLOCK_CELLS) * gap + s
    yield Thing(kind="light", s=places[0] + 1.5, x=post, height=5.6, variant=int(rng.integers(3)))
    yield Thing(kind="lamp", s=places[1] + 4.0, x=post, height=6.4)
    yield Thing(kind="lamp", s=places[2] + 4.0, x=post, height=6.4)
    for position in places[3:]:
        face = int(rng.integers(len(SIGN_FACES)))
        yield Thing(kind="sign", s=position + rng.uniform(1, 5), x=post, height=rng.uniform(2.5, 3.0), variant=face)
    for position in rng.permutation(_BLOCK_CELLS) * gap + s:
        walk = side * (drive.kerb_m + rng.uniform(1.0, drive.sidewalk_m - 0.6))
        yield Thing(
            kind="pedestrian",
            s=position + rng.uniform(0, gap),
            x=walk,
            height=rng.uniform(1.75, 2.05),
            pace=rng.uniform(0.7, 1.5),
            color=_CLOTHES[int(rng.integers(len(_CLOTHES)))],
            variant=int(rng.integers(64)),
        )
    for position in rng.permutation(_BLOCK_CELLS)[: int(rng.integers(1, 3))] * gap + s:
        yield _car(rng, float(position + rng.uniform(0.5, 3.0)), side * (drive.kerb_m - 1.2))


def _car(rng: np.random.Generator, s: float, x: float) -> Thing:
    van = rng.random() < 0.25
    return Thing(
        kind="car",
        s=s,
        x=x,
        length=4.9 if van else rng.uniform(4.0, 4.5),
        depth=1.85,
        variant=int(van),
        height=rng.uniform(2.0, 2.3) if van else rng.uniform(1.42, 1.6),
        pace=-1.0 if x < 0 else 1.0,
        color=_CAR_COLORS[int(rng.integers(len(_CAR_COLORS)))],
    )


def _traffic(drive: Drive, camera_s: float, time_s: float) -> Iterator[Thing]:
    """The cars that move: one ahead in the car's own lane, and those that come towards it."""
    rng = random_generator(drive.seed, drive.number, 2)
    gap = rng.uniform(15, 24) + 4 * math.sin(0.3 * time_s + rng.uniform(0, 6.28))
    yield _car(rng, camera_s + gap, drive.lane_m / 2)
    pace, spacing = rng.uniform(6, 10), rng.uniform(34, 48)
    first = int((camera_s + pace * time_s) // spacing)
    for number in range(first, first + int(SIGHT_M // spacing) + 2):
        own = random_generator(drive.seed, drive.number, 3, number)
        yield _car(own, (number + own.uniform(0, 0.5)) * spacing - pace * time_s, -drive.lane_m / 2)


def things_in_sight(drive: Drive, s: float, time_s: float) -> list[Thing]:
    """What is ahead of a camera at `s`, in the order to paint it.

    From far to near by cells; within a cell from the houses to the road, since what is farther out is never in front.
    """
    block_m = _CELL_M * _BLOCK_CELLS
    things = list(_traffic(drive, s, time_s))
    for block in range(max(0, int(s // block_m) - 1), int((s + SIGHT_M) // block_m) + 1):
        things += _block(drive.seed, drive.number, block)
    placed = []
    for thing in things:
        if thing.kind == "pedestrian":  # walks to and fro, 5 m each way
            way = (thing.pace * time_s + thing.variant) % 20
            thing = replace(thing, s=thing.s + (way if way < 10 else 20 - way) - 5)
        nearest = 2.0 - thing.length if thing.kind in ("building", "wall", "fence") else 1.5
        if nearest < thing.s - s < _SIGHT_BY_KIND_M[thing.kind]:
            placed.append(thing)
    return sorted(placed, key=lambda thing: (-(thing.s // _CELL_M), -abs(thing.x), -thing.s))
