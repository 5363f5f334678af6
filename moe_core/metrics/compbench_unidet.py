"""The scorer of T2I-CompBench++'s three box categories, 2D spatial, 3D spatial and numeracy: what the benchmark calls UniDet.

- UniDet is of detectron2 and no longer maintained. An open-vocabulary detector stands in for it; the formulas on its boxes are the
  official ones (`compbench_spatial`, `compbench_numeracy`).
- The depth model is the official one in transformers' format: MiDaS' DPT.
- A picture of another category gets nan: no measure looks at it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moe_core.metrics import compbench_numeracy as numeracy
from moe_core.metrics import compbench_spatial as spatial
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.open_detector import Detection, OpenDetector
from moe_core.metrics.scorer import Row, Sample

_UNUSED = re.compile(r"neck\.fusion_stage\.layers\.0\.residual_layer1\..*")
"""The first fusion has nothing to add, so it never calls this layer; Intel's checkpoints lack it (huggingface/transformers issue 28292)."""


class DepthModel:
    """A DPT that says how near each pixel is."""

    def __init__(self, model: Any, processor: Any, device: torch.device) -> None:
        self._model, self._processor, self._device = model, processor, device

    @classmethod
    def load(cls, folder: str, device: torch.device) -> DepthModel:
        """From a folder or hub id of a DPT in transformers' format with safetensors. Raises Unloadable, or DataError where weights are missing."""
        from transformers import AutoImageProcessor, DPTForDepthEstimation

        model = load_model(DPTForDepthEstimation, folder, "DPT", unused=_UNUSED)
        return cls(model.to(device).eval(), load_part(AutoImageProcessor, folder), device)

    @torch.inference_mode()
    def nearness(self, image: Image.Image) -> Tensor:
        """[H, W] of the picture's frame (`compbench_spatial.frame`), 0 for its farthest point, 1 for its nearest; 0 if all are equal."""
        inputs = self._processor(images=image, return_tensors="pt").to(self._device)
        # MiDaS says inverse depth: large is near.
        (depth,) = self._model(**inputs).predicted_depth.float()
        spread = depth.max() - depth.min()
        depth = (depth - depth.min()) / spread if spread > 0 else torch.zeros_like(depth)
        width, height = spatial.frame(*image.size)
        return F.interpolate(depth[None, None], size=(height, width), mode="bilinear", align_corners=True)[0, 0].cpu()


class BoxScorer:
    """Scores pictures of the three categories by their prompt's `record`, as `compbench.read_prompts` makes it."""

    def __init__(self, detector: OpenDetector, depth: DepthModel) -> None:
        self._detector, self._depth = detector, depth

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`unidet`: the category's score, 0 to 1. `unidet_swapped`: the same, with 3D's depth read as the official script does."""
        return [self._row(sample) for sample in samples]

    def _row(self, sample: Sample) -> Row:
        record, image = sample.prompt.record, sample.image
        if sample.prompt.kind == "numeracy":
            counts = record["counts"]
            score = numeracy.score(counts, self._found(image, [numeracy.sought(thing) for thing, _ in counts]))
            return {"unidet": score, "unidet_swapped": score}
        if sample.prompt.kind not in ("spatial", "3d_spatial"):
            return {"unidet": math.nan, "unidet_swapped": math.nan}
        first, relation, second = record["relation"]
        found = self._found(image, [spatial.sought(first), spatial.sought(second)])
        if sample.prompt.kind == "spatial":
            score = spatial.score_2d(first, relation, second, found)
            return {"unidet": score, "unidet_swapped": score}
        nearness = self._depth.nearness(image)
        return {
            "unidet": spatial.score_3d(first, relation, second, found, nearness),
            "unidet_swapped": spatial.score_3d(first, relation, second, found, nearness, swapped=True),
        }

    def _found(self, image: Image.Image, names: Sequence[str]) -> list[Detection]:
        """In the frame's pixels, best first."""
        return spatial.to_frame(self._detector.detect(image, list(dict.fromkeys(names))), *image.size)


def load(assets: Mapping[str, str], device: torch.device) -> BoxScorer:
    """From `open_detector` (OWLv2) and `depth` (DPT)."""
    return BoxScorer(OpenDetector.load(assets["open_detector"], device), DepthModel.load(assets["depth"], device))
