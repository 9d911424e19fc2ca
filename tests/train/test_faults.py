"""A run on its worst day: kills, full disks, broken images, dead workers, clocks, damaged checkpoints, long runs."""

import dataclasses
import gc
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from fastkd.train import DataError, InputError, RunError, checkpoint, job  # noqa: E402
from fastkd.train.data import Images, find_unreadable, open_data  # noqa: E402
from fastkd.train.settings import Settings, write_settings  # noqa: E402
from tests._support.runs import command, finish, invoke, places, run_with_kills, same, start, train  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}


def small(folder: Path, out: Path, **changes: object) -> Settings:
    """A student with and without a teacher, and their averages: all that `same` compares."""
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": SMALL, "teacher": VIT, "teacher_args": SMALL, "teacher_epochs": 1,
        "task": "soft", "epochs": 2, "warmup_epochs": 0, "baseline": True, "ema": 0.9, "checkpoint_every": 1,
    }  # fmt: skip
    return Settings(**(settings | changes))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    job.train(small(folder, out, checkpoint_every=0))
    return out


def clean(out: Path) -> None:
    """Nothing half-written is left."""
    assert [path.name for path in out.rglob(".*")] == []
    assert not (out / job.CHECKPOINTS).exists()


# Images

BROKEN = {"truncated", "empty", "giant", "link"}  # the rest is read


def giant() -> bytes:
    """A PNG of 4 gigapixels in 60 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 2**16 - 1, 2**16 - 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def spoil(root: Path, number: int) -> dict[str, Path]:
    """Write an image of each kind into a class of the folder."""
    image, place = Image.open(next(root.rglob("0.png"))).convert("RGB"), root / f"class{number}"
    exif, found = Image.Exif(), {}
    exif[0x0112] = 6

    def put(kind: str, suffix: str, **options: object) -> io.BytesIO:
        found[kind] = place / f"{kind}{suffix}"
        return options.pop("image", image).save(found[kind], **options)

    put("cmyk", ".jpg", image=image.convert("CMYK"))
    put("deep", ".png", image=Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))
    put("palette", ".png", image=image.quantize(8), transparency=bytes(range(8)))
    put("rotated", ".jpg", exif=exif)
    put("animated", ".gif", save_all=True, append_images=[image.rotate(90), image.rotate(180)])
    put("suffix", ".jpg", format="png")
    put("ünïcode ☃", ".png")
    content = (place / "deep.png").read_bytes()
    for kind, data in (("truncated", content[:60]), ("empty", b""), ("giant", giant())):
        found[kind] = place / f"{kind}.png"
        found[kind].write_bytes(data)
    (place / "folder.jpg").mkdir()
    (place / "above").symlink_to("..")  # every image again, without end
    found["link"] = place / "link.jpg"
    found["link"].symlink_to("link.jpg")
    put("bytes", ".png")
    os.rename(found["bytes"], os.fsencode(place) + b"/\xff\xfe.png")
    found["bytes"] = Path(os.fsdecode(os.fsencode(place) + b"/\xff\xfe.png"))
    return found


def test_broken_images_of_all_kinds(folder, tmp_path, monkeypatch):
    """What can be read is read without a warning, the rest is named; a run with both ends, in processes too."""
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    kinds = spoil(root, 1)
    data = open_data(str(root), None)
    paths = [path for path, _ in data.train.reader.samples]
    assert sorted(paths) == sorted([*map(str, folder_images(root, kinds)), *map(str, kinds.values())])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faults = find_unreadable(data)
        images = Images(data.train, lambda image: image, 0)
        for index, path in enumerate(paths):
            if not any(fault.startswith(f"{path} ") for fault in faults):
                image, target = images[0, index, 0]
                assert image.mode == "RGB" and image.size == (32, 32), path
                assert data.classes[target] in Path(path).parts
    assert {path for path in paths if any(x.startswith(f"{path} ") for x in faults)} == {str(kinds[x]) for x in BROKEN}
    assert images.faults() == []
    sizes = [f"--student-arg={key}={value}" for key, value in SMALL.items()]
    given = [f"--data={root}", "--task=none", "--batch-size=8", "--img-size=32", f"--student={VIT}", *sizes]
    result = invoke("train", *given, "--dry-run", f"--skip-images={2 * len(faults)}")
    assert all(f"{name}." in result.output for name in BROKEN), result.output
    for workers in (0, 2):
        out = tmp_path / f"run-{workers}"
        settings = small(root, out, workers=workers, check=False, skip_images=10, train_fraction=1.0, task="none",
                         teacher=None, teacher_epochs=0, teacher_args={}, ema=None)  # fmt: skip
        summary = job.train(settings)
        assert summary["results"][-1]["top1"] >= 0
        clean(out)
    with pytest.raises(InputError, match=r"images/class1/\w+\.\w+ cannot be read as an image .*--skip-images 4"):
        job.train(small(root, tmp_path / "no"))
    (tmp_path / "more" / "x").mkdir(parents=True)
    shutil.copytree(folder / "class0", os.fsdecode(os.fsencode(tmp_path / "more") + b"/\xff"))
    shutil.copytree(folder / "class1", tmp_path / "more" / "y")
    with pytest.raises(InputError, match=r"--data: the name of a class must be one line of UTF-8, got .*udcff"):
        open_data(str(tmp_path / "more"), 0.2)


def folder_images(root: Path, others: dict[str, Path]) -> list[Path]:
    own = set(map(str, others.values()))
    return [x for x in root.rglob("*.png") if str(x) not in own and "above" not in x.parts]


# Processes and disks


@pytest.mark.exhaustive
def test_killed_twenty_times(folder, tmp_path):
    """In random moments, the start, the writing of files and the end included; the bits are those of a whole run."""
    settings = small(folder, tmp_path / "run", epochs=4)
    finish(dataclasses.replace(settings, out=str(tmp_path / "whole"), checkpoint_every=0))
    where = run_with_kills(settings, 1, 20, random.Random(time.time_ns()))
    assert len(where) == 20 or (tmp_path / "run" / "summary.json").exists()
    same(tmp_path / "whole", tmp_path / "run")
    clean(tmp_path / "run")


def killing(out: Path):
    """An Images.__getitem__ in which a loader's worker is killed, as the kernel does when memory ends."""
    real = Images.__getitem__

    def get(self, key):
        if torch.utils.data.get_worker_info() is not None and places(out):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, key)

    return get


