"""The manifold loss over the batch of all ranks, with one agreement and one draw for all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import functional as F
from fastkd._precision import accumulator, has_fast_float64
from fastkd.distributed._autograd import Averaged, Whole, mean_over_ranks
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import About, Agreed, Own, Ranks, is_small, layout
from fastkd.distributed.relation import sampled, spanning
from fastkd.ops import _checks as check
from fastkd.ops._autograd import refuse_transforms, wants_grad
from fastkd.ops._dispatch import Backend, resolve
from fastkd.ops.relation import ReturnTerms, check_manifold
from fastkd.ops.relation import manifold_layers as local_manifold_layers


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
    return_terms: ReturnTerms,
    backend: Backend,
    group: Group,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the mean of manifold_loss over layers of the same images, with one handshake and one draw for all."""
    ranks = Ranks(group)

    def arguments() -> Own:
        about: About = {"function": "manifold_loss", "layers": len(students), "num_samples": num_samples}
        weights = {"intra": intra, "inter": inter, "random": random}
        check_manifold(students, teachers, indices, weights, num_samples, generator, return_terms)
        about |= weights
        for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
            index = None if indices is None else indices[i]
            resolve(backend, "relation_fwd", s, t)
            if len(s) != len(students[0]):
                raise ValueError(f"student must hold the same images in every layer, got {len(s)} in layer {i}")
            layer = f" of layer {i}" if len(students) > 1 else ""
            about |= {f"student{layer}": layout(s), f"teacher{layer}": layout(t)}
            about[f"index{layer}"] = None if index is None else tuple(index.shape)
        refuse_transforms("manifold_loss")
        about["return_terms"] = return_terms
        about["devices"] = len({x.device for x in (*students, *teachers)})
        fast_float64, with_grad = has_fast_float64(students[0].device), wants_grad(*students)
        return Own(about, len(students[0]), fast_float64, with_grad, features, _source(generator, students[0].device))

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
    if is_small(features, sizes):
        n = len(students)
        whole = Whole.apply(ranks, agreed, *features)
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
        loss, *terms = (Averaged.apply(x, ranks.world) for x in (loss_and_terms[0], *loss_and_terms[1]))
        return _result(loss, tuple(terms), return_terms)
    pairs = list(zip(students, teachers, strict=True))
    zeros = [s.new_zeros((), dtype=accumulator(s, t)) for s, t in pairs]
    of_layers = [zeros, zeros, zeros]
    if intra or return_terms:
        of_layers[0] = mean_over_ranks([F.relation_loss(s, t, backend=backend) for s, t in pairs], ranks, sizes)
    if inter or return_terms:
        of_layers[1] = spanning(students, teachers, ranks, agreed, scope="inter", backend=backend)
    if random or return_terms:
        at_home = [index.to(s.device) for index, s in zip(rows, students, strict=True)]
        of_layers[2] = sampled(students, teachers, at_home, ranks, sizes, backend=backend)
    L_intra, L_inter, L_random = (torch.stack(losses).mean() for losses in of_layers)
    loss = intra * L_intra + inter * L_inter + random * L_random
    return _result(loss, (L_intra, L_inter, L_random), return_terms)


def _result(
    loss: Tensor, terms: tuple[Tensor, ...], return_terms: ReturnTerms
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    if not return_terms:
        return loss
    L_intra, L_inter, L_random = (term.detach() for term in terms) if return_terms == "detached" else terms
    return loss, (L_intra, L_inter, L_random)


def _source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return the generator, or PyTorch's default one for None."""
    if generator is not None:
        return generator
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _draw(
    students: Sequence[Tensor], num_samples: int, generator: torch.Generator | None, ranks: Ranks, agreed: Agreed
) -> list[Tensor]:
    """Return, for each layer, K distinct rows of the global batch, which the first rank draws for all."""
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
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    intra: float = 4.0,
    inter: float = 0.1,
    random: float = 0.2,
    num_samples: int = 192,
    generator: torch.Generator | None = None,
    index: Tensor | None = None,
    return_terms: ReturnTerms = False,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """fastkd.manifold_loss of the batch of all ranks: Hao et al. 2022 (arXiv:2107.01378), weights of its code.

        L = intra L_intra + inter L_inter + random L_random

    with L_intra, L_inter the relation_loss of those scopes over all ranks and L_random that of K rows drawn from all
    ΣB*N tokens.

    Args:
        student: (B, N, Ds), this rank's, or a list of one per matched layer; B may differ between ranks, all else may
            not. Differentiable.
        teacher: (B, N, Dt), or a list of as many. Constants.
        intra, inter, random: weights >= 0; a term of weight 0 is not computed unless return_terms.
        num_samples: K distinct rows of the random term; all of them where K > ΣB*N.
        generator: source of the draw, which the first rank of the group makes for all; the others' is left alone.
        index: (K,) int64 rows of all ranks' tokens, in their order, one draw for all layers. The first rank's counts.
        return_terms: as in fastkd.manifold_loss.
        backend: of the relation kernels; an inter term by Grams is PyTorch operations.
        group: a torch.distributed process group that this rank is in; None: the default one.

    Returns:
        Scalar, the same on every rank, float32 (float64 if an input is), or (scalar, (intra, inter, random)).

    Raises:
        TypeError, ValueError, RuntimeError: as relation_loss; a weight < 0, num_samples < 1.
    """
    if Ranks(group).world == 1:
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
    students, teachers = check.unchecked_layers(student), check.unchecked_layers(teacher)
    return manifold_layers(
        students,
        teachers,
        intra=intra,
        inter=inter,
        random=random,
        num_samples=num_samples,
        generator=generator,
        indices=None if index is None else [index] * len(students),
        return_terms=return_terms,
        backend=backend,
        group=group,
    )
