"""An open-vocabulary detector: boxes of the things that a list of names asks for.

- OWLv2 of transformers. Each name is a query of its own, so a box's name is never a guess about which words of a sentence it answers.
- A box belongs to the name that fits it best. Boxes of one name that overlap are thinned as UniDet's head does (IoU above 0.5), for
  OWLv2 itself keeps many boxes a thing.
- One picture at a time: its boxes do not depend on what else is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from moe_core.metrics.loading import load_model, load_part

THRESHOLD = 0.2
"""Least confidence of a box. Ours: UniDet's 0.5 is of another scale, and could not be calibrated against it here."""
OVERLAP = 0.5
"""IoU above which the less confident box of the same name goes; detectron2's default, which UniDet keeps"""
_QUERY = "a photo of a {}"

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels, from the upper left"""


@dataclass(frozen=True)
class Detection:
    """One thing found."""

    name: str
    score: float
    """confidence, 0 to 1"""
    box: Box


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where both are without area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    union = _area(a) + _area(b) - common
    return common / union if union > 0 else 0.0


def thin(detections: Sequence[Detection], overlap: float = OVERLAP) -> list[Detection]:
    """Non-maximum suppression by name: best first, each without an equally named better one that it overlaps by more than `overlap`."""
    kept: list[Detection] = []
    for found in sorted(detections, key=lambda d: -d.score):
        if not any(other.name == found.name and iou(other.box, found.box) > overlap for other in kept):
            kept.append(found)
    return kept


class OpenDetector:
    """OWLv2 with its processor."""

    def __init__(self, model: Any, processor: Any, device: torch.device, threshold: float = THRESHOLD) -> None:
        self._model, self._processor = model, processor
        self._device, self._threshold = device, threshold

    @classmethod
    def load(cls, folder: str, device: torch.device, threshold: float = THRESHOLD) -> OpenDetector:
        """From a folder or hub id of an OWLv2 in transformers' format with safetensors. Raises Unloadable, or DataError where weights are missing."""
        from transformers import Owlv2ForObjectDetection, Owlv2Processor

        model = load_model(Owlv2ForObjectDetection, folder, "OWLv2")
        return cls(model.to(device).eval(), load_part(Owlv2Processor, folder), device, threshold)

    @torch.inference_mode()
    def detect(self, image: Image.Image, names: Sequence[str]) -> list[Detection]:
        """What is found of `names` (distinct, at least one), best first, in the picture's pixels.

        Boxes are cut at the picture's edges; those that lie beyond them go.
        """
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names are {list(names)}; they must be distinct, and at least one")
        queries = [_QUERY.format(name) for name in names]
        # Names beyond the tokenizer's 16 tokens would be an error of the model; no benchmark has such.
        inputs = self._processor(text=[queries], images=image, return_tensors="pt").to(self._device)
        outputs = self._model(**inputs)
        # OWLv2 pads a picture to a square at its right and bottom, and says boxes as shares of that square.
        side = max(image.size)
        (found,) = self._processor.post_process_grounded_object_detection(
            outputs, threshold=self._threshold, target_sizes=[(side, side)]
        )
        detections = []
        for score, label, (x1, y1, x2, y2) in zip(
            found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True
        ):
            box = (
                _within(x1, image.width),
                _within(y1, image.height),
                _within(x2, image.width),
                _within(y2, image.height),
            )
            if _area(box) > 0:
                detections.append(Detection(names[label], score, box))
        return thin(detections)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _within(value: float, end: int) -> float:
    return min(max(value, 0.0), float(end))
