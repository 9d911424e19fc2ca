"""capture.qkv and capture.tokens on a small model of every family, against the maps and tokens it computes itself."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastkd import capture
from fastkd.capture import QKV

timm = pytest.importorskip("timm", reason="the families are timm's ..")
pytest.importorskip("transformers", reason=".. and Hugging Face's")
from benchmarks.families import FAMILIES, HUGGING_FACE, TIMM, Family, row  # noqa: E402

ROWS = {
    found["family"]: found
    for found in json.loads((Path(__file__).parents[2] / "benchmarks/results/capture.json").read_text())["families"]
}
SOFTMAX, MATMUL, SDPA = Tensor.softmax, torch.matmul, F.scaled_dot_product_attention
HIDDEN = -1e4  # a bias of a hidden key, whose rounding is nothing
OTHER_OUTPUTS = {  # of blocks
    "coat": "pass prefix='keep'",
    "crossvit": "gives list",
    "pit": "gives tuple",
    "tnt": "gives tuple",
    "efficientvim": "gives tuple",
    "mobilenetv4": "pass layout=",
}
FEW = ("vision_transformer", "vision_transformer_sam", "swin_transformer_v2", "hiera", "Dinov2", "Swinv2")


def families(those: Callable[[Family], bool], few: tuple[str, ...] | None = None) -> Any:
    """Parametrise by family; all but `few` in the exhaustive tests only."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(f, id=f.name, marks=[] if few is None or f.name in few else pytest.mark.exhaustive)
            for f in FAMILIES
            if those(f)
        ],
    )


def attends(family: Family) -> bool:
    return bool(ROWS[family.name]["captured"])


def usable(model: nn.Module) -> list[str]:
    return [layer.alias for layer in capture.attention_layers(model) if layer.reason is None]


