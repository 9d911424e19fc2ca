"""The tasks: every family of networks, what each loss is made of, and what timm, DDP and the compiler do with them."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from fastkd import capture, reference  # noqa: E402
from fastkd.losses import DKDLoss, NKDLoss, SoftTargetLoss  # noqa: E402
from fastkd.testing import relative_difference  # noqa: E402
from fastkd.train import InputError, mhca, models  # noqa: E402
from fastkd.train.clock import LossClock  # noqa: E402
from fastkd.train.tasks import TASKS, CIKDTask, ViTKDTask, create_task, task_options  # noqa: E402
from fastkd.train.tasks.cikd import _patient  # noqa: E402
from fastkd.train.tasks.layers import resized  # noqa: E402
from tests._support.runs import together  # noqa: E402

SIZE = 64  # 8 x 8 tokens in every family
VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
SWIN = {
    "img_size": SIZE,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 4),
    "num_heads": (2, 4),
    "drop_path_rate": 0.0,
}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "cait": ("cait_xxs24_224", VIT | {"depth": 5}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "cnn": ("resnet18", {"output_stride": 8, "channels": (8, 16, 16, 16), "stem_width": 8}),
}
IMAGES = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 0])


def build(family: str, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    name, arguments = FAMILIES[family]
    return timm.create_model(name, **({"num_classes": 3} | arguments | changes))


def teacher_of(name: str) -> nn.Module:
    """One that the task takes, wider and deeper than the student."""
    return build("cnn", 1) if name == "dearkd" else build("vit", 1, embed_dim=32, depth=6)


def student_of(name: str) -> nn.Module:
    return build("deit" if name == "dearkd" else "vit")


def gradients(task) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in task.trainable.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        error, size = (actual[name] - expected[name]).norm(), expected[name].norm()
        assert error <= bound * max(size, 1e-3), f"{name}: {error} of {size}"


# A step


@pytest.mark.parametrize("name", TASKS)
def test_task_trains_in_a_bare_loop(name):
    student, teacher = student_of(name), teacher_of(name)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    task = create_task(name, student, teacher, img_size=SIZE).train()
    assert student.training and not any(module.training for module in teacher.modules())
    optimizer = torch.optim.AdamW(task.trainable_parameters, 1e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(1)  # the same masks and rows
        result = task(IMAGES, TARGETS)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
    assert losses[-1] < losses[0]
    assert result["output"].shape == (4, 3)
    assert not any(value.requires_grad for key, value in result.items() if key != "loss")
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    without = {n for n, p in student.named_parameters() if p.grad is None}
    ends = ("blocks.3.attn.proj", "blocks.3.norm2", "blocks.3.mlp", "norm.", "head.")
    assert without == ({n for n, _ in student.named_parameters() if n.startswith(ends)} if name == "cikd" else set())


@pytest.mark.parametrize("logits", ["soft", "hard", "dkd", "nkd"])
@pytest.mark.parametrize("name", ["manifold", "vitkd", "dearkd", "cikd"])
def test_loss_is_the_weighted_sum_of_its_parts(name, logits):
    options = {"logits": logits, "task_weight": 0.3, "weight": 2.0, "logit_weight": 0.7}
    task = create_task(name, student_of(name), teacher_of(name), options=options).train()
    result = task(IMAGES, TARGETS)
    expected = 0.3 * result["task_loss"] + 2 * result[f"{name}_loss"] + 0.7 * result[f"{logits}_loss"]
    torch.testing.assert_close(result["loss"].detach(), expected)


@pytest.mark.parametrize(
    ("name", "weights", "rest"),
    [
        ("manifold+dkd", {"manifold": 1.0}, {"dkd": 1.0}),
        ("hard+manifold=2", {"manifold": 2.0}, {"hard": 0.5}),
        ("manifold=2+vitkd=0.5+cikd", {"manifold": 2.0, "vitkd": 0.5, "cikd": 1.0}, {}),
        ("dearkd=3+manifold", {"dearkd": 3.0, "manifold": 1.0}, {"hard": 0.5}),
        ("vitkd+cikd=0.1+nkd=0.7", {"vitkd": 1.0, "cikd": 0.1}, {"nkd": 0.7}),
    ],
)
def test_several_methods_are_the_weighted_sum_of_each(name, weights, rest):
    """The layers and values of each method alone; labels with the largest of the methods' weights, here 1."""
    student, teacher = build("vit"), build("vit", 1, embed_dim=32, depth=6)
    options = {"random": 0.0, "mask_ratio": 1.0}  # nothing is drawn

    def loss_of(method: str) -> tuple[Tensor, list[tuple[str, str]]]:
        torch.manual_seed(2)
        own = {key: value for key, value in options.items() if key in task_options(method)}
        task = create_task(method, student, teacher, options=own).train()
        return task(IMAGES, TARGETS), task.matched

    (together, matched), alone = loss_of(name), {method: loss_of(method) for method in {**weights, **rest}}
    expected = together["task_loss"]
    for method, weight in weights.items():
        if method not in ("vitkd", "dearkd"):  # whose projectors are drawn
            torch.testing.assert_close(together[f"{method}_loss"], alone[method][0][f"{method}_loss"])
        expected = expected + weight * together[f"{method}_loss"]
    for method, weight in rest.items():
        expected = expected + weight * together[f"{method}_loss"]
    torch.testing.assert_close(together["loss"].detach(), expected)
    assert matched == [pair for method in weights for pair in alone[method][1]]
    together["loss"].backward()


