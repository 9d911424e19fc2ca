"""Inversion's parts: the optimisation of a batch against the formulas, and the folder of finished images."""

import dataclasses
import errno
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from fastkd import capture, reference  # noqa: E402
from fastkd.train import DivergedError, InputError  # noqa: E402
from fastkd.train.data import open_data  # noqa: E402
from fastkd.train.inversion import synthesis  # noqa: E402
from fastkd.train.inversion.presets import PRESETS, Phase, Preset  # noqa: E402
from fastkd.train.inversion.store import GRID, MANIFEST, ManifestError, Store, check_folder  # noqa: E402
from fastkd.train.inversion.synthesis import Inverter  # noqa: E402

SMALL = {"num_classes": 4, "channels": (8, 8, 8, 8), "stem_width": 8}
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    """A small CNN whose statistics and classes come from four kinds of stripes."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", **SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        labels = torch.randint(4, (32,))
        loss = F.cross_entropy(network(stripes(labels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def stripes(labels: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    kinds = torch.stack([rows / 2, columns / 2, (rows + columns) / 3, (rows - columns) / 3])
    phase = torch.rand(len(labels), 1, 1, 1) * 6
    return (kinds[labels][:, None] + phase).sin().expand(-1, 3, -1, -1) + 0.1 * torch.randn(len(labels), 3, 32, 32)


def preset(**changes) -> Preset:
    plain = {
        "phases": (Phase(30),), "batch_size": 6, "lr": 0.1, "betas": (0.5, 0.9), "schedule": "cosine",
        "warmup_steps": 5, "clamp": False, "bn": 0.1, "first_bn": 1.0, "tv_l1": 0.0, "tv_l2": 0.0, "l2": 0.0,
        "l2_per_image": True,
    }  # fmt: skip
    return Preset(**plain | changes)


def inverter(network: torch.nn.Module, amp: str = "none", student=None, **changes) -> Inverter:
    return Inverter(network, preset(**changes), img_size=32, amp=amp, student=student)


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_images_become_what_the_network_knows(trained, amp):
    noise = inverter(trained, phases=()).synthesise(LABELS)
    one = inverter(trained, phases=(Phase(1),)).synthesise(LABELS)
    batch = inverter(trained, amp, clamp=True, cross_entropy=3.0).synthesise(LABELS)
    assert batch.images.shape == (6, 3, 32, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.terms["bn"] < 0.5 * one.terms["bn"]
    assert batch.probabilities.mean() > 0.55 > 0.4 > noise.probabilities.mean()


def test_the_best_step_is_kept(trained, monkeypatch):
    monkeypatch.setattr(synthesis, "LOOK_EVERY", 1)
    seen = []
    wild = {"lr": 2.0, "schedule": "constant", "warmup_steps": 0}
    batch = inverter(trained, phases=(Phase(6), Phase(6, pool=2)), **wild).synthesise(LABELS, report=seen.append)
    assert len(seen) == 12
    totals = [terms["total"] for terms in seen]
    assert batch.terms == seen[totals.index(min(totals))]


def test_best_of_totals():
    leaves = [torch.full((2, 1, 2, 2), float(k)) for k in range(5)]
    best = synthesis._Best(leaves[0])
    for leaf, total in zip(leaves, [3.0, 1.0, 2.0, math.nan, 0.5], strict=True):
        best.see(leaf, leaf + 10, {"total": torch.tensor(total), "bn": torch.tensor(total + 1)})
        if total == 2.0:
            assert torch.equal(best.leaf, leaves[1])
            assert best.terms == {"total": 1.0, "bn": 2.0}
            assert not best.failed
    assert best.failed
    assert torch.equal(best.suspect, leaves[3] + 10)  # the first that failed
    assert best.terms["total"] == 0.5


def test_same_seed_same_images(trained):
    changing = {"phases": (Phase(8, jitter=3),), "flip": True}
    one, same, other = (inverter(trained, **changing).synthesise(LABELS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def test_total_is_the_weighted_formula(trained):
    """One step from noise, each term by the reference on the same input."""
    student = timm.create_model("resnet18", **SMALL).eval()
    student.pretrained_cfg = student.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    weights = {"cross_entropy": 2.0, "bn": 0.3, "competition": 0.7, "intra": 0.5}
    priors = {"tv_l1": 0.2, "tv_l2": 0.1, "l2": 0.01, "l2_per_image": False}
    one = inverter(trained, student=student, phases=(Phase(1),), first_bn=10.0, temperature=2.0, **weights, **priors)
    terms = one.synthesise(LABELS, seed=5).terms

    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    raw = x * torch.tensor(trained.pretrained_cfg["std"]).view(3, 1, 1)
    raw = raw + torch.tensor(trained.pretrained_cfg["mean"]).view(3, 1, 1)
    own = (raw - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)
    with torch.no_grad(), capture.bn_inputs(trained) as bn:
        logits, rival = trained(x), student(own)
        layers = (bn.inputs, bn.running_means, bn.running_vars)
        expected = {
            "cross_entropy": F.cross_entropy(logits, LABELS),
            "bn": reference.bn_stat_loss(*layers, layer_weights=[10.0] + [1.0] * (len(bn.inputs) - 1)),
            "competition": reference.competition_loss(rival, logits, temperature=2.0),
        }
        pooled = trained.forward_head(trained.forward_features(x), pre_logits=True)
    expected["intra"] = reference.intra_divergence_loss(pooled, LABELS, spread_margin=1.0, boundary_margin=0.1)
    expected["prior"] = reference.image_prior(x, **priors)
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    for name, value in (expected | {"total": total}).items():
        torch.testing.assert_close(torch.tensor(terms[name]), value, msg=lambda text, name=name: f"{name}: {text}")


def test_noise_that_it_starts_from(trained):
    """Without a step, the noise; of twice the deviation, twice as far from the mean."""
    one, half = (inverter(trained, phases=(), noise=noise).synthesise(LABELS, seed=5).images for noise in (0.4, 0.2))
    mean = 255 * torch.tensor(trained.pretrained_cfg["mean"]).view(3, 1, 1)
    assert (one - mean - 2 * (half - mean)).abs().max() <= 1.5  # as both are rounded
    assert (one - mean).std() > 10
    step = inverter(trained, phases=(Phase(1),), noise=0.4).synthesise(LABELS, seed=5)
    assert torch.equal(step.images, inverter(trained, phases=(), noise=0.4).synthesise(LABELS, seed=5).images)


def test_terms_of_weight_zero_are_left_out(trained):
    terms = inverter(trained, phases=(Phase(1),), bn=0.0).synthesise(LABELS).terms
    assert set(terms) == {"total", "cross_entropy"}


def test_learning_rate():
    """DeepInversion's: up over the warm-up, then a cosine to 0, anew in each phase; or constant."""
    network = timm.create_model("resnet18", **SMALL)
    cosine = inverter(network, warmup_steps=10)
    assert [cosine._rate(step, 110) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1, 1, 0.5])
    assert cosine._rate(109, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    constant = inverter(network, schedule="constant", warmup_steps=0)
    assert [constant._rate(step, 100) for step in (0, 99)] == [1, 1]


def test_what_the_network_sees(trained):
    whole = Phase(1, pool=2, jitter=4)
    one = inverter(trained, grey=True, cell=4, clamp=True, flip=True, phases=(whole,))
    leaf = torch.randn(2, 1, 8, 8)
    rendered = one._render(leaf)
    assert rendered.shape == (2, 3, 32, 32)
    grey = rendered * one.std + one.mean
    torch.testing.assert_close(grey[:, :1].expand(-1, 3, -1, -1), grey)
    pooled, rolls = F.avg_pool2d(rendered, 2), set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        view = one._view(leaf, whole, generator)
        shifted = {
            (rows, columns, mirrored): pooled.roll((rows, columns), (2, 3)).flip([3] if mirrored else [])
            for rows in range(-4, 5)
            for columns in range(-4, 5)
            for mirrored in (False, True)
        }
        found = [key for key, expected in shifted.items() if torch.equal(view, expected)]
        assert found, "the view is no roll of the images"
        rolls.add(found[0])
    assert {mirrored for *_, mirrored in rolls} == {False, True}
    assert len(rolls) > 30
    assert all({-4, 4} <= {roll[axis] for roll in rolls} for axis in (0, 1))


def test_clamp_keeps_real_pixels(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(synthesis._Best, "see", lambda self, leaf, view, terms: seen.append(view.detach()))
    inverter(trained, clamp=True, lr=5.0, phases=(Phase(4),)).synthesise(LABELS)
    one = inverter(trained)
    pixels = torch.stack(seen[1:]) * one.std + one.mean
    assert -1e-5 < pixels.min() < 1e-5
    assert 1 - 1e-5 < pixels.max() < 1 + 1e-5


def test_not_finite_names_the_layer(trained):
    network = timm.create_model("resnet18", **SMALL).eval()
    with torch.no_grad():
        network.layer2[0].conv2.weight[3, 0, 0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"phase 1, step 3.*enters layer2.0.bn2 is the first"):
        inverter(network, phases=(Phase(3),)).synthesise(LABELS)
    with torch.no_grad():
        network.layer2[0].conv2.weight[3, 0, 0, 0] = 0
        network.fc.bias[0] = torch.inf
    with pytest.raises(DivergedError, match="the logits are the first"):
        inverter(network, phases=(Phase(3),)).synthesise(LABELS)


def test_networks_without_statistics():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"no batch norm.*use one that has"):
        inverter(vit)
    assert inverter(vit, bn=0.0, phases=(Phase(1),)).synthesise(LABELS).terms["total"] > 0
    network = timm.create_model("resnet18", **SMALL)
    network.layer3[0].bn1 = torch.nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match=r"layer3.0.bn1 keep no running statistics"):
        inverter(network)


