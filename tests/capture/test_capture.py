"""What capture collects, checked against the models themselves: their intermediates, hooks and unfused maps."""

import contextlib
import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import bn_stat_loss, capture
from fastkd.functional import resize_tokens

timm = pytest.importorskip("timm", reason="capture is checked on timm's models")
from timm.layers import set_reentrant_ckpt  # noqa: E402

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0}
VIT = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit_small": ("vit_tiny_patch16_224", VIT | {"depth": 2}),
    "vit_qk_norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True, "reg_tokens": 3}),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "eva": ("eva02_tiny_patch14_224", VIT | {"img_size": 28}),
    "cait": ("cait_xxs24_224", VIT | {"num_heads": 4}),
    "xcit": ("xcit_nano_12_p16_224", VIT | {"depth": 2, "num_heads": 4}),
    "convit": ("convit_tiny", VIT | {"num_heads": 4, "local_up_to_layer": 1}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin_small": (
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": 32, "depths": (2,), "num_heads": (2,)},
    ),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = MODELS[kind]
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "relative_position_bias_table" in parameter_name or "_norm." in parameter_name:
                parameter.normal_()  # as initialised they would hide a bias or norm that is left out
    return model


def images_for(model: nn.Module) -> Tensor:
    size = getattr(getattr(model, "patch_embed", None), "img_size", (32, 32))
    return F.interpolate(IMAGES, size=size)


def tokens_of(model: nn.Module, x: Tensor, block: int | str, **arguments: object) -> Tensor:
    with capture.tokens(model, [block], **arguments) as captured:
        model(x)
        return captured[0]


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def assert_clean(model: nn.Module) -> None:
    assert hooks_of(model) == 0
    assert torch._C._len_torch_function_stack() == 0


# tokens


@pytest.mark.parametrize("kind", ["vit", "vit_qk_norm", "deit", "eva", "cait", "resnet", "convnext"])
def test_tokens_are_the_models_intermediates_row_major(kind):
    model = build(kind)
    images = images_for(model)
    indices = [2, 0] if kind != "resnet" else [4, 1]
    with torch.no_grad(), capture.tokens(model, indices) as captured:
        model(images)
        found = list(captured)
        maps = model.forward_intermediates(images, indices=sorted(indices), intermediates_only=True, output_fmt="NCHW")
    assert len(found) == len(captured) == 2
    for x, grid in zip(found, reversed(maps), strict=True):
        b, d, h, w = grid.shape
        assert x.shape == (b, h * w, d)
        for row in range(h):
            for column in range(w):
                assert torch.equal(x[:, row * w + column], grid[:, :, row, column])


def test_swin_stages_and_blocks_are_row_major():
    model = build("swin")
    with torch.no_grad(), capture.tokens(model, ["layers.0", "layers.1", -1, 0]) as captured:
        model(images_for(model))
        first, last, block, _ = captured
        assert captured.names == ("layers.0", "layers.1", "layers.1.blocks.1", "layers.0.blocks.0")
        maps = model.forward_intermediates(images_for(model), indices=[0, 1], intermediates_only=True)
        assert torch.equal(first, maps[0].flatten(2).transpose(1, 2))
        assert torch.equal(last, maps[1].flatten(2).transpose(1, 2))
        assert torch.equal(block, last)
    assert first.shape == (2, 16 * 16, 24)


@pytest.mark.parametrize(("kind", "count"), [("vit", 1), ("vit_qk_norm", 4), ("deit", 2), ("eva", 1), ("cait", 0)])
def test_prefix_tokens(kind, count):
    model = build(kind)
    patches = 4
    seen = {}
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.update(output=output))
    for prefix, dropped in (("drop", count), ("keep", 0), (1, 1)):
        with torch.no_grad(), capture.tokens(model, [1], prefix) as captured:
            model(images_for(model))
            assert captured[0].shape[1] == patches + count - dropped
            assert torch.equal(captured[0], seen["output"][:, dropped:])
    with torch.no_grad(), capture.tokens(model, ["patch_embed"]) as captured:
        model(images_for(model))
        assert captured[0].shape[1] == patches


@pytest.mark.parametrize(
    ("kind", "joined"),
    [
        ("cait", {"blocks.1": False, "blocks.2": False}),
        ("xcit", {"blocks.0": False, "blocks.1": False, "cls_attn_blocks.0": True, "cls_attn_blocks.1": True}),
        ("convit", {"blocks.0": False, "blocks.1": True, "blocks.2": True}),
    ],
)
def test_a_class_token_that_joins_late_is_dropped_from_there_on(kind, joined):
    """Every block keeps all four of its patches, whether or not a class token leads them."""
    model = build(kind)
    seen = {}
    for name in joined:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
    with torch.no_grad(), capture.tokens(model, list(joined)) as captured:
        model(images_for(model))
        for name, has_class_token in joined.items():
            assert seen[name].shape[1] == 4 + has_class_token
            assert torch.equal(captured[name], seen[name][:, int(has_class_token) :])


def test_of_nested_models_the_inner_one_tells():
    """A wrapper with prefix tokens and a layout of its own around models of other families."""
    model = nn.ModuleDict({"vit": build("vit_qk_norm"), "distilled": build("deit"), "maps": Plain(nn.Identity())})
    model.num_prefix_tokens, model.output_fmt = 1, "NCHW"
    model["maps"].output_fmt = "NHWC"
    model["maps"].body.num_heads = 2
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad(), capture.tokens(model, ["vit.blocks.1", "distilled.blocks.1", "maps.body"]) as captured:
        model["vit"](IMAGES)
        model["distilled"](IMAGES)
        model["maps"](x)
        assert [captured[i].shape[1] for i in (0, 1)] == [4, 4]
        assert torch.equal(captured[2], x.flatten(1, 2))


