"""Every Triton kernel in every configuration, as it is compiled ahead of time: no GPU is needed for that."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import triton
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.dry_driver import ARCHITECTURES, TARGETS
from fastkd_kernels import attention, logits, moments, prior, relation

# Bytes of a block; what is compiled for sm_80 also runs on consumer cards, of compute capability 8.6 to 12.x.
SHARED_MEMORY = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_MEMORY = 512  # columns, where there is one
DTYPES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: the types of its arguments, its constants, its launch options, the arguments
    taken to be multiples of 16 (vector loads depend on it) and the targets whose tables hold it."""

    kernel: Any
    signature: dict[str, str | tuple[str, ...]]  # several types: a tuple of arguments
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    targets: tuple[str, ...] = tuple(TARGETS)

    def pointers(self, names: str = ".*") -> list[str]:
        """What arguments of such names point to."""
        every = [[t] if isinstance(t, str) else t for name, t in self.signature.items() if re.fullmatch(names, name)]
        return sorted({t[1:] for types in every for t in types if t.startswith("*")})

    def __str__(self) -> str:
        constants = (f"{k}={v}" for k, v in self.constants.items())
        return "-".join((self.kernel.fn.__name__, *self.pointers(), *constants))

    def compile(self, target: str) -> CompiledKernel:
        signature = self.signature | dict.fromkeys(self.constants, "constexpr")
        ordered = {name: signature[name] for name in self.kernel.arg_names}
        attrs = {}
        for i, (name, types) in enumerate(ordered.items()):
            if name in self.aligned:
                paths = [(i,)] if isinstance(types, str) else [(i, k) for k in range(len(types))]
                attrs |= {path: [["tt.divisibility", 16]] for path in paths}
        source = ASTSource(self.kernel, ordered, constexprs=self.constants, attrs=attrs)
        return triton.compile(source, target=TARGETS[target], options=self.options)


