"""ImageReward on a small random checkpoint in the official naming: against the official formula written out, layer by layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertTokenizer

from moe_core.errors import DataError
from moe_core.metrics import image_reward
from moe_core.metrics.image_reward import OFFICIAL_CONFIG, SPEC, ImageRewardScorer, RewardModel
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample

CPU = torch.device("cpu")
WORDS = ["a", "red", "blue", "cat", "dog", "on", "the", "left", "of", "and", "very", "old", "small", "ball"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
SIZE, PATCH, HEADS, LAYERS = 32, 8, 4, 2
VISION, TEXT = 24, 16
CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": VISION,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": len(VOCABULARY) + 2,
        "hidden_size": TEXT,
        "intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
    },
    "head_widths": [12, 10, 8, 6],
}


def _linear_shapes(prefix: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (out, into), f"{prefix}.bias": (out,)}


def _official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official classes' state dict, written down by hand from their source."""
    eye, text = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}.cls_token": (1, 1, VISION),
        f"{eye}.pos_embed": (1, (SIZE // PATCH) ** 2 + 1, VISION),
        f"{eye}.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        f"{eye}.patch_embed.proj.bias": (VISION,),
        f"{eye}.norm.weight": (VISION,),
        f"{eye}.norm.bias": (VISION,),
        f"{text}.embeddings.word_embeddings.weight": (len(VOCABULARY) + 2, TEXT),
        f"{text}.embeddings.position_embeddings.weight": (40, TEXT),
        f"{text}.embeddings.LayerNorm.weight": (TEXT,),
        f"{text}.embeddings.LayerNorm.bias": (TEXT,),
        **_linear_shapes("blip.vision_proj", 5, VISION),
        **_linear_shapes("blip.text_proj", 5, TEXT),
    }
    for i in range(LAYERS):
        block = f"{eye}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (VISION,), f"{block}.{norm}.bias": (VISION,)}
        shapes |= _linear_shapes(f"{block}.attn.qkv", 3 * VISION, VISION)
        shapes |= _linear_shapes(f"{block}.attn.proj", VISION, VISION)
        shapes |= _linear_shapes(f"{block}.mlp.fc1", 40, VISION)
        shapes |= _linear_shapes(f"{block}.mlp.fc2", VISION, 40)
        layer = f"{text}.encoder.layer.{i}"
        for part, seen in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= _linear_shapes(f"{layer}.{part}.self.query", TEXT, TEXT)
            shapes |= _linear_shapes(f"{layer}.{part}.self.key", TEXT, seen)
            shapes |= _linear_shapes(f"{layer}.{part}.self.value", TEXT, seen)
            shapes |= _linear_shapes(f"{layer}.{part}.output.dense", TEXT, TEXT)
            shapes |= {f"{layer}.{part}.output.LayerNorm.{kind}": (TEXT,) for kind in ("weight", "bias")}
        shapes |= _linear_shapes(f"{layer}.intermediate.dense", 32, TEXT)
        shapes |= _linear_shapes(f"{layer}.output.dense", TEXT, 32)
        shapes |= {f"{layer}.output.LayerNorm.{kind}": (TEXT,) for kind in ("weight", "bias")}
    for place, (into, out) in zip((0, 2, 4, 6, 7), ((TEXT, 12), (12, 10), (10, 8), (8, 6), (6, 1)), strict=True):
        shapes |= _linear_shapes(f"mlp.layers.{place}", out, into)
    return shapes


def _save(folder: Path) -> str:
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in _official_shapes().items()}
    for name in weights:
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
            weights[name] += 1
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("image_reward"))


@pytest.fixture(scope="module")
def scorer(folder: str) -> ImageRewardScorer:
    made = SPEC.load({"image_reward": folder}, CPU)
    assert isinstance(made, ImageRewardScorer)
    return made


def _picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


SAMPLES = [
    Sample(Prompt("a", "a red cat"), 0, _picture(0, 64, 64)),
    Sample(Prompt("b", "A Blue DOG on the left of the very old ball"), 0, _picture(1, 80, 40)),
    Sample(Prompt("c", "unheard of"), 0, _picture(2, 20, 40)),
    Sample(Prompt("d", "the small red dog and " * 12), 0, _picture(3, 32, 32)),
]


