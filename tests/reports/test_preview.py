from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import labelled
import numpy as np
import pyarrow.parquet as pq
from labelled import DRIVES, make_plan, run, write_archive
from PIL import Image

from unet_ray.archives.listing import list_archives
from unet_ray.labelling.result import show_preview
from unet_ray.reports import preview
from unet_ray.reports.preview import choose_rows


def test_every_drive_is_shown_and_both_ends_of_confidence():
    drives = np.repeat([0, 1, 2], [10, 20, 5])
    confidence = np.linspace(0, 1, 35)
    confidence[3] = np.nan
    chosen = choose_rows(drives, confidence)
    assert len(chosen) == len(set(chosen)) == 12 and 3 not in chosen
    assert np.bincount(drives[chosen]).tolist() == [4, 4, 4]
    assert {0, 9} <= set(chosen)  # the least and the most confident of the first drive


def test_of_many_drives_a_dozen_are_shown_spread_over_all():
    chosen = choose_rows(np.arange(100), np.full(100, 0.5))
    assert chosen == [i * 100 // 12 for i in range(12)]


def test_fewer_frames_than_places_are_shown_once_each():
    assert choose_rows(np.zeros(3, int), np.array([0.2, np.nan, 0.9])) == [0, 2]
    assert choose_rows(np.zeros(2, int), np.array([np.nan, np.nan])) == []


def test_a_frame_is_shown_with_its_own_mask_and_one_that_is_gone_is_passed_over(tmp_path):
    """Over three files of two row groups or chunks each, in the manifest's order."""
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
    samples = list(preview._read_samples(plan, list_archives([root]), rows_of, list(range(13))))
    names = [f"{drive}/{index}.png" for drive, n_frames in DRIVES.items() for index in range(n_frames)]
    assert [caption.split()[0] for *_, caption in samples] == [name for name in names if name != "b/2.png"]
    rows = {row["frame_id"]: row for file in files for row in file.read().to_pylist()}
    for frame_HWC, mask_HW, caption in samples:
        name = caption.split()[0]
        np.testing.assert_array_equal(frame_HWC, pixels[name])
        assert mask_HW.tobytes() == rows[name]["mask"]


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
