"""Paths and lists among the options: Python may give them in more forms than a configuration keeps.

| type | is kept as | may be given as |
|---|---|---|
| `Uri`, `OptionalUri` | `str` (or None) | a text or an `os.PathLike` (or None) |
| `Uris` | `tuple[str, ...]` | one of these, or several |
| `Texts`, `OptionalTexts` | `tuple[str, ...]` (or None) | a text, or several (or None) |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, dataclass_transform, get_type_hints

AnyPath = str | os.PathLike[str]
"""A local path or a URI."""


@dataclass(frozen=True)
class Form:
    """What an option may be given as, and how it is kept."""

    given: Any
    """The type, for people who read a signature."""
    keep: Callable[[str, Any], Any]
    """Takes the field's name and its value. Raises ValueError for a value that is none of these."""


def _refusal(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"--{name.replace('_', '-')} is {value!r}; give {allowed}")


def _one(name: str, value: Any) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise _refusal(name, value, "a text or a path")
    return path


def _one_or_none(name: str, value: Any) -> str | None:
    return None if value is None else _one(name, value)


def _several(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        return (_one(name, value),)
    if not isinstance(value, Iterable) or isinstance(value, bytes | dict):
        raise _refusal(name, value, "one, or a list of them")
    return tuple(_one(name, item) for item in value)


def _several_or_none(name: str, value: Any) -> tuple[str, ...] | None:
    return None if value is None else _several(name, value)


_Config = TypeVar("_Config")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def configuration(config_type: type[_Config]) -> type[_Config]:
    """Makes a frozen dataclass of keywords alone, whose constructor takes the fields below as they may be given.

    Of a plain dataclass, mypy asks for what a field without a default is kept as (python/mypy#14868).
    """
    return dataclass(frozen=True, kw_only=True)(config_type)


_Kept = TypeVar("_Kept")
_Given = TypeVar("_Given")

if TYPE_CHECKING:

    class _Option(Generic[_Kept, _Given]):
        """A field that is given as one type and read as another: for a type checker it is a descriptor."""

        def __get__(self, config: Any, owner: Any = None) -> _Kept: ...

        def __set__(self, config: Any, value: _Given) -> None: ...

    Uri = _Option[str, AnyPath]
    OptionalUri = _Option[str | None, AnyPath | None]
    Uris = _Option[tuple[str, ...], AnyPath | Iterable[AnyPath]]
    Texts = _Option[tuple[str, ...], str | Iterable[str]]
    OptionalTexts = _Option[tuple[str, ...] | None, str | Iterable[str] | None]
else:  # what the parser of the command line takes them for
    Uri = Annotated[str, Form(AnyPath, _one)]
    OptionalUri = Annotated[str | None, Form(AnyPath | None, _one_or_none)]
    Uris = Annotated[tuple[str, ...], Form(AnyPath | Iterable[AnyPath], _several)]
    Texts = Annotated[tuple[str, ...], Form(str | Iterable[str], _several)]
    OptionalTexts = Annotated[tuple[str, ...] | None, Form(str | Iterable[str] | None, _several_or_none)]

NOT_GIVEN: Any = None
"""The default of an `OptionalUri` and of `OptionalTexts`, of a type that they take."""

EMPTY: Any = ()
"""The same of `Uris` and `Texts`."""


@lru_cache
def forms(config_type: Any) -> dict[str, Form]:
    """Returns the fields of a configuration that have one of these types."""
    hints = get_type_hints(config_type, include_extras=True)
    metadata = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: item for name, items in metadata.items() for item in items if isinstance(item, Form)}


def keep_forms(config: Any) -> None:
    """Brings the fields of a configuration that is being made into the form in which it keeps them.

    Raises:
        ValueError: a value that is neither a path nor a list of them.
    """
    config_type: Any = type(config)
    for name, form in forms(config_type).items():
        object.__setattr__(config, name, form.keep(name, getattr(config, name)))