def test_weight_of_one_method():
    for name, key in (("manifold=2", "weight"), ("dkd=0.3", "logit_weight")):
        assert (
            create_task(name, build("vit"), build("vit", 1)).trainable.weights
            == create_task(
                name.partition("=")[0], build("vit"), build("vit", 1), options={key: float(name.partition("=")[2])}
            ).trainable.weights
        )


@pytest.mark.parametrize("mixed", [False, True])
def test_logit_losses_are_the_modules(mixed):
    student, teacher = build("vit").eval(), build("vit", 1).eval()
    target = F.one_hot(TARGETS, 3) * 0.7 + 0.1 if mixed else TARGETS
    s, t = student(IMAGES).detach(), teacher(IMAGES).detach()
    expected = {
        "soft": SoftTargetLoss(temperature=2.0)(s, t),
        "hard": F.cross_entropy(s, t.argmax(1)),
        "dkd": DKDLoss(alpha=1.0, beta=0.5, temperature=1.0)(s, t, TARGETS),
        "nkd": NKDLoss(gamma=1.5)(s, t, TARGETS),
    }
    options = {"soft": {"temperature": 2.0}, "hard": {}, "dkd": {"beta": 0.5}, "nkd": {"gamma": 1.5}}
    for name, value in expected.items():
        task = create_task(name, student, teacher, options={"logit_options": options[name]}).eval()
        torch.testing.assert_close(task(IMAGES, target)[f"{name}_loss"], value, msg=name)
        known = task(IMAGES, target, teacher_logits=t)
        torch.testing.assert_close(known[f"{name}_loss"], value, msg=name)


def test_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels():
    student, teacher = build("deit"), build("cnn")
    task = create_task("hard", student, teacher).train()
    result = task(IMAGES, TARGETS)
    of_class, of_distillation = student(IMAGES)
    torch.testing.assert_close(result["task_loss"], F.cross_entropy(of_class, TARGETS).detach())
    decisions = teacher(IMAGES).argmax(1)
    torch.testing.assert_close(result["hard_loss"], F.cross_entropy(of_distillation, decisions).detach())
    plain = create_task("none", student, None).train()
    assert plain(IMAGES, TARGETS)["output"].shape == (4, 3)  # the mean of both, as it is evaluated


