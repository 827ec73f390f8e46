"""A command line becomes a command's configuration: the recipe's options, then the file's, then its own words.

Everything that a person can get wrong is a ValueError of one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from unet_ray.messages import first_few
from unet_ray.options import config_files
from unet_ray.options.cli_values import NEVER, Option, options_of
from unet_ray.suggestions import NEEDLESS, option_meant, perhaps

HELP = ("-h", "--help")


@dataclass(frozen=True)
class Command:
    """One subcommand: what it is told, and what it does with that."""

    config_type: type[Any]
    run: Callable[[Any], int]
    recipe: str | None = None
    """Of the package, that counts where none is given; None: the command has no recipes."""

    @cached_property
    def options(self) -> dict[str, Option]:
        """Its options by their fields' names."""
        return options_of(self.config_type)

    @property
    def positional(self) -> Option | None:
        """The option that is given by its value alone."""
        return next((option for option in self.options.values() if option.is_positional), None)

    @property
    def files(self) -> dict[str, Option]:
        """The options that name what other options are read from."""
        files = {
            "config": Option(
                field="config", kind=str, default=None, text="YAML file with some of these options (name: value)."
            )
        }
        if self.recipe:
            text = f"Recipe of the package to start from: {', '.join(config_files.recipe_names())}."
            files["recipe"] = Option(field="recipe", kind=str, default=self.recipe, text=text)
        return files


@dataclass
class Words:
    """A command line, sorted by option."""

    of_option: dict[str, list[str]] = field(default_factory=dict)
    """The words behind each option, by its field's name; none behind a switch."""
    off: set[str] = field(default_factory=set)
    """Switches that were given last as `--no-…`."""
    positional: list[str] = field(default_factory=list)
    help: str | None = None
    """`-h` or `--help`, where one was given."""


def sort_words(name: str, command: Command, arguments: Sequence[str], commands: Mapping[str, Command]) -> Words:
    """Sorts the words of a command line by option.

    An option of many values that is given again goes on: `--frames a --frames b`. Of any other the last one counts.

    Args:
        name: the command's.
        command: whose options they are.
        arguments: the words.
        commands: all commands by name, whose options may have been meant.

    Raises:
        ValueError: an option that the command does not have.
    """
    words = Words(help=next((word for word in arguments if word in HELP), None))
    taken, room = words.positional, math.inf
    for word in arguments if words.help is None else ():
        if not re.match("--|-[A-Za-z]", word):
            taken, room = (taken, room - 1) if room else (words.positional, math.inf)
            taken.append(word)
            continue
        title, equals, value = word.partition("=")
        option = _option(name, command, title, commands)
        before = words.of_option.get(option.field, []) if option.takes_many else []
        taken = words.of_option[option.field] = [*before, *([value] if equals else [])]
        words.off.discard(option.field)
        if title.startswith("--no-") and option.is_switch:
            words.off.add(option.field)
        # Where no word stands by itself, one too many is the option's, whose message names it.
        room = option.most_words - len(taken) if command.positional else math.inf
    return words


def _option(name: str, command: Command, title: str, commands: Mapping[str, Command]) -> Option:
    """Returns the option that a word names. Raises ValueError where it names none."""
    named = {option.title: option for option in (*command.options.values(), *command.files.values())}
    named |= {f"--no-{title[2:]}": option for title, option in named.items() if option.is_switch}
    named = {title: option for title, option in named.items() if title.startswith("--")}
    option = named.get(title.replace("_", "-"))
    if option is not None:
        return option
    field = title.lstrip("-").replace("-", "_").lower()
    fields = [title[2:].replace("-", "_") for title in named]
    hint, owners = "", [other for other, its in commands.items() if field in its.options and other != name]
    if command.positional and field == command.positional.field:
        hint = f"give {command.positional.title} by itself; "
    elif field in NEEDLESS:
        hint = f"{NEEDLESS[field]}; "
    elif meant := option_meant(field, fields):
        hint = perhaps("--" + meant.replace("_", "-"))
    elif owners:
        hint = f"it is one of {first_few(owners, len(owners))}; "
    raise ValueError(f"{name} has no option {title}; {hint}`unet-ray {name} --help` shows them all")


def configuration(name: str, command: Command, words: Words) -> Any:
    """Returns the configuration of a command. Precedence: `--recipe` < `--config` < the options themselves.

    Raises:
        ValueError: an option or a combination that the command does not allow.
    """
    values: dict[str, Any] = {}
    if recipe := recipe_of(command, words):
        values |= _of_file(command, config_files.read_recipe(recipe), f"recipe {recipe}")
    if "config" in words.of_option:
        file = command.files["config"].read(words.of_option["config"])
        values |= _of_file(command, config_files.read_yaml(file), file)
    given = {field: text for field, text in words.of_option.items() if field in command.options}
    values |= {field: _of_line(command.options[field], text, field in words.off) for field, text in given.items()}
    values |= _of_positional(name, command, words.positional)
    missing = [
        option.title for option in command.options.values() if option.default is NEVER and option.field not in values
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; `unet-ray {name} --help` tells more")
    return command.config_type(**values)


def recipe_of(command: Command, words: Words) -> str | None:
    """Returns the recipe that a command starts from."""
    if "recipe" not in words.of_option:
        return command.recipe
    return command.files["recipe"].read(words.of_option["recipe"])


def _of_file(command: Command, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    values = config_files.option_values(options, command.config_type, source)
    try:
        return {field: command.options[field].from_file(value) for field, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _of_line(option: Option, words: Sequence[str], is_off: bool) -> Any:
    if option.is_switch and not words:
        return not is_off
    return option.read(words)


def _of_positional(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    option = command.positional
    if not words:
        return {}
    if option is None:
        raise ValueError(f"{words[0]!r} belongs to no option of {name}; `unet-ray {name} -h` shows them")
    if len(words) > 1:
        raise ValueError(f"{name} takes one {option.title}, and {words[1]!r} is one too many")
    return {option.field: option.read(words)}


def recipe_line(recipe: str, config: Any) -> str:
    """Returns which recipe a job uses, and which of its options the command line or a file has changed."""
    plain = config_files.to_plain(config)
    changed = [name for name, value in config_files.read_recipe(recipe).items() if plain[name] != value]
    but = ", but for " + " ".join(f"--{name.replace('_', '-')}" for name in changed) if changed else ""
    return f"recipe: {recipe}{but}"
