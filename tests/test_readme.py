"""The documents' commands, tables, recipes and links, held against the code; and README's limits."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_output

import unet_ray
from unet_ray import cli, errors
from unet_ray.archives.listing import list_archives
from unet_ray.bench import contests
from unet_ray.labelling import work as labelling
from unet_ray.output import columns
from unet_ray.output import rows as results
from unet_ray.pairs.pairs import find_pairs, require_complete
from unet_ray.pixels import images
from unet_ray.training import monitor

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "unet_ray/README.md", "jobs/README.md", "jobs/BENCHMARK.md", ".github/CONTRIBUTING.md")
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
README = TEXTS["README.md"]

MAX_LINES, MAX_WORDS = 220, 2_200
"""Of README: it is read to its end."""

OTHER_OPTIONS = {
    *("--help", "--config", "--recipe"),  # of every command, beside its own
    *("--generate", "--working-dir", "--all-files", "--extra-index-url"),  # of Ray, pre-commit and pip
    *("--aws-service-name", "--force", "--head", "--logdir"),  # of aws, kubectl, ray start and tensorboard
}


def blocks(language: str, *documents: str) -> list[str]:
    """Returns the code blocks of a language, of all documents unless some are named."""
    texts = (TEXTS[name] for name in documents or DOCUMENTS)
    matches = (re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE) for text in texts)
    return [block for pairs in matches for name, block in pairs if name == language]


def table(document: str, heading: str) -> list[list[str]]:
    """Returns the cells of the table whose first line begins so, without that line."""
    lines = TEXTS[document][TEXTS[document].index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def lines(*documents: str) -> list[str]:
    """Returns the lines of shell, each whole."""
    return [
        " ".join(line.split()) for block in blocks("sh", *documents) for line in block.replace("\\\n", " ").splitlines()
    ]


LINES = lines()
COMMANDS = [line for line in LINES if line.startswith("unet-ray ")]
COMMANDS += [
    line.replace("…", "x") for text in TEXTS.values() for line in re.findall(r"`(unet-ray [a-z-]+ [^`]+)`", text)
]
SUBMISSIONS = [line for line in LINES if line.startswith("ray job submit ")]
PROGRAMS = [
    line for text in TEXTS.values() for line in re.findall(r"python (jobs/(?:benchmark|chaos)\.py[^`\n]*)", text)
]


# --- commands and options ---


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    _, name, *arguments = shlex.split(line, comments=True)
    assert cli.parse(name, arguments) is not None


def test_there_are_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"check", "train", "segment", "verify", "export-masks"}


@pytest.mark.parametrize("line", SUBMISSIONS)
def test_every_submission_is_understood(line):
    job, *arguments = shlex.split(line.partition(" -- python jobs/")[2])
    assert cli.parse(job.removesuffix(".py"), arguments) is not None


def test_the_submission_in_readme_is_one_of_the_jobs():
    ours, theirs = ({line for line in lines(name) if line in SUBMISSIONS} for name in ("README.md", "jobs/README.md"))
    assert len(ours) == 1 and len(theirs) == 2 and ours < theirs


@pytest.mark.parametrize("line", PROGRAMS)
def test_every_program_has_the_options_that_it_is_given(line):
    program, *arguments = shlex.split(line)
    code = (ROOT / program).read_text()
    assert all(f'"{option}"' in code for option in arguments if option.startswith("--"))


def test_rows_of_the_benchmark_that_are_named_exist():
    named = re.findall(r"--only ([a-z_ ]+)", "\n".join(TEXTS.values()))
    assert all(name in contests.ROWS for names in named for name in names.split())


OPTIONS = {
    f"--{field.name.replace('_', '-')}": field.default
    for command in cli.COMMANDS.values()
    for field in dataclasses.fields(command.config_type)
}
OPTIONS |= {name.replace("--", "--no-", 1): not default for name, default in OPTIONS.items() if type(default) is bool}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_that_is_named_exists(document):
    programs = "".join((ROOT / "jobs" / f"{name}.py").read_text() for name in ("benchmark", "chaos"))
    quoted = "\n".join(re.findall(r"`+[^`]+`+", TEXTS[document]))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", quoted))
    assert {name for name in named - OPTIONS.keys() - OTHER_OPTIONS if f'"{name}"' not in programs} == set()


def test_defaults_that_are_named_are_the_codes():
    defaults = re.findall(r"`(--[a-z-]+)`(?: seconds)? \((?:default )?([\d.]+)\)", "\n".join(TEXTS.values()))
    assert len(defaults) >= 4
    assert [(name, float(value)) for name, value in defaults] == [(name, OPTIONS[name]) for name, _ in defaults]


CONTRIBUTING = ".github/CONTRIBUTING.md"


def test_ci_runs_the_documents_commands_word_for_word():
    commands = re.findall(r'^as_written_in (\S+) "(.*)"', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert [name for name, _ in commands] == ["README.md", CONTRIBUTING, "README.md", CONTRIBUTING]
    assert all(line in TEXTS[name].splitlines() for name, line in commands)
    assert "- run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_script_of_a_schedule_tries_again_while_that_may_help(tmp_path):
    (script,) = (block for block in blocks("sh", "jobs/README.md") if "while" in block)
    codes = tmp_path / "codes"
    programs = {
        "unet-ray": f'read -r code < {codes}; sed -i 1d {codes}; echo "$@"; exit "$code"',
        "sleep": 'echo "sleep $1"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    command = shlex.join(shlex.split(next(line for line in script.splitlines() if "unet-ray" in line))[1:])
    for last in (0, 1):
        codes.write_text(f"75\n75\n{last}\n")
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        )
        assert done.returncode == last
        assert done.stdout.splitlines() == [command, "sleep 300", command, "sleep 300", command]


# --- the input ---


def test_the_input_that_is_drawn_is_understood(tmp_path):
    (drawn,) = (tree for tree in blocks("") if "CameraRGB" in tree)
    files = []
    folders: list[str] = []
    for line in drawn.splitlines():
        indent, name = re.match(r"([ │├└─]*)(\S+)", line).groups()
        del folders[len(indent) // 4 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.append("".join([*folders, name]))
    png = images.encode_png(np.zeros((8, 8, 3), np.uint8))
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            file.write_bytes(png)
        elif name.endswith(".tar"):
            member = tarfile.TarInfo("1.png")
            member.size = len(png)
            with tarfile.open(file, "w") as tar:
                tar.addfile(member, io.BytesIO(png))
        else:
            pq.write_table(pa.table({"image": [png]}), file)
    pairs = find_pairs(str(tmp_path / "data" / "CameraRGB"), str(tmp_path / "data" / "CameraMask"))
    require_complete(pairs)
    assert [pair.sequence for pair in pairs.pairs] == ["drive01", "drive02"]
    listing = list_archives([str(tmp_path / "drives")])
    assert not listing.unlistable and not listing.ignored
    assert listing.table["sequence"].to_pylist() == ["drive07", "drive08.tar", "drive09.parquet"]


# --- the output ---


@pytest.fixture
def labels(tmp_path, monkeypatch) -> Path:
    """A small output in the folder `labels`."""
    monkeypatch.chdir(tmp_path)
    small_output.segment(str(tmp_path / "labels"), mask_encoding="png")
    return tmp_path / "labels"


@pytest.mark.parametrize("query", [query for block in blocks("sql") for query in block.split(";") if query.strip()])
def test_every_query_runs_on_an_output(query, labels):
    assert duckdb.sql(query).fetchall()


def test_the_files_of_an_output_that_are_drawn_are_there(labels):
    (drawn,) = (tree for tree in blocks("", "unet_ray/README.md") if "run.json" in tree)
    named = {line.split()[0].partition("/")[2].partition("/")[0] for line in drawn.splitlines()}
    there = {path.name for path in labels.iterdir()}
    # The job itself writes the preview and the page; `_work` is gone.
    assert named - {"preview.png", "report.html", "_work"} == there


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_is_python(block):
    ast.parse(block)


PYTHON = next(block for block in blocks("python", "README.md") if "import unet_ray" in block)


def test_the_calls_in_python_have_options_that_there_are():
    calls = [node for node in ast.walk(ast.parse(PYTHON)) if isinstance(node, ast.Call)]
    ours = {name: call for call in calls if re.fullmatch(r"unet_ray(\.\w+)+", name := ast.unparse(call.func))}
    assert ours.keys() >= {f"unet_ray.{name}" for name in ("train", "segment", "load", "open_labels")}
    for name, call in ours.items():
        function = functools.reduce(getattr, name.split(".")[1:], unet_ray)
        names = {keyword.arg: keyword.value for keyword in call.keywords}
        if name != "unet_ray.train":
            inspect.signature(function).bind(*call.args, **names)
    recipe = ours["unet_ray.TrainConfig.from_recipe"]
    assert eval(ast.unparse(recipe)) == cli.parse("train", shlex.split(next(c for c in COMMANDS if " train " in c))[2:])


def test_the_lines_that_read_labels_read_them(labels, capsys):
    """Those from `open_labels` on."""
    names: dict = {}
    exec("import unet_ray\n" + PYTHON[PYTHON.index("labels = ") :], names)
    rows = [row for row in names["table"].to_pylist() if row["pixels_pedestrian"] and row["confidence"] < 0.6]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{row['frame_id']} {small_output.mask_of(row['frame_id']).shape}" for row in rows] and rows
    named = set(re.findall(r"(?<=labels\.)\w+", PYTHON)) | {"__getitem__"}
    assert all(hasattr(unet_ray.Labels, name) for name in named)
    assert all(hasattr(unet_ray.LabelledFrame, name) for name in re.findall(r"(?<=frame\.)\w+", PYTHON))
    fields = {field.name for field in dataclasses.fields(unet_ray.Prediction)}
    assert set(re.findall(r"[n,] ?\.(\w+)(?=,|$)", PYTHON, re.MULTILINE)) <= fields and ".class_pixels" in PYTHON


def test_the_lines_for_hugging_face_datasets_give_every_mask_as_an_image(labels, tmp_path):
    (block,) = (block for block in blocks("python") if "load_dataset" in block)
    program = "\nimport json, numpy\nassert mask.mode == 'P'\n"
    program += "print(json.dumps({row['frame_id']: numpy.array(row['mask']).tolist() for row in labels}))"
    # A process of its own, because datasets reads these settings when it is imported.
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-W", "error", "-c", block + program]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    read = json.loads(done.stdout)
    assert len(read) == 9 and not small_output.BROKEN.keys() & read.keys()
    assert read == {frame_id: small_output.mask_of(frame_id).tolist() for frame_id in read}


# --- tables ---


def named_columns(rows: list[list[str]]) -> dict[str, str]:
    return {name: kind for names, kind, _ in rows for name in re.findall(r"`(.*?)`", names)}


def types_of(schema: pa.Schema) -> dict[str, str]:
    names = {"float": "float32", "double": "float64"}
    return {field.name: names.get(str(field.type), str(field.type)) for field in schema}


def test_the_table_of_a_row_is_that_of_the_code():
    rows = [
        (re.findall("`(.*?)`", names), kind, re.sub(r"\[(.*?)\]\(.*?\)", r"\1", meaning))
        for names, kind, meaning in table("README.md", "| column | type | meaning |")
    ]
    assert rows == columns.documented()


def test_the_table_of_statistics_is_the_schema():
    rows = table("unet_ray/README.md", "| column | type | meaning |")
    assert named_columns(rows) == types_of(results.statistics_schema())


def test_the_table_of_rejected_frames_names_every_reason():
    rows = table("unet_ray/README.md", "| file | what happens |")
    named = [name for _, what in rows for name in re.findall(r"`(\w+)`", what)]
    assert sorted(named) == sorted(results.REASONS)


def test_the_table_of_exit_codes_has_those_there_are():
    documented = {int(code) for codes, *_ in table("jobs/README.md", "| code | meaning |") for code in codes.split(",")}
    assert documented == {0, errors.EXIT_FAILED, errors.EXIT_USAGE, errors.EXIT_TRY_AGAIN, 130, 143}


def test_the_table_of_metrics_names_those_there_are():
    documented = {
        name for names, _ in table("jobs/README.md", "| metric | |") for name in re.findall(r"`(ray_\w+)`", names)
    }
    counters = {f"ray_{name}_total" for name in labelling.COUNTERS}
    segmenting = {f"ray_unet_ray_segment_{name}" for name in labelling.GAUGES}
    assert documented == counters | segmenting | {f"ray_unet_ray_train_{name}" for name, _ in monitor.GAUGES.values()}


def test_the_rooms_are_in_the_order_of_imports():
    rooms = [name.strip("`") for name, _ in table("unet_ray/README.md", "| room |")]
    (order,) = re.findall(r"^    (words < .*)$", TEXTS["unet_ray/README.md"], re.MULTILINE)
    assert rooms == re.split(r" [<|] ", order)
    packages = {path.parent.name for path in (ROOT / "unet_ray").glob("*/__init__.py")}
    assert packages <= set(rooms)


# --- the documents themselves ---


def test_readme_keeps_its_limits():
    assert len(README.splitlines()) <= MAX_LINES
    assert len(README.split()) <= MAX_WORDS


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[document]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target
