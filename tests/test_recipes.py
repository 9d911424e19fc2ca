"""The recipes: complete, sourced, and each a step of its real networks at their real size."""

import dataclasses
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
from fastkd.train.tasks import create_task, task_options  # noqa: E402

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


def networks(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    own = network("student", recipe.student, tuple(recipe.student_args.items()), recipe.img_size)
    return own, network("teacher", recipe.teacher, tuple(recipe.teacher_args.items()), recipe.img_size)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_a_step_of_each_stage_with_its_real_networks(name):
    recipe = RECIPES[name]
    student, teacher = networks(recipe)
    for role, model in (("student", student), ("teacher", teacher)):
        millions = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("head")) / 1e6
        assert millions == pytest.approx(PARAMETERS[getattr(recipe, role).partition(".")[0]], abs=0.1)
    images = torch.randn(2, 3, recipe.img_size, recipe.img_size)
    targets = torch.tensor([1, 7])
    for number, stage in enumerate(recipe.stages):
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
        if number == 0 and name in MATCHED:
            assert task.matched == MATCHED[name]
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


def test_published_figures():
    """A few that a slip of the hand would change."""
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