def test_part_of_weight_zero_is_reported_and_trains_nothing():
    options = {"task_weight": 0.0, "logits": "soft", "random": 0.0}
    student, teacher = student_of("manifold"), teacher_of("manifold")
    task = create_task("manifold", student, teacher, options=options, criterion=lambda z, y: z.sum() * math.nan)
    result = task(IMAGES, TARGETS)
    result["loss"].backward()
    assert result["task_loss"].isnan() and result["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_layers_of_weight_zero_train_no_projector():
    task = create_task("vitkd", student_of("vitkd"), teacher_of("vitkd"), options={"weight": 0.0})
    result = task(IMAGES, TARGETS)
    result["loss"].backward()
    assert result["vitkd_loss"] > 0
    torch.testing.assert_close(result["loss"].detach(), result["task_loss"])
    assert all(p.grad is None for p in task.trainable.features.parameters())


def test_plain_stage_never_runs_the_teacher():
    task = create_task("none", build("vit"), nn.Identity())
    task.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    assert task(IMAGES, TARGETS).keys() == {"loss", "output", "task_loss"}


def test_networks_that_are_not_timms():
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
        for width in (8, 16)
    )
    task = create_task("manifold", student, teacher, img_size=SIZE, student_layers=["1"], teacher_layers=["1"])
    result = task(IMAGES, TARGETS)
    result["loss"].backward()
    assert result["intra"] > 0 and student[0].weight.grad.any()
    with pytest.raises(InputError, match="--img-size: Sequential does not tell the size"):
        create_task("manifold", student, teacher)


def test_weight_of_the_logit_loss_rises():
    task = create_task("dkd", build("vit"), build("vit", 1), options={"logit_ramp_epochs": 4})
    shares = []
    for epoch in (0, 1, 4, 9):
        task.set_epoch(epoch)
        result = task(IMAGES, TARGETS)
        shares.append(((result["loss"] - result["task_loss"]) / result["dkd_loss"]).item())
    assert shares == pytest.approx([0, 0.25, 1, 1], abs=1e-5)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"none"}))
def test_clock_runs_during_the_losses(name):
    clock = LossClock()
    task = create_task(name, student_of(name), teacher_of(name), clock=clock)
    result = task(IMAGES, TARGETS)
    forward = clock.total()
    result["loss"].backward()
    assert forward > 0 and clock.total() > 0


# What each loss is made of


def test_manifold_terms():
    student, teacher = build("vit").eval(), build("vit", 1, embed_dim=32).eval()
    task = create_task("manifold", student, teacher, student_layers=[-1], teacher_layers=["blocks.1"])
    result = task(IMAGES, TARGETS)
    s, t = (
        model.forward_intermediates(IMAGES, indices=[i], intermediates_only=True, output_fmt="NLC")[0]
        for model, i in ((student, 3), (teacher, 1))
    )
    for term in ("intra", "inter"):
        expected = reference.relation_loss(s.double(), t.double(), scope=term)
        torch.testing.assert_close(result[term].double(), expected.detach(), rtol=1e-5, atol=0)
    expected = 4 * result["intra"] + 0.1 * result["inter"] + 0.2 * result["random"]
    torch.testing.assert_close(result["manifold_loss"], expected)


def test_vitkd_takes_the_first_two_blocks_and_the_normed_last():
    student, teacher = build("vit").eval(), build("vit", 1, embed_dim=32, depth=6).eval()
    task = create_task("vitkd", student, teacher)
    assert task.matched == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1"), ("norm", "norm")]
    loss = task.trainable.features.loss
    assert not loss.mask_token.any()
    torch.manual_seed(3)
    result = task(IMAGES, TARGETS)
    low, high = [], []
    for model in (student, teacher):
        last = len(model.blocks) - 1
        first = model.forward_intermediates(IMAGES, indices=[0, 1], intermediates_only=True, output_fmt="NLC")
        normed = model.forward_intermediates(
            IMAGES, indices=[last], intermediates_only=True, output_fmt="NLC", norm=True
        )
        low.append(torch.stack(first, 1).detach())
        high.append(normed[0].detach())
    torch.manual_seed(3)
    torch.testing.assert_close(result["vitkd_loss"], loss(*low, *high).detach())


