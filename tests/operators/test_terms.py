"""Functions that return several terms: whichever of them are differentiated, no operator runs in backward."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import compat, reference
from fastkd.losses import ManifoldLoss
from fastkd.testing import DEVICE, assert_matches_oracle, backends, loss_and_gradients
from tests._support.cases import OperatorCalls

STUDENT, TEACHER = (5, 9, 16), (5, 9, 24)
INDEX = torch.tensor([3, 11, 0, 44, 17], device=DEVICE)
COMBINATIONS: dict[str, Callable[..., Tensor]] = {
    "first": lambda a, b, c: a,
    "second": lambda a, b, c: b,
    "third": lambda a, b, c: c,
    "sum": lambda a, b, c: a + b + c,
    "weighted": lambda a, b, c: 4 * a + 0.1 * b - 0.2 * c,
    "detached": lambda a, b, c: a * b.detach() + c,
    "product": lambda a, b, c: a * b * c,
}


def tokens(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple((torch.randn(shape, generator=generator) + 0.2).to(DEVICE, dtype) for shape in (STUDENT, TEACHER))


def manifold(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return fastkd.manifold_loss(student, teacher, index=INDEX, return_terms=True)[1]


def layers(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return ManifoldLoss()([student, student], [teacher, teacher], indices=[INDEX, INDEX], return_terms=True)[1]


def drop_in(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return compat.layer_mf_loss(student, teacher, len(INDEX), index=INDEX)


def formula(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    options = ({"scope": "intra"}, {"scope": "inter"}, {"scope": "batch", "index": INDEX})
    return tuple(reference.relation_loss(student, teacher, **each) for each in options)


def _cases() -> Iterator[Any]:
    """Yield (backend, terms, combine). Combinations differ in autograd alone, so an interpreter runs each once."""
    for backend in backends("relation_fwd"):
        for i, name in enumerate(COMBINATIONS):
            for j, terms in enumerate((manifold, layers, drop_in)):
                marks = pytest.mark.exhaustive if backend == "triton" and i % 3 != j else ()
                yield pytest.param(
                    backend, terms, COMBINATIONS[name], marks=marks, id=f"{backend}-{terms.__name__}-{name}"
                )


@pytest.mark.parametrize(("backend", "terms", "combine"), [*_cases()])
def test_one_forward_and_no_operator_in_backward(
    backend: str, terms: Callable[..., tuple[Tensor, ...]], combine: Callable[..., Tensor]
) -> None:
    student, teacher = tokens()
    leaf = student.clone().requires_grad_()
    with fastkd.backend(backend), OperatorCalls() as forward:
        loss = combine(*terms(leaf, teacher))
    with OperatorCalls() as backward:
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf)
    assert len(forward.calls) == 3 * (2 if terms is layers else 1)
    assert not backward.calls
    assert torch.equal(first, second)
    eager = loss_and_gradients(lambda s: combine(*formula(s, teacher)), [student])
    oracle = loss_and_gradients(lambda s: combine(*formula(s, teacher.double())), [student.double()])
    reduced = STUDENT[0] * STUDENT[1] * STUDENT[2]
    assert_matches_oracle(loss.detach(), eager[0], oracle[0], reduced, "loss")
    assert_matches_oracle(first, eager[1], oracle[1], reduced, "gradient")


@pytest.mark.parametrize("combine", [COMBINATIONS["second"], COMBINATIONS["weighted"]], ids=["second", "weighted"])
def test_terms_compile_to_one_graph(combine: Callable[..., Tensor]) -> None:
    student, teacher = tokens()
    torch._dynamo.reset()

    def loss(s: Tensor) -> Tensor:
        return combine(*manifold(s, teacher))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        loss_and_gradients(compiled, [student]), loss_and_gradients(loss, [student]), strict=True
    ):
        assert torch.equal(actual, expected)


def test_detached_terms_cost_nothing() -> None:
    """The trainer logs them: one operator for all layers, and values that no gradient reaches."""
    student, teacher = tokens()
    leaf = student.clone().requires_grad_()
    module, inputs = ManifoldLoss(), ([leaf, leaf], [teacher, teacher])
    with OperatorCalls() as calls:
        loss, terms = module(*inputs, indices=[INDEX, INDEX], return_terms="detached")
    assert [op._schema.name.split("::")[1].removesuffix("_eager") for op, _ in calls.calls] == ["manifold_fwd"]
    assert loss.requires_grad and not any(term.requires_grad for term in terms)
    assert torch.equal(loss, module(*inputs, indices=[INDEX, INDEX]))
    oracle = [term.detach() for term in formula(student.double(), teacher.double())]
    eager = [term.detach() for term in formula(student, teacher)]
    for actual, e, o in zip(terms, eager, oracle, strict=True):
        assert_matches_oracle(actual, e, o, STUDENT[0] * STUDENT[1] * STUDENT[2], "term")


@pytest.mark.parametrize("form", ["all", 1, 0, None])
def test_an_unknown_form_of_terms_is_refused(form: object) -> None:
    with pytest.raises(ValueError, match=f"return_terms must be True, False or 'detached', got {form!r}"):
        fastkd.manifold_loss(*tokens(), return_terms=form)
