"""The recipes: complete, sourced, with the published figures, and tasks that fit their real networks."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from fastkd.train.models import create_model  # noqa: E402
from fastkd.train.recipes import RECIPES, Recipe  # noqa: E402
from fastkd.train.settings import FOLDER  # noqa: E402
from fastkd.train.tasks import DistillationTask, create_task, task_options  # noqa: E402

CLASSES = 10
PARAMETERS = {  # millions, without the classifier's
    "deit_tiny_patch16_224": 5.5, "deit_small_patch16_224": 21.7, "deit_base_patch16_224": 85.8,
    "deit_tiny_distilled_patch16_224": 5.5, "deit_small_distilled_patch16_224": 21.7,
    "deit_base_distilled_patch16_224": 85.8, "deit_tiny_mhca_patch16_224": 5.5, "vit_tiny_patch16_224": 5.5,
    "swin_tiny_patch4_window7_224": 27.5, "swin_small_patch4_window7_224": 48.8, "cait_s24_224": 46.6,
    "deit3_small_patch16_224": 21.7, "deit3_base_patch16_224": 85.8, "deit3_large_patch16_224": 303.3,
    "regnety_160": 80.6, "vit_base_patch16_224": 85.8,
}  # fmt: skip
ENDS = zip((0, 1, 2, 3, 8, 9, 10, 11), (0, 1, 2, 3, 20, 21, 22, 23), strict=True)
STAGE = zip(range(6), (0, 1, 2, 15, 16, 17), strict=True)
MATCHED = {
    "manifold-deit-tiny": [(f"blocks.{s}", f"blocks.{t}") for s, t in ENDS],
    "manifold-swin-tiny": [(f"layers.2.blocks.{s}", f"layers.2.blocks.{t}") for s, t in STAGE],
    "vitkd-deit-tiny": [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1"), ("norm", "norm")],
    "dearkd-deit-tiny": [("blocks.0", "s1"), ("blocks.1", "s2")],
    "cikd-vit-tiny": [("blocks.0", "blocks.0"), ("blocks.11", "blocks.7")],
}


def light_init(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Of the spread of a truncated normal of 0.02, and cheaper to draw."""
    with torch.no_grad():
        return tensor.uniform_(-0.035, 0.035)


