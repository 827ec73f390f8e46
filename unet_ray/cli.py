"""The command line: the dataclasses of `config` as options, one line for every error, exit codes that scripts can use.

Exit codes: 0 done; 1 the data or its verification failed; 2 usage; 75 trying again may help; 130 and 143 interrupted.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

# Before TensorFlow is loaded anywhere below: its C++ notices name no trouble of the user's.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import unet_ray
from unet_ray import stops, storage, streams
from unet_ray.config import (
    CheckConfig,
    DemoConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportMasksConfig,
    ExportModelConfig,
    ImportModelConfig,
    ReportConfig,
    SegmentConfig,
    StorageConfig,
    TrainConfig,
    VerifyConfig,
)
from unet_ray.errors import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE, JobFailed, TryAgain
from unet_ray.messages import printable, say
from unet_ray.options.cli_help import help_text
from unet_ray.options.cli_options import Command, Words, configuration, recipe_line, recipe_of, sort_words
from unet_ray.stops import STOPPED
from unet_ray.suggestions import COMMAND_SYNONYMS, closest

END_WITHIN_S = 10.0
"""What a command that was told to stop has to do so in order; Ray's processes end with it either way."""


# TensorFlow and Ray take seconds to import, so each command imports what it runs.


def _train(config: TrainConfig) -> int:
    from unet_ray.training.job import train

    train(config)
    _end(config.out, PICTURES, f"unet-ray segment --model {shlex.quote(config.out)} --frames … --out …")
    return 0


def _evaluate(config: EvaluateConfig) -> int:
    from unet_ray.training.evaluation import evaluate

    evaluate(config)
    if config.out is None:
        say("Next: the same command with --out FOLDER keeps metrics.json and pictures")
        return 0
    following = f"unet-ray segment --model {shlex.quote(config.model)} --frames … --out …"
    _end(config.out, ("metrics.json", *PICTURES), following)
    return 0


def _segment(config: SegmentConfig) -> int:
    from unet_ray.labelling.job import segment

    segment(config)
    _end(config.out, ("report.html", "preview.png", "rejected.csv"), f"unet-ray verify {shlex.quote(config.out)}")
    return 0


def _check(config: CheckConfig) -> int:
    from unet_ray.pairs.checks import check_data_set

    report = check_data_set(config, say)
    say(*report.as_text().split("\n"))
    if report.refused:
        say("Next: mend what is marked `refused`, and give the same command again")
        return EXIT_FAILED
    words = [word for name in ("images", "masks", "classes") for word in (f"--{name}", getattr(config, name))]
    say(f"Next: unet-ray train {shlex.join(words)} --out …")
    return 0


def _verify(config: VerifyConfig) -> int:
    from unet_ray import commands

    verification = commands.verify(config)
    verdict = "damaged" if verification.problems else "whole: every file and row agrees with its record"
    say(*(verification.problems or verification.kept_labels), f"{config.out}: {verdict}")
    if verification.sources:
        say(*verification.sources.problems, verification.sources.as_text())
    if verification.problems:
        say("Next: the command that made these labels labels what is damaged again")
    elif verification.is_whole:
        say(f"Next: unet-ray export-masks {shlex.quote(config.out)} --out …")
    return 0 if verification.is_whole else EXIT_FAILED


def _export_model(config: ExportModelConfig) -> int:
    with streams.without_notices():
        from unet_ray.model.export import export_model

        export_model(config.model, config.out, config.format, allow_network=config.allow_network)
    say(f"wrote {config.out}", f"Next: in Python, {_LOADERS[config.format]}({config.out!r})")
    return 0


def _import_model(config: ImportModelConfig) -> int:
    from unet_ray import commands

    imported = commands.import_model(config)
    say(*imported.lines, f"model: {imported.model}")
    say(f"Next: unet-ray segment --model {shlex.quote(imported.model)} --frames … --out …")
    return 0


def _export_masks(config: ExportMasksConfig) -> int:
    from unet_ray.output.exports.formats import export_masks

    say(*export_masks(config).as_text(config.out), f"Look at: {config.out}")
    return 0


def _report(config: ReportConfig) -> int:
    from unet_ray.reports.report import write_report

    say(f"Look at: {write_report(config)}")
    return 0


def _doctor(config: DoctorConfig) -> int:
    from unet_ray.cluster.doctor import examine
    from unet_ray.cluster.findings import report_text

    reports = examine(config)
    print(report_text(reports))
    if any(report.fails for report in reports):
        say("Next: mend what fails, as its line says, and give the same command again")
        return EXIT_FAILED
    say("Next: unet-ray check --images … --masks … --classes …")
    return 0


def _demo(config: DemoConfig) -> int:
    from unet_ray.demo.run import run_demo

    run_demo(config)
    return 0


COMMANDS = {
    "demo": Command(DemoConfig, _demo),
    "doctor": Command(DoctorConfig, _doctor),
    "check": Command(CheckConfig, _check),
    "train": Command(TrainConfig, _train, recipe="default"),
    "evaluate": Command(EvaluateConfig, _evaluate),
    "export-model": Command(ExportModelConfig, _export_model),
    "import-model": Command(ImportModelConfig, _import_model),
    "segment": Command(SegmentConfig, _segment),
    "verify": Command(VerifyConfig, _verify),
    "export-masks": Command(ExportMasksConfig, _export_masks),
    "report": Command(ReportConfig, _report),
}


