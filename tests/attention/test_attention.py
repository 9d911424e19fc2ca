"""attention_loss, qkv_relation_loss and the modules and signatures made of them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import compat, losses, reference
from fastkd.eager import _common
from fastkd.ops import attention as ops
from fastkd.ops._dispatch import INTERPRETED
from fastkd.ops.attention import pick_algorithm
from fastkd.testing import (
    DEVICE,
    assert_matches_oracle,
    backends,
    loss_and_gradients,
    peak_extra_memory,
    poisoned_allocations,
    relative_difference,
    strided,
    thresholds,
)
from tests._support import golden
from tests._support.pairs import in_pairs, pairs
from tests._support.splits import around, on_every_number_of_threads, threads

BACKENDS = backends("attention_fwd")
SOFTMAX = ["kl", "reverse_kl", "js", "ce", "mse"]
DIVERGENCES = [*SOFTMAX, "score_mse"]
WITH_HEADS = [(d, "match") for d in DIVERGENCES] + [(d, "mean") for d in SOFTMAX]
# (B, H, N_q, N_k, d_s, d_t): degenerate; below any tile; one past a tile of 64, cross-attention; ViT with class token.
SHAPES = [(1, 1, 1, 1, 8, 8), (2, 3, 7, 7, 8, 24), (1, 2, 65, 130, 24, 8), (1, 2, 197, 197, 64, 24)]
if INTERPRETED:  # a program takes milliseconds there
    SHAPES = [*SHAPES[:2], (1, 1, 65, 70, 24, 8)]
MANY, HEADS = (67, 1) if INTERPRETED else (197, 3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")

Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def operands(
    B: int, H: int, N_q: int, N_k: int, d_s: int, d_t: int, dtype: torch.dtype = torch.float32, gain: float = 1.5
) -> Operands:
    """(q, k) of a student and a teacher; scores of unit variance times gain²."""
    return tuple(  # type: ignore[return-value]
        (gain * torch.randn(B, H, N, d, device=DEVICE)).to(dtype) for d in (d_s, d_t) for N in (N_q, N_k)
    )


def half_of(*shape: int) -> Tensor:
    """A mask with about a third False, the first column True."""
    mask = torch.rand(shape, device=DEVICE) > 0.3
    mask[:, 0] = True
    return mask


def once(run: Callable[[], tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    with poisoned_allocations():
        yield run()


def check(
    x: Operands,
    bias: Tensor | None = None,
    *,
    backend: str = "eager",
    incoming: float = 1.0,
    is_shared: bool = False,
    repeats: Callable[..., Iterator[tuple[Tensor, ...]]] = once,
    **options,
) -> None:
    """Hold fastkd.attention_loss to the oracle rule: loss, and the gradients of q, k and a student's bias. is_shared:
    one tensor is both q and k. repeats: yields what the call returns, however often it makes it."""
    q, k, *teacher = x
    inputs = {"dq": q} | ({} if is_shared else {"dk": k}) | ({} if bias is None else {"dbias": bias})

    def run(function, dtype: torch.dtype | None, **more) -> tuple[Tensor, ...]:
        def cast(v):
            return v.to(dtype) if dtype and isinstance(v, Tensor) and v.is_floating_point() else v

        others, fixed = [cast(t) for t in teacher], {name: cast(v) for name, v in (options | more).items()}

        def loss(*given: Tensor) -> Tensor:
            named = dict(zip(inputs, given, strict=True))
            q = named["dq"]
            bias = {"bias_student": named["dbias"]} if "dbias" in named else {}
            return function(q, named.get("dk", q), *others, **bias, **fixed)

        return loss_and_gradients(loss, [cast(v) for v in inputs.values()], incoming)

    oracle, eager = run(reference.attention_loss, torch.float64), run(reference.attention_loss, q.dtype)
    for actual in repeats(partial(run, fastkd.attention_loss, None, backend=backend)):
        for name, a, e, o in zip(("loss", *inputs), actual, eager, oracle, strict=True):
            if q.dtype == torch.float64:  # eager is the oracle itself
                assert relative_difference(a, o) < 1e-11, name
                continue
            assert_matches_oracle(a, e.to(a.dtype), o, k.shape[2] * q.shape[3], name)


@pytest.fixture
def _strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "CHUNK", 30000)  # several strips and a tail at these sizes


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs({"dtype": DTYPES, "shape": SHAPES, "divergence": DIVERGENCES})
def test_matches_oracle(backend: str, dtype: torch.dtype, shape: tuple[int, ...], divergence: str) -> None:
    check(operands(*shape, dtype), divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs({"dtype": DTYPES, "widths": [(13, 80), (8, 256)], "divergence": ["kl", "score_mse"]})
def test_widths(backend: str, dtype: torch.dtype, widths: tuple[int, int], divergence: str) -> None:
    check(operands(2, 1, 35, 51, *widths, dtype), divergence=divergence, backend=backend)


@pytest.mark.parametrize(("divergence", "heads"), WITH_HEADS)
@pytest.mark.parametrize("backend", backends("attention_fwd", torch.float64))
def test_float64(backend: str, divergence: str, heads: str) -> None:
    q, k, tq, tk = (x.double() for x in operands(2, 3, 65, 65, 8, 24))
    bias = torch.randn(3, 65, 65, device=DEVICE).double()

    def run(function, **more) -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda q, k, b: function(
                q, k, tq, tk, bias_student=b, is_causal=True, divergence=divergence, heads=heads, **more
            ),
            [q, k, bias],
        )

    actual, oracle = run(fastkd.attention_loss, backend=backend), run(reference.attention_loss)
    assert all(relative_difference(a, o) < 1e-11 for a, o in zip(actual, oracle, strict=True))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", [{}, {"key_mask": (1, MANY)}, {"is_causal": True}, {"heads": "mean"}], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_few_heads_on_many_threads(backend: str, options: dict, dtype: torch.dtype) -> None:
    """Threads then share a head's rows, and their sums over rows are joined in one order."""
    options = {k: half_of(*v) if k.endswith("mask") else v for k, v in options.items()}
    q, k, tq, tk = operands(1, 1, MANY, MANY, 24, 24, dtype)
    bias = torch.randn(MANY, MANY, device=DEVICE).to(dtype)
    check((q, k, tq, tk), backend=backend, **options)
    check((q, k, tq, tk), bias, backend=backend, **options)

    def run(is_shared: bool) -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda a: fastkd.attention_loss(a, a if is_shared else k, tq, tk, backend=backend, **options), [q]
        )

    for is_shared in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(run(is_shared), run(is_shared), strict=True))


class Split(NamedTuple):
    """A size at which the native kernels split their work, lowered, and shapes of a size around it."""

    lowered: dict[str, int]
    size: int
    shape: Callable[[int], tuple[int, ...]] = lambda n: (2, 3, n, 11, 5, 7)


ROW = 256  # bytes that a row of up to 16 scores takes in float64, and on a matrix unit
SPLITS = {
    "strip_bytes": Split({"strip_bytes": 3 * ROW, "few_rows": 1, "least_rows": 1}, 3),
    "spilled_bytes": Split({"strip_bytes": 1, "spilled_bytes": 3 * ROW, "least_rows": 1}, 3),
    "few_rows": Split({"strip_bytes": 1, "few_rows": 3, "least_rows": 1}, 3),
    "least_rows": Split({"strip_bytes": 1, "few_rows": 1, "least_rows": 3}, 3),
    "most_rows": Split({"most_rows": 3}, 3),
    "fewest_rows": Split({"fewest_rows": 3, "most_rows": 2}, 3, lambda n: (1, 1, n, 11, 5, 7)),
    "fewest_of_some": Split({"fewest_rows": 4}, 4, lambda n: (2, 1, n, 17, 5, 7)),
    "block_rows": Split({"block_rows": 3}, 3),
    "block_bytes": Split({"block_bytes": 3 * 3 * 16 * 8}, 3),
    "prefetched_rows": Split({"prefetched_rows": 3}, 3),
    "keys": Split({"most_rows": 5}, 16, lambda n: (2, 3, 6, n, 5, 7)),
    "depth": Split({"matmul_depth": 4, "most_rows": 5}, 4, lambda n: (2, 3, n, n, 5, 7)),
    "pair_keys": Split({"pair_keys": 16, "most_rows": 5}, 16, lambda n: (2, 3, 6, n, 5, 7)),
}
# Products of float32 and float64: our own kernels', the library's. Of bfloat16: as of a matrix unit, as of pairs.
PRODUCTS = {
    torch.float32: {"own": {"matmul_own_products": 2}, "others": {"matmul_own_products": 3}},
    torch.bfloat16: {"own": {"matmul_bf16_products": 2}, "others": {"matmul_bf16_products": 4}},
}
PRODUCTS[torch.float64] = PRODUCTS[torch.float32]
VARIANTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masks": {"key_mask": True, "query_mask": True},
    "causal_masks": {"is_causal": True, "key_mask": True, "temperature": 0.5},
    "heads": {"heads": "mean", "key_mask": True},
    "shared": {"is_shared": True},
    "shared_masks": {"is_shared": True, "key_mask": True},
    "bias": {"bias": (1, 1, 0, 1)},
    "bias_of_keys": {"bias": (0, 0, 0, 1), "key_mask": True, "temperature": 2.0},
    "bias_of_images": {"bias": (1, 0, 1, 1), "is_causal": True},
    "bias_of_heads": {"bias": (0, 1, 1, 1), "query_mask": True},
    "bias_of_all": {"bias": (0, 0, 1, 1), "heads": "mean", "reduction": "none"},
}


