"""Gradients and the outputs of batch norms lie in memory kept for the next one, and are tensors like any other."""

import copy
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.testing import DEVICE, backends, thresholds

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu" or "native" not in backends("moments_fwd") or not sys.platform.startswith("linux"),
    reason="needs the compiled extension on a Linux CPU",
)

HUGE = 2**21  # bytes of a huge page, on which blocks start and PyTorch's own memory never does


def gradient(value: float = 1.0, elements: int = 700_000, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of the mean, times a value: as many equal elements."""
    x = torch.zeros(1, 1, elements, dtype=dtype, requires_grad=True)
    mean, _ = fastkd.batch_moments(x, backend="native")
    (dx,) = torch.autograd.grad(mean, x, torch.full_like(mean, value * elements))
    return dx


def test_a_freed_block_serves_the_next_gradient() -> None:
    first, second = gradient(1.0), gradient(2.0)
    addresses = first.data_ptr(), second.data_ptr()
    assert (first == 1).all()
    assert (second == 2).all()
    assert all(address % HUGE == 0 for address in addresses)
    del second
    third = gradient(3.0)
    assert third.data_ptr() == addresses[1]
    assert (first == 1).all()
    assert (third == 3).all()


def test_the_output_of_a_batch_norm_lies_there_too() -> None:
    def output(value: float) -> Tensor:
        x, zeros, ones = torch.full((2, 4, 300, 300), value), torch.zeros(4), torch.ones(4)
        return fastkd.batch_norm_moments(x, zeros, ones, eps=1e-30, backend="native")[0]

    first = output(1.0)
    address = first.data_ptr()
    assert address % HUGE == 0
    assert (first == 1).all()
    del first
    second = output(2.0)
    assert second.data_ptr() == address
    assert (second == 2).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
def test_a_tensor_like_any_other(dtype: torch.dtype) -> None:
    dx = gradient(3.0, dtype=dtype)
    n = dx.numel()
    assert dx.untyped_storage().nbytes() == n * dtype.itemsize
    file = io.BytesIO()
    torch.save(dx, file)
    file.seek(0)
    for same in (copy.deepcopy(dx), torch.load(file), torch.from_dlpack(gradient(3.0, dtype=dtype))):
        assert torch.equal(same, dx)
    if dtype != torch.bfloat16:
        array = gradient(3.0, dtype=dtype).numpy()  # holds the block
        gradient(5.0, dtype=dtype)
        assert (array == 3).all()
    with pytest.raises(RuntimeError, match="not resizable"):  # as memory of NumPy
        dx.resize_(2 * n)
    assert dx.resize_(n).shape == (n,)
    assert dx.clone().resize_(2 * n).shape == (2 * n,)
    dx.fill_(4)
    dx.share_memory_()
    assert dx.is_shared()
    assert (dx == 4).all()


def test_gradients_of_several_threads() -> None:
    def work(value: int) -> bool:
        held = [gradient(value + k / 4) for k in range(4)]
        return all(bool((dx == value + k / 4).all()) for k, dx in enumerate(held))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(24)))


def test_never_holds_more_than_was_in_use_at_once() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    most = 8_000_000
    gradient(elements=most)
    before = resident()
    for i in range(1, 30):
        gradient(elements=most - 10_000 * i)
    assert resident() - before < 2 * 4 * most


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(last, 16) for first, last in ranges)


def test_blocks_begin_at_the_smallest() -> None:
    with thresholds(blocks_smallest=4 * 50_001):
        for elements, is_block in ((50_000, False), (50_001, True), (50_002, True)):
            gradient(elements=elements)
            dx = gradient(2.0, elements=elements)
            assert (dx.data_ptr() % HUGE == 0) == is_block
            assert (dx == 2).all()


def test_no_more_lies_free_than_is_kept() -> None:
    """Of what was freed, the blocks freed first go."""
    sizes = [400_000, 900_000]  # of 1.6 and 3.6 MB
    for kept, remaining in ((1, [False, False]), (4_000_000, [False, True]), (8_000_000, [True, True])):
        with thresholds(blocks_kept=1):
            gradient()  # nothing lies free
        with thresholds(blocks_kept=kept):
            held = [gradient(elements=n) for n in sizes]
            addresses = [dx.data_ptr() for dx in held]
            while held:
                held.pop(0)
            assert [is_mapped(address) for address in addresses] == remaining
            assert (gradient(3.0, elements=sizes[1]) == 3).all()


@pytest.mark.parametrize("ready", [1, 3_000_000, 1 << 30])
def test_pages_offered_to_the_kernel_come_back_as_memory(ready: int) -> None:
    with thresholds(blocks_ready=ready):
        for value in range(1, 4):
            first, second = gradient(float(value)), gradient(value + 0.5)
            assert (first == value).all()
            assert (second == value + 0.5).all()


def test_a_block_serves_no_tensor_of_less_than_half_its_size() -> None:
    with thresholds(blocks_kept=1):
        gradient()
    large = gradient(elements=1_000_000).data_ptr()
    assert gradient(elements=300_000).data_ptr() != large
    assert gradient(elements=700_000).data_ptr() == large


def test_keeps_a_block_of_each_size_though_one_is_in_use_at_a_time() -> None:
    sizes = [100_000, 300_000, 1_000_000, 3_000_000]  # none fits another
    first, second = ([gradient(elements=n).data_ptr() for n in sizes] for _ in range(2))
    assert first == second
    assert all(address % HUGE == 0 for address in first)
    assert len(set(first)) == len(sizes)


PROGRAM = """
import os, resource, sys, torch, fastkd
from tests.operators.test_blocks import gradient, HUGE

print(gradient(2.0).data_ptr() % HUGE == 0)

if (child := os.fork()) == 0:  # with a block lying free, and the parent's threads gone
    torch.set_num_threads(1)
    os._exit(0 if all((gradient(float(k)) == k).all() for k in range(3)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

mean = torch.zeros(1)
x = torch.zeros(1, 1, 100_000_000)
vm = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (vm + 2**27, resource.RLIM_INFINITY))
try:
    torch.ops.fastkd.moments_bwd.default(mean, mean, [x], mean, False)
except RuntimeError as error:
    print("allocate" in str(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(bool((torch.ops.fastkd.moments_bwd.default(mean + 1e8, mean, [x], mean, False)[0] == 1).all()))
"""


@pytest.mark.parametrize("kept", [True, False])
def test_in_another_process(kept: bool) -> None:
    """FASTKD_KEEP_BLOCKS, a fork, and more memory than there is."""
    environment = os.environ | {"FASTKD_KEEP_BLOCKS": str(int(kept))}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout.split() == [str(kept), "0", "True", "True"], run.stderr
