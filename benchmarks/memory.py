"""Measure the peak extra memory of a step: by the CUDA allocator on a GPU, by a fresh process's peak RSS on a CPU."""

import ctypes
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.case import Case, Provider, Step

PROC = Path("/proc/self")
SECONDS = 120


def peak(case: Case, provider: Provider, step: Step) -> int | None:
    """Return the peak bytes above those held before the step; None without Linux's /proc or if the process failed."""
    if case.device == "cuda":
        return _on_gpu(step)
    if not (PROC / "clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "benchmarks.cases"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, case, provider), daemon=True)
    process.start()
    theirs.close()
    try:
        return int(ours.recv()) if ours.poll(SECONDS) else None
    except EOFError:
        return None
    finally:
        process.join(10)
        process.kill()


def _on_gpu(step: Step) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(key: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _child(pipe: Connection, case: Case, provider: Provider) -> None:
    torch.ones(256, 256) @ torch.ones(256, 256)  # threads and the library's own buffers
    step = Step.of(provider, case.inputs(case.device, case.dtype), case.backward)
    if provider.compiled:
        step()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # otherwise the step would reuse memory freed by the compilation, which is not counted
    (PROC / "clear_refs").write_text("5")  # VmHWM := VmRSS
    before, code = _resident("VmRSS"), _resident("RssFile")
    step()
    pipe.send(_resident("VmHWM") - before - (_resident("RssFile") - code))  # pages of libraries first used here
