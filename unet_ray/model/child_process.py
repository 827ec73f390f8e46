"""A question that a child process answers: the process that asks loads no TensorFlow, and outlives what the child does.

The question is JSON on the child's standard input, the answer the last line of its standard output:
`{"problem": null}` where all is well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

TIMEOUT_S = 600.0
"""For a child that does not end."""
_LETTERS = 500
_NOTICE = re.compile(r"[IWE]\d{4} |WARNING: All log messages")
"""How lines of TensorFlow's begin that name no trouble of the user's."""


def ask_child(child: str, question: Mapping[str, Any], subject: str, *, late: str) -> None:
    """Asks a question, and returns where the child has no problem with it.

    Args:
        child: the module that runs `answer_parent` as its main program.
        question: plain JSON types.
        subject: what messages call the thing that is tried.
        late: what is said of it where there is no answer in time: `has built no network`.

    Raises:
        ValueError: one line: the problem, or how the child ended.
    """
    # The folder of the command is where Python would look for a user's module, as in the process that asks.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", child]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{subject} {late} in {TIMEOUT_S:.0f} s") from error
    reply = _last_line(done.stdout)
    if reply is None:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not _NOTICE.match(line)]
        last = lines[-1][:_LETTERS] if lines else "without a word"
        raise ValueError(f"{subject} ended its process with exit code {done.returncode}: {last}")
    if reply["problem"] is not None:
        raise ValueError(reply["problem"])


def _last_line(output: str) -> dict[str, Any] | None:
    """The child's answer; what a user's function prints comes before it."""
    try:
        return json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def answer_parent(act: Callable[[Mapping[str, Any]], None]) -> None:
    """Answers the question on standard input: `act` is given it, and raises ValueError for a problem."""
    question = json.loads(sys.stdin.read())
    problem = None
    try:
        act(question)
    except ValueError as error:
        problem = " ".join(str(error).split())[:_LETTERS]
    print(json.dumps({"problem": problem}))
