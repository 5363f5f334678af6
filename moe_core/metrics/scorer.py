"""What a scorer is: it looks at pictures and says a row of values for each. Every metric of `evaluate` is one, from CLIP score to GenEval.

- A scorer knows neither the model that made the pictures nor how many workers there are. It is given fixed batches of samples.
- What its rows come to is said beside it by `Measure`s: plain means, over prompts or over kinds of prompts. So intervals and paired
  comparisons are made in one place (`moe_core.metrics.aggregate`), in the same way for all.
- What it must load is said by `Asset`s: a model's folder or a file that the user fetches once. One that is missing is an error that
  says what to get and where it goes; the other scorers go on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from moe_core import folders
from moe_core.errors import DataError, Dense2MoEError, EvaluationError
from moe_core.metrics.loading import Unloadable

Row = dict[str, Any]
"""Column -> value of one picture: float, bool or str, or a list of floats (features)."""


class MissingAsset(Dense2MoEError):
    """Something that a scorer or a set of prompts needs is not there; the message says what to get and where it goes."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark."""

    id: str
    """unique in its set"""
    text: str
    kind: str = ""
    """what the benchmark groups its prompts by: GenEval's tag, CompBench's category; "" where it does not"""
    record: Mapping[str, Any] = field(default_factory=dict)
    """what the benchmark says of it beside the text: GenEval's `include`, DPG's questions"""


@dataclass(frozen=True)
class Sample:
    """One picture of a prompt."""

    prompt: Prompt
    index: int
    """which of the prompt's pictures, from 0"""
    image: Image.Image
    """RGB"""
    reference: Image.Image | None = None
    """RGB, of the reference model from the same noise; for those that are compared with one"""


class Scorer(Protocol):
    """Loaded once in a worker, by its spec's `load`."""

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """A row a sample, in their order, each with the same columns."""


@dataclass(frozen=True)
class Measure:
    """What a column comes to over a set of prompts: the mean over prompts of the means over a prompt's pictures, times `scale`."""

    name: str
    """unique among all scorers: `geneval`, `clip_score`"""
    column: str
    rising: bool = True
    """more is better"""
    scale: float = 1.0
    over_kinds: bool = False
    """the mean of the kinds' means, as GenEval has it, instead of the mean over prompts"""
    by_kind: bool = False
    """tell the kinds' means too"""
    kinds: tuple[str, ...] = ()
    """only prompts of these kinds; all where empty"""
    binary: bool = False
    """right or wrong a picture: its interval allows for two of each that were not seen"""
    weight: str | None = None
    """column of each picture's weight in the mean: DPG's categories count questions, not prompts"""


@dataclass(frozen=True)
class SetMeasure:
    """What the features of all pictures together come to: a distance to reference features."""

    name: str
    column: str
    """of each picture's features"""
    statistic: Literal["fid", "kid"]
    asset: str
    """key of the asset in whose folder the reference lies"""
    file: str
    """safetensors with one matrix `features` [N, D]"""
    rising: bool = False


@dataclass(frozen=True)
class Asset:
    """A model's folder or a file that a scorer needs."""

    key: str
    """its name in `eval.models`: what the user writes beside it is a folder, or a hub id"""
    what: str
    """what to get, in words with its address or hub id: "CLIP ViT-L/14, openai/clip-vit-large-patch14" """
    files: tuple[str, ...] = ()
    """that must lie in the folder"""


@dataclass(frozen=True)
class ScorerSpec:
    """What is known of a scorer without loading it: a scorer's module is imported in the worker that uses it."""

    name: str
    load_from: str
    """`package.module:function`; the function is `load(assets: Mapping[str, str], device: torch.device) -> Scorer`, whose assets are
    folders or hub ids by `Asset.key`"""
    measures: tuple[Measure, ...] = ()
    set_measures: tuple[SetMeasure, ...] = ()
    assets: tuple[Asset, ...] = ()
    needs_reference: bool = False
    """its samples have a `reference`"""
    packages: tuple[str, ...] = ()
    """optional packages that it imports"""

    def load(self, assets: Mapping[str, str], device: torch.device) -> Scorer:
        """Loads it. Raises MissingAsset for what is not there or cannot be reached."""
        module, _, function = self.load_from.partition(":")
        check_assets(self, assets)
        made: Callable[[Mapping[str, str], torch.device], Scorer] = getattr(importlib.import_module(module), function)
        try:
            return made(assets, device)
        except (OSError, Unloadable) as error:
            if not self.assets:
                raise
            raise MissingAsset(self._told(assets, error)) from error

    def _told(self, assets: Mapping[str, str], error: OSError | Unloadable) -> str:
        """Which asset cannot be loaded, and what it must be; any of them may be it where the error names no place."""
        place = error.place if isinstance(error, Unloadable) else None
        meant = [asset for asset in self.assets if assets[asset.key] == place] or self.assets
        named = " and ".join(f"eval.models.{asset.key} is {assets[asset.key]}" for asset in meant)
        wanted = " and ".join(asset.what for asset in meant)
        why = error.why if isinstance(error, Unloadable) else error
        return f"{self.name}: {named}, which cannot be loaded ({why}); it must hold {wanted}"


def check_assets(spec: ScorerSpec, assets: Mapping[str, str]) -> None:
    """Raises MissingAsset where an asset is not named, or a named folder lacks a file. Hub ids are not looked up."""
    for asset in spec.assets:
        place = assets.get(asset.key)
        if place is None:
            raise MissingAsset(
                f"{spec.name} needs {asset.what}; fetch it and name its folder, or its hub id, in eval.models.{asset.key}"
            )
        if (folder := folders.meant(place, Path.cwd())) is not None:
            missing = [file for file in asset.files if not (folder / file).exists()]
            if missing or not folder.exists():
                raise MissingAsset(
                    f"{spec.name}: eval.models.{asset.key} is {place}, which has no {', '.join(missing) or 'such folder'};"
                    f" it must hold {asset.what}"
                )


def stack(samples: Sequence[Sample], references: bool = False) -> NDArray[np.uint8]:
    """The pictures, or their references, uint8 [N, S, S, 3]."""
    pictures = []
    for sample in samples:
        image = sample.reference if references else sample.image
        if image is None:
            raise EvaluationError(
                f"prompt {sample.prompt.id}, picture {sample.index} has no reference to compare it with"
            )
        pictures.append(np.asarray(image.convert("RGB"), np.uint8))
    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) > 1:
        raise DataError(f"pictures are of sizes {sizes}; scenes of one data set are all of one size")
    return np.stack(pictures)
