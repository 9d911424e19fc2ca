"""Signatures of other codes: their defaults, the layers and heads they match, and what their arguments mean."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd import compat, reference
from fastkd.testing import DEVICE, relative_difference


def close(actual: Tensor, expected: Tensor) -> bool:
    return relative_difference(actual, expected) < 1e-5


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


# As the published codes declare them: (name, default), in order.
_ = inspect.Parameter.empty
TEXTBREWER = [("q_S", _), ("k_S", _), ("q_T", _), ("k_T", _), ("mask", None)]
SIGNATURES: dict[str, tuple[Callable[..., object], list[tuple[str, object]]]] = {
    "layer_mf_loss": (compat.layer_mf_loss, [("F_s", _), ("F_t", _), ("K", _), ("index", None)]),
    "GramLoss": (
        compat.GramLoss,
        [("apply_norm", True), ("img_level", True), ("remove_neg", True), ("remove_only_teacher_neg", False)],
    ),
    "GramLoss.forward": (compat.GramLoss().forward, [("output_feats", _), ("target_feats", _), ("img_level", True)]),
    "DeepInversionFeatureHook": (compat.DeepInversionFeatureHook, [("module", _)]),
    "att_mse_loss": (compat.att_mse_loss, TEXTBREWER),
    "att_mse_sum_loss": (compat.att_mse_sum_loss, TEXTBREWER),
    "att_ce_loss": (compat.att_ce_loss, TEXTBREWER),
    "att_ce_mean_loss": (compat.att_ce_mean_loss, TEXTBREWER),
    "mmd_loss": (compat.mmd_loss, [("state_S", _), ("state_T", _), ("mask", None)]),
    "tinybert_att_loss": (compat.tinybert_att_loss, [("students", _), ("teachers", _), ("attention_mask", None)]),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    function, expected = SIGNATURES[name]
    assert [(p.name, p.default) for p in inspect.signature(function).parameters.values()] == expected


def test_every_signature_is_listed() -> None:
    public = {
        name
        for name, found in vars(compat).items()
        if getattr(found, "__module__", "") == "fastkd.compat" and not name.startswith("_")
    }
    assert public == {name for name in SIGNATURES if "." not in name}


@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize(
    ("options", "normalize", "rectify"),
    [
        ({}, True, "both"),
        ({"apply_norm": False}, False, "both"),
        ({"remove_neg": False}, True, "none"),
        ({"remove_neg": False, "remove_only_teacher_neg": True}, True, "teacher"),
        ({"img_level": False}, True, "both"),  # forward's decides
    ],
    ids=str,
)
def test_gram_loss_is_the_relation_loss(options, normalize, rectify, img_level) -> None:
    s, t = randn(3, 9, 8), randn(3, 9, 12)
    scope = "intra" if img_level else "batch"
    expected = reference.relation_loss(s, t, scope=scope, normalize=normalize, rectify=rectify)
    module = compat.GramLoss(**options)
    assert close(module(s, t, img_level=img_level), expected)
    if img_level:
        assert torch.equal(module(s, t), module(s, t, True))
    else:
        assert close(module(s.flatten(0, 1), t.flatten(0, 1), img_level=False), expected)


@pytest.mark.parametrize("K", [5, 26, 27, 1000])
def test_layer_mf_loss_draws_k_rows(K: int) -> None:
    """As many distinct rows as K says, all of them where there are fewer; another draw at every call."""
    s, t = randn(3, 9, 8), randn(3, 9, 12)
    torch.manual_seed(3)
    first, second = (compat.layer_mf_loss(s, t, K) for _ in range(2))
    assert close(first[0], reference.relation_loss(s, t))
    assert close(first[1], reference.relation_loss(s, t, scope="inter"))
    if K >= 27:
        assert close(first[2], reference.relation_loss(s, t, scope="batch"))
        return
    torch.manual_seed(3)
    index = torch.randperm(27, device=DEVICE)[:K]
    assert close(first[2], reference.relation_loss(s, t, scope="batch", index=index))
    assert not close(second[2], first[2])


def heads_of(H: int, d: int) -> tuple[Tensor, Tensor]:
    return randn(2, H, 9, d), randn(2, H, 9, d)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


@pytest.mark.parametrize(("H", "d", "H_T", "d_T"), [(3, 8, 3, 24), (2, 8, 6, 8), (6, 4, 1, 24)])
def test_losses_over_heads_of_other_numbers_and_widths(H: int, d: int, H_T: int, d_T: int) -> None:
    student, teacher = heads_of(H, d), heads_of(H_T, d_T)
    S, T = scores(*student), scores(*teacher)
    assert close(compat.att_mse_sum_loss(*student, *teacher), (S.sum(1) - T.sum(1)).square().mean())
    expected = -(T.mean(1).softmax(-1) * S.mean(1).log_softmax(-1)).sum(-1).mean()
    assert close(compat.att_ce_mean_loss(*student, *teacher), expected)
    if H == H_T:
        assert close(compat.att_mse_loss(*student, *teacher), (S - T).square().mean())
        expected = -(T.softmax(-1) * S.log_softmax(-1)).sum(-1).mean()
        assert close(compat.att_ce_loss(*student, *teacher), expected)


@pytest.mark.parametrize(("layers", "of_teacher"), [(1, 1), (2, 2), (2, 4), (1, 3), (2, 6)])
def test_tinybert_layers_learn_from_the_last_of_their_share(layers: int, of_teacher: int) -> None:
    students, teachers = ([heads_of(2, 8) for _ in range(n)] for n in (layers, of_teacher))
    every = of_teacher // layers
    matched = [teachers[(j + 1) * every - 1] for j in range(layers)]
    expected = sum((scores(*s) - scores(*t)).square().mean() for s, t in zip(students, matched, strict=True))
    assert close(compat.tinybert_att_loss(students, teachers), expected)
    mask = (torch.arange(9, device=DEVICE) < torch.tensor([9, 4], device=DEVICE)[:, None]).long()
    expected = sum(
        ((scores(*s) - scores(*t)).square() * mask[:, None, None]).mean()
        for s, t in zip(students, matched, strict=True)
    )
    assert close(compat.tinybert_att_loss(students, teachers, mask), expected)
