"""Arguments of wrong types, lengths and sizes, and uses that are refused: the message names the argument."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastkd
import fastkd.reference
from fastkd import losses
from fastkd.ops import _checks
from fastkd.testing import assert_matches_oracle, loss_and_gradients, relative_difference
from tests._support.calls import CALLS, Call, outcome, randn, runs

BEYOND = [1e300, -1e300, 10**400, math.nan, math.inf]  # of float32
NO_NUMBER = [True, "1", None, torch.ones(()), [1.0]]
NO_TENSOR = [5, 1.5, "x", [], (), [randn(2, 3)], {}, object(), torch.ones(2, 2, dtype=torch.complex64)]
NO_LIST = [5, 1.5, True, "x", b"x", {}, object(), torch.ones(()), lambda: None]
SPARSE = torch.eye(3).to_sparse()
# What no parameter of that type accepts, by words of its annotation; None is added where it is no default.
WRONG: dict[str, list[Any]] = {
    "float": [*BEYOND, "1", True, torch.ones(()), [1.0], object()],
    "int": [0, -1, 1.5, True, "1", torch.ones(()), object()],
    "bool": [5, "x", None, torch.ones(2), [], object()],
    "str": ["x", 5, None, [], torch.ones(2), object()],
    "Tensor": [*NO_TENSOR, SPARSE],
    "list": [*NO_LIST, [], [5], [None], [torch.ones(())]],
    "label": [1.5, "x", [], [randn(2, 3)], {}, object(), -1, 7, torch.ones(4), torch.ones(3, dtype=torch.int64)],
    "dims": [0, -1, 1.5, True, "x", {}, object(), torch.ones(()), [], [0], [None], ["x"]],
    "Generator": [5, "x", True, torch.ones(2), object()],
    "slice": [5, "x", (0, 1), object()],
}
KINDS = {  # parameters whose annotation names a type of this package or several types
    "return_terms": "bool", "p": "str", "label": "label", "student_dims": "dims", "teacher_dims": "dims",
    "student": "list", "teacher": "list", "students": "list", "teachers": "list", "query_slice": "slice",
}  # fmt: skip
SINGLE = ("relation_loss", "soft_target_loss", "dkd_loss", "nkd_loss")  # whose student is a tensor


def kind(function: str, name: str, parameter: inspect.Parameter) -> str | None:
    text = str(parameter.annotation)
    if name in ("backend", "group", "process_group"):
        return None  # tests/operators/test_contract.py, tests/distributed/test_distributed.py
    if name in KINDS and not (name in ("student", "teacher") and function in SINGLE):
        return KINDS[name]
    words = {"Sequence": "list", "tuple": "list", "Literal": "str", "Generator": "Generator", "Tensor": "Tensor"}
    words |= {"bool": "bool", "float": "float", "int": "int"}
    return next(wanted for word, wanted in words.items() if word in text)


def parameters() -> list[Any]:
    """(call, parameter, kind) once for each parameter of each function and module call."""
    found = {}
    for call in CALLS:
        target = call.target()
        signature = inspect.signature(target.forward if isinstance(target, nn.Module) else target)
        for name, parameter in signature.parameters.items():
            if (wanted := kind(call.function, name, parameter)) is not None:
                optional = "None" in str(parameter.annotation) or parameter.default is None
                key = (call.function, name)
                if key not in found or name in call.arguments | call.constants:  # a call that gives it, if there is one
                    found[key] = (call, name, wanted, optional)
    return [pytest.param(*value, id="-".join(key)) for key, value in found.items()]


def assert_refused(call: Callable[[], object], name: str, value: Any, what: str = "") -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert name in message, f"{what}{value!r}: {message}"
    described = [type(value).__name__, repr(value), str(value), str(getattr(value, "dtype", "?"))]
    described += [str(getattr(value, "layout", "?")), str(tuple(getattr(value, "shape", "?")))]
    if isinstance(value, list | tuple):
        described += [str(len(value)), *(type(x).__name__ for x in value), *map(repr, value), "()", "none"]
    if isinstance(value, Tensor):
        described.append("1")  # one layer
    assert any(text in message for text in described), f"{what}{value!r} is not described: {message}"


@pytest.mark.parametrize(("call", "name", "wanted", "optional"), parameters())
def test_wrong_arguments_are_named(call: Call, name: str, wanted: str, optional: bool) -> None:
    values = WRONG[wanted] + ([] if optional or wanted in ("bool", "str") else [None])
    for value in values:
        assert_refused(lambda v=value: call.run(**{name: v}), name, value)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_sparse_tensors_are_refused(call: Call) -> None:
    for path, _ in call.leaves():
        argument = path.split("'")[1].replace("indices", "index").rstrip("s")
        with pytest.raises(TypeError, match=rf"{argument}.*must be a dense tensor, got torch.sparse_coo"):
            call.with_leaf(path, Tensor.to_sparse).run()


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_tensors_without_values_are_refused_by_name(call: Call) -> None:
    """One on the meta device beside others that hold values. Some calls take one: their result is then on it too."""
    for path, _ in call.leaves():
        result = outcome(call.with_leaf(path, lambda x: x.to("meta")))
        assert all(x.is_meta for x in tree_leaves(result) if x is not None), path


def test_every_parameter_has_a_call() -> None:
    """The calls name every tensor that a function takes, or this file's tests would leave it out."""
    given: dict[str, set[str]] = {}
    for call in CALLS:
        given.setdefault(call.function, set()).update(call.arguments)
    assert given.keys() >= set(fastkd.functional.__all__)
    for name in fastkd.functional.__all__:
        for parameter in inspect.signature(getattr(fastkd, name)).parameters.values():
            if "Tensor" in str(parameter.annotation):
                assert parameter.name in given[name], f"{name} {parameter.name}"


