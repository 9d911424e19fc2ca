"""relation_loss, manifold_loss and the modules and signatures made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import compat, losses, reference
from fastkd._precision import matrix_gain
from fastkd.eager import _common
from fastkd.ops import relation as ops
from fastkd.ops._dispatch import INTERPRETED
from fastkd.ops.relation import cheaper, draw_rows, pick_algorithm, pick_of_digits
from fastkd.testing import (
    DEVICE,
    assert_matches_oracle,
    backends,
    loss_and_gradients,
    peak_extra_memory,
    relative_difference,
    strided,
    thresholds,
)
from tests._support import golden
from tests._support.pairs import in_pairs
from tests._support.splits import around, on_every_number_of_threads

BACKENDS = backends("relation_fwd")
SCOPES = ["intra", "inter", "batch"]
# (B, N, Ds, Dt): below any tile; one past a tile of 64; DeiT-Tiny and -Small with class token.
SHAPES = [(4, 7, 24, 80), (5, 65, 80, 24), (6, 197, 192, 384)]
if INTERPRETED:  # a program takes milliseconds there: the last is one past a tile of 64 in scope batch
    SHAPES = [(4, 7, 24, 80), (5, 15, 72, 40)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists() or DEVICE != "cpu", reason="reads /proc, on a CPU")


def features(B: int, N: int, Ds: int, Dt: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens with a common direction, as real ones have: similarities of both signs, mostly positive."""
    return tuple(  # type: ignore[return-value]
        (torch.randn(B, N, D, device=DEVICE) + 0.5 * torch.randn(1, 1, D, device=DEVICE)).to(dtype) for D in (Ds, Dt)
    )


def with_short_rows(student: Tensor, teacher: Tensor) -> None:
    """Rows whose norm is below 0.1 and above any other eps."""
    student[:, 1::4] *= 2**-10
    teacher[:, ::5] *= 2**-10


def oracle_of(
    student: Tensor, teacher: Tensor, dtype: torch.dtype, incoming: float = 1.0, **options: object
) -> tuple[Tensor, ...]:
    """(loss, dstudent) of the reference in another dtype."""
    s, t = (x.to(dtype) for x in (student, teacher))
    return loss_and_gradients(lambda s: reference.relation_loss(s, t, **options), [s], incoming)


def check(student: Tensor, teacher: Tensor, n: int, incoming: float = 1.0, **options: object) -> None:
    """Hold fastkd.relation_loss to the oracle rule, with options common to both sides beside backend, algorithm."""
    shared = {k: v for k, v in options.items() if k not in ("backend", "algorithm")}

    actual = loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, **options), [student], incoming)
    oracle, eager = (oracle_of(student, teacher, dtype, incoming, **shared) for dtype in (torch.float64, student.dtype))
    for name, a, e, o in zip(("loss", "dstudent"), actual, eager, oracle, strict=True):
        if student.dtype == torch.float64:  # eager is the oracle itself
            assert relative_difference(a, o) < 1e-11, name
        else:
            assert_matches_oracle(a, e, o, n * student.shape[-1], name)


LAYOUTS = ["contiguous", "permuted", "sliced", "offset", "channels"]


