"""What the distillation tests work on: a FLUX small enough to differentiate sample by sample, students, batches."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from moe_core.config import KDStageConfig, OptimizerConfig, TimestepConfig
from moe_core.distill import KDBatch
from moe_core.noise import draw
from moe_core.transformer import FluxMoETransformer2DModel

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 4,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}
IMAGE_TOKENS, TEXT_TOKENS = 4, 3

MOE = {"num_experts": 4, "top_k": 2, "shared_ratio": 1.0, "normal_ratio": 0.75, "dense_double_blocks": [0]}
STUDENTS: dict[str, dict[str, Any]] = {
    "shared": {"moe": {**MOE, "num_experts": 0, "top_k": 0}, "conditioning_dim": 8},
    "moe": {"moe": MOE, "conditioning_dim": 8},
    "mob": {"moe": MOE, "conditioning_dim": 8, "mob": {"double_groups": [[1, 2, 3]], "single_groups": [[0, 1]]}},
}
TRAINED = {"shared": ("shared", "conditioning"), "moe": ("experts", "router"), "mob": ("group_blocks", "block_router")}


def make_teacher(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> FluxTransformer2DModel:
    """A dense model with random weights."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{**SIZES, **sizes}).to(dtype).eval()


def make_student(
    kind: str, seed: int = 1, dtype: torch.dtype = torch.float32, **overrides: Any
) -> FluxMoETransformer2DModel:
    """A sparse model with random weights, as in the stage of that name."""
    torch.manual_seed(seed)
    student = FluxMoETransformer2DModel(**{**SIZES, **STUDENTS[kind], **overrides}).to(dtype)
    student.set_expert_backend("loop")
    return student


def make_stage(kind: str, **overrides: Any) -> KDStageConfig:
    """The parameters of the stage of that name."""
    optimizer = OptimizerConfig(steps=10, batch_size=4, learning_rate=1e-3)
    return KDStageConfig(**{"optimizer": optimizer, "train": TRAINED[kind], "validate_every": 5, **overrides})


def make_batch(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> KDBatch:
    """Random inputs; noise and levels as in training."""
    generator = torch.Generator().manual_seed(seed)
    noise, sigma = draw(seed, range(size), (IMAGE_TOKENS, SIZES["in_channels"]), TimestepConfig())
    return KDBatch(
        latents=torch.randn(noise.shape, generator=generator),
        noise=noise,
        sigma=sigma,
        prompt_embeds=torch.randn(size, TEXT_TOKENS, SIZES["joint_attention_dim"], generator=generator),
        pooled=torch.randn(size, SIZES["pooled_projection_dim"], generator=generator),
        img_ids=torch.tensor([[0.0, row, column] for row in range(2) for column in range(2)]),
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        guidance=torch.full((size,), 3.5),
    ).to(dtype)
