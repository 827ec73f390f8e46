"""Gates before functions of this package, in processes that a test starts; it opens them when it has seen enough.

So a test holds on a machine of any speed: what it kills has not finished, and what it waits for is not over.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

STAGES = "unet_ray.labelling.stages"
CHECKPOINTS = "unet_ray.training.checkpoints"

_SITE = """
import functools, importlib.util, itertools, json, os, sys, time
folder = os.path.dirname(__file__)

def passes(name):
    if os.path.exists(os.path.join(folder, name)):
        return True
    for call in itertools.count():
        try:
            os.unlink(os.path.join(folder, f"{name}-{call}"))
            return True
        except FileNotFoundError:
            if call >= 64:
                return False

def gated(act, name, most_s):
    @functools.wraps(act)
    def act_late(*arguments, **more):
        end_s = time.monotonic() + most_s
        while time.monotonic() < end_s and not passes(name):
            time.sleep(0.05)
        return act(*arguments, **more)
    return act_late

class Gated:
    def find_spec(self, name, path=None, target=None):
        if name not in MOST_S and name not in ANSWERS:
            return None
        gates, answers = MOST_S.pop(name, {}), ANSWERS.pop(name, {})
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def run_and_patch(module):
            run(module)
            for function, most_s in gates.items():
                setattr(module, function, gated(getattr(module, function), function, most_s))
            for function, answer in answers.items():
                if callable(getattr(module, function)):
                    setattr(module, function, lambda *_, answer=answer: answer)
        spec.loader.exec_module = run_and_patch
        return spec

sys.meta_path.insert(0, Gated())
"""


class Gates:
    """Gates before some functions of some modules, in every Python process with these settings."""

    def __init__(
        self,
        folder: Path,
        most_s: Mapping[str, Mapping[str, float]],
        answers: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        """All are shut.

        Args:
            folder: an empty one.
            most_s: by module and function, the seconds after which a call is let through anyway.
            answers: by module and function, what it says of this machine, where there is no such device to ask.
        """
        self._folder = folder
        plain = {module: dict(functions) for module, functions in most_s.items()}
        given = {module: dict(functions) for module, functions in (answers or {}).items()}
        (folder / "sitecustomize.py").write_text(
            f"inf = float('inf')\nMOST_S = {plain!r}\nANSWERS = {given!r}\n{_SITE}"
        )

    @property
    def settings(self) -> dict[str, str]:
        """Returns the environment variables that the processes need."""
        path = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(self._folder), *([path] if path else [])])}

    def open(self, function: str) -> None:
        """Lets every call through from now on."""
        (self._folder / function).touch()

    def open_for(self, function: str, calls: int) -> None:
        """Lets so many calls through, at most 64, in whatever process; those let through before must have been made."""
        for call in range(calls):
            (self._folder / f"{function}-{call}").touch()
