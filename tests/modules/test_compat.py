"""Signatures of other codes: their defaults, the layers and heads they match, and what their arguments mean."""

import copy
import inspect
import math
import sys
import types
from collections.abc import Callable
from importlib import reload
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import compat, losses, reference
from fastkd.testing import DEVICE, assert_matches_oracle, loss_and_gradients, relative_difference
from tests._support import golden

ROOT = Path(__file__).parents[2]
golden_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])


def golden_cases(*ops: str, **wanted: object) -> pytest.MarkDecorator:
    """Parametrize by the golden cases of these operators that have the wanted parameters."""
    found = [c for c in golden.cases(*ops) if all(c["params"].get(k) == v for k, v in wanted.items())]
    assert found
    return pytest.mark.parametrize("case", found, ids=golden.name)


def of_dtype(case: golden.Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else v.dtype) for k, v in golden.load(case).items()}


def assert_golden(case: golden.Case, dtype: torch.dtype, x: dict[str, Tensor], call: Callable[..., Tensor]) -> None:
    """Compare the loss and the gradients of all inputs that have one; call takes the inputs by their names."""
    names = [k.removeprefix("grad.") for k in x if f"in.{k[5:]}" in x]
    given = {k.removeprefix("in."): v for k, v in x.items() if k.startswith("in.")}
    for name in names:
        given[name] = given[name].requires_grad_()
    loss = call(**given)
    assert relative_difference(loss.detach(), x["loss"]) <= golden.tolerance(case, dtype, "loss")
    for name, grad in zip(names, torch.autograd.grad(loss, [given[n] for n in names], allow_unused=True), strict=True):
        expected = x[f"grad.{name}"]
        if grad is None:
            assert not expected.any(), name
        else:
            assert relative_difference(grad, expected) <= golden.tolerance(case, dtype, "grad"), name


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
    "DeepInversionFeatureHook": (compat.DeepInversionFeatureHook, [("module", _), ("process_group", None)]),
    "mf_loss": (
        compat.mf_loss,
        [
            *((name, _) for name in ("block_outs_s", "block_outs_t", "layer_ids_s", "layer_ids_t", "K")),
            *((name, None) for name in ("w_sample", "w_patch", "w_rand")),
            ("max_patch_num", 0),
            ("indices", None),
        ],
    ),
    "minilmv2_loss": (
        compat.minilmv2_loss,
        [("student", _), ("teacher", _), ("relations", _), ("A_r", None), ("attention_mask", None)],
    ),
    "tinymim_loss": (
        compat.tinymim_loss,
        [("student", _), ("teacher", _), ("num_heads", None), ("attention_mask", None)],
    ),
    "KDLoss": (compat.KDLoss, [("name", _), ("use_this", _), ("temp", 4.0), ("alpha", 0.5)]),
    "DKDLoss": (compat.DKDLoss, [("name", _), ("use_this", _), ("temp", 4.0), ("alpha", 1.0), ("beta", 6.0)]),
    "NKDLoss": (compat.NKDLoss, [("name", _), ("use_this", _), ("temp", 1.0), ("gamma", 1.5)]),
    "ViTKDLoss": (
        compat.ViTKDLoss,
        [
            *((name, _) for name in ("name", "use_this", "student_dims", "teacher_dims")),
            ("alpha_vitkd", 3e-5),
            ("beta_vitkd", 3e-6),
            ("lambda_vitkd", 0.5),
        ],
    ),
    "KDLoss.forward": (compat.KDLoss("", True).forward, [("logit_s", _), ("logit_t", _)]),
    "DKDLoss.forward": (compat.DKDLoss("", True).forward, [("logit_s", _), ("logit_t", _), ("gt_label", _)]),
    "NKDLoss.forward": (compat.NKDLoss("", True).forward, [("logit_s", _), ("logit_t", _), ("gt_label", _)]),
    "ViTKDLoss.forward": (
        compat.ViTKDLoss("", True, 4, 4).forward,
        [("preds_S", _), ("preds_T", _), ("mask", None)],
    ),
    "register_cls_kd": (compat.register_cls_kd, [("registry", _), ("force", True)]),
    "DistillationLoss": (
        compat.DistillationLoss,
        [("base_criterion", _), ("teacher_model", _), ("distillation_type", _), ("alpha", _), ("tau", _)],
    ),
    "DistillationLoss.forward": (
        compat.DistillationLoss(F.cross_entropy, nn.Identity(), "none", 0.5, 1.0).forward,
        [("inputs", _), ("outputs", _), ("labels", _)],
    ),
    "tinyvit_distill_loss": (
        compat.tinyvit_distill_loss,
        [("outputs", _), ("logits_index", _), ("logits_value", _)],
    ),
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
    assert set(compat.__all__) == {name for name in SIGNATURES if "." not in name}


