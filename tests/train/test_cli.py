"""The command line: whole runs in a process of their own, and what it says to input that cannot work."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
pytest.importorskip("jsonargparse")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from fastkd._version import __version__  # noqa: E402
from fastkd.train import checkpoint  # noqa: E402
from fastkd.train.inversion.settings import GROUPS as INVERT_GROUPS  # noqa: E402
from fastkd.train.parser import read_file  # noqa: E402
from fastkd.train.recipes import RECIPES, recipe  # noqa: E402
from fastkd.train.settings import (  # noqa: E402
    DIGITS,
    FOLDER,
    GROUPS,
    Settings,
    Stage,
    read_recipe,
    read_settings,
    read_stages,
    settings_from,
    stages,
    write_settings,
)
from tests._support.runs import command, invoke, start, together  # noqa: E402

SMALL = [
    "--device=cpu",
    "--batch-size=64",
    "--img-size=32",
    "--epochs=1",
    "--teacher-epochs=1",
    "--teacher-layers=layer2,layer4",
]
SMALL += [f"--student-arg={pair}" for pair in ("embed_dim=32", "num_heads=2", "depth=2")]
SMALL += ["--teacher-arg=channels=(8,8,8,8)", "--teacher-arg=stem_width=8"]
WAYS_OUT = ["--teacher-checkpoint FILE", "--teacher-pretrained", "--teacher-epochs N"]
FEW = ["--train-fraction=0.3"]  # 269 images


def fastkd(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastkd", *arguments]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(fastkd(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=500)


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }


def test_digits_run(tmp_path):
    done = run("train", *SMALL, *FEW, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "digits"
    for name in ("curve.png", "log.csv", "student.safetensors", "student_alone.safetensors", "teacher.safetensors"):
        assert f"runs/digits/{name}" in done.stdout
    assert "| student distilled |" in done.stdout
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    with (out / "log.csv").open() as file:
        assert [row["network"] for row in csv.DictReader(file)] == ["teacher", "student alone", "student distilled"]
    Image.open(out / "curve.png").verify()
    assert json.loads((out / "summary.json").read_text())["images"] == {"train": 269, "validation": 899}

    # What it prints to load the student does so, with timm alone.
    expression = next(line for line in done.stdout.splitlines() if line.startswith("load it")).partition(" ")[2].strip()
    expression = expression.removeprefix("it").strip()
    code = f"import sys, timm; {expression}; assert not [m for m in sys.modules if m.startswith('fastkd')]"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_ctrl_c_leaves_whole_files_and_a_place_to_go_on_from(tmp_path):
    arguments = ["train", *SMALL, *FEW, "--epochs", "1000", "--out", "run"]
    (process,) = start(1, command, tmp_path, *arguments)
    written, deadline = tmp_path / "run" / "student.safetensors", time.monotonic() + 400
    while not written.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    errors = (tmp_path / "stderr-0.txt").read_text()
    assert errors.splitlines()[-1].startswith("fastkd train: interrupted")
    assert "Traceback" not in errors
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert errors.splitlines()[-1].endswith("fastkd train --resume run")
    weights, state = checkpoint.read(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert set(weights) == {"student.weights", "student_alone.weights"} and state["rows"]

    # It goes on only as it was begun.
    refused = invoke("train", "--resume", str(tmp_path / "run"), "--lr", "1", "--seed", "0")
    assert refused.exit_code == 2
    assert refused.stderr.strip() == (
        "fastkd train: --resume: the run was started with other settings: lr: 1.0 (the run has 0.001)"
    )


def test_pair(tmp_path):
    """Two processes, with what torchrun tells them: one speaks and writes."""
    together(2, command, tmp_path, "train", *SMALL, *FEW, "--no-baseline", "--out=run")
    assert (tmp_path / "stdout-0.txt").read_text().count("| student distilled |") == 1
    spoken = (tmp_path / "stdout-1.txt").read_text().splitlines()
    assert [line for line in spoken if not line.startswith("[Gloo]")] == []  # PyTorch 2.10 speaks there itself
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["machine"].endswith("in each of 2 processes")
    with (tmp_path / "run" / "log.csv").open() as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["2", "2"]  # 269 images, 2 x 64 in a step


@pytest.mark.exhaustive
def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastkd", "train", *SMALL, "--no-baseline", "--out=run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| student distilled |") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["machine"].endswith("in each of 2 processes")
    with (tmp_path / "run" / "log.csv").open() as file:
        assert [row["steps"] for row in csv.DictReader(file)] == ["7", "7"]  # 898 images, 2 x 64 in a step


def test_what_one_process_lacks_ends_both_and_is_told_once(tmp_path):
    for number in range(2):
        folder = tmp_path / "0" / "images" / f"class{number}"
        folder.mkdir(parents=True)
        for name in "abcde":
            Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (tmp_path / "1").mkdir()
    arguments = ["train", "--device=cpu", "--data=images", "--teacher=resnet18", "--teacher-epochs=1", "--out=run"]
    processes = start(2, command, tmp_path, *arguments)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [2, 2]
    told = [(tmp_path / f"stderr-{rank}.txt").read_text() for rank in range(2)]
    assert "fastkd train" not in told[0] and "Traceback" not in told[0] + told[1]
    assert told[1].count("fastkd train: ") == told[1].count("fastkd train: --data: images is not a folder") == 1
    assert not (tmp_path / "0" / "run").exists()


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    for words in ("898 training", "blocks.1 (1, 17, 32)", "layer4 (1, 8, 4, 4)", "M parameters", "MB per process"):
        assert words in result.stdout
    assert not list(tmp_path.iterdir())


def test_recipe_prints_what_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = RECIPES[0]
    result = invoke("train", "--recipe", name, "--batch-size", "7")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(recipe(name).read_text())
    assert result.stdout.endswith("# Options given:\nbatch_size: 7\n")
    shown = re.findall(r"^(\w+):", result.stdout, re.MULTILINE)
    assert {item.name for item in dataclasses.fields(Settings)} - set(shown) == {"data", "recipe", "task", "task_args"}
    settings = settings_from({"recipe": name, "data": "images", "batch_size": 7})
    values = read_file(str(recipe(name)), *GROUPS)
    assert (settings.batch_size, settings.student) == (7, values["student"])
    assert settings.stages == values["stages"]
    assert settings_from({"recipe": name, "task": "soft"}).stages == ()
    assert settings.teacher_pretrained
    # A given checkpoint needs no other weights fetched first.
    assert not settings_from({"recipe": name, "data": "images", "teacher_checkpoint": "t.pth"}).teacher_pretrained


def test_dry_run_of_a_recipe_is_a_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.train.plan.plan", lambda settings: f"planned {settings.recipe} on {settings.data}")
    arguments = ["train", "--recipe", "vitkd-deit-tiny", "--data", str(tmp_path), "--dry-run"]
    assert invoke(*arguments).stdout == f"planned vitkd-deit-tiny on {tmp_path}\n"


def test_stages_on_the_command_line():
    settings = settings_from({"stages": read_stages(["dearkd:250:weight=0.5,lr=1e-3", "none:50"])})
    assert settings.stages == (Stage("dearkd", 250, {"weight": 0.5}, lr=1e-3), Stage("none", 50))
    (stage,) = read_stages("none:1:opt_args={'betas': (0.8, 0.9), 'eps': 1e-6},lr=1e-3")
    assert stage == Stage("none", 1, lr=1e-3, opt_args={"betas": (0.8, 0.9), "eps": 1e-6})
    with pytest.raises(ValueError, match="needs TASK:EPOCHS"):
        read_stages("dearkd")


def test_methods_of_two_stages_run_both(tmp_path, monkeypatch):
    assert [(s.task, s.epochs) for s in stages(Settings(task="cikd", epochs=301))] == [("cikd", 151), ("dkd", 150)]
    assert [(s.task, s.epochs) for s in stages(Settings(task="dearkd", epochs=300))] == [("dearkd", 250), ("none", 50)]
    assert [(s.task, s.epochs) for s in stages(Settings(task="dearkd", epochs=2))] == [("dearkd", 1), ("none", 1)]
    assert [(s.task, s.options) for s in stages(Settings(task="soft", task_args={"a": 1}))] == [("soft", {"a": 1})]
    assert [s.task for s in stages(Settings(stages=(Stage("cikd", 5),)))] == ["cikd"]
    monkeypatch.chdir(tmp_path)
    teacher = ["--teacher=vit_tiny_patch16_224", "--teacher-epochs=1"]
    teacher += [f"--teacher-arg={pair}" for pair in ("patch_size=8", "embed_dim=40", "num_heads=5", "depth=3")]
    result = invoke(
        "train",
        *SMALL[:4],
        "--epochs=4",
        *SMALL[6:9],
        "--student-arg=patch_size=8",
        *teacher,
        "--task=cikd",
        "--dry-run",
    )
    assert result.exit_code == 0, result.output
    assert "stage 1     cikd(), 2 epochs" in result.stdout and "stage 2     dkd(), 2 epochs" in result.stdout


def test_missing_library_is_named(tmp_path):
    code = "import sys; sys.modules['jsonargparse'] = None; sys.argv = ['fastkd', 'train']; "
    code += "import fastkd.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["fastkd: jsonargparse is missing; install it with: pip install 'fastkd[train]'"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """Folders and files that cannot be used."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    for name in ("broken/a", "broken/b", "one/a", "few/a", "few/b"):
        (root / name).mkdir(parents=True)
        for i in range(1 if name.startswith("few") else 4):
            Image.new("RGB", (16, 16)).save(root / name / f"{i}.png")
    whole = (root / "broken/b/3.png").read_bytes()
    (root / "broken/b/3.png").write_bytes(whole[: len(whole) // 2])
    (root / "finished").mkdir()
    (root / "finished/summary.json").write_text("{}")
    (root / "file").write_text("text")
    other = timm.create_model("resnet18", num_classes=10, channels=(8, 8, 8, 8), stem_width=8)
    checkpoint.write_weights(root / "other.safetensors", other, "resnet18", {})
    return root


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data nowhere", ["--data", "nowhere", "not a folder"]),
        ("--data empty --teacher resnet18", ["--data", "empty", "no images"]),
        ("--data one --teacher resnet18", ["--data", "sub-folder per class", "got 1"]),
        (
            "--data broken --teacher resnet18 --teacher-epochs 1 --batch-size 4 --img-size 64",
            ["--data", "broken/b/3.png", "cannot be read"],
        ),
        ("--data few --teacher resnet18", ["--val-fraction"]),
        ("--data broken --no-check", ["--teacher", "timm model"]),
        ("--data broken --no-check --teacher resnet18 --teacher-epochs 1", ["--batch-size", "64", "6 training images"]),
        ("--student vit_tinny_patch16_224", ["--student", "vit_tinny", "vit_tiny_patch16_224"]),
        ("--data few --teacher resnet18 --num-classes 5", ["--num-classes", "few has 2", "got 5"]),
        ("--num-classes 5", ["--num-classes", "digits has 10", "got 5"]),
        ("--teacher resnet1x", ["--teacher", "resnet1x"]),
        ("--teacher-arg num_classes=7", ["--teacher-arg", "num_classes=7", "10 classes"]),
        ("--student-arg colour=blue", ["--student", "colour"]),
        ("--student-arg num_classes=7", ["--student-arg", "num_classes", "10", "7"]),
        ("--student-arg colour", ["--student-arg", "KEY=VALUE"]),
        ("--student-layers blocks.0,blocks.7", ["--student-layers", "blocks.7", "blocks.0, blocks.1"]),
        ("--teacher-layers layer9", ["--teacher-layers", "layer9", "layer2"]),
        ("--teacher-layers layer1,layer2,layer3,layer4", ["--teacher-layers", "token grids", "256"]),
        ("--student-arg patch_size=16", ["--teacher-layers", "token grids", "16"]),
        ("--teacher-checkpoint other.safetensors", ["--teacher-checkpoint", "other.safetensors", "resnet18"]),
        ("--teacher-checkpoint file", ["--teacher-checkpoint", "file"]),
        ("--teacher-checkpoint nowhere", ["--teacher-checkpoint", "nowhere"]),
        ("--teacher-epochs 0", ["--teacher: resnet18 is untrained", *WAYS_OUT]),
        ("--data broken --no-check --teacher resnet18", ["--teacher: resnet18 is untrained", *WAYS_OUT]),
        ("--batch-size 1000", ["--batch-size", "1000", "898"]),
        ("--out finished", ["--out", "finished", "--overwrite"]),
        ("--out file", ["--out", "file"]),
        ("--out . --teacher-checkpoint other.safetensors", ["--out", "--teacher-checkpoint"]),
        ("--out file/below", ["--out", "file/below"]),
        ("--device tpu9", ["--device", "tpu9"]),
        ("--device meta", ["--device", "meta"]),
        ("--amp int8", ["--amp", "int8"]),
        ("--opt none_such", ["--opt", "none_such"]),
        ("--sched none_such", ["--sched", "none_such"]),
        ("--mixup 0.5 --batch-size 31", ["--mixup", "even", "31"]),
        ("--task none_such", ["--task", "none_such", "manifold"]),
        ("--task logits", ["--task", "'logits'; did you mean soft, hard, dkd or nkd?"]),
        ("--task manifld+dkd", ["--task", "'manifld'; near it: manifold"]),
        ("--task soft+dkd", ["--task: at most one of none, soft, hard, dkd, nkd beside other methods, got soft+dkd"]),
        ("--task manifold=much+dkd", ["--task: needs a number as the weight of manifold, got 'much'"]),
        ("--task cikd --epochs 1", ["--epochs: cikd has two stages", "--stage cikd:1"]),
        ("--task-arg colour=blue", ["--task", "colour", "num_samples"]),
        ("--task-arg intra=-1", ["--task", "manifold", "intra", ">= 0", "-1"]),
        ("--task soft --task-arg logit_weight=much", ["--task", "soft", "much"]),
        ("--stage none", ["--stage", "TASK:EPOCHS"]),
        ("--stage none:0", ["--stage", "epoch"]),
        ("--stage cikd:1:lr=abc", ["--stage: cikd needs a number as lr, got 'abc'"]),
        ("--stage none:1:weight_decay=(1,2)", ["--stage: none needs a number as weight_decay, got (1, 2)"]),
        ("--stage none:1:warmup_epochs=0.5", ["--stage: none needs a whole number as warmup_epochs, got 0.5"]),
        ("--stage none:1:opt=3", ["--stage: none needs a name as opt, got 3"]),
        ("--stage none:1:opt_args=3", ["--stage: none needs a mapping as opt_args, got 3"]),
        ("--recipe none_such", ["--recipe", "none_such"]),
        ("--resume nowhere", ["--resume", "nowhere", "no run"]),
        ("--resume finished", ["--resume", "finished"]),
        ("--shard", ["--shard", "torchrun"]),
        ("--teacher-cache c --task manifold", ["--teacher-cache", "--no-augment"]),
        ("--task soft --no-augment --teacher-cache file/c", ["--teacher-cache", "file/c", "that can be written"]),
        ("--augment-arg colour=blue", ["--augment-arg", "colour"]),
        ("--opt-arg colour=blue", ["--opt", "colour"]),
        ("--data wds/none --teacher resnet18 --data-root .", ["--data", "wds/none"]),
    ],
)
def test_bad_input(bad, monkeypatch, arguments, words):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    result = invoke("train", "--device", "cpu", *arguments.split())
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("fastkd train: ")
    for word in words:
        assert word in lines[0]
    assert sorted(bad.rglob("*")) == before


