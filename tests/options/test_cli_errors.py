"""What a person gets wrong on a command line or in a file: one line on standard error and exit code 2."""

from __future__ import annotations

import pytest
import yaml

from unet_ray import cli
from unet_ray.options.cli_values import NEVER, Option
from unet_ray.options.config_files import Mark
from unet_ray.suggestions import COMMAND_SYNONYMS

WORDS = {
    "train": ["--images", "i", "--masks", "m", "--classes", "camvid", "--out", "o"],
    "segment": ["--model", "m", "--frames", "f", "--out", "o"],
    "evaluate": ["--model", "m", "--images", "i", "--masks", "k"],
    "check": ["--images", "i", "--masks", "m", "--classes", "camvid"],
    "verify": ["labels"],
    "doctor": [],
    "demo": [],
    "export-model": ["--model", "m", "--out", "o"],
    "import-model": ["--onnx", "n", "--classes", "camvid", "--out", "o"],
    "export-masks": ["labels", "--out", "o"],
    "report": ["labels"],
}
"""What each command needs."""


def wrong_words(option: Option) -> list[list[str]]:
    """Words behind an option that mean nothing, by its type alone."""
    if option.is_switch:
        return [[f"{option.title}=perhaps"]]
    if option.takes_many:
        return []  # any words are values of these
    if str in option.arms:
        return [[option.title], [option.title, "a", "b"]]
    wrong = [[], ["{torn"], ["[1, 2]"]]
    if Mark.MAPPING not in option.arms:
        wrong = [[], [""], ["nonsense"], ["inf"], ["1", "nan", "3", "4"]]
    return [[option.title, *words] for words in wrong]


