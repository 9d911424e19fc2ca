"""Helpers of the autograd functions: whether a gradient is wanted, scaling of a stored one, rejected transforms."""

from typing import Any

import torch
from torch import Tensor

_SCALE_CHUNK = 1 << 16  # elements; on a CPU a product of mixed dtypes converts its operands first, here within cache


def wants_grad(*tensors: Tensor) -> bool:
    """Return whether forward should compute gradients (needs_input_grad stays True under no_grad)."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def savable(x: Tensor) -> Tensor:
    """Return x, or a copy of a tensor made under torch.inference_mode(), which autograd does not save for backward."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def distinct(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors, each as an object of its own, which the compiler asks of an autograd function's arguments."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    out: list[Tensor | None] = []
    for x in tensors:
        out.append(x.view_as(x) if x is not None and any(x is before for before in out) else x)
    return out


def refuse_transforms(function: str) -> None:
    """Raise under vmap, torch.func.grad and other transforms, which cannot look inside a fused kernel."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function} does not support torch.vmap or torch.func transforms; fastkd.reference.{function} does"
        )


def takes_operators(incoming: Tensor) -> bool:
    """Return whether a backward may call an operator rather than PyTorch's, which a compiler fuses and a batch of
    incoming gradients needs."""
    return not torch.compiler.is_compiling() and not _is_batched(incoming)


def refuse_batched(function: str, incoming: Tensor) -> None:
    """Raise under is_grads_batched=True if an operator that returns a list, for which PyTorch has no loop, is next."""
    if not torch.compiler.is_compiling() and _is_batched(incoming):
        raise RuntimeError(
            f"{function} takes no batched gradients (is_grads_batched=True, vectorize=True): call torch.autograd.grad "
            f"once for each, or use fastkd.reference.{function}"
        )


def _is_batched(x: Tensor) -> bool:
    """Return whether x holds several gradients of is_grads_batched=True; private names, which may change."""
    try:
        return torch._C._functorch.is_legacy_batchedtensor(x)
    except AttributeError:
        return False


def refuse_double_backward(function: str) -> None:
    """Raise under create_graph=True, the only case with grad mode on in backward. Call it first there."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function} cannot be differentiated twice: its gradient is a constant here. "
            f"Use fastkd.reference.{function} for gradient penalties"
        )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, function: str) -> Tensor:
        ctx.function = function
        return loss.clone()  # a view could not be added to in place

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        refuse_double_backward(ctx.function)
        return dloss, None


def once(loss: Tensor, function: str) -> Tensor:
    """Return the loss, not twice differentiable, so that losses of PyTorch operations obey the same contract."""
    return _Once.apply(loss, function)


def _is_last_use(dloss: Tensor) -> bool:
    """Return whether the running backward frees its graph and nothing records or transforms it."""
    try:
        return not (
            torch._C._autograd._get_current_graph_task_keep_graph()  # True outside of a backward
            or torch._C._are_functorch_transforms_active()
            or torch._C._functorch.is_legacy_batchedtensor(dloss)  # is_grads_batched
            or torch._C._len_torch_dispatch_stack() > 0
        )
    except AttributeError:  # private names: a PyTorch without them gets new tensors
        return False


def scaled(stored: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """stored * dloss (one number, or one per row), rounded once to dtype: the product is in float32 or better.

    The result is a new tensor, except on a CPU in the backward pass that frees its graph: there nobody can read
    `stored` again, and it becomes the product itself, because the pages of a new tensor cost up to a quarter of a whole
    loss. Only a pack hook (torch.autograd.graph.saved_tensors_hooks) that keeps the very tensor it was given sees the
    change. On a GPU memory is cached, and a captured graph may replay a backward pass: `stored` is never written there.
    """
    if torch.compiler.is_compiling():
        return (stored * dloss).to(dtype)
    # On CPU torch multiplies by a 0-dim float32 in float32; on CUDA it rounds it to 16 bits first.
    if stored.dtype == dtype and (stored.device.type == "cpu" or dtype in (torch.float32, torch.float64)):
        if stored.device.type != "cpu" or not _is_last_use(dloss):
            return stored * dloss
        return stored if dloss.numel() == 1 and dloss.item() == 1 else stored.mul_(dloss)
    if dtype in (torch.float32, torch.float64) or dloss.numel() > 1:
        return (stored * dloss).to(dtype)
    if stored.device.type == "cpu" and _is_last_use(dloss):
        return (stored if dloss.item() == 1 else stored.mul_(dloss)).to(dtype)
    out = torch.empty_like(stored, dtype=dtype)
    # A one-element tensor, unlike a 0-dim one, keeps its dtype in promotion: dloss is not rounded to 16 bits.
    dloss = dloss.reshape(1)
    if stored.device.type != "cpu":  # one kernel, which converts as it reads
        return torch.mul(stored, dloss, out=out)
    for o, g in zip(out.view(-1).split(_SCALE_CHUNK), stored.view(-1).split(_SCALE_CHUNK), strict=True):
        torch.mul(g, dloss, out=o)
    return out
