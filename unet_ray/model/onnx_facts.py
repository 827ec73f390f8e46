"""What a network made elsewhere takes and gives, as plain values that a model folder keeps.

Sizes are (height, width) in pixels; `N` frames, `C` colours or classes, `H` height, `W` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

LAYOUTS = ("nchw", "nhwc")
DTYPES = ("float32", "uint8")
KINDS = ("logits", "probabilities", "ids")
MAX_SIDE_PX = 16_384
MAX_BATCH = 1_024
MAX_CLASSES = 256
"""A mask is uint8."""

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class OnnxFacts:
    """The one input and the one output of a network, as far as its file or a trial shows them."""

    input_name: str
    layout: str
    """Of the input: one of `LAYOUTS`."""
    dtype: str
    """Of the input: one of `DTYPES`; uint8 is not normalised."""
    batch: int | None
    """Frames that it takes at once; None for any number."""
    size: tuple[int | None, int | None]
    """Of the input; None along a side where any will do."""
    output_name: str
    output_layout: str
    """One of `LAYOUTS`, or `nhw` for class ids without a channel."""
    n_classes: int
    kind: str | None
    """One of `KINDS`; None before a trial has looked at the values of an output that may be either of the first two."""
    output_size: Size | None = None
    """None before a trial."""

    def __post_init__(self) -> None:
        problem = _first_problem(self)
        if problem:
            raise ValueError(problem)

    @property
    def gives_ids(self) -> bool:
        """Whether the network chooses the class itself, so that nothing is known of its confidence."""
        return self.kind == "ids"

    @property
    def scale(self) -> tuple[Fraction, Fraction] | None:
        """Output size to input size, such as 1/4; None before a trial."""
        height_px, width_px = self.size
        if self.output_size is None or not height_px or not width_px:
            return None
        return Fraction(self.output_size[0], height_px), Fraction(self.output_size[1], width_px)

    def image_size(self, wanted: Size | None) -> Size:
        """Returns the size to work at: the network's own, or the wanted one where it takes any.

        Raises:
            ValueError: it takes another size than the wanted, or any and none is wanted.
        """
        fixed = " ".join(str(side or "any") for side in self.size)
        if wanted is None:
            height_px, width_px = self.size
            if height_px is None or width_px is None:
                raise ValueError(f"the network takes images of several sizes ({fixed}); choose one with --image-size")
            return height_px, width_px
        if any(side not in (None, of_wanted) for side, of_wanted in zip(self.size, wanted, strict=True)):
            raise ValueError(
                f"--image-size is {wanted[0]} {wanted[1]}, the network takes {fixed} only; give that, or export it "
                "with any height and width"
            )
        return wanted

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> OnnxFacts:
        """Returns the facts of a model folder.

        Raises:
            ValueError: a field is missing, unknown, or of a value that `to_dict` never gives.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or fields.keys() != names:
            raise ValueError(f"the facts of an ONNX network have the keys {', '.join(sorted(names))}")
        pairs = {name: fields[name] for name in ("size", "output_size")}
        if any(not isinstance(value, list | None) for value in pairs.values()):
            raise ValueError("size and output_size are lists of two numbers")
        return cls(**{**fields, **{name: value if value is None else tuple(value) for name, value in pairs.items()}})


def _first_problem(facts: OnnxFacts) -> str | None:
    """The first field whose value no network can have, as text."""
    checks = {
        "input_name": isinstance(facts.input_name, str),
        "layout": facts.layout in LAYOUTS,
        "dtype": facts.dtype in DTYPES,
        "batch": facts.batch is None or _is_count(facts.batch, MAX_BATCH),
        "size": _is_size(facts.size, (type(None), int)),
        "output_name": isinstance(facts.output_name, str),
        "output_layout": facts.output_layout in (LAYOUTS if facts.kind != "ids" else (*LAYOUTS, "nhw")),
        "n_classes": _is_count(facts.n_classes, MAX_CLASSES),
        "kind": facts.kind is None or facts.kind in KINDS,
        "output_size": facts.output_size is None or _is_size(facts.output_size, (int,)),
    }
    wrong = [name for name, is_right in checks.items() if not is_right]
    return f"{wrong[0]} of an ONNX network is {str(getattr(facts, wrong[0]))[:50]!r}" if wrong else None


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 1 <= value <= limit


def _is_size(value: Any, types: tuple[type, ...]) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(side) in types and (side is None or 1 <= side <= MAX_SIDE_PX) for side in value)
    )