def of_variant(variant: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], dict]:
    """The shape, with as many keys as queries where that must be, and the options."""
    B, H, N_q, N_k, d_s, d_t = shape
    options = dict(VARIANTS[variant])
    if options.get("is_causal") or options.get("is_shared"):
        N_k = N_q
    for name, n in (("key_mask", N_k), ("query_mask", N_q)):
        if name in options:
            options[name] = half_of(B, n)
    if "bias" in options:
        whole = (B, H, N_q, N_k)
        bias = torch.randn([n if wide else 1 for n, wide in zip(whole, options["bias"], strict=True)], device=DEVICE)
        options["bias"] = bias
    return (B, H, N_q, N_k, d_s, d_t), options


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@in_pairs(
    {
        "split": SPLITS,
        "variant": VARIANTS,
        "divergence": DIVERGENCES,
        "dtype": [torch.float64, torch.bfloat16],
        "products": ["own", "others"],
    },
    allowed=lambda x: x.get("divergence") != "score_mse" or VARIANTS[x.get("variant", "plain")].get("heads") != "mean",
)
def test_native_splits(split: str, variant: str, divergence: str, dtype: torch.dtype, products: str) -> None:
    """On any number of threads the values are the oracle's, and equal bits on as many threads, on all products."""
    lowered, size, shape_of = SPLITS[split]
    lowered = {name if "matmul" in name else f"attention_{name}": value for name, value in lowered.items()}
    lowered |= PRODUCTS[dtype][products]
    for n in around(size):
        shape, options = of_variant(variant, shape_of(n))
        x, bias = operands(*shape, dtype), options.pop("bias", None)
        with thresholds(**lowered):
            check(x, None if bias is None else bias.to(dtype), divergence=divergence, backend="native",
                  repeats=on_every_number_of_threads, **options)  # fmt: skip


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("products", PRODUCTS[torch.float32].values(), ids=PRODUCTS[torch.float32])
def test_gradients_of_many_keys_keep_their_digits(products: dict[str, int]) -> None:
    """A sum of thousands of products one by one has an error several times that of PyTorch's sums in parts."""
    q, k, *teacher = operands(1, 1, 16, 8192, 64, 64)
    with thresholds(**products):
        call = partial(fastkd.attention_loss, backend="native")
        actual = loss_and_gradients(lambda q: call(q, k, *teacher), [q])
    oracle = loss_and_gradients(
        lambda q: reference.attention_loss(q, k.double(), *(x.double() for x in teacher)), [q.double()]
    )
    assert all(relative_difference(a, o) < 1.2e-6 for a, o in zip(actual, oracle, strict=True))


def test_bfloat16_with_onednn_switched_off() -> None:
    """Its matrix products are then refused."""
    x = operands(1, 1, 9, 200, 8, 8, torch.bfloat16)
    expected = fastkd.attention_loss(*x)
    with torch.backends.mkldnn.flags(enabled=False):
        found = fastkd.attention_loss(*x)
    assert relative_difference(found, expected) < 1e-5
    assert fastkd.attention_loss(*x) == expected


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("divergence", ["kl", "score_mse"])
@pytest.mark.parametrize("d", [1, 5, 16, 17, 33, 64])
def test_own_products_in_float32(d: int, divergence: str) -> None:
    """Whole vectors and parts of one, in every direction: the values of the library's products."""
    for N_q, N_k in ((1, 1), (7, 49), (9, 16), (40, 15)):
        q, k, *teacher = operands(2, 2, N_q, N_k, d, 24)
        found = []
        for products in PRODUCTS[torch.float32].values():
            with thresholds(attention_most_rows=17, **products), poisoned_allocations():
                found.append(
                    loss_and_gradients(
                        lambda q, k, teacher=teacher: fastkd.attention_loss(
                            q, k, *teacher, divergence=divergence, backend="native"
                        ),
                        [q, k],
                    )
                )
        if N_k > 1 or divergence == "score_mse":  # one key has probability 1: all is 0
            assert all(relative_difference(a, b) < 2e-6 for a, b in zip(*found, strict=True))
        else:
            assert all((x == 0).all() for x in (*found[0], *found[1]))


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("products", PRODUCTS[torch.float32].values(), ids=PRODUCTS[torch.float32])
@pytest.mark.parametrize("masks", [(), ("key_mask", "query_mask")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_native_grams_in_blocks(
    dtype: torch.dtype, masks: tuple[str, ...], products: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "pick_algorithm", lambda *_: "gram")
    for n in around(5):
        for N_q, N_k in ((n, 13), (13, n)):
            options = {name: half_of(2, {"key_mask": N_k, "query_mask": N_q}[name]) for name in masks}
            with thresholds(attention_gram_rows=5, **products):
                check(operands(2, 3, N_q, N_k, 3, 2, dtype), divergence="score_mse", backend="native",
                      repeats=on_every_number_of_threads, **options)  # fmt: skip


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("shape", [(1, 1, 0, 1), (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 1, 0), (1, 0, 1, 1)], ids=str)
def test_no_two_threads_add_to_one_sum(shape: tuple[int, ...]) -> None:
    """Elements of a bias gradient that several heads or rows add to: in one order, so that calls have equal bits. So
    many rows that threads which did share them would meet."""
    B, H, N_q, N_k = (1, 3, 1500, 16) if shape[2] == 0 else (2, 3, 700, 16)
    x = operands(B, H, N_q, N_k, 8, 8)
    bias = torch.randn([n if wide else 1 for n, wide in zip((B, H, N_q, N_k), shape, strict=True)])

    def run() -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda b: fastkd.attention_loss(*x, bias_student=b, divergence="score_mse", backend="native"), [bias]
        )

    for count in (2, 3, 7):
        with threads(count):
            first, *others = (run() for _ in range(4))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)), count


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_totals_beside_a_large_term(backend: str) -> None:
    """10,000 losses of 0.49 beside one of 2²³: a float32 in which they were added up would round each of them away."""
    q, k, tq, tk = (torch.zeros(1, 1, n, 8, device=DEVICE) for n in (10_001, 1) * 2)
    bias = torch.full((10_001, 1), 0.7, device=DEVICE)
    bias[0] = 2900.0
    options = {"bias_student": bias, "divergence": "score_mse", "reduction": "sum"}
    loss = fastkd.attention_loss(q, k, tq, tk, **options, backend=backend)
    assert relative_difference(loss, bias.double().square().sum()) < 1e-5


