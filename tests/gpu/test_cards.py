"""Every call of a Triton kernel in bfloat16 as on cards of every architecture, with one multiprocessor or many, its
programs in two orders: under the interpreter."""

import pytest
import torch

import fastkd
from fastkd.ops._dispatch import INTERPRETED
from fastkd.testing import DEVICE, assert_matches_oracle
from tests._support.calls import Call, randn, runs

if not INTERPRETED:
    pytest.skip("needs the interpreter, which has a process of its own", allow_module_level=True)

from tests._support import interpreter

pytestmark = pytest.mark.triton

CARDS = [(architecture, count) for count in (132, 1) for architecture in ("8.x", "9.0", "10.x", "cdna")]
CALLS = [call for call, backend in runs() if backend == "triton"]
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def check(call: Call, card: tuple[str, int], dtype: torch.dtype) -> None:
    """Hold a call to the oracle rule, and to equal bits whatever the order of its programs."""
    inputs = call.to(dtype)
    with fastkd.backend("eager"):
        oracle, eager = inputs.to(torch.float64).loss_and_gradients(), inputs.loss_and_gradients()
    with fastkd.backend("triton"), interpreter.card(*card):
        interpreter.seed(1)
        actual = inputs.loss_and_gradients()
        interpreter.seed(2)
        again = inputs.loss_and_gradients()
    reduced = max(x.numel() for _, x in inputs.leaves())
    for i, (a, b, e, o) in enumerate(zip(actual, again, eager, oracle, strict=True)):
        assert torch.equal(a, b), f"{call} result {i} depends on the order of programs"
        # All rows together: in some the exact gradient is 0.
        assert_matches_oracle(a.flatten(), e.flatten(), o.flatten(), reduced, f"{call} result {i} on {card}")


@pytest.mark.parametrize(
    ("call", "card"), [(call, CARDS[i % len(CARDS)]) for i, call in enumerate(CALLS)], ids=lambda x: str(x)
)
def test_calls_in_bfloat16(call: Call, card: tuple[str, int]) -> None:
    check(call, card, torch.bfloat16)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_calls_on_every_card(call: Call, card: tuple[str, int], dtype: torch.dtype) -> None:
    check(call, card, dtype)


@pytest.mark.parametrize("form", ["maps", "groups"])
@pytest.mark.parametrize(("architecture", "width"), [("8.x", 300), ("10.x", 300), ("cdna", 300), ("9.0", 200)])
def test_wide_students(architecture: str, width: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of a width by one program, or its gradient in the small tiles of a large card."""
    if form == "maps":
        monkeypatch.setattr("fastkd_kernels.relation.GROUP_ROWS", 0)
    tokens = {"student": randn(2, 67, width), "teacher": randn(2, 67, 40, seed=1)}
    call = Call("relation_loss", "relation_fwd", ("student",), tokens, constants={"algorithm": "tile"})
    check(call, (architecture, 132), torch.bfloat16)


def test_products_of_taller_tiles_than_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that few programs fill, they read rows of W past the last tile of the map."""
    monkeypatch.setattr("fastkd_kernels.relation.GROUP_ROWS", 0)
    tokens = {"student": randn(1, 130, 40), "teacher": randn(1, 130, 24, seed=1)}
    call = Call("relation_loss", "relation_fwd", ("student",), tokens, constants={"algorithm": "tile"})
    check(call, ("10.x", 1), torch.bfloat16)


def test_more_layers_than_share_a_launch() -> None:
    module = fastkd.losses.ManifoldLoss(backend="triton")
    students = [torch.randn(1, 5, 8, device=DEVICE, requires_grad=True) for _ in range(18)]
    teachers, indices = [torch.randn(1, 5, 4, device=DEVICE) for _ in students], [torch.arange(5, device=DEVICE)] * 18
    loss = module(students, teachers, indices=indices)
    each = [module([s], [t], indices=[i]) for s, t, i in zip(students, teachers, indices, strict=True)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss, students), torch.autograd.grad(torch.stack(each).mean(), students)
    )


@pytest.mark.parametrize("tokens", [50, 100])
@pytest.mark.parametrize(("student", "teacher"), [(80, 80), (128, 64), (32, 160), (64, 64)])
@pytest.mark.parametrize("architecture", ["8.x", "9.0", "10.x", "cdna"])
def test_wide_heads(architecture: str, student: int, teacher: int, tokens: int) -> None:
    """Those wider than a tile are taken in pieces, though all keys fit on chip and heads fill the card."""
    widths = {"q_student": student, "k_student": student, "q_teacher": teacher, "k_teacher": teacher}
    inputs = {name: randn(1, 2, tokens, d, seed=i) for i, (name, d) in enumerate(widths.items())}
    call = Call("attention_loss", "attention_fwd", ("q_student", "k_student"), inputs)
    check(call, (architecture, 2), torch.bfloat16)


def test_averages_of_fewer_heads() -> None:
    """The kernel of the keys' gradient reads nothing of a teacher with fewer heads."""
    shapes = {
        "q_student": (1, 3, 5, 24),
        "k_student": (1, 3, 7, 24),
        "q_teacher": (1, 2, 5, 16),
        "k_teacher": (1, 2, 7, 16),
    }
    inputs = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    call = Call("attention_loss", "attention_fwd", ("q_student", "k_student"), inputs, constants={"heads": "mean"})
    check(call, ("9.0", 1), torch.float32)
