"""Every example runs as its user runs it, its loss falls, and loss and gradients equal the textbook's."""

import copy
import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import reference
from fastkd.testing import assert_matches_oracle, loss_and_gradients
from tests._support import runs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# What each example imports beside torch; the extra `examples` brings it, and `test` brings that.
NEEDS = {
    "dropins": (),
    "pytorch_loop": ("timm", "sklearn"),
    "dinov3_gram": ("timm", "sklearn"),
    "deepinversion_hook": ("timm", "sklearn"),
    "transformers_vit": ("timm", "sklearn", "transformers", "accelerate"),
    "transformers_bert": ("sklearn", "transformers", "accelerate"),
    "lightning_module": ("timm", "sklearn", "lightning"),
    "torchdistill_registry": ("timm", "sklearn", "torchdistill"),
    "timm_train": ("timm.task", "sklearn"),
    "accelerate_fsdp2": ("timm", "sklearn", "accelerate"),
    "mmengine_registry": ("timm", "sklearn", "mmengine"),
    "vit_from_cnn": ("timm", "sklearn"),
}
# Hosts that take seconds to import. Their losses, checkpoints and accumulated gradients are tested below in any case.
RARE = {
    "accelerate_fsdp2",
    "mmengine_registry",
    "lightning_module",
    "torchdistill_registry",
    "transformers_bert",
    "transformers_vit",
}
STUDENT, TEACHER = {"embed_dim": 32, "depth": 2, "num_heads": 2}, {"embed_dim": 64, "depth": 3, "num_heads": 4}
DIGITS = 600  # of 1,797: enough for every loss to fall to a tenth
# Runs an example as `python examples/<name>.py` does, on those.
PROGRAM = f"""
import runpy, sys, sklearn.datasets
found = sklearn.datasets.load_digits()
found.images, found.target = found.images[:{DIGITS}], found.target[:{DIGITS}]
sklearn.datasets.load_digits = lambda: found
path = sys.argv.pop(1)
sys.path.insert(0, path.rpartition("/")[0])
runpy.run_path(path, run_name="__main__")
"""
# timm's train.py as a task sees it: the lines around the place of the patch are its own, the calls on the task too.
TRAIN = """
def main(args, model, loader, loss_kwargs):
    if args.kd_model_name is not None:
        task = LogitDistillationTask(
            student_model=model, teacher_model=args.kd_model_name, device=device, criterion_kwargs=loss_kwargs
        )
    else:
        task = ClassificationTask(
            model=model,
            device=device,
            criterion_kwargs=loss_kwargs,
        )

    model = task.get_trainable_module()
    eval_model = task.get_eval_model()

    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
    task.setup_ema(decay=0.9, use_warmup=False, device=None)
    evaluator = task.create_evaluator()
    saver = CheckpointSaver(model=model, optimizer=optimizer, checkpoint_dir=args.output, task=task)
    task.get_trainable_module().train()
    for step, (images, labels) in enumerate(loader):
        result = task(images, labels)
        result["loss"].backward()
        dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), value=1.0, mode="agc")
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    for network in (eval_model, task.get_eval_model(ema=True)):
        evaluator.reset()
        evaluator.update(network.eval()(images), labels)
        saver.save_checkpoint(0, metric=evaluator.compute()["top1"])
    return task, result
"""
IMAGES = 8  # 128 tokens: the manifold loss then takes every row, so nothing is drawn


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports an example by name, or skips where a package it needs is missing."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name: str) -> ModuleType:
        for package in NEEDS.get(name, ()):
            pytest.importorskip(package)
        return importlib.import_module(name)

    return load


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "digits", "gain"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n in RARE)) for n in NEEDS])
def test_runs_and_the_loss_falls(name: str, tmp_path: Path) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    (process,) = runs.start(1, runs.script, tmp_path, PROGRAM, str(EXAMPLES / f"{name}.py"))
    process.join(900)
    assert process.exitcode == 0, (tmp_path / "stderr-0.txt").read_text()
    printed = (tmp_path / "stdout-0.txt").read_text()
    found = re.search(r"([\d.]+) -> ([\d.]+)", printed)
    assert found, printed
    before, after = map(float, found.groups())
    assert 0 < after < before / 2
    gained = re.search(
        r"8 images: ([\d.]+) ms instead of ([\d.]+) \(([\d.]+) times faster\), (\d+) MB instead of (\d+)$",
        printed,
        re.MULTILINE,
    )
    assert gained, printed
    ours, textbook, ratio = map(float, gained.groups()[:3])
    assert (textbook - 0.05) / (ours + 0.05) - 0.05 <= ratio <= (textbook + 0.05) / (ours - 0.05) + 0.05
    assert int(gained[4]) < int(gained[5])


