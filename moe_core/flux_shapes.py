"""The tensors of a dense FLUX transformer, by its configuration, without torch.

`FluxTransformer2DModel` on the meta device would say the same (a test compares them), but a given teacher is checked whenever
parameters are read, by a flow too, where torch and diffusers would cost seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FFN_RATIO = 4
"""Hidden width of the FFNs over the model's."""
TIME_CHANNELS = 256
"""Sines and cosines of the timestep and of the guidance."""

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor of the `FluxTransformer2DModel` that a config.json describes.

    Raises KeyError or TypeError where the configuration lacks a number.
    """
    head = int(config["attention_head_dim"])
    width = int(config["num_attention_heads"]) * head
    channels, patch = int(config["in_channels"]), int(config.get("patch_size") or 1)
    shapes: Shapes = {}
    _embedder(shapes, "time_text_embed.timestep_embedder", TIME_CHANNELS, width)
    if config.get("guidance_embeds"):
        _embedder(shapes, "time_text_embed.guidance_embedder", TIME_CHANNELS, width)
    _embedder(shapes, "time_text_embed.text_embedder", int(config["pooled_projection_dim"]), width)
    _linear(shapes, "context_embedder", int(config["joint_attention_dim"]), width)
    _linear(shapes, "x_embedder", channels, width)
    for index in range(int(config["num_layers"])):
        _double(shapes, f"transformer_blocks.{index}", width, head)
    for index in range(int(config["num_single_layers"])):
        _single(shapes, f"single_transformer_blocks.{index}", width, head)
    _linear(shapes, "norm_out.linear", width, 2 * width)
    _linear(shapes, "proj_out", width, patch * patch * int(config.get("out_channels") or channels))
    return shapes


def _double(shapes: Shapes, block: str, width: int, head: int) -> None:
    for norm in ("norm1", "norm1_context"):
        _linear(shapes, f"{block}.{norm}.linear", width, 6 * width)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        _linear(shapes, f"{block}.attn.{name}", width, width)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        shapes[f"{block}.attn.{name}.weight"] = (head,)
    for ffn in ("ff", "ff_context"):
        _linear(shapes, f"{block}.{ffn}.net.0.proj", width, FFN_RATIO * width)
        _linear(shapes, f"{block}.{ffn}.net.2", FFN_RATIO * width, width)


def _single(shapes: Shapes, block: str, width: int, head: int) -> None:
    _linear(shapes, f"{block}.norm.linear", width, 3 * width)
    for name in ("to_q", "to_k", "to_v"):
        _linear(shapes, f"{block}.attn.{name}", width, width)
    for name in ("norm_q", "norm_k"):
        shapes[f"{block}.attn.{name}.weight"] = (head,)
    _linear(shapes, f"{block}.proj_mlp", width, FFN_RATIO * width)
    _linear(shapes, f"{block}.proj_out", (1 + FFN_RATIO) * width, width)


def _embedder(shapes: Shapes, name: str, inputs: int, width: int) -> None:
    _linear(shapes, f"{name}.linear_1", inputs, width)
    _linear(shapes, f"{name}.linear_2", width, width)


def _linear(shapes: Shapes, name: str, inputs: int, outputs: int) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs)
    shapes[f"{name}.bias"] = (outputs,)
