"""A real BLIP-VQA, small and with random weights, as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipTextConfig,
    BlipVisionConfig,
)

# fmt: off
WORDS = [
    "yes", "no", "one", "two", "is", "there", "a", "an", "the", "dog",
    "cat", "red", "blue", "ball", "in", "picture", "of", "and", "on", "left",
    "right", "how", "many", "?", "where", "table", "sky", "green", "very", "old",
    "small",
]
# fmt: on
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
DEC, ENC = len(VOCABULARY), len(VOCABULARY) + 1
SIZE = 32


def save(folder: Path, vocabulary: Sequence[str] = VOCABULARY, vocab_size: int = ENC + 1) -> str:
    """A real BLIP, small and with random weights that are large enough for its answers to differ."""
    torch.manual_seed(0)
    text = BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        encoder_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        bos_token_id=len(vocabulary),
        sep_token_id=3,
        pad_token_id=0,
        initializer_range=0.5,
    )
    vision = BlipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        initializer_range=0.3,
    )
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return str(folder)