@pytest.mark.parametrize("page", ["docs/dropins.md", "examples/dropins.py", "benchmarks/cases/dropins.py"])
def test_every_drop_in_is_shown(page: str) -> None:
    text = (ROOT / page).read_text()
    missing = [name for name in compat.__all__ if name not in text]
    assert missing == (["register_cls_kd"] if page.startswith("benchmarks") else [])


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


def cells_of(x: Tensor, side: int, cell: int) -> Tensor:
    """(B, side², C) -> (B, (side/cell)², cell² C), cell by cell and row by row in each."""
    grid = x.view(len(x), side, side, -1)
    return torch.stack(
        [
            torch.cat([grid[:, i + a, j + b] for a in range(cell) for b in range(cell)], -1)
            for i in range(0, side, cell)
            for j in range(0, side, cell)
        ],
        1,
    )


@golden_dtypes
@golden_cases("mf_loss")
def test_golden_mf_loss(case: golden.Case, dtype: torch.dtype) -> None:
    """Weights by position as the original's trainer gives them; blocks that are not matched get no gradient."""
    x, p = of_dtype(case, dtype), case["params"]
    terms: list[Tensor] = []

    def loss(**given: Tensor) -> Tensor:
        students, teachers = (
            [given[f"{who}_block{i}"] for i in range(10) if f"{who}_block{i}" in given]
            for who in ("student", "teacher")
        )
        indices = [given[f"index{i}"] for i in range(len(p["s_id"]))]
        weights = (p["w_sample"], p["w_patch"], p["w_rand"], p["max_patch_num"])
        terms.extend(compat.mf_loss(students, teachers, p["s_id"], p["t_id"], p["K"], *weights, indices=indices))
        return terms[0] + terms[1] + terms[2]

    assert_golden(case, dtype, x, loss)
    for term, name in zip(terms, ("sample", "patch", "rand"), strict=True):
        expected = x[f"loss.{name}_weighted"]
        assert relative_difference(term.detach(), expected) <= golden.tolerance(case, dtype, "loss"), name


@pytest.mark.parametrize("most", [0, 4, 9, 35, 36, 100])
def test_mf_loss_merges_cells(most: int) -> None:
    """Into isqrt(most)² cells where there are more tokens; the student's class token goes first."""
    s, t = randn(3, 37, 8), randn(3, 36, 12)
    m = math.isqrt(most)
    cell = 6 // m if 0 < most < 36 else 1
    if 0 < most < 36 and 6 % m:
        with pytest.raises(ValueError, match="cannot merge"):
            compat.mf_loss([s], [t], [0], [0], 4, max_patch_num=most)
        return
    cell_s, cell_t = cells_of(s[:, 1:], 6, cell), cells_of(t, 6, cell)
    torch.manual_seed(3)
    sample, patch, rand = compat.mf_loss([s], [t], [0], [0], 7, max_patch_num=most)
    torch.manual_seed(3)
    index = torch.randperm(3 * cell_s.shape[1], device=DEVICE)[:7]
    assert close(patch, reference.relation_loss(cell_s, cell_t))
    assert close(sample, reference.relation_loss(cell_s, cell_t, scope="inter"))
    assert close(rand, reference.relation_loss(cell_s, cell_t, scope="batch", index=index))


@pytest.mark.parametrize(("s", "t"), [((3, 9), (27,)), ((27,), (3, 9)), ((27,), (27,)), ((3, 9), (9, 3)), ((5,), (5,))])
@pytest.mark.parametrize("remove_neg", [True, False])
def test_gram_loss_over_sets(s: tuple[int, ...], t: tuple[int, ...], remove_neg: bool) -> None:
    """Over the batch: whatever the form of either network's tokens."""
    student, teacher = randn(*s, 8), randn(*t, 12)
    expected = reference.relation_loss(
        student.flatten(0, -2)[None], teacher.flatten(0, -2)[None], rectify="both" if remove_neg else "none"
    )
    assert close(compat.GramLoss(remove_neg=remove_neg)(student, teacher, img_level=False), expected)


