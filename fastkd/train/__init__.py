"""The thin trainer on timm: tasks for any loop, and the command `fastkd train`."""


class RunError(Exception):
    """What ends a run in one line. Where all processes raise it at once, one of them tells it."""

    teller: int | None = None  # its rank; None: each for itself
    code = 1  # for the shell


class InputError(RunError, ValueError):
    """A setting that cannot work: the message names the option, what it got and what it needs."""

    code = 2


class DivergedError(RunError, RuntimeError):
    """A loss that is no longer finite."""

    teller = 0


class DataError(RunError, RuntimeError):
    """Images or files that fail while the run goes on."""


class InterruptedRun(RunError):  # noqa: N818  nothing went wrong
    """A run that was asked to stop, and has written where it is."""

    teller = 0

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
