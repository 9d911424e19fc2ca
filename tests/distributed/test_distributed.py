"""The global batch: three gloo processes on one machine, in groups of three, two and one.

A process costs seconds to start, so all checks run in one spawn, in the same order on every rank.
"""

import copy
import inspect
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastkd
from fastkd import distributed, reference
from fastkd.compat import DeepInversionFeatureHook
from fastkd.losses import BatchNormStatLoss, IntraDivergenceLoss, ManifoldLoss, RelationLoss
from fastkd.testing import assert_matches_oracle, relative_difference, strided

SIZES = {3: [3, 1, 2], 2: [1, 2], 1: [2]}  # images per rank: uneven, one alone
N, WIDTH, DS, DT = 5, 6, 8, 10
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
WEIGHTS = torch.linspace(0.5, 1.5, DS)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def maps(s: Tensor) -> list[Tensor]:
    """Two layers of BatchNorm inputs, (B, C, N) and (B, C, 1)."""
    return [s.mT, s[:, :1].mT * 2]


def statistics(s: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [randn(DS, seed=i, dtype=s.dtype) for i in (1, 2)],
        [randn(DS, seed=i, dtype=s.dtype).abs() for i in (3, 4)],
    )


def relation(**options):
    return lambda api, s, t, labels, **group: api.relation_loss(s, t, **options, **group)


def moments(api, s, t, labels, **group):
    mean, var = api.batch_moments(s.mT, **group)
    return ((mean + 2 * var.sqrt()) * WEIGHTS.to(mean)).sum()


def bn_stat(with_ema=False, distance="l2"):
    def loss(api, s, t, labels, **group):
        options = {"momentum": 0.7, "ema": statistics(s + 1)} if with_ema else {}
        layers = maps(s)[: 1 if distance == "image" else 2]  # an image of (B, C, 1) has no variance
        running = [x[: len(layers)] for x in statistics(s)]
        weights = [2.0, 0.5][: len(layers)]
        return api.bn_stat_loss(layers, *running, distance=distance, layer_weights=weights, **options, **group)

    return loss


def diversity(api, s, t, labels, **group):
    return api.intra_divergence_loss(s.mean(1), labels, spread_margin=2.0, boundary_margin=0.5, **group)


def shared_out(loss):
    """The same loss with the work shared out, as for batches that are too large for every rank to take whole."""

    def run(api, s, t, labels, **group):
        with mock.patch.object(distributed._ranks, "SMALL", 0):
            return loss(api, s, t, labels, **group)

    return run


# Rows of the smallest group's batch, with repeats.
INDEX = torch.tensor([0, 9, 3, 3, 7, 5, 9, 1])
LOSSES = {
    "intra": relation(scope="intra"),
    "intra-gram": relation(scope="intra", algorithm="gram"),
    "inter-tile": relation(scope="inter", algorithm="tile"),
    "inter-gram": relation(scope="inter", algorithm="gram"),
    "inter-auto": relation(scope="inter"),
    "inter-teacher": relation(scope="inter", rectify="teacher"),
    "batch-tile": relation(scope="batch", algorithm="tile"),
    "batch-gram": relation(scope="batch", algorithm="gram"),
    "batch-both": relation(scope="batch", rectify="both"),
    "batch-teacher": relation(scope="batch", rectify="teacher"),
    "batch-raw-tile": relation(scope="batch", normalize=False, algorithm="tile"),
    "batch-raw-gram": relation(scope="batch", normalize=False, algorithm="gram"),
    "index": relation(scope="batch", index=INDEX, rectify="both"),
    "manifold": lambda api, s, t, labels, **group: api.manifold_loss(s, t, index=INDEX, **group),
    "manifold-terms": lambda api, s, t, labels, **group: torch.stack(
        api.manifold_loss(s, t, inter=0.0, index=INDEX, return_terms=True, **group)[1]
    ).sum(),
    "manifold-two": lambda api, s, t, labels, **group: api.manifold_loss(s, t, intra=0, index=INDEX, **group),
    "moments": moments,
    "bn-l2": bn_stat(),
    "bn-mse": bn_stat(distance="mse"),
    "bn-image": bn_stat(distance="image"),
    "bn-ema": bn_stat(with_ema=True),
    "diversity": diversity,
}
LOSSES |= {f"{name}-shared": shared_out(loss) for name, loss in LOSSES.items() if name.startswith("manifold")}


