"""Whole runs of the trainer in processes of their own, as torchrun would start them; killed, resumed, compared."""

import io
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from fastkd.train import checkpoint, job, ranks
from fastkd.train.loop import Trainee
from fastkd.train.settings import Settings

# What the library imports only when it needs it, seconds of each process that starts without.
PRELOADED = [
    "fastkd.train.cli", "fastkd.train.inversion.job", "fastkd.train.job", "sklearn.datasets", "sklearn.model_selection",
    "torch._dynamo", "torch.nn.parallel.distributed", "matplotlib.backends.backend_agg",
]  # fmt: skip


def signal_at(monkeypatch: pytest.MonkeyPatch, number: int, signum: signal.Signals) -> list[int]:
    """Send this process a signal at the start of a step. Return a list that holds the number of steps so far."""
    step, count = Trainee._step, [0]

    def counted(*args: Any) -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signum)
        step(*args)

    monkeypatch.setattr(Trainee, "_step", counted)
    return count


def start(world: int, task: Callable[..., Any], *arguments: Any) -> list[multiprocessing.Process]:
    """Real processes, forked from one that has imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, world, port, task, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def work(rank: int, world: int, port: int, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # else each of its loaders' workers imports all of it anew
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    task(*arguments)
    ranks.leave()


def together(world: int, task: Callable[..., Any], *arguments: Any) -> None:
    """Runs the task in so many processes to their end, which has to be a good one."""
    processes = start(world, task, *arguments)
    for process in processes:
        process.join(500)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def train(settings: Settings, resume: bool) -> None:
    job.train(settings, resume=resume)


def enter(folder: Path) -> None:
    """Work in this folder, or the rank's in it, with files there in the place of stdout and stderr."""
    rank = os.environ.get("RANK", "0")
    os.chdir(folder / rank if (folder / rank).is_dir() else folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(folder / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)


def script(folder: Path, program: str, *arguments: str) -> None:
    """Run a program as `python -c` does, in this folder."""
    enter(folder)
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})


def command(folder: Path, *arguments: str) -> None:
    """Run `fastkd` with these arguments in this folder."""
    enter(folder)
    sys.argv = ["fastkd", *arguments]
    from fastkd.__main__ import main

    main()


class Result(NamedTuple):
    """The exit status of a command, and the text that it wrote."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(*arguments: str) -> Result:
    """Run `fastkd` with these arguments in this process."""
    from fastkd.train import cli

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # of --help and --version
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def finish(settings: Settings, resume: bool = False, world: int = 1) -> None:
    together(world, train, settings, resume)


def places(out: Path) -> str:
    found = checkpoint.latest(out / job.CHECKPOINTS)
    return found.name if found else ""


def run_with_kills(settings: Settings, world: int, kills: int, draw: random.Random) -> list[str]:
    """Kills the run `kills` times at random moments, the start-up included, and lets it finish. Returns where."""
    out, where = Path(settings.out), []
    for _ in range(kills):
        processes = start(world, train, settings, (out / "config.json").exists())
        # Until there is something new, and then a moment more: between two steps, or within the writing of a file.
        before, deadline = places(out), time.monotonic() + 120
        while places(out) == before and any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        where.append(places(out))
        if (out / "summary.json").exists():
            break
    else:
        finish(settings, True, world)
    return where


def same(a: Path, b: Path) -> None:
    names = {path.name for path in a.glob("*.safetensors")}
    assert names == {path.name for path in b.glob("*.safetensors")}
    assert {"student.safetensors", "student_ema.safetensors", "student_alone.safetensors"} <= names
    for name in names:
        one, two = load_file(a / name), load_file(b / name)
        assert one.keys() == two.keys()
        assert all(one[key].numpy().tobytes() == two[key].numpy().tobytes() for key in one), name
    rows = []
    for out in (a, b):
        lines = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
        timed = [i for i, name in enumerate(lines[0]) if "seconds" in name]
        rows.append([[cell for i, cell in enumerate(line) if i not in timed] for line in lines])
    assert rows[0] == rows[1]
