"""Where a diffusers pipeline lies and how it is called. Without diffusers: the driver of a stage hands it on to the workers that load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PipelineSource:
    """Where a pipeline lies, and how it is called."""

    place: str
    """folder or hub id"""
    transformer: Path | None = None
    """that takes the place of the pipeline's own"""
    precision: str = "fp32"
    """of `sampling.DTYPES`"""
    arguments: Mapping[str, Any] | None = None
    """of its call: `num_inference_steps`, `guidance_scale`, `height`, `width`, `max_sequence_length`"""
    expert_backend: str | None = None
    """of a sparse transformer; None leaves it as it is"""
    compile: bool = False
    """a FLUX transformer's blocks go through torch.compile"""