class Repeats(nn.Module):
    """Runs its only layer as many times as asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.other = layer, nn.Identity()

    def forward(self, x: Tensor, runs: int = 2) -> Tensor:
        for _ in range(runs):
            x = self.layer(x)
        return self.other(x)


@pytest.mark.parametrize("grab", ["tokens", "bn_inputs", "fused"])
def test_of_a_module_that_runs_twice_the_last_run_stays(grab):
    """A later pass that skips the module leaves nothing to read."""
    model = Repeats(nn.BatchNorm2d(3)).eval()
    model.layer.running_mean.fill_(1.0)
    seen = []
    model.layer.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    enter = capture.tokens(model, ["layer"]) if grab == "tokens" else capture.bn_inputs(model, fused=grab == "fused")
    with enter as captured:
        for runs in (2, 1, 3):
            model(IMAGES, runs)
            before, after = seen[-1]
            if grab == "tokens":
                assert torch.equal(captured[0], after.flatten(2).mT)
            else:
                assert torch.equal(captured.inputs[0], before)
        model(IMAGES, 0)
        with pytest.raises(RuntimeError, match=r"layer did not run .*another branch"):
            list(captured) if grab == "tokens" else captured.inputs


def test_sequence_by_position_name_and_slice():
    model = build("vit")
    with capture.tokens(model, ["blocks.2", 0, 0]) as captured:
        model(IMAGES)
        assert captured["blocks.2"] is captured[0] is captured[-3]
        assert captured[1] is captured[2] is captured[0:3][1]
        assert len(captured) == 3
        with pytest.raises(IndexError):
            captured[3]
        with pytest.raises(KeyError, match=r"blocks.1.*blocks.2, blocks.0"):
            captured["blocks.1"]


def test_int_blocks_of_each_family():
    assert capture.resolve(build("efficientnet"), [0, -1]) == ["blocks.0", "blocks.4"]
    assert capture.resolve(build("resnet"), [0, 4]) == ["act1", "layer4"]
    assert capture.resolve(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [-1]) == ["1"]
    nested = nn.Module()
    nested.blocks = nn.ModuleList([nn.ModuleList([nn.Identity(), nn.ReLU()]), nn.Identity()])
    assert capture.block_names(nested) == ["blocks.0.0", "blocks.0.1", "blocks.1"]


def test_student_learns_and_teacher_does_not():
    student, teacher = build("vit"), build("deit")
    with capture.tokens(student, [1]) as s, capture.tokens(teacher, [1]) as t:
        student(IMAGES)
        with torch.no_grad():
            teacher(IMAGES)
        assert not t[0].requires_grad
        F.mse_loss(s[0], t[0]).backward()
    assert student.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
    assert student.blocks[2].mlp.fc2.weight.grad is None


@pytest.mark.parametrize("grab", [capture.tokens, capture.qkv])
def test_unknown_blocks_are_refused_at_entry(grab):
    model = build("vit")
    cases = [
        (["blocks.7"], ValueError, r"blocks\.7.*blocks\.0, blocks\.1, blocks\.2.*patch_embed.*Did you mean"),
        ([3], ValueError, r"block 3 .*blocks\.0, blocks\.1, blocks\.2"),
        ([-4], ValueError, r"block -4 "),
        ([], ValueError, "empty"),
        ("blocks.1", TypeError, "list"),
        (1, TypeError, "list"),
        ([1.0], TypeError, "ints or strings"),
        ([True], TypeError, "ints or strings"),
    ]
    for blocks, error, message in cases:
        with pytest.raises(error, match=message), grab(model, blocks):
            pytest.fail("entered")
    with pytest.raises(TypeError, match=r"nn\.Module"), grab(len, [0]):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="DistributedDataParallel"), grab(nn.DataParallel(model), [0]):
        pytest.fail("entered")
    assert_clean(model)


def test_wrong_options_and_layouts():
    model = build("vit")
    for arguments in ({"prefix": "cls"}, {"prefix": -1}, {"prefix": True}, {"layout": "CHW"}):
        with pytest.raises(ValueError, match=next(iter(arguments))), capture.tokens(model, [0], **arguments):
            pytest.fail("entered")
    for arguments, message in (({"layout": "NCHW"}, "not NCHW"), ({"prefix": 5}, "prefix='keep'")):
        with pytest.raises(ValueError, match=message):
            tokens_of(model, IMAGES, 0, **arguments)
    with pytest.raises(ValueError, match="one tensor"):
        tokens_of(model, IMAGES, "head")


class Plain(nn.Module):
    """A model that tells nothing of its layout."""

    def __init__(self, body: nn.Module, has_class_token: bool = False) -> None:
        super().__init__()
        self.body = body
        if has_class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_layout_the_model_does_not_tell_is_asked_for():
    x = torch.randn(2, 3, 4, 5)
    cases = [
        ("auto", x.flatten(2).transpose(1, 2)),
        ("NCHW", x.flatten(2).transpose(1, 2)),
        ("NHWC", x.flatten(1, 2)),
    ]
    for layout, expected in cases:
        model = Plain(nn.Identity())
        assert torch.equal(tokens_of(model, x, 0, layout=layout), expected)
    model = Plain(nn.Identity())
    model.body.num_heads = 2
    with pytest.raises(ValueError, match="layout="):
        tokens_of(model, x, 0)


@pytest.mark.parametrize(
    ("channels", "shape", "layout"),
    [(3, (2, 3, 4, 5), "NCHW"), (5, (2, 3, 4, 5), "NHWC"), (5, (2, 5, 5, 5), None), (7, (2, 3, 4, 5), None)],
)
def test_channels_in_feature_info_tell_the_layout_unless_both_fit(channels, shape, layout):
    model = Plain(nn.Identity())
    model.body.num_heads = 2
    model.feature_info = [{"module": "body", "num_chs": channels}]
    x = torch.randn(shape)
    if layout is None:
        with pytest.raises(ValueError, match="layout="):
            tokens_of(model, x, 0)
    else:
        assert torch.equal(tokens_of(model, x, 0), tokens_of(model, x, 0, layout=layout))


def test_a_class_token_the_model_does_not_count_is_asked_for():
    model = Plain(nn.Identity(), has_class_token=True)
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="prefix='keep'"):
        tokens_of(model, x, 0)
    for prefix, expected in (("keep", x), (1, x[:, 1:])):
        assert torch.equal(tokens_of(model, x, 0, prefix=prefix), expected)


def test_what_is_overwritten_in_place_later_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match=r"'0'.*overwritten"):
        tokens_of(model, IMAGES, 0)
    with torch.inference_mode():
        assert tokens_of(model, IMAGES, 1).shape == (2, 1024, 4)


GRABS = {
    "tokens": ("vit_small", lambda model: capture.tokens(model, [1, 0]), list),
    "qkv": ("vit_small", lambda model: capture.qkv(model, [0, 1]), lambda c: [x for a in c for x in (a.q, a.k, a.v)]),
    "windows": (
        "swin_small",
        lambda model: capture.qkv(model, [0, 1]),
        lambda c: [x for a in c for x in (a.q, a.k, a.v, a.bias)],
    ),
    "bn_inputs": ("resnet", capture.bn_inputs, lambda captured: captured.inputs),
    "fused": (
        "resnet",
        lambda model: capture.bn_inputs(model, fused=True),
        lambda captured: [*captured.inputs, *(v for pair in captured.moments for v in pair)],
    ),
}


def started(grab: str) -> tuple[nn.Module, Tensor, Callable[..., Any], Callable[..., list[Tensor]]]:
    """(model, images, how to capture, how to read what was captured)"""
    kind, enter, read = GRABS[grab]
    model = build(kind)
    return model, images_for(model), enter, read


# one `with`, many passes


def test_each_pass_replaces_the_last():
    model = build("vit")
    with capture.tokens(model, [0]) as captured:
        for images in (IMAGES, IMAGES + 1):
            model(images)
            seen = captured[0]
            with capture.tokens(model, [0]) as inner:
                model.forward_features(images)
                assert torch.equal(inner[0], seen)
        captured.clear()
        with pytest.raises(RuntimeError, match=r"'blocks\.0' gave was let go of by clear"):
            captured[0]


@pytest.mark.parametrize(
    ("kind", "enter", "first"),
    [
        ("vit_small", lambda model: capture.tokens(model, [0]), lambda captured: captured[0]),
        ("vit_small", lambda model: capture.qkv(model, [0]), lambda captured: captured[0]),
        ("swin_small", lambda model: capture.qkv(model, ["layers.0.blocks.0"]), lambda captured: captured[0]),
        ("resnet", capture.bn_inputs, lambda captured: captured.inputs[0]),
        ("resnet", lambda model: capture.bn_inputs(model, fused=True), lambda captured: captured.inputs[0]),
    ],
    ids=["tokens", "qkv", "windows", "bn_inputs", "fused"],
)
def test_a_deep_copy_is_not_captured(kind, enter, first):
    """A copy made inside the `with` computes as the model does, and what the model gave stays."""
    model = build(kind)
    x = images_for(model)
    with enter(model) as captured, torch.no_grad():
        expected = model(x)
        found = first(captured)
        twin = copy.deepcopy(model)
        assert not torch.equal(twin(2 * x), expected)
        torch.testing.assert_close(twin(x), expected)
        assert first(captured) is found
    torch.testing.assert_close(twin(x), expected)


def test_reading_outside_a_pass():
    model = build("vit")
    none = "did not run: no forward pass of VisionTransformer inside the `with`"
    with pytest.raises(RuntimeError, match=none), capture.tokens(model, [0]) as captured:
        captured[0]
    with pytest.raises(RuntimeError, match=none), capture.tokens(model, [0]) as captured:
        pass
    with pytest.raises(RuntimeError, match=none):
        captured[0]
    with pytest.raises(RuntimeError, match=r"blocks\.1 did not run .*another branch"), capture.tokens(model, [0, 1]):
        model.blocks[0](torch.randn(1, 5, 48))
    assert_clean(model)


@pytest.mark.parametrize("grab", GRABS)
def test_what_was_captured_can_be_read_after_the_with(grab):
    model, images, enter, read = started(grab)
    with enter(model) as captured:
        model(images)
        inside = [x.detach().clone() for x in read(captured)]
    with enter(model) as later:
        model(images)
    model(images + 1)
    for x, y, z in zip(read(captured), read(later), inside, strict=True):
        assert torch.equal(x, z)
        assert torch.equal(y, z)
        assert x.requires_grad or not x.is_floating_point()
    sum(x.square().mean() for x in read(later)).backward()
    assert next(model.parameters()).grad.abs().sum() > 0
    assert_clean(model)


@pytest.mark.parametrize("grab", [lambda m: capture.tokens(m, [1]), lambda m: capture.qkv(m, [1])])
def test_an_exception_passes_and_leaves_nothing(grab):
    model = build("vit")
    breaks = model.blocks[1].attn.proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with grab(model) as captured:
        with pytest.raises(ZeroDivisionError):
            model(IMAGES)  # between the start and the end of a hooked block
        breaks.remove()
        model(IMAGES)
        assert captured[0] is not None
    breaks = model.blocks[1].attn.proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), grab(model):
        model(IMAGES)
    breaks.remove()
    assert_clean(model)


class Saved:
    """A tensor the graph keeps for backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("grab", GRABS)