@pytest.mark.parametrize("img_level", [True, False])
def test_gram_loss_of_an_empty_set_is_nan(img_level: bool) -> None:
    """The original's mean over no entries; there is nothing to train, and the graph stays whole."""
    shape = (2, 0, 8) if img_level else (0, 8)
    student = randn(*shape).requires_grad_()
    loss = compat.GramLoss()(student, randn(*shape), img_level=img_level)
    loss.backward()
    assert loss.isnan()
    assert student.grad is not None and student.grad.shape == shape
    with pytest.raises(ValueError, match="must not be empty"):
        compat.GramLoss()(student, randn(*shape[:-2], 3, 8), img_level=img_level)


class Normed(nn.Module):
    """Batch norms that run on tensors of their own, as golden cases give them."""

    def __init__(self, means: list[Tensor], variances: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm2d(len(x)).to(x) for x in means)
        for layer, mean, var in zip(self.layers, means, variances, strict=True):
            layer.running_mean, layer.running_var = mean, var

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


@golden_dtypes
@golden_cases("bn_stat_deepinversion")
def test_golden_hook(case: golden.Case, dtype: torch.dtype) -> None:
    x = of_dtype(case, dtype)
    n = sum(k.startswith("in.act") for k in x)
    model = Normed(*([x[f"in.{name}{i}"] for i in range(n)] for name in ("running_mean", "running_var"))).eval()
    hooks = [compat.DeepInversionFeatureHook(layer) for layer in model.layers]
    rescale = [case["params"]["first_bn_multiplier"]] + [1.0] * (n - 1)

    def loss(**given: Tensor) -> Tensor:
        model(*(given[f"act{i}"] for i in range(n)))
        return sum(hook.r_feature * scale for hook, scale in zip(hooks, rescale, strict=True))

    assert_golden(case, dtype, x, loss)


def batch_norm_and_hook() -> tuple[nn.Module, Tensor, compat.DeepInversionFeatureHook]:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(DEVICE).eval()
    return model, randn(2, 3, 5, 5).requires_grad_(), compat.DeepInversionFeatureHook(model[1])


def test_hook_reads_the_same_tensor_until_the_next_pass() -> None:
    model, x, hook = batch_norm_and_hook()
    model(x)
    with torch.no_grad():  # a value that was read for a log must not become the loss
        logged = hook.r_feature
    assert not logged.requires_grad
    first = hook.r_feature
    assert first is hook.r_feature and first.requires_grad and torch.equal(first, logged)
    model(2 * x)
    assert not close(hook.r_feature, first)


def test_hook_can_be_removed_by_its_handle() -> None:
    model, x, hook = batch_norm_and_hook()
    model(x)
    hook.hook.remove()
    assert not model[1]._forward_pre_hooks and not model[1]._forward_hooks
    with pytest.raises(RuntimeError, match="after close"):
        _ = hook.r_feature


def test_a_hooked_model_can_be_copied() -> None:
    """A copy computes as the model does and leaves its hooks alone; hooks that are copied along follow the copy."""
    model, x, hook = batch_norm_and_hook()
    model.hooks = [hook]
    model(x)
    before = hook.r_feature
    twin = copy.deepcopy(model)
    twin(3 * x)
    assert hook.r_feature is before
    expected = twin.hooks[0].r_feature
    model(3 * x)
    torch.testing.assert_close(hook.r_feature, expected)


def padding_masks(mask: Tensor) -> dict[str, Tensor]:
    """Every form of a (B, N) bool mask, True = token."""
    lowest = torch.finfo(torch.float32).min
    additive = {
        f"additive {low:g}": torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, low)
        for low in (-1000.0, -1e4, lowest, -math.inf)
    }
    half = {"additive float16": additive["additive -10000"].half()}
    whole = {"bool": mask, "int64": mask.long(), "uint8": mask.byte(), "float 0/1": mask.float()}
    forms = whole | additive | half
    return forms | {f"(B,1,1,N) {k}": v[:, None, None] for k, v in forms.items()} | {"(B,1,N)": mask[:, None]}