def test_finished_run_is_replaced_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    threads = torch.get_num_threads()
    result = invoke("train", *SMALL, *FEW, "--no-baseline", "--out", "run", "--overwrite")
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    assert not (tmp_path / "run" / "student_alone.safetensors").exists()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_config_starts_the_same_run_again(tmp_path, monkeypatch):
    """From a folder of its own, with the run's config.yaml alone, to the same bits."""
    monkeypatch.chdir(tmp_path)
    stages = ["--stage=manifold:1:weight=0.5,lr=2e-3", "--stage=none:1:opt_args={'betas': (0.8, 0.9)}"]
    done = invoke("train", *SMALL, *FEW, "--no-baseline", *stages, "--ema=0.9", "--out=a")
    assert done.exit_code == 0, done.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = invoke("train", "--config", str(tmp_path / "a" / "config.yaml"), "--out=b")
    assert again.exit_code == 0, again.output
    a, b = tmp_path / "a", tmp_path / "elsewhere" / "b"
    assert (a / "config.yaml").read_text() == (b / "config.yaml").read_text()
    for name in ("teacher", "student", "student_ema"):
        one, two = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_config_holds_every_option(tmp_path):
    """What a run writes is read as the same settings; every option is a line of it."""
    changed = {
        "layer_decay": 0.5,
        "warmup_lr": 1e-7,
        "train_fraction": 0.1 + 0.2,
        "data": "a folder: #1",
        "student_args": {"a": "1e3", "b": "1.5e-3"},
    }
    stages = (
        Stage("dkd", 2, {"logit_options": {"alpha": 1e-5}}, augment_args={"scale": (0.08, 1.0)}),
        Stage("none", 1),
    )
    for settings in (
        DIGITS,
        dataclasses.replace(FOLDER, stages=stages, **changed),
        settings_from({"recipe": RECIPES[3]}),
    ):
        path = tmp_path / "config.yaml"
        write_settings(path, settings)
        read = read_file(str(path), *GROUPS)
        own = {name: value for name, value in vars(settings).items() if name not in ("out", "overwrite")}
        assert read == own
        assert read_settings(path) == settings
        assert {name: type(value) for name, value in read.items()} == {name: type(value) for name, value in own.items()}
        for base in (DIGITS, FOLDER):  # nothing of what it is applied to is left
            assert settings_from({}, base, read) == settings


