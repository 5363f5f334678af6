"""Section `model`: the dense teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section
from moe_core.config.training import OptimizerConfig, TimestepConfig

LATENT_PATCH = 2
"""FLUX packs 2 x 2 latent pixels into a token."""


class TransformerConfig(Section):
    """Arguments of diffusers' `FluxTransformer2DModel`, for a teacher trained here."""

    num_layers: int = Field(gt=0)
    num_single_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    attention_head_dim: int = Field(gt=0)
    axes_dims_rope: tuple[int, int, int]
    guidance_embeds: bool = True

    @model_validator(mode="after")
    def _rope_fills_the_head(self) -> TransformerConfig:
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(a % 2 for a in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope is {list(self.axes_dims_rope)}; it must be even numbers that sum to"
                f" attention_head_dim, which is {self.attention_head_dim}"
            )
        return self


class VAEConfig(Section):
    """The small `AutoencoderKL`; its downsampling factor is 2 ** (len(block_out_channels) - 1)."""

    latent_channels: int = Field(gt=0)
    block_out_channels: tuple[int, ...]
    layers_per_block: int = Field(1, gt=0)
    norm_num_groups: int = Field(8, gt=0)
    mid_block_attention: bool = Field(True, description="attention at the VAE's lowest resolution, as FLUX's has")
    kl_weight: float = Field(1e-6, ge=0)

    @property
    def factor(self) -> int:
        """Pixels a side of one latent pixel."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @model_validator(mode="after")
    def _groups_fit(self) -> VAEConfig:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}; it must be a multiple of norm_num_groups, which is {self.norm_num_groups}"
                )
        return self


class TextConfig(Section):
    """The small T5 (token features) and CLIP (pooled vector) encoders."""

    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    max_sequence_length: int = Field(gt=0, description="T5 tokens a prompt")
    context_words: int = Field(3, gt=0, description="how far to either side a T5 token learns to tell its neighbours")

    @model_validator(mode="after")
    def _heads_fit(self) -> TextConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of num_heads, which is {self.num_heads}"
            )
        return self


class TeacherTrainingConfig(Section):
    """How a teacher is trained from nothing: the VAE, then the text encoders, then the transformer."""

    vae: OptimizerConfig
    text: OptimizerConfig
    transformer: OptimizerConfig
    timesteps: TimestepConfig
    validate_every: int = Field(gt=0)


class LoRAConfig(Section):
    """A low-rank change of a given teacher's transformer, fused into its weights before anything else is done with it."""

    path: str = Field(description="a safetensors file, a folder with one, or a hub id")
    weight_name: str | None = Field(
        None, description="the file within the folder or hub repository; null: its only one"
    )
    revision: str | None = Field(None, description="of a hub repository: a branch, tag or commit")
    scale: float = Field(allow_inf_nan=False, description="W + scale * alpha / rank * B A")

    @model_validator(mode="after")
    def _safetensors(self) -> LoRAConfig:
        name = self.weight_name or ""
        if name and (not name.endswith(".safetensors") or name.startswith("/") or ".." in name.split("/")):
            raise ValueError(
                f"weight_name is '{name}'; it must be a .safetensors file within path (others could run code)"
            )
        return self


class ModelConfig(Section):
    """The dense teacher."""

    name: str
    source: Literal["train", "folder", "hub"]
    path: str | None = Field(None, description="a diffusers pipeline folder, or a hub id")
    revision: str | None = None
    lora: LoRAConfig | None = None
    transformer: TransformerConfig | None = None
    vae: VAEConfig | None = None
    text: TextConfig | None = None
    training: TeacherTrainingConfig | None = None
    resolution: int = Field(gt=0, description="side of the square image, pixels")
    guidance_scale: float | None = Field(
        3.5, gt=0, description="null: a teacher without guidance embedding, as FLUX.1 [schnell]"
    )
    num_inference_steps: int = Field(gt=0)
    max_sequence_length: int = Field(512, gt=0, le=512, description="T5 tokens a prompt, in training and sampling")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of weights and arithmetic where nothing is trained: importance, pictures, latency"
    )

    @model_validator(mode="before")
    @classmethod
    def _given_says_what_it_is(cls, values: Any) -> Any:
        # A preset describes the teacher that it trains. Of a given one its own files say all that.
        if isinstance(values, Mapping) and values.get("source") in ("folder", "hub"):
            return {**values, **dict.fromkeys(("transformer", "vae", "text", "training"))}
        return values

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        if self.source == "train":
            missing = [k for k in ("transformer", "vae", "text", "training") if getattr(self, k) is None]
            if missing:
                raise ValueError(f"source is 'train'; then {', '.join(missing)} must be given")
            if self.lora is not None:
                raise ValueError(
                    f"lora is '{self.lora.path}', but source is 'train'; only a given teacher takes one: lora must be null"
                )
        elif not self.path:
            raise ValueError(f"source is '{self.source}'; then path must be given")
        if self.transformer is not None:
            check_guidance(self.guidance_scale, self.transformer.guidance_embeds, "transformer.guidance_embeds")
        if self.vae is not None and self.resolution % (self.vae.factor * LATENT_PATCH):
            raise ValueError(
                f"resolution is {self.resolution}; it must be a multiple of {self.vae.factor * LATENT_PATCH}: the VAE's"
                f" factor {self.vae.factor} times the patch of {LATENT_PATCH}"
            )
        if self.text is not None and self.max_sequence_length > self.text.max_sequence_length:
            raise ValueError(
                f"max_sequence_length is {self.max_sequence_length}; it must be at most text.max_sequence_length,"
                f" which is {self.text.max_sequence_length}"
            )
        return self


def check_guidance(scale: float | None, embeds: bool, where: str) -> None:
    """A model with a guidance embedding needs a scale, one without takes none; raises ValueError, naming both."""
    if embeds and scale is None:
        raise ValueError(f"guidance_scale is null, but {where} is true; it must be a number, 3.5 for FLUX.1 [dev]")
    if not embeds and scale is not None:
        raise ValueError(f"guidance_scale is {scale:g}, but {where} is false: the model takes none; it must be null")
