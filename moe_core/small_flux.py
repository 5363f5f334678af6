"""A small FLUX pipeline with random weights, built from diffusers' and transformers' own classes.

- Nothing is special about it but its size: it is saved and loaded with `save_pretrained` /
  `FluxPipeline.from_pretrained`.
- The tokenizers are real CLIP (BPE) and T5 (Unigram) tokenizers over a small vocabulary: each word of the given
  captions is one token, other words of the Latin alphabet fall apart into letters.
- The scheduler has no resolution shift: sigmas run evenly from 1 to 1/steps, as a model of one small resolution wants
  them.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from moe_core.config import LATENT_PATCH, ModelConfig, TextConfig, TransformerConfig, VAEConfig
from moe_core.errors import ConfigError

ALPHABET = string.ascii_lowercase
"""Letters that words unknown to the tokenizers fall apart into."""
WORD_END = "</w>"
"""CLIP's mark of a word's last piece."""


def build_pipeline(model: ModelConfig, vocabulary: Iterable[str], seed: int) -> FluxPipeline:
    """A FluxPipeline of this configuration, randomly initialised from `seed`; the caller's random state is left as it
    was.

    `vocabulary`: captions whose words become tokens of their own. Raises ConfigError if a section is missing.
    """
    if model.transformer is None or model.vae is None or model.text is None:
        raise ConfigError(
            f"model '{model.name}' has source '{model.source}';"
            " only a model with transformer, vae and text sections can be built"
        )
    captions = list(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(captions, model.text.max_sequence_length + 1)
        tokenizer_2 = t5_tokenizer(captions, model.text.max_sequence_length)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=build_vae(model.vae, model.resolution),
            text_encoder=_clip(model.text, tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_t5(model.text, tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=build_transformer(model.transformer, model.vae.latent_channels, model.text.hidden_size),
        )


def build_transformer(config: TransformerConfig, latent_channels: int, text_width: int) -> FluxTransformer2DModel:
    """diffusers' FLUX transformer for packed latents of `latent_channels` and text features of `text_width`."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=latent_channels * LATENT_PATCH**2,
        num_layers=config.num_layers,
        num_single_layers=config.num_single_layers,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=config.guidance_embeds,
        axes_dims_rope=config.axes_dims_rope,
    )


def build_vae(config: VAEConfig, resolution: int) -> AutoencoderKL:
    """An AutoencoderKL without quantisation convolutions, as FLUX's; `teacher_training` sets its scale and shift."""
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        sample_size=resolution,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def put_finished(pipeline: FluxPipeline, vae: Path, text: Path) -> None:
    """Puts the trained VAE and text encoders (`text/text_encoder`, `text/text_encoder_2`) into the pipeline, frozen.

    Where they lay is forgotten: a pipeline that was trained in another folder is the same, file by file.
    """
    pipeline.register_modules(
        vae=AutoencoderKL.from_pretrained(vae).requires_grad_(False),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder").requires_grad_(False),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2").requires_grad_(False),
    )
    pipeline.vae.register_to_config(_name_or_path="")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.config.name_or_path = ""


def clip_tokenizer(captions: list[str], max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make each word of the captions one token; `max_length` counts start and end."""
    words = Counter(word for caption in set(captions) for word in caption.lower().split())
    merges = _bpe_merges({word: (*word[:-1], word[-1] + WORD_END) for word in words}, words)
    symbols = sorted(
        {end for pair in merges for end in pair} | set(ALPHABET) | {letter + WORD_END for letter in ALPHABET}
    )
    pieces = ["<|startoftext|>", "<|endoftext|>", *dict.fromkeys([*symbols, *("".join(pair) for pair in merges)])]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, model_max_length=max_length
    )


def t5_tokenizer(captions: list[str], max_length: int) -> T5TokenizerFast:
    """A T5 tokenizer (Unigram): the captions' words, then letters as a last resort; `max_length` counts the end."""
    words = sorted({word for caption in captions for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words), ("▁", -5.0)]
    pieces += [(letter, -6.0) for letter in ALPHABET]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _bpe_merges(parts: dict[str, tuple[str, ...]], counts: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one piece.

    By hand: the trainer of `tokenizers` breaks ties by hash order, so that two runs number the tokens differently.
    """
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        parts = {word: _merge(pieces, best) for word, pieces in parts.items()}


def _merge(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def _clip(config: TextConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            projection_dim=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _t5(config: TextConfig, tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=config.hidden_size,
            d_kv=config.hidden_size // config.num_heads,
            d_ff=4 * config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
