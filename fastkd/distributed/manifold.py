"""The manifold loss over the batch of all ranks, with one agreement and one draw for all layers."""

import torch
from torch import Tensor

from fastkd._precision import accumulator, has_fast_float64
from fastkd.distributed._autograd import Averaged, Whole, mean_over_ranks
from fastkd.distributed._messages import Group
from fastkd.distributed._ranks import About, Agreed, Own, Ranks, is_small, layout
from fastkd.distributed.relation import sampled, spanning
from fastkd.ops._autograd import wants_grad
from fastkd.ops._dispatch import resolve
from fastkd.ops.relation import ManifoldCall, check_manifold, layer_calls, run_manifold, run_relation, term_weights

Terms = tuple[Tensor, Tensor, Tensor]  # intra, inter, random


@torch.compiler.disable
def manifold_over_ranks(call: ManifoldCall, group: Group) -> tuple[Tensor, Terms]:
    """Return the mean of manifold_loss over layers of the same images, and its terms.

    One handshake and one draw serve all layers.
    """
    ranks = Ranks(group)
    if ranks.world == 1:
        check_manifold(call)
        return run_manifold(call)
    students, teachers, indices, return_terms = call.students, call.teachers, call.indices, call.return_terms

    def arguments() -> Own:
        about: About = {"function": "manifold_loss", "layers": len(students), "num_samples": call.num_samples}
        check_manifold(call)
        about |= term_weights(call)
        for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
            index = None if indices is None else indices[i]
            resolve(call.backend, "relation_fwd", s, t)
            if len(s) != len(students[0]):
                raise ValueError(f"student must hold the same images in every layer, got {len(s)} in layer {i}")
            layer = f" of layer {i}" if len(students) > 1 else ""
            about |= {f"student{layer}": layout(s), f"teacher{layer}": layout(t)}
            about[f"index{layer}"] = None if index is None else tuple(index.shape)
        about["return_terms"] = return_terms
        about["devices"] = len({x.device for x in (*students, *teachers)})
        fast_float64, with_grad = has_fast_float64(students[0].device), wants_grad(*students)
        generator = _source(call.generator, students[0].device)
        return Own(about, len(students[0]), fast_float64, with_grad, features, generator)

    features = [*students, *teachers]
    agreed = ranks.agree(arguments)
    sizes = agreed.sizes
    rows: list[Tensor] = []
    if call.random or return_terms:
        rows = _draw(call, ranks, agreed) if indices is None else list(indices)
        rows = [index.to(students[0].device, non_blocking=True) for index in rows]
        if indices is not None:
            joined = torch.cat(rows)
            rows = list(ranks.share(joined, joined.shape, 0).split([len(index) for index in rows]))
    if is_small(features, sizes):
        n = len(students)
        whole = Whole.apply(ranks, agreed, *features)
        everyones = call._replace(
            students=whole[:n],
            teachers=[t.detach() for t in whole[n:]],
            generator=None,
            indices=rows or [torch.zeros(1, dtype=torch.int64, device=x.device) for x in students],
        )
        loss, terms = run_manifold(everyones)
        loss, L_intra, L_inter, L_random = (Averaged.apply(x, ranks.world) for x in (loss, *terms))
    else:
        pairs = layer_calls(call)
        zeros = [s.new_zeros((), dtype=accumulator(s, t)) for s, t in zip(students, teachers, strict=True)]
        of_layers = [zeros, zeros, zeros]
        if call.intra or return_terms:
            of_layers[0] = mean_over_ranks([run_relation(pair) for pair in pairs], ranks, sizes)
        if call.inter or return_terms:
            of_layers[1] = spanning([pair._replace(scope="inter") for pair in pairs], ranks, agreed)
        if call.random or return_terms:
            at_home = [index.to(s.device) for index, s in zip(rows, students, strict=True)]
            of_layers[2] = sampled(pairs, at_home, ranks, sizes)
        L_intra, L_inter, L_random = (torch.stack(losses).mean() for losses in of_layers)
        loss = call.intra * L_intra + call.inter * L_inter + call.random * L_random
    if return_terms == "detached":
        L_intra, L_inter, L_random = L_intra.detach(), L_inter.detach(), L_random.detach()
    return loss, (L_intra, L_inter, L_random)


def _source(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return the generator, or PyTorch's default one for None."""
    if generator is not None:
        return generator
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def _draw(call: ManifoldCall, ranks: Ranks, agreed: Agreed) -> list[Tensor]:
    """Return, for each layer, K distinct rows of the global batch, which the first rank draws for all."""
    students = call.students
    generator = _source(call.generator, students[0].device)
    if ranks.rank > 0:
        generator = torch.Generator("cpu" if agreed.draws_on_host else students[0].device)
        state = agreed.state[: len(generator.get_state())]
        generator.set_state(state.clone())  # it would read a view from the start of what it is a view of
    total = sum(agreed.sizes)
    return [
        torch.randperm(total * s.shape[1], generator=generator, device=generator.device)[: call.num_samples]
        for s in students
    ]
