"""One call of every public function: what the contract tests are made from, and what notes the operators it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.testing import DEVICE


class OperatorCalls(TorchDispatchMode):
    """Notes the calls of fastkd's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastkd":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """`call(*inputs)` gives a tensor, or several, differentiable in every input of `inputs(dtype)`."""

    function: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    option: str = ""

    def __str__(self) -> str:
        return f"{self.function}-{self.option}" if self.option else self.function

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        torch.manual_seed(1)
        return [(torch.randn(shape, device=DEVICE) + 0.2).to(dtype) for shape in self.shapes]

    def scalar(self, *inputs: Tensor) -> Tensor:
        """The call's result as one number: what is not a scalar is weighed element by element."""
        result = self.call(*inputs)
        results = result if isinstance(result, tuple) else (result,)
        return torch.stack(
            [(x * torch.linspace(0.5, 1.5, x.numel(), device=DEVICE).view_as(x)).sum() for x in results]
        ).sum()


def constant(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


TOKENS, Q, K = (3, 9, 16), (2, 3, 9, 8), (2, 3, 11, 8)
TEACHER, INDEX = constant(3, 9, 24), torch.arange(12, device=DEVICE) * 2
ATTENTION_TEACHER = constant(2, 3, 9, 4), constant(2, 3, 11, 4)
LABELS = torch.tensor([0, 1, 0, 1, 2, 2], device=DEVICE)
LOGITS, LOGITS_TEACHER = (6, 7), constant(6, 7)
KEY_MASK = torch.arange(11, device=DEVICE).expand(2, 11) < torch.tensor([[7], [11]], device=DEVICE)
RUNNING = constant(5), constant(5).abs() + 0.5
STATISTICS = [constant(5), constant(6)], [constant(5).abs(), constant(6).abs()]
QKV, QKV_TEACHER = (2, 9, 24), tuple(constant(2, 9, 48, seed=seed) for seed in range(3))


def _normalised(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """y in small units: a scaled gradient of 65536 would not fit into a float16 output."""
    y, mean, var = fastkd.batch_norm_moments(x, *RUNNING, weight, bias)
    return y.to(mean.dtype) * 0.01, mean, var


CASES = [
    *(
        Case("relation_loss", (TOKENS,), lambda s, o=o: fastkd.relation_loss(s, TEACHER, **o), "-".join(o.values()))
        for o in (
            {"scope": "intra"},
            {"scope": "inter", "rectify": "both", "algorithm": "tile"},
            {"scope": "batch", "algorithm": "gram"},
        )
    ),
    Case("relation_loss", (TOKENS,), lambda s: fastkd.relation_loss(s, TEACHER, scope="batch", index=INDEX), "index"),
    Case("manifold_loss", (TOKENS,), lambda s: fastkd.manifold_loss(s, TEACHER, index=INDEX)),
    *(
        Case(
            "attention_loss", (Q, K), lambda q, k, d=d: fastkd.attention_loss(q, k, *ATTENTION_TEACHER, divergence=d), d
        )
        for d in ("kl", "reverse_kl", "js", "ce", "mse", "score_mse")
    ),
    Case(
        "attention_loss",
        (Q, K, (1, 3, 9, 11)),
        lambda q, k, b: fastkd.attention_loss(
            q, k, *ATTENTION_TEACHER, bias_student=b, key_mask=KEY_MASK, heads="mean", reduction="none"
        ),
        "bias-mask-mean-none",
    ),
    Case(
        "qkv_relation_loss",
        (QKV, QKV, QKV),
        lambda q, k, v: fastkd.qkv_relation_loss((q, k, v), QKV_TEACHER, relation_heads=4),
    ),
    Case("batch_moments", ((4, 5, 3, 3),), fastkd.batch_moments),
    Case("batch_moments", ((4, 5, 3, 3),), lambda x: fastkd.batch_moments(x, dims="image"), "image"),
    Case("batch_norm_moments", ((4, 5, 3, 3), (5,), (5,)), lambda *x: _normalised(*x)),
    *(
        Case(
            "bn_stat_loss",
            ((4, 5, 3, 3), (4, 6, 2, 2)),
            lambda *x, d=d: fastkd.bn_stat_loss(x, *STATISTICS, distance=d),
            d,
        )
        for d in ("l2", "mse", "image")
    ),
    Case("total_variation", ((2, 3, 8, 9),), lambda x: fastkd.total_variation(x, p=1), "l1"),
    Case("total_variation", ((2, 3, 8, 9),), lambda x: fastkd.total_variation(x, p=2), "l2"),
    Case("image_prior", ((2, 3, 8, 9),), lambda x: fastkd.image_prior(x, tv_l1=0.5, tv_l2=0.1, l2=0.2)),
    Case("competition_loss", (LOGITS, LOGITS), lambda s, t: fastkd.competition_loss(s, t)),
    Case(
        "intra_divergence_loss",
        ((6, 16),),
        lambda f: fastkd.intra_divergence_loss(f, LABELS, spread_margin=2.0, boundary_margin=0.5),
    ),
    Case("soft_target_loss", (LOGITS,), lambda s: fastkd.soft_target_loss(s, LOGITS_TEACHER, temperature=4.0)),
    Case(
        "dkd_loss",
        (LOGITS,),
        lambda s: fastkd.dkd_loss(s, LOGITS_TEACHER, LABELS, alpha=1.0, beta=4.0, temperature=2.0),
    ),
    Case("nkd_loss", (LOGITS,), lambda s: fastkd.nkd_loss(s, LOGITS_TEACHER, LABELS, gamma=1.5, temperature=2.0)),
]
