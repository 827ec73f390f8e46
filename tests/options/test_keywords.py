"""What Python offers: names, functions of a configuration or of keywords, and paths in the forms that people give."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import unet_ray
from unet_ray import cli, config
from unet_ray.config import ExportMasksConfig, ImportModelConfig, SegmentConfig, TrainConfig, VerifyConfig
from unet_ray.options import config_types
from unet_ray.options.keywords import takes_options

PAIRS = {"images": "i", "masks": "m", "classes": "camvid", "out": "o"}
COMMANDS = ("check", "evaluate", "export_masks", "export_model", "import_model", "report", "segment", "train", "verify")


def test_dir_names_what_there_is_and_nothing_else():
    program = "import unet_ray, json; print(json.dumps(dir(unet_ray)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = [*unet_ray.__all__, "__version__"]
    assert done.stdout == f"{sorted(names)}\n".replace("'", '"')
    assert {*COMMANDS, "load", "open_labels", "save_model", "TrainConfig"} < set(names)
    assert all(getattr(unet_ray, name) is not None for name in names)
    with pytest.raises(AttributeError, match="module 'unet_ray' has no attribute 'ray'"):
        unet_ray.ray  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_has_the_options_of_its_command(name):
    function, config_type = getattr(unet_ray, name), cli.COMMANDS[name.replace("_", "-")].config_type
    signature = inspect.signature(function)
    own = inspect.signature(config_type).parameters
    assert {n: p.default for n, p in signature.parameters.items()} == {n: p.default for n, p in own.items()}
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    defaults = [
        parameter.default for parameter in signature.parameters.values() if "KEYWORD_ONLY" in str(parameter.kind)
    ]
    n_required = defaults.count(inspect.Parameter.empty)
    assert all(default is inspect.Parameter.empty for default in defaults[:n_required])  # they come first
    documented = inspect.getdoc(function)
    assert documented and all(f"\n    {option}: " in documented for option in own)
    assert "\n    storage_retry_s: Seconds for which a store that does not answer is asked again, before" in documented


def test_a_notebook_shows_types_as_they_may_be_given():
    signature = inspect.signature(unet_ray.segment)
    path = str | os.PathLike[str]
    assert signature.parameters["model"].annotation == path
    assert signature.parameters["path_pattern"].annotation == str | None
    assert "Iterable" in str(signature.parameters["frames"].annotation)
    assert signature.return_annotation == "SegmentResult"


@takes_options(VerifyConfig)
def echo(config: VerifyConfig) -> VerifyConfig:
    """Returns its configuration."""
    return config


def test_a_configuration_and_its_keywords_are_the_same():
    hand = VerifyConfig(out="labels", sources=True)
    assert echo(hand) is hand
    assert (
        echo("labels", sources=True) == echo(out="labels", sources=True) == hand == VerifyConfig("labels", sources=True)
    )
    assert echo.__name__ == "echo" and echo.__doc__.startswith(
        "Returns its configuration.\n\nOptions:\n    out: URI of"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: echo(out="o", source=True), "echo has no option source; perhaps you meant sources"),
        (lambda: echo(out="o", xyz=True), "echo has no option xyz; help(unet_ray.echo) shows them all"),
        (lambda: echo(sources=True), "echo needs out; help(unet_ray.echo) tells more"),
        (
            lambda: echo(SegmentConfig(model="m", frames="f", out="o")),
            "echo takes a VerifyConfig, or its fields as keywords; a SegmentConfig was given",
        ),
        (
            lambda: echo(VerifyConfig("o"), sources=True),
            "echo takes a VerifyConfig, or its fields as keywords; a VerifyConfig and keywords was given",
        ),
    ],
)
def test_a_wrong_call_is_one_line(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_wrong_value_is_the_commands_own_line():
    with pytest.raises(ValueError, match="--storage-retry-s is -1; it must be at least 0"):
        echo("labels", storage_retry_s=-1)


# --- recipes ---


@pytest.mark.parametrize("recipe", ["default", "notebook"])
def test_a_recipe_in_python_is_that_of_the_command_line(recipe):
    arguments = [text for name, value in PAIRS.items() for text in (f"--{name}", value)]
    made = TrainConfig.from_recipe(recipe, **PAIRS, epochs=7)
    assert made == cli.parse("train", [*arguments, "--recipe", recipe, "--epochs", "7"])
    assert repr(made) == repr(cli.parse("train", [*arguments, "--recipe", recipe, "--epochs", "7"]))  # 3.0, not 3


def test_a_recipe_shows_its_options_and_refuses_a_name_that_is_none():
    parameters = list(inspect.signature(TrainConfig.from_recipe).parameters)
    assert parameters[:5] == ["recipe", "images", "masks", "classes", "out"] and "epochs" in parameters
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_recipe("cake", **PAIRS)
    assert str(caught.value) == "--recipe is 'cake'; the recipes are default, notebook"


# --- paths ---


@pytest.mark.parametrize(
    "frames",
    ["few/a", Path("few/a"), ["few/a"], (Path("few/a"),), iter(["few/a"])],
    ids=["str", "Path", "list", "tuple", "iterator"],
)
def test_frames_are_a_path_or_several(frames):
    made = SegmentConfig(model=Path("runs/first"), frames=frames, out=Path("o"), allow_uri=Path("/b"))
    assert (made.model, made.frames, made.out, made.allow_uri) == ("runs/first", ("few/a",), "o", ("/b",))
    assert made == SegmentConfig(model="runs/first", frames=("few/a",), out="o", allow_uri=("/b",))


def test_other_options_are_paths_and_texts_too():
    made = TrainConfig(**{name: Path(value) for name, value in PAIRS.items()}, init_from=Path("before"))
    assert made == TrainConfig(**PAIRS, init_from="before")
    masks = ExportMasksConfig("labels", out=Path("o"), sequence="drive07")
    assert (masks.sequence, masks.out) == (("drive07",), "o")
    assert SegmentConfig(model="m", frames="f", out="o", retry_rejected="crashed").retry_rejected == ("crashed",)
    assert SegmentConfig(model="m", frames="f", out="o").retry_rejected is None
    assert ImportModelConfig(onnx=Path("a.onnx"), classes="camvid", out="o", frames=Path("f")).uris() == (
        "a.onnx",
        "o",
        "f",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 7}, "--frames is 7; give one, or a list of them"),
        ({"frames": b"few"}, "--frames is b'few'; give one, or a list of them"),
        ({"frames": ["a", 7]}, "--frames is 7; give a text or a path"),
        ({"frames": []}, "--frames is empty; give at least one folder, tar file or glob"),
        ({"model": None}, "--model is None; give a text or a path"),
    ],
)
def test_what_is_no_path_is_one_line(change, message):
    with pytest.raises(ValueError) as caught:
        SegmentConfig(**{"model": "m", "frames": "f", "out": "o", **change})
    assert str(caught.value) == message


def test_every_path_of_a_job_may_be_a_path():
    """A field that `uris` names is one of the types that take a `Path`."""
    for command in cli.COMMANDS.values():
        if issubclass(command.config_type, config.StorageConfig) and command.config_type is not config.DoctorConfig:
            names = set(inspect.signature(command.config_type).parameters)
            paths = names & {"images", "masks", "classes", "out", "model", "frames", "labels", "onnx", "init_from"}
            assert paths <= config_types.forms(command.config_type).keys(), command.config_type


# --- types ---

TYPED = """
from pathlib import Path
from typing import reveal_type
import unet_ray
from unet_ray import SegmentConfig, TrainConfig