def test_arguments_that_do_not_fit(trained):
    with pytest.raises(ValueError, match="needs a student"):
        inverter(trained, competition=1.0)
    with pytest.raises(ValueError, match="32 px cannot be divided by pool 3"):
        inverter(trained, phases=(Phase(1, pool=3),))
    with pytest.raises(ValueError, match=r"layer3.0.bn1 gets one element per channel at 16 px"):
        inverter(trained, phases=(Phase(1, pool=2), Phase(1)), batch_size=1)
    for wrong in ({"steps": 0}, {"pool": 0}, {"jitter": -1}):
        with pytest.raises(ValueError, match="a phase needs"):
            Phase(**{"steps": 1} | wrong)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["cifar"].lr = 1.0
    assert [sum(phase.steps for phase in PRESETS[f"imagenet-{i}"].phases) for i in range(3)] == [3000, 2000, 20_000]


# The folder

HEADER = {"classes": ["00", "01", "02", "03"], "seed": 0}


def add_batch(store: Store, value: int = 0) -> None:
    images = torch.full((6, 3, 16, 16), value, dtype=torch.uint8)
    images[:, 0, 0, :6] = torch.eye(6, dtype=torch.uint8) * 200
    store.add(images, LABELS.tolist(), [0.5] * 6, {"total": 1 / 3})
    store.commit()