def test_what_a_gain_is_measured_by_is_the_textbook(example: Callable[[str], ModuleType]) -> None:
    gain = example("gain")
    student, teacher = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 6).double()
    heads = [x.unsqueeze(1) for x in (student, student.flip(1), teacher, teacher.flip(1))]
    x, mean, var = torch.randn(3, 5, 2, 2).double(), torch.randn(5).double(), torch.rand(5).double()
    every = torch.arange(10)
    for found, expected in (
        (gain.gram_maps(student, teacher), reference.relation_loss(student, teacher)),
        (gain.manifold_maps(student, teacher), reference.manifold_loss(student, teacher, index=every)),
        (gain.attention_maps(*heads), reference.attention_loss(*heads)),
        (gain.moments_copied(x, mean, var), reference.bn_stat_loss([x], [mean], [var])),
    ):
        assert_matches_oracle(found, expected, expected, 100, "loss")


def test_patch_of_timms_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched script distils with fastkd's task, and its checkpoint has the student's names."""
    pytest.importorskip("timm.task")
    import timm.task.distillation
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, dispatch_clip_grad

    (tmp_path / "train.py").write_text(TRAIN)
    command = ["patch", "--fuzz=0", "train.py", str(EXAMPLES / "timm_train.patch")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def vit(model_name: str, **options: Any) -> nn.Module:
        small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return timm.create_model(model_name, **small, num_classes=10)

    monkeypatch.setattr(timm.task.distillation, "create_model", vit)  # the script's teacher is pretrained
    names: dict[str, Any] = {
        "device": torch.device("cpu"),
        "LogitDistillationTask": timm.task.LogitDistillationTask,
        "ClassificationTask": timm.task.ClassificationTask,
        "create_optimizer_v2": create_optimizer_v2,
        "CheckpointSaver": CheckpointSaver,
        "dispatch_clip_grad": dispatch_clip_grad,
    }
    exec((tmp_path / "train.py").read_text(), names)
    student = vit("vit_tiny_patch16_224")
    args = SimpleNamespace(kd_model_name="vit_tiny_patch16_224", output=tmp_path)
    batch = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 1])
    task, result = names["main"](args, student, [batch, batch], {"smoothing": 0.1})
    assert isinstance(task, importlib.import_module("fastkd.train.tasks").ManifoldTask)
    assert result["manifold_loss"] > 0
    assert result["loss"] == result["task_loss"] + result["manifold_loss"]
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert checkpoint["state_dict"].keys() == checkpoint["state_dict_ema"].keys() == student.state_dict().keys()


class Manifold:
    """ManifoldLoss as formulas, for batches of which it takes every row."""

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        index = torch.arange(students[0].shape[0] * students[0].shape[1])
        losses = [reference.manifold_loss(s, t, index=index) for s, t in zip(students, teachers, strict=True)]
        return torch.stack(losses).mean()


class Gram(nn.Module):
    """DINOv3's Gram loss of single images, as it is written there for remove_neg=False."""

    def __init__(self, apply_norm: bool, remove_neg: bool) -> None:
        super().__init__()
        assert apply_norm and not remove_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool) -> Tensor:
        assert img_level
        s, t = (F.normalize(x, dim=-1) for x in (output_feats, target_feats))
        return F.mse_loss(s @ s.mT, t @ t.mT)


class FeatureHook:
    """DeepInversion's hook: the formula of its paper, on a copy of the activation."""

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        var, mean = x.var(1, unbiased=False), x.mean(1)
        self.r_feature = (module.running_var - var).norm() + (module.running_mean - mean).norm()

    def close(self) -> None:
        self.hook.remove()


Step = Callable[[torch.dtype], tuple[Tensor, Tensor]]


