"""What the paper compares with, and its figures: Table 1, and the dense models by their configurations.

- FLUX.1-Lite (Freepik/flux.1-lite-8B) is FLUX.1 [dev] without 11 of its double blocks, FLUX-Mini (TencentARC/flux-mini) has 5 double and 10
  single blocks; all three are diffusers' `FluxTransformer2DModel`.
- The figures are data to compare with, copied from the paper; nothing here was measured by this project.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FLUX1_DEV: Mapping[str, Any] = MappingProxyType(
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
)
"""Arguments of `FluxTransformer2DModel`: 11.90 B parameters."""
FLUX1_LITE: Mapping[str, Any] = MappingProxyType({**FLUX1_DEV, "num_layers": 8})
"""8.16 B parameters."""
FLUX1_MINI: Mapping[str, Any] = MappingProxyType({**FLUX1_DEV, "num_layers": 5, "num_single_layers": 10})
"""3.18 B parameters."""


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 1: 1024 x 1024 pixels, guidance 3.5, on one H20 with grouped GEMM."""

    steps: int
    """NFEs, of a whole sampling"""
    tflops: float
    """of one step; the paper's count, see docs/metrics.md"""
    activated: float
    """parameters, in billions; the paper's count, see docs/metrics.md"""
    latency: float
    """seconds of a whole sampling"""
    clip: float
    image_reward: float
    mps: float
    geneval: float
    dpg: float
    b_vqa: float
    """T2I-CompBench, as the two that follow"""
    unidet: float
    s_cot: float


TABLE_1: Mapping[str, PaperRow] = MappingProxyType(
    {
        "FLUX.1 [dev]": PaperRow(28, 66.00, 11.90, 21.20, 32.24, 0.9656, 13.09, 0.6595, 83.42, 0.6401, 0.4262, 78.57),
        "HyperFLUX": PaperRow(8, 66.00, 11.90, 6.06, 32.19, 0.9859, 13.22, 0.6669, 83.25, 0.6270, 0.4375, 78.91),
        "FLUX.1-Lite": PaperRow(28, 53.15, 8.16, 17.24, 31.79, 0.8380, 12.87, 0.5229, 79.00, 0.5471, 0.3785, 77.62),
        "FLUX.1-MoE-L": PaperRow(28, 43.42, 5.15, 17.80, 31.39, 0.8011, 12.60, 0.5702, 81.63, 0.6032, 0.3899, 78.28),
        "HyperFLUX-MoE-L": PaperRow(8, 43.42, 5.15, 5.09, 31.50, 0.8257, 12.74, 0.5917, 81.76, 0.5959, 0.3914, 78.13),
        "FLUX.1-MoE-M": PaperRow(28, 35.70, 4.01, 14.37, 30.77, 0.5969, 12.19, 0.4758, 76.26, 0.4947, 0.3400, 77.50),
        "FLUX-Mini": PaperRow(50, 17.37, 3.18, 10.30, 29.94, 0.2151, 11.18, 0.3209, 69.34, 0.4209, 0.2845, 75.86),
        "FLUX.1-MoE-S": PaperRow(28, 26.43, 3.19, 9.57, 30.67, 0.5942, 12.06, 0.4441, 75.61, 0.4958, 0.3266, 77.03),
        "FLUX.1-MoE-XS": PaperRow(28, 20.26, 2.64, 8.74, 30.40, 0.5076, 11.80, 0.4036, 73.66, 0.4734, 0.3108, 76.25),
        "HyperFLUX-MoE-XS": PaperRow(8, 20.26, 2.64, 2.50, 30.70, 0.5320, 11.76, 0.4117, 74.53, 0.4859, 0.3036, 76.88),
    }
)
"""In the paper's order."""

FLUX1_VAE: Mapping[str, Any] = MappingProxyType(
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
)
"""Arguments of diffusers' `AutoencoderKL`: 84 M parameters."""
FLUX1_SCHEDULER: Mapping[str, Any] = MappingProxyType(
    {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }
)
"""Arguments of diffusers' `FlowMatchEulerDiscreteScheduler`."""
FLUX1_T5: Mapping[str, Any] = MappingProxyType(
    {
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    }
)
"""Arguments of transformers' `T5Config`: T5 v1.1 XXL, of whose encoder FLUX uses 4.76 B parameters."""
FLUX1_CLIP: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": 768,
    }
)
"""Arguments of transformers' `CLIPTextConfig`: the text half of CLIP ViT-L/14, 123 M parameters."""
FLUX1_HUB_IDS = ("black-forest-labs/FLUX.1-dev",)
"""Hub ids of which these configurations are known without asking the hub."""