@pytest.fixture
def filled(tmp_path) -> Path:
    store = Store.create(tmp_path / "out", HEADER)
    add_batch(store, 10)
    add_batch(store, 20)
    return tmp_path / "out"


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_folder_round_trip(filled):
    store = Store.open(filled)
    assert store.header == HEADER
    assert [entry["label"] for entry in store.entries] == 2 * LABELS.tolist()
    assert store.batches[0]["terms"] == {"total": 0.333333}
    assert Image.open(filled / GRID).size == (160, 32)
    assert check_folder(filled) == HEADER
    assert check_folder(filled.parent) is None
    first = Image.open(filled / "train/01/00000-001.png")
    assert [first.getpixel((i, 0))[0] for i in range(3)] == [0, 200, 0]


def test_training_reads_the_folder(filled):
    data = open_data(str(filled), 0.5)
    assert data.classes == HEADER["classes"]
    assert len(data.train) + len(data.val) == 12
    add_image(filled)
    with pytest.raises(InputError, match=r"does not list train/02/mine.png"):
        open_data(str(filled), 0.5)


def test_interrupted_batch_leaves_no_trace(filled):
    before = files(filled)
    store = Store.open(filled)
    store.add(torch.zeros(6, 3, 16, 16, dtype=torch.uint8), LABELS.tolist(), [0.5] * 6, {})
    (filled / "student-00003.safetensors").write_bytes(b"weights")
    (filled / "train/00/.00002-004.png.123").write_bytes(b"half")
    with (filled / MANIFEST).open("a") as file:
        file.write('{"batch":2,"ima')
    assert files(filled) != before
    assert len(Store.open(filled).entries) == 12
    assert files(filled) == before


