"""What the trainer must reach: the measuring loops do the trainer's work, on networks small enough for a test."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("timm.task")

from benchmarks import __main__ as command
from benchmarks import training
from benchmarks.training import Bare, Figure, Pair, Trainer
from fastkd.train.settings import DIGITS, Settings

VIT = "vit_tiny_patch16_224"
NETWORK = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
# Its 64 tokens are all rows of the random term, whatever is drawn; sgd's step is the gradient.
TINY = dataclasses.replace(
    DIGITS, img_size=32, batch_size=4, device="cpu", student=VIT, student_args=NETWORK,
    teacher="deit_tiny_patch16_224", teacher_args=NETWORK | {"embed_dim": 24}, teacher_layers=None,
    opt="sgd", lr=0.1, warmup_epochs=0, sched="step",
)  # fmt: skip


def weights(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_bare_loop_does_what_the_trainer_does() -> None:
    trainer, bare = Trainer(TINY), Bare(TINY)
    before = weights(trainer.trainee.network)
    assert torch.equal(before, weights(bare.setup.nets.student))
    taken = [loop.take(3) for loop in (trainer, bare)]
    assert 0 < taken[0].in_loss < taken[0].seconds and taken[1].seconds > 0
    moved, expected = (weights(network) - before for network in (trainer.trainee.network, bare.setup.nets.student))
    assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_the_share_is_that_of_equal_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, eager = training.share(TINY, 3)
    assert fused.goal == 0.03 and eager.goal is None and eager.reached is None
    for figure in (fused, eager):
        assert 0 < figure.value < 1 and 0 < figure.against < figure.seconds and "2 layers" in figure.setting
    right = training.manifold_by_maps
    monkeypatch.setattr(training, "manifold_by_maps", lambda s, t: 2 * right(s, t))
    with pytest.raises(RuntimeError, match="eager maps"):
        next(training.share(TINY, 1))


def test_kept_batches_are_as_loaded() -> None:
    """Whatever is written into them, and from any step of an epoch on."""
    loader = Trainer(TINY).trainee.loaders[0]
    kept = training.Kept(loader, 2)
    first, second, third = (next(kept.epoch(0, start)) for start in range(3))
    first[0].zero_()
    assert not torch.equal(first[0], third[0]) and torch.equal(first[1], third[1])
    for (images, targets), (own, labels) in zip((third, second), loader.epoch(0), strict=False):
        assert torch.equal(images, own) and torch.equal(targets, labels)
    assert len(list(kept.epoch(0))) == len(kept) == len(loader)


def test_turns_go_back_and_forth() -> None:
    order: list[str] = []
    found = training.turns({name: partial(order.append, name) for name in "ab"}, 3)
    assert "".join(order) == "ab" + "ba" + "ab" and [len(found[name]) for name in "ab"] == [3, 3]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_take_turns_and_their_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    (figure,) = training.against_one((Pair("tiny", TINY, 2, 1),))
    assert figure.value == pytest.approx(figure.seconds / figure.against) and "4 images" in figure.setting
    store = training.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(training.sys, "executable", shutil.which("false"))  # a process that fails at once
    with pytest.raises(RuntimeError, match="did not take"), training.Processes(store, 1) as one:
        one.take(TINY, 1)


@pytest.mark.parametrize(("value", "status"), [(0.04, 1), (0.02, 0)])
def test_a_missed_goal_is_told(value: float, status: int, monkeypatch, tmp_path: Path, capsys) -> None:
    found = [Figure("f", "s", "share", value, 0.03, 2.0, 0.04), Figure("f", "s", "ratio", 9.0, None, 1.0, 1.0)]
    monkeypatch.setattr(training, "figures", lambda device: found)
    path = tmp_path / "training.json"
    assert command.main(["training", "--device", "cpu", "--json", str(path)]) == status
    assert ("MISS" in capsys.readouterr().out) == bool(status)
    rows = json.loads(path.read_text())["training"]
    assert [row["reached"] for row in rows] == [not status, None] and rows[0]["value"] == value


def test_the_goals_are_measured_on_what_they_are_about() -> None:
    of_recipe = training.recipe("cpu")
    assert (of_recipe.student, of_recipe.batch_size, of_recipe.amp) == ("deit_tiny_patch16_224", 16, "none")
    assert of_recipe.teacher is not None and of_recipe.teacher.startswith("cait_s24_224")
    assert of_recipe.teacher_layers is not None and len(of_recipe.teacher_layers) == 8
    assert training.recipe("cuda").batch_size == 256 and training.recipe("cuda").amp == "bf16"
    assert all(isinstance(pair.settings, Settings) and pair.settings.batch_size % 2 == 0 for pair in training.PAIRS)
