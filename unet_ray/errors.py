"""How a job ends: its exit codes, and the errors that stand for them."""

from __future__ import annotations

EXIT_FAILED = 1
"""The data or the verification failed."""

EXIT_USAGE = 2
"""The command was told something that it does not take."""

EXIT_TRY_AGAIN = 75
"""The same command may finish when it is tried again (EX_TEMPFAIL of sysexits.h)."""


class JobFailed(RuntimeError):
    """The job ran and its result cannot stand: data or verification failed."""


class TryAgain(RuntimeError):
    """What the job runs on is not there, and may be when the same command is tried again."""


class UnusableNetwork(ValueError):
    """A network cannot be built, or is not the one that a checkpoint is of; trying again changes nothing."""


def require(holds: bool, message: str) -> None:
    """Raises ValueError with the message where something does not hold that the user can mend."""
    if not holds:
        raise ValueError(message)