def kill_in_a_write(path: Path) -> None:
    """Stands for checkpoint._sync: the loader's worker dies in it, whose signal raises in it."""
    for process in multiprocessing.active_children():
        process.kill()  # unlike join, a wait for the signal leaves the exit code for PyTorch's handler
    time.sleep(10)
    raise AssertionError("no signal came")


@pytest.mark.parametrize("when", ["loading", "writing"])
def test_a_worker_that_dies(folder, whole, tmp_path, monkeypatch, when):
    settings = small(folder, tmp_path / "run", workers=1)
    if when == "loading":
        monkeypatch.setattr(Images, "__getitem__", killing(tmp_path / "run"))
    else:
        save, count = job.Run._save, itertools.count()

        def dying(*args):
            if next(count) == 1:
                monkeypatch.setattr(checkpoint, "_sync", kill_in_a_write)
            save(*args)

        monkeypatch.setattr(job.Run, "_save", dying)
    with pytest.raises(DataError, match=r"a process that loads images has ended \(DataLoader worker .*fewer --workers"):
        job.train(settings)
    monkeypatch.undo()
    assert places(tmp_path / "run")
    assert not [path.name for path in (tmp_path / "run").rglob(".*")]
    job.train(settings, resume=True)
    same(whole, tmp_path / "run")
    clean(tmp_path / "run")