class Rank:
    """One rank of one group, with its share of the batch. `value` is what every rank must see the same."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        self.sizes = SIZES[self.world]
        start = sum(self.sizes[: self.rank])
        self.own = slice(start, start + self.sizes[self.rank])
        self.value: object = None

    def batch(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Of all ranks: what the student's layer gets, the teacher's tokens, labels."""
        B = sum(self.sizes)
        direction = randn(1, 1, WIDTH, seed=12, dtype=dtype)
        return (
            randn(B, N, WIDTH, seed=10, dtype=dtype) + direction,
            randn(B, N, DT, seed=11, dtype=dtype),
            torch.arange(B) % 2,
        )


def raises(rank: Rank, error: type[Exception], match: str, call) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    rank.value = str(caught.value)


def ddp(rank: Rank, dtype: torch.dtype) -> None:
    """Losses and the parameters' gradients after averaging, against one process with the concatenated batch."""
    torch.manual_seed(0)
    alone = nn.Linear(WIDTH, DS).to(dtype)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(alone), process_group=rank.group)
    x, t, labels = rank.batch(dtype)
    values = []
    for name, loss in LOSSES.items():
        expected = loss(fastkd, alone(x), t, labels)
        gradients = torch.autograd.grad(expected, list(alone.parameters()))
        parallel.zero_grad()
        s = parallel(x[rank.own])
        actual = loss(distributed, s, t[rank.own], labels[rank.own], group=rank.group)
        actual.backward()
        assert actual.dtype == expected.dtype, name
        assert relative_difference(actual, expected) <= TOLERANCE[dtype], f"{name}: {actual} and {expected}"
        for p, g in zip(parallel.parameters(), gradients, strict=True):
            assert relative_difference(p.grad, g) <= TOLERANCE[dtype], f"{name}: gradient {p.grad} and {g}"
        if rank.world == 1:
            assert torch.equal(actual, expected), name
        values.append(actual.item())
    rank.value = values


def oracle(rank: Rank) -> None:
    """Gradients of own features, by the rule of the kernels, in each dtype and other strides."""
    if rank.world == 1:
        return  # the plain function, with its own tests
    B = sum(rank.sizes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Widths that auto sends as features, and as Grams; fewer tokens than ranks.
        for Ds, Dt, tokens in ((24, 40, 9), (3, 2, 9), (24, 40, 2)):
            s, t = (randn(B, tokens, D, seed=D, dtype=dtype) + 0.5 for D in (Ds, Dt))
            s[0, 1] = 0
            for scope, layout in (("inter", "sliced"), ("batch", "permuted"), ("batch", "sliced")):

                def compute(relation_loss, s, t, incoming, scope=scope, **options):
                    leaf = s.detach().requires_grad_()
                    loss = relation_loss(leaf, t, scope=scope, **options)
                    return loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, incoming))

                own_s, own_t = (strided(x[rank.own], layout) for x in (s, t))
                # By the world size less comes in, as after DDP.
                loss, ds = compute(distributed.relation_loss, own_s, own_t, 1024 / rank.world, group=rank.group)
                eager, oracle = (
                    compute(reference.relation_loss, s.to(a), t.to(a), 1024) for a in (dtype, torch.float64)
                )
                assert_matches_oracle(loss, eager[0], oracle[0], B * tokens * Ds, f"{scope} {dtype} loss")
                assert_matches_oracle(
                    ds, eager[1][rank.own], oracle[1][rank.own], B * tokens * Ds, f"{scope} {dtype} {Ds} gradient"
                )


