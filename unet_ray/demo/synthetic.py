"""A driving log drawn by program: frames and masks seen from a moving car, in the layout of the CARLA data set.

A frame of a drive (`street.py`) is painted from far to near as one picture of paint numbers, from which both the frame
and the mask are read: they agree to the pixel. `draw_frame` is a pure function of (seed, drive, index, size).

Shapes: H height px, W width px, C colour (3), P paints used in one frame. Coordinates of the world as in `street.py`:
s along the road, x across it, y up from the ground, in metres; u and v are pixels.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
from PIL import Image, ImageDraw

from unet_ray import storage
from unet_ray.demo import street
from unet_ray.demo.street import BRICKS, CLOUDS, GRAIN, LEAVES, PAVING, Color, Drive, Thing

Point = tuple[float, float]


class Tag(IntEnum):
    """The semantic tags of CARLA 0.9.0 to 0.9.13 that are drawn here (the whole list has 0 to 22)."""

    BUILDING = 1
    FENCE = 2
    PEDESTRIAN = 4
    POLE = 5
    ROAD_LINE = 6
    ROAD = 7
    SIDEWALK = 8
    VEGETATION = 9
    VEHICLE = 10
    WALL = 11
    TRAFFIC_SIGN = 12
    SKY = 13
    TRAFFIC_LIGHT = 18
    TERRAIN = 22


_TEXELS_PER_M = 32.0
_MIN_SIDE_PX = 16
_GROUND = slice(1, 6)  # the paints whose distance and texture follow from the row of the picture
_STEEL: Color = (46, 74, 76)


class _Scene:
    """One frame while it is painted: a camera, a picture of paint numbers, and what each paint is."""

    def __init__(self, drive: Drive, index: int, height_px: int, width_px: int) -> None:
        self.drive, self.height_px, self.width_px = drive, height_px, width_px
        self.index, self.time_s = index, index * drive.frame_s
        self.camera_s = drive.start_m + drive.speed_m_s * self.time_s
        self.camera_x = drive.course(self.camera_s) + drive.lane_m / 2
        yaw = math.atan(drive.slope(self.camera_s + 4.0))
        self.yaw, self.sin, self.cos = yaw, math.sin(yaw), math.cos(yaw)
        self.focal_px = drive.focal * width_px
        bounce = 0.003 * math.sin(9.0 * self.time_s) + 0.002 * math.sin(23.0 * self.time_s)
        self.horizon_px = height_px * (drive.horizon + bounce)
        self.image = Image.new("I", (width_px, height_px), 0)
        self.draw = ImageDraw.Draw(self.image)
        self.paints: list[tuple[float, ...]] = []  # r, g, b, tag, distance, tile, strength, u and v of the texture

    def at(self, s: float, x: float, y: float) -> Point:
        """The pixel (u, v) of a point of the world."""
        ahead, right = s - self.camera_s, self.drive.course(s) + x - self.camera_x
        scale = self.focal_px / max(0.3, ahead * self.cos + right * self.sin)
        u = self.width_px / 2 + (right * self.cos - ahead * self.sin) * scale
        return u, self.horizon_px - (y - self.drive.camera_m) * scale

    def near(self, s: float, x: float) -> float:
        """`s`, or where the world at `x` comes into view if that is farther."""
        right = self.drive.course(self.camera_s) + x - self.camera_x
        return max(s, self.camera_s + (0.7 - right * self.sin) / self.cos)

    def paint(self, color: Color, tag: Tag, s: float, shade: float = 1.0, texture: tuple[int, float] = (GRAIN, 0.0),
              anchor: Point = (0.0, 0.0)) -> int:  # fmt: skip
        """A new paint for things at `s`, lit by the drive's light; `texture` is a tile and its strength."""
        r, g, b = (c * lit * shade for c, lit in zip(color, self.drive.mood.light, strict=True))
        anchor_px = self.at(*anchor, 0.0) if texture[1] and any(anchor) else (-self.yaw * self.focal_px, 0.0)
        self.paints.append((r, g, b, tag, max(1.0, s - self.camera_s), *texture, *anchor_px))
        return len(self.paints) - 1

    def glow(self, color: Color, tag: Tag, s: float) -> int:
        """A paint that shines by itself."""
        r, g, b = color
        self.paints.append((r, g, b, tag, max(1.0, (s - self.camera_s) / 3), GRAIN, 0.0, 0.0, 0.0))
        return len(self.paints) - 1

    def polygon(self, points: list[Point], paint: int) -> None:
        """Fills the polygon, without smoothing its edge."""
        self.draw.polygon(points, fill=paint)

    def along(self, x: float, span: Point, rise: Point, paint: int) -> None:
        """An upright rectangle that runs along the road at `x`."""
        (s0, s1), (low, high) = span, rise
        self.polygon([self.at(s0, x, low), self.at(s1, x, low), self.at(s1, x, high), self.at(s0, x, high)], paint)

    def across(self, s: float, span: Point, rise: Point, paint: int) -> None:
        """An upright rectangle across the road at `s`."""
        (x0, x1), (low, high) = span, rise
        (left, bottom), (right, top) = self.at(s, x0, low), self.at(s, x1, high)
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], paint)

    def flat(self, span: Point, width: Point, paint: int) -> None:
        """A strip of ground between two `s` and two `x`, following the road's course."""
        start = max(0.7, span[0] - self.camera_s)
        ratio = max(1.01, (span[1] - self.camera_s) / start)
        steps = max(1, round(6 * math.log(ratio)))
        stops = [self.camera_s + start * ratio ** (i / steps) for i in range(steps + 1)]
        left = [self.at(s, width[0], 0.0) for s in stops]
        self.polygon(left + [self.at(s, width[1], 0.0) for s in reversed(stops)], paint)

    def blob(self, s: float, x: float, y: float, radius: Point, paint: int) -> None:
        """An ellipse that faces the camera."""
        (left, top), (right, bottom) = (
            self.at(s, x - radius[0], y + radius[1]),
            self.at(s, x + radius[0], y - radius[1]),
        )
        self.draw.ellipse((left, top, right, bottom), fill=paint)

    def facing(self, side: float) -> float:
        """How brightly an upright face that looks to `side` (-1 left, 0 the camera, 1 right) is lit."""
        return 0.86 + 0.16 * self.drive.sun * side


