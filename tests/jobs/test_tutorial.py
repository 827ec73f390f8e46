"""The tutorial runs from its first cell to its last, twice, and its answer is that of the files that it wrote."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from unet_ray import PACKAGE
from unet_ray.pixels import images

PROGRAM = PACKAGE.parent / "jobs" / "tutorial.py"


def test_each_cell_says_what_it_is_for_and_shows_something():
    cells = PROGRAM.read_text().split("\n# %% ")[1:]
    assert len(cells) >= 6
    for cell in cells:
        title, _, code = cell.partition("\n")
        assert title.endswith((".", "?")) and ast.parse(code).body


def result_of(output: str) -> float:
    """The mean IoU that it prints."""
    (line,) = (line for line in output.splitlines() if line.endswith("on drives that were set aside"))
    return float(line.split()[2])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    out = tmp_path / "unet-ray-tutorial"
    first, again = outputs
    assert "Training would take this data set." in first and "recipe: " not in first
    assert "24 frames: 24 labelled, 0 rejected" in first and "24 frames in 2 chunks, 0 in 0 to do" in again
    tables = [output[output.index("┌") :] for output in outputs]
    assert tables[0] == tables[1] and "vehicle_percent" in tables[0]
    rows = [row for file in (out / "labels/frames").glob("*") for row in pq.ParquetFile(file).read().to_pylist()]
    for drive in ("drive10", "drive11"):
        of_drive = [row for row in rows if row["sequence"] == drive]
        shares = [100 * row["pixels_road"] / (row["mask_height_px"] * row["mask_width_px"]) for row in of_drive]
        (line,) = (line for line in tables[0].splitlines() if f"│ {drive} " in line)
        assert f" {round(sum(shares) / 12, 1)} " in line
    assert result_of(first) > 0.3
    pictures = [images.decode_frame((out / name).read_bytes()) for name in ("closest.png", "prediction.png")]
    assert [picture.shape for picture in pictures] == [(120, 160, 3)] * 2