def auto(rank: Rank) -> None:
    """Which algorithm sends less, and that what Grams send does not grow with the batch."""
    wide, narrow = (torch.empty(1, 1, D) for D in (24, 4))
    assert distributed.relation.pick_algorithm(100, wide, wide, "none", True) == "tile"
    assert distributed.relation.pick_algorithm(1000, wide, wide, "none", True) == "gram"
    assert distributed.relation.pick_algorithm(1000, wide.half(), wide.half(), "none", True) == "gram"
    assert distributed.relation.pick_algorithm(200, wide.half(), wide.half(), "none", True) == "tile"
    assert distributed.relation.pick_algorithm(1000, wide, wide, "both", True) == "tile"
    assert distributed.relation.pick_algorithm(1000, wide, wide, "none", False) == "tile"
    traffic = []
    for tokens in (20, 200):
        s, t = (randn(2, tokens, D, seed=D) for D in (4, 3))
        sent = [0]

        def counted(x, *args, sent=sent, **kwargs):
            sent[0] += x.numel() * x.element_size()

        with (
            mock.patch.object(dist, "all_reduce", counted),
            mock.patch.object(dist, "broadcast", counted),
        ):
            distributed.relation_loss(s, t, scope="batch", group=rank.group)
        traffic.append(sent[0])
    assert traffic == ([0, 0] if rank.world == 1 else [8 * (16 + 12 + 9)] * 2)
    assert distributed.relation.pick_algorithm(20, narrow, narrow, "none", True) == "tile"


def first_index(rank: Rank) -> None:
    """The first rank's rows are everyone's, drawn or given."""
    s, t, _ = rank.batch()
    own = s[rank.own], t[rank.own]
    generator = torch.Generator().manual_seed(100 + rank.rank)
    options = {"intra": 0, "inter": 0, "random": 1.0, "num_samples": 4, "group": rank.group}
    drawn = distributed.manifold_loss(*own, generator=generator, **options)
    generator.manual_seed(100 + rank.rank)
    with mock.patch.object(distributed._ranks, "SMALL", 0):
        shared = distributed.manifold_loss(*own, generator=generator, **options)
    assert relative_difference(shared, drawn) <= 1e-5
    rows = torch.randperm(sum(rank.sizes) * N, generator=torch.Generator().manual_seed(100))[:4]
    expected = fastkd.relation_loss(s, t, scope="batch", index=rows)
    given = distributed.relation_loss(
        *own, scope="batch", index=rows if rank.rank == 0 else torch.zeros_like(rows), group=rank.group
    )
    assert relative_difference(drawn, expected) <= 1e-5
    assert relative_difference(given, expected) <= 1e-5
    everything = distributed.manifold_loss(*own, intra=0, inter=0, random=1.0, group=rank.group)
    assert relative_difference(everything, fastkd.relation_loss(s, t, scope="batch")) <= 1e-5
    rank.value = [drawn.item(), given.item()]


def sent_along(rank: Rank) -> None:
    """From the third call alike on, features go out before the ranks agree; what else is called then finds its way."""
    if rank.world == 1:
        return
    s, t, _ = rank.batch()
    first, last = rank.own.start, rank.own.stop

    def loss(own: slice, everyone: slice, **options) -> list[Tensor]:
        leaf = s[own].clone().requires_grad_()
        losses = [distributed.manifold_loss(leaf, t[own], index=INDEX, group=rank.group, **options)]
        losses.append(fastkd.manifold_loss(s[everyone], t[everyone], index=INDEX, **options))
        assert relative_difference(*losses) <= 1e-5
        return [losses[0].detach(), *torch.autograd.grad(losses[0], leaf)]

    def sent_later(**options) -> int:
        gather = distributed._ranks.Ranks.gather
        with mock.patch.object(distributed._ranks.Ranks, "gather", autospec=True, side_effect=gather) as sent:
            found = loss(rank.own, slice(None), **options)
        assert options or all(map(torch.equal, found, expected))
        return sent.call_count

    distributed.batch_moments(s[rank.own].mT, group=rank.group)
    expected = loss(rank.own, slice(None))
    assert [sent_later() for _ in range(3)] == [1, 0, 0]
    assert [sent_later(inter=2.0) for _ in range(3)] == [1, 1, 0]
    # The last rank has an image less, then all are back.
    odd = rank.rank == rank.world - 1
    fewer = slice(first, last - 1) if odd else rank.own
    loss(fewer, slice(sum(rank.sizes) - 1))
    assert [sent_later() for _ in range(3)] == [1, 1, 0]
    # One has arguments of its own while features are expected, or calls another function.
    for _ in range(2):
        with pytest.raises(ValueError, match="inter"):
            distributed.manifold_loss(s[rank.own], t[rank.own], inter=-1.0 if odd else 1.0, group=rank.group)
        assert [sent_later() for _ in range(3)] == [1, 1, 0]
    call = distributed.relation_loss if odd else distributed.manifold_loss
    with pytest.raises(ValueError, match="function: "):
        call(s[rank.own], t[rank.own], group=rank.group)
    assert [sent_later() for _ in range(3)] == [1, 1, 0]
    mean, _ = distributed.batch_moments(s[rank.own].mT, group=rank.group)
    assert sent_later() == 1
    rank.value = mean.tolist()


