"""T2I-CompBench's B-VQA: is each noun phrase of the prompt there? The product of P(yes) over the phrases.

- The phrases are spaCy's noun chunks, but for four that only place things. The first eight count, as in the official script.
- BLIP-VQA answers (`moe_core.metrics.vqa`).
- A picture of another category gets nan: no measure looks at it.

Source: Karine-Huang/T2I-CompBench, BLIPvqa_eval/BLIP_vqa.py and BLIPvqa_eval/data/utils.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics.scorer import MissingAsset, Row, Sample

KINDS = ("color", "shape", "texture")
PLACES = ("top", "the side", "the left", "the right")
"""noun chunks that are no things"""
MOST_PHRASES = 8
MOST_WORDS = 50
"""of a question"""


class Answerer(Protocol):
    """What is needed of BLIP-VQA."""

    def yes_probability(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]: ...


def questions(phrases: Iterable[str]) -> list[str]:
    """What is asked of a prompt's noun chunks: "<phrase>?", in small letters and without most punctuation."""
    things = [phrase for phrase in phrases if phrase not in PLACES]
    asked = []
    for thing in things[:MOST_PHRASES]:
        plain = re.sub(r'[.!"()*#:;~]', "", f"{thing}?".lower()).rstrip(" ")
        asked.append(" ".join(plain.split(" ")[:MOST_WORDS]))
    return asked


def load_english(place: str) -> Any:
    """spaCy's small English pipeline, from a package's name or a folder. Raises MissingAsset if it or spaCy is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise MissingAsset("compbench_bvqa needs the package spacy; install it: pip install spacy") from error
    try:
        return spacy.load(place)
    except OSError as error:
        raise MissingAsset(
            f"eval.models.spacy_english is {place!r}, which spaCy cannot load ({error}); it must be the package en_core_web_sm"
            " (python -m spacy download en_core_web_sm) or a folder of such a pipeline"
        ) from error


class BVqaScorer:
    """Scores pictures of the three attribute categories."""

    def __init__(self, answerer: Answerer, english: Any) -> None:
        self._answerer, self._english = answerer, english
        self._questions: dict[str, list[str]] = {}

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """`bvqa`: 0 to 1. Raises DataError for a prompt without a noun phrase, which the official script gives 1."""
        asked = [self._asked(sample.prompt.text) if sample.prompt.kind in KINDS else [] for sample in samples]
        images = [sample.image for sample, own in zip(samples, asked, strict=True) for _ in own]
        flat = [question for own in asked for question in own]
        answers = iter(self._answerer.yes_probability(images, flat) if flat else [])
        return [{"bvqa": math.prod(next(answers) for _ in own) if own else math.nan} for own in asked]

    def _asked(self, text: str) -> list[str]:
        if text not in self._questions:
            found = questions(chunk.text for chunk in self._english(text).noun_chunks)
            if not found:
                raise DataError(f"spaCy finds no noun phrase in {text!r}; B-VQA has nothing to ask")
            self._questions[text] = found
        return self._questions[text]


def load(assets: Mapping[str, str], device: torch.device) -> BVqaScorer:
    """From `blip_vqa` (BLIP-VQA) and `spacy_english`."""
    english = load_english(assets["spacy_english"])
    from moe_core.metrics.vqa import BlipVQA

    return BVqaScorer(BlipVQA.load(assets["blip_vqa"], device), english)