def test_dearkd_takes_the_first_stages_after_the_stem():
    student, teacher = build("deit").eval(), build("cnn", output_stride=32).eval()
    task = create_task("dearkd", student, teacher)
    assert task.matched == [("blocks.0", "layer1"), ("blocks.1", "layer2")]
    result = task(IMAGES, TARGETS)
    tokens = student.forward_intermediates(IMAGES, indices=[0, 1], intermediates_only=True, output_fmt="NLC")
    maps = teacher.forward_intermediates(IMAGES, indices=[1, 2], intermediates_only=True)
    assert [x.shape[-1] for x in maps] == [16, 8]
    expected = task.trainable.features.loss(tokens, [x.detach() for x in maps])
    torch.testing.assert_close(result["dearkd_loss"], expected.detach())


@pytest.mark.parametrize("heads", [2, 4])
def test_cikd_compares_the_attention_maps(heads):
    """Against the softmaxes written out, as many in the student as the teacher has heads."""
    student, teacher = (
        build("vit").double().eval(),
        build("vit", 1, embed_dim=32, depth=6, num_heads=heads).double().eval(),
    )
    task = create_task("cikd", student, teacher, teacher_layers=[0, 3])
    images = IMAGES.double()
    maps: list[list[tuple[Tensor, Tensor]]] = []
    for model, layers in ((student, (0, 3)), (teacher, (0, 3))):
        own = []
        handles = [
            model.blocks[i].attn.qkv.register_forward_hook(lambda _, args, out, own=own: own.append(out))
            for i in layers
        ]
        model(images)
        [handle.remove() for handle in handles]
        pairs = []
        for out in own:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in out.chunk(3, -1))
            scale = q.shape[3] ** -0.5
            pairs.append(((q @ k.mT * scale).softmax(-1), (v @ v.mT * scale).softmax(-1)))
        maps.append(pairs)
    expected = sum(
        (t * (t.log() - s.log())).sum(-1).mean()
        for own, theirs in zip(*maps, strict=True)
        for s, t in zip(own, theirs, strict=True)
    )
    torch.testing.assert_close(task(images, TARGETS)["cikd_loss"], expected.detach())


def test_cikd_takes_relation_heads_that_divide():
    student, teacher = build("vit"), build("vit", 1, embed_dim=40, num_heads=5)  # 24 and 40 wide
    assert create_task("cikd", student, teacher).trainable.features.heads == [4, 4]
    result = create_task("cikd", student, teacher)(IMAGES, TARGETS)
    assert result["cikd_loss"] > 0


@pytest.mark.parametrize(
    ("width", "depth", "block"), [(384, 12, 10), (768, 12, 7), (1024, 24, 17), (192, 12, 7), (768, 5, 3)]
)
def test_cikd_teacher_block(width, depth, block):
    teacher = nn.Module()
    teacher.embed_dim, teacher.blocks = width, nn.Sequential(*(nn.MultiheadAttention(2, 1) for _ in range(depth)))
    assert _patient(teacher) == [0, block]


def test_swin_pair_compares_windows_with_their_bias():
    student, teacher = build("swin"), build("swin", 1)
    with torch.no_grad():
        for model in (student, teacher):
            for name, p in model.named_parameters():
                if "relative_position_bias_table" in name:
                    p.normal_()
    task = CIKDTask(student, teacher, student_layers=[1], teacher_layers=[1])
    result = task(IMAGES, TARGETS)
    with capture.qkv(student, [1]) as s, capture.qkv(teacher, [1]) as t, torch.no_grad():
        student(IMAGES)
        teacher(IMAGES)
        own, theirs = s[0], t[0]
    assert own.bias is not None
    log_s, log_t = ((x.q @ x.k.mT * x.scale + x.bias).log_softmax(-1) for x in (own, theirs))
    torch.testing.assert_close(result["qk"], (log_t.exp() * (log_t - log_s)).sum(-1).mean())
    result["loss"].backward()
    assert student.layers[0].blocks[1].attn.relative_position_bias_table.grad.any()


