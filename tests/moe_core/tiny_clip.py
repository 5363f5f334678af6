"""The text half of a CLIP small enough for tests, for a tokenizer that a test made."""

from __future__ import annotations

from transformers import CLIPTextConfig, PreTrainedTokenizerBase


def text_config(tokenizer: PreTrainedTokenizerBase, width: int, length: int) -> CLIPTextConfig:
    """One layer; `length` tokens at most."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
