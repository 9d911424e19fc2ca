"""`fastkd invert`: whole runs, killed and resumed ones, what it says to input that cannot work; the data-free demo."""

import dataclasses
import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
pytest.importorskip("jsonargparse")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from experiments import data_free as demo  # noqa: E402
from fastkd.train import checkpoint  # noqa: E402
from fastkd.train.checkpoint import write_weights  # noqa: E402
from fastkd.train.data import Digits  # noqa: E402
from fastkd.train.inversion.presets import Phase  # noqa: E402
from fastkd.train.inversion.store import GRID, MANIFEST, Store, check_folder  # noqa: E402
from tests._support.runs import Result, invoke, start  # noqa: E402

ROOT = Path(__file__).parents[2]
CNN = {"num_classes": 4, "channels": (8, 8, 8, 8), "stem_width": 8}
SMALL = ["--device=cpu", "--img-size=32", "--batch-size=6", "--phases=2/2/2,2/1/4", "--images=15"]
RIVAL = ["--competition=1", "--student=resnet18", "--student-steps=2"]
RIVAL += [f"--student-arg={pair}" for pair in ("channels=(8,8,8,8)", "stem_width=8")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with teachers, and with what cannot be used."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("inversion")
    teacher = timm.create_model("resnet18", **CNN)
    write_weights(root / "teacher.safetensors", teacher, "resnet18", CNN)
    torch.save(teacher.state_dict(), root / "plain.pth")
    with torch.no_grad():
        teacher.layer2[1].conv1.weight.fill_(torch.nan)
    write_weights(root / "nan.safetensors", teacher, "resnet18", CNN)
    args = {"num_classes": 4, "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    write_weights(root / "vit.safetensors", vit, "vit_tiny_patch16_224", args)
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("text")
    (root / "file").write_text("text")
    return root


def invert(*arguments: str) -> Result:
    return invoke("invert", *SMALL, *arguments)


def files(out: Path) -> dict[str, bytes]:
    """All files but a student's: safetensors writes metadata in any order."""
    paths = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("student"))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def assert_same(out: Path, other: Path) -> None:
    assert files(out) == files(other)
    own, theirs = (load_file(folder / "student-00003.safetensors") for folder in (out, other))
    assert all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """The images of a run that nothing stopped, with a student in training."""
    out = place / "whole"
    result = invert("--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(out), *RIVAL)
    assert result.exit_code == 0, result.output
    assert f"15 in 3 batches, {out}/train" in result.output
    return out


def test_what_a_run_leaves(whole):
    assert {path.name for path in whole.iterdir()} == {
        "train",
        "config.yaml",
        GRID,
        MANIFEST,
        "student-00003.safetensors",
    }
    header, store = check_folder(whole), Store.open(whole)
    assert header["teacher"] == "resnet18"
    assert header["preset"]["phases"] == [dataclasses.asdict(p) for p in (Phase(2, 2, 2), Phase(2, 1, 4))]
    assert [entry["label"] for entry in store.entries] == [i % 4 for i in range(15)]
    assert set(store.batches[0]["terms"]) == {"total", "bn", "cross_entropy", "prior", "competition"}
    assert Image.open(whole / GRID).size == (320, 64)
    assert Image.open(whole / store.entries[3]["file"]).size == (32, 32)


def test_rectangles(place):
    """Images of another height than width, with a competing student; a resume continues them."""
    out = place / "wide"
    given = ["--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(out), *RIVAL, "--img-size=32x64"]
    assert invert(*given, "--images=6").exit_code == 0
    first = files(out)
    result = invert(*given, "--images=8", "--resume")
    assert result.exit_code == 0, result.output
    store = Store.open(out)
    assert check_folder(out)["img_size"] == [32, 64] and len(store.entries) == 8
    assert {Image.open(out / entry["file"]).size for entry in store.entries} == {(64, 32)}
    assert Image.open(out / GRID).size == (640, 32)
    images = [name for name in first if name.startswith("train/")]
    assert len(images) == 6 and all((out / name).read_bytes() == first[name] for name in images)
    result = invert(*given[:-1], "--img-size=33x64", "--out", str(place / "odd"))
    assert (result.exit_code, "33x64 px cannot be divided by pool 2" in result.stderr) == (2, True), result.stderr


def test_the_student_trains(whole, place):
    """Its weights move with each batch, and the competition with them."""
    again = place / "untrained"
    steps = [flag for flag in RIVAL if "steps" not in flag]
    teacher = ["--teacher-checkpoint", str(place / "teacher.safetensors")]
    assert invert(*teacher, "--out", str(again), *steps, "--student-steps=0").exit_code == 0
    trained, untrained = (load_file(out / "student-00003.safetensors") for out in (whole, again))
    assert not torch.equal(trained["conv1.weight"], untrained["conv1.weight"])
    first, then = ([batch["terms"]["competition"] for batch in Store.open(out).batches] for out in (whole, again))
    assert first[0] == then[0]
    assert first[1] != then[1]


def test_config_makes_the_same_images_again(whole, place):
    out = place / "again"
    result = invoke("invert", "--config", str(whole / "config.yaml"), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert_same(out, whole)
    result = invoke("invert", "--config", str(whole / "config.yaml"), "--out", str(out), "--resume", "--no-flip")
    assert (result.exit_code, "made with other settings" in result.output) == (2, True), result.output


def test_training_takes_the_folder(whole, place):
    teacher = place / "teacher.safetensors"
    arguments = f"--data {whole} --out {place / 'run'} --device cpu --img-size 32 --batch-size 4 --epochs 1 --workers 0"
    arguments += " --no-augment --no-baseline --val-fraction 0.4 --teacher-layers layer2,layer2"
    arguments += f" --teacher resnet18 --teacher-checkpoint {teacher} --student vit_tiny_patch16_224"
    arguments += "".join(f" --teacher-arg {pair}" for pair in ("channels=(8,8,8,8)", "stem_width=8"))
    arguments += "".join(f" --student-arg {p}" for p in ("patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"))
    arguments += " --student-layers blocks.0,blocks.1"
    result = invoke("train", *arguments.split())
    assert result.exit_code == 0, result.output
    assert json.loads((place / "run/summary.json").read_text())["images"] == {"train": 9, "validation": 6}


def test_kill_and_resume(whole, place):
    """SIGKILL once a batch is finished; then the same files as without, to the byte."""
    out = place / "killed"
    arguments = [*SMALL, "--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(out), *RIVAL]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    # Steps that take long enough to be killed in.
    code = (
        "import sys, time; from fastkd.train.inversion import synthesis as s; plain = s.Inverter._terms\n"
        "def slow(*a): time.sleep(0.3); return plain(*a)\n"
        "s.Inverter._terms = slow; import fastkd.__main__ as m; m.main()"
    )
    with subprocess.Popen([sys.executable, "-c", code, "invert", *arguments], env=environment) as process:
        manifest, deadline = out / MANIFEST, time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if manifest.exists() and manifest.read_text().count("\n") >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = files(out / "train")
    assert 6 <= len(finished) < 15
    threads = torch.get_num_threads()
    try:
        result = invert(*arguments, "--resume")
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert files(out / "train").items() >= finished.items()
    assert len(files(out / "train")) == 15
    assert {k: v for k, v in files(out / "train").items() if "/00000-" in k}.items() <= finished.items()
    if threads == 1:  # sums are cut by threads
        assert_same(out, whole)


def create_and_die(out: Path, moment: str) -> None:
    """SIGKILL within the creation of the folder, before its manifest is there."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "folder":
        checkpoint._locked = die
    else:
        Path.replace = die
    with checkpoint.alone(out):
        Store.create(out, {"classes": []})


@pytest.mark.parametrize("moment", ["folder", "manifest", "class folders"])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_killed_before_the_manifest(place, tmp_path, moment, resume):
    """What is there then counts as nothing, to a start as to a resume."""
    out = tmp_path / "out"
    if moment == "class folders":
        (out / "train" / "0").mkdir(parents=True)
    else:
        (process,) = start(1, create_and_die, out, moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert out.is_dir() and not (out / MANIFEST).exists()
    teacher = ["--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(out)]
    result = invert(*teacher, "--images=6", *resume)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"train", "config.yaml", GRID, MANIFEST}
    assert len(Store.open(out).entries) == 6


def test_more_images_go_on(whole, place):
    out = place / "more"
    teacher = ["--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(out), *RIVAL]
    assert invert(*teacher, "--images=12").exit_code == 0
    assert len(Store.open(out).entries) == 12
    result = invert(*teacher, "--resume")
    assert result.exit_code == 0, result.output
    assert_same(out, whole)
    done = files(out)
    assert invert(*teacher, "--resume").exit_code == 0
    assert files(out) == done


def test_full_disk(place, monkeypatch):
    """The disk fills up within the second batch; with room again the run goes on, as if nothing had been."""
    teacher = ["--teacher-checkpoint", str(place / "teacher.safetensors")]
    assert invert(*teacher, "--out", str(place / "roomy")).exit_code == 0
    out, count, write = place / "tight", [0], Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        count[0] += path.name.startswith(".0")
        if count[0] > 9:
            write(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    result = invert(*teacher, "--out", str(out))
    assert result.exit_code == 1
    words = ["fastkd invert:", str(out), "No space left on device", "1 finished batches stay", "--resume"]
    assert all(word in result.output for word in words), result.output
    assert len(Store.open(out).entries) == 6
    monkeypatch.undo()
    assert invert(*teacher, "--out", str(out), "--resume").exit_code == 0
    assert files(out) == files(place / "roomy")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--teacher-checkpoint", "--teacher-pretrained"]),
        ("--teacher-checkpoint nowhere", ["--teacher"]),
        ("--teacher resnet18 --teacher-checkpoint nowhere", ["--teacher-checkpoint", "nowhere is not a file"]),
        ("--teacher-checkpoint plain.pth", ["--teacher", "does not tell"]),
        ("--teacher resnet18 --teacher-checkpoint plain.pth", ["--teacher-checkpoint", "does not fit resnet18"]),
        ("--teacher resnet1x --teacher-checkpoint plain.pth", ["--teacher", "resnet1x"]),
        ("--teacher-checkpoint vit.safetensors", ["--teacher", "no batch norm", "use one that has"]),
        ("--teacher-checkpoint teacher.safetensors --out full", ["--out", "full", "not empty", "--resume"]),
        ("--teacher-checkpoint teacher.safetensors --out full --resume", ["full", "has no manifest.jsonl"]),
        ("--teacher-checkpoint teacher.safetensors --out file", ["--out", "is a file"]),
        ("--teacher-checkpoint teacher.safetensors --out file/below", ["--out", "cannot be written"]),
        ("--teacher-checkpoint teacher.safetensors --preset imagenet", ["--preset", "imagenet-0"]),
        ("--teacher-checkpoint teacher.safetensors --phases 2/x", ["--phases", "STEPS"]),
        ("--teacher-checkpoint teacher.safetensors --phases 2/3", ["32 px cannot be divided by pool 3"]),
        ("--teacher-checkpoint teacher.safetensors --phases 0", ["--phases", "STEPS", "got '0'"]),
        ("--teacher-checkpoint teacher.safetensors --phases 2/0", ["--phases", "STEPS", "got '2/0'"]),
        ("--teacher-checkpoint teacher.safetensors --phases 2/1/-1", ["--phases", "STEPS"]),
        ("--teacher-checkpoint teacher.safetensors --batch-size 1", ["one element per channel", "2 images"]),
        ("--teacher-checkpoint teacher.safetensors --labels 1,4", ["--labels", "0 to 3", "got 4"]),
        ("--teacher-checkpoint teacher.safetensors --labels one", ["--labels", "numbers"]),
        ("--teacher-checkpoint teacher.safetensors --competition 1", ["--student", "competition"]),
        ("--teacher-checkpoint teacher.safetensors --intra 1 --batch-size 1", ["--intra", "--batch-size"]),
        ("--teacher-checkpoint teacher.safetensors --amp int8", ["--amp", "int8"]),
        ("--teacher-checkpoint teacher.safetensors --device tpu9", ["--device", "tpu9"]),
        ("--teacher-checkpoint teacher.safetensors --device meta", ["--device", "meta"]),
        (
            "--teacher-checkpoint teacher.safetensors --bn 0 --batch-size 1 --competition 1 --student resnet18",
            ["--batch-size", "student", "1 image"],
        ),
        ("--teacher-checkpoint teacher.safetensors --teacher-arg colour", ["--teacher-arg", "KEY=VALUE"]),
    ],
)
def test_bad_input(place, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    before = files(place)
    result = invert(*arguments.split())
    assert result.exit_code == 2, result.output
    assert result.output.startswith("fastkd invert: ")
    assert len(result.output.splitlines()) == 1
    assert all(word in result.output for word in words), result.output
    assert files(place) == before


def test_not_finite(place):
    out = place / "nan"
    result = invert("--teacher-checkpoint", str(place / "nan.safetensors"), "--out", str(out))
    assert result.exit_code == 1
    assert "what enters layer2.1.bn1 is the first that is not" in result.output
    assert len(result.output.splitlines()) == 1
    assert not Store.open(out).entries


def test_resume_with_other_settings(whole, place):
    before = files(whole)
    teacher = ["--teacher-checkpoint", str(place / "teacher.safetensors"), "--out", str(whole), "--resume"]
    result = invert(*teacher, *RIVAL, "--seed=3")
    assert result.exit_code == 2
    assert "made with other settings: seed 0, not 3" in result.output
    assert files(whole) == before
    (whole / "train/1/00000-001.png").rename(place / "aside.png")
    result = invert(*teacher, *RIVAL)
    (place / "aside.png").rename(whole / "train/1/00000-001.png")
    assert result.exit_code == 2
    assert "lists train/1/00000-001.png, which is not there" in result.output
    assert files(whole) == before


def test_demo_runs(tmp_path, monkeypatch):
    """All of it, on one seed and with hardly any steps."""
    short = {
        name: dataclasses.replace(preset, batch_size=20, phases=preset.phases and (Phase(6),))
        for name, preset in demo.RUNGS.items()
    }
    monkeypatch.setattr(demo, "RUNGS", short)
    monkeypatch.setattr(demo, "STUDENT", dataclasses.replace(demo.STUDENT, epochs=1, warmup_epochs=0))
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(demo, "DIGITS", dataclasses.replace(demo.DIGITS, train_fraction=0.2))
    summary = demo.main(tmp_path, seeds=1, images=20, workers=0)
    assert summary == json.loads((tmp_path / "demo-datafree.json").read_text())
    assert [row["images"] for row in summary["results"]] == list(demo.RUNGS)
    assert all(5 < row["mean"] == row["top1"][0] < 60 and row["spread"] == 0 for row in summary["results"])
    grids = [(tmp_path / "seed0" / name.replace(" ", "") / GRID).read_bytes() for name in demo.RUNGS]
    assert len(set(grids)) == 4
    lines = demo.table(summary).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert all(0 <= row["read"][0] < 60 for row in summary["results"])
    assert lines[6].split("|")[-2].strip() == f"{summary['reader']:.0f}"
    assert f"{summary['results'][2]['mean']:.1f} ± 0.0" in lines[4]


def test_adversary():
    """Moves no digit's pixel by more than EPSILON, within black and white, and to where the loss is higher."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", **CNN | {"num_classes": 10})
    seen, losses = [], []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = torch.full((8, 3, 64, 64), 0.5), torch.arange(8)
    task = demo.AdversarialTask(network, verbose=False)
    for _ in range(10):
        result = task((images - mean) / std, labels)
        at_random = F.cross_entropy(network(seen[-2]), labels)
        losses.append(float((result["loss"] - at_random).detach()))
        result["loss"].backward()
    moved = seen[1] * std + mean - images
    cells = F.avg_pool2d(moved, 8)
    assert 0.5 * demo.EPSILON < cells.abs().max() < 1.3 * demo.EPSILON  # a bicubic overshoots
    # One shift for the three channels, up to what normalising each by its own mean and back rounds.
    assert torch.allclose(moved[:, :1].expand_as(moved), moved, atol=1e-6)
    assert statistics.mean(losses) > 0
    dark = demo._moved(torch.zeros(2, 3, 64, 64), torch.full((2, 1, 8, 8), -0.1))
    assert torch.equal(dark, torch.zeros(2, 3, 64, 64))


def test_reader():
    """Reads real digits, and the enlarged ones as well; asked for another digit, it says no."""
    real = Digits(train=False)
    images, labels = real.images[:100], real.targets[:100]
    large = [image.resize((64, 64), Image.Resampling.BICUBIC) for image in images]
    assert demo.read(images, labels) > 90
    assert demo.read(large, labels) > 90
    assert demo.read(large, [(label + 1) % 10 for label in labels]) < 10


def test_demo_spread():
    values = [1.0, 2.0, 3.0]
    assert demo.spread(values) == {"top1": values, "mean": 2.0, "spread": 1.0}


def test_committed_demo_is_above_its_lower_rungs():
    summary = json.loads((ROOT / "benchmarks/results/demo-datafree.json").read_text())
    mean = {row["images"]: row["mean"] for row in summary["results"]}
    assert all(len(row["top1"]) == 3 for row in summary["results"])
    upper = [mean["DeepInversion"], mean["DeepInversion + intra-divergence"]]
    assert min(upper) > max(mean["noise"], mean["cross-entropy"])
    read = {row["images"]: statistics.mean(row["read"]) for row in summary["results"]}
    assert min(read["DeepInversion"], read["DeepInversion + intra-divergence"]) > read["noise"]
