"""ImageReward: what people would say of a picture and its prompt, by BLIP with a small head.

- Vision and text encoder are transformers' BLIP; only their names are changed from those of the official checkpoint.
- The prompt is read by BERT with cross-attention to the picture's patches; the head reads its first token. That one is BERT's [CLS]: BLIP's
  own [ENC] is not put there, for ImageReward does not.
- The head is five linear layers in a row, as the official one, whose activations are commented out.
- The official checkpoint is a pickle. This reads a safetensors file with the same names; docs/metrics.md has the command that makes it.

Source: Xu et al. 2023; THUDM/ImageReward, ImageReward/ImageReward.py, models/BLIP/{blip_pretrain,med,vit}.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_core.errors import DataError
from moe_core.metrics.official_weights import load_weights
from moe_core.metrics.scorer import Asset, Measure, MissingAsset, Row, Sample, ScorerSpec, check_assets

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output on the authors' validation set; a score is so many standard deviations above it."""
MAX_TOKENS = 35
"""Of a prompt, [CLS] and [SEP] among them; a longer one is cut, a shorter one padded."""
BATCH = 16
"""Pictures at once."""

OFFICIAL_CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
    },
    "head_widths": [1024, 128, 64, 16],
}
"""Content of config.json for the official checkpoint (BLIP large and med_config.json). transformers' own defaults differ: 8 heads in the
text encoder, 1e-5 in the vision encoder's layer norms."""

SPEC = ScorerSpec(
    name="image_reward",
    load_from="moe_core.metrics.image_reward:load",
    measures=(Measure("image_reward", "image_reward", by_kind=True),),
    assets=(
        Asset(
            "image_reward",
            "ImageReward (ImageReward.pt of THUDM/ImageReward) as model.safetensors, its sizes as config.json and the tokenizer of"
            " google-bert/bert-base-uncased; docs/metrics.md has the command that writes them",
            # Without config.json `load` says what to write into it.
            files=("model.safetensors", "tokenizer.json"),
        ),
    ),
)

_HEAD_PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers in the official nn.Sequential; dropouts stand between the first four."""
_UNUSED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))")
"""BLIP's projections for contrastive training, which the official model has but does not use, and a table of 0, 1, 2..."""
_VISION_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".norm"),
)
"""transformers' name -> the official one, in the vision encoder."""


class RewardModel(nn.Module):
    """BLIP's two encoders and the head."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Of a config like `OFFICIAL_CONFIG`, with random weights."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**config["vision_config"]))
        # transformers builds cross-attention only into a "decoder"; its mask stays bidirectional, for forward is not told is_decoder.
        text = BlipTextConfig(
            **config["text_config"],
            encoder_hidden_size=config["vision_config"]["hidden_size"],
            is_decoder=True,
            bos_token_id=None,
            sep_token_id=None,
            eos_token_id=None,
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (config["text_config"]["hidden_size"], *config["head_widths"], 1)
        self.head = nn.Sequential(*(nn.Linear(before, after) for before, after in pairwise(widths)))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores [b] of pixels [b, 3, h, w] and a prompt's tokens [b, t] with their mask [b, t]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]).squeeze(1) - MEAN) / STD


def official_name(name: str) -> str:
    """What the official checkpoint calls a weight of `RewardModel`."""
    part, _, rest = name.partition(".")
    if part == "text":
        return f"blip.text_encoder.{rest}"
    if part == "head":
        place, _, kind = rest.partition(".")
        return f"mlp.layers.{_HEAD_PLACES[int(place)]}.{kind}"
    for ours, theirs in _VISION_NAMES:
        rest = rest.replace(ours, theirs)
    return f"blip.visual_encoder.{rest}"


class ImageRewardScorer:
    """Scores pictures by the reward of their prompt."""

    def __init__(self, model: RewardModel, tokenizer: Any, image_processor: Any, device: torch.device) -> None:
        self._model, self._device = model.to(device).eval(), device
        self._tokenizer, self._image_processor = tokenizer, image_processor

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`image_reward`: standard deviations above the mean of the authors' validation set."""
        rows: list[Row] = []
        for first in range(0, len(samples), BATCH):
            part = samples[first : first + BATCH]
            pixels = self._image_processor(images=[sample.image for sample in part], return_tensors="pt")[
                "pixel_values"
            ]
            tokens = self._tokenizer(
                [sample.prompt.text for sample in part],
                padding="max_length",
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self._device)
            rewards = self._model(pixels.to(self._device), tokens["input_ids"], tokens["attention_mask"])
            rows.extend({"image_reward": value} for value in rewards.tolist())
        return rows


def load(assets: Mapping[str, str], device: torch.device) -> ImageRewardScorer:
    """From the folder `image_reward`. Raises MissingAsset for a file that is not there, DataError for one that is wrong."""
    from transformers import BertTokenizer, CLIPImageProcessorPil

    folder = Path(assets["image_reward"])
    if folder.is_dir() and not (folder / "config.json").exists():
        raise MissingAsset(
            f"image_reward: {folder} has no config.json; for the official checkpoint write this into it: {json.dumps(OFFICIAL_CONFIG)}"
        )
    # A hub id is no folder: nobody holds the checkpoint in this form there.
    check_assets(SPEC, {"image_reward": str(folder.absolute())})
    config = read_config(folder / "config.json")
    # Random weights are drawn before the real ones come; the worker's own random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        model = RewardModel(config)
    load_weights(model, folder / "model.safetensors", official_name, _UNUSED)
    tokenizer = BertTokenizer.from_pretrained(folder, padding_side="right")
    if len(tokenizer) > config["text_config"]["vocab_size"]:
        raise DataError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {config['text_config']['vocab_size']}; it must be BERT's own"
        )
    side = config["vision_config"]["image_size"]
    # Shorter side to `side`, bicubic, then the middle; CLIP's mean and deviation are this class's own.
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return ImageRewardScorer(model, tokenizer, image_processor, device)


def read_config(file: Path) -> dict[str, Any]:
    """A config with just the keys of `OFFICIAL_CONFIG`, so that no size is left to a library's default. Raises DataError for another."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no JSON ({error}); it must be like {json.dumps(OFFICIAL_CONFIG)}") from error
    _check_keys(file, "", config, OFFICIAL_CONFIG)
    for section in ("vision_config", "text_config"):
        _check_keys(file, f"{section}.", config[section], OFFICIAL_CONFIG[section])
        for key, value in config[section].items():
            kind = type(OFFICIAL_CONFIG[section][key])
            if type(value) is not kind or value <= 0:
                raise DataError(f"{file}: {section}.{key} is {value!r}; it must be a positive {kind.__name__}")
    widths = config["head_widths"]
    if not isinstance(widths, list) or len(widths) != len(_HEAD_PLACES) - 1 or any(type(w) is not int for w in widths):
        raise DataError(f"{file}: head_widths is {widths!r}; it must be four whole numbers")
    return dict(config)


def _check_keys(file: Path, where: str, found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise DataError(
            f"{file}: {where.rstrip('.') or 'the file'} is no object; it must be one with {', '.join(wanted)}"
        )
    for key in wanted:
        if key not in found:
            raise DataError(f"{file} has no {where}{key}; the official model's is {json.dumps(wanted[key])}")
    for key in found:
        if key not in wanted:
            raise DataError(f"{file} has {where}{key}, which is unknown; there are {', '.join(wanted)}")
