"""MPS on a small random checkpoint in the official naming: against the official formula, one picture at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from moe_core.errors import DataError
from moe_core.metrics import mps
from moe_core.metrics.mps import CONDITION, SPEC, CrossSizes, MpsModel, MpsScorer, kept_tokens, official_name
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz,."
SIZE, PATCH, WIDTH, LAYERS, HEADS, HEAD = 16, 8, 12, 2, 3, 4
INNER = 20


def _tokenizer() -> CLIPTokenizer:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "at</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[("a", "t</w>")], model_max_length=77
    )


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)


def _cross_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official Cross_model's state dict, written down by hand from its source."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(LAYERS):
        across, within = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        shapes |= {
            f"{across}.norm.weight": (WIDTH,),
            f"{across}.norm.bias": (WIDTH,),
            f"{across}.to_q.weight": (HEADS * HEAD, WIDTH),
            f"{across}.to_kv.weight": (2 * HEAD, WIDTH),
            f"{across}.to_out.weight": (WIDTH, HEADS * HEAD),
            f"{across}.ff.0.weight": (2 * INNER, WIDTH),
            f"{across}.ff.2.weight": (WIDTH, INNER),
            f"{within}.norm.weight": (WIDTH,),
            f"{within}.norm.bias": (WIDTH,),
            f"{within}.rotary_emb.inv_freq": (HEAD // 2,),
            f"{within}.fused_attn_ff_proj.weight": (HEADS * HEAD + 2 * HEAD + 2 * INNER, WIDTH),
            f"{within}.attn_out.weight": (WIDTH, HEADS * HEAD),
            f"{within}.ff_out.1.weight": (WIDTH, INNER),
        }
    return shapes


def _save(folder: Path) -> str:
    """In half precision, as the official file must be: its scripts give it halves."""
    generator = torch.Generator().manual_seed(1)
    tokenizer = _tokenizer()
    config = _clip_config(tokenizer)
    clip = CLIPModel(config).state_dict()
    weights = {f"model.{name}": 0.3 * torch.randn(w.shape, generator=generator) for name, w in clip.items()}
    weights["model.logit_scale"] = torch.tensor(4.0)
    weights |= {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in _cross_shapes().items()}
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
        if name.endswith("inv_freq"):
            weights[name] = 1.0 / 10000 ** (torch.arange(0, HEAD, 2).float() / HEAD)
        if "cross_model" in name and name.endswith("norm.bias"):
            weights[name] = torch.zeros(WIDTH)
    weights = {name: weight.half() for name, weight in weights.items()}
    weights["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, folder / "model.safetensors")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("mps"))


@pytest.fixture(scope="module")
def scorer(folder: str) -> MpsScorer:
    made = SPEC.load({"mps": folder}, CPU)
    assert isinstance(made, MpsScorer)
    return made


def _picture(seed: int, width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


TEXTS = ("a cat", "Fat bat.", "a very long prompt, " * 9, "z")
SAMPLES = [Sample(Prompt(str(i), text), 0, _picture(i, 16 + 8 * i, 16 + 4 * i)) for i, text in enumerate(TEXTS)]


class _Plain:
    """`infer_one_sample` of the official scripts, with an attention head at a time and an additive mask."""

    def __init__(self, folder: str) -> None:
        self.weights = {name: w.float() for name, w in load_file(Path(folder) / "model.safetensors").items()}
        self.clip = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
        own = {name.removeprefix("model."): w for name, w in self.weights.items() if name.startswith("model.")}
        self.clip.load_state_dict({name: w for name, w in own.items() if not name.endswith("position_ids")})
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder)

    def text(self, text: str) -> tuple[Tensor, Tensor]:
        ids = self.tokenizer(text, max_length=77, padding="max_length", truncation=True)["input_ids"]
        states = self.clip.text_projection(self.clip.text_model(input_ids=torch.tensor([ids])).last_hidden_state[0])
        return states, states[ids.index(self.tokenizer.eos_token_id)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weights[f"{name}.weight"])

    @staticmethod
    def gated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        gate = x[..., half:]
        return gate * gate.sigmoid() * x[..., :half]

    @staticmethod
    def turned(x: Tensor, frequencies: Tensor) -> Tensor:
        turned = torch.zeros_like(x)
        for position in range(len(x)):
            for i in range(HEAD // 2):
                angle = position * frequencies[i]
                first, second = x[position, i], x[position, i + HEAD // 2]
                turned[position, i] = first * angle.cos() - second * angle.sin()
                turned[position, i + HEAD // 2] = second * angle.cos() + first * angle.sin()
        return turned

    def cross(self, patches: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        for i in range(LAYERS):
            name = f"cross_model.layers.{i}.0.fn"
            x = self.norm(f"{name}.norm", patches)
            queries = self.linear(f"{name}.to_q", x)
            keys, values = self.linear(f"{name}.to_kv", tokens).split(HEAD, -1)
            heads = [(q / HEAD**0.5 @ keys.T + mask).softmax(-1) @ values for q in queries.split(HEAD, -1)]
            fed = self.linear(f"{name}.ff.2", self.gated(self.linear(f"{name}.ff.0", x)))
            patches = self.linear(f"{name}.to_out", torch.cat(heads, -1)) + fed + patches
            name = f"cross_model.layers.{i}.1.fn"
            x = self.linear(f"{name}.fused_attn_ff_proj", self.norm(f"{name}.norm", patches))
            queries, keys, values, inner = x.split((HEADS * HEAD, HEAD, HEAD, 2 * INNER), -1)
            frequencies = self.weights[f"{name}.rotary_emb.inv_freq"]
            keys = self.turned(keys, frequencies)
            heads = [
                (self.turned(q, frequencies) / HEAD**0.5 @ keys.T).softmax(-1) @ values for q in queries.split(HEAD, -1)
            ]
            patches = (
                self.linear(f"{name}.attn_out", torch.cat(heads, -1))
                + self.linear(f"{name}.ff_out.1", self.gated(inner))
                + patches
            )
        return patches

    @torch.no_grad()
    def score(self, sample: Sample) -> tuple[float, int]:
        """The score, and how many of the 77 tokens count."""
        tokens, prompt = self.text(sample.prompt.text)
        words, _ = self.text(CONDITION)
        nearness = (words @ tokens.T).max(0).values
        mask = torch.where(nearness / nearness.max() > 0.3, 0.0, float("-inf"))
        pixels = self.processor(sample.image, return_tensors="pt")["pixel_values"]
        patches = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state[0])
        looked = self.cross(patches, tokens, mask)[0]
        score = float(self.clip.logit_scale.exp() * (prompt / prompt.norm()) @ (looked / looked.norm()))
        return score, int((mask == 0).sum())


def test_equals_the_official_formula(folder: str, scorer: MpsScorer):
    plain = _Plain(folder)
    expected, counted = zip(*(plain.score(sample) for sample in SAMPLES), strict=True)
    assert [row["mps"] for row in scorer.score(SAMPLES)] == pytest.approx(list(expected), abs=1e-3)
    assert len({round(value, 1) for value in expected}) == len(expected)
    # The mask does something, and not the same for all.
    assert min(counted) < 77
    assert len(set(counted)) > 1


def test_tokens_count_by_their_share_of_the_prompts_own_largest():
    tokens = torch.tensor([[[10.0, 0], [3.1, 0], [2.9, 0], [0, 5]], [[1.0, 0], [0.29, 0], [0, 0.31], [-9, -9]]])
    words = torch.tensor([[[1.0, 0], [0, 1.0]]])
    assert kept_tokens(tokens, words).tolist() == [[True, True, False, True], [True, False, True, False]]


def test_a_row_does_not_depend_on_its_batch(scorer: MpsScorer, monkeypatch: pytest.MonkeyPatch):
    together = [row["mps"] for row in scorer.score(SAMPLES)]
    monkeypatch.setattr(mps, "BATCH", 1)
    assert [row["mps"] for row in scorer.score(SAMPLES)] == pytest.approx(together, abs=1e-4)
    assert scorer.score([]) == []


def test_the_softmax_of_two_pictures_follows_from_their_scores(folder: str, scorer: MpsScorer):
    """The official scripts' probabilities are those of the raw scores."""
    plain = _Plain(folder)
    pair = [Sample(SAMPLES[0].prompt, i, _picture(20 + i)) for i in range(2)]
    theirs = torch.tensor([plain.score(sample)[0] for sample in pair]).softmax(0)
    ours = torch.tensor([row["mps"] for row in scorer.score(pair)]).softmax(0)
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_sizes_are_read_from_the_weights(folder: str):
    assert mps.read_sizes(Path(folder) / "model.safetensors") == CrossSizes(WIDTH, LAYERS, HEADS, HEAD, INNER)


