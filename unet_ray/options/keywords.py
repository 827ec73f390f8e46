"""Functions that take a configuration, or its fields as keywords; each option is written once, as a field.

>>> @takes_options(SegmentConfig)
... def segment(config: SegmentConfig) -> SegmentResult: ...
>>> segment(SegmentConfig(model="runs/first", frames="drives", out="labels"))
>>> segment(model="runs/first", frames="drives", out="labels")  # the same

Type checkers know the keywords by the configuration's own constructor, editors and notebooks by `__signature__`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, get_type_hints, overload

from unet_ray.options.config_files import read_recipe
from unet_ray.options.config_types import forms

P = ParamSpec("P")
C = TypeVar("C")
R = TypeVar("R")
C_contra = TypeVar("C_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class TakesOptions(Protocol[P, C_contra, R_co]):
    """A function of a configuration, or of what its constructor takes."""

    @overload
    def __call__(self, config: C_contra, /) -> R_co: ...

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def takes_options(config_type: Callable[P, C]) -> Callable[[Callable[[C], R]], TakesOptions[P, C, R]]:
    """Returns a decorator for functions of one configuration: they take its fields as keywords, too."""

    def decorate(run: Callable[[C], R]) -> TakesOptions[P, C, R]:
        assert isinstance(config_type, type)

        @functools.wraps(run)
        def call(*given: Any, **options: Any) -> R:
            if len(given) == 1 and isinstance(given[0], config_type) and not options:
                return run(cast(C, given[0]))
            _require_options(run.__name__, config_type, given, options)
            return run(cast(C, config_type(*given, **options)))

        show_signature(call, config_type)
        call.__doc__ = f"{inspect.cleandoc(run.__doc__ or '')}\n\n{option_texts(config_type)}"
        return cast(TakesOptions[P, C, R], call)

    return decorate


def show_signature(function: Callable[..., Any], config_type: Any, before: tuple[str, ...] = ()) -> None:
    """Gives a function the signature of a configuration's constructor, for editors and notebooks.

    Args:
        function: or a method of the class.
        config_type: the configuration.
        before: parameters that the function has before these.
    """
    described = cast(Any, getattr(function, "__func__", function))
    own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in before]
    signature = signature_of(config_type)
    # What it returns as it is written: the module that has the type may not be loaded.
    described.__signature__ = signature.replace(
        parameters=[*own, *signature.parameters.values()],
        return_annotation=described.__annotations__.get("return", inspect.Signature.empty),
    )


def _require_options(name: str, config_type: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raises TypeError, in one line, for another configuration, an option that there is not and one that is missing."""
    if given and dataclasses.is_dataclass(given[0]):
        and_more = " and keywords" if options else ""
        raise TypeError(
            f"{name} takes a {config_type.__name__}, or its fields as keywords; a {type(given[0]).__name__}{and_more} "
            "was given"
        )
    known = signature_of(config_type).parameters
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"perhaps you meant {close[0]}" if close else f"help(unet_ray.{name}) shows them all"
            raise TypeError(f"{name} has no option {option}; {hint}")
    required = [option for option, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [option for option in required[len(given) :] if option not in options]:
        raise TypeError(f"{name} needs {', '.join(missing)}; help(unet_ray.{name}) tells more")


@functools.lru_cache
def signature_of(config_type: Any) -> inspect.Signature:
    """Returns what a configuration is made of, required options first, with types as a person reads them."""
    hints, special = get_type_hints(config_type), forms(config_type)
    signature = inspect.signature(config_type)
    parameters = [
        parameter.replace(annotation=special[name].given if name in special else hints[name])
        for name, parameter in signature.parameters.items()
    ]
    ordered = sorted(parameters, key=lambda parameter: (parameter.kind, parameter.default is not parameter.empty))
    return signature.replace(parameters=ordered)


def option_texts(config_type: Any) -> str:
    """Returns the options of a configuration with the texts under its fields, one paragraph each."""
    texts = {name: text for ancestor in reversed(config_type.__mro__) for name, text in _field_texts(ancestor).items()}
    lines = ["Options:"]
    for name, parameter in signature_of(config_type).parameters.items():
        note = "" if parameter.default is parameter.empty else f" (default: {parameter.default!r})"
        text = " ".join(texts.get(name, "").split()) + note
        lines.append(textwrap.fill(f"{name}: {text}", 118, initial_indent="    ", subsequent_indent=" " * 8))
    return "\n".join(lines)


def _field_texts(dataclass_type: Any) -> dict[str, str]:
    """The texts that stand under the fields in the source of a dataclass; Python keeps them nowhere else."""
    class_node = _classes_of(dataclass_type.__module__).get(dataclass_type.__name__)
    if class_node is None:
        return {}
    texts: dict[str, str] = {}
    for node, after in zip(class_node.body, class_node.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = text
    return texts


@functools.lru_cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The classes in the source of a module of ours."""
    if not module.startswith("unet_ray."):
        return {}
    nodes = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def recipe_options(recipe: str, config_type: Callable[..., Any]) -> dict[str, Any]:
    """Returns the options of a recipe as the command line would have read them. Raises ValueError for a wrong name."""
    hints = get_type_hints(config_type)
    return {name: _as_in_python(value, hints[name]) for name, value in read_recipe(recipe).items()}


def _as_in_python(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if hint is float else value
