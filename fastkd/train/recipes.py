"""Settings of the papers: each value with its source, under the names of the fields of Settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .settings import Settings, Stage

Sourced = tuple[Any, str]  # (value, source)
OURS = "our choice"


@dataclass(frozen=True)
class Recipe:
    """The configuration of a published run. Fields with names of Settings have the same meaning.

    source: the paper and its code. processes: their number, each with batch_size images; lr is for all together.
    sources: the source of each field, and of each value of stage i as "stages[i].name".
    differences: features of the published run that a run of this recipe lacks.
    """

    name: str
    source: str
    student: str
    teacher: str
    img_size: int
    stages: tuple[Stage, ...]
    batch_size: int
    processes: int
    lr: float
    weight_decay: float
    opt: str
    sched: str
    warmup_epochs: int
    warmup_lr: float
    min_lr: float
    teacher_pretrained: bool = False
    student_args: dict[str, Any] = field(default_factory=dict)
    teacher_args: dict[str, Any] = field(default_factory=dict)
    student_layers: tuple[str, ...] | None = None
    teacher_layers: tuple[str, ...] | None = None
    opt_args: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    ema: float | None = None
    augment_args: dict[str, Any] = field(default_factory=dict)
    aug_repeats: int = 1
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    amp: str = "none"
    sources: Mapping[str, str] = field(default_factory=dict)
    differences: tuple[str, ...] = ()

    def overrides(self) -> dict[str, Any]:
        """Return the recipe's values by their names in Settings."""
        names = {item.name for item in dataclasses.fields(Settings)}
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name in names}
        own["epochs"] = sum(stage.epochs for stage in self.stages)
        if self.teacher_pretrained:
            own["teacher_epochs"] = 0
        return own

    def rows(self) -> list[tuple[str, str, str]]:
        """Yield (name, value, source) of every value; values of a stage are named "stages[i].name"."""
        rows = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "stages":
                rows += [
                    (name, str(own), self.sources[name])
                    for i, stage in enumerate(value)
                    for name, own in _flat(i, stage)
                ]
            elif item.name not in ("name", "source", "sources", "differences"):
                rows.append((item.name, str(value), self.sources.get(item.name, "")))
        return rows

    def table(self) -> str:
        """Return the configuration as text: each value with its source, then the differences from the published run."""
        rows = [row for row in self.rows() if row[2]]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{self.name}: {self.source}", ""]
        lines += ["  ".join((row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2])) for row in rows]
        if self.differences:
            lines += ["", "Not as published:", *(f"- {text}" for text in self.differences)]
        return "\n".join(lines)


def _flat(i: int, stage: Stage) -> list[tuple[str, Any]]:
    """Return the values that a stage sets, including its options."""
    own = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)}
    options = own.pop("options")
    return [(f"stages[{i}].{name}", value) for name, value in {**own, **options}.items() if value is not None]


def _stage(
    task: str, source: str, *, epochs: Sourced, options: Mapping[str, Sourced], **own: Sourced
) -> tuple[Stage, dict[str, str]]:
    values: dict[str, Any] = {name: value for name, (value, _) in own.items()}
    stage = Stage(task, epochs[0], {name: value for name, (value, _) in options.items()}, **values)
    sources = {name: where for name, (_, where) in {"epochs": epochs, **options, **own}.items()}
    return stage, {"task": source, **sources}


def _recipe(
    name: str,
    source: str,
    stages: list[tuple[Stage, dict[str, str]]],
    *,
    differences: tuple[str, ...] = (),
    **given: Sourced,
) -> Recipe:
    values: dict[str, Any] = {key: value for key, (value, _) in given.items()}
    sources = {key: where for key, (_, where) in given.items()}
    sources |= {f"stages[{i}].{key}": where for i, (_, own) in enumerate(stages) for key, where in own.items()}
    own_stages = tuple(stage for stage, _ in stages)
    return Recipe(name=name, source=source, stages=own_stages, sources=sources, differences=differences, **values)


def _deit(where: str) -> dict[str, Sourced]:
    """Return DeiT's augmentation, which all recipes of DeiT students share."""
    return {
        "augment_args": (
            {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "interpolation": "bicubic"}, where,
        ),
        "erase": (0.25, where),
        "mixup": (0.8, where),
        "cutmix": (1.0, where),
        "smoothing": (0.1, where),
    }  # fmt: skip


