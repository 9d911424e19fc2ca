"""What every public function promises beyond its value, checked on every case of tests/cases.py."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from cases import CASES, Case, OperatorCalls
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import fastkd
import fastkd.reference
from fastkd.ops import _autograd, _dispatch, _schemas
from fastkd.ops._autograd import scaled
from fastkd.testing import DEVICE, loss_and_gradients, poisoned_allocations, relative_difference

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=["eager", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastkd.backend(request.param):
        yield request.param


def test_every_public_function_has_a_formula_and_a_case() -> None:
    assert fastkd.reference.__all__ == fastkd.functional.__all__
    assert {case.function for case in CASES} == set(fastkd.functional.__all__)


@each_case
def test_compiles_to_one_graph(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.scalar, fullgraph=True, backend="aot_eager")
    expected, actual = (loss_and_gradients(f, case.inputs()) for f in (case.scalar, compiled))
    for a, e in zip(actual, expected, strict=True):
        assert relative_difference(a, e) < 1e-6  # the compiler may sum in another order


@each_case
def test_same_bits_twice_and_no_write_into_inputs(case: Case, backend: str) -> None:
    inputs = case.inputs()
    before = [x.clone() for x in inputs]
    with poisoned_allocations():
        first = loss_and_gradients(case.scalar, inputs)
        second = loss_and_gradients(case.scalar, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@each_case
def test_backward_twice_and_any_incoming_gradient(case: Case, backend: str) -> None:
    leaves = [x.requires_grad_() for x in case.inputs()]
    loss = case.scalar(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, 4.0), retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, k, b, c in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, k), "a later backward wrote into an earlier gradient"
        assert torch.equal(a, c)
        assert relative_difference(b, 4 * a) < 1e-6


@each_case
def test_autocast_leaves_the_maths_alone(case: Case, backend: str) -> None:
    expected = loss_and_gradients(case.scalar, case.inputs())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = loss_and_gradients(case.scalar, case.inputs())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@each_case
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(case: Case, backend: str, use_reentrant: bool) -> None:
    expected = loss_and_gradients(case.scalar, case.inputs())
    leaves = [x.requires_grad_() for x in case.inputs()]
    checkpoint(case.scalar, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, e) for x, e in zip(leaves, expected[1:], strict=True))


@each_case
def test_no_grad_gives_the_same_loss(case: Case, backend: str) -> None:
    expected, *_ = loss_and_gradients(case.scalar, case.inputs())
    with torch.no_grad():
        loss = case.scalar(*(x.requires_grad_() for x in case.inputs()))
    assert not loss.requires_grad
    assert relative_difference(loss, expected) < 1e-6


@each_case
def test_float16_under_a_grad_scaler(case: Case, backend: str) -> None:
    """Incoming gradient 65536 / loss scale, as GradScaler gives: right to 1e-3 of the float64 result."""
    inputs = case.inputs(torch.float16)
    scale = 65536.0
    oracle = loss_and_gradients(case.scalar, [x.double() for x in inputs], scale)
    while max(g.abs().max().item() for g in oracle[1:]) > 3e4:  # what GradScaler does on overflow
        scale, oracle = scale / 2, (oracle[0], *(g / 2 for g in oracle[1:]))
    actual = loss_and_gradients(case.scalar, inputs, scale)
    for a, o in zip(actual[1:], oracle[1:], strict=True):
        assert a.dtype == torch.float16
        assert ((a.double() - o).norm() / o.norm()).item() < 1e-3


@each_case
def test_double_backward_is_refused(case: Case, backend: str) -> None:
    leaves = [x.requires_grad_() for x in case.inputs()]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*fastkd\.reference"):
        torch.autograd.grad(case.scalar(*leaves), leaves, create_graph=True)


@each_case
def test_transforms_are_refused(case: Case, backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"does not support torch.vmap or torch.func.*fastkd\.reference"):
        torch.func.grad(case.scalar)(*case.inputs())
    with pytest.raises(RuntimeError, match=r"does not support torch.vmap or torch.func.*fastkd\.reference"):
        torch.vmap(case.scalar)(*(x.unsqueeze(0) for x in case.inputs()))


@each_case
def test_forward_mode_is_refused(case: Case, backend: str) -> None:
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|forward AD"):
        case.scalar(*(forward_ad.make_dual(x, torch.ones_like(x)) for x in case.inputs()))


def _calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    recorder = OperatorCalls()
    with recorder:
        loss_and_gradients(case.scalar, case.inputs())
    return recorder.calls


@each_case
def test_opcheck(case: Case, backend: str) -> None:
    for op, args in _calls(case):
        torch.library.opcheck(op, tree_map_only(Tensor, Tensor.detach, args))


def test_every_operator_is_checked() -> None:
    with fastkd.backend("eager"):
        called = {op._schema.name for case in CASES for op, _ in _calls(case)}
    assert called == {f"fastkd::{op}_eager" for op in _schemas.STEMS}


def test_no_operator_is_registered_beside_the_page() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastkd::")}
    assert registered == {f"fastkd::{op}{suffix}" for op in _schemas.STEMS for suffix in ("", "_eager", "_triton")}


@pytest.mark.parametrize("op", list(_schemas.STEMS))
def test_schema_and_implementations_name_the_same_arguments(op: str) -> None:
    """The order of an operator's arguments is written in its schema; fake, eager and Triton follow it."""
    schema = [argument.name for argument in getattr(torch.ops.fastkd, op).default._schema.arguments]
    functions = [
        getattr(_schemas, f"_{op}"),
        getattr(importlib.import_module(f"fastkd.eager.{_schemas.STEMS[op]}"), op),
    ]
    if _dispatch.HAS_TRITON:
        functions.append(getattr(importlib.import_module(f"fastkd_kernels.{_schemas.STEMS[op]}"), op))
    for function in functions:
        assert list(inspect.signature(function).parameters) == schema, function.__module__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("stored", [torch.float32, None], ids=["from float32", "as stored"])
