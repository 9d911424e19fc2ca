"""Data that is read in order, WebDataset shards and streamed Hugging Face data, by one process and by pairs."""

import io
import json
import random
import signal
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from fastkd.train import DataError, InputError, InterruptedRun, job, ranks  # noqa: E402
from fastkd.train.data import create_loaders, open_data  # noqa: E402
from fastkd.train.evaluate import evaluate  # noqa: E402
from fastkd.train.settings import Settings, Stage  # noqa: E402
from tests._support.runs import finish, invoke, run_with_kills, same, signal_at, together  # noqa: E402

VIT = "vit_tiny_patch16_224"
SIZES = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
EVEN, UNEVEN = (8, 8, 8, 8), (3, 9, 5, 2, 4)  # images of each shard
BATCH, WORKERS = 4, 2


def picture(number: int) -> Image.Image:
    """The brightness tells the number's remainder by 3, through noise."""
    noise = torch.randint(0, 120, (32, 32, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray((noise + 60 * (number % 3)).numpy())


def numbers(sizes: tuple[int, ...]) -> Iterator[range]:
    first = 0
    for size in sizes:
        yield range(first, first := first + size)


def write_shards(root: Path, name: str, sizes: tuple[int, ...], classes: int, format_: str = "png") -> str:
    """WebDataset shards whose images have their numbers' remainder as label; what timm calls the split."""
    for shard, held in enumerate(numbers(sizes)):
        with tarfile.open(root / f"{name}-{shard}.tar", "w") as tar:
            for number in held:
                image = io.BytesIO()
                picture(number).save(image, format_)
                for kind, content in (("png", image.getvalue()), ("cls", str(number % classes).encode())):
                    info = tarfile.TarInfo(f"{number:03}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{name}-{{0..{len(sizes) - 1}}}.tar|{sum(sizes)}"


def web_dataset(root: Path) -> dict[str, dict[str, Any]]:
    pytest.importorskip("webdataset")
    even, uneven = (write_shards(root, name, sizes, 40) for name, sizes in (("even", EVEN), ("uneven", UNEVEN)))
    common = {"data": "wds/numbers", "root": str(root), "num_classes": 40}
    return {"even": common | {"splits": (even, uneven)}, "uneven": common | {"splits": (uneven, even)}}


def hugging_face(root: Path) -> dict[str, dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    cases = {}
    for name, both in (("even", (EVEN, UNEVEN)), ("uneven", (UNEVEN, EVEN))):
        for split, sizes in zip(("train", "validation"), both, strict=True):
            for shard, held in enumerate(numbers(sizes)):
                rows = datasets.Dataset.from_dict(
                    {"image": [picture(number) for number in held], "label": list(held)},
                    features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
                )
                (root / name).mkdir(exist_ok=True)
                rows.to_parquet(root / name / f"{split}-{shard:05}-of-{len(sizes):05}.parquet")
        datasets.load_dataset(str(root / name), cache_dir=str(root / "cache"))  # counts the images
        cases[name] = {"data": f"hfids/{root / name}", "root": str(root / "cache"), "num_classes": 40}
    return cases


def labels(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    return [label for _, targets in batches for label in targets.tolist()]


def read(cases: dict[str, dict[str, Any]], out: Path) -> None:
    """What the loaders of this process give: labels, by which every image is known."""
    own, device = ranks.join(torch.device("cpu"), WORKERS)
    found = {}
    for name, case in cases.items():
        data = open_data(**case, val_fraction=0, batch_size=BATCH)
        loading: dict[str, Any] = {"batch_size": BATCH, "workers": WORKERS, "device": device, "ranks": own}
        loading |= {"img_size": 32, "augment": True}
        model = timm.create_model(VIT, img_size=32, **SIZES)
        train, val = create_loaders(data, model, **loading)
        _, whole = create_loaders(data, model, val_ranks=ranks.ALONE, **loading)  # the same images, for a sharded run
        found[name] = {
            "steps": len(train),
            "epochs": [labels(train.epoch(epoch)) for epoch in range(2)],
            "rest": labels(train.epoch(1, start=2)),
            "val": labels(val),
            "whole": labels(whole),
        }
        try:
            create_loaders(data, model, **loading | {"workers": 9})
        except InputError as error:
            found[name]["refused"] = str(error)
    (out / f"{own.rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("reader", [web_dataset, hugging_face])
def test_pair_shares_the_shards(tmp_path, reader):
    together(2, read, reader(tmp_path), tmp_path)
    ones, others = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    one, other = ones["even"], others["even"]
    assert one["steps"] == other["steps"] == sum(EVEN) / 2 / BATCH
    for epoch in range(2):  # each image once, half of them here and half there
        assert len(one["epochs"][epoch]) == len(other["epochs"][epoch])
        assert sorted(one["epochs"][epoch] + other["epochs"][epoch]) == list(range(sum(EVEN)))
    assert one["epochs"][0] != one["epochs"][1]
    assert sorted(one["val"] + other["val"]) == list(range(sum(UNEVEN)))
    assert one["whole"] == other["whole"] and sorted(one["whole"]) == list(range(sum(UNEVEN)))

    # Of shards that differ some images come twice and some not at all, but as many steps and whole batches to both.
    for rank in (ones["uneven"], others["uneven"]):
        assert rank["steps"] == ones["uneven"]["steps"]
        assert all(len(epoch) == rank["steps"] * BATCH for epoch in rank["epochs"])
    assert sorted(ones["uneven"]["val"] + others["uneven"]["val"]) == list(range(sum(EVEN)))

    for found in (*ones.values(), *others.values()):
        assert found["rest"] == found["epochs"][1][2 * BATCH :]
        assert found["refused"].startswith("--workers: 9 need a shard each to train on, a process gets ")


def small(root: Path, out: Path, **changes: Any) -> Settings:
    """Three classes, a teacher of one epoch and the student alone and with it."""
    settings = {
        "data": "wds/numbers", "data_root": str(root), "num_classes": 3, "workers": WORKERS, "batch_size": BATCH,
        "train_split": write_shards(root, "train", EVEN, 3), "val_split": write_shards(root, "val", UNEVEN, 3),
        "out": str(out), "img_size": 32, "student": VIT, "student_args": SIZES, "teacher": VIT, "teacher_args": SIZES,
        "teacher_epochs": 1, "baseline": True, "warmup_epochs": 0, "lr": 3e-3, "checkpoint_every": 1, "ema": 0.9,
        "device": "cpu",
        "stages": (Stage("soft", 2),),
    }  # fmt: skip
    return Settings(**(settings | changes))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_pair_on_shards_killed_at_random_moments(tmp_path, kills):
    """The same bits as without, and the top-1 of all validation images."""
    pytest.importorskip("webdataset")
    finish(small(tmp_path, tmp_path / "whole", checkpoint_every=0), world=2)
    where = run_with_kills(small(tmp_path, tmp_path / "run"), 2, kills, random.Random(time.time_ns()))
    assert any(where), "no run was killed after a checkpoint"
    same(tmp_path / "whole", tmp_path / "run")

    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["images"] == {"train": sum(EVEN), "validation": sum(UNEVEN)}
    files = {"student alone": "student_alone.safetensors", "student distilled": "student.safetensors"}
    student = timm.create_model(VIT, num_classes=3, img_size=32, **SIZES)
    data = open_data("wds/numbers", 0, root=str(tmp_path), splits=(summary["config"]["train_split"],
                     summary["config"]["val_split"]), num_classes=3)  # fmt: skip
    options: dict[str, Any] = {"img_size": 32, "batch_size": BATCH, "augment": True, "workers": 1}
    _, loader = create_loaders(data, student, device=torch.device("cpu"), **options)
    for row in summary["results"][1:]:
        student.load_state_dict(load_file(tmp_path / "whole" / files[row["network"]]))
        assert 0 < row["top1"] == pytest.approx(evaluate(student, loader, torch.no_grad())["top1"])


def test_one_process_on_shards(tmp_path, monkeypatch):
    """A run stopped within an epoch ends as one that was not."""
    pytest.importorskip("webdataset")
    job.train(small(tmp_path, tmp_path / "whole"))
    signal_at(monkeypatch, 12, signal.SIGTERM)
    stopped = small(tmp_path, tmp_path / "stopped")
    with pytest.raises(InterruptedRun) as caught:
        job.train(stopped)
    assert caught.value.code == 143
    with pytest.raises(InputError, match=r"--resume: .*'workers': 1.*'workers': 2"):
        job.train(small(tmp_path, tmp_path / "stopped", workers=1), resume=True)
    job.train(stopped, resume=True)
    same(tmp_path / "whole", tmp_path / "stopped")

    result = invoke("eval", str(tmp_path / "whole"), "--teacher", str(tmp_path / "whole"))
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "whole" / "eval" / "student_distilled.json").read_text())
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (scores["images"], scores["top1"]) == (sum(UNEVEN), summary["results"][-1]["top1"])
    assert scores["teacher_top1"] == summary["results"][0]["top1"]


def test_pixels_of_16_bits_in_shards(tmp_path, monkeypatch):
    """16-bit grey images give what the same ones in 8 bits give; of 32 bits they end the run in one line."""
    pytest.importorskip("webdataset")

    def values(number: int) -> torch.Tensor:
        return torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(number))

    kinds = {
        "plain": lambda number: Image.fromarray(values(number).to(torch.uint8).numpy()),
        "deep": lambda number: Image.fromarray((values(number) * 257).to(torch.uint16).numpy()),
        "float": lambda number: Image.fromarray(values(number).float().numpy()),
    }
    loaded = {}
    options: dict[str, Any] = {"img_size": 32, "batch_size": BATCH, "augment": True, "workers": 1}
    for name, drawn in kinds.items():
        monkeypatch.setattr(sys.modules[__name__], "picture", drawn)
        splits = (write_shards(tmp_path, name, (4, 4), 3, "tiff"),) * 2
        data = open_data("wds/numbers", 0, root=str(tmp_path), splits=splits, num_classes=3)
        model = timm.create_model(VIT, img_size=32, **SIZES)
        loaded[name] = create_loaders(data, model, device=torch.device("cpu"), **options)
    for own, others in zip(loaded["plain"], loaded["deep"], strict=True):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(own, others, strict=True))
    with pytest.raises(DataError, match=r"^--data: its pixels are 32-bit numbers, mode F; it needs 8 or 16 bits$"):
        next(iter(loaded["float"][0]))


def test_fewer_shards_than_processes(tmp_path):
    (case, _) = web_dataset(tmp_path).values()
    data, model = open_data(**case, val_fraction=0), timm.create_model(VIT, img_size=32, **SIZES)
    options: dict[str, Any] = {"img_size": 32, "batch_size": BATCH, "augment": True, "device": torch.device("cpu")}
    create_loaders(data, model, ranks=ranks.Ranks(3, 4), workers=1, **options)
    with pytest.raises(InputError, match="--workers: 1 need a shard each to train on, a process gets 0"):
        create_loaders(data, model, ranks=ranks.Ranks(4, 5), workers=1, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 0}, "--workers: data that is read in order needs 1"),
        ({"workers": 5}, "--workers: 5 need a shard each to train on, a process gets 4"),
        ({"num_classes": None}, "--num-classes"),
        ({"val_split": "val-{4..6}.tar|9"}, r"--data: wds/numbers lacks 2 of its 3 shards: .*val-5.tar"),
        ({"batch_size": 64}, "--batch-size: 64 exceeds the 32 training images"),
        ({"aug_repeats": 3}, "--aug-repeats: needs data with random access"),
        ({"epoch_repeats": 2}, "--epoch-repeats: needs data with random access"),
        ({"train_fraction": 0.5}, "--train-fraction: needs a folder"),
    ],
)
def test_refusals(tmp_path, changes, words):
    pytest.importorskip("webdataset")
    with pytest.raises(InputError, match=words):
        job.train(small(tmp_path, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
