"""Calls of every public loss with every tensor that it can take, which attacks on their arguments are made from."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

import fastkd
import fastkd.losses
from fastkd.testing import DEVICE, backends


@dataclass(frozen=True)
class Call:
    """A call of `function` by keyword. `students` name the arguments that it differentiates, `op` its operator."""

    function: str
    op: str | None
    students: tuple[str, ...]
    arguments: dict[str, Any]
    option: str = ""
    module: Callable[[], torch.nn.Module] | None = None
    constants: dict[str, Any] = field(default_factory=dict)  # arguments that are no tensors

    def __str__(self) -> str:
        return f"{self.function}-{self.option}" if self.option else self.function

    def __repr__(self) -> str:
        shapes = tree_map_only(Tensor, lambda x: (*x.shape, str(x.dtype)[6:], x.stride()), self.arguments)
        return f"{self.function} {shapes} {self.constants}"

    def target(self) -> Callable[..., Any]:
        """The function, or a new module with the parameters of seed 0."""
        if self.module is None:
            return getattr(fastkd, self.function)
        torch.manual_seed(0)
        return self.module()

    def run(self, **changes: Any) -> Any:
        return self.target()(**(self.arguments | self.constants | changes))

    def leaves(self) -> list[tuple[str, Tensor]]:
        """(path, tensor) of all tensors among the arguments, such as ("['inputs'][0]", ...)."""
        return [
            ("".join(map(str, path)), x)
            for path, x in tree_flatten_with_path(self.arguments)[0]
            if isinstance(x, Tensor)
        ]

    def is_student(self, path: str) -> bool:
        return any(path.startswith(f"['{name}']") for name in self.students)

    def with_leaf(self, path: str, change: Callable[[Tensor], Tensor]) -> "Call":
        """The call with one tensor changed."""
        leaves, spec = tree_flatten(self.arguments)
        paths = ["".join(map(str, p)) for p, _ in tree_flatten_with_path(self.arguments)[0]]
        changed = [change(x) if p == path else x for p, x in zip(paths, leaves, strict=True)]
        return replace(self, arguments=tree_unflatten(changed, spec))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The call with every tensor changed."""
        return replace(self, arguments=tree_map_only(Tensor, change, self.arguments))

    def to(self, dtype: torch.dtype) -> "Call":
        return self.mapped(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def differentiable(self) -> tuple[list[Tensor], list[Tensor]]:
        """(results that are differentiable, leaves of the students)."""
        leaves: list[Tensor] = []

        def required(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        students = {name: tree_map_only(Tensor, required, self.arguments[name]) for name in self.students}
        return [x for x in tree_leaves(self.run(**students)) if x.requires_grad], leaves

    def values_and_gradients(self, incoming: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
        """(results, gradients of the students by a fixed weight of each element of the results)."""
        results, students = self.differentiable()
        weights = [incoming * torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x).to(x) for x in results]
        gradients = torch.autograd.grad(results, students, weights, allow_unused=True)
        return [x.detach() for x in results], [g for g in gradients if g is not None]

    def loss_and_gradients(self) -> list[Tensor]:
        results, gradients = self.values_and_gradients()
        return results + gradients


def outcome(call: Call) -> Any:
    """The result of the call, or None where it is refused: by a TypeError or ValueError that names an argument."""
    target = call.target()
    names = inspect.signature(target.forward if call.module is not None else target).parameters
    refusal = None
    try:
        return call.run()
    except (TypeError, ValueError) as error:
        refusal = str(error)
    assert any(name.rstrip("s") in refusal for name in names), refusal
    return None


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def positive(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.5


def _relations() -> Iterator[Call]:
    tokens = {"student": randn(3, 5, 7), "teacher": randn(3, 5, 9, seed=1)}
    index = torch.tensor([0, 7, 7, 14, 3], device=DEVICE)
    for option, constants in {
        "intra": {},
        "inter-tile": {"scope": "inter", "rectify": "both", "algorithm": "tile"},
        "batch-gram": {"scope": "batch", "algorithm": "gram"},
        "plain-teacher": {"normalize": False, "rectify": "teacher"},
        "no-eps": {"eps": 0.0},
    }.items():
        yield Call("relation_loss", "relation_fwd", ("student",), tokens, option, constants=constants)
    rows = tokens | {"index": index}
    yield Call("relation_loss", "relation_fwd", ("student",), rows, "index", constants={"scope": "batch"})
    yield Call("manifold_loss", "manifold_fwd", ("student",), rows)
    yield Call("manifold_loss", "relation_fwd", ("student",), rows, "terms", constants={"return_terms": True})


def _attention() -> Iterator[Call]:
    maps = {
        "q_student": randn(2, 3, 5, 4),
        "k_student": randn(2, 3, 7, 4, seed=1),
        "q_teacher": randn(2, 3, 5, 6, seed=2),
        "k_teacher": randn(2, 3, 7, 6, seed=3),
    }
    masks = {
        "key_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1]], device=DEVICE).bool(),
        "query_mask": torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]], device=DEVICE).bool(),
    }
    biases = {"bias_student": randn(2, 3, 5, 7, seed=4), "bias_teacher": randn(2, 3, 5, 7, seed=5)}
    students = ("q_student", "k_student")
    for divergence in ("kl", "reverse_kl", "js", "ce", "mse", "score_mse"):
        options = {"divergence": divergence}
        yield Call("attention_loss", "attention_fwd", students, maps, divergence, constants=options)
    yield Call("attention_loss", "attention_fwd", (*students, "bias_student"), maps | masks | biases, "masks-biases")
    for heads in ("match", "mean"):
        options = {"reduction": "none", "heads": heads}
        arguments = maps | masks | biases
        yield Call(
            "attention_loss", "attention_fwd", (*students, "bias_student"), arguments, f"none-{heads}",
            constants=options,
        )  # fmt: skip
    narrow = {name: x[..., :2] for name, x in maps.items()} | {"query_mask": masks["query_mask"]}
    narrow = {
        name: x.repeat_interleave(8, 2) if x.ndim == 4 else x.repeat_interleave(8, 1) for name, x in narrow.items()
    }
    yield Call("attention_loss", "attention_fwd", students, narrow, "gram", constants={"divergence": "score_mse"})
    triples = {
        "student": tuple(randn(2, 5, 6, seed=seed) for seed in range(3)),
        "teacher": tuple(randn(2, 5, 12, seed=seed) for seed in range(3, 6)),
        "key_mask": masks["query_mask"],
        "query_mask": masks["query_mask"],
    }
    yield Call("qkv_relation_loss", "attention_fwd", ("student",), triples, constants={"relation_heads": 2})


