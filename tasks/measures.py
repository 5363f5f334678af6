"""From pictures to numbers: the scorers of each suite, one after the other, and their measures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors.numpy import load_file

from moe_core import noise
from moe_core.config import Params
from moe_core.errors import EvaluationError
from moe_core.metrics import aggregate, registry
from moe_core.metrics.aggregate import Estimated
from moe_core.metrics.scorer import Measure, MissingAsset, ScorerSpec, SetMeasure
from tasks import scoring, suites
from tasks.actors import Group
from tasks.progress import Progress
from tasks.suites import Picture, Suite


@dataclass
class SuiteResult:
    """What one suite came to for one model."""

    suite: Suite
    values: dict[str, Estimated] = field(default_factory=dict)
    """by name of the measure"""
    kinds: dict[str, dict[str, Estimated]] = field(default_factory=dict)
    """measure -> kind -> value, of those that tell their kinds"""
    not_measured: dict[str, str] = field(default_factory=dict)
    """scorer -> why"""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """scorer -> a row a picture"""
    seconds_a_picture: dict[str, float] = field(default_factory=dict)
    """scorer -> cost, of those that had something left to score"""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it; no time in it, as it differs between equal runs."""
        return {
            "prompts": len(self.suite.prompts),
            "images_per_prompt": self.suite.config.images_per_prompt,
            "missing": self.suite.missing,
            "measures": {
                name: asdict(value) | {"by_kind": {k: asdict(v) for k, v in self.kinds.get(name, {}).items()}}
                for name, value in self.values.items()
            },
            "not_measured": self.not_measured,
        }

    def write(self, folder: Path) -> None:
        """`<suite>.pictures.parquet` and `<suite>.prompts.parquet`."""
        if not self.tables:
            return
        numbers = {prompt.id: number for number, prompt in enumerate(self.suite.prompts)}
        pictures = scoring.rows_by_scorer(self.tables)
        pictures = pictures.sort_values(["id", "index"], key=lambda c: c.map(numbers) if c.name == "id" else c)
        pictures.to_parquet(folder / f"{self.suite.name}.pictures.parquet", index=False)
        self.by_prompt().to_parquet(folder / f"{self.suite.name}.prompts.parquet", index=False)

    def by_prompt(self) -> pd.DataFrame:
        """A row a prompt: its text, kind, and the mean over its pictures of every column that is measured."""
        rows = pd.DataFrame([{"id": p.id, "kind": p.kind, "prompt": p.text} for p in self.suite.prompts])
        for name, table in self.tables.items():
            spec = registry.spec(name)
            columns = sorted({c for m in spec.measures for c in (m.column, m.weight) if c is not None})
            if columns:
                means = table.groupby("id", sort=False)[columns].mean()
                means = means.rename(columns={column: f"{name}.{column}" for column in columns})
                rows = rows.merge(means, left_on="id", right_index=True, how="left", validate="one_to_one")
        return rows

    def extremes(self, count: int) -> pd.DataFrame:
        """The best and the worst prompts by each measure."""
        rows, found = self.by_prompt(), []
        for name in self.tables:
            for measure in registry.spec(name).measures:
                column = f"{name}.{measure.column}"
                ranked = rows.dropna(subset=[column]).sort_values(column, ascending=not measure.rising, kind="stable")
                for label, part in (("best", ranked.head(count)), ("worst", ranked.tail(count))):
                    found += [
                        {"measure": measure.name, "which": label, "value": float(row[column]), "prompt": row["prompt"]}
                        for _, row in part.iterrows()
                    ]
        return pd.DataFrame(found)


