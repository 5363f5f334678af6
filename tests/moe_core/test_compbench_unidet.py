"""A small random OWLv2 and DPT on disk, loaded as the scorer loads them, against the boxes and depths worked out plainly."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import compbench_numeracy as numeracy
from moe_core.metrics import compbench_spatial as spatial
from moe_core.metrics import compbench_unidet, open_detector
from moe_core.metrics.open_detector import Detection, OpenDetector
from moe_core.metrics.scorer import Prompt, Sample
from tests.moe_core import faulty_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    folder = tmp_path_factory.mktemp("owl")
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=48
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 48, "bos_token_id": 52, "eos_token_id": 53}
    config = Owlv2Config(
        text_config={**small, **text}, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        # As they come, random heads say confidences of just 0 and 1, and boxes on the edges.
        for head in (model.box_head.dense2, model.class_head.logit_shift, model.class_head.logit_scale):
            head.weight *= 0.02
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["vit", "hybrid"])
def dpt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Like Intel/dpt-large, and like Intel/dpt-hybrid-midas, whose patches come from a ResNet."""
    from transformers import DPTConfig, DPTForDepthEstimation
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    folder = tmp_path_factory.mktemp("dpt")
    options: dict[str, Any] = {}
    if request.param == "hybrid":
        resnet = {
            "model_type": "bit",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 32],
            "depths": [1, 1, 1],
            "num_groups": 4,
            "global_padding": "same",
            "layer_type": "bottleneck",
            "embedding_dynamic_padding": True,
            "out_features": ["stage1", "stage2", "stage3"],
        }
        options = {
            "is_hybrid": True,
            "backbone_config": resnet,
            "patch_size": 16,
            "backbone_featmap_shape": [1, 32, 4, 4],
        }
        options |= {"neck_ignore_stages": [0, 1]}
    config = DPTConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 8, 8],
            "fusion_hidden_size": 8,
            **options,
        }
    )
    torch.manual_seed(1)
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def _plain_boxes(folder: str, image: Image.Image, names: list[str], threshold: float) -> list[Detection]:
    """All boxes above the threshold, by the model's outputs, without suppression."""
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    model, processor = Owlv2ForObjectDetection.from_pretrained(folder).eval(), Owlv2Processor.from_pretrained(folder)
    outputs = model(**processor(text=[[f"a photo of a {n}" for n in names]], images=image, return_tensors="pt"))
    side, found = max(image.size), []
    for logits, (x, y, w, h) in zip(outputs.logits[0], outputs.pred_boxes[0].tolist(), strict=True):
        score = 1 / (1 + math.exp(-float(logits.max())))
        if score <= threshold:
            continue
        ends = [(x - w / 2) * side, (y - h / 2) * side, (x + w / 2) * side, (y + h / 2) * side]
        limits = [image.width, image.height] * 2
        box = tuple(min(max(end, 0.0), limit) for end, limit in zip(ends, limits, strict=True))
        if box[0] < box[2] and box[1] < box[3]:
            found.append(Detection(names[int(logits.argmax())], score, box))
    return sorted(found, key=lambda d: -d.score)


def _plain_thinning(boxes: list[Detection]) -> list[Detection]:
    kept: list[Detection] = []
    for box in boxes:
        rivals = [other for other in kept if other.name == box.name]
        if all(open_detector.iou(box.box, other.box) <= 0.5 for other in rivals):
            kept.append(box)
    return kept


@pytest.mark.parametrize("size", [(40, 40), (60, 30)])
def test_boxes_are_those_of_the_model(owl: str, size: tuple[int, int]):
    names, image = ["cat", "dog", "lamp"], _picture(*size)
    everything = _plain_boxes(owl, image, names, 0.0)
    middle = len(everything) // 2
    threshold = (everything[middle].score + everything[middle - 1].score) / 2
    found = OpenDetector.load(owl, CPU, threshold).detect(image, names)
    expected = _plain_thinning([d for d in everything if d.score > threshold])
    assert found
    assert [d.name for d in found] == [d.name for d in expected]
    assert [d.score for d in found] == pytest.approx([d.score for d in expected], rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert one.box == pytest.approx(other.box, abs=1e-3)


def test_names_must_be_distinct(owl: str):
    detector = OpenDetector.load(owl, CPU)
    for names in ([], ["cat", "cat"]):
        with pytest.raises(ValueError, match="must be distinct"):
            detector.detect(_picture(32, 32), names)


def test_thinning_is_by_name_and_best_first():
    a, moved = (0, 0, 100, 100), (20, 0, 120, 100)  # common 8,000 of 12,000: IoU 2/3
    half = (0, 0, 50, 100)  # IoU just a half: stays
    found = [
        Detection("cat", 0.3, moved),
        Detection("dog", 0.4, moved),
        Detection("cat", 0.9, a),
        Detection("cat", 0.2, half),
    ]
    assert open_detector.thin(found) == [found[2], found[1], found[3]]


def test_iou_of_boxes_without_area_is_nothing():
    assert open_detector.iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0.0
    assert open_detector.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)