MAPS = [(3, 5), (3, 5, 1), (2, 5, 3), (2, 3, 3, 5), (2, 3, 1, 5), (2, 17, 2, 2), (2, 3, 2, 2, 3), (1, 1, 5, 67)]


def _moments() -> Iterator[Call]:
    for shape in MAPS:
        name, C = "x".join(map(str, shape)), shape[1]
        yield Call("batch_moments", "moments_fwd", ("x",), {"x": randn(*shape)}, name)
        images = {"dims": "image"}
        yield Call("batch_moments", "moments_fwd", ("x",), {"x": randn(*shape)}, f"image-{name}", constants=images)
        arguments = {
            "x": randn(*shape),
            "running_mean": randn(C, seed=1),
            "running_var": positive(C, seed=2),
            "weight": randn(C, seed=3),
            "bias": randn(C, seed=4),
        }
        yield Call("batch_norm_moments", "batch_norm_fwd", ("x", "weight", "bias"), arguments, name)
    layers = [(3, 5, 3, 3), (3, 7, 2)]
    statistics = {
        "inputs": [randn(*shape) for shape in layers],
        "running_means": [randn(shape[1], seed=1) for shape in layers],
        "running_vars": [positive(shape[1], seed=2) for shape in layers],
    }
    for distance in ("l2", "mse", "image"):
        options = {"distance": distance}
        yield Call("bn_stat_loss", "moments_fwd", ("inputs",), statistics, distance, constants=options)
    ema = {"ema": ([randn(5), randn(7)], [positive(5), positive(7)])}
    yield Call("bn_stat_loss", "moments_fwd", ("inputs",), statistics | ema, "ema", constants={"momentum": 0.3})
    known = {"moments": [(randn(C), positive(C)) for C in (5, 7)]}
    yield Call("bn_stat_loss", "moments_fwd", ("moments",), statistics | known, "moments")
    yield Call(
        "BatchNormStatLoss", "moments_fwd", ("inputs",), statistics, module=lambda: fastkd.losses.BatchNormStatLoss()
    )


def _priors() -> Iterator[Call]:
    images = {"images": randn(2, 3, 5, 7)}
    for p in (1, 2):
        yield Call("total_variation", "prior_fwd", ("images",), images, f"p{p}", constants={"p": p})
    weights = {"tv_l1": 0.5, "tv_l2": 0.1, "l2": 0.2}
    for shape in ((2, 3, 5, 7), (1, 1, 2, 2), (3, 1, 2, 19)):
        name = "x".join(map(str, shape))
        yield Call("image_prior", "prior_fwd", ("images",), {"images": randn(*shape)}, name, constants=weights)
    one_norm = weights | {"l2_per_image": False}
    yield Call("image_prior", "prior_fwd", ("images",), images, "one-norm", constants=one_norm)


