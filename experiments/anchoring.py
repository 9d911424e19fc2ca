"""Measure Gram anchoring: fine-tune a network with good patch features by labels alone, and with the task `gram`.

python -m experiments.anchoring   writes benchmarks/results/anchoring.json; minutes on two cores

A small transformer first learns the ink of each patch of handwritten digits. It then learns the digits' labels. Two
values are measured on other writers' digits: the mean squared difference of its patch relations from those before, and
the share of the variance of the patches' ink that a linear map, fitted to the first writers' digits, explains.
"""

import dataclasses
import datetime as dt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastkd import capture
from fastkd.functional import relation_loss
from fastkd.train import job, report
from fastkd.train.checkpoint import write_weights
from fastkd.train.data import Digits
from fastkd.train.settings import DIGITS, Settings

SIZE, PATCH, STEPS, SEEDS = 32, 4, 600, 3
NAME, ARGS = "vit_tiny_patch16_224", {"patch_size": PATCH, "embed_dim": 64, "depth": 4, "num_heads": 2}


def images(train: bool) -> Tensor:
    """(N, 3, 32, 32), normalised for the network."""
    pixels = [np.asarray(image.resize((SIZE, SIZE))) for image in Digits(train).images]
    return torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2) / 127.5 - 1


def ink(x: Tensor) -> Tensor:
    """(N, patches, 1)"""
    return nn.functional.avg_pool2d(x[:, :1], PATCH).flatten(2).mT


def pretrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model, head, x = timm.create_model(NAME, img_size=SIZE, num_classes=10, **ARGS), nn.Linear(64, 1), images(True)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 1e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (32,))
        loss = (head(model.forward_features(x[rows])[:, 1:]) - ink(x[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def features(model: nn.Module, x: Tensor) -> Tensor:
    with capture.tokens(model.eval(), ["norm"]) as tokens:
        model(x)
    return tokens[0]


def explained(model: nn.Module) -> float:
    """Return the share of the variance of ink that a linear map of the features explains."""
    (a, y), (b, z) = (
        (features(model, x).double().flatten(0, 1), ink(x).double().flatten(0, 1)) for x in map(images, (True, False))
    )
    a, b = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (a, b))
    weights = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1]), a.T @ y)
    return float(1 - (b @ weights - z).square().mean() / z.var())


def measure(seed: int, folder: Path) -> dict[str, dict[str, float | None]]:
    start, path = pretrained(seed), folder / f"start-{seed}.safetensors"
    write_weights(path, start, NAME, ARGS)
    before = features(start, images(False))
    rows: dict[str, Any] = {"before": {"drift": 0.0, "explained": explained(start), "top1": None}}
    settings: Settings = dataclasses.replace(
        DIGITS, img_size=SIZE, student=NAME, student_args=ARGS, student_checkpoint=str(path), teacher="self",
        teacher_args={}, teacher_layers=None, teacher_epochs=0, epochs=20, baseline=False, device="cpu", seed=seed,
    )  # fmt: skip
    for task, label in (("none", "fine-tuned"), ("gram", "fine-tuned with gram")):
        out = folder / f"{task}-{seed}"
        summary = job.train(dataclasses.replace(settings, task=task, out=str(out)))
        model = timm.create_model(NAME, img_size=SIZE, num_classes=10, **ARGS)
        model.load_state_dict(load_file(out / "student.safetensors"))
        drift = float(relation_loss(features(model, images(False)), before))
        rows[label] = {"drift": drift, "explained": explained(model), "top1": summary["results"][-1]["top1"]}
    return rows | {"versions": summary["versions"], "machine": summary["machine"]}


def draw(figure: Any, rows: dict[str, list[dict[str, float | None]]]) -> None:
    """Draw, for each network, the mean of each value as a bar and the seeds as points."""
    titles = {
        "drift": "difference of patch relations", "explained": "variance of ink explained", "top1": "top-1 (%)",
    }  # fmt: skip
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for place, (label, runs) in enumerate(rows.items()):
            values = [value for run in runs if (value := run[name]) is not None]
            if values:
                axes.bar(place, sum(values) / len(values), 0.6, color=f"C{place}", alpha=0.5, label=label)
                axes.plot([place] * len(values), values, "o", color=f"C{place}", markersize=4)
        axes.set_xticks(range(len(rows)), [label.replace(" with ", "\nwith ") for label in rows], fontsize="small")
        axes.set_title(title, fontsize="medium")


def main() -> None:
    with TemporaryDirectory() as folder:
        seeds = [measure(seed, Path(folder)) for seed in range(SEEDS)]
    about = {name: seeds[0][name] for name in ("versions", "machine")}
    labels = [name for name in seeds[0] if name not in about]
    rows = {label: [seed[label] for seed in seeds] for label in labels}
    path = Path(__file__).parents[1] / "benchmarks/results/anchoring.json"
    report.write_json(path, {"rows": rows, "date": dt.date.today().isoformat(), **about})
    print(path.read_text())


if __name__ == "__main__":
    main()