def test_names_of_the_official_size_are_those_of_its_source():
    """On the meta device: one layer of each tower, four of the official cross layers."""
    with torch.device("meta"):
        model = MpsModel(_clip_config(_tokenizer()), CrossSizes(1024, 4, 16, 64, 4096))
    shapes = {official_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["cross_model.layers.3.0.fn.to_kv.weight"] == (128, 1024)
    assert shapes["cross_model.layers.3.1.fn.fused_attn_ff_proj.weight"] == (1024 + 64 + 64 + 8192, 1024)
    assert shapes["cross_model.layers.0.1.fn.rotary_emb.inv_freq"] == (32,)
    assert "model.vision_model.pre_layrnorm.weight" in shapes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("drop", r"missing: cross_model\.layers\.1\.1\.fn\.attn_out\.weight$"),
        ("add", r"unexpected: model\.extra$"),
        ("cross", r"lacks cross_model\.layers\.0\.0\.fn\.to_q, to_kv or ff\.2"),
        ("clip", r"unexpected: clip\.text_model"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, change: str, said: str):
    _save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "drop":
        del weights["cross_model.layers.1.1.fn.attn_out.weight"]
    elif change == "add":
        weights["model.extra"] = torch.zeros(1)
    elif change == "cross":
        weights = {name: w for name, w in weights.items() if not name.startswith("cross_model")}
    else:
        weights = {name.replace("model.text_model", "clip.text_model"): w for name, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=said):
        SPEC.load({"mps": str(tmp_path)}, CPU)


def test_a_config_of_another_width_is_refused(tmp_path: Path):
    _save(tmp_path)
    config = _clip_config(_tokenizer())
    config.projection_dim = 16
    config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"cross layers of width 12, .* a projection_dim of 16"):
        SPEC.load({"mps": str(tmp_path)}, CPU)


def test_missing_files_are_named(tmp_path: Path):
    _save(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(MissingAsset, match=r"which has no preprocessor_config\.json; it must hold MPS"):
        SPEC.load({"mps": str(tmp_path)}, CPU)
    with pytest.raises(MissingAsset, match=r"which has no config\.json, model\.safetensors"):
        SPEC.load({"mps": "Kwai-Kolors/MPS"}, CPU)
