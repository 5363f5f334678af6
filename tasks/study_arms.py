"""A run of a study, in a Ray worker: an arm trained with a budget and a seed, and what came of it measured.

- The stage's own builder makes and trains the model (`tasks.<stage>:build`), in a folder that looks like a checkout: the teacher, the shards and
  the importance are links, and so is the model it goes on from, where its stage would have left it.
- The folder's name is the run's identity. A run that was killed goes on from its last checkpoint, a finished one is read, in this study or another.
- It is measured with the noise, prompts and validation samples of the experiment's own seed, which are the same for every run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_core.config import KDStageConfig, Params, StudyConfig, arm_params, parse
from moe_core.config.studies import TEMPLATES, place
from moe_core.errors import Dense2MoEError
from tasks import outs
from tasks.phase import METRICS, PRODUCT, Phase
from tasks.places import DENSE, IMAGES, IMPORTANCE, SHARDS, TEACHER

RESULT = "result.json"
PHASE = "train"
BUILDERS = {
    "shared_expert_kd": "tasks.shared_expert_kd:build",
    "moe_kd": "tasks.moe_kd:build",
    "mob_kd": "tasks.mob_kd:build",
    "baseline": "tasks.baseline:build",
}
ALONE = {"num_workers": 1, "sharding": "none", "text_encoders": "resident"}
"""Of `compute`: a run is one process, whatever the cluster is otherwise used for."""
UNUSED = ("experiment", "data", "eval", "models", "studies", "compute")
"""Sections that decide nothing in a training."""


@dataclass(frozen=True)
class Run:
    """What a worker is told of a run."""

    arm: str
    budget: str
    seed: int
    stage: str
    total_steps: int
    """from the teacher on"""
    params: Params
    """with which it trains"""
    fingerprint: str
    after: tuple[str, str] | None
    """fingerprint of the run that it goes on from, and where that one's stage would have left its model"""

    @property
    def name(self) -> str:
        """`moe-short-0`"""
        return f"{self.arm}-{self.budget}-{self.seed}"


def runs(params: Params, study: StudyConfig, deps: Mapping[str, str]) -> list[Run]:
    """All runs of a study, in the order in which they are to be made: small budgets first, and before an arm those that it goes on from.

    `deps`: hashes of the code and data that a run depends on, as DVC has them.
    """
    values = params.model_dump(mode="json")
    found: list[Run] = []
    for budget in sorted(study.budgets, key=lambda name: study.budgets[name]):
        for seed in study.seeds:
            made: dict[str, Run] = {}
            for name in study.order():
                arm = study.arms[name]
                own = parse(Params, arm_params(values, study, name, budget, seed), f"study, arm {name}")
                own = own.model_copy(update={"compute": own.compute.model_copy(update=ALONE)})
                start = made[arm.after] if arm.after else None
                made[name] = Run(
                    arm=name,
                    budget=budget,
                    seed=seed,
                    stage=arm.stage,
                    total_steps=study.steps(name, budget),
                    params=own,
                    fingerprint=_fingerprint(own, study, name, start, params, deps),
                    after=(start.fingerprint, f"data/{place(study, arm.after)}") if start else None,
                )
            found += made.values()
    return found


def _fingerprint(
    own: Params, study: StudyConfig, name: str, start: Run | None, params: Params, deps: Mapping[str, str]
) -> str:
    trained = own.model_dump(mode="json", exclude=set(UNUSED))
    # A model is measured as the experiment says.
    measured = [params.seed, study.prompts, params.eval.model_dump(mode="json"), params.data.model_dump(mode="json")]
    content = [study.arms[name].stage, trained, measured, start and start.fingerprint, dict(deps)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def finished(folder: Path) -> dict[str, Any] | None:
    """What a run came to, or None if it was not made: `result`, the same for equal runs, and `seconds`."""
    file = folder / RESULT
    return dict(json.loads(file.read_text())) if file.exists() else None


def work(root: Path, home: Path, params: Params, prompts: int, run: Run, needs_model: bool) -> dict[str, Any]:
    """Trains and measures a run, unless that was done; returns what `finished` says of it.

    root: the checkout; home: where runs have their folders; params: the experiment's; prompts: how many are drawn; needs_model: another run goes on
    from this one's. The run that this one goes on from must be finished.
    """
    folder = home / run.fingerprint
    found = finished(folder)
    if found and (not needs_model or (folder / PHASE / PRODUCT).exists()):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    links = {path: root / path for path in (TEACHER, SHARDS, IMPORTANCE)}
    if run.after:
        links[Path(run.after[1])] = home / run.after[0] / PHASE / PRODUCT
    for path, target in links.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        # A killed run's links may point into a worktree that is gone.
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target.resolve())
    try:
        seconds = _train(folder, run)
    except Dense2MoEError as error:
        raise type(error)(f"{run.name}: {error}") from error
    result = {
        "arm": run.arm,
        "budget": run.budget,
        "seed": run.seed,
        "stage": run.stage,
        "steps": run.total_steps,
        "fingerprint": run.fingerprint,
        **_measure(root, params, prompts, folder / PHASE / PRODUCT),
        "curve": _curve(folder / PHASE / METRICS),
    }
    made = {"result": result, "seconds": seconds}
    outs.write_json(folder / RESULT, made)
    return made