def test_no_graph_outlives_the_captured(grab):
    kind, enter, read = GRABS[grab]
    model = build(kind)
    references = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an output kept with its own node would be a cycle
        references.append(weakref.ref(saved))
        return saved

    with enter(model) as captured:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            output = model(images_for(model))
        references += [weakref.ref(x) for x in read(captured)]
        assert len(references) > len(read(captured))
        assert all(reference() is not None for reference in references)
    gc.collect()
    gc.disable()  # no cycle may keep what was captured alive until the collector finds it
    try:
        del output, captured
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()
    assert_clean(model)


@pytest.mark.parametrize("grab", GRABS)
def test_ddp(grab, tmp_path):
    model, images, enter, read = started(grab)
    with enter(model) as captured:
        model(images)
        expected = [x.detach().clone() for x in read(captured)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with enter(wrapped) as captured:
            output = wrapped(images)
            found = read(captured)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            (output.sum() + sum(x.square().mean() for x in found)).backward()
    finally:
        dist.destroy_process_group()
    assert next(model.parameters()).grad.abs().sum() > 0
    assert_clean(model)


def test_every_wrapper_is_taken_off():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    compiled_model = torch.compile(model, backend="eager")
    inside = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(inside)  # its own starts to communicate
    inside.module = compiled_model
    for wrapped in (compiled_model, inside, torch.compile(inside, backend="eager")):
        assert capture._modules.unwrap(wrapped) is model


def gradients(model: nn.Module, enter, read) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values captured before and after backward, and the parameters' gradients of a loss on them."""
    model.zero_grad()
    with enter(model) as captured:
        output = model(images_for(getattr(model, "_orig_mod", model)))
        before = read(captured)
        (output.square().mean() + sum(x.square().mean() for x in before)).backward()
        after = read(captured)
        values = [x.detach().clone() for x in before]
    return values, after, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("grab", GRABS)
def test_checkpointing_keeps_the_first_run(grab):
    kind, enter, read = GRABS[grab]
    model = build(kind)
    values, _, expected = gradients(model, enter, read)
    model.set_grad_checkpointing(True)
    if kind != "resnet":
        model.train()  # some of timm's models checkpoint only then; nothing in them is random
    with enter(model) as captured:
        model(images_for(model))
        first = [weakref.ref(x) for x in read(captured)]
        sum(x.square().mean() for x in read(captured)).backward()
        assert all(a() is b for a, b in zip(first, read(captured), strict=True))
    again, _, found = gradients(model, enter, read)
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("grab", GRABS)
def test_reentrant_checkpointing_is_refused_where_it_would_train_nothing(grab):
    kind, enter, _ = GRABS[grab]
    model = build(kind)
    images = images_for(model).requires_grad_()
    model.set_grad_checkpointing(True)
    if kind != "resnet":
        model.train()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match="use_reentrant=False"), enter(model):
            model(images)
        with torch.no_grad(), enter(model):
            model(images)
    finally:
        set_reentrant_ckpt(False)
    assert_clean(model)


