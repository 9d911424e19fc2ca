"""Batch-norm statistic losses against the official codes, their module, DeepInversion's hook and its total loss."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fastkd
from fastkd.compat import DeepInversionFeatureHook
from fastkd.losses import BatchNormStatLoss
from fastkd.testing import DEVICE, backends, loss_and_gradients, relative_difference
from tests._support import golden
from tests._support.cases import OperatorCalls

available = pytest.mark.parametrize("backend", backends("moments_fwd"))
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def layers(data, dtype, prefix="in."):
    """(inputs, running means, running variances) of a golden case."""
    found = []
    for name in ("act", "running_mean", "running_var"):
        keys = [f"{'in.' if name != 'act' else prefix}{name}{i}" for i in range(100)]
        found.append([data[k].to(DEVICE, dtype) for k in keys if k in data])
    assert len({len(x) for x in found}) == 1
    return found


def close(actual, expected, case, dtype, what):
    assert relative_difference(actual.double().cpu(), expected) <= golden.tolerance(case, dtype, what)


def skip_unless_runs(backend, dtype):
    if backend not in backends("moments_fwd", dtype):
        pytest.skip(f"{backend} does not take {dtype}")


def given(backend, case, dtype):
    """The data of a golden case and its layers, where the backend takes the dtype."""
    skip_unless_runs(backend, dtype)
    data = golden.load(case)
    return data, *layers(data, dtype)


@both
@pytest.mark.parametrize("case", golden.cases("bn_stat_gdfq"), ids=golden.name)
@available
def test_golden_gdfq(backend, case, dtype):
    data, inputs, means, variances = given(backend, case, dtype)

    def f(*inputs):
        return fastkd.bn_stat_loss(inputs, means, variances, distance="mse", backend=backend)

    loss, *gradients = loss_and_gradients(f, inputs)
    close(loss, data["loss"], case, dtype, "loss")
    for i, g in enumerate(gradients):
        close(g, data[f"grad.act{i}"], case, dtype, "grad")


@both
@pytest.mark.parametrize("case", golden.cases("bn_stat_zeroq"), ids=golden.name)
@available
def test_golden_zeroq(backend, case, dtype):
    """The images are one more layer, of mean 0 and deviation 1."""
    data, inputs, means, variances = given(backend, case, dtype)
    images = data["in.images"].to(DEVICE, dtype)
    # The official target of the images is 1 itself, where a layer's is sqrt(var + 1e-6).
    target = images.new_zeros(3), images.new_full((3,), 1 - 1e-6)

    def on_layers(*inputs):
        return fastkd.bn_stat_loss(inputs, means, variances, distance="image", backend=backend)

    def on_images(x):
        return fastkd.bn_stat_loss([x], [target[0]], [target[1]], distance="image", backend=backend)

    close(on_layers(*inputs), data["loss.layers"], case, dtype, "loss")
    close(on_images(images), data["loss.input"], case, dtype, "loss")
    loss, *gradients = loss_and_gradients(lambda *xs: on_layers(*xs[:-1]) + on_images(xs[-1]), (*inputs, images))
    close(loss, data["loss"], case, dtype, "loss")
    for i, g in enumerate(gradients[:-1]):
        close(g, data[f"grad.act{i}"], case, dtype, "grad")
    close(gradients[-1], data["grad.images"], case, dtype, "grad")


@both
@pytest.mark.parametrize("case", golden.cases("bn_stat_fast"), ids=golden.name)
@available
def test_golden_fast(backend, case, dtype):
    skip_unless_runs(backend, dtype)
    data, steps = golden.load(case), case["params"]["steps"]
    module = BatchNormStatLoss(momentum=case["params"]["mmt"], backend=backend)
    total = 0
    for step in range(steps):
        inputs, means, variances = layers(data, dtype, f"in.step{step}_")
        loss, *gradients = loss_and_gradients(lambda *xs, m=means, v=variances: module(xs, m, v), inputs)
        total = total + loss
        close(loss, data[f"loss.step{step}"], case, dtype, "loss")
        for i, g in enumerate(gradients):
            close(g, data[f"grad.step{step}_act{i}"], case, dtype, "grad")
        if case["params"]["mmt"] == 0:
            assert module.ema_mean is None
            continue
        for name in ("mean", "var"):
            expected = torch.cat([data[f"aux.ema_{name}{i}_after_step{step}"] for i in range(len(inputs))])
            close(getattr(module, f"ema_{name}"), expected, case, dtype, "loss")
    close(total, data["loss"], case, dtype, "loss")


def network(*widths):
    """Inputs, running means and variances of BatchNorm layers."""
    inputs = [torch.randn(4, C, 6, 5, requires_grad=True) for C in widths]
    return inputs, [torch.randn(C) for C in widths], [torch.rand(C) + 0.5 for C in widths]


def test_module_takes_moments_once_and_leaves_the_average_alone_if_told():
    inputs, means, variances = network(3, 5)
    module = BatchNormStatLoss(momentum=0.9, layer_weights=[10.0, 1.0])
    with OperatorCalls() as operators:
        module(inputs, means, variances)
    names = [func.overloadpacket.__name__ for func, _ in operators.calls]
    assert len(names) == 2 and names[0].startswith("moments_fwd") and names[1].startswith("bn_distance")
    before = module.ema_mean.clone()
    loss = module([x + 1 for x in inputs], means, variances, update=False)
    assert torch.equal(module.ema_mean, before)
    ema = ([before[:3], before[3:]], list(module.ema_var.split([3, 5])))
    expected = fastkd.bn_stat_loss(
        [x + 1 for x in inputs], means, variances, layer_weights=[10.0, 1.0], momentum=0.9, ema=ema
    )
    assert torch.equal(loss, expected)
    module([x + 1 for x in inputs], means, variances)
    assert not torch.equal(module.ema_mean, before)
    assert not module.ema_mean.requires_grad


def test_module_backward_after_the_next_update():
    inputs, means, variances = network(3)
    module = BatchNormStatLoss(momentum=0.5)
    losses = [module([(k + 1) * inputs[0]], means, variances) for k in range(3)]
    (late,) = torch.autograd.grad(losses[1], inputs[0], retain_graph=True)
    assert late.isfinite().all()
    torch.stack(losses).sum().backward()


def test_module_state_survives_a_checkpoint():
    inputs, means, variances = network(3, 5)
    module = BatchNormStatLoss(momentum=0.9)
    module(inputs, means, variances)
    fresh = nn.ModuleDict({"bn": BatchNormStatLoss(momentum=0.9)})
    fresh.load_state_dict({f"bn.{k}": v for k, v in module.state_dict().items()})
    assert torch.equal(fresh["bn"](inputs, means, variances), copy.deepcopy(module)(inputs, means, variances))
    assert BatchNormStatLoss().state_dict() == {}
    with pytest.raises(ValueError, match="inputs must have the 8 channels of the moving average, got 3"):
        module(inputs[:1], means[:1], variances[:1])


@pytest.mark.parametrize("distance", ["l2", "mse", "image"])
def test_module_is_the_function(distance):
    inputs, means, variances = network(3, 5)
    weights = [10.0, 1.0]
    module = BatchNormStatLoss(distance=distance, layer_weights=weights)
    expected = fastkd.bn_stat_loss(inputs, means, variances, distance=distance, layer_weights=weights)
    assert torch.equal(module(inputs, means, variances), expected)


def test_module_compiles_whole():
    inputs, means, variances = network(3, 5)
    eager, compiled = BatchNormStatLoss(momentum=0.9), BatchNormStatLoss(momentum=0.9)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for k in range(3):
        xs = [x + k for x in inputs]
        a, b = eager(xs, means, variances), run(xs, means, variances)
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(torch.autograd.grad(b, inputs), torch.autograd.grad(a, inputs))
        torch.testing.assert_close(compiled.ema_var, eager.ema_var)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distance": "l1"}, ValueError, "distance must be one of"),
        ({"momentum": 1.0}, ValueError, "momentum must be below 1"),
        ({"momentum": -0.1}, ValueError, "momentum must be a finite number >= 0"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a Python number"),
        ({"momentum": 0.9, "distance": "image"}, ValueError, "momentum averages batch statistics"),
    ],
)
def test_module_errors(options, error, message):
    with pytest.raises(error, match=message):
        BatchNormStatLoss(**options)


class Inverted(nn.Module):
    """The little network of deepinversion_total."""

    def __init__(self, parameters):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 6)
        self.double().load_state_dict(parameters, strict=False)
        self.requires_grad_(False).eval()

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@both
@pytest.mark.parametrize("case", golden.cases("deepinversion_total"), ids=golden.name)
def test_golden_deepinversion_total(case, dtype):
    data, p = golden.load(case), case["params"]
    teacher, student = (
        Inverted({k.removeprefix(f"param.{who}."): v for k, v in data.items() if k.startswith(f"param.{who}.")}).to(
            DEVICE, dtype
        )
        for who in ("teacher", "student")
    )
    hooks = [DeepInversionFeatureHook(bn) for bn in (teacher.bn1, teacher.bn2)]
    targets = data["in.targets"].to(DEVICE)
    terms = {}

    def total(images):
        z = teacher(images)
        terms["ce"] = nn.functional.cross_entropy(z, targets)
        terms["r_feature"] = p["first_bn_multiplier"] * hooks[0].r_feature + hooks[1].r_feature
        terms["tv_l1"] = fastkd.total_variation(images, p=1)
        terms["tv_l2"] = fastkd.total_variation(images, p=2)
        terms["l2"] = fastkd.image_prior(images, l2=1.0)
        loss = p["main_loss_multiplier"] * terms["ce"] + p["r_feature"] * terms["r_feature"]
        loss = loss + fastkd.image_prior(images, tv_l1=p["tv_l1"], tv_l2=p["tv_l2"], l2=p["l2"])
        if p["adi_scale"]:
            terms["adi"] = fastkd.competition_loss(student(images), z, temperature=p["adi_T"])
            loss = loss + p["adi_scale"] * terms["adi"]
        return loss

    loss, dimages = loss_and_gradients(total, (data["in.images"].to(DEVICE, dtype),))
    close(loss, data["loss"], case, dtype, "loss")
    close(dimages, data["grad.images"], case, dtype, "grad")
    for name, value in terms.items():
        close(value.detach(), data[f"loss.{name}"], case, dtype, "loss")
    for hook in hooks:
        hook.close()


def test_hook():
    bn = nn.BatchNorm2d(4).eval()
    hook = DeepInversionFeatureHook(bn)
    with pytest.raises(RuntimeError, match="BatchNorm2d did not run: no forward pass"):
        _ = hook.r_feature
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    for k in (1, 2):  # the same leaf twice: nothing of the first graph may be left
        bn(x)
        hook.r_feature.backward()
        expected = (bn.running_mean - x.mean((0, 2, 3))).norm() + (
            bn.running_var - x.var((0, 2, 3), correction=0)
        ).norm()
        torch.testing.assert_close(hook.r_feature, expected)
        torch.testing.assert_close(x.grad, k * torch.autograd.grad(expected, x)[0])
    seen = weakref.ref(x)
    hook.close()
    hook.close()
    del x, expected
    gc.collect()
    assert seen() is None
    assert not bn._forward_hooks
    assert not bn._forward_pre_hooks
    with pytest.raises(RuntimeError, match="after close"):
        _ = hook.r_feature
    with pytest.raises(ValueError, match="batch norm"):
        DeepInversionFeatureHook(nn.Linear(3, 3))
    DeepInversionFeatureHook(bn).close()
