"""Weights spread over ranks by FSDP2."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastkd import capture

from .ranks import Ranks


def shard(network: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Shard the network's weights over the ranks by FSDP2, with a group for each block."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    for name in capture.block_names(network):
        fully_shard(network.get_submodule(name), mesh=mesh)
    fully_shard(network, mesh=mesh)


def shard_beside(module: nn.Module, network: nn.Module) -> None:
    """Shard the modules that a task trains besides the network, in a group of their own."""
    mesh = next(network.parameters()).device_mesh  # type: ignore[attr-defined]
    for child in module.children():
        if child is not network and any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)


def keep_whole(network: nn.Module, wanted: bool) -> None:
    """Set whether the blocks' weights stay whole from the forward to the backward pass.

    Needed where a loss takes values from inside of a block: FSDP2 gathers the weights for the backward pass when a
    gradient reaches the block's output, and none does.
    """
    for name in capture.block_names(network):
        block: Any = network.get_submodule(name)
        block.set_reshard_after_forward(not wanted)
