"""The thin trainer on timm: tasks for any loop, and the command `fastkd train`."""


class InputError(ValueError):
    """A setting that cannot work: the message names the option, what it got and what it needs."""


class DivergedError(RuntimeError):
    """A loss that is no longer finite."""
