"""Many processes: every method under DistributedDataParallel and FSDP2, and the page's SLURM script."""

import csv
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
pytest.importorskip("jsonargparse")

from torch.distributed.run import get_args_parser  # noqa: E402

from fastkd.train.cli import parser  # noqa: E402
from fastkd.train.settings import Settings  # noqa: E402
from fastkd.train.tasks import TASKS  # noqa: E402
from tests._support.runs import finish  # noqa: E402

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
        student_args=SMALL, teacher=VIT, teacher_args=SMALL | {"embed_dim": 24, "depth": 4}, task=task, epochs=1,
        teacher_epochs=1, warmup_epochs=0, baseline=False, shard=shard, val_fraction=0.375,
    )  # fmt: skip
    finish(settings, world=2)
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["3", "3"]
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