@pytest.mark.parametrize("wants", ["input", "parameters", "neither"])
def test_reentrant_checkpointing_passes_only_where_nothing_could_be_trained(wants):
    """A frozen model gives a gradient to images being synthesised."""
    model = build("vit_small").requires_grad_(wants == "parameters")
    images = IMAGES.clone().requires_grad_(wants == "input")
    model.set_grad_checkpointing(True)
    model.train()
    set_reentrant_ckpt(True)
    expected = contextlib.nullcontext()
    if wants != "neither":
        expected = pytest.raises(RuntimeError, match="use_reentrant=False")
    try:
        with expected, capture.tokens(model, [0]):
            model(images)
    finally:
        set_reentrant_ckpt(False)


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, how: str) -> nn.Module:
    if how == "whole":
        return torch.compile(model, backend="aot_eager", fullgraph=True)
    if how == "in_place":
        model.compile(backend="aot_eager", fullgraph=True)
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("grab", "how"),
    [
        ("qkv", "whole"),
        ("qkv", "by_block"),
        ("tokens", "whole"),
        *(
            pytest.param(*both, marks=pytest.mark.exhaustive)
            for both in (("qkv", "in_place"), ("tokens", "in_place"), ("tokens", "by_block"))
        ),
        ("windows", "whole"),
        ("bn_inputs", "whole"),
    ],
)
def test_compile(grab, how):
    model, images, enter, read = started(grab)
    values, _, expected = gradients(model, enter, read)
    model = compiled(model, how)
    with torch._dynamo.config.patch(recompile_limit=2):  # entering again must cost no compilation
        for _ in range(4):
            again, _, found = gradients(model, enter, read)
            torch.testing.assert_close(again, values)
            torch.testing.assert_close(found, expected)
    with enter(model) as captured:
        output = model(images)
        references = [weakref.ref(x) for x in read(captured)]
    del output
    captured.clear()
    bare = model(images)
    gc.collect()
    assert all(reference() is None for reference in references)
    assert bare.requires_grad
    assert_clean(model)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("grab", [grab for grab in GRABS if grab != "fused"])
def test_entering_after_the_first_compiled_call_is_an_error(grab):
    model, images, enter, read = started(grab)
    model = compiled(model, "whole")
    model(images)
    with pytest.raises(RuntimeError, match="enter before the first compiled call"), enter(model):
        model(images)
    with enter(model) as captured:
        with pytest.raises(RuntimeError, match="enter before the first compiled call"):
            read(captured)
        (model._orig_mod)(images)
    assert_clean(model)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("grab", ["tokens", "qkv"])
def test_compile_and_checkpointing(grab, fullgraph):
    kind, enter, read = GRABS[grab]
    model = build(kind)
    values, _, expected = gradients(model, enter, read)
    model.set_grad_checkpointing(True)
    model = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=fullgraph):
        again, _, found = gradients(model, enter, read)
    torch.testing.assert_close(again, values)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_model_inside_a_compiled_one():
    model = build("vit_small")
    outer = torch.compile(Plain(model), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            with capture.qkv(model, [1]) as captured:
                outer(IMAGES)
                assert captured[0].q.requires_grad


# bn_inputs


def test_bn_inputs_are_what_the_layers_are_given():
    model = build("resnet")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    seen = {}
    handles = [m.register_forward_pre_hook(lambda m, args, n=n: seen.update({n: args[0]})) for n, m in layers.items()]
    images = IMAGES.clone().requires_grad_()
    with capture.bn_inputs(model) as bn:
        model(images)
        assert bn.names == tuple(layers)
        assert all(x is seen[name] for x, name in zip(bn.inputs, layers, strict=True))
        assert all(mean is m.running_mean for mean, m in zip(bn.running_means, layers.values(), strict=True))
        assert all(var is m.running_var for var, m in zip(bn.running_vars, layers.values(), strict=True))
        sum(x.mean() for x in bn.inputs).backward()
    assert images.grad.abs().sum() > 0
    for handle in handles:
        handle.remove()


def test_bn_inputs_finds_every_kind():
    frozen = timm.layers.norm_act.FrozenBatchNormAct2d(3)
    model = nn.Sequential(timm.layers.BatchNormAct2d(3), frozen, nn.Flatten(), nn.BatchNorm1d(3072)).eval()
    with capture.bn_inputs(model) as bn:
        model(IMAGES)
        assert bn.names == ("0", "1", "3")
        assert [x.shape for x in bn.inputs] == [IMAGES.shape, IMAGES.shape, (2, 3072)]
    with capture.bn_inputs(model, layers=["3", "1"]) as bn:
        model(IMAGES)
        assert bn.names == ("1", "3")


def test_bn_inputs_warns_in_train_mode():
    """There the forward pass moves the statistics that the inputs are compared with; frozen ones have no such mode."""
    frozen = timm.layers.norm_act.FrozenBatchNormAct2d(3)
    model = nn.Sequential(nn.BatchNorm2d(3), frozen, nn.BatchNorm2d(3)).train()
    before = model[0].running_mean.clone()
    with (
        pytest.warns(UserWarning, match=r"2 batch norms are in train mode, such as 0: .*call model.eval\(\)") as told,
        capture.bn_inputs(model),
    ):
        model(IMAGES)
    assert told[0].filename == __file__ and not torch.equal(model[0].running_mean, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture.bn_inputs(model, layers=["1"]):
            model(IMAGES)
        with capture.bn_inputs(model.eval()):
            model(IMAGES)


def test_bn_inputs_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="no batch norm"), capture.bn_inputs(build("vit")):
        pytest.fail("entered")
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)).eval()
    with pytest.raises(ValueError, match=r"^0 keep no running statistics"), capture.bn_inputs(model):
        pytest.fail("entered")
    for layers in (["2"], [], "1"):
        with pytest.raises(ValueError, match="there are 0, 1"), capture.bn_inputs(model, layers=layers):
            pytest.fail("entered")
    with capture.bn_inputs(model, layers=["1"]) as bn:
        model(IMAGES)
        assert len(bn.inputs) == 1
    model.add_module("spare", nn.BatchNorm2d(3))
    model.forward = lambda x: model[1](x)
    with (
        pytest.raises(RuntimeError, match=r"spare did not run .*another branch.*layers="),
        capture.bn_inputs(model, layers=["1", "spare"]),
    ):
        model(IMAGES)


