"""What a training run is told: one frozen dataclass and the values for the two kinds of data."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """All options of `fastkd train`; the defaults are those for a folder of images.

    Weights and num_samples: the command in the README of Hao et al.'s official code. The optimiser's: DeiT's.
    """

    data: str = "digits"
    val_fraction: float = 0.2
    check: bool = True
    img_size: int | None = None  # None: the student's own
    student: str = "deit_tiny_patch16_224"
    student_args: dict[str, Any] = field(default_factory=dict)
    student_layers: tuple[str, ...] | None = None  # None: models.match_layers
    teacher: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    teacher_layers: tuple[str, ...] | None = None
    teacher_checkpoint: str | None = None
    teacher_pretrained: bool = False
    teacher_epochs: int = 30  # of training first, where it comes without weights
    teacher_lr: float = 1e-3
    epochs: int = 300
    warmup_epochs: int = 5
    batch_size: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.05
    opt: str = "adamw"
    sched: str = "cosine"
    clip_grad: float | None = None
    augment: bool = True
    mixup: float = 0.0
    smoothing: float = 0.0
    weight: float = 1.0
    intra: float = 4.0
    inter: float = 0.1
    random: float = 0.2
    num_samples: int = 192
    baseline: bool = True
    device: str = "auto"
    amp: str = "none"
    workers: int = 2
    seed: int = 0
    out: str | None = None
    overwrite: bool = False


# 64 px: a digit's pixel is one patch of the student and one cell of the teacher's map at stride 8.
DIGITS = Settings(
    img_size=64,
    student="vit_tiny_patch16_224",
    student_args={"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2},
    teacher="resnet18",
    teacher_args={"output_stride": 8, "channels": (16, 32, 64, 64), "stem_width": 16},
    teacher_layers=("layer2.1", "layer3.0", "layer3.1", "layer4.0"),
    teacher_epochs=4,
    teacher_lr=3e-3,
    epochs=20,
    warmup_epochs=2,
    batch_size=16,
    lr=1e-3,
    workers=0,
)
FOLDER = Settings()
