"""What the classes are: names, output ids, colours, the raw values that mean them, and what is ignored.

Shapes: `H` height px, `W` width px, `C` colour (red, green, blue), `K` classes.
An encoded mask is uint8 [H, W]: a class's place in its set (0 to K-1), or `IGNORED_ID`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
import yaml

from unet_ray.messages import count
from unet_ray.suggestions import closest, perhaps

IGNORED_ID = 255
"""In an encoded mask: a pixel that counts in no loss and no metric."""

MAX_CLASSES = 254
"""An encoded mask is uint8: 255 is `IGNORED_ID`, and 254 marks unknown values while one is made."""

MOST_UNKNOWN = 256
"""Unknown values that an error holds one by one: a photograph taken for a mask has 100,000 colours."""

_UNKNOWN_ID = 254
_NAME = re.compile(r"[a-z][a-z0-9_]*")

Color = tuple[int, int, int]
RawValue = int | Color
"""What a mask file holds for a pixel: an id (0 to 255) or a colour."""


class ClassSetFormError(ValueError):
    """A class set is not written as one: a key that is missing or unknown, something else where a list belongs."""


class UnknownValuesError(ValueError):
    """A mask holds values that its class set neither names nor ignores.

    Attributes:
        values: the number of pixels of each unknown id or colour, the most frequent first; of `MOST_UNKNOWN` at most.
        n_values: how many different ones there are.
        n_pixels: how many pixels have one.
    """

    def __init__(self, message: str, values: Mapping[Any, int], n_values: int, n_pixels: int):
        super().__init__(message, values, n_values, n_pixels)  # all are arguments, so that it survives pickling
        self.values: dict[RawValue, int] = dict(values)
        self.n_values, self.n_pixels = n_values, n_pixels

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class SegmentationClass:
    """One class: its name, its colour in pictures, and the raw values that mean it in a mask file.

    Its colour means it too in a mask of colours: only further colours need to stand in `values`.
    """

    name: str
    """Lower-case letters, digits and `_`, a letter first: it becomes a part of column names."""
    color: Color
    """Red, green, blue, each 0 to 255; no two classes of a set share one."""
    values: tuple[RawValue, ...] = ()
    """Ids (0 to 255) and colours in mask files that mean this class."""


@dataclass(frozen=True, kw_only=True)
class ClassSet:
    """The classes of a data set in the order of their output ids, and the raw values that are ignored.

    Raises:
        ValueError: no class or more than `MAX_CLASSES`, a bad name, id or colour, or a name, colour or raw value that
            stands for two things.
    """

    name: str
    classes: tuple[SegmentationClass, ...]
    ignore: tuple[RawValue, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"class set: name is {self.name!r}, allowed is a text that is not empty")
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"class set {self.name!r}: {len(self.classes)} classes, allowed are 1 to {MAX_CLASSES}")
        for item in self.classes:
            self._check_class(item)
        for value in self.ignore:
            _check_raw_value(value, f"class set {self.name!r}: ignore")
        self._refuse_twice("name", ((item.name, f"class {item.name!r}") for item in self.classes))
        self._refuse_twice("color", ((item.color, f"class {item.name!r}") for item in self.classes))
        self._refuse_twice("value", self._raw_values())

    def _check_class(self, item: SegmentationClass) -> None:
        where = f"class set {self.name!r}: class {item.name!r}"
        if not isinstance(item.name, str) or not _NAME.fullmatch(item.name):
            raise ValueError(
                f"{where}: a class's name is made of lower-case letters, digits and _ and begins with a letter"
                f" (it becomes the column pixels_<name>){_similar_name(item.name)}"
            )
        if not _is_color(item.color):
            raise ValueError(f"{where}: color is {item.color!r}, allowed are three numbers from 0 to 255")
        for value in item.values:
            _check_raw_value(value, f"{where}: values")

    def _raw_values(self) -> Iterator[tuple[RawValue, str]]:
        """Every raw value with what it means; a class's own colour is one of its values, named there or not."""
        for item in self.classes:
            for value in item.values:
                yield value, f"class {item.name!r}"
            if item.color not in item.values:
                yield item.color, f"class {item.name!r}"
        for value in self.ignore:
            yield value, "ignore"

    def _refuse_twice(self, what: str, entries: Iterable[tuple[Any, str]]) -> None:
        seen: dict[Any, str] = {}
        for value, owner in entries:
            if value in seen:
                raise ValueError(
                    f"class set {self.name!r}: {what} {value!r} stands in {seen[value]} and in {owner};"
                    " it can mean only one"
                )
            seen[value] = owner

    @property
    def n_classes(self) -> int:
        """How many classes there are: the network's output channels."""
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names in the order of their output ids."""
        return tuple(item.name for item in self.classes)

    @cached_property
    def palette_K3(self) -> np.ndarray:
        """The classes' colours, uint8 [K, 3], read-only."""
        palette_K3 = np.array([item.color for item in self.classes], np.uint8)
        palette_K3.setflags(write=False)
        return palette_K3

    @cached_property
    def _output_of_id(self) -> np.ndarray:
        """The output id of each raw id 0 to 255, uint8 [256]."""
        lookup = np.full(256, _UNKNOWN_ID, np.uint8)
        for output_id, item in enumerate(self.classes):
            lookup[[value for value in item.values if isinstance(value, int)]] = output_id
        lookup[[value for value in self.ignore if isinstance(value, int)]] = IGNORED_ID
        return lookup

    @cached_property
    def _output_of_color(self) -> tuple[np.ndarray, np.ndarray]:
        """Known colours as 24-bit numbers in ascending order, and the output id of each."""
        outputs: dict[int, int] = {}
        for output_id, item in enumerate(self.classes):
            for value in (item.color, *item.values):
                if isinstance(value, tuple):
                    outputs[_packed(value)] = output_id
        outputs.update({_packed(value): IGNORED_ID for value in self.ignore if isinstance(value, tuple)})
        known = sorted(outputs)
        return np.array(known, np.uint32), np.array([outputs[color] for color in known], np.uint8)

    def encode_ids(self, ids_HW: np.ndarray) -> np.ndarray:
        """Raw ids, integers of any type [H, W], to an encoded mask, uint8 [H, W].

        Raises:
            UnknownValuesError: an id that no class names and that is not ignored.
        """
        if not np.issubdtype(ids_HW.dtype, np.integer) or ids_HW.ndim != 2:
            raise ValueError(f"ids are {ids_HW.dtype} of shape {ids_HW.shape}, allowed are whole numbers [H, W]")
        if ids_HW.dtype == np.uint8:
            # An index array would take eight times the mask's memory, and as long as half of its decoding.
            encoded = ids_HW.tobytes().translate(self._output_of_id.tobytes())
            mask_HW, is_known = np.frombuffer(encoded, np.uint8).reshape(ids_HW.shape), _UNKNOWN_ID not in encoded
        else:
            in_range_HW = (ids_HW >= 0) & (ids_HW <= 255)
            mask_HW = np.where(in_range_HW, self._output_of_id[np.clip(ids_HW, 0, 255)], np.uint8(_UNKNOWN_ID))
            is_known = not (mask_HW == _UNKNOWN_ID).any()
        if not is_known:
            unknown_HW = mask_HW == _UNKNOWN_ID
            known = np.flatnonzero(self._output_of_id != _UNKNOWN_ID)
            raise self._unknown_values("id", ids_HW[unknown_HW], int, f"ids {_ranges(known)}")
        return mask_HW

    def encode_colors(self, colors_HWC: np.ndarray) -> np.ndarray:
        """Colours, uint8 [H, W, 3], to an encoded mask, uint8 [H, W].

        Raises:
            UnknownValuesError: a colour that no class has and that is not ignored.
        """
        if colors_HWC.dtype != np.uint8 or colors_HWC.ndim != 3 or colors_HWC.shape[2] != 3:
            raise ValueError(f"colours are {colors_HWC.dtype} of shape {colors_HWC.shape}, allowed are uint8 [H, W, 3]")
        known, output_ids = self._output_of_color
        packed_HW = colors_HWC[..., 0].astype(np.uint32) << 16
        packed_HW |= colors_HWC[..., 1].astype(np.uint32) << 8
        packed_HW |= colors_HWC[..., 2]
        index_HW = np.minimum(np.searchsorted(known, packed_HW), len(known) - 1)
        unknown_HW = known[index_HW] != packed_HW
        if unknown_HW.any():
            allowed = f"the {len(known)} colours of its classes and of ignore"
            raise self._unknown_values("colour", packed_HW[unknown_HW], _unpacked, allowed)
        return output_ids[index_HW]

    def _unknown_values(
        self, kind: str, unknown: np.ndarray, value_of: Callable[[int], RawValue], allowed: str
    ) -> UnknownValuesError:
        """The error of pixels whose values are not known, the most frequent first, equals by value."""
        unique, numbers = np.unique(unknown, return_counts=True)
        most = np.argsort(-numbers, kind="stable")[:MOST_UNKNOWN]
        values = {value_of(int(unique[index])): int(numbers[index]) for index in most}
        n_values = len(unique)
        listed = ", ".join(f"{value} ({count(n, 'pixel')})" for value, n in list(values.items())[:8])
        more = f" and {n_values - 8:,} more" if n_values > 8 else ""
        return UnknownValuesError(
            f"{count(n_values, kind)} outside the class set {self.name!r}: {listed}{more}; allowed: {allowed}; "
            "add what is missing to a class's values or to ignore, or choose another class set",
            values,
            n_values,
            unknown.size,
        )

    def colorize(self, mask_HW: np.ndarray) -> np.ndarray:
        """An encoded mask, uint8 [H, W], to a picture, uint8 [H, W, 3]; ignored pixels are black."""
        colors = np.zeros((256, 3), np.uint8)
        colors[: self.n_classes] = self.palette_K3
        return np.take(colors, mask_HW, axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads them back to an equal class set."""
        return {
            "name": self.name,
            "classes": [
                {"name": item.name, "color": list(item.color), "values": [_plain(value) for value in item.values]}
                for item in self.classes
            ],
            "ignore": [_plain(value) for value in self.ignore],
        }

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], *, name: str = "custom") -> ClassSet:
        """A class set from plain types, as JSON and YAML give them.

        Args:
            mapping: `classes` (a list of `name`, `color` and optional `values`), and optional `ignore` and `name`.
            name: the set's name where the mapping has none.

        Raises:
            ClassSetFormError: an unknown or missing key, or a value of the wrong kind.
            ValueError: what `ClassSet` refuses.
        """
        _check_keys(mapping, "class set", required=("classes",), optional=("name", "ignore"))
        classes = []
        for index, entry in enumerate(_sequence(mapping["classes"], "class set: classes")):
            where = f"class set: classes[{index}]"
            _check_keys(entry, where, required=("name", "color"), optional=("values",))
            values = tuple(_raw_value(value) for value in _sequence(entry.get("values", ()), f"{where}: values"))
            classes.append(SegmentationClass(name=entry["name"], color=_raw_value(entry["color"]), values=values))
        ignore = tuple(_raw_value(value) for value in _sequence(mapping.get("ignore", ()), "class set: ignore"))
        return cls(name=mapping.get("name", name), classes=tuple(classes), ignore=ignore)


def _similar_name(name: object) -> str:
    """`Road Line` can be called `road_line`; empty where no name follows."""
    similar = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") if isinstance(name, str) else ""
    return f": call it {similar}" if _NAME.fullmatch(similar) else ""


def _ranges(numbers: np.ndarray) -> str:
    """`[0, 1, 2, 7]` as `0-2, 7`; `none` where there are none (a set whose values are all colours)."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def _packed(color: Color) -> int:
    return color[0] << 16 | color[1] << 8 | color[2]


def _unpacked(number: int) -> Color:
    return number >> 16, number >> 8 & 255, number & 255


def _is_byte(value: object) -> bool:
    return type(value) is int and 0 <= value <= 255  # not isinstance: True is no id


def _is_color(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_byte(part) for part in value)


def _check_raw_value(value: object, where: str) -> None:
    if not _is_byte(value) and not _is_color(value):
        raise ValueError(f"{where}: {value!r} is neither an id from 0 to 255 nor a colour of three such numbers")


def _raw_value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: RawValue) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ClassSetFormError(f"{where} is {value!r}, allowed is a list")
    return value


