"""The command line: the dataclasses of `config` as options, one line for every error, exit codes that scripts can use.

Exit codes: 0 done; 1 the data or its verification failed; 2 usage; 75 trying again may help; 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

# Before TensorFlow is loaded anywhere below: its C++ notices name no trouble of the user's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tyro

import unet_ray
from unet_ray import config_files as options
from unet_ray import storage
from unet_ray.config import (
    CheckConfig,
    DemoConfig,
    EvaluateConfig,
    ExportMasksConfig,
    ExportModelConfig,
    SegmentConfig,
    StorageConfig,
    TrainConfig,
    VerifyConfig,
)
from unet_ray.errors import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE, JobFailed, TryAgain
from unet_ray.messages import count

END_WITHIN_S = 10.0
"""What a command that was told to stop has to do so in order; Ray's processes end with it either way."""


@dataclass(frozen=True)
class Command:
    """One subcommand: what it is told, and what it does with that."""

    config_type: type[Any]
    run: Callable[[Any], int]
    has_recipes: bool = False


# TensorFlow and Ray take seconds to import, so each command imports what it runs.


def _train(config: TrainConfig) -> int:
    from unet_ray.training.job import train

    train(config)
    return 0


def _evaluate(config: EvaluateConfig) -> int:
    from unet_ray.training.evaluation import evaluate

    evaluate(config)
    return 0


def _segment(config: SegmentConfig) -> int:
    from unet_ray.labelling.job import segment

    segment(config)
    return 0


def _check(config: CheckConfig) -> int:
    from unet_ray.pairs.checks import check_data_set

    report = check_data_set(config)
    print(report.as_text())
    return EXIT_FAILED if report.refused else 0


def _verify(config: VerifyConfig) -> int:
    from unet_ray.output import verify

    out = storage.resolve(config.out)
    problems = verify.verify(out)
    for line in problems or verify.kept_labels(out):
        print(line)
    print(f"{config.out}: {'whole: every file and row agrees with its record' if not problems else 'damaged'}")
    return EXIT_FAILED if problems else 0


def _export_model(config: ExportModelConfig) -> int:
    from unet_ray.model.export import export_model

    export_model(config.model, config.out, config.format)
    print(f"wrote {config.out}")
    return 0


def _export_masks(config: ExportMasksConfig) -> int:
    from unet_ray.output.masks import export_masks

    done = export_masks(config)
    missing = f"; {done.rejected:,} rejected frames have none" if done.rejected else ""
    print(f"{count(done.written, 'mask')} written to {config.out}{missing}")
    return 0


def _demo(config: DemoConfig) -> int:
    from unet_ray.demo.run import run_demo

    run_demo(config)
    return 0


