"""The losses that span images, over the global batch of a process group; the only place that knows ranks.

Every rank gets the loss of one process on the concatenated batch (images in the order of the ranks, which may hold
different numbers of them). Gradients are that loss's times the number of ranks: DistributedDataParallel averages over
ranks, so parameter gradients come out as those of the single process, and a term that is a mean over the local batch
weighs as it would there. All collectives are in forward: a gradient that reaches only some ranks cannot hang, and the
incoming gradient must be the same on every rank, as it is wherever ranks add up the same terms.

A call starts with one small all-gather that the host waits for: the sizes, and whether the ranks agree. Arguments that
one rank refuses, or on which ranks disagree, are an error on every rank. Hence no CUDA-graph capture, and a graph break
in torch.compile.
"""

import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import functional as F
from fastkd._precision import accumulator, has_fast_float64, matrix_gain, stored_gradient
from fastkd.ops._autograd import refuse_double_backward, refuse_transforms, scaled, wants_grad
from fastkd.ops._dispatch import Backend, call, resolve, resolve_plain
from fastkd.ops.diversity import check_intra_divergence
from fastkd.ops.moments import Distance, Moments, bn_stat_loss_and_moments, check_bn_stat
from fastkd.ops.relation import Algorithm, Rectify, Scope, check_manifold, check_relation
from fastkd.ops.relation import manifold_layers as local_manifold_layers
from fastkd.ops.relation import pick_algorithm as pick_local

__all__ = ["batch_moments", "bn_stat_loss", "intra_divergence_loss", "manifold_loss", "relation_loss"]

_CHUNK = 1 << 22  # elements of a message or a temporary: 16 MB in float32
# Bytes of all ranks together that every rank takes whole and works on alone: waiting for more messages costs more.
SMALL = 1 << 22
_STATE = 5056  # bytes of a CPU generator's state; a GPU's is smaller

Group: TypeAlias = "dist.ProcessGroup | None"  # a string: PyTorch can be built without it
Shapes: TypeAlias = "Sequence[tuple[int, ...]]"
About = dict[str, object]  # what must be the same on every rank


class _Own(NamedTuple):
    """What a rank tells the others before a call."""

    about: About  # the same everywhere, or an error
    size: int = 0  # of images
    fast_float64: bool = True
    with_grad: bool = False
    features: Sequence[Tensor] = ()  # that all ranks take whole where they are small
    generator: torch.Generator | None = None  # the first rank's is the one that all draw from


class _Agreed(NamedTuple):
    """What every rank knows then."""

    sizes: list[int]
    fast_float64: bool  # on every rank
    with_grad: bool  # on some rank: the others must help to form it
    state: Tensor  # of the first rank's generator
    draws_on_host: bool  # that generator
    images: Tensor | None  # everyone's features, if they came along


class _Past(NamedTuple):
    """The call before on a process group, as every rank knows it."""

    digest: int
    sizes: list[int]
    image: int  # bytes of the features of an image
    again: bool  # it was like the one before it

    @property
    def bytes(self) -> list[int]:
        """Per rank."""
        return [size * self.image for size in self.sizes]


_PAST: "weakref.WeakKeyDictionary[Any, _Past]" = weakref.WeakKeyDictionary()