# Families, depths, layers


FITS = {
    "manifold": {(s, t) for s in ("vit", "deit", "cait", "swin") for t in FAMILIES},
    "vitkd": {(s, t) for s in ("vit", "deit", "cait", "swin") for t in ("vit", "deit", "cait", "swin", "cnn")},
    "dearkd": {(s, t) for s in ("vit", "deit", "cait", "swin") for t in FAMILIES},
    "cikd": {("vit", "vit"), ("deit", "deit"), ("swin", "swin")},
}
REASONS = {
    "cait": "mixes heads around the softmax",
    "cnn": "has no softmax attention over tokens",
    "grids": "attention maps of student and teacher must agree in windows and tokens",
}


@pytest.mark.parametrize("teacher", FAMILIES)
@pytest.mark.parametrize("student", ["vit", "deit", "cait", "swin"])
def test_every_family_works_or_says_why(student, teacher):
    for name, fits in FITS.items():
        networks = build(student), build(teacher, 1)
        if (student, teacher) in fits:
            result = create_task(name, *networks)(IMAGES, TARGETS)
            result["loss"].backward()
            assert result["loss"].isfinite() and result[f"{name}_loss"] > 0, name
        else:
            reason = next((REASONS[kind] for kind in ("cait", "cnn") if kind in (student, teacher)), REASONS["grids"])
            with pytest.raises(InputError, match=reason):
                create_task(name, *networks)


def test_vitkd_in_a_staged_network_takes_the_stage_of_the_others_grid():
    assert create_task("vitkd", build("vit"), build("swin")).matched == [
        ("blocks.0", "layers.1.blocks.0"), ("blocks.1", "layers.1.blocks.1"), ("norm", "layers.1.blocks.3"),
    ]  # fmt: skip
    with pytest.raises(
        InputError, match=r"--teacher-layers: ViTKD needs two low layers and a high one.*layer2 \(64 tok"
    ):
        ViTKDTask(build("vit"), build("cnn"), teacher_layers=["layer2", "layer3"])


def test_default_layers_for_any_depth():
    shallow, deep = build("vit", depth=2), build("vit", depth=10)
    assert [s for s, _ in create_task("manifold", shallow, deep).matched] == ["blocks.0", "blocks.1"]
    assert [t for _, t in create_task("manifold", shallow, deep).matched] == ["blocks.0", "blocks.9"]
    assert create_task("cikd", shallow, deep).matched == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.6")]


@pytest.mark.parametrize("name", ["manifold", "vitkd"])
def test_grids_are_interpolated_when_asked_only(name):
    student, teacher = build("vit"), build("vit", 1, patch_size=16)
    with pytest.raises(InputError, match="token grids of student and teacher must agree"):
        create_task(name, student, teacher)
    task = create_task(name, student, teacher, options={"interpolate": True})
    result = task(IMAGES, TARGETS)
    result["loss"].backward()
    assert result[f"{name}_loss"] > 0


def test_interpolated_tokens():
    ramp = torch.arange(64.0).view(1, 64, 1)

    def resize(x: Tensor, of: tuple[int, int], to: tuple[int, int]) -> Tensor:
        return resized([x], [(to, of)])[0]

    assert resize(ramp, (8, 8), (8, 8)) is ramp
    half, double = resize(ramp, (8, 8), (4, 4)), resize(ramp, (8, 8), (16, 16))
    assert half.shape == (1, 16, 1) and double.shape == (1, 256, 1)
    rows = half.view(4, 4)
    torch.testing.assert_close(rows[2] - rows[1], torch.full((4,), 16.0))  # away from the border
    torch.testing.assert_close(resize(torch.ones(2, 64, 3), (4, 16), (7, 7)), torch.ones(2, 49, 3))
    with pytest.raises(InputError, match="square grid of tokens, got 50"):
        models.grid_of(build("vit"), models.Layer("layer", 50, 1), SIZE)