COMMANDS = {
    "demo": Command(DemoConfig, _demo),
    "check": Command(CheckConfig, _check),
    "train": Command(TrainConfig, _train, has_recipes=True),
    "evaluate": Command(EvaluateConfig, _evaluate),
    "export-model": Command(ExportModelConfig, _export_model),
    "segment": Command(SegmentConfig, _segment),
    "verify": Command(VerifyConfig, _verify),
    "export-masks": Command(ExportMasksConfig, _export_masks),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"unet-ray {unet_ray.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"perhaps you meant {close[0]}" if close else "the commands are " + ", ".join(COMMANDS)
        return _fail(f"{name!r} is no command; {hint}", EXIT_USAGE)
    return run_command(name, arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Runs one command with its options; the entry of `jobs/train.py` and `jobs/segment.py`, too."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it for its background
        signal.signal(signal.SIGINT, _stop)
    try:
        config = parse(name, arguments)
        if isinstance(config, StorageConfig):
            config.configure_storage()
        return COMMANDS[name].run(config)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    except JobFailed as error:
        return _fail(str(error), EXIT_FAILED)
    except (storage.StorageError, TryAgain) as error:
        return _fail(str(error), EXIT_TRY_AGAIN)
    except OSError as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped", 128 + signal.SIGINT)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Returns the configuration of a command. Precedence: `--recipe` < `--config` < the options themselves.

    Raises:
        ValueError: an option or a combination that the command does not allow.
        SystemExit: after `--help` (0), or after the parser has said what it did not understand (2).
    """
    command = COMMANDS[name]
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    if command.has_recipes:
        files.add_argument("--recipe")
    chosen, rest = files.parse_known_args(arguments)
    from_files: list[str] = []
    if getattr(chosen, "recipe", None):
        from_files += options.option_arguments(
            options.read_recipe(chosen.recipe), command.config_type, f"recipe {chosen.recipe}"
        )
    if chosen.config:
        from_files += options.option_arguments(options.read_yaml(chosen.config), command.config_type, chosen.config)
    _refuse_unknown(name, rest, command.config_type)
    _refuse_missing(name, [*from_files, *rest], command.config_type)
    # The parser would put a ValueError of the configuration into a box of its own, so it fills an unchecked twin.
    twin = type(command.config_type.__name__, (command.config_type,), {"__post_init__": lambda self: None})
    config: Any = tyro.cli(
        twin,
        args=[*from_files, *rest],
        prog=f"unet-ray {name}",
        description=_description(command),
        use_underscores=False,
    )
    return command.config_type(**{field.name: getattr(config, field.name) for field in dataclasses.fields(twin)})


def _refuse_unknown(name: str, words: Sequence[str], config_type: type[Any]) -> None:
    """Raises ValueError for an option that is none, in one line; the parser would draw a box of nine."""
    options = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(config_type)]
    known = {"--help", "--config", "--recipe", *options, *(option.replace("--", "--no-", 1) for option in options)}
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            close = difflib.get_close_matches(option, options, n=1)
            hint = f"perhaps you meant {close[0]}; " if close else ""
            raise ValueError(f"{name} has no option {option}; {hint}`unet-ray {name} --help` shows them all")


def _refuse_missing(name: str, words: Sequence[str], config_type: type[Any]) -> None:
    """Raises ValueError for required options that are not given, in one line, as above."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    required = (
        field
        for field in dataclasses.fields(config_type)
        if field.default is field.default_factory is dataclasses.MISSING
    )
    missing = []
    for field in required:
        is_positional = "Positional" in str(field.type)
        option = field.name.upper() if is_positional else f"--{field.name.replace('_', '-')}"
        if not words if is_positional else option not in given:
            missing.append(option)
    if missing and not given & {"--help", "-h"}:
        raise ValueError(f"{name} needs {', '.join(missing)}; `unet-ray {name} --help` tells more")


def _description(command: Command) -> str:
    text = (command.config_type.__doc__ or "").strip()
    text += "\n\nAlso: --config FILE.yaml reads options from a file (`name: value`)."
    if command.has_recipes:
        text += f" --recipe NAME starts from one of {', '.join(options.recipe_names())}."
        text += " An option given here wins over the file, the file over the recipe."
    return text


def _overview() -> str:
    lines = (f"  {name:14}{(command.config_type.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    return f"""usage: unet-ray COMMAND [OPTIONS]

{unet_ray.__doc__}

commands:
{chr(10).join(lines)}

unet-ray COMMAND --help shows a command's options, unet-ray --version the version."""


def _fail(message: str, code: int) -> int:
    print(f"unet-ray: error: {message}", file=sys.stderr, flush=True)
    return code


def _stop(signum: int, frame: FrameType | None) -> None:
    """Ends this process in order; at once a little later, should threads that wait for a store hold that up."""
    code = 128 + signum
    timer = threading.Timer(END_WITHIN_S, _end_at_once, [code])
    timer.daemon = True
    timer.start()
    word = "interrupted" if signum == signal.SIGINT else "stopped"
    raise SystemExit(_fail(f"{word}; the same command goes on where this one stopped", code))


def _end_at_once(code: int) -> None:
    if "unet_ray.cluster.connection" in sys.modules:  # else there is no Ray, whose import takes a second
        from unet_ray.cluster import connection as cluster

        cluster.end_ray(in_order=False)
    os._exit(code)
