"""The thin trainer on timm: tasks for any loop, and the command `fastkd train`."""


class InputError(ValueError):
    """A setting that cannot work: the message names the option, what it got and what it needs."""


class DivergedError(RuntimeError):
    """A loss that is no longer finite."""


class DataError(RuntimeError):
    """Images or files that fail while the run goes on."""


class InterruptedRun(Exception):  # noqa: N818  nothing went wrong
    """A run that was asked to stop, and has written where it is."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
