"""One small instance of every family of models, as timm and Hugging Face build them, with random weights."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from fastkd import capture
from fastkd.capture import attention_layers


@dataclass(frozen=True)
class Family:
    """A small model of a family.

    name: the family; timm's module, or the class in transformers.
    build: returns the model; its argument says whether attention is fused, where there is a choice.
    size: pixels of a side.
    """

    name: str
    build: Callable[[bool], nn.Module]
    size: int

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))


def _timm(name: str, size: int, entry: str, **arguments: Any) -> Family:
    def build(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(entry, pretrained=False, **arguments)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return _randomised(model)

    return Family(name, build, size)


def _randomised(model: nn.Module) -> nn.Module:
    """Draw what is initialised to a constant: it would hide a bias, a scale or a norm that is left out."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("bias_table", "rel_", "logit_scale", "attention_bias", "_norm.")):
                parameter.normal_()
    return model.eval()


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)}
VIT = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
VIT64 = VIT | {"img_size": 64}

TIMM = (
    _timm("vision_transformer", 32, "vit_tiny_patch16_224", **VIT, qk_norm=True),
    _timm("deit", 32, "deit_tiny_distilled_patch16_224", **VIT),
    _timm("beit", 32, "beit_base_patch16_224", **VIT),
    _timm("eva", 28, "eva02_tiny_patch14_224", **VIT | {"img_size": 28}),
    _timm("vision_transformer_relpos", 32, "vit_relpos_small_patch16_224", **VIT),
    _timm("vision_transformer_sam", 64, "samvit_base_patch16", **VIT64, window_size=2, global_attn_indexes=(1,)),
    _timm("vision_transformer_hybrid", 64, "vit_tiny_r_s16_p8_224", **VIT64),
    _timm("naflexvit", 32, "naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3),
    _timm("vitamin", 64, "vitamin_small_224", img_size=64),
    _timm("cait", 32, "cait_xxs24_224", **VIT | {"num_heads": 4}),
    _timm("convit", 32, "convit_tiny", **VIT | {"num_heads": 4, "local_up_to_layer": 1}),
    _timm("xcit", 32, "xcit_nano_12_p16_224", **VIT | {"num_heads": 4}),
    _timm("crossvit", 240, "crossvit_tiny_240", depth=((1, 1, 0),)),
    _timm("pit", 64, "pit_ti_224", img_size=64),
    _timm("tnt", 32, "tnt_s_legacy_patch16_224", img_size=32, embed_dim=48, depth=2),
    _timm("volo", 32, "volo_d1_224", img_size=32),
    _timm("swin_transformer", 64, "swin_tiny_patch4_window7_224", **SWIN),
    _timm("swin_transformer_v2", 64, "swinv2_tiny_window8_256", **SWIN),
    _timm("swin_transformer_v2_cr", 64, "swinv2_cr_tiny_224", **SWIN),
    _timm("twins (local)", 64, "twins_svt_small", img_size=64, depths=(2, 2, 2, 2)),
    _timm("twins (pyramid)", 64, "twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1)),
    _timm("pvt_v2", 64, "pvt_v2_b0", depths=(1, 1, 1, 1)),
    _timm("mvitv2", 64, "mvitv2_tiny", img_size=64),
    _timm("hiera", 64, "hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=24),
    _timm("hieradet_sam2", 64, "sam2_hiera_tiny"),
    _timm("nest", 64, "nest_tiny", img_size=64),
    _timm("coat", 32, "coat_lite_tiny", img_size=32),
    _timm("davit", 32, "davit_tiny", depths=(1, 1, 1, 1)),
    _timm("gcvit", 64, "gcvit_xxtiny", img_size=64),
    _timm("focalnet", 32, "focalnet_tiny_srf"),
    _timm("maxxvit (maxvit)", 64, "maxvit_pico_rw_256", img_size=64),
    _timm("maxxvit (coatnet)", 64, "coatnet_nano_rw_224", img_size=64),
    _timm("levit", 64, "levit_128s", img_size=64),
    _timm("levit (convolutional)", 64, "levit_conv_128s", img_size=64),
    _timm("efficientformer", 224, "efficientformer_l1"),
    _timm("efficientformer_v2", 64, "efficientformerv2_s0", img_size=64),
    _timm("efficientvit_mit", 32, "efficientvit_b0"),
    _timm("efficientvit_msra", 64, "efficientvit_m0", img_size=64),
    _timm("efficientvim", 32, "efficientvim_m1"),
    _timm("edgenext", 64, "edgenext_xx_small"),
    _timm("mobilevit", 64, "mobilevit_xxs"),
    _timm("mobilevit (v2)", 64, "mobilevitv2_050"),
    _timm("fastvit", 64, "fastvit_sa12", layers=(1, 1, 1, 1)),
    _timm("nextvit", 32, "nextvit_small"),
    _timm("tiny_vit", 64, "tiny_vit_5m_224"),
    _timm("visformer", 64, "visformer_tiny", img_size=64),
    _timm("metaformer (caformer)", 32, "caformer_s18"),
    _timm("metaformer (poolformer)", 32, "poolformer_s12"),
    _timm("iformer", 64, "iformer_t"),
    _timm("lowformer", 64, "lowformer_b0"),
    _timm("shvit", 64, "shvit_s1"),
    _timm("cpubone", 64, "cpubone_nano"),
    _timm("csatv2", 128, "csatv2"),
    _timm("mobilenetv4", 64, "mobilenetv4_hybrid_medium"),
    _timm("byoanet (botnet)", 64, "botnet26t_256", img_size=64),
    _timm("byoanet (halonet)", 256, "halonet26t"),
    _timm("byoanet (lambda)", 64, "lambda_resnet26t", img_size=64),
    _timm("swiftformer", 32, "swiftformer_xs"),
    _timm("qwen3_vit", 64, "qwen3_vit_88m", img_size=64, embed_dim=96, depth=2, num_heads=3),
    _timm("nfnet", 32, "test_nfnet"),
    _timm("resnetv2", 32, "resnetv2_18"),
    _timm("mambaout", 32, "test_mambaout"),
    _timm("convnext", 32, "test_convnext"),
    _timm("resnet", 32, "test_resnet"),
    _timm("efficientnet", 32, "test_efficientnet"),
    _timm("mlp_mixer", 32, "mixer_s32_224", img_size=32),
)  # fmt: skip


def _hugging_face(kind: str, size: int, **arguments: Any) -> Family:
    """Return the base model of a family, built from its configuration."""

    def build(fused: bool) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")
        config = getattr(transformers, f"{kind}Config")(**arguments)
        config._attn_implementation = "sdpa" if fused and model._supports_sdpa else "eager"
        return _randomised(model(config))

    return Family(kind, build, size)


HF_VIT = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
HF_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4,
}  # fmt: skip

HUGGING_FACE = (
    _hugging_face("ViT", 32, **HF_VIT),
    _hugging_face("DeiT", 32, **HF_VIT),
    _hugging_face("Beit", 32, **HF_VIT, use_relative_position_bias=True),
    _hugging_face("Dinov2", 32, **HF_VIT, mlp_ratio=2),
    _hugging_face("Dinov2WithRegisters", 32, **HF_VIT, mlp_ratio=2),
    _hugging_face("DINOv3ViT", 32, **HF_VIT, num_register_tokens=4),
    _hugging_face("SiglipVision", 32, **HF_VIT),
    _hugging_face("CLIPVision", 32, **HF_VIT),
    _hugging_face("Swin", 32, **HF_SWIN),
    _hugging_face("Swinv2", 32, **HF_SWIN),
    _hugging_face("Segformer", 64, depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 30, 32]),
    _hugging_face("ConvNext", 64, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]),
)

FAMILIES = (*TIMM, *HUGGING_FACE)


def row(family: Family) -> dict[str, Any]:
    """Return the family's line in the table of the docs: its attention layers, and what capture.qkv gives of them."""
    model = family.build(True)
    layers = attention_layers(model)
    captured = [layer.alias for layer in layers if layer.reason is None]
    message, shape = "", ""
    if layers and captured:
        with torch.no_grad(), capture.qkv(model, captured) as records:
            model(family.images())
        first = records[0]
        shape = f"{tuple(first.q.shape)}" + ("" if first.bias is None else f", bias {tuple(first.bias.shape)}")
    refused = next((layer.alias for layer in layers if layer.reason is not None), None)
    if refused is not None or not layers:
        try:
            with capture.qkv(model, [refused or 0]):
                pass
        except ValueError as error:
            message = str(error)
    return {
        "family": family.name,
        "library": "timm" if family in TIMM else "transformers",
        "layers": dict(Counter(layer.kind for layer in layers)),
        "captured": len(captured),
        "first": shape,
        "refused": message,
    }