TOKENS = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], device=DEVICE).bool()
QK = {"q_S": (3, 2, 6, 4), "k_S": (3, 2, 6, 4), "q_T": (3, 2, 6, 8), "k_T": (3, 2, 6, 8)}
THREE_EQUAL = {(1, 1): 1.0, (2, 2): 1.0, (3, 3): 1.0}
MASKED: dict[str, tuple[Callable[..., object], list[tuple[int, ...]]]] = {
    "att_mse_loss": (compat.att_mse_loss, list(QK.values())),
    "att_mse_sum_loss": (compat.att_mse_sum_loss, list(QK.values())),
    "att_ce_loss": (compat.att_ce_loss, list(QK.values())),
    "att_ce_mean_loss": (compat.att_ce_mean_loss, list(QK.values())),
    "mmd_loss": (lambda a, b, c, d, mask: compat.mmd_loss((a, b), (c, d), mask), [(3, 6, 4)] * 2 + [(3, 6, 8)] * 2),
    "tinybert_att_loss": (
        lambda a, b, c, d, mask: compat.tinybert_att_loss([(a, b)], [(c, d)], mask),
        list(QK.values()),
    ),
    "minilmv2_loss": (
        lambda s, t, mask: compat.minilmv2_loss(s, t, THREE_EQUAL, 2, mask),
        [(3, 6, 24), (3, 6, 48)],
    ),
    "tinymim_loss": (lambda s, t, mask: sum(compat.tinymim_loss(s, t, 2, mask)), [(3, 6, 24), (3, 6, 48)]),
}


def test_every_drop_in_with_a_mask_is_listed() -> None:
    masked = {name for name in compat.__all__ if {"mask", "attention_mask"} & {*inspect.signature(
        getattr(compat, name)).parameters}}  # fmt: skip
    assert masked == {*MASKED}


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_every_form_hide_the_same_tokens(name: str) -> None:
    call, shapes = MASKED[name]
    inputs = [randn(*shape) for shape in shapes]
    expected = call(*inputs, TOKENS)
    assert not close(call(*inputs, None), expected)
    for form, mask in padding_masks(TOKENS).items():
        assert torch.equal(call(*inputs, mask), expected), form
    everything = call(*inputs, torch.ones_like(TOKENS))
    assert torch.equal(call(*inputs, torch.zeros(TOKENS.shape, device=DEVICE)), everything)  # additive, nothing hidden


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (TOKENS[:2], ValueError, "must have shape"),
        (TOKENS[:, None].expand(3, 6, 6), ValueError, "must have shape"),
        (torch.where(TOKENS, 0.0, -2.5), RuntimeError, "at most -1000"),
        (torch.where(TOKENS, 1.0, -1e4), RuntimeError, "at most -1000"),
        (torch.where(TOKENS, 0.0, math.nan), RuntimeError, "at most -1000"),
        ([1, 1], TypeError, "must be a tensor"),
    ],
    ids=["images", "per query", "bias", "both forms", "nan", "list"],
)
@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion ends the process's use of a GPU")
def test_masks_of_no_known_form_are_refused(name: str, mask: Tensor, error: type[Exception], message: str) -> None:
    call, shapes = MASKED[name]
    with pytest.raises(error, match=message):
        call(*(randn(*shape) for shape in shapes), mask)


def forms_of(q: Tensor, k: Tensor, v: Tensor, heads: int) -> dict[str, tuple[Tensor | list[Tensor], int | None]]:
    """q, k, v (B, N, D) in every form that the relation losses take, with the number of heads to give."""
    in_heads = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    return {
        "three outputs": ([q, k, v], heads),
        "one output": (torch.cat([q, k, v], 2), heads),
        "in heads": (in_heads, None),
        "stacked": (torch.stack(in_heads), None),
    }


FORMS = ["three outputs", "one output", "in heads", "stacked"]


@pytest.mark.parametrize("form", FORMS)
@golden_dtypes
@golden_cases("minilmv2_relations")
def test_golden_minilmv2(case: golden.Case, dtype: torch.dtype, form: str) -> None:
    x, p = of_dtype(case, dtype), case["params"]
    relations = {tuple(map(int, ids.split(","))): w for ids, w in p["relations"].items()}

    def loss(mask: Tensor, **given: Tensor) -> Tensor:
        (student, A_r), (teacher, _) = (
            forms_of(*(given[f"{letter}_{who}"] for letter in "qkv"), p["relation_heads"])[form] for who in "st"
        )
        return compat.minilmv2_loss(student, teacher, relations, A_r, mask)

    assert_golden(case, dtype, x, loss)


