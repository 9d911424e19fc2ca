"""The base of modules that hold the options of a loss function."""

from typing import Any, ClassVar

from torch import nn


class FixedLoss(nn.Module):
    """A loss function with its options fixed: each option is an attribute, and `repr` shows those in `shown`."""

    shown: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the function."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)
