"""CUDA graphs, one a block, at a fixed resolution: a step launches one for each block that it passes, and a MoB group chooses on the host.

- All graphs of one batch size work on the same buffers: a block reads image and text there and leaves its own in their place. So blocks can
  follow each other in any order, and a sample that chose another block replays another graph; nothing is recorded anew.
- `torch.compile(mode="reduce-overhead")` records by the path that led to a graph: with groups a path for every combination of choices.
- A block is recorded when it is first called with a batch size, in the same memory pool: between two replays only the buffers live.
- Recording needs CUDA, and experts that never ask the host (`grouped_mm`, bf16, compute capability 9 and 10). Anywhere else a "graph" calls its
  block again, on the same buffers: so tests on a CPU say whether values are right. Without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from moe_core.mob import MoBGroup

WARM_UP = 3
"""Calls before a recording: kernels are compiled and chosen, and cuBLAS takes its memory."""


@dataclass
class _Buffers:
    """Of one batch size; what blocks read and write."""

    image: Tensor
    text: Tensor
    temb: Tensor
    rotary: tuple[Tensor, Tensor] | None


class Graphs:
    """Replaces the `forward` of every block of a model by graphs, inside and outside of groups; `compiled`: of compiled blocks."""

    def __init__(self, model: FluxTransformer2DModel, device: torch.device, compiled: bool):
        self.device, self.compiled = device, compiled
        self.recorded = 0
        self._buffers: dict[int, _Buffers] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        for member in (*model.transformer_blocks, *model.single_transformer_blocks):
            for block in member.blocks if isinstance(member, MoBGroup) else (member,):
                self._replace(block)

    def _replace(self, block: nn.Module) -> None:
        original = torch.compile(block.forward, fullgraph=True) if self.compiled else block.forward
        replays: dict[int, Callable[[], None]] = {}

        def forward(
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: tuple[Tensor, Tensor] | None = None,
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            size = len(hidden_states)
            if size not in self._buffers:
                rotary = image_rotary_emb and (image_rotary_emb[0].clone(), image_rotary_emb[1].clone())
                image, text = hidden_states.clone(), encoder_hidden_states.clone()
                self._buffers[size] = _Buffers(image, text, temb.clone(), rotary)
            buffers = self._buffers[size]
            _take(buffers, hidden_states, encoder_hidden_states, temb)
            if size not in replays:
                # Recording writes there, and what was given may be the buffers themselves.
                given = [t.clone() for t in (hidden_states, encoder_hidden_states, temb)]
                replays[size] = self._record(original, buffers)
                _take(buffers, *given)
            replays[size]()
            return buffers.text, buffers.image

        block.forward = forward

    def _record(self, block: Callable[..., Any], buffers: _Buffers) -> Callable[[], None]:
        self.recorded += 1

        def run() -> None:
            text, image = block(
                hidden_states=buffers.image,
                encoder_hidden_states=buffers.text,
                temb=buffers.temb,
                image_rotary_emb=buffers.rotary,
                joint_attention_kwargs=None,
            )
            buffers.image.copy_(image)
            buffers.text.copy_(text)

        if self.device.type != "cuda":
            run()
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


def _take(buffers: _Buffers, image: Tensor, text: Tensor, temb: Tensor) -> None:
    for buffer, given in ((buffers.image, image), (buffers.text, text), (buffers.temb, temb)):
        if buffer.data_ptr() != given.data_ptr():
            buffer.copy_(given)
