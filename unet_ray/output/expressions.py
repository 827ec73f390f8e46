"""Conditions on the columns of `frames/`, as a person writes them: text in the manner of SQL to an Arrow expression.

>>> parse_expression("pixels_pedestrian > 0 and sequence in ('drive07', 'drive08')", schema)

    condition   = all of { "or" all of },  all of = test { "and" test },  test = "not" test | comparison
    comparison  = value [ ("=" "==" "!=" "<>" "<" "<=" ">" ">=") value | "is" ["not"] "null"
                        | ["not"] "in" "(" literal { "," literal } ")" | ["not"] "like" 'text with % and _' ]
    value       = column | "column" | 12 | 0.5 | 'text' | true | false | "(" condition ")" | + - * / of numbers

As in SQL, words have no case, columns have, `''` is a quote within text, and a comparison with a null is null, which
chooses no row. A name that is no plain word stands in double quotes. Calculations are in float64; a time is compared
with text such as '2026-11-30 12:00:00'. Nothing of the text runs as code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from unet_ray.messages import first_few

_LETTERS, _DEPTH = 10_000, 50
"""At most, of a condition and of brackets within brackets: Python and Arrow walk through it by recursion."""

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\w)|(?P<text>'(?:[^']|'')*')|(?P<quoted>\"(?:[^\"]|\"\")*\")"
    r"|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|==|[=<>(),+*/-]))"
)
_WORDS = ("and", "or", "not", "in", "is", "null", "like", "true", "false")

_COMPARED: dict[str, Callable[[pc.Expression, pc.Expression], pc.Expression]] = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_UINT64 = pa.uint64()

# Not the operators of an expression, which end everything at a division by 0.
_CALCULATED = {"+": pc.add, "-": pc.subtract, "*": pc.multiply, "/": pc.divide}


def parse_expression(text: str, schema: pa.Schema) -> pc.Expression:
    """Returns a condition on a table's columns, for `filter` of a table or batch.

    Raises:
        ValueError: no condition, a column that is not there, or two values that cannot be compared; one line.
    """
    return _parsed(text, schema)[0]


def column_names(text: str, schema: pa.Schema) -> list[str]:
    """Returns the names of the columns that a condition looks at, in their order in the table. Raises as above."""
    names = _parsed(text, schema)[1]
    return [name for name in schema.names if name in names]


def _parsed(text: str, schema: pa.Schema) -> tuple[pc.Expression, set[str]]:
    parser = _Parser(text, schema)
    expression = parser.condition()
    try:
        schema.empty_table().filter(expression)
    except pa.ArrowException as error:
        parser.fail(f"it cannot be computed: {str(error).splitlines()[0]}")
    return expression, parser.columns


class _Token(NamedTuple):
    kind: str
    """`number`, `text`, `quoted`, `word`, `sign`, or `end`."""
    text: str

    @property
    def word(self) -> str:
        """The sign or word of the language that it is, in lower case; else nothing."""
        word = self.text.lower()
        return word if self.kind == "sign" or (self.kind == "word" and word in _WORDS) else ""


class _Value(NamedTuple):
    expression: pc.Expression
    kind: str
    """`number`, `text`, `boolean`, `time`, or `other`, which can only be null or not."""
    source: str
    """As it was written."""
    type: pa.DataType | None = None
    """Of a column."""
    literal: bool | int | float | str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is an integer of at most 64 bits with sign."""
        dtype = self.type
        return isinstance(self.literal, int) or (dtype is not None and pa.types.is_integer(dtype) and dtype != _UINT64)


