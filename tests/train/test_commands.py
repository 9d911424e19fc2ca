"""`fastkd eval`, `look` and `export`, and what a run shows and keeps: each as a process, of one run shared by all."""

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

import numpy as np  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from fastkd.train import look  # noqa: E402
from fastkd.train.checkpoint import saved_as, write_weights  # noqa: E402
from fastkd.train.networks import sources  # noqa: E402
from tests._support.runs import command, invoke, start  # noqa: E402

VIT = "vit_tiny_patch16_224"
LABELS = ("teacher", "student alone", "student distilled")
OPTIONAL = [name for name in ("tensorboard", "wandb") if find_spec(name)]


def fastkd(folder: Path, *arguments: str) -> str:
    """Run `fastkd` in a process of its own in this folder and return what it printed."""
    (process,) = start(1, command, folder, *arguments)
    process.join(300)
    assert process.exitcode == 0, (folder / "stderr-0.txt").read_text()
    return (folder / "stdout-0.txt").read_text()


@pytest.fixture(scope="module")
def root(folder, tmp_path_factory) -> Path:
    """A folder with a run of a teacher and both students on three digits; every second step is a line."""
    root = tmp_path_factory.mktemp("commands")
    sizes = {"student": (16, 2), "teacher": (24, 3)}
    models = [
        f"--{role}-arg={key}={value}"
        for role, (width, depth) in sizes.items()
        for key, value in (("patch_size", 8), ("embed_dim", width), ("depth", depth), ("num_heads", 2))
    ]
    (root / "wandb").mkdir()
    (root / "wandb/settings").write_text("[default]\nmode = offline\n")
    optional = [{"tensorboard": "--tensorboard", "wandb": "--wandb=digits"}[name] for name in OPTIONAL]
    printed = fastkd(
        root, "train", f"--data={folder}", "--out=run", f"--student={VIT}", f"--teacher={VIT}", *models, *optional,
        "--img-size=32", "--device=cpu", "--workers=0", "--batch-size=1", "--epochs=2", "--teacher-epochs=1",
        "--baseline", "--ema=0.9", "--keep=1", "--log-every=1e-3", "--warmup-epochs=0", "--task=manifold=2+dkd=0.5",
    )  # fmt: skip
    (root / "printed.txt").write_text(printed)
    return root


def log(root: Path, network: str) -> list[dict[str, str]]:
    with (root / "run" / "log.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["network"] == network]


def results(root: Path) -> dict[str, dict]:
    return {row["network"]: row for row in json.loads((root / "run" / "summary.json").read_text())["results"]}


def network(path: Path) -> nn.Module:
    name, args = saved_as(path)
    return timm.create_model(name, checkpoint_path=str(path), **args).eval()


def validation(root: Path) -> tuple[Tensor, Tensor]:
    """The run's validation images from 0 to 1 as its networks see them, without any of the trainer's loaders."""
    from fastkd.train.data import open_data

    data = open_data(json.loads((root / "run" / "config.json").read_text())["data"], 0.2)
    files = data.val.reader.samples
    transform = timm.data.create_transform(
        (3, 32, 32), crop_pct=0.9, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3
    )
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in files])
    return images, torch.tensor([target for _, target in files])


# A run


def test_run_tells_its_speed_and_its_time(root):
    printed = (root / "printed.txt").read_text().splitlines()
    for label in LABELS:
        epochs = 1 if label == "teacher" else 2
        own = [line for line in printed if line.startswith(f"{label} ")]
        estimate = rf"{label} +an epoch takes about \d\d:\d\d, the {epochs} left \d\d:\d\d"
        assert sum(bool(re.fullmatch(estimate, line)) for line in own) == 1
        lines = [line for line in own if "step" in line]
        assert len(lines) > 5
        within = r" +epoch +\d/\d  step \d+/38  loss .*, \d+ images/s, loading \d+%, .*epoch ends in \d\d:\d\d"
        assert all(re.fullmatch(label + within, line) for line in lines)
        scores = [line for line in own if re.search(r" epoch +\d/\d  loss \S+  top-1 +\S+%  top-5 100.00%", line)]
        assert len(scores) == epochs
        for row in log(root, label):
            assert 0 < float(row["data_seconds"]) < float(row["seconds"]) and float(row["val_loss"]) > 0


