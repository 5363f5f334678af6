"""`dense2moe evaluate`: the suites of `eval` on any diffusers text-to-image pipeline, a folder or a hub id, outside the DAG.

    dense2moe evaluate PIPELINE [--out FOLDER] [--against MODEL] [KEY=VALUE ...]

- Parameters are those of params/, composed with the overrides; how the pipeline is called is `model.resolution`, `model.num_inference_steps`
  and so on, as far as its call takes them.
- Pictures and rows stay in the folder: run again, it goes on where it was. Of another pipeline, other parameters or prompts they are refused
  (`tasks.foreign_claim`).
- `--against` compares with an evaluated model of this checkout (data/evaluations/MODEL), prompt by prompt from the same seeds.
- What this run measured of time is in `costs.json`, so that `result.json` is the same for equal runs.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from moe_core import folders
from moe_core.config import Params
from moe_core.errors import ConfigError, Dense2MoEError, EvaluationError
from tasks import (
    cluster,
    comparison,
    foreign_claim,
    generate,
    generation,
    measures,
    outs,
    scoring,
    suite_prompts,
    suites,
)
from tasks.foreign_claim import Reference, comparing
from tasks.measures import SuiteResult
from tasks.params import compose
from tasks.places import PROMPTS
from tasks.progress import Progress, Told
from tasks.project import validated
from tasks.suites import Suite

RESULT, COSTS = "result.json", "costs.json"


def evaluate(root: Path, place: str, out: Path, params: Params, against: str | None) -> dict[str, Any]:
    """Makes the pictures, scores them, and writes `result.json` and tables into `out`; returns the result.

    Raises ConfigError, before any picture is made, where `out` is of something else or `against` cannot be compared with.
    """
    # Workers run elsewhere.
    out, folder = out.resolve(), folders.meant(place, Path.cwd())
    if folder is not None and not folder.exists():
        raise ConfigError(f"{place} is no folder here, and a hub id has the form owner/name")
    place = str(folder or place)
    source = replace(generate.source_of(root, params, None), place=place)
    foreign_claim.claim_folder(out, source, params)
    if not (root / PROMPTS).is_file():
        raise ConfigError(f"{root / PROMPTS} is missing; `dvc repro source` makes the prompts of the first suite")
    # Not into data/suites, which is an out of the DAG.
    suite_prompts.collect(root, params, out / "suites")
    found = suites.read(root, params.eval, out / "suites")
    foreign_claim.claim_prompts(out, found)
    reference = None if against is None else foreign_claim.reference_of(root, against, found, params.seed)
    progress, size = Progress("evaluate"), params.eval.batch_size
    work = [
        unit
        for suite in found
        for unit in generation.units(out / "images" / suite.name, suites.pictures(suite, params.seed), size)
    ]
    assets = scoring.assets_of(params.eval.models, root)
    with contextlib.ExitStack() as stack:
        if params.compute.num_workers:
            stack.enter_context(cluster.connect("evaluate", params.compute))
        costs = _made(work, partial(generation.make, source, work, params.compute), progress)
        outs.write_json(out / COSTS, costs)
        apart = {} if reference is None else foreign_claim.not_alike(reference, found, out / "images")
        alike = [_without(suite, apart) for suite in found]
        if not any(suite.config.scorers for suite in alike):
            raise EvaluationError(f"every scorer compares, and nothing can be compared: {'; '.join(apart.values())}")
        foreign_claim.renew_rows(out, alike, assets, None if reference is None else reference.images)
        there = set((out / "rows").rglob("*.parquet"))
        judges = stack.enter_context(scoring.judges(assets, params.compute))
        results = measures.score_suites(
            alike,
            params,
            images=out / "images",
            reference=None if reference is None else reference.images,
            rows=out / "rows",
            assets=assets,
            judges=judges,
            progress=progress,
        )
    progress.close()
    outs.write_json(out / COSTS, costs | {"suites": _scored(results, out / "rows", there)})
    for suite, result in zip(found, results):
        result.suite = suite
        result.not_measured |= dict.fromkeys(comparing(suite), apart[suite.name]) if suite.name in apart else {}
        result.write(out)
    told = {"pipeline": place, "suites": {result.suite.name: result.as_dict() for result in results}}
    if reference is None:
        outs.write_json(out / RESULT, told)
        return told
    told["against"] = reference.name
    # The pictures' worth of hours is kept, whatever becomes of the comparison.
    outs.write_json(out / RESULT, told)
    told["differences"] = {
        result.suite.name: _differences(result, out, reference, assets, params.seed)
        for result in results
        if result.tables or result.suite.name in reference.lacking
    }
    outs.write_json(out / RESULT, told)
    return told


def _without(suite: Suite, apart: Mapping[str, str]) -> Suite:
    """The suite without scorers that compare, where there is nothing to compare its pictures with."""
    if suite.name not in apart:
        return suite
    scorers = tuple(name for name in suite.config.scorers if name not in comparing(suite))
    return replace(suite, config=suite.config.model_copy(update={"scorers": scorers}))


def _differences(
    result: SuiteResult, out: Path, reference: Reference, assets: Mapping[str, str], seed: int
) -> dict[str, Any]:
    """Measure -> difference; or `not_compared` alone, which says why."""
    suite = result.suite.name
    if suite in reference.lacking:
        return {"not_compared": reference.lacking[suite]}
    found = comparison.differences(suite, list(result.tables), out, reference.rows, assets, seed)
    return {name: asdict(value) for name, value in found.items()}


def _made(work: Sequence[generation.Unit], make: Callable[[Told], float], progress: Progress) -> dict[str, Any]:
    """Makes the pictures; returns what those that were not there took."""
    made = sum(len(unit.pictures) for unit in work if not unit.is_done)
    seconds = make(partial(progress.pictures, "generate"))
    return {"generate": {"pictures": made, "seconds_a_picture": seconds / made}} if made else {}


def _scored(results: Sequence[SuiteResult], rows: Path, there: Collection[Path]) -> dict[str, Any]:
    """Suite -> scorer -> what its pictures took, of the rows that were not `there`."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        for name, seconds in result.seconds_a_picture.items():
            new = [file for file in (rows / result.suite.name / name).glob("*.parquet") if file not in there]
            own = {"pictures": sum(pq.read_metadata(file).num_rows for file in new), "seconds_a_picture": seconds}
            found.setdefault(result.suite.name, {})[name] = own
    return found


