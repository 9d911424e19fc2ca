"""Modules with parameters of their own, and those that fix a logit loss's options."""

import golden
import pytest
import torch
from torch import nn

import fastkd
from fastkd.losses import DKDLoss, EarlyDistillationLoss, ManifoldLoss, NKDLoss, SoftTargetLoss, ViTKDLoss
from fastkd.testing import loss_and_gradients, relative_difference

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


def test_early_distillation_is_its_formula():
    module = EarlyDistillationLoss([4, 6], [8, 5])
    students = [torch.randn(2, 16, 4), torch.randn(2, 9, 6)]
    teachers = [torch.randn(2, 8, 4, 4), torch.randn(2, 5, 7, 6)]
    expected = 0
    for aligner, s, t in zip(module.aligners, students, teachers, strict=True):
        side = int(s.shape[1] ** 0.5)
        x = aligner(s).transpose(1, 2).reshape(2, -1, side, side)
        x = nn.functional.interpolate(x, t.shape[2:], mode="bilinear", align_corners=False)
        expected = expected + (x - t).square().mean()
    torch.testing.assert_close(module(students, teachers), expected)
    one = EarlyDistillationLoss(4, 8)
    one.aligners[0].load_state_dict(module.aligners[0].state_dict())
    torch.testing.assert_close(one(students[0].half(), teachers[0]), one([students[0].half().float()], [teachers[0]]))


def test_early_distillation_compiles_whole_and_learns():
    torch.manual_seed(1)
    module = EarlyDistillationLoss(4, 8)
    s, t = torch.randn(2, 16, 4, requires_grad=True), torch.randn(2, 8, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, t), module(s, t))
    torch.testing.assert_close(torch.autograd.grad(compiled(s, t), s), torch.autograd.grad(module(s, t), s))


def test_logit_modules_are_their_functions():
    s, t, label = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([1, 6, 0])
    pairs = [
        (SoftTargetLoss()(s, t), fastkd.soft_target_loss(s, t, temperature=1.0)),
        (
            SoftTargetLoss(temperature=3.0, reduction="mean")(s, t),
            fastkd.soft_target_loss(s, t, temperature=3.0, reduction="mean"),
        ),
        (DKDLoss()(s, t, label), fastkd.dkd_loss(s, t, label, alpha=1.0, beta=4.0, temperature=1.0)),
        (NKDLoss(gamma=2.0)(s, t, label), fastkd.nkd_loss(s, t, label, gamma=2.0, temperature=1.0)),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual, expected)


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