def _manifold(size: str) -> Recipe:
    """Return a recipe from the command of Hao et al.'s code; students other than DeiT-Tiny follow the paper."""
    readme, code = "README of the official code", "main.py of the official code"
    student = readme if size == "tiny" else f"{OURS}, with the settings of DeiT-Tiny"
    ends = tuple(f"blocks.{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11))
    stage = _stage(
        "manifold",
        readme,
        epochs=(300, code),
        options={
            "intra": (4.0, readme),
            "inter": (0.1, readme),
            "random": (0.2, readme),
            "num_samples": (192, readme),
            "weight": (1.0, readme),
            "task_weight": (0.0, readme),
            "logits": ("soft", readme),
            "logit_weight": (1.0, readme),
            "logit_options": ({"temperature": 1.0}, code),
        },
    )
    return _recipe(
        f"manifold-deit-{size}",
        "Hao et al. 2022 (arXiv:2107.01378), github.com/Hao840/manifold-distillation at 1096b82",
        [stage],
        student=(f"deit_{size}_patch16_224", student),
        student_args=({"drop_path_rate": 0.0}, readme),
        student_layers=(ends, readme),
        teacher=("cait_s24_224.fb_dist_in1k", readme),
        teacher_pretrained=(True, readme),
        teacher_layers=(tuple(f"blocks.{i}" for i in (0, 1, 2, 3, 20, 21, 22, 23)), readme),
        img_size=(224, readme),
        batch_size=(64, code),
        processes=(8, readme),
        opt=("adamw", code),
        lr=(5e-4, f"{code}: 5e-4 for 512 images"),
        weight_decay=(0.05, code),
        sched=("cosine", code),
        warmup_epochs=(5, code),
        warmup_lr=(1e-6, code),
        min_lr=(1e-5, code),
        amp=("fp16", code),
        aug_repeats=(3, code),
        differences=(
            "the code keeps an average of the weights that it does not evaluate",
            "class tokens are left out also where teacher and student both have one (CaiT's blocks have none)",
        ),
        **_deit(code),
    )


def _manifold_swin() -> Recipe:
    """Return the recipe of Swin-Small into Swin-Tiny; the released code lacks Swin, so parts are our choice."""
    ours = f"{OURS}: that of manifold-deit-tiny"
    base = _manifold("tiny")
    stage = _stage(
        "manifold",
        "paper",
        epochs=(300, ours),
        options={name: (value, ours) for name, value in base.stages[0].options.items()},
    )
    same = (
        "batch_size",
        "processes",
        "opt",
        "lr",
        "weight_decay",
        "sched",
        "warmup_epochs",
        "warmup_lr",
        "min_lr",
        "amp",
    )
    return _recipe(
        "manifold-swin-tiny",
        base.source,
        [stage],
        student=("swin_tiny_patch4_window7_224", "paper"),
        student_args=({"drop_path_rate": 0.0}, ours),
        teacher=("swin_small_patch4_window7_224.ms_in1k", f"paper; its weights {OURS}"),
        teacher_pretrained=(True, "paper"),
        img_size=(224, "paper"),
        aug_repeats=(3, ours),
        differences=(
            "the layers are the task's choice, those of the third stage (14 x 14 tokens); the paper's are not known",
            "tokens are not merged into larger patches, which the first stages would need",
        ),
        **{name: (getattr(base, name), ours) for name in same},
        **_deit(ours),
    )


def _vitkd(size: str, teacher: str, *, nkd: bool) -> Recipe:
    configs = "configs of the official code"
    options: dict[str, Sourced] = {
        "alpha": (3e-5, configs),
        "beta": (3e-6, configs),
        "mask_ratio": (0.5, configs),
        "weight": (1.0, configs),
        "task_weight": (1.0, configs),
    }
    if nkd:
        options |= {
            "logits": ("nkd", configs),
            "logit_weight": (1.0, configs),
            "logit_options": ({"gamma": 1.0, "temperature": 1.0}, configs),
        }
    own: dict[str, Sourced] = {"student_args": ({"drop_path_rate": 0.0}, configs)}
    if size == "base":
        own = {
            "student_args": ({"drop_path_rate": 0.1}, configs),
            "ema": (0.99996, f"{configs}; the decay is {OURS}, DeiT's"),
        }
    return _recipe(
        f"vitkd-{'nkd-' if nkd else ''}deit-{size}",
        "Yang et al. 2022 (arXiv:2209.02432), github.com/yzd-v/cls_KD, branch master at ad4876f",
        [_stage("vitkd", configs, epochs=(300, configs), options=options)],
        student=(f"deit_{size}_patch16_224", "README vitkd.md of the official code"),
        teacher=(f"deit3_{teacher}_patch16_224.fb_in22k_ft_in1k", "README vitkd.md of the official code"),
        teacher_pretrained=(True, "README vitkd.md of the official code"),
        img_size=(224, configs),
        batch_size=(256, configs),
        processes=(4, configs),
        opt=("adamw", configs),
        opt_args=({"betas": (0.9, 0.999)}, configs),
        lr=(1e-3, f"{configs}: for 1024 images"),
        weight_decay=(0.05, configs),
        sched=("cosine", configs),
        warmup_epochs=(20, configs),
        warmup_lr=(1e-6, OURS),
        min_lr=(1e-5, configs),
        clip_grad=(5.0, configs),
        differences=("the projectors, mask token and generator learn with the student's settings",),
        **own,
        **_deit(configs),
    )


def _dearkd(size: str, *, mhca: bool = False) -> Recipe:
    deit = f"{OURS}: DeiT's (arXiv:2012.12877)"
    reading = "our reading; the paper has no code"
    early = _stage(
        "dearkd",
        "paper",
        epochs=(250, reading),
        options={
            "weight": (1.0, reading),
            "task_weight": (0.5, deit),
            "logits": ("hard", reading),
            "logit_weight": (0.5, deit),
        },
    )
    kind = "mhca" if mhca else "distilled"
    return _recipe(
        f"dearkd-{'mhca-' if mhca else ''}deit-{size}",
        "Chen et al. 2022 (arXiv:2204.12997); no code was released",
        [early, _stage("none", "paper", epochs=(50, reading), options={})],
        student=(f"deit_{size}_{kind}_patch16_224", f"paper; the {'MHCA' if mhca else 'distillation'} part {reading}"),
        student_args=({"drop_path_rate": 0.1}, deit),
        student_layers=(("blocks.0", "blocks.1"), reading),
        teacher=("regnety_160.deit_in1k", f"{OURS}: RegNetY-16GF, DeiT's teacher"),
        teacher_pretrained=(True, OURS),
        teacher_layers=(("s1", "s2"), reading),
        img_size=(224, "paper"),
        batch_size=(256, deit),
        processes=(4, deit),
        opt=("adamw", deit),
        lr=(1e-3, f"{deit}, 5e-4 for 512 images"),
        weight_decay=(0.05, deit),
        sched=("cosine", deit),
        warmup_epochs=(5, deit),
        warmup_lr=(1e-6, deit),
        min_lr=(1e-5, deit),
        amp=("fp16", deit),
        aug_repeats=(3, deit),
        differences=(
            "how the stages share the learning rate's schedule is not known; here each has its own, warm-up included",
            *(() if mhca else ("the paper's students have MHCA layers, as dearkd-mhca-deit-tiny in our reading",)),
        ),
        **_deit(deit),
    )


def _cikd() -> Recipe:
    code, readme = "official code", "README of the official code"
    imitation = _stage(
        "cikd",
        code,
        epochs=(300, readme),
        options={"weight": (1.0, code), "task_weight": (0.0, code)},
        warmup_epochs=(15, readme),
    )
    logits = _stage(
        "dkd",
        code,
        epochs=(300, readme),
        options={
            "task_weight": (1.0, code),
            "logit_weight": (1.0, code),
            "logit_options": ({"alpha": 1.0, "beta": 4.0, "temperature": 1.0}, code),
            "logit_ramp_epochs": (5, code),
        },
        warmup_epochs=(15, readme),
        min_lr=(1e-6, code),
        layer_decay=(0.75, code),
        opt_args=({}, f"{OURS}: AdamW's own"),
        batch_size=(512, code),
        augment_args=(
            {"scale": (0.08, 1.0), "auto_augment": "rand-m10-n1-p1.0-mstd101", "interpolation": "bicubic"},
            f"{code}, its TrivialAugmentWide as one operation of RandAugment at a uniform strength",
        ),
    )
    return _recipe(
        "cikd-vit-tiny",
        "CIKD, github.com/newLLing/CIKD at 255b34e, for data sets the size of CIFAR-100",
        [imitation, logits],
        student=("vit_tiny_patch16_224", code),
        student_args=({"num_heads": 12, "drop_path_rate": 0.1}, f"{code}: 12 heads in the first and the last block"),
        student_layers=(("blocks.0", "blocks.11"), code),
        teacher=("vit_base_patch16_224", f"{code}; to be trained on the same data"),
        teacher_layers=(("blocks.0", "blocks.7"), code),
        img_size=(224, code),
        batch_size=(256, f"{code}: of the first stage"),
        processes=(1, OURS),
        opt=("adamw", code),
        opt_args=({"betas": (0.9, 0.95)}, f"{code}: of the first stage"),
        lr=(1e-3, code),
        weight_decay=(0.05, code),
        sched=("cosine", code),
        warmup_epochs=(15, readme),
        warmup_lr=(0.0, OURS),
        min_lr=(0.0, f"{code}: of the first stage"),
        augment_args=(
            {"scale": (0.2, 1.0), "color_jitter": 0.4, "interpolation": "bicubic"},
            f"{code}: of the first stage",
        ),
        smoothing=(0.1, f"{code}: of the second stage; the first looks at no labels"),
        amp=("fp16", code),
        differences=(
            "the student's blocks between have 12 heads as well, the code's 6",
            "drop-path grows with depth to 0.1 in the last block; the code has 0.1 in all but the first and the last",
            "in the first stage the code shows the teacher the images without colour jitter",
            "the second stage's augmentation is one operation of RandAugment's, in the code of TrivialAugmentWide's",
        ),
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _manifold("tiny"),
        _manifold("small"),
        _manifold_swin(),
        *(
            _vitkd(size, teacher, nkd=nkd)
            for nkd in (False, True)
            for size, teacher in (("tiny", "small"), ("small", "base"), ("base", "large"))
        ),
        *(_dearkd(size) for size in ("tiny", "small", "base")),
        _dearkd("tiny", mhca=True),
        _cikd(),
    )
}
