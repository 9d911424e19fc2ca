"""What every public function promises beyond its value, checked on every case of tests/_support/cases.py."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import fastkd
import fastkd.reference
from fastkd import _extension, _precision, losses
from fastkd.ops import _autograd, _checks, _dispatch, _schemas
from fastkd.ops._autograd import scaled
from fastkd.testing import DEVICE, loss_and_gradients, poisoned_allocations, relative_difference
from tests._support.calls import CALLS, Call
from tests._support.cases import CASES, Case, OperatorCalls
from tests._support.pairs import in_pairs

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=["eager", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastkd.backend(request.param):
        yield request.param


def test_every_public_function_has_a_formula_and_a_case() -> None:
    formulas = sorted(name for name, value in vars(fastkd.reference).items() if inspect.isfunction(value))
    assert formulas == fastkd.functional.__all__
    assert {case.function for case in CASES} == set(fastkd.functional.__all__)


@pytest.mark.parametrize(
    "backend", ["auto", pytest.param("eager", marks=pytest.mark.exhaustive)], indirect=True
)  # an operator is opaque to the compiler, whoever implements it
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


def _calls(case: Case, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    recorder = OperatorCalls()
    with recorder:
        loss_and_gradients(case.scalar, case.inputs(dtype))
    return recorder.calls


@each_case
def test_opcheck(case: Case, backend: str) -> None:
    for op, args in _calls(case):
        torch.library.opcheck(op, tree_map_only(Tensor, Tensor.detach, args))


@each_case
def test_fakes_have_the_dtypes_and_strides_of_results(case: Case, backend: str) -> None:
    """What torch.compile believes, where opcheck does not look: 16 bits beside float32, and a float64 teacher."""
    calls = [call for dtype in (torch.float64, torch.float16, torch.bfloat16) for call in _calls(case, dtype)]
    for op, args in _calls(case):
        names = [argument.name for argument in op._schema.arguments]
        wider = [
            tree_map_only(Tensor, Tensor.double, x) if "teacher" in name else x
            for name, x in zip(names, args, strict=True)
        ]
        calls += [(op, wider)] * ("teacher" in "".join(names) and "_bwd" not in op._schema.name)
    for op, args in calls:
        detached = tree_map_only(Tensor, Tensor.detach, tuple(args))
        with FakeTensorMode() as mode:
            fake = op(*tree_map_only(Tensor, mode.from_tensor, detached))
        for real, expected in zip(tree_leaves(op(*detached)), tree_leaves(fake), strict=True):
            assert (real.dtype, real.stride()) == (expected.dtype, expected.stride()), op


def test_every_operator_is_checked() -> None:
    with fastkd.backend("eager"):
        called = {op._schema.name for case in CASES for op, _ in _calls(case)}
    assert called == {f"fastkd::{op}_eager" for op in _schemas.STEMS}


def test_no_operator_is_registered_beside_the_page() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastkd::")}
    assert registered == {f"fastkd::{op}{suffix}" for op in _schemas.STEMS for suffix in ("", "_eager", "_triton")}


@pytest.mark.parametrize("op", list(_schemas.STEMS))
def test_schema_and_implementations_name_the_same_arguments(op: str) -> None:
    """The order of an operator's arguments is written in its schema; eager and Triton follow it."""
    schema = [argument.name for argument in getattr(torch.ops.fastkd, op).default._schema.arguments]
    functions = [getattr(importlib.import_module(f"fastkd.eager.{_schemas.STEMS[op]}"), op)]
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


CPU = torch.arange(4)


def _masked(x: Tensor) -> Tensor:
    low = x[:, None].expand(-1, 2, -1, -1)
    return losses.ViTKDLoss(8, 8).to("meta")(low, low, x, x, mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("index", lambda x: fastkd.relation_loss(x, x, scope="batch", index=CPU)),
        ("index", lambda x: fastkd.manifold_loss(x, x, index=CPU)),
        ("label", lambda x: fastkd.dkd_loss(x[0], x[0], CPU)),
        ("label", lambda x: fastkd.nkd_loss(x[0], x[0], torch.ones(4, 8), gamma=1.0)),
        ("labels", lambda x: fastkd.intra_divergence_loss(x[0], CPU, spread_margin=1, boundary_margin=1)),
        ("mask", _masked),
    ],
)
def test_a_graph_under_capture_takes_no_tensor_of_a_cpu(
    name: str, call: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay would read the memory where it was. Tensors without memory stand in for those of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"{name} must be on meta while a CUDA graph is captured, got cpu"):
        call(torch.empty(2, 4, 8, device="meta"))


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


