from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import unet_ray
from unet_ray import cli
from unet_ray.config import TrainConfig
from unet_ray.options import config_files as options

TRAIN = ["--images", "i", "--masks", "m", "--classes", "camvid", "--out", "o"]


def test_the_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"unet-ray {unet_ray.__version__}\n"


def test_a_mistyped_command_gets_a_suggestion_and_exit_code_2(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "unet-ray: error: 'trian' is no command; perhaps you meant train\n"


def test_a_mistyped_option_gets_a_suggestion_and_exit_code_2(capsys):
    assert cli.main(["train", "--images", "x", "--bach-size", "4"]) == 2
    assert capsys.readouterr().err == (
        "unet-ray: error: train has no option --bach-size; perhaps you meant --batch-size; "
        "`unet-ray train --help` shows them all\n"
    )


def test_missing_options_are_one_line_and_exit_code_2(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("masks: m\n")
    assert cli.main(["train", "--config", str(file), "--images", "i"]) == 2
    assert capsys.readouterr().err == (
        "unet-ray: error: train needs --classes, --out; `unet-ray train --help` tells more\n"
    )
    assert cli.main(["verify"]) == 2
    assert capsys.readouterr().err == "unet-ray: error: verify needs OUT; `unet-ray verify --help` tells more\n"


def test_a_wrong_value_is_one_line_and_exit_code_2(capsys):
    assert cli.main(["train", *TRAIN, "--image-size", "0", "128"]) == 2
    assert capsys.readouterr().err == "unet-ray: error: image height is 0; it must be 1 to 8192\n"


def test_precedence_is_recipe_then_file_then_options(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "epochs: 7\nbatch-size: 8\nimage_size: [48, 64]\naugment: true\nflip: false\nimages: from-the-file\n"
    )
    config = cli.parse("train", [*TRAIN, "--recipe", "notebook", "--config", str(file), "--batch-size", "16"])
    assert config.learning_rate == 1e-3 and config.augment and not config.flip
    assert (config.epochs, config.batch_size, config.image_size, config.images) == (7, 16, (48, 64), "i")


def test_without_a_recipe_it_is_the_default_one():
    config = cli.parse("train", TRAIN)
    assert config == cli.parse("train", [*TRAIN, "--recipe", "default"])
    assert (config.optimizer, config.schedule, config.batch_size, config.epochs) == ("adamw", "cosine", 8, 118)
    assert (config.loss, config.class_weights, config.augment, config.val_fraction) == ("ce+dice", "log", True, 0.1)
    changed = cli.parse("train", [*TRAIN, "--epochs", "5", "--no-augment"])
    assert (changed.epochs, changed.augment, changed.optimizer) == (5, False, "adamw")
    assert cli.recipe_line("default", config) == "recipe: default"
    assert cli.recipe_line("default", changed) == "recipe: default, but for --epochs --augment"


def test_the_notebooks_recipe_is_the_notebooks_in_full():
    """Its values by hand: NOTEBOOK's Adam, 40 epochs of batches of 32, all frames train."""
    config = cli.parse("train", [*TRAIN, "--recipe", "notebook"])
    hand = TrainConfig(images="i", masks="m", classes="camvid", out="o", val_fraction=0.0)
    assert config == hand
    assert (hand.optimizer, hand.learning_rate, hand.schedule, hand.batch_size) == ("adam", 1e-3, "constant", 32)
    assert (hand.epochs, hand.loss, hand.augment, hand.early_stopping_epochs) == (40, "ce", False, 0)
    assert (hand.image_size, hand.resize, hand.fit, hand.n_filters) == ((96, 128), "nearest", "stretch", 32)
    assert cli.recipe_line("notebook", config) == "recipe: notebook"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], "recipe: default"),
        (["--recipe", "notebook", "--epochs", "3"], "recipe: notebook, but for --epochs"),
    ],
)
def test_the_first_line_is_the_recipe(given, line, tmp_path, capsys):
    gone = str(tmp_path / "gone")
    arguments = ["--images", gone, "--masks", gone, "--classes", "camvid", "--out", str(tmp_path / "o")]
    assert cli.main(["train", *arguments, *given]) == 2
    assert capsys.readouterr().out.splitlines()[:1] == [line]


def test_a_run_can_be_repeated_from_the_configuration_it_wrote(tmp_path):
    config = cli.parse("train", [*TRAIN, "--scale", "0.3", "1.0", "--val-images", "v", "--val-masks", "w"])
    file = tmp_path / "config.yaml"
    file.write_text(options.to_yaml(config))
    assert cli.parse("train", ["--config", str(file)]) == config
    config = cli.parse("segment", ["--model", "m", "--frames", "a", "b", "--out", "o", "--actors", "1:3"])
    file.write_text(options.to_yaml(config))
    assert cli.parse("segment", ["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [([], None), (["--retry-rejected"], ()), (["--retry-rejected", "crashed", "changed"], ("crashed", "changed"))],
)
def test_rejected_frames_are_tried_again_all_or_by_reason(arguments, reasons, tmp_path):
    config = cli.parse("segment", ["--model", "m", "--frames", "a", *arguments, "--out", "o"])
    assert config.retry_rejected == reasons
    (tmp_path / "config.yaml").write_text(options.to_yaml(config))
    assert cli.parse("segment", ["--config", str(tmp_path / "config.yaml")]) == config


def test_an_unknown_option_in_a_file_is_named(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("epoch: 7\n")
    assert cli.main(["train", *TRAIN, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"unet-ray: error: {file}: unknown option 'epoch'; perhaps you meant epochs; the options are accumulate, "
    )
    assert error.count("\n") == 1


def test_an_unknown_recipe_names_those_there_are(capsys):
    assert cli.main(["train", *TRAIN, "--recipe", "cake"]) == 2
    assert capsys.readouterr().err == "unet-ray: error: --recipe is 'cake'; the recipes are default, notebook\n"


@pytest.mark.parametrize("command", ["train", "segment", "evaluate", "check"])
def test_missing_folders_are_one_line_and_exit_code_2(command, tmp_path, capsys):
    gone = str(tmp_path / "gone")
    options = {
        "train": ["--images", gone, "--masks", gone, "--classes", "camvid", "--out", str(tmp_path / "o")],
        "segment": ["--model", gone, "--frames", gone, "--out", str(tmp_path / "o")],
        "evaluate": ["--model", gone, "--images", gone, "--masks", gone],
        "check": ["--images", gone, "--masks", gone, "--classes", "camvid"],
    }
    assert cli.main([command, *options[command]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"unet-ray: error: {gone}") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("job", ["train", "segment"])
def test_the_jobs_to_submit_take_the_same_options(job, tmp_path):
    script = Path(__file__).parent.parent / "jobs" / f"{job}.py"
    options = {
        "train": ["--images", "gone", "--masks", "gone", "--classes", "camvid", "--out", "o"],
        "segment": ["--model", "gone", "--frames", "gone", "--out", "o"],
    }[job]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"unet-ray: error: {tmp_path}/gone") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_values_of_a_list_that_is_given_twice_are_all_taken():
    words = ["--model", "m", "--frames", "a", "b", "--out=o", "--frames=c", "--allow_uri", "s3://x"]
    config = cli.parse("segment", [*words, "--allow-uri", "/y"])
    assert (config.frames, config.out, config.allow_uri) == (("a", "b", "c"), "o", ("s3://x", "/y"))
    config = cli.parse("export-masks", ["--sequence", "a", "--out", "o", "labels", "--sequence", "b"])
    assert (config.labels, config.sequence) == ("labels", ("a", "b"))
