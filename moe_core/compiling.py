"""Blocks compiled one by one (`torch.compile`), for training and sampling.

- diffusers' `compile_repeated_blocks` goes by names of classes: under FSDP2 a block has another class, and stays as it is. Here its kind counts.
- `fullgraph` is False: hooks that record routing, and FSDP2's on routers, end a graph at a layer's router. Where neither is, a block is one
  graph all the same (`tests/moe_core/test_compile.py`).
- Hooks that come and go are guarded: by default the compiler would leave out one that is registered after it has compiled.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn
from torch._dynamo import config

from moe_core.transformer import FluxMoESingleTransformerBlock

RECOMPILE_LIMIT = 64
"""All blocks of a class share it: dense and sparse ones, a teacher's and a student's, with and without gradients, in two precisions."""


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compiles every block of a dense or sparse FLUX in place, sharded or not, when it is first called; a MoB group chooses on the host as before.

    options: of `torch.compile`. Raises ValueError if there is no block.
    """
    config.skip_nnmodule_hook_guards = False
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    blocks = [module for module in model.modules() if isinstance(module, _BLOCKS)]
    if not blocks:
        raise ValueError(f"a {type(model).__name__} has no FLUX block to compile")
    for block in blocks:
        block.compile(**options)


_BLOCKS = (FluxTransformerBlock, FluxSingleTransformerBlock, FluxMoESingleTransformerBlock)