def test_a_clock_that_jumps_back(folder, whole, tmp_path, monkeypatch):
    clock = [2e9]

    def back() -> float:
        clock[0] -= 3600
        return clock[0]

    monkeypatch.setattr(time, "time", back)
    save, count = job.Run._save, 0

    def stopping(*args):
        nonlocal count
        save(*args)
        count += 1
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (clock[0] - count, clock[0] - count))  # later files look older
        if count == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(job.Run, "_save", stopping)
    settings = small(folder, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        job.train(settings)
    monkeypatch.setattr(job.Run, "_save", save)
    job.train(settings, resume=True)
    same(whole, tmp_path / "run")


def limited(settings: Settings, resume: bool, most: int) -> None:
    """Train with files of so many bytes at most, which a write then meets like the end of a disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        job.train(settings, resume=resume)
    except RunError as error:
        os._exit(7 if "cannot be written" in str(error) else 8)


# As the state of a checkpoint; the weights; the log and the picture.
@pytest.mark.parametrize(
    "most", [8_000, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (3_000, 20_000, 40_000))]
)
def test_a_disk_that_is_full(folder, whole, tmp_path, most):
    """What was written stays, nothing is half-written, and the run goes on when there is room."""
    settings = small(folder, tmp_path / "run")
    (process,) = start(1, limited, settings, False, most)
    process.join(120)
    assert process.exitcode == 7
    out = tmp_path / "run"
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    if (out / "config.json").exists():
        finish(settings, True)
    else:
        finish(settings)
    same(whole, out)
    clean(out)


TMPFS = """
mount -t tmpfs -o size={size} full {place} && cp -r {start} {place}/run
{python} -m fastkd train --resume {place}/run
status=$?
ls -A {place}/run {place}/run/checkpoints
rm {place}/run/filler
{python} -m fastkd train --resume {place}/run && cp -r {place}/run {end}
exit $status
"""


@pytest.mark.exhaustive
def test_a_small_file_system_that_is_full(folder, whole, tmp_path):
    """As above, on a file system in memory, which a new user namespace may mount."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    settings = small(folder, tmp_path / "run")
    (process,) = start(1, train, settings, False)
    while not places(tmp_path / "run"):
        time.sleep(0.002)
    process.kill()
    process.join()
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    (tmp_path / "run" / "filler").write_bytes(bytes(4_000_000))
    (tmp_path / "disk").mkdir()
    line = TMPFS.format(size=used + 4_000_000 + 60_000, place=tmp_path / "disk", start=tmp_path / "run",
                        python=sys.executable, end=tmp_path / "end")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(job.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", line], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1 and "No space left on device; what was written before stays" in done.stderr, done
    assert ".partial" not in done.stdout
    (tmp_path / "end" / "filler").unlink(missing_ok=True)
    same(whole, tmp_path / "end")


def test_damaged_checkpoints(folder, tmp_path, monkeypatch):
    """Truncated at any place, of another format, or without a file: one line that names it, and nothing is changed."""
    settings = small(folder, tmp_path / "run")

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.Run, "_export", stopping)
    with pytest.raises(KeyboardInterrupt):
        job.train(settings)
    monkeypatch.undo()  # a checkpoint that is taken after all must end in a failure, not in an interrupt of pytest
    place = checkpoint.latest(tmp_path / "run" / job.CHECKPOINTS)
    kept = {path: path.read_bytes() for path in place.iterdir()}
    assert len(kept) == 2
    state = torch.load(place / checkpoint.STATE, weights_only=True)
    other = io.BytesIO()
    torch.save(state | {"format": 99}, other)
    draw = random.Random(0)
    damages = [(path, data[: draw.randrange(len(data))]) for path, data in kept.items() for _ in range(4)]
    damages += [(path, b"") for path in kept] + [(path, bytes(len(data))) for path, data in kept.items()]
    for path, data in damages:
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"--resume: the checkpoint {place} cannot be read, and was damaged"):
            job.train(settings, resume=True)
        path.write_bytes(kept[path])
    (place / checkpoint.STATE).write_bytes(other.getvalue())
    with pytest.raises(InputError, match=r"has format 99, fastkd .* reads 1; resume it with the version that began"):
        job.train(settings, resume=True)
    assert checkpoint.latest(tmp_path / "run" / job.CHECKPOINTS) == place


@pytest.mark.exhaustive
def test_sigterm_at_random_moments(folder, whole, tmp_path):
    """As a scheduler stops a job, start-up included: status 143 or a kill before the run began, and equal bits."""
    settings, draw, out = small(folder, tmp_path / "run", checkpoint_every=0), random.Random(time.time_ns()), None
    write_settings(tmp_path / "run.yaml", settings)
    for _ in range(12):
        given = ["--resume=run"] if (tmp_path / "run" / "config.json").exists() else ["--config=run.yaml", "--out=run"]
        (process,) = start(1, command, tmp_path, "train", *given)
        process.join(draw.uniform(0.5, 3))
        process.terminate()
        process.join(60)
        assert process.exitcode in (0, 143, -signal.SIGTERM), (tmp_path / "stderr-0.txt").read_text()
        if (out := tmp_path / "run" / "summary.json").exists():
            break
    if not out.exists():
        finish(settings, (tmp_path / "run" / "config.json").exists())
    same(whole, tmp_path / "run")
    clean(tmp_path / "run")


# Long runs


def resources() -> tuple[int, int, int]:
    """Tensors, open files, resident pages."""
    gc.collect()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return tensors, len(os.listdir("/proc/self/fd")), int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.exhaustive
@pytest.mark.parametrize("epochs", [5, 200])
def test_memory_stays_flat(folder, tmp_path, monkeypatch, epochs):
    found, save = [], job.Run._save

    def counting(*args):
        save(*args)
        found.append(resources())

    monkeypatch.setattr(job.Run, "_save", counting)
    job.train(small(folder, tmp_path / "run", epochs=epochs, checkpoint_every=0))
    later = found[3:]  # after the first epochs of the teacher and of both students
    assert len(later) >= 2 * epochs - 3
    assert len({tensors for tensors, _, _ in later[1::2]}) == 1, found
    assert len({files for _, files, _ in later}) == 1, found
    if epochs >= 200:  # the first half may still fill caches
        half = len(later) // 2
        assert later[-1][2] < 1.03 * later[half][2], found
