"""Calls of every public loss with drawn shapes, strides, sizes of values, dtypes and options."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastkd.testing import DEVICE
from tests._support.calls import LAYOUTS, Call

DTYPES = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Sizes of values: ordinary ones, at which errors are bounded, and the ends of float32's range, at which results only
# have to be finite where float64's are.
ORDINARY, EXTREME = (1e-3, 1.0, 30.0), (1e-42, 1e-38, 1e-20, 1e10, 1e15)
dtypes, seeds = st.sampled_from(DTYPES), st.integers(0, 2**16)


@st.composite
def sizes(draw: st.DrawFn, count: int, largest: int = 40, least: int = 1) -> list[int]:
    """Mostly small sizes, of which one may be large; a few hundred elements cost little and tens of thousands much."""
    small = [draw(st.integers(least, 9)) for _ in range(count)]
    if draw(st.booleans()):
        small[draw(st.integers(0, count - 1))] = draw(st.integers(least, largest))
    return small


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def tensors(draw: st.DrawFn, *shape: int, positive: bool = False) -> Tensor:
    """float32, normal with mean 0 or a common offset; some have zeros or equal rows."""
    x = normal(draw(seeds), *shape)
    kind = draw(st.sampled_from(["normal"] * 5 + ["offset", "zeros", "zero row", "equal rows", "one large"]))
    if kind == "offset":
        x = x + 10
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "zero row":
        x[0] = 0
    elif kind == "equal rows":
        x = x[:1].expand(shape).clone()
    elif kind == "one large":
        x.view(-1)[-1] = 1e3
    return x.abs() + 0.1 if positive else x


@st.composite
def relation(draw: st.DrawFn) -> Call:
    B, N, Ds, Dt = draw(sizes(4, 150, least=2))
    arguments = {"student": draw(tensors(B, N, Ds)), "teacher": draw(tensors(B, N, Dt))}
    scope = draw(st.sampled_from(["intra", "inter", "batch"]))
    options = {
        "scope": scope,
        "normalize": draw(st.booleans()),
        "rectify": draw(st.sampled_from(["none", "both", "teacher"])),
        "eps": draw(st.sampled_from([1e-12, 1e-6, 0.0])),
        "algorithm": draw(st.sampled_from(["auto", "tile"])),
    }
    if scope == "batch" and draw(st.booleans()):
        arguments["index"] = torch.tensor(draw(st.lists(st.integers(0, B * N - 1), min_size=1, max_size=20)))
    return Call("relation_loss", "relation_fwd", ("student",), arguments, constants=options)


@st.composite
def manifold(draw: st.DrawFn) -> Call:
    B, N, Ds, Dt = draw(sizes(4, 150, least=2))
    arguments = {"student": draw(tensors(B, N, Ds)), "teacher": draw(tensors(B, N, Dt))}
    arguments["index"] = torch.tensor(draw(st.lists(st.integers(0, B * N - 1), min_size=1, max_size=20)))
    weights = {name: draw(st.sampled_from([0.0, 0.1, 4.0])) for name in ("intra", "inter", "random")}
    return Call("manifold_loss", "manifold_fwd", ("student",), arguments, constants=weights)


@st.composite
def attention(draw: st.DrawFn) -> Call:
    B, H, Nq, Nk, ds, dt = draw(sizes(6, 150))
    divergence = draw(st.sampled_from(["kl", "reverse_kl", "js", "ce", "mse", "score_mse"]))
    heads = "match" if divergence == "score_mse" else draw(st.sampled_from(["match", "mean"]))
    causal = draw(st.booleans())
    Nk = Nq if causal else Nk
    Ht = draw(st.integers(1, 4)) if heads == "mean" else H
    arguments: dict[str, Any] = {
        "q_student": draw(tensors(B, H, Nq, ds)),
        "k_student": draw(tensors(B, H, Nk, ds)),
        "q_teacher": draw(tensors(B, Ht, Nq, dt)),
        "k_teacher": draw(tensors(B, Ht, Nk, dt)),
    }
    for name, size in (("key_mask", Nk), ("query_mask", Nq)):
        if draw(st.booleans()):
            arguments[name] = normal(draw(seeds), B, size) > draw(st.sampled_from([-1.0, 0.5, 9.0]))
    students = ["q_student", "k_student"]
    for name, count in (("bias_student", H), ("bias_teacher", Ht)):
        if draw(st.booleans()):
            leading = draw(st.sampled_from([(B, count), (1, count), (B, 1), (1, 1)]))
            arguments[name] = draw(tensors(*leading, Nq, Nk))
            students += [name] * (name == "bias_student")
    options = {
        "divergence": divergence,
        "heads": heads,
        "is_causal": causal,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "temperature": 1.0 if divergence == "score_mse" else draw(st.sampled_from([1.0, 0.1, 7.0])),
        "scale_student": draw(st.sampled_from([None, 0.2])),
    }
    return Call("attention_loss", "attention_fwd", tuple(students), arguments, constants=options)


@st.composite
def qkv(draw: st.DrawFn) -> Call:
    B, N, d, heads = draw(sizes(4, 60))
    wide = heads * draw(st.integers(1, 6))
    arguments: dict[str, Any] = {
        "student": tuple(draw(tensors(B, N, heads * d)) for _ in range(3)),
        "teacher": tuple(draw(tensors(B, N, wide)) for _ in range(3)),
    }
    if draw(st.booleans()):
        arguments["key_mask"] = normal(draw(seeds), B, N) > 0
    relations = draw(st.sampled_from([("qq", "kk", "vv"), ("qk", "vv"), ("qk",)]))
    options = {"relation_heads": heads, "relations": relations}
    return Call("qkv_relation_loss", "attention_fwd", ("student",), arguments, constants=options)


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    shape = draw(sizes(draw(st.integers(2, 5)), 70))
    return draw(tensors(*shape))


@st.composite
def batch_moments(draw: st.DrawFn) -> Call:
    options = {"dims": draw(st.sampled_from(["batch", "image"]))}
    return Call("batch_moments", "moments_fwd", ("x",), {"x": draw(maps())}, constants=options)


@st.composite
def batch_norm(draw: st.DrawFn) -> Call:
    x = draw(maps())
    C = x.shape[1]
    arguments = {"x": x, "running_mean": draw(tensors(C)), "running_var": draw(tensors(C, positive=True))}
    arguments |= {name: draw(tensors(C)) for name in ("weight", "bias") if draw(st.booleans())}
    students = ("x", *(name for name in ("weight", "bias") if name in arguments))
    return Call("batch_norm_moments", "batch_norm_fwd", students, arguments)


@st.composite
def bn_stat(draw: st.DrawFn) -> Call:
    inputs = [draw(maps().filter(lambda x: x[0, 0].numel() > 1)) for _ in range(draw(st.integers(1, 4)))]
    arguments: dict[str, Any] = {
        "inputs": inputs,
        "running_means": [draw(tensors(x.shape[1])) for x in inputs],
        "running_vars": [draw(tensors(x.shape[1], positive=True)) for x in inputs],
    }
    options: dict[str, Any] = {"distance": draw(st.sampled_from(["l2", "mse", "image"]))}
    if draw(st.booleans()):
        options["layer_weights"] = [draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in inputs]
    if options["distance"] != "image" and draw(st.booleans()):
        options["momentum"] = 0.3
        arguments["ema"] = ([draw(tensors(x.shape[1])) for x in inputs], arguments["running_vars"])
    return Call("bn_stat_loss", "moments_fwd", ("inputs",), arguments, constants=options)


@st.composite
def prior(draw: st.DrawFn) -> Call:
    B, C, H, W = draw(sizes(4, 80, least=2))
    images = {"images": draw(tensors(B, C, H, W))}
    if draw(st.booleans()):
        options = {"p": draw(st.sampled_from([1, 2]))}
        return Call("total_variation", "prior_fwd", ("images",), images, constants=options)
    weights = {name: draw(st.sampled_from([0.0, 0.3, 2.0])) for name in ("tv_l1", "tv_l2", "l2")}
    options = weights | {"l2_per_image": draw(st.booleans())}
    return Call("image_prior", "prior_fwd", ("images",), images, constants=options)


@st.composite
def logits(draw: st.DrawFn) -> Call:
    B, C = draw(sizes(2, 400, least=2))
    rows = {"student": draw(tensors(B, C)), "teacher": draw(tensors(B, C))}
    options: dict[str, Any] = {"temperature": draw(st.sampled_from([1.0, 0.3, 4.0]))}
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    name = draw(st.sampled_from(["soft_target_loss", "dkd_loss", "nkd_loss", "competition_loss"]))
    if name == "competition_loss":
        options["reduction"] = draw(st.sampled_from(["mean", "none"]))
        both = {f"{role}_logits": x for role, x in rows.items()}
        return Call(name, "competition", tuple(both), both, constants=options)
    if name != "soft_target_loss":
        rows["label"] = torch.tensor(draw(st.lists(st.integers(0, C - 1), min_size=B, max_size=B)))
    return Call(name, "nkd" if name == "nkd_loss" else "softmax_kl", ("student",), rows, constants=options)


@st.composite
def diversity(draw: st.DrawFn) -> Call:
    B, D, classes = draw(sizes(3, 60, least=2))
    arguments = {"features": draw(tensors(B, D)), "labels": normal(draw(seeds), B).mul(9).long() % classes}
    margins = {name: draw(st.sampled_from([0.1, 2.0])) for name in ("spread_margin", "boundary_margin")}
    return Call("intra_divergence_loss", None, ("features",), arguments, constants=margins)


def _laid_out(call: Call, layouts: list[Callable[[Tensor], Tensor]]) -> Call:
    each = iter(layouts)
    return call.mapped(lambda x: next(each)(x))


@st.composite
def calls(draw: st.DrawFn, scales: tuple[float, ...] = ORDINARY) -> Call:
    """A valid call: drawn tensors times a size, in drawn dtypes and layouts."""
    call = draw(
        st.one_of(
            relation(), manifold(), attention(), qkv(), batch_moments(), batch_norm(), bn_stat(), prior(), logits(),
            diversity(),
        )
    )  # fmt: skip
    dtype = draw(dtypes)
    # Moments take statistics in other dtypes and losses a teacher in another; each list is of one dtype.
    others = {name: draw(st.sampled_from([dtype, dtype, *DTYPES])) for name in call.arguments}
    others |= dict.fromkeys(call.students, dtype)

    def sized(name: str, value: Any) -> Any:
        to = others[name]
        size = min(draw(st.sampled_from(scales)), max(torch.finfo(to).max / 1e4, 1.0))
        return tree_map_only(
            Tensor, lambda x: (x.double() * size).to(DEVICE, to) if x.is_floating_point() else x.to(DEVICE), value
        )

    call = replace(call, arguments={name: sized(name, value) for name, value in call.arguments.items()})
    kinds = [lambda x: x, lambda x: x, *(f for name, f in LAYOUTS.items() if not name.startswith("expanded"))]
    return _laid_out(call, [draw(st.sampled_from(kinds)) for _ in call.leaves()])
