"""Pictures of any diffusers text-to-image pipeline: ours, its teacher, or anybody's folder or hub id.

- A picture's noise comes from a generator on the CPU with a seed of its own: neither the batch nor the device changes what is drawn.
- A pipeline is given what its call takes of the arguments that are set, and no others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from numpy.typing import NDArray

from moe_core import sampling
from moe_core.compiling import compile_blocks
from moe_core.errors import CheckpointError, EvaluationError
from moe_core.pipeline_source import PipelineSource
from moe_core.text_encoding import LOADING, text_length
from moe_core.transformer import FluxMoETransformer2DModel

NEEDED = ("prompt", "generator", "output_type")
"""What a text-to-image pipeline's call takes at least."""


def load(source: PipelineSource, device: torch.device) -> DiffusionPipeline:
    """The pipeline on a device, in eval mode. Raises CheckpointError for a folder that is none, or a pipeline that takes no prompt."""
    dtype = sampling.DTYPES[source.precision]
    if _is_flux(source):
        pipeline: Any = sampling.load_pipeline(Path(source.place), source.transformer, device, dtype)
    else:
        folder = Path(source.place)
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise CheckpointError(f"{folder} has no model_index.json; it must be a diffusers pipeline folder")
        if source.transformer is not None:
            raise CheckpointError(
                f"{source.place} is no FluxPipeline; the transformer {source.transformer} has no place in it"
            )
        try:
            pipeline = DiffusionPipeline.from_pretrained(source.place, dtype=dtype, use_safetensors=True, **LOADING)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source.place} cannot be loaded ({error}); it must be a diffusers pipeline folder or hub id"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        pipeline = pipeline.to(device)
    taken = inspect.signature(type(pipeline).__call__).parameters
    if missing := [name for name in NEEDED if name not in taken]:
        raise CheckpointError(
            f"{source.place} is a {type(pipeline).__name__}, whose call takes no {missing[0]}; it must be a text-to-image pipeline"
        )
    transformer = getattr(pipeline, "transformer", None)
    if isinstance(transformer, FluxMoETransformer2DModel) and source.expert_backend is not None:
        transformer.set_expert_backend(source.expert_backend)
    if source.compile and isinstance(pipeline, FluxPipeline):
        compile_blocks(pipeline.transformer)
    return pipeline


def paint(
    pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], arguments: Mapping[str, Any]
) -> NDArray[np.uint8]:
    """Pictures uint8 [B, H, W, 3] of prompts, each from the noise of its seed, in one call.

    Raises EvaluationError with the prompt of a picture that is not a number somewhere, or that a safety checker has blackened.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; each prompt needs its seed")
    taken = inspect.signature(type(pipeline).__call__).parameters
    given = {name: value for name, value in arguments.items() if value is not None and name in taken}
    if isinstance(pipeline, FluxPipeline) and "max_sequence_length" in given:
        given["max_sequence_length"] = text_length(pipeline, given["max_sequence_length"])
    with torch.inference_mode():
        made = pipeline(
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **given,
        )
    pictures = np.asarray(made.images, np.float32)
    blackened = getattr(made, "nsfw_content_detected", None) or [False] * len(prompts)
    for prompt, black in zip(prompts, blackened, strict=True):
        if black:
            raise EvaluationError(
                f"the pipeline's safety checker has blackened the picture of '{prompt}'; black pictures would count in every measure"
            )
    for prompt, picture in zip(prompts, pictures, strict=True):
        if not np.isfinite(picture).all():
            raise EvaluationError(
                f"the picture of '{prompt}' has values that are not numbers; the model's weights or precision are at fault"
            )
    return np.round(pictures.clip(0, 1) * 255).astype(np.uint8)


def _is_flux(source: PipelineSource) -> bool:
    index = Path(source.place) / "model_index.json"
    return index.is_file() and f'"{FluxPipeline.__name__}"' in index.read_text(encoding="utf-8")