@cache
def network(role: str, name: str, arguments: tuple[tuple[str, object], ...], img_size: int) -> nn.Module:
    """Random weights; one of each for the whole session."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("vision_transformer", "cait", "swin_transformer"):
            patch.setattr(f"timm.models.{module}.trunc_normal_", light_init)
        return create_model(role, name, dict(arguments), num_classes=CLASSES, img_size=img_size)[0]


def networks(recipe: Recipe, device: str) -> tuple[nn.Module, nn.Module]:
    where = (("device", device),)
    own = network("student", recipe.student, (*recipe.student_args.items(), *where), recipe.img_size)
    return own, network("teacher", recipe.teacher, (*recipe.teacher_args.items(), *where), recipe.img_size)


def tasks(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> Iterator[DistillationTask]:
    """Of each stage, in its last epoch."""
    for stage in recipe.stages:
        task = create_task(
            stage.task,
            student,
            teacher,
            img_size=recipe.img_size,
            student_layers=recipe.student_layers,
            teacher_layers=recipe.teacher_layers,
            options=stage.options,
        ).train()
        task.set_epoch(stage.epochs - 1)
        yield task


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_real_networks(name):
    """Without numbers: sizes, matched layers, and the shapes of a forward pass of each stage."""
    recipe = RECIPES[name]
    student, teacher = networks(recipe, "meta")
    for role, model in (("student", student), ("teacher", teacher)):
        millions = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("head")) / 1e6
        assert millions == pytest.approx(PARAMETERS[getattr(recipe, role).partition(".")[0]], abs=0.1)
    images = torch.empty(2, 3, recipe.img_size, recipe.img_size, device="meta")
    targets = torch.empty(2, dtype=torch.long, device="meta")
    for number, task in enumerate(tasks(recipe, student, teacher)):
        if number == 0 and name in MATCHED:
            assert task.matched == MATCHED[name]
        result = task(images, targets)
        assert result["loss"].shape == () and result["output"].shape == (2, CLASSES)


FIRST = "manifold-deit-tiny"


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in RECIPES if name != FIRST)]
)
def test_recipe_runs_a_step_of_each_stage_with_its_real_networks(name):
    recipe = RECIPES[name]
    student, teacher = networks(recipe, "cpu")
    images = torch.randn(2, 3, recipe.img_size, recipe.img_size)
    targets = torch.tensor([1, 7])
    for task in tasks(recipe, student, teacher):
        before = [p.detach().clone() for p in task.trainable_parameters]
        optimizer = torch.optim.AdamW(task.trainable_parameters, recipe.lr, weight_decay=0.0)
        result = task(images, targets)
        result["loss"].backward()
        optimizer.step()
        assert all(value.isfinite().all() for value in result.values())
        assert result["output"].shape == (2, CLASSES)
        moved = sum(not torch.equal(p, old) for p, old in zip(task.trainable_parameters, before, strict=True))
        assert moved > 0.8 * len(before)  # CIKD's first stage leaves the student's end alone
        student.zero_grad()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_complete(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    for item in dataclasses.fields(Recipe):
        unset = item.default is not dataclasses.MISSING and getattr(recipe, item.name) == item.default
        own = item.name not in ("name", "source", "sources", "differences", "stages")
        empty = getattr(recipe, item.name) in ({}, (), None)
        assert not own or unset or empty or recipe.sources[item.name], f"{item.name} has no source"
    for number, stage in enumerate(recipe.stages):
        assert stage.options.keys() <= task_options(stage.task).keys()
        assert all(recipe.sources[f"stages[{number}].{key}"] for key in ("task", "epochs", *stage.options))
    teacher, _, tag = recipe.teacher.partition(".")
    assert bool(tag) == recipe.teacher_pretrained
    assert recipe.teacher in timm.list_pretrained(f"{teacher}*") if tag else timm.is_model(teacher)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_as_settings_and_as_text(name):
    recipe = RECIPES[name]
    settings = dataclasses.replace(FOLDER, **recipe.overrides())
    assert settings.stages == recipe.stages
    assert settings.epochs == sum(stage.epochs for stage in recipe.stages) >= 300
    assert settings.teacher_epochs == (0 if recipe.teacher_pretrained else FOLDER.teacher_epochs)
    text = recipe.table()
    assert text.startswith(f"{name}: ")
    for key, value, source in recipe.rows():
        if source:
            line = next(line for line in text.splitlines() if line.startswith(f"{key} "))
            assert value in line and line.endswith(source)
    assert all(key.split(".")[0].split("[")[0] in text for key in recipe.sources)


DEIT = {"erase": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "weight_decay": 0.05, "opt": "adamw"}
DEIT |= {"sched": "cosine", "min_lr": 1e-5, "img_size": 224}
DEIT_IMAGES = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "interpolation": "bicubic"}
PUBLISHED = {  # hyper-parameters of the papers' codes; those of a stage by its number
    "manifold": DEIT | {
        "augment_args": DEIT_IMAGES, "student_args": {"drop_path_rate": 0.0}, "batch_size": 64, "processes": 8,
        "lr": 5e-4, "warmup_epochs": 5, "warmup_lr": 1e-6, "clip_grad": None, "ema": None, "aug_repeats": 3,
        "amp": "fp16",
        0: {
            "epochs": 300, "intra": 4.0, "inter": 0.1, "random": 0.2, "num_samples": 192, "weight": 1.0,
            "task_weight": 0.0, "logits": "soft", "logit_weight": 1.0, "logit_options": {"temperature": 1.0},
        },
    },
    "vitkd": DEIT | {
        "augment_args": DEIT_IMAGES, "batch_size": 256, "processes": 4, "lr": 1e-3, "warmup_epochs": 20,
        "clip_grad": 5.0, "opt_args": {"betas": (0.9, 0.999)}, "aug_repeats": 1, "amp": "none",
        0: {"epochs": 300, "alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5, "weight": 1.0, "task_weight": 1.0},
    },
    "dearkd": DEIT | {
        "augment_args": DEIT_IMAGES, "batch_size": 256, "processes": 4, "lr": 1e-3, "warmup_epochs": 5,
        "warmup_lr": 1e-6, "aug_repeats": 3,
        0: {"epochs": 250, "logits": "hard", "task_weight": 0.5, "logit_weight": 0.5},
        1: {"epochs": 50},
    },
    "cikd": {
        "batch_size": 256, "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 15, "min_lr": 0.0, "mixup": 0.0,
        "cutmix": 0.0, "erase": 0.0, "smoothing": 0.1, "opt_args": {"betas": (0.9, 0.95)}, "amp": "fp16",
        "augment_args": {"scale": (0.2, 1.0), "color_jitter": 0.4, "interpolation": "bicubic"},
        0: {"epochs": 300, "weight": 1.0, "task_weight": 0.0},
        1: {
            "epochs": 300, "warmup_epochs": 15, "min_lr": 1e-6, "layer_decay": 0.75, "opt_args": {}, "batch_size": 512,
            "task_weight": 1.0, "logit_weight": 1.0, "logit_ramp_epochs": 5,
            "logit_options": {"alpha": 1.0, "beta": 4.0, "temperature": 1.0},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_published_values(name):
    recipe = RECIPES[name]
    for key, value in PUBLISHED[name.partition("-")[0]].items():
        if isinstance(key, int):
            stage = recipe.stages[key]
            own = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)} | dict(stage.options)
            assert {part: own[part] for part in value} == value
        else:
            assert getattr(recipe, key) == value, key
    if "nkd" in name:
        options = recipe.stages[0].options
        assert options["logits"] == "nkd" and options["logit_options"] == {"gamma": 1.0, "temperature": 1.0}
    if name == "cikd-vit-tiny":
        assert recipe.stages[1].augment_args["scale"] == (0.08, 1.0)


def test_published_figures():
    """What is one recipe's own."""
    manifold, vitkd, cikd = (RECIPES[name] for name in ("manifold-deit-tiny", "vitkd-nkd-deit-base", "cikd-vit-tiny"))
    assert manifold.batch_size * manifold.processes == 512 and manifold.lr == 5e-4
    assert vitkd.batch_size * vitkd.processes == 1024 and vitkd.lr == 1e-3 and vitkd.clip_grad == 5.0
    assert vitkd.ema is not None and RECIPES["vitkd-deit-tiny"].ema is None
    assert [stage.task for stage in cikd.stages] == ["cikd", "dkd"] and cikd.mixup == 0
    assert [stage.task for stage in RECIPES["dearkd-deit-small"].stages] == ["dearkd", "none"]


def test_the_page_lists_them():
    page = (Path(__file__).parent.parent / "docs/recipes.md").read_text()
    rows = [
        f"| `{name}` | `{recipe.student}` | `{recipe.teacher}` | "
        f"{', '.join(f'{stage.task} {stage.epochs}' for stage in recipe.stages)} |"
        for name, recipe in RECIPES.items()
    ]
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows
