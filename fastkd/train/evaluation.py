"""`fastkd eval`: top-1, top-5 and loss of a network, class by class, and its agreement with a teacher."""

import csv
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import DataError, InputError
from .checkpoint import replacing
from .data import Data, Images, create_loaders, find_unreadable, leave_out, size_of, worker_errors
from .evaluate import evaluate
from .loop import AMP_DTYPES
from .networks import Opening, network_parser, sources, split
from .options import Size, option
from .parser import Parser
from .prepare import choose_device
from .report import write_json
from .settings import Settings
from .tasks import renormalisation

EVAL = """Evaluate a network on the validation images of its run, of a folder or of a timm dataset.

RUN_OR_MODEL is the folder of a run (its student), a file of weights or a timm model with its pretrained weights. A file
in the folder of a run is evaluated as the run did. In a folder of --data without val/, all images are used.
"""
INPUTS = {
    "data", "data_root", "val_split", "num_classes", "check", "skip_images", "img_size", "batch_size", "device", "amp",
    "channels_last", "workers",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation(Opening):
    teacher: str | None = option(
        "Teacher to compare with: a run's folder, a file or a timm model.", None, metavar="RUN_OR_MODEL", shown="none"
    )
    out: str | None = option(
        "Folder for the results.", None, metavar="FOLDER", shown="eval in the run's folder, else eval-NAME"
    )


def parser() -> Parser:
    """Return the parser of `fastkd eval`."""
    return network_parser("fastkd eval RUN_OR_MODEL [OPTION ...]", EVAL, Evaluation, INPUTS)


def run(given: dict[str, Any]) -> None:
    """Run `fastkd eval` with the options that were given."""
    name, own, given = split(given, Evaluation, INPUTS)
    source = sources(name, own.model)[-1]
    settings = source.settings(given)
    if source.run is None and "data" not in given:
        raise InputError(f"--data: {name} belongs to no run; give images")
    device = choose_device(settings)
    data = source.data(settings, whole="data" in given)
    data = data._replace(train=Dataset())
    leave_out(data, find_unreadable(data) if settings.check else [], settings.skip_images)
    network, teacher = source.load(settings, device), None
    settings = dataclasses.replace(settings, img_size=source.size(settings, network))
    check_classes(f"{source.file or source.label}", network, data)
    if own.teacher is not None:
        their = sources(own.teacher)[0]
        teacher = their.load(settings, device)
        check_classes(f"--teacher: {their.file or their.label}", teacher, data)
    out = Path(own.out or (f"eval-{source.label}" if source.run is None else source.run / "eval"))
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, not a folder")
    result, matrix = measure(network, teacher, data, settings)
    stem = source.label.replace(" ", "_").replace("/", "_")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{stem}.json", {"network": str(source.file or source.model), "data": settings.data, **result})
        write_classes(out / f"{stem}.csv", matrix, data.classes)
        write_confusion(out / f"{stem}.png", matrix, data.classes, f"{source.label} on {Path(settings.data).name}")
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    print(f"network     {source.label}: {source.model}{f' from {source.file}' if source.file else ''}")
    print(f"data        {settings.data}: {result['images']:,} images, {len(data.classes)} classes")
    print(f"top-1       {result['top1']:.2f}%\ntop-5       {result['top5']:.2f}%\nloss        {result['val_loss']:.4f}")
    print(f"speed       {result['images_per_second']:.0f} images/s on {device}")
    if teacher is not None:
        print(f"teacher     top-1 {result['teacher_top1']:.2f}%")
        print(f"agreement   {result['agreement']:.2f}% of the images get the class that the teacher gives")
        print(f"KL          {result['kl']:.4f} from the teacher's classes to the student's, in nats")
    print(f"per class   {out / stem}.csv\nconfusion   {out / stem}.png")


def check_classes(name: str, network: nn.Module, data: Data) -> None:
    if network.num_classes != len(data.classes):
        raise InputError(f"{name} has {network.num_classes} classes, the data {len(data.classes)}")


@worker_errors()
def measure(
    network: nn.Module, teacher: nn.Module | None, data: Data, settings: Settings
) -> tuple[dict[str, Any], Any]:
    """Return the scores by name, and the confusion matrix (classes, classes): rows are true, columns predicted."""
    from sklearn.metrics import confusion_matrix

    device = next(network.parameters()).device
    loader = create_loaders(
        data._replace(train=data.val), network, img_size=cast(Size, settings.img_size), augment=False, device=device,
        upright=settings.exif,
        batch_size=min(settings.batch_size, size_of(data.val)), workers=settings.workers, seed=settings.seed,
    )[1]  # fmt: skip
    autocast = torch.autocast(device.type, AMP_DTYPES[settings.amp], enabled=settings.amp != "none")
    scale, shift = (x.to(device, torch.float32) for x in renormalisation(network, teacher))
    true, guessed, taught, divergence, extra = list[int](), list[int](), list[int](), 0.0, 0.0

    def watch(images: Tensor, targets: Tensor, logits: Tensor) -> None:
        nonlocal divergence, extra
        true.extend(targets.tolist())
        guessed.extend(logits.argmax(1).tolist())
        if teacher is not None:
            start = time.perf_counter()
            with autocast:
                theirs = teacher(images * scale + shift).float()
            taught.extend(theirs.argmax(1).tolist())
            log_s, log_t = logits.log_softmax(1), theirs.log_softmax(1)
            divergence += nn.functional.kl_div(log_s, log_t, reduction="sum", log_target=True).item()
            extra += time.perf_counter() - start

    began = time.perf_counter()
    scores: dict[str, Any] = evaluate(network, loader, autocast, watch=watch)
    faults, count = loader.images.faults() if isinstance(loader.images, Images) else [], len(true)
    if len(faults) > settings.skip_images:
        raise DataError(
            f"{len(faults)} images cannot be read, more than --skip-images {settings.skip_images}: {faults[0]}"
        )
    scores |= {"images": count, "images_per_second": count / (time.perf_counter() - began - extra)}
    if teacher is not None:
        scores["teacher_top1"] = 100 * sum(map(int.__eq__, taught, true)) / count
        scores["agreement"] = 100 * sum(map(int.__eq__, taught, guessed)) / count
        scores["kl"] = divergence / count
    return scores, confusion_matrix(true, guessed, labels=range(len(data.classes)))


def write_classes(path: Path, matrix: Any, classes: list[str]) -> None:
    """Write a row per class: name, images, images recognised, and their share in percent."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "images", "right", "top1"))
        for name, row, right in zip(classes, matrix, matrix.diagonal(), strict=True):
            writer.writerow((name, row.sum(), right, f"{100 * right / row.sum():.2f}" if row.sum() else ""))


def write_confusion(path: Path, matrix: Any, classes: list[str], title: str) -> None:
    """Draw the share of each true class, in percent, that gets each class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(classes) <= 30
    figure = Figure(figsize=(2.5 + 0.35 * len(classes),) * 2 if few else (8, 8), dpi=150, layout="constrained")
    axes = figure.subplots()
    shares = 100 * matrix / matrix.sum(1, keepdims=True).clip(1)
    drawn = ConfusionMatrixDisplay(shares, display_labels=classes if few else None)
    drawn.plot(
        ax=axes, include_values=few, values_format=".0f", cmap="Blues", im_kw={"vmin": 0, "vmax": 100},
        text_kw={"fontsize": 8}, xticks_rotation=90 if few and max(map(len, classes)) > 3 else 0, colorbar=not few,
    )  # fmt: skip
    if not few:
        axes.set(xticks=[], yticks=[])
    axes.set(xlabel="class given", ylabel="true class")
    axes.set_title(f"{title}: % of each true class", fontsize=10, parse_math=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
