"""The order of folders: which may import which, and which libraries each may know; read from the source."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unet_ray import PACKAGE

ORDER = (
    # the words
    (
        *("class_files", "classes", "containers", "digests", "errors", "frames", "messages", "palette", "progress"),
        *("stops", "streams", "suggestions"),
    ),
    ("pixels",),
    ("drawing",),
    ("storage",),
    ("model",),
    ("options",),
    ("config",),
    ("saved_models",),
    ("cluster",),
    ("archives",),
    ("pairs",),
    ("output",),
    ("reports",),
    ("training", "labelling"),
    ("demo",),
    ("cli", "commands", "__init__"),
    ("chaos",),
    ("bench",),
    ("jobs",),
)
"""A folder, or a file beside the folders, imports only from earlier lines and from itself. Files of one line that are
no folders may import each other; `training` and `labelling` never do."""

MAY_KNOW = {
    "fsspec": ("storage.",),
    "matplotlib": ("drawing.charts", "drawing.picture_grid", "reports.curves"),
    "ray": (
        *(
            "cluster.",
            "training.batches",
            "training.blocks",
            "training.evaluation",
            "training.job",
            "training.launcher",
        ),
        *("labelling.allocation", "labelling.job", "labelling.planning", "labelling.waves", "labelling.work"),
        *("chaos.scenarios", "bench.contestants", "bench.peers"),
    ),
}
"""Modules, or all of a folder, that may import a library anywhere."""

LOAD_TENSORFLOW = {
    "model.cells",
    "model.convnext",
    "model.encoder_files",
    "model.export",
    "model.keras_network",
    "model.keras_record",
    "model.losses",
    "model.networks",
    "model.unet",
    "model.gpu_labels",
    "model.grid",
    "model.labeler",
    "model.labels",
    "model.weights",
    "training.batch_norm",
    "training.calibrator",
    "training.exactness",
    "training.onnx_predictor",
    "training.optimizer",
    "training.steps",
    "training.worker",
}
"""What imports TensorFlow or Keras at its top, so that to import it takes seconds."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
FOLDERS = sorted(".".join(path.relative_to(PACKAGE).parts[:-1]) for path in PACKAGE.rglob("*/__init__.py"))
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def tree(module: str) -> ast.Module:
    path = PACKAGE / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imported(nodes: list[ast.AST], module: str) -> set[str]:
    """Names of the modules that statements import, with `unet_ray.x` for our own."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in whole if name.removeprefix("unet_ray.") in (*MODULES, *FOLDERS)}
            names |= ours | ({node.module} if ours != whole else set())
    return names


@functools.cache
def imports(module: str) -> set[str]:
    """All that a module imports, in functions too."""
    return imported(list(ast.walk(tree(module))), module)


def ours(module: str) -> set[str]:
    """Those of our modules and folders that a module imports."""
    names = {name.removeprefix("unet_ray.") for name in imports(module)}
    return {name for name in names if name in (*MODULES, *FOLDERS)} - {module}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_folder_and_file_has_its_place_in_the_order():
    assert {room(module) for module in (*MODULES, *FOLDERS)} | {"__init__", "jobs"} == set(LEVELS)


def test_a_folder_imports_only_from_earlier_ones():
    def is_fine(module: str, other: str) -> bool:
        folder, other_folder = room(module), room(other)
        side_by_side = LEVELS[folder] == LEVELS[other_folder] and not {folder, other_folder} & {"training", "labelling"}
        return folder == other_folder or LEVELS[other_folder] < LEVELS[folder] or side_by_side

    modules = (*MODULES, *FOLDERS, "__init__")
    against = {(module, other) for module in modules for other in ours(module) if not is_fine(module, other)}
    assert against == set()


def test_no_module_imports_one_that_imports_it():
    needs = {module: ours(module) for module in (*MODULES, *FOLDERS)}
    done: set[str] = set()
    while len(done) < len(needs):
        free = {module for module in needs if module not in done and needs[module] <= done}
        assert free, f"these import each other in a circle: {sorted(set(needs) - done)}"
        done |= free


@pytest.mark.parametrize("module", [*MODULES, *FOLDERS])
def test_only_the_named_modules_know_ray_fsspec_and_matplotlib(module):
    top_level = {name.partition(".")[0] for name in imports(module)}
    for library, known in MAY_KNOW.items():
        assert library not in top_level or {module, f"{room(module)}."} & set(known), library


@pytest.mark.parametrize("module", [*MODULES, *FOLDERS])
def test_only_the_named_modules_load_tensorflow(module):
    at_the_top = {name.partition(".")[0] for name in imported(list(tree(module).body), module)}
    assert ("tensorflow" in at_the_top or "keras" in at_the_top) == (module in LOAD_TENSORFLOW)


def test_no_test_imports_from_the_folder_tests():
    """`pytest` has it not on its path, `python -m pytest` has: what helps tests is imported by its own name."""
    statement = re.compile(r"^ *(from|import) tests\b", re.MULTILINE)
    assert [path for path in Path(__file__).parent.rglob("*.py") if statement.search(path.read_text())] == []


def test_no_parquet_file_is_read_as_a_data_set():
    """See `manifest.read_parquet`: a command that has done its work would end by SIGABRT now and then."""
    outside = [module for module in MODULES if room(module) != "bench"]
    sources = {module: (PACKAGE / f"{module.replace('.', '/')}.py").read_text() for module in outside}
    assert [module for module, source in sources.items() if "pq.read_table(" in source] == []


@pytest.mark.parametrize(
    "module",
    [
        *("classes", "config", "frames", "cli", "commands"),
        *("pixels.images", "pixels.preprocessing", "drawing.overlays"),
        *("storage", "storage.filesystems", "archives", "archives.reading", "cluster.processes"),
        *("model.onnx_file", "model.onnx_network", "model.onnx_trial"),
        *("model.bundle", "pairs.pairs", "output.exports.formats", "output.ledger", "output.masks", "output.opened"),
        *("output.rows", "labelling.predictor"),
        *("reports.label_page", "reports.report"),
    ],
)
def test_light_modules_load_neither_tensorflow_nor_ray(module):
    assert loaded_of(("tensorflow", "keras", "ray", "matplotlib"), f"import unet_ray.{module}") == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_by_itself_loads_neither_tensorflow_nor_ray(folder):
    """Python runs a folder's `__init__` before any of its modules, the light ones too."""
    assert loaded_of(("tensorflow", "keras", "ray", "matplotlib"), f"import unet_ray.{folder}") == []


def test_a_job_starts_its_ray_before_it_loads_ray_data():
    assert loaded_of(("ray", "ray.data", "tensorflow"), "import unet_ray.labelling.job") == ["ray"]


def loaded_of(modules: tuple[str, ...], code: str) -> list[str]:
    """Which of these a process has loaded after it ran the code."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {modules} if sys.modules.get(name)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