@pytest.mark.parametrize("backend", BACKENDS)
@in_pairs(
    {
        "dtype": DTYPES,
        "scope": SCOPES,
        "shape": SHAPES,
        "rectify": ["none", "both", "teacher"],
        "normalize": [True, False],
        "eps": [1e-12, 0.1],
        "layout": LAYOUTS,
        "teacher_layout": LAYOUTS,
        "incoming": [1.0, -3.0],
    },
    allowed=lambda x: x.get("dtype") != torch.float16 or x.get("normalize") is not False,  # gradients beyond 65,504
)
def test_tile_matches_oracle(
    backend: str,
    dtype: torch.dtype,
    scope: str,
    shape: tuple[int, ...],
    rectify: str,
    normalize: bool,
    eps: float,
    layout: str,
    teacher_layout: str,
    incoming: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_common, "CHUNK", 7000)  # several strips and a tail at these sizes
    n = {"intra": shape[1], "inter": shape[0], "batch": shape[0] * shape[1]}[scope]
    student, teacher = features(*shape, dtype)
    with_short_rows(student, teacher)
    check(
        strided(student, layout),
        strided(teacher, teacher_layout),
        n,
        incoming,
        scope=scope,
        rectify=rectify,
        normalize=normalize,
        eps=eps,
        backend=backend,
        algorithm="tile",
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("rectify", ["none", "both", "teacher"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tile_matches_oracle(
    backend: str, dtype: torch.dtype, scope: str, shape: tuple[int, ...], rectify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_common, "CHUNK", 7000)
    n = {"intra": shape[1], "inter": shape[0], "batch": shape[0] * shape[1]}[scope]
    check(*features(*shape, dtype), n, scope=scope, rectify=rectify, backend=backend, algorithm="tile")


@pytest.mark.parametrize("chunk", [1, 40, 400])
@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("scope", SCOPES)
def test_eager_chunks(scope: str, algorithm: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, a few at a time, and several groups at a time with a tail."""
    monkeypatch.setattr(_common, "CHUNK", chunk)
    for rectify in ("none", "both") if algorithm == "tile" else ("none",):
        student, teacher = features(7, 6, 3, 2, torch.float64)
        with_short_rows(student, teacher)
        check(student, teacher, 42, scope=scope, rectify=rectify, eps=0.1, backend="eager", algorithm=algorithm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_totals_beside_a_large_term(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of about 0.5 beside one of 2²³: a float32 in which they were added up would round each of them away."""
    if backend == "triton":
        monkeypatch.setattr(pytest.importorskip("fastkd_kernels.relation"), "SUM_BLOCK", 1)
    large, small = 2900.0**0.5, (0.49 / 4) ** 0.25

    def relative_error(student: Tensor, total: float) -> float:
        loss = fastkd.relation_loss(
            student, torch.zeros_like(student), normalize=False, backend=backend, algorithm="tile"
        )
        return abs(loss.item() * student.shape[0] * student.shape[1] ** 2 / total - 1)

    groups = torch.zeros(101, 2, 2, device=DEVICE)  # a large one, then 100 small ones
    groups[1:, :, 1] = small
    groups[0, 0, 0] = large
    assert relative_error(groups, large**4 + 100 * 0.49) < 1e-6
    if backend == "native":
        rows = torch.zeros(1, 2048, 2)  # of one map, in blocks of 8 rows and 256 columns
        rows[:, 1:, 1] = small = (0.24 / 2048) ** 0.25
        rows[:, 0, 0] = large
        assert relative_error(rows, large**4 + 2047**2 * small**4) < 1e-6


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("scope", "shape"),
    [
        ("intra", (1, 650, 48, 80)),  # shared by all threads
        ("intra", (2, 517, 48, 80)),  # three blocks of a map, the last of few rows, operands read in place
        ("intra", (4, 517, 24, 40)),  # copied, for their rows are no whole vectors
        ("inter", (517, 2, 32, 48)),  # copied, for their rows lie far apart
        ("intra", (1, 70, 4100, 16)),  # a block of so wide rows is a quarter of others
        ("intra", (7, 40, 32, 48)),  # threads with unequal shares of the groups
        ("intra", (4, 3, 16, 32)),  # rows as wide as there are: a whole map at a time, of fewer rows than a tile,
        ("intra", (5, 49, 64, 80)),  # of one more than whole tiles,
        ("intra", (3, 51, 72, 56)),  # of three more, the rows copied,
        ("inter", (50, 5, 64, 64)),  # of two more, the gradient's rows far apart,
        ("intra", (2, 203, 208, 224)),  # and shared by all threads
    ],
    ids=str,
)
def test_blocks_of_a_map(scope: str, shape: tuple[int, ...], threads: int) -> None:
    """A thread takes a group's map whole or its blocks in pairs; threads share what is no whole round of groups."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        student, teacher = features(*shape)
        n = shape[0 if scope == "inter" else 1]
        check(student, teacher, n, scope=scope, rectify="teacher", backend="native", algorithm="tile")
        options = {"scope": scope, "backend": "native", "algorithm": "tile"}
        loss = fastkd.relation_loss(student, teacher, **options)
        expected = reference.relation_loss(student.double(), teacher.double(), scope=scope)
        assert relative_difference(loss, expected) < 1e-5
        once, again = (
            loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, **options), [student]) for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))  # whoever was faster
    finally:
        torch.set_num_threads(before)


class Split(NamedTuple):
    """A size at which the native kernels split their work, lowered, and inputs of a size around it."""

    lowered: dict[str, int]
    size: int
    shape: Callable[[int], tuple[int, ...]]  # (B, N, Ds, Dt)
    dtype: torch.dtype = torch.float32
    scope: str = "intra"
    algorithm: str = "tile"


def maps_of(widths: tuple[int, int], groups: int = 2) -> Callable[[int], tuple[int, ...]]:
    return lambda n: (groups, n, *widths)


# Maps of at most (Ds + Dt) / 2 rows are formed whole, others in blocks. Five groups: some threads have one more.
NARROW, WIDE = (8, 5), (48, 80)
PAIRS = (64, 96)  # whole vectors of bfloat16
IN_PAIRS = {"matmul_bf16_products": 4}
EMULATED = {"matmul_bf16_products": 2, "relation_matrix_rows": 1}
BLOCKS = {"relation_panel_rows": 16}
SHARED_BLOCKS = BLOCKS | {"relation_shared_blocks": 1, "relation_shared_rows": 17}
SPLITS = {
    "strips": Split({"relation_strip_rows": 4}, 4, maps_of(NARROW), torch.float64),
    "pieces": Split({"relation_strip_rows": 3, "relation_strip_columns": 16}, 16, maps_of(NARROW), torch.float64),
    "strips_inter": Split(
        {"relation_strip_rows": 3, "relation_strip_columns": 16},
        16,
        lambda n: (n, 2, *NARROW),
        torch.float64,
        "inter",
    ),
    "panel_rows": Split({"relation_panel_rows": 16}, 16, maps_of(NARROW)),
    "panel_bytes": Split({"relation_panel_bytes": 1, "relation_panel_rows": 64}, 64, maps_of((16, 16))),
    "whole_rows": Split({"relation_panel_rows": 21}, 21, maps_of(WIDE)),
    "whole_bytes": Split({"relation_panel_bytes": 21 * 80 * 4}, 21, maps_of(WIDE)),
    "whole_inter": Split({"relation_panel_rows": 21}, 21, lambda n: (n, 2, *WIDE), scope="inter"),
    "whole_bf16": Split(IN_PAIRS | {"relation_panel_rows": 21}, 21, maps_of(WIDE), torch.bfloat16),
    "whole_pairs": Split({"relation_panel_rows": 21}, 21, maps_of(PAIRS), torch.bfloat16),
    "whole_pairs_inter": Split(
        IN_PAIRS | {"relation_panel_rows": 21}, 21, lambda n: (n, 2, *PAIRS), torch.bfloat16, scope="inter"
    ),
    "shared_pairs": Split(
        IN_PAIRS | {"relation_shared_maps": 17 * 17 * (3 * 64 + 96)}, 17, maps_of(PAIRS, 5), torch.bfloat16
    ),
    "words": Split(BLOCKS, 32, maps_of(PAIRS), torch.bfloat16),
    "words_emulated": Split(IN_PAIRS | BLOCKS, 32, maps_of(PAIRS), torch.bfloat16),
    "words_inter": Split(IN_PAIRS | BLOCKS, 32, lambda n: (n, 2, *PAIRS), torch.bfloat16, "inter"),
    "words_of_student": Split(BLOCKS, 32, maps_of((64, 40)), torch.bfloat16),
    "words_of_teacher": Split(IN_PAIRS | BLOCKS, 32, maps_of((40, 64)), torch.bfloat16),
    "words_shared": Split(SHARED_BLOCKS, 32, maps_of(PAIRS, 5), torch.bfloat16),
    "words_shared_inter": Split(IN_PAIRS | SHARED_BLOCKS, 32, lambda n: (n, 5, *PAIRS), torch.bfloat16, "inter"),
    "words_of_many_rows": Split(
        BLOCKS | {"relation_wide_bytes": 33 * (64 + 96) * 4}, 33, maps_of(PAIRS), torch.bfloat16
    ),
    "words_shared_by_many": Split(SHARED_BLOCKS | {"relation_wide_bytes": 1}, 33, maps_of(PAIRS, 5), torch.bfloat16),
    "wide_bytes": Split(BLOCKS | {"relation_wide_bytes": 33 * (48 + 80) * 4}, 33, maps_of(WIDE), torch.float16),
    "wide_copies": Split(BLOCKS, 32, maps_of(WIDE), torch.float16),
    "wide_inter": Split(BLOCKS, 32, lambda n: (n, 2, *WIDE), scope="inter"),
    "wide_shared": Split(SHARED_BLOCKS, 32, maps_of((13, 9), 5), torch.float16),
    "shared_rows": Split({"relation_shared_blocks": 1, "relation_shared_rows": 33}, 33, maps_of(NARROW, 5)),
    "shared_blocks": Split(
        {"relation_shared_blocks": 32 * 32 * (3 * 8 + 5), "relation_shared_rows": 17, "relation_panel_rows": 16},
        32,
        maps_of(NARROW, 5),
    ),
    "shared_in_place": Split(SHARED_BLOCKS, 32, maps_of((16, 5), 5)),
    "shared_maps": Split({"relation_shared_maps": 17 * 17 * (3 * 48 + 80)}, 17, maps_of(WIDE, 5)),
    "shared_copies": Split({"relation_shared_maps": 1}, 16, lambda n: (n, 5, 56, 72), scope="inter"),
    "few_groups": Split(
        {"relation_few_groups": 2, "relation_shared_maps": 1, "relation_shared_blocks": 1}, 6, lambda G: (G, 20, *WIDE)
    ),
    "matrix_rows": Split(EMULATED | {"relation_matrix_rows": 9}, 9, maps_of((6, 18)), torch.bfloat16),
    "matrix_strips": Split(EMULATED | {"relation_strip_rows": 4}, 4, maps_of((6, 18)), torch.bfloat16),
    "matrix_pieces": Split(
        EMULATED | {"relation_strip_rows": 3, "relation_strip_columns": 16}, 16, maps_of((18, 6)), torch.bfloat16
    ),
    "depth": Split({"matmul_depth": 5, "relation_strip_rows": 7}, 5, maps_of(NARROW), torch.float64),
    "gram_rows": Split({"relation_gram_rows": 16}, 16, maps_of((13, 9)), algorithm="gram"),
    "gram_columns": Split(
        {"relation_gram_columns": 6, "relation_gram_rows": 8},
        6,
        lambda D: (2, 33, D, 5),
        torch.float64,
        algorithm="gram",
    ),
}
ON_GENERAL = ["strips", "pieces", "strips_inter", "gram_rows", "gram_columns"]  # matrix products


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize(
    "options", [{}, {"normalize": False, "rectify": "both"}, {"rectify": "teacher", "eps": 0.1}], ids=str
)
@pytest.mark.parametrize(("split", "products"), [(n, 2) for n in SPLITS] + [(n, 3) for n in SPLITS if n in ON_GENERAL])
def test_native_splits(split: str, products: int, options: dict) -> None:
    """On any number of threads the values are the oracle's, and equal bits on as many threads. products: our own, or
    the library's."""
    lowered, split_at, shape_of, dtype, scope, algorithm = SPLITS[split]
    if algorithm == "gram":
        options = {k: v for k, v in options.items() if k != "rectify"}
    for size in around(split_at):
        shape = shape_of(size)
        student, teacher = features(*shape, dtype)
        if "eps" in options:
            with_short_rows(student, teacher)
        n = shape[0 if scope == "inter" else 1]
        shared = {"scope": scope, **options}
        oracle = oracle_of(student, teacher, torch.float64, **shared)
        # Grams lose digits where they cancel, in every form; float64 maps would be the oracle itself.
        form = {"backend": "eager", "algorithm": algorithm}
        eager = loss_and_gradients(partial(fastkd.relation_loss, teacher=teacher, **form, **shared), [student])
        with thresholds(matmul_own_products=products, **lowered):
            call = partial(fastkd.relation_loss, teacher=teacher, backend="native", algorithm=algorithm, **shared)
            for actual in on_every_number_of_threads(partial(loss_and_gradients, call, [student])):
                for name, a, e, o in zip(("loss", "dstudent"), actual, eager, oracle, strict=True):
                    assert_matches_oracle(a, e, o, n * shape[2], f"{name} of size {size}")
                with torch.no_grad():  # forms no gradient, and splits otherwise
                    alone = call(student)
                assert_matches_oracle(alone, eager[0], oracle[0], n * shape[2], f"loss alone, size {size}")


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("strides", [(40 * 65, 65, 1), (40 * 64 + 1, 64, 1), (40 * 66, 66, 1), (64, 128, 1)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_bfloat16_rows_anywhere(offset: int, strides: tuple[int, int, int]) -> None:
    """Two numbers are read as one word only where they make one."""
    student, teacher = features(2, 40, 64, 96, torch.bfloat16)
    given = torch.ones(2 * 40 * 66 + 2, dtype=torch.bfloat16).as_strided(student.shape, strides, offset)
    given.copy_(student)
    call = partial(fastkd.relation_loss, teacher=teacher, backend="native", algorithm="tile")
    with thresholds(**BLOCKS):
        results = [loss_and_gradients(call, [x]) for x in (student, given)]
    for expected, actual in zip(*results, strict=True):
        assert relative_difference(actual, expected) < 4 * torch.finfo(torch.bfloat16).eps ** 2


@pytest.mark.parametrize("n", [7, 70])  # below and in whole tiles of a matrix unit
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_rows_of_tiny_norms(backend: str, n: int) -> None:
    """Instructions for bfloat16 take their products for 0; the rows count, down to eps."""
    student, teacher = features(2, n, 128, 192, torch.bfloat16)
    norm = student.float().norm(dim=-1, keepdim=True)
    tiny = (student.float() / norm * 4e-18).to(torch.bfloat16)
    call = partial(fastkd.relation_loss, eps=0.0, algorithm="tile", backend=backend)
    found = loss_and_gradients(lambda s: call(s, teacher) * 2.0**-60, [tiny])
    oracle = oracle_of(tiny, teacher, torch.float64, eps=0.0)
    assert relative_difference(found[0] * 2.0**60, oracle[0]) < 1e-5
    assert relative_difference(found[1].double() * 2.0**60, oracle[1]) < 1e-2


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("n", [7, 40, 100])  # whole maps, and blocks of them
@pytest.mark.parametrize("scale", [1e-20, 1e-18])
def test_signs_of_tiny_bfloat16_products(n: int, scale: float) -> None:
    """They decide which similarities of raw rows are clamped, and pass no gradient."""
    student, teacher = features(2, n, 64, 32, torch.bfloat16)
    student[0, 3] *= scale
    student[1] *= scale
    options = {"normalize": False, "rectify": "both"}
    call = partial(fastkd.relation_loss, teacher=teacher, algorithm="tile", backend="native", **options)
    (_, gradient), (_, oracle) = (
        loss_and_gradients(call, [student], 2.0**80),
        oracle_of(student, teacher, torch.float64, **options),
    )
    error = (gradient.double() * 2.0**-80 - oracle).norm(dim=-1)
    assert (error <= 0.01 * oracle.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("scope", "shape"),
    [
        ("intra", (2, 197, 24, 40)),
        ("inter", (130, 5, 16, 24)),
        ("batch", (5, 65, 80, 24)),
        ("batch", (6, 197, 192, 384)),
    ][: 3 if INTERPRETED else None],  # the last has a thousand steps there
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gram_matches_oracle(
    backend: str, dtype: torch.dtype, scope: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is the cheaper algorithm; with fewer rows than columns the Grams' difference cancels."""
    monkeypatch.setattr(_common, "CHUNK", 7000)
    n = {"intra": shape[1], "inter": shape[0], "batch": shape[0] * shape[1]}[scope]
    assert pick_algorithm(n, *shape[2:], "none", torch.device("cpu")) == "gram"
    check(*features(*shape, dtype), n, scope=scope, backend=backend, algorithm="gram")


@pytest.mark.parametrize(("rectify", "normalize"), [("both", True), ("none", False)])
@pytest.mark.parametrize(
    ("form", "Ds", "dtype"),
    [
        ("groups", 136, torch.bfloat16),
        ("groups", 32, torch.float32),
        ("whole maps", 136, torch.float16),
        ("strips", 392, torch.float16),
        ("strips", 24, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_every_form_of_the_kernels(
    backend: str, dtype: torch.dtype, form: str, Ds: int, rectify: str, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short groups by a program each, long ones by whole maps, or by strips of them: rows and memory decide."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    if form != "groups":
        monkeypatch.setattr(kernels, "GROUP_ROWS", 0)
    if form == "strips":
        monkeypatch.setattr(kernels, "STRIP_BYTES", 0)
    N = 67 if dtype == torch.float32 else 131  # one tile and a tail
    student, teacher = features(1 if form == "strips" else 2, N, Ds, 48, dtype)
    options = {"rectify": rectify, "normalize": normalize}
    check(student, teacher, N, backend=backend, algorithm="tile", **options)
    with torch.no_grad():  # another kernel, and no gradient
        loss = fastkd.relation_loss(student, teacher, backend=backend, algorithm="tile", **options)
    expected = reference.relation_loss(student.double(), teacher.double(), **options)
    assert relative_difference(loss, expected) < 1e-5


TRITON = [name for name in BACKENDS if name == "triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"rectify": "both", "eps": 0.1}], ids=str)
@pytest.mark.parametrize("backend", TRITON)
def test_several_maps_at_a_time(
    backend: str, options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three maps, then the last; their gradient in small tiles, for there are more multiprocessors."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 1000)
    monkeypatch.setattr(kernels, "GROUP_ROWS", 0)
    student, teacher = features(3, 9, 136, 24, dtype)
    scale = torch.tensor([1.0, 8.0, 1 / 8], device=DEVICE)[:, None, None]  # a W of raw rows has a scale for each group
    student, teacher = ((x * scale).to(dtype) for x in (student, teacher))
    with_short_rows(student, teacher)
    pitch = kernels.Alike([student], [teacher], normalize=True, eps=0.0).map.BLOCK_M
    monkeypatch.setattr(kernels, "STRIP_BYTES", 4 * pitch * (2 * pitch + 5))
    check(student, teacher, 9, backend=backend, algorithm="tile", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("architecture", ["8.x", "10.x", "cdna"])
@pytest.mark.parametrize("backend", TRITON)
def test_tiles_of_other_architectures(
    backend: str, architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("fastkd_kernels.relation")
    monkeypatch.setattr(kernels, "architecture", lambda _: architecture)
    student, teacher = features(1, 67, 72, 24, dtype)
    check(student, teacher, 67, backend=backend, algorithm="tile")
    monkeypatch.setattr(kernels, "GROUP_ROWS", 66)
    check(student, teacher, 67, backend=backend, algorithm="tile")


@dataclass(frozen=True)
class Noted:
    """A kernel whose launches are noted by name."""

    kernel: Any
    name: str
    launches: list[str]

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(self.name)
        return self.kernel[grid]


def note_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which every kernel launched from now on adds its name."""
    kernels, launches = pytest.importorskip("fastkd_kernels.relation"), []
    for name in [name for name in vars(kernels) if name.startswith("_relation") and name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Noted(getattr(kernels, name), name, launches))
    return launches


@pytest.mark.parametrize("scope", ["intra", "inter"])
@pytest.mark.parametrize("backend", TRITON)
def test_tails_of_short_groups(backend: str, scope: str) -> None:
    """Last tiles of 16 or 32 rows, one row less and one more than fill them."""
    for n in (*around(16), *around(32), *around(64), 80):
        student, teacher = features(2, n, 24, 8, torch.bfloat16)
        if scope == "inter":
            student, teacher = (x.transpose(0, 1).contiguous() for x in (student, teacher))
        check(student, teacher, n, scope=scope, backend=backend, algorithm="tile")


@pytest.mark.parametrize("backend", TRITON)
def test_long_groups_have_maps(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("fastkd_kernels.relation")
    monkeypatch.setattr(kernels, "GROUP_ROWS", 20)
    launches = note_launches(monkeypatch)
    for n in around(20):
        launches.clear()
        check(*features(2, n, 32, 16), n, backend=backend, algorithm="tile")
        assert ("_relation_group_kernel" in launches) == (n <= 20)
        assert ("_relation_map_kernel" in launches) == (n > 20)


@pytest.mark.parametrize("backend", TRITON)
def test_float32_products_in_float16_terms(backend: str) -> None:
    """The gradient of one number's loss x⁴ is 4 x² x: each product has three roundings to 22 bits."""
    x = (1 + torch.rand(32, 1, 1, device=DEVICE)) * 2.0 ** torch.randint(-9, 9, (32, 1, 1), device=DEVICE)
    zero = torch.zeros_like(x)
    _, gradient = loss_and_gradients(
        lambda s: fastkd.relation_loss(s, zero, normalize=False, algorithm="tile", backend=backend), [x]
    )
    error = (32 * gradient.double() / (4 * x.double() ** 3) - 1).abs()
    assert error.max() <= 7 * 2**-22 and error.mean() <= 2**-22


FORMS = {
    "tile": {"algorithm": "tile"},
    "gram": {"algorithm": "gram"},
    "both": {"algorithm": "tile", "rectify": "both"},
    "teacher": {"algorithm": "tile", "rectify": "teacher"},
    "manifold": None,
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@in_pairs(
    {
        "form": list(FORMS),
        "scope": SCOPES,
        "dtype": [torch.float32, torch.bfloat16],
        "tokens": [(2, 9), (2, 70)],
        "huge": [(0,), (1,), (0, 1)],
    }
)
def test_rows_whose_squares_leave_float32(
    backend: str, form: str, scope: str, dtype: torch.dtype, tokens: tuple[int, int], huge: tuple[int, ...]
) -> None:
    """Such rows relate as others do: powers of two change no bit, and the gradient is by their inverse."""
    # float32 of either dtype's numbers, because the rows that are scaled are held in it.
    rows = [x.to(dtype).float() for x in features(*tokens, 72, 96)]
    rows = [x / 2.0 ** x.abs().amax(-1, keepdim=True).log2().floor() for x in rows]
    scales = [torch.ones(*tokens, 1, device=DEVICE) for _ in rows]
    for i in huge:
        scales[i][:, ::2] = 2.0**100
        scales[i][:, 1] = 2.0**66

    def loss(s: Tensor, t: Tensor) -> Tensor:
        if form == "manifold":
            return fastkd.manifold_loss(s, t, index=torch.arange(7, device=DEVICE), backend=backend)
        return fastkd.relation_loss(s, t, scope=scope, backend=backend, **FORMS[form])

    expected, gradient = loss_and_gradients(lambda s: loss(s, rows[1]), [rows[0]])
    s, t = ((x * scale).to(dtype) for x, scale in zip(rows, scales, strict=True))
    actual, of_scaled = loss_and_gradients(lambda s: loss(s, t), [s])
    if backend == "native":
        assert torch.equal(actual, expected)
        assert torch.equal(of_scaled, (gradient / scales[0]).to(dtype))
    else:  # inverse norms below 2^-126 have fewer bits
        assert relative_difference(actual, expected) < 1e-5
        assert relative_difference(of_scaled * scales[0], gradient) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", TRITON)
def test_float32_rows_of_any_size(backend: str, normalize: bool) -> None:
    """Rows are scaled before float16 holds them: the values do not depend on their scale, and entries far below the
    largest of their row count too."""
    student, teacher = features(2, 20, 32, 48)
    student[:, :, 0] *= 2.0**12
    options = {"normalize": normalize, "backend": backend, "algorithm": "tile"}
    check(student, teacher, 20, **options)
    loss, gradient = loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, **options), [student])
    for exponent in (-40, 40, 70) if normalize else (-12, 12):
        scale = 2.0**exponent
        other = teacher if normalize else teacher * scale
        scaled, of_scaled = loss_and_gradients(
            lambda s, t=other: fastkd.relation_loss(s, t, **options), [student * scale]
        )
        assert torch.equal(scaled, loss if normalize else loss * scale**4)
        assert torch.equal(of_scaled, gradient / scale if normalize else gradient * scale**3)


@pytest.mark.parametrize("backend", TRITON)
@in_pairs(
    {
        "scope": SCOPES,
        "dtype": DTYPES,
        "rows": [(2, 64), (2, 65), (3, 20)],
        "widths": [(17, 1), (24, 40), (60, 8)],
        "limits": [{}, {"GRAM_BYTES": 1}, {"GRAM_BYTES": 40_000}, {"GRAM_ROWS": 64}],
        "normalize": [True, False],
        "layout": LAYOUTS,
    },
    allowed=lambda x: x.get("dtype") != torch.float16 or x.get("normalize") is not False,  # gradients beyond 65,504
)
def test_grams_in_pieces(
    backend: str,
    scope: str,
    dtype: torch.dtype,
    rows: tuple[int, int],
    widths: tuple[int, int],
    limits: dict[str, int],
    normalize: bool,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One group and 64 rows a launch, some groups with a tail, all of them; a sum per 64 rows. Widths below a tile of
    a Gram matrix, of one, and of two with a tail; as many rows as a piece has, fewer and more."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    for name, value in limits.items():
        monkeypatch.setattr(kernels, name, value)
    groups, n = rows
    student, teacher = features(*(rows[::-1] if scope == "inter" else rows), *widths, dtype)
    with_short_rows(student, teacher)
    n = groups * n if scope == "batch" else n
    options = {"scope": scope, "normalize": normalize, "eps": 0.1, "backend": backend, "algorithm": "gram"}
    check(strided(student, layout), strided(teacher, layout), n, **options)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(("Ds", "Dt"), [(192, 24), (17, 140), pytest.param(17, 768, marks=pytest.mark.exhaustive)])
def test_grams_of_models_widths(backend: str, Ds: int, Dt: int) -> None:
    """Several pieces of a student's width, whose gradients are formed twice; a wide teacher; the loss alone."""
    student, teacher = features(2, 70, Ds, Dt, torch.bfloat16)
    options = {"scope": "batch", "backend": backend, "algorithm": "gram"}
    check(student, teacher, 140, **options)
    with torch.no_grad():
        alone = fastkd.relation_loss(student, teacher, **options)
    assert torch.equal(alone, fastkd.relation_loss(student, teacher, **options))
    assert relative_difference(alone, reference.relation_loss(student.double(), teacher.double(), scope="batch")) < 1e-6


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**20])
@pytest.mark.parametrize("backend", TRITON)
def test_grams_of_raw_rows_of_any_size(backend: str, scale: float) -> None:
    """Digits count from the largest number of a network: powers of two change no digit."""
    student, teacher = features(2, 20, 32, 48)
    student *= 2.0**-10
    options = {"scope": "batch", "normalize": False, "backend": backend, "algorithm": "gram"}
    check(student, teacher, 40, **options)
    loss, gradient = loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, **options), [student])
    scaled, of_scaled = loss_and_gradients(
        lambda s: fastkd.relation_loss(s, teacher * scale, **options), [student * scale]
    )
    assert torch.equal(scaled, loss * scale**4) and torch.equal(of_scaled, gradient * scale**3)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter finds sums that wrap")
def test_sums_of_digits_do_not_wrap() -> None:
    """The largest products, as many as a sum takes; twice as many wrap."""
    kernels = pytest.importorskip("fastkd_kernels.relation")

    def gram(rows: int) -> Tensor:
        planes = torch.full((1, 4, 1, rows), -128, dtype=torch.int8)
        grams = torch.empty(1, 1, 1, 16, 16, dtype=torch.float64)
        kernels._relation_gram_kernel[(1,)](
            planes, grams, D=1, pitch=rows, steps=rows // 1024, share=rows // 1024, pieces=1, tiles=1, first_row=0,
            BLOCK_D=16, BLOCK_N=1024,
        )  # fmt: skip
        return grams

    products = sum(pairs * 2.0 ** (14 + 8 * (4 - level)) for level, pairs in enumerate((1, 2, 3, 4, 3)))
    assert (gram(kernels.GRAM_ROWS) == kernels.GRAM_ROWS * products).all()
    with pytest.raises(OverflowError):
        gram(2 * kernels.GRAM_ROWS)


@pytest.mark.parametrize("backend", TRITON)
def test_layers_in_several_launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers at a time; rows drawn twice lie many draws apart, in pieces of the width."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    monkeypatch.setattr(kernels, "LAYERS", 3)
    monkeypatch.setattr(kernels, "SCATTER_BLOCK", (2, 16))
    layers = [features(1, 7, 24, 8) for _ in range(4)]
    students, teachers = [s for s, _ in layers], [t for _, t in layers]
    indices = [torch.tensor([i, 1, 2, 3, 4, i, 5, 6, i], device=DEVICE) for i in range(4)]

    def run(dtype: torch.dtype, of_layers: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return loss_and_gradients(of_layers, [s.to(dtype) for s in students])

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return run(
            dtype,
            lambda *s: torch.stack(
                [reference.manifold_loss(a, t.to(dtype), index=i) for a, t, i in zip(s, teachers, indices, strict=True)]
            ).mean(),
        )

    module = losses.ManifoldLoss(backend=backend)
    actual = run(torch.float32, lambda *s: module(s, teachers, indices=indices))
    for i, (a, e, o) in enumerate(zip(actual, expected(torch.float32), expected(torch.float64), strict=True)):
        assert_matches_oracle(a, e, o, 7 * 24, f"result {i}")


@pytest.mark.parametrize("scope", ["intra", "inter"])
@pytest.mark.parametrize("backend", TRITON)
def test_sums_over_strips(backend: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of a map writes no row of the next one, whose gradient may have the sum of other scopes still to read."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    shape = (1, 200) if scope == "intra" else (200, 1)
    student, teacher = features(*shape, 16, 24, torch.float16)
    index = torch.arange(5, device=DEVICE)
    call = partial(fastkd.manifold_loss, teacher=teacher, index=index, backend=backend)
    expected = loss_and_gradients(call, [student], 2.0**16)
    monkeypatch.setattr(kernels, "STRIP_BYTES", 1)
    for actual, whole in zip(loss_and_gradients(call, [student], 2.0**16), expected, strict=True):
        assert relative_difference(actual, whole) < 1e-3


@pytest.mark.parametrize("backend", TRITON)
def test_sums_between_scopes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 students they are float16 numbers, which keep 11 bits of small ones beside large ones of a row; once
    more where drawn rows are added. Gradients are seen before they are rounded."""
    kernels = pytest.importorskip("fastkd_kernels.relation")
    monkeypatch.setattr(kernels, "empty_gradient", lambda x, _: x.new_empty(x.shape, dtype=torch.float32))
    layers = [features(3, 5, D, 40, torch.bfloat16) for D in (72, 72, 24)]
    students, teachers = [s for s, _ in layers], [t for _, t in layers]
    for s in students:
        s *= 2.0 ** -torch.arange(s.shape[2], device=DEVICE).remainder(20)
        s[1, 2] *= 2.0**-100
    students[0][2, 3] = 0
    indices = [torch.tensor([1, 7, 7, 13, i], device=DEVICE) for i in range(3)]

    def run(inter: float, random: float) -> list[Tensor]:
        return list(kernels.manifold_fwd(students, teachers, indices, 1.0, inter, random, True)[2])

    actual = run(0.5, 1.0)
    monkeypatch.setattr(kernels.Alike, "sums", lambda self: None)
    for a, e, of_images, of_both in zip(actual, run(0.5, 1.0), run(0.0, 0.0), run(0.0, 1.0), strict=True):
        peak = torch.maximum(of_images.abs().amax(2, keepdim=True), of_both.abs().amax(2, keepdim=True))
        bound = 2**-11 * (of_images.abs() + of_both.abs()) + 2**-38 * peak + 2**-22 * e.abs()
        assert not torch.equal(a, e) and ((a - e).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_student(backend: str, dtype: torch.dtype) -> None:
    """Its gradient is a small difference of large terms: rounding those to 16 bits would show."""
    student, teacher = (x.double() for x in features(1, 131, 128, 256))
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        reference.relation_loss(student, teacher).backward()
        optimizer.step()
    # A scale at which float16 holds the gradient.
    check(student.detach().to(dtype), teacher.to(dtype), 131, 2.0**14, backend=backend, algorithm="tile")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_for_all(backend: str, scope: str) -> None:
    """A teacher's stride of 0."""
    student, teacher = features(3, 33, 24, 40)
    n = {"intra": 33, "inter": 3, "batch": 99}[scope]
    check(student, teacher[:1].expand(3, 33, 40), n, scope=scope, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stride_beyond_32_bits(backend: str) -> None:
    """One image: its own stride is never used, however large."""
    student, teacher = features(1, 9, 24, 24)
    far = student.as_strided((1, 9, 24), (2**32 + 3, 24, 1))
    check(far, teacher.as_strided((1, 9, 24), (2**32 + 3, 24, 1)), 9, backend=backend)
    loss = fastkd.relation_loss(far, teacher, scope="inter", backend=backend)
    assert loss <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_teacher_of_another_dtype(backend: str) -> None:
    student, teacher = (x.half() for x in features(2, 33, 24, 40))
    if backend == "triton":  # its 16-bit products are other instructions, rounded otherwise
        check(student, teacher.float(), 33, backend=backend)
        return
    same, mixed = (
        loss_and_gradients(lambda s: fastkd.relation_loss(s, t, backend=backend), [student])  # noqa: B023
        for t in (teacher, teacher.float())
    )
    assert all(torch.equal(a, b) for a, b in zip(same, mixed, strict=True))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_float64_teacher(backend: str) -> None:
    """Left to itself, a call whose teacher has the dtype that Triton lacks runs elsewhere."""
    student, teacher = features(2, 9, 24, 40)
    if backend == "triton":
        with pytest.raises(RuntimeError, match="float64"):
            fastkd.relation_loss(student, teacher.double(), backend=backend)
        return
    actual = fastkd.relation_loss(student, teacher.double(), backend=backend)
    assert relative_difference(actual, reference.relation_loss(student.double(), teacher.double())) < 1e-5


@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_rows(backend: str, algorithm: str) -> None:
    student, teacher = features(2, 33, 24, 40)
    check(student, teacher, 33, normalize=False, backend=backend, algorithm=algorithm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_an_index(backend: str) -> None:
    student, teacher = features(3, 33, 24, 40)
    index = torch.randint(0, 99, (50,), device=DEVICE)  # with repeats
    assert len(index.unique()) < 50
    check(student, teacher, 50, scope="batch", index=index, backend=backend)
    everything = fastkd.relation_loss(
        student, teacher, scope="batch", index=torch.arange(99, device=DEVICE), backend=backend
    )
    whole = fastkd.relation_loss(student, teacher, scope="batch", backend=backend)
    assert relative_difference(everything, whole) < 1e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_gradcheck(scope: str) -> None:
    student, teacher = features(2, 5, 4, 6, torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: reference.relation_loss(s, teacher, scope=scope), (student,))
    for backend in backends("relation_fwd", torch.float64):
        for algorithm in ("tile", "gram"):
            options = {"scope": scope, "algorithm": algorithm, "backend": backend}
            assert torch.autograd.gradcheck(lambda s, o=options: fastkd.relation_loss(s, teacher, **o), (student,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("case", golden.cases("manifold_intra", "manifold_inter", "manifold_random"), ids=golden.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_terms(backend: str, case: golden.Case, algorithm: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in backends("relation_fwd", torch.float64):
        pytest.skip("this backend has no float64")
    x = {k: v.to(DEVICE, dtype) if v.is_floating_point() else v.to(DEVICE) for k, v in golden.load(case).items()}
    scope = {"manifold_intra": "intra", "manifold_inter": "inter", "manifold_random": "batch"}[case["op"]]
    loss, grad = loss_and_gradients(
        lambda s: fastkd.relation_loss(
            s, x["in.teacher"], scope=scope, index=x.get("in.index"), algorithm=algorithm, backend=backend
        ),
        [x["in.student"]],
    )
    expected = x["grad.student"]
    if "edge" in case:  # a zero token: the official gradient there is 1e10, ours 0; the others agree
        zero = x["in.student"].norm(dim=-1) == 0
        assert zero.any() and (grad[zero] == 0).all()
        grad, expected = grad[~zero], expected[~zero]
    assert relative_difference(loss, x["loss"]) <= golden.tolerance(case, dtype, "loss")
    assert relative_difference(grad, expected) <= golden.tolerance(case, dtype, "grad")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", golden.cases("mf_loss"), ids=golden.name)
def test_golden_manifold_loss(case: golden.Case, dtype: torch.dtype) -> None:
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden.load(case).items()}
    p = case["params"]
    drop = p["drop_leading_student_tokens"]
    students = [x[f"in.student_block{i}"].requires_grad_() for i in p["s_id"]]
    teachers = [x[f"in.teacher_block{i}"] for i in p["t_id"]]
    module = losses.ManifoldLoss(intra=p["w_patch"], inter=p["w_sample"], random=p["w_rand"], num_samples=p["K"])
    indices = [x[f"in.index{layer}"] for layer in range(len(students))]
    loss, terms = module([s[:, drop:] for s in students], teachers, indices=indices, return_terms=True)
    grads = torch.autograd.grad(loss, students)
    assert relative_difference(loss, x["loss"]) <= golden.tolerance(case, dtype, "loss")
    for term, weight, part in zip(
        terms, ("w_patch", "w_sample", "w_rand"), ("patch_weighted", "sample_weighted", "rand_weighted"), strict=True
    ):
        assert relative_difference(p[weight] * term, x[f"loss.{part}"]) <= golden.tolerance(case, dtype, "loss"), part
    for i, grad in zip(p["s_id"], grads, strict=True):
        assert relative_difference(grad, x[f"grad.student_block{i}"]) <= golden.tolerance(case, dtype, "grad")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", golden.cases("gram_loss"), ids=golden.name)
def test_golden_gram_loss(case: golden.Case, dtype: torch.dtype) -> None:
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden.load(case).items()}
    p = case["params"]
    module = compat.GramLoss(
        apply_norm=p["apply_norm"],
        remove_neg=p["remove_neg"],
        remove_only_teacher_neg=p["remove_only_teacher_neg"],
    )
    loss, grad = loss_and_gradients(lambda s: module(s, x["in.teacher"], img_level=p["img_level"]), [x["in.student"]])
    assert relative_difference(loss, x["loss_f64"]) <= golden.tolerance(case, dtype, "loss")
    assert relative_difference(grad, x["grad_f64.student"]) <= golden.tolerance(case, dtype, "grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_mf_loss_is_the_three_terms(backend: str) -> None:
    student, teacher = features(3, 9, 16, 24)
    index = torch.randperm(27, device=DEVICE)[:12]
    with fastkd.backend(backend):
        patch, sample, rand = compat.layer_mf_loss(student, teacher, 12, index=index)
    assert relative_difference(patch, reference.relation_loss(student, teacher)) < 1e-5
    assert relative_difference(sample, reference.relation_loss(student, teacher, scope="inter")) < 1e-5
    assert relative_difference(rand, reference.relation_loss(student, teacher, scope="batch", index=index)) < 1e-5


@pytest.mark.parametrize("loss", [1.0, 1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_a_match(backend: str, algorithm: str, loss: float) -> None:
    """A rotated student plus noise: the loss within 1e-5, the gradient within 1e-3, down to a loss of about 1e-8.

    There float32 rounding is 3e-6 of the loss of 394 rows, and more of fewer. The pairs of digits that Triton's Grams
    leave out are 6e-6 of it, in the mean of draws: up to 4e-5 are allowed.
    """
    teacher = torch.randn(2, 40 if INTERPRETED and loss > 1e-7 else 197, 96, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(96, 96, device=DEVICE))[0]
    noise = {1.0: 30.0, 1e-3: 0.25, 1e-6: 7e-3, 1e-8: 7e-4}[loss]
    student = teacher @ rotation + noise * torch.randn_like(teacher)
    options = {"scope": "batch"}
    oracle = loss_and_gradients(lambda s: reference.relation_loss(s, teacher.double(), **options), [student.double()])
    actual = loss_and_gradients(
        lambda s: fastkd.relation_loss(s, teacher, **options, algorithm=algorithm, backend=backend), [student]
    )
    leaves_out = backend == "triton" and algorithm == "gram" and loss < 1e-7
    assert relative_difference(actual[0], oracle[0]) < (4e-5 if leaves_out else 1e-5)
    assert ((actual[1] - oracle[1]).norm() / oracle[1].norm()).item() < 1e-3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_equal_to_the_teacher(backend: str, scope: str) -> None:
    student, _ = features(3, 33, 24, 24)
    for algorithm in ("tile", "gram"):
        loss, grad = loss_and_gradients(
            lambda s, a=algorithm: fastkd.relation_loss(s, student, scope=scope, algorithm=a, backend=backend),
            [student],
        )
        most = (
            0 if (backend, algorithm) == ("triton", "tile") else 1
        )  # three equal terms of a Gram are added in float64
        assert loss <= most * 1e-12 and grad.abs().max() <= (backend != "triton") * 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_relates_to_itself_alone(backend: str) -> None:
    student, teacher = features(1, 1, 24, 40)
    for scope in SCOPES:
        loss, grad = loss_and_gradients(
            lambda s, o=scope: fastkd.relation_loss(s, teacher, scope=o, backend=backend), [student]
        )
        assert loss <= 1e-12
        assert grad.abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetries(backend: str) -> None:
    """Order of tokens, images and axes of the feature space do not matter; batch-mates do not in intra."""
    N = 9 if INTERPRETED else 33
    student, teacher = features(3, N, 24, 40)

    def loss(s: Tensor, t: Tensor, **options: str) -> Tensor:
        return fastkd.relation_loss(s, t, backend=backend, **options)

    tokens, images = torch.randperm(N, device=DEVICE), torch.randperm(3, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(24, 24, device=DEVICE))[0]
    for scope in SCOPES:
        whole = loss(student, teacher, scope=scope)
        for moved in (
            loss(student[:, tokens], teacher[:, tokens], scope=scope),
            loss(student[images], teacher[images], scope=scope),
            loss(student @ rotation, teacher, scope=scope),
            loss(3 * student, 0.1 * teacher, scope=scope),
        ):
            assert relative_difference(moved, whole) < 1e-5
    alone = torch.stack([loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)]).mean()
    assert relative_difference(alone, loss(student, teacher)) < 1e-6


@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend: str, dtype: torch.dtype, algorithm: str) -> None:
    student, teacher = features(2, 9, 16, 24, dtype)
    student[0, 3], teacher[1, 4] = 0, 0
    check(student, teacher, 9, algorithm=algorithm, backend=backend)
    _, grad = loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, backend=backend), [student])
    assert (grad[0, 3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_a_grad_scaler(backend: str) -> None:
    """An incoming gradient of 65536 keeps entries that would round to zero without it."""
    student, teacher = features(4, 33, 24, 40, torch.float16)
    (s64, t64) = (x.double() for x in (student, teacher))
    _, oracle = loss_and_gradients(lambda s: reference.relation_loss(s, t64), [s64], 65536.0)
    _, grad = loss_and_gradients(lambda s: fastkd.relation_loss(s, teacher, backend=backend), [student], 65536.0)
    assert ((grad - oracle).norm() / oracle.norm()).item() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", backends("manifold_fwd"))
def test_layers_in_one_call(backend: str, dtype: torch.dtype) -> None:
    """Layers of two widths and strides, two of them alike: the fused weighted sum and each term by itself."""
    B, N = (2, 5) if INTERPRETED else (5, 33)
    layers = [features(B, N, 24, 40, dtype), features(B, N, 48, 80, dtype), features(B, N, 24, 40, dtype)]
    students = [strided(s, layout) for (s, _), layout in zip(layers, ("sliced", "permuted", "sliced"), strict=True)]
    teachers = [t for _, t in layers]
    indices = [torch.randint(0, B * N, (B * N // 2,), device=DEVICE) for _ in layers]  # with repeats
    module, incoming = losses.ManifoldLoss(backend=backend), 3.0

    def expected(*students: Tensor, dtype: torch.dtype) -> Tensor:
        cast = [t.to(dtype) for t in teachers]
        return torch.stack(
            [reference.manifold_loss(s, t, index=i) for s, t, i in zip(students, cast, indices, strict=True)]
        ).mean()

    actual = loss_and_gradients(lambda *s: module(s, teachers, indices=indices), students, incoming)
    eager = loss_and_gradients(lambda *s: expected(*s, dtype=dtype), students, incoming)
    oracle = loss_and_gradients(lambda *s: expected(*s, dtype=torch.float64), [s.double() for s in students], incoming)
    for name, a, e, o in zip(("loss", "first", "second", "third"), actual, eager, oracle, strict=True):
        assert_matches_oracle(a, e, o, N * 48, name)

    if INTERPRETED:  # terms by themselves: test_a_loss_and_one_of_its_terms
        return
    for i, scope in enumerate(("intra", "inter", "batch")):
        own = loss_and_gradients(
            lambda *s, i=i: module(s, teachers, indices=indices, return_terms=True)[1][i], students
        )
        alone = loss_and_gradients(
            lambda *s, o=scope: torch.stack(
                [
                    reference.relation_loss(x, t, scope=o, index=index if o == "batch" else None)
                    for x, t, index in zip(s, teachers, indices, strict=True)
                ]
            ).mean(),
            students,
        )
        limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert all(relative_difference(a, b) < limit for a, b in zip(own, alone, strict=True)), scope


@pytest.mark.parametrize("backend", backends("manifold_fwd"))
def test_the_incoming_gradient_keeps_its_digits(backend: str) -> None:
    """Halfway between two numbers of bfloat16, it is rounded with the product alone."""
    layers = [features(2, 5, n, 16, torch.bfloat16) for n in (8, 24, 8)]
    students, teachers = [s for s, _ in layers], [t for _, t in layers]
    indices = [torch.arange(4, device=DEVICE)] * 3

    def gradients(incoming: float) -> list[Tensor]:
        module = losses.ManifoldLoss(backend=backend)
        return loss_and_gradients(lambda *s: module(s, teachers, indices=indices), students, incoming)[1:]

    for one, more in zip(gradients(1.0), gradients(1 + 2**-8), strict=True):
        assert torch.equal(more, (one.float() * (1 + 2**-8)).bfloat16())


@pytest.mark.parametrize("backend", backends("manifold_fwd"))
def test_a_loss_and_one_of_its_terms(backend: str) -> None:
    """Differentiated together: the term's gradient is that of its mean over the layers, as it is alone."""
    layers = [features(2, 5, 8, 16) for _ in range(2)]
    students, teachers = [s for s, _ in layers], [t for _, t in layers]
    indices = [torch.arange(4, device=DEVICE)] * 2
    module = losses.ManifoldLoss(backend=backend)

    def of_both(*students: Tensor) -> Tensor:
        loss, terms = module(students, teachers, indices=indices, return_terms=True)
        return loss + 30 * terms[0]

    def expected(*students: Tensor) -> Tensor:
        pairs = [(s, t.double(), i) for s, t, i in zip(students, teachers, indices, strict=True)]
        of_layers = [reference.manifold_loss(s, t, index=i) + 30 * reference.relation_loss(s, t) for s, t, i in pairs]
        return torch.stack(of_layers).mean()

    actual = loss_and_gradients(of_both, students)
    oracle = loss_and_gradients(expected, [s.double() for s in students])
    assert all(relative_difference(a, o) < 1e-5 for a, o in zip(actual, oracle, strict=True))


@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
def test_terms_add_up_in_shared_groups() -> None:
    """One gradient takes all three terms, though threads share the last one's groups."""
    student, teacher = features(2, 517, 48, 80)
    index = torch.randperm(2 * 517)[:600]

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        t = teacher.to(dtype)
        return loss_and_gradients(
            lambda s: fastkd.manifold_loss(s, t, index=index, backend="native"), [student.to(dtype)]
        )

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        actual, oracle = run(torch.float32), run(torch.float64)
    finally:
        torch.set_num_threads(before)
    assert all(relative_difference(a, o) < 1e-5 for a, o in zip(actual, oracle, strict=True))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"])
def test_alike_layers_share_their_launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = note_launches(monkeypatch)

    def count(layers: int) -> list[str]:
        launches.clear()
        students, teachers = zip(*(features(2, 5, 32, 48) for _ in range(layers)), strict=True)
        indices = [torch.arange(4, device=DEVICE)] * layers
        loss_and_gradients(lambda *s: losses.ManifoldLoss(backend=backend)(s, teachers, indices=indices), students)
        return list(launches)

    assert count(1) == count(3) and len(launches) == 7


@pytest.mark.parametrize("algorithm", ["tile", "gram"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_through(backend: str, algorithm: str) -> None:
    student, teacher = features(2, 9, 16, 24)
    student[1, 2, 3] = float("nan")
    loss, grad = loss_and_gradients(
        lambda s: fastkd.relation_loss(s, teacher, algorithm=algorithm, backend=backend), [student]
    )
    assert loss.isnan()
    assert grad[1].isnan().all()


def test_layers_of_different_dtypes() -> None:
    layers = [features(3, 9, 16, 24), features(3, 9, 16, 24, torch.float16)]
    students, teachers = zip(*layers, strict=True)
    index = torch.arange(12, device=DEVICE)
    together = losses.ManifoldLoss()(students, teachers, indices=[index, index])
    alone = torch.stack([fastkd.manifold_loss(s, t, index=index) for s, t in layers]).mean()
    assert relative_difference(together, alone) < 1e-6


def test_one_index_serves_all_layers() -> None:
    """Given, it is the draw of every layer; else each layer has a draw of its own, as in the official code."""
    students, teachers = [torch.randn(3, n, 8) for n in (5, 6)], [torch.randn(3, n, 4) for n in (5, 6)]
    index = torch.tensor([0, 14, 3, 7])
    weights = {"intra": 1.0, "inter": 2.0, "random": 3.0}
    each = [fastkd.manifold_loss(s, t, index=index, **weights) for s, t in zip(students, teachers, strict=True)]
    expected = torch.stack(each).mean()
    module = losses.ManifoldLoss(**weights)
    for loss in (
        fastkd.manifold_loss(students, teachers, index=index, **weights),
        module(students, teachers, index=index),
        module(students, teachers, indices=[index, index]),
    ):
        assert relative_difference(loss, expected) < 1e-6

    same = [students[0], students[0]], [teachers[0], teachers[0]]
    _, (_, _, of_one) = fastkd.manifold_loss(*(x[0] for x in same), index=index, return_terms="detached")
    options = {"num_samples": 4, "return_terms": "detached"}
    drawn = [losses.ManifoldLoss(num_samples=4)(*same, return_terms="detached")[1][2] for _ in range(4)]
    drawn += [
        fastkd.manifold_loss(*same, generator=torch.Generator().manual_seed(i), **options)[1][2] for i in range(4)
    ]
    assert len({float(x) for x in [*drawn, of_one]}) > 4


@pytest.mark.parametrize("tokens", [(5, 5), (6, 5), (5, 6)])
def test_the_index_of_every_layer_is_checked(tokens: tuple[int, int]) -> None:
    """By the number of that layer's tokens."""
    students, teachers = [torch.randn(3, n, 8) for n in tokens], [torch.randn(3, n, 4) for n in tokens]
    first, last = torch.tensor([0, 3 * tokens[0] - 1]), torch.tensor([0, 3 * tokens[1] - 1])
    module = losses.ManifoldLoss()
    assert module(students, teachers, indices=[first, last]).isfinite()
    for indices in ([first, last + 1], [first + 1, last], [first, last - 2]):
        with pytest.raises(RuntimeError, match=r"index must lie in \[0, B\*N = "):
            module(students, teachers, indices=indices)


def test_layers_share_a_draw() -> None:
    """Layers of as many tokens have distinct rows each, of one permutation until it is used up."""
    layers = [torch.empty(3, n, 1) for n in (4, 4, 4, 5)]
    drawn = draw_rows(layers, 5, torch.Generator().manual_seed(0))
    (first,) = (torch.randperm(12, generator=torch.Generator().manual_seed(0)),)
    assert torch.equal(torch.cat(drawn[:2]), first[:10])  # 2 rows are left, too few for a third
    assert [len(index.unique()) for index in drawn] == [5, 5, 5, 5]
    assert all(0 <= index.min() and index.max() < 3 * len(s[0]) for index, s in zip(drawn, layers, strict=True))
    assert [len(index.unique()) for index in draw_rows(layers, 100, None)] == [12, 12, 12, 15]


def test_manifold_loss_draws_rows() -> None:
    student, teacher = features(3, 33, 24, 40)
    a, b = (torch.Generator(DEVICE).manual_seed(1) for _ in range(2))
    first, second = (fastkd.manifold_loss(student, teacher, num_samples=20, generator=g) for g in (a, b))
    assert torch.equal(first, second)
    assert not torch.equal(first, fastkd.manifold_loss(student, teacher, num_samples=20, generator=a))
    every_row = fastkd.manifold_loss(student, teacher, num_samples=1000, return_terms=True)[1][2]
    assert relative_difference(every_row, reference.relation_loss(student, teacher, scope="batch")) < 1e-5


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    student, teacher = features(3, 33, 24, 40)
    loss = fastkd.manifold_loss(student, teacher, intra=2.0, inter=0.0, random=0.0)
    assert relative_difference(loss, 2 * reference.relation_loss(student, teacher)) < 1e-6


@pytest.mark.parametrize("backend", backends("manifold_fwd"))
def test_a_loss_without_terms_is_differentiable(backend: str) -> None:
    student, teacher = features(3, 5, 24, 40)
    student.requires_grad_()
    loss = fastkd.manifold_loss(student, teacher, intra=0.0, inter=0.0, random=0.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and not gradient.any()


def relation_memory(shape: tuple[int, ...], dtype: str, scope: str, backend: str) -> int:
    B, N, Ds, Dt = shape
    setup = f"""
student, teacher = torch.randn({B}, {N}, {Ds}).to(torch.{dtype}), torch.randn({B}, {N}, {Dt}).to(torch.{dtype})
def run(n):
    s = student[:, :n].detach().requires_grad_()
    fastkd.relation_loss(s, teacher[:, :n], scope={scope!r}, backend={backend!r}).backward()
"""
    return peak_extra_memory(setup, "run(8)", f"run({N})")


@ON_LINUX
def test_eager_holds_no_map() -> None:
    """25,088 tokens, 192 and 384 wide: one map would be 2.5 GB."""
    assert relation_memory((1, 25088, 192, 384), "float32", "batch", "eager") < 150e6


@ON_LINUX
@pytest.mark.skipif("native" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize(
    ("shape", "scope", "dtype"),
    [
        pytest.param(shape, scope, dtype, marks=[] if dtype == usual else [pytest.mark.exhaustive])
        for shape, scope, usual in (
            ((32, 196, 192, 384), "intra", "bfloat16"),
            ((8, 1024, 384, 768), "intra", "float16"),
            ((128, 196, 192, 384), "inter", "float32"),
            ((1, 25088, 192, 384), "batch", "float16"),
        )
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
def test_native_needs_little_beyond_the_gradient(shape: tuple[int, ...], scope: str, dtype: str) -> None:
    gradient = shape[0] * shape[1] * shape[2] * getattr(torch, dtype).itemsize
    allowed = (3 if dtype == "float16" else 2) * gradient + 16 * 2**20
    assert relation_memory(shape, dtype, scope, "native") <= allowed


@pytest.mark.parametrize(
    ("n", "rectify", "expected"), [(197, "none", "tile"), (25088, "none", "gram"), (25088, "both", "tile")]
)
def test_the_cheaper_algorithm_is_taken(n: int, rectify: str, expected: str) -> None:
    assert pick_algorithm(n, 192, 384, rectify, torch.device("cpu")) == expected


@pytest.mark.parametrize(("gain", "n", "expected"), [(1, 1024, "gram"), (8, 1024, "tile"), (8, 25088, "gram")])
def test_matrix_units_move_the_switch(gain: int, n: int, expected: str) -> None:
    """They multiply 16-bit rows, and no float64."""
    assert pick_algorithm(n, 192, 384, "none", torch.device("cpu"), gain) == expected


@pytest.mark.parametrize(
    ("terms", "n", "rectify", "expected"),
    [
        (1, 1024, "none", "tile"),
        (3, 1024, "none", "tile"),
        (1, 4096, "none", "gram"),
        (3, 2048, "none", "gram"),
        (1, 4096, "teacher", "tile"),
    ],
)
def test_digits_are_as_cheap_on_every_card(terms: int, n: int, rectify: str, expected: str) -> None:
    """Triton's Grams need no float64 products, so that a card whose float64 is slow changes nothing."""
    dtype = torch.bfloat16 if terms == 1 else torch.float32
    student, teacher = torch.empty(1, 1, 192, dtype=dtype), torch.empty(1, 1, 384, dtype=dtype)
    with mock.patch.object(ops, "has_fast_float64", return_value=False):
        assert (
            pick_of_digits(n, 192, 384, rectify, terms) == cheaper(n, student, teacher, rectify, "triton") == expected
        )
        assert cheaper(n, student, teacher, rectify, "eager") == "tile"


@pytest.mark.parametrize(
    ("device", "dtypes", "expected"),
    [
        ("cuda", (torch.bfloat16, torch.float16), 8),
        ("cuda", (torch.bfloat16, torch.float32), 1),
        ("cuda", (torch.float32, torch.float32), 1),
        ("cpu", (torch.bfloat16, torch.bfloat16), 1),
    ],
)
def test_matrix_units_take_two_16_bit_operands(device: str, dtypes: tuple[torch.dtype, ...], expected: int) -> None:
    assert matrix_gain(torch.device(device), *(torch.empty(1, dtype=dtype) for dtype in dtypes)) == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": [1.0]}, TypeError, "student must be a tensor"),
        ({"student": torch.ones(2, 9, 16, dtype=torch.int64)}, TypeError, "student must be float64"),
        ({"student": torch.ones(9, 16)}, ValueError, r"student must have shape \(B, N, Ds\)"),
        ({"teacher": torch.ones(9, 16)}, ValueError, r"teacher must have shape \(B, N, Dt\)"),
        ({"student": torch.ones(3, 9, 16)}, ValueError, "must agree in images and tokens"),
        ({"student": torch.ones(2, 10, 16)}, ValueError, "drop class tokens"),
        ({"student": torch.ones(2, 0, 16), "teacher": torch.ones(2, 0, 16)}, ValueError, "student must not be empty"),
        ({"teacher": torch.ones(2, 9, 16, device="meta")}, ValueError, "teacher must be on the device of student"),
        ({"teacher": torch.ones(2, 9, 16, requires_grad=True)}, ValueError, "detach it"),
        ({"scope": "image"}, ValueError, "scope must be one of 'intra', 'inter', 'batch', got 'image'"),
        ({"rectify": True}, ValueError, "rectify must be one of"),
        ({"algorithm": "fft"}, ValueError, "algorithm must be one of"),
        ({"algorithm": "gram", "rectify": "both"}, ValueError, "use 'tile'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0"),
        ({"index": torch.arange(3)}, ValueError, "index needs scope='batch'"),
        ({"index": torch.arange(3.0), "scope": "batch"}, TypeError, "index must be an int64 tensor"),
        ({"index": torch.arange(0), "scope": "batch"}, ValueError, "K >= 1"),
        ({"index": torch.tensor([18]), "scope": "batch"}, RuntimeError, r"index must lie in \[0, B\*N = 18\)"),
        ({"index": torch.tensor([-1]), "scope": "batch"}, RuntimeError, "index must lie in"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, eager, native, triton"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"student": torch.ones(2, 9, 16), "teacher": torch.ones(2, 9, 16)}
    with pytest.raises(error, match=message):
        fastkd.relation_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"num_samples": 1.5}, TypeError, "num_samples must be an int"),
        ({"intra": -1.0}, ValueError, "intra must be a finite number >= 0"),
        ({"inter": float("nan")}, ValueError, "inter must be a finite number"),
        ({"random": torch.ones(())}, TypeError, "random must be a Python number"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_bad_weights(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastkd.manifold_loss(torch.ones(2, 9, 16), torch.ones(2, 9, 16), **change)


def test_bad_layers() -> None:
    x = torch.ones(2, 9, 16)
    with pytest.raises(ValueError, match="2 and 1 layers"):
        losses.ManifoldLoss()([x, x], [x])
    with pytest.raises(ValueError, match="0 and 0 layers"):
        losses.ManifoldLoss()([], [])
    with pytest.raises(ValueError, match="one tensor per layer"):
        losses.ManifoldLoss()([x], [x], indices=[])
    with pytest.raises(ValueError, match="exclude each other"):
        compat.GramLoss(remove_neg=True, remove_only_teacher_neg=True)
    with pytest.raises(ValueError, match="detach it"):
        compat.GramLoss()(x, x.clone().requires_grad_())
