"""Context managers that collect the inputs of losses from a live model; hooks are removed when the `with` ends."""

from fastkd.capture._batch_norm import BatchNormInputs, FusedBatchNormStat, bn_inputs
from fastkd.capture._hooks import Captured
from fastkd.capture._layers import attention_layers as attention_layers
from fastkd.capture._layers import resolve_attention as resolve_attention
from fastkd.capture._modules import block_names as block_names
from fastkd.capture._modules import resolve as resolve
from fastkd.capture._qkv import QKV, qkv
from fastkd.capture._tokens import tokens

__all__ = ["QKV", "BatchNormInputs", "Captured", "FusedBatchNormStat", "bn_inputs", "qkv", "tokens"]
