"""The rule by which results are judged catches the faults it is made for and lets honest rounding pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd.testing import accumulator_eps, assert_matches_oracle

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
K = 384  # terms of each sum


def product(dtype: torch.dtype, rows: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Operands (rows, K), (K, 50) of a matrix product whose rows differ in size by 1e4, what eager makes of them in
    float32 or better, and the oracle."""
    a, b = torch.randn(rows, K) * torch.logspace(-2, 2, rows)[:, None], torch.randn(K, 50)
    a, b = a.to(dtype), b.to(dtype)
    acc = torch.promote_types(dtype, torch.float32)
    return a, b, (a.to(acc) @ b.to(acc)).to(dtype), a.double() @ b.double()


def honest(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in another order and in pieces, in the accumulation dtype, rounded once."""
    acc = torch.promote_types(dtype, torch.float32)
    order = torch.randperm(K)
    parts = [a[:, i].to(acc) @ b[i].to(acc) for i in order.split(50)]
    return torch.stack(parts).sum(0).to(dtype)


def judge(actual: Tensor, eager: Tensor, oracle: Tensor) -> None:
    assert_matches_oracle(actual, eager, oracle, K, "product")


@each_dtype
def test_honest_rounding_passes(dtype: torch.dtype) -> None:
    for _ in range(20):
        a, b, eager, oracle = product(dtype)
        judge(honest(a, b, dtype), eager, oracle)
        judge(eager, eager, oracle)
        row = honest(a, b, dtype)[0, 0]
        judge(row, eager[0, 0], oracle[0, 0])


def zeroed(*where: slice) -> Callable[[Tensor], Tensor]:
    def fault(x: Tensor) -> Tensor:
        x = x.clone()
        x[where] = 0
        return x

    return fault


def one_element(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, x[0].abs().argmax()] *= 1.05
    return x


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a bias of 0.5%": lambda x: x * 1.005,
    "a zeroed tail tile": zeroed(slice(64, None), slice(48, None)),
    "a zeroed row": zeroed(slice(33, 34)),
    "the smallest row zeroed": zeroed(slice(0, 1)),
    "the smallest row of another": lambda x: torch.cat([x[1:2], x[1:]]),
    "the largest element of the smallest row": one_element,
    "a sign": lambda x: -x,
    "a NaN": lambda x: torch.where(x == x.max(), torch.nan, x),
    "an infinity": lambda x: torch.where(x == x.max(), torch.inf, x),
    "another shape": lambda x: x[:-1],
    "another dtype": lambda x: x.to(torch.float32 if x.dtype == torch.float64 else torch.float64),
}


@each_dtype
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, dtype: torch.dtype) -> None:
    a, b, eager, oracle = product(dtype)
    with pytest.raises(AssertionError, match=r"^product: "):
        judge(FAULTS[fault](honest(a, b, dtype)), eager, oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_in_16_bits_are_caught(dtype: torch.dtype) -> None:
    a, b, eager, oracle = product(dtype)
    total = torch.zeros_like(eager)
    for k in range(0, K, 16):  # pieces as of a matrix unit, their total in the dtype of the inputs
        total = (total.float() + a[:, k : k + 16].float() @ b[k : k + 16].float()).to(dtype)
    with pytest.raises(AssertionError, match=r"^product: L2 error|^product: max error"):
        judge(total, eager, oracle)


@pytest.mark.parametrize("error", [1e-4, -1e-4])
def test_an_error_of_a_loss_is_caught(error: float) -> None:
    x = torch.randn(1000)
    oracle = x.double().square().mean()
    eager = x.square().mean()
    assert_matches_oracle(eager, eager, oracle, 1000, "loss")
    with pytest.raises(AssertionError, match="loss: max error"):
        assert_matches_oracle(eager * (1 + error), eager, oracle, 1000, "loss")


def test_a_small_bias_of_16_bits_is_caught_though_every_element_may_be_rounded() -> None:
    """Half of a rounding step, in one direction everywhere: each element alone could be honest."""
    _, _, eager, oracle = product(torch.bfloat16)
    biased = (oracle * (1 + torch.finfo(torch.bfloat16).eps)).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="L2 error"):
        judge(biased, eager, oracle)


def test_the_error_of_an_operation_is_twice_as_large_on_a_gpu() -> None:
    with FakeTensorMode():
        for dtype, device, bits in (
            (torch.float32, "cpu", 23), (torch.float32, "cuda", 22), (torch.bfloat16, "cuda", 22),
            (torch.float64, "cuda", 52),
        ):  # fmt: skip
            assert accumulator_eps(torch.empty(1, dtype=dtype, device=device)) == 2.0**-bits


def test_rows_of_zeros_must_be_zeros() -> None:
    oracle = torch.zeros(3, 4, dtype=torch.float64)
    zeros = torch.zeros(3, 4)
    assert_matches_oracle(zeros, zeros, oracle, 10, "zeros")
    with pytest.raises(AssertionError, match="zeros: max error"):
        assert_matches_oracle(zeros + 1e-30, zeros, oracle, 10, "zeros")
