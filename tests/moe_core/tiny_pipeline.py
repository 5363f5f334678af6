"""A FluxPipeline small enough for fast tests, with random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from diffusers import FluxPipeline

from moe_core import small_flux
from moe_core.config import ModelConfig
from moe_core.data.embedded import captions_vocabulary

SIZES = {
    "name": "tiny",
    "source": "train",
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    "vae": {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4, "mid_block_attention": False},
    "text": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_sequence_length": 8},
    "training": {
        "vae": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "text": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "transformer": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "timesteps": {},
        "validate_every": 1,
    },
    "resolution": 16,
    "num_inference_steps": 2,
    "max_sequence_length": 8,
}


def tiny_config(**changes: object) -> ModelConfig:
    """The configuration, with changes."""
    return ModelConfig.model_validate({**SIZES, **changes})


def tiny_pipeline(seed: int = 0) -> FluxPipeline:
    """A fresh pipeline."""
    return small_flux.build_pipeline(tiny_config(), captions_vocabulary(), seed)


@cache
def saved_pipeline(folder: Path) -> Path:
    """A folder with a saved pipeline."""
    tiny_pipeline().save_pretrained(folder)
    return folder
