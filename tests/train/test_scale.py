"""Many processes: every method under DistributedDataParallel and FSDP2, and the page's SLURM script."""

import csv
import json
import os
import re
import shutil
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

from safetensors.torch import load_file  # noqa: E402
from torch.distributed.run import get_args_parser  # noqa: E402

from fastkd.train import InputError, job  # noqa: E402
from fastkd.train.cli import parser  # noqa: E402
from fastkd.train.settings import SECOND_STAGES, Settings, Stage, write_settings  # noqa: E402
from fastkd.train.tasks import TASKS  # noqa: E402
from tests._support.runs import command, finish, places, start, train  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
SCRIPT = re.compile(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", re.DOTALL)
STANDINS = {
    "srun": 'exec "$@"',
    "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >> requeued',
    "torchrun": 'printf "%s\\n" "$@" > given; exit ${STATUS:-0}',
}


CASES = [(task, shard) for task in TASKS for shard in (False, True)]


@pytest.mark.parametrize(
    ("task", "shard"),
    [case if case == ("gram", False) else pytest.param(*case, marks=pytest.mark.exhaustive) for case in CASES],
)
def test_every_method_on_two_processes(folder, tmp_path, task, shard):
    """30 training images are 3 whole batches of 2 x 5, and 18 to validate 2 of 5 and 4 on each process."""
    settings = Settings(
        data=str(folder), out=str(tmp_path / "run"), img_size=32, batch_size=5, workers=0, device="cpu", student=VIT,
        student_args=SMALL, teacher=VIT, teacher_args=SMALL | {"embed_dim": 24, "depth": 4}, task=task,
        epochs=1 + (task in SECOND_STAGES),
        teacher_epochs=1, warmup_epochs=0, baseline=False, shard=shard, val_fraction=0.375,
    )  # fmt: skip
    finish(settings, world=2)
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["3"] * (2 + (task in SECOND_STAGES))
    correct = float(rows[-1]["top1"]) * 18 / 100
    assert correct == pytest.approx(round(correct))


def test_slurm_script(tmp_path):
    """Its options are torchrun's and fastkd's; a stopped job continues, and is put back into the queue."""
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    (text,) = SCRIPT.findall(page)
    (tmp_path / "job.sh").write_text(text)
    (tmp_path / "bin").mkdir()
    for name, body in STANDINS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    known = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41"}
    known["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(**more: str) -> tuple[int, list[str]]:
        bash = shutil.which("bash")
        done = subprocess.run([bash, "job.sh"], cwd=tmp_path, env=os.environ | known | more, check=False)
        return done.returncode, (tmp_path / "given").read_text().splitlines()

    status, given = run()
    assert status == 0
    options = get_args_parser().parse_args(given)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "node7:29500")
    assert options.module and options.training_script == "fastkd" and options.rdzv_id == "41"
    found = parser("train").parse_args(options.training_script_args, defaults=False)
    assert found.train.config == "distil.yaml" and found.train.out == "runs/distil"

    (tmp_path / "runs/distil/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/distil/config.json").write_text("{}")
    status, given = run(STATUS="143")
    assert status == 143 and given[-3:] == ["train", "--resume", "runs/distil"]
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"


def endless(folder: Path, out: Path, **changes: object) -> Settings:
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 4, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": SMALL, "teacher": VIT, "teacher_args": SMALL, "task": "manifold", "lr": 1e-3,
        "epochs": 1000, "teacher_epochs": 1, "warmup_epochs": 0, "checkpoint_every": 1, "augment": False,
        "check": False, "baseline": False,
    }  # fmt: skip
    return Settings(**(settings | changes))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_others_end_when_a_process_is_killed(folder, tmp_path, shard):
    """They say why and how to go on, in one line, and leave a checkpoint that a resume takes."""
    write_settings(tmp_path / "run.yaml", endless(folder, tmp_path / "run", shard=shard))
    processes = start(2, command, tmp_path, "train", "--config=run.yaml", "--out=run")
    deadline = time.monotonic() + 200
    while not places(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].kill()
    began = time.monotonic()
    processes[0].join(60)
    assert processes[0].exitcode == 1, f"after {time.monotonic() - began:.0f} s: {processes[0].exitcode}"
    text = (tmp_path / "stderr-0.txt").read_text()
    assert re.search(r"^fastkd train: another process of this run has ended.* --resume run$", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert not list((tmp_path / "run").glob(".*.partial")) and places(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((1, 2, 3, 2), marks=pytest.mark.exhaustive)])