QKV = tuple(randn(2, 5, 6, seed=seed) for seed in range(3))
LAYERS = [randn(3, 5, 2), randn(3, 7, 2)]
STATISTICS = [torch.ones(5), torch.ones(7)], [torch.ones(5), torch.ones(7)]
PAIRS = [(torch.ones(5), torch.ones(5)), (torch.ones(7), torch.ones(7))]


def bn_stat(**options: Any) -> Tensor:
    return fastkd.bn_stat_loss(LAYERS, *STATISTICS, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bn_stat(momentum=0.1, ema=STATISTICS[:1]), r"ema must be a pair \(means, vars\), got 1 elements"),
        (lambda: bn_stat(momentum=0.1, ema=(*STATISTICS, [])), r"ema must be a pair \(means, vars\), got 3 elements"),
        (lambda: bn_stat(momentum=0.1, ema=(STATISTICS[0], STATISTICS[1][:1])), r"ema\[1\] must have .*got 1 for 2"),
        (lambda: bn_stat(momentum=0.1), "momentum and ema go together.*got momentum=0.1 and ema of type NoneType"),
        (lambda: bn_stat(moments=[(*pair, pair[0]) for pair in PAIRS]), r"moments\[0\] must be a pair .*got 3"),
        (lambda: bn_stat(moments=[pair[:1] for pair in PAIRS]), r"moments\[0\] must be a pair \(mean, var\), got 1"),
        (lambda: bn_stat(moments=[pair[0] for pair in PAIRS]), r"moments\[0\] must be a list or tuple .*got Tensor"),
        (lambda: bn_stat(moments=PAIRS[:1]), "moments must have one pair per layer, got 1 for 2"),
        (lambda: bn_stat(layer_weights=[1.0]), "layer_weights must have one number per layer, got 1 for 2"),
        (lambda: fastkd.bn_stat_loss(LAYERS[0], *STATISTICS), r"inputs must be .*got Tensor: give \[x\] for one"),
        (lambda: fastkd.qkv_relation_loss(QKV[:2], QKV, relation_heads=2), r"student must be a triple .*got 2"),
        (lambda: fastkd.qkv_relation_loss(QKV, QKV * 2, relation_heads=2), r"teacher must be a triple .*got 6"),
        (lambda: fastkd.manifold_loss([QKV[0]], QKV[1:]), "students and teachers must match .*got 1 and 2"),
        (lambda: fastkd.manifold_loss(QKV[0], QKV[1], generator=5), "generator must be a torch.Generator.*got int"),
        (
            lambda: losses.ManifoldLoss()(QKV[0], QKV[1], index=torch.arange(3), indices=[torch.arange(3)]),
            "index is one draw for all layers and indices are one for each",
        ),
        (lambda: losses.ManifoldLoss()(QKV[:2], [*QKV[1:2], QKV[2][:, 1:]]), r"student\[1\] and teacher\[1\] must"),
        (lambda: losses.EarlyDistillationLoss(5.5, 4), "student_dims must be a list or tuple of ints.*got float"),
        (lambda: losses.EarlyDistillationLoss([5], "4"), "teacher_dims must be a list or tuple of ints.*got str"),
    ],
)  # fmt: skip
def test_wrong_lengths_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_second_call_of_a_module_with_an_average_refuses_wrong_inputs_as_the_first_does() -> None:
    module = losses.BatchNormStatLoss(momentum=0.5)
    module(LAYERS, *STATISTICS)
    for inputs in (5, [5, 5], [torch.ones(()), torch.ones(())], LAYERS[0], None):
        with pytest.raises((TypeError, ValueError), match=r"^inputs"):
            module(inputs, *STATISTICS)
    with pytest.raises(ValueError, match="inputs must have the 12 channels of the moving average, got 5"):
        module(LAYERS[:1], *(x[:1] for x in STATISTICS))


