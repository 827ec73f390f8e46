"""Class files as people write them: short forms become the full one, and classes without a colour get one.

| `classes` | what a mask holds for a class |
|---|---|
| `[sky, road]` | its place in the list, from 0 |
| `{0: sky, 7: road}` | the number; output ids follow the numbers in ascending order |
| `{sky: 0, road: 7}` | the number; output ids follow the file |
| `{sky: [70, 130, 180], road: [128, 64, 128]}` | its colour, or its place |
| `[{name: sky, color: [70, 130, 180], values: [0]}, …]` | one of its values or its colour; without both, its place |

`ignore: [255]` may stand beside `classes`. Without it, `classes:` itself may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from unet_ray.classes import MAX_CLASSES, ClassSet, ClassSetFormError, Color
from unet_ray.palette import free_colors

EXAMPLE = "an example: `classes: [sky, road]`, or `classes: {0: sky, 7: road}` with the masks' ids"
_KEYS = {"classes", "ignore", "name"}


def class_set_of(content: Any, *, source: str, name: str = "custom") -> ClassSet:
    """Returns the class set of a class file's content, plain YAML types.

    Args:
        content: in one of the forms above.
        source: what holds it, for the message.
        name: the set's name where the content has none.

    Raises:
        ValueError: one line, with an example where the content has none of the forms.
    """
    if not (isinstance(content, Mapping) and _KEYS & content.keys()):
        content = {"classes": content}
    try:
        if "classes" in content:
            entries = list(_entries(content["classes"]))
            if len(entries) > MAX_CLASSES:
                raise ValueError(f"{source}: {len(entries)} classes, allowed are 1 to {MAX_CLASSES}")
            _color(entries, content.get("ignore"))
            content = {**content, "classes": entries}
        return ClassSet.from_dict(content, name=name)
    except ClassSetFormError as error:
        raise ValueError(f"{source}: {error}; {EXAMPLE}") from error


def _entries(classes: Any) -> Iterator[Any]:
    """Each class in the full form, some still without a colour."""
    if isinstance(classes, list | tuple):
        for position, entry in enumerate(classes):
            yield _entry(entry, position)
    elif isinstance(classes, Mapping) and classes and all(type(key) is int for key in classes):
        for number in sorted(classes):
            yield {"name": _name(classes[number], f"classes: {number}"), "values": [number]}
    elif isinstance(classes, Mapping) and classes:
        for position, (key, value) in enumerate(classes.items()):
            yield _named(_name(key, "classes"), value, position)
    else:
        raise ClassSetFormError(f"classes is {classes!r}, allowed is a list of names, or a mapping of ids or colours")


def _entry(entry: Any, position: int) -> Any:
    """An item of a list: a name, or a mapping in the full form, which may lack a colour."""
    if not isinstance(entry, Mapping):
        return {"name": _name(entry, f"classes[{position}]"), "values": [position]}
    return entry if "color" in entry or "values" in entry else {**entry, "values": [position]}


def _named(name: str, value: Any, position: int) -> dict[str, Any]:
    """An item of a mapping: a name with its id, or with its colour."""
    if type(value) is int:
        return {"name": name, "values": [value]}
    if isinstance(value, list | tuple) and len(value) == 3:
        return {"name": name, "color": list(value), "values": [position]}
    raise ClassSetFormError(f"class {name} has {value!r}, allowed are an id or a colour of three numbers")


def _name(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    quotes = ": put the name in quotes, which YAML takes for true or false" if isinstance(value, bool) else ""
    raise ClassSetFormError(f"{where} has {value!r}, allowed is a name{quotes}")


def _color(entries: list[Any], ignore: Any) -> None:
    """Gives those without a colour one that is far from all that are given; what is wrong is refused later."""
    values = [value for entry in entries if isinstance(entry, Mapping) for value in _values(entry)]
    taken = [color for value in [*values, *_list(ignore)] if (color := _as_color(value)) is not None]
    bare = [index for index, entry in enumerate(entries) if "color" not in entry]
    for index, color in zip(bare, free_colors(len(bare), taken), strict=True):
        entries[index] = {**entries[index], "color": list(color)}


def _values(entry: Mapping[str, Any]) -> list[Any]:
    return [entry.get("color"), *_list(entry.get("values"))]


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _as_color(value: Any) -> Color | None:
    parts = _list(value)
    is_color = len(parts) == 3 and all(type(part) is int and 0 <= part <= 255 for part in parts)
    return (parts[0], parts[1], parts[2]) if is_color else None