def test_resume_on_another_number_of_processes(folder, tmp_path, worlds):
    """Each step has the images of the run that was begun; drawn noise is off, so only the order of sums differs."""
    images = 12

    def settings(name: str, world: int) -> Settings:
        stages = (Stage("manifold", 1), Stage("vitkd", 1, {"logits": "soft"}, batch_size=images // world))
        # AdamW divides gradients by their size, so near zero it would take rounding for a direction.
        optimiser = {"opt": "sgd", "lr": 0.05}
        return endless(folder, tmp_path / name, batch_size=images // world, stages=stages, **optimiser)

    finish(settings("whole", 1))
    first, *others = worlds
    for world, resume in zip(worlds[:-1], [False, *[True] * len(others)], strict=False):
        before, processes = places(tmp_path / "run"), start(world, train, settings("run", first), resume)
        while places(tmp_path / "run") == before and any(process.is_alive() for process in processes):
            time.sleep(0.002)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        assert places(tmp_path / "run") > before, "no checkpoint was written"
    finish(settings("run", first), True, worlds[-1])
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run")]
    assert summaries[1]["config"]["processes"] == worlds[-1]
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "run")]
    assert [row["steps"] for row in logs[0]] == [row["steps"] for row in logs[1]]
    whole, run = (load_file(tmp_path / name / "student.safetensors") for name in ("whole", "run"))
    for key in whole:  # whole runs in float32, as in test_resume.py
        torch.testing.assert_close(whole[key], run[key], rtol=1e-3, atol=2e-4)


def test_resume_refuses_what_processes_cannot_share(tmp_path):
    (tmp_path / "config.json").write_text('{"processes": 2}')
    settings = Settings(data="x", out=str(tmp_path), batch_size=5, stages=(Stage("none", 1, batch_size=3),))
    scaled = job.same_batches(settings, 1)
    assert (scaled.batch_size, scaled.stages[0].batch_size) == (10, 6)
    assert job.same_batches(settings, 2) == settings
    with pytest.raises(InputError, match="--resume: a step of the run has 6 images, which 5 processes cannot share"):
        job.same_batches(settings, 5)


@pytest.mark.exhaustive
def test_torchrun_ends_when_a_process_is_killed(folder, tmp_path):
    """torchrun itself: it starts the processes, and ends within a minute; a second torchrun goes on and is stopped."""
    write_settings(tmp_path / "run.yaml", endless(folder, tmp_path / "run"))
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "fastkd",
        "train",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(job.__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def launch(*given: str) -> tuple[subprocess.Popen[str], list[int]]:
        before = places(tmp_path / "run")
        running = subprocess.Popen([*line, *given], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while places(tmp_path / "run") == before and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True)
        return running, sorted(map(int, listed.stdout.split()))

    running, children = launch("--config=run.yaml", "--out=run")
    os.kill(children[-1], signal.SIGKILL)
    errors = running.communicate(timeout=60)[1]
    assert running.returncode != 0 and "another process of this run has ended" in errors, errors
    reached = places(tmp_path / "run")
    running, children = launch("--resume=run")
    running.terminate()
    errors = running.communicate(timeout=60)[1]
    assert "interrupted; go on with: fastkd train --resume run" in errors, errors
    assert places(tmp_path / "run") > reached
