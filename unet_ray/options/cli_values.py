"""What an option's words mean by the type of its field: its value, or one line that says what it takes.

A type is a choice of arms: `tuple[int, int] | Literal["data"]` has two, and the first that takes the words gives the
value. These arms are known: None, bool, int, float, a path or other text, Literal, a tuple of a fixed or of any length,
and a mapping as text (`Mark.MAPPING`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from unet_ray.options.config_files import Mark
from unet_ray.suggestions import closest, perhaps

NEVER = dataclasses.MISSING
"""The default of an option that has to be given."""

_NUMBERS = {int: "whole number", float: "number"}
_LISTS = (tuple, list, Sequence, Collection)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command: a field of its configuration."""

    field: str
    """Its name there: `batch_size`."""
    kind: Any
    """Its type."""
    default: Any
    """`NEVER` where it has to be given."""
    text: str
    """What it means: the text under the field, in one line."""
    is_positional: bool = False

    @property
    def title(self) -> str:
        """`--batch-size`; of one that is given by its value alone `OUT`."""
        return self.field.upper() if self.is_positional else "--" + self.field.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """Whether it takes no value: `--augment`, `--no-augment`."""
        return self.arms == (bool,)

    @property
    def takes_many(self) -> bool:
        """Whether it takes any number of values."""
        return any(_is_list(arm) for arm in self.arms)

    @property
    def most_words(self) -> float:
        """Words that may follow its name."""
        return max(_n_words(arm) for arm in self.arms)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes, where these are few."""
        return tuple(str(value) for arm in self.arms if _is_literal(arm) for value in typing.get_args(arm))

    @property
    def arms(self) -> tuple[Any, ...]:
        """The arms of its type but for None; an empty tuple never."""
        return tuple(arm for arm in _arms(self.kind) if arm is not type(None))

    # --- its value ---

    def read(self, words: Sequence[str]) -> Any:
        """Returns the value that some words mean. Raises ValueError, in one line, where they mean none."""
        if not words and not self.takes_many:
            raise ValueError(f"{self.title} needs a value; {self._remedy()}")
        for arm in self.arms:
            value = _read(arm, words)
            if value is not None:
                return value
        given = " ".join(words)
        if len(words) > self.most_words and self.arms == (str,):
            raise ValueError(f"{self.title} takes one value, and {words[1]!r} is one too many; quote what has spaces")
        raise ValueError(f"{self.title} is {given!r}; {perhaps(closest(given, self.choices))}{self._remedy()}")

    def from_file(self, value: Any) -> Any:
        """Returns the value that YAML's value means. Raises ValueError as `read`."""
        if isinstance(value, bool):
            if bool in self.arms:
                return value
            raise ValueError(f"{self.title} is {str(value).lower()}; {self._remedy()}, in quotes where YAML needs them")
        if value is None:
            if type(None) in _arms(self.kind):
                return None
            raise ValueError(f"{self.title} is null; {self._remedy()}")
        if isinstance(value, Mapping):
            if Mark.MAPPING in self.arms:
                return dict(value)
            raise ValueError(f"{self.title} is a mapping; {self._remedy()}")
        return self.read([str(part) for part in (value if isinstance(value, list | tuple) else [value])])

    # --- what it takes, in words ---

    def metavar(self) -> str:
        """What stands for its value in a usage line: `INT`, `{cpu,gpu}`, `INT INT|data`; nothing for a switch."""
        if self.field in _METAVARS:
            return _METAVARS[self.field]
        arms = [] if self.is_switch else [arm for arm in self.arms if not _is_literal(arm)]
        parts = [_metavar(arm, "URI" if self.text.startswith("URI") else "TEXT") for arm in arms]
        if self.choices:
            parts.append("|".join(self.choices) if arms else f"{{{','.join(self.choices)}}}")
        return "|".join(dict.fromkeys(parts))

    def default_text(self) -> str:
        """Its default as one would type it; empty where it has none."""
        return "" if self.default is NEVER else value_text(self.default)

    def _remedy(self) -> str:
        """`give 2 whole numbers or data, such as --image-size 96 128`."""
        if self.is_switch:
            return f"give {self.title} or --no-{self.title[2:]}, and in a file true or false"
        if str in self.arms:
            return f"it is: {first_clause(self.text)}"
        wanted = [_wanted(arm) for arm in self.arms if not _is_literal(arm)] + list(self.choices)
        listed = " or ".join(filter(None, [", ".join(wanted[:-1]), wanted[-1]]))
        example = self._example()
        return f"give {listed}" + (f", such as {self.title} {example}" if example else "")

    def _example(self) -> str:
        if all(_is_literal(arm) for arm in self.arms):
            return ""
        return self.default_text() or next(filter(None, (_EXAMPLES.get(str(arm)) for arm in self.arms)), "")


_METAVARS = {"classes": "NAME|FILE", "class_weights": "none|log|median|FILE", "workers": "N|MIN:MAX"}
_METAVARS |= {"actors": "auto|N|MIN:MAX", "path_pattern": "REGEX", "retry_rejected": "[REASON …]", "network": "NAME"}
_METAVARS |= {"config": "FILE", "recipe": "NAME"}

