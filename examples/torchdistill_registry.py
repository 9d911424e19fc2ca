"""fastkd in torchdistill: a loss in its registry, selected and weighted by torchdistill_config.yaml.

pip install 'fastkd[examples]'
python examples/torchdistill_registry.py
"""

from pathlib import Path
from typing import Any

import digits
import gain
import torch
from torch import Tensor, nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import register_mid_level_loss

from fastkd import capture
from fastkd.losses import ManifoldLoss

CONFIG = Path(__file__).with_name("torchdistill_config.yaml")


@register_mid_level_loss
class FastKDManifoldLoss(nn.Module):
    """fastkd's ManifoldLoss on the hooked features.

    Args:
        feature_pairs: per layer {student: {io, path}, teacher: {io, path}}, as in torchdistill's own losses.
        prefix_tokens: number of leading class and register tokens to drop.
        options: options of ManifoldLoss.
    """

    def __init__(self, feature_pairs: dict[str, Any], prefix_tokens: int = 0, **options: Any) -> None:
        super().__init__()
        self.feature_pairs, self.prefix_tokens = feature_pairs, prefix_tokens
        self.manifold = ManifoldLoss(**options)

    def forward(
        self, student_io_dict: dict[str, Any], teacher_io_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.manifold(self.tokens(student_io_dict, "student"), self.tokens(teacher_io_dict, "teacher"))

    def tokens(self, io_dict: dict[str, Any], side: str) -> list[Tensor]:
        layers = [pair[side] for pair in self.feature_pairs.values()]
        return [io_dict[layer["path"]][layer["io"]][:, self.prefix_tokens :] for layer in layers]


def main(epochs: int | None = None) -> tuple[float, float]:
    """Distil as configured. Return the held-out manifold loss before and after."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    teacher = digits.teacher()
    student = digits.vit(embed_dim=32, depth=2, num_heads=2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_yaml_file(str(CONFIG))["train"]
    box = get_distillation_box(teacher, student, {"digits/train": train}, config, device, None, False, 1)

    def distance() -> float:
        images = held_out.tensors[0].to(device)
        with torch.no_grad(), capture.tokens(student.eval(), [0, -1]) as s, capture.tokens(teacher, [0, -1]) as t:
            student(images), teacher(images)
            return ManifoldLoss()(list(s), list(t)).item()

    before = distance()
    for epoch in range(box.num_epochs if epochs is None else epochs):
        box.pre_epoch_process(epoch=epoch)
        for images, labels, _ in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(images.to(device), labels.to(device)))
        box.post_epoch_process()
    gain.manifold()
    return digits.summary("manifold loss", before, distance(), student.cpu(), held_out)


if __name__ == "__main__":
    main()