def step_of(loss: Callable[..., Tensor], student: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor]) -> Step:
    """(loss, gradient of all of the student's parameters as one vector) of copies in a given dtype."""

    def step(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s, t = (copy.deepcopy(model).to(dtype).eval() for model in (student, teacher))
        t.requires_grad_(False)
        x = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        value = loss(s, t, x)
        gradients = torch.autograd.grad(value, list(s.parameters()), allow_unused=True)
        return value.detach(), torch.cat([g.flatten() for g in gradients if g is not None])

    return step


def assert_equals_textbook(step: Step, replace: Callable[[], None], reduced: int = 16 * IMAGES) -> None:
    """Compares step as it is with step after replace(), in the same dtype and in float64."""
    fused = step(torch.float32)
    replace()
    eager, oracle = step(torch.float32), step(torch.float64)
    assert oracle[1].norm() > 0
    for name, actual, expected, exact in zip(("loss", "gradient"), fused, eager, oracle, strict=True):
        assert_matches_oracle(actual, expected, exact, reduced, name)


@pytest.mark.parametrize(
    ("name", "model", "replaced"),
    [
        ("pytorch_loop", "vit_tiny_patch16_224", {"ManifoldLoss": Manifold}),
        ("dinov3_gram", "vit_small_patch16_dinov3", {"GramLoss": Gram}),
    ],
)
def test_timm_loss_equals_textbook(name, model, replaced, example, monkeypatch):
    module, digits = example(name), example("digits")
    options = {"dynamic_img_size": True} if name == "dinov3_gram" else {}  # the Gram teacher sees larger images
    student, teacher = (digits.vit(model, **size, **options) for size in (STUDENT, TEACHER))
    step = step_of(
        lambda s, t, x: module.forward(s, t, x["images"])[1],
        student,
        teacher,
        {"images": digits.load()[0].tensors[0][:IMAGES]},
    )
    assert_equals_textbook(step, lambda: [monkeypatch.setattr(module, *item) for item in replaced.items()])


def test_transformers_vit_loss_equals_textbook(example, monkeypatch):
    module, digits = example("transformers_vit"), example("digits")
    images, labels = (x[:IMAGES] for x in digits.load()[0].tensors)

    def loss(s: nn.Module, t: nn.Module, x: dict[str, Tensor]) -> Tensor:
        output, manifold, attention = module.forward(s, t, x)
        return output.loss + manifold + attention

    def replace() -> None:
        monkeypatch.setattr(module, "ManifoldLoss", Manifold)
        monkeypatch.setattr(module, "attention_loss", reference.attention_loss)

    step = step_of(
        loss,
        module.vit(32, layers=2, heads=2),
        module.vit(64, layers=3, heads=4),
        {"pixel_values": images, "labels": labels},
    )
    assert_equals_textbook(step, replace)


@pytest.fixture
def bert(example) -> tuple[ModuleType, nn.Module, nn.Module, dict[str, Tensor]]:
    """(module, student, teacher, a padded batch)."""
    module = example("transformers_bert")
    lines = module.sentences()
    tokenizer = module.word_pieces(lines)
    student, teacher = (module.BertModel(module.config(len(tokenizer), width, layers=2, heads=2)) for width in (32, 64))
    batch = dict(tokenizer(lines[:IMAGES], padding=True, return_tensors="pt"))
    assert not batch["attention_mask"].all()
    return module, student, teacher, batch


def test_transformers_bert_loss_equals_textbook(bert, monkeypatch):
    module, student, teacher, batch = bert
    step = step_of(lambda s, t, x: module.forward(s, t, x)[1], student, teacher, batch)
    assert_equals_textbook(
        step,
        lambda: monkeypatch.setattr(module, "qkv_relation_loss", reference.qkv_relation_loss),
        batch["input_ids"].numel(),
    )


def test_transformers_bert_ignores_padding(bert):
    """Seven more columns of padding change neither loss nor gradient."""
    module, student, teacher, batch = bert
    longer = {key: F.pad(value, (0, 7)) for key, value in batch.items()}
    short, long = (step_of(lambda s, t, x: module.forward(s, t, x)[1], student, teacher, x) for x in (batch, longer))
    for name, actual, eager, oracle in zip(
        ("loss", "gradient"), long(torch.float32), short(torch.float32), short(torch.float64), strict=True
    ):
        assert_matches_oracle(actual, eager, oracle, batch["input_ids"].numel(), name)


def test_transformers_trainer_accumulates_means(example, monkeypatch, tmp_path):
    """Two half batches move the student as one whole batch does."""
    module, digits = example("transformers_vit"), example("digits")
    # The manifold loss relates the images of a batch, so halves of it differ: classification alone is compared.
    monkeypatch.setattr(module, "forward", lambda s, t, x: (s(**x), torch.zeros(()), torch.zeros(())))
    rows = module.rows(torch.utils.data.TensorDataset(*(x[:IMAGES] for x in digits.load()[0].tensors)))
    start, teacher = module.vit(32, layers=2, heads=2), module.vit(32, layers=2, heads=2)
    moved = []
    for dtype, parts in ((torch.float32, 2), (torch.float32, 1), (torch.float64, 1)):
        student = copy.deepcopy(start).to(dtype)
        options = module.TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=IMAGES // parts,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        module.DistillationTrainer(teacher.to(dtype), student, options, train_dataset=rows).train()
        pairs = zip(student.parameters(), start.parameters(), strict=True)
        moved.append(torch.cat([(a - b.to(dtype)).detach().flatten() for a, b in pairs]))
    # A difference of parameters: what rounds is the parameter, not the step.
    assert_matches_oracle(*moved, reduced=16 * IMAGES, name="step")


def test_lightning_loss_equals_textbook(example, monkeypatch):
    module, digits = example("lightning_module"), example("digits")
    step = step_of(
        lambda s, t, x: module.Distillation(s, t).forward_both(x["images"])[1],
        digits.vit(**STUDENT),
        digits.vit(**TEACHER),
        {"images": digits.load()[0].tensors[0][:IMAGES]},
    )
    assert_equals_textbook(step, lambda: monkeypatch.setattr(module, "ManifoldLoss", Manifold))


def test_lightning_checkpoint_is_the_student(example, tmp_path):
    module, digits = example("lightning_module"), example("digits")
    trained = module.Distillation(digits.vit(**STUDENT), digits.vit(**TEACHER))
    before = copy.deepcopy(trained.teacher.state_dict())
    trainer = module.lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(trained, module.DataLoader(digits.load()[0], batch_size=IMAGES))
    assert all(torch.equal(value, before[key]) for key, value in trained.teacher.state_dict().items())
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"student.{key}" for key in trained.student.state_dict()}
    loaded = module.Distillation.load_from_checkpoint(
        tmp_path / "student.ckpt", student=digits.vit(**STUDENT), teacher=digits.vit(**TEACHER)
    )
    assert all(torch.equal(value, saved[f"student.{key}"]) for key, value in loaded.student.state_dict().items())