def test_blank_image_leaves_modes_alone():
    teacher = build("cnn").train()
    teacher.bn1.eval()
    models.layers_of("teacher", teacher, None, SIZE)
    assert teacher.training and teacher.layer1.training and not teacher.bn1.training


@pytest.mark.parametrize(
    ("name", "student", "teacher", "given", "words"),
    [
        ("unheard", "vit", "vit", {}, "--task: needs one of none, manifold, .*'unheard'"),
        ("manifold", "vit", "vit", {"options": {"alpha": 1}}, "manifold has no option alpha; it has .*num_samples"),
        ("soft", "vit", "vit", {"options": {"logits": "softer"}}, "needs one of soft, hard, dkd, nkd or None"),
        ("dkd", "vit", "vit", {"options": {"logit_options": {"gamma": 1}}}, "logit_options of 'dkd': .*gamma"),
        ("none", "vit", "vit", {"options": {"task_weight": 0}}, "nothing would be trained"),
        ("dkd", "vit", None, {}, "--teacher: DKDTask needs one"),
        ("manifold", "vit", "vit", {"student_layers": [0, 1], "teacher_layers": [0]}, "pair up, got 2 and 1"),
        ("cikd", "vit", "vit", {"student_layers": [0]}, "pair up, got 1 and 2"),
        ("dearkd", "vit", "cnn", {"student_layers": ["blocks.7"]}, "--student-layers: .*blocks.7.*blocks.0"),
        ("vitkd", "vit", "vit", {"img_size": 40}, "--img-size: the student refuses 40 px"),
        ("cikd", "vit", "vit", {"options": {"relation_heads": 5}}, "relation_heads: 5 do not divide the width 24"),
        ("cikd", "swin", "swin", {"options": {"relation_heads": 4}}, "a bias for each of its 2 heads"),
        ("cikd", "deit", "vit", {}, r"blocks.0 \(66 tokens\) in the student, blocks.0 \(65 tokens\)"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(name, student, teacher, given, words):
    with pytest.raises(InputError, match=words):
        create_task(name, build(student), None if teacher is None else build(teacher), **given)


def test_class_counts_that_differ():
    with pytest.raises(InputError, match="the student has 3, the teacher 1000"):
        create_task("soft", build("vit"), build("vit", num_classes=1000))
    create_task("manifold", build("vit"), build("vit", num_classes=1000))(IMAGES, TARGETS)


def test_known_teacher_logits_cannot_replace_its_layers():
    with pytest.raises(ValueError, match="only where no layers are compared"):
        create_task("manifold", build("vit"), build("vit"))(IMAGES, TARGETS, teacher_logits=torch.zeros(4, 3))


def test_teachers_fused_attention_is_on():
    teacher = build("swin")
    windows = [m for m in teacher.modules() if hasattr(m, "fused_attn")]
    assert windows and not any(m.fused_attn for m in windows)
    expected = teacher.eval()(IMAGES)
    create_task("soft", build("vit"), teacher)
    assert all(m.fused_attn for m in windows)
    torch.testing.assert_close(teacher(IMAGES), expected)


@pytest.mark.parametrize("name", TASKS)
def test_options_and_their_defaults(name):
    options = task_options(name)
    assert options["logit_ramp_epochs"] == 0
    task = create_task(name, student_of(name), teacher_of(name), options=options)
    same = create_task(name, student_of(name), teacher_of(name))
    assert task.trainable.weights == same.trainable.weights
    assert str(task.trainable.features) == str(same.trainable.features)


# Students with MHCA


MHCA = ("deit_tiny_mhca_patch16_224", VIT | {"mhca_blocks": 2})


def test_convolutional_attention_looks_where_its_centre_is():
    attention = mhca.ConvolutionalAttention(12, 3, (3, 4), 2)
    with torch.no_grad():
        attention.sharpness.copy_(torch.tensor([0.5, 1.0, 2.0]))
        attention.centre[0] = torch.tensor([1.0, -2.0])
    bias = attention.bias()
    assert bias.shape == (1, 3, 14, 14)
    assert not bias[:, :, :2].any() and not bias[:, :, :, :2].any()
    query, key = (0, 3), (2, 1)  # row, column: two down, two to the left
    expected = -0.5 * ((2 - 1) ** 2 + (-2 + 2) ** 2)
    assert bias[0, 0, 2 + 4 * query[0] + query[1], 2 + 4 * key[0] + key[1]] == expected
    centres = mhca.ConvolutionalAttention(8, 4, (2, 2), 0).centre.tolist()
    assert centres == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    with pytest.raises(ValueError, match="takes no mask"):
        attention(torch.randn(1, 14, 12), attn_mask=bias)


def test_convolutional_attention_without_places_is_timms():
    plain = build("deit").eval()
    name, arguments = MHCA
    convolutional = timm.create_model(name, num_classes=3, **arguments).eval()
    missing, unexpected = convolutional.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and {key.rpartition(".")[2] for key in missing} == {"sharpness", "centre"}
    with torch.no_grad():
        for block in convolutional.blocks[:2]:
            block.attn.sharpness.zero_()
        torch.testing.assert_close(convolutional(IMAGES), plain(IMAGES))


def test_mhca_student_learns_its_centres_and_is_timms_again(tmp_path):
    name, arguments = MHCA
    student = timm.create_model(name, num_classes=3, **arguments)
    task = create_task("dearkd", student, build("cnn", 1)).train()
    task(IMAGES, TARGETS)["loss"].backward()
    for block in student.blocks[:2]:
        assert block.attn.centre.grad.any() and block.attn.sharpness.grad.any()
    assert "blocks.1.attn.centre" in student.no_weight_decay()
    torch.save(student.state_dict(), tmp_path / "student.pth")
    again = timm.create_model(name, num_classes=3, checkpoint_path=tmp_path / "student.pth", **arguments)
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES), student.eval()(IMAGES))


# timm's hooks, checkpoints, export


@pytest.mark.parametrize("name", ["vitkd", "dearkd", "manifold"])
def test_checkpoint_holds_the_student_and_apart_from_it_the_projectors(name):
    task = create_task(name, student_of(name), teacher_of(name))
    state = task.get_checkpoint_state()
    assert state["state_dict"].keys() == student_of(name).state_dict().keys()
    assert ("task_state" in state) == (name != "manifold")
    other = create_task(name, build("deit" if name == "dearkd" else "vit", 5), teacher_of(name))
    other.load_checkpoint_state(copy.deepcopy(state["state_dict"]), copy.deepcopy(state.get("task_state")))
    for task_ in (task, other):
        torch.manual_seed(0)
        task_(IMAGES, TARGETS)["loss"].backward()
    assert_same(gradients(other), gradients(task), 0)
    assert task.get_eval_model() is task.network


def test_optimiser_sees_timms_groups():
    from timm.optim import create_optimizer_v2

    task = create_task("vitkd", student_of("vitkd"), teacher_of("vitkd"))
    optimizer = create_optimizer_v2(task.trainable_module, opt="adamw", weight_decay=0.05, layer_decay=0.5)
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    assert count == len(task.trainable_parameters) == len(task.get_clip_parameters())
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(task.network.pos_embed)] < scale[id(task.network.head.weight)] == 1
    assert scale[id(task.trainable.features.loss.mask_token)] == 1
    assert decay[id(task.network.pos_embed)] == 0 and decay[id(task.network.head.weight)] == 0.05
    assert len(task.get_clip_parameters(exclude_head=True)) == count - 2