unet_ray.segment(model=Path("m"), frames="few/a", out="o")
unet_ray.segment(SegmentConfig(model="m", frames=["a", Path("b")], out="o"))
unet_ray.train(TrainConfig.from_recipe("default", images="a", masks="b", classes="c", out=Path("o"), epochs=3))
reveal_type(unet_ray.verify("labels", sources=True).problems)
reveal_type(SegmentConfig(model="m", frames="a", out="o").frames)
reveal_type(unet_ray.load("m").predict("a.png"))
reveal_type(unet_ray.load("m").predict(["a.png", Path("b")]))
unet_ray.segment(model="m", frames="a", out="o", bach_size=3)
unet_ray.segment(model="m", frames="a", out="o", batch_size="3")
unet_ray.segment(model="m", frames="a")
unet_ray.segment(TrainConfig(images="a", masks="b", classes="c", out="o"))
TrainConfig.from_recipe("default", images=3, masks="b", classes="c", out="o")
"""
VERDICTS = [
    (10, "note", 'Revealed type is "tuple[str, ...]"'),
    (11, "note", 'Revealed type is "tuple[str, ...]"'),
    (12, "note", 'Revealed type is "unet_ray.labelling.predictor.Prediction"'),
    (13, "note", 'Revealed type is "list[unet_ray.labelling.predictor.Prediction]"'),
    (14, "error", 'Unexpected keyword argument "bach_size"'),
    (15, "error", "No overload variant"),
    (16, "error", "No overload variant"),
    (17, "error", "No overload variant"),
    (18, "error", 'Argument "images" to "from_recipe" of "TrainConfig" has incompatible type "int"'),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is in the extra dev")
def test_a_type_checker_knows_every_keyword(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    root = unet_ray.PACKAGE.parent
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(tmp_path / "typed.py")]
    done = subprocess.run(
        [*command, "--cache-dir", str(root / ".mypy_cache")], capture_output=True, text=True, cwd=root
    )
    verdicts = [
        line.partition("typed.py:")[2].split(": ", 2) for line in done.stdout.splitlines() if "typed.py:" in line
    ]
    for number, kind, text in VERDICTS:
        lines = [message for line, of_kind, message in verdicts if (line, of_kind) == (str(number), kind)]
        assert any(message.startswith(text) for message in lines), (number, done.stdout)
    assert {int(line) for line, kind, _ in verdicts if kind == "error"} == {14, 15, 16, 17, 18}
