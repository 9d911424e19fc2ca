"""Files of others run no code: pickles, YAML, manifests, archives, file names, the working directory, open folders."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from safetensors.torch import save_file  # noqa: E402

from fastkd.train import InputError, checkpoint, job  # noqa: E402
from fastkd.train.data import open_data  # noqa: E402
from fastkd.train.inversion.store import MANIFEST, Store  # noqa: E402
from fastkd.train.options import literal, mapping  # noqa: E402
from fastkd.train.settings import Settings  # noqa: E402
from tests._support.runs import invoke  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
ARGS = [f"--student-arg={key}={value}" for key, value in SMALL.items()]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def teacher_args(path: Path) -> list[str]:
    return [f"--teacher={VIT}", *(x.replace("student", "teacher") for x in ARGS), f"--teacher-checkpoint={path}"]


def torch_file(folder: Path, evil: Payload) -> list[str]:
    torch.save({"state_dict": {"x": evil}}, folder / "x.pth")
    return teacher_args(folder / "x.pth")


def old_torch_file(folder: Path, evil: Payload) -> list[str]:
    torch.save({"x": evil}, folder / "x.bin", _use_new_zipfile_serialization=False)
    return teacher_args(folder / "x.bin")


def bare_pickle(folder: Path, evil: Payload) -> list[str]:
    (folder / "x.pt").write_bytes(pickle.dumps(evil))
    return teacher_args(folder / "x.pt")


def numpy_file(folder: Path, evil: Payload) -> list[str]:
    np.savez(folder / "x.npz", x=np.array([evil], dtype=object))
    return teacher_args(folder / "x.npz")


def student_file(folder: Path, evil: Payload) -> list[str]:
    torch.save({"x": evil}, folder / "x.pth")
    return [f"--student-checkpoint={folder / 'x.pth'}"]


def timm_folder(folder: Path, evil: Payload) -> list[str]:
    (folder / "config.json").write_text(json.dumps({"architecture": VIT, "num_classes": 3, "pretrained_cfg": {}}))
    torch.save({"x": evil}, folder / "pytorch_model.bin")
    return [f"--student=local-dir:{folder}", "--student-pretrained"]


def transformers_folder(folder: Path, evil: Payload) -> list[str]:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    about = {"model_type": "vit", "architectures": ["ViTModel"], "auto_map": {"AutoModel": "evil.Model"}, **sizes}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(evil.marker)!r})\nclass Model: pass\n")
    torch.save({"x": evil}, folder / "pytorch_model.bin")
    return [f"--teacher=local-dir:{folder}", "--teacher-pretrained"]


def class_map(folder: Path, evil: Payload) -> list[str]:
    (folder / "x.pkl").write_bytes(pickle.dumps(evil))
    return [f"--class-map={folder / 'x.pkl'}"]


def yaml_file(folder: Path, evil: Payload) -> list[str]:
    (folder / "x.yaml").write_text(f"lr: !!python/object/apply:os.mkdir [{str(evil.marker)!r}]\n")
    return [f"--config={folder / 'x.yaml'}"]


def class_path(folder: Path, evil: Payload) -> list[str]:
    (folder / "x.yaml").write_text(f"opt_args: {{class_path: os.mkdir, init_args: {{path: {evil.marker}}}}}\n")
    return [f"--config={folder / 'x.yaml'}"]


def option_value(folder: Path, evil: Payload) -> list[str]:
    return [f"--student-arg=depth=__import__('os').mkdir({str(evil.marker)!r})"]


FILES = (
    torch_file, old_torch_file, bare_pickle, numpy_file, student_file, timm_folder, transformers_folder, class_map,
    yaml_file, class_path, option_value,
)  # fmt: skip


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__)
def test_no_file_runs_code(folder, tmp_path, make):
    marker = tmp_path / "ran"
    (tmp_path / "theirs").mkdir()
    given = make(tmp_path / "theirs", Payload(marker))
    result = invoke(
        "train", f"--data={folder}", f"--out={tmp_path / 'run'}", f"--student={VIT}", *ARGS, "--task=none",
        "--img-size=32", "--device=cpu", "--workers=0", "--batch-size=8", "--epochs=1", *given,
    )  # fmt: skip
    assert not marker.exists()
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert result.stderr.startswith("fastkd train: --")


@pytest.mark.parametrize("command", ["eval", "look", "export"])
def test_no_network_runs_code(folder, tmp_path, command):
    marker = tmp_path / "ran"
    torch.save({"state_dict": {"x": Payload(marker)}}, tmp_path / "x.pth")
    more = {"eval": f"--data={folder}", "look": f"--images={folder}", "export": f"--hf={tmp_path / 'hf'}"}[command]
    result = invoke(command, str(tmp_path / "x.pth"), f"--model={VIT}", more)
    assert result.exit_code == 2 and not marker.exists(), result.output


def test_no_run_of_others_runs_code(folder, tmp_path):
    """A folder of a run, its checkpoint among it, may come from somebody else."""
    marker, out = tmp_path / "ran", tmp_path / "run"
    settings = Settings(
        data=str(folder), out=str(out), img_size=32, batch_size=8, workers=0, device="cpu", student=VIT,
        student_args=SMALL, task="none", epochs=1, warmup_epochs=0, check=False,
    )  # fmt: skip
    setup = job.prepare(settings)
    job.start_folder(out, job.describe(setup), settings) if out.mkdir() is None else None
    place = out / job.CHECKPOINTS / job.Place(0, 1).name
    place.mkdir(parents=True)
    torch.save({"rows": [Payload(marker)]}, place / checkpoint.STATE)
    result = invoke("train", f"--resume={out}")
    assert result.exit_code == 2 and not marker.exists(), result.output
    assert f"--resume: the checkpoint {place} cannot be read" in result.stderr
    (out / job.CONFIG).write_text(f"lr: !!python/object/apply:os.mkdir [{str(marker)!r}]\n")
    for command in (("train", f"--resume={out}"), ("eval", str(out))):
        result = invoke(*command)
        assert result.exit_code == 2 and not marker.exists(), result.output


@pytest.mark.parametrize("name", ["pipe:mkdir ran", "../outside.tar", "/etc/outside.tar", "http://127.0.0.1:9/x.tar"])
def test_a_data_set_names_its_own_files_only(tmp_path, name, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    split = {"num_samples": 4, "filenames": [name], "shard_lengths": [4], "name": "train"}
    (tmp_path / "data" / "_info.json").write_text(json.dumps({"splits": {"train": split, "validation": split}}))
    with pytest.raises(InputError, match=r"--data: .*_info.json.* names a shard outside the folder"):
        open_data("wds/x", 0.1, root=str(tmp_path / "data"), num_classes=3)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["../../escaped.png", "/tmp/escaped.png", "train/../../escaped.png"])
def test_a_manifest_names_its_own_files_only(tmp_path, file):
    out = tmp_path / "images"
    store = Store.create(out, {"classes": ["0", "1"]})
    store.add(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [0], [1.0], {"total": 0.0})
    store.commit()
    (tmp_path / "escaped.png").write_bytes(b"kept")
    lines = (out / MANIFEST).read_text().splitlines()
    batch = json.loads(lines[1])
    batch["images"][0] |= {"file": file, "bytes": 4}
    (out / MANIFEST).write_text("\n".join([lines[0], json.dumps(batch)]) + "\n")
    with pytest.raises(InputError, match="which is not there"):
        Store.open(out)
    assert (tmp_path / "escaped.png").read_bytes() == b"kept"


def test_archives_are_not_unpacked(tmp_path):
    """An archive in a class folder is no image; nothing in it is written."""
    root = tmp_path / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            image = pytest.importorskip("PIL.Image").new("RGB", (8, 8), (number, 0, 0))
            image.save(root / name / f"{number}.png")
    with zipfile.ZipFile(root / "a" / "more.zip", "w") as archive:
        archive.writestr("../../../escaped.png", b"x")
    with tarfile.open(root / "a" / "more.tar", "w") as tar:
        tar.add(root / "a" / "0.png", "../../escaped.png")
    before = sorted(tmp_path.rglob("*"))
    data = open_data(str(root), 0.25)
    assert len(data.train) + len(data.val) == 8 and "left out: 2" in data.notes[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_texts_are_data():
    """Values of options are literals; those that Python cannot read are texts."""
    for text in ("{[]: 1}", "(" * 5000, "1 +", "__import__('os')", "\0", "9" * 5000):
        assert literal(text) == text
    assert mapping(["a=[1, (2,)]"]) == {"a": (1, (2,))}


NAMES = ["$(touch ran)", "`touch ran`; touch ran", "-rf", "é ☃", "%s %d {0}"]


def test_names_are_not_commands(folder, tmp_path, monkeypatch):
    """Names of folders and images with what a shell, a format or an option would read."""
    monkeypatch.chdir(tmp_path)
    root, image = tmp_path / "images $(touch ran)", folder / "class0" / "0.png"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for number in range(6):
            (root / name / f"{number} {name}.png").write_bytes(image.read_bytes())
    result = invoke(
        "train", f"--data={root}", f"--out={tmp_path / 'run; touch ran'}", f"--student={VIT}", *ARGS, "--task=none",
        "--img-size=32", "--device=cpu", "--workers=0", "--batch-size=8", "--epochs=1", "--warmup-epochs=0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.rglob("ran"))
    config = json.loads((tmp_path / "run; touch ran" / "config.json").read_text())
    assert sorted(config["classes"]) == sorted(NAMES)
    result = invoke("eval", str(tmp_path / "run; touch ran"), "--workers=0")
    assert result.exit_code == 0 and not list(tmp_path.rglob("ran")), result.output


def test_nothing_is_imported_from_the_working_directory(tmp_path):
    """The installed command, as a script in another folder, with files of its libraries' names where it runs."""
    for name in ("yaml", "timm", "torch", "fastkd_kernels", "wandb", "tqdm", "safetensors", "jsonargparse", "json"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "fastkd"
    script.write_text("import sys\nfrom fastkd.__main__ import main\nsys.exit(main())\n")
    (tmp_path / "x.yaml").write_text("student: vit_tiny_patch16_224\nlr: 1e-3\n")
    environment = os.environ | {"PYTHONPATH": str(Path(job.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), "train", "--config", "x.yaml", "--teacher", "nothing", "--epochs", "0"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "--epochs: needs" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()


def test_temporary_files_follow_no_link(tmp_path):
    """In a folder that others can write to, a name that they have prepared is not written through."""
    (tmp_path / "theirs").write_text("kept")
    real = checkpoint.secrets.token_hex
    names = iter(["aa", "bb"])
    checkpoint.secrets.token_hex = lambda _: next(names)
    try:
        (tmp_path / ".x.png.aa.partial").symlink_to(tmp_path / "theirs")
        with pytest.raises(FileExistsError), checkpoint.replacing(tmp_path / "x.png") as partial:
            partial.write_text("ours")
        with checkpoint.replacing(tmp_path / "x.png") as partial:
            partial.write_text("ours")
    finally:
        checkpoint.secrets.token_hex = real
    assert (tmp_path / "theirs").read_text() == "kept" and (tmp_path / "x.png").read_text() == "ours"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o666 & ~umask
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {".x.png.aa.partial", "theirs", "x.png", "y.safetensors"}
