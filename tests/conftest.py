"""Marks every test that runs a Triton kernel: `make test` runs those in a process of their own, interpreted."""

import os

import pytest
import torch

from fastkd.ops import _dispatch


def pytest_configure(config: pytest.Config) -> None:
    if os.getenv("TRITON_INTERPRET") == "1" and not _dispatch.HAS_TRITON:
        raise pytest.UsageError("TRITON_INTERPRET=1 needs triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "triton" in getattr(getattr(item, "callspec", None), "params", {}).values():
            item.add_marker("triton")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
