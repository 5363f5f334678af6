"""Text-to-image pipelines of other kinds than FLUX, small and of random weights, saved as anybody's are: Stable Diffusion and PixArt."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from moe_core.small_flux import clip_tokenizer, t5_tokenizer
from tests.moe_core.tiny_clip import text_config

CAPTIONS = ["a red seven", "two green fours", "a blue nine left of a one"]
WIDTH = 16


def save_stable_diffusion(folder: Path, seed: int = 0) -> Path:
    """A UNet with CLIP, as Stable Diffusion 1's; latents of half the side."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(CAPTIONS, 12)
    text = text_config(tokenizer, WIDTH, 12)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    StableDiffusionPipeline(
        vae=_vae(2),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_pixart(folder: Path, seed: int = 0) -> Path:
    """A DiT with T5, as PixArt-alpha's. It makes 256 pixels and scales them to what is asked for: fewer its sizes do not allow."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(CAPTIONS, 12)
    text = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        cross_attention_dim=WIDTH,
        in_channels=4,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=_vae(4),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def _vae(levels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