def sizes_by_which_ranks_decide(rank: Rank) -> None:
    """Where the choice of a way turns on the number of images, all ranks make the same one, whatever their own."""
    if rank.world == 1:
        return
    s, t, _ = rank.batch()
    own = s[rank.own], t[rank.own]
    chosen = []
    pick, most = distributed.relation.pick_algorithm, max(rank.sizes)
    for limit in range(1, 2 * most + 1):
        # Each number of images in turn is where "auto" changes from features to Grams.
        def turning(n: int, *args: object, limit: int = limit) -> str:
            chosen.append(n)
            return "gram" if n > limit else "tile"

        with mock.patch.object(distributed.relation, "pick_algorithm", turning):
            actual = distributed.relation_loss(*own, scope="inter", group=rank.group)
        assert relative_difference(actual, fastkd.relation_loss(s, t, scope="inter")) <= 1e-5
    assert set(chosen) == {2 * most} and pick is distributed.relation.pick_algorithm
    of_image = N * 4 * (WIDTH + DT) + 32  # and what fills up to 16 bytes
    for images in range(1, rank.world * most + 1):
        with mock.patch.object(distributed._ranks, "SMALL", images * of_image):
            actual = distributed.manifold_loss(*own, index=INDEX, group=rank.group)
        assert relative_difference(actual, fastkd.manifold_loss(s, t, index=INDEX)) <= 1e-5


def generators(rank: Rank) -> None:
    """The first rank's moves on as in one process; the others' stay, though each call brings other rows."""
    s, t, _ = rank.batch()
    own = s[rank.own], t[rank.own]
    generator, alone = (torch.Generator().manual_seed(seed) for seed in (40 + rank.rank, 40))
    before = generator.get_state()
    options = {"intra": 0, "inter": 0, "random": 1.0, "num_samples": 3}
    rank.value = []
    for small in (distributed.SMALL, 0, distributed.SMALL):
        with mock.patch.object(distributed._ranks, "SMALL", small):
            actual = distributed.manifold_loss(*own, generator=generator, group=rank.group, **options)
        expected = fastkd.manifold_loss(s, t, generator=alone, **options)
        assert relative_difference(actual, expected) <= 1e-5
        rank.value.append(actual.item())
        assert torch.equal(generator.get_state(), alone.get_state() if rank.rank == 0 else before)
    assert len({*rank.value}) == 3


def rows_of_the_first_rank(rank: Rank) -> None:
    """Indices of several layers, of other lengths, and others on every rank."""
    s, t, _ = rank.batch()
    layers = [(s, t), (s * 2 + 1, t[..., :4])]
    total = sum(rank.sizes) * N
    draws = [torch.Generator().manual_seed(r) for r in (0, rank.rank)]
    firsts, owns = ([torch.randperm(total, generator=draw)[:k] for k in (5, 8)] for draw in draws)
    students, teachers = ([pair[i] for pair in layers] for i in (0, 1))
    expected = ManifoldLoss()(students, teachers, indices=firsts, return_terms=True)
    for small in (distributed.SMALL, 0):
        with mock.patch.object(distributed._ranks, "SMALL", small):
            actual = ManifoldLoss(process_group=rank.group)(
                *([x[rank.own] for x in each] for each in (students, teachers)), indices=owns, return_terms=True
            )
        for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
            assert relative_difference(a, e) <= 1e-5


def mixed_dtypes(rank: Rank) -> None:
    """A teacher in another dtype than the student's keeps its digits, and its rows."""
    s, t, _ = rank.batch()
    for own, others in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float64),
    ):
        student, teacher = s.to(own), t.to(others)
        for name in ("index", "intra", "inter-tile", "inter-gram", "batch-tile", "manifold", "manifold-shared"):
            expected = LOSSES[name](fastkd, student.double(), teacher.double(), None)
            actual = LOSSES[name](distributed, student[rank.own], teacher[rank.own], None, group=rank.group)
            # The products of one process, from the same rounded inputs.
            assert relative_difference(actual.double(), expected) <= 1e-5, f"{name} {own} {others}"


