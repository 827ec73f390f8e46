"""The help of every command: groups, required options first, defaults, examples, and how long it is."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys

import pytest

from unet_ray import cli, config
from unet_ray.options import cli_help
from unet_ray.options.cli_values import NEVER

OPTIONS = [(name, option) for name, command in cli.COMMANDS.items() for option in command.options.values()]


def help_lines(name: str, option: str, capsys, monkeypatch, columns: int = 100) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        cli.main([name, option])
    output, error = capsys.readouterr()
    assert (ended.value.code, error) == (0, "")
    return output.splitlines()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_short_help_is_a_screen_and_names_the_whole_one(name, capsys, monkeypatch):
    lines = help_lines(name, "-h", capsys, monkeypatch)
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    assert lines[-1].startswith(f"`unet-ray {name} --help` explains ")


@pytest.mark.parametrize("name", cli.COMMANDS)
@pytest.mark.parametrize("columns", [60, 100, 300])
def test_the_whole_help_has_each_option_once_with_its_text_and_default(name, columns, capsys, monkeypatch):
    lines = help_lines(name, "--help", capsys, monkeypatch, columns)
    titles = [match[1] for line in lines if (match := re.match(r"  (--[a-z0-9-]+|[A-Z]+)(?:,? |$)", line))]
    command = cli.COMMANDS[name]
    options = [*command.options.values(), *command.files.values()]
    assert sorted(titles) == sorted(option.title for option in options)
    text = " ".join(" ".join(lines).split())
    assert all(option.text in text for option in options)
    if columns >= 100:
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_options_that_must_be_given_come_first_and_the_groups_in_their_order(name, capsys, monkeypatch):
    for option in ("-h", "--help"):
        titles = [line[:-1] for line in help_lines(name, option, capsys, monkeypatch) if re.match("[a-z ]+:$", line)]
        required = ["required"] * any(option.default is NEVER for option in cli.COMMANDS[name].options.values())
        groups = [title for title in cli_help.GROUPS if title in titles]
        assert titles == [*required, *groups, "options from files", "examples"]


def test_the_help_loads_neither_tensorflow_nor_ray():
    code = "import sys\nfrom unet_ray import cli\ntry:\n    cli.main(['train', '-h'])\nexcept SystemExit:\n    "
    code += "assert not {'tensorflow', 'keras', 'ray', 'matplotlib'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: unet-ray train --images URI ")


def test_every_option_of_every_command_has_a_group():
    grouped = [field for fields in cli_help.GROUPS.values() for field in fields]
    assert len(grouped) == len(set(grouped))
    assert {option.field for _, option in OPTIONS} == set(grouped)
    exceptions = [(name, field) for name, field in cli_help._ELSEWHERE]
    assert all(field in cli.COMMANDS[name].options for name, field in exceptions)
    assert {cli_help.group_of(name, option.field) for name, option in OPTIONS} == set(cli_help.GROUPS)


def test_the_short_help_names_options_that_there_are():
    brief = [(name, field) for name, fields in cli_help.BRIEF.items() for field in fields]
    optional = {(name, option.field) for name, option in OPTIONS if option.default is not NEVER}
    assert set(brief) <= optional and len(brief) == len(set(brief))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_two_examples_are_understood_and_shown_as_a_shell_takes_them(name, capsys, monkeypatch):
    examples = cli_help.EXAMPLES[name]
    assert len(examples) == 2
    lines = help_lines(name, "-h", capsys, monkeypatch)
    text = "\n".join(lines[lines.index("examples:") + 1 : -2]).replace("\\\n", " ")
    assert [shlex.split(line) for line in text.splitlines()] == [shlex.split(example) for example in examples]
    monkeypatch.setattr(
        "unet_ray.options.config_files.read_yaml", lambda file: {"images": "i", "masks": "m", "classes": "kitti"}
    )
    for example in examples:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("unet-ray", name)
        assert isinstance(cli.parse(name, arguments), cli.COMMANDS[name].config_type)


def test_defaults_are_those_that_count(capsys, monkeypatch):
    text = " ".join(" ".join(help_lines("train", "--help", capsys, monkeypatch)).split())
    for line in (
        "--batch-size INT Frames of a step, over all workers together. (default: 8)",  # of the recipe
        "--image-size INT INT|data Height and width of the network's input in pixels, or data: ",
        "scaled down to 512x1024 pixels' worth. (default: 96 128)",
        "--augment, --no-augment Whether to vary the training frames; the options below say how. (default: on)",
        "--overwrite Delete what lies in `--out` and start anew. --checkpoint-every-epochs",
        "--mask-format {auto,channel-max,ids,colors} How a mask's pixels mean a class",
        "Defaults below are those of `--recipe default`.",
    ):
        assert line in text
    text = " ".join(" ".join(help_lines("evaluate", "-h", capsys, monkeypatch)).split())
    assert "--batch-size INT Frames of a step [32]" in text


def test_a_text_is_cut_where_it_still_makes_sense():
    text = "Size of the masks: the frame's own (logits, resized) or the network's. Twice the time."
    beginnings = [cli_help._beginning(text, room) for room in (100, 75, 60, 20, 8)]
    assert beginnings == [
        text[:-1],
        "Size of the masks: the frame's own (logits, resized) or the network's",
        "Size of the masks: the frame's own",
        "Size of the masks",
        "Size …",
    ]


def test_a_number_with_a_unit_says_it_in_its_name_or_its_text():
    units = (
        "Seconds|Frames|frames|Epochs|Passes|pixels|Share|share|CPUs|Threads|workers|actors|Times|Rows|Filters|blocks"
    )
    units += "|rate|norm|relative|weight decay|multiplied|Decides|Micro-batches|epochs|number"
    numbers = {option.field: option for _, option in OPTIONS if re.search("INT|NUMBER", option.metavar())}
    assert [option.title for option in numbers.values() if not re.search(units, option.text)] == ["--mean"]
    assert "in units of 0 to 255" in numbers["mean"].text


def test_the_texts_are_those_under_the_fields():
    """By another way than the help's: the last text of a field in the order of inheritance wins."""
    tree = ast.parse(inspect.getsource(config.SegmentConfig))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    places = {node.target.id: index for index, node in enumerate(body) if isinstance(node, ast.AnnAssign)}
    for field, index in places.items():
        assert cli.COMMANDS["segment"].options[field].text == " ".join(ast.literal_eval(body[index + 1].value).split())
