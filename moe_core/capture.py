"""Records what blocks put out and what routers decided, during one forward pass.

- Forward hooks, so that the model's own forward stays diffusers'. They are gone when the context ends.
- What is recorded keeps its gradient: losses on it train the model.
- Under gradient checkpointing a block runs again in the backward pass. The first call wins, so a recording that is
  still open then keeps what belongs to the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_core.losses import Feature
from moe_core.mob import BlockRouter, BlockRouting
from moe_core.moe import Router, Routing


@dataclass
class Recording:
    """What one forward pass left; names are those of `model.named_modules()`, in the order of execution."""

    features: dict[str, Feature] = field(default_factory=dict)
    """Block name -> (encoder_hidden_states [B, T_text, D], hidden_states [B, T_image, D]), after the block."""
    routings: dict[str, Routing] = field(default_factory=dict)
    """Router name -> its decision. A router inside a MoB group that no sample passed is absent, and one that some
    passed has only those."""
    block_routings: dict[str, BlockRouting] = field(default_factory=dict)
    """Block router name -> its decision."""


@contextmanager
def record(model: nn.Module, features: Iterable[str] | None = None) -> Iterator[Recording]:
    """Records features and routings of the forward passes made inside the context; of several, the first.

    `features`: names of the blocks whose output to keep; by default every block (a MoB group is one). Raises
    AttributeError for a name that the model does not have.
    """
    recording = Recording()
    names = block_names(model) if features is None else list(features)
    handles = [model.get_submodule(name).register_forward_hook(_into(recording.features, name)) for name in names]
    for name, module in model.named_modules():
        if isinstance(module, Router):
            handles.append(module.register_forward_hook(_into(recording.routings, name)))
        elif isinstance(module, BlockRouter):
            handles.append(module.register_forward_hook(_into(recording.block_routings, name)))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def block_names(model: nn.Module) -> list[str]:
    """The names of a FLUX model's blocks in the order of execution; a MoB group counts as one block."""
    return [
        f"{kind}.{index}"
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for index in range(len(model.get_submodule(kind)))  # type: ignore[arg-type]
    ]


def _into(store: dict[str, Any], name: str) -> Any:
    # Compiled, each of them would be a graph of its own, and another one in the next step.
    @torch.compiler.disable
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        store.setdefault(name, output)

    return hook