def _paint_ground(scene: _Scene) -> None:
    """Sky, the trees on the horizon, terrain, sidewalks, road and its lines. The first paints, in this order."""
    drive, width = scene.drive, scene.width_px
    far, kerb, s = scene.camera_s + street.SIGHT_M, drive.kerb_m, scene.camera_s
    scene.paint(drive.mood.zenith, Tag.SKY, s, texture=(CLOUDS, 16.0))
    ground = [
        scene.paint(drive.grass, Tag.TERRAIN, s, texture=(GRAIN, 24.0)),
        scene.paint(drive.paving, Tag.SIDEWALK, s, texture=(PAVING, 26.0)),
        scene.paint(drive.paving, Tag.SIDEWALK, s, 1.16),
        scene.paint((drive.asphalt, drive.asphalt, drive.asphalt + 4), Tag.ROAD, s, texture=(GRAIN, 15.0)),
        scene.paint(drive.line, Tag.ROAD_LINE, s, texture=(GRAIN, 14.0)),
    ]
    terrain, paving, kerbstone, asphalt, line = ground
    scene.draw.rectangle((0, scene.horizon_px, width, scene.height_px), fill=terrain)
    _paint_horizon(scene)
    for side in (-1, 1):
        outer = side * (kerb + drive.sidewalk_m)
        scene.flat((s, far), (side * (kerb - 0.1), outer), paving)
        scene.flat((s, s + 50), (side * (kerb - 0.1), side * (kerb + 0.18)), kerbstone)
    scene.flat((s, far), (-kerb, kerb), asphalt)
    for side in (-1, 1):
        scene.flat((s, s + 55), (side * drive.lane_m - 0.16, side * drive.lane_m + 0.16), line)
    for dash in range(int(s // 9), int((s + 45) // 9) + 1):
        if dash * 9 + 5 > s + 2:
            scene.flat((dash * 9.0, dash * 9.0 + 5.0), (-0.17, 0.17), line)


def _paint_horizon(scene: _Scene) -> None:
    """The row of far trees that hides where the street ends: it turns with the car and comes no nearer."""
    paint = scene.paint(scene.drive.leaves, Tag.VEGETATION, scene.camera_s + street.SIGHT_M, texture=(LEAVES, 26.0))
    base = scene.horizon_px + scene.drive.camera_m * scene.focal_px / street.SIGHT_M + 1
    crest = []
    for column in range(41):
        bearing = scene.yaw + math.atan((column / 40 - 0.5) / scene.drive.focal)
        swell = sum(math.sin(bearing * k + scene.drive.number * k) / (1 + i) for i, k in enumerate((5, 13, 41, 87)))
        crest.append((column * scene.width_px / 40, scene.horizon_px - (0.055 + 0.014 * swell) * scene.focal_px))
    scene.polygon([(0.0, base), *crest, (float(scene.width_px), base)], paint)


def _paint_building(scene: _Scene, thing: Thing) -> None:
    side = math.copysign(1.0, thing.x)
    s0, s1 = scene.near(thing.s, thing.x), thing.s + thing.length
    if s1 - s0 < 0.3:
        return
    # It rises from behind the far trees as the car comes nearer, so that none springs up.
    top = thing.height * min(1.0, (scene.camera_s + street.SIGHT_M - thing.s) / 25)
    x, back = thing.x, thing.x + side * thing.depth
    texture, anchor = (GRAIN, 7.0), (thing.s, thing.x)
    front = scene.paint(thing.color, Tag.BUILDING, thing.s, scene.facing(0), texture, anchor)
    flank = scene.paint(thing.color, Tag.BUILDING, thing.s, scene.facing(-side), texture, anchor)
    if scene.drive.gables:
        ridge = top + 2.6
        tiles = scene.paint((106, 100, 108), Tag.BUILDING, thing.s, scene.facing(-side), (BRICKS, 12.0), anchor)
        middle = (x + back) / 2
        slope = [(s0, x, top), (s1, x, top), (s1, middle, ridge), (s0, middle, ridge)]
        scene.polygon([scene.at(*corner) for corner in slope], tiles)
        scene.polygon([scene.at(s0, x, top), scene.at(s0, back, top), scene.at(s0, middle, ridge)], front)
    scene.along(x, (s0, s1), (0.0, top), flank)
    scene.across(s0, (x, back), (0.0, top), front)
    if not scene.drive.gables:
        cornice = scene.paint(thing.color, Tag.BUILDING, thing.s, scene.facing(-side) * 0.72)
        scene.along(x, (s0, s1), (top - 0.5, top), cornice)
        scene.across(s0, (x, back), (top - 0.5, top), cornice)
    if thing.s - scene.camera_s < 75:
        _paint_windows(scene, thing, back)


def _paint_windows(scene: _Scene, thing: Thing, back: float) -> None:
    """Windows and a door, on the face along the road and on the one towards the camera."""
    side = math.copysign(1.0, thing.x)
    dark = scene.paint((118, 136, 156), Tag.BUILDING, thing.s, scene.facing(-side))
    lit = scene.glow((252, 214, 128), Tag.BUILDING, thing.s)
    is_visible = thing.s > scene.near(thing.s, thing.x) - 0.01
    door = thing.variant % 3
    for number in range(int(thing.height // 3) * 3):
        floor, column = divmod(number, 3)
        chance = (thing.variant * (number + 3) * 2654435761 >> 7) % 1000 / 1000
        glass = lit if chance < scene.drive.mood.lit_windows else dark
        rise = (0.0, 2.2) if floor == 0 and column == door else (floor * 3 + 0.9, floor * 3 + 2.4)
        s = thing.s + (column + 0.28) * thing.length / 3
        if s > scene.near(s, thing.x) - 0.01:
            scene.along(thing.x, (s, s + 1.15), rise, glass)
        if is_visible and thing.s - scene.camera_s < 60:
            x = thing.x + (back - thing.x) * (column + 0.28) / 3
            scene.across(thing.s, (x, x + side * 1.2), (floor * 3 + 0.9, floor * 3 + 2.4), glass)


def _paint_wall(scene: _Scene, thing: Thing) -> None:
    s0, s1 = scene.near(thing.s, thing.x), thing.s + thing.length
    side = math.copysign(1.0, thing.x)
    if s1 - s0 < 0.3:
        return
    anchor = (thing.s, thing.x)
    scene.along(thing.x, (s0, s1), (0, thing.height),
                scene.paint(thing.color, Tag.WALL, thing.s, scene.facing(-side), (BRICKS, 30.0), anchor))  # fmt: skip
    front = scene.paint(thing.color, Tag.WALL, thing.s, scene.facing(0), (BRICKS, 30.0), anchor)
    scene.across(s0, (thing.x, thing.x + side * thing.depth), (0, thing.height), front)
    coping = scene.paint((176, 168, 158), Tag.WALL, thing.s, scene.facing(-side))
    scene.along(thing.x, (s0, s1), (thing.height - 0.25, thing.height), coping)


def _paint_fence(scene: _Scene, thing: Thing) -> None:
    s0, s1 = scene.near(thing.s, thing.x), thing.s + thing.length
    if s1 - s0 < 0.3:
        return
    shade = scene.facing(-math.copysign(1.0, thing.x))
    board = scene.paint(thing.color, Tag.FENCE, thing.s, shade, (GRAIN, 10.0), (thing.s, thing.x))
    light = scene.paint(thing.color, Tag.FENCE, thing.s, shade * 1.35, (GRAIN, 10.0), (thing.s, thing.x))
    scene.along(thing.x, (s0, s1), (0, thing.height), board)
    width = 0.5 if thing.s - scene.camera_s < 30 else 1.0
    for number in range(round(thing.length / width)):
        s = thing.s + number * width
        if s >= s0:
            scene.along(thing.x, (s, s + width * 0.55), (0, thing.height + 0.12), light)


def _paint_tree(scene: _Scene, thing: Thing) -> None:
    rng, spread = street.random_generator(thing.variant), thing.height * 0.3
    anchor = (thing.s, thing.x)
    trunk = scene.paint((84, 66, 48), Tag.VEGETATION, thing.s, texture=(GRAIN, 12.0), anchor=anchor)
    scene.across(thing.s, (thing.x - 0.22, thing.x + 0.22), (0, thing.height * 0.6), trunk)
    for shade in (0.78, 0.9, 1.0, 1.12, 1.22):
        leaves = scene.paint(thing.color, Tag.VEGETATION, thing.s, shade, (LEAVES, 34.0), anchor)
        x = thing.x + rng.uniform(-0.6, 0.6) * spread - scene.drive.sun * (1 - shade) * spread
        y = thing.height * rng.uniform(0.62, 0.8) + (shade - 1) * spread
        scene.blob(thing.s, x, y, (spread * rng.uniform(0.6, 0.85), spread * rng.uniform(0.55, 0.75)), leaves)


def _paint_bush(scene: _Scene, thing: Thing) -> None:
    for step, shade in ((-0.45, 0.85), (0.4, 0.95), (0.0, 1.08)):
        leaves = scene.paint(thing.color, Tag.VEGETATION, thing.s, shade, (LEAVES, 34.0), (thing.s, thing.x))
        scene.blob(thing.s, thing.x + step, thing.height * 0.45, (0.6, thing.height * 0.55), leaves)


def _paint_lamp(scene: _Scene, thing: Thing) -> None:
    side = math.copysign(1.0, thing.x)
    steel = scene.paint(_STEEL, Tag.POLE, thing.s, texture=(GRAIN, 5.0), anchor=(thing.s, thing.x))
    scene.across(thing.s, (thing.x - 0.25, thing.x + 0.25), (0, thing.height), steel)
    scene.across(thing.s, (thing.x - 0.36, thing.x + 0.36), (0, 0.9), steel)
    scene.across(thing.s, (thing.x, thing.x - side * 1.9), (thing.height - 0.25, thing.height + 0.15), steel)
    bulb = scene.glow((255, 240, 196), Tag.POLE, thing.s)
    scene.across(thing.s, (thing.x - side * 1.1, thing.x - side * 1.9), (thing.height - 0.3, thing.height - 0.1), bulb)


def _paint_sign(scene: _Scene, thing: Thing) -> None:
    rim, face, corners = street.SIGN_FACES[thing.variant]
    post = scene.paint(_STEEL, Tag.POLE, thing.s)
    scene.across(thing.s, (thing.x - 0.19, thing.x + 0.19), (0, thing.height), post)
    for color, radius in ((rim, 0.72), (face, 0.48)):
        paint = scene.paint(color, Tag.TRAFFIC_SIGN, thing.s)
        turn = {3: math.pi / 2, 4: math.pi / 4, 8: math.pi / 8}.get(corners, 0.0)
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        scene.polygon([scene.at(thing.s, thing.x + radius * math.cos(a), thing.height + radius * math.sin(a))
                       for a in angles], paint)  # fmt: skip


def _paint_light(scene: _Scene, thing: Thing) -> None:
    """A traffic light on its post, and a second one that hangs over the lane on an arm."""
    side = math.copysign(1.0, thing.x)
    steel = scene.paint(_STEEL, Tag.POLE, thing.s, texture=(GRAIN, 5.0), anchor=(thing.s, thing.x))
    reach = thing.x - side * 3.4
    scene.across(thing.s, (thing.x - 0.25, thing.x + 0.25), (0, thing.height), steel)
    scene.across(thing.s, (thing.x, reach), (thing.height - 0.4, thing.height), steel)
    housing = scene.paint((30, 32, 30), Tag.TRAFFIC_LIGHT, thing.s)
    border = scene.paint((214, 176, 40), Tag.TRAFFIC_LIGHT, thing.s)
    phase = (thing.variant + int(scene.time_s / 4)) % 3
    colors = ((250, 40, 32), (255, 190, 30), (44, 236, 110))
    for x, y in ((thing.x, 2.4), (reach, thing.height - 1.9)):
        scene.across(thing.s, (x - 0.5, x + 0.5), (y, y + 2.1), border)
        scene.across(thing.s, (x - 0.38, x + 0.38), (y + 0.12, y + 1.98), housing)
        for lamp, color in enumerate(colors):
            lens = scene.glow(color, Tag.TRAFFIC_LIGHT, thing.s) if lamp == phase else scene.paint(
                color, Tag.TRAFFIC_LIGHT, thing.s, 0.35)  # fmt: skip
            scene.blob(thing.s, x, y + 1.7 - 0.65 * lamp, (0.25, 0.25), lens)


def _paint_pedestrian(scene: _Scene, thing: Thing) -> None:
    tall, x, s = thing.height, thing.x, thing.s
    stride = 0.2 * math.sin(2 * math.pi * thing.pace * scene.time_s + thing.variant)
    dark = scene.paint((44, 44, 62), Tag.PEDESTRIAN, s)
    cloth = scene.paint(thing.color, Tag.PEDESTRIAN, s)
    skin = scene.paint([(232, 188, 156), (140, 92, 66), (198, 148, 110)][thing.variant % 3], Tag.PEDESTRIAN, s)
    for hip, foot in ((-0.16, stride), (0.16, -stride)):
        leg = [(hip - 0.16, 0.5), (hip + 0.16, 0.5), (hip + foot + 0.15, 0.0), (hip + foot - 0.15, 0.0)]
        scene.polygon([scene.at(s, x + across, tall * up) for across, up in leg], dark)
        hand = hip * 2.4 - foot
        arm = [(hip * 2.1 - 0.11, 0.8), (hip * 2.1 + 0.11, 0.8), (hand + 0.1, 0.46), (hand - 0.1, 0.46)]
        scene.polygon([scene.at(s, x + across, tall * up) for across, up in arm], cloth)
    scene.across(s, (x - 0.35, x + 0.35), (tall * 0.45, tall * 0.84), cloth)
    scene.blob(s, x, tall * 0.92, (0.18, tall * 0.09), skin)


def _paint_car(scene: _Scene, thing: Thing) -> None:
    """A car as its outline swept across: the faces towards the camera from far to near, then the nearer flank."""
    x0, x1 = thing.x - thing.depth / 2, thing.x + thing.depth / 2
    coming, long, high = thing.pace < 0, thing.length, thing.height
    # (along, up) in shares of length and height, from the far end over the roof to the near one.
    outline = [(1, 0.2), (1, 0.58), (0.74, 0.66), (0.6, 1), (0.18, 1), (0.03, 0.62), (0, 0.58), (0, 0.2)]
    if thing.variant:
        outline = [(1, 0.12), (1, 0.5), (0.84, 0.95), (0.78, 1), (0.02, 1), (0, 0.55), (0, 0.5), (0, 0.12)]
    if coming:
        outline = [(1 - along, up) for along, up in reversed(outline)]
    profile = [(thing.s + along * long, up * high) for along, up in outline]
    shadow = scene.paint((30, 30, 34), Tag.ROAD, thing.s)
    scene.flat((thing.s - 0.3, thing.s + long), (x0 - 0.15, x1 + 0.15), shadow)
    body = {shade: scene.paint(thing.color, Tag.VEHICLE, thing.s, shade) for shade in (0.72, 0.9, 1.12)}
    glass = scene.paint((40, 50, 62), Tag.VEHICLE, thing.s)
    tyre = scene.paint((20, 20, 22), Tag.VEHICLE, thing.s)
    scene.across(thing.s + 0.1, (x0 + 0.05, x1 - 0.05), (0, high * 0.3), tyre)
    for (s0, y0), (s1, y1) in itertools.pairwise(profile[1:]):
        steep = abs(y1 - y0) > 0.25 * high
        paint = body[1.12] if not steep else glass if y0 > 0.9 * high else body[0.9]
        if s0 - scene.camera_s > 0.7 and s1 - scene.camera_s > 0.7:
            scene.polygon(
                [scene.at(s0, x0, y0), scene.at(s0, x1, y0), scene.at(s1, x1, y1), scene.at(s1, x0, y1)], paint
            )
    flank = x0 if scene.drive.course(thing.s) + thing.x > scene.camera_x else x1
    _paint_flank(scene, profile, flank, (body[0.72], glass, tyre))
    lamps = scene.glow((255, 250, 226) if coming else (214, 24, 28), Tag.VEHICLE, thing.s)
    for x in (x0, x1 - 0.42):
        scene.across(thing.s, (x + 0.04, x + 0.38), (high * 0.42, high * 0.54), lamps)


def _paint_flank(scene: _Scene, profile: list[Point], x: float, paints: tuple[int, int, int]) -> None:
    """A car's side: its outline, the windows along it, the wheels."""
    body, glass, tyre = paints
    low, high = profile[0][1], max(y for _, y in profile)
    scene.polygon([scene.at(s, x, y) for s, y in profile], body)
    roof = [s for s, y in profile if y > 0.97 * high]
    if roof:
        scene.along(x, (min(roof), max(roof)), (0.66 * high, 0.93 * high), glass)
    ends = min(s for s, _ in profile), max(s for s, _ in profile)
    for centre in (ends[0] + 0.8, ends[1] - 0.8):
        corners = [(0.34 * math.cos(k * math.pi / 4), 0.34 * math.sin(k * math.pi / 4)) for k in range(8)]
        scene.polygon([scene.at(centre + along, x, max(0.0, low * 0.9 + up)) for along, up in corners], tyre)


_PAINTERS: dict[str, Callable[[_Scene, Thing], None]] = {
    "building": _paint_building, "wall": _paint_wall, "fence": _paint_fence, "tree": _paint_tree, "bush": _paint_bush,
    "lamp": _paint_lamp, "sign": _paint_sign, "light": _paint_light, "pedestrian": _paint_pedestrian, "car": _paint_car,
}  # fmt: skip


def _develop(scene: _Scene, ids_HW: np.ndarray) -> np.ndarray:
    """Reads the frame from the picture of paint numbers: colour, haze, texture, noise. uint8 [H, W, C]."""
    drive, height = scene.drive, scene.height_px
    table = np.array(scene.paints, np.float32)
    rows_H1 = np.arange(height, dtype=np.float32)[:, None] + 0.5
    depth_HP = np.repeat(table[None, :, 4], height, axis=0)
    depth_HP[:, _GROUND] = drive.camera_m * scene.focal_px / np.maximum(rows_H1 - scene.horizon_px, 0.5)
    haze_HP = 1 - np.exp(-drive.mood.haze_per_m * depth_HP)
    haze_HP[:, 0] = np.clip(rows_H1[:, 0] / scene.horizon_px, 0, 1) ** 1.5
    mist_C = np.array(drive.mood.horizon, np.float32)
    color_HPC = table[:, :3] * (1 - haze_HP[..., None]) + mist_C * haze_HP[..., None]
    strength_HP = table[:, 6] / 100 * (1 - haze_HP) * np.minimum(1, 16 / depth_HP)
    strength_HP[:, 0] = table[0, 6] / 100

    flat_HW = ids_HW + (np.arange(height) * len(table))[:, None]
    frame_HWC = color_HPC.reshape(-1, 3).take(flat_HW, axis=0)
    frame_HWC += (strength_HP.take(flat_HW) * _texture(scene, table, depth_HP, flat_HW))[..., None]
    rng = street.random_generator(drive.seed, drive.number, 4, scene.index)
    noise_HWC = rng.integers(0, 256, frame_HWC.shape, np.uint8).astype(np.float32)
    noise_HWC -= 127.5
    noise_HWC *= drive.noise / 73.6  # the standard deviation of a byte drawn evenly
    frame_HWC += noise_HWC
    return np.clip(frame_HWC, 0, 255, out=frame_HWC).astype(np.uint8)


def _texture(scene: _Scene, table: np.ndarray, depth_HP: np.ndarray, flat_HW: np.ndarray) -> np.ndarray:
    """The texture under each pixel, fixed to the ground or to the thing it lies on. int8 [H, W]."""
    drive, height, width = scene.drive, scene.height_px, scene.width_px
    rows_H1 = np.arange(height, dtype=np.float32)[:, None]
    scale_HP = depth_HP * np.float32(_TEXELS_PER_M / scene.focal_px)
    scale_HP[:, 0] = street.TILE_PX / (0.9 * width)
    u_HP = -table[:, 7] * scale_HP
    v_HP = (rows_H1 - table[:, 8]) * scale_HP
    ground_HP = depth_HP[:, _GROUND]
    u_HP[:, _GROUND] = (scene.camera_x + ground_HP * scene.sin) * _TEXELS_PER_M - width / 2 * scale_HP[:, _GROUND]
    v_HP[:, _GROUND] = (scene.camera_s % street.TILE_PX + ground_HP) * _TEXELS_PER_M
    row_HP = (v_HP.astype(np.int32) % street.TILE_PX + table[:, 5].astype(np.int32) * street.TILE_PX) * street.TILE_PX
    u_HW = scale_HP.take(flat_HW) * np.arange(width, dtype=np.float32) + u_HP.take(flat_HW)
    return drive.tiles.ravel().take(row_HP.take(flat_HW) + (u_HW.astype(np.int32) & (street.TILE_PX - 1)))


def draw_frame(
    seed: int, drive: int, index: int, *, height_px: int = 480, width_px: int = 640
) -> tuple[np.ndarray, np.ndarray]:
    """Draws frame `index` of a drive: the frame uint8 [H, W, 3] and its mask of CARLA ids uint8 [H, W].

    Raises ValueError for a negative number or a picture too small to show anything.
    """
    if min(seed, drive, index) < 0:
        raise ValueError(f"seed {seed}, drive {drive}, frame {index}: none of them may be negative")
    if min(height_px, width_px) < _MIN_SIDE_PX:
        raise ValueError(f"a frame of {height_px}x{width_px} px is too small: draw at least {_MIN_SIDE_PX} px a side")
    scene = _Scene(street.lay_out_drive(seed, drive), index, height_px, width_px)
    _paint_ground(scene)
    for thing in street.things_in_sight(scene.drive, scene.camera_s, scene.time_s):
        _PAINTERS[thing.kind](scene, thing)
    ids_HW = np.asarray(scene.image)
    tags_P = np.array([paint[3] for paint in scene.paints], np.uint8)
    return _develop(scene, ids_HW), tags_P[ids_HW]


def drive_name(drive: int) -> str:
    """The folder of a drive's frames."""
    return f"drive{drive:02d}"


def write_frame(out: str, *, seed: int, drive: int, index: int, height_px: int = 480, width_px: int = 640) -> None:
    """Draws one frame into `out/CameraRGB` and its mask, the id in the red channel, into `out/CameraMask`."""
    frame_HWC, mask_HW = draw_frame(seed, drive, index, height_px=height_px, width_px=width_px)
    mask_HWC = np.zeros_like(frame_HWC)
    mask_HWC[..., 0] = mask_HW
    for folder, pixels_HWC in (("CameraRGB", frame_HWC), ("CameraMask", mask_HWC)):
        png = io.BytesIO()
        Image.fromarray(pixels_HWC).save(png, "PNG", compress_level=1)
        storage.write_whole(storage.join(out, folder, drive_name(drive), f"{index:06d}.png"), png.getvalue())


def write_log(
    out: str, *, seed: int, drives: int, frames_per_drive: int, height_px: int = 480, width_px: int = 640,
    first_drive: int = 0,
) -> list[str]:  # fmt: skip
    """Writes a log of `drives` drives, from number `first_drive` on, and returns their names.

    A caller with many cores spreads `write_frame` over them instead: the files are the same.
    """
    if drives < 1 or frames_per_drive < 1:
        raise ValueError(f"{drives} drives of {frames_per_drive} frames: at least one of each is needed")
    numbers = range(first_drive, first_drive + drives)
    for drive in numbers:
        for index in range(frames_per_drive):
            write_frame(out, seed=seed, drive=drive, index=index, height_px=height_px, width_px=width_px)
    return [drive_name(drive) for drive in numbers]
