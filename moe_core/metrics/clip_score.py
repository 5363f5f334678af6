"""CLIP score: 100 x cosine of a picture's and its prompt's CLIP embeddings, 0 where it is negative.

- transformers' CLIPModel, in batches. torchmetrics' CLIPScore has the same definition, and the tests hold the two equal. It is not called
  here: version 1.9 fails on transformers 5, says no number a picture, and takes the end token off a prompt that is too long, so that with
  OpenAI's models all such prompts have one and the same embedding.
- A prompt of more tokens than the model's context (77 for OpenAI's) is cut; its end token stays, as OpenAI's `clip.tokenize(truncate=True)`
  has it.
- Sizes are the model's: OpenAI's sees 224 pixels, the small one of `moe_core.metrics.scene_clip` sees 16.
- float32. Pictures are resized by Pillow, as in OpenAI's code; torchvision differs in the last digit.

Source: Hessel et al. 2021, eq. 1 with w = 100 in place of 2.5; torchmetrics 1.9, functional/multimodal/clip_score.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moe_core.errors import DataError
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.scorer import Asset, Measure, Row, Sample, ScorerSpec

BATCH = 32
"""Pictures at once."""

SPEC = ScorerSpec(
    name="clip_score",
    load_from="moe_core.metrics.clip_score:load",
    measures=(Measure("clip_score", "clip_score", by_kind=True),),
    assets=(Asset("clip", "CLIP ViT-L/14, openai/clip-vit-large-patch14", files=("config.json", "model.safetensors")),),
)

_LEGACY_END = 2
"""What OpenAI's configs say of the end token, wrongly; transformers then takes the highest token for it."""


class ClipScorer:
    """Scores pictures by how near CLIP holds them to their prompts."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, device: torch.device) -> None:
        """Of a `CLIPModel` with its tokenizer and image processor. Raises DataError where model and tokenizer do not fit."""
        check_end_token(model.config.text_config, tokenizer)
        self._model, self._tokenizer, self._image_processor = model.to(device).eval(), tokenizer, image_processor
        self._device = device
        self._context = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`clip_score`: 0 to 100."""
        rows: list[Row] = []
        for first in range(0, len(samples), BATCH):
            part = samples[first : first + BATCH]
            pictures = self.embed_pictures([sample.image for sample in part])
            texts = self.embed_texts([sample.prompt.text for sample in part])
            cosines = (pictures * texts).sum(1)
            rows.extend({"clip_score": value} for value in (100 * cosines).clamp_min(0).tolist())
        return rows

    def embed_pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [n, width] of RGB pictures."""
        pixels = self._image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return F.normalize(self._model.get_image_features(pixel_values=pixels.to(self._device)).pooler_output, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [n, width]; what is over the context is cut."""
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        ).to(self._device)
        features = self._model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(features.pooler_output, dim=-1)


def load(assets: Mapping[str, str], device: torch.device) -> ClipScorer:
    """From `clip`: a folder or hub id in transformers' format with safetensors.

    Raises Unloadable where there is no such model, DataError where it lacks some of a CLIP model's weights.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    place = assets["clip"]
    model = load_model(CLIPModel, place, "CLIP", dtype=torch.float32)
    tokenizer = load_part(AutoTokenizer, place, padding_side="right")
    image_processor = load_part(AutoImageProcessor, place, backend="pil")
    return ClipScorer(model, tokenizer, image_processor, device)


def check_end_token(text_config: Any, tokenizer: Any) -> None:
    """Raises DataError where a CLIP text model would not find the end of its tokenizer's texts: it would then embed the start instead."""
    legacy = text_config.eos_token_id == _LEGACY_END
    looked_for = len(tokenizer) - 1 if legacy else text_config.eos_token_id
    if tokenizer.eos_token_id != looked_for:
        raise DataError(
            f"the CLIP tokenizer ends a text with token {tokenizer.eos_token_id}, its model looks for token {looked_for};"
            " they must be of one model"
        )