def score_suites(
    found: Sequence[Suite],
    params: Params,
    *,
    images: Path,
    reference: Path | None,
    rows: Path,
    assets: Mapping[str, str],
    judges: Group,
    progress: Progress,
    is_reference: bool = False,
) -> list[SuiteResult]:
    """Every suite's measures. `images` and `reference` have a folder a suite; `rows` keeps what a killed run has scored.

    A scorer that cannot be loaded here is told in `not_measured`; if none of all can, EvaluationError says why. Of the model that
    others are compared with (`is_reference`) a scorer that compares has nothing to say, which is no fault.
    """
    results: list[SuiteResult] = []
    compares = False
    for suite in found:
        result = SuiteResult(suite)
        results.append(result)
        for name in suite.config.scorers:
            spec = registry.spec(name)
            why = suite.missing or scoring.unavailable(spec, assets)
            if why is None and spec.needs_reference and reference is None:
                why = f"{name} compares with a reference model's pictures; this is that model, or none was named"
                compares = True
            if why is not None:
                result.not_measured[name] = why
                continue
            units = scoring.units(
                spec,
                asked(spec, suites.pictures(suite, params.seed)),
                images / suite.name,
                None if reference is None else reference / suite.name,
                rows / suite.name / name,
                params.eval.scoring_batch_size,
            )
            told = partial(progress.pictures, f"{suite.name} {name}")
            try:
                table, cost = scoring.run(units, judges, told)
            except MissingAsset as error:
                result.not_measured[name] = scoring.cause(error)
                continue
            result.tables[name] = table
            if cost is not None:
                result.seconds_a_picture[name] = cost
            _measure(result, spec, table, assets, noise.derive_seed(params.seed, aggregate.DRAWS))
    if not any(result.tables for result in results) and not (is_reference and compares):
        reasons = "; ".join(why for result in results for why in result.not_measured.values())
        raise EvaluationError(f"no scorer of any suite can be loaded: {reasons}")
    return results


def asked(spec: ScorerSpec, pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures whose prompts are of a kind that the scorer measures; raises EvaluationError if there are none."""
    kinds = {kind for measure in spec.measures for kind in measure.kinds}
    all_kinds = bool(spec.set_measures) or any(not measure.kinds for measure in spec.measures)
    found = [picture for picture in pictures if all_kinds or picture.prompt.kind in kinds]
    if not found:
        raise EvaluationError(
            f"{spec.name} measures prompts of the kinds {', '.join(sorted(kinds))}; the suite has none"
        )
    return found


def _measure(result: SuiteResult, spec: ScorerSpec, table: pd.DataFrame, assets: Mapping[str, str], seed: int) -> None:
    counted = applicable(spec, table)
    for measure in spec.measures:
        if measure not in counted:
            result.not_measured[measure.name] = f"no prompt of suite {result.suite.name} counts for {measure.name}"
            continue
        prompts = prompt_table(table, measure)
        result.values[measure.name] = aggregate.estimate(prompts, measure, seed)
        if measure.by_kind:
            result.kinds[measure.name] = aggregate.by_kind(prompts, measure, seed)
    for distance in spec.set_measures:
        result.values[distance.name] = aggregate.set_estimate(
            features(table, distance.column), list(table["id"]), reference_features(distance, assets), distance
        )


def applicable(spec: ScorerSpec, table: pd.DataFrame) -> list[Measure]:
    """The measures that these rows have something for: a part of DPG's prompts may have no question of a category."""
    found = []
    for measure in spec.measures:
        own = table[table["kind"].isin(measure.kinds)] if measure.kinds else table
        if len(own) and (measure.weight is None or own[measure.weight].sum() > 0):
            found.append(measure)
    return found


def prompt_table(table: pd.DataFrame, measure: Measure) -> pd.DataFrame:
    """A row a prompt with what a measure needs, of the kinds that it counts."""
    own = table[table["kind"].isin(measure.kinds)] if measure.kinds else table
    return aggregate.by_prompt(own, [measure.column] + ([measure.weight] if measure.weight else []))


def features(table: pd.DataFrame, column: str) -> np.ndarray:
    """[pictures, D]."""
    return np.stack([np.asarray(row, np.float64) for row in table[column]])


def reference_features(measure: SetMeasure, assets: Mapping[str, str]) -> np.ndarray:
    """[N, D] of the pictures that the distance is taken to."""
    return load_file(Path(assets[measure.asset]) / measure.file)["features"].astype(np.float64)


def best_and_worst(result: SuiteResult, folder: Path, pictures: Sequence[Picture]) -> Image.Image:
    """The pictures of the best and of the worst prompts by the suite's first measure, in two rows."""
    files = {picture.prompt.id: folder / picture.file for picture in reversed(pictures)}
    rows = result.by_prompt()
    spec = registry.spec(next(iter(result.tables))) if result.tables else None
    if spec is not None and spec.measures:
        column = f"{spec.name}.{spec.measures[0].column}"
        rows = rows.sort_values(column, ascending=not spec.measures[0].rising, kind="stable")
    ids = list(rows["id"])
    count = min(8, len(ids) // 2 or 1)
    lines = [np.concatenate([_pixels(files[i]) for i in part], axis=1) for part in (ids[:count], ids[-count:])]
    return Image.fromarray(np.concatenate(lines, axis=0))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(scoring.read_picture(path))