def test_recipes_are_configs():
    for name in RECIPES:
        read = read_file(str(recipe(name)), *GROUPS)
        assert read.keys() == read_recipe(name).keys()
        assert repr({key: read[key] for key in read_recipe(name)}) == repr(read_recipe(name))


def test_command_line_overrides_the_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: images\nlr: 1e-3\nopt_args: {eps: 1e-7, betas: [0.8, 0.9]}\nstages: [{task: soft, epochs: 3}]\n"
    )
    config = read_file(str(path), *GROUPS)
    settings = settings_from({"lr": 0.1, "opt_args": {"eps": 1e-6}}, config=config)
    assert (settings.lr, settings.opt_args, settings.batch_size) == (0.1, {"eps": 1e-6, "betas": (0.8, 0.9)}, 64)
    assert settings.stages == (Stage("soft", 3),)
    assert settings_from({"task": "dkd"}, config=config).stages == ()
    assert settings_from({"task": "soft"}, config={"task": "dkd", "task_args": {"weight": 2}}).task_args == {}
    assert settings_from({"task": "dkd"}, config={"task": "dkd", "task_args": {"weight": 2}}).task_args == {"weight": 2}
    recipe_and_file = settings_from({"recipe": "cikd-vit-tiny"}, config={"opt_args": {}})
    assert recipe_and_file.opt_args == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ler: 1", ["ler: there is no such option", "near it: lr"]),
        ("bach_size: 4", ["bach_size", "batch_size"]),
        ("lr: fast", ["--lr: needs a number at least 0, got fast"]),
        ("lr: null", ["--lr: needs a number at least 0, got null"]),
        ("batch_size: 1.5", ["--batch-size: needs a whole number at least 1, got 1.5"]),
        ("device: 3", ["--device: needs a text, got 3"]),
        ("augment: maybe", ["--augment: needs true or false, got 'maybe'"]),
        ("teacher_args: 3", ["--teacher-arg: needs KEY=VALUE, got 3"]),
        ("teacher_layers: 3", ["--teacher-layers: needs names, got 3"]),
        ("stages: [{task: none}]", ["--stage: needs a task and epochs"]),
        ("stages: [{task: none, epochs: 1, ler: 3}]", ["--stage: ler is no key of a stage", "near it: lr"]),
        ("stages: [{task: none, epochs: x}]", ["--stage: needs a whole number of epochs, got 'x'"]),
        ("stages: [{task: none, epochs: 1, lr: x}]", ["--stage: none needs a number as lr, got 'x'"]),
        ("resume: runs/a", ["resume: there is no such option"]),
        ("lr: [", ["mine.yaml"]),
        ("- lr", ["mine.yaml"]),
        ("", ["mine.yaml"]),
        (None, ["mine.yaml: is not a file"]),
    ],
)
def test_bad_config(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    result = invoke("train", "--config", "mine.yaml", "--device", "cpu")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert result.stderr.startswith("fastkd train: --")
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "trian",
            "fastkd: there is no command 'trian'; the commands are 'train', 'eval', 'look', 'export', 'invert', 'info'",
        ),
        ("train --ler 1", "fastkd train: --ler: there is no such option; near it: --lr"),
        ("train --bach-size 1", "fastkd train: --bach-size: there is no such option; near it: --batch-size"),
        ("train --checkpoint 1", "fastkd train: --checkpoint: there is no such option; near it: --checkpoint-every"),
        ("train --lr", "fastkd train: --lr: expected one argument"),
        ("train --lr x", "fastkd train: --lr: needs a number at least 0, got x"),
        ("train --erase 2", "fastkd train: --erase: needs a number at least 0 and at most 1, got 2"),
        ("train --epochs 0", "fastkd train: --epochs: needs a whole number at least 1, got 0"),
        ("train --recipe vitkd-diet-tiny", "fastkd train: --recipe: needs one of manifold-deit-tiny"),
        ("invert --preset imagenet0", "fastkd invert: --preset: imagenet0 is not one of imagenet-0"),
        ("invert --jitter 3", "fastkd invert: --jitter: there is no such option; near it: --intra"),
        ("invert --schedule linear", "fastkd invert: --schedule: needs one of cosine, constant, got linear"),
    ],
)
def test_mistyped_command(arguments, message):
    result = invoke(*arguments.split())
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert result.stderr.startswith(message), result.stderr


@pytest.mark.parametrize("command", ["train", "invert"])
def test_help_has_every_option_in_a_group(command):
    groups = {"train": GROUPS, "invert": INVERT_GROUPS}[command]
    result = invoke(command, "--help")
    assert result.exit_code == 0
    sections = dict(re.findall(r"^(\w+):\n((?:  .*\n?)+)", result.stdout, re.MULTILINE))
    assert list(sections) == ["options", *(group.__name__.lower() for group in groups)]
    for group in groups:
        text = sections[group.__name__.lower()]
        for item in dataclasses.fields(group):
            flag = (item.metadata["flag"] or item.name).replace("_", "-")
            assert re.search(rf"^  --{flag}[ ,]", text, re.MULTILINE), flag
            assert item.metadata["text"] in " ".join(text.split())
            repeated = item.metadata["flag"] is not None
            assert command == "invert" or repeated or re.search(rf"^  --{flag}[ ,][^[]*\[", text, re.MULTILINE), flag


def test_version_and_completion():
    assert invoke("--version").stdout == f"fastkd {__version__}\n"
    script = invoke("--print_completion=shtab-bash").stdout
    assert all(flag in script for flag in ("--student-layers", "--boundary-margin", "invert"))
