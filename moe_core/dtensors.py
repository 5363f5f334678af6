"""Tensors that may be spread over processes, as FSDP2 leaves parameters, gradients and optimizer state, or may not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
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


def drop_zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Makes gradients that are 0 throughout, in every process, None; only of sharded parameters.

    A block that no sample of any process passed has such ones here, and none in a whole model. Optimizers tell the two apart: a
    weight without a gradient keeps its moments, and does not decay.
    """
    spread = [(p, p.grad) for p in parameters if isinstance(p.grad, DTensor)]
    if not spread:
        return
    largest = torch.stack([_largest(gradient.to_local()) for _, gradient in spread])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=spread[0][1].device_mesh.get_group())
    for (parameter, _), value in zip(spread, largest.tolist(), strict=True):
        if value == 0:
            parameter.grad = None


def _largest(part: Tensor) -> Tensor:
    # A process may have no part of a small tensor.
    return part.abs().max() if part.numel() else part.new_zeros(())