# bn_inputs(fused=True)


@pytest.fixture
def normed():
    """Every kind of batch norm, in eval mode, with statistics and weights of its own."""
    torch.manual_seed(1)
    act = timm.layers.BatchNormAct2d(4, drop_layer=nn.Identity)
    frozen = timm.layers.norm_act.FrozenBatchNormAct2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3), act, frozen, nn.BatchNorm2d(4, affine=False, eps=0.1),
        nn.Flatten(), nn.BatchNorm1d(3600),
    )  # fmt: skip
    act.eps, frozen.eps = 0.2, 0.4
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fused_gives_the_same_outputs_moments_and_gradients(normed):
    leaves = [IMAGES.clone().requires_grad_(), *normed.parameters()]
    results = []
    for fused in (False, True):
        with capture.bn_inputs(normed, fused=fused) as bn:
            y = normed(leaves[0])
            assert (bn.moments is not None) == fused
            loss = bn_stat_loss(bn.inputs, bn.running_means, bn.running_vars, moments=bn.moments)
            results.append((y.detach(), loss.detach(), *torch.autograd.grad(loss + y.square().mean(), leaves)))
    torch.testing.assert_close(results[1], results[0])


def test_fused_keeps_the_models_own_norm(normed):
    """Modules, hooks and parameters stay the layers' own, so the activation of a BatchNormAct2d is applied once."""
    fired = []
    normed[2].register_forward_hook(lambda m, args, out: fired.append(out.min().item()))
    before, modules = bits(normed), list(normed.modules())
    with capture.bn_inputs(normed, fused=True):
        normed(IMAGES)
        assert list(normed.modules()) == modules
        assert normed.state_dict().keys() == before.keys()
    assert fired == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(bits(normed).values(), before.values(), strict=True))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_fused_restores_the_model_bit_for_bit(normed, error):
    own = normed[1].forward = lambda x: nn.BatchNorm2d.forward(normed[1], x)  # patched by someone else
    before, expected = bits(normed), normed(IMAGES)
    with contextlib.suppress(KeyboardInterrupt), capture.bn_inputs(normed, fused=True) as bn:
        normed(IMAGES)
        assert all(layer.forward is not own for layer in normed[1:5])
        assert bn.not_finite() == []
        if error is not None:
            raise error
    assert normed[1].forward is own
    assert not any("forward" in layer.__dict__ for layer in normed[2:])
    assert all(torch.equal(a, b) for a, b in zip(bits(normed).values(), before.values(), strict=True))
    assert torch.equal(normed(IMAGES), expected)


@pytest.mark.parametrize("name", ["weight", "running_mean"])
def test_fused_takes_what_a_layer_holds_at_the_time(normed, name):
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    with torch.no_grad(), capture.bn_inputs(normed, fused=True):
        before = normed(IMAGES)
        nn.utils.parametrize.register_parametrization(normed[1], name, Double())
        after = normed(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(after, normed(IMAGES))
    assert not torch.allclose(after, before)


def test_fused_refuses_what_it_cannot_replace(normed):
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Own(3)).eval()
    with pytest.raises(ValueError, match="Own has a forward pass of its own"), capture.bn_inputs(model, fused=True):
        pytest.fail("entered")
    assert "forward" not in model[0].__dict__
    normed[4].train()
    with pytest.raises(ValueError, match=r"^4 are in train mode.*eval"), capture.bn_inputs(normed, fused=True):
        pytest.fail("entered")
    normed.eval()
    with pytest.raises(RuntimeError, match="in train mode"), capture.bn_inputs(normed, fused=True):
        normed.train()(IMAGES)
    normed.eval()
    with pytest.raises(ValueError, match=r"shape \(B, 4, ...\)"), capture.bn_inputs(normed[1:2], fused=True):
        normed[1](IMAGES)
    with capture.bn_inputs(normed[:3], fused=True) as bn:
        normed[:3](IMAGES)
        with pytest.raises(ValueError, match='distance "l2" or "mse"'):
            bn_stat_loss(bn.inputs, bn.running_means, bn.running_vars, moments=bn.moments, distance="image")


@pytest.mark.usefixtures("fresh_compiler")
def test_fused_compiles_whole(normed):
    """The compiler sees a replaced forward pass, so the `with` may also be entered after the first compiled call."""
    compiled_model = torch.compile(normed, backend="aot_eager", fullgraph=True)
    expected, images = compiled_model(IMAGES), IMAGES.clone().requires_grad_()
    with capture.bn_inputs(normed, fused=True) as bn:
        for _ in range(2):
            torch.testing.assert_close(compiled_model(images), expected)
            compared = fastkd.batch_moments(bn.inputs[0])
            torch.testing.assert_close(bn.moments[0], compared)
    assert torch.equal(compiled_model(IMAGES), expected)


def test_layers_with_nan_are_named(normed):
    images = IMAGES.clone()
    images[0, 0, 0, 0] = float("nan")
    for fused in (False, True):
        with capture.bn_inputs(normed, fused=fused) as bn:
            normed(images)
            assert bn.not_finite() == list(bn.names)
        normed[3].weight.data[1] = float("inf")
        with capture.bn_inputs(normed, fused=fused) as bn:
            normed(IMAGES)
            assert bn.not_finite() == ["4", "6"]
        normed[3].weight.data[1] = 1


