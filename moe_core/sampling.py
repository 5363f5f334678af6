"""Pictures from fixed noise through an ordinary FluxPipeline, and the inputs of a distillation step.

- The noise of a picture is a function of (seed, number of its prompt) alone: the same for every model, however the
  prompts are cut into batches.
- A prompt is encoded on its own, never with others: its features do not depend on the batch, so a resumed run sees the
  same bits.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.utils import is_accelerate_available
from numpy.typing import NDArray
from torch import Tensor

from moe_core import noise
from moe_core.config import LATENT_PATCH, TimestepConfig
from moe_core.distill import KDBatch
from moe_core.dtensors import is_sharded
from moe_core.errors import CheckpointError
from moe_core.transformer import FluxMoETransformer2DModel

CACHE_BYTES = 512 * 2**20
"""Encoded prompts that are kept, a pipeline; FLUX.1's are 4 MB each."""
LOADING = {"low_cpu_mem_usage": is_accelerate_available()}
"""For `from_pretrained`, which otherwise says at every load that accelerate is not there."""
_MAX_T5_TOKENS = 512
"""FluxPipeline's own limit."""


def load_pipeline(
    folder: Path,
    transformer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    without: Sequence[str] = (),
) -> FluxPipeline:
    """A FluxPipeline from a diffusers folder, with another transformer in its place if one is given; `without` are parts that are
    not loaded (`vae`).

    The transformer is a FluxMoETransformer2DModel if its config.json says so. Raises CheckpointError for a folder that
    is none.
    """
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} has no model_index.json; it must be a diffusers pipeline folder")
    parts: dict[str, Any] = dict.fromkeys(without)
    if transformer is not None:
        parts["transformer"] = load_transformer(transformer, dtype)
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, **LOADING, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """A dense or a sparse transformer, by the class that its config.json names."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{config} does not exist; {folder} must be a diffusers model folder")
    name = json.loads(config.read_text()).get("_class_name")
    classes = {kind.__name__: kind for kind in (FluxTransformer2DModel, FluxMoETransformer2DModel)}
    if name not in classes:
        raise CheckpointError(f"{config} has _class_name '{name}'; it must be one of {', '.join(classes)}")
    return classes[name].from_pretrained(folder, dtype=dtype, **LOADING)


def start_noise(pipeline: FluxPipeline, seed: int, numbers: Sequence[int], resolution: int) -> Tensor:
    """Packed starting noise [B, T, C] of the prompts with these numbers, for square pictures of `resolution` pixels."""
    side = resolution // pipeline.vae_scale_factor
    channels = pipeline.transformer.config.in_channels // LATENT_PATCH**2
    drawn, _ = noise.draw(seed, numbers, (channels, side, side), TimestepConfig())
    return FluxPipeline._pack_latents(drawn, len(numbers), channels, side, side)


def generate(
    pipeline: FluxPipeline,
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    *,
    resolution: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    max_sequence_length: int,
) -> NDArray[np.uint8]:
    """Pictures uint8 [B, resolution, resolution, 3] of prompts, from the noise of their numbers, in one call."""
    if len(prompts) != len(numbers):
        raise ValueError(f"{len(prompts)} prompts and {len(numbers)} numbers; each prompt needs its number")
    text, pooled, _ = encode_prompts(pipeline, prompts, max_sequence_length)
    pictures = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        latents=start_noise(pipeline, seed, numbers, resolution).to(pipeline.device, pipeline.transformer.dtype),
        height=resolution,
        width=resolution,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        output_type="np",
    ).images
    return np.round(np.asarray(pictures) * 255).astype(np.uint8)


def prepare_batch(
    pipeline: FluxPipeline,
    latents: Tensor,
    captions: Sequence[str],
    drawn: Tensor,
    sigma: Tensor,
    guidance_scale: float | None,
    max_sequence_length: int,
) -> KDBatch:
    """Inputs of a distillation step, on the pipeline's device; latents and noise [B, C, h, w], sigma [B]."""
    count, channels, height, width = latents.shape
    device = pipeline.device
    text, pooled, text_ids = encode_prompts(pipeline, captions, max_sequence_length)
    guidance = None if guidance_scale is None else torch.full((count,), guidance_scale, device=device)
    return KDBatch(
        latents=FluxPipeline._pack_latents(latents, count, channels, height, width).to(device),
        noise=FluxPipeline._pack_latents(drawn, count, channels, height, width).to(device),
        sigma=sigma.to(device),
        prompt_embeds=text,
        pooled=pooled,
        img_ids=FluxPipeline._prepare_latent_image_ids(
            count, height // LATENT_PATCH, width // LATENT_PATCH, device, torch.float32
        ),
        txt_ids=text_ids,
        guidance=guidance,
    )


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
    cache = _CACHES.setdefault(pipeline, _PromptCache())
    # Where T5 is sharded, every process must run it as often as the others.
    always = is_sharded(pipeline.text_encoder_2)
    length = text_length(pipeline, max_sequence_length)
    texts, pooled = [], []
    for caption in captions:
        entry = None if always else cache.get(caption, length)
        if entry is None:
            text, vector, _ = pipeline.encode_prompt(
                prompt=caption, prompt_2=None, device=pipeline.device, max_sequence_length=length
            )
            entry = (text[0], vector[0])
            cache.put(caption, length, *entry)
        texts.append(entry[0])
        pooled.append(entry[1])
    text = torch.stack(texts)
    return text, torch.stack(pooled), torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype)