def _logits() -> Iterator[Call]:
    rows = {"student": 3 * randn(4, 7), "teacher": 3 * randn(4, 7, seed=1)}
    label = {"label": torch.tensor([3, 0, 6, 3], device=DEVICE)}
    mixed = {"label": randn(4, 7, seed=2).softmax(-1)}
    both = {"student_logits": rows["student"], "teacher_logits": rows["teacher"]}
    for reduction in ("batchmean", "none"):
        options = {"reduction": reduction}
        yield Call(
            "soft_target_loss", "softmax_kl", ("student",), rows, reduction, constants={"temperature": 1.0} | options
        )
    yield Call(
        "dkd_loss", "softmax_kl", ("student",), rows | label, constants={"alpha": 1.0, "beta": 4.0, "temperature": 1.0}
    )
    yield Call("dkd_loss", "softmax_kl", ("student",), rows | label, "none", constants={"reduction": "none"})
    yield Call("nkd_loss", "nkd", ("student",), rows | label, "none", constants={"reduction": "none"})
    for option, given in (("", label), ("mixed", mixed)):
        yield Call("nkd_loss", "nkd", ("student",), rows | given, option, constants={"gamma": 1.0, "temperature": 1.0})
    yield Call("competition_loss", "competition", tuple(both), both)
    yield Call(
        "intra_divergence_loss",
        None,
        ("features",),
        {"features": randn(6, 5), "labels": torch.tensor([0, 1, 0, 1, 2, 2], device=DEVICE)},
        constants={"spread_margin": 2.0, "boundary_margin": 0.5},
    )


def _modules() -> Iterator[Call]:
    layers = {
        "students": [randn(2, 4, 6), randn(2, 9, 6)],
        "teachers": [randn(2, 4, 8, seed=1), randn(2, 9, 8, seed=1)],
    }
    rows = {"indices": [torch.tensor([0, 5, 3], device=DEVICE), torch.tensor([7, 1, 12], device=DEVICE)]}
    yield Call(
        "ManifoldLoss", "manifold_fwd", ("students",), layers | rows, module=lambda: fastkd.losses.ManifoldLoss()
    )
    several = {"student": layers["students"], "teacher": layers["teachers"], "index": rows["indices"][0]}
    yield Call("manifold_loss", "manifold_fwd", ("student",), several, "layers")
    one = layers | {"index": rows["indices"][0]}
    yield Call("ManifoldLoss", "manifold_fwd", ("students",), one, "index", module=fastkd.losses.ManifoldLoss)
    early = layers | {"teachers": [randn(2, 8, 2, 2, seed=1), randn(2, 8, 5, 5, seed=1)]}
    yield Call(
        "EarlyDistillationLoss", None, ("students",), early,
        module=lambda: fastkd.losses.EarlyDistillationLoss([6, 6], [8, 8]).to(DEVICE),
    )  # fmt: skip
    tokens = {
        "low_student": randn(2, 2, 9, 6),
        "low_teacher": randn(2, 2, 9, 8, seed=1),
        "high_student": randn(2, 9, 6, seed=2),
        "high_teacher": randn(2, 9, 8, seed=3),
        "mask": torch.arange(18, device=DEVICE).view(2, 9) % 3 > 0,
    }
    yield Call(
        "ViTKDLoss", None, ("low_student", "high_student"), tokens,
        module=lambda: fastkd.losses.ViTKDLoss(6, 8).to(DEVICE),
    )  # fmt: skip


def _transposed(x: Tensor) -> Tensor:
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def _sliced(x: Tensor) -> Tensor:
    """Inside a larger tensor, which has an element more on both sides of each dimension."""
    larger = x.new_zeros([n + 2 for n in x.shape])
    return larger[(slice(1, -1),) * x.ndim].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "sliced": _sliced,
    "transposed": _transposed,
    "channels": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 2 else _transposed(x),
    "expanded first": lambda x: x[:1].expand_as(x),
    "expanded last": lambda x: x[..., :1].expand_as(x),
}

CALLS = [*_relations(), *_attention(), *_moments(), *_priors(), *_logits(), *_modules()]


def runs(calls: list[Call] | None = None) -> list[tuple[Call, str]]:
    """Each call with each backend that runs it here."""
    return [
        (call, backend)
        for call in (CALLS if calls is None else calls)
        for backend in (["auto"] if call.op is None else backends(call.op))
    ]
