"""The recipes: complete, sourced, with the published figures, and tasks that fit their real networks."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from fastkd.train.models import create_model  # noqa: E402
from fastkd.train.recipes import RECIPES, recipe  # noqa: E402
from fastkd.train.settings import FOLDER, Settings, read_recipe, settings_from  # noqa: E402
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


@cache
def settings_of(name: str) -> Settings:
    return settings_from({"recipe": name, "data": "images"})


def sources(name: str) -> dict[str, str]:
    """The source of each value: the comment on its line, or the one of the line before."""
    found, before, place = {}, "", ""
    for line in recipe(name).read_text().partition("\n\n")[2].splitlines():
        text, _, comment = line.partition("  # ")
        if line.strip().startswith("# "):
            before = line.strip().removeprefix("# ")
            continue
        key, _, value = text.strip().removeprefix("- ").partition(":")
        if text.startswith("  - "):
            place = f"stages[{int(place[7:-2]) + 1 if place else 0}]."
        if value:
            found[(place if text.startswith(" ") else "") + key] = comment or before
        before = ""
    return found


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


def networks(settings: Settings, device: str) -> tuple[nn.Module, nn.Module]:
    where = (("device", device),)
    own = network("student", settings.student, (*settings.student_args.items(), *where), settings.img_size)
    return own, network("teacher", settings.teacher, (*settings.teacher_args.items(), *where), settings.img_size)


def tasks(settings: Settings, student: nn.Module, teacher: nn.Module) -> Iterator[DistillationTask]:
    """Of each stage, in its last epoch."""
    for stage in settings.stages:
        task = create_task(
            stage.task,
            student,
            teacher,
            img_size=settings.img_size,
            student_layers=settings.student_layers,
            teacher_layers=settings.teacher_layers,
            options=stage.options,
        ).train()
        task.set_epoch(stage.epochs - 1)
        yield task


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_its_real_networks(name):
    """Without numbers: sizes, matched layers, and the shapes of a forward pass of each stage."""
    settings = settings_of(name)
    student, teacher = networks(settings, "meta")
    for role, model in (("student", student), ("teacher", teacher)):
        millions = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("head")) / 1e6
        assert millions == pytest.approx(PARAMETERS[getattr(settings, role).partition(".")[0]], abs=0.1)
    images = torch.empty(2, 3, settings.img_size, settings.img_size, device="meta")
    targets = torch.empty(2, dtype=torch.long, device="meta")
    for number, task in enumerate(tasks(settings, student, teacher)):
        if number == 0 and name in MATCHED:
            assert task.matched == MATCHED[name]
        result = task(images, targets)
        assert result["loss"].shape == () and result["output"].shape == (2, CLASSES)


FIRST = "manifold-deit-tiny"


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in RECIPES if name != FIRST)]
)
def test_recipe_runs_a_step_of_each_stage_with_its_real_networks(name):
    settings = settings_of(name)
    student, teacher = networks(settings, "cpu")
    images = torch.randn(2, 3, settings.img_size, settings.img_size)
    targets = torch.tensor([1, 7])
    for task in tasks(settings, student, teacher):
        before = [p.detach().clone() for p in task.trainable_parameters]
        optimizer = torch.optim.AdamW(task.trainable_parameters, settings.lr, weight_decay=0.0)
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
    settings, given = settings_of(name), read_recipe(name)
    own = {key: getattr(settings, key) for key in given}
    assert own == given
    assert {key for key, value in vars(settings).items() if value != getattr(FOLDER, key) and key not in given} == {
        "data",
        "recipe",
    }
    expected = {*given} - {"stages"}
    for number, stage in enumerate(settings.stages):
        assert stage.options.keys() <= task_options(stage.task).keys()
        values = dataclasses.asdict(stage)
        keys = {*values.pop("options"), *(key for key, value in values.items() if value is not None)}
        expected |= {f"stages[{number}].{key}" for key in keys}
    found = sources(name)
    assert found.keys() == expected
    assert all(found.values()), [key for key, source in found.items() if not source]
    teacher, _, tag = settings.teacher.partition(".")
    assert bool(tag) == settings.teacher_pretrained
    assert settings.teacher in timm.list_pretrained(f"{teacher}*") if tag else timm.is_model(teacher)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_configuration_file(name):
    """It gives the same settings by its name and as a file."""
    settings = settings_of(name)
    config = read_recipe(name)
    assert dataclasses.replace(settings_from({"data": "images"}, config=config), recipe=name) == settings
    assert settings.epochs == sum(stage.epochs for stage in settings.stages) >= 300
    assert settings.teacher_epochs == 0


def test_every_file_is_a_recipe():
    assert {path.stem for path in recipe(RECIPES[0]).parent.glob("*.yaml")} == set(RECIPES)


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
    settings = settings_of(name)
    for key, value in PUBLISHED[name.partition("-")[0]].items():
        if key == "processes":
            assert processes(name) == value
        elif isinstance(key, int):
            stage = settings.stages[key]
            own = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)} | dict(stage.options)
            assert {part: own[part] for part in value} == value
        else:
            assert getattr(settings, key) == value, key
    if "nkd" in name:
        options = settings.stages[0].options
        assert options["logits"] == "nkd" and options["logit_options"] == {"gamma": 1.0, "temperature": 1.0}
    if name == "cikd-vit-tiny":
        assert settings.stages[1].augment_args["scale"] == (0.08, 1.0)


def processes(name: str) -> int:
    return int(re.search(r"on (?:each of )?(\d+) process", sources(name)["batch_size"])[1])


def test_published_figures():
    """What is one recipe's own."""
    names = ("manifold-deit-tiny", "vitkd-nkd-deit-base", "cikd-vit-tiny")
    manifold, vitkd, cikd = (settings_of(name) for name in names)
    assert manifold.batch_size * processes(names[0]) == 512 and manifold.lr == 5e-4
    assert vitkd.batch_size * processes(names[1]) == 1024 and vitkd.lr == 1e-3 and vitkd.clip_grad == 5.0
    assert vitkd.ema is not None and settings_of("vitkd-deit-tiny").ema is None
    assert [stage.task for stage in cikd.stages] == ["cikd", "dkd"] and cikd.mixup == 0
    assert [stage.task for stage in settings_of("dearkd-deit-small").stages] == ["dearkd", "none"]


def test_the_page_lists_them():
    page = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    rows = [
        f"| `{name}` | `{settings.student}` | `{settings.teacher}` | "
        f"{', '.join(f'{stage.task} {stage.epochs}' for stage in settings.stages)} |"
        for name, settings in ((name, settings_of(name)) for name in RECIPES)
    ]
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows
