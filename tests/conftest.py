"""What tests of several files start from. Marks every test that runs a Triton kernel: `make test` runs those in a
process of their own, interpreted.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastkd.ops import _dispatch
from fastkd.testing import poisoned_allocations

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if os.getenv("TRITON_INTERPRET") != "1":
        return
    if not _dispatch.HAS_TRITON:
        raise pytest.UsageError("TRITON_INTERPRET=1 needs triton")
    from tests._support import interpreter

    interpreter.install()


# What launches no kernel of its own is not even imported by the process that interprets kernels.
UNINTERPRETED = ["train", "capture"]
if os.getenv("TRITON_INTERPRET") == "1":
    collect_ignore = UNINTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "triton" in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker("triton")
        if item.get_closest_marker("triton") is not None and item.path.relative_to(HERE).parts[0] in UNINTERPRETED:
            raise pytest.UsageError(f"{item.nodeid} runs a Triton kernel, and is in a folder that is not interpreted")
    # First, so that no worker starts with one of them when the others have finished.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    if _dispatch.INTERPRETED:
        from tests._support import interpreter

        interpreter.seed(0)


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """No launch is planned by a threshold or tile that an earlier test has lowered."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastkd_kernels."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What interpreted kernels and what lies around them leave unwritten is NaN."""
    with poisoned_allocations() if _dispatch.INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits as 32 px PNGs, 16 of each, in a folder per class."""
    from fastkd.train.data import Digits  # needs timm, as all that use it

    root, counts = tmp_path_factory.mktemp("images"), [0, 0, 0]
    for image, target in Digits(train=True):
        if target < 3 and counts[target] < 16:
            path = root / f"class{target}" / f"{counts[target]}.png"
            path.parent.mkdir(exist_ok=True)
            image.resize((32, 32)).save(path)
            counts[target] += 1
    return root