def stage_config(run: Run) -> KDStageConfig:
    """The section of the parameters that says how a run trains."""
    if run.stage == "baseline":
        return run.params.baselines[run.arm].kd
    return getattr(run.params.kd, TEMPLATES[run.stage])


def _train(folder: Path, run: Run) -> float:
    """Trains the run's model into its folder; returns the seconds of its steps and validations."""
    import torch

    from tasks import training

    compute, config = run.params.compute, stage_config(run)
    given: dict[str, Any] = {
        "root": str(folder),
        "params": run.params.model_dump(mode="json"),
        "made": str(folder / "student"),
    }
    given |= {"mob_kd": {"level": run.arm}, "baseline": {"name": run.arm}}.get(run.stage, {})
    phase = Phase(
        PHASE,
        BUILDERS[run.stage],
        given,
        config.optimizer,
        config.validate_every,
        compute.log_every,
        compute.checkpoint_every,
    )
    device = torch.device("cuda" if compute.use_gpu else "cpu")
    training.run([phase], folder, device, compute.cpus_per_worker, run.params.seed)
    return sum(record["seconds"] for record in _records(folder / PHASE / METRICS))


def _measure(root: Path, params: Params, prompts: int, model: Path) -> dict[str, Any]:
    """What stage `evaluate` says of a model, of its first prompts."""
    import torch

    from moe_core import pipelines
    from moe_core.metrics import fidelity
    from tasks import generate, judgement, scoring, suites
    from tasks.inspection import Inspector

    own = suites.own_suite(root, params.eval)
    pictures, size = suites.pictures(own, params.seed)[:prompts], params.eval.batch_size
    teacher = root / IMAGES / DENSE / own.name
    reference = np.stack([np.asarray(scoring.read_picture(teacher / picture.file)) for picture in pictures])
    source = generate.source_of(root, params, model)
    pipeline = pipelines.load(source, torch.device("cuda" if params.compute.use_gpu else "cpu"))
    cuts = [pictures[first : first + size] for first in range(0, len(pictures), size)]
    images = np.concatenate(
        [
            pipelines.paint(pipeline, [p.prompt.text for p in cut], [p.seed for p in cut], source.arguments or {})
            for cut in cuts
        ]
    )
    judged = judgement.judge(root, params, [dict(picture.prompt.record) for picture in pictures], images)
    inspector = Inspector(root, params, model, dense=False)
    cost = inspector.cost()
    measures = {
        "kd_loss": inspector.validation()["distill"],
        "teacher_distance": fidelity.mean_distance(images, reference),
    }
    if judged is not None:
        measures |= {"accuracy": judged.accuracy, "fid": judged.fid}
    counts = {key: cost["params"][key] for key in ("total", "activated")}
    return {
        "measures": measures,
        "accuracy_by_kind": None if judged is None else judged.accuracy_by_kind,
        "params": counts,
        "flops": cost["flops"],
    }


def _curve(metrics: Path) -> list[list[float]]:
    """[step, validation KD loss], from before training on."""
    return [[record["step"], record["distill"]] for record in _records(metrics) if record["split"] == "validation"]


def _records(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def lighten(folder: Path) -> None:
    """Leaves of a finished run what a later study reads: its result."""
    # At once, as what is half removed would be taken for a model.
    if (folder / PHASE).exists():
        (folder / PHASE).rename(folder / f".{PHASE}.gone")
    for path in folder.iterdir():
        if path.name == RESULT:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
