"""Scorer `similarity`: how near a picture is to the reference model's from the same noise. Of any pictures, without any model.

It punishes another, equally good picture: it says whether a model still does what its teacher did, not whether what it does is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moe_core.metrics.scorer import Measure, Row, Sample, ScorerSpec, stack

SPEC = ScorerSpec(
    "similarity",
    "moe_core.metrics.likeness:load",
    measures=(Measure("psnr", "psnr"), Measure("ssim", "ssim"), Measure("rmse", "rmse", rising=False)),
    needs_reference=True,
)


class SimilarityScorer:
    """Columns `psnr`, `ssim` (`moe_core.metrics.similarity`) and `rmse` (`moe_core.metrics.fidelity`)."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Raises DataError for pictures of unequal sizes, EvaluationError for one without a reference."""
        from moe_core.metrics import fidelity, similarity

        made, reference = stack(samples), stack(samples, references=True)
        columns = {
            "psnr": similarity.psnr(made, reference),
            "ssim": similarity.ssim(made, reference),
            "rmse": fidelity.distances(made, reference),
        }
        return [{name: float(values[row]) for name, values in columns.items()} for row in range(len(samples))]


def load(assets: Mapping[str, str], device: torch.device) -> SimilarityScorer:
    """Needs nothing; works on the CPU, whatever the device."""
    return SimilarityScorer()
