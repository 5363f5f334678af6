"""Pictures from fixed noise through an ordinary FluxPipeline, and the inputs of a distillation step.

- The noise of a picture is a function of (seed, number of its prompt) alone: the same for every model, however the
  prompts are cut into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from moe_core import checkpoint, noise
from moe_core.config import LATENT_PATCH, TimestepConfig
from moe_core.distill import KDBatch
from moe_core.errors import CheckpointError, DataError
from moe_core.flux_shapes import dense_shapes
from moe_core.text_encoding import LOADING, encode_prompts, text_length
from moe_core.transformer import FluxMoETransformer2DModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What weights are loaded in, by `model.precision`."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which a model loaded in this precision takes inputs in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


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
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **LOADING, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def with_transformer(pipeline: FluxPipeline, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The same pipeline with another transformer; the other parts are shared."""
    other = FluxPipeline(**{**pipeline.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return other


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """A dense transformer, of any number of blocks, or a sparse one, by the class that its config.json names.

    Raises CheckpointError for a folder that does not hold exactly that model's weights.
    """
    config = checkpoint.read_config(folder)
    name = config.get("_class_name")
    classes = {kind.__name__: kind for kind in (FluxTransformer2DModel, FluxMoETransformer2DModel)}
    if name not in classes:
        raise CheckpointError(
            f"{folder / checkpoint.CONFIG} has _class_name '{name}'; it must be one of {', '.join(classes)}"
        )
    if name == FluxTransformer2DModel.__name__:
        # The sparse class does so itself.
        checkpoint.check_weights(folder, dense_shapes(config))
    return classes[name].from_pretrained(folder, dtype=dtype, use_safetensors=True, **LOADING)


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
    stored: tuple[Tensor, Tensor] | None = None,
) -> KDBatch:
    """Inputs of a distillation step, on the pipeline's device; latents and noise [B, C, h, w], sigma [B].

    `stored`: the captions' T5 features [B, T, D] and CLIP vectors [B, P], if they were encoded before. Raises DataError if their T
    is not the one that is asked for.
    """
    count, channels, height, width = latents.shape
    device = pipeline.device
    if stored is None:
        text, pooled, text_ids = encode_prompts(pipeline, captions, max_sequence_length)
    else:
        text, pooled = (tensor.to(device, pipeline.transformer.dtype) for tensor in stored)
        if text.shape[1] != (length := text_length(pipeline, max_sequence_length)):
            raise DataError(
                f"the shards' text embeddings have {text.shape[1]} tokens; model.max_sequence_length asks for {length}"
            )
        text_ids = torch.zeros(text.shape[1], 3, device=device, dtype=text.dtype)
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