PICTURES = ("report.html", "curves.png", "samples.png", "confusion.png")
"""Of a training and of an evaluation; each may lack some."""

_LOADERS = {
    "keras": "keras.saving.load_model",
    "savedmodel": "tensorflow.saved_model.load",
    "onnx": "onnxruntime.InferenceSession",
}
"""What reads an exported model."""


def _end(folder: str, names: Sequence[str], following: str) -> None:
    """Says which of some files of a folder to look at, and the command that comes next."""
    uri = storage.resolve(folder)
    files = [storage.join(folder, name) for name in names if storage.exists(storage.join(uri, name))]
    if files:
        say(f"Look at: {', '.join(files)}")
    say(f"Next: {following}")


class _Stop:
    """The handler of SIGTERM and SIGINT: ends this process in order.

    A little later at once, should threads that wait for a store hold that up. Where the signal comes while Ray waits in
    C++, Ray (2.60) makes exit code 1 of this one's: so it is kept.
    """

    code: int | None = None
    """The exit code of the signal that came."""

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.code = 128 + signum
        timer = threading.Timer(END_WITHIN_S, _end_at_once, [self.code])
        timer.daemon = True
        timer.start()
        if stops.takes_last_word():
            _fail(STOPPED.format(stops.WORDS[signum]), self.code)
        raise SystemExit(self.code)


_stop = _Stop()


def run() -> NoReturn:
    """The console script `unet-ray`."""
    end_process(main)


def end_process(command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends this process with its exit code, while its threads still can do what they like.

    Arrow's threads let go of Python's files when they come to it. Where the interpreter is gone by then, C++ aborts
    the process: 1 of 40 runs of `export-masks --sequence WRONG` (pyarrow 26, 2 busy cores, 2026-11-30).
    """
    streams.steady()
    try:
        code = command()
    except SystemExit as ended:  # of the option parser, or of `_stop`
        code = ended.code if isinstance(ended.code, int) else 0
    atexit._run_exitfuncs()
    if trouble := streams.flush():
        code = _fail(f"standard output could not be written: {trouble.strerror}", code or EXIT_FAILED)
    os._exit(code)


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
        meant = COMMAND_SYNONYMS.get(name) or closest(name, COMMANDS)
        hint = f"perhaps you meant {meant}" if meant else "the commands are " + ", ".join(COMMANDS)
        return _fail(f"{name!r} is no command; {hint}", EXIT_USAGE)
    return run_command(name, arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Runs one command with its options; the entry of `jobs/train.py` and `jobs/segment.py`, too."""
    _stop.code = None
    stops.note_arrivals()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell ignores it for its background
        signal.signal(signal.SIGINT, _stop)
    try:
        words = _sorted_words(name, arguments)
        config = configuration(name, COMMANDS[name], words)
        if isinstance(config, StorageConfig):
            config.configure_storage()
        if recipe := recipe_of(COMMANDS[name], words):
            say(recipe_line(recipe, config))
        return COMMANDS[name].run(config)
    except ValueError as error:
        return _fail(str(error), EXIT_USAGE)
    except JobFailed as error:
        return _fail(str(error), EXIT_FAILED)
    except (storage.StorageError, TryAgain) as error:
        return _fail(str(error), EXIT_TRY_AGAIN)
    except OSError as error:
        return _fail(str(error), EXIT_FAILED)
    except SystemExit as ended:
        if _stop.code is not None:
            return _stop.code
        if ended.code != signal.SIGTERM:
            raise
        return _fail(STOPPED.format("stopped"), 128 + signal.SIGTERM)  # by Ray's own handler, while it starts
    except KeyboardInterrupt:
        return _fail(STOPPED.format("interrupted"), 128 + signal.SIGINT)


def parse(name: str, arguments: Sequence[str]) -> Any:
    """Returns the configuration of a command; see `cli_options.configuration`.

    Raises:
        ValueError: an option or a combination that the command does not allow.
        SystemExit: after the help.
    """
    return configuration(name, COMMANDS[name], _sorted_words(name, arguments))


def _sorted_words(name: str, arguments: Sequence[str]) -> Words:
    words = sort_words(name, COMMANDS[name], arguments, COMMANDS)
    if words.help:
        print(help_text(name, COMMANDS[name], is_whole=words.help == "--help"))
        raise SystemExit(0)
    return words


def _overview() -> str:
    lines = (f"  {name:14}{(command.config_type.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    return f"""usage: unet-ray COMMAND [OPTIONS]

{unet_ray.__doc__}

commands:
{chr(10).join(lines)}

unet-ray COMMAND -h shows a command's options, --help explains all of them; unet-ray --version shows the version."""


def _fail(message: str, code: int) -> int:
    print(f"unet-ray: error: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _end_at_once(code: int) -> None:
    if "unet_ray.cluster.connection" in sys.modules:  # else there is no Ray, whose import takes a second
        from unet_ray.cluster import connection as cluster

        cluster.end_ray(in_order=False)
    os._exit(code)