class _Plain:
    """The official classes, one picture and one prompt at a time, without padding."""

    def __init__(self, folder: str) -> None:
        self.weights = load_file(Path(folder) / "model.safetensors")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[-1] // HEADS
        heads = []
        for i in range(HEADS):
            own = slice(i * width, (i + 1) * width)
            heads.append((q[:, own] @ k[:, own].T / math.sqrt(width)).softmax(-1) @ v[:, own])
        return torch.cat(heads, -1)

    def see(self, image: Image.Image) -> Tensor:
        eye = "blip.visual_encoder"
        short = min(image.size)
        image = image.resize(tuple(SIZE * side // short for side in image.size), Image.Resampling.BICUBIC)
        left, top = ((side - SIZE) // 2 for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + SIZE, top + SIZE)))).float() / 255
        pixels = (pixels - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
            [0.26862954, 0.26130258, 0.27577711]
        )
        kernel = self.weights[f"{eye}.patch_embed.proj.weight"]
        patches = [
            (kernel * pixels[y : y + PATCH, x : x + PATCH].permute(2, 0, 1)).sum((1, 2, 3))
            for y in range(0, SIZE, PATCH)
            for x in range(0, SIZE, PATCH)
        ]
        states = torch.stack(patches) + self.weights[f"{eye}.patch_embed.proj.bias"]
        states = torch.cat([self.weights[f"{eye}.cls_token"][0], states]) + self.weights[f"{eye}.pos_embed"][0]
        for i in range(LAYERS):
            block = f"{eye}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", states, 1e-6))
            states = states + self.linear(f"{block}.attn.proj", self.attend(*qkv.chunk(3, -1)))
            inner = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", states, 1e-6)))
            states = states + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{eye}.norm", states, 1e-6)

    def read(self, text: str, seen: Tensor) -> Tensor:
        words = [word if word in WORDS else "[UNK]" for word in text.lower().split()][:33]
        tokens = [VOCABULARY.index(word) for word in ("[CLS]", *words, "[SEP]")]
        embeddings = "blip.text_encoder.embeddings"
        states = self.weights[f"{embeddings}.word_embeddings.weight"][tokens]
        states = states + self.weights[f"{embeddings}.position_embeddings.weight"][: len(tokens)]
        states = self.norm(f"{embeddings}.LayerNorm", states, 1e-12)
        for i in range(LAYERS):
            layer = f"blip.text_encoder.encoder.layer.{i}"
            for part in ("attention", "crossattention"):
                context = states if part == "attention" else seen
                name = f"{layer}.{part}.self"
                mixed = self.attend(
                    self.linear(f"{name}.query", states),
                    self.linear(f"{name}.key", context),
                    self.linear(f"{name}.value", context),
                )
                mixed = self.linear(f"{layer}.{part}.output.dense", mixed)
                states = self.norm(f"{layer}.{part}.output.LayerNorm", mixed + states, 1e-12)
            inner = self.linear(f"{layer}.output.dense", F.gelu(self.linear(f"{layer}.intermediate.dense", states)))
            states = self.norm(f"{layer}.output.LayerNorm", inner + states, 1e-12)
        return states

    def score(self, sample: Sample) -> float:
        state = self.read(sample.prompt.text, self.see(sample.image))[0]
        for place in (0, 2, 4, 6, 7):
            state = self.linear(f"mlp.layers.{place}", state)
        return (float(state) - 0.16717362830052426) / 1.0333394966054072


def test_equals_the_official_formula(folder: str, scorer: ImageRewardScorer):
    plain = _Plain(folder)
    expected = [plain.score(sample) for sample in SAMPLES]
    assert [row["image_reward"] for row in scorer.score(SAMPLES)] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert len({round(value, 1) for value in expected}) == len(expected)


def test_picture_and_prompt_both_count(scorer: ImageRewardScorer):
    picture, prompt = SAMPLES[0].image, SAMPLES[0].prompt
    other_text = Sample(Prompt("x", "a blue cat"), 0, picture)
    other_picture = Sample(prompt, 1, SAMPLES[3].image)
    rewards = [row["image_reward"] for row in scorer.score([SAMPLES[0], other_text, other_picture])]
    assert abs(rewards[0] - rewards[1]) > 0.01
    assert abs(rewards[0] - rewards[2]) > 0.01


def test_a_row_does_not_depend_on_its_batch(scorer: ImageRewardScorer, monkeypatch: pytest.MonkeyPatch):
    together = [row["image_reward"] for row in scorer.score(SAMPLES)]
    monkeypatch.setattr(image_reward, "BATCH", 3)
    assert [row["image_reward"] for row in scorer.score(SAMPLES)] == pytest.approx(together, rel=1e-4, abs=1e-3)
    assert scorer.score([]) == []


def test_half_precision_weights_are_scored_in_float32(folder: str, tmp_path: Path):
    _save(tmp_path)
    weights = {
        name: w.half() if w.is_floating_point() else w
        for name, w in load_file(Path(folder) / "model.safetensors").items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    scorer = SPEC.load({"image_reward": str(tmp_path)}, CPU)
    assert isinstance(scorer, ImageRewardScorer)
    assert {weight.dtype for weight in scorer._model.parameters()} == {torch.float32}


def test_loading_leaves_the_random_state_alone(folder: str):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    SPEC.load({"image_reward": folder}, CPU)
    assert torch.equal(torch.rand(1), expected)


def test_names_of_the_official_size_are_those_of_its_source():
    """On the meta device: 24 and 12 layers, no memory."""
    with torch.device("meta"):
        model = RewardModel(OFFICIAL_CONFIG)
    shapes = {image_reward.official_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["blip.text_encoder.embeddings.word_embeddings.weight"] == (30524, 768)
    assert shapes["mlp.layers.7.weight"] == (1, 16)
    assert model.text.config.num_attention_heads == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("drop", r"missing: blip\.visual_encoder\.blocks\.1\.attn\.proj\.bias$"),
        ("add", r"unexpected: blip\.text_decoder\.x$"),
        ("shape", r"mlp\.layers\.7\.weight has shape \[1, 7\]; the model of this size has \[1, 6\]"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, change: str, said: str):
    _save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        del weights["blip.visual_encoder.blocks.1.attn.proj.bias"]
    elif change == "add":
        weights["blip.text_decoder.x"] = torch.zeros(1)
    else:
        weights["mlp.layers.7.weight"] = torch.zeros(1, 7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=said):
        SPEC.load({"image_reward": str(tmp_path)}, CPU)


def test_a_pickle_is_refused(tmp_path: Path):
    _save(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="is no safetensors file"):
        SPEC.load({"image_reward": str(tmp_path)}, CPU)


def test_missing_files_are_named(tmp_path: Path):
    _save(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MissingAsset, match=r"has no config\.json; for the official checkpoint write this") as error:
        SPEC.load({"image_reward": str(tmp_path)}, CPU)
    assert json.loads(str(error.value).split("into it: ")[1]) == OFFICIAL_CONFIG
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingAsset, match=r"which has no model\.safetensors"):
        SPEC.load({"image_reward": str(tmp_path)}, CPU)
    with pytest.raises(MissingAsset, match=r"which has no model\.safetensors, tokenizer\.json"):
        SPEC.load({"image_reward": "THUDM/ImageReward"}, CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("head_widths"), r"has no head_widths; the official model's is \[1024, 128, 64, 16\]"),
        (lambda c: c["text_config"].pop("num_attention_heads"), r"has no text_config.num_attention_heads; .* is 12"),
        (lambda c: c["vision_config"].update(depth=2), "has vision_config.depth, which is unknown"),
        (
            lambda c: c["vision_config"].update(hidden_size="24"),
            "vision_config.hidden_size is '24'; it must be a positive int",
        ),
        (lambda c: c["text_config"].update(layer_norm_eps=0.0), "layer_norm_eps is 0.0; it must be a positive float"),
        (lambda c: c.update(head_widths=[1, 2]), r"head_widths is \[1, 2\]; it must be four"),
        (lambda c: c.update(text_config=[]), "text_config is no object"),
    ],
)
def test_wrong_configs_are_named(tmp_path: Path, change: Any, said: str):
    config = json.loads(json.dumps(CONFIG))
    change(config)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(DataError, match=said):
        image_reward.read_config(file)


def test_a_foreign_tokenizer_is_refused(tmp_path: Path):
    _save(tmp_path)
    vocabulary = [*VOCABULARY, "x", "y", "z"]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=f"has {len(vocabulary)} tokens, the model {len(VOCABULARY) + 2}"):
        SPEC.load({"image_reward": str(tmp_path)}, CPU)
