"""Providers of the drop-ins: the official form of each loss, written from its formula, and fastkd.compat."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from benchmarks.case import Provider, Result, in_pytorch
from fastkd import compat

K, WEIGHTS = 192, (4.0, 0.1, 0.2)  # of the manifold terms: intra, inter, random
RELATIONS = {(1, 1): 1 / 3, (2, 2): 1 / 3, (3, 3): 1 / 3}


def providers(official: Callable[..., Result], ours: Callable[..., Result], **others: Provider) -> dict[str, Provider]:
    return {**in_pytorch(official, tuned=False), **others, "fastkd": Provider(ours)}


def _float(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def thirds(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (student, teacher, index) of each layer."""
    n = len(tensors) // 3
    return [(tensors[i], tensors[n + i], tensors[2 * n + i]) for i in range(n)]


def _difference(s: Tensor, t: Tensor) -> Tensor:
    return (t @ t.mT - s @ s.mT).square().mean()


def layer_terms(s: Tensor, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of one layer, each with its maps."""
    s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    rows = (x.reshape(-1, x.shape[-1])[index] for x in (s, t))
    return _difference(s, t), _difference(s.transpose(0, 1), t.transpose(0, 1)), _difference(*rows)


def _weighted(terms: Sequence[Tensor]) -> Tensor:
    return sum((w * term for w, term in zip(WEIGHTS, terms, strict=True)), torch.zeros(()))


def layer_mf_loss(s: Tensor, t: Tensor, index: Tensor) -> Tensor:
    return _weighted(layer_terms(s, t, index))


def layer_mf_loss_fastkd(s: Tensor, t: Tensor, index: Tensor) -> Tensor:
    return _weighted(compat.layer_mf_loss(s, t, K, index=index))


def manifold_loss(s: Tensor, t: Tensor, index: Tensor) -> Tensor:
    loss = fastkd.manifold_loss(s, t, index=index)
    assert isinstance(loss, Tensor)
    return loss


def merged(x: Tensor, most: int) -> Tensor:
    """(B, n², C) -> (B, m², (n/m)² C) where the grid has more tokens than `most` = m²."""
    B, N, C = x.shape
    if most in (0, N):
        return x
    n, m = int(N**0.5), int(most**0.5)
    return x.view(B, m, n // m, m, n // m, C).permute(0, 1, 3, 2, 4, 5).reshape(B, m * m, -1)


def mf_loss(most: int, *tensors: Tensor) -> Tensor:
    """The weighted mean over layers, of the tokens that both networks have."""
    losses = []
    for s, t, index in thirds(tensors):
        s = s[:, s.shape[1] - t.shape[1] :]
        losses.append(layer_mf_loss(merged(s, most), merged(t, most), index))
    return torch.stack(losses).mean()


def mf_loss_fastkd(most: int, *tensors: Tensor) -> Tensor:
    students, teachers, indices = zip(*thirds(tensors), strict=True)
    ids, (patch, sample, rand) = range(len(students)), WEIGHTS
    return torch.stack(
        compat.mf_loss(students, teachers, ids, ids, K, sample, patch, rand, max_patch_num=most, indices=indices)
    ).sum()


def gram_loss(s: Tensor, t: Tensor) -> Tensor:
    """DINOv3's default: negative similarities of both networks are removed."""
    s, t = (F.normalize(x, dim=-1) for x in _float(s, t))
    t_map, s_map = t @ t.mT, s @ s.mT
    t_map[t_map < 0] = 0.0
    s_map[s_map < 0] = 0.0
    return F.mse_loss(s_map, t_map)


def gram_loss_fastkd(s: Tensor, t: Tensor) -> Tensor:
    return compat.GramLoss()(s, t, img_level=s.ndim == 3)


class StatisticsHook:
    """A forward hook that computes the distance from a channels-first copy of what enters the layer."""

    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.r_feature = (module.running_var - var).norm() + (module.running_mean - mean).norm()  # type: ignore[operator]


@torch.compiler.disable
@cache
def hooked_resnet18(hook: Callable[[nn.Module], Any], dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    """Return a teacher in eval mode, with running statistics that are not the initial ones, and its hooks."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=100)
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
    model = model.eval().requires_grad_(False).to(dtype)
    return model, [hook(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def inversion_step(hook: Callable[[nn.Module], Any], images: Tensor, labels: Tensor) -> Tensor:
    model, hooks = hooked_resnet18(hook, images.dtype)
    loss = F.cross_entropy(model(images), labels)
    rescale = [10.0] + [1.0] * (len(hooks) - 1)
    return loss + 0.01 * sum(h.r_feature * scale for h, scale in zip(hooks, rescale, strict=True))


def minilmv2(heads: int, *tensors: Tensor) -> Tensor:
    """Relations of each text's own tokens, text by text."""
    *projections, mask = tensors
    s, t = projections[:3], projections[3:]
    lengths = mask.sum(1).tolist()
    total = s[0].new_zeros(())
    for x_s, x_t in zip(s, t, strict=True):
        maps = []
        for x in (x_t, x_s):
            x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
            maps.append(x @ x.mT / x.shape[-1] ** 0.5)
        for b, n in enumerate(lengths):
            q, p = (z[b, :, :n, :n].reshape(-1, n) for z in maps)
            kl = F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="sum") / (heads * n)
            total = total + kl / (3 * len(lengths))
    return total


def minilmv2_fastkd(heads: int, *tensors: Tensor) -> Tensor:
    return compat.minilmv2_loss(tensors[:3], tensors[3:6], RELATIONS, heads, tensors[6])


def tinymim(heads: int, student: Tensor, teacher: Tensor) -> Tensor:
    maps = []
    for qkv in (student, teacher):
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        maps.append((((q @ k.mT) * scale).softmax(-1), ((v @ v.mT) * scale).softmax(-1)))
    terms = [F.kl_div(p.log(), q, reduction="none").sum(-1).mean() for p, q in zip(*maps, strict=True)]
    return terms[0] + terms[1]


def tinymim_fastkd(heads: int, student: Tensor, teacher: Tensor) -> Tensor:
    qk, vv = compat.tinymim_loss(student, teacher, heads)
    return qk + vv


def kd(s: Tensor, t: Tensor) -> Tensor:
    s, t = _float(s, t)
    return -0.5 * 16 * (F.softmax(t / 4, 1) * F.softmax(s / 4, 1).log()).sum(1).mean()


def kd_fastkd(s: Tensor, t: Tensor) -> Tensor:
    return compat.KDLoss("loss_kd", True)(s, t)[1]


def dkd(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The form with masks over all classes; the target's logit is lowered by 1000 to exclude it."""
    s, t = _float(s, t)
    at, others = (torch.full_like(s, x).scatter_(1, label[:, None], 1 - x).bool() for x in (0.0, 1.0))

    def binary(z: Tensor) -> Tensor:
        p = F.softmax(z / 4, 1)
        return torch.cat([(p * at).sum(1, keepdim=True), (p * others).sum(1, keepdim=True)], 1)

    target = F.kl_div(binary(s).log(), binary(t), reduction="sum") * 16 / len(s)
    q = F.softmax(t / 4 - 1000.0 * at, 1)
    rest = F.kl_div(F.log_softmax(s / 4 - 1000.0 * at, 1), q, reduction="sum") * 16 / len(s)
    return target + 6.0 * rest


def dkd_fastkd(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return compat.DKDLoss("loss_dkd", True)(s, t, label)


def nkd(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The form that removes the target's column."""
    s, t = _float(s, t)
    label = label[:, None]
    of_target = (F.softmax(t, 1).gather(1, label) * F.log_softmax(s, 1).gather(1, label)).mean()
    others = torch.ones_like(s).scatter_(1, label, 0).bool()
    s, t = s[others].reshape(len(s), -1), t[others].reshape(len(s), -1)
    return -of_target - 1.5 * (F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()


def nkd_fastkd(s: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return compat.NKDLoss("loss_nkd", True)(s, t, label)


@cache
def vitkd_module(Ds: int, Dt: int) -> nn.Module:
    return compat.ViTKDLoss("loss_vitkd", True, Ds, Dt)


def vitkd_shapes(Ds: int, Dt: int) -> list[tuple[str, torch.Size]]:
    return [(name, p.shape) for name, p in vitkd_module(Ds, Dt).named_parameters()]


def vitkd(Ds: int, Dt: int, *tensors: Tensor) -> Tensor:
    """Mimicking of two low layers, generation of the masked tokens of the last by two convolutions."""
    (low_s, high_s), (low_t, high_t, noise) = tensors[:2], tensors[-3:]
    p = dict(zip((name for name, _ in vitkd_shapes(Ds, Dt)), tensors[2:-3], strict=True))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    B, N, _ = high_s.shape
    low = torch.cat([linear(low_s[:, i], f"align2.{i}").unsqueeze(1) for i in range(2)], 1)
    mimic = F.mse_loss(low, low_t, reduction="sum") / B * 3e-5
    order = noise.argsort(1)
    keep, restore = order[:, : N // 2], order.argsort(1)
    x = linear(high_s, "align").gather(1, keep[..., None].expand(-1, -1, Dt))
    x = torch.cat([x, p["mask_token"].expand(B, N - N // 2, -1)], 1).gather(1, restore[..., None].expand(-1, -1, Dt))
    mask = torch.ones_like(noise).index_fill(1, torch.arange(N // 2, device=noise.device), 0).gather(1, restore)
    side = int(N**0.5)
    x = x.reshape(B, side, side, Dt).permute(0, 3, 1, 2)
    x = F.conv2d(x, p["generation.0.weight"], p["generation.0.bias"], padding=1).relu()
    x = F.conv2d(x, p["generation.2.weight"], p["generation.2.bias"], padding=1).flatten(2).mT
    return mimic + F.mse_loss(x * mask[..., None], high_t * mask[..., None], reduction="sum") / B * 3e-6 / 0.5


def vitkd_fastkd(Ds: int, Dt: int, *tensors: Tensor) -> Tensor:
    (low_s, high_s), (low_t, high_t, noise) = tensors[:2], tensors[-3:]
    parameters = dict(zip((name for name, _ in vitkd_shapes(Ds, Dt)), tensors[2:-3], strict=True))
    half = noise.shape[1] // 2
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, noise.argsort(1)[:, :half], False)
    arguments = ([low_s, high_s], [low_t, high_t])
    loss: Tensor = torch.func.functional_call(vitkd_module(Ds, Dt), parameters, arguments, {"mask": mask})
    return loss


def deit(outputs: Tensor, outputs_kd: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    log_p, log_q = (F.log_softmax(z / 3, 1) for z in (outputs_kd, teacher))
    soft = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * 9 / outputs_kd.numel()
    return F.cross_entropy(outputs, label) * 0.5 + soft * 0.5


def deit_fastkd(outputs: Tensor, outputs_kd: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    criterion = compat.DistillationLoss(F.cross_entropy, nn.Identity(), "soft", alpha=0.5, tau=3.0)
    loss: Tensor = criterion(teacher, (outputs, outputs_kd), label)
    return loss


def tinyvit(outputs: Tensor, value: Tensor, index: Tensor) -> Tensor:
    C = outputs.shape[1]
    rest = (1.0 - value.sum(-1, keepdim=True)) / (C - value.shape[1])
    target = rest.repeat_interleave(C, dim=-1).scatter_(-1, index, value)
    return -(target * F.log_softmax(outputs, -1)).sum(-1).mean()


def tinyvit_fastkd(outputs: Tensor, value: Tensor, index: Tensor) -> Tensor:
    return compat.tinyvit_distill_loss(outputs, index, value)


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q kᵀ d^-1/2, lowered by 10,000 for padded keys."""
    return q @ k.mT * q.shape[-1] ** -0.5 + (mask[:, None, None] - 1.0) * 10000.0


def att_mse(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    pairs = (mask[:, None, :, None] * mask[:, None, None]).to(q_S)
    squares = F.mse_loss(_scores(q_S, k_S, mask), _scores(q_T, k_T, mask), reduction="none")
    return (squares * pairs).sum() / pairs.sum() / q_S.shape[1]


def att_mse_sum(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    pairs = (mask[:, :, None] * mask[:, None]).to(q_S)
    squares = F.mse_loss(_scores(q_S, k_S, mask).sum(1), _scores(q_T, k_T, mask).sum(1), reduction="none")
    return (squares * pairs).sum() / pairs.sum()


def att_ce(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    rows = mask[:, None].to(q_S)
    q = F.softmax(_scores(q_T, k_T, mask), -1)
    loss = (q * F.log_softmax(_scores(q_S, k_S, mask), -1)).sum(-1)
    return -(loss * rows).sum() / rows.sum() / q_S.shape[1]


def att_ce_mean(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    rows = mask.to(q_S)
    q = F.softmax(_scores(q_T, k_T, mask).mean(1), -1)
    loss = (q * F.log_softmax(_scores(q_S, k_S, mask).mean(1), -1)).sum(-1)
    return -(loss * rows).sum() / rows.sum()


def tinybert(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    S, T = (torch.where(z <= -1e2, torch.zeros_like(z), z) for z in (_scores(q_S, k_S, mask), _scores(q_T, k_T, mask)))
    return F.mse_loss(S, T)


def mmd(s1: Tensor, s2: Tensor, t1: Tensor, t2: Tensor, mask: Tensor) -> Tensor:
    pairs = (mask[:, :, None] * mask[:, None]).to(s1)
    squares = F.mse_loss(s1 @ s2.mT / s1.shape[-1], t1 @ t2.mT / t1.shape[-1], reduction="none")
    return (squares * pairs).sum() / pairs.sum()


def tinybert_fastkd(q_S: Tensor, k_S: Tensor, q_T: Tensor, k_T: Tensor, mask: Tensor) -> Tensor:
    return compat.tinybert_att_loss([(q_S, k_S)], [(q_T, k_T)], mask)


def mmd_fastkd(s1: Tensor, s2: Tensor, t1: Tensor, t2: Tensor, mask: Tensor) -> Tensor:
    return compat.mmd_loss((s1, s2), (t1, t2), mask)


LAYER_MF_LOSS = providers(layer_mf_loss, layer_mf_loss_fastkd, manifold_loss=Provider(manifold_loss))
GRAM_LOSS = providers(gram_loss, gram_loss_fastkd)
HOOK = providers(partial(inversion_step, StatisticsHook), partial(inversion_step, compat.DeepInversionFeatureHook))
LOGITS = {
    "KDLoss": providers(kd, kd_fastkd),
    "DKDLoss": providers(dkd, dkd_fastkd),
    "NKDLoss": providers(nkd, nkd_fastkd),
    "DistillationLoss": providers(deit, deit_fastkd),
    "tinyvit_distill_loss": providers(tinyvit, tinyvit_fastkd),
}
TEXT = {
    "att_mse_loss": providers(att_mse, compat.att_mse_loss),
    "att_mse_sum_loss": providers(att_mse_sum, compat.att_mse_sum_loss),
    "att_ce_loss": providers(att_ce, compat.att_ce_loss),
    "att_ce_mean_loss": providers(att_ce_mean, compat.att_ce_mean_loss),
    "mmd_loss": providers(mmd, mmd_fastkd),
    "tinybert_att_loss": providers(tinybert, tinybert_fastkd),
}


def mf_providers(most: int) -> dict[str, Provider]:
    return providers(partial(mf_loss, most), partial(mf_loss_fastkd, most))


def minilmv2_providers(heads: int) -> dict[str, Provider]:
    return providers(partial(minilmv2, heads), partial(minilmv2_fastkd, heads))


def tinymim_providers(heads: int) -> dict[str, Provider]:
    return providers(partial(tinymim, heads), partial(tinymim_fastkd, heads))


def vitkd_providers(Ds: int, Dt: int) -> dict[str, Provider]:
    return providers(partial(vitkd, Ds, Dt), partial(vitkd_fastkd, Ds, Dt))