_EXAMPLES = {
    str(int): "4",
    str(float): "0.5",
    str(tuple[int, int]): "96 128",
    str(tuple[float, float]): "0.5 1.0",
    str(tuple[float, float, float]): "123.675 116.28 103.53",
    str(Mark.MAPPING): "'{\"key\": 1}'",
}
"""Values of options that have no default to show."""


def first_clause(text: str) -> str:
    """Returns a help text up to its first `. `, `; ` or `: `."""
    return re.split(r"\.? \(|[.;:] ", text + " ", maxsplit=1)[0].rstrip(". ")


def value_text(value: Any) -> str:
    """Returns a value as one would type it; nothing for None, for what is empty, and for a switch that is off."""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, list | tuple):
        return " ".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


# --- the arms of a type ---


@functools.cache
def _arms(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is Annotated:
        inner, *marks = typing.get_args(kind)
        return (Mark.MAPPING, type(None)) if Mark.MAPPING in marks else _arms(inner)
    if typing.get_origin(kind) in (Union, types.UnionType):
        arms = [arm for part in typing.get_args(kind) for arm in _arms(part)]
        # A path is text here, and what is text would take the words of all others.
        plain = [arm for arm in arms if arm is not str and not _is_path(arm)]
        return (*plain, *([str] if len(plain) < len(arms) else []))
    if _is_path(kind):
        return (str,)
    if kind in (type(None), bool, str, *_NUMBERS) or _is_literal(kind) or _origin(kind) in _LISTS:
        return (kind,)
    raise TypeError(f"{kind} is no type that the command line knows; see `cli_values`")


def _origin(arm: Any) -> Any:
    return typing.get_origin(arm) or arm


def _is_literal(arm: Any) -> bool:
    return typing.get_origin(arm) is Literal


def _is_path(kind: Any) -> bool:
    origin = _origin(kind)
    return isinstance(origin, type) and issubclass(origin, os.PathLike)


def _is_list(arm: Any) -> bool:
    parts = typing.get_args(arm)
    return _origin(arm) in _LISTS and (_origin(arm) is not tuple or parts[-1:] == (...,))


def _n_words(arm: Any) -> float:
    if arm is bool:
        return 0
    if _is_list(arm):
        return math.inf
    return len(typing.get_args(arm)) if _origin(arm) is tuple else 1


def _read(arm: Any, words: Sequence[str]) -> Any:
    """Returns the value of some words; None where the arm does not take them."""
    if _is_list(arm):
        values = [_read(typing.get_args(arm)[0], [word]) for word in words]
        return None if None in values else tuple(values)
    if len(words) != _n_words(arm):
        return None
    if _origin(arm) is tuple:
        values = [_read(part, [word]) for part, word in zip(typing.get_args(arm), words, strict=True)]
        return None if None in values else tuple(values)
    if _is_literal(arm):
        return next((value for value in typing.get_args(arm) if str(value) == words[0]), None)
    if arm in _NUMBERS:
        return _number(arm, words[0])
    return words[0]


def _number(arm: type[int] | type[float], word: str) -> int | float | None:
    try:
        number = arm(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _metavar(arm: Any, text: str) -> str:
    if arm is Mark.MAPPING:
        return "MAPPING"
    if _is_list(arm):
        each = _metavar(typing.get_args(arm)[0], text)
        return f"{each} [{each} …]"
    if _origin(arm) is tuple:
        return " ".join(_metavar(part, text) for part in typing.get_args(arm))
    return {int: "INT", float: "NUMBER"}.get(arm, text)


def _wanted(arm: Any) -> str:
    if arm is Mark.MAPPING:
        return "a mapping as JSON or YAML"
    if _is_list(arm):
        return "one value or more"
    if _origin(arm) is tuple:
        parts = typing.get_args(arm)
        return f"{len(parts)} {_NUMBERS.get(parts[0], 'value')}s"
    return f"a {_NUMBERS.get(arm, 'text')}"


# --- the options of a configuration ---


def options_of(config_type: type[Any]) -> dict[str, Option]:
    """Returns the options of a command by their fields' names, in the order of the fields."""
    kinds, texts = typing.get_type_hints(config_type, include_extras=True), _field_texts(config_type)
    return {
        field.name: Option(
            field=field.name,
            kind=kinds[field.name],
            default=field.default if field.default_factory is NEVER else field.default_factory(),
            text=texts.get(field.name, ""),
            is_positional=Mark.POSITIONAL in getattr(kinds[field.name], "__metadata__", ()),
        )
        for field in dataclasses.fields(config_type)
    }


def _field_texts(config_type: type[Any]) -> dict[str, str]:
    """Returns the texts under the fields of a dataclass and of those that it inherits from, each in one line."""
    texts: dict[str, str] = {}
    for owner in reversed(config_type.__mro__):
        if dataclasses.is_dataclass(owner):
            body = _class_bodies(inspect.getsourcefile(owner) or "").get(owner.__name__, [])
            for field, following in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                    assert isinstance(field.target, ast.Name) and isinstance(following.value, ast.Constant)
                    texts[field.target.id] = " ".join(str(following.value.value).split())
    return texts


@functools.cache
def _class_bodies(file: str) -> dict[str, list[ast.stmt]]:
    with open(file, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