def positions_differ(rank: Rank) -> None:
    """Layers whose positions the ranks share out in other proportions, as with images of several sizes."""
    positions = [torch.Size([3 + 4 * rank.rank]), torch.Size([9 - 3 * rank.rank])]
    counts = [[B * (3 + 4 * r) for r, B in enumerate(rank.sizes)], [B * (9 - 3 * r) for r, B in enumerate(rank.sizes)]]
    whole = [randn(C, sum(n), seed=C, dtype=torch.float64) + 1 for C, n in zip((3, 5), counts, strict=True)]
    own = [
        x.split(n, 1)[rank.rank].view(len(x), rank.sizes[rank.rank], *p).transpose(0, 1)
        for x, n, p in zip(whole, counts, positions, strict=True)
    ]
    running = (
        [torch.zeros(C, dtype=torch.float64) for C in (3, 5)],
        [torch.ones(C, dtype=torch.float64) for C in (3, 5)],
    )
    for distance in ("l2", "mse"):
        expected = fastkd.bn_stat_loss([x.T for x in whole], *running, distance=distance)
        actual = distributed.bn_stat_loss(own, *running, distance=distance, group=rank.group)
        assert relative_difference(actual, expected) <= 1e-10


def rows_below_eps(rank: Rank) -> None:
    """Rows no longer than eps relate as 0, on every way; equal networks have a loss of 0, not less."""
    s, t, _ = rank.batch()
    eps = s.norm(dim=-1).flatten().sort().values[4:6].mean().item()  # between two rows' lengths
    own = s[rank.own], t[rank.own]
    for scope, algorithm in (
        ("intra", "auto"),
        ("inter", "tile"),
        ("inter", "gram"),
        ("batch", "tile"),
        ("batch", "gram"),
    ):
        options = {"scope": scope, "eps": eps, "algorithm": algorithm}
        expected = reference.relation_loss(s, t, scope=scope, eps=eps)
        assert relative_difference(distributed.relation_loss(*own, **options, group=rank.group), expected) <= 1e-5
        for seed in range(4):
            x = randn(sum(rank.sizes), N, WIDTH, seed=seed)[rank.own]
            loss = distributed.relation_loss(x, x.clone(), scope=scope, algorithm=algorithm, group=rank.group)
            assert 0 <= loss.item() < 1e-6


def options_must_agree(rank: Rank) -> None:
    """Every option of every function: the last rank's is another, and all ranks refuse and name it."""
    if rank.world == 1:
        return
    s, t, labels = (x[rank.own] for x in rank.batch())
    odd = rank.rank == rank.world - 1
    zeros = [torch.zeros(WIDTH)]
    margins = {"spread_margin": (1.0, 2.0), "boundary_margin": (0.25, 0.5)}
    calls = {
        distributed.relation_loss: (
            (s, t),
            {
                "scope": ("intra", "batch"),
                "normalize": (True, False),
                "rectify": ("none", "both"),
                "eps": (1e-12, 1e-6),
                "algorithm": ("auto", "tile"),
            },
        ),
        distributed.manifold_loss: (
            (s, t),
            {
                "intra": (1.0, 2.0),
                "inter": (1.0, 2.0),
                "random": (1.0, 2.0),
                "num_samples": (4, 5),
                "return_terms": (False, True),
            },
        ),
        distributed.batch_moments: ((s.mT,), {"dims": ("batch", "image")}),
        distributed.bn_stat_loss: (
            ([s.mT], zeros, zeros),
            {"distance": ("l2", "mse"), "layer_weights": ([1.0], [2.0]), "momentum": (0.25, 0.5)},
        ),
        distributed.intra_divergence_loss: ((s[:, 0], labels), margins),
    }
    assert {function.__name__ for function in calls} == {*distributed.__all__}
    # Tensors, whose shapes must agree or of which the first rank's count, and what is each rank's own affair.
    apart = {"index", "ema", "moments", "generator", "backend", "group"}
    for function, (inputs, options) in calls.items():
        named = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
        assert named - apart == options.keys(), function.__name__
        for option, values in options.items():
            fixed = {name: values[0] for name, values in options.items()} | {"group": rank.group}
            if function is distributed.bn_stat_loss:
                fixed["ema"] = ([torch.zeros(WIDTH)], [torch.zeros(WIDTH)])
            with pytest.raises(ValueError, match=rf"must agree, got .*{option}: .* on rank 0"):
                function(*inputs, **fixed | {option: values[odd]})


