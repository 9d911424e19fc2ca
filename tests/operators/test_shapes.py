"""One compilation for all batch sizes: torch.compile(fullgraph=True, dynamic=True) makes two graphs at most.

The first call sees B = 1, which PyTorch specialises; all others share the second graph.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.testing import DEVICE, backends, loss_and_gradients, relative_difference
from tests._support.cases import CASES

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 33)
C, N, H, D = 5, 6, 2, 8


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def labels(B: int) -> Tensor:
    return torch.arange(B, device=DEVICE) % 2


RUNNING = randn(C), randn(C).abs() + 0.5
Sized = Callable[[int], tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]]]


def tokens(**options: object) -> Sized:
    return lambda B: (lambda s, t: fastkd.relation_loss(s, t, **options), [randn(B, N, D)], [randn(B, N, 2 * D)])


def attention(**options: object) -> Sized:
    def sized(B: int) -> tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]]:
        def loss(q: Tensor, k: Tensor, bias: Tensor, q_t: Tensor, k_t: Tensor, mask: Tensor) -> Tensor:
            return fastkd.attention_loss(q, k, q_t, k_t, bias_student=bias, key_mask=mask, **options).sum()

        mask = torch.ones(B, N, dtype=torch.bool, device=DEVICE)
        heads = [randn(B, H, N, D) for _ in range(4)]
        return loss, [*heads[:2], randn(1, H, N, N)], [*heads[2:], mask]

    return sized


def moments(dims: str) -> Sized:
    return lambda B: (
        lambda x: torch.stack([m.sum() for m in fastkd.batch_moments(x, dims=dims)]).sum(),
        [randn(B, C, 3, 3)],
        [],
    )


def statistics(distance: str) -> Sized:
    def loss(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return fastkd.bn_stat_loss([x, x * 2], [mean, mean], [var, var], distance=distance)

    return lambda B: (loss, [randn(B, C, 3, 3)], RUNNING)


def logits(function: Callable[..., Tensor], *, with_labels: bool = False, **options: object) -> Sized:
    def loss(s: Tensor, t: Tensor, *label: Tensor) -> Tensor:
        return function(s, t, *label, **options)

    return lambda B: (loss, [randn(B, 7)], [randn(B, 7), *([labels(B)] if with_labels else [])])


INDEX = torch.tensor([0, 5, 2], device=DEVICE)
SIZED: dict[str, Sized] = {
    "relation_loss-intra": tokens(),
    "relation_loss-inter": tokens(scope="inter"),
    "relation_loss-batch": tokens(scope="batch", algorithm="tile"),
    "relation_loss-gram": tokens(scope="batch", algorithm="gram"),
    "relation_loss-index": tokens(scope="batch", index=INDEX),
    "manifold_loss": lambda B: (
        lambda s, t: fastkd.manifold_loss(s, t, index=INDEX), [randn(B, N, D)], [randn(B, N, 2 * D)]
    ),
    "manifold_loss-drawn": lambda B: (
        lambda s, t: fastkd.manifold_loss(s, t, num_samples=4) * 0 + s.sum(), [randn(B, N, D)], [randn(B, N, 2 * D)]
    ),
    "manifold_loss-terms": lambda B: (
        lambda s, t: sum(fastkd.manifold_loss(s, t, index=INDEX, return_terms=True)[1]),
        [randn(B, N, D)], [randn(B, N, 2 * D)]
    ),
    "attention_loss": attention(),
    "attention_loss-mean-none": attention(heads="mean", reduction="none"),
    "attention_loss-js-slice": attention(divergence="js", query_slice=slice(0, 1)),
    "qkv_relation_loss": lambda B: (
        lambda q, k, v, *t: fastkd.qkv_relation_loss((q, k, v), t, relation_heads=2),
        [randn(B, N, D) for _ in range(3)], [randn(B, N, D) for _ in range(3)],
    ),
    "batch_moments": moments("batch"),
    "batch_moments-image": moments("image"),
    "batch_norm_moments": lambda B: (
        lambda x, *running: torch.stack([y.sum() for y in fastkd.batch_norm_moments(x, *running)]).sum(),
        [randn(B, C, 3, 3)], RUNNING,
    ),
    "bn_stat_loss": statistics("l2"),
    "bn_stat_loss-mse": statistics("mse"),
    "bn_stat_loss-image": statistics("image"),
    "total_variation": lambda B: (lambda x: fastkd.total_variation(x, p=2), [randn(B, 3, 8, 9)], []),
    "image_prior": lambda B: (lambda x: fastkd.image_prior(x, tv_l1=0.5, tv_l2=0.1, l2=0.2), [randn(B, 3, 8, 9)], []),
    "competition_loss": logits(fastkd.competition_loss),
    "intra_divergence_loss": lambda B: (
        lambda f, y: fastkd.intra_divergence_loss(f, y, spread_margin=2.0, boundary_margin=0.5),
        [randn(B, D)], [labels(B)],
    ),
    "soft_target_loss": logits(fastkd.soft_target_loss, temperature=4.0),
    "dkd_loss": logits(fastkd.dkd_loss, with_labels=True, alpha=1.0, beta=4.0, temperature=2.0),
    "nkd_loss": logits(fastkd.nkd_loss, with_labels=True, gamma=1.5, temperature=2.0),
}  # fmt: skip


# Their sizes enter the graph as those of another call of the same operator do.
ALIKE = (
    "relation_loss-batch", "relation_loss-index", "manifold_loss", "attention_loss", "batch_moments-image",
    "bn_stat_loss", "bn_stat_loss-mse", "total_variation",
)  # fmt: skip


def test_every_function_is_compiled_here() -> None:
    assert {name.split("-")[0] for name in SIZED} == {case.function for case in CASES}
    assert set(ALIKE) < set(SIZED)


def check_graphs(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = None
    for B in SIZES:
        loss, leaves, constants = SIZED[name](B)
        if compiled is None:
            compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        actual = loss_and_gradients(lambda *x, f=compiled, c=constants: f(*x, *c), leaves)
        expected = loss_and_gradients(lambda *x, f=loss, c=constants: f(*x, *c), leaves)
        for a, e in zip(actual, expected, strict=True):
            assert relative_difference(a, e) < 1e-5, f"B = {B}"  # the compiler may sum in another order
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, f"{graphs} graphs over {len(SIZES)} batch sizes"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in ALIKE else []) for name in SIZED]
)
def test_two_graphs_serve_all_batch_sizes(name: str) -> None:
    check_graphs(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("backend", backends("relation_fwd"))
def test_two_graphs_serve_all_batch_sizes_on_every_backend(name: str, backend: str) -> None:
    if name.startswith("intra_divergence_loss") and backend != "eager":
        backend = "auto"  # it has no kernel
    with fastkd.backend(backend):
        check_graphs(name)
