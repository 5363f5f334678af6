"""MPS, the Multi-dimensional Preference Score: CLIP whose picture is looked at with the prompt's words in mind.

- CLIP ViT-H of transformers. On top four layers in which the picture's patches attend to the prompt's tokens, and to each other; these are
  written here, for no library has them (they follow lucidrains' CoCa: PaLM's parallel blocks with one key and value for all heads).
- A fixed text names what is judged; a token of the prompt counts only if it is near enough to a word of that text. Only the overall
  condition: the authors released no other weights.
- The score of one picture is exp(logit scale) x cosine of its first patch token and the prompt, as `infer_one_sample` of the official
  scripts. They take a softmax of it over a prompt's pictures, which says who wins; a single picture has only the raw score.
- The prompt's nearness is divided by its own largest value, one prompt at a time as in the official scripts: a batch mixes nothing.
- float32, where the official model runs in half precision.

Source: Zhang et al. 2024; Kwai-Kolors/MPS, eval_overall_mps_on_hpdv2.py, trainer/models/{clip_model,cross_modeling}.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core.errors import DataError
from moe_core.metrics.clip_score import check_end_token
from moe_core.metrics.official_weights import load_weights, read_shapes
from moe_core.metrics.scorer import Asset, Measure, Row, Sample, ScorerSpec, check_assets

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity,"
    " attributes, position, number, location, word, things."
)
"""The official scripts' condition for the overall score, to the letter."""
THRESHOLD = 0.3
"""A token counts if its nearness is above this share of the largest. The official scripts' value; the model's own `forward`, which they do
not call, has 0.01."""
BATCH = 8
"""Pictures at once."""

SPEC = ScorerSpec(
    name="mps",
    load_from="moe_core.metrics.mps:load",
    measures=(Measure("mps", "mps", by_kind=True),),
    assets=(
        Asset(
            "mps",
            "MPS (MPS_overall_checkpoint.pth of github.com/Kwai-Kolors/MPS) as model.safetensors, beside config.json,"
            " preprocessor_config.json and the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K; docs/metrics.md says how",
            files=("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"),
        ),
    ),
)

_UNUSED = re.compile(r"model\.(text|vision)_model\.embeddings\.position_ids")
"""Tables of 0, 1, 2... that older versions of transformers saved."""
_ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class CrossSizes:
    """Of the layers on top of CLIP; the official ones are 1024, 4, 16, 64, 4096."""

    width: int
    layers: int
    heads: int
    head_width: int
    inner_width: int
    """of the feed-forward part"""


class Gated(nn.Module):
    """SwiGLU: [..., 2 d] -> [..., d]; the second half is the gate."""

    def forward(self, states: Tensor) -> Tensor:
        values, gate = states.chunk(2, dim=-1)
        return F.silu(gate) * values


class Rotary(nn.Module):
    """Rotary position embedding in halves (Su et al. 2021), whose frequencies lie in the checkpoint."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        powers = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.register_buffer("inv_freq", _ROTARY_BASE**-powers)

    def forward(self, states: Tensor) -> Tensor:
        """Turns [b, heads, n, d] by their positions 0 to n - 1."""
        positions = torch.arange(states.shape[-2], device=states.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq).repeat(1, 2)
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class CrossAttention(nn.Module):
    """Patches attend to the prompt's tokens, beside a feed-forward part of the same input."""

    def __init__(self, sizes: CrossSizes) -> None:
        super().__init__()
        self._heads = sizes.heads
        inner = sizes.heads * sizes.head_width
        self.norm = nn.LayerNorm(sizes.width)
        self.to_q = nn.Linear(sizes.width, inner, bias=False)
        self.to_kv = nn.Linear(sizes.width, 2 * sizes.head_width, bias=False)
        self.to_out = nn.Linear(inner, sizes.width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(sizes.width, 2 * sizes.inner_width, bias=False),
            Gated(),
            nn.Linear(sizes.inner_width, sizes.width, bias=False),
        )

    def forward(self, patches: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        """Of patches [b, n, width] and tokens [b, t, width]; only those that are `kept` [b, t] are seen."""
        patches = self.norm(patches)
        keys, values = self.to_kv(tokens).chunk(2, dim=-1)
        seen = _attend(self.to_q(patches).unflatten(-1, (self._heads, -1)).transpose(1, 2), keys, values, kept)
        return self.to_out(seen) + self.ff(patches)


class ParallelBlock(nn.Module):
    """Patches attend to each other, beside a feed-forward part of the same input."""

    def __init__(self, sizes: CrossSizes) -> None:
        super().__init__()
        self._heads = sizes.heads
        inner = sizes.heads * sizes.head_width
        self._parts = (inner, sizes.head_width, sizes.head_width, 2 * sizes.inner_width)
        self.norm = nn.LayerNorm(sizes.width)
        self.rotary_emb = Rotary(sizes.head_width)
        self.fused_attn_ff_proj = nn.Linear(sizes.width, sum(self._parts), bias=False)
        self.attn_out = nn.Linear(inner, sizes.width, bias=False)
        self.ff_out = nn.Sequential(Gated(), nn.Linear(sizes.inner_width, sizes.width, bias=False))

    def forward(self, patches: Tensor) -> Tensor:
        """Of patches [b, n, width]."""
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(patches)).split(self._parts, dim=-1)
        queries = self.rotary_emb(queries.unflatten(-1, (self._heads, -1)).transpose(1, 2))
        seen = _attend(queries, self.rotary_emb(keys[:, None]).squeeze(1), values)
        return self.attn_out(seen) + self.ff_out(inner)


