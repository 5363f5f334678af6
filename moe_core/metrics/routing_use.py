"""Which experts and blocks a model uses while it samples: shares over all tokens and samples, in all and by timestep (Fig. 6).

- Counted by forward hooks on the routers, so that sampling itself is untouched.
- Layers go by their names in the dense model: a block inside a MoB group keeps its number; a group is `transformer_blocks.1-3`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_core.mob import BlockRouter, MoBGroup
from moe_core.moe import Router

Counts = dict[str, Tensor]


class RoutingUse:
    """Choices by layer: `experts[layer]` and `blocks[group]` are int64 [steps, E] and [steps, m]."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        """`steps`: denoising steps of one sampling; every so many calls of the model begin a new one."""
        self.model, self.steps = model, steps
        self.experts: Counts = {}
        self.blocks: Counts = {}
        self._calls = -1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Counts the choices of the forward passes made inside."""
        handles = [self.model.register_forward_pre_hook(self._next_call, with_kwargs=True)]
        for kind in ("transformer_blocks", "single_transformer_blocks"):
            for name, module in _routers(kind, getattr(self.model, kind)):
                store = self.blocks if isinstance(module, BlockRouter) else self.experts
                handles.append(module.register_forward_hook(self._counter(store, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _next_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls += 1

    def _counter(self, store: Counts, name: str) -> Any:
        @torch.compiler.disable  # counts on the host
        def hook(module: nn.Module, args: Any, routing: Any) -> None:
            probs, indices = (
                (routing[0], routing.indices_Bk)
                if isinstance(module, BlockRouter)
                else (routing[0], routing.indices_TK)
            )
            if name not in store:
                store[name] = torch.zeros(self.steps, probs.shape[-1], dtype=torch.int64)
            store[name][self._calls % self.steps] += torch.bincount(indices.flatten().cpu(), minlength=probs.shape[-1])

        return hook


def merge(parts: Iterable[Mapping[str, Tensor]]) -> Counts:
    """Adds up the counts of several units of work."""
    total: Counts = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = total[name] + counts if name in total else counts.clone()
    return total


def shares(counts: Mapping[str, Tensor]) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Layer -> share of each choice over all steps, and the same by step. A step without a choice has shares of 0."""
    overall = {name: _normalised(count.sum(0)).tolist() for name, count in counts.items()}
    return overall, {name: _normalised(count).tolist() for name, count in counts.items()}


def _normalised(count: Tensor) -> Tensor:
    return count.double() / count.sum(-1, keepdim=True).clamp(min=1)


def _routers(kind: str, blocks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    number = 0
    for block in blocks:
        members = list(block.blocks) if isinstance(block, MoBGroup) else [block]
        if isinstance(block, MoBGroup):
            yield f"{kind}.{number}-{number + len(members) - 1}", block.router
        for member in members:
            for name, module in member.named_modules():
                if isinstance(module, Router):
                    yield f"{kind}.{number}.{name.removesuffix('.router')}", module
            number += 1
