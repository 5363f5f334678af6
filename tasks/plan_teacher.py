"""The teacher's parts as configurations, for a plan: nothing is downloaded but, for an unknown hub id, four small JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from moe_core import accounting, small_flux
from moe_core.config import LATENT_PATCH, ModelConfig
from moe_core.config.given_teacher import known_configs, read_configs
from moe_core.errors import ConfigError


@dataclass(frozen=True)
class Teacher:
    """Configurations, as in the parts' config.json."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]

    def build_vae(self) -> nn.Module:
        return AutoencoderKL.from_config(dict(self.vae))

    def build_clip(self) -> nn.Module:
        return CLIPTextModel(CLIPTextConfig(**self.text_encoder))

    def build_t5(self) -> nn.Module:
        return T5EncoderModel(T5Config(**self.text_encoder_2))

    def image_tokens(self, resolution: int) -> int:
        """Tokens of a square picture."""
        factor = 2 ** (len(self.vae["block_out_channels"]) - 1)
        return (resolution // (factor * LATENT_PATCH)) ** 2

    def parameters(self) -> dict[str, int]:
        """Part -> number of its parameters."""
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {
                "vae": self.build_vae(),
                "text_encoder": self.build_clip(),
                "text_encoder_2": self.build_t5(),
            }
        counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        return {"transformer": accounting.count(self.transformer).total, **counts}


def describe(model: ModelConfig) -> Teacher:
    """The teacher that the parameters name. Raises ConfigError where the hub must be asked and does not answer."""
    if model.source == "train":
        pipeline = small_flux.build_pipeline(model, [], seed=0)
        text = [pipeline.text_encoder.config.to_dict(), pipeline.text_encoder_2.config.to_dict()]
        return Teacher(dict(pipeline.transformer.config), dict(pipeline.vae.config), *text)
    configs = known_configs(model)
    return Teacher(**(read_configs(_from_hub(model)) if configs is None else configs))


def _from_hub(model: ModelConfig) -> Path:
    # Only here: other teachers need no hub.
    from huggingface_hub import snapshot_download

    try:
        patterns = ["model_index.json", "*/config.json"]
        return Path(snapshot_download(str(model.path), revision=model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path is {model.path}, whose configuration the hub does not give ({error}); give a folder: model.source=folder"
        ) from error