def _signature(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Pointers as given; every other argument that is not a constant is a 32-bit integer, as most launches pass."""
    return {n: f"*{pointers[n]}" if n in pointers else "i32" for n in kernel.arg_names if n not in constants}


def _moments() -> Iterator[Variant]:
    """Large planes and columns as they come from a network: adjacent lanes one apart, the rest multiples of 16; small
    planes, several of which fill a block; planes cut out of larger ones, whose rows have a stride of their own."""
    of_channels = ("partial_ptr", "dmean_ptr", "dvar_ptr", "mean_ptr")
    PLANES, (BLOCK_G, BLOCK_P) = moments.PLANES, moments.COLUMNS
    for dtype, (per_image, has_norm) in product(DTYPES, ((False, False), (True, False), (False, True))):
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "dx_ptr", "dy_ptr"), dtype) | dict.fromkeys(of_channels, "fp32")
        pointers |= dict.fromkeys(("scale_ptr", "shift_ptr"), "fp32" if has_norm else dtype)
        several = (PLANES // 64, 1, 64) if per_image else (1, PLANES // 64, 64)
        forms = [
            ("w", (1, 1, PLANES), False, True),
            ("w", several, False, False),
            ("c", (BLOCK_G, 1, BLOCK_P), False, True),
        ]
        for lanes, block, has_rows, aligned in [*forms, ("w", (1, 1, PLANES), True, False)][
            : 4 if dtype == "fp32" else 3
        ]:
            for kernel in (moments._moments_partial_kernel, moments._moments_bwd_kernel):
                constants = dict(zip(("BLOCK_G", "BLOCK_N", "BLOCK_P"), block, strict=True))
                constants |= {"PER_IMAGE": per_image, "HAS_ROWS": has_rows, "HAS_NORM": has_norm}
                constants |= {name: 1 for name in kernel.arg_names if re.fullmatch(f"stride_.?{lanes}", name)}
                signature = _signature(kernel, pointers, constants)
                yield Variant(
                    kernel, signature, constants, {"num_warps": moments.WARPS}, frozenset(signature if aligned else ())
                )
    kernel, constants = moments._moments_merge_kernel, {"BLOCK_G": 128}
    pointers = dict.fromkeys(("partial_ptr", "mean_ptr", "var_ptr"), "fp32")
    yield Variant(kernel, _signature(kernel, pointers, constants), constants)
    for distance in ("l2", "mse", "image"):
        kernel, constants = moments._bn_distance_kernel, {"DISTANCE": distance, "BLOCK": moments.DISTANCE_BLOCK}
        pointers = {name: "fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        signature = _signature(kernel, pointers, constants) | {"weight": "fp32", "unbias": "fp32"}
        yield Variant(kernel, signature, constants)


def _prior() -> Iterator[Variant]:
    BLOCK_H, BLOCK_W, num_warps = prior.BLOCKS
    constants = {"BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W, "stride_w": 1}
    for dtype, kernel in product(DTYPES, (prior._prior_fwd_kernel, prior._prior_bwd_kernel)):
        pointers = dict.fromkeys(("partial_ptr", "slopes_ptr", "of_image_ptr"), "fp32")
        pointers |= dict.fromkeys(("x_ptr", "dx_ptr"), dtype)
        yield Variant(kernel, _signature(kernel, pointers, constants), constants, {"num_warps": num_warps})


def _logits() -> Iterator[Variant]:
    kernel = logits._softmax_kl_kernel
    for dtype, (BLOCK, num_warps), has_target in product(DTYPES, logits.BLOCKS, (False, True)):
        constants = {"HAS_TARGET": has_target, "HAS_GRAD": True, "BLOCK": BLOCK, "stride_sc": 1, "stride_tc": 1}
        pointers = {"s_ptr": dtype, "t_ptr": dtype, "target_ptr": "i64", "kl_ptr": "fp32", "ds_ptr": "fp32"}
        signature = _signature(kernel, pointers, constants)
        signature |= dict.fromkeys(("alpha", "beta", "inv_temperature", "step"), "fp32")
        aligned = frozenset({*pointers, "stride_sb", "stride_tb", "C"})
        yield Variant(kernel, signature, constants, {"num_warps": num_warps}, aligned)


def _relation_variant(
    kernel: Any, target: str, student: str, teacher: str, config: Any = None, **constants: Any
) -> Variant:
    """As launched on contiguous rows: stride 1 along D, widths and other strides multiples of 16."""
    pointers = dict.fromkeys(("norms_ptr", "scale_ptr", "partial_ptr", "along_ptr", "loss_ptr"), "fp32")
    pointers |= {"w_ptr": student, "index_ptr": "i64", "d_ptr": "fp32"}
    # ds: float32 of float16, and where terms are added up
    layers = {"s_ptr": student, "t_ptr": teacher, "ds_ptr": "fp32", "out_ptr": "fp32"}
    blocks = config._asdict() if config else {}
    options = {k: blocks.pop(k) for k in ("num_warps", "num_stages") if k in blocks}
    constants |= blocks | dict.fromkeys(("stride_sd", "stride_td", "stride_dd"), 1)
    constants |= {
        "HAS_SCALE": constants.get("HAS_GRAD", True) and student == "fp16",
        "NORMALIZE": True,
        "TERMS": 1 if student == "fp32" else 2,
        "PRECISION": "ieee",
        "IS_ADDED": True,
        "HAS_INDEX": True,
    }
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    signature = _signature(kernel, pointers, constants)
    signature |= {k: (f"*{dtype}",) * 2 for k, dtype in layers.items() if k in signature}
    signature |= {k: "fp32" for k in ("eps", "scale", "factor") if k in signature}
    aligned = {p.name for p in kernel.params if p.name not in constants and not p.do_not_specialize} - {
        "eps",
        "scale",
        "factor",
    }
    return Variant(kernel, signature, constants, options, frozenset(aligned), (target,))


def _relation() -> Iterator[Variant]:
    mixed = (("bf16", "fp32"), ("fp32", "fp16"))
    for target, (student, teacher) in product(TARGETS, (*zip(DTYPES, DTYPES, strict=True), *mixed)):
        config = relation.CONFIGS[ARCHITECTURES[target], 4 if "fp32" in (student, teacher) else 2]

        def variant(
            kernel: Any, *args: Any, on: tuple[str, ...] = (target, student, teacher), **constants: Any
        ) -> Variant:
            return _relation_variant(kernel, *on, *args, **constants)

        clamps = {"RECTIFY_S": True, "RECTIFY_T": True}
        most = {max(f.BLOCK_D, width) // f.BLOCK_D: f for width, f in config.fused.items()}
        if student == teacher:  # a mixed pair differs in the kernels below
            BLOCK_R, BLOCK_K = relation.NORM_BLOCK
            yield variant(relation._relation_norms_kernel, INVERT=True, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K)
            yield variant(relation._relation_map_kernel, config.map, IS_TRIANGLE=True, HAS_GRAD=False, **clamps)
            yield variant(relation._relation_map_kernel, config.map, IS_TRIANGLE=False, HAS_GRAD=True, **clamps)
            BLOCK_K, BLOCK_D = relation.SCATTER_BLOCK
            yield variant(relation._relation_scatter_kernel, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D)
        yield variant(relation._relation_map_kernel, config.map, IS_TRIANGLE=True, HAS_GRAD=True, **clamps)
        for apply in config.apply:
            yield variant(relation._relation_apply_kernel, apply)
        for chunks, fused in most.items():
            yield variant(relation._relation_fused_kernel, fused, CHUNKS=chunks, **clamps)
    yield Variant(
        relation._relation_sum_kernel,
        {"partial_ptr": "*fp32", "loss_ptr": "*fp32", "count": "i32", "stride_l": "i32", "scale": "fp32"},
        {"BLOCK": relation.SUM_BLOCK},
    )


FLOAT_ARGUMENTS = ("scale", "bias_scale", "dq_scale", "dk_scale", "dbias_scale", "factor", "inv_keys", "inv_H")


def _attention_variant(kernel: Any, target: str, dtype: str, width: int, tile: Any, **constants: Any) -> Variant:
    """As launched on contiguous heads of one width, with a bias, a mask and weights where `constants` does not say."""
    names = kernel.arg_names
    pointers = {n: "fp32" for n in names if n.endswith("_ptr")}
    pointers |= {n: dtype for n in names if n.startswith(("q", "k", "bias")) and n in pointers}
    pointers |= {n: "fp32" if dtype == "fp16" else dtype for n in ("dq_ptr", "dk_ptr") if n in pointers}
    pointers |= {"mask_ptr": "u8"} if "mask_ptr" in pointers else {}
    blocks = tile._asdict() if tile else {}
    options = {k: blocks.pop(k) for k in ("num_warps", "num_stages") if k in blocks}
    constants = blocks | dict.fromkeys((n for n in names if n.startswith("BLOCK_D")), width) | constants
    for n in names:
        if n.startswith("HAS_") or n == "IS_ADDED":
            constants.setdefault(n, True)
        elif n.startswith("IS_CENTRED"):
            constants.setdefault(n, dtype == "fp32")
        elif n.startswith(("IS_", "SUM_")):
            constants.setdefault(n, False)
        elif n.startswith("stride_") and n.endswith(("d", "k", "mn", "wn")):
            constants[n] = 1
    constants |= {"PRECISION": "ieee"} | ({"DIVERGENCE": constants.get("DIVERGENCE", "js")})
    constants = {k: v for k, v in constants.items() if k in names}
    signature = _signature(kernel, pointers, constants)
    floats = {n for n in signature if n in FLOAT_ARGUMENTS or n.startswith("scale_")}
    aligned = {p.name for p in kernel.params if p.name not in constants and not p.do_not_specialize}
    return Variant(
        kernel, signature | dict.fromkeys(floats, "fp32"), constants, options, frozenset(aligned - floats), (target,)
    )


def _attention() -> Iterator[Variant]:
    """Kernels with a bias, a mask and weights, under the divergence of most registers; heads taken in pieces, which
    only changes loads, on one architecture alone; of float16 those of most calls."""
    for target, dtype in product(TARGETS, DTYPES):
        table = attention.CONFIGS[ARCHITECTURES[target], 4 if dtype == "fp32" else 2]

        def variant(kernel: Any, tile: Any, width: int = 64, on: Any = (target, dtype), **constants: Any) -> Variant:
            return _attention_variant(kernel, *on, width, tile, **constants)

        yield variant(attention._attention_rows_kernel, table[64].rows)
        yield variant(attention._attention_keys_kernel, table[64].keys)
        if dtype != "fp32":
            yield variant(attention._attention_fused_kernel, table[64].fused[-1])
        if dtype == "fp16":
            continue
        yield variant(attention._attention_centre_kernel, None, BLOCK_N=attention.CENTRE_BLOCK)
        yield variant(attention._attention_bias_kernel, table[64].bias, SUM_B=True)
        yield variant(attention._attention_mean_kernel, table[64].mean)
        yield variant(attention._attention_stats_kernel, table[64].rows)
        yield variant(attention._attention_head_kernel, table[64].rows)
        yield variant(attention._attention_keys_kernel, table[64].keys, IS_MEAN=True)
        for is_wide in (False, True) if target == "sm_90" else (False,):
            yield variant(attention._attention_rows_kernel, table[128].rows, 128, IS_WIDE=is_wide)
            yield variant(attention._attention_keys_kernel, table[128].keys, 128, IS_WIDE=is_wide)


def variants() -> list[Variant]:
    return [*_logits(), *_moments(), *_prior(), *_relation(), *_attention()]
