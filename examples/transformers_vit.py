"""fastkd in Hugging Face's Trainer: a ViT learns token relations and attention maps while SDPA attention stays on.

pip install 'fastkd[examples]'
python examples/transformers_vit.py
"""

from typing import Any

import digits
import gain
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.models.vit.modeling_vit import ViTLayer

from fastkd import attention_loss, capture
from fastkd.losses import ManifoldLoss


def last_layer(model: nn.Module) -> list[str]:
    """Return the name of the last layer, which differs between versions of Transformers."""
    return [name for name, module in model.named_modules() if isinstance(module, ViTLayer)][-1:]


def forward(student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
    """Return the student's output, the manifold loss and the attention loss of a batch."""
    with (
        capture.tokens(
            student, last_layer(student), prefix=1
        ) as s,  # one class token; the model has no attribute for it
        capture.tokens(teacher, last_layer(teacher), prefix=1) as t,
        capture.qkv(student, last_layer(student)) as s_maps,
        capture.qkv(teacher, last_layer(teacher)) as t_maps,
    ):
        output = student(**inputs)
        with torch.no_grad():
            teacher(pixel_values=inputs["pixel_values"])
        manifold = ManifoldLoss()(list(s), list(t))
        # Head counts differ, so head-averaged maps are compared.
        attention = attention_loss(s_maps[0].q, s_maps[0].k, t_maps[0].q, t_maps[0].k, heads="mean")
        return output, manifold, attention


class DistillationTrainer(Trainer):
    def __init__(self, teacher: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        # compute_loss returns the mean over a batch, so the Trainer must divide it when it accumulates gradients.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        output, manifold, attention = forward(model, self.teacher, inputs)
        loss = output.loss + manifold + attention
        return (loss, output) if return_outputs else loss


def vit(hidden_size: int, layers: int, heads: int) -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
        )
    )


def rows(data: TensorDataset) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(*data.tensors, strict=True)]


def main(epochs: int = 3) -> tuple[float, float]:
    """Distil. Return the held-out sum of both distillation losses before and after."""
    torch.manual_seed(0)
    train, held_out = digits.load()
    options = TrainingArguments(
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    teacher = vit(64, layers=3, heads=4)
    Trainer(teacher, options, train_dataset=rows(train)).train()
    student = vit(32, layers=2, heads=2)
    trainer = DistillationTrainer(teacher, student, options, train_dataset=rows(train))

    def distance() -> float:
        with torch.no_grad():
            images = held_out.tensors[0].to(trainer.args.device)
            _, manifold, attention = forward(student.eval(), teacher, {"pixel_values": images})
            return (manifold + attention).item()

    before = distance()
    trainer.train()
    after = distance()
    logits = torch.tensor(trainer.predict(rows(held_out)).predictions)
    top1 = (logits.argmax(1) == held_out.tensors[1]).double().mean()
    print(f"held-out distillation losses {before:.5f} -> {after:.5f}, top-1 {top1:.1%}")
    gain.report("attention maps of DeiT-S", attention_loss, gain.attention_maps, gain.queries_and_keys)
    return before, after


if __name__ == "__main__":
    main()
