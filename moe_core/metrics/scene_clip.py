"""A small CLIP for scenes of digits: what openai/clip-vit-large-patch14 is for photographs, trained in half a minute on one core.

- transformers' own `CLIPModel` and `CLIPProcessor`, saved as one folder, so that whatever loads CLIP loads this too.
- Trained on scenes of the evaluator's digits: it shares no digit with the generator. Its own test is on the last of them, other hands.
- Symmetric InfoNCE; pairs whose prompts are equal are positives too (as in supervised contrastive learning): a batch has many such.
- It tells classes, colours and counts. It does not tell which colour belongs to which digit, nor which digit is on the left: two true
  words in the wrong order score as well as in the right one, as in CLIP itself (Yuksekgonul et al. 2023). `separation` measures this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from moe_core.config import EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.data.embedded import DIGIT_NAMES, DIGIT_PIXELS, PLURALS, Scene
from moe_core.errors import DataError
from moe_core.metrics import classifier
from moe_core.small_flux import clip_tokenizer

WIDTH, LAYERS, HEADS = 64, 2, 4
"""Of both towers."""
MAX_TOKENS = 77
"""As CLIP's, so that code that pads to 77 runs."""
TEST_SHARE = 0.3
"""Of the evaluator's digits, the last; never trained on."""
TRAIN_SCENES, TEST_SCENES = 8000, 1000
_MAX_LOGIT_SCALE = 100.0
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def train(
    config: EmbeddedDataConfig,
    seed: int,
    steps: int = 600,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    scenes: int = TRAIN_SCENES,
) -> tuple[CLIPModel, CLIPProcessor, dict[str, float]]:
    """A CLIP in eval mode, its processor, and `separation` on scenes of digits that it was not trained on.

    The caller's random state is left as it was. Raises DataError for steps, a batch or scenes below one.
    """
    if min(steps, batch_size, scenes) < 1:
        raise DataError(f"steps are {steps}, batch_size {batch_size} and scenes {scenes}; each must be at least 1")
    images, classes = embedded.evaluator_digits(config)
    cut = len(images) - math.ceil(TEST_SHARE * len(images))
    shown = [embedded.make_scene(config, seed, index, (images[:cut], classes[:cut])) for index in range(scenes)]
    processor = _processor(config.canvas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(config, processor)
        _fit(model, processor, shown, config.grid, steps, batch_size, learning_rate, seed)
    kept = [
        embedded.make_scene(config, seed, scenes + index, (images[cut:], classes[cut:])) for index in range(TEST_SCENES)
    ]
    return model, processor, separation(model, processor, kept, config, seed)


def save(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Writes a complete CLIP folder: `CLIPModel.from_pretrained(folder)`, `CLIPProcessor.from_pretrained(folder)`."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.inference_mode()
def separation(
    model: CLIPModel, processor: CLIPProcessor, scenes: Sequence[Scene], config: EmbeddedDataConfig, seed: int
) -> dict[str, float]:
    """How often a scene is nearer to its own prompt than to a wrong one, by what is wrong: {"class": 0.98, ...}; chance is 0.5.

    The wrong prompts are those of `wrong_prompts`. `own_similarity` and `other_similarity` are the mean cosines with the scene's own
    prompt and with that of another scene, the next with another text.
    """
    if not scenes:
        raise DataError("there is no scene to measure the separation on")
    rng = np.random.default_rng(seed)
    pictures = _embed_images(model, processor, scenes)
    own = (pictures * _embed_texts(model, processor, [scene.prompt for scene in scenes])).sum(1)
    wrong: dict[str, tuple[list[int], list[str]]] = {}
    for number, scene in enumerate(scenes):
        for fault, text in wrong_prompts(scene.record, config, rng).items():
            rows, texts = wrong.setdefault(fault, ([], []))
            rows.append(number)
            texts.append(text)
    found = {"own_similarity": float(own.mean())}
    others = _next_other(scenes)
    if others is not None:
        found["other_similarity"] = float((pictures * _embed_texts(model, processor, others)).sum(1).mean())
    for fault, (rows, texts) in sorted(wrong.items()):
        other = (pictures[rows] * _embed_texts(model, processor, texts)).sum(1)
        found[fault] = float((own[rows] > other).float().mean())
    return found


def wrong_prompts(record: Mapping[str, Any], config: EmbeddedDataConfig, rng: np.random.Generator) -> dict[str, str]:
    """Prompts that differ from a record's in one thing and are not true of its scene: {fault: text}, only faults that the kind can have.

    `class`: one object of another class. `color`: one object of another colour. `count`: another number. `position`: the opposite.
    `binding`: both colours kept, but exchanged.
    """
    include = record["include"]
    if _caption(record["tag"], include) != record["prompt"]:
        raise DataError(
            f"prompt '{record['prompt']}' is not what its record says: '{_caption(record['tag'], include)}'"
        )
    number = int(rng.integers(len(include)))

    def changed(key: str, values: Sequence[Any]) -> str:
        items = [dict(item) for item in include]
        items[number][key] = values[int(rng.integers(len(values)))]
        return _caption(record["tag"], items)

    texts = {"class": changed("class", _others(DIGIT_NAMES, [item["class"] for item in include]))}
    colours = [item["color"] for item in include if "color" in item]
    unused = _others(config.colours, colours)
    if colours and unused:
        texts["color"] = changed("color", unused)
    if len(colours) == 2 and colours[0] != colours[1]:
        pair = [{**item, "color": colour} for item, colour in zip(include, reversed(colours), strict=True)]
        texts["binding"] = _caption(record["tag"], pair)
    if record["tag"] == "counting":
        counts = _others(range(2, min(config.max_digits, config.grid**2) + 1), [include[0]["count"]])
        if counts:
            texts["count"] = changed("count", counts)
    if record["tag"] == "position":
        relation, base = include[1]["position"]
        texts["position"] = _caption("position", [include[0], {**include[1], "position": [_OPPOSITE[relation], base]}])
    return texts


def contrastive_loss(logits: Tensor, prompts: Tensor) -> Tensor:
    """Symmetric InfoNCE of logits [B pictures, B texts]; `prompts` [B] numbers the texts, and equal numbers are all positives.

    Without equal prompts it is CLIP's loss (Radford et al. 2021, fig. 3); with them the mean of -log p over the positives (Khosla et al.
    2020, eq. 2).
    """
    equal = (prompts[:, None] == prompts[None]).to(logits.dtype)
    target = equal / equal.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _fit(
    model: CLIPModel,
    processor: CLIPProcessor,
    scenes: Sequence[Scene],
    grid: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pixels = _pixels(processor, scenes)
    texts = sorted({scene.prompt for scene in scenes})
    number = {text: place for place, text in enumerate(texts)}
    prompts = torch.tensor([number[scene.prompt] for scene in scenes])
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps + 1)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(scenes), (batch_size,), generator=generator)
        # A text that occurs twice is encoded once.
        unique, place = prompts[rows].unique(return_inverse=True)
        pictures = _image_features(model, _augment(pixels[rows], grid, generator))
        words = _text_features(model, tokens.input_ids[unique], tokens.attention_mask[unique])
        loss = contrastive_loss(model.logit_scale.exp() * pictures @ words[place].T, prompts[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(_MAX_LOGIT_SCALE))
    model.eval()


def _model(config: EmbeddedDataConfig, processor: CLIPProcessor) -> CLIPModel:
    tokenizer = processor.tokenizer
    both = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": WIDTH,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **both,
    )
    # A patch is a digit's cell, or a quarter of a larger one. Five times the usual spread: at 0.02 the patches and their places are
    # still drowned by the class token when so few steps are over.
    vision = CLIPVisionConfig(image_size=config.canvas, patch_size=DIGIT_PIXELS, initializer_range=0.1, **both)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def _processor(canvas: int) -> CLIPProcessor:
    # Black is 0: an empty cell says nothing.
    images = CLIPImageProcessor(
        size={"shortest_edge": canvas},
        crop_size={"height": canvas, "width": canvas},
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    return CLIPProcessor(images, clip_tokenizer(embedded.captions_vocabulary(), MAX_TOKENS))


def _augment(pixels: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Each cell of [B, 3, S, S] moved, sheared, dimmed and made noisy by itself, as the digit classifier's digits are."""
    side = pixels.shape[-1] // grid
    cells = pixels.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 1, 3, 5)
    moved = classifier.augment(cells.flatten(0, 2), generator).unflatten(0, cells.shape[:3])
    return moved.permute(0, 3, 1, 4, 2, 5).reshape(pixels.shape)


def _pixels(processor: CLIPProcessor, scenes: Sequence[Scene]) -> Tensor:
    return processor.image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]


def _embed_images(model: CLIPModel, processor: CLIPProcessor, scenes: Sequence[Scene]) -> Tensor:
    return _image_features(model, _pixels(processor, scenes))


def _embed_texts(model: CLIPModel, processor: CLIPProcessor, texts: Sequence[str]) -> Tensor:
    tokens = processor.tokenizer(list(texts), padding=True, return_tensors="pt")
    return _text_features(model, tokens.input_ids, tokens.attention_mask)


def _image_features(model: CLIPModel, pixels: Tensor) -> Tensor:
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def _text_features(model: CLIPModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    encoded = model.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    return F.normalize(model.text_projection(encoded), dim=-1)


def _next_other(scenes: Sequence[Scene]) -> list[str] | None:
    """For each scene the prompt of the next with another text; None where all texts are equal."""
    texts = [scene.prompt for scene in scenes]
    if len(set(texts)) < 2:
        return None
    return [
        next(other for other in texts[place + 1 :] + texts[:place] if other != text) for place, text in enumerate(texts)
    ]


def _others(values: Sequence[Any], taken: Sequence[Any]) -> list[Any]:
    return [value for value in values if value not in taken]


def _caption(tag: str, include: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a record's objects, as `embedded` words it."""
    if tag == "counting":
        (item,) = include
        return f"{DIGIT_NAMES[item['count']]} {PLURALS[DIGIT_NAMES.index(item['class'])]}"
    named = [
        f"a {item['color']} {item['class']}" if "color" in item else embedded.with_article(item["class"])
        for item in include
    ]
    if tag == "position":
        return f"{named[1]} {include[1]['position'][0]} {named[0]}"
    return " and ".join(named)