class CrossLayer(nn.Module):
    """Both, each added to its input."""

    def __init__(self, sizes: CrossSizes) -> None:
        super().__init__()
        self.across, self.within = CrossAttention(sizes), ParallelBlock(sizes)

    def forward(self, patches: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        patches = patches + self.across(patches, tokens, kept)
        return patches + self.within(patches)


class MpsModel(nn.Module):
    """CLIP and the layers on top."""

    def __init__(self, config: Any, sizes: CrossSizes) -> None:
        """Of a `CLIPConfig`, with random weights."""
        from transformers import CLIPModel

        super().__init__()
        self.clip = CLIPModel(config)
        self.cross = nn.ModuleList(CrossLayer(sizes) for _ in range(sizes.layers))

    def forward(self, pixels: Tensor, prompts: Tensor, condition: Tensor) -> Tensor:
        """Scores [b] of pixels [b, 3, h, w] and the tokens of prompts [b, t] and condition [1, t], all padded, none masked."""
        tokens, prompt = self._read(prompts)
        words, _ = self._read(condition)
        patches = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        kept = kept_tokens(tokens, words)
        for layer in self.cross:
            patches = layer(patches, tokens, kept)
        return self.clip.logit_scale.exp() * F.cosine_similarity(prompt, patches[:, 0], dim=-1)

    def _read(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens [b, t, width] and the end token [b, width] of texts, in the joint space."""
        read = self.clip.text_model(input_ids=texts)
        return self.clip.text_projection(read.last_hidden_state), self.clip.text_projection(read.pooler_output)


def kept_tokens(tokens: Tensor, words: Tensor) -> Tensor:
    """Which of a prompt's tokens [b, t, width] count [b, t]: those whose largest product with one of the condition's [1, s, width] is above
    `THRESHOLD` of the prompt's largest. Padding is not told apart, as in the official code."""
    nearness = (tokens @ words.transpose(1, 2)).amax(2)
    return nearness / nearness.amax(1, keepdim=True) > THRESHOLD


def official_name(name: str) -> str:
    """What the official checkpoint calls a weight of `MpsModel`."""
    part, _, rest = name.partition(".")
    if part == "clip":
        return f"model.{rest}"
    return f"cross_model.layers.{rest.replace('.across.', '.0.fn.').replace('.within.', '.1.fn.')}"


class MpsScorer:
    """Scores pictures by overall preference."""

    def __init__(self, model: MpsModel, tokenizer: Any, image_processor: Any, device: torch.device) -> None:
        """Raises DataError where model and tokenizer do not fit."""
        check_end_token(model.clip.config.text_config, tokenizer)
        self._model, self._device = model.to(device).eval(), device
        self._tokenizer, self._image_processor = tokenizer, image_processor
        self._context = min(tokenizer.model_max_length, model.clip.config.text_config.max_position_embeddings)
        self._condition = self._tokens([CONDITION])

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`mps`: the raw score, at most exp(logit scale)."""
        rows: list[Row] = []
        for first in range(0, len(samples), BATCH):
            part = samples[first : first + BATCH]
            pixels = self._image_processor(images=[sample.image for sample in part], return_tensors="pt")[
                "pixel_values"
            ]
            prompts = self._tokens([sample.prompt.text for sample in part])
            scores = self._model(pixels.to(self._device), prompts, self._condition)
            rows.extend({"mps": value} for value in scores.tolist())
        return rows

    def _tokens(self, texts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        )
        return tokens["input_ids"].to(self._device)


def load(assets: Mapping[str, str], device: torch.device) -> MpsScorer:
    """From the folder `mps`. Raises MissingAsset for a file that is not there, DataError for one that is wrong."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig

    folder = Path(assets["mps"]).absolute()
    # A hub id is no folder: nobody holds the checkpoint in this form there.
    check_assets(SPEC, {"mps": str(folder)})
    weights = folder / "model.safetensors"
    config = CLIPConfig.from_pretrained(folder)
    sizes = read_sizes(weights)
    if sizes.width != config.projection_dim:
        raise DataError(
            f"{weights} has cross layers of width {sizes.width}, {folder / 'config.json'} a projection_dim of {config.projection_dim};"
            " they must be equal"
        )
    # Random weights are drawn before the real ones come; the worker's own random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        model = MpsModel(config, sizes).float()
    load_weights(model, weights, official_name, _UNUSED)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    return MpsScorer(model, tokenizer, AutoImageProcessor.from_pretrained(folder, backend="pil"), device)


def read_sizes(file: Path) -> CrossSizes:
    """Sizes of the cross layers of an official checkpoint, by its weights' shapes. Raises DataError where it has none."""
    shapes = read_shapes(file)
    prefix = "cross_model.layers.0.0.fn."
    queries, keys, inner = (shapes.get(f"{prefix}{name}.weight", ()) for name in ("to_q", "to_kv", "ff.2"))
    if not len(queries) == len(keys) == len(inner) == 2:
        raise DataError(f"{file} lacks {prefix}to_q, to_kv or ff.2; it must hold the official MPS model's state dict")
    head_width = keys[0] // 2
    layers = sum(re.fullmatch(r"cross_model\.layers\.\d+\.0\.fn\.to_q\.weight", name) is not None for name in shapes)
    return CrossSizes(queries[1], layers, queries[0] // head_width, head_width, inner[1])


def _attend(queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
    """[b, n, heads d] of queries [b, heads, n, d] on one head of keys and values [b, t, d], of which only `kept` [b, t] are seen."""
    shape = (-1, queries.shape[1], -1, -1)
    mask = None if kept is None else kept[:, None, None]
    seen = F.scaled_dot_product_attention(queries, keys[:, None].expand(shape), values[:, None].expand(shape), mask)
    return seen.transpose(1, 2).flatten(2)
