"""`python -m tests._support.wheel` holds every native operator of the installed package to the float64 oracle."""

import sys

import torch

import fastkd
from fastkd import _extension
from fastkd.testing import assert_matches_oracle
from tests._support.calls import CALLS, runs


def main() -> None:
    if not _extension.HAS_NATIVE:
        sys.exit(_extension.WHY_NOT)
    calls = [call for call, backend in runs() if backend == "native"]
    for call in calls:
        results = []
        for backend, dtype in (("native", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
            with fastkd.backend(backend):
                # Joined, so that what is 0 in exact arithmetic is measured by what is not.
                results.append(torch.cat([x.flatten() for x in call.to(dtype).loss_and_gradients()]))
        assert_matches_oracle(*results, max(x.numel() for _, x in call.leaves()), str(call))
    assert {call.op for call in calls} == {call.op for call in CALLS} - {None}
    print(f"torch {torch.__version__}: {len(calls)} calls of {fastkd.__file__} match", _extension.WHY_NOT_RECORDER)


if __name__ == "__main__":
    main()