@pytest.mark.parametrize("form", FORMS)
@golden_dtypes
@golden_cases("attn_relation_kl")
def test_golden_tinymim(case: golden.Case, dtype: torch.dtype, form: str) -> None:
    """CIKD's cases hold two layers."""
    x = of_dtype(case, dtype)
    heads = next(v.shape[1] for k, v in x.items() if k.startswith("in.q_s"))
    terms: list[tuple[Tensor, Tensor]] = []

    def loss(**given: Tensor) -> Tensor:
        for layer in ("", "1", "2"):
            if f"q_s{layer}" in given:
                (student, H), (teacher, _) = (
                    forms_of(*(given[f"{c}_{who}{layer}"].transpose(1, 2).flatten(2) for c in "qkv"), heads)[form]
                    for who in "st"
                )
                terms.append(compat.tinymim_loss(student, teacher, H))
        return sum(qk + vv for qk, vv in terms)

    assert_golden(case, dtype, x, loss)
    for i, name in enumerate(("qk", "vv")):
        part = sum(term[i].detach() for term in terms)
        assert relative_difference(part, x[f"loss.{name}"]) <= golden.tolerance(case, dtype, "loss")


@golden_dtypes
@golden_cases("kd", "dkd", "nkd")
def test_golden_logits(case: golden.Case, dtype: torch.dtype) -> None:
    """Every golden case whose loss a drop-in computes: cls_KD's, and DeiT's mean over classes too."""
    x, p = of_dtype(case, dtype), case["params"]
    temperature = p.get("T", p.get("temp"))
    rest = {"temp": temperature, **{k: p[k] for k in ("alpha", "beta", "gamma") if k in p}}
    if case["op"] != "kd":
        module = {"dkd": compat.DKDLoss, "nkd": compat.NKDLoss}[case["op"]]("loss", True, **rest)
        assert_golden(case, dtype, x, lambda logits_student, logits_teacher, label: module(
            logits_student, logits_teacher, label))  # fmt: skip
    elif case["case"] == "cls_kd_ce":
        weight, _ = compat.KDLoss("loss", True, **rest)(x["in.logits_student"], x["in.logits_teacher"])
        assert weight == 1 - p["alpha"]
        kd = compat.KDLoss("loss", True, **rest)
        assert_golden(case, dtype, x, lambda logits_student, logits_teacher: kd(logits_student, logits_teacher)[1])
    elif case["case"] == "deit_numel":
        distil = compat.DistillationLoss(
            lambda outputs, labels: outputs.sum() * 0, nn.Identity(), "soft", 1.0, temperature
        )
        assert_golden(case, dtype, x, lambda logits_student, logits_teacher: distil(
            logits_teacher, (logits_student, logits_student), None))  # fmt: skip


def test_kd_loss_defaults_are_the_originals() -> None:
    """-α T² mean Σ q log p with T = 4, α = 1/2, and the other loss's weight."""
    s, t = randn(5, 9).double(), randn(5, 9).double()
    t[:, 2] = -math.inf  # 0 log 0 = 0
    weight, loss = compat.KDLoss("loss_kd", True)(s, t)
    log_p, q = (s / 4).log_softmax(1), (t / 4).softmax(1)
    assert weight == 0.5 and relative_difference(loss, -0.5 * 16 * (q * log_p).sum(1).mean()) < 1e-12


def test_labels_of_cls_kd() -> None:
    s, t, label = randn(4, 9), randn(4, 9), torch.tensor([0, 3, 8, 8], device=DEVICE)
    dkd, nkd = compat.DKDLoss("d", True), compat.NKDLoss("n", True)
    assert torch.equal(dkd(s, t, label[:, None]), dkd(s, t, label))
    mixed = 0.7 * F.one_hot(label, 9) + 0.3 / 9
    assert torch.equal(nkd(s, t, mixed), nkd(s, t, label))
    with pytest.raises(ValueError, match="label must have shape"):
        nkd(s, t, label[:, None])
    with pytest.raises(TypeError, match="label must be an integer"):
        dkd(s, t, mixed)


