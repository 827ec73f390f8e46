"""The import rules of the module map in the README, read from the source."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import unet_ray

PACKAGE = Path(unet_ray.__file__).parent
MAY_IMPORT_RAY = {
    *("allocation", "chaos", "cluster", "machines", "ingest", "labelling", "monitor", "worker", "training", "waves"),
    "segmentation",
    *("bench.contestants", "bench.peers"),
}
MAY_IMPORT_FSSPEC = {"filesystems", "listings", "storage"}
MAY_IMPORT_MATPLOTLIB = {"pictures"}


@functools.cache
def imports(module: str) -> set[str]:
    """Names of all modules that one module of ours imports anywhere, with `unet_ray.x` for our own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            packages = ("unet_ray", "unet_ray.bench")
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if node.module in packages else {node.module or ""}
    return found


MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("module", MODULES)
def test_only_the_named_modules_know_ray_fsspec_and_matplotlib(module):
    top_level = {name.partition(".")[0] for name in imports(module)}
    assert "ray" not in top_level or module in MAY_IMPORT_RAY
    assert "fsspec" not in top_level or module in MAY_IMPORT_FSSPEC
    assert "matplotlib" not in top_level or module in MAY_IMPORT_MATPLOTLIB


def test_training_and_segmentation_never_import_each_other():
    assert "unet_ray.segmentation" not in imports("training")
    assert "unet_ray.training" not in imports("segmentation")


def test_no_parquet_file_is_read_as_a_data_set():
    """See `manifest.read_parquet`: a command that has done its work would end by SIGABRT now and then."""
    outside = [module for module in MODULES if not module.startswith("bench.")]
    assert [module for module in outside if "pq.read_table(" in (PACKAGE / f"{module}.py").read_text()] == []


def test_nothing_needs_the_benchmark():
    outside = [module for module in MODULES if not module.startswith("bench.")]
    assert not any(name.startswith("unet_ray.bench") for module in outside for name in imports(module))


def test_no_module_imports_one_that_imports_it():
    ours = {
        module: {name for name in MODULES if f"unet_ray.{name}" in imports(module) and name != module}
        for module in MODULES
    }
    done: list[str] = []
    while len(done) < len(ours):
        free = [module for module, needs in ours.items() if module not in done and needs <= set(done)]
        assert free, f"these import each other in a circle: {sorted(set(ours) - set(done))}"
        done += free


@pytest.mark.parametrize(
    "module",
    [
        "classes",
        "config",
        "filesystems",
        "storage",
        "images",
        "pairs",
        "frames",
        "bundle",
        "ledger",
        "results",
        "masks",
        "cli",
    ],
)
def test_light_modules_load_neither_tensorflow_nor_ray(module):
    assert loaded_of(("tensorflow", "keras", "ray", "matplotlib"), f"import unet_ray.{module}") == []


def test_a_job_starts_its_ray_before_it_loads_ray_data():
    assert loaded_of(("ray", "ray.data", "tensorflow"), "import unet_ray.segmentation") == ["ray"]


def test_tensorflow_is_loaded_without_what_keras_would_draw_with():
    load = "from unet_ray.processes import without_plots\nwith without_plots(): import unet_ray.inference"
    assert loaded_of(("keras", "matplotlib"), load) == ["keras"]
    assert loaded_of(("keras", "matplotlib"), f"{load}\nimport unet_ray.pictures") == ["keras", "matplotlib"]
    assert loaded_of(("keras", "matplotlib"), f"import unet_ray.pictures\n{load}") == ["keras", "matplotlib"]


def loaded_of(modules: tuple[str, ...], code: str) -> list[str]:
    """Which of these a process has loaded after it ran the code."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {modules} if sys.modules.get(name)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
