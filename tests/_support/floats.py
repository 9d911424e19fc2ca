"""The dtypes of tests that run on every backend."""

import pytest
import torch

from fastkd.ops._dispatch import INTERPRETED

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
if INTERPRETED:
    FLOATS = FLOATS[1:]  # no kernel there takes float64
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
