"""Every drop-in of fastkd.compat in place of the loss that it replaces: a student learns each teacher by heart.

python examples/dropins.py
"""

from collections.abc import Callable, Sequence
from functools import partial

import gain
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import compat

B, N, Ds, Dt, H, C = 2, 16, 24, 48, 4, 10
RELATIONS = {(1, 1): 1 / 3, (2, 2): 1 / 3, (3, 3): 1 / 3}
MASK = torch.tensor([[1] * N, [1] * 12 + [0] * 4])
LABELS = torch.tensor([0, 3])


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def fit(name: str, parameters: list[Tensor], loss: Callable[[], Tensor], steps: int = 40) -> None:
    """Minimise a loss and print its values before and after."""
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        values.append(value.item())
    print(f"{name:<26}{values[0]:.5f} -> {values[-1]:.5f}")


def relations() -> None:
    """Fit tokens, as of blocks, in manifold distillation and DINOv3."""
    blocks_S, blocks_T = leaves((B, N + 1, Ds), (B, N + 1, Ds)), [torch.randn(B, N, Dt), torch.randn(B, N, Dt)]
    weights = (0.1, 4.0, 0.2)

    # from losses import layer_mf_loss, mf_loss
    fit("mf_loss", blocks_S, lambda: sum_of(compat.mf_loss(blocks_S, blocks_T, [0, 1], [0, 1], 8, *weights)))
    s, r = leaves((B, N, Ds), (B, N, Ds))
    fit("layer_mf_loss", [s], lambda: sum_of(compat.layer_mf_loss(s, blocks_T[0], 8)))

    # from dinov3.loss.gram_loss import GramLoss
    fit("GramLoss", [r], lambda: compat.GramLoss()(r, blocks_T[0]))


def statistics() -> None:
    """Fit images to the statistics of a network."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()

    # from deepinversion import DeepInversionFeatureHook
    hook = compat.DeepInversionFeatureHook(network[1])
    (images,) = leaves((B, 3, 8, 8))

    def r_feature() -> Tensor:
        network(images)
        return hook.r_feature

    fit("DeepInversionFeatureHook", [images], r_feature)
    hook.close()


def attention() -> None:
    """Fit projections, from linear layers and in heads."""
    (s,), t = leaves((B, N, 3 * Ds)), torch.randn(B, N, 3 * Dt)
    fit("minilmv2_loss", [s], lambda: compat.minilmv2_loss(s, t, RELATIONS, H, MASK))
    fit("tinymim_loss", [s], lambda: sum_of(compat.tinymim_loss(s, t, H)))

    # from textbrewer.losses import att_ce_loss, att_ce_mean_loss, att_mse_loss, att_mse_sum_loss, mmd_loss
    q_T, k_T = torch.randn(2, B, H, N, Dt // H)
    names = ("att_ce_loss", "att_ce_mean_loss", "att_mse_loss", "att_mse_sum_loss")
    for name in names:
        qk = leaves(*[(B, H, N, Ds // H)] * 2)
        fit(name, qk, partial(getattr(compat, name), *qk, q_T, k_T, MASK))
    q, k = qk = leaves(*[(B, H, N, Ds // H)] * 2)
    fit("tinybert_att_loss", qk, lambda: compat.tinybert_att_loss([(q, k)], [(q_T, k_T)], MASK))
    state_S, state_T = leaves(*[(B, N, Ds)] * 2), [torch.randn(B, N, Dt), torch.randn(B, N, Dt)]
    fit("mmd_loss", state_S, lambda: compat.mmd_loss(state_S, state_T, MASK))


def logits() -> None:
    """Fit logits in cls_KD, DeiT and TinyViT; the first four include the teacher's entropy or a label's loss."""
    t = 3 * torch.randn(B, C)

    # from mmcls.models.dis_losses import DKDLoss, KDLoss, NKDLoss, ViTKDLoss
    (s,) = leaves((B, C))
    fit("KDLoss", [s], lambda: compat.KDLoss("loss_kd", True)(s, t)[1])
    fit("NKDLoss", [s], lambda: compat.NKDLoss("loss_nkd", True)(s, t, LABELS))
    fit("DKDLoss", [s], lambda: compat.DKDLoss("loss_dkd", True)(s, t, LABELS))
    preds_S, preds_T = leaves((B, 2, N, Ds), (B, N, Ds)), [torch.randn(B, 2, N, Dt), torch.randn(B, N, Dt)]
    vitkd = compat.ViTKDLoss("loss_vitkd", True, student_dims=Ds, teacher_dims=Dt)
    fit("ViTKDLoss", [*preds_S, *vitkd.parameters()], lambda: vitkd(preds_S, preds_T))

    # from losses import DistillationLoss
    criterion = compat.DistillationLoss(F.cross_entropy, nn.Identity(), "soft", alpha=0.5, tau=3.0)
    outputs = leaves((B, C), (B, C))
    fit("DistillationLoss", outputs, lambda: criterion(t, tuple(outputs), LABELS))

    (s,) = leaves((B, C))
    value, index = t.softmax(1).topk(3)
    fit("tinyvit_distill_loss", [s], lambda: compat.tinyvit_distill_loss(s, index, value))
    # compat.register_cls_kd(mmcls.registry.MODELS) puts cls_KD's four where its configs find them.


def main() -> None:
    torch.manual_seed(0)
    relations()
    statistics()
    attention()
    logits()
    gain.report("GramLoss of DeiT-Ti and DeiT-S", compat.GramLoss(), gain.gram_maps, gain.tokens)


if __name__ == "__main__":
    main()
