from __future__ import annotations

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
    (tmp_path / "log" / "b" / "2.png").unlink()
    samples = list(preview._read_samples(plan, list_archives([root]), files, list(range(13))))
    names = [f"{drive}/{index}.png" for drive, n_frames in DRIVES.items() for index in range(n_frames)]
    assert [caption.split()[0] for *_, caption in samples] == [name for name in names if name != "b/2.png"]
    rows = {row["frame_id"]: row for file in files for row in file.read().to_pylist()}
    for frame_HWC, mask_HW, caption in samples:
        name = caption.split()[0]
        np.testing.assert_array_equal(frame_HWC, pixels[name])
        assert mask_HW.tobytes() == rows[name]["mask"]


def test_it_is_drawn_again_when_the_output_has_changed(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    run(write_archive(tmp_path / "log"), out)
    plan, listing, drawn = make_plan(str(tmp_path / "log"), out), list_archives([str(tmp_path / "log")]), []
    monkeypatch.setattr(preview, "write_preview", lambda plan, listing: drawn.append(plan) or f"{out}/preview.png")
    show_preview(plan, listing, False)
    (tmp_path / "out" / "preview.png").write_bytes(b"of an earlier run")
    show_preview(plan, listing, False)
    assert len(drawn) == 1
    show_preview(plan, listing, True)
    assert len(drawn) == 2 and capsys.readouterr().out == f"preview: {out}/preview.png\n" * 3
