"""Students and teachers as people have them: checkpoints, folders, hubs out of reach, and networks of other grids."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from safetensors.torch import load_file, save_file  # noqa: E402

from fastkd import capture  # noqa: E402
from fastkd.train import InputError, job, models  # noqa: E402
from fastkd.train.settings import Settings, read_settings  # noqa: E402
from fastkd.train.tasks import create_task  # noqa: E402
from tests._support.runs import invoke  # noqa: E402

VIT = "vit_tiny_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
CNN = {"channels": (8, 8, 8, 8), "stem_width": 8}


def vit(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(VIT, **({"img_size": 32, "num_classes": 3} | SMALL | changes))


def small(folder: Path, out: Path, **changes) -> Settings:
    settings = {
        "data": str(folder), "out": str(out), "img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu",
        "student": VIT, "student_args": SMALL, "task": "none", "epochs": 1, "warmup_epochs": 0, "baseline": False,
    }  # fmt: skip
    return Settings(**(settings | changes))


# Checkpoints


def renamed(tensors: dict, prefix: str) -> dict:
    return {f"{prefix}{key}": x for key, x in tensors.items()}


def test_prefixes_of_frameworks(tmp_path, capsys):
    """Of DDP, of compiled models, of Lightning, of a backbone beside a projector, of any other."""
    weights = vit(1).state_dict()
    files = {
        "module.": renamed(weights, "module."),
        "lightning": {"state_dict": renamed(weights, "model."), "optimizer_states": []},
        "nested": {"model": renamed(weights, "student.backbone.")},
        "projector": {**renamed(weights, "backbone."), "projector.0.weight": torch.zeros(2)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        model = vit()
        models.load_weights("teacher", model, VIT, str(tmp_path / name))
        assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items()), name
    told = "--teacher-checkpoint: took the weights below 'backbone.', left out 1, such as projector.0.weight"
    assert capsys.readouterr().err.strip() == told


def test_checkpoints_that_do_not_fit_say_what_would(tmp_path):
    weights, model = vit(1).state_dict(), vit()
    torch.save(vit(1), tmp_path / "whole.pth")
    torch.save({**renamed(weights, "student."), **renamed(weights, "teacher.")}, tmp_path / "two.pth")
    torch.save({key: x for key, x in weights.items() if "head" not in key}, tmp_path / "bare.pth")
    save_file({"vit.embeddings.cls_token": torch.zeros(1, 1, 16)}, tmp_path / "theirs.safetensors")
    save_file(vit(num_classes=7).state_dict(), tmp_path / "other.safetensors")
    cases = {
        "whole.pth": r"holds pickled objects, .*s.save_model\(torch.load\('.*whole.pth', .*'whole.safetensors'\)",
        "two.pth": "holds several networks, below '(student|teacher).' and '(student|teacher).'; save one",
        "bare.pth": r"has no head \(head.bias, head.weight\); load it by num_classes=0",
        "other.safetensors": f"does not fit {VIT}: .*size mismatch for head",
        "theirs.safetensors": "has the names of a transformers model; give its folder, --teacher local-dir:FOLDER",
        "none.pth": "is not a file",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=f"--teacher-checkpoint: .*{words}"):
            models.load_weights("teacher", model, VIT, str(tmp_path / name))
    models.load_weights("teacher", vit(num_classes=0), VIT, str(tmp_path / "bare.pth"))


def test_student_starts_from_a_checkpoint(folder, tmp_path, monkeypatch, capsys):
    """Its head is new where its classes differ; the path may be relative; a resume works from another folder."""
    save_file(vit(1, num_classes=7, img_size=64).state_dict(), tmp_path / "student.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    settings = small(folder, tmp_path / "run", student_checkpoint="student.safetensors", lr=0.0, epochs=2)
    job.train(settings)
    assert "--student-checkpoint: the head is new, with 3 classes" in capsys.readouterr().err
    given, trained = load_file("student.safetensors"), load_file("run/student.safetensors")
    kept = [key for key in given if "head" not in key and key != "pos_embed"]  # which is resized from 64 px
    assert all(torch.equal(given[key], trained[key]) for key in kept) and len(kept) > 30
    assert os.path.isabs(read_settings(tmp_path / "run" / "config.yaml").student_checkpoint)
    for key, words in (("checkpoint_path", "--student-checkpoint"), ("pretrained", "--student-pretrained")):
        with pytest.raises(InputError, match=f"--student-arg: {key} is an option of its own, {words}"):
            job.train(small(folder, tmp_path / "no", student_args=SMALL | {key: "student.safetensors"}))


# Folders and hubs


def test_timm_folder_is_a_model(folder, tmp_path, monkeypatch):
    """`local-dir:` as timm writes it, for a student and a teacher, also by a relative path."""
    model = vit(1)
    (tmp_path / "mine").mkdir()
    args = {"img_size": 32, **SMALL}
    config = {"architecture": VIT, "num_classes": 3, "model_args": args, "pretrained_cfg": model.pretrained_cfg}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config, default=str))
    save_file(model.state_dict(), tmp_path / "mine" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    options = {"student": "local-dir:mine", "student_args": {}, "student_pretrained": True, "lr": 0.0}
    options |= {"teacher": "local-dir:mine", "teacher_pretrained": True, "teacher_epochs": 0, "task": "soft"}
    summary = job.train(small(folder, tmp_path / "run", **options))
    trained = load_file("run/student.safetensors")
    assert all(torch.equal(trained[key], x) for key, x in model.state_dict().items())
    assert summary["results"][0]["top1"] == summary["results"][1]["top1"]  # of teacher and student
    assert read_settings(tmp_path / "run" / "config.yaml").student == f"local-dir:{tmp_path / 'mine'}"
    for name, words in (("local-dir:none", "config.json"), ("hub:x/y", "source 'hub'"), ("a/b", "hf-hub:a/b")):
        with pytest.raises(InputError, match=f"--teacher: .*{words}"):
            models.create_model("teacher", name, {}, num_classes=3, img_size=32)


def transformers_models() -> dict:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    common |= {"image_size": 32, "patch_size": 8}
    return {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**common, num_labels=3)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**common)),
        "dinov3": transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**common, num_register_tokens=4)),
        "siglip": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**common)),
    }


def test_transformers_folder_is_a_teacher(folder, tmp_path):
    for name, model in transformers_models().items():
        model.eval().save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3]}')
        teacher, args = models.create_model(
            "teacher", f"local-dir:{tmp_path / name}", {}, num_classes=3, img_size=32, pretrained=True
        )
        assert args == {"num_classes": 3 if name == "vit" else 0} and teacher.pretrained_cfg["mean"] == (0.5, 0.4, 0.3)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad(), capture.tokens(teacher, [0, -1]) as tokens, capture.tokens(model, [0, -1]) as own:
            logits = teacher.eval()(images)
            expected = model(images)
        assert tokens[1].shape == (2, 16, 24) and torch.equal(tokens[1], own[1])
        assert torch.equal(logits, expected.logits if name == "vit" else expected.pooler_output)
        task = create_task("manifold", vit(), teacher, img_size=32)
        assert len(task.matched) == 3 and task(images, torch.tensor([0, 1]))["loss"].isfinite()
    options = {"teacher": f"local-dir:{tmp_path / 'dinov3'}", "teacher_pretrained": True, "teacher_epochs": 0}
    assert job.train(small(folder, tmp_path / "run", task="manifold", **options))["results"][0]["top1"] is None
    with pytest.raises(InputError, match=r"--student: .*can only be a teacher"):
        job.train(small(folder, tmp_path / "no", student=f"local-dir:{tmp_path / 'vit'}", student_args={}))


def test_without_network_and_cache_there_is_one_clear_message(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for option in (
        "--student-pretrained",
        "--teacher=resnet18 --teacher-pretrained",
        "--student=hf-hub:timm/resnet18.a1",
    ):
        began = time.monotonic()
        result = invoke("train", "--device=cpu", *option.split())
        assert time.monotonic() - began < 5
        role = "teacher" if "teacher" in option else "student"
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
        assert f"--{role}: timm cannot make" in result.stderr
        assert "not in the cache, and the hub cannot be reached" in result.stderr


# Sizes and grids


def test_size_that_is_no_multiple_of_the_patch_says_what_it_loses(folder, tmp_path, capsys):
    job.train(small(folder, tmp_path / "run", img_size=(36, 44)))
    told = "--img-size: 32 x 40 of 36x44 px are seen by the patches of 8 x 8 px of the student"
    assert told in capsys.readouterr().err
    assert models.uncovered(vit(), 32) is None and models.uncovered(timm.create_model("resnet18", **CNN), 33) is None


def test_cnn_learns_from_a_vit_of_another_grid(folder, tmp_path):
    """DINOv3 with patches of 16 px, and patches that fit no stage: the option that resizes is named, and works."""
    torch.manual_seed(0)
    dino = timm.create_model("vit_small_patch16_dinov3", embed_dim=24, depth=4, num_heads=2)
    odd = vit(img_size=56, patch_size=14)  # 4 x 4 tokens; the CNN has 14, 7, 4 and 2 a side
    student = timm.create_model("resnet18", num_classes=3, **CNN)
    assert create_task("manifold", student, dino, img_size=64).matched == [("layer3", "blocks.3")]
    assert create_task("manifold", student, odd, img_size=56).matched == [("layer3", "blocks.2")]
    odd = vit(img_size=56, patch_size=8)  # 7 x 7: layer2
    assert create_task("manifold", student, odd, img_size=56).matched == [("layer2", "blocks.2")]
    odd = vit(img_size=60, patch_size=12)  # 5 x 5, and 15, 8, 4, 2
    with pytest.raises(InputError, match="--task-arg interpolate=True"):
        create_task("manifold", student, odd, img_size=60)
    task = create_task("manifold", student, odd, img_size=60, options={"interpolate": True})
    assert task.matched == [("layer3", "blocks.2")]  # the nearest grid, not the stem's 900 tokens
    task.train()(torch.randn(2, 3, 60, 60), torch.tensor([0, 1]))["loss"].backward()
    assert student.layer3[1].bn2.weight.grad.abs().sum() > 0
    # One command.
    weights = tmp_path / "dino.safetensors"
    save_file(dino.state_dict(), weights)
    result = invoke(
        "train", f"--data={folder}", f"--out={tmp_path / 'run'}", "--device=cpu", "--img-size=64", "--student=resnet18",
        "--student-arg=channels=(8,8,8,8)", "--student-arg=stem_width=8", "--teacher=vit_small_patch16_dinov3",
        *(f"--teacher-arg={pair}" for pair in ("embed_dim=24", "depth=4", "num_heads=2", "num_classes=0")),
        f"--teacher-checkpoint={weights}", "--epochs=1", "--batch-size=8", "--workers=0", "--no-baseline",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["matched"] == [[["layer3", "blocks.3"]]]
