"""The benchmarks' tables of the report: each measure with its interval for every model, differences to the teacher, and what a metric can see."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_core.config import Params
from moe_core.metrics import corruption, registry
from moe_core.metrics.aggregate import Estimated
from tasks import comparison, scoring
from tasks.places import DENSE, EVALUATIONS, SANITY
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


def tables(root: Path, params: Params, models: tuple[str, ...]) -> list[SuiteTable]:
    """A table a suite."""
    assets = scoring.assets_of(params.eval.models, root)
    told = {m: json.loads((root / EVALUATIONS / f"{m}.json").read_text(encoding="utf-8"))["suites"] for m in models}
    found = []
    for name, suite in params.eval.suites.items():
        rows: dict[str, dict[str, Cell | None]] = {}
        less: dict[str, dict[str, Estimated]] = {}
        if told[DENSE][name]["measures"]:
            teacher = root / EVALUATIONS / DENSE
            less = {
                model: comparison.differences(
                    name, suite.scorers, root / EVALUATIONS / model, teacher, assets, params.seed
                )
                for model in models
                if model != DENSE
            }
        missing: dict[str, str] = {}
        for scorer in suite.scorers:
            for measure in _measures(scorer):
                cells = {m: _cell(told[m][name]["measures"].get(measure), less.get(m, {}).get(measure)) for m in models}
                if any(cells.values()):
                    rows[measure] = cells
            if all(scorer in told[m][name]["not_measured"] for m in models):
                missing[scorer] = told[models[-1]][name]["not_measured"][scorer]
        found.append(
            SuiteTable(
                name,
                told[DENSE][name]["prompts"],
                suite.images_per_prompt,
                rows,
                {measure: TITLES.get(measure, measure) for measure in rows},
                {measure: rising for scorer in suite.scorers for measure, rising in _measures(scorer).items()},
                missing,
            )
        )
    return found


def sights(root: Path) -> list[Sight]:
    """What every measure makes of pictures that get worse: a row a measure and kind."""
    found = []
    for name, told in json.loads((root / SANITY).read_text(encoding="utf-8"))["measures"].items():
        for kind in corruption.KINDS:
            values: list[float] = told[kind]
            steps, of = worse_steps(values, told["rising"]), len(values) - 1
            verdict = f"{steps} of {of} steps worse"
            if kind == "swap" and told["blind_to_swap"]:
                verdict = told["blind_to_swap"]
            found.append(Sight(TITLES.get(name, name), told["rising"], kind, values, verdict))
    return found


def _measures(scorer: str) -> dict[str, bool]:
    """Name of each measure of a scorer -> whether more is better."""
    spec = registry.spec(scorer)
    return {m.name: m.rising for m in spec.measures} | {m.name: m.rising for m in spec.set_measures}


def _cell(own: dict[str, Any] | None, less: Estimated | None) -> Cell | None:
    if own is None:
        return None
    return Cell(Estimated(own["value"], own["low"], own["high"], own["count"]), less)
