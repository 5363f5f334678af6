"""`dense2moe evaluate`: the suites of `eval` on any diffusers text-to-image pipeline, a folder or a hub id, outside the DAG.

    dense2moe evaluate PIPELINE [--out FOLDER] [--against MODEL] [KEY=VALUE ...]

- Parameters are those of params/, composed with the overrides; how the pipeline is called is `model.resolution`, `model.num_inference_steps`
  and so on, as far as its call takes them.
- Pictures and rows stay in the folder: run again, it goes on where it was. Of another pipeline, other parameters or prompts they are refused.
- `--against` compares with an evaluated model of this checkout (data/evaluations/MODEL), prompt by prompt from the same seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moe_core import folders
from moe_core.config import Params
from moe_core.errors import ConfigError, Dense2MoEError
from tasks import cluster, comparison, generate, generation, measures, outs, scoring, suite_prompts, suites
from tasks.params import compose
from tasks.places import DENSE, EVALUATIONS, IMAGES, PROMPTS
from tasks.progress import Progress
from tasks.project import validated

RESULT, ASKED, ASKED_PROMPTS = "result.json", "asked.json", "prompts.json"


def evaluate(root: Path, place: str, out: Path, params: Params, against: str | None) -> dict[str, Any]:
    """Makes the pictures, scores them, and writes `result.json` and tables into `out`; returns the result."""
    # Workers run elsewhere.
    out, folder = out.resolve(), folders.meant(place, Path.cwd())
    if folder is not None and not folder.exists():
        raise ConfigError(f"{place} is no folder here, and a hub id has the form owner/name")
    place = str(folder or place)
    source = replace(generate.source_of(root, params, None), place=place)
    _claim(out, source, params)
    if not (root / PROMPTS).is_file():
        raise ConfigError(f"{root / PROMPTS} is missing; `dvc repro source` makes the prompts of the first suite")
    # Not into data/suites, which is an out of the DAG.
    suite_prompts.collect(root, params, out / "suites")
    found = suites.read(root, params.eval, out / "suites")
    _claim_prompts(out, found)
    progress, size = Progress("evaluate"), params.eval.batch_size
    work = [
        unit
        for suite in found
        for unit in generation.units(out / "images" / suite.name, suites.pictures(suite, params.seed), size)
    ]
    reference = root / IMAGES / (against or DENSE)
    assets = scoring.assets_of(params.eval.models, root)
    with contextlib.ExitStack() as stack:
        if params.compute.num_workers:
            stack.enter_context(cluster.connect("evaluate", params.compute))
        generation.make(source, work, params.compute, partial(progress.pictures, "generate"))
        judges = stack.enter_context(scoring.judges(assets, params.compute))
        results = measures.score_suites(
            found,
            params,
            images=out / "images",
            reference=reference if against is not None else None,
            rows=out / "rows",
            assets=assets,
            judges=judges,
            progress=progress,
        )
    progress.close()
    for result in results:
        result.write(out)
    told = {"pipeline": place, "suites": {result.suite.name: result.as_dict() for result in results}}
    if against is not None:
        told["against"] = against
        told["differences"] = {
            result.suite.name: {
                name: asdict(value)
                for name, value in comparison.differences(
                    result.suite.name, list(result.tables), out, root / EVALUATIONS / against, assets, params.seed
                ).items()
            }
            for result in results
            if result.tables
        }
    outs.write_json(out / RESULT, told)
    return told


def _claim(out: Path, source: Any, params: Params) -> None:
    """A folder with pictures belongs to one pipeline and one set of parameters."""
    asked = {
        "pipeline": source.place,
        "arguments": source.arguments,
        "precision": source.precision,
        "seed": params.seed,
        "eval": params.eval.model_dump(mode="json"),
    }
    file = out / ASKED
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any((out / "images").rglob("*.png")) and there != json.loads(json.dumps(asked)):
        other = next(key for key in asked if there.get(key) != json.loads(json.dumps(asked[key])))
        raise ConfigError(
            f"{out} has the evaluation of another '{other}' ({there.get(other)}); give --out another folder"
        )
    outs.write_json(file, asked)


def _claim_prompts(out: Path, found: Sequence[suites.Suite]) -> None:
    """Pictures have numbers for names: of a file of prompts that has changed since, they would be taken for the new ones'."""
    own = {suite.name: suites.fingerprint(suite) for suite in found if suite.missing is None}
    file = out / ASKED_PROMPTS
    there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if changed := [name for name in own if there.get(name, own[name]) != own[name]]:
        raise ConfigError(f"{out} has pictures of other prompts in suite {changed[0]}; give --out another folder")
    outs.write_json(file, there | own)


def main(arguments: list[str]) -> int:
    """Entry of `dense2moe evaluate`."""
    parser = argparse.ArgumentParser(prog="dense2moe evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("pipeline", help="folder or hub id of a diffusers text-to-image pipeline")
    parser.add_argument("--out", type=Path, help="where pictures, rows and result.json go; default evaluations/NAME")
    parser.add_argument("--against", help="a model of data/evaluations to compare with, prompt by prompt")
    parser.add_argument("overrides", nargs="*", help="as for `dvc exp run -S`: eval=paper model.num_inference_steps=28")
    given = parser.parse_args(arguments)
    root = Path.cwd()
    try:
        text = compose(root, given.overrides) if given.overrides else (root / "params.yaml").read_text(encoding="utf-8")
        params = validated(yaml.safe_load(text), "params/")
        params = params.model_copy(update={"compute": params.compute.of("evaluate")})
        out = given.out or root / "evaluations" / Path(given.pipeline).name
        print(table(evaluate(root, given.pipeline, out, params, given.against)))
        print(f"\nrows, pictures and {RESULT}: {out}")
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
        lines += [f"| {suite} | {name} | not measured | {why} | |" for name, why in result["not_measured"].items()]
    return "\n".join(lines)