class _Parser:
    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.columns: set[str] = set()
        self._position = self._depth = 0
        if len(text) > _LETTERS:
            self.fail(f"it has {len(text):,} letters; at most {_LETTERS:,} are read")
        self._tokens = self._split()
        if not self._tokens:
            self.fail("it is empty; write one such as pixels_road > 0")

    def fail(self, problem: str) -> NoReturn:
        """Raises ValueError with a problem and the condition that has it."""
        text = self.text if len(self.text) <= 80 else f"{self.text[:80]}…"
        raise ValueError(f"the condition `{text}` cannot be used: {problem}") from None

    def condition(self) -> pc.Expression:
        """Returns the whole text's expression."""
        value = self._any_of()
        if self._token.kind != "end":
            self.fail(f"{self._token.text} is not expected there; conditions are joined by `and` and `or`")
        return self._truth(value).expression

    # --- from the weakest to the strongest bond ---

    def _any_of(self) -> _Value:
        value = self._all_of()
        while self._take("or"):
            value = self._test_of(pc.or_kleene(self._truth(value).expression, self._truth(self._all_of()).expression))
        return value

    def _all_of(self) -> _Value:
        value = self._test()
        while self._take("and"):
            value = self._test_of(pc.and_kleene(self._truth(value).expression, self._truth(self._test()).expression))
        return value

    def _test(self) -> _Value:
        if not self._take("not"):
            return self._comparison()
        return self._test_of(pc.invert(self._truth(self._deeper(self._test)).expression))

    def _comparison(self) -> _Value:
        left = self._sum()
        if sign := self._take(*_COMPARED):
            left, right = self._alike(left, self._sum())
            return self._test_of(_COMPARED[sign](left.expression, right.expression))
        if self._take("is"):
            is_not = self._take("not")
            self._expect("null")
            return self._test_of(left.expression.is_valid() if is_not else left.expression.is_null())
        is_not = self._take("not")
        if self._take("in"):
            test = self._in_list(left)
        elif self._take("like"):
            test = self._like(left)
        elif is_not:
            self.fail(f"after `not` there is {self._seen()} instead of `in` or `like`")
        else:
            return left
        return self._test_of(pc.invert(test) if is_not else test)

    def _in_list(self, value: _Value) -> pc.Expression:
        self._expect("(")
        literals: list[bool | int | float | str] = []
        while not literals or self._take(","):
            right = self._alike(value, self._signed())[1]
            if right.literal is None:
                self.fail(f"{right.source} is no literal; `in` takes numbers or text")
            literals.append(right.literal)
        self._expect(")")
        if any(isinstance(literal, float) for literal in literals):
            literals = [float(literal) for literal in literals]
        values = pa.array(literals)
        if value.kind == "time":
            values = values.cast(value.type)
        elif value.kind == "number" and not (value.is_whole and pa.types.is_integer(values.type)):
            value, values = value._replace(expression=self._number(value)), values.cast(pa.float64(), safe=False)
        null = pc.scalar(pa.scalar(None, pa.bool_()))
        return pc.if_else(value.expression.is_valid(), value.expression.isin(values), null)

    def _like(self, value: _Value) -> pc.Expression:
        pattern = self._signed()
        if value.kind != "text" or not isinstance(pattern.literal, str):
            self.fail("`like` compares a column of text with a pattern in single quotes, such as 'drive07%'")
        return pc.match_like(value.expression, pattern.literal)

    def _sum(self) -> _Value:
        return self._calculation(self._product, "+", "-")

    def _product(self) -> _Value:
        return self._calculation(self._signed, "*", "/")

    def _calculation(self, operand: Callable[[], _Value], *signs: str) -> _Value:
        value = operand()
        while sign := self._take(*signs):
            sides = [self._number(side) for side in (value, operand())]
            value = _Value(_CALCULATED[sign](*sides), "number", f"the calculation with {sign}")
        return value

    def _signed(self) -> _Value:
        if not self._take("-"):
            return self._plain()
        value = self._deeper(self._signed)
        if isinstance(value.literal, int | float) and not isinstance(value.literal, bool):
            return self._literal(-value.literal, "number", f"-{value.source}")
        return _Value(pc.negate(self._number(value)), "number", f"-{value.source}")

    def _plain(self) -> _Value:
        token = self._next()
        if token.kind == "number":
            return self._literal(self._parsed_number(token.text), "number", token.text)
        if token.kind == "text":
            return self._literal(token.text[1:-1].replace("''", "'"), "text", token.text)
        if token.word in ("true", "false"):
            return self._literal(token.word == "true", "boolean", token.text)
        if token.word == "(":
            value = self._deeper(self._any_of)
            self._expect(")")
            return value
        if token.kind == "quoted":
            return self._column(token.text[1:-1].replace('""', '"'))
        if token.kind == "word" and not token.word:
            return self._column(token.text)
        if token.word == "null":
            self.fail("a comparison with null is never true; write `is null` or `is not null`")
        return self.fail(f"there is {_named(token)} instead of a column, a number or text in single quotes")

    # --- values ---

    def _parsed_number(self, text: str) -> int | float:
        number = int(text) if text.isdigit() else float(text)
        if isinstance(number, int) and number >= 2**63:
            self.fail(f"{text} is over 63 bits")
        return number

    def _literal(self, literal: bool | int | float | str, kind: str, source: str) -> _Value:
        return _Value(pc.scalar(literal), kind, source, literal=literal)

    def _column(self, name: str) -> _Value:
        if self.schema.get_field_index(name) < 0:
            close = difflib.get_close_matches(name, self.schema.names, n=1, cutoff=0.5)
            perhaps = f"perhaps you meant {_quoted(close[0])}; " if close else ""
            columns = first_few([_quoted(column) for column in self.schema.names], 24)
            self.fail(f"there is no column {name}; {perhaps}the columns are {columns} (text stands in single quotes)")
        self.columns.add(name)
        dtype = self.schema.field(name).type
        return _Value(pc.field(name), _kind(dtype), _quoted(name), dtype)

    def _alike(self, left: _Value, right: _Value) -> tuple[_Value, _Value]:
        """Returns two values that Arrow compares: text beside a time as a time."""
        if left.kind == "time" and isinstance(right.literal, str):
            right = self._time(right.literal, left)
        elif right.kind == "time" and isinstance(left.literal, str):
            left = self._time(left.literal, right)
        if left.kind != right.kind or left.kind == "other":
            kinds = " and ".join(f"{value.source} is {_KINDS[value.kind]}" for value in (left, right))
            self.fail(f"{kinds}, which do not compare (text stands in single quotes)")
        if left.kind == "number" and not (left.is_whole and right.is_whole):
            # Arrow compares them as float64 too, but fails at an integer of over 53 bits.
            left, right = (side._replace(expression=self._number(side)) for side in (left, right))
        return left, right

    def _time(self, text: str, column: _Value) -> _Value:
        try:
            time = pa.scalar(text).cast(column.type)
        except pa.ArrowException:
            zone = "Z" if getattr(column.type, "tz", None) else ""
            self.fail(f"'{text}' is no {column.type} as {column.source} is; write 2026-11-30 12:00:00{zone}")
        return _Value(pc.scalar(time), "time", f"'{text}'", literal=text)

    def _number(self, value: _Value) -> pc.Expression:
        if value.kind != "number":
            self.fail(f"{value.source} is {_KINDS[value.kind]}, with which nothing can be calculated")
        return value.expression.cast(pa.float64(), safe=False)

    def _truth(self, value: _Value) -> _Value:
        if value.kind != "boolean":
            self.fail(
                f"{value.source} is {_KINDS[value.kind]}, not a condition; compare it, such as {value.source} = …"
            )
        return value

    def _test_of(self, expression: pc.Expression) -> _Value:
        return _Value(expression, "boolean", "the comparison")

    # --- tokens ---

    def _split(self) -> Sequence[_Token]:
        tokens, position, text = [], 0, self.text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                rest = text[position:].lstrip()
                what = "an open quote at" if rest[0] in "'\"" else "something unknown:"
                self.fail(f"there is {what} {rest[:20]}")
            kind = str(match.lastgroup)
            tokens.append(_Token(kind, match[kind]))
            position = match.end()
        return tokens

    @property
    def _token(self) -> _Token:
        return self._tokens[self._position] if self._position < len(self._tokens) else _Token("end", "")

    def _seen(self) -> str:
        return _named(self._token)

    def _next(self) -> _Token:
        token = self._token
        self._position += 1
        return token

    def _take(self, *words: str) -> str:
        """Returns which of the words or signs comes next, and passes it; nothing where none of them does."""
        word = self._token.word
        if word not in words:
            return ""
        self._position += 1
        return word

    def _expect(self, word: str) -> None:
        if not self._take(word):
            self.fail(f"there is {self._seen()} instead of `{word}`")

    def _deeper(self, read: Callable[[], _Value]) -> _Value:
        self._depth += 1
        if self._depth > _DEPTH:
            self.fail(f"it has over {_DEPTH} brackets, signs or `not` within each other")
        value = read()
        self._depth -= 1
        return value


_KINDS = {
    "number": "a number",
    "text": "text",
    "boolean": "true or false",
    "time": "a time",
    "other": "neither number nor text",
}


def _kind(dtype: pa.DataType) -> str:
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
        return "number"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return "text"
    if pa.types.is_boolean(dtype):
        return "boolean"
    return "time" if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype) else "other"


def _quoted(name: str) -> str:
    """Returns a column's name as a condition has it."""
    plain = re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in _WORDS
    return name if plain else '"{}"'.format(name.replace('"', '""'))


def _named(token: _Token) -> str:
    return "the end" if token.kind == "end" else token.text
