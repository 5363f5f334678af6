"""Scorers over pictures that are there, in Ray actors: one scorer at a time, on all workers, its rows kept as they come.

- A unit is a fixed run of pictures of one suite, scored in one batch with a fixed number of threads.
- A unit's rows are a file that appears whole or not at all; a killed run goes on after the last one.
- A picture that is missing, broken or of the wrong kind is an error that names it. Nothing is averaged over what is left.
- A batch that does not fit into the memory is halved, again and again; a single picture that does not is an error.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError

from moe_core import folders
from moe_core.config import ComputeConfig
from moe_core.errors import EvaluationError
from moe_core.metrics.scorer import MissingAsset, Row, Sample, Scorer, ScorerSpec, check_assets
from tasks.actors import Group, actors
from tasks.progress import Told
from tasks.suites import Picture

KEYS = ("id", "kind", "index")
"""Columns of every row, beside the scorer's own."""


@dataclass(frozen=True)
class Unit:
    """Some pictures of a suite, who scores them, and the file that their rows go to."""

    spec: ScorerSpec
    folder: Path
    reference: Path | None
    """folder of the pictures that they are compared with"""
    pictures: tuple[Picture, ...]
    rows: Path


class Judge:
    """Scorers in one process, one at a time: the models of the last are let go before the next one's are loaded."""

    def __init__(self, assets: Mapping[str, str], compute: ComputeConfig) -> None:
        torch.set_num_threads(compute.cpus_per_worker)
        self.assets, self.device = assets, torch.device("cuda" if compute.use_gpu else "cpu")
        self.loaded: tuple[str, Scorer] | None = None

    def judge(self, unit: Unit) -> float:
        """Writes a unit's rows; returns the seconds that it took, without loading the scorer."""
        scorer = self._scorer(unit.spec)
        began = time.monotonic()
        samples = [
            Sample(
                picture.prompt,
                picture.index,
                read_picture(unit.folder / picture.file),
                None if unit.reference is None else read_picture(unit.reference / picture.file),
            )
            for picture in unit.pictures
        ]
        found = score(scorer, samples, unit.spec.name)
        check_rows(unit.spec, samples, found)
        rows = [
            dict(zip(KEYS, (sample.prompt.id, sample.prompt.kind, sample.index), strict=True)) | row
            for sample, row in zip(samples, found, strict=True)
        ]
        partial = unit.rows.with_name(f".{unit.rows.name}.partial")
        pd.DataFrame(rows).to_parquet(partial, index=False)
        partial.replace(unit.rows)
        return time.monotonic() - began

    def _scorer(self, spec: ScorerSpec) -> Scorer:
        if self.loaded is None or self.loaded[0] != spec.name:
            self.loaded = None
            torch.cuda.empty_cache()
            self.loaded = (spec.name, spec.load(self.assets, self.device))
        return self.loaded[1]


def judges(assets: Mapping[str, str], compute: ComputeConfig) -> AbstractContextManager[Group]:
    """Those who score: `compute.num_workers` actors, or one object in this process."""
    return actors(Judge, (assets, compute), compute)