class Own:
    """The maps that a model applies, layer by layer, and their products with the values.

    keeps_fused: fused attention computes the output of its layers, beside the map of its operands in float64; else it
        is replaced by its textbook form.
    """

    def __init__(self, keeps_fused: bool) -> None:
        self.keeps_fused = keeps_fused
        self.layer = ""
        self.maps: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}

    def softmax(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("dtype", None)
        y = SOFTMAX(x, *args, **kwargs)
        if self.layer:
            self.maps.setdefault(self.layer, []).append(y)
        return y

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        product = MATMUL(x, y)
        maps, outputs = self.maps.get(self.layer, []), self.outputs.setdefault(self.layer, [])
        if len(outputs) < len(maps):
            outputs.append(product if x.data_ptr() == maps[-1].data_ptr() else product.mT)
        return product

    def sdpa(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> Tensor:
        scale = options.get("scale")
        assert not options.get("is_causal")
        if self.keeps_fused:
            output = SDPA(q, k, v, attn_mask, dropout_p, scale=scale)
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            # Autocast rounds what it is given.
            q, k = (x.to(output.dtype).double() for x in (q, k))
            scores = MATMUL(q, k.mT) * scale
            if attn_mask is not None:
                scores = scores + (
                    torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask.double()
                )
            self.softmax(scores, dim=-1)
            self.outputs.setdefault(self.layer, []).append(output)
            return output
        scores = MATMUL(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.matmul(self.softmax(scores, dim=-1), v)


def own(model: nn.Module, images: Tensor, keeps_fused: bool = False) -> Own:
    """Run the model and collect what its attention layers apply."""
    found, handles = Own(keeps_fused), []
    for layer in capture.attention_layers(model):
        handles += [
            layer.module.register_forward_pre_hook(lambda m, args, name=layer.alias: setattr(found, "layer", name)),
            layer.module.register_forward_hook(lambda m, args, output: setattr(found, "layer", "")),
        ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "softmax", lambda x, *args, **kwargs: found.softmax(x, *args, **kwargs))
        patch.setattr(Tensor, "__matmul__", lambda x, y: found.matmul(x, y))
        patch.setattr(torch, "matmul", found.matmul)
        patch.setattr(F, "scaled_dot_product_attention", found.sdpa)
        model(images)
    for handle in handles:
        handle.remove()
    return found


def map_of(record: QKV) -> Tensor:
    assert not record.is_causal
    scores = record.q.double() @ record.k.double().mT * record.scale
    return (scores if record.bias is None else scores + record.bias.double()).softmax(-1)


def laid_out(x: Tensor, record: QKV, like: list[Tensor], *others: Tensor) -> tuple[Tensor, ...]:
    """Return x (B',H,..), with its batch unfolded, and what the model has, in the model's layout, and others like x."""
    theirs = like[0] if len(like) == 1 else torch.stack(like, dim=1)
    whole = x.unflatten(0, record.batch_shape)
    places = [i for i in range(whole.dim() - 2) if whole.movedim(-3, i).shape == theirs.shape]

    def placed(y: Tensor, i: int) -> Tensor:
        return y.unflatten(0, record.batch_shape).movedim(-3, i).reshape(theirs.shape)

    best = min(places or range(whole.dim() - 2), key=lambda i: (placed(x, i) - theirs).abs().max().item())
    return placed(x, best), theirs, *(placed(y, best) for y in others)


def close(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(tuple(t for t in x[:3]), tuple(t for t in y[:3]))
        assert x.scale == y.scale
        assert (x.bias is None) == (y.bias is None)
        if x.bias is not None:
            torch.testing.assert_close(x.bias.expand_as(y.bias), y.bias)


# qkv


@families(lambda family: True)
def test_the_table_says_what_is_captured_and_what_is_refused(family: Family) -> None:
    assert row(family) == ROWS[family.name]


def test_the_table_has_every_family() -> None:
    assert set(ROWS) == {family.name for family in FAMILIES}
    assert len(TIMM) >= 45
    assert len({name for name in ROWS if any(name.startswith(x) for x in
                ("ViT", "Dinov2", "DINOv3", "SiglipVision", "CLIPVision", "Swin"))}) >= 6  # fmt: skip


@families(attends)
def test_records_make_the_models_own_maps_fused_and_unfused(family: Family) -> None:
    images, found = family.images().double(), []
    for fused in (True, False):
        model = family.build(fused).double()
        names = usable(model)
        with torch.no_grad(), capture.qkv(model, names) as records:
            output = model(images)
        with torch.no_grad():
            assert all(map(torch.equal, tree_leaves(output), tree_leaves(model(images))))
        assert records.names == tuple(names)
        found.append(list(records))
    close(*found)
    theirs = own(model, images)
    for name, record in zip(names, records, strict=True):
        assert record.q.dim() == record.k.dim() == record.v.dim() == 4
        assert record.q.shape[:2] == record.k.shape[:2] == record.v.shape[:2]
        applied = map_of(record)
        torch.testing.assert_close(*laid_out(applied, record, theirs.maps[name]))
        torch.testing.assert_close(*laid_out(applied @ record.v, record, theirs.outputs[name]))
        assert record.bias is None or torch.broadcast_shapes(record.bias.shape, applied.shape) == applied.shape


@families(lambda family: ROWS[family.name]["layers"])
def test_integers_count_the_layers_in_the_order_in_which_they_run(family: Family) -> None:
    model = family.build(True)
    layers, ran = capture.attention_layers(model), []
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda m, args, name=layer.name: ran.append(name))
    with torch.no_grad():
        model(family.images())
    assert ran == [layer.name for layer in layers]
    for i, layer in enumerate(layers):
        expected = pytest.raises(ValueError, match=layer.kind) if layer.reason else contextlib.nullcontext()
        with expected:
            assert [module for _, module in capture.resolve_attention(model, [i, i - len(layers)])] == [
                layer.module
            ] * 2
    counts = ", ".join(f"{n} {kind}" for kind, n in ROWS[family.name]["layers"].items())
    past = (
        rf"block {len(layers)} is not among the {len(layers)} attention layers of {type(model).__name__} \({counts}\)"
    )
    with pytest.raises(ValueError, match=past), capture.qkv(model, [len(layers)]):
        pytest.fail("entered")


def check_alike(family: Family, run: Callable[[nn.Module, Tensor], Any]) -> None:
    """Check that a pass by `run` gives the records and gradients of a plain pass, and that backward changes none."""
    images = family.images().double()
    found = []
    for passes in (lambda m, x: m(x), run):
        model = family.build(False).double().train()  # in eval mode LeViT keeps its bias, with its graph
        torch.manual_seed(0)
        with capture.qkv(model, usable(model)) as records:
            passes(model, images)
        before = list(records)
        sum(x.square().mean() for record in records for x in record[:3]).backward()
        assert all(x is y for x, y in zip(before, records, strict=True))
        found.append((before, [p.grad for p in model.parameters() if p.grad is not None]))
    close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


@families(attends, FEW)
def test_checkpointing(family: Family) -> None:
    check_alike(family, lambda model, x: checkpoint(model, x, use_reentrant=False))


@families(attends, FEW)
def test_ddp(family: Family, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        check_alike(family, lambda model, x: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)(x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "fused", [pytest.param(True, id="fused", marks=pytest.mark.exhaustive), pytest.param(False, id="unfused")]
)
@families(attends, ("vision_transformer", "Dinov2"))
def test_compiled_whole(family: Family, fused: bool) -> None:
    torch._dynamo.reset()
    model, images = family.build(fused), family.images()
    names = usable(model)
    with torch.no_grad(), capture.qkv(model, names) as expected:
        model(images)
    # PyTorch itself fails to decompose a view of CPUBone's.
    backend = "eager" if family.name == "cpubone" else "aot_eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            with capture.qkv(compiled, names) as records:
                compiled(images)
            close(records, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@families(attends, FEW)
def test_autocast(family: Family, fused: bool) -> None:
    """The model's maps are those of the record's operands but for the rounding of scores, element by element.

    A score is rounded at most six times: its queries, keys, product, scale, bias and sum. If each element z of a row of
    scores is off by at most e, softmax(z) is off by a factor of at most exp(e) sum(softmax(z) exp(e)).
    """
    model, images = family.build(fused), family.images()
    names = usable(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with capture.qkv(model, names) as records:
            model(images)
        theirs = own(model, images, keeps_fused=True)
    unit = torch.finfo(torch.bfloat16).eps / 2
    tells = []
    for name, record in zip(names, records, strict=True):
        assert record.q.dtype == record.k.dtype == record.v.dtype
        applied = map_of(record)
        terms = record.q.double().abs() @ record.k.double().abs().mT * record.scale
        if record.bias is not None:
            terms = torch.where(record.bias <= HIDDEN, 0.0, terms + record.bias.double().abs())
        error = 6 * unit * terms
        factor = error.clamp(max=300).exp()
        factor = factor * (applied * factor).sum(-1, keepdim=True) * (1 + 2 * unit) - 1
        factor = torch.where((error > 300).any(-1, keepdim=True), torch.inf, factor)
        bound = torch.where(factor == torch.inf, 1.0, applied * factor)
        found, expected, bound = laid_out(applied, record, theirs.maps[name], bound)
        tiny = torch.finfo(torch.float32).tiny
        assert ((found - expected).abs() <= bound + tiny).all(), f"{name}: {(found - expected).abs().max():.2e}"
        uniform = 1 / expected.shape[-1]
        tells.append(factor.median() < 0.25 or ((uniform - expected).abs() > bound).any())
        if fused and len(theirs.outputs.get(name, [])) == len(theirs.maps[name]):
            size = (applied * (factor.clamp(max=1e9) + 2 * unit)) @ record.v.double().abs()
            found, expected, bound = laid_out(applied @ record.v.double(), record, theirs.outputs[name], size)
            assert ((found - expected).abs() <= bound + tiny).all(), f"{name}: output {(found - expected).abs().max()}"
    assert any(tells)  # else the bound would allow any map


# tokens


@families(lambda family: family in HUGGING_FACE and attends(family))
def test_tokens_of_hugging_face_are_hidden_states(family: Family) -> None:
    model, images = family.build(True), family.images()
    names = capture.block_names(model)
    with torch.no_grad(), capture.tokens(model, [0, -1]) as tokens, capture.tokens(model, [0, -1], "keep") as kept:
        states = model(images, output_hidden_states=True).hidden_states
    assert tokens.names == (names[0], names[-1])
    patches = [state for state in states if state.shape == kept[0].shape]
    assert any(torch.equal(kept[0], state) for state in patches) or family.name in ("Swin", "Swinv2", "Segformer")
    grid = {n * n for n in range(1, 65)}
    for x, whole in zip(tokens, kept, strict=True):
        assert x.shape[1] in grid
        assert torch.equal(x, whole[:, whole.shape[1] - x.shape[1] :])


@families(lambda family: family in TIMM, ("vision_transformer", "hiera", "swin_transformer", "davit"))
def test_tokens_are_the_intermediates_that_timm_gives(family: Family) -> None:
    model, images = family.build(True), family.images()
    names = capture.block_names(model)
    if family.name.startswith("twins"):  # timm takes its maps behind the position embedding
        names = [*names, *(name for name, _ in model.named_modules() if re.fullmatch(r"pos_block\.\d", name))]
    with torch.no_grad(), capture.tokens(model, names) as tokens:
        model(images)
    if family.name in OTHER_OUTPUTS:
        with pytest.raises(ValueError, match=OTHER_OUTPUTS[family.name]):
            list(tokens)
        return
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True, norm=False)
    found = list(tokens)
    assert maps
    for x in maps:
        theirs = x if x.dim() == 3 else x.flatten(2).mT
        ours = [y for y in found if y.shape == theirs.shape]
        assert any(torch.equal(y, theirs) for y in ours), f"{tuple(x.shape)} {[tuple(y.shape) for y in found]}"
