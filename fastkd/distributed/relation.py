"""Relation losses over the batch of all ranks: Grams are summed, features pass by, sampled rows are gathered."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._precision import accumulator, has_fast_float64, stored_gradient
from fastkd.distributed import _messages
from fastkd.distributed._autograd import Averaged, Sum, mean_over_ranks
from fastkd.distributed._messages import Group, Shapes, length, slices
from fastkd.distributed._ranks import About, Agreed, Own, Ranks, layout
from fastkd.eager.relation import Rows, difference, gram
from fastkd.ops import _checks as check
from fastkd.ops._autograd import refuse_double_backward, scaled, wants_grad
from fastkd.ops._dispatch import Backend, resolve, resolve_plain
from fastkd.ops._dispatch import call as run
from fastkd.ops.relation import EPS_FLOOR, Algorithm, Maps, RelationCall, cheaper, check_relation, run_relation


def pick_algorithm(n: int, student: Tensor, teacher: Tensor, rectify: str, fast_float64: bool) -> Algorithm:
    """Choose the algorithm that sends fewer bytes per group: Grams, or the features of the n rows.

    gram: 2 (Ds² + Ds Dt + Dt²) float64 (an all-reduce sends twice).   tile: n (Ds + Dt) elements in their own dtype.
    As in one process, "gram" is never chosen with rectification or if float64 is slow on a rank.
    """
    if rectify != "none" or not fast_float64:
        return "tile"
    Ds, Dt = student.shape[-1], teacher.shape[-1]
    features = n * (Ds * student.element_size() + Dt * teacher.element_size())
    return "gram" if 16 * (Ds * Ds + Ds * Dt + Dt * Dt) < features else "tile"


def _groups(x: Tensor, scope: str) -> Tensor:
    """(B, N, D) -> (G, n, D)."""
    return x.transpose(0, 1) if scope == "inter" else x.reshape(1, -1, x.shape[-1])


class _Scaled:
    """Strips of x as (x̂, r), scaled in advance if that takes little memory, otherwise on request."""

    def __init__(self, x: Tensor, rows: Rows, at_once: bool) -> None:
        self.x, self.rows, self.whole = x, rows, rows.unit(x) if at_once else None

    def __getitem__(self, strip: slice) -> tuple[Tensor, Tensor]:
        if self.whole is None:
            return self.rows.unit(self.x[strip])
        x_hat, r = self.whole
        return x_hat[strip], r[strip]


def _tile(s: Tensor, t: Tensor, ds: Tensor | None, counts: list[int], rows: Rows, ranks: Ranks, rectify: str) -> Tensor:
    """Compare this rank's rows of the map (n_own, Ds) with the columns of each rank in turn, received in pieces.

    The map is symmetric, so dŜ = 4/n² E' Ŝ of this rank's rows needs only these strips; only the loss is summed.
    """
    (n_own, Ds), Dt, n = s.shape, t.shape[-1], sum(counts)
    total = s.new_zeros((), dtype=torch.float64)
    s, t = s.contiguous(), t.contiguous()
    own = _Scaled(s, rows, s.numel() <= _messages.CHUNK), _Scaled(t, rows, t.numel() <= _messages.CHUNK)
    ds_hat = None if ds is None else torch.zeros_like(s, dtype=rows.acc)
    for source, count in enumerate(counts):
        for c in slices(count, Ds + Dt):
            sent = c if source == ranks.rank else slice(0)
            columns_s = rows.unit(ranks.share(s[sent], (length(c), Ds), source))[0]
            columns_t = rows.unit(ranks.share(t[sent], (length(c), Dt), source))[0]
            for r in slices(n_own, max(length(c), Ds + Dt)):
                (s_hat, _), (t_hat, _) = own[0][r], own[1][r]
                error, map_s = difference(s_hat, t_hat, columns_s, columns_t, rectify)
                total += torch.linalg.vector_norm(error).double().square()
                if ds_hat is not None:
                    if rectify == "both":
                        error.masked_fill_(map_s < 0, 0)
                    ds_hat[r].addmm_(error, columns_s, alpha=4 / n**2)
    if ds is not None and ds_hat is not None:
        for r in slices(n_own, Ds):
            ds[r] = rows.through(ds_hat[r], *own[0][r]).to(ds.dtype)
    return ranks.sum_(total) / n**2


class _Relation(torch.autograd.Function):
    """Scope "batch", and "inter" by Grams: forward forms the gradient of own rows from what all ranks send."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        ranks: Ranks,
        sizes: list[int],
        scope: str,
        rectify: str,
        algorithm: str,
        rows: Rows,
        with_grad: bool,
    ) -> Tensor:
        dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))
        s, t = _groups(student, scope), _groups(teacher, scope)
        ds = _groups(dstudent, scope) if with_grad else None
        counts = sizes if scope == "inter" else [size * student.shape[1] for size in sizes]
        # Autocast would round the products; the maths stays in its accumulation dtype.
        with torch.autocast(student.device.type, enabled=False):
            if algorithm == "gram":
                loss = gram(s, t, ds, rows, sum(counts), _messages.CHUNK, ranks.sum_)
            else:
                loss = _tile(s[0], t[0], None if ds is None else ds[0], counts, rows, ranks, rectify)
        ctx.save_for_backward(dstudent)
        ctx.dtype = student.dtype
        return loss.to(rows.acc)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("relation_loss")
        (dstudent,) = ctx.saved_tensors
        return scaled(dstudent, dloss, ctx.dtype), *(None,) * 8


