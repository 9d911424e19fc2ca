"""The thin trainer on timm: tasks for any loop, and the command `fastkd train`."""

import os
import sys


class RunError(Exception):
    """An error that ends a run with a one-line message. If all processes raise it together, one of them prints it."""

    teller: int | None = None  # rank of the process that prints it; None: every process
    code = 1  # exit status


class InputError(RunError, ValueError):
    """A setting that cannot work. The message gives the option, the value it got and the values it accepts."""

    code = 2


class DivergedError(RunError, RuntimeError):
    """The loss is no longer finite."""

    teller = 0


class DataError(RunError, RuntimeError):
    """An image cannot be read or a file cannot be written during the run."""


class InterruptedRun(RunError):  # noqa: N818  this is not an error
    """The run was asked to stop and has written a checkpoint."""

    teller = 0

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def tell(text: str) -> None:
    """Print a line to stderr, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