def score(scorer: Scorer, samples: Sequence[Sample], name: str) -> list[Row]:
    """The rows of samples; where the memory does not hold them together, of their halves.

    Raises EvaluationError where it does not hold a single one, or the scorer gives other rows than it must.
    """
    rows: list[Row] | None
    try:
        rows = scorer.score(samples)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if len(samples) == 1:
            raise EvaluationError(
                f"{name} runs out of memory on one picture, {samples[0].image.size} of '{samples[0].prompt.text}': {error}"
            ) from error
        rows = None
    if rows is None:
        # Only here: inside `except` the error's traceback still holds the tensors for which there is no room.
        torch.cuda.empty_cache()
        middle = len(samples) // 2
        return score(scorer, samples[:middle], name) + score(scorer, samples[middle:], name)
    if len(rows) != len(samples):
        raise EvaluationError(f"{name} gave {len(rows)} rows for {len(samples)} pictures; it must give one each")
    return rows


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # A CPU's allocator has no class of error of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def check_rows(spec: ScorerSpec, samples: Sequence[Sample], rows: Sequence[Row]) -> None:
    """Raises EvaluationError for a row that lacks a number which a measure takes of its picture: such a row is not kept."""
    for sample, row in zip(samples, rows, strict=True):
        for measure in spec.measures:
            if measure.kinds and sample.prompt.kind not in measure.kinds:
                continue
            for column in (measure.column, measure.weight):
                if column is not None and not _is_number(row.get(column)):
                    raise EvaluationError(
                        f"{spec.name} says {column} = {row.get(column)} of prompt {sample.prompt.id}, picture {sample.index};"
                        " it must be a number"
                    )
        for distance in spec.set_measures:
            if not all(map(_is_number, row.get(distance.column) or [None])):
                raise EvaluationError(
                    f"{spec.name} gives prompt {sample.prompt.id}, picture {sample.index}, {distance.column} that are not all numbers"
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value)


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB; raises EvaluationError where it is missing or cannot be decoded."""
    if not path.is_file():
        raise EvaluationError(f"{path} is missing; every prompt must have its pictures before they are scored")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise EvaluationError(
            f"{path} cannot be decoded ({error}); remove it, and `generate` of its model makes it again"
        ) from error


def unavailable(spec: ScorerSpec, assets: Mapping[str, str]) -> str | None:
    """Why a scorer cannot be loaded here: what is missing, in words; None if nothing is."""
    for package in spec.packages:
        if importlib.util.find_spec(package) is None:
            return f"{spec.name} needs the package {package}; install it beside this one"
    try:
        check_assets(spec, assets)
    except MissingAsset as error:
        return str(error)
    return None


def cause(error: MissingAsset) -> str:
    """What only loading finds, such as a hub id that cannot be reached: Ray's error has the worker's as its cause."""
    return str(getattr(error, "cause", None) or error)


def run(units: Sequence[Unit], group: Group, told: Told) -> tuple[pd.DataFrame, float | None]:
    """Scores what has no rows yet; returns the rows of all units, in their order, and the seconds that a picture took now, without
    loading the scorer; None where all had been scored."""
    todo = [unit for unit in units if not unit.rows.exists()]
    count = sum(len(unit.pictures) for unit in units)
    there, done, seconds = count - sum(len(unit.pictures) for unit in todo), 0, 0.0
    began = time.monotonic()
    for folder in {unit.rows.parent for unit in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    for unit, taken in group.each("judge", todo):
        done, seconds = done + len(unit.pictures), seconds + taken
        told(there + done, count, done / (time.monotonic() - began))
    table = pd.concat([pd.read_parquet(unit.rows) for unit in units], ignore_index=True)
    return table, seconds / done if done else None


def units(
    spec: ScorerSpec, pictures: Sequence[Picture], folder: Path, reference: Path | None, rows: Path, size: int
) -> list[Unit]:
    """A suite's pictures cut into units of `size`; `rows` is the folder of this scorer's rows."""
    return [
        Unit(
            spec,
            folder,
            reference if spec.needs_reference else None,
            tuple(pictures[first : first + size]),
            rows / f"{first:07d}.parquet",
        )
        for first in range(0, len(pictures), size)
    ]


def assets_of(models: Mapping[str, str], root: Path) -> dict[str, str]:
    """`eval.models` with folders of the checkout as absolute paths, since workers run elsewhere; hub ids stay."""
    return {key: str(folders.meant(place, root) or place) for key, place in models.items()}


def rows_by_scorer(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One table a suite: the scorers' columns side by side, each named `scorer.column`; empty where a scorer has not seen a picture."""
    whole: pd.DataFrame | None = None
    for name, table in tables.items():
        renamed = table.rename(columns={c: f"{name}.{c}" for c in table.columns if c not in KEYS})
        whole = renamed if whole is None else whole.merge(renamed, on=list(KEYS), how="outer", validate="one_to_one")
    assert whole is not None
    return whole