def _check_keys(mapping: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(mapping, Mapping):
        raise ClassSetFormError(f"{where} is {mapping!r}, allowed is a mapping with {', '.join(required + optional)}")
    for key in mapping:
        if key not in required + optional:
            meant = perhaps(closest(str(key), required + optional))
            allowed = ", ".join(required + optional)
            raise ClassSetFormError(f"{where}: unknown key {key!r}, {meant}allowed are {allowed}")
    for key in required:
        if key not in mapping:
            raise ClassSetFormError(f"{where}: {key} is missing")


_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's takes an eighth of the time


class _Presets(Mapping[str, ClassSet]):
    """The class sets of the folder `class_sets/`, each read when it is asked for: 123 classes take 5 ms."""

    def __init__(self, folder: Traversable):
        self._folder = folder
        names = (entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        self._names = sorted(name.removesuffix(".yaml") for name in names)
        self._read: dict[str, ClassSet] = {}

    def __getitem__(self, name: str) -> ClassSet:
        if name not in self._read:
            if name not in self._names:
                raise KeyError(name)
            text = (self._folder / f"{name}.yaml").read_bytes()
            self._read[name] = ClassSet.from_dict(yaml.load(text, _YAML_LOADER), name=name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


PRESETS: Mapping[str, ClassSet] = _Presets(resources.files("unet_ray") / "class_sets")
"""The class sets that `--classes` knows by name; each file says what it is and where its ids and colours are from."""