CASES = [
    (name, option.field, words)
    for name, command in cli.COMMANDS.items()
    for option in command.options.values()
    if not option.is_positional
    for words in wrong_words(option)
    if len(words) <= 1 + option.most_words or not command.positional  # else the last stands by itself
]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line gets, behind `unet-ray: error: `."""
    assert cli.main(arguments) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("unet-ray: error: ") and error.endswith("\n") and error.count("\n") == 1
    return error.removeprefix("unet-ray: error: ").removesuffix("\n")


@pytest.mark.parametrize(("name", "field", "words"), CASES, ids=lambda part: part if isinstance(part, str) else "")
def test_a_wrong_value_of_any_option_is_one_line_that_names_it(name, field, words, capsys):
    option = cli.COMMANDS[name].options[field]
    assert option.title in error_of([name, *WORDS[name], *words], capsys)


def test_every_option_of_every_command_is_tried():
    every = {
        (name, option.field)
        for name, command in cli.COMMANDS.items()
        for option in command.options.values()
        if not option.is_positional and not option.takes_many
    }
    assert every <= {(name, field) for name, field, _ in CASES} and len(CASES) > 200


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_the_commands_need_is_taken_and_its_defaults_are_the_fields(name):
    config, command = cli.parse(name, WORDS[name]), cli.COMMANDS[name]
    if not command.recipe:
        defaults = {option.field: option.default for option in command.options.values() if option.default is not NEVER}
        assert {field: getattr(config, field) for field in defaults} == defaults


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train", *WORDS["train"], "--image-size", "128"],
            "--image-size is '128'; give 2 whole numbers or data, such as --image-size 96 128",
        ),
        (["train", *WORDS["train"], "--epochs", "ten"], "--epochs is 'ten'; give a whole number, such as --epochs 40"),
        (["train", *WORDS["train"], "--epochs"], "--epochs needs a value; give a whole number, such as --epochs 40"),
        (
            ["train", *WORDS["train"], "--learning-rate", "nan"],
            "--learning-rate is 'nan'; give a number, such as --learning-rate 0.001",
        ),
        (
            ["train", *WORDS["train"], "--loss", "dise"],
            "--loss is 'dise'; perhaps you meant dice; give ce, focal, dice, jaccard, ce+dice or ce+jaccard",
        ),
        (["train", *WORDS["train"], "--images"], "--images needs a value; it is: URI of the folder of frames"),
        (
            ["train", *WORDS["train"], "--images", "a", "b"],
            "--images takes one value, and 'b' is one too many; quote what has spaces",
        ),
        (
            ["train", *WORDS["train"], "--no-augment=x"],
            "--augment is 'x'; give --augment or --no-augment, and in a file true or false",
        ),
        (["train", *WORDS["train"], "--config"], "--config needs a value; it is: YAML file with some of these options"),
        (["train", "data", *WORDS["train"]], "'data' belongs to no option of train; `unet-ray train -h` shows them"),
        (["verify", "a", "b"], "verify takes one OUT, and 'b' is one too many"),
        (["verify"], "verify needs OUT; `unet-ray verify --help` tells more"),
        (["segment", "--model", "m"], "segment needs --frames, --out; `unet-ray segment --help` tells more"),
        (
            ["segment", *WORDS["segment"], "--window", "96"],
            "--window is '96'; give 2 whole numbers, such as --window 96 128",
        ),
        (
            ["import-model", *WORDS["import-model"], "--mean", "0.5"],
            "--mean is '0.5'; give 3 numbers, such as --mean 123.675 116.28 103.53",
        ),
    ],
)
def test_a_line_says_what_was_given_what_is_allowed_and_an_example(arguments, line, capsys):
    assert error_of(arguments, capsys) == line


@pytest.mark.parametrize(
    ("name", "word", "hint"),
    [
        ("segment", "--workers", "perhaps you meant --actors"),
        ("train", "--actors", "perhaps you meant --workers"),
        ("train", "--lr", "perhaps you meant --learning-rate"),
        ("train", "--bs", "perhaps you meant --batch-size"),
        ("train", "--batch", "perhaps you meant --batch-size"),
        ("train", "-b", "perhaps you meant --batch-size"),
        ("train", "--gpus", "perhaps you meant --workers"),
        ("segment", "--gpus", "perhaps you meant --actors"),
        ("evaluate", "--gpus", "perhaps you meant --device"),
        ("train", "--imgsz", "perhaps you meant --image-size"),
        ("train", "--weights", "perhaps you meant --init-from"),
        ("segment", "--weights", "perhaps you meant --model"),
        ("segment", "--source", "perhaps you meant --frames"),
        ("segment", "--images", "perhaps you meant --frames"),
        ("train", "--labels", "perhaps you meant --masks"),
        ("train", "--patience", "perhaps you meant --early-stopping-epochs"),
        ("train", "--val_split", "perhaps you meant --val-fraction"),
        ("train", "--bach-size", "perhaps you meant --batch-size"),
        ("train", "--no-agument", "perhaps you meant --no-augment"),
        ("train", "--Epochs", "perhaps you meant --epochs"),
        ("train", "--recipes", "perhaps you meant --recipe"),
        ("train", "--resume", "the same command goes on where it was stopped"),
        ("segment", "--epochs", "it is one of demo, train"),
        ("verify", "--out", "give OUT by itself"),
    ],
)
def test_an_option_that_is_none_gets_the_one_that_was_meant(name, word, hint, capsys):
    line = error_of([name, *WORDS[name], word, "x"], capsys)
    assert line == f"{name} has no option {word}; {hint}; `unet-ray {name} --help` shows them all"


def test_an_option_that_resembles_none_gets_no_guess(capsys):
    assert error_of(["train", "--zzz"], capsys) == "train has no option --zzz; `unet-ray train --help` shows them all"


@pytest.mark.parametrize(("word", "command"), [*COMMAND_SYNONYMS.items(), ("sgment", "segment"), ("Train", "train")])
def test_a_command_that_is_none_gets_the_one_that_was_meant(word, command, capsys):
    assert command in cli.COMMANDS
    assert error_of([word], capsys) == f"{word!r} is no command; perhaps you meant {command}"


def test_every_synonym_is_an_option_of_some_command_and_hides_none():
    from unet_ray.suggestions import _SYNONYMS

    fields = {field for command in cli.COMMANDS.values() for field in command.options}
    assert {name for names in _SYNONYMS.values() for name in names.split()} <= fields


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("lr: 0.1", "unknown option 'lr'; perhaps you meant learning_rate; the options are "),
        ("Epochs: 3", "unknown option 'Epochs'; perhaps you meant epochs; the options are "),
        ("zzz: 3", "unknown option 'zzz'; the options are accumulate, "),
        ("epochs: ten", "--epochs is 'ten'; give a whole number, such as --epochs 40"),
        ("epochs: true", "--epochs is true; give a whole number, such as --epochs 40, in quotes where YAML needs them"),
        ("epochs: {a: 1}", "--epochs is a mapping; give a whole number, such as --epochs 40"),
        ("epochs: null", "--epochs is null; give a whole number, such as --epochs 40"),
        ("augment: 3", "--augment is '3'; give --augment or --no-augment, and in a file true or false"),
        ("image_size: [96]", "--image-size is '96'; give 2 whole numbers or data, such as --image-size 96 128"),
        ("images: [a, b]", "--images takes one value, and 'b' is one too many; quote what has spaces"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_option(content, line, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    assert error_of(["train", *WORDS["train"], "--config", str(file)], capsys).startswith(f"{file}: {line}")


def test_a_recipe_that_is_none_gets_the_one_that_was_meant(capsys):
    assert error_of(["train", *WORDS["train"], "--recipe", "notebok"], capsys) == (
        "--recipe is 'notebok'; perhaps you meant notebook; the recipes are default, notebook"
    )


def test_a_class_set_that_is_none_gets_the_one_that_was_meant(capsys, tmp_path):
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
    words = ["check", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "m"), "--classes"]
    assert error_of([*words, "citiscapes"], capsys).startswith(
        "--classes is 'citiscapes'; perhaps you meant cityscapes; give one of a2d2, "
    )
    (tmp_path / "mine.yaml").write_text("classes: [{name: road, colour: [1, 2, 3]}]")
    assert "unknown key 'colour', perhaps you meant color; allowed are " in error_of(
        [*words, str(tmp_path / "mine.yaml")], capsys
    )


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--image-size", "data"], "image_size", "data"),
        (["--image_size=data"], "image_size", "data"),
        (["--image-size", "48", "64"], "image_size", (48, 64)),
        (["--workers", "2"], "workers", 2),
        (["--workers=1:2"], "workers", "1:2"),
        (["--scale", "0.5", "1e0"], "scale", (0.5, 1.0)),
        (["--no-flip"], "flip", False),
        (["--no-flip", "--flip"], "flip", True),
        (["--flip", "--no-flip"], "flip", False),
        (["--epochs", "3", "--epochs", "5"], "epochs", 5),
        (["--out=a=b"], "out", "a=b"),
        (["--out", "-"], "out", "-"),
        (["--storage-options", '{"s3": {"anon": true}}'], "storage_options", '{"s3": {"anon": true}}'),
    ],
)
def test_words_become_values_by_the_type_of_the_field(words, field, value):
    assert getattr(cli.parse("train", [*WORDS["train"], *words]), field) == value


def test_negative_numbers_are_values(capsys):
    words = [*WORDS["import-model"], "--mean", "-1", "-2.5", ".5"]
    assert cli.parse("import-model", words).mean == (-1.0, -2.5, 0.5)
    assert error_of(["train", *WORDS["train"], "--seed", "-1"], capsys) == "--seed is -1; it must be at least 0"


def test_a_file_holds_mappings_lists_and_nothing(tmp_path):
    content = {"frames": ["a", "b"], "window": [48, 64], "storage_options": {"s3": {"anon": True}}, "stride": None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    config = cli.parse("segment", ["--model", "m", "--out", "o", "--config", str(tmp_path / "mine.yaml")])
    assert (config.frames, config.window, config.stride) == (("a", "b"), (48, 64), None)
    assert config.storage_options == {"s3": {"anon": True}}