def test_torchdistill_loss_equals_textbook(example):
    """Built from the file's own entry; prefix tokens carry no gradient."""
    module = example("torchdistill_registry")
    criterion = module.load_yaml_file(str(module.CONFIG))["train"]["criterion"]["kwargs"]["sub_terms"]["manifold"]
    loss = importlib.import_module("torchdistill.losses.registry").get_mid_level_loss(criterion["criterion"])
    students = [torch.randn(IMAGES, 17, 32) for _ in range(2)]
    teachers = [torch.randn(IMAGES, 17, 64) for _ in range(2)]

    def fused(*tokens: Tensor) -> Tensor:
        student, teacher = (
            {path: {"output": x} for path, x in zip(paths, xs, strict=True)}
            for paths, xs in ((("blocks.0", "blocks.1"), tokens), (("blocks.0", "blocks.2"), teachers))
        )
        return loss(student, teacher, torch.zeros(IMAGES))

    def textbook(*tokens: Tensor) -> Tensor:
        return Manifold()([x[:, 1:] for x in tokens], [x[:, 1:].to(tokens[0].dtype) for x in teachers])

    actual = loss_and_gradients(fused, students)
    eager = loss_and_gradients(textbook, students)
    oracle = loss_and_gradients(textbook, [x.double() for x in students])
    for name, *compared in zip(("loss", "dfirst", "dlast"), actual, eager, oracle, strict=True):
        assert_matches_oracle(*compared, reduced=16 * IMAGES, name=name)


def test_deepinversion_distance_equals_textbook(example, monkeypatch):
    module = example("deepinversion_hook")
    network = module.digits.cnn(8)
    network(torch.randn(64, 1, 8, 8))  # statistics other than those a batch norm starts with
    images = torch.randn(IMAGES, 1, 8, 8)

    def step(dtype: torch.dtype) -> tuple[Tensor, ...]:
        model = copy.deepcopy(network).to(dtype).eval()
        hooks = [module.DeepInversionFeatureHook(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(hooks) == 3

        def distance(x: Tensor) -> Tensor:
            model(x)
            return module.statistics(hooks)

        return loss_and_gradients(distance, [images.to(dtype)])

    assert_equals_textbook(
        step, lambda: monkeypatch.setattr(module, "DeepInversionFeatureHook", FeatureHook), images.numel()
    )


def test_plain_loop_owes_its_relations_to_the_loss(example, monkeypatch):
    """The same training without the manifold loss ends farther from the teacher."""
    loop = example("pytorch_loop")
    train, held_out = (torch.utils.data.TensorDataset(*data[: DIGITS // 2]) for data in loop.digits.load())
    monkeypatch.setattr(loop.digits, "load", lambda: (train, held_out))
    monkeypatch.setattr(loop.gain, "report", lambda *arguments: None)
    _, distilled = loop.main(epochs=2)
    _, alone = loop.main(epochs=2, weight=0.0)
    assert distilled < 0.7 * alone
