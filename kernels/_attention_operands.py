"""A network's tensors as arguments of the attention kernels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_scores import CENTRE_BLOCK, _attention_centre_kernel
from ._common import cdiv


def broadcast(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    if x is None:
        return (0,) * ndim
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape[:ndim], x.stride()[:ndim], strict=True))


def strided(x: Tensor | None, ndim: int) -> tuple[Any, ...] | None:
    """A tensor and its strides as one argument."""
    return None if x is None else (x, *broadcast(x, ndim))


def width_of(d: int) -> int:
    return max(1 << (d - 1).bit_length(), 16)  # triton.next_power_of_2 takes microseconds


class Operands(NamedTuple):
    """A network in a launch: one argument, because each takes a microsecond. It holds no tuples, of which Triton 3.6
    loses the strides of 1 in loops."""

    q: Tensor  # (B, H, N_q, d)
    q_stride_b: int
    q_stride_h: int
    q_stride_n: int
    q_stride_d: int
    k: Tensor  # (B, H, N_k, d)
    k_stride_b: int
    k_stride_h: int
    k_stride_n: int
    k_stride_d: int
    mean: Tensor | None  # (B, H, d), of keys that are centred
    D: int


class Biased(NamedTuple):
    """A network with a bias: what Operands holds, and more."""

    q: Tensor
    q_stride_b: int
    q_stride_h: int
    q_stride_n: int
    q_stride_d: int
    k: Tensor
    k_stride_b: int
    k_stride_h: int
    k_stride_n: int
    k_stride_d: int
    mean: Tensor | None
    D: int
    bias: Tensor  # (B | 1, H | 1, N_q | 1, N_k | 1)
    bias_stride_b: int
    bias_stride_h: int
    bias_stride_q: int
    bias_stride_k: int
    top: Tensor | None  # (B | 1, H | 1, N_q | 1), maxima of the bias' rows under a softmax
    top_stride_b: int
    top_stride_h: int
    top_stride_q: int


class Network:
    """Arguments of one network in a launch."""

    def __init__(self, q: Tensor, k: Tensor, bias: Tensor | None, scale: float, has_softmax: bool) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.bias = None if has_softmax and bias is not None and bias.shape[3] == 1 else bias  # the same for all keys
        self.top = None if self.bias is None or not has_softmax else self.bias.amax(-1)
        self.has_softmax, self.is_centred = has_softmax, False
        self.mean: Tensor | None = None

    def widen(self) -> None:
        """Convert to float32 like the other network: 16-bit beside float32 saves little and spills registers."""
        q = self.q.float()
        self.q, self.k = q, q if self.k is self.q else self.k.float()

    def centre(self, mask: Tensor | None) -> None:
        self.is_centred = self.has_softmax and self.k.dtype == torch.float32
        if not self.is_centred:
            return
        B, H, N_k, D = self.k.shape
        self.mean = self.k.new_empty((B, H, D), dtype=torch.float32)
        BLOCK_D = min(width_of(D), 64)
        _attention_centre_kernel[(B * H, cdiv(D, BLOCK_D))](
            self.k, strided(mask, 2), self.mean, self.k.stride(), H, N_k, D,
            HAS_MASK=mask is not None, BLOCK_N=CENTRE_BLOCK, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    def operands(self) -> Operands | Biased:
        plain = (self.q, *self.q.stride(), self.k, *self.k.stride(), self.mean, self.q.shape[3])
        if self.bias is None:
            return Operands._make(plain)
        return Biased._make((*plain, self.bias, *broadcast(self.bias, 4), self.top, *broadcast(self.top, 3)))
