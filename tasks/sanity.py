"""Stage `sanity`: the teacher's pictures made worse step by step. A metric that does not worsen with them says nothing of that fault.

Every scorer of the data's own suite sees the same pictures blurred, noised, and under each other's prompts, in the same way as in `evaluate`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_core import noise
from moe_core.errors import ConfigError
from moe_core.metrics import aggregate, corruption, registry
from moe_core.metrics.scorer import Measure, MissingAsset, ScorerSpec, SetMeasure
from tasks import measures, outs, scoring, suites
from tasks.places import DENSE, IMAGES, SANITY
from tasks.stage import Stage, execute, workers
from tasks.suites import Picture

BLIND = "does not read the prompt"


@dataclass(frozen=True)
class Cell:
    """The pictures at one level of one kind of corruption."""

    kind: str
    level: int
    folder: Path
    pictures: tuple[Picture, ...]


def sanity(stage: Stage) -> None:
    """Writes reports/sanity.json: measure -> kind of corruption -> a value a level."""
    assert stage.resume is not None
    params, root = stage.params, stage.root
    if params.eval.sanity is None:
        outs.write_json(root / SANITY, {"pictures": 0, "measures": {}, "not_measured": {}})
        stage.summary({})
        return
    own = suites.own_suite(root, params.eval)
    pictures = suites.pictures(own, params.seed)[: params.eval.sanity]
    if len(pictures) < params.eval.sanity:
        raise ConfigError(
            f"eval.sanity is {params.eval.sanity}, but there are {len(pictures)} pictures of eval.prompts"
        )
    clean = root / IMAGES / DENSE / own.name
    cells = corrupted(pictures, clean, stage.resume.path / "pictures")
    found: dict[str, Any] = {}
    not_measured: dict[str, str] = {}
    assets = scoring.assets_of(params.eval.models, root)
    ray = contextlib.nullcontext() if params.compute.num_workers == 0 else stage.ray()
    with ray, scoring.judges(assets, params.compute) as judges:
        for name in own.config.scorers:
            spec = registry.spec(name)
            if (why := scoring.unavailable(spec, assets)) is not None:
                not_measured[name] = why
                continue
            rows, size = stage.resume.path / "rows" / name, params.eval.scoring_batch_size
            units = [
                unit
                for cell in cells
                for unit in scoring.units(
                    spec,
                    measures.asked(spec, cell.pictures),
                    cell.folder,
                    clean,
                    rows / f"{cell.kind}-{cell.level}",
                    size,
                )
            ]
            try:
                table, _ = scoring.run(units, judges, partial(stage.progress.pictures, name))
            except MissingAsset as error:
                not_measured[name] = scoring.cause(error)
                continue
            found |= values(spec, table, cells, assets, noise.derive_seed(params.seed, aggregate.DRAWS))
    outs.write_json(
        root / SANITY,
        {"pictures": len(pictures), "levels": strengths(), "measures": found, "not_measured": not_measured},
    )
    seen = {
        f"{name}_{kind}_steps": worse_steps(m[kind], m["rising"])
        for name, m in found.items()
        for kind in corruption.KINDS
    }
    stage.summary(seen)


def corrupted(pictures: Sequence[Picture], clean: Path, folder: Path) -> list[Cell]:
    """Writes the pictures of every kind and level; those that are there are made again alike."""
    images = [scoring.read_picture(clean / picture.file) for picture in pictures]
    cells = []
    for kind in corruption.KINDS:
        for level in corruption.LEVELS:
            made, prompts = corruption.corrupt(images, [picture.prompt for picture in pictures], kind, level)
            place = folder / f"{kind}-{level}"
            place.mkdir(parents=True, exist_ok=True)
            for picture, image in zip(pictures, made, strict=True):
                image.save(place / picture.file)
            asked = tuple(replace(p, prompt=prompt) for p, prompt in zip(pictures, prompts, strict=True))
            cells.append(Cell(kind, level, place, asked))
    return cells


def values(
    spec: ScorerSpec, table: pd.DataFrame, cells: Sequence[Cell], assets: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Measure -> {kind: its value at each level, rising, why it is blind for swapped prompts, if it is}."""
    size = len(table) // len(cells)
    parts = {(cell.kind, cell.level): table.iloc[i * size : (i + 1) * size] for i, cell in enumerate(cells)}
    blind = BLIND if spec.needs_reference or spec.set_measures else None
    found: dict[str, Any] = {}
    for measure in measures.applicable(spec, table):
        value = partial(_mean, measure, seed)
        found[measure.name] = _levels(value, parts) | {"rising": measure.rising, "blind_to_swap": blind}
    for distance in spec.set_measures:
        value = partial(_distance, distance, measures.reference_features(distance, assets))
        found[distance.name] = _levels(value, parts) | {"rising": distance.rising, "blind_to_swap": blind}
    return found


def strengths() -> dict[str, list[float]]:
    """How strong each level of each kind is, in the units of `moe_core.metrics.corruption`."""
    return {"blur": list(corruption.BLUR), "noise": list(corruption.NOISE), "swap": list(corruption.SWAP)}


def worse_steps(levels: Sequence[float], rising: bool) -> int:
    """How many of the steps from level to level make the measure worse."""
    return sum((b < a) if rising else (b > a) for a, b in itertools.pairwise(levels))


def _mean(measure: Measure, seed: int, part: pd.DataFrame) -> float:
    return aggregate.estimate(measures.prompt_table(part, measure), measure, seed).value


def _distance(measure: SetMeasure, real: np.ndarray, part: pd.DataFrame) -> float:
    return aggregate.set_estimate(measures.features(part, measure.column), list(part["id"]), real, measure).value


def _levels(value: Callable[[pd.DataFrame], float], parts: Mapping[tuple[str, int], pd.DataFrame]) -> dict[str, Any]:
    return {kind: [value(parts[kind, level]) for level in corruption.LEVELS] for kind in corruption.KINDS}


if __name__ == "__main__":
    execute("sanity", sanity, resumable=True, joins=workers)