def index_out_of_range(rank: Rank) -> None:
    s, t, _ = rank.batch()
    index = torch.tensor([0, sum(rank.sizes) * N])
    raises(
        rank,
        RuntimeError,
        "index must lie in",
        lambda: distributed.relation_loss(s[rank.own], t[rank.own], scope="batch", index=index, group=rank.group),
    )


def disagreement(rank: Rank) -> None:
    """The last rank's argument is another: the same ValueError everywhere, and the group lives on."""
    if rank.world == 1:
        return
    s, t, labels = rank.batch()
    last = rank.world - 1
    odd = rank.rank == last
    own = s[rank.own], t[rank.own]
    narrow = own[0][..., :-1] if odd else own[0], own[1]
    values = []

    def check(match: str, call) -> None:
        raises(rank, ValueError, match, call)
        values.append(rank.value)

    group = {"group": rank.group}
    for scope in ("intra", "inter", "batch"):
        check(
            rf"must agree, got student: \(B, 5, 6\) float32 cpu on rank 0.*\(B, 5, 5\) float32 cpu on rank {last}",
            lambda scope=scope: distributed.relation_loss(*narrow, scope=scope, **group),
        )
    check("must agree, got student", lambda: distributed.manifold_loss(*narrow, **group))
    check("student of layer 1", lambda: ManifoldLoss(process_group=rank.group)([own[0], narrow[0]], [own[1]] * 2))
    check(
        "layers: 2 on rank 0", lambda: ManifoldLoss(process_group=rank.group)(*([x] * (1 if odd else 2) for x in own))
    )
    check("must agree, got x", lambda: distributed.batch_moments(narrow[0].mT, **group))
    check("must agree, got features", lambda: distributed.intra_divergence_loss(
        narrow[0][:, 0], labels[rank.own], spread_margin=1.0, boundary_margin=1.0, **group
    ))  # fmt: skip
    x = narrow[0].mT
    zeros = torch.zeros(x.shape[1])
    check(r"must agree, got inputs\[0\]: 6 channels", lambda: distributed.bn_stat_loss([x], [zeros], [zeros], **group))
    check("tokens|student", lambda: distributed.relation_loss(*(v[:, : 4 if odd else 5] for v in own), **group))
    check("float64", lambda: distributed.relation_loss(own[0].double() if odd else own[0], own[1], **group))
    check("scope: inter on rank 0", lambda: distributed.relation_loss(*own, scope="batch" if odd else "inter", **group))
    check("eps: 0.1 on rank 0", lambda: distributed.relation_loss(*own, eps=0.2 if odd else 0.1, **group))
    check("function: ", lambda: (distributed.manifold_loss if odd else distributed.relation_loss)(*own, **group))
    index = torch.arange(4 if odd else 5)
    check("index", lambda: distributed.relation_loss(*own, scope="batch", index=index, **group))
    rank.value = values