@pytest.mark.parametrize(("divergence", "heads"), [x for x in WITH_HEADS if x[0] != "score_mse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_probabilities_whose_inverse_overflows(backend: str, dtype: torch.dtype, divergence: str, heads: str) -> None:
    """Of keys that lag so far behind the others that e^-lag is subnormal, in the student, the teacher or both."""
    lag = {torch.float64: 743.0, torch.float32: 102.0}[dtype]
    q = torch.ones(1, 1, 1, 1, dtype=dtype, device=DEVICE)
    far, near = torch.zeros(2, 1, 1, 9, 1, dtype=dtype, device=DEVICE)
    far[:, :, :3] = -lag
    near[:, :, 2:4] = -lag
    for student, teacher in ((far, near), (near, far), (far, far + far / 1e4)):
        leaf = student.clone().requires_grad_()
        loss = fastkd.attention_loss(q, leaf, q, teacher, divergence=divergence, heads=heads, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = reference.attention_loss(
            q.double(), student.double(), q.double(), teacher.double(), divergence=divergence, heads=heads
        )
        assert gradient.isfinite().all()
        assert (loss - expected).abs() <= 1e-5 * (1 + expected.abs()), (loss, expected)


@pytest.mark.parametrize(("divergence", "heads"), [x for x in WITH_HEADS if x[0] != "score_mse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_keys_one_network_lacks(backend: str, divergence: str, heads: str) -> None:
    """All of a row's keys in every head: the student's in row 1, the teacher's in row 4, both in row 3. 0 where
    the teacher has none, gradient 0 where either has none; the other rows are as if those were not there."""
    q, k, tq, tk = operands(1, 2, 6, 5, 8, 24)
    bias_s, bias_t = torch.zeros(2, 1, 2, 6, 5, device=DEVICE)
    bias_s[:, :, [1, 3]], bias_t[:, :, [3, 4]] = -INF, -INF
    kept, without, every = [0, 2, 5], [1, 3, 4], slice(None)

    def run(
        function: Callable[..., Tensor], dtype: torch.dtype, rows: list[int] | slice, **more: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (x.to(dtype).requires_grad_() for x in (q, k))
        own, other = (bias.to(dtype)[:, :, rows] for bias in (bias_s, bias_t))
        losses = function(
            a[:, :, rows], b, tq.to(dtype)[:, :, rows], tk.to(dtype), bias_student=own, bias_teacher=other,
            divergence=divergence, heads=heads, reduction="none", **more,
        )  # fmt: skip
        return losses.detach(), *torch.autograd.grad(losses.sum(), (a, b))

    actual = run(fastkd.attention_loss, torch.float32, every, backend=backend)
    oracle, eager = (run(reference.attention_loss, dtype, kept) for dtype in (torch.float64, torch.float32))
    for name, a, e, o in zip(("rows", "dq", "dk"), (actual[0][:, :, kept], *actual[1:]), eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, 5 * 8, name)
    assert (actual[1][:, :, without] == 0).all()
    own, expected = actual[0][:, :, without], run(reference.attention_loss, torch.float64, every)[0][:, :, without]
    assert torch.equal(own.isfinite(), expected.isfinite())
    assert ((own - expected).nan_to_num(0).abs() < 1e-6).all(), (own, expected)


@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_without_keys_in_one_network(backend: str, divergence: str) -> None:
    """In an average of heads it has probability 0 throughout, so that the two totals differ."""
    x = operands(1, 3, 4, 5, 8, 8)
    bias_s, bias_t = torch.zeros(2, 1, 3, 4, 5, device=DEVICE)
    bias_s[:, 1, 2], bias_t[:, 0, 3] = -INF, -INF
    biases = {"bias_student": bias_s, "bias_teacher": bias_t}
    check(x, divergence=divergence, heads="mean", backend=backend, reduction="none", **biases)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs({"dtype": DTYPES, "divergence": SOFTMAX})
def test_head_averages(backend: str, dtype: torch.dtype, divergence: str) -> None:
    N = 9 if INTERPRETED else 33
    (q, k, _, _), (_, _, tq, tk) = operands(2, 2, N, N, 8, 8, dtype), operands(2, 3, N, N, 8, 24, dtype)
    check((q, k, tq, tk), heads="mean", divergence=divergence, backend=backend)


OPTIONS = {
    "divergence": DIVERGENCES,
    "dtype": [*DTYPES, torch.float64],
    "heads": ["match", "mean"],
    "bias": [None, "bhqk", "1hqk", "11qk", "b11k", "1h1k", "teacher"],
    "key_mask": [False, True],
    "query_mask": [False, True],
    "is_causal": [False, True],
    "temperature": [1.0, 0.5],
    "query_slice": [None, slice(5, -2, 3), slice(-50, 9), slice(0, 1)],
    "reduction": ["mean", "sum", "none"],
    "layout": ["contiguous", "permuted", "sliced", "offset", "channels"],
    "is_shared": [False, True],
    "scales": [None, (0.3, 0.2)],
}


def is_allowed(x: dict) -> bool:
    """Averages of heads have no scores; as queries have a slice of their own, one tensor cannot be both."""
    return (x.get("divergence"), x.get("heads")) != ("score_mse", "mean")


def check_options(x: dict, backend: str) -> None:
    x = dict(x)
    B, N_q = 2, 19
    H = 1 if INTERPRETED and x["heads"] == "match" and "h" not in (x["bias"] or "") else 2
    N_k = N_q if x["is_causal"] or x["is_shared"] else 23 if INTERPRETED else 35
    dtype, layout, where, scales = x.pop("dtype"), x.pop("layout"), x.pop("bias"), x.pop("scales")
    for name, n in (("key_mask", N_k), ("query_mask", N_q)):
        x[name] = half_of(B, n) if x[name] else None
    if scales:
        x["scale_student"], x["scale_teacher"] = scales
    if where:
        whole = zip(where if where != "teacher" else "bhqk", (B, H, N_q, N_k), strict=True)
        bias = torch.randn([1 if letter == "1" else n for letter, n in whole], device=DEVICE).to(dtype)
    if where == "teacher":
        x["bias_teacher"] = bias
    inputs = tuple(strided(v, layout) for v in operands(B, H, N_q, N_k, 8, 24, dtype))
    check(inputs, bias if where not in (None, "teacher") else None, backend=backend, **x)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", pairs(OPTIONS, allowed=is_allowed), ids=lambda x: "-".join(map(str, x.values())))
def test_pairs_of_options(backend: str, options: dict) -> None:
    if options["dtype"] == torch.float64 and backend not in backends("attention_fwd", torch.float64):
        options = options | {"dtype": torch.float32}
    check_options(options, backend)


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("shape", [(3, 33, 1), (2, 1, 1, 1), ()], ids=str)
@pytest.mark.parametrize("backend", backends("attention_fwd", torch.float64))
def test_bias_of_whole_rows(backend: str, shape: tuple[int, ...]) -> None:
    """Nothing to a softmax; the sum of score differences otherwise, small against its terms: so in float64."""
    bias = torch.randn(shape, device=DEVICE).double()
    q, k, tq, tk = (x.double() for x in operands(2, 3, 33, 17, 8, 24))
    for reduction in ("sum", "none"):

        def run(function, divergence: str, reduction: str = reduction, **more) -> tuple[Tensor, ...]:
            return loss_and_gradients(
                lambda b: function(q, k, tq, tk, bias_student=b, divergence=divergence, reduction=reduction, **more),
                [bias],
            )

        actual, oracle = (
            run(fastkd.attention_loss, "score_mse", backend=backend),
            run(reference.attention_loss, "score_mse"),
        )
        assert all(relative_difference(a, o) < 1e-11 for a, o in zip(actual, oracle, strict=True))
        assert run(fastkd.attention_loss, "kl", backend=backend)[1].abs().max() < 1e-13


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_keys(backend: str, divergence: str, heads: str) -> None:
    """-inf in both biases, as a window mask: absent keys, an image's absent row, and one head's in a mean."""
    bias = torch.randn(2, 2, 9, 17, device=DEVICE)
    bias[..., 3:6], bias[0, :, 4] = -INF, -INF
    if heads == "mean":
        bias[1, 1, 2] = -INF
    for reduction in ("mean",) if INTERPRETED else ("mean", "none"):
        x = operands(2, 2, 9, 17, 8, 24)
        check(x, bias, divergence=divergence, heads=heads, bias_teacher=bias, reduction=reduction, backend=backend)
    finite = fastkd.attention_loss(*x, bias_student=bias, bias_teacher=bias, reduction="none", backend=backend)
    assert (finite[0, :, 4] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_keys(backend: str, divergence: str) -> None:
    """It adds 0 and gets gradient 0, whatever its padding holds; the other image is as if alone."""
    q, k, tq, tk = operands(2, HEADS, 9, 9, 8, 24)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    q[1], k[1], tk[1] = INF, float("nan"), float("nan")

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return fastkd.attention_loss(
            q, k, tq, tk, key_mask=mask, query_mask=mask, divergence=divergence, backend=backend
        )

    total, dq, dk = loss_and_gradients(loss, [q, k])
    alone = fastkd.attention_loss(q[:1], k[:1], tq[:1], tk[:1], divergence=divergence, backend=backend)
    assert relative_difference(2 * total, alone) < 1e-6
    assert (dq[1] == 0).all() and (dk[1] == 0).all() and dq[0].isfinite().all() and dq[0].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_one_network_lacks(backend: str) -> None:
    x = operands(1, 2, 5, 9, 8, 8)
    bias = torch.zeros(9, device=DEVICE)
    bias[4] = -INF
    lacking = {
        "student": {"kl": True, "ce": True, "reverse_kl": False, "js": False, "mse": False, "score_mse": True},
        "teacher": {"kl": False, "ce": False, "reverse_kl": True, "js": False, "mse": False, "score_mse": True},
    }
    for who, infinite in lacking.items():
        for divergence, is_infinite in infinite.items():

            def loss(q: Tensor, k: Tensor, who: str = who, divergence: str = divergence) -> Tensor:
                return fastkd.attention_loss(
                    q, k, *x[2:], **{f"bias_{who}": bias}, divergence=divergence, backend=backend
                )

            value, *grads = loss_and_gradients(loss, x[:2])
            assert value == INF if is_infinite else value.isfinite(), (who, divergence)
            if not is_infinite or divergence in ("kl", "ce"):
                assert all(g.isfinite().all() for g in grads), (who, divergence)


@pytest.mark.parametrize("divergence", ["kl", "score_mse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str, divergence: str) -> None:
    N = 9 if INTERPRETED else 33
    q, k, tq, tk = operands(3, 3, N, N, 8, 24)
    check((q, k, tq[:1].expand_as(tq), tk), divergence=divergence, backend=backend)
    projection = torch.randn(2, N, 3, 3, 8, device=DEVICE)  # (B, N, qkv, H, d), as ViTs have it
    q, k, _ = projection.permute(2, 0, 3, 1, 4)
    check((q, k, tq[:2], tk[:2]), divergence=divergence, backend=backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_of_another_dtype(backend: str, divergence: str) -> None:
    q, k, tq, tk = (x.half() for x in operands(2, HEADS, 33, 33, 8, 24))

    def run(tq: Tensor, tk: Tensor) -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda q, k: fastkd.attention_loss(q, k, tq, tk, divergence=divergence, backend=backend), [q, k]
        )

    if backend == "triton":  # its 16-bit products are other instructions, rounded otherwise
        check((q, k, tq.float(), tk.float()), divergence=divergence, backend=backend)
    else:
        assert all(torch.equal(a, b) for a, b in zip(run(tq, tk), run(tq.float(), tk.float()), strict=True))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_float64_teacher(backend: str) -> None:
    """Left to itself, a call whose teacher has the dtype that Triton lacks runs elsewhere."""
    q, k, tq, tk = operands(2, 3, 9, 9, 8, 24)
    if backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            fastkd.attention_loss(q, k, tq.double(), tk, backend=backend)
        return
    actual = fastkd.attention_loss(q, k, tq.double(), tk.double(), backend=backend)
    oracle = reference.attention_loss(*(x.double() for x in (q, k, tq, tk)))
    assert relative_difference(actual, oracle) < 1e-5


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize(("divergence", "heads"), WITH_HEADS)
def test_gradcheck(divergence: str, heads: str) -> None:
    q, k, tq, tk = (x.double() for x in operands(2, 2, 5, 5, 3, 4))
    bias = torch.randn(1, 2, 5, 5, device=DEVICE).double()
    masks = {"key_mask": half_of(2, 5), "query_mask": half_of(2, 5)}
    for options in ({"reduction": "none"}, {"is_causal": True, **masks}):
        torch.autograd.gradcheck(
            lambda q, k, b, o=options: fastkd.attention_loss(
                q, k, tq, tk, bias_student=b, divergence=divergence, heads=heads, backend="eager", **o
            ),
            [x.requires_grad_() for x in (q, k, bias)],
            fast_mode=True,
        )


@pytest.mark.parametrize("masks", [(), ("key_mask",), ("query_mask",), ("key_mask", "query_mask")], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_by_grams(
    backend: str, dtype: torch.dtype, masks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pick_algorithm(150, 101, 8, 8, torch.device("cpu")) == "gram"
    monkeypatch.setattr(_common, "CHUNK", 7000)
    options = {name: half_of(2, {"key_mask": 101, "query_mask": 150}[name]) for name in masks}
    for reduction in ("mean", "sum"):
        x = operands(2, 3, 150, 101, 8, 8, dtype)
        check(x, divergence="score_mse", reduction=reduction, backend=backend, **options)


@pytest.mark.parametrize("chunk", [1, 100, 5000])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grams_in_chunks(backend: str, is_shared: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row and image by image; a few rows; all rows of some images."""
    monkeypatch.setattr(ops, "pick_algorithm", lambda *_: "gram")
    monkeypatch.setattr(_common, "CHUNK", chunk)
    N_k = 19 if is_shared else 13
    masks = {"key_mask": half_of(3, N_k), "query_mask": half_of(3, 19)}
    for options in ({}, masks):
        x = operands(3, 2, 19, N_k, 3, 2)
        check(x, divergence="score_mse", is_shared=is_shared, backend=backend, **options)


@pytest.mark.parametrize("chunk", [1, 300, 5000])
@pytest.mark.parametrize(("divergence", "heads"), WITH_HEADS)
def test_eager_chunks(divergence: str, heads: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row of each head; strips of a head's rows; some heads, or images."""
    monkeypatch.setattr(_common, "CHUNK", chunk)
    bias = torch.randn(1, 3, 5, 1 if divergence == "score_mse" else 7, device=DEVICE).double()
    x = operands(3, 3, 5, 7, 4, 6, torch.float64)
    check(x, bias, divergence=divergence, heads=heads, key_mask=half_of(3, 7), temperature=2.0, reduction="sum")


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
@in_pairs({"divergence": ["kl", "mse"], "is_shared": [False, True], "reduction": ["sum", "none"]})
def test_strips_of_averages(
    backend: str, divergence: str, is_shared: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages of heads are kept for a strip of 32 rows, a tail after it; or for one of two images."""
    kernels = pytest.importorskip("fastkd_kernels.attention")
    rows = 35 if divergence == "kl" else 16
    monkeypatch.setattr(kernels, "STRIP_BYTES", 1)
    bias = torch.randn(1, 1, rows, rows, device=DEVICE)
    x = operands(1 if divergence == "kl" else 3, 2, rows, rows, 8, 8)
    check(x, bias, heads="mean", divergence=divergence, is_shared=is_shared, reduction=reduction, backend=backend)


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
def test_partial_sums_of_a_bias(
    backend: str, shape: tuple[int, ...], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as memory allows, beside many multiprocessors: 5 images and heads, or tiles, do not divide among them."""
    kernels = pytest.importorskip("fastkd_kernels.attention")
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1000)
    whole = (5, 1, 4, 35)
    bias = torch.randn([n if wide else 1 for n, wide in zip(whole, shape, strict=True)], device=DEVICE)
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", most * 4 * bias.numel())
    check(operands(*whole, 8, 8), bias, divergence="score_mse", temperature=2.0, reduction="sum", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("architecture", ["8.x", "10.x", "cdna"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
def test_tiles_of_other_architectures(
    backend: str, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("fastkd_kernels.attention")
    monkeypatch.setattr(kernels, "architecture", lambda _: architecture)
    check(operands(1, 1, 35, 35, 8, 24, dtype), divergence="js", backend=backend)
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1000)  # too few heads for one pass
    check(operands(1, 1, 35, 35, 8, 72, dtype), divergence="kl", is_causal=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs({"divergence": DIVERGENCES, "dtype": DTYPES})
def test_rows_of_many_keys(backend: str, divergence: str, dtype: torch.dtype) -> None:
    """More than 4,096, the likeliest and the least so at either end."""
    q, k, tq, tk = operands(1, 1, 3, 300 if INTERPRETED else 4100, 8, 8, dtype)
    k[..., -1, :], k[..., 0, :] = q[..., 1, :], q[..., 2, :]
    tk[..., -1, :] = tq[..., 0, :]
    check((q, k, tq, tk), divergence=divergence, backend=backend)


TRITON = pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])


@pytest.fixture
def _separate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were too few heads to fill the card: gradients of queries and of keys in kernels of their own."""
    kernels = pytest.importorskip("fastkd_kernels.attention")
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1000)


@TRITON
@in_pairs({"keys": [255, 256, 257], "dtype": [torch.float16, torch.bfloat16], "divergence": ["kl", "mse"]})
def test_keys_around_the_largest_tile(backend: str, keys: int, dtype: torch.dtype, divergence: str) -> None:
    check(operands(1, 1, 19, keys, 8, 24, dtype), divergence=divergence, backend=backend)


@TRITON
@pytest.mark.parametrize("keys", [256, 257])
@pytest.mark.parametrize("is_near", [False, True])
def test_one_term_of_a_bfloat16_gradient_is_enough(backend: str, is_near: bool, keys: int) -> None:
    """Its error shows less than an eighth beside the rounding of the exact gradient to bfloat16."""
    q, k, tq, tk = operands(1, 1, 35, keys, 64, 64, torch.bfloat16, gain=1.0)
    if is_near:  # a KL of about 2e-4
        q, k = ((x.float() + 0.015 * torch.randn_like(x.float())).to(torch.bfloat16) for x in (tq, tk))
    _, *exact = loss_and_gradients(
        lambda a, b: reference.attention_loss(a, b, tq.double(), tk.double()), [q.double(), k.double()]
    )
    _, *actual = loss_and_gradients(lambda a, b: fastkd.attention_loss(a, b, tq, tk, backend=backend), [q, k])
    for a, e in zip(actual, exact, strict=True):
        assert (a - e).norm() <= 1.125 * (e.bfloat16() - e).norm()


@TRITON
@pytest.mark.usefixtures("_separate")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_sums_of_a_sweep_whose_maxima_move(backend: str, dtype: torch.dtype) -> None:
    """The likeliest keys come tile after tile, in turns of the networks; in the first tile one has none that counts."""
    q, k, tq, tk = operands(1, 1, 5, 150, 8, 8, dtype)
    rise = torch.linspace(-20, 20, 150, device=DEVICE)
    turns = rise + 9 * torch.sin(rise)
    late = rise.where(rise > -10, -300)
    q[..., 0], tq[..., 0] = 8**0.5, 8**0.5
    for student, teacher in ((turns, late), (late, turns), (rise, turns), (turns, turns.flip(0))):
        k[..., 0], tk[..., 0] = student, teacher
        check((q, k, tq, tk), backend=backend)


@TRITON
@pytest.mark.usefixtures("_separate")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_sweep_over_equal_networks(backend: str, dtype: torch.dtype) -> None:
    q, k, _, _ = operands(1, 1, 5, 150, 8, 8, dtype)
    loss, *grads = loss_and_gradients(lambda a, b: fastkd.attention_loss(a, b, q, k, backend=backend), [q, k])
    assert loss == 0 and all((g == 0).all() for g in grads)


@TRITON
@pytest.mark.parametrize("keys", [19, 300])
def test_bfloat16_outside_the_range_of_float16(backend: str, keys: int) -> None:
    q, k, tq, tk = operands(1, 1, 5, keys, 8, 8, torch.bfloat16)
    q, k = q * 2.0**60, k * 2.0**-90
    q[0, 0, 1], k[0, 0, 3] = 0, 0
    check((q, k, tq, tk), scale_student=2.0**30 / 8**0.5, backend=backend)


@pytest.mark.parametrize(
    ("gain", "n", "expected"), [(1, 197, "tile"), (1, 1024, "gram"), (8, 1024, "tile"), (8, 4097, "gram")]
)
def test_the_cheaper_algorithm_is_taken(gain: int, n: int, expected: str) -> None:
    assert pick_algorithm(n, n, 64, 64, torch.device("cpu"), gain) == expected


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_equal_to_the_teacher(backend: str, dtype: torch.dtype, divergence: str) -> None:
    n = 19 if INTERPRETED else 33
    cases = {(n, "match"), (n, "mean"), (150, "match")}  # score_mse: by strips, by Grams
    cases -= {(n, "mean")} if divergence == "score_mse" else {(150, "match")} if INTERPRETED else set()
    for n, heads in sorted(cases):
        q, k, _, _ = operands(1, 2, n, n, 8, 8, dtype)
        loss, *grads = loss_and_gradients(
            lambda a, b, q=q, k=k, h=heads: fastkd.attention_loss(
                a, b, q, k, divergence=divergence, heads=h, backend=backend
            ),
            [q.transpose(1, 2).contiguous().transpose(1, 2), k],
        )
        assert divergence == "ce" or 0 <= loss <= 1e-6
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs({"is_near": [False, True], "where": ["keys", "bias"], "divergence": SOFTMAX})
def test_a_common_offset_of_a_row_is_free(backend: str, is_near: bool, where: str, divergence: str) -> None:
    """All scores of a row 3,000 higher: errors of loss and gradients stay what they are without, near a match too."""
    N = 19 if INTERPRETED else 65
    q, k, tq, tk = operands(1, 2, N, N, 24, 24)
    if is_near:
        q, k = tq + 0.01 * q, tk + 0.01 * k
    plain: Operands = (q, k, tq, tk)
    if where == "keys":  # in a direction of its own: queries 120, keys 120 and the teacher's -120, 24^-½ 120² = 2,939
        offsets = (120, 120, 120, -120)
        lifted = tuple(torch.cat([x, torch.full_like(x[..., :1], o)], -1) for x, o in zip(plain, offsets, strict=True))
        options = {"scale_student": 24**-0.5, "scale_teacher": 24**-0.5}
    else:
        lifted = plain
        options = {"bias_student": torch.tensor([[3000.0]]), "bias_teacher": torch.full((N, N), -3000.0)}
        options = {name: bias.to(DEVICE) for name, bias in options.items()}
    oracle = loss_and_gradients(
        lambda a, b: reference.attention_loss(a, b, tq.double(), tk.double(), divergence=divergence),
        [q.double(), k.double()],
    )

    def errors(x: Operands, **options) -> list[float]:
        actual = loss_and_gradients(
            lambda a, b: fastkd.attention_loss(a, b, *x[2:], divergence=divergence, backend=backend, **options), x[:2]
        )
        actual = (actual[0], actual[1][..., :24], actual[2][..., :24])
        return [((a - o).norm() / o.norm()).item() for a, o in zip(actual, oracle, strict=True)]

    for with_offset, without in zip(errors(lifted, **options), errors(plain), strict=True):
        assert with_offset <= 2 * without + 1e-6


@pytest.mark.parametrize(("divergence", "heads"), WITH_HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores(backend: str, divergence: str, heads: str) -> None:
    N = 19 if INTERPRETED else 33
    q, k, tq, tk = operands(1, 2, N, N, 8, 8)
    assert (q @ k.mT * 1500).abs().max() > 1e4
    natural = torch.stack([q.norm(), k.norm()]) / (2 * N)  # times the scale: a gradient where the map is not one-hot
    for options in ({"scale_student": 1500, "scale_teacher": 1500}, {"temperature": 0.05}, {"scale_student": -1500}):

        def run(function, dtype: torch.dtype, options: dict = options, **more) -> tuple[Tensor, ...]:
            t = tq.to(dtype), tk.to(dtype)
            return loss_and_gradients(
                lambda x, y: function(x, y, *t, divergence=divergence, heads=heads, **options, **more),
                [q.to(dtype), k.to(dtype)],
            )

        actual = run(fastkd.attention_loss, torch.float32, backend=backend)
        oracle, eager = (run(reference.attention_loss, dtype) for dtype in (torch.float64, torch.float32))
        assert_matches_oracle(actual[0], eager[0], oracle[0], N * 8, "loss")
        scale = options.get("scale_student", 8**-0.5 / 0.05)
        rounding = torch.finfo(torch.float32).eps * (q @ k.mT * scale).abs().max()  # of a score, so of e to its power
        for a, e, o, unit in zip(actual[1:], eager[1:], oracle[1:], natural, strict=True):
            assert a.isfinite().all()
            assert (a - o).norm() <= 2 * (e - o).norm() + rounding * abs(scale) * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_a_match(backend: str, dtype: torch.dtype) -> None:
    """KL about 2e-4: the loss right to 1e-3, the gradient as from float32 arithmetic on the same inputs."""
    _, _, tq, tk = operands(1, 2, MANY, MANY, 64, 64, dtype, gain=1.0)
    q, k = ((x.float() + 0.015 * torch.randn_like(x.float())).to(dtype) for x in (tq, tk))
    oracle = loss_and_gradients(
        lambda a, b: reference.attention_loss(a, b, tq.double(), tk.double()), [q.double(), k.double()]
    )
    assert 5e-5 < oracle[0] < 5e-4
    loss, *grads = loss_and_gradients(
        lambda a, b: fastkd.attention_loss(a, b, tq, tk, backend=backend),
        [q, k],
        4096.0,  # clear of float16's subnormals
    )
    assert relative_difference(loss, oracle[0]) < 1e-3
    for a, o in zip(grads, oracle[1:], strict=True):
        assert ((a.double() / 4096 - o).norm() / o.norm()).item() < 1e-2


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_a_grad_scaler(backend: str, reduction: str) -> None:
    """An incoming gradient of 65536 keeps entries that would round to zero without it."""
    B, H, N = (2, 1, 35) if INTERPRETED else (4, 3, 65)
    q, k, tq, tk = operands(B, H, N, N, 8, 24, torch.float16)
    incoming = 65536.0 if reduction == "mean" else 65536.0 / (B * H * N)
    _, *oracle = loss_and_gradients(
        lambda a, b: reference.attention_loss(a, b, tq.double(), tk.double()), [q.double(), k.double()], 65536.0
    )
    _, *actual = loss_and_gradients(
        lambda a, b: fastkd.attention_loss(a, b, tq, tk, reduction=reduction, backend=backend), [q, k], incoming
    )
    for a, o in zip(actual, oracle, strict=True):
        assert ((a - o).norm() / o.norm()).item() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetries(backend: str) -> None:
    """Order of images, heads, queries and keys, and axes of a head, do not matter."""
    B, H, N_q, N_k = (2, 2, 9, 5) if INTERPRETED else (3, 4, 33, 17)
    q, k, tq, tk = operands(B, H, N_q, N_k, 8, 24)

    def loss(*x: Tensor, **options) -> Tensor:
        return fastkd.attention_loss(*x, backend=backend, **options)

    images, heads, rows, keys = (torch.randperm(n, device=DEVICE) for n in (B, H, N_q, N_k))
    rotation = torch.linalg.qr(torch.randn(8, 8, device=DEVICE))[0]
    for divergence in ("kl", "score_mse") if INTERPRETED else DIVERGENCES:
        whole = loss(q, k, tq, tk, divergence=divergence)
        for moved in (
            [x[images] for x in (q, k, tq, tk)],
            [x[:, heads] for x in (q, k, tq, tk)],
            [q[:, :, rows], k[:, :, keys], tq[:, :, rows], tk[:, :, keys]],
            [q @ rotation, k @ rotation, tq, tk],
        ):
            assert relative_difference(loss(*moved, divergence=divergence), whole) < 1e-5
    rows = loss(q, k, tq, tk, reduction="none")
    assert rows.shape == (B, H, N_q) and relative_difference(rows.sum(), loss(q, k, tq, tk, reduction="sum")) < 1e-5
    assert loss(q, k, tq, tk, reduction="none", heads="mean").shape == (B, 1, N_q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_is_as_good_as_absence(backend: str) -> None:
    q, k, tq, tk = operands(2, 3, 9, 9, 8, 24)
    mask = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    mask[1, 5:] = False
    whole = fastkd.attention_loss(q, k, tq, tk, key_mask=mask, query_mask=mask, backend=backend)
    first = fastkd.attention_loss(*(x[:1] for x in (q, k, tq, tk)), backend=backend)
    second = fastkd.attention_loss(*(x[1:, :, :5] for x in (q, k, tq, tk)), backend=backend)
    assert relative_difference(whole, (first + second) / 2) < 1e-6


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("divergence", ["kl", "score_mse"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_queries_and_keys(
    backend: str, reduction: str, divergence: str, dtype: torch.dtype, is_masked: bool
) -> None:
    x, _, t, _ = operands(2, HEADS, 33, 33, 8, 24, dtype)
    options = {"divergence": divergence, "reduction": reduction, "key_mask": half_of(2, 33) if is_masked else None}

    def run(function, keys, x: Tensor, t: Tensor, **more) -> tuple[Tensor, ...]:
        return loss_and_gradients(lambda a: function(a, keys(a), t, t, **options, **more).sum(), [x])

    actual = run(fastkd.attention_loss, lambda a: a, x, t, backend=backend)
    oracle = run(reference.attention_loss, torch.clone, x.double(), t.double())
    eager = run(reference.attention_loss, torch.clone, x, t)
    for name, a, e, o in zip(("loss", "dx"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, 33 * 8, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_wanted(backend: str) -> None:
    q, k, tq, tk = operands(2, 3, 9, 9, 8, 24)
    bias = torch.randn(9, 9, device=DEVICE)
    for reduction in ("mean", "none"):
        leaves = [x.clone().requires_grad_() for x in (q, k, bias)]

        def loss(a: Tensor, b: Tensor, c: Tensor, reduction: str = reduction) -> Tensor:
            out = fastkd.attention_loss(a, b, tq, tk, bias_student=c, reduction=reduction, backend=backend)
            return out.square().sum()

        together = torch.autograd.grad(loss(*leaves), leaves)
        for i, expected in enumerate(together):
            alone = [x if i == j else x.detach() for j, x in enumerate(leaves)]
            (grad,) = torch.autograd.grad(loss(*alone), leaves[i])
            assert torch.equal(grad, expected)
        with torch.no_grad():
            assert not loss(*leaves).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_maths_in_float32(backend: str, reduction: str) -> None:
    q, k, tq, tk = operands(2, HEADS, 33, 33, 8, 24)

    def run() -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda a, b: fastkd.attention_loss(a, b, tq, tk, reduction=reduction, backend=backend).sum(), [q, k]
        )

    expected = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


COMPILED = {
    "plain": {},
    "rows": {"reduction": "none", "is_causal": True},
    "all": {"is_causal": True, "query_slice": slice(1, 8, 2), "heads": "mean", "divergence": "js", "masks": True},
    "scores": {"divergence": "score_mse", "masks": True},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str, options: dict) -> None:
    q, k, tq, tk = operands(2, 3, 9, 9, 8, 24)
    options = dict(options)
    if options.pop("masks", False):
        options |= {"key_mask": half_of(2, 9), "query_mask": half_of(2, 9)}
    bias = torch.randn(3, 9, 9, device=DEVICE)

    def loss(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return fastkd.attention_loss(q, k, tq, tk, bias_student=bias, backend=backend, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (loss_and_gradients(f, [q, k, bias]) for f in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_compile_whole(backend: str) -> None:
    student, teacher = (tuple(torch.randn(2, 9, D, device=DEVICE) for _ in range(3)) for D in (16, 24))

    def loss(*student: Tensor) -> Tensor:
        return fastkd.qkv_relation_loss(
            student, teacher, relations=("qq", "qk", "vv"), relation_heads=4, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (loss_and_gradients(f, student) for f in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("flags", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_holds_its_contract(backend: str, flags: tuple[bool, ...]) -> None:
    q, k, tq, tk = operands(2, 3, 9, 9, 8, 24)
    bias, mask = torch.randn(1, 3, 9, 9, device=DEVICE), half_of(2, 9)
    operator = getattr(torch.ops.fastkd, "attention_fwd" if backend == "native" else f"attention_fwd_{backend}").default
    options = ("kl", "match", (0.3, 0.3, 1.0), False, (0, 1))
    of_rows = torch.rand(2, 3, 9, device=DEVICE)  # what the backward of reduction "none" weighs rows by
    for reduction, weight in (("mean", None), ("none", None), ("none", of_rows)):
        torch.library.opcheck(operator, (q, k, tq, tk, bias, bias, mask, weight, reduction, "tile", *options, flags))
    shared = (q, None, tq, tk, None, None, None, mask.float()[:, None], "sum", "tile", *options)
    torch.library.opcheck(operator, (*shared, (flags[0], False, False)))


@pytest.mark.parametrize("divergence", ["kl", "score_mse"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_memory_is_linear_in_tokens(backend: str, divergence: str) -> None:
    """Forward and backward at N = 4096 in a fresh process: 40 MB with both gradients (4 MB each); a map has 67 MB."""
    setup = f"""
q, k, tq, tk = (torch.randn(1, 4, 4096, 64) for _ in range(4))
def run(n):
    a, b = (x[:, :, :n].detach().requires_grad_() for x in (q, k))
    fastkd.attention_loss(a, b, tq[:, :, :n], tk[:, :, :n], divergence={divergence!r}, backend={backend!r}).backward()
"""
    assert peak_extra_memory(setup, "run(64)", "run(4096)") < 40e6


def of_dtype(case: golden.Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else v.dtype) for k, v in golden.load(case).items()}


def assert_golden(
    case: golden.Case, dtype: torch.dtype, x: dict[str, Tensor], loss: Tensor, part: str = "loss"
) -> None:
    """A loss, and its gradients for those inputs of the case that it was computed from."""
    assert relative_difference(loss, x[part]) <= golden.tolerance(case, dtype, "loss"), part
    for name in [k.removeprefix("grad.") for k in x if k.startswith("grad.") and x[f"in.{k[5:]}"].requires_grad]:
        (grad,) = torch.autograd.grad(loss, x[f"in.{name}"], retain_graph=True)
        assert relative_difference(grad, x[f"grad.{name}"]) <= golden.tolerance(case, dtype, "grad"), name


golden_dtypes = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for dtype in (torch.float64, torch.float32) for b in backends("attention_fwd", dtype)],
    ids=lambda x: str(x).removeprefix("torch."),
)


@golden_dtypes
@pytest.mark.parametrize("case", golden.cases("attn_relation_kl"), ids=golden.name)
def test_golden_attention_relations(backend: str, case: golden.Case, dtype: torch.dtype) -> None:
    x = of_dtype(case, dtype)
    module = losses.AttentionLoss(backend=backend)
    for name in [k for k in x if f"grad.{k[3:]}" in x]:
        x[name].requires_grad_()
    layers = ["1", "2"] if "in.q_s1" in x else [""]
    qk, vv = (
        sum(module(*(x[f"in.{letter}_{who}{i}"] for who in "st" for letter in pair)) for i in layers)
        for pair in ("qk", "vv")
    )
    assert relative_difference(qk.detach(), x["loss.qk"]) <= golden.tolerance(case, dtype, "loss")
    assert relative_difference(vv.detach(), x["loss.vv"]) <= golden.tolerance(case, dtype, "loss")
    assert_golden(case, dtype, x, qk + vv)


@golden_dtypes
@pytest.mark.parametrize("case", golden.cases("minilmv2_relations"), ids=golden.name)
def test_golden_minilmv2(backend: str, case: golden.Case, dtype: torch.dtype) -> None:
    x, p = of_dtype(case, dtype), case["params"]
    weights = {"".join("qkv"[int(i) - 1] for i in ids.split(",")): w for ids, w in p["relations"].items()}
    mask = x["in.mask"].bool()
    for name in [k for k in x if f"grad.{k[3:]}" in x]:
        x[name].requires_grad_()

    def loss(relations: dict[str, float]) -> Tensor:
        module = losses.QKVRelationLoss(
            relations=tuple(relations),
            relation_heads=p["relation_heads"],
            weights=list(relations.values()),
            backend=backend,
        )
        student, teacher = (tuple(x[f"in.{letter}_{who}"] for letter in "qkv") for who in "st")
        return module(student, teacher, key_mask=mask, query_mask=mask)

    assert_golden(case, dtype, x, loss(weights))
    for pair in weights:
        part = f"loss.rel{''.join(str('qkv'.index(c) + 1) for c in pair)}"
        assert relative_difference(loss({pair: 1.0}).detach(), x[part]) <= golden.tolerance(case, dtype, "loss")


@golden_dtypes
@pytest.mark.parametrize("case", golden.cases("tinybert_attn_mse"), ids=golden.name)
def test_golden_tinybert(backend: str, case: golden.Case, dtype: torch.dtype) -> None:
    """From queries and keys where the case has them; raw scores go in as the bias of zero queries."""
    x, p = of_dtype(case, dtype), case["params"]
    for name in [k for k in x if k.startswith(("in.q_s", "in.k_s", "in.att_s"))]:
        x[name].requires_grad_()
    if "in.mask" in x:
        (s, t) = (
            tuple(x[f"in.{letter}_{who}0"].unflatten(-1, (p["heads"], -1)).transpose(1, 2) for letter in "qk")
            for who in "st"
        )
        with fastkd.backend(backend):
            assert_golden(case, dtype, x, compat.tinybert_att_loss([s], [t], x["in.mask"]))
        return
    every = p["layers_t"] // p["layers_s"]
    total = 0.0
    for layer in range(p["layers_s"]):
        scores = x[f"in.att_s{layer}"], x[f"in.att_t{layer * every + every - 1}"]
        zero = scores[0].new_zeros(*scores[0].shape[:3], 8)
        mask = torch.arange(scores[0].shape[-1], device=DEVICE) < torch.tensor(p["lengths"], device=DEVICE)[:, None]
        total = total + fastkd.attention_loss(
            zero,
            zero.clone(),
            zero.clone(),
            zero.clone(),
            divergence="score_mse",
            bias_student=scores[0],
            bias_teacher=scores[1],
            key_mask=mask,
            backend=backend,
        )
    assert_golden(case, dtype, x, total, "loss.att" if "loss.att" in x else "loss")


@golden_dtypes
@pytest.mark.parametrize("case", golden.cases("attndistill_cls"), ids=golden.name)
def test_golden_attndistill(backend: str, case: golden.Case, dtype: torch.dtype) -> None:
    """Its attention term: the class token's row alone. The clamp binds in no row that comes from queries and keys; rows
    given as probabilities are prepared here and go in as logarithms, which the softmax renormalises."""
    x, p = of_dtype(case, dtype), case["params"]
    wanted = ["in.q_s", "in.k_s"] if p["input"] == "qk" else ["in.attn_s"]
    for name in wanted:
        x[name].requires_grad_()
    if p["input"] == "qk":
        inputs = [x[f"in.{name}"] for name in ("q_s", "k_s", "q_t", "k_t")]
        loss = fastkd.attention_loss(*inputs, query_slice=slice(0, 1), reduction="sum", backend=backend)
    else:
        s, t = x["in.attn_s"], x["in.attn_t"]
        if p["interpolate"]:
            g = p["teacher_grid"]
            patches = torch.nn.functional.interpolate(
                t[..., 1:].unflatten(-1, (g, g)), size=(p["student_grid"],) * 2, mode="bicubic"
            ).flatten(2)
            t = torch.cat([t[..., :1], patches * ((1 - t[..., :1]) / patches.sum(-1, keepdim=True))], -1)
        if p["aggregation"]:
            s, t = ((v.log().sum(1, keepdim=True) / p["attn_T"]).softmax(-1) for v in (s, t))
        s, t = (v.clamp(*p["clamp"]).log().unsqueeze(2) for v in (s, t))
        zeros = [s.new_zeros(*s.shape[:2], n, 8) for n in (1, s.shape[3]) * 2]
        loss = fastkd.attention_loss(*zeros, bias_student=s, bias_teacher=t, reduction="sum", backend=backend)
    assert_golden(case, dtype, x, p["weight_attn"] / len(x[wanted[0]]) * loss, "loss.attn")


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_are_attention_of_relation_heads(backend: str) -> None:
    N = 9 if INTERPRETED else 33
    student, teacher = (tuple(torch.randn(2, N, D, device=DEVICE) for _ in range(3)) for D in (24, 48))
    masks = {"key_mask": half_of(2, N), "query_mask": half_of(2, N)}
    options = {"relations": ("qq", "qk", "vk", "vv"), "relation_heads": 4, "weights": [1, 0.5, 2, 0], **masks}

    def run(function, dtype: torch.dtype, **more) -> tuple[Tensor, ...]:
        return loss_and_gradients(
            lambda *s: function(s, tuple(t.to(dtype) for t in teacher), **options, **more),
            [s.to(dtype) for s in student],
        )

    actual = run(fastkd.qkv_relation_loss, torch.float32, backend=backend)
    oracle, eager = (run(reference.qkv_relation_loss, dtype) for dtype in (torch.float64, torch.float32))
    for name, a, e, o in zip(("loss", "dq", "dk", "dv"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, N * 24, name)


def test_textbrewer_signatures() -> None:
    """Against the originals' formulas on whole score maps, padded keys of which arrive 10,000 lower."""
    q_S, k_S, q_T, k_T = operands(3, 2, 9, 9, 8, 24)
    mask = (torch.arange(9, device=DEVICE) < torch.tensor([9, 5, 2], device=DEVICE)[:, None]).long()
    S, T = (q @ k.mT * q.shape[-1] ** -0.5 - 1e4 * (1 - mask)[:, None, None] for q, k in ((q_S, k_S), (q_T, k_T)))
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).expand(-1, 2, -1, -1)
    rows = mask[:, None].expand(-1, 2, -1)

    def ce(s: Tensor, t: Tensor) -> Tensor:
        return -(t.softmax(-1) * s.log_softmax(-1) * mask[:, None, None]).sum(-1)

    expected = {
        "att_mse_loss": ((S - T).square() * pairs).sum() / pairs.sum(),
        "att_mse_sum_loss": ((S - T).sum(1).square() * pairs[:, 0]).sum() / pairs[:, 0].sum(),
        "att_ce_loss": (ce(S, T) * rows).sum() / rows.sum(),
        "att_ce_mean_loss": (ce(S.mean(1, keepdim=True), T.mean(1, keepdim=True)) * rows[:, :1]).sum() / mask.sum(),
    }
    for name, value in expected.items():
        actual = getattr(compat, name)(q_S, k_S, q_T, k_T, mask)
        assert relative_difference(actual, value) < 1e-5, name
        whole = getattr(compat, name)(q_S, k_S, q_T, k_T)
        assert relative_difference(getattr(compat, name)(q_S, k_S, q_T, k_T, torch.ones_like(mask)), whole) < 1e-5


def test_textbrewer_mmd() -> None:
    (s1, s2), (t1, t2) = ([torch.randn(2, 9, D, device=DEVICE) for _ in range(2)] for D in (16, 24))
    d = s1 @ s2.mT / 16 - t1 @ t2.mT / 24
    assert relative_difference(compat.mmd_loss((s1, s2), (t1, t2)), d.square().mean()) < 1e-5
    mask = half_of(2, 9).long()
    pairs = mask[:, :, None] * mask[:, None]
    expected = (d.square() * pairs).sum() / pairs.sum()
    assert relative_difference(compat.mmd_loss((s1, s2), (t1, t2), mask), expected) < 1e-5


Q, BOOL = (2, 3, 9, 8), torch.bool


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q_student": [1.0]}, TypeError, "q_student must be a tensor"),
        ({"k_teacher": torch.ones(Q, dtype=torch.int64)}, TypeError, "k_teacher must be float64"),
        ({"q_student": torch.ones(2, 9, 24)}, ValueError, r"q_student must have shape \(B, H, N, d\)"),
        ({"k_student": torch.ones(2, 3, 0, 8)}, ValueError, "k_student must not be empty"),
        ({"k_student": torch.ones(2, 3, 9, 16)}, ValueError, "must agree in images, heads and width"),
        ({"q_teacher": torch.ones(2, 2, 9, 8)}, ValueError, "q_teacher .* must agree in images, heads and width"),
        ({"q_student": torch.ones(2, 3, 10, 8)}, ValueError, "give both class tokens or neither"),
        ({n: torch.ones(2, 2, 9, 8) for n in ("q_teacher", "k_teacher")}, ValueError, "got 3 and 2.*heads='mean'.*qkv"),
        ({"k_teacher": torch.ones(Q, device="meta")}, ValueError, "k_teacher must be on the device of q_student"),
        ({"q_teacher": torch.ones(Q, requires_grad=True)}, ValueError, "q_teacher is a constant.*detach it"),
        ({"bias_teacher": torch.ones(9, 9, requires_grad=True)}, ValueError, "bias_teacher is a constant.*detach it"),
        ({"bias_student": torch.ones(9, 8)}, ValueError, r"bias_student must broadcast .* \(2, 3, 9, 9\)"),
        ({"bias_student": torch.ones(1, 2, 3, 9, 9)}, ValueError, "bias_student must have shape broadcastable"),
        ({"bias_student": torch.ones(9, 9, dtype=BOOL)}, TypeError, "bias_student must be float64"),
        ({"key_mask": torch.ones(2, 9)}, TypeError, r"key_mask must be a bool tensor .* got torch.float32"),
        ({"key_mask": torch.ones(2, 8, dtype=BOOL)}, ValueError, r"key_mask must have shape \(B, N_k\) = \(2, 9\)"),
        ({"query_mask": torch.ones(9, dtype=BOOL)}, ValueError, r"query_mask must have shape \(B, N_q\) = \(2, 9\)"),
        ({"query_mask": [True]}, TypeError, "query_mask must be a bool tensor"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"temperature": -1}, ValueError, "temperature must be a finite number > 0"),
        ({"temperature": INF}, ValueError, "temperature must be a finite number > 0"),
        ({"temperature": torch.ones(())}, TypeError, "temperature must be a Python number"),
        ({"scale_student": INF}, ValueError, "scale_student must be a finite number"),
        ({"divergence": "l2"}, ValueError, "divergence must be one of 'kl', 'reverse_kl'"),
        ({"heads": "max"}, ValueError, "heads must be one of 'match', 'mean'"),
        ({"heads": "mean", "divergence": "score_mse"}, ValueError, "use 'mse'"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        (
            {n: torch.ones(2, 3, 5, 8) for n in ("q_teacher", "q_student")} | {"is_causal": True},
            ValueError,
            "got 5 and 9",
        ),
        ({"query_slice": slice(9, None)}, ValueError, "at least one of the 9 queries"),
        ({"query_slice": slice(3, 3)}, ValueError, "at least one of the 9 queries"),
        ({"query_slice": slice(None, None, -1)}, ValueError, "must step forward"),
        ({"query_slice": 0}, TypeError, "query_slice must be a slice, got int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, eager, native, triton"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("q_student", "k_student", "q_teacher", "k_teacher")
    arguments: dict[str, object] = {name: torch.ones(Q) for name in names}
    with pytest.raises(error, match=message):
        fastkd.attention_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"relation_heads": 5}, ValueError, "student width 16 must be divisible by relation_heads = 5"),
        ({"relation_heads": 16}, ValueError, "teacher width 24 must be divisible by relation_heads = 16"),
        ({"relation_heads": 0}, ValueError, "relation_heads must be at least 1"),
        ({"relation_heads": 2.0}, TypeError, "relation_heads must be an int"),
        ({"relations": ()}, ValueError, "at least one"),
        ({"relations": "qk"}, ValueError, "relations must list pairs"),
        ({"relations": ("qk", "qx")}, ValueError, r"relations\[1\] must be one of 'qq'.* got 'qx'"),
        ({"weights": [1.0]}, ValueError, "one number per relation, got 1 for 3"),
        ({"weights": [1.0, -1.0, 1.0]}, ValueError, r"weights\[1\] must be a finite number >= 0"),
        ({"student": (torch.ones(2, 9, 16),) * 2}, ValueError, r"student must be a triple \(q, k, v\), got 2"),
        ({"student": (torch.ones(2, 9),) * 3}, ValueError, r"student q must have shape \(B, N, D\)"),
        ({"student": (*[torch.ones(2, 9, 16)] * 2, torch.ones(2, 8, 16))}, ValueError, "must share one shape"),
        ({"teacher": (torch.ones(2, 9, 24, requires_grad=True),) * 3}, ValueError, "detach it"),
        ({"key_mask": torch.ones(2, 8, dtype=BOOL)}, ValueError, "key_mask must have shape"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_bad_relations(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"student": (torch.ones(2, 9, 16),) * 3, "teacher": (torch.ones(2, 9, 24),) * 3, "relation_heads": 4}
    with pytest.raises(error, match=message):
        fastkd.qkv_relation_loss(**(arguments | change))


def test_bad_layers() -> None:
    pair = (torch.ones(Q), torch.ones(Q))
    with pytest.raises(ValueError, match="got 3 for 2 layers"):
        compat.tinybert_att_loss([pair] * 2, [pair] * 3)
    with pytest.raises(ValueError, match="got 1 for 0 layers"):
        compat.tinybert_att_loss([], [pair])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend: str, reduction: str) -> None:
    q, k, tq, tk = operands(1, 2, 5, 5, 8, 8)
    q.requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return fastkd.attention_loss(q, k, tq, tk, reduction=reduction, backend=backend).sum()

    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*fastkd\.reference\.attention_loss"):
        torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not support torch\.vmap"):
        torch.func.grad(loss)(q.detach())
    value = loss(q)
    first = torch.autograd.grad(value, q, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, q)[0])
