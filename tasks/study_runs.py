"""Stage `study_runs@STUDY`: every arm of a study trained with every budget and seed, and measured; a queue of Ray tasks.

As many run side by side as the cluster has CPUs, or `compute.runs_per_gpu` on each GPU. A run is found again by what decides it, also after the study
got another arm: see `tasks.study_arms`.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray

from moe_core.config import ComputeConfig
from moe_core.errors import ConfigError
from tasks import outs, study_arms
from tasks.places import STUDIES
from tasks.project import main_checkout
from tasks.stage import RESUME_ROOT, Stage, execute, workers
from tasks.study_arms import Run
from tasks.tracking import flatten

NOT_OF_A_RUN = ("tasks/study_runs.py", "moe_core/config/studies.py")
"""Dependencies of the stage that decide nothing in a run: the queue, and what makes its parameters, which it has."""
HOME = "study_runs"
"""Where runs have their folders, in the folder of resume folders."""


def study_runs(name: str, stage: Stage) -> None:
    """Writes data/studies/<name>/: a file a run."""
    if name not in stage.params.studies:
        raise ConfigError(f"study is {name}; studies has {', '.join(stage.params.studies) or 'none'}")
    study = stage.params.studies[name]
    deps = {path: md5 for path, md5 in stage.identity.deps.items() if path not in NOT_OF_A_RUN}
    runs = study_arms.runs(stage.params, study, deps)
    home = main_checkout(stage.root) / RESUME_ROOT / HOME
    with _alone(home):
        with stage.ray("tasks.study_arms"):
            results = _queue(stage, runs, home, study.prompts)
        with outs.folder(stage.root / STUDIES / name) as folder:
            for run in runs:
                outs.write_json(folder / f"{run.name}.json", results[run.name])
        for run in runs:
            study_arms.lighten(home / run.fingerprint)
    stage.summary({"runs": len(runs), "steps": sum(study_arms.stage_config(run).optimizer.steps for run in runs)})


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Studies of all worktrees share the folder of runs; one of them at a time uses it."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _queue(stage: Stage, runs: list[Run], home: Path, prompts: int) -> dict[str, dict[str, Any]]:
    """Makes all runs; returns their results by name. MLflow gets each as it ends."""
    compute = stage.params.compute
    task = ray.remote(study_arms.work).options(
        num_cpus=compute.cpus_per_worker,
        num_gpus=1 / compute.runs_per_gpu if compute.use_gpu else 0,
        max_retries=compute.max_failures,
    )
    missing = [run for run in runs if study_arms.finished(home / run.fingerprint) is None]
    started = {run.after[0] for run in missing if run.after}
    # A start may itself have been made from another one.
    for run in reversed(runs):
        if run.fingerprint in started and run.after:
            started.add(run.after[0])
    # A resumed stage goes on in its MLflow run, which has some of them.
    logged = stage.run.children()
    results: dict[str, dict[str, Any]] = {}
    todo, running, done = list(runs), dict[Any, Run](), set[str]()
    while todo or running:
        # Not all at once: Ray would run what waits for another one last, whatever its budget.
        for run in list(todo):
            if len(running) >= _slots(compute):
                break
            # One that equals another is read when that one is there.
            if (run.after and run.after[0] not in done) or run.fingerprint in {
                other.fingerprint for other in running.values()
            }:
                continue
            todo.remove(run)
            running[task.remote(stage.root, home, stage.params, prompts, run, run.fingerprint in started)] = run
        [future], _ = ray.wait(list(running), num_returns=1)
        run, made = running.pop(future), ray.get(future)
        done.add(run.fingerprint)
        if run.name not in logged:
            _log(stage, run, made, new=run in missing)
        # It may have been made as another study's, under other names.
        results[run.name] = made["result"] | {"arm": run.arm, "budget": run.budget}
        stage.progress.update("runs", len(results), len(runs), made["result"]["measures"]["kd_loss"])
    return results


def _slots(compute: ComputeConfig) -> int:
    """How many runs the cluster has room for."""
    there = ray.cluster_resources()
    room = there["CPU"] / compute.cpus_per_worker
    return max(1, int(min(room, there.get("GPU", 0) * compute.runs_per_gpu) if compute.use_gpu else room))


def _log(stage: Stage, run: Run, made: dict[str, Any], new: bool) -> None:
    """One MLflow run below the stage's."""
    result = made["result"]
    changed = {"arm": run.arm, "budget": run.budget, "seed": run.seed, "steps": run.total_steps}
    config = {
        run.stage: study_arms.stage_config(run).model_dump(mode="json"),
        "moe": run.params.moe.model_dump(mode="json"),
    }
    tags = {
        "stage": f"{stage.name}/{run.name}",
        "study": stage.name.partition("@")[2],
        "run_fingerprint": run.fingerprint,
        "new": str(new).lower(),
    }
    stage.run.child(
        run.name,
        tags,
        changed | flatten(config),
        {
            **result["measures"],
            **{f"accuracy_{kind}": value for kind, value in (result["accuracy_by_kind"] or {}).items()},
        },
        {"validation/distill": result["curve"]},
        made["seconds"],
    )


if __name__ == "__main__":
    execute(f"study_runs@{sys.argv[1]}", partial(study_runs, sys.argv[1]), resumable=True, joins=workers)