@golden_dtypes
@golden_cases("vitkd")
def test_golden_vitkd(case: golden.Case, dtype: torch.dtype) -> None:
    """The original's parameters load under their names."""
    x, p = of_dtype(case, dtype), case["params"]
    options = {k: p[k] for k in ("student_dims", "teacher_dims", "alpha_vitkd", "beta_vitkd", "lambda_vitkd")}
    module = compat.ViTKDLoss(name="loss_vitkd", use_this=True, **options).to(DEVICE, dtype)
    module.load_state_dict({k.removeprefix("param."): v for k, v in x.items() if k.startswith("param.")})
    assert_golden(case, dtype, x, lambda low_s, high_s, low_t, high_t, mask, ids_restore: module(
        [low_s, high_s], [low_t, high_t], mask=mask))  # fmt: skip


def test_vitkd_draws_the_mask_as_the_original_does() -> None:
    """It keeps the tokens of the smallest noise."""
    module = compat.ViTKDLoss("loss_vitkd", True, 4, 6).to(DEVICE)
    low_s, high_s, low_t, high_t = randn(2, 2, 9, 4), randn(2, 9, 4), randn(2, 2, 9, 6), randn(2, 9, 6)
    torch.manual_seed(3)
    drawn = module([low_s, high_s], (low_t, high_t))
    torch.manual_seed(3)
    mask = torch.ones(2, 9, device=DEVICE).scatter(1, torch.rand(2, 9, device=DEVICE).argsort(1)[:, :4], 0)
    assert torch.equal(drawn, module([low_s, high_s], [low_t, high_t], mask=mask))
    with pytest.raises(ValueError, match=r"\[low, high\]"):
        module([low_s], [low_t, high_t])


class Registry:
    """An mmengine-style registry: it refuses a name that is taken, unless forced."""

    def __init__(self, **taken: type) -> None:
        self.modules = taken

    def get(self, name: str) -> type | None:
        return self.modules.get(name)

    def register_module(self, name: str, force: bool = False, module: type | None = None) -> None:
        if name in self.modules and not force:
            raise KeyError(f"{name} is already registered")
        assert module is not None
        self.modules[name] = module

    def build(self, config: dict[str, object]) -> object:
        arguments = dict(config)
        return self.modules[str(arguments.pop("type"))](**arguments)