def refusal(rank: Rank) -> None:
    """One rank's own error stops the others too."""
    if rank.world == 1:
        return
    s, t, labels = rank.batch()
    own, odd, group = (s[rank.own], t[rank.own]), rank.rank == 1, {"group": rank.group}
    others = (ValueError, "rank 1 of the process group refused its arguments: {}: ")

    def check(error: type[Exception], match: str, call) -> None:
        expected, text = (error, match) if odd else (others[0], others[1].format(error.__name__) + match)
        with pytest.raises(expected, match=text):
            call()

    check(
        TypeError,
        "student must be",
        lambda: distributed.relation_loss(own[0].int() if odd else own[0], own[1], **group),
    )
    check(ValueError, "student must not be empty", lambda: distributed.relation_loss(
        *((x[:0] if odd else x) for x in own), **group
    ))  # fmt: skip
    check(ValueError, "intra must be", lambda: distributed.manifold_loss(*own, intra=-1.0 if odd else 1.0, **group))
    check(RuntimeError, "backend='native' cannot run here", lambda: distributed.relation_loss(
        *own, scope="batch", backend="native" if odd else "eager", **group
    ))  # fmt: skip
    check(TypeError, "x must be", lambda: distributed.batch_moments(None if odd else own[0].mT, **group))
    zeros = [torch.zeros(WIDTH)]
    check(ValueError, "inputs must hold at least one layer", lambda: distributed.bn_stat_loss(
        [] if odd else [own[0].mT], zeros, zeros, **group
    ))  # fmt: skip
    margins = {"spread_margin": 1.0, "boundary_margin": 1.0}
    here = labels[rank.own].float() if odd else labels[rank.own]
    check(
        TypeError, "labels must be", lambda: distributed.intra_divergence_loss(own[0][:, 0], here, **margins, **group)
    )
    module = BatchNormStatLoss(momentum=0.5, process_group=rank.group)
    module([own[0].mT], zeros, zeros)
    narrow = own[0].mT[:, :4] if odd else own[0].mT
    running = [torch.zeros(narrow.shape[1])]
    check(ValueError, r"ema\[0\]\[0\] must have the 4 channels", lambda: module([narrow], running, running))


def modules(rank: Rank) -> None:
    """The modules on this rank's share, and plain on the whole batch."""
    x, t, labels = rank.batch(torch.float64)

    def both(make, call) -> None:
        results = []
        for group, own in ((None, slice(None)), (rank.group, rank.own)):
            module, leaf = make(process_group=group), x[own].clone().requires_grad_()
            loss = call(module, leaf, own)
            loss.backward()
            results.append((loss.detach(), leaf.grad[rank.own] if group is None else leaf.grad / rank.world))
            results[-1] += tuple(module.buffers())
        for expected, actual in zip(*results, strict=True):
            assert relative_difference(actual, expected) <= 1e-10, module

    both(lambda **o: RelationLoss(scope="inter", **o), lambda m, s, own: m(s, t[own]))
    both(lambda **o: RelationLoss(scope="batch", **o), lambda m, s, own: m(s, t[own], index=INDEX))
    both(ManifoldLoss, lambda m, s, own: m([s, s * 2 + 1], [t[own], t[own, :, :4]], indices=[INDEX, INDEX[:5]]))
    both(ManifoldLoss, lambda m, s, own: sum(m(s, t[own], indices=[INDEX], return_terms=True)[1]))
    margins = {"spread_margin": 1.0, "boundary_margin": 0.2}
    both(lambda **o: IntraDivergenceLoss(**margins, **o), lambda m, s, own: m(s[:, 0], labels[own]))
    running = [randn(WIDTH, seed=1).double()], [randn(WIDTH, seed=2).double().abs()]

    def twice(module, s, own):
        return module([s.mT], *running) + module([s.mT * 2], *running)

    both(lambda **o: BatchNormStatLoss(momentum=0.6, **o), twice)
    both(lambda **o: BatchNormStatLoss(distance="image", **o), lambda m, s, own: m([s.mT], *running))

    class Hooked(nn.Module):
        def __init__(self, process_group) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH, dtype=torch.float64).eval()
            self.norm.running_mean, self.norm.running_var = (x[0] for x in running)
            self.watch = DeepInversionFeatureHook(self.norm, process_group)

        def forward(self, s: Tensor) -> Tensor:
            self.norm(s.mT)
            if rank.rank == 0:
                _ = self.watch.r_feature  # a read for a log alone, of which the other ranks know nothing
            return self.watch.r_feature

    both(Hooked, lambda m, s, own: m(s))


def far_mean(rank: Rank) -> None:
    """A mean of 1e4 times the spread costs the variance no more digits than in one process."""
    x = randn(sum(rank.sizes), 3, 500, seed=5) + 1e4
    mean, var = distributed.batch_moments(x[rank.own], group=rank.group)
    assert relative_difference(mean, x.double().mean((0, 2))) < 1e-6
    assert relative_difference(var, x.double().var((0, 2), correction=0)) < 1e-4
    rank.value = [mean.tolist(), var.tolist()]


