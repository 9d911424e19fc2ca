"""The ranks of one call: what they must agree on before they send anything, and what they then send."""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.distributed._messages import Shapes, image_bytes, offsets, pack, start_gather, views

# Below this number of bytes of all ranks, each rank receives all and computes alone; more messages would cost more.
SMALL = 1 << 22
_STATE = 5056  # bytes of a CPU generator's state; a GPU's is smaller
About = dict[str, object]  # values that must be the same on every rank


class Own(NamedTuple):
    """Facts that a rank sends to the others before a call."""

    about: About  # must be equal on all ranks
    size: int = 0  # number of images
    fast_float64: bool = True
    with_grad: bool = False
    features: Sequence[Tensor] = ()  # features that are sent whole to all ranks if they are small
    generator: torch.Generator | None = None  # all ranks draw from the first rank's


class Agreed(NamedTuple):
    """Facts that every rank knows after the handshake."""

    sizes: list[int]
    fast_float64: bool  # on every rank
    with_grad: bool  # wanted on some rank, so the others must help to form it
    state: Tensor  # of the first rank's generator
    draws_on_host: bool  # that generator
    images: Tensor | None  # features of all ranks, if they were sent with the handshake


class _Past(NamedTuple):
    """The previous call on a process group, which every rank knows."""

    digest: int
    sizes: list[int]
    image: int  # bytes of an image's features
    again: bool  # it was identical to the call before it

    @property
    def bytes(self) -> list[int]:
        """Return the bytes of each rank."""
        return [size * self.image for size in self.sizes]


_PAST: "weakref.WeakKeyDictionary[Any, _Past]" = weakref.WeakKeyDictionary()


class Ranks:
    """The ranks of one call, and their messages."""

    def __init__(self, group: Any) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("fastkd.distributed needs torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group must be one that this process belongs to")

    def agree(self, arguments: Callable[[], Own]) -> Agreed:
        """Check that every rank's arguments are valid and agree, and return the facts that all ranks then know.

        After two identical calls, the third sends its features with the handshake, since all ranks know the size; a
        rank whose arguments changed sends padding of the same size.

        Args:
            arguments: function that checks and returns this rank's facts.

        Raises, on every rank: this rank's own error, otherwise ValueError with another rank's error or the differences.
        """
        error: Exception | None = None
        own = Own({})
        try:
            own = arguments()
        except Exception as caught:  # any error must be sent, since the others wait
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
        # Sent from the host if the group supports it, so that nothing waits for the device.
        config = dist.get_backend_config(self.group)
        message = torch.cat([row.view(torch.uint8), state])[None]
        message = message.to("cpu" if "cpu:" in config else config.partition(":")[0])
        wait = start_gather(message, [1] * self.world, self.group)
        past, images = _PAST.pop(self.group, None), None
        if past is not None and past.again:
            images = torch.empty(sum(past.bytes), dtype=torch.uint8, device="cpu")
            parts = images.split(past.bytes)
            if (digest, own.size) == (past.digest, past.sizes[self.rank]):
                pack(parts[self.rank], own.features)
            start_gather(parts[self.rank], past.bytes, self.group, parts)()
        everyones = torch.cat(wait()).cpu()
        table = everyones[:, : row.nbytes].contiguous().view(torch.int64).tolist()
        digests, sizes, fast_float64, with_grad, hosts, errors = map(list, zip(*table, strict=True))
        if len(set(digests)) == 1 and not any(errors):
            as_before = past is not None and (past.digest, past.sizes) == (digest, sizes)
            if own.features and is_small(own.features, sizes) and own.features[0].device.type == "cpu":
                _PAST[self.group] = _Past(digest, sizes, image_bytes(own.features), as_before)
            came = images if as_before else None
            return Agreed(sizes, all(fast_float64), any(with_grad), everyones[0, row.nbytes :], bool(hosts[0]), came)
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
        """Return x of the rank `source`, of a known shape, on every rank."""
        x = x.contiguous() if self.rank == source else x.new_empty(shape)
        dist.broadcast(x, group=self.group, group_src=source)
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the concatenation of all ranks' x (its size, ...)."""
        return torch.cat(self.gathered(x, sizes))

    def gathered(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return each rank's x (its size, ...)."""
        return start_gather(x, sizes, self.group)()

    def exchange(
        self, pieces: Sequence[Sequence[Tensor]], sent: Sequence[Shapes], taken: Sequence[Shapes]
    ) -> list[list[Tensor]]:
        """Send pieces[r] to each rank r, all in one message, and return the pieces received from each.

        Args:
            pieces: tensors (images, tokens, D) per rank, alike in dtype on every rank.
            sent: their shapes on the way, per rank; tokens that a piece lacks are zeros.
            taken: the shapes that come from each rank.
        """
        dtypes = [x.dtype for x in pieces[0]]
        out_bytes, in_bytes = ([offsets(shapes, dtypes)[-1] for shapes in each] for each in (sent, taken))
        message = pieces[0][0].new_empty(sum(out_bytes), dtype=torch.uint8)
        for part, own, shapes in zip(message.split(out_bytes), pieces, sent, strict=True):
            for view, x in zip(views(part, shapes, dtypes), own, strict=True):
                view[:, : x.shape[1]] = x
                view[:, x.shape[1] :] = 0
        received = message.new_empty(sum(in_bytes))
        dist.all_to_all_single(received, message, in_bytes, out_bytes, group=self.group)
        return [views(part, shapes, dtypes) for part, shapes in zip(received.split(in_bytes), taken, strict=True)]


def is_small(features: Sequence[Tensor], sizes: list[int]) -> bool:
    """Return whether the features are small enough for every rank to receive all of them."""
    return sum(sizes) * image_bytes(features) <= SMALL and len({x.device for x in features}) == 1


def _disagreement(told: list[Any]) -> str:
    """Return the error message for ranks whose arguments differ, the same on each rank."""
    for rank, about in enumerate(told):
        if isinstance(about, str):
            return f"rank {rank} of the process group refused its arguments: {about}"
    differing = []
    for key in dict.fromkeys(key for about in told for key in about):
        values = [about.get(key) for about in told]
        if any(value != values[0] for value in values):
            differing.append(f"{key}: " + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values)))
    return f"the ranks of the process group must agree, got {'; '.join(differing)}"


def kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {x.device.type}"


def layout(x: Tensor) -> str:
    """Return everything but the number of images."""
    return f"({', '.join(['B', *map(str, x.shape[1:])])}) {kind(x)}"