def test_average_is_of_the_student_alone():
    task = create_task("vitkd", student_of("vitkd"), teacher_of("vitkd"))
    task.setup_ema(decay=0.5)
    before = task.network.head.weight.clone()
    with torch.no_grad():
        task.network.head.weight.add_(1)
    task.update_ema()
    average = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert average.keys() == task.network.state_dict().keys()
    torch.testing.assert_close(average["head.weight"], before + 0.5)


@pytest.mark.parametrize("name", ["manifold", "vitkd", "dearkd", "cikd", "dkd"])
def test_activation_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        student = student_of(name)
        student.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        task = create_task(name, student, teacher_of(name)).train()
        torch.manual_seed(2)
        task(IMAGES, TARGETS)["loss"].backward()
        found.append(gradients(task))
    assert_same(*found)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("manifold", marks=pytest.mark.exhaustive),
        "vitkd",
        pytest.param("cikd", marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_networks_give_the_same_gradients(name):
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(2)
        task = create_task(name, build("vit", depth=2), build("vit", 1, depth=3)).train()
        names = task.network.state_dict().keys()
        if compiled:
            task.compile(backend=counter)
        for _ in range(2):
            torch.manual_seed(2)
            task.zero_grad()
            task(IMAGES, TARGETS)["loss"].backward()
            assert counter.frame_count == (2 if compiled else 0)  # a network each, none in the second step
        assert task.network.state_dict().keys() == names
        # Compiled, what gets no gradient gets zeros.
        found.append({n: g for n, g in gradients(task).items() if g.any()})
    torch._dynamo.reset()
    assert_same(*found)


def test_stages_compile_anew():
    """A network compiled without a task's hooks would go on without them."""
    student, teacher = build("vit", depth=1), build("vit", 1, depth=1)
    losses = []
    for name in ("none", "manifold", "none"):
        task = create_task(name, student, teacher).train()
        task.compile(backend="eager")
        result = task(IMAGES, TARGETS)
        result["loss"].backward()
        losses.append(result["task_loss"].item())
    assert losses == pytest.approx(losses[:1] * 3)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["manifold", "vitkd", "dearkd", "cikd", "dkd"])