def test_run_keeps_the_best_beside_the_last(root):
    for stem, label in (("student", LABELS[2]), ("student_alone", LABELS[1])):
        for suffix, key in (("", "top1"), ("_ema", "top1_ema")):
            ranked = sorted(log(root, label), key=lambda row: -float(row[key]))
            kept = {path.name for path in (root / "run").glob(f"{stem}{suffix}_epoch*.safetensors")}
            assert kept == {f"{stem}{suffix}_epoch{row['epoch']}.safetensors" for row in ranked[:1]}
            best = load_file(root / "run" / f"{stem}{suffix}_best.safetensors")
            same = load_file(root / "run" / f"{stem}{suffix}_epoch{ranked[0]['epoch']}.safetensors")
            assert all(torch.equal(x, same[name]) for name, x in best.items())


@pytest.mark.skipif("wandb" not in OPTIONAL, reason="wandb is not installed")
def test_log_of_weights_and_biases(root):
    (file,) = (root / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for word in (b"student distilled/top1", b"teacher/loss", b"embed_dim"):
        assert word in content


# fastkd eval


def test_eval_gives_the_top1_of_the_training(root):
    """To the last bit, for each network of the run."""
    for label, name in zip(LABELS, ("run/teacher.safetensors", "run/student_alone.safetensors", "run"), strict=True):
        printed = fastkd(root, "eval", name, "--out=scores")
        stem = {"run": "student_distilled"}.get(name, Path(name).stem)
        found = json.loads((root / "scores" / f"{stem}.json").read_text())
        assert found["top1"] == results(root)[label]["top1"]
        assert f"top-1       {found['top1']:.2f}%" in printed and f"{found['val_loss']:.4f}" in printed
        assert found["val_loss"] == pytest.approx(float(log(root, label)[-1]["val_loss"]), rel=1e-5)
        with (root / "scores" / f"{stem}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["class"] for row in rows] == ["class0", "class1", "class2"]
        assert sum(int(row["right"]) for row in rows) == round(found["top1"] * found["images"] / 100)
        Image.open(root / "scores" / f"{stem}.png").verify()


def test_eval_compares_with_the_teacher(root):
    images, targets = validation(root)
    student, teacher = (network(root / "run" / f"{name}.safetensors") for name in ("student", "teacher"))
    with torch.no_grad():
        s, t = (model((images - 0.5) / 0.5) for model in (student, teacher))  # both networks' mean and std
    fastkd(root, "eval", "run", "--teacher=run")
    found = json.loads((root / "run" / "eval" / "student_distilled.json").read_text())
    assert found["agreement"] == pytest.approx(100 * (s.argmax(1) == t.argmax(1)).double().mean().item())
    assert found["teacher_top1"] == pytest.approx(100 * (t.argmax(1) == targets).double().mean().item())
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean().item()
    assert kl > 1e-4 and found["kl"] == pytest.approx(kl, rel=1e-2)  # images of 8 bits and of floats


def test_eval_of_a_bare_file_on_a_folder_takes_all_images(root, folder):
    torch.save(network(root / "run" / "student.safetensors").state_dict(), root / "bare.pth")
    result = invoke("eval", str(root / "bare.pth"), "--data", str(folder), "--device=cpu")
    assert (result.exit_code, result.stderr) == (
        2,
        f"fastkd eval: {root / 'bare.pth'}: the file does not name its timm model; give --model\n",
    )
    printed = fastkd(root, "eval", "run/student.safetensors", f"--data={folder}", "--out=whole", "--batch-size=16")
    assert "48 images, 3 classes" in printed
    assert json.loads((root / "whole" / "student.json").read_text())["images"] == 48


# fastkd look


def test_look_draws_the_networks_of_a_run(root):
    printed = fastkd(root, "look", "run", "--out=maps.png", "--count=2")
    assert "teacher (blocks.2), student alone (blocks.1), student distilled (blocks.1)" in printed
    picture = np.asarray(Image.open(root / "maps.png").convert("RGB")).astype(int)
    assert picture.shape[1] > 1.5 * picture.shape[0] > 400
    assert (np.abs(picture - (0x19, 0xD3, 0xC5)).sum(2) < 10).sum() > 2 * 7 * 100  # the mark on every map
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_maps_are_cosines_and_the_mean_attention(root):
    model = network(root / "run" / "teacher.safetensors")
    pixels = torch.rand(2, 3, 32, 32)
    relations, attention, name = look.maps(model, pixels, "1")
    assert name == "blocks.1" and relations.shape == attention.shape == (2, 4, 4, 4, 4)
    images = (pixels - 0.5) / 0.5
    with torch.no_grad():
        (tokens,) = model.forward_intermediates(images, indices=[1], intermediates_only=True, output_fmt="NLC")
        torch.testing.assert_close(
            relations[1, 2, 3, 0, 1], torch.cosine_similarity(tokens[1, 11], tokens[1, 1], dim=0)
        )
        kept = []
        model.blocks[1].attn.fused_attn = False
        model.blocks[1].attn.attn_drop.register_forward_hook(lambda _, args, out: kept.append(out))
        model(images)
    torch.testing.assert_close(attention[1, 2, 3, 0, 1], kept[0][1, :, 1 + 11, 1 + 1].mean())
    cnn = timm.create_model("resnet18", channels=(8, 8, 8, 8), stem_width=8, output_stride=8)
    relations, attention, _ = look.maps(cnn.eval(), pixels, -1)
    assert relations.shape == (2, 4, 4, 4, 4) and attention is None


def test_look_at_rectangles(folder, tmp_path):
    """A grid of 4 x 16 is drawn as one: a mark in the lower right corner is in its last row and column."""
    args = {"num_classes": 3, "img_size": (32, 128), "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model(VIT, **args)
    write_weights(tmp_path / "wide.safetensors", model, VIT, args)
    relations, attention, _ = look.maps(model.eval(), torch.rand(1, 3, 32, 128), -1)
    assert relations.shape == attention.shape == (1, 4, 16, 4, 16)
    image = torch.zeros(3, 32, 128)
    image[:, 24:28, 120:124] = 1
    assert look._contrast(image, (4, 16)) == (3, 15)
    given = ("look", str(tmp_path / "wide.safetensors"), f"--images={folder}", f"--out={tmp_path / 'maps.png'}")
    result = invoke(*given, "--img-size=32x128", "--patches=3,15", "--count=1")
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(tmp_path / "maps.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(picture - (0x19, 0xD3, 0xC5)).sum(2) < 10)
    assert picture.shape[1] > 3 * picture.shape[0]
    assert rows.min() > picture.shape[0] / 2 and len(set(columns // 10)) > 6  # the marks of three wide maps
    result = invoke(*given, "--img-size=32x128", "--patches=15,3")
    assert (result.exit_code, "is not one of the 4 x 16 patches" in result.stderr) == (2, True)


def test_options_from_a_file(root, folder, monkeypatch, tmp_path):
    """`--config` of eval, look and export; the command line overrides it, and an unknown key is refused."""
    monkeypatch.chdir(root)
    out = tmp_path / "scores"
    (tmp_path / "eval.yaml").write_text(f"data: {folder}\nout: {out}\nbatch_size: 48\nworkers: 0\nteacher: run\n")
    (tmp_path / "look.yaml").write_text(f"count: 1\npatches: 0,0 3,3\nout: {tmp_path / 'maps.png'}\n")
    (tmp_path / "export.yaml").write_text(f"hf: {tmp_path / 'hf'}\noverwrite: true\n")
    for name in ("eval", "look", "export"):
        result = invoke(name, "run", f"--config={tmp_path / name}.yaml")
        assert result.exit_code == 0, result.output
    scores = json.loads((out / "student_distilled.json").read_text())
    assert scores["images"] == 48 and "agreement" in scores
    result = invoke("eval", "run", f"--config={tmp_path / 'eval.yaml'}", f"--out={tmp_path / 'other'}")
    assert result.exit_code == 0 and json.loads((tmp_path / "other" / "student_distilled.json").read_text()) == (
        scores | {"images_per_second": pytest.approx(0, abs=1e9)}
    )
    for name, text, words in (
        ("eval", "lr: 1", "lr: there is no such option"),
        ("look", "count: 0", "--count: needs a whole number at least 1, got 0"),
        ("export", "hf: [", "x.yaml"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        result = invoke(name, "run", f"--config={tmp_path / 'x.yaml'}")
        assert (result.exit_code, result.stderr.count("\n"), words in result.stderr) == (2, 1, True), result.stderr


# fastkd export


def test_export_is_the_network(root):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    printed = fastkd(root, "export", "run", "--onnx=s.onnx", "--torch-export=s.pt2", "--hf=hf")
    assert len(re.findall(r"off by \d\.\de[-+]\d\d of the largest logit", printed)) == 3
    assert "(batch, 3, 32, 32), normalised by mean (0.5, 0.5, 0.5)" in printed
    config = json.loads((root / "hf" / "config.json").read_text())
    assert config["label_names"] == ["class0", "class1", "class2"]
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = network(root / "run" / "student.safetensors")(images)
        found = [torch.export.load(root / "s.pt2").module()(images)]
        found.append(timm.create_model(f"local-dir:{root / 'hf'}", pretrained=True).eval()(images))
    session = onnxruntime.InferenceSession(root / "s.onnx", providers=["CPUExecutionProvider"])
    found.append(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))
    for logits in found:
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


# Bad input


def written(root: Path) -> dict[Path, float]:
    """When each file was written, beside those of the process in which wandb may still be writing its log."""
    return {path: path.stat().st_mtime for path in root.rglob("*") if "wandb" not in path.parts}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval", ["needs a RUN_OR_MODEL"]),
        ("eval nothing", ["nothing is no run, no file and no timm model"]),
        ("eval vit_tinny_patch16_224", ["vit_tinny_patch16_224 is no run", "near it: vit_tiny_patch16_224"]),
        ("eval resnet18", ["--data: resnet18 belongs to no run"]),
        ("eval empty", ["empty holds no run"]),
        ("eval run --teacher nothing", ["nothing is no run"]),
        ("eval run --amp int8", ["--amp", "int8"]),
        ("eval run --data two", ["--data: the classes of two are not the run's", "class2"]),
        ("eval run --out run/log.csv", ["--out: run/log.csv is a file"]),
        ("eval run --ler 1", ["--ler: there is no such option"]),
        ("eval run/student.safetensors --model resnet18", ["run/student.safetensors", "does not fit resnet18"]),
        ("look run --out maps.jpg", ["--out: needs a file .png in a folder that exists, got maps.jpg"]),
        ("look run --out nowhere/maps.png", ["--out", "nowhere/maps.png"]),
        ("look run --patches 3", ["--patches: needs ROW,COLUMN pairs, got '3'"]),
        ("look run --patches 9,9", ["--patches: (9, 9) is not one of the 4 x 4 patches"]),
        ("look run --layer blocks.9", ["--layer:", "blocks.9", "blocks.0"]),
        ("look run --images empty", ["--images: empty is no folder of images"]),
        ("look run/nothing", ["run/nothing is no run"]),
        ("export run", ["--onnx, --torch-export, --hf: give one at least"]),
        ("export run --onnx run/log.csv", ["--onnx: run/log.csv exists"]),
        ("export run --hf nowhere/hf", ["--hf: the folder nowhere does not exist"]),
        ("export nothing --torch-export s2.pt2", ["nothing is no run"]),
    ],
)
def test_bad_input(root, monkeypatch, arguments, words):
    monkeypatch.chdir(root)
    (root / "empty").mkdir(exist_ok=True)
    for name in ("two/class0/a", "two/class1/b"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(root / f"{name}.png")
    before = written(root)
    result = invoke(*arguments.split())
    assert (result.exit_code, len(result.stderr.splitlines()), result.stdout) == (2, 1, ""), result.output
    assert result.stderr.startswith(f"fastkd {arguments.split()[0]}: ")
    assert all(word in result.stderr for word in words), result.stderr
    assert written(root) == before


def test_networks_of_a_run(root, monkeypatch):
    monkeypatch.chdir(root)
    assert [source.label for source in sources("run")] == [*LABELS]
    (root / "run" / "teacher.safetensors").rename(root / "moved")
    try:  # it was trained there, so nothing else has its weights
        assert [source.label for source in sources("run")] == [*LABELS[1:]]
    finally:
        (root / "moved").rename(root / "run" / "teacher.safetensors")