def modes(rank: Rank) -> None:
    """No gradient on one rank, autocast, two backwards, no double backward, inputs untouched."""
    s, t, _ = rank.batch()
    own_s, own_t = s[rank.own].clone(), t[rank.own].clone()
    for scope in ("intra", "inter", "batch"):
        with torch.set_grad_enabled(rank.rank == 0):
            leaf = own_s.clone().requires_grad_()
            loss = distributed.relation_loss(leaf, own_t, scope=scope, group=rank.group)
        assert loss.requires_grad == (rank.rank == 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = distributed.relation_loss(leaf, own_t, scope=scope, group=rank.group)
        assert torch.equal(loss, again)
        (first,) = torch.autograd.grad(again, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(again * 3, leaf, retain_graph=True)
        torch.testing.assert_close(second, first * 3)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(again, leaf, create_graph=True)
        assert torch.equal(leaf, own_s) and torch.equal(own_t, t[rank.own])
        assert leaf._version == own_t._version == 0  # a backward that saved them would refuse otherwise
    mean, var = distributed.batch_moments(leaf.mT, group=rank.group)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad((mean + var).sum(), leaf, create_graph=True)


def compiled(rank: Rank) -> None:
    """A graph break, not an error."""
    s, t, _ = rank.batch()
    module = RelationLoss(scope="inter", process_group=rank.group)

    def step(s, t):
        return module(s * 2, t) + 1

    actual = torch.compile(step, backend="eager")(s[rank.own], t[rank.own])
    assert torch.equal(actual, step(s[rank.own], t[rank.own]))


CHECKS = {
    "ddp-float64": lambda rank: ddp(rank, torch.float64),
    "ddp-float32": lambda rank: ddp(rank, torch.float32),
    **{
        check.__name__: check
        for check in (
            oracle, auto, first_index, sizes_by_which_ranks_decide, generators, rows_of_the_first_rank, mixed_dtypes,
            positions_differ, rows_below_eps, options_must_agree, sent_along, index_out_of_range, disagreement, refusal,
            modules, far_mean, modes, compiled,
        )
    },
}  # fmt: skip


def work(rank: int, folder: str) -> None:
    """What each process does: every check in every group it is in, and a note of how that went."""
    torch.set_num_threads(1)
    distributed._messages.CHUNK = 100  # several pieces and a tail at these sizes
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3, timeout=timedelta(seconds=30)
    )
    groups = [dist.group.WORLD, dist.new_group([1, 2]), *(dist.new_group([r]) for r in range(3))]
    notes: dict[str, tuple[object, str | None]] = {}
    for group in groups:
        if dist.get_rank(group) < 0:
            with pytest.raises(ValueError, match="group must be one that this process belongs to"):
                distributed.batch_moments(torch.ones(2, 2), group=group)
            continue
        for name, check in CHECKS.items():
            here, failure = Rank(group), None
            try:
                check(here)
            except Exception:  # noted for the parent, which shows it
                failure = traceback.format_exc()
            notes[f"{name} in a group of {here.world}"] = here.value, failure
            torch.save(notes, f"{folder}/{rank}.pt")
            if failure is not None:
                return  # the ranks are out of step
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank(tmp_path: Path) -> None:
    context = torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=3, join=False)
    deadline = time.monotonic() + 240
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks hang")
    notes = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(3)]
    failures = [
        f"{name}, rank {rank}:\n{note[1]}" for rank, own in enumerate(notes) for name, note in own.items() if note[1]
    ]
    assert not failures, "\n".join(failures)
    assert len(notes[0]) == 2 * len(CHECKS) and len(notes[1]) == len(notes[2]) == 3 * len(CHECKS)
    for a, b in ((0, 1), (1, 2)):
        for name in notes[a].keys() & notes[b].keys():
            if "group of 1" not in name:
                assert notes[a][name][0] == notes[b][name][0], f"{name} on ranks {a} and {b}"


def test_functions_that_take_a_group_are_here_with_the_default_one() -> None:
    named = [
        name for name in fastkd.functional.__all__ if "group" in inspect.signature(getattr(fastkd, name)).parameters
    ]
    assert named == distributed.__all__
    for name in named:
        assert inspect.signature(getattr(distributed, name)) == inspect.signature(getattr(fastkd, name))


def test_without_processes() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.relation_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
