"""Stage `study@STUDY`: what the runs of a study say of its claims, as a table with intervals, a verdict a claim, and curves."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from moe_core.config import ClaimConfig, StudyConfig
from moe_core.config.studies import RISING
from moe_core.errors import ConfigError, DataError
from moe_core.metrics.paired import Comparison, Interval, compare, interval
from tasks import outs, study_figures
from tasks.places import STUDIES, STUDY_REPORTS
from tasks.stage import Stage, execute

TITLES = {
    "kd_loss": "KD loss",
    "teacher_distance": "distance to the teacher's pictures",
    "accuracy": "accuracy",
    "fid": "FID",
}
SCOPE = (
    "What this means: how conversions and trainings compare on this teacher, with these data, learning rates and so many steps."
    " The intervals cover what differs between trainings (order of samples, noise, routers, random splits), not what another teacher"
    " or other data would change. Arms of one seed share it, not their samples: each stage draws its own.",
    "",
    "What it does not mean: that the same holds for FLUX.1, whose FFNs have other uses for their width, or after distillations of tens of"
    " thousands of steps. Accuracy and FID are of this project's own detector and classifier.",
)
Runs = dict[tuple[str, str, int], dict[str, Any]]
"""(arm, budget, seed) -> result"""


def study(name: str, stage: Stage) -> None:
    """Writes reports/studies/<name>/: study.md, study.json, runs.csv (a line a run), a plot a budget."""
    if name not in stage.params.studies:
        raise ConfigError(f"study is {name}; studies has {', '.join(stage.params.studies) or 'none'}")
    config = stage.params.studies[name]
    runs = read_runs(stage.root / STUDIES / name, config)
    verdicts = {budget: judge(config, runs, budget) for budget in config.budgets}
    with outs.folder(stage.root / STUDY_REPORTS / name) as folder:
        plots = {f"{budget}.svg": study_figures.curves(config, runs, budget) for budget in config.budgets}
        for file, text in plots.items():
            (folder / file).write_text(text, encoding="utf-8")
        (folder / "study.md").write_text(render(config, runs, verdicts), encoding="utf-8")
        outs.write_json(folder / "study.json", _plain(verdicts))
        frame(config, runs).to_csv(folder / "runs.csv", index=False)
    counts = [
        asdict(found)["verdict"]
        for claims in verdicts.values()
        for claim in claims.values()
        for found in claim.values()
    ]
    stage.summary(
        {verdict.replace(" ", "_"): counts.count(verdict) for verdict in ("holds", "does not hold here", "undecided")}
    )


def read_runs(folder: Path, config: StudyConfig) -> Runs:
    """The results of all runs. Raises DataError for one that is not there."""
    runs: Runs = {}
    for arm in config.arms:
        for budget in config.budgets:
            for seed in config.seeds:
                file = folder / f"{arm}-{budget}-{seed}.json"
                if not file.is_file():
                    raise DataError(f"{file} does not exist; `dvc repro study_runs@{folder.name}` makes it")
                runs[arm, budget, seed] = json.loads(file.read_text())
    return runs


def frame(config: StudyConfig, runs: Runs) -> pd.DataFrame:
    """A row a run: arm, budget, seed, steps from the teacher on, active parameters, every measure, accuracy by kind of prompt."""
    rows = [
        {
            "arm": arm,
            "budget": budget,
            "seed": seed,
            "steps": config.steps(arm, budget),
            "activated": result["params"]["activated"],
            **result["measures"],
            **{f"accuracy_{kind}": value for kind, value in (result["accuracy_by_kind"] or {}).items()},
        }
        for (arm, budget, seed), result in runs.items()
    ]
    return pd.DataFrame(rows)


def values(runs: Runs, config: StudyConfig, arm: str, budget: str, measure: str) -> list[float]:
    """A measure of an arm, seed by seed. Raises ConfigError where it was not taken."""
    found = [runs[arm, budget, seed]["measures"].get(measure) for seed in config.seeds]
    if None in found:
        raise ConfigError(
            f"a claim is about {measure}, which was not measured: eval.classifier is null, and nobody judges pictures"
        )
    return found


def judge(config: StudyConfig, runs: Runs, budget: str) -> dict[str, dict[str, Comparison]]:
    """Claim -> measure -> what the runs of a budget say."""

    def one(claim: ClaimConfig, measure: str) -> Comparison:
        better, than = (values(runs, config, arm, budget, measure) for arm in (claim.better, claim.than))
        return compare(better, than, claim.ratio, measure in RISING)

    return {name: {measure: one(claim, measure) for measure in claim.measures} for name, claim in config.claims.items()}


def render(config: StudyConfig, runs: Runs, verdicts: dict[str, dict[str, dict[str, Comparison]]]) -> str:
    """The report in Markdown."""
    budgets = ", ".join(f"{name}: {steps}" for name, steps in config.budgets.items())
    lines = [
        f"# {config.title}",
        "",
        f"{len(config.seeds)} seeds, paired; steps of an arm of share 1: {budgets}; batch {config.batch_size}; {config.prompts} prompts."
        " Mean of the better arm and of the other, and their difference and ratio with 95 % intervals (Student's t over seeds)."
        " A claim holds where the whole interval says so, and does not hold here where the whole interval says the opposite."
        " Of twenty claims without an effect one would be decided by chance.",
        "",
        *SCOPE,
        "",
    ]
    if config.claims:
        rows = [_verdict_row(config, name, verdicts) for name in config.claims]
        lines += ["## Verdicts", "", "By the first measure; others that are decided otherwise are named.", ""]
        lines += _table(["claim", "source", *config.budgets], rows)
    for budget in config.budgets:
        lines += [
            "",
            f"## {budget.capitalize()}: {config.budgets[budget]} steps",
            "",
            f"![Validation KD loss along training]({budget}.svg)",
            "",
        ]
        rows = [
            [
                config.claims[name].says,
                f"{claim.better} / {claim.than}",
                str(_steps(config, claim, budget)),
                TITLES[measure],
                *_numbers(found),
            ]
            for name, claim in config.claims.items()
            for measure, found in verdicts[budget][name].items()
        ]
        if rows:
            head = ["claim", "arms", "steps", "measure", "better", "other", "difference", "ratio", "verdict"]
            lines += [*_table(head, rows), ""]
        arms = [_arm_row(config, runs, arm, budget) for arm in config.arms]
        lines += _table(["arm", "active parameters", *TITLES.values()], arms)
    return "\n".join(lines) + "\n"


def _steps(config: StudyConfig, claim: ClaimConfig, budget: str) -> str:
    steps = [config.steps(arm, budget) for arm in (claim.better, claim.than)]
    return str(steps[0]) if steps[0] == steps[1] else f"{steps[0]} / {steps[1]}"


def _verdict_row(config: StudyConfig, name: str, verdicts: dict[str, dict[str, dict[str, Comparison]]]) -> list[str]:
    claim, cells = config.claims[name], []
    for budget in config.budgets:
        (_, first), *others = verdicts[budget][name].items()
        text = f"**{first.verdict}**" if first.verdict != "undecided" else first.verdict
        told = [
            f"{TITLES[measure]}: {found.verdict}"
            for measure, found in others
            if found.verdict not in (first.verdict, "undecided")
        ]
        cells.append("; ".join([text, *told]))
    return [claim.says, claim.source, *cells]


def _numbers(found: Comparison) -> list[str]:
    return [f"{found.better:.4g}", f"{found.than:.4g}", _spread(found.difference), _spread(found.ratio), found.verdict]


def _spread(value: Interval | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value.mean:.3g} ± {value.half:.2g}"


def _arm_row(config: StudyConfig, runs: Runs, arm: str, budget: str) -> list[str]:
    first = runs[arm, budget, config.seeds[0]]
    cells = [
        _spread(interval(values(runs, config, arm, budget, m))) if m in first["measures"] else "not measured"
        for m in TITLES
    ]
    return [f"`{arm}`", f"{first['params']['activated'] / 1e3:.0f} k", *cells]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _plain(verdicts: dict[str, dict[str, dict[str, Comparison]]]) -> dict[str, Any]:
    return {
        budget: {
            name: {measure: _finite(asdict(found)) for measure, found in claim.items()}
            for name, claim in claims.items()
        }
        for budget, claims in verdicts.items()
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: of one seed there is no interval."""
    return {
        key: _finite(value) if isinstance(value, dict) else None if value == math.inf else value
        for key, value in values.items()
    }


if __name__ == "__main__":
    execute(f"study@{sys.argv[1]}", partial(study, sys.argv[1]))
