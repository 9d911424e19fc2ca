"""Modules with parameters of their own, and that every option of the others reaches its function."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import fastkd
from fastkd import functional, losses
from fastkd.losses import (
    AttentionLoss,
    BatchNormStatLoss,
    DKDLoss,
    EarlyDistillationLoss,
    IntraDivergenceLoss,
    ManifoldLoss,
    NKDLoss,
    QKVRelationLoss,
    RelationLoss,
    SoftTargetLoss,
    ViTKDLoss,
)
from fastkd.testing import loss_and_gradients, relative_difference
from tests._support import golden

both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def features(B=2, N=16, Ds=4, Dt=6, dtype=torch.float32):
    """low_student, low_teacher, high_student, high_teacher"""
    shapes = [(B, 2, N, Ds), (B, 2, N, Dt), (B, N, Ds), (B, N, Dt)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@both
@pytest.mark.parametrize("case", golden.cases("vitkd"), ids=golden.name)
def test_golden_vitkd(case, dtype):
    data, p = golden.load(case), case["params"]
    module = ViTKDLoss(
        p["student_dims"],
        p["teacher_dims"],
        alpha=p["alpha_vitkd"],
        beta=p["beta_vitkd"],
        mask_ratio=p["lambda_vitkd"],
    ).double()
    module.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    module.to(dtype)
    inputs = {k: data[f"in.{k}"].to(dtype) for k in ("low_s", "low_t", "high_s", "high_t")}
    leaves = [inputs[k].requires_grad_() for k in ("low_s", "high_s")]
    loss, (mimic, generate) = module(*inputs.values(), data["in.mask"], return_terms=True)
    for name, value in (("loss", loss), ("loss.lr", mimic), ("loss.gen", generate)):
        assert relative_difference(value.detach().double(), data[name]) <= golden.tolerance(case, dtype, "loss")
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, [*leaves, *parameters.values()])
    names = ["grad.low_s", "grad.high_s", *(f"grad.param.{name}" for name in parameters)]
    assert set(names) == {k for k in data if k.startswith("grad.")}
    for name, g in zip(names, gradients, strict=True):
        assert relative_difference(g.double(), data[name]) <= golden.tolerance(case, dtype, "grad"), name
    masked = data["in.mask"].bool()
    assert not gradients[1][masked].any()


def test_vitkd_is_its_formula():
    module = ViTKDLoss(4, 6, alpha=0.3, beta=0.7, mask_ratio=0.25)
    named = [name for name, _ in module.named_parameters()]
    assert len(named) == len(module.state_dict()) == 11  # three mappings, two convolutions and a token
    nn.init.normal_(module.mask_token)
    low_s, low_t, high_s, high_t = features()
    mask = module.draw_mask(2, 16, generator=torch.Generator().manual_seed(1))
    assert mask.sum(1).tolist() == [4, 4]
    mimic = sum((module.align2[i](low_s[:, i]) - low_t[:, i]).square().sum() for i in range(2)) / 2
    x = module.align(high_s)
    x[mask] = module.mask_token.view(-1)
    x = module.generation(x.transpose(1, 2).reshape(2, 6, 4, 4)).flatten(2).transpose(1, 2)
    generate = (x - high_t)[mask].square().sum() / 2 / 0.25
    expected = 0.3 * mimic + 0.7 * generate
    torch.testing.assert_close(module(low_s, low_t, high_s, high_t, mask), expected)
    seeded = module(low_s, low_t, high_s, high_t, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(seeded, expected)


def test_vitkd_draws_anew_and_keeps_floor():
    module = ViTKDLoss(4, 4)
    masks = [module.draw_mask(3, 25) for _ in range(2)]
    assert not torch.equal(*masks)
    assert masks[0].sum(1).tolist() == [13, 13, 13]  # 25 * 0.5 kept, rounded down
    for N, ratio, masked in ((9, 0.25, 3), (16, 0.3, 5), (4, 1, 4), (4, 0.01, 1)):
        assert ViTKDLoss(4, 4, mask_ratio=ratio).draw_mask(1, N).sum() == masked
    assert [name for name, _ in module.named_parameters() if "align" in name] == []
    assert not module.mask_token.any()


def test_vitkd_student_mistake_at_kept_tokens_costs_nothing_there():
    """Teacher values at kept tokens do not matter to the generation."""
    module = ViTKDLoss(4, 6, alpha=0.0)
    low_s, low_t, high_s, high_t = features()
    mask = module.draw_mask(2, 16)
    other = torch.where(mask[..., None], high_t, high_t + 9)
    assert torch.equal(module(low_s, low_t, high_s, high_t, mask), module(low_s, low_t, high_s, other, mask.int()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("dims", [(4, 6), (6, 6)], ids=str)
def test_vitkd_takes_other_dtypes(dims, dtype):
    module = ViTKDLoss(*dims)
    inputs = features(Ds=dims[0], Dt=dims[1], dtype=dtype)
    mask = module.draw_mask(2, 16)
    leaves = [inputs[0].requires_grad_(), inputs[2].requires_grad_()]
    loss = module(*inputs, mask)
    expected = module(*(x.detach().float() for x in inputs), mask)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    assert [g.dtype for g in torch.autograd.grad(loss, leaves)] == [dtype, dtype]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module(*inputs, mask), expected, check_dtype=False, rtol=0.02, atol=0)


def test_vitkd_compiles_whole():
    module, inputs = ViTKDLoss(4, 6), features()
    mask = module.draw_mask(2, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    expected, actual = module(*inputs, mask), compiled(*inputs, mask)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters))
    assert compiled(*inputs).isfinite()  # drawn inside


LOW_S, LOW_T, HIGH_S, HIGH_T = features()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ManifoldLoss(intra=-1), ValueError, "intra must be a finite number >= 0"),
        (lambda: ManifoldLoss(num_samples=0), ValueError, "num_samples must be at least 1"),
        (lambda: ViTKDLoss(0, 4), ValueError, "student_dim must be at least 1"),
        (lambda: ViTKDLoss(4, 4.0), TypeError, "teacher_dim must be an int"),
        (lambda: ViTKDLoss(4, 4, alpha=-1), ValueError, "alpha must be"),
        (lambda: ViTKDLoss(4, 4, mask_ratio=0), ValueError, "mask_ratio must be a finite number > 0"),
        (lambda: ViTKDLoss(4, 4, mask_ratio=1.5), ValueError, "mask_ratio must be at most 1"),
        (
            lambda: ViTKDLoss(4, 6)(LOW_S[:, 0], LOW_T, HIGH_S, HIGH_T),
            ValueError,
            r"low_student must have shape \(2, 2",
        ),
        (lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T[:, :, 1:], HIGH_S, HIGH_T), ValueError, "low_teacher must have shape"),
        (
            lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_T, HIGH_T),
            ValueError,
            r"high_student must have shape \(B, N, 4\)",
        ),
        (lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_S, HIGH_S), ValueError, "high_teacher must have shape"),
        (lambda: ViTKDLoss(4, 6)(LOW_S.long(), LOW_T, HIGH_S, HIGH_T), TypeError, "low_student must be float64"),
        (
            lambda: ViTKDLoss(4, 6)(LOW_S[:, :, 1:], LOW_T[:, :, 1:], HIGH_S[:, 1:], HIGH_T[:, 1:]),
            ValueError,
            "square grid of tokens, without class or register tokens, got N = 15",
        ),
        (
            lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_S, HIGH_T, torch.ones(2, 15)),
            ValueError,
            r"mask must have shape \(2, 16\)",
        ),
        (lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_S, HIGH_T, [1, 0]), TypeError, "mask must be a tensor"),
        (lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_S, HIGH_T.to("meta")), ValueError, "device of high_student"),
        (
            lambda: ViTKDLoss(4, 6)(LOW_S, LOW_T, HIGH_S, HIGH_T.clone().requires_grad_()),
            ValueError,
            "high_teacher is a constant here",
        ),
        (lambda: EarlyDistillationLoss([4], [8, 8]), ValueError, "must match layer by layer, got 1 and 2"),
        (lambda: EarlyDistillationLoss([], []), ValueError, "must match layer by layer"),
        (lambda: EarlyDistillationLoss(4, 0), ValueError, r"teacher_dims\[0\] must be at least 1"),
        (lambda: EarlyDistillationLoss(4, 8)([HIGH_S] * 2, [HIGH_S]), ValueError, "must have 1 layers each"),
        (lambda: EarlyDistillationLoss(4, 8)(HIGH_T, torch.randn(2, 8, 4, 4)), ValueError, r"students\[0\] must have"),
        (lambda: EarlyDistillationLoss(4, 8)(HIGH_S, torch.randn(2, 7, 4, 4)), ValueError, r"teachers\[0\] must have"),
        (lambda: EarlyDistillationLoss(4, 8)(HIGH_S, torch.randn(3, 8, 4, 4)), ValueError, r"\(2, 8, h, w\)"),
        (lambda: EarlyDistillationLoss(4, 8)(HIGH_S[:, :5], torch.randn(2, 8, 4, 4)), ValueError, "got N = 5"),
        (
            lambda: EarlyDistillationLoss(4, 8)(HIGH_S, torch.randn(2, 8, 4, 4, requires_grad=True)),
            ValueError,
            "detach it",
        ),
        (lambda: SoftTargetLoss(temperature=0), ValueError, "temperature must be"),
        (lambda: SoftTargetLoss(reduction="all"), ValueError, "reduction must be one of"),
        (lambda: DKDLoss(beta=-1), ValueError, "beta must be"),
        (lambda: NKDLoss(gamma=-1), ValueError, "gamma must be"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("first", "second"), [((4, 4), (7, 6)), ((4, 7), (7, 3)), ((2, 4), (3, 2))])
def test_early_distillation_is_its_formula(first, second):
    module = EarlyDistillationLoss([4, 6], [8, 5])
    students = [torch.randn(2, 16, 4), torch.randn(2, 9, 6)]
    teachers = [torch.randn(2, 8, *first), torch.randn(2, 5, *second)]
    expected = 0
    for aligner, s, t in zip(module.aligners, students, teachers, strict=True):
        side = int(s.shape[1] ** 0.5)
        x = aligner(s).transpose(1, 2).reshape(2, -1, side, side)
        x = nn.functional.interpolate(x, t.shape[2:], mode="bilinear", align_corners=False)
        expected = expected + (x - t).square().mean()
    torch.testing.assert_close(module(students, teachers, grid=[(4, 4), (3, 3)]), expected)
    one = EarlyDistillationLoss(4, 8)
    one.aligners[0].load_state_dict(module.aligners[0].state_dict())
    torch.testing.assert_close(
        one(students[0].half(), teachers[0], grid=(4, 4)),
        one([students[0].half().float()], [teachers[0]], grid=(4, 4)),
    )


def test_early_distillation_compiles_whole_and_learns():
    torch.manual_seed(1)
    module = EarlyDistillationLoss(4, 8)
    s, t = torch.randn(2, 16, 4, requires_grad=True), torch.randn(2, 8, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t), module(s, t))
    torch.testing.assert_close(torch.autograd.grad(compiled(s, t), s), torch.autograd.grad(module(s, t), s))


# Per module: where it finds its function, the function's name, and a value other than the default of each option.
FIXED: dict[type[nn.Module], tuple[Any, str, dict[str, Any]]] = {
    RelationLoss: (
        functional,
        "relation_loss",
        {
            "scope": "batch",
            "normalize": False,
            "rectify": "teacher",
            "eps": 0.25,
            "algorithm": "tile",
            "backend": "eager",
        },
    ),
    ManifoldLoss: (
        losses.relation,
        "manifold_layers",
        {"intra": 5.0, "inter": 6.0, "random": 7.0, "num_samples": 8, "backend": "eager"},
    ),
    AttentionLoss: (
        functional,
        "attention_loss",
        {
            "divergence": "js",
            "scale_student": 0.5,
            "scale_teacher": 0.25,
            "temperature": 2.0,
            "is_causal": True,
            "heads": "mean",
            "query_slice": slice(1, 3),
            "reduction": "sum",
            "backend": "eager",
        },
    ),
    QKVRelationLoss: (
        functional,
        "qkv_relation_loss",
        {"relations": ("qk", "vv"), "relation_heads": 3, "weights": [0.5, 2.0], "backend": "eager"},
    ),
    BatchNormStatLoss: (
        losses.moments,
        "bn_stat_loss_and_moments",
        {"distance": "mse", "layer_weights": [3.0], "momentum": 0.75, "backend": "eager"},
    ),
    IntraDivergenceLoss: (
        functional,
        "intra_divergence_loss",
        {"spread_margin": 3.0, "boundary_margin": 0.25},
    ),
    SoftTargetLoss: (functional, "soft_target_loss", {"temperature": 3.0, "reduction": "mean"}),
    DKDLoss: (functional, "dkd_loss", {"alpha": 5.0, "beta": 6.0, "temperature": 7.0, "reduction": "sum"}),
    NKDLoss: (functional, "nkd_loss", {"gamma": 5.0, "temperature": 6.0, "reduction": "sum"}),
}
LEARNT = (ViTKDLoss, EarlyDistillationLoss)


class Stand:
    """Stands for a tensor, equal to itself alone."""

    shape = (2, 3)


def called_with(
    module: nn.Module, place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of forward, what the function called `name` was then given), both by name."""
    signature = inspect.signature(getattr(place, name))
    found: dict[str, Any] = {}

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        record = arguments.pop("call", None)  # all the arguments but the group
        found.update(arguments | ({} if record is None else record._asdict()))
        return torch.zeros(()), torch.zeros(3), torch.zeros(3)

    monkeypatch.setattr(place, name, function)
    given = {name: [Stand()] for name in inspect.signature(module.forward).parameters}
    given |= {name: value for name, value in {"update": True, "index": None}.items() if name in given}
    positional = [
        p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    module(*(given[name] for name in positional), **{k: v for k, v in given.items() if k not in positional})
    return given, found


def test_every_module_is_listed() -> None:
    public = {m for m in vars(losses).values() if inspect.isclass(m) and m.__module__.startswith(f"{losses.__name__}.")}
    assert public == {*FIXED, *LEARNT}


@pytest.mark.parametrize("kind", FIXED, ids=lambda kind: kind.__name__)
def test_every_option_and_argument_reaches_the_function(kind, monkeypatch) -> None:
    place, name, options = FIXED[kind]
    spans_ranks = "group" in inspect.signature(getattr(place, name)).parameters
    defaults = inspect.signature(kind).parameters
    assert {*options, *(["process_group"] if spans_ranks else [])} == defaults.keys()
    assert all(value != defaults[option].default for option, value in options.items())
    group = Stand()
    module = kind(**options, **({"process_group": group} if spans_ranks else {}))
    if kind is BatchNormStatLoss:  # which has an average to weigh from its second call on
        module.ema_mean, module.ema_var = torch.rand(3), torch.rand(3)
    signature = inspect.signature(getattr(place, name)).parameters
    given, found = called_with(module, place, name, monkeypatch)
    given.pop("update", None)
    given.pop("index", None)  # the same as indices for all layers
    expected = options | given | ({"group": group} if spans_ranks else {})
    assert expected.keys() <= found.keys()
    assert {option: found.pop(option) for option in expected} == expected
    if kind is BatchNormStatLoss:
        means, variances = found.pop("ema")
        assert [len(means), len(variances)] == [1, 1]
        assert means[0].data_ptr() == module.ema_mean.data_ptr()
        assert variances[0].data_ptr() == module.ema_var.data_ptr()
    assert found == {name: signature[name].default for name in found}


# The papers' and their codes' (docs/losses/methods.md), where the function leaves the choice to its caller.
CHOSEN = {
    AttentionLoss: {"divergence": "kl"},
    QKVRelationLoss: {"relations": ("qq", "kk", "vv")},
    SoftTargetLoss: {"temperature": 1.0, "reduction": "batchmean"},
    DKDLoss: {"alpha": 1.0, "beta": 4.0, "temperature": 1.0},
    NKDLoss: {"gamma": 1.0, "temperature": 1.0},
    ManifoldLoss: {"intra": 4.0, "inter": 0.1, "random": 0.2, "num_samples": 192},
    ViTKDLoss: {"alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5},
}


@pytest.mark.parametrize("kind", [*FIXED, ViTKDLoss], ids=lambda kind: kind.__name__)
def test_defaults(kind) -> None:
    own = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.default is not p.empty}
    chosen = CHOSEN.get(kind, {})
    assert {option: own.pop(option) for option in chosen} == chosen
    assert own.pop("process_group", None) is None
    if kind in FIXED:
        name = {"bn_stat_loss_and_moments": "bn_stat_loss", "manifold_layers": "manifold_loss"}.get(
            FIXED[kind][1], FIXED[kind][1]
        )
        functions = inspect.signature(getattr(fastkd, name)).parameters
        assert own == {option: functions[option].default for option in own}


def test_modules_say_what_they_do():
    for module in (SoftTargetLoss(), DKDLoss(), NKDLoss()):
        assert "temperature=1.0" in repr(module)
    assert "alpha=3e-05, beta=3e-06, mask_ratio=0.5" in repr(ViTKDLoss(4, 6))


def test_vitkd_float16_incoming_gradient():
    module = ViTKDLoss(6, 6, alpha=1e-3, beta=1e-3)
    inputs = features(Ds=6, dtype=torch.float16)
    mask = module.draw_mask(2, 16)

    def f(low, high):
        return module(low, inputs[1].to(low), high, inputs[3].to(low), mask)

    _, *actual = loss_and_gradients(f, (inputs[0], inputs[2]), 65536.0)
    _, *expected = loss_and_gradients(f, (inputs[0].float(), inputs[2].float()), 65536.0)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() / e.norm() < 1e-3
