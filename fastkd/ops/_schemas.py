"""Every operator fastkd registers, on one page: schema, and the shapes and dtypes of its results.

`<op>` has native implementations (csrc/, keys CPU and CUDA), `<op>_triton` those of kernels/, `<op>_eager` those of
eager/. The three share a schema and a fake, so tracing needs none of them installed.
"""

import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastkd._precision import accumulator, stored_gradient

STEMS: dict[str, str] = {}  # operator -> stem: the file that holds it in eager/, kernels/ and csrc/
_SCHEMAS: dict[str, Any] = {}

# The interpreter runs Triton kernels on CPU tensors.
_TRITON_KEY = "CPU" if os.getenv("TRITON_INTERPRET") == "1" else "CUDA"


def _first(args: tuple[Any, ...]) -> Tensor:
    return args[0][0] if isinstance(args[0], list) else args[0]


def _register(stem: str, op: str, schema: str, results: Callable[[Any], Any]) -> None:
    """Register an operator and its implementations. `results` gives empty results from the arguments by name."""
    STEMS[op] = stem
    parsed = _SCHEMAS[op] = torch._C.parse_schema(f"fastkd::{op}{schema}")
    names = [argument.name for argument in parsed.arguments]

    def named(args: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(names, args, strict=True))

    def fake(*args: Any) -> Any:
        return results(SimpleNamespace(**named(args)))

    def eager(*args: Any) -> Any:
        # Autocast would round the chunks' products; an operator's maths stays in its accumulation dtype.
        with torch.autocast(_first(args).device.type, enabled=False):
            return getattr(importlib.import_module(f"fastkd.eager.{stem}"), op)(**named(args))

    def triton(*args: Any) -> Any:
        with torch.cuda.device_of(_first(args)):  # Triton launches on the current device
            return getattr(importlib.import_module(f"fastkd_kernels.{stem}"), op)(**named(args))

    for name in (op, f"{op}_eager", f"{op}_triton"):
        torch.library.define(f"fastkd::{name}", schema)
        torch.library.register_fake(f"fastkd::{name}", fake)
    torch.library.impl(f"fastkd::{op}_eager", "CompositeExplicitAutograd", eager)
    torch.library.impl(f"fastkd::{op}_triton", _TRITON_KEY, triton)


def signatures() -> dict[str, str]:
    """Return the types that each operator takes and returns, as fastkd._C.signatures() has them."""
    return {
        op: " ".join([*(str(a.type) for a in schema.arguments), "->", *(str(r.type) for r in schema.returns)])
        for op, schema in _SCHEMAS.items()
    }


def _gradient(x: Tensor, wanted: bool) -> Tensor:
    """Return an empty gradient of x as forward stores it; (0,) if it is not wanted."""
    return x.new_empty(x.shape if wanted else (0,), dtype=stored_gradient(x))


def _relation_fwd(a: Any) -> tuple[Tensor, Tensor]:
    loss = a.student.new_empty((), dtype=accumulator(a.student, a.teacher))
    return loss, _gradient(a.student, a.with_grad)


_register(
    "relation",
    "relation_fwd",
    "(Tensor student, Tensor teacher, str scope, bool normalize, str rectify, float eps, str algorithm, bool with_grad)"
    " -> (Tensor loss, Tensor dstudent)",
    _relation_fwd,
)


