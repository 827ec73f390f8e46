"""Exports as Datumaro and FiftyOne read them, each in an environment of its own: their pins exclude ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import exported
import numpy as np
import pytest
from exported import CLASS_SET, FRAMES, bare, frame_name, mask_of

from unet_ray import cli

NO_INDEX = ("No matching distribution", "ConnectionError", "NewConnectionError", "Temporary failure in name resolution")


def environment(folder: Path, package: str) -> str:
    """Makes a virtual environment with a package and returns its Python; skips the test where there is no index."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin/python")
    done = subprocess.run([python, "-m", "pip", "install", "-q", package], capture_output=True, text=True)
    if done.returncode and any(line in done.stderr for line in NO_INDEX):
        pytest.skip(f"pip finds no index with {package}")
    assert done.returncode == 0, done.stderr[-2000:]
    return python


def read(python: str, code: str, folder: Path) -> list:
    """Runs code in an environment, on a folder; returns what it prints as JSON."""
    done = subprocess.run([python, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def export(root: Path, out: Path, *options: str) -> None:
    exported.segment(exported.write_archives(root / "log"), str(root / "labels"))
    assert cli.main(["export-masks", str(root / "labels"), "--out", str(out), "--with-frames", *options]) == 0


DATUMARO = """
import json, sys
import datumaro as dm
items = dm.Dataset.import_from(sys.argv[1], "voc_segmentation")
names = [label.name for label in items.categories()[dm.AnnotationType.label]]
print(json.dumps([
    [item.id, item.subset, item.media.size, [[names[mask.label], mask.image.tolist()] for mask in item.annotations]]
    for item in items
]))
"""


@pytest.mark.slow
def test_datumaro_reads_what_cvat_is_given(tmp_path):
    python = environment(tmp_path / "environment", "datumaro==1.13.12")
    export(tmp_path, tmp_path / "cvat", "--format", "cvat")
    items = read(python, DATUMARO, tmp_path / "cvat")
    assert [item[0] for item in items] == [bare(frame_id) for frame_id in FRAMES]
    for (_, subset, size, masks), frame_id in zip(items, FRAMES, strict=True):
        expected = mask_of(frame_id)
        assert subset == "default" and tuple(size) == expected.shape
        assert [name for name, _ in masks] == [CLASS_SET.names[k] for k in np.unique(expected)]
        for name, mask in masks:
            assert np.array_equal(mask, expected == CLASS_SET.names.index(name))


FIFTYONE = """
import json, sys
import fiftyone.core.odm as documents
from fiftyone.utils.data import importers
# The database is a program of its own, which pip does not always bring; this is what from_dir reads the folder with.
importer = importers._handle_legacy_formats(importers.FiftyOneDatasetImporter(sys.argv[1]))
with importer:
    info = importer.get_dataset_info()
    colors = documents.DatasetAppConfig.from_dict(info["app_config"], extended=True).color_scheme
    samples = [
        [sample.filepath, sample.media_type, sample.frame_id, sample.predictions.get_mask().tolist(), sample.confidence]
        for sample in importer
    ]
print(json.dumps([info["default_mask_targets"], colors.default_mask_targets_colors, samples]))
"""


@pytest.mark.weekly
def test_fiftyones_importer_reads_its_format(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where it would keep its database
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    python = environment(tmp_path / "environment", "fiftyone==1.22.1")
    out = tmp_path / "fiftyone"
    export(tmp_path, out, "--format", "fiftyone")
    targets, colors, samples = read(python, FIFTYONE, out)
    assert list(targets.values()) == list(CLASS_SET.names)
    assert colors[1] == {"intTarget": 2, "color": "#4682b4"}
    for (path, media_type, name, mask, confidence), frame_id in zip(samples, FRAMES, strict=True):
        assert (path, media_type, name) == (str(out / "data" / frame_name(frame_id)), "image", frame_id)
        assert Path(path).is_file() and mask == (mask_of(frame_id) + 1).tolist() and 0.5 <= confidence <= 0.75