@pytest.mark.skipif(not _dispatch.HAS_TRITON, reason="needs triton")
def test_no_call_looks_for_modules_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look reads folders, and takes longer than a small loss."""
    asked = [(op, "triton", "cuda", torch.float32) for op in _schemas.STEMS]
    before = [_dispatch.why_not(*question) for question in asked]
    monkeypatch.setattr(importlib.util, "find_spec", None)
    assert [_dispatch.why_not(*question) for question in asked] == before


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_second_call_looks_for_no_module(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    call.loss_and_gradients()
    monkeypatch.setattr(importlib.util, "find_spec", None)
    call.loss_and_gradients()


def test_backends_nest_and_end_with_an_exception() -> None:
    def fails() -> None:
        with fastkd.backend("auto"):
            assert _dispatch._default == "auto"
            raise ZeroDivisionError

    with fastkd.backend("eager"):
        with pytest.raises(ZeroDivisionError):
            fails()
        assert _dispatch._default == "eager"
    assert _dispatch._default == "auto"


@pytest.mark.skipif(not _extension.HAS_NATIVE, reason=f"no compiled extension: {_extension.WHY_NOT}")
@pytest.mark.parametrize("default", ["auto", "eager", "native"])
@pytest.mark.parametrize("named", ["auto", "eager", "native"])
def test_a_backend_named_by_the_call_goes_before_the_default(named: str, default: str) -> None:
    """Forward and backward, of operators whose gradient C++ records and of those whose gradient Python records."""
    x = torch.randn(3, 4, 5, device=DEVICE)
    expected = {named if named != "auto" else default}
    if expected == {"auto"}:
        expected = {_dispatch.resolve("auto", "moments_fwd", x)}
    with fastkd.backend(default), OperatorCalls() as recorder:
        leaf = x.clone().requires_grad_()
        mean, var = fastkd.batch_moments(leaf, backend=named)
        (mean.sum() + var.sum() + fastkd.relation_loss(leaf, x, backend=named)).backward()
    ran = [op._schema.name for op, _ in recorder.calls]
    assert len(ran) >= 3 and {"eager" if name.endswith("_eager") else "native" for name in ran} == expected


@pytest.mark.skipif(not _dispatch.HAS_TRITON, reason="needs triton")
def test_triton_takes_no_float64_in_any_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    single, double = torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.float64)
    assert _dispatch.resolve("triton", "relation_fwd", single, single, None) == "triton"
    for inputs in ((double, single), (single, double), (single, None, double)):
        with pytest.raises(RuntimeError, match="got float64"):
            _dispatch.resolve("triton", "relation_fwd", *inputs)


@pytest.mark.parametrize(
    ("capability", "fast"),
    [((7, 0), True), ((7, 5), False), ((8, 0), True), ((8, 9), False), ((9, 0), True), ((12, 0), True)],
)
def test_float64_is_fast_on_gpus_of_data_centres(capability, fast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert _precision.has_fast_float64(torch.device("cuda", 0)) == fast
    assert _precision.has_fast_float64(torch.device("cpu"))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@in_pairs({"first": DTYPES, "second": DTYPES, "third": [None, *DTYPES]})
def test_precision_of_mixed_inputs(first: torch.dtype, second: torch.dtype, third: torch.dtype | None) -> None:
    """Of any order: one float64 input makes a sum float64, one wide input keeps a product off the matrix units."""
    dtypes = [dtype for dtype in (first, second, third) if dtype is not None]
    tensors = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    is_double, is_narrow = torch.float64 in dtypes, max(dtype.itemsize for dtype in dtypes) == 2
    assert _precision.accumulator(*tensors) == (torch.float64 if is_double else torch.float32)
    assert _precision.matrix_gain(torch.device("cuda"), *tensors) == (8 if is_narrow else 1)
    assert _precision.matrix_gain(torch.device("cpu"), *tensors) == 1
    for x in tensors:
        assert _precision.stored_gradient(x) == (torch.float32 if x.dtype == torch.float16 else x.dtype)


@pytest.mark.skipif(not _dispatch.HAS_TRITON, reason="needs triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_the_kernels_store_gradients_as_the_schemas_say(dtype: torch.dtype) -> None:
    """kernels/ does not depend on fastkd, so the rule is written there again."""
    x = torch.ones(2, dtype=dtype)
    kernels = importlib.import_module("fastkd_kernels._common")
    for is_wanted in (True, False):
        room = kernels.empty_gradient(x, is_wanted)
        assert room.dtype == _precision.stored_gradient(x) and room.numel() == (x.numel() if is_wanted else 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), True, "1", None, torch.ones(()), -1e-9])
@pytest.mark.parametrize("open_low", [False, True])
def test_options_that_are_no_number_in_range_are_refused(value: Any, open_low: bool) -> None:
    _checks.number("option", 0.5, low=0, open_low=open_low)
    with pytest.raises((TypeError, ValueError), match=r"^option must be a"):
        _checks.number("option", value, low=0, open_low=open_low)
    for name, is_refused in (("option", open_low), ("unbounded", False)):
        if is_refused:
            with pytest.raises(ValueError, match="finite number > 0, got 0"):
                _checks.number(name, 0, low=0, open_low=open_low)
        else:
            _checks.number(name, 0, low=0)


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None])
def test_counts_are_positive_ints(value: Any) -> None:
    _checks.positive_int("count", 1)
    with pytest.raises((TypeError, ValueError), match=r"^count must be a"):
        _checks.positive_int("count", value)


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
