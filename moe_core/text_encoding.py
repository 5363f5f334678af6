"""Captions to features, by a FLUX pipeline's T5 and CLIP.

A prompt is encoded on its own: its features do not depend on the batch, so a resumed run sees the same bits. Only by a T5 that is
sharded over processes are the prompts of a pass encoded together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from diffusers import FluxPipeline
from diffusers.utils import is_accelerate_available
from torch import Tensor

from moe_core.dtensors import is_sharded

CACHE_BYTES = 512 * 2**20
"""Encoded prompts that are kept, a pipeline; FLUX.1's are 4 MB each."""
LOADING = {"low_cpu_mem_usage": is_accelerate_available()}
"""For `from_pretrained`, which otherwise says at every load that accelerate is not there."""
_MAX_T5_TOKENS = 512
"""FluxPipeline's own limit."""


def load_text_encoders(folder: Path, device: torch.device | str, dtype: torch.dtype) -> FluxPipeline:
    """A FluxPipeline with nothing but tokenizers and text encoders."""
    return FluxPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype, **LOADING).to(device)


class _PromptCache:
    """Encoded prompts of one pipeline, the least recently used dropped first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[tuple[str, int], tuple[Tensor, Tensor]] = OrderedDict()
        self.bytes = 0

    def get(self, caption: str, length: int) -> tuple[Tensor, Tensor] | None:
        found = self.entries.get((caption, length))
        if found is not None:
            self.entries.move_to_end((caption, length))
        return found

    def put(self, caption: str, length: int, text: Tensor, pooled: Tensor) -> None:
        self.entries[caption, length] = (text, pooled)
        self.bytes += text.nbytes + pooled.nbytes
        while self.bytes > CACHE_BYTES and len(self.entries) > 1:
            _, dropped = self.entries.popitem(last=False)
            self.bytes -= sum(tensor.nbytes for tensor in dropped)


_CACHES: WeakKeyDictionary[FluxPipeline, _PromptCache] = WeakKeyDictionary()


def text_length(pipeline: FluxPipeline, max_sequence_length: int) -> int:
    """T5 tokens of a prompt: as many as asked for, if the tokenizer and FluxPipeline take so many."""
    return min(max_sequence_length, pipeline.tokenizer_2.model_max_length, _MAX_T5_TOKENS)


@torch.no_grad()
def encode_prompts(
    pipeline: FluxPipeline, captions: Sequence[str], max_sequence_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """T5 features [B, T, D], CLIP's pooled vectors [B, P] and text ids [T, 3], by FluxPipeline's own encoding.

    T is `text_length`. Kept by caption while the pipeline lives; its text encoders must not change meanwhile.
    """
    length = text_length(pipeline, max_sequence_length)
    if is_sharded(pipeline.text_encoder_2):
        # Each run gathers the encoder from all processes, and all must run it equally often: together, whatever was seen before.
        text, pooled = _encode(pipeline, list(captions), length)
    else:
        cache, entries = _CACHES.setdefault(pipeline, _PromptCache()), []
        for caption in captions:
            entry = cache.get(caption, length)
            if entry is None:
                one, vector = _encode(pipeline, [caption], length)
                entry = (one[0], vector[0])
                cache.put(caption, length, *entry)
            entries.append(entry)
        text, pooled = (torch.stack(parts) for parts in zip(*entries, strict=True))
    return text, pooled, torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype)


def _encode(pipeline: FluxPipeline, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    text, pooled, _ = pipeline.encode_prompt(
        prompt=captions, prompt_2=None, device=pipeline.device, max_sequence_length=length
    )
    return text, pooled
