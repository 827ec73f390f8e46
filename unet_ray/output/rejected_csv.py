"""`rejected.csv`: the rejected frames of an output, drawn from its rows.

| column | |
|---|---|
| `frame_id`, `uri`, `reason`, `error` | as in `frames/`; control letters as escapes (`\\x1b`), all else as it is |

It stands beside the output when it is published, and when nothing is, as too many frames are rejected. No digest proves
it; `segment` writes it again where it is not there.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator

import pyarrow.compute as pc

from unet_ray import storage
from unet_ray.messages import printable, shown_path
from unet_ray.output.plans import Plan
from unet_ray.output.rejected import rows_with_rejected

NAME = "rejected.csv"
COLUMNS = ("frame_id", "uri", "reason", "error")
_NAMED = 3


def write(plan: Plan, *, is_empty: bool = False) -> None:
    """Writes the list of all frames that are rejected so far; where none is, there is no list.

    Args:
        plan: of the output.
        is_empty: none is known to be, so that no row need be looked at.

    Raises:
        StorageError: rows are damaged, or the store did not answer.
        FileNotFoundError: another job has published rows meanwhile.
    """
    uri, lines = storage.join(plan.out, NAME), io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    rows: Iterator[tuple[str, ...]] = iter(()) if is_empty else _rejected(plan)
    first = next(rows, None)
    if first is None:
        storage.delete(uri)
        return
    writer.writerow(COLUMNS)
    writer.writerows(itertools.chain([first], rows))
    storage.write_whole(uri, lines.getvalue().encode())


def first_names(plan: Plan) -> str:
    """Returns the first frames that are rejected, and where the list of all is: for a message."""
    first = list(itertools.islice(_rejected(plan), _NAMED))
    names = ", ".join(f"{frame_id} ({reason})" for frame_id, _, reason, _ in first)
    return f"{names}; all in {shown_path(storage.join(plan.out, NAME))}"


def _rejected(plan: Plan) -> Iterator[tuple[str, ...]]:
    for _, rows in rows_with_rejected(plan, COLUMNS):
        for row in rows.filter(pc.is_valid(rows["reason"])).to_pylist():
            yield tuple(printable(row[name] or "") for name in COLUMNS)
