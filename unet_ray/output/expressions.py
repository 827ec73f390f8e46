"""Conditions on rows as texts, read into pyarrow's expressions; nothing of a text is run.

>>> read_condition("pixels_pedestrian > 0 and confidence < 0.6", schema)
(<pyarrow.compute.Expression …>, {"pixels_pedestrian", "confidence"})

A text is written as in Python: names of columns, numbers, texts in quotes; `== != < <= > >=`, also two in a row
(`0.2 < confidence < 0.5`); `and`, `or`, `not`; `+ - * /`; `sequence in ("a", "b")`; `reason is None`. A column whose
name is no word of Python is `field("its name")`; `starts_with(frame_id, "drive07/")` looks at the beginning of a text.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_MOST_LETTERS = 10_000

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_EXAMPLE = "write it as in Python: pixels_pedestrian > 0 and status == 'ok'"


def read_condition(text: str, schema: pa.Schema) -> tuple[pc.Expression, set[str]]:
    """Returns a condition and the columns that it looks at.

    Raises:
        ValueError: one line: a text that is none, a column that is not there, types that cannot be compared.
    """
    if len(text) > _MOST_LETTERS:
        raise ValueError(f"a condition of {len(text):,} letters; at most {_MOST_LETTERS:,} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise ValueError(f"{text!r} is no condition ({reason}); {_EXAMPLE}") from error
    reader = _Reader(text, schema)
    try:
        condition = reader.expression(tree.body)
    except (pa.ArrowException, RecursionError) as error:
        raise _misfit(text, error) from error
    require_condition(condition, schema, text)
    return condition, reader.columns


def require_condition(condition: pc.Expression, schema: pa.Schema, text: str) -> None:
    """Raises ValueError, in one line, where an expression does not say yes or no of rows with such columns."""
    try:
        schema.empty_table().filter(condition)
    except pa.ArrowException as error:
        raise _misfit(text, error) from error


def _misfit(text: str, error: Exception) -> ValueError:
    reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
    return ValueError(f"{text!r} does not fit the output's columns: {reason}")


class _Reader:
    """Nodes of Python's grammar to expressions; those that mean nothing here are refused."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text, self._schema = text, schema
        self.columns: set[str] = set()

    def expression(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.Name(id=name):
                return self._field(name)
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value)
            case ast.BoolOp(op=op, values=values):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                return _joined(join, map(self.expression, values))
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return ~self.expression(operand)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return pc.scalar(-value)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self.expression(left), self.expression(right))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                return _joined(operator.and_, map(self._comparison, lefts, ops, rights))
            case ast.Call(func=ast.Name(id="field"), args=[ast.Constant(value=str(name))], keywords=[]):
                return self._field(name)
            case ast.Call(func=ast.Name(id="starts_with"), args=[column, ast.Constant(value=str(start))], keywords=[]):
                return pc.starts_with(self.expression(column), start)
        raise self._refused(node)

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        match op, right:
            case ast.Is() | ast.Eq(), ast.Constant(value=None):
                return self.expression(left).is_null()
            case ast.IsNot() | ast.NotEq(), ast.Constant(value=None):
                return self.expression(left).is_valid()
            case ast.In() | ast.NotIn(), ast.Tuple(elts=items) | ast.List(elts=items):
                values = [item.value for item in items if isinstance(item, ast.Constant)]
                if values and len(values) == len(items):
                    among = self.expression(left).isin(values)
                    return ~among if isinstance(op, ast.NotIn) else among
            case _ if type(op) in _COMPARISONS:
                return _COMPARISONS[type(op)](self.expression(left), self.expression(right))
        raise self._refused(right)

    def _field(self, name: str) -> pc.Expression:
        if name not in self._schema.names:
            close = difflib.get_close_matches(name, self._schema.names, n=1)
            hint = f"perhaps you meant {close[0]}" if close else f"they are {', '.join(self._schema.names[:12])}, …"
            raise ValueError(f"{self._text!r}: there is no column {name}; {hint}")
        self.columns.add(name)
        return pc.field(name)

    def _refused(self, node: ast.expr) -> ValueError:
        part = ast.get_source_segment(self._text.strip(), node) or ast.unparse(node)
        return ValueError(f"{self._text!r}: {part} is not understood here; {_EXAMPLE}")


def _joined(join: Callable[[Any, Any], Any], parts: Iterable[pc.Expression]) -> pc.Expression:
    first, *others = parts
    for part in others:
        first = join(first, part)
    return first
