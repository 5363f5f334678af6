"""Training the small text encoders from nothing: T5's tokens learn to tell the words around them, CLIP's vector the whole caption.

- FLUX gives its text tokens no positions: which colour belongs to which digit, and what is left of what, reaches the
  transformer only if the text encoders have put it into their features. FLUX's own come with that knowledge, and are
  frozen; new ones that are trained with the transformer alone do not find it (docs/experiments.md).
- What is drawn for a sample is a function of (seed, position) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from moe_core import noise
from moe_core.errors import DataError

ENCODERS = ("text_encoder", "text_encoder_2")
"""CLIP and T5, as a FluxPipeline calls them."""

_VALIDATION_BATCH = 128
_IGNORE = -100
"""Cross-entropy's mark of a target that does not count."""


class TextStep(nn.Module):
    """Loss of both encoders, a mean cross-entropy each: T5's of the words up to `words` places to either side of each
    token, from that token's feature; CLIP's of every word of the caption, from the pooled vector.
    """

    def __init__(self, pipeline: FluxPipeline, places: int, words: int) -> None:
        super().__init__()
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2
        self.words = words
        t5, clip = self.text_encoder_2.config, self.text_encoder.config
        self.around = nn.Linear(t5.d_model, (2 * words + 1) * t5.vocab_size)
        self.whole = nn.Linear(clip.hidden_size, places * clip.vocab_size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`clip_ids` [B, L1], `t5_ids` [B, L2] token numbers -> scalars "loss", "t5", "clip" (losses), "t5_accuracy",
        "clip_accuracy" (share of the words that are told rightly).
        """
        features = self.text_encoder_2(batch["t5_ids"])[0]
        around = self.around(features).unflatten(-1, (2 * self.words + 1, -1))  # [B, L2, 2 * words + 1, vocabulary]
        neighbours = neighbouring(batch["t5_ids"], self.words, self.text_encoder_2.config.pad_token_id)
        pooled = self.text_encoder(batch["clip_ids"]).pooler_output
        whole = self.whole(pooled).unflatten(-1, (batch["clip_ids"].shape[1], -1))  # [B, L1, vocabulary]
        t5, t5_accuracy = _told(around, neighbours)
        clip, clip_accuracy = _told(whole, batch["clip_ids"])
        return {"loss": t5 + clip, "t5": t5, "clip": clip, "t5_accuracy": t5_accuracy, "clip_accuracy": clip_accuracy}


def neighbouring(ids: Tensor, words: int, pad: int) -> Tensor:
    """[B, L] -> [B, L, 2 * words + 1]: the token at each offset from -words to words; -100 beyond the ends and around padding."""
    length = ids.shape[1]
    wide = F.pad(ids, (words, words), value=_IGNORE)
    found = torch.stack([wide[:, start : start + length] for start in range(2 * words + 1)], -1)
    return found.masked_fill((ids == pad)[..., None], _IGNORE)


def _told(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """[..., vocabulary], [...] -> cross-entropy and accuracy over the targets that count."""
    count = targets != _IGNORE
    logits, targets = logits[count], targets[count]
    return F.cross_entropy(logits, targets), (logits.argmax(-1) == targets).float().mean()


def tokens(pipeline: FluxPipeline, captions: Sequence[str], max_sequence_length: int) -> tuple[Tensor, Tensor]:
    """CLIP's [N, L1] and T5's [N, L2] token numbers, padded and cut as FluxPipeline does it."""
    clip, t5 = (
        tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for tokenizer, length in (
            (pipeline.tokenizer, pipeline.tokenizer.model_max_length),
            (pipeline.tokenizer_2, max_sequence_length),
        )
    )
    return clip, t5


class TextTrainee:
    """Both text encoders of a pipeline, as a trainee (`moe_core.training`). Raises DataError without captions."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        max_sequence_length: int,
        words: int,
        captions: Sequence[str],
        validation: Sequence[str],
        seed: int,
    ) -> None:
        if not captions or not validation:
            raise DataError(
                f"{len(captions)} captions to train the text encoders on and {len(validation)} to validate them;"
                " there must be at least one of each"
            )
        self.module = TextStep(pipeline, pipeline.tokenizer.model_max_length, words)
        self.module.to(pipeline.text_encoder.device)
        self.rates: dict[str, float] = {}
        self.seed = seed
        self._train = tokens(pipeline, captions, max_sequence_length)
        self._validation = tokens(pipeline, validation, max_sequence_length)

    def batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Token numbers of the captions of these sample positions."""
        return self._batch(self._train, noise.sample_index(self.seed, positions, len(self._train[0])))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """What the module returns, on the validation captions."""
        totals: dict[str, float] = {}
        count = len(self._validation[0])
        for start in range(0, count, _VALIDATION_BATCH):
            rows = range(start, min(start + _VALIDATION_BATCH, count))
            for name, value in self.module(self._batch(self._validation, rows)).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(rows) / count
        return totals

    def save(self, folder: Path) -> None:
        """Writes each encoder as a transformers model folder; what told the words is left behind."""
        for name in ENCODERS:
            getattr(self.module, name).save_pretrained(folder / name)

    def _batch(self, ids: tuple[Tensor, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
        clip, t5 = (part[list(rows)].to(self.module.text_encoder.device) for part in ids)
        return {"clip_ids": clip, "t5_ids": t5}
