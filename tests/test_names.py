"""Names say what they hold: words that fit anything bind no name."""

from __future__ import annotations

import ast

from unet_ray import PACKAGE

ROOT = PACKAGE.parent
VAGUE = {"told", "found", "said", "shown", "held", "looked", "some", "here", "place"}


def bound_name(node: ast.AST) -> str | None:
    """The name that a node binds: a variable, attribute, argument, function, class, import, caught error or pattern."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.ExceptHandler(name=name) | ast.MatchAs(name=name) | ast.MatchStar(name=name):
            return name
        case ast.alias(name=name, asname=alias):
            return alias or name
    return None


def test_no_name_is_a_word_that_fits_anything():
    vague = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {bound_name(node)}"
        for folder in ("unet_ray", "jobs", "tests")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if bound_name(node) in VAGUE
    ]
    assert vague == []
