"""Folders and image sizes as people have them: layouts, formats, orientation, the order of classes, rectangles."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402
from timm.data import ImageDataset  # noqa: E402

from fastkd.losses import EarlyDistillationLoss, ViTKDLoss  # noqa: E402
from fastkd.train import InputError, checkpoint, models, prepare  # noqa: E402
from fastkd.train.data import as_rgb, create_loaders, find_unreadable, open_data  # noqa: E402
from fastkd.train.options import BadValueError, as_size  # noqa: E402
from fastkd.train.settings import Settings  # noqa: E402
from fastkd.train.tasks import create_task  # noqa: E402
from tests._support.runs import command, invoke, together  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
WIDE = (32, 128)  # 4 x 16 tokens, as many as 8 x 8


def arguments(role: str, **changes: object) -> list[str]:
    return [f"--{role}-arg={key}={value}" for key, value in (SMALL | changes).items()]


def labels(data) -> dict[str, str]:
    """File name -> class of all images."""
    samples = [*data.train.reader.samples, *data.val.reader.samples]
    return {"/".join(Path(path).parts[-2:]): data.classes[target] for path, target in samples}


def copies(folder: Path, root: Path, place) -> Path:
    """The images of the folder, each at place(class, file name) below the root."""
    for path in folder.rglob("*.png"):
        new = root / place(path.parent.name, path.name)
        new.parent.mkdir(parents=True, exist_ok=True)
        if new.suffix.lower() == ".png":
            shutil.copy(path, new)
        else:
            Image.open(path).save(new)
    return root


# Folders


LAYOUTS = {
    "parts of a class": lambda c, f: f"{c}/part{int(f[:-4]) % 2}/{f}",
    "parts of equal names": lambda c, f: f"{c}/images/{f}",
    "deep": lambda c, f: f"{c}/2024/05/camera/{f}",
    "splits": lambda c, f: f"{('train', 'val')[int(f[:-4]) % 4 == 0]}/{c}/images/{f}",
    "a class named train": lambda c, f: f"{'train' if c == 'class0' else c}/{f}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_class_is_the_first_folder_under_the_root(folder, tmp_path, layout):
    data = open_data(str(copies(folder, tmp_path, LAYOUTS[layout])), 0.25)
    assert data.classes == (["class1", "class2", "train"] if "named" in layout else ["class0", "class1", "class2"])
    counts = [target for part in (data.train, data.val) for _, target in part.reader.samples]
    assert [counts.count(i) for i in range(3)] == [16, 16, 16]
    for part in (data.train, data.val):
        for path, target in part.reader.samples:
            assert data.classes[target] in Path(path).parts
    assert data.notes == ()
    assert isinstance(data.train, ImageDataset) and data.train[0][0].mode == "RGB"  # timm reads it on its own


def test_every_format_counts_and_what_is_left_out_is_told(folder, tmp_path):
    kinds = ["png", "webp", "tif", "bmp", "gif", "JPG", "jpeg", "ppm"]
    root = copies(folder, tmp_path, lambda c, f: f"train/{c}/{f[:-4]}.{kinds[int(f[:-4]) % 8]}")
    assert open_data(str(root), 0.25).notes == ()
    for name in ("train/stray.webp", "train/class1/notes.txt", "train/class1/scan.h5", "test/class0/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "class0" / "0.png", root / name)
    # Copies that computers make; none of them is an image, or in a class.
    for name in (".ipynb_checkpoints/0.png", "train/.ipynb_checkpoints/0.png", "train/class0/.ipynb_checkpoints/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "class0" / "0.png", root / name)
    for name in ("train/__MACOSX/class0/._0.png", "train/class1/._3.png", "train/.DS_Store", "train/class2/.DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7" + bytes(80))
    data = open_data(str(root), 0.25)
    assert len(data.train) + len(data.val) == 48 and data.classes == ["class0", "class1", "class2"]
    assert find_unreadable(data) == []
    assert data.notes == (
        f"left out: 1 outside the class folders ({root / 'train/stray.webp'})",
        f"left out: 2 that Pillow does not know as images ({root / 'train/class1/notes.txt'}, "
        f"{root / 'train/class1/scan.h5'})",
        f"not read: {root / 'test'}",
    )


def test_classes_that_cannot_be_divided_are_named(folder, tmp_path):
    root = copies(folder, tmp_path / "few", lambda c, f: f"{c}/{f}")
    (root / "rare").mkdir()
    shutil.copy(folder / "class0" / "0.png", root / "rare")
    with pytest.raises(InputError, match=r"--val-fraction: a class needs 2 images at least .* has rare$"):
        open_data(str(root), 0.25)
    loose = copies(folder, tmp_path / "loose", lambda c, f: f"{c}-{f}")
    with pytest.raises(InputError, match=r"holds no images in class folders; .*its 48 images lie outside"):
        open_data(str(loose), 0.25)
    one = copies(folder, tmp_path / "one", lambda c, f: f"archive/{c}/{f}")
    with pytest.raises(InputError, match="two at least, got 1: archive"):
        open_data(str(one), 0.25)


@pytest.mark.parametrize("upright", [True, False])
def test_exif_orientation(folder, tmp_path, upright):
    """Photographs that lie on their side, as cameras store them."""
    for path in folder.rglob("*.png"):
        image, exif = Image.open(path), Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / path.parent.name / path.name, exif=exif)
    options = {"img_size": 32, "batch_size": 8, "augment": False, "workers": 0, "device": torch.device("cpu")}
    model = timm.create_model(VIT, img_size=32, **SMALL)
    (lying, _), (right, _) = (
        create_loaders(open_data(str(root), 0.25), model, **options, upright=upright) for root in (tmp_path, folder)
    )
    for (a, _), (b, _) in zip(lying, right, strict=True):
        assert torch.equal(a, b if upright else b.rot90(1, (2, 3)))
    assert np.array_equal(as_rgb(Image.open(folder / "class0" / "0.png")), Image.open(folder / "class0" / "0.png"))


# The order of classes


def test_order_of_classes(folder, tmp_path):
    names = {"class0": "10", "class1": "9", "class2": "1"}
    root = copies(folder, tmp_path / "images", lambda c, f: f"{names[c]}/{f}")
    natural = open_data(str(root), 0.25)
    assert natural.classes == ["1", "9", "10"]
    (tmp_path / "map.txt").write_text("10\n1\n9\n")
    mapped = open_data(str(root), 0.25, class_map=str(tmp_path / "map.txt"))
    assert mapped.classes == ["10", "1", "9"] and labels(mapped) == labels(natural)
    timms = ImageDataset(str(root), class_map=str(tmp_path / "map.txt")).reader.class_to_idx
    assert timms == mapped.train.reader.class_to_idx == mapped.val.reader.class_to_idx
    for text in ("10\n1\n", "10\n1\n8\n", "10\n1\n9\n9\n"):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(InputError, match=r"--class-map: .*map.txt must name each class of .* once"):
            open_data(str(root), 0.25, class_map=str(tmp_path / "map.txt"))
    for data, path in ((str(root), "nowhere.txt"), ("digits", "map.txt")):
        with pytest.raises(InputError, match="--class-map: "):
            open_data(data, 0.25, class_map=path)


def test_teacher_near_chance_is_told_the_order_of_classes(folder, tmp_path):
    teacher = timm.create_model(VIT, img_size=32, num_classes=3, **SMALL)
    nn.init.zeros_(teacher.head.weight)  # it takes all images for the first class
    checkpoint.write_weights(tmp_path / "teacher.safetensors", teacher, VIT, {})
    result = invoke(
        "train", f"--data={folder}", f"--out={tmp_path / 'run'}", "--device=cpu", "--img-size=32", "--task=soft",
        f"--student={VIT}", *arguments("student"), f"--teacher={VIT}", *arguments("teacher"), "--epochs=1",
        f"--teacher-checkpoint={tmp_path / 'teacher.safetensors'}", "--batch-size=8", "--workers=0", "--no-baseline",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(
        r"--teacher: top-1 is \d\d\.\d%, near chance \(33.3%\): its classes are probably in another order than the "
        r"data's, which is class0, class1, class2; .*--class-map", result.output,
    )  # fmt: skip
    for task, top1 in (("soft", 50.0), ("manifold", 33.3)):  # whose tokens teach
        setup = SimpleNamespace(settings=Settings(task=task), data=SimpleNamespace(classes=["1", "10", "2"]))
        assert prepare.class_order_note(setup, top1) is None


def test_equal_weights_are_equal_files(tmp_path):
    model = timm.create_model(VIT, img_size=32, num_classes=3, **SMALL)
    contents = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        checkpoint.write_weights(path, model, VIT, SMALL | {"img_size": 32}, ["a", "é", "c"])
        contents.add(path.read_bytes())
    assert len(contents) == 1
    loaded = load_file(path)
    assert all(torch.equal(x, loaded[key]) for key, x in model.state_dict().items())


# Rectangles


def test_sizes():
    assert [as_size(x) for x in (64, "64", "64x64", (64, 64), [64, 256], "64X256")] == [64] * 4 + [(64, 256)] * 2
    for wrong in ("0", "64x", "1x2x3", -1, 3.5, (), "wide", (64, 0)):
        with pytest.raises(BadValueError, match="HEIGHTxWIDTH"):
            as_size(wrong)


CNN = {"channels": (8, 8, 8, 8), "stem_width": 8}
FAMILIES = {
    "vit": lambda size: timm.create_model(VIT, img_size=size, num_classes=3, **SMALL),
    "swin": lambda size: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, num_classes=3, window_size=4, embed_dim=16, depths=(2, 2),
        num_heads=(2, 2),
    ),
    "resnet": lambda size: timm.create_model("resnet18", num_classes=3, **CNN),
    "dinov3": lambda size: timm.create_model(
        "vit_small_patch16_dinov3", num_classes=3, embed_dim=24, depth=2, num_heads=2, patch_size=8
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [(32, 128), (128, 32), (64, 96), 64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_grid_of_every_layer_is_that_of_its_map(family, size):
    """A mark in the image's lower right corner is in the last token of the grid's last row."""
    model = FAMILIES[family](size).eval()
    for layer in models.layers_of("student", model, None, size):
        h, w = models.grid_of(model, layer, size)
        assert h * w == layer.tokens
        height, width = size if isinstance(size, tuple) else (size, size)
        assert abs(np.log(h / w * width / height)) < 0.01


def test_losses_take_their_grid():
    """A 4 x 16 grid through the generator's convolutions and the aligner's resize, against the same tokens as maps."""
    torch.manual_seed(0)
    low, high_s, high_t = torch.randn(2, 2, 64, 4), torch.randn(2, 64, 4), torch.randn(2, 64, 4)
    loss = ViTKDLoss(4, 4)
    nn.init.normal_(loss.mask_token)
    mask = loss.draw_mask(2, 64)
    of_grid, square = (loss(low, low, high_s, high_t, mask, grid=grid) for grid in ((4, 16), None))
    x = torch.where(mask[..., None], loss.mask_token, high_s).mT.unflatten(2, (4, 16))
    expected = 3e-6 / (0.5 * 2) * (loss.generation(x).flatten(2).mT - high_t)[mask].square().sum()
    torch.testing.assert_close(of_grid, expected)
    assert not torch.allclose(of_grid, square)
    with pytest.raises(ValueError, match=r"grid \(4, 8\) has 32 tokens, high_student has 64"):
        loss(low, low, high_s, high_t, mask, grid=(4, 8))
    with pytest.raises(ValueError, match=r"square grid .* N = 63; of another shape, give grid=\(h, w\)"):
        loss(low[:, :, :63], low[:, :, :63], high_s[:, :63], high_t[:, :63])

    early = EarlyDistillationLoss(4, 6)
    for shape in ((8, 32), (4, 16), (2, 8), (3, 10)):  # the last is rounded by its strides
        maps = torch.randn(2, 6, *shape)
        x = early.aligners[0](high_s).mT.reshape(2, 6, 4, 16)
        x = x if shape == (4, 16) else nn.functional.interpolate(x, shape, mode="bilinear", align_corners=False)
        for grid in (None, (4, 16), [(4, 16)]):
            torch.testing.assert_close(early(high_s, maps, grid=grid), (x - maps).square().mean())
    for shape in ((1, 30), (8, 16), (10, 7), (15, 9)):  # 64 tokens have no grid between 4 x 16 and 8 x 8
        near = shape == (10, 7)
        maps = torch.randn(2, 6, *shape)
        if near:  # 8 x 8
            assert early(high_s, maps).equal(early(high_s, maps, grid=(8, 8)))
            continue
        with pytest.raises(ValueError, match=r"students\[0\] has 64 tokens, which form no grid .*; give grid=\(h, w\)"):
            early(high_s, maps)
        assert early(high_s, maps, grid=(4, 16)).isfinite()
    with pytest.raises(ValueError, match="one per layer"):
        early(high_s, maps, grid=[(4, 16), (4, 16)])


@pytest.mark.parametrize("name", ["manifold", "vitkd", "dearkd", "cikd", "soft"])
def test_every_task_takes_rectangles(name):
    """Grids of 4 x 16 tokens, and of another patch size where the task resizes."""
    student = FAMILIES["vit"](WIDE)
    resizes = name in ("manifold", "vitkd")
    teacher = timm.create_model(
        VIT, img_size=WIDE, num_classes=3, **SMALL | {"embed_dim": 24, "patch_size": 4 if resizes else 8}
    )
    teacher = FAMILIES["resnet"](WIDE) if name == "dearkd" else teacher
    options = {"interpolate": True} if resizes else {}
    images = torch.randn(2, 3, *WIDE)
    task = create_task(name, student, teacher, options=options)
    torch.manual_seed(1)
    result = task(images, torch.tensor([0, 1]))
    assert result["loss"].isfinite()
    if name in ("vitkd", "dearkd"):
        features = task.trainable.features
        assert [grid for grid, _ in features.grids] == [(4, 16)] * len(features.grids)


def test_rectangles_from_end_to_end(folder, tmp_path):
    """`fastkd train` as a process on a folder with everything that people's folders have."""
    root = copies(folder, tmp_path / "images", lambda c, f: f"{c}/part{int(f[:-4]) % 2}/{f[:-4]}.webp")
    shutil.copy(folder / "class0" / "0.png", root)
    together(
        1, command, tmp_path, "train", "--data=images", "--out=run", "--device=cpu", "--img-size=32x128",
        "--task=vitkd", f"--student={VIT}", *arguments("student"), f"--teacher={VIT}", *arguments("teacher"),
        "--epochs=1", "--teacher-epochs=1", "--batch-size=8", "--workers=0", "--no-baseline",
    )  # fmt: skip
    assert "--data: left out: 1 outside the class folders (" in (tmp_path / "stderr-0.txt").read_text()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["img_size"] == [32, 128] and (tmp_path / "run" / "classes.txt").read_text() == "class0\nclass1\nclass2\n"
    )
    line = re.search(r"load it +(timm.*)", (tmp_path / "stdout-0.txt").read_text())[1]
    student = eval(line.replace("'run", f"'{tmp_path}/run"), {"timm": timm})
    assert student(torch.zeros(1, 3, 32, 128)).shape == (1, 3)
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["class0", "class1", "class2"]
