"""A small dense FLUX, scores, parameters and inputs for the tests of conversion and of the sparse model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from moe_core.config import MoBConfig, MoBLevelConfig, MoEConfig
from moe_core.convert import ffn_names

WIDTH = 32
SIZES: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 5,
    "num_single_layers": 6,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
IMAGE_TOKENS, TEXT_TOKENS = 9, 4


def make_teacher(seed: int = 0, **sizes: Any) -> FluxTransformer2DModel:
    """A dense model with random weights, modulations and biases among them, so that nothing is hidden by a zero."""
    torch.manual_seed(seed)
    teacher = FluxTransformer2DModel(**{**SIZES, **sizes}).eval()
    for name, parameter in teacher.named_parameters():
        if name.startswith("time_text_embed"):
            parameter.data *= 3
    return teacher


def make_scores(teacher: FluxTransformer2DModel, seed: int = 0) -> dict[str, Tensor]:
    """Importance scores as the importance stage would write them."""
    generator = torch.Generator().manual_seed(seed)
    segments = 4 * teacher.inner_dim
    return {name: torch.rand(segments, generator=generator) for name in ffn_names(teacher)}


def make_moe(**changes: Any) -> MoEConfig:
    """The paper's 1S12E2A, without conditioning compression."""
    values = {"shared_ratio": 1.0, "normal_ratio": 0.25, "num_experts": 12, "top_k": 2, **changes}
    return MoEConfig(**values)


def make_mob(**changes: Any) -> MoBConfig:
    """Block routing parameters; the levels are given to `to_mob` one by one."""
    return MoBConfig(**{"levels": {}, **changes})


def make_level(double: dict[str, Any] | None = None, single: dict[str, Any] | None = None) -> MoBLevelConfig:
    """A sparsity level."""
    return MoBLevelConfig.model_validate({"init": "moe", "double": double or {}, "single": single or {}})


def make_inputs(batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of the transformer's forward."""
    g = torch.Generator().manual_seed(seed)
    side = round(IMAGE_TOKENS**0.5)
    return {
        "hidden_states": torch.randn(batch, IMAGE_TOKENS, SIZES["in_channels"], generator=g).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, SIZES["joint_attention_dim"], generator=g).to(dtype),
        "pooled_projections": torch.randn(batch, SIZES["pooled_projection_dim"], generator=g).to(dtype),
        "timestep": torch.rand(batch, generator=g).to(dtype),
        "guidance": torch.full((batch,), 3.5).to(dtype),
        "img_ids": torch.tensor([[0.0, row, column] for row in range(side) for column in range(side)]).to(dtype),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3).to(dtype),
    }


def conditioning_bank(teacher: FluxTransformer2DModel, count: int = 400, seed: int = 0) -> Tensor:
    """[N, D] conditioning vectors of random prompts and timesteps."""
    g = torch.Generator().manual_seed(seed)
    pooled = torch.randn(count, SIZES["pooled_projection_dim"], generator=g)
    with torch.no_grad():
        return teacher.time_text_embed(1000 * torch.rand(count, generator=g), torch.full((count,), 3500.0), pooled)


@torch.no_grad()
def predict(model: FluxTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's output, [B, T, C]."""
    return model(**inputs, return_dict=False)[0]