def _manifold_fwd(a: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    loss, means = (a.students[0].new_empty(n, dtype=accumulator(*a.students, *a.teachers)) for n in ((), (3,)))
    return loss, means, [_gradient(s, a.with_grad) for s in a.students]


def _manifold_bwd(a: Any) -> list[Tensor]:
    return [torch.empty_like(d, dtype=a.dtype) for d in a.stored]


# means: (3,), of intra, inter and random over the layers; loss: their weighted sum; dstudents: its gradients.
_register(
    "relation",
    "manifold_fwd",
    "(Tensor[] students, Tensor[] teachers, Tensor[] indices, float intra, float inter, float random, bool with_grad)"
    " -> (Tensor loss, Tensor means, Tensor[] dstudents)",
    _manifold_fwd,
)
# stored: the gradients of forward, which dloss (), scales.
_register(
    "relation", "manifold_bwd", "(Tensor dloss, Tensor[] stored, ScalarType dtype) -> Tensor[] dstudents", _manifold_bwd
)


def _moments_fwd(a: Any) -> tuple[Tensor, Tensor]:
    groups = sum(x.shape[0] * x.shape[1] if a.per_image else x.shape[1] for x in a.inputs)
    mean = a.inputs[0].new_empty((groups,), dtype=accumulator(a.inputs[0]))
    return mean, torch.empty_like(mean)


def _moments_bwd(a: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in a.inputs]


# inputs: layers of one dtype, whose channels (images and channels if per_image) stand end to end in mean and var.
_register("moments", "moments_fwd", "(Tensor[] inputs, bool per_image) -> (Tensor mean, Tensor var)", _moments_fwd)
_register(
    "moments",
    "moments_bwd",
    "(Tensor dmean, Tensor dvar, Tensor[] inputs, Tensor mean, bool per_image) -> Tensor[] dinputs",
    _moments_bwd,
)


def _bn_distance(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    return a.mean.new_empty(()), torch.empty_like(a.mean), torch.empty_like(a.var)


# All layers' moments end to end: rows[l] * channels[l] of layer l, each over counts[l] elements. rows is 1 but in
# "image". Gradients are those of the loss itself; 0 where a norm is 0.
_register(
    "moments",
    "bn_distance",
    "(Tensor mean, Tensor var, Tensor running_mean, Tensor running_var, SymInt[] channels, SymInt[] rows,"
    " SymInt[] counts, float[] weights, str distance) -> (Tensor loss, Tensor dmean, Tensor dvar)",
    _bn_distance,
)


def _batch_norm_fwd(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = a.x.new_empty(a.x.shape[1:2], dtype=accumulator(a.x))
    return torch.empty_like(a.x), mean, torch.empty_like(mean)


def _batch_norm_bwd(a: Any) -> Tensor:
    return torch.empty_like(a.x)


_register(
    "moments",
    "batch_norm_fwd",
    "(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    _batch_norm_fwd,
)
_register(
    "moments",
    "batch_norm_bwd",
    "(Tensor dy, Tensor dmean, Tensor dvar, Tensor x, Tensor mean, Tensor running_var, Tensor? weight, float eps)"
    " -> Tensor dx",
    _batch_norm_bwd,
)


def _prior_fwd(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, acc = a.images, accumulator(a.images)
    return x.new_empty(4, dtype=acc), x.new_empty(4, dtype=acc), x.new_empty(x.shape[0], dtype=acc)


def _prior_bwd(a: Any) -> Tensor:
    return torch.empty_like(a.images)


_register("prior", "prior_fwd", "(Tensor images) -> (Tensor tv_l1, Tensor tv_l2, Tensor norms)", _prior_fwd)
_register(
    "prior",
    "prior_bwd",
    "(Tensor dtv_l1, Tensor dtv_l2, Tensor dnorms, Tensor images, Tensor tv_l2, Tensor norms) -> Tensor dimages",
    _prior_bwd,
)


def _prior_loss(a: Any) -> tuple[Tensor, Tensor]:
    return a.norms.new_empty(()), a.norms.new_empty(8 + a.norms.shape[0])


# slopes: (8 + B,), by each of tv_l1, tv_l2 and norms. of_norm weighs the mean of the norms, or the one norm of all.
_register(
    "prior",
    "prior_loss",
    "(Tensor tv_l1, Tensor tv_l2, Tensor norms, float of_tv_l1, float of_tv_l2, float of_norm, bool per_image)"
    " -> (Tensor loss, Tensor slopes)",
    _prior_loss,
)


def _attention_fwd(a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (a.q_student, a.k_student, a.q_teacher, a.k_teacher, a.bias_student, a.bias_teacher)
    acc = accumulator(*(x for x in tensors if x is not None))
    B, H, N_q = a.q_student.shape[:3]
    shape = (B, 1 if a.heads == "mean" else H, N_q) if a.reduction == "none" else ()
    loss = a.q_student.new_empty(shape, dtype=acc)
    k = a.q_student if a.k_student is None else a.k_student
    bias = loss if a.bias_student is None else a.bias_student
    dq, dk, dbias = (_gradient(x, want) for x, want in zip((a.q_student, k, bias), a.wanted, strict=True))
    return loss, dq, dk, dbias


# scales: those of student, teacher and bias, with the temperature folded in: z = q kᵀ scale + bias bias_scale. Biases
# have 4 dimensions, each 1 or whole. row_weight (B, 1 | H, N_q) multiplies the rows; in the mean it stands in place of
# 1/N_q. rows: start and step; query row i is at position start + i step, which is_causal compares with the key's.
# Without k_student the keys are the queries, and dq is the whole gradient, (G + Gᵀ) Q. wanted: dq, dk, dbias; the
# others are empty (0,). "gram" comes with k_student and without bias.
_register(
    "attention",
    "attention_fwd",
    "(Tensor q_student, Tensor? k_student, Tensor q_teacher, Tensor k_teacher, Tensor? bias_student,"
    " Tensor? bias_teacher, Tensor? key_mask, Tensor? row_weight, str reduction, str algorithm, str divergence,"
    " str heads, float[3] scales, bool is_causal, SymInt[2] rows, bool[3] wanted)"
    " -> (Tensor loss, Tensor dq, Tensor dk, Tensor dbias)",
    _attention_fwd,
)


def _softmax_kl(a: Any) -> tuple[Tensor, Tensor]:
    acc = accumulator(a.student, a.teacher)
    dstudent = a.student.new_empty(a.student.shape if a.with_grad else (0,), dtype=acc)
    return a.student.new_empty(a.student.shape[0], dtype=acc), dstudent


# kl: (B,), beta KL of softmax(teacher / T) against softmax(student / T); with a target (B,) that of the other classes
# among themselves, plus alpha KL of (target, others). dstudent: the gradient of each row's own.
_register(
    "logits",
    "softmax_kl",
    "(Tensor student, Tensor teacher, Tensor? target, float alpha, float beta, float temperature, bool with_grad)"
    " -> (Tensor kl, Tensor dstudent)",
    _softmax_kl,
)


# loss: (B,), of each row: the normalised loss of its target (B,) at a temperature of 1, and gamma T² times that of the
# other classes at T. dstudent: the gradient of each row's own.
_register(
    "logits",
    "nkd",
    "(Tensor student, Tensor teacher, Tensor target, float gamma, float temperature, bool with_grad)"
    " -> (Tensor loss, Tensor dstudent)",
    _softmax_kl,
)


def _competition(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(a.student, a.teacher)
    pairs = zip((a.student, a.teacher), a.wanted, strict=True)
    ds, dt = (x.new_empty(x.shape if want else (0,), dtype=acc) for x, want in pairs)
    return a.student.new_empty(a.student.shape[0], dtype=acc), ds, dt


# j: (B,). dstudent, dteacher: the gradients of each row's own; those that are not wanted are empty (0,).
_register(
    "logits",
    "competition",
    "(Tensor student, Tensor teacher, float temperature, bool[2] wanted)"
    " -> (Tensor j, Tensor dstudent, Tensor dteacher)",
    _competition,
)
