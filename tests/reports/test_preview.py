from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import labelled
import numpy as np
import pyarrow.parquet as pq
import pytest
from labelled import DRIVES, make_plan, run, write_archive
from PIL import Image

from unet_ray.archives.listing import list_archives
from unet_ray.drawing.pictures import draw_preview
from unet_ray.labelling.result import show_preview
from unet_ray.reports import preview
from unet_ray.reports.interest import Choice


def test_a_frame_is_shown_with_its_own_mask_and_one_that_is_gone_is_passed_over(tmp_path):
    """Over three files of two row groups or chunks each."""
    root, out = write_archive(tmp_path / "log"), str(tmp_path / "out")
    pixels = {}
    for number, path in enumerate(sorted((tmp_path / "log").rglob("*.png"))):
        pixels[str(path.relative_to(root))] = np.full((2, 3, 3), number, np.uint8)
        Image.fromarray(pixels[str(path.relative_to(root))]).save(path)
    run(root, out)
    plan = make_plan(root, out)
    files = [pq.ParquetFile(path) for path in sorted((tmp_path / "out" / "frames").iterdir())]
    rows_of = {str(path): pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out" / "frames").iterdir())}
    (tmp_path / "log" / "b" / "2.png").unlink()
    choices = [Choice(row=row, reason=f"row {row}", class_id=1) for row in (12, *range(12))]
    samples = list(preview._read_samples(plan, list_archives([root]), rows_of, choices))
    names = [f"{drive}/{index}.png" for drive, n_frames in DRIVES.items() for index in range(n_frames)]
    places = [row for row in (12, *range(12)) if names[row] != "b/2.png"]
    assert [sample.frame_id for sample in samples] == [names[row] for row in places]
    assert [sample.reason for sample in samples] == [f"row {row}" for row in places]
    rows = {row["frame_id"]: row for file in files for row in file.read().to_pylist()}
    for sample in samples:
        np.testing.assert_array_equal(sample.frame_HWC, pixels[sample.frame_id])
        assert sample.mask_HW.tobytes() == rows[sample.frame_id]["mask"]
        sky = np.argwhere(sample.mask_HW == 1)
        expected = (*(sky.min(axis=0) / (2, 3)), *((sky.max(axis=0) + 1) / (2, 3))) if len(sky) else None
        assert sample.mark == (None if expected is None else pytest.approx(expected))


def test_the_picture_shows_what_the_columns_say(tmp_path, monkeypatch):
    root, out = write_archive(tmp_path / "log"), str(tmp_path / "out")
    for path in (tmp_path / "log").rglob("*.png"):
        Image.new("RGB", (3, 2)).save(path)
    run(root, out, reject=("a/1.png",))
    drawn = {}

    def draw(frames, masks, captions, class_set, *, reasons, marks):
        drawn.update(zip(captions, reasons, strict=True))
        return draw_preview(frames, masks, captions, class_set, reasons=reasons, marks=marks)

    monkeypatch.setattr(preview.pictures, "draw_preview", draw)
    plan = make_plan(root, out)
    assert preview.write_preview(plan, list_archives([root])) == f"{out}/preview.png"
    assert len(drawn) == preview.N_FRAMES and "a/1.png" not in drawn
    rows = {row["frame_id"]: row for chunk in plan.chunks for row in labelled.label(chunk).to_pylist()}
    del rows["a/1.png"]
    rarest = min(("road", "sky"), key=lambda name: sum(row[f"pixels_{name}"] for row in rows.values()))
    (most,) = (name for name, reason in drawn.items() if f"most {rarest}" in reason)
    assert rows[most][f"pixels_{rarest}"] == max(row[f"pixels_{rarest}"] for row in rows.values())
    (least,) = (name for name, reason in drawn.items() if f"least {rarest}" in reason)
    assert rows[least][f"pixels_{rarest}"] == min(n for row in rows.values() if (n := row[f"pixels_{rarest}"]))
    assert sum(reason.startswith("least confident: 0.75") for reason in drawn.values()) == 2
    assert sum("typical: confidence 0.75" in reason for reason in drawn.values()) == 2


def test_it_is_drawn_again_when_the_output_has_changed_or_it_is_no_picture(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    run(write_archive(tmp_path / "log"), out)
    plan, listing, drawn = make_plan(str(tmp_path / "log"), out), list_archives([str(tmp_path / "log")]), []
    monkeypatch.setattr(preview, "write_preview", lambda plan, listing: drawn.append(plan) or f"{out}/preview.png")
    show_preview(plan, listing, False)
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(f"{out}/preview.png")  # of an earlier run
    show_preview(plan, listing, False)
    assert len(drawn) == 1
    show_preview(plan, listing, True)
    assert len(drawn) == 2
    for data in (b"", b"no picture", Path(f"{out}/preview.png").read_bytes()[:40]):
        Path(f"{out}/preview.png").write_bytes(data)
        show_preview(plan, listing, False)
    assert len(drawn) == 5 and capsys.readouterr().out == f"preview: {out}/preview.png\n" * 6


MANY_FILES = """
import resource, sys
from pathlib import Path
import labelled
from PIL import Image
from unet_ray.archives.listing import list_archives
from unet_ray.output import verify
from unet_ray.output.chunks import Cutting
from unet_ray.reports.preview import write_preview
folder = Path(sys.argv[1])
root, out = labelled.write_archive(folder / "log", {"a": 200}), str(folder / "out")
for path in Path(root).rglob("*.png"):
    Image.new("RGB", (3, 2)).save(path)
labelled.CUTTING = Cutting(chunk_frames=1, shard_rows=1)
labelled.run(root, out)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
assert write_preview(labelled.make_plan(root, out), list_archives([root])) == f"{out}/preview.png"
assert verify.verify(out) == []
"""


def test_an_output_of_more_files_than_a_process_may_open_is_shown_and_verified(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(labelled.__file__).parent)}
    subprocess.run([sys.executable, "-c", MANY_FILES, str(tmp_path)], env=environment, check=True, timeout=250)
