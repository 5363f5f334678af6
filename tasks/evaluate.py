"""Stage `evaluate@MODEL`: every suite's scorers over the pictures of one model, and what their rows come to."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_core.metrics import fidelity
from tasks import judgement, measures, outs, scoring, suites
from tasks.judgement import Judgement
from tasks.places import DENSE, EVALUATIONS, IMAGES, INSPECTIONS
from tasks.stage import Stage, execute, workers

SHOWN = 5
"""Best and worst prompts that MLflow lists."""


def evaluate(name: str, stage: Stage) -> None:
    """Writes data/evaluations/<model>.json and, in data/evaluations/<model>/, a row a prompt and a row a picture of each suite."""
    assert stage.resume is not None
    params, root = stage.params, stage.root
    found = suites.read(root, params.eval)
    assets = scoring.assets_of(params.eval.models, root)
    ray = contextlib.nullcontext() if params.compute.num_workers == 0 else stage.ray()
    with ray, scoring.judges(assets, params.compute) as judges:
        results = measures.score_suites(
            found,
            params,
            images=root / IMAGES / name,
            reference=None if name == DENSE else root / IMAGES / DENSE,
            rows=stage.resume.path / "rows",
            assets=assets,
            judges=judges,
            progress=stage.progress,
            is_reference=name == DENSE,
        )
    own = found[0]
    pictures = suites.pictures(own, params.seed)
    images = _stack(root / IMAGES / name / own.name, pictures)
    judged = judgement.judge(root, params, [dict(prompt.record) for prompt in own.prompts], images)
    with outs.folder(root / EVALUATIONS / name) as out:
        for result in results:
            result.write(out)
        _list_pictures(out / "pictures.jsonl", own, pictures, judged)
    dense = name == DENSE
    distance = 0.0 if dense else fidelity.mean_distance(images, _stack(root / IMAGES / DENSE / own.name, pictures))
    report = {
        "model": name,
        "prompts": len(own.prompts),
        "nfe": params.model.num_inference_steps,
        "judged": None if judged is None else judged.as_dict(),
        "teacher_distance": distance,
        **{key: value for key, value in _inspection(root, name).items() if key != "model"},
        "suites": {result.suite.name: result.as_dict() for result in results},
    }
    outs.write_json(root / EVALUATIONS / f"{name}.json", report)
    stage.summary(
        ({} if judged is None else judged.summary())
        | {key: report[key] for key in ("teacher_distance", "kd_loss", "flops")}
        | {f"params_{key}": report["params"][key] for key in ("total", "activated", "activated_paper")}
        | {f"{r.suite.name}_{measure}": value.value for r in results for measure, value in r.values.items()}
    )
    for result in results:
        stage.run.metrics(
            {f"{result.suite.name}/{scorer}_seconds_a_picture": s for scorer, s in result.seconds_a_picture.items()}
        )
        if not (extremes := result.extremes(SHOWN)).empty:
            stage.run.table(f"{result.suite.name}_prompts.json", extremes)
        if result.tables:
            shown = measures.best_and_worst(
                result, root / IMAGES / name / result.suite.name, suites.pictures(result.suite, params.seed)
            )
            stage.run.image(f"{result.suite.name}_pictures.png", shown)


def _stack(folder: Path, pictures: list[suites.Picture]) -> np.ndarray:
    return np.stack([np.asarray(scoring.read_picture(folder / picture.file)) for picture in pictures])


def _inspection(root: Path, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / INSPECTIONS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def _list_pictures(path: Path, own: suites.Suite, pictures: list[suites.Picture], judged: Judgement | None) -> None:
    """What the report's gallery shows."""
    lines = [
        {
            "index": number,
            "file": f"{own.name}/{picture.file}",
            "tag": picture.prompt.kind,
            "prompt": picture.prompt.text,
            "correct": None if judged is None else judged.correct[number],
        }
        for number, picture in enumerate(pictures)
    ]
    outs.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    execute(f"evaluate@{sys.argv[1]}", partial(evaluate, sys.argv[1]), resumable=True, joins=workers)
