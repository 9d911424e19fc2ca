"""DeiT students whose first blocks can attend like a convolution: our reading of DearKD's MHCA.

Importing this module registers deit_tiny_mhca_patch16_224, deit_small_.. and deit_base_.. with timm.create_model.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

__all__ = ["ConvolutionalAttention", "VisionTransformerMHCA"]


class ConvolutionalAttention(nn.Module):
    """Self-attention with a learned centre for each head, after Cordonnier et al. 2020 (arXiv:1911.03584).

        softmax( q kᵀ d^-1/2 - α_h |δ - Δ_h|² ) v,  δ the way from query to key on the grid of patches

    With a large α, head h attends only to the offset Δ_h, so the heads together form a convolution. Class tokens have
    no position on the grid, so their scores have no such term. DearKD (Chen et al. 2022, arXiv:2204.12997) describes
    the layer and its dropout. Adding the terms before the softmax, α = 1 and a square of centres Δ at the start are our
    reading.

    Args:
        dim, num_heads, qkv_bias: as timm's Attention, whose names the weights have.
        grid_size: rows and columns of patches.
        prefix_tokens: class tokens that lead the sequence.
        attn_drop: dropout of the attention maps.
    """

    offsets: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        prefix_tokens: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.prefix_tokens, self.fused_attn = num_heads, prefix_tokens, True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(attn_drop)
        side = math.ceil(math.sqrt(num_heads))
        head = torch.arange(num_heads)
        centres = torch.stack([head // side, head % side], 1) - (side - 1) / 2
        self.sharpness = nn.Parameter(torch.ones(num_heads))  # α
        self.centre = nn.Parameter(centres)  # Δ (H, 2), rows and columns
        rows, columns = (torch.arange(n, dtype=torch.float32) for n in grid_size)
        place = torch.cartesian_prod(rows, columns)
        self.register_buffer("offsets", place[None] - place[:, None], persistent=False)  # δ (N, N, 2)

    def bias(self) -> Tensor:
        """Return the positional term of the scores, (1, H, prefix + N, prefix + N)."""
        away = (self.offsets[None] - self.centre[:, None, None]).square().sum(-1)
        return F.pad(-self.sharpness[:, None, None] * away, (self.prefix_tokens, 0, self.prefix_tokens, 0))[None]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("ConvolutionalAttention takes no mask: every token sees the whole grid")
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias().to(q.dtype), dropout_p=dropout)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(B, N, D))
        return out


class VisionTransformerMHCA(VisionTransformerDistilled):
    """A DeiT with a distillation token and ConvolutionalAttention in its first blocks.

    Args:
        mhca_blocks: number of such blocks; half of twelve is our choice.
        mhca_drop: dropout of their attention maps; our choice.
        args, kwargs: as timm's VisionTransformer.
    """

    def __init__(self, *args: Any, mhca_blocks: int = 6, mhca_drop: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mhca_blocks = mhca_blocks
        for block in self.blocks[:mhca_blocks]:
            plain = block.attn
            block.attn = ConvolutionalAttention(
                self.embed_dim,
                plain.num_heads,
                self.patch_embed.grid_size,
                self.num_prefix_tokens,
                qkv_bias=plain.qkv.bias is not None,
                attn_drop=mhca_drop,
            ).to(plain.qkv.weight)
            block.attn.qkv, block.attn.proj = plain.qkv, plain.proj  # initialised like the other blocks

    def no_weight_decay(self) -> set[str]:
        centres = {f"blocks.{i}.attn.centre" for i in range(self.mhca_blocks)}
        return set(super().no_weight_decay()) | centres


def _cfg() -> dict[str, Any]:
    """Return DeiT's configuration without weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": ("head", "head_dist"),
    }


_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
default_cfgs = generate_default_cfgs({f"deit_{size}_mhca_patch16_224": _cfg() for size in _SIZES})


def _create(size: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    width, heads = _SIZES[size]
    arguments = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": heads} | arguments
    out_indices = arguments.pop("out_indices", 3)
    model: nn.Module = build_model_with_cfg(
        VisionTransformerMHCA,
        f"deit_{size}_mhca_patch16_224",
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )
    return model


@register_model
def deit_tiny_mhca_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("tiny", pretrained, kwargs)


@register_model
def deit_small_mhca_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("small", pretrained, kwargs)


@register_model
def deit_base_mhca_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _create("base", pretrained, kwargs)
