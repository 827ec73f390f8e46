"""All contests and rows of the benchmark, and how rounds of them are played."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from unet_ray.bench import cost_contests, labelling_contests, onnx_contests, photo_contests, training_contests
from unet_ray.bench.arena import Arena, Contest, ContestantFailed
from unet_ray.bench.benchmark import Journal, Measurement, Row, Skipped, in_turn, lacking

CONTESTS = {
    contest.name: contest
    for contest in (
        *labelling_contests.CONTESTS,
        *photo_contests.CONTESTS,
        *cost_contests.CONTESTS,
        *training_contests.CONTESTS,
        *onnx_contests.CONTESTS,
        labelling_contests.GPU,
    )
}

CPU_ROWS = {
    row.name: row
    for row in (
        *(*labelling_contests.ROWS, *photo_contests.ROWS, *cost_contests.ROWS, *training_contests.ROWS),
        *onnx_contests.ROWS,
    )
}
"""By name, in the table's order."""

GPU_ROWS = {row.name: row for row in labelling_contests.GPU_ROWS}
"""What `--device gpu` measures."""

ROWS = {**CPU_ROWS, **GPU_ROWS}


def play(
    contest: Contest, rows: Sequence[Row], arena: Arena, journal: Journal, repeats: int, say: Callable[[str], None]
) -> bool:
    """Runs rounds until each of these rows has enough of them; what is measured is saved at once.

    Returns:
        Whether no contestant failed. One that is skipped, or fails, takes its rows with it and no others.
    """
    settings = {"source": arena.source, **vars(arena.settings), "network": dataclasses.asdict(arena.settings.network)}
    rounds = journal.rounds(contest.name, settings)
    went_well = True
    while todo := lacking([row for row in rows if not _is_out(row, journal)], rounds, repeats):
        wanted = [name for name in contest.contestants if any(name in row.needs for row in todo)]
        order = in_turn(wanted, len(rounds))
        arena.round_number = len(rounds)
        measured: dict[str, Any] = {}
        rounds.append(measured)
        for name in order:
            try:
                measured[name] = contest.contestants[name](arena)
                say(f"{contest.name} {name}: {_brief(measured[name])}")
            except Skipped as reason:
                journal.missing[f"{contest.name}.{name}"] = f"skipped: {reason}"
            except (ContestantFailed, ValueError, OSError) as error:
                journal.missing[f"{contest.name}.{name}"], went_well = f"failed: {error}", False
            if name not in measured:
                say(f"{contest.name} {name}: {journal.missing[f'{contest.name}.{name}']}")
            if contest.compare:
                contest.compare(arena, measured)
            journal.save()
        if not measured:
            rounds.remove(measured)
    return went_well


def _is_out(row: Row, journal: Journal) -> bool:
    return any(f"{row.contest}.{name}" in journal.missing for name in row.needs)


def _brief(measured: Measurement) -> str:
    numbers = {key: value for key, value in measured.items() if isinstance(value, (int, float))}
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items() if not key.endswith("_s") or "per" in key)
