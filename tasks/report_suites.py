"""The benchmarks' tables of the report: each measure with its interval for every model, differences to the teacher, and what a metric can see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moe_core.config import Params
from moe_core.errors import DataError
from moe_core.metrics import corruption, registry
from moe_core.metrics.aggregate import Estimated
from tasks import comparison, scoring
from tasks.places import DENSE, EVALUATIONS
from tasks.sanity import worse_steps

TITLES = {
    "exact": "Exactly as asked",
    "scene_geneval": "GenEval's rule",
    "scene_fid": "FID",
    "scene_kid": "KID",
    "psnr": "PSNR to the teacher, dB",
    "ssim": "SSIM to the teacher",
    "feature_distance": "Feature distance to the teacher",
    "rmse": "RMSE to the teacher",
    "clip_score": "CLIP score",
}
"""Of measures whose names are no words."""


class Record(BaseModel):
    """A part of an input file. Keys that the report does not show may be there."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Value(Record):
    """A measure with its interval, and of each kind of prompt, where it tells them."""

    value: float
    low: float
    high: float
    count: int
    by_kind: dict[str, Value] = {}


class SuiteValues(Record):
    """What one suite came to for one model."""

    prompts: int
    measures: dict[str, Value]
    not_measured: dict[str, str]


class SeenMeasure(Record):
    """A measure at each level of each corruption."""

    rising: bool
    blind_to_swap: str | None
    blur: list[float]
    noise: list[float]
    swap: list[float]


@dataclass(frozen=True)
class Cell:
    """One measure of one model; `less` is the difference to the teacher's, on the same prompts."""

    own: Estimated
    less: Estimated | None

    @property
    def apart(self) -> str:
        """Whether the paired interval lies on one side of 0."""
        if self.less is None:
            return ""
        return "apart" if self.less.low > 0 or self.less.high < 0 else "not told apart"


@dataclass(frozen=True)
class SuiteTable:
    """One suite. `rows[measure][model]`; `not_measured[scorer]` says why."""

    name: str
    prompts: int
    images_per_prompt: int
    rows: dict[str, dict[str, Cell | None]]
    titles: dict[str, str]
    rising: dict[str, bool]
    not_measured: dict[str, str]


@dataclass(frozen=True)
class Sight:
    """One measure under one kind of corruption, level by level."""

    title: str
    rising: bool
    kind: str
    values: list[float]
    verdict: str


def tables(root: Path, params: Params, told: Mapping[str, Mapping[str, SuiteValues]]) -> list[SuiteTable]:
    """A table a suite, of what each model's evaluation says of its suites. Raises DataError for one that says nothing of a suite."""
    assets, models = scoring.assets_of(params.eval.models, root), tuple(told)
    found = []
    for name, suite in params.eval.suites.items():
        if without := [model for model in models if name not in told[model]]:
            raise DataError(
                f"data/evaluations/{without[0]}.json has no suite {name}; `dvc repro evaluate@{without[0]}` makes it"
            )
        rows: dict[str, dict[str, Cell | None]] = {}
        less: dict[str, dict[str, Estimated]] = {}
        if told[DENSE][name].measures:
            teacher = root / EVALUATIONS / DENSE
            less = {
                model: comparison.differences(
                    name, suite.scorers, root / EVALUATIONS / model, teacher, assets, params.seed
                )
                for model in models
                if model != DENSE
            }
        missing: dict[str, str] = {}
        titles: dict[str, str] = {}
        rising = {measure: up for scorer in suite.scorers for measure, up in _measures(scorer).items()}
        for scorer in suite.scorers:
            for measure in _measures(scorer):
                cells = {m: _cell(told[m][name].measures.get(measure), less.get(m, {}).get(measure)) for m in models}
                if not any(cells.values()):
                    continue
                rows[measure] = cells
                titles[measure] = TITLES.get(measure, measure)
                for kind, values in _kinds(measure, [told[m][name] for m in models]).items():
                    rows[kind] = {m: _cell(value, None) for m, value in zip(models, values, strict=True)}
                    titles[kind] = f"· {kind.partition(': ')[2].replace('_', ' ')}"
                    rising[kind] = rising[measure]
            if all(scorer in told[m][name].not_measured for m in models):
                missing[scorer] = told[models[-1]][name].not_measured[scorer]
        found.append(
            SuiteTable(
                name,
                told[DENSE][name].prompts,
                suite.images_per_prompt,
                rows,
                titles,
                rising,
                missing,
            )
        )
    return found


def sights(measures: Mapping[str, SeenMeasure]) -> list[Sight]:
    """What every measure makes of pictures that get worse: a row a measure and kind."""
    found = []
    for name, told in measures.items():
        for kind in corruption.KINDS:
            values: list[float] = getattr(told, kind)
            steps, of = worse_steps(values, told.rising), len(values) - 1
            verdict = f"{steps} of {of} steps worse"
            if kind == "swap" and told.blind_to_swap:
                verdict = told.blind_to_swap
            found.append(Sight(TITLES.get(name, name), told.rising, kind, values, verdict))
    return found


def _kinds(measure: str, told: Sequence[SuiteValues]) -> dict[str, list[Value | None]]:
    """A measure of each kind of prompt alone, by model; none where it knows one kind only."""
    of_models = [values.measures[measure].by_kind if measure in values.measures else {} for values in told]
    kinds = list(dict.fromkeys(kind for of_model in of_models for kind in of_model))
    if len(kinds) < 2:
        return {}
    return {f"{measure}: {kind}": [of_model.get(kind) for of_model in of_models] for kind in kinds}


def _measures(scorer: str) -> dict[str, bool]:
    """Name of each measure of a scorer -> whether more is better."""
    spec = registry.spec(scorer)
    return {m.name: m.rising for m in spec.measures} | {m.name: m.rising for m in spec.set_measures}


def _cell(own: Value | None, less: Estimated | None) -> Cell | None:
    return None if own is None else Cell(Estimated(own.value, own.low, own.high, own.count), less)
