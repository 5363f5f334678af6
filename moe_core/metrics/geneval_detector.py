"""GenEval's scorer: Mask2Former finds the objects, CLIP names their colours, GenEval's rules judge.

- transformers' Mask2Former with Meta's weights, where GenEval has mmdet's of the same architecture and training set.
- The picture is resized as both test it: shorter side 800, longer at most 1333, padded to multiples of 32. The model's own
  preprocessor file may say otherwise and is overruled.
- A detection's confidence is P(class) times its mask's mean probability; the best 100 pairs of query and class are looked at. The same
  query may stand for two classes, and nothing is suppressed.
- One picture at a time: its row does not depend on what else is scored.

Source: djghosh13/geneval evaluation/evaluate_images.py; mmdet MaskFormerFusionHead `instance_postprocess`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import geneval_colours
from moe_core.metrics.geneval_verdict import THRESHOLD, Box, Detection, check_record, verdict
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.scorer import Asset, Measure, Row, Sample, ScorerSpec

if TYPE_CHECKING:
    from moe_core.metrics.geneval_colours import ColourNamer

SPEC = ScorerSpec(
    name="geneval",
    load_from="moe_core.metrics.geneval_detector:load",
    measures=(Measure("geneval", "correct", over_kinds=True, by_kind=True, binary=True),),
    assets=(
        Asset(
            key="mask2former",
            what="Mask2Former Swin-S of COCO instances, facebook/mask2former-swin-small-coco-instance",
            files=("config.json", "model.safetensors", "preprocessor_config.json"),
        ),
        geneval_colours.ASSET,
    ),
)
SHORTER_SIDE, LONGER_SIDE = 800, 1333
"""Pixels that a picture is resized to"""
PADDED_TO = 32
MOST_INSTANCES = 100
GENEVAL_NAMES = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
}
"""COCO's names, and those of the YOLO list that some checkpoints have, where GenEval spells them otherwise"""
_UNUSED = re.compile(r"criterion\..*")
"""Of the loss"""


@dataclass(frozen=True)
class Instance:
    """One object found."""

    name: str
    score: float
    box: Box
    mask: NDArray[np.bool_]
    """[height, width] of the picture"""


class Mask2Former:
    """The detector."""

    def __init__(self, model: Any, image_processor: Any, device: torch.device) -> None:
        self._model, self._image_processor, self._device = model.to(device).eval(), image_processor, device
        labels: Mapping[int, str] = model.config.id2label
        self.names = tuple(GENEVAL_NAMES.get(labels[i], labels[i]) for i in range(len(labels)))
        """Classes in GenEval's spelling, by number"""

    @classmethod
    def load(cls, folder: str, device: torch.device) -> Mask2Former:
        """From a folder or hub id of a Mask2Former in transformers' format with safetensors.

        Raises Unloadable, or DataError where weights are missing.
        """
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        model = load_model(Mask2FormerForUniversalSegmentation, folder, "Mask2Former", unused=_UNUSED)
        return cls(model, load_part(AutoImageProcessor, folder, backend="pil"), device)

    @torch.inference_mode()
    def detect(self, image: Image.Image, threshold: float = THRESHOLD) -> list[Instance]:
        """What is found in an RGB picture with a confidence above `threshold`, the surest first."""
        pixels = self._image_processor(
            images=image,
            size={"shortest_edge": SHORTER_SIDE, "longest_edge": LONGER_SIDE},
            size_divisor=0,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"].to(self._device)
        height, width = pixels.shape[-2:]
        padded = F.pad(pixels, (0, -width % PADDED_TO, 0, -height % PADDED_TO))
        outputs = self._model(pixel_values=padded)
        likely = outputs.class_queries_logits[0].softmax(-1)[:, :-1]
        best = likely.flatten().topk(min(MOST_INSTANCES, likely.numel()))
        # The confidence is no more than P(class), so that what is below the threshold by that alone needs no mask.
        chosen = best.indices[best.values > threshold]
        if not len(chosen):
            return []
        queries, classes = chosen // likely.shape[1], (chosen % likely.shape[1]).tolist()
        logits = outputs.masks_queries_logits[0, queries]
        logits = F.interpolate(logits[None], padded.shape[-2:], mode="bilinear", align_corners=False)
        logits = F.interpolate(
            logits[..., :height, :width], (image.height, image.width), mode="bilinear", align_corners=False
        )[0]
        masks = logits > 0
        certain = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
        scores = (likely.flatten()[chosen] * certain).tolist()
        found = [
            Instance(self.names[number], score, box_of(mask), mask)
            for number, score, mask in zip(classes, scores, masks.cpu().numpy(), strict=True)
            if score > threshold
        ]
        return sorted(found, key=lambda instance: -instance.score)


class GenEvalScorer:
    """Judges pictures of GenEval's prompts."""

    def __init__(self, detector: Mask2Former, colours: ColourNamer) -> None:
        self._detector, self._colours = detector, colours

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`correct` (bool), `reason` (a few words), `detections` (JSON: name, score, box, and the colour where it was asked for).

        Raises DataError for a prompt of a class that the detector does not know, or whose record is none of GenEval's.
        """
        return [self._row(sample) for sample in samples]

    def _row(self, sample: Sample) -> Row:
        record = sample.prompt.record
        check_record(record)
        for item in (*record["include"], *record.get("exclude", ())):
            if item["class"] not in self._detector.names:
                raise DataError(
                    f"prompt {sample.prompt.id} asks for a '{item['class']}', which the detector does not know; its"
                    f" {len(self._detector.names)} classes are {', '.join(self._detector.names)}"
                )
        found = self._detector.detect(sample.image)
        looked_up = [_LazyColour(self._colours, sample.image, instance) for instance in found]
        judged = verdict(
            record,
            [
                Detection(instance.name, instance.box, instance.score, colour)
                for instance, colour in zip(found, looked_up, strict=True)
            ],
        )
        told = [
            {"name": instance.name, "score": round(instance.score, 4), "box": instance.box}
            | ({} if colour.told is None else {"colour": colour.told})
            for instance, colour in zip(found, looked_up, strict=True)
        ]
        return {"correct": judged.correct, "reason": judged.reason, "detections": json.dumps(told)}


def box_of(mask: NDArray[np.bool_]) -> Box:
    """The smallest box around a mask's pixels [height, width]; all zeros for an empty one."""
    if not mask.any():
        return (0.0, 0.0, 0.0, 0.0)
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def load(assets: Mapping[str, str], device: torch.device) -> GenEvalScorer:
    """From `mask2former` and `clip`."""
    detector = Mask2Former.load(assets["mask2former"], device)
    return GenEvalScorer(detector, geneval_colours.ColourNamer.load(assets["clip"], device))


class _LazyColour:
    """An object's colour, looked up when it is first asked for."""

    def __init__(self, colours: ColourNamer, image: Image.Image, instance: Instance) -> None:
        self._colours, self._image, self._instance = colours, image, instance
        self.told: str | None = None

    def __call__(self) -> str:
        if self.told is None:
            cut = geneval_colours.crop(self._image, self._instance.mask, self._instance.box)
            self.told = self._colours.name(cut, self._instance.name)
        return self.told