@pytest.mark.parametrize("at", [0, 3, 6, 7])
def test_full_disk_takes_nothing_finished(filled, monkeypatch, at):
    """The write that fails is one of the images, (6) the student's weights, or (7) the manifest's line."""
    before = files(filled)
    store = Store.open(filled)
    count, write = [0], Path.write_bytes

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_bytes(path: Path, content: bytes) -> int:
        count[0] += 1
        if count[0] > at:
            write(path, content[: len(content) // 2])
            full()
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    images = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(OSError, match="No space"):  # noqa: PT012  either may be the one
        store.add(images, LABELS.tolist(), [0.5] * 6, {})
        if at == 7:
            monkeypatch.setattr("os.fsync", full)
        store.commit(lambda path: path.write_bytes(b"weights"))
    monkeypatch.undo()
    assert files(filled) == before
    again = Store.open(filled)
    add_batch(again)
    assert check_folder(filled) == HEADER
    assert len(Store.open(filled).entries) == 18


def drop_image(out: Path) -> None:
    (out / "train/01/00001-001.png").unlink()


def add_image(out: Path) -> None:
    Image.new("RGB", (16, 16)).save(out / "train/02/mine.png")


def move_image(out: Path) -> None:
    (out / "train/01/00001-001.png").rename(out / "train/02/00001-001.png")


def cut_image(out: Path) -> None:
    path = out / "train/03/00000-003.png"
    path.write_bytes(path.read_bytes()[:-7])


def relabel(out: Path) -> None:
    path = out / MANIFEST
    path.write_text(path.read_text().replace('"label":3', '"label":2', 1))


def break_line(out: Path) -> None:
    path = out / MANIFEST
    path.write_text(path.read_text().replace('"batch":0', '"batch"0'))


def swap_batches(out: Path) -> None:
    header, *batches = (out / MANIFEST).read_text().splitlines()
    (out / MANIFEST).write_text("\n".join([header, *reversed(batches)]) + "\n")


def drop_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_image, r"lists train/01/00001-001.png, which is not there$"),
        (add_image, r"does not list train/02/mine.png, which is there$"),
        (move_image, r"lists train/01/00001-001.png, which is not there$"),
        (cut_image, r"gives train/03/00000-003.png \d+ bytes, it has \d+"),
        (relabel, r"gives train/03/00000-003.png the label 2, which is another folder's"),
        (break_line, r"manifest.jsonl cannot be read as a manifest"),
        (swap_batches, r"batches are not in order"),
        (drop_manifest, r"has no manifest.jsonl"),
    ],
)
def test_manifest_that_does_not_fit(filled, change, words):
    change(filled)
    before = files(filled)
    with pytest.raises(ManifestError, match=words):
        Store.open(filled)
    assert files(filled) == before
