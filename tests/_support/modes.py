"""Ways in which people's loops call a loss: compiled, under autocast, checkpointed, copied, exported, transformed."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fastkd.testing import DEVICE
from tests._support.calls import Call

# What a refusal says of a way out.
WAYS_OUT = r"fastkd\.reference\.\w+|once for each"


class DifferentResultError(AssertionError):
    """The results are not those of a plain call."""


def close(actual: list[Tensor], expected: list[Tensor], bound: float = 0.0) -> None:
    """Require equal results, or a relative error of at most `bound`, of all results together."""
    if [x.shape for x in actual] != [x.shape for x in expected]:
        raise DifferentResultError(f"{[x.shape for x in actual]} instead of {[x.shape for x in expected]}")
    a, e = (torch.cat([x.detach().double().flatten() for x in results]) for results in (actual, expected))
    if not (torch.equal(a, e) or (a - e).abs().max() <= bound * e.abs().max()):
        raise DifferentResultError(f"off by {(a - e).abs().max()}")


def on(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of its students' tensors, one after another."""
    target = call.target()

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        each = iter(leaves)
        students = {name: tree_map_only(Tensor, lambda _: next(each), call.arguments[name]) for name in call.students}
        results = tree_leaves(target(**(call.arguments | call.constants | students)))
        return tuple(x for x in results if isinstance(x, Tensor))

    return function


def students(call: Call) -> list[Tensor]:
    """The students' tensors, new leaves."""
    return [x.detach().clone().requires_grad_() for name in call.students for x in tree_leaves(call.arguments[name])]


def total(results: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([x.sum().double() for x in results if x.is_floating_point() and x.requires_grad]).sum()


def with_gradients(function: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
    results = function(*leaves)
    gradients = torch.autograd.grad(total(results), leaves, allow_unused=True, materialize_grads=True)
    return [*(x.detach() for x in results), *gradients]


def plainly(call: Call) -> list[Tensor]:
    return with_gradients(on(call), students(call))


def values(call: Call) -> list[Tensor]:
    return [x.detach() for x in on(call)(*students(call))]


def twice(call: Call) -> None:
    close(plainly(call), plainly(call))


def compiled(dynamic: bool) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(on(call), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        close(with_gradients(compiled, students(call)), plainly(call), 1e-5)  # it may sum in another order

    return run


def autocast(call: Call) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = plainly(call)
    # Projections of modules run in bfloat16 under autocast, losses do not.
    target = call.target()
    projects = isinstance(target, nn.Module) and any(True for _ in target.parameters())
    close(actual, plainly(call), 2e-2 if projects else 0.0)


def checkpointed(call: Call) -> None:
    function = on(call)
    close(
        with_gradients(lambda *leaves: checkpoint(function, *leaves, use_reentrant=False), students(call)),
        plainly(call),
    )


def retained(call: Call) -> None:
    leaves = students(call)
    loss = total(on(call)(*leaves))
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True, **options)]
    close(list(torch.autograd.grad(loss, leaves, **options)), first)


def without_grad(mode: Callable[[], Any]) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        expected = values(call)
        with mode():
            # A forward pass without gradients may take another path.
            close(list(on(call)(*students(call))), expected, 1e-5)

    return run


@contextlib.contextmanager
def deterministic_algorithms() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def deterministic(call: Call) -> None:
    expected = plainly(call)
    with deterministic_algorithms():
        close(plainly(call), expected)


def batched_gradients(call: Call) -> None:
    leaves = students(call)
    results = [x for x in on(call)(*leaves) if x.requires_grad]
    incoming = [torch.stack([torch.ones_like(x), 2 * torch.ones_like(x)]) for x in results]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that it loops
        batched = torch.autograd.grad(results, leaves, incoming, is_grads_batched=True, **options)
    one_by_one = [torch.autograd.grad(results, leaves, [g[i] for g in incoming], **options) for i in range(2)]
    close(list(batched), [torch.stack(each) for each in zip(*one_by_one, strict=True)], 1e-6)


def differentiated_twice(call: Call) -> None:
    leaves = students(call)
    gradients = torch.autograd.grad(total(on(call)(*leaves)), leaves, create_graph=True, allow_unused=True)
    torch.autograd.grad(total(tuple(g for g in gradients if g is not None)), leaves, allow_unused=True)


def vmapped(call: Call) -> None:
    expected, function = values(call), on(call)
    actual = torch.vmap(function)(*(x.detach().unsqueeze(0) for x in students(call)))
    close([x.squeeze(0) for x in actual], expected, 1e-5)


def functional_gradient(call: Call) -> None:
    leaves, function = students(call), on(call)
    first = torch.func.grad(lambda *x: torch.stack([y.sum() for y in function(*x) if y.is_floating_point()]).sum())
    close([first(*(x.detach() for x in leaves))], plainly(call)[-len(leaves) :][:1], 1e-5)


def forward_mode(call: Call) -> None:
    function = on(call)
    with forward_ad.dual_level():
        results = function(*(forward_ad.make_dual(x.detach(), torch.ones_like(x)) for x in students(call)))
        if all(forward_ad.unpack_dual(x).tangent is None for x in results):
            raise DifferentResultError("the tangents are lost")


def fake(call: Call) -> None:
    expected, target = values(call), call.target()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        faked = replace(call.mapped(mode.from_tensor), module=lambda: target)
        actual = on(faked)(*(mode.from_tensor(x.detach()) for x in students(call)))
    for a, e in zip(actual, expected, strict=True):
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            raise DifferentResultError(f"{a.shape} {a.dtype} instead of {e.shape} {e.dtype}")


class _Exported(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.function = on(call)
        target = call.target()
        if isinstance(target, nn.Module):
            self.target = target

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        return self.function(*leaves)


def exported(call: Call) -> None:
    leaves = tuple(x.detach() for x in students(call))
    with torch.no_grad():
        program = torch.export.export(_Exported(call), leaves, strict=False)
        close(list(program.module()(*leaves)), values(call), 1e-5)


def copied(copier: Callable[[Any], Any]) -> Callable[[Call], None]:
    def run(call: Call) -> None:
        made = copier(call.target())
        close(plainly(replace(call, module=lambda: made)), plainly(call))

    return run


MODES: dict[str, Callable[[Call], None]] = {
    "called twice": twice,
    "torch.compile": compiled(False),
    "compiled, dynamic": compiled(True),
    "torch.export": exported,
    "fake tensors": fake,
    "autocast": autocast,
    "checkpoint": checkpointed,
    "retain_graph": retained,
    "no_grad": without_grad(torch.no_grad),
    "inference_mode": without_grad(torch.inference_mode),
    "deterministic": deterministic,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda target: pickle.loads(pickle.dumps(target))),
    "batched gradients": batched_gradients,
    "second derivative": differentiated_twice,
    "vmap": vmapped,
    "torch.func.grad": functional_gradient,
    "forward mode": forward_mode,
}
