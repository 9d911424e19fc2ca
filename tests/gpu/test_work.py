"""Counted work equals counts by hand, and what is done twice is counted twice."""

import math
import os
import re
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here: its kernels are what is counted")

if os.getenv("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import triton
import triton.language as tl

import fastkd
from benchmarks import ttir
from benchmarks.case import Case, Inputs, Provider
from benchmarks.cases.moments import resnet50_shapes
from benchmarks.dry_driver import Launch, host_seconds, recorded
from benchmarks.products import products
from benchmarks.ttir import Counts, Program
from benchmarks.work import Work, count, record

BF16 = torch.bfloat16


@triton.jit
def _walk_kernel(
    x_ptr, y_ptr, n, tiles,
    IS_TRIANGLE: tl.constexpr, PRODUCTS: tl.constexpr, PASSES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply tiles of rows of x, and write the sums of their exponentials to y."""
    tile = tl.program_id(0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(PASSES):
        for other in range(tile + 1 if IS_TRIANGLE else tiles):
            j = other * BLOCK + tl.arange(0, BLOCK)
            a = tl.load(x_ptr + i[:, None] * BLOCK + k[None, :], mask=i[:, None] < n, other=0.0)
            b = tl.load(x_ptr + j[:, None] * BLOCK + k[None, :], mask=j[:, None] < n, other=0.0)
            for _ in tl.static_range(PRODUCTS):
                a = tl.dot(a, b.trans(), input_precision=PRECISION).to(x_ptr.dtype.element_ty)
            if other > 0:
                total += tl.sum(tl.exp(a.to(tl.float32)), 1)
    if tl.load(y_ptr) > 0:  # unknown, so that it holds
        tl.store(y_ptr + i, total, mask=i < n)


def walk(n: int, dtype: torch.dtype = BF16, warps: int = 4, **options: Any) -> Launch:
    settings = {"IS_TRIANGLE": False, "PRODUCTS": 1, "PASSES": 1, "PRECISION": "ieee", "BLOCK": 64} | options
    x, y = torch.empty(n, settings["BLOCK"], dtype=dtype), torch.empty(n)
    tiles = triton.cdiv(n, settings["BLOCK"])
    with recorded("sm_90") as launches:
        _walk_kernel[(tiles,)](x, y, n, tiles, **settings, num_warps=warps)
    return launches[0]


def counted(launch: Launch) -> Counts:
    return Program(launch.kernel.lowered()[0], launch.kernel.arguments).count(launch.arguments, launch.grid)


@pytest.mark.parametrize("is_triangle", [False, True])
def test_loops_masks_and_conditions(is_triangle: bool) -> None:
    """160 rows are two whole tiles and half of one."""
    found = counted(walk(160, IS_TRIANGLE=is_triangle))
    pairs = 6 if is_triangle else 9
    assert found.flops == {("16-bit", "64x64"): pairs * 2 * 64**3}
    assert found.exponentials == (pairs - 3) * 64 * 64
    left, right = (64 + 2 * 64 + 3 * 32, 3 * 64 + 2 * 64 + 32) if is_triangle else (3 * 160, 3 * 160)
    assert found.read == {"x_ptr": (left + right) * 64 * 2, "y_ptr": 3 * 4}
    assert found.written == {"y_ptr": 160 * 4}


def test_another_product_or_pass_is_counted() -> None:
    once, product, again = (counted(walk(160, **more)) for more in ({}, {"PRODUCTS": 2}, {"PASSES": 2}))
    assert sum(product.flops.values()) == 2 * sum(once.flops.values()) and product.read == once.read
    assert again.read["x_ptr"] == 2 * once.read["x_ptr"] and again.exponentials == 2 * once.exponentials


def test_a_product_of_duplicated_warps_is_counted_twice() -> None:
    """Eight warps in a column over 64 rows: products that feed each other take that layout on Hopper."""
    few, many = Work(), Work()
    few.add(walk(160, PRODUCTS=2))
    many.add(launch := walk(160, PRODUCTS=2, warps=8))
    assert products(launch.kernel.lowered()[1]).repeats == {"64x64": 2}
    assert many.flops["16-bit"] == 2 * few.flops["16-bit"]


@pytest.mark.parametrize(
    ("dtype", "precision", "unit", "times"),
    [
        (BF16, "ieee", "16-bit", 1),
        (torch.float32, "ieee", "float32", 1),
        (torch.float32, "tf32", "tf32", 1),
        (torch.float32, "bf16x3", "16-bit", 3),
    ],
)
def test_type_and_precision_choose_the_unit(dtype: torch.dtype, precision: str, unit: str, times: int) -> None:
    found = counted(walk(64, dtype, BLOCK=32, PRECISION=precision))
    assert found.flops == {(unit, "32x32"): 4 * times * 2 * 32**3}


def test_some_programs_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = walk(40 * 16 - 8, BLOCK=16, IS_TRIANGLE=True)
    monkeypatch.setattr(ttir, "LIMIT", 20)
    some = counted(launch)
    monkeypatch.setattr(ttir, "LIMIT", 40)
    every = counted(launch)
    assert sum(every.flops.values()) == 40 * 41 // 2 * 2 * 16**3
    for a, b in ((some.flops, every.flops), (some.read, every.read), (some.written, every.written)):
        assert a.total() == pytest.approx(b.total(), rel=0.03)


def case(call: Any, *leaves: tuple[int, ...], dtype: torch.dtype = BF16, constants: tuple[int, ...] = (),
         backward: bool = True) -> Case:  # fmt: skip
    def inputs(device: str, dtype: torch.dtype) -> Inputs:
        tensors = [torch.empty(shape, device=device, dtype=dtype) for shape in (*leaves, *constants)]
        return Inputs(tuple(tensors[: len(leaves)]), tuple(tensors[len(leaves) :]))

    providers = {"fastkd": Provider(call), "eager": Provider(call)}
    return Case(name="small", inputs=inputs, providers=providers, oracle=lambda *_: [], reduced=1, flops=0.0,
                dtype=dtype, backward=backward)  # fmt: skip


def of(launches: list[Launch], name: str) -> tuple[Counts, dict[str, Any]]:
    """Return the counts of the only launch of a kernel, and its constants."""
    (launch,) = (launch for launch in launches if launch.kernel.name == name)
    return counted(launch), launch.kernel.constexprs


def test_relation_by_hand() -> None:
    """300 rows are 3 tiles of 128, of which the triangle has 6; a width of 72 is 2 pieces of 64, or 3 of 32."""
    _, launches = count(case(fastkd.relation_loss, (1, 300, 72), constants=((1, 300, 72),), backward=False), "sm_90")
    found, tile = of(launches, "_relation_map_kernel")
    rows, depth = tile["BLOCK_M"], tile["BLOCK_K"]
    tiles = triton.cdiv(300, rows)
    assert sum(found.flops.values()) == tiles * (tiles + 1) // 2 * 2 * rows**2 * 2 * triton.cdiv(72, depth) * depth
    norms, _ = of(launches, "_relation_norms_kernel")
    assert norms.read == {"s_ptr.0": 300 * 72 * 2, "t_ptr.0": 300 * 72 * 2}
    assert norms.written.total() == 2 * 300 * 4


def test_grams_by_hand() -> None:
    """300 rows side by side are 5 steps of 64, as digits; 72 and 40 columns are 3 tiles of 64."""
    call = partial(fastkd.relation_loss, scope="batch", algorithm="gram")
    work, launches = count(case(call, (2, 150, 72), constants=((2, 150, 40),)), "sm_90")
    found, tile = of(launches, "_relation_gram_kernel")
    assert (tile["BLOCK_D"], sum(found.flops.values())) == (64, 3 * 13 * 2 * 64**2 * 320)
    apply, tile = of(launches, "_relation_gram_apply_kernel")
    rows = triton.cdiv(300, tile["BLOCK_M"]) * tile["BLOCK_M"]
    pieces, depth = (
        triton.cdiv(72, tile["BLOCK_D"]),
        triton.cdiv(72, tile["BLOCK_K"]) + triton.cdiv(40, tile["BLOCK_K"]),
    )
    products = (2 * pieces - 1) * tile["BLOCK_D"] * rows * depth * tile["BLOCK_K"]
    assert sum(apply.flops.values()) == 2 * 2 * products  # two terms of the Grams
    assert work.flops == {"8-bit": sum(found.flops.values()), "16-bit": sum(apply.flops.values())}
    digits, _ = of(launches, "_relation_digits_kernel")
    assert digits.read == {"s_ptr": 2 * 300 * 72 * 2, "t_ptr": 2 * 300 * 40 * 2}
    assert digits.written["planes_ptr"] == 4 * 112 * 320


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_grams_of_25088_tokens(target: str) -> None:
    """Few launches, each of the products' with a program for most multiprocessors."""
    call = case(partial(fastkd.relation_loss, scope="batch"), (128, 196, 192), constants=((128, 196, 384),))
    work, launches = record(call, target)
    assert len(launches) + work.operators <= 12 and not work.flops
    assert min(math.prod(launch.grid) for launch in launches if "sum" not in launch.kernel.name) >= 100


def test_attention_by_hand() -> None:
    """One head of 70 queries and 70 keys, 24 channels of 32: one score of each network for each pair of the tiles."""
    _, launches = count(
        case(fastkd.attention_loss, (1, 1, 70, 24), (1, 1, 70, 24), constants=((1, 1, 70, 24),) * 2, backward=False),
        "sm_90",
    )
    found, tile = of(launches, "_attention_rows_kernel")
    rows, keys = triton.cdiv(70, tile["BLOCK_M"]) * tile["BLOCK_M"], triton.cdiv(70, tile["BLOCK_N"]) * tile["BLOCK_N"]
    assert sum(found.flops.values()) == 2 * 2 * rows * keys * 32
    strips = rows // tile["BLOCK_M"]
    # A network begins with q, its four strides, and k.
    assert found.read["student.0"] == found.read["teacher.0"] == 70 * 24 * 2
    assert found.read["student.5"] == found.read["teacher.5"] == strips * 70 * 24 * 2
    assert found.written["loss_ptr"] == 70 * 4


def test_moments_by_hand() -> None:
    work, launches = count(case(fastkd.batch_moments, (4, 3, 20, 30), dtype=torch.float32), "sm_90")
    found, _ = of(launches, "_moments_partial_kernel")
    assert found.read == {"x_ptrs.0": 4 * 3 * 20 * 30 * 4}
    backward, _ = of(launches, "_moments_bwd_kernel")
    assert backward.read["x_ptrs.0"] == backward.written["dx_ptrs.0"] == 4 * 3 * 20 * 30 * 4
    assert work.operators == 0 and not work.flops


def test_prior_by_hand() -> None:
    """A pixel, and of each of four directions the one before it, where there is one. Backward reads both neighbours."""
    call = case(lambda x: fastkd.image_prior(x, tv_l1=1.0), (1, 1, 9, 11), dtype=torch.float32)
    work, launches = count(call, "sm_90")
    neighbours = 9 * 10 + 8 * 11 + 2 * 8 * 10
    assert of(launches, "_prior_fwd_kernel")[0].read == {"x_ptr": (9 * 11 + neighbours) * 4}
    assert of(launches, "_prior_bwd_kernel")[0].read["x_ptr"] == (9 * 11 + 2 * neighbours) * 4
    assert work.kernels == 3 + 1 and work.operators == 1


def test_logits_by_hand() -> None:
    """Three sweeps take the exponentials of both networks; the first also rescales its sums."""
    call = case(lambda s, t: fastkd.soft_target_loss(s, t, temperature=2.0), (8, 100), constants=((8, 100),))
    _, launches = count(call, "sm_90")
    found, tile = of(launches, "_softmax_kl_kernel")
    assert found.read == {"s_ptr": 3 * 8 * 100 * 2, "t_ptr": 3 * 8 * 100 * 2}
    assert found.written == {"ds_ptr": 8 * 100 * 4, "kl_ptr": 8 * 4}
    assert found.exponentials == 8 * (3 * 2 * tile["BLOCK"] + 2)


def test_operators_by_hand() -> None:
    """Forward multiplies, exponentiates and adds up; backward multiplies twice; views launch nothing."""
    work, launches = count(case(lambda x: (x.mT * 2).exp().sum(), (30, 20), dtype=torch.float32), "sm_90")
    n = 30 * 20 * 4
    assert not launches and work.operators == 5 and work.exponentials == 600
    assert work.read == (n + n + n) + (4 + n) + n and work.written == (n + n + 4) + n + n


def test_products_of_operators_by_hand() -> None:
    """x @ w, and in backward the gradient of x alone."""
    work, _ = count(case(lambda x, w: (x @ w).sum(), (8, 30, 20), constants=((8, 20, 10),)), "sm_90")
    assert work.flops == {"16-bit": 2 * 2 * 8 * 30 * 20 * 10}


def test_the_official_form_by_hand() -> None:
    """Two products forward, one of which has a gradient, and everything else in few kernels."""

    def maps(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s @ s.mT - t @ t.mT).float().square().mean()

    form = case(maps, (4, 64, 32), constants=((4, 64, 32),))
    eager, _ = count(form, "sm_90")
    from benchmarks import official  # loads Inductor, which takes seconds

    work = official.compiled(form)
    assert work.flops == eager.flops == {"16-bit": (2 + 2) * 2 * 4 * 64 * 64 * 32}
    assert work.launches < eager.launches and work.bytes < eager.bytes


def layers(*shapes: tuple[int, ...]) -> Case:
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        n = len(shapes)
        return fastkd.bn_stat_loss(tensors[:n], tensors[n : 2 * n], tensors[2 * n :])

    return case(call, *shapes, constants=2 * tuple((shape[1],) for shape in shapes))


def test_layers_share_launches() -> None:
    """A ResNet-50 at 224 px: 53 layers of 12 shapes. An evaluating batch norm takes three launches."""
    work, launches = record(layers(*resnet50_shapes(4, 224)), "sm_90")
    assert len(launches) == 3 * 12 + 4 and len(launches) + work.operators <= 60
    work, launches = record(case(fastkd.batch_norm_moments, (4, 16, 14, 14), constants=((16,),) * 4), "sm_90")
    assert len(launches) == 3 and not work.operators


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 64, 7, 7), (128, 64, 14, 14), (128, 64, 28, 28)])
def test_lanes_load_several_elements_at_once(shape: tuple[int, ...]) -> None:
    """Planes of 49 elements start at odd addresses, those of 196 at multiples of 8 bytes."""
    for launch in record(case(fastkd.batch_moments, shape), "sm_90")[1]:
        if launch.kernel.name != "_moments_merge_kernel":
            assert not re.search(r"ld\.global\S*\.[bu](8|16)\b", launch.kernel.compile().asm["ptx"])


def test_the_host_is_timed_launch_by_launch() -> None:
    x = torch.empty(2, 3, 5, 33)[..., 1:]
    with recorded("sm_90") as launches:
        fastkd.batch_moments(x, backend="triton")
        fastkd.batch_moments(x[:1], backend="triton")
    seconds = host_seconds(launches, rounds=3)
    assert len(seconds) == len(launches) == 4 and all(0 < each < 1 for each in seconds)


def test_the_host_is_timed_in_a_counted_case() -> None:
    """Its tensors are on a GPU that is not there and have no elements; those of the timed calls have."""
    _, launches = record(case(fastkd.batch_moments, (4, 16, 14, 14)), "sm_90")
    seconds = host_seconds(launches, rounds=3)
    assert len(seconds) == len(launches) > 1 and all(0 < each < 1 for each in seconds)