# qkv


def unfused_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Attention maps the model computes with fused attention off, by the name of the attention module."""
    maps, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            keep = lambda m, args, name=name: maps.update({name: args[0]})  # noqa: E731
            handles.append(module.attn_drop.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.parametrize("kind", ["vit", "vit_qk_norm", "deit", "eva"])
def test_qkv_make_the_maps_of_unfused_attention(kind):
    model = build(kind).double()
    images = images_for(model).double()
    reference = model(images)
    with capture.qkv(model, [2, 0, "blocks.1.attn"]) as captured:
        output = model(images)
        found = list(captured)
    assert torch.equal(output, reference)
    maps = unfused_maps(model, images)
    for attention, name in zip(found, ("blocks.2.attn", "blocks.0.attn", "blocks.1.attn"), strict=True):
        q, k, v, scale, bias, is_causal = attention
        assert bias is None
        assert not is_causal
        assert scale == q.shape[-1] ** -0.5
        assert q.shape == k.shape == v.shape == (*maps[name].shape[:3], 48 // q.shape[1])
        torch.testing.assert_close((q @ k.mT * scale).softmax(-1), maps[name])
        assert all(x.requires_grad for x in (q, k, v))


@pytest.mark.parametrize("fused", [False, True])
def test_qkv_of_swin_windows(fused):
    model = build("swin").double()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    images = images_for(model).double()
    reference = model(images)
    names = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
    with capture.qkv(model, [0, 1, 2, 3]) as captured:
        output = model(images)
        assert captured.names == tuple(names)
        found = list(captured)
    assert torch.equal(output, reference)
    maps = unfused_maps(model, images)
    windows = {0: 16, 1: 4}
    for attention, name in zip(found, names, strict=True):
        q, k, v, scale, bias, _ = attention
        assert q.shape == k.shape == v.shape
        assert q.shape[0] == 2 * windows[int(name[7])]
        assert bias.shape == ((q.shape[0], *bias.shape[1:]) if name.endswith("1") else (1, q.shape[1], 16, 16))
        torch.testing.assert_close((q @ k.mT * scale + bias).softmax(-1), maps[f"{name}.attn"])
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, bias, scale=scale), maps[f"{name}.attn"] @ v)
        assert all(x.requires_grad for x in (q, k, v, bias))
    with torch.no_grad(), capture.qkv(model, [1]) as captured:
        model(images)
        with torch.enable_grad():
            assert not any(x.requires_grad for x in (captured[0].q, captured[0].bias))


class Attention(nn.Module):
    """scaled_dot_product_attention with whatever arguments, `runs` times."""

    def __init__(self, runs: int = 1, **arguments: object) -> None:
        super().__init__()
        self.runs, self.arguments = runs, arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        v = k if v is None else v
        return sum(F.scaled_dot_product_attention(q, key=k, value=v, **self.arguments) for _ in range(self.runs))


def test_qkv_of_any_module():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(5, 5).gt(0.3) | torch.eye(5, dtype=torch.bool)
    model = nn.ModuleDict({"a": Attention(attn_mask=mask, scale=0.5, enable_gqa=True)})
    with capture.qkv(model, ["a"]) as captured:
        expected = model["a"](q, k)
        a = captured[0]
        assert a.k.shape == q.shape
        assert a.scale == 0.5
        torch.testing.assert_close((a.q @ a.k.mT * a.scale + a.bias).softmax(-1) @ a.v, expected)
    for wide, scale in ((True, None), (True, 0.0), (False, 0.0), (False, 2)):
        model = nn.ModuleDict({"a": Attention(scale=scale)})
        values = torch.randn(2, 4, 5, 3) if wide else q
        with capture.qkv(model, ["a"]) as captured:
            expected = model["a"](q, q + 1, values)
            a = captured[0]
            torch.testing.assert_close((a.q @ a.k.mT * a.scale).softmax(-1) @ a.v, expected)
    model = nn.ModuleDict({"a": Attention(is_causal=True)})
    with capture.qkv(model, ["a"]) as captured:
        model["a"](q, q)
        assert captured["a"].is_causal
    model = nn.ModuleDict({"a": Attention(runs=2)})
    with pytest.raises(RuntimeError, match=r"'a' runs 2 attentions in one pass"), capture.qkv(model, ["a"]):
        model["a"](q, q)
    model = nn.ModuleDict({"a": nn.Softmax(-1)})
    with pytest.raises(ValueError, match="ModuleDict has no softmax attention"), capture.qkv(model, ["a"]):
        pytest.fail("entered")
    assert_clean(model)


def test_qkv_refuses_at_entry_what_it_cannot_read():
    with pytest.raises(ValueError, match=r"blocks\.0.*mixes heads.*TalkingHeadAttn"), capture.qkv(build("cait"), [0]):
        pytest.fail("entered")


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_capture_adds_no_operation(kind, fused):
    """Views aside: q, k and v are neither copied nor read."""

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = build(kind)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    with Operations() as bare:
        model(images_for(model))
    with capture.qkv(model, [0, -1]) as captured, Operations() as watched:
        model(images_for(model))
    assert watched.names == bare.names
    q, k, v = captured[0][:3]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()


class Unfused(nn.Module):
    """Attention of q, k, v by whatever product, changes of its scores and changes of its map."""

    def __init__(self, product=torch.matmul, scores=lambda z: z, after=lambda p: p) -> None:
        super().__init__()
        self.num_heads = 2
        self.product, self.scores, self.after = product, scores, after

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.applied = self.scores(self.product(q * 0.5, k.mT)).softmax(-1)
        return self.after(self.applied) @ v


MASK = torch.ones(5, 6).tril(1).bool()
BIAS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("product", "scores"),
    [
        (torch.matmul, lambda z: z + BIAS),
        (torch.matmul, lambda z: BIAS + 2 * z),
        (torch.matmul, lambda z: (z + BIAS) / 3 - BIAS.relu()),
        (torch.matmul, lambda z: z.masked_fill(~MASK, -torch.inf)),
        (torch.matmul, lambda z: torch.where(MASK, z, -1e9)),
        (torch.matmul, lambda z: z.add_(BIAS).mul_(BIAS[:, :1, :1].exp())),
        (torch.matmul, lambda z: z - z.amax(-1, keepdim=True)),
        (torch.matmul, lambda z: (z.view(3, 1, 2, 5, 6) + BIAS[:, :1]).view(3, 2, 5, 6)),
        (lambda q, k: torch.einsum("bhid,bhdj->bhij", q, k), lambda z: z + BIAS),
        (lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1)), lambda z: z.view(3, 2, 5, 6) + BIAS),
        (lambda q, k: torch.baddbmm(BIAS.repeat(3, 1, 1), q.flatten(0, 1), k.flatten(0, 1), alpha=0.3),
         lambda z: z.unflatten(0, (3, 2))),
        (lambda q, k: (q * 2 + 1) @ k, lambda z: z),
        (lambda q, k: (q * 2).add_(1) @ k, lambda z: z),
        (lambda q, k: q.mul_(0.3) @ k, lambda z: z),
        (lambda q, k: (q @ BIAS[:, :4, :4]) @ k, lambda z: z),
        (lambda q, k: q @ (k * 2).data, lambda z: z),
        (lambda q, k: q @ (k * 2).mT.mT, lambda z: z),
    ],
)  # fmt: skip
def test_scores_of_every_form(product, scores):
    q, k, v = (torch.randn(3, 2, n, 4, generator=torch.Generator().manual_seed(n)) for n in (5, 6, 6))
    model = nn.ModuleDict({"a": Unfused(product, scores)}).double()
    with capture.qkv(model, ["a"]) as captured:
        model["a"](q, k, v)
    a = captured[0]
    made = a.q @ a.k.mT * a.scale
    torch.testing.assert_close((made if a.bias is None else made + a.bias).softmax(-1), model["a"].applied)
    assert torch.equal(a.v, v)


@pytest.mark.parametrize(
    ("scores", "after", "message"),
    [
        (lambda z: z.relu(), lambda p: p, r"'a' changes its scores before the softmax \(by relu\)"),
        (lambda z: z * BIAS, lambda p: p, r"changes its scores before the softmax \(by mul\)"),
        (lambda z: z.flip(1), lambda p: p, r"changes its scores before the softmax \(by flip\)"),
        (lambda z: z, lambda p: p.flip(1), r"'a' changes its map after the softmax \(by flip\)"),
        (lambda z: z, lambda p: 2 * p, r"changes its map after the softmax \(by mul\)"),
    ],
)
def test_what_queries_and_keys_do_not_make_is_refused(scores, after, message):
    q, k, v = (torch.randn(3, 2, n, 4) for n in (5, 6, 6))
    model = nn.ModuleDict({"a": Unfused(scores=scores, after=after)})
    with pytest.raises(RuntimeError, match=message), capture.qkv(model, ["a"]) as captured:
        model["a"](q, k, v)
    with pytest.raises(RuntimeError, match=message):
        captured[0]


def assigned(scores: Tensor, place: object, value: Tensor | float) -> Tensor:
    scores[place] = value
    return scores


def added(scores: Tensor, place: object, value: Tensor | float) -> Tensor:
    scores[place] += value
    return scores


TAIL, ALIKE = (..., slice(1, None)), (..., slice(5))
ASSIGNED, OTHER = r"changes its scores before the softmax \(by an assignment\)", "changes its scores before the softmax"
WRITES = {
    "put_back": (lambda z: assigned(z, TAIL, z[TAIL] + BIAS[:, :, 1:]), None),
    "put_back_shifted": (lambda z: assigned(z, TAIL, z[TAIL] + 3), None),
    "put_elsewhere": (lambda z: assigned(z, ALIKE, z[TAIL] + 3), ASSIGNED),
    "put_back_mixed": (lambda z: assigned(z, ALIKE, z[TAIL] + z[ALIKE]), ASSIGNED),
    "put_back_scaled": (lambda z: assigned(z, TAIL, z[TAIL] * 2), OTHER),
    "put_back_and_hidden": (lambda z: assigned(assigned(z, TAIL, z[TAIL] + 3), MASK.expand_as(z), -9.0), ASSIGNED),
    "part_in_place": (lambda z: added(z, TAIL, BIAS[:, :, 1:]), None),
    "part_in_place_by_index": (lambda z: added(z, MASK.expand_as(z), 1.0), None),
    "mask": (lambda z: assigned(z, MASK.expand_as(z), -9.0), ASSIGNED),
    "whole": (lambda z: assigned(z, ..., BIAS.expand_as(z) * 2), ASSIGNED),
    "view": (lambda z: (z[..., 0].add_(1.0), z)[1], None),
    "view_filled": (lambda z: (z[..., 0].fill_(-9.0), z)[1], OTHER),
    "view_made_before": (lambda z: (z.unbind(1)[0].add_(BIAS[0]), z)[1], ASSIGNED),
    "whole_of_a_view": (lambda z: (z.flatten(0, 1), z.add_(BIAS))[0].view(3, 2, 5, 6), ASSIGNED),
    "detached": (lambda z: (assigned(z.detach(), TAIL, -9.0), z)[1], ASSIGNED),
    "data": (lambda z: (assigned(z.data, TAIL, -9.0), z)[1], ASSIGNED),
    "fill": (lambda z: z.masked_fill_(~MASK, -1e9), None),
    "fill_a_little": (lambda z: z.masked_fill_(~MASK, -9.0), OTHER),
    "put": (lambda z: z.index_put_((MASK.expand_as(z),), torch.tensor(-9.0, dtype=z.dtype)), OTHER),
    "beside": (lambda z: z + assigned(torch.zeros(5, 6), TAIL, 1.0), None),
}


class Writes(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: Unfused(scores=WRITES[name][0]) for name in names})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        for layer in self.layers.values():
            layer(q, k, v)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["eager", "inference", "compiled"])
def test_what_is_written_into_scores_is_in_the_record_or_refused(how):
    q, k, v = (torch.randn(3, 2, n, 4, generator=torch.Generator().manual_seed(n)).double() for n in (5, 6, 6))
    names = list(WRITES)
    model = Writes(names)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model
    with torch.inference_mode() if how == "inference" else torch.no_grad():
        with pytest.raises(RuntimeError), capture.qkv(run, [f"layers.{name}" for name in names]) as captured:
            run(q, k, v)
        model(q, k, v)
        for name in names:
            if WRITES[name][1] is not None:
                with pytest.raises(RuntimeError, match=f"'layers.{name}' {WRITES[name][1]}"):
                    captured[f"layers.{name}"]
                continue
            a = captured[f"layers.{name}"]
            made = a.q @ a.k.mT * a.scale
            applied = model.layers[name].applied
            torch.testing.assert_close((made if a.bias is None else made + a.bias).softmax(-1), applied, msg=name)


class Overwrites(nn.Module):
    """Attention whose queries are overwritten after it ran."""

    def forward(self, q: Tensor) -> Tensor:
        q = q * 1
        y = F.scaled_dot_product_attention(q, q, q)
        q[..., 0] = 0
        return y


@pytest.mark.usefixtures("fresh_compiler")
def test_operands_that_are_overwritten_later_are_refused():
    q = torch.randn(3, 2, 5, 4)
    model = nn.Sequential(Overwrites())
    with torch.no_grad(), capture.qkv(model, [0]) as captured:
        model(q)
    with pytest.raises(RuntimeError, match=r"operand of the attention in '0' was overwritten .*read the record before"):
        captured[0]
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="'0' overwrites an operand"), torch.no_grad(), capture.qkv(run, [0]):
        run(q)
    bias = nn.Parameter(torch.zeros(5, 5))
    model = nn.ModuleDict({"a": Attention(attn_mask=bias)})
    optimizer = torch.optim.SGD([bias], lr=1.0)
    records = []
    for reads_before in (True, False):
        with capture.qkv(model, ["a"]) as captured:
            model["a"](q, q).square().sum().backward()
        if reads_before:
            records.append(captured[0])
        optimizer.step()
    assert records[0] is not None
    with pytest.raises(RuntimeError, match="right after the forward pass if an optimizer overwrote a bias"):
        captured[0]


def test_multihead_attention_of_torch():
    x = torch.randn(3, 5, 8)
    hidden = torch.tensor([[False] * 5, [False] * 4 + [True], [True] + [False] * 4])
    for batch_first in (False, True):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=batch_first)})
        y = x if batch_first else x.transpose(0, 1)
        with capture.qkv(model, [0]) as captured:
            _, maps = model["a"](y, y, y, key_padding_mask=hidden, average_attn_weights=False)
        a = captured[0]
        torch.testing.assert_close((a.q @ a.k.mT * a.scale + a.bias).softmax(-1), maps)


def test_windows_as_many_as_heads_are_told_from_them():
    """Twins has its windows before its heads, Nest behind them."""
    for name, arguments in (
        ("twins_svt_small", {"img_size": 64, "depths": (2, 1, 1, 1)}),
        ("nest_tiny", {"img_size": 64}),
    ):
        model = timm.create_model(name, **arguments).eval()
        layer = capture.attention_layers(model)[0]
        heads = 4
        layer.module.num_heads = heads
        size = 2 * layer.module.ws if name.startswith("twins") else None
        x = torch.randn(2, size * size, 64) if size else torch.randn(2, heads, 16, 96)
        with torch.no_grad(), capture.qkv(layer.module, [0]) as captured:
            layer.module(x, (size, size)) if size else layer.module(x)
        q = captured[0].q
        projected = layer.module.qkv(x.view(2, 2, size // 2, 2, size // 2, 64).transpose(2, 3) if size else x)
        expected = projected.reshape(2 * heads, -1, 3, heads, q.shape[-1])[:, :, 0].transpose(1, 2)
        assert captured[0].batch_shape == (2, heads)
        assert torch.equal(q, expected)


def test_models_without_attention_are_told_so():
    cases = [
        ("resnet", [0], "ResNet has no softmax attention over tokens"),
        ("convnext", ["stages.0"], "ConvNeXt has no softmax attention over tokens"),
        ("xcit", [0], r"'blocks\.0' attends over channels.* queries and keys: cls_attn_blocks"),
        ("swin", ["layers.0"], r"'layers\.0' holds 2 attention layers; name one of layers\.0\.blocks\.0\.attn"),
        ("swin", ["layers.0.blocks.7"], r"Did you mean layers\.0\.blocks\.1"),
        ("swin", [4], r"block 4 is not among the 4 attention layers of SwinTransformer \(4 WindowAttention\)"),
    ]
    for kind, blocks, message in cases:
        with pytest.raises(ValueError, match=message), capture.qkv(build(kind), blocks):
            pytest.fail("entered")


def test_channel_attention_of_an_unknown_class_is_seen_by_its_shape():
    class Channels(timm.models.xcit.XCA):
        pass

    model = nn.ModuleDict({"a": Channels(24, num_heads=4)}).eval()
    with capture.qkv(model, ["a"]) as captured:
        model["a"](torch.randn(2, 9, 24))
    with pytest.raises(RuntimeError, match="Channels attends over channels: its maps are of the 6 channels"):
        captured[0]


def test_resized_tokens():
    x = torch.arange(2 * 18 * 3.0).view(2, 18, 3)
    assert resize_tokens(x, 4, prefix=2) is x
    half = resize_tokens(x, 2, prefix=2)
    assert torch.equal(half[:, :2], x[:, :2])
    assert torch.equal(half[:, 2:].view(2, 2, 2, 3), x[:, 2:].view(2, 2, 2, 2, 2, 3).mean((2, 4)))
    maps = x[:, 2:].mT.reshape(2, 3, 4, 4)
    grown = F.interpolate(maps, (8, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(resize_tokens(x, (8, 6), prefix=2)[:, 2:], grown)
    assert resize_tokens(x[:, :15].bfloat16(), (5, 2), grid=(3, 5)).shape == (2, 10, 3)
    torch.testing.assert_close(resize_tokens(torch.ones(1, 9, 2), (2, 7)), torch.ones(1, 14, 2))
    for arguments, message in (
        ({"size": 2}, r"x has 18 tokens behind 0 class tokens.* pass grid=\(h, w\), or .*prefix="),
        ({"size": 2, "prefix": 18}, "prefix must be a number of tokens below N = 18"),
        ({"size": 0, "prefix": 2}, "size must be at least 1"),
        ({"size": 2, "grid": (4, 4)}, "x has 18 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            resize_tokens(x, **arguments)
