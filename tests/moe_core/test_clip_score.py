"""CLIP score on a small random CLIP: against torchmetrics, against a plain reference, and on prompts that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from moe_core.errors import DataError
from moe_core.metrics import clip_score
from moe_core.metrics.clip_score import SPEC, ClipScorer
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample

CONTEXT = 16
SIZE = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CPU = torch.device("cpu")


def _tokenizer() -> CLIPTokenizer:
    """A token a letter, and start and end last, as in OpenAI's vocabulary."""
    merges = [("a", "t</w>")]
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "at</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, model_max_length=CONTEXT
    )


def _save(folder: Path, eos_token_id: int = 2) -> str:
    """A real CLIP with weights large enough for its embeddings to differ; its end token is said as OpenAI's configs say it."""
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=8
    )
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def scorer(folder: str) -> ClipScorer:
    made = SPEC.load({"clip": folder}, CPU)
    assert isinstance(made, ClipScorer)
    return made


def _picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _samples(*texts: str, sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE), (70, 48), (20, 33))) -> list[Sample]:
    return [Sample(Prompt(str(i), text), 0, _picture(i, *sizes[i % len(sizes)])) for i, text in enumerate(texts)]


SHORT = ("a cat", "Fat Bat", "the dog sat", "rat", "at a hat", "zebra")
LONG = ("one very long prompt on cats", "and another that is long too")


def _cosine(folder: str, sample: Sample) -> float:
    """One picture, one prompt, nothing padded."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    ids = processor.tokenizer(sample.prompt.text)["input_ids"]
    ids = ids if len(ids) <= CONTEXT else [*ids[: CONTEXT - 1], ids[-1]]
    with torch.no_grad():
        text = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        pixels = processor.image_processor(sample.image, return_tensors="pt")["pixel_values"]
        picture = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output[0])
    return float(text @ picture / (text.norm() * picture.norm()))


class _AsTensors:
    """What torchmetrics 1.9 expects of a CLIP: features as tensors, as before transformers 5."""

    def __init__(self, model: CLIPModel) -> None:
        self._model, self.config = model, model.config

    def to(self, device: torch.device) -> _AsTensors:
        return self

    def get_image_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._model.get_image_features(*inputs).pooler_output

    def get_text_features(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._model.get_text_features(*inputs).pooler_output


def _by_torchmetrics(folder: str, sample: Sample) -> float:
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)
    with torch.no_grad():
        return float(torchmetrics_clip_score(pixels, sample.prompt.text, lambda: (_AsTensors(model), processor)))


def test_equals_torchmetrics(folder: str, scorer: ClipScorer):
    samples = _samples(*SHORT * 3)
    expected = [_by_torchmetrics(folder, sample) for sample in samples]
    assert [row["clip_score"] for row in scorer.score(samples)] == pytest.approx(expected, abs=2e-4)
    assert len({round(value, 2) for value in expected if value > 0}) >= 5


def test_equals_a_plain_reference_and_is_never_negative(folder: str, scorer: ClipScorer):
    samples = _samples(*SHORT, *LONG, *LONG)
    cosines = [_cosine(folder, sample) for sample in samples]
    assert min(cosines) < 0 < max(cosines)
    expected = [max(100 * cosine, 0) for cosine in cosines]
    assert [row["clip_score"] for row in scorer.score(samples)] == pytest.approx(expected, abs=2e-4)


def test_long_prompts_keep_their_end_token(folder: str, scorer: ClipScorer):
    """Why torchmetrics is not called: without an end token the model embeds the start, which is the same for all prompts."""
    picture = _picture(3)
    samples = [Sample(Prompt(text, text), 0, picture) for text in LONG]
    with pytest.warns(UserWarning, match="longer than"):
        theirs = [_by_torchmetrics(folder, sample) for sample in samples]
    assert theirs[0] == theirs[1]
    texts = scorer.embed_texts(LONG)
    assert (texts[0] - texts[1]).abs().max() > 0.01


def test_a_row_does_not_depend_on_its_batch(scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch):
    samples = _samples(*SHORT, *LONG)
    together = [row["clip_score"] for row in scorer.score(samples)]
    monkeypatch.setattr(clip_score, "BATCH", 3)
    assert [row["clip_score"] for row in scorer.score(samples)] == pytest.approx(together, abs=1e-4)
    assert [row["clip_score"] for s in samples for row in scorer.score([s])] == pytest.approx(together, abs=1e-4)
    assert scorer.score([]) == []


def test_missing_models_are_named(tmp_path: Path):
    with pytest.raises(MissingAsset, match=r"eval\.models\.clip"):
        SPEC.load({}, CPU)
    with pytest.raises(MissingAsset, match="openai/clip-vit-large-patch14"):
        SPEC.load({"clip": str(tmp_path)}, CPU)
    with pytest.raises(MissingAsset, match="not a/model id at all, which cannot be loaded"):
        SPEC.load({"clip": "not a/model id at all"}, CPU)


def test_a_model_without_all_its_weights_is_refused(folder: str, tmp_path: Path):
    _save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 of CLIP's weights, as visual_projection\.weight"):
        SPEC.load({"clip": str(tmp_path)}, CPU)


def test_a_model_that_looks_for_another_end_is_refused(tmp_path: Path):
    _save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="ends a text with token 54, its model looks for token 5;"):
        SPEC.load({"clip": str(tmp_path)}, CPU)


@pytest.mark.parametrize(
    ("eos_token_id", "end", "fits"), [(2, 9, True), (9, 9, True), (2, 2, False), (2, 8, False), (8, 9, False)]
)
def test_end_tokens(eos_token_id: int, end: int, fits: bool):
    class Tokenizer:
        eos_token_id = end

        def __len__(self) -> int:
            return 10

    config: Any = SimpleNamespace(eos_token_id=eos_token_id)
    if fits:
        clip_score.check_end_token(config, Tokenizer())
    else:
        with pytest.raises(DataError, match="must be of one model"):
            clip_score.check_end_token(config, Tokenizer())
