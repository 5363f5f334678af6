"""Tensors that may be spread over processes, as FSDP2 leaves parameters, gradients and optimizer state, or may not."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights lie on many processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, spread or not. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of `whole`, placed as `like` is; every process must have all of it."""
    if not isinstance(like, DTensor):
        return whole
    # Without a source nothing is sent: each process cuts its part out.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
