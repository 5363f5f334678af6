"""The colour of an object, as GenEval tells it: CLIP chooses among ten names for the object's crop on grey.

- The crop is the box; what the object's mask does not cover is grey #999. CLIP's own preprocessing then takes the middle square.
- Three templates a colour, their text features averaged (CLIP_benchmark's zero-shot classifier).
- In full precision; the official script runs CLIP in half precision.

Source: djghosh13/geneval evaluation/evaluate_images.py (`ImageCrops`, `color_classification`); LAION-AI/CLIP_benchmark
clip_benchmark/metrics/zeroshot_classification.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from moe_core.errors import DataError
from moe_core.metrics.geneval_verdict import COLOURS, Box
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.scorer import Asset

ASSET = Asset(
    key="clip",
    what="CLIP ViT-L/14, openai/clip-vit-large-patch14",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
)
BACKGROUND = "#999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


def crop(image: Image.Image, mask: NDArray[np.bool_], box: Box) -> Image.Image:
    """The box of an RGB picture, grey where `mask` [height, width] is not set. Raises DataError where their sizes differ."""
    if mask.shape != (image.height, image.width):
        raise DataError(
            f"the mask is {list(mask.shape)} and the picture {image.height} x {image.width}; they must be of one size"
        )
    blank = Image.new("RGB", image.size, BACKGROUND)
    left, top, right, bottom = (round(edge) for edge in box)
    return Image.composite(image, blank, Image.fromarray(mask)).crop((left, top, right, bottom))


class ColourNamer:
    """CLIP with the colours' texts."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, device: torch.device) -> None:
        self._model, self._tokenizer = model.to(device).eval(), tokenizer
        self._image_processor, self._device = image_processor, device
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def load(cls, folder: str, device: torch.device) -> ColourNamer:
        """From a folder or hub id of a CLIP in transformers' format with safetensors. Raises Unloadable, or DataError where weights are missing."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        model = load_model(CLIPModel, folder, "CLIP")
        # Pillow resizes as open_clip's transform does.
        image_processor = load_part(AutoImageProcessor, folder, backend="pil")
        return cls(model, load_part(AutoTokenizer, folder), image_processor, device)

    @torch.inference_mode()
    def name(self, object_crop: Image.Image, name: str) -> str:
        """Which of COLOURS the object of this class has; of `crop`'s picture."""
        # A crop of three rows would be taken for one of three channels.
        pixels = self._image_processor(images=object_crop, input_data_format="channels_last", return_tensors="pt")
        seen = self._model.get_image_features(pixel_values=pixels["pixel_values"].to(self._device)).pooler_output
        return COLOURS[int((self._colours(name) @ F.normalize(seen[0], dim=-1)).argmax())]

    def _colours(self, name: str) -> Tensor:
        """Text features of the colours of a class, [10, width]."""
        if name not in self._texts:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._device)
            features = F.normalize(self._model.get_text_features(**tokens).pooler_output, dim=-1)
            self._texts[name] = F.normalize(features.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)
        return self._texts[name]
