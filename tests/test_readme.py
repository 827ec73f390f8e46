"""The README's commands and tables, held against the code."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pytest
import small_output
from test_boundaries import MODULES

from unet_ray import cli, labelling, monitor, results
from unet_ray.classes import ClassSet, SegmentationClass

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)


COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("unet-ray ") and "…" not in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    _, name, *arguments = shlex.split(line)
    assert cli.parse(name, arguments) is not None


def test_there_are_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"check", "train", "segment", "verify", "export-masks"}


@pytest.fixture
def labels(tmp_path, monkeypatch) -> Path:
    """A small output in the folder `labels`."""
    monkeypatch.chdir(tmp_path)
    small_output.segment(str(tmp_path / "labels"), mask_encoding="png")
    return tmp_path / "labels"


@pytest.mark.parametrize("query", blocks("sql"))
def test_every_query_runs_on_an_output(query, labels):
    assert duckdb.sql(query).fetchall()


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_is_python(block):
    ast.parse(block)


def test_the_lines_that_read_a_mask_read_it(labels):
    (block,) = (block for block in blocks("python") if "pq.read_table" in block)
    names: dict = {}
    exec(block, names)
    assert np.array_equal(names["mask"], small_output.mask_of(names["row"]["frame_id"]))
    assert names["mask"].dtype == np.uint8


def test_the_lines_for_hugging_face_datasets_give_every_mask_as_an_image(labels, tmp_path):
    (block,) = (block for block in blocks("python") if "load_dataset" in block)
    shown = "\nimport json, numpy\nassert mask.mode == 'P'\n"
    shown += "print(json.dumps({row['frame_id']: numpy.array(row['mask']).tolist() for row in labels}))"
    # A process of its own, because datasets reads these settings when it is imported.
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-W", "error", "-c", block + shown]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    read = json.loads(done.stdout)
    assert len(read) == 9 and not small_output.BROKEN.keys() & read.keys()
    assert read == {frame_id: small_output.mask_of(frame_id).tolist() for frame_id in read}


def test_ci_runs_the_readmes_commands_word_for_word():
    told = re.findall(r'as_the_readme_says "(.*)"', (ROOT / ".ci" / "run").read_text())
    lines = README.splitlines()
    assert len(told) == 3 and all(line in lines for line in told)


def test_the_table_of_a_row_is_the_schema():
    table = README[README.index("A row of `frames/`:") :].split("\n\n")[1]
    told = {
        name: kind
        for names, kind in re.findall(r"^\| (`.*?`) \| (\w+) \|", table, re.MULTILINE)
        for name in re.findall(r"`(.*?)`", names)
    }
    one_class = ClassSet(name="one", classes=(SegmentationClass(name="x", color=(1, 2, 3), values=(0,)),))
    schema = results.frames_schema(one_class)
    types = {"float": "float32"}
    code = {field.name.replace("_x", "_<class>"): types.get(str(field.type), str(field.type)) for field in schema}
    assert told == code


def test_the_table_of_metrics_names_those_there_are():
    table = README[README.index("| metric | |") :].split("\n\n")[0]
    told = set(re.findall(r"`(ray_\w+)`", table))
    counters = {f"ray_{name}_total" for name in labelling.COUNTERS}
    segmenting = {f"ray_unet_ray_segment_{name}" for name in labelling.GAUGES}
    assert told == counters | segmenting | {f"ray_unet_ray_train_{name}" for name, _ in monitor.GAUGES.values()}


def test_the_module_map_names_every_module():
    table = README[README.index("| module (`unet_ray/`)") :].split("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert named == set(MODULES)