MODULES = [getattr(losses, name) for name in losses.__all__]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_wrong_options_of_modules_are_named(module: type[nn.Module]) -> None:
    """When they are constructed, or in the first call."""
    required = {"relation_heads": 2, "student_dim": 4, "teacher_dim": 6, "student_dims": 4, "teacher_dims": 6}
    required |= {"spread_margin": 2.0, "boundary_margin": 0.5}
    signature = inspect.signature(module).parameters
    needed = {name: value for name, value in required.items() if name in signature}
    call = next(call for call in CALLS if call.function in (module.__name__, FUNCTIONS.get(module.__name__)))
    for name, parameter in signature.items():
        if (wanted := kind(module.__name__, name, parameter)) is None:
            continue
        for value in WRONG[wanted]:
            assert_refused(
                lambda n=name, v=value: module(**needed | {n: v})(**call.arguments),
                name,
                value,
                f"{module.__name__} {name} ",
            )


FUNCTIONS = {
    "AttentionLoss": "attention_loss", "QKVRelationLoss": "qkv_relation_loss", "RelationLoss": "relation_loss",
    "SoftTargetLoss": "soft_target_loss", "DKDLoss": "dkd_loss", "NKDLoss": "nkd_loss",
    "IntraDivergenceLoss": "intra_divergence_loss",
}  # fmt: skip

HEATED = [call for call in CALLS if "temperature" in inspect.signature(call.target()).parameters]


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, 1e-7, 1e7, 1e300, math.inf, math.nan, 10**400, True, "1"])
def test_temperatures_are_refused(value: Any) -> None:
    for call in HEATED:
        with pytest.raises((TypeError, ValueError), match=r"^temperature must (be|lie)") as caught:
            call.run(temperature=value)
        assert str(value) in str(caught.value) or type(value).__name__ in str(caught.value)
    for module in (losses.SoftTargetLoss, losses.DKDLoss, losses.NKDLoss):
        with pytest.raises((TypeError, ValueError), match=r"^temperature must (be|lie)"):
            module(temperature=value)


@pytest.mark.parametrize("temperature", [_checks.COLDEST, _checks.HOTTEST])
@pytest.mark.parametrize(("call", "backend"), [(c, b) for c, b in runs(HEATED) if b != "triton"], ids=str)
def test_the_coldest_and_the_hottest_temperature_make_sense(call: Call, backend: str, temperature: float) -> None:
    def at(module: Any, dtype: torch.dtype, temperature: float = temperature) -> list[Tensor]:
        inputs = call.to(dtype).arguments
        constants = call.constants | {"temperature": temperature}
        students = [inputs[name] for name in call.students]

        def loss(*values: Tensor) -> Tensor:
            given = inputs | dict(zip(call.students, values, strict=True))
            return getattr(module, call.function)(**given, **constants).sum()

        return list(loss_and_gradients(loss, students))

    oracle, eager = at(fastkd.reference, torch.float64), at(fastkd.reference, torch.float32)
    with fastkd.backend(backend):
        actual = at(fastkd, torch.float32)
    reduced = max(x.numel() for _, x in call.leaves())
    for number, results in enumerate(zip(actual, eager, oracle, strict=True)):
        if "attention" in call.function and temperature > 1:
            # Maps that are all but equal: what remains is rounding, beside the numbers of a temperature of 1.
            usual = at(fastkd.reference, torch.float64, 1.0)[number].abs().max()
            results = [x + usual.to(x.dtype) for x in results]
        assert_matches_oracle(*results, reduced, f"{call} result {number}")


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


some_triton = pytest.mark.parametrize(
    ("call", "backend"),
    [(c, b) for c, b in runs() if b != "triton" or c.option in ("none-match", "3x5", "p2")],
    ids=str,
)


@some_triton
def test_every_tensor_may_come_from_inference_mode(call: Call, backend: str) -> None:
    """All but one student, without which there would be nothing to differentiate."""
    for student in call.students:
        alone = replace(call, students=(student,))
        made = alone
        for path, _ in call.leaves():
            if not alone.is_student(path):
                made = made.with_leaf(path, inference)
        with fastkd.backend(backend):
            assert all(map(torch.equal, made.loss_and_gradients(), alone.loss_and_gradients())), student
            with torch.inference_mode():
                made.run()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@some_triton
def test_batched_gradients_are_right_or_refused(call: Call, backend: str) -> None:
    """is_grads_batched=True: PyTorch loops over an operator that returns tensors, not over one that returns a list."""
    with fastkd.backend(backend):
        results, students = call.differentiable()
        incoming = [torch.randn(3, *x.shape, device=x.device, dtype=x.dtype) for x in results]
        options: dict[str, Any] = {"allow_unused": True, "retain_graph": True}
        one_by_one = [torch.autograd.grad(results, students, [g[i] for g in incoming], **options) for i in range(3)]
        if call.op == "moments_fwd" and "moments" not in call.students:
            refused = r"(batch_moments|bn_stat_loss) takes no batched gradients.*autograd.grad once for each.*reference"
            with pytest.raises(RuntimeError, match=refused):
                torch.autograd.grad(results, students, incoming, is_grads_batched=True, **options)
            return
        batched = torch.autograd.grad(results, students, incoming, is_grads_batched=True, **options)
    for x, *each in zip(batched, *one_by_one, strict=True):
        assert x is None or relative_difference(x, torch.stack(each)) < 1e-6