@torch.inference_mode()
def test_nearness_is_the_models_inverse_depth(dpt: str):
    from transformers import AutoImageProcessor, DPTForDepthEstimation

    image = _picture(80, 60, 3)
    nearness = compbench_unidet.DepthModel.load(dpt, CPU).nearness(image)
    inputs = AutoImageProcessor.from_pretrained(dpt)(images=image, return_tensors="pt")
    depth = DPTForDepthEstimation.from_pretrained(dpt).eval()(**inputs).predicted_depth[0]
    assert nearness.shape == (360, 480)  # 638 by 479 is too long; 480 * 479 / 638 = 360.4
    # Corners stay in place when corners are aligned.
    corners = (depth[[0, 0, -1, -1], [0, -1, 0, -1]] - depth.min()) / (depth.max() - depth.min())
    torch.testing.assert_close(nearness[[0, 0, -1, -1], [0, -1, 0, -1]], corners)
    assert 0 <= nearness.min() < nearness.max() <= 1


def test_rows_are_the_formulas_on_what_is_found(owl: str, dpt: str):
    scorer = compbench_unidet.load({"open_detector": owl, "depth": dpt}, CPU)
    image = _picture(50, 40, 5)
    prompts = [
        Prompt("spatial/1", "", "spatial", {"relation": ("boy", "near", "cat")}),
        Prompt("3d_spatial/1", "", "3d_spatial", {"relation": ("cat", "behind", "dog")}),
        Prompt("numeracy/1", "", "numeracy", {"counts": [("girl", 1), ("boy", 2), ("cup", 3)]}),
        Prompt("color/1", "", "color"),
    ]
    rows = scorer.score([Sample(prompt, 0, image) for prompt in prompts])

    detector = OpenDetector.load(owl, CPU)

    def found(*names: str) -> list[Detection]:
        return spatial.to_frame(detector.detect(image, list(names)), 50, 40)

    nearness = compbench_unidet.DepthModel.load(dpt, CPU).nearness(image)
    flat = spatial.score_2d("boy", "near", "cat", found("person", "cat"))
    deep = [
        spatial.score_3d("cat", "behind", "dog", found("cat", "dog"), nearness, swapped) for swapped in (False, True)
    ]
    count = numeracy.score([("girl", 1), ("boy", 2), ("cup", 3)], found("person", "cup"))
    assert found("cat", "dog")
    assert count > 0
    assert rows[:3] == [
        {"unidet": flat, "unidet_swapped": flat},
        {"unidet": deep[0], "unidet_swapped": deep[1]},
        {"unidet": count, "unidet_swapped": count},
    ]
    assert math.isnan(rows[3]["unidet"])
    assert rows[3].keys() == rows[0].keys()
    # A row does not depend on its neighbours.
    assert scorer.score([Sample(prompts[2], 0, image)]) == rows[2:3]


def test_models_without_all_their_weights_are_refused(owl: str, dpt: str, tmp_path: Path):
    place = faulty_weights.without(owl, tmp_path / "a", "class_head.dense0.weight")
    with pytest.raises(DataError, match=r"lacks 1 of OWLv2's weights, as class_head\.dense0\.weight;"):
        compbench_unidet.load({"open_detector": place, "depth": dpt}, CPU)
    missing = "neck.fusion_stage.layers.1.residual_layer1.convolution1.weight"
    place = faulty_weights.without(dpt, tmp_path / "b", missing)
    with pytest.raises(DataError, match=rf"lacks 1 of DPT's weights, as {missing};"):
        compbench_unidet.load({"open_detector": owl, "depth": place}, CPU)


def test_a_depth_model_as_intel_saves_it_is_whole(dpt: str, tmp_path: Path):
    """Intel's checkpoints lack a layer that is never called."""
    layer = "neck.fusion_stage.layers.0.residual_layer1"
    names = [f"{layer}.convolution{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    place = faulty_weights.without(dpt, tmp_path / "a", *names)
    image = _picture(50, 40, 5)
    nearness = compbench_unidet.DepthModel.load(place, CPU).nearness(image)
    assert torch.equal(nearness, compbench_unidet.DepthModel.load(dpt, CPU).nearness(image))
