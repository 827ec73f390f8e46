"""A job's options in files: YAML and recipes become command-line options, a configuration becomes YAML."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, TypeVar

import yaml

from unet_ray import storage
from unet_ray.suggestions import closest, option_meant, perhaps

T = TypeVar("T")


class Mark(enum.Enum):
    """What the type of an option says of how the command line takes it."""

    MAPPING = "a mapping as text, which `read_mapping` reads"
    POSITIONAL = "given without the option's name"


MAPPING_TEXT = Mark.MAPPING
Positional = Annotated[T, Mark.POSITIONAL]


class _YamlLoader(yaml.SafeLoader):
    """YAML without its whole numbers to base 60: `workers: 1:4` is the text that it looks like, not 64."""

    def construct_whole_number(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else self.construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML takes the last of two equal keys, so that a class or an option would be lost without a word."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_whole_number)


def read_yaml(uri: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises ValueError where there is no such file or no mapping in it."""
    return _require_mapping(read_content(uri), uri)


def read_content(uri: str) -> Any:
    """Returns what a YAML file holds. Raises ValueError where there is no such file or it is no YAML."""
    try:
        return _content(storage.read_bytes(storage.resolve(uri)), uri)
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: no such file") from error
    except (IsADirectoryError, storage.NotAFile) as error:
        raise ValueError(f"{uri}: {error.strerror}") from error


def read_mapping(text: str | bytes, source: str) -> dict[str, Any]:
    """Returns the mapping in a text of YAML or JSON. Raises ValueError, which names the source, where there is none."""
    return _require_mapping(_content(text, source), source)


def _content(text: str | bytes, source: str) -> Any:
    try:
        return yaml.load(text, _YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        position = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        raise ValueError(f"{source} is neither YAML nor JSON{position}: {getattr(error, 'problem', error)}") from error


def _require_mapping(content: Any, source: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds no options; write one `name: value` a line")
    return content


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    folder = resources.files("unet_ray") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Returns the options of a recipe of the package. Raises ValueError for an unknown name."""
    if name not in recipe_names():
        meant = perhaps(closest(name, recipe_names()))
        raise ValueError(f"--recipe is {name!r}; {meant}the recipes are {', '.join(recipe_names())}")
    return yaml.load((resources.files("unet_ray") / "recipes" / f"{name}.yaml").read_bytes(), _YamlLoader)


def option_values(options: Mapping[str, Any], config_type: type[Any], source: str) -> dict[str, Any]:
    """Returns the options of a file by the names of their fields; their values are as YAML gives them.

    Args:
        options: option names (`-` and `_` are the same) and YAML values.
        config_type: the dataclass whose fields are the options.
        source: the file, for the message.

    Raises:
        ValueError: an option that the job does not have.
    """
    fields = sorted(field.name for field in dataclasses.fields(config_type))
    values = {}
    for option, value in options.items():
        field = str(option).replace("-", "_")
        if field not in fields:
            raise ValueError(
                f"{source}: unknown option {option!r}; {perhaps(option_meant(field, fields))}the options are "
                f"{', '.join(fields)}"
            )
        values[field] = value
    return values


def to_yaml(config: Any) -> str:
    """Returns a configuration as the YAML file that is written beside every run and that `--config` reads."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def to_plain(config: Any) -> dict[str, Any]:
    """Returns a configuration as that file's content: option names with numbers, texts, lists and None.

    Options of the filesystem say how to reach the files, from here and now, and nothing of the result: they are left
    out.
    """
    options = dataclasses.asdict(config)
    options.pop("storage_options", None)
    return _plain(options)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