class _Inter(torch.autograd.Function):
    """Scope "inter" of several layers: a rank relates the images of all ranks at its share of the tokens.

    All layers take two messages: one sends features, one returns gradients. The similarities of a zero row are 0, so
    the padding of the last shares changes only the mean, which every rank takes over the same number of tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        sizes: list[int],
        impl: Backend,
        with_grad: bool,
        maps: list[Maps],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n_layers, own, world = len(maps), sizes[ranks.rank], ranks.world
        students = tensors[:n_layers]
        shares = [-(-x.shape[1] // world) for x in tensors]

        def shapes(images: int, of: Sequence[Tensor] = tensors) -> Shapes:
            return [(images, share, x.shape[-1]) for share, x in zip(shares, of, strict=False)]

        pieces = [[x[:, r * n : (r + 1) * n] for n, x in zip(shares, tensors, strict=True)] for r in range(world)]
        received = ranks.exchange(pieces, [shapes(own)] * world, [shapes(size) for size in sizes])
        images = [torch.cat(parts) for parts in zip(*received, strict=True)]
        losses, gradients = [], []
        with torch.autocast(tensors[0].device.type, enabled=False):
            for s, t, of_layer in zip(images[:n_layers], images[n_layers:], maps, strict=True):
                loss, ds = run(impl, "relation_fwd", s, t, *of_layer, with_grad)
                losses.append(loss)
                gradients.append(ds)
        ctx.scales = [share / s.shape[1] for share, s in zip(shares, students, strict=False)]
        ctx.dtypes = [s.dtype for s in students]
        if with_grad:
            pieces = [list(parts) for parts in zip(*(ds.split(sizes) for ds in gradients), strict=True)]
            received = ranks.exchange(
                pieces, [shapes(size, students) for size in sizes], [shapes(own, students)] * world
            )
            gradients = [
                torch.cat(parts, 1)[:, : s.shape[1]].contiguous()
                for parts, s in zip(zip(*received, strict=True), students, strict=True)
            ]
        ctx.save_for_backward(*gradients)
        total = ranks.sum_(torch.stack([x.double() * scale for x, scale in zip(losses, ctx.scales, strict=True)]))
        return tuple(x.to(loss.dtype, copy=True) for x, loss in zip(total.unbind(), losses, strict=True))

    @staticmethod
    def backward(ctx: Any, *dlosses: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("relation_loss")
        gradients = [
            scaled(stored, dloss * scale, dtype)
            for stored, dloss, scale, dtype in zip(ctx.saved_tensors, dlosses, ctx.scales, ctx.dtypes, strict=True)
        ]
        return *(None,) * 5, *gradients, *(None,) * len(gradients)


def spanning(calls: Sequence[RelationCall], ranks: Ranks, agreed: Agreed) -> list[Tensor]:
    """Return the losses of calls of one scope, "inter" or "batch", over all ranks.

    Features for "inter" are sent in one message.
    """
    sizes = agreed.sizes
    losses: list[Tensor | None] = [None] * len(calls)
    together: dict[tuple[torch.device, Backend], list[int]] = {}
    for i, call in enumerate(calls):
        s, t, scope, _, normalize, rectify, eps, chosen, backend = call
        if chosen == "auto":
            # "inter" sends a rank's features and returns the gradient; "batch" receives the features of all ranks.
            n = 2 * max(sizes) if scope == "inter" else sum(sizes) * s.shape[1]
            chosen = pick_algorithm(n, s, t, rectify, agreed.fast_float64)
        if scope == "inter" and chosen == "tile":
            together.setdefault((s.device, resolve(backend, "relation_fwd", s, t)), []).append(i)
        else:
            rows = Rows(normalize, max(eps, EPS_FLOOR), accumulator(s, t))
            losses[i] = _Relation.apply(s, t, ranks, sizes, scope, rectify, chosen, rows, wants_grad(s))
    for (_, impl), layers in together.items():
        own, theirs = [calls[i].student for i in layers], [calls[i].teacher for i in layers]
        maps = []
        for call in (calls[i] for i in layers):
            auto = call.algorithm == "auto"
            local = cheaper(sum(sizes), call.student, call.teacher, call.rectify, impl) if auto else call.algorithm
            maps.append(call.maps(local))
        found = _Inter.apply(ranks, sizes, impl, agreed.with_grad, maps, *own, *theirs)
        for i, loss in zip(layers, found, strict=True):
            losses[i] = loss
    return [Averaged.apply(loss, ranks.world) for loss in losses]


def _own_rows(x: Tensor, index: Tensor, start: int) -> Tensor:
    """Return (K, D): the rows of the global batch that are on this rank, zeros for the others."""
    N, last = x.shape[1], x.shape[0] * x.shape[1] - 1
    local = (index - start).clamp(0, last)
    return x[local // N, local % N].masked_fill((index - start != local)[:, None], 0)


def sampled(calls: Sequence[RelationCall], indices: Sequence[Tensor], ranks: Ranks, sizes: list[int]) -> list[Tensor]:
    """Return the loss of the K x K map of sampled rows on every rank; gradients go to the rank that has the row."""
    rows = []
    for (s, t, *_), index in zip(calls, indices, strict=True):
        total, start = sum(sizes) * s.shape[1], sum(sizes[: ranks.rank]) * s.shape[1]
        check.rows("index", index, total)
        dtype = torch.promote_types(s.dtype, t.dtype)
        rows.append(torch.cat([_own_rows(x, index, start).to(dtype) for x in (s, t)], -1))
    # Each row is x + 0 + ... + 0: exact in any dtype. Layers of equal shape share a message.
    if len({(x.dtype, x.device) for x in rows}) == 1:
        parts = Sum.apply(torch.cat([x.flatten() for x in rows]), ranks).split([x.numel() for x in rows])
        rows = [part.view(x.shape) for part, x in zip(parts, rows, strict=True)]
    else:
        rows = [Sum.apply(x, ranks) for x in rows]
    losses = []
    for call, both in zip(calls, rows, strict=True):
        Ds = call.student.shape[-1]
        own, theirs = both[:, :Ds].to(call.student.dtype), both[:, Ds:].detach().to(call.teacher.dtype)
        of_rows = call._replace(student=own[None], teacher=theirs[None], scope="intra", rows=None)
        losses.append(Averaged.apply(run_relation(of_rows), ranks.world))
    return losses


@torch.compiler.disable
def relation_over_ranks(call: RelationCall, group: Group) -> Tensor:
    """Return relation_loss of the batch of all ranks.

    "intra" sends a scalar. "inter" and "batch" send D x D Grams or features (pick_algorithm). For "inter" a rank gets
    its share of the tokens of all images; for "batch" features are received in pieces: at any time a rank holds at most
    one local batch's worth of other ranks' features. `index` sends those rows.
    """
    ranks = Ranks(group)
    if ranks.world == 1:
        check_relation(call)
        return run_relation(call)
    student, teacher, scope, index, normalize, rectify, eps, algorithm, backend = call

    def arguments() -> Own:
        check_relation(call)
        if scope == "batch" and index is None:
            resolve_plain(backend, "relation_loss of scope 'batch' over a process group")
        elif scope == "inter" and algorithm == "gram":
            resolve_plain(backend, "relation_loss of scope 'inter' by Grams over a process group")
        else:
            resolve(backend, "relation_fwd", student, teacher)
        about: About = {"function": "relation_loss", "student": layout(student), "teacher": layout(teacher)}
        about |= {"scope": scope, "index": None if index is None else tuple(index.shape)}
        about |= {"normalize": normalize, "rectify": rectify, "eps": eps, "algorithm": algorithm}
        return Own(about, len(student), has_fast_float64(student.device), wants_grad(student))

    agreed = ranks.agree(arguments)
    if index is not None:
        index = ranks.share(index.to(student.device, non_blocking=True), index.shape, 0)
        return sampled([call], [index], ranks, agreed.sizes)[0]
    if scope == "intra":
        return mean_over_ranks([run_relation(call)], ranks, agreed.sizes)[0]
    return spanning([call], ranks, agreed)[0]