def test_a_stored_gradient_is_scaled_in_float32_and_rounded_once(
    stored: torch.dtype | None, dtype: torch.dtype
) -> None:
    gradient = torch.randn(70_001, device=DEVICE).to(stored or dtype)  # more than a chunk, and a tail
    for factor in (1 / 3, 1e-3, 65536 / 7):
        dloss = torch.tensor(factor, device=DEVICE)
        assert torch.equal(scaled(gradient, dloss, dtype), (gradient.float() * dloss).to(dtype))


def test_a_stored_gradient_on_a_gpu_is_scaled_by_one_kernel() -> None:
    """Whatever its size: a launch takes as long as 65,536 elements do."""

    class Kernels(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func.overloadpacket is torch.ops.aten.mul
            return func(*args, **(kwargs or {}))

    stored = torch.empty(300_000, dtype=torch.bfloat16, device="meta")  # has no kernels, but all that calls them
    with Kernels() as kernels:
        scaled(stored, torch.empty((), device="meta"), torch.bfloat16)
    assert kernels.calls == 1


def test_a_stored_gradient_on_a_gpu_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph replays its backward pass, which would scale a tensor that it had written to once more."""

    class Written(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_autograd, "_is_last_use", lambda _: True)
    for dtype in (torch.float32, torch.float16, torch.float64):
        with Written() as written:
            scaled(torch.empty(8, dtype=dtype, device="meta"), torch.empty((), device="meta"), dtype)
        assert not any(name.split(".")[0].endswith("_") for name in written.names), written.names


def test_a_stored_gradient_is_handed_out_once() -> None:
    """A backward that frees its graph gives the stored gradient itself; others leave it as it is."""
    student, teacher = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True), torch.randn(2, 5, 8, device=DEVICE)
    loss = fastkd.relation_loss(student, teacher)
    (stored,) = loss.grad_fn.saved_tensors
    kept = stored.clone()

    def gradient(of: Tensor, incoming: Tensor | None = None, **options: bool) -> Tensor:
        return torch.autograd.grad(of, student, incoming, **options)[0]

    assert gradient(loss, retain_graph=True).data_ptr() != stored.data_ptr()
    assert torch.equal(gradient(loss, torch.full_like(loss, 3.0), retain_graph=True), kept * 3)
    with OperatorCalls():
        assert gradient(loss, retain_graph=True).data_ptr() != stored.data_ptr()
    assert torch.equal(stored, kept)

    assert gradient(loss).data_ptr() == stored.data_ptr()
    again = fastkd.relation_loss(student, teacher)
    assert torch.equal(gradient(again, torch.full_like(again, 3.0)), kept * 3)
    again = fastkd.relation_loss(student, teacher)
    assert torch.equal(gradient(again, torch.ones(3, device=DEVICE), is_grads_batched=True)[2], kept)
    (fastkd.relation_loss(student, teacher) + fastkd.relation_loss(student, teacher)).backward()
    assert torch.equal(student.grad, kept * 2)


@pytest.mark.skipif(not _dispatch.HAS_TRITON or _dispatch.INTERPRETED, reason="needs compiled Triton")
@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_too_old_for_the_triton_kernels_is_told(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    reason = _dispatch.why_not("relation_fwd", "triton", "cuda", torch.float32)
    assert reason is None if runs else "compute capability 8.0, this GPU has 7.5" in str(reason)


def test_backends_by_name() -> None:
    x = torch.randn(2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="backend must be one of auto, eager, native, triton, got 'cuda'"):
        fastkd.backend("cuda").__enter__()
    for name in ("native", "triton"):
        reason = _dispatch.why_not("relation_fwd", name, DEVICE, x.dtype)
        if reason is not None:
            with pytest.raises(RuntimeError, match="cannot run here"):
                fastkd.relation_loss(x, x, backend=name)
    with fastkd.backend("eager"), OperatorCalls() as recorder:
        fastkd.batch_moments(x)
        fastkd.batch_moments(x, backend="auto")
    assert [op._schema.name for op, _ in recorder.calls] == ["fastkd::moments_fwd_eager"] * 2
    assert _dispatch._default == "auto"