def test_autocast_stays_near_float32(name):
    found = []
    for enabled in (False, True):
        torch.manual_seed(2)
        task = create_task(name, student_of(name), teacher_of(name)).train()
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = task(IMAGES, TARGETS)
        result["loss"].backward()
        assert result["loss"].dtype == torch.float32
        found.append(torch.cat([g.flatten() for g in gradients(task).values()]))
    assert relative_difference(*reversed(found)) < 0.1  # of the networks' 8 bits, not of the losses


# Two processes


def _global_step(name: str, group: "dist.ProcessGroup | None", images: Tensor, targets: Tensor):
    # Masks and rows that are drawn would differ from those of one process.
    drawn = {"manifold": {"random": 0.0}, "vitkd": {"mask_ratio": 1.0}, "manifold+cikd=2+dkd": {"random": 0.0}}
    options = drawn.get(name, {})
    torch.manual_seed(2)
    task = create_task(name, student_of(name), teacher_of(name), process_group=group, options=options).train()
    if group is not None:
        task.prepare_distributed()
    for _ in range(2):  # DDP finds in the second what it missed in the first
        task.zero_grad()
        result = task(images, targets)
        result["loss"].backward()
    return task, result


def _rank() -> None:
    dist.init_process_group("gloo")
    try:
        own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        for name in (*TASKS, "manifold+cikd=2+dkd"):
            alone, _ = _global_step(name, None, IMAGES, TARGETS)
            shared, result = _global_step(name, dist.group.WORLD, IMAGES[own], TARGETS[own])
            assert result["loss"].isfinite()
            assert_same(gradients(shared), gradients(alone), 1e-4)
            assert shared.network.state_dict().keys() == alone.network.state_dict().keys(), name
            with shared.no_sync():
                shared(IMAGES[own], TARGETS[own])["loss"].backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_two_processes_give_the_gradients_of_one():
    together(2, _rank)
