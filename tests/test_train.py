"""The trainer's parts: task, clock, layers, data, loop; and short whole runs on real digits."""

import csv
import json
import time
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from fastkd.train import DivergedError, InputError, job, models, report  # noqa: E402
from fastkd.train.clock import LossClock  # noqa: E402
from fastkd.train.data import Digits, create_loaders, open_data  # noqa: E402
from fastkd.train.loop import evaluate  # noqa: E402
from fastkd.train.settings import Settings  # noqa: E402
from fastkd.train.tasks import ManifoldTask  # noqa: E402

VIT = "vit_tiny_patch16_224"
CNN_ARGS = {"output_stride": 8, "channels": (8, 8, 8, 8), "stem_width": 8}


def vit_args(embed_dim: int, depth: int = 2, patch_size: int = 8) -> dict:
    return {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": 2}


def vit(embed_dim: int, depth: int = 2, **kwargs) -> torch.nn.Module:
    return timm.create_model(VIT, num_classes=3, img_size=32, **vit_args(embed_dim, depth), **kwargs)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three digits as 32 px PNGs, 16 of each, in a folder per class."""
    root = tmp_path_factory.mktemp("images")
    digits, counts = Digits(train=True), [0, 0, 0]
    for image, target in digits:
        if target < 3 and counts[target] < 16:
            path = root / f"class{target}" / f"{counts[target]}.png"
            path.parent.mkdir(exist_ok=True)
            image.resize((32, 32)).save(path)
            counts[target] += 1
    return root


def small(folder: Path, out: Path, **changes) -> Settings:
    """Two ViTs of different widths, one epoch each."""
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": vit_args(16), "teacher": VIT, "teacher_args": vit_args(24, 3),
        "epochs": 1, "teacher_epochs": 1, "warmup_epochs": 0,
    }  # fmt: skip
    return Settings(**(settings | changes))


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_task_in_a_bare_loop():
    student, teacher = vit(16), vit(24)
    task = ManifoldTask(student, teacher, student_layers=[0, 1], teacher_layers=[0, 1], verbose=False)
    task.train()
    assert student.training
    assert not any(module.training for module in teacher.modules())

    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    losses = []
    for _ in range(3):
        result = task(images, targets)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]
    assert result["output"].shape == (4, 3)
    torch.testing.assert_close(result["loss"].detach(), result["task_loss"] + result["manifold_loss"])
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_task_loss_is_the_papers_formula():
    student, teacher = vit(16), vit(24)
    task = ManifoldTask(student, teacher, student_layers=[-1], teacher_layers=["blocks.1"], verbose=False)
    result = task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    expected = 4 * result["intra"] + 0.1 * result["inter"] + 0.2 * result["random"]
    torch.testing.assert_close(result["manifold_loss"], expected)


def test_teacher_sees_its_own_normalisation():
    student, teacher = vit(16), vit(24)
    student.pretrained_cfg = student.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    teacher.pretrained_cfg = teacher.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1)}
    task = ManifoldTask(student, teacher, student_layers=[0], teacher_layers=[0], verbose=False)
    seen = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw = torch.rand(2, 3, 32, 32)

    def normalised(cfg: dict) -> torch.Tensor:
        return (raw - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)

    task(normalised(student.pretrained_cfg), torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0], normalised(teacher.pretrained_cfg))


def test_task_refuses_unpaired_layers():
    with pytest.raises(ValueError, match="one to one, got 2 and 1"):
        ManifoldTask(vit(16), vit(24), student_layers=[0, 1], teacher_layers=[0])


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None, None


def test_clock_counts_the_loss_and_nothing_else():
    clock = LossClock()
    tokens = [Sleep.apply(torch.randn(2, 4, 3, requires_grad=True), 0.2, 0.2) for _ in range(2)]  # the network
    task_loss = Sleep.apply(sum(x.sum() for x in tokens), 0.2, 0.2)
    views = clock.start(tokens)
    loss = sum(Sleep.apply(x, 0.02, 0.03).square().mean() for x in views)
    clock.stop(loss)
    (task_loss + loss).backward()
    assert 0.1 <= clock.total() < 0.19
    assert clock.total() == 0


def test_default_layers_are_the_first_and_last_four():
    student, teacher = vit(16, 12), timm.create_model("cait_xxs24_224", img_size=32, patch_size=8)
    own, theirs = models.match_layers(student, teacher, None, None, 32)
    assert own == [f"blocks.{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert theirs == [f"blocks.{i}" for i in (0, 1, 2, 3, 20, 21, 22, 23)]


def test_default_layers_of_a_cnn_share_the_students_grid():
    teacher = timm.create_model("resnet18", num_classes=3, **CNN_ARGS)
    teacher.train()
    own, theirs = models.match_layers(vit(16, 4), teacher, None, None, 32)
    assert theirs == ["layer2", "layer3", "layer4"]
    assert own == ["blocks.0", "blocks.2", "blocks.3"]
    assert teacher.training


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((None, ("blocks.9",)), "--teacher-layers: .*blocks.0, blocks.1"),
        ((("nothing",), None), "--student-layers: .*'nothing'.*blocks.0, blocks.1"),
        ((("blocks.0",), ("blocks.0", "blocks.1")), "must pair up, got 1 and 2"),
        ((("blocks.0",), ("patch_embed.proj", "blocks.1")), "must pair up"),
    ],
)
def test_wrong_layers(layers, words):
    with pytest.raises(InputError, match=words):
        models.match_layers(vit(16), vit(24), *layers, 32)


def test_token_grids_that_differ():
    other = timm.create_model(VIT, img_size=32, **vit_args(16, patch_size=4))
    with pytest.raises(InputError, match=r"student has blocks.0 \(16 tokens\).*teacher blocks.0 \(64 tokens\)"):
        models.match_layers(vit(16), other, None, None, 32)
    with pytest.raises(InputError, match=r"student layer blocks.1 has 16 tokens, teacher layer blocks.0 has 64"):
        models.match_layers(vit(16), other, ("blocks.1",), ("blocks.0",), 32)
    with pytest.raises(InputError, match="--img-size: the student refuses 40 px"):
        models.match_layers(vit(16), other, None, None, 40)


def test_weights_load_in_plain_timm(tmp_path):
    model, args = models.create_model("student", VIT, vit_args(16), num_classes=3, img_size=32)
    report.write_weights(tmp_path / "student.safetensors", model, VIT, args)
    loaded = timm.create_model(VIT, checkpoint_path=str(tmp_path / "student.safetensors"), **args)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), loaded.eval()(images))


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), report.replacing(path) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digits_are_real_and_apart():
    data = open_data("digits", 0.2)
    assert (len(data.train), len(data.val)) == (898, 899)
    model = timm.create_model("resnet18", num_classes=10, **CNN_ARGS)
    options = {"batch_size": 32, "augment": False, "workers": 0, "device": torch.device("cpu")}
    train, val = create_loaders(data, model, img_size=64, **options)
    images, targets = next(iter(val))
    assert images.shape == (32, 3, 64, 64)
    assert targets[0] == data.val.targets[0]
    assert len(train) == 898 // 32


def test_folder_is_split_by_class_and_always_alike(folder):
    data, again = open_data(str(folder), 0.25), open_data(str(folder), 0.25)
    assert data.classes == ["class0", "class1", "class2"]
    own, held_out = data.train.reader.samples, data.val.reader.samples
    assert [target for _, target in held_out].count(0) == 4
    assert not {path for path, _ in own} & {path for path, _ in held_out}
    assert held_out == again.val.reader.samples


def test_folder_with_its_own_validation_images(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder)
    (tmp_path / "val").symlink_to(folder)
    data = open_data(str(tmp_path), 0.25)
    assert len(data.train) == len(data.val) == 48
    (tmp_path / "val").unlink()
    (tmp_path / "val" / "class1").mkdir(parents=True)
    (tmp_path / "val" / "class1" / "0.png").symlink_to(folder / "class1" / "0.png")
    with pytest.raises(InputError, match=r"same classes, one lacks \['class0', 'class2'\]"):
        open_data(str(tmp_path), 0.25)


def test_run_on_a_folder(folder, tmp_path):
    out = tmp_path / "run"
    summary = job.train(small(folder, out, epochs=2, amp="bf16", mixup=0.2, clip_grad=1.0, workers=1))
    assert {path.name for path in out.iterdir()} == set(job.FILES)
    assert json.loads((out / "summary.json").read_text())["results"] == summary["results"]
    assert [row["network"] for row in summary["results"]] == ["teacher", "student alone", "student distilled"]
    assert 0 < summary["results"][2]["loss_share"] < 1
    assert [row["network"] for row in read_log(out)] == ["teacher"] + 2 * ["student alone", "student distilled"]
    assert Image.open(out / "curve.png").size == (1500, 630)


def test_same_seed_same_run(folder, tmp_path):
    for name, seed, baseline in (("a", 0, True), ("b", 0, False), ("c", 1, True)):
        job.train(small(folder, tmp_path / name, epochs=2, seed=seed, baseline=baseline))
    logs = {}
    for name in "abc":
        rows = [row for row in read_log(tmp_path / name) if row["network"] != "student alone"]
        logs[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    assert logs["a"] == logs["b"]
    assert logs["a"] != logs["c"]
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_students_start_alike_and_checkpoints_go_on(folder, tmp_path):
    job.train(small(folder, tmp_path / "a"))
    settings = small(
        folder, tmp_path / "b", teacher_epochs=0, teacher_checkpoint=str(tmp_path / "a" / "teacher.safetensors")
    )
    job.train(settings)
    first, second = (read_log(tmp_path / name) for name in "ab")
    assert [row["loss"] for row in first[1:]] == [row["loss"] for row in second]
    assert not (tmp_path / "b" / "teacher.safetensors").exists()

    # The table's accuracy is that of the weights on disk.
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    args = summary["config"]["student_args"]
    student = timm.create_model(VIT, checkpoint_path=str(tmp_path / "b" / "student.safetensors"), **args)
    data = open_data(str(folder), settings.val_fraction)
    options = {"img_size": 32, "batch_size": 8, "augment": True, "workers": 0, "device": torch.device("cpu")}
    _, loader = create_loaders(data, student, **options)
    assert evaluate(student, loader, torch.no_grad()) == pytest.approx(summary["results"][2]["top1"])


def test_diverged_loss_is_named(folder, tmp_path):
    with pytest.raises(DivergedError, match=r"student alone is not finite by epoch \d, step \d+: loss nan"):
        job.train(small(folder, tmp_path / "run", lr=1e30, epochs=3))
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_run_on_a_gpu(folder, tmp_path, amp):
    summary = job.train(small(folder, tmp_path, device="cuda", amp=amp, epochs=2))
    assert 0 < summary["results"][2]["loss_share"] < 1
    assert summary["machine"].startswith(torch.cuda.get_device_name())