class _Ranks:
    """The ranks of one call, and what they tell each other."""

    def __init__(self, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("fastkd.distributed needs torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group must be one that this process belongs to")

    def agree(self, arguments: Callable[[], _Own]) -> _Agreed:
        """What the ranks are up to, once every rank's arguments are good and in agreement.

        After two calls alike the features of a third are sent along: all ranks know how much to expect, and one whose
        arguments are others sends as much of nothing.

        Args:
            arguments: checks them and gives this rank's.

        Raises, on every rank: this rank's own error, else ValueError with another's or with what differs.
        """
        error: Exception | None = None
        own = _Own({})
        try:
            own = arguments()
        except Exception as caught:  # whatever it is, the others wait
            error = caught
        digest_bytes = hashlib.blake2b(repr(own.about).encode(), digest_size=8).digest()
        digest = int.from_bytes(digest_bytes, "big", signed=True)
        state = torch.zeros(_STATE, dtype=torch.uint8, device="cpu")
        on_host = own.generator is None or own.generator.device.type == "cpu"
        if own.generator is not None and self.rank == 0:
            drawn_from = own.generator.get_state()
            state[: len(drawn_from)] = drawn_from
        row = torch.tensor(
            [digest, own.size, own.fast_float64, own.with_grad, on_host, error is not None], device="cpu"
        )
        # On the host where the group can: nothing then waits for the device.
        config = dist.get_backend_config(self.group)
        message = torch.cat([row.view(torch.uint8), state])[None]
        message = message.to("cpu" if "cpu:" in config else config.partition(":")[0])
        wait = start_gather(message, [1] * self.world, self.group)
        past, images = _PAST.pop(self.group, None), None
        if past is not None and past.again:
            images = torch.empty(sum(past.bytes), dtype=torch.uint8, device="cpu")
            parts = images.split(past.bytes)
            if (digest, own.size) == (past.digest, past.sizes[self.rank]):
                _pack(parts[self.rank], own.features)
            start_gather(parts[self.rank], past.bytes, self.group, parts)()
        everyones = torch.cat(wait()).cpu()
        table = everyones[:, : row.nbytes].contiguous().view(torch.int64).tolist()
        digests, sizes, fast_float64, with_grad, hosts, errors = map(list, zip(*table, strict=True))
        if len(set(digests)) == 1 and not any(errors):
            as_before = past is not None and (past.digest, past.sizes) == (digest, sizes)
            if own.features and _is_small(own.features, sizes) and own.features[0].device.type == "cpu":
                _PAST[self.group] = _Past(digest, sizes, _image_bytes(own.features), as_before)
            came = images if as_before else None
            return _Agreed(sizes, all(fast_float64), any(with_grad), everyones[0, row.nbytes :], bool(hosts[0]), came)
        told: list[Any] = [None] * self.world
        dist.all_gather_object(
            told, own.about if error is None else f"{type(error).__name__}: {error}", group=self.group
        )
        if error is not None:
            raise error
        raise ValueError(_disagreement(told))

    def sum_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def share(self, x: Tensor, shape: Sequence[int], source: int) -> Tensor:
        """x of the rank `source`, of that shape, on every rank."""
        x = x.contiguous() if self.rank == source else x.new_empty(shape)
        dist.broadcast(x, group=self.group, group_src=source)
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Each rank's x (its size, ...) one after the other."""
        return torch.cat(self.gathered(x, sizes))

    def gathered(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Each rank's x (its size, ...)."""
        return start_gather(x, sizes, self.group)()

    def exchange(
        self, pieces: Sequence[Sequence[Tensor]], sent: Sequence[Shapes], taken: Sequence[Shapes]
    ) -> list[list[Tensor]]:
        """Sends pieces[r] to each rank r, all in one message, and returns what came from each.

        Args:
            pieces: tensors (images, tokens, D) per rank, alike in dtype on every rank.
            sent: their shapes on the way, per rank; tokens that a piece lacks are zeros.
            taken: the shapes that come from each rank.
        """
        dtypes = [x.dtype for x in pieces[0]]
        out_bytes, in_bytes = ([_offsets(shapes, dtypes)[-1] for shapes in each] for each in (sent, taken))
        message = pieces[0][0].new_empty(sum(out_bytes), dtype=torch.uint8)
        for part, own, shapes in zip(message.split(out_bytes), pieces, sent, strict=True):
            for view, x in zip(_views(part, shapes, dtypes), own, strict=True):
                view[:, : x.shape[1]] = x
                view[:, x.shape[1] :] = 0
        received = message.new_empty(sum(in_bytes))
        dist.all_to_all_single(received, message, in_bytes, out_bytes, group=self.group)
        return [_views(part, shapes, dtypes) for part, shapes in zip(received.split(in_bytes), taken, strict=True)]


def start_gather(
    x: Tensor, sizes: Sequence[int], group: Any, parts: Sequence[Tensor] | None = None
) -> Callable[[], list[Tensor]]:
    """Sends x to every rank of the group; what it returns waits for each rank's x (its size, ...), in their order.

    On CPUs straight from rank to rank: gloo's all-gather goes round a ring, in pieces and by other threads. There this
    rank's own part is x itself, not to be written to, and the others' can go to given places: `parts`, x among them.
    """
    rank = dist.get_rank(group)
    if x.device.type == "cpu":
        x = x.contiguous()
        if parts is None:
            parts = [x if r == rank else x.new_empty((size, *x.shape[1:])) for r, size in enumerate(sizes)]
        others = [(rank + i) % len(sizes) for i in range(1, len(sizes))]
        messages = [dist.P2POp(dist.isend, x, group=group, group_peer=r) for r in others]
        messages += [dist.P2POp(dist.irecv, parts[r], group=group, group_peer=r) for r in others]
        under_way = dist.batch_isend_irecv(messages) if messages else []
    else:
        padded = x.new_zeros((max(sizes), *x.shape[1:]))  # the collective takes equal shapes only
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        under_way = [dist.all_gather(parts, padded, group=group, async_op=True)]

    def wait() -> list[Tensor]:
        for work in under_way:
            work.wait()
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    return wait


def _offsets(shapes: Shapes, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Where tensors begin that lie one after the other in bytes, each at a multiple of 16, and where the last ends."""
    sizes = (-(-math.prod(shape) * dtype.itemsize // 16) * 16 for shape, dtype in zip(shapes, dtypes, strict=True))
    return list(itertools.accumulate(sizes, initial=0))


def _views(message: Tensor, shapes: Shapes, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors of those shapes and dtypes in a message of bytes."""
    starts = _offsets(shapes, dtypes)
    return [
        message[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, shape, dtype in zip(starts, shapes, dtypes, strict=False)
    ]


def _image_bytes(features: Sequence[Tensor]) -> int:
    """Of one image in all features, each at a multiple of 16."""
    return _offsets([x.shape[1:] for x in features], [x.dtype for x in features])[-1]


def _is_small(features: Sequence[Tensor], sizes: list[int]) -> bool:
    """Whether every rank takes them whole."""
    return sum(sizes) * _image_bytes(features) <= SMALL and len({x.device for x in features}) == 1


def _images(message: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """The features of the images in a message of bytes, which come one after the other, each with all of its features.

    So each rank's images are one piece of the message, and all ranks' one tensor per feature.
    """
    starts = _offsets([x.shape[1:] for x in features], [x.dtype for x in features])
    of_image = message.view(-1, starts[-1])
    return [
        of_image[:, start : start + x[0].numel() * x.itemsize].view(x.dtype).view(-1, *x.shape[1:])
        for start, x in zip(starts, features, strict=False)
    ]


def _pack(message: Tensor, features: Sequence[Tensor]) -> None:
    torch._foreach_copy_(_images(message, features), [x.detach() for x in features])


def spans_ranks(group: Group) -> bool:
    """Whether a module's process_group stands for more than this process."""
    return group is not None and dist.get_world_size(group) > 1


def _disagreement(told: list[Any]) -> str:
    """The message of ranks whose arguments differ, the same on each."""
    for rank, about in enumerate(told):
        if isinstance(about, str):
            return f"rank {rank} of the process group refused its arguments: {about}"
    differing = []
    for key in dict.fromkeys(key for about in told for key in about):
        values = [about.get(key) for about in told]
        if any(value != values[0] for value in values):
            differing.append(f"{key}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values)))
    return f"the ranks of the process group must agree, got {'; '.join(differing)}"


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {x.device.type}"


def _layout(x: Tensor) -> str:
    """All but the number of images."""
    return f"({', '.join(['B', *map(str, x.shape[1:])])}) {_kind(x)}"


class _Averaged(torch.autograd.Function):
    """x itself; its gradient times the world size, by which DDP divides. Only on results, so 16 bits round once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: int) -> Tensor:
        ctx.world = world
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx * ctx.world, None


class _Sum(torch.autograd.Function):
    """Sum over ranks. What every rank makes of it is the same loss, so its gradient is already the whole one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: _Ranks) -> Tensor:
        return ranks.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class _Gather(torch.autograd.Function):
    """Every rank's rows; as in _Sum, a rank's own slice of the gradient is all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: _Ranks, sizes: Sequence[int]) -> Tensor:
        ctx.start, ctx.size = sum(sizes[: ranks.rank]), sizes[ranks.rank]
        return ranks.gather(x, sizes)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx[ctx.start : ctx.start + ctx.size], None, None


def pick_algorithm(n: int, student: Tensor, teacher: Tensor, rectify: str, fast_float64: bool) -> str:
    """What sends fewer bytes a group: its Grams, or the features of the n rows that pass by a rank.

    gram: 2 (Ds² + Ds Dt + Dt²) float64 (an all-reduce sends twice).   tile: n (Ds + Dt) elements as they are.
    As in one process, gram never with rectification nor where a rank's float64 is crippled.
    """
    if rectify != "none" or not fast_float64:
        return "tile"
    Ds, Dt = student.shape[-1], teacher.shape[-1]
    features = n * (Ds * student.element_size() + Dt * teacher.element_size())
    return "gram" if 16 * (Ds * Ds + Ds * Dt + Dt * Dt) < features else "tile"


def _slices(total: int, elements_each: int) -> Iterator[slice]:
    """Cuts of `total` items of `elements_each` elements into pieces of at most _CHUNK."""
    step = max(1, _CHUNK // max(1, elements_each))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _length(piece: slice) -> int:
    return piece.stop - piece.start


def _groups(x: Tensor, scope: str) -> Tensor:
    """(B, N, D) -> (G, n, D)."""
    return x.transpose(0, 1) if scope == "inter" else x.reshape(1, -1, x.shape[-1])


class _Rows:
    """How rows are scaled: to unit length, or not; a row whose norm is at most eps relates as 0."""

    def __init__(self, normalize: bool, eps: float, acc: torch.dtype) -> None:
        self.normalize, self.eps, self.acc = normalize, eps, acc

    def unit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂, r) of x̂ = r x."""
        x = x.to(self.acc)
        if not self.normalize:
            return x, x.new_ones(()).expand(*x.shape[:-1], 1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.reciprocal().masked_fill_(norm <= self.eps, 0)
        return x * r, r

    def through(self, ds_hat: Tensor, s_hat: Tensor, r: Tensor) -> Tensor:
        """dS = r (dŜ - ŝ <ŝ, dŜ>)."""
        return r * (ds_hat - s_hat * (s_hat * ds_hat).sum(-1, keepdim=True)) if self.normalize else ds_hat


class _Scaled:
    """Strips of x as (x̂, r): scaled at once where that takes little memory, else each when it is asked for."""

    def __init__(self, x: Tensor, rows: _Rows, at_once: bool) -> None:
        self.x, self.rows, self.whole = x, rows, rows.unit(x) if at_once else None

    def __getitem__(self, strip: slice) -> tuple[Tensor, Tensor]:
        if self.whole is None:
            return self.rows.unit(self.x[strip])
        x_hat, r = self.whole
        return x_hat[strip], r[strip]


def _gram(s: Tensor, t: Tensor, ds: Tensor | None, counts: list[int], rows: _Rows, ranks: _Ranks) -> Tensor:
    """||SᵀS||² - 2||SᵀT||² + ||TᵀT||² with the Grams summed over ranks, dS = 4/(G n²) (S(SᵀS) - T(TᵀS)) of own rows.

    What is sent does not grow with the batch.
    """
    (G, n_own, Ds), Dt, n = s.shape, t.shape[-1], sum(counts)
    sizes = [Ds * Ds, Ds * Dt, Dt * Dt]
    total = s.new_zeros((), dtype=torch.float64)
    for g in _slices(G, sum(sizes)):
        # One message; ST stands in it as (Ds, Dt).
        message = s.new_zeros(_length(g) * sum(sizes), dtype=torch.float64)
        parts = message.split([_length(g) * size for size in sizes])
        ss, st, tt = (x.view(-1, a, b) for x, (a, b) in zip(parts, ((Ds, Ds), (Ds, Dt), (Dt, Dt)), strict=True))
        strips = list(_slices(n_own, _length(g) * (Ds + Dt)))
        for r in strips:
            s64, t64 = rows.unit(s[g, r])[0].double(), rows.unit(t[g, r])[0].double()
            ss.baddbmm_(s64.mT, s64)
            st.baddbmm_(s64.mT, t64)
            tt.baddbmm_(t64.mT, t64)
        ranks.sum_(message)
        total += ss.square().sum() - 2 * st.square().sum() + tt.square().sum()
        if ds is not None:
            ss_acc, ts_acc = ss.to(rows.acc), st.mT.to(rows.acc)
            for r in strips:
                (s_hat, inverse), (t_hat, _) = rows.unit(s[g, r]), rows.unit(t[g, r])
                ds_hat = torch.baddbmm(s_hat @ ss_acc, t_hat, ts_acc, alpha=-1).mul_(4 / (G * n * n))
                ds[g, r] = rows.through(ds_hat, s_hat, inverse).to(ds.dtype)
    return total.clamp_min(0) / (G * n * n)  # rounding alone can take a zero below 0


def _tile(
    s: Tensor, t: Tensor, ds: Tensor | None, counts: list[int], rows: _Rows, ranks: _Ranks, rectify: str
) -> Tensor:
    """Own rows of the one map (n_own, Ds) against the columns of each rank in turn, whose features pass by in pieces.

    The map is symmetric, so dŜ = 4/n² E' Ŝ of own rows needs these strips alone; only the loss is summed.
    """
    (n_own, Ds), Dt, n = s.shape, t.shape[-1], sum(counts)
    total = s.new_zeros((), dtype=torch.float64)
    s, t = s.contiguous(), t.contiguous()
    own = _Scaled(s, rows, s.numel() <= _CHUNK), _Scaled(t, rows, t.numel() <= _CHUNK)
    ds_hat = None if ds is None else torch.zeros_like(s, dtype=rows.acc)
    for source, count in enumerate(counts):
        for c in _slices(count, Ds + Dt):
            sent = c if source == ranks.rank else slice(0)
            columns_s = rows.unit(ranks.share(s[sent], (_length(c), Ds), source))[0]
            columns_t = rows.unit(ranks.share(t[sent], (_length(c), Dt), source))[0]
            for r in _slices(n_own, max(_length(c), Ds + Dt)):
                (s_hat, _), (t_hat, _) = own[0][r], own[1][r]
                if rectify == "none":
                    error = torch.addmm(s_hat @ columns_s.T, t_hat, columns_t.T, alpha=-1)
                else:
                    map_s, map_t = s_hat @ columns_s.T, t_hat @ columns_t.T
                    error = (map_s.clamp_min(0) if rectify == "both" else map_s) - map_t.clamp_min_(0)
                total += torch.linalg.vector_norm(error).double().square()
                if ds_hat is not None:
                    if rectify == "both":
                        error.masked_fill_(map_s < 0, 0)
                    ds_hat[r].addmm_(error, columns_s, alpha=4 / n**2)
    if ds is not None and ds_hat is not None:
        for r in _slices(n_own, Ds):
            ds[r] = rows.through(ds_hat[r], *own[0][r]).to(ds.dtype)
    return ranks.sum_(total) / n**2


class _Relation(torch.autograd.Function):
    """Scope "batch", and "inter" by Grams: forward forms the gradient of own rows from what all ranks send."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        ranks: _Ranks,
        sizes: list[int],
        scope: str,
        rectify: str,
        algorithm: str,
        rows: _Rows,
        with_grad: bool,
    ) -> Tensor:
        dstudent = student.new_empty(student.shape if with_grad else (0,), dtype=stored_gradient(student))
        s, t = _groups(student, scope), _groups(teacher, scope)
        ds = _groups(dstudent, scope) if with_grad else None
        counts = sizes if scope == "inter" else [size * student.shape[1] for size in sizes]
        # Autocast would round the products; the maths stays in its accumulation dtype.
        with torch.autocast(student.device.type, enabled=False):
            if algorithm == "gram":
                loss = _gram(s, t, ds, counts, rows, ranks)
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


class _Whole(torch.autograd.Function):
    """Every rank's images of several features. As in _Sum, a rank's own slice of the gradient is all of it."""

    @staticmethod
    def forward(ctx: Any, ranks: _Ranks, agreed: _Agreed, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        sizes, images = agreed.sizes, agreed.images
        ctx.own = slice(sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1]))
        if images is None:
            bytes_of = [size * _image_bytes(features) for size in sizes]
            message = features[0].new_empty(bytes_of[ranks.rank], dtype=torch.uint8)
            _pack(message, features)
            images = ranks.gather(message, bytes_of)
        return tuple(_images(images, features))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *(None if dx is None else dx[ctx.own] for dx in gradients)


class _Inter(torch.autograd.Function):
    """Scope "inter" of several layers: a rank relates the images of all ranks at its share of the tokens.

    Two messages for all layers: features go out, gradients come home. A row of zeros relates as 0, so what fills up
    the last shares changes nothing but the mean, which every rank takes over as many tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ranks: _Ranks,
        sizes: list[int],
        impl: Backend,
        with_grad: bool,
        options: list[tuple[Any, ...]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        n_layers, own, world = len(options), sizes[ranks.rank], ranks.world
        students = tensors[:n_layers]
        shares = [-(-x.shape[1] // world) for x in tensors]

        def shapes(images: int, of: Sequence[Tensor] = tensors) -> Shapes:
            return [(images, share, x.shape[-1]) for share, x in zip(shares, of, strict=False)]

        pieces = [[x[:, r * n : (r + 1) * n] for n, x in zip(shares, tensors, strict=True)] for r in range(world)]
        received = ranks.exchange(pieces, [shapes(own)] * world, [shapes(size) for size in sizes])
        images = [torch.cat(parts) for parts in zip(*received, strict=True)]
        losses, gradients = [], []
        with torch.autocast(tensors[0].device.type, enabled=False):
            for s, t, option in zip(images[:n_layers], images[n_layers:], options, strict=True):
                loss, ds = call(impl, "relation_fwd", s, t, "inter", *option, with_grad)
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


def _spanning(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    ranks: _Ranks,
    agreed: _Agreed,
    *,
    scope: str,
    normalize: bool = True,
    rectify: str = "none",
    eps: float = 1e-12,
    algorithm: str = "auto",
    backend: Backend = "auto",
) -> list[Tensor]:
    """Scope "inter" or "batch" over all ranks, layer by layer; what "inter" sends as features goes together."""
    sizes = agreed.sizes
    losses: list[Tensor | None] = [None] * len(students)
    together: dict[tuple[torch.device, Backend], list[int]] = {}
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        chosen = algorithm
        if algorithm == "auto":
            # "inter" sends a rank's features away and the gradient back, "batch" brings those of all ranks.
            n = 2 * max(sizes) if scope == "inter" else sum(sizes) * s.shape[1]
            chosen = pick_algorithm(n, s, t, rectify, agreed.fast_float64)
        if scope == "inter" and chosen == "tile":
            together.setdefault((s.device, resolve(backend, "relation_fwd", s, t)), []).append(i)
        else:
            rows = _Rows(normalize, eps, accumulator(s, t))
            losses[i] = _Relation.apply(s, t, ranks, sizes, scope, rectify, chosen, rows, wants_grad(s))
    for (device, impl), layers in together.items():
        own, theirs = [students[i] for i in layers], [teachers[i] for i in layers]
        local = [
            algorithm
            if algorithm != "auto"
            else pick_local(sum(sizes), s.shape[-1], t.shape[-1], rectify, device, matrix_gain(device, s, t))
            for s, t in zip(own, theirs, strict=True)
        ]
        options = [(normalize, rectify, float(eps), each) for each in local]
        found = _Inter.apply(ranks, sizes, impl, agreed.with_grad, options, *own, *theirs)
        for i, loss in zip(layers, found, strict=True):
            losses[i] = loss
    return [_Averaged.apply(loss, ranks.world) for loss in losses]


def _own_rows(x: Tensor, index: Tensor, start: int) -> Tensor:
    """(K, D): the rows of the global batch that stand here, zeros for the others."""
    N, last = x.shape[1], x.shape[0] * x.shape[1] - 1
    local = (index - start).clamp(0, last)
    return x[local // N, local % N].masked_fill((index - start != local)[:, None], 0)


def _sampled(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    indices: Sequence[Tensor],
    ranks: _Ranks,
    sizes: list[int],
    **options: Any,
) -> list[Tensor]:
    """The K x K map of rows of the global batch, on every rank; their gradient goes back to where they stand."""
    pairs = list(zip(students, teachers, strict=True))
    rows = []
    for (s, t), index in zip(pairs, indices, strict=True):
        total, start = sum(sizes) * s.shape[1], sum(sizes[: ranks.rank]) * s.shape[1]
        torch._assert_async(((index >= 0) & (index < total)).all(), f"index must lie in [0, B*N = {total})")
        dtype = torch.promote_types(s.dtype, t.dtype)
        rows.append(torch.cat([_own_rows(x, index, start).to(dtype) for x in (s, t)], -1))
    # Each row is x + 0 + ... + 0: exact in any dtype that holds both. One message where layers are alike.
    if len({(x.dtype, x.device) for x in rows}) == 1:
        parts = _Sum.apply(torch.cat([x.flatten() for x in rows]), ranks).split([x.numel() for x in rows])
        rows = [part.view(x.shape) for part, x in zip(parts, rows, strict=True)]
    else:
        rows = [_Sum.apply(x, ranks) for x in rows]
    losses = []
    for (s, t), both in zip(pairs, rows, strict=True):
        Ds = s.shape[-1]
        own, theirs = both[:, :Ds].to(s.dtype), both[:, Ds:].detach().to(t.dtype)
        losses.append(_Averaged.apply(F.relation_loss(own[None], theirs[None], **options), ranks.world))
    return losses


def _joined(losses: Sequence[Tensor], ranks: _Ranks, sizes: list[int]) -> list[Tensor]:
    """Means over all images from the means over each rank's, in one message."""
    share = sizes[ranks.rank] / sum(sizes)
    joined = _Sum.apply(torch.stack([loss.double() * share for loss in losses]), ranks)
    return [_Averaged.apply(x.to(loss.dtype), ranks.world) for x, loss in zip(joined.unbind(), losses, strict=True)]


@torch.compiler.disable
def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scope: Scope = "intra",
    index: Tensor | None = None,
    normalize: bool = True,
    rectify: Rectify = "none",
    eps: float = 1e-12,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """fastkd.relation_loss of the batch of all ranks: Hao et al. 2022 (arXiv:2107.01378), DINOv3 (arXiv:2508.10104).

        L = 1/(G n²) Σ_g || f(S_g S_gᵀ) - f(T_g T_gᵀ) ||²,  rows of S_g and T_g of unit length, from every rank

    "intra" sends a scalar. "inter" and "batch" send D x D Grams or features (pick_algorithm). For "inter" a rank gets
    its share of the tokens of all images; for "batch" features pass by in pieces: at no time a rank holds more than its
    own batch besides its own. `index` sends those rows.

    Args:
        student: (B, N, Ds), this rank's; B may differ between ranks, all else may not. Differentiable.
        teacher: (B, N, Dt). A constant.
        scope: "intra", "inter" (N maps of all images) or "batch" (one map of all tokens of all images, exact).
        index: (K,) int64 rows of the flattened (ΣB*N, D) tokens of all ranks, in their order, for scope "batch". The
            first rank's counts.
        normalize, rectify, eps: as in fastkd.relation_loss.
        algorithm: "tile" sends features, "gram" Grams (no rectification), "auto" what is less; in "intra" and with
            `index`, as in one process.
        backend: of "intra", `index` and "inter" by features; all else is PyTorch operations ("auto" or "eager").
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 if an input is).

    Raises:
        ValueError: ranks that disagree on widths, tokens, dtypes or options, on every rank; as in fastkd.relation_loss,
            and then on the other ranks too.
        TypeError, RuntimeError: as in fastkd.relation_loss; no process group.
    """
    ranks = _Ranks(group)
    options: dict[str, Any] = {"normalize": normalize, "rectify": rectify, "eps": eps, "algorithm": algorithm}
    if ranks.world == 1:
        return F.relation_loss(student, teacher, scope=scope, index=index, backend=backend, **options)

    def arguments() -> _Own:
        check_relation(student, teacher, scope, index, rectify, eps, algorithm)
        refuse_transforms("relation_loss")
        if scope == "batch" and index is None:
            resolve_plain(backend, "relation_loss of scope 'batch' over a process group")
        elif scope == "inter" and algorithm == "gram":
            resolve_plain(backend, "relation_loss of scope 'inter' by Grams over a process group")
        else:
            resolve(backend, "relation_fwd", student, teacher)
        about: About = {"function": "relation_loss", "student": _layout(student), "teacher": _layout(teacher)}
        about["scope"] = scope
        about["index"] = None if index is None else tuple(index.shape)
        return _Own(about | options, len(student), has_fast_float64(student.device), wants_grad(student))

    agreed = ranks.agree(arguments)
    sizes = agreed.sizes
    if index is not None:
        index = ranks.share(index.to(student.device, non_blocking=True), index.shape, 0)
        return _sampled([student], [teacher], [index], ranks, sizes, backend=backend, **options)[0]
    if scope == "intra":
        return _joined([F.relation_loss(student, teacher, backend=backend, **options)], ranks, sizes)[0]
    return _spanning([student], [teacher], ranks, agreed, scope=scope, backend=backend, **options)[0]


@torch.compiler.disable
def manifold_layers(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    intra: float,
    inter: float,
    random: float,
    num_samples: int,
    generator: torch.Generator | None,
    indices: Sequence[Tensor] | None,
    return_terms: bool,
    backend: Backend,
    group: Group,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean of manifold_loss over the layers of the same images, with one agreement and one draw for all of them."""
    ranks = _Ranks(group)

    def arguments() -> _Own:
        about: About = {"function": "manifold_loss", "layers": len(students), "num_samples": num_samples}
        weights = {"intra": intra, "inter": inter, "random": random}
        check_manifold(students, teachers, indices, weights, num_samples)
        about |= weights
        for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
            index = None if indices is None else indices[i]
            resolve(backend, "relation_fwd", s, t)
            if len(s) != len(students[0]):
                raise ValueError(f"student must hold the same images in every layer, got {len(s)} in layer {i}")
            layer = f" of layer {i}" if len(students) > 1 else ""
            about |= {f"student{layer}": _layout(s), f"teacher{layer}": _layout(t)}
            about[f"index{layer}"] = None if index is None else tuple(index.shape)
        refuse_transforms("manifold_loss")
        about["return_terms"] = return_terms
        about["devices"] = len({x.device for x in (*students, *teachers)})
        fast_float64, with_grad = has_fast_float64(students[0].device), wants_grad(*students)
        return _Own(about, len(students[0]), fast_float64, with_grad, features, _source(generator, students[0].device))

    features = [*students, *teachers]
    agreed = ranks.agree(arguments)
    sizes = agreed.sizes
    rows: list[Tensor] = []
    if random or return_terms:
        rows = _draw(students, num_samples, generator, ranks, agreed) if indices is None else list(indices)
        rows = [index.to(students[0].device, non_blocking=True) for index in rows]
        if indices is not None:
            joined = torch.cat(rows)
            rows = list(ranks.share(joined, joined.shape, 0).split([len(index) for index in rows]))
    if _is_small(features, sizes):
        n = len(students)
        whole = _Whole.apply(ranks, agreed, *features)
        loss_and_terms = local_manifold_layers(
            whole[:n],
            [t.detach() for t in whole[n:]],
            intra=intra,
            inter=inter,
            random=random,
            num_samples=num_samples,
            generator=None,
            indices=rows or [torch.zeros(1, dtype=torch.int64, device=x.device) for x in students],
            return_terms=return_terms,
            backend=backend,
        )
        loss, *of_terms = (_Averaged.apply(x, ranks.world) for x in (loss_and_terms[0], *loss_and_terms[1]))
        return (loss, tuple(of_terms)) if return_terms else loss
    pairs = list(zip(students, teachers, strict=True))
    zeros = [s.new_zeros((), dtype=accumulator(s, t)) for s, t in pairs]
    terms = [zeros, zeros, zeros]
    if intra or return_terms:
        terms[0] = _joined([F.relation_loss(s, t, backend=backend) for s, t in pairs], ranks, sizes)
    if inter or return_terms:
        terms[1] = _spanning(students, teachers, ranks, agreed, scope="inter", backend=backend)
    if random or return_terms:
        at_home = [index.to(s.device) for index, s in zip(rows, students, strict=True)]
        terms[2] = _sampled(students, teachers, at_home, ranks, sizes, backend=backend)
    L_intra, L_inter, L_random = (torch.stack(term).mean() for term in terms)
    loss = intra * L_intra + inter * L_inter + random * L_random
    return (loss, (L_intra, L_inter, L_random)) if return_terms else loss


def _source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """PyTorch's own for None."""
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        return generator
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _draw(
    students: Sequence[Tensor], num_samples: int, generator: torch.Generator | None, ranks: _Ranks, agreed: _Agreed
) -> list[Tensor]:
    """Per layer K distinct rows of the global batch, on every rank those that the first one draws."""
    generator = _source(generator, students[0].device)
    if ranks.rank > 0:
        generator = torch.Generator("cpu" if agreed.draws_on_host else students[0].device)
        state = agreed.state[: len(generator.get_state())]
        generator.set_state(state.clone())  # it would read a view from the start of what it is a view of
    total = sum(agreed.sizes)
    return [
        torch.randperm(total * s.shape[1], generator=generator, device=generator.device)[:num_samples] for s in students
    ]


@torch.compiler.disable
def manifold_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    num_samples: int = 192,
    generator: torch.Generator | None = None,
    index: Tensor | None = None,
    return_terms: bool = False,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """fastkd.manifold_loss of the batch of all ranks: Hao et al. 2022 (arXiv:2107.01378), weights of its code.

        L = intra L_intra + inter L_inter + random L_random

    with L_intra, L_inter the relation_loss of those scopes over all ranks and L_random that of K rows drawn from all
    ΣB*N tokens.

    Args:
        student: (B, N, Ds), this rank's; B may differ between ranks, all else may not. Differentiable.
        teacher: (B, N, Dt). A constant.
        intra, inter, random: weights >= 0; a term of weight 0 is not computed unless return_terms.
        num_samples: K distinct rows of the random term; all of them where K > ΣB*N.
        generator: source of the draw, which the first rank of the group makes for all; the others' is left alone.
        index: (K,) int64 rows of all ranks' tokens, in their order, instead of a draw. The first rank's counts.
        return_terms: also give the unweighted (intra, inter, random).
        backend: of the relation kernels; an inter term by Grams is PyTorch operations.
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 if an input is), or (scalar, (intra, inter, random)).

    Raises:
        TypeError, ValueError, RuntimeError: as relation_loss; a weight < 0, num_samples < 1.
    """
    if _Ranks(group).world == 1:
        return F.manifold_loss(
            student,
            teacher,
            intra=intra,
            inter=inter,
            random=random,
            num_samples=num_samples,
            generator=generator,
            index=index,
            return_terms=return_terms,
            backend=backend,
        )
    return manifold_layers(
        [student],
        [teacher],
        intra=intra,
        inter=inter,
        random=random,
        num_samples=num_samples,
        generator=generator,
        indices=None if index is None else [index],
        return_terms=return_terms,
        backend=backend,
        group=group,
    )


def _merged(moments: Moments, channels: Sequence[int], counts: Sequence[int], ranks: _Ranks) -> Moments:
    """(mean, var) over all ranks from each one's (count, mean, M2 = count var), gathered for all layers at once.

    mean = Σ_r n_r/n mean_r,   M2 = Σ_r M2_r + n_r (mean_r - mean)²,   in float64
    """
    # A count is exact in float64 up to 2^53.
    n = torch.tensor(counts, dtype=torch.float64).to(moments[0].device, non_blocking=True)
    flat = [*(x.double() for x in moments), n]
    table = _Gather.apply(torch.cat(flat)[None], ranks, [1] * ranks.world)
    means, variances, n = table.split([len(x) for x in flat], 1)
    share = n / n.sum(0)  # (ranks, layers)
    w = torch.cat([share[:, i, None].expand(-1, C) for i, C in enumerate(channels)], 1)
    mean = (w * means).sum(0)
    var = (w * (variances + (means - mean).square())).sum(0)
    return mean.to(moments[0].dtype), var.to(moments[1].dtype)


@torch.compiler.disable
def batch_moments(x: Tensor, *, backend: Backend = "auto", group: Group = None) -> tuple[Tensor, Tensor]:
    """fastkd.batch_moments of the batch of all ranks, merged from (count, mean, M2): Chan et al. 1979.

        mean_c = 1/M Σ x,  var_c = 1/M Σ (x - mean_c)²,  over all images and positions of all ranks

    Per-image moments (dims="image") span no ranks: fastkd.batch_moments.

    Args:
        x: (B, C, ...), this rank's, float64 | float32 | bfloat16 | float16, any strides; all but C may differ between
            ranks. Differentiable: what the caller makes of the moments must be the same on every rank.
        backend: "auto", "eager", "native" or "triton".
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        (mean, biased var), each (C,), the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on channels or dtype, on every rank; as in fastkd.batch_moments, and then on the
            other ranks too.
        TypeError, RuntimeError: as in fastkd.batch_moments; no process group.
    """
    ranks = _Ranks(group)
    local: list[Moments] = []

    def arguments() -> _Own:
        local.append(F.batch_moments(x, backend=backend))
        return _Own({"function": "batch_moments", "x": f"{x.shape[1]} channels {_kind(x)}"})

    if ranks.world == 1:
        return F.batch_moments(x, backend=backend)
    ranks.agree(arguments)
    mean, var = _merged(local[0], [x.shape[1]], [x[:, 0].numel()], ranks)
    return _Averaged.apply(mean, ranks.world), _Averaged.apply(var, ranks.world)


@torch.compiler.disable
def bn_stat_loss_and_global_moments(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    distance: Distance,
    layer_weights: Sequence[float] | None,
    momentum: float | None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    moments: Sequence[Moments] | None,
    backend: Backend,
    group: Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """bn_stat_loss, and the means and variances that it compared, of all layers end to end (this rank's in "image")."""
    ranks = _Ranks(group)
    options = (distance, layer_weights, momentum, ema, moments)
    if ranks.world == 1:
        return bn_stat_loss_and_moments(inputs, running_means, running_vars, *options, backend)

    def arguments() -> _Own:
        check_bn_stat(inputs, running_means, running_vars, *options, spans_ranks=True)
        about: About = {"function": "bn_stat_loss", "layers": len(inputs), "distance": distance, "momentum": momentum}
        about["layer_weights"] = None if layer_weights is None else list(layer_weights)
        for i, x in enumerate(inputs):
            resolve(backend, "moments_fwd", x)
            about[f"inputs[{i}]"] = f"{x.shape[1]} channels {_kind(x)}"
            if distance == "image" and len(x) != len(inputs[0]):
                raise ValueError(f"inputs must hold the same images, got {len(inputs[0])} and {len(x)}")
        refuse_transforms("bn_stat_loss")
        return _Own(about, len(inputs[0]))

    def merge(own: Moments) -> Moments:
        if distance == "image":
            return own
        return _merged(own, [x.shape[1] for x in inputs], [x[:, 0].numel() for x in inputs], ranks)

    sizes = ranks.agree(arguments).sizes
    loss, mean, var = bn_stat_loss_and_moments(inputs, running_means, running_vars, *options, backend, merge)
    if distance == "image":
        return _joined([loss], ranks, sizes)[0], mean, var
    return _Averaged.apply(loss, ranks.world), mean, var


def bn_stat_loss(
    inputs: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    distance: Distance = "l2",
    layer_weights: Sequence[float] | None = None,
    momentum: float | None = None,
    ema: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    moments: Sequence[Moments] | None = None,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """fastkd.bn_stat_loss with the statistics of the batch of all ranks (DeepInversion, arXiv:1912.08795; GDFQ,
    arXiv:2003.03603; ZeroQ, arXiv:2001.00281). One message carries the moments of all layers.

    Args:
        inputs: per layer this rank's BatchNorm input (B, C, ...); all but C may differ between ranks. Differentiable.
        running_means, running_vars, ema: per layer (C,), the same on every rank. Constants.
        distance, layer_weights, momentum: as in fastkd.bn_stat_loss; "image" is the mean over all ranks' images. One
            element per channel on a rank is enough, except for "image".
        moments: per layer (mean, biased var) of this rank's input, as in fastkd.bn_stat_loss. Differentiable.
        backend: "auto", "eager", "native" or "triton".
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on layers, channels, dtypes or options, on every rank; as in
            fastkd.bn_stat_loss, and then on the other ranks too.
        TypeError, RuntimeError: as in fastkd.bn_stat_loss; no process group.
    """
    loss, _, _ = bn_stat_loss_and_global_moments(
        inputs, running_means, running_vars, distance, layer_weights, momentum, ema, moments, backend, group
    )
    return loss


@torch.compiler.disable
def intra_divergence_loss(
    features: Tensor,
    labels: Tensor,
    *,
    spread_margin: float,
    boundary_margin: float,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """fastkd.intra_divergence_loss, where its formula stands, of the batch of all ranks, whose features are gathered.
    Our formulation of the idea of DearKD's data-free variant (arXiv:2204.12997).

    Args:
        features: (B, D), this rank's; B may differ between ranks, all else may not. Differentiable.
        labels: (B,) integer classes.
        spread_margin, boundary_margin: m₁ >= 0, m₂ >= 0.
        backend: "auto" or "eager": PyTorch operations alone.
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 for float64 input).

    Raises:
        ValueError: ranks that disagree on width, dtype or margins, on every rank; as in fastkd.intra_divergence_loss,
            and then on the other ranks too.
        TypeError, RuntimeError: as in fastkd.intra_divergence_loss; no process group.
    """
    ranks = _Ranks(group)
    margins = {"spread_margin": spread_margin, "boundary_margin": boundary_margin}
    if ranks.world == 1:
        return F.intra_divergence_loss(features, labels, backend=backend, **margins)

    def arguments() -> _Own:
        check_intra_divergence(features, labels, spread_margin, boundary_margin)
        resolve_plain(backend, "intra_divergence_loss")
        refuse_transforms("intra_divergence_loss")
        return _Own({"function": "intra_divergence_loss", "features": _layout(features), **margins}, len(features))

    sizes = ranks.agree(arguments).sizes
    everyones = ranks.gather(labels.to(features.device, torch.int64, non_blocking=True), sizes)
    loss = F.intra_divergence_loss(_Gather.apply(features, ranks, sizes), everyones, backend=backend, **margins)
    return _Averaged.apply(loss, ranks.world)
