"""Pages of HTML: one file each, without scripts, and every text in it escaped.

Names of frames, classes and files may hold anything. Jinja2 escapes what HTML would take for a tag or an attribute,
`printable` what turns the direction of writing or is no letter, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from unet_ray import storage
from unet_ray.messages import count, printable

NAME = "report.html"
MAX_BYTES = 5_000_000
"""Of a page: what a mail takes."""


def render(template: str, **context: Any) -> bytes:
    """Returns a page.

    Args:
        template: one of the HTML files beside this module.
        context: what it names.
    """
    return _environment().get_template(template).render(**context).encode()


def write(uri: str, page: bytes) -> str:
    """Writes a page, whole or not at all, and returns its URI."""
    storage.write_whole(uri, page)
    return uri


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unet_ray", "reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_visible,
    )
    environment.filters |= {"percent": percent, "figure": figure, "whole": whole, "count": count}
    return environment


def _visible(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def percent(value: float | None) -> str:
    """Returns a share as people read it: `34.5%`, `0.12%`, `< 0.01%`, and `–` where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0%"
    if abs(value) < 1e-4:
        return "< 0.01%"
    return f"{value:.2%}" if abs(value) < 0.01 else f"{value:.1%}"


def figure(value: float | None) -> str:
    """Returns a number with three digits behind the point, and `–` where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def whole(value: int) -> str:
    """Returns a whole number with its thousands parted."""
    return f"{value:,}"
