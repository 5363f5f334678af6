"""Mask2Former, CLIP and the scorer on small random models: against plain loops over the models' raw outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from moe_core.errors import DataError
from moe_core.metrics import geneval_detector
from moe_core.metrics.geneval_colours import ColourNamer, crop
from moe_core.metrics.geneval_detector import SPEC, GenEvalScorer, Mask2Former, box_of
from moe_core.metrics.geneval_verdict import COLOURS, Detection, verdict
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample
from moe_core.small_flux import clip_tokenizer
from tests.moe_core import faulty_weights
from tests.moe_core.tiny_clip import text_config

CPU = torch.device("cpu")
LABELS = ["person", "mouse", "tvmonitor", "dog"]
"""As two checkpoints spell them"""
NAMES = ("person", "computer mouse", "tv", "dog")


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real Mask2Former whose class logits are spread so that some are sure."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        # Without labels at random starts every query says much the same; this makes them differ.
        model.class_predictor.weight.mul_(40)
        for parameter in model.model.transformer_module.queries_features.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    # What the folder says of sizes is overruled.
    Mask2FormerImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(1)
    texts = [f"a photo of a {c} {n}" for c in COLOURS for n in NAMES] + [
        f"a photo of a {c}-colored object" for c in COLOURS
    ]
    tokenizer = clip_tokenizer(texts, 32)
    config = CLIPConfig(
        text_config=text_config(tokenizer, 32, 32).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
        ).to_dict(),
        projection_dim=16,
        initializer_factor=10.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geneval_detector, "SHORTER_SIDE", 72)
    monkeypatch.setattr(geneval_detector, "LONGER_SIDE", 120)


def _picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def _plain(folder: str, image: Image.Image, side: tuple[int, int], threshold: float) -> list[tuple[str, float, Any]]:
    """Every pair of query and class on its own, with its full mask; `side` is the resized picture's (width, height)."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    values = np.asarray(image.resize(side, Image.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy((values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(2, 0, 1)
    wide, high = (32 * -(-edge // 32) for edge in side)
    padded = torch.zeros(3, high, wide)
    padded[:, : side[1], : side[0]] = pixels
    with torch.no_grad():
        outputs = model(pixel_values=padded[None])
    found = []
    for query, logits in enumerate(outputs.masks_queries_logits[0]):
        large = F.interpolate(logits[None, None], (high, wide), mode="bilinear", align_corners=False)
        large = large[:, :, : side[1], : side[0]]
        mask_logits = F.interpolate(large, (image.height, image.width), mode="bilinear", align_corners=False)[0, 0]
        inside = mask_logits[mask_logits > 0]
        for number, share in enumerate(outputs.class_queries_logits[0, query].softmax(0)[:-1]):
            score = float(share * inside.sigmoid().mean()) if len(inside) else 0.0
            if score > threshold:
                found.append((NAMES[number], score, (mask_logits > 0).numpy()))
    return sorted(found, key=lambda instance: -instance[1])


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ((48, 40), (86, 72)),
        # The longer side is what limits: 90 x 30 -> 120 x 40.
        ((90, 30), (120, 40)),
    ],
)
def test_instances_are_those_of_the_raw_outputs(mask2former: str, size: tuple[int, int], side: tuple[int, int]):
    detector = Mask2Former.load(mask2former, CPU)
    assert detector.names == NAMES
    image = _picture(3, *size)
    expected = _plain(mask2former, image, side, 0.05)
    found = detector.detect(image, 0.05)
    assert len(expected) >= 3
    assert [instance.name for instance in found] == [name for name, _, _ in expected]
    assert [instance.score for instance in found] == pytest.approx([score for _, score, _ in expected], rel=1e-3)
    for instance, (_, _, mask) in zip(found, expected, strict=True):
        # A pixel at zero may fall either way.
        assert (instance.mask != mask).mean() < 0.01
        rows, columns = np.nonzero(instance.mask)
        assert instance.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_threshold_cuts(mask2former: str):
    detector = Mask2Former.load(mask2former, CPU)
    scores = [instance.score for instance in detector.detect(_picture(3), 0.0)]
    middle = scores[len(scores) // 2]
    assert [i.score for i in detector.detect(_picture(3), middle)] == [s for s in scores if s > middle]
    assert detector.detect(_picture(3), 0.9999) == []


def test_boxes():
    mask = np.zeros((6, 9), bool)
    assert box_of(mask) == (0, 0, 0, 0)
    mask[2, 3] = True
    assert box_of(mask) == (3, 2, 4, 3)
    mask[4, 7] = True
    assert box_of(mask) == (3, 2, 8, 5)


def test_crop_is_the_object_on_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    mask = np.zeros((6, 9), bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    cut = np.asarray(crop(Image.fromarray(pixels), mask, (1, 1, 6, 5)))
    expected = np.full((4, 5, 3), 0x99, np.uint8)
    for row in range(4):
        for column in range(5):
            if mask[row + 1, column + 1]:
                expected[row, column] = pixels[row + 1, column + 1]
    assert np.array_equal(cut, expected)
    with pytest.raises(DataError, match=r"mask is \[9, 6\] and the picture 6 x 9"):
        crop(Image.fromarray(pixels), mask.T, (0, 0, 1, 1))


def test_colour_is_the_nearest_text(clip: str):
    """Against one text and one picture at a time. A crop of three rows is a picture, not channels."""
    namer = ColourNamer.load(clip, CPU)
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = namer._tokenizer, CLIPImageProcessorPil.from_pretrained(clip)
    told = []
    for seed, (width, height) in enumerate([(40, 40), (70, 3), (3, 50), (33, 64), (16, 24), (64, 16)]):
        # One hue each, with some grain, so that CLIP's features differ.
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 200, 3) + rng.integers(0, 56, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        square = processor(
            images=image.resize(_covering(width, height), Image.Resampling.BICUBIC),
            do_resize=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(square["pixel_values"]).pooler_output)[0]
            scores = []
            for colour in COLOURS:
                texts = [
                    f"a photo of a {colour} tv",
                    f"a photo of a {colour}-colored tv",
                    f"a photo of a {colour} object",
                ]
                features = [
                    model.text_projection(model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output)[0]
                    for text in texts
                ]
                mean = sum(feature / feature.norm() for feature in features) / 3
                scores.append(float(mean @ seen / mean.norm()))
        told.append(namer.name(image, "tv"))
        assert told[-1] == COLOURS[int(np.argmax(scores))]
    assert len(set(told)) > 1


def _covering(width: int, height: int) -> tuple[int, int]:
    """The size whose shorter side is 32."""
    return (32 * width // height, 32) if width > height else (32, 32 * height // width)


def _sample(record: dict[str, Any], seed: int, index: int = 0) -> Sample:
    return Sample(Prompt(f"{seed:05d}", "x", record["tag"], record), index, _picture(seed))


def test_rows(mask2former: str, clip: str):
    scorer = SPEC.load({"mask2former": mask2former, "clip": clip}, CPU)
    assert isinstance(scorer, GenEvalScorer)
    detector, namer = Mask2Former.load(mask2former, CPU), ColourNamer.load(clip, CPU)
    best = detector.detect(_picture(3))[0]
    colour = namer.name(crop(_picture(3), best.mask, best.box), best.name)
    other = next(c for c in COLOURS if c != colour)
    records = [
        {"tag": "colors", "include": [{"class": best.name, "count": 1, "color": colour}]},
        {"tag": "colors", "include": [{"class": best.name, "count": 1, "color": other}]},
        {"tag": "counting", "include": [{"class": best.name, "count": 1}], "exclude": [{"class": best.name, "count": 2}]},
        {"tag": "single_object", "include": [{"class": "person", "count": 9}]},
    ]  # fmt: skip
    samples = [_sample(record, seed) for record in records for seed in (3, 4)]
    rows = scorer.score(samples)
    assert rows[0]["correct"] is True
    assert rows[2]["correct"] is False
    assert f"0 of 1 {other}, the colours are {colour}" in rows[2]["reason"]
    for sample, row in zip(samples, rows, strict=True):
        assert set(row) == {"correct", "reason", "detections"}
        told = json.loads(row["detections"])
        found = [Detection(d["name"], tuple(d["box"]), d["score"], d.get("colour")) for d in told]
        assert verdict(sample.prompt.record, found).reason == row["reason"]
        # Each alone gives the same row.
        assert scorer.score([sample]) == [row]
    # Colours are told where they were asked for, and only there.
    assert json.loads(rows[0]["detections"])[0]["colour"] == colour
    assert not any("colour" in d for d in json.loads(rows[4]["detections"]))


def test_faults_are_named(mask2former: str, clip: str, tmp_path: Path):
    scorer = SPEC.load({"mask2former": mask2former, "clip": clip}, CPU)
    with pytest.raises(
        DataError, match="prompt 00003 asks for a 'zebra', which the detector does not know; its 4 classes are"
    ):
        scorer.score([_sample({"tag": "single_object", "include": [{"class": "zebra", "count": 1}]}, 3)])
    with pytest.raises(DataError, match="a 'cow', which"):
        included, excluded = {"class": "dog", "count": 1}, {"class": "cow", "count": 1}
        scorer.score([_sample({"tag": "single_object", "include": [included], "exclude": [excluded]}, 3)])
    with pytest.raises(DataError, match="include is None"):
        scorer.score([_sample({"tag": "single_object"}, 3)])
    with pytest.raises(MissingAsset, match=r"mask2former is .*, which has no config\.json, model\.safetensors"):
        SPEC.load({"mask2former": str(tmp_path), "clip": clip}, CPU)
    with pytest.raises(MissingAsset, match="geneval needs CLIP ViT-L/14"):
        SPEC.load({"mask2former": mask2former}, CPU)


def test_models_without_all_their_weights_are_refused(mask2former: str, clip: str, tmp_path: Path):
    place = faulty_weights.without(mask2former, tmp_path / "a", "class_predictor.weight")
    with pytest.raises(DataError, match=r"lacks 1 of Mask2Former's weights, as class_predictor\.weight;"):
        SPEC.load({"mask2former": place, "clip": clip}, CPU)
    place = faulty_weights.without(clip, tmp_path / "b", "text_projection.weight")
    with pytest.raises(DataError, match=r"lacks 1 of CLIP's weights, as text_projection\.weight;"):
        SPEC.load({"mask2former": mask2former, "clip": place}, CPU)


def test_a_detector_without_its_loss_is_whole(mask2former: str, tmp_path: Path):
    Mask2Former.load(faulty_weights.without(mask2former, tmp_path / "a", "criterion.empty_weight"), CPU)