def main(arguments: list[str]) -> int:
    """Entry of `dense2moe evaluate`."""
    parser = argparse.ArgumentParser(prog="dense2moe evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("pipeline", help="folder or hub id of a diffusers text-to-image pipeline")
    parser.add_argument("--out", type=Path, help="where pictures, rows and result.json go; default evaluations/NAME")
    parser.add_argument("--against", help="a model of data/evaluations to compare with, prompt by prompt")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="as for `dvc exp run -S`: eval=paper model.num_inference_steps=28",
    )
    # Plain parsing takes no override after an option: with the first positionals, `*` has already matched none.
    given = parser.parse_intermixed_args(arguments)
    root = Path.cwd()
    try:
        text = compose(root, given.overrides) if given.overrides else (root / "params.yaml").read_text(encoding="utf-8")
        params = validated(yaml.safe_load(text), "params/")
        params = params.model_copy(update={"compute": params.compute.of("evaluate")})
        out = given.out or root / "evaluations" / Path(given.pipeline).name
        print(table(evaluate(root, given.pipeline, out, params, given.against)))
        print(f"\nrows, pictures, {RESULT} and {COSTS} (seconds a picture of this run): {out}")
    except Dense2MoEError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def table(told: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = ["| suite | measure | value | 95 % interval | difference |", "|---|---|--:|--:|--:|"]
    for suite, result in told["suites"].items():
        for name, value in result["measures"].items():
            less = told.get("differences", {}).get(suite, {}).get(name)
            apart = "" if less is None else f"{less['value']:+.4g} ({less['low']:+.4g} to {less['high']:+.4g})"
            lines.append(
                f"| {suite} | {name} | {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} | {apart} |"
            )
        if (why := told.get("differences", {}).get(suite, {}).get("not_compared")) is not None:
            lines.append(f"| {suite} | difference | not compared | {why} | |")
        lines += [f"| {suite} | {name} | not measured | {why} | |" for name, why in result["not_measured"].items()]
    return "\n".join(lines)