def test_cls_kd_is_built_from_its_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On import in mmengine's registry, where a name is free; in the user's own in place of the original."""
    mine = Registry(NKDLoss=nn.Identity)
    compat.register_cls_kd(mine)
    config = {"type": "NKDLoss", "name": "loss_nkd", "use_this": True, "temp": 1.0}
    built = mine.build(config)
    assert isinstance(built, compat.NKDLoss) and built.gamma == 1.5
    root = Registry(DKDLoss=nn.Identity)
    mmengine, registry = types.ModuleType("mmengine"), types.ModuleType("mmengine.registry")
    registry.MODELS = root
    monkeypatch.setitem(sys.modules, "mmengine", mmengine)
    monkeypatch.setitem(sys.modules, "mmengine.registry", registry)
    from fastkd.compat import cls_kd

    before = dict(vars(cls_kd))
    reload(cls_kd)
    vars(cls_kd).update(before)  # the classes that the package exports
    assert {*root.modules} == {"KDLoss", "DKDLoss", "NKDLoss", "ViTKDLoss"}
    assert root.modules["DKDLoss"] is nn.Identity
    config = {"type": "ViTKDLoss", "name": "loss_vitkd", "use_this": True, "student_dims": 4, "teacher_dims": 8}
    assert isinstance(root.build(config), losses.ViTKDLoss)


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_deit_distillation(kind: str) -> None:
    outputs, outputs_kd, inputs, labels = randn(5, 7), randn(5, 7), randn(5, 7), torch.arange(5, device=DEVICE)
    teacher = nn.Linear(7, 7).to(DEVICE)

    def criterion(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, label_smoothing=0.1)

    module = compat.DistillationLoss(criterion, teacher, kind, alpha=0.3, tau=2.0)
    loss, *grads = loss_and_gradients(lambda a, b: module(inputs, (a, b), labels) + 0 * b.sum(), (outputs, outputs_kd))

    def textbook(a: Tensor, b: Tensor) -> Tensor:
        z = teacher(inputs).detach().double()
        if kind == "none":
            return criterion(a, labels) + 0 * b.sum()
        soft = (
            F.kl_div((b / 2).log_softmax(1), (z / 2).log_softmax(1), reduction="sum", log_target=True) * 4 / b.numel()
        )
        distillation = soft if kind == "soft" else F.cross_entropy(b, z.argmax(1))
        return 0.7 * criterion(a, labels) + 0.3 * distillation

    expected = loss_and_gradients(textbook, (outputs.double(), outputs_kd.double()))
    for actual, wanted in zip((loss, *grads), expected, strict=True):
        assert relative_difference(actual, wanted) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_deit_distillation_refuses_one_output() -> None:
    x, labels = randn(3, 4), torch.arange(3, device=DEVICE)
    with pytest.raises(ValueError, match="distillation needs outputs"):
        compat.DistillationLoss(F.cross_entropy, nn.Identity(), "soft", 0.5, 1.0)(x, x, labels)
    with pytest.raises(ValueError, match="distillation_type must be"):
        compat.DistillationLoss(F.cross_entropy, nn.Identity(), "Soft", 0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int16], ids=lambda d: str(d)[6:])
def test_tinyvit_distillation(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    """The cross-entropy with the dense targets that the original rebuilds."""
    C, K = 30, 5
    outputs = (3 * randn(4, C)).to(dtype)
    value, index = randn(4, C).softmax(1).topk(K)

    def dense(x: Tensor) -> Tensor:
        target = ((1 - value.double().sum(1, keepdim=True)) / (C - K)).expand(4, C).scatter(1, index, value.double())
        return -(target * x.log_softmax(1)).sum(1).mean()

    def ours(x: Tensor) -> Tensor:
        return compat.tinyvit_distill_loss(x, index.to(index_dtype), value)

    expected = loss_and_gradients(dense, (outputs.double(),))
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for actual, wanted in zip(loss_and_gradients(ours, (outputs,)), expected, strict=True):
        assert relative_difference(actual.double(), wanted) < bound


def test_tinyvit_classes_without_probability_cost_nothing() -> None:
    """The stored values add up to 1, and the student has switched another class off."""
    outputs, index = randn(4, 6), torch.tensor([1, 3], device=DEVICE).expand(4, 2)
    value = torch.tensor([0.75, 0.25], device=DEVICE).expand(4, 2)
    outputs[:, 5] = -math.inf
    loss, gradient = loss_and_gradients(lambda x: compat.tinyvit_distill_loss(x, index, value), (outputs,))
    expected, wanted = loss_and_gradients(
        lambda x: -(value * x.log_softmax(1).gather(1, index)).sum(1).mean(), (outputs.double(),)
    )
    assert relative_difference(loss, expected) < 1e-6 and relative_difference(gradient, wanted) < 1e-6
    assert not gradient[:, 5].any()


X = torch.randn(2, 9, 12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compat.mf_loss([X], [X], [0], [0], 4, 1.0), TypeError, "belong together"),
        (lambda: compat.mf_loss([X], [X], [0], [0], 4, 1.0, 1.0, -1.0), ValueError, "w_rand must be"),
        (lambda: compat.mf_loss([X], [X], [0], [0, 0], 4), ValueError, "must match in pairs"),
        (lambda: compat.mf_loss([X], [X], [], [], 4), ValueError, "layer by layer"),
        (lambda: compat.mf_loss([X[:, 1:]], [X], [0], [0], 4), ValueError, "1 tokens more than block_outs_s"),
        (lambda: compat.mf_loss([X], [X], [0], [0], 4, max_patch_num=-1), ValueError, "max_patch_num must be"),
        (lambda: compat.mf_loss([X], [X], [0], [0], 4, max_patch_num=4), ValueError, "cannot merge"),
        (lambda: compat.mf_loss([X[:, 1:]], [X[:, 1:]], [0], [0], 4, max_patch_num=4), ValueError, "cannot merge"),
        (lambda: compat.mf_loss([X[0]], [X], [0], [0], 4), ValueError, r"block_outs_s\[0\] must have shape"),
        (lambda: compat.minilmv2_loss(X, X, {}, 2), ValueError, "relations must map"),
        (lambda: compat.minilmv2_loss(X, X, {(0, 1): 1.0}, 2), ValueError, "relations must map"),
        (lambda: compat.minilmv2_loss(X, X, {(1, 1): -1.0}, 2), ValueError, "relations"),
        (lambda: compat.minilmv2_loss(X, X, THREE_EQUAL), ValueError, "needs the number of heads"),
        (lambda: compat.minilmv2_loss(X, X, THREE_EQUAL, 3), ValueError, "divisible by 3 heads"),
        (lambda: compat.minilmv2_loss([X, X], [X, X], THREE_EQUAL, 2), ValueError, "must hold q, k and v"),
        (lambda: compat.minilmv2_loss(X[..., :10], X, THREE_EQUAL, 2), ValueError, "3D"),
        (lambda: compat.tinymim_loss(X.view(2, 1, 3, 3, 12), X, 3), ValueError, "3, B, H, N, d"),
        (lambda: compat.tinymim_loss([X.view(2, 9, 3, 4).transpose(1, 2)] * 3, X, 2), ValueError, "must have 2 heads"),
        (lambda: compat.tinymim_loss(X, X.clone().requires_grad_(), 2), ValueError, "detach"),
        (lambda: compat.tinyvit_distill_loss(X[0], X[0, :, :3], X[0, :, :3]), TypeError, "logits_index must be"),
        (lambda: compat.tinyvit_distill_loss(X[0], X[0, :, :12].long(), X[0, :, :12]), ValueError, "0 < K < C"),
        (lambda: compat.tinyvit_distill_loss(X[0], X[0, :8, :2].long(), X[0, :8, :2]), ValueError, "logits_index and"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


INDEX = torch.arange(7, device=DEVICE)
PADDED = torch.zeros(TOKENS.shape, device=DEVICE).masked_fill(~TOKENS, -1e4)
COMPILED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "mf_loss": (
        lambda s, t: torch.stack(compat.mf_loss([s], [t], [0], [0], 7, max_patch_num=4, indices=[INDEX])).sum(),
        [(2, 17, 4), (2, 16, 6)],
    ),
    "GramLoss": (lambda s, t: compat.GramLoss()(s, t, img_level=False), [(3, 9, 4), (27, 4)]),
    "minilmv2_loss": (lambda s, t: compat.minilmv2_loss(s, t, THREE_EQUAL, 2, PADDED), [(3, 6, 24), (3, 6, 48)]),
    "tinymim_loss": (lambda s, t: sum(compat.tinymim_loss(s, t, 2)), [(3, 6, 24), (3, 6, 48)]),
    "KDLoss": (lambda s, t: compat.KDLoss("", True)(s, t)[1], [(4, 9), (4, 9)]),
    "tinyvit_distill_loss": (
        lambda s, t: compat.tinyvit_distill_loss(s, torch.arange(3, device=DEVICE).expand(4, 3), t.softmax(1)[:, :3]),
        [(4, 9), (4, 9)],
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name: str) -> None:
    call, (shape_s, shape_t) = COMPILED[name]
    s, t = randn(*shape_s), randn(*shape_t)
    expected = loss_and_gradients(lambda s: call(s, t), (s,))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    actual = loss_and_gradients(lambda s: compiled(s, t), (s,))
    for a, b in zip(actual, expected, strict=True):
        assert close(a, b)


@pytest.mark.parametrize("name", ["KDLoss", "tinyvit_distill_loss"])
def test_cross_entropies_are_differentiated_once(name: str) -> None:
    call, (shape_s, shape_t) = COMPILED[name]
    s = randn(*shape_s).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(call(s, randn(*shape_t)), s, create_graph=True)


def test_a_class_that_both_networks_switched_off_costs_nothing() -> None:
    kept = torch.arange(6, device=DEVICE) != 2
    student, teacher = (x.masked_fill(~kept, -math.inf) for x in torch.randn(2, 4, 6, device=DEVICE))
    loss, gradient = loss_and_gradients(lambda s: compat.KDLoss("kd", True)(s, teacher)[1], [student])
    expected = loss_and_gradients(lambda s: compat.KDLoss("kd", True)(s, teacher[:, kept])[1], [student[:, kept]])
    assert_matches_oracle(loss, expected[0], expected[0].double(), 24, "loss")
    assert_matches_oracle(gradient[:, kept], expected[1], expected[1].double(), 24, "gradient")
    assert not gradient[:, ~kept].any()
