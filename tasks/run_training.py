"""A stage's training, from the driver: starts the loop in the workers, passes on what rank 0 writes, and leaves the curves."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_core.config import ComputeConfig, OptimizerConfig
from tasks import curves
from tasks.curves import Curve, Point
from tasks.phase import METRICS, NOTES, PRODUCT, MetricsTail, Phase
from tasks.places import CURVES
from tasks.stage import Stage

POLL_SECONDS = 0.5

Watcher = Callable[[Phase, list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Trained:
    """What came of it: the product folder of the last phase (inside the resume folder), and phase -> curve."""

    product: Path
    points: dict[str, list[Point]]


def train_stage(stage: Stage, phases: Sequence[tuple[str, str, dict[str, Any], OptimizerConfig, int]]) -> Trained:
    """Trains phases, each (name, builder, arguments, optimizer, validate_every), in Ray workers; goes on from where a killed run was.

    The last phase's curve is logged and written under the stage's name, an earlier one's with the phase's name added.
    """
    assert stage.resume is not None
    compute, folder = stage.params.compute, stage.resume.path
    jobs = [Phase(*phase, log_every=compute.log_every, checkpoint_every=compute.checkpoint_every) for phase in phases]
    prefixes = {job.name: "" if job is jobs[-1] else f"{job.name}/" for job in jobs}
    # A resumed run goes on where the killed attempt stopped logging; what lies between is the same, bit for bit.
    logged = {
        job.name: {s: stage.run.last_step(f"{prefixes[job.name]}{s}/") for s in ("train", "validation")} for job in jobs
    }
    drawn = {job.name: Curve(job.optimizer.steps) for job in jobs}

    def watch(job: Phase, records: list[dict[str, Any]]) -> None:
        points = [p for p in drawn[job.name].add(records) if p.step > logged[job.name][p.split]]
        stage.run.points(points, prefixes[job.name])
        if trained := [r for r in records if r["split"] == "train"]:
            stage.progress.update(job.name, trained[-1]["step"], job.optimizer.steps, trained[-1]["loss"])

    with contextlib.nullcontext() if compute.num_workers == 0 else stage.ray("tasks.launch"):
        train(jobs, folder, compute, stage.params.seed, watch)
    stage.run.tag({"work_seconds": f"{sum(_work_seconds(folder / job.name / METRICS) for job in jobs):.1f}"})
    points = {job.name: curves.read(folder / job.name / METRICS, job.optimizer.steps) for job in jobs}
    for job in jobs:
        suffix = "" if job is jobs[-1] else f"-{job.name}"
        curves.write(stage.root / CURVES / f"{stage.file_name}{suffix}.csv", points[job.name])
    return Trained(folder / jobs[-1].name / PRODUCT, points)


def _work_seconds(metrics: Path) -> float:
    """What rank 0's steps and validations took, of all attempts; what a stage takes beyond that is its overhead."""
    return sum(json.loads(line)["seconds"] for line in metrics.read_text().splitlines())


def train(phases: Sequence[Phase], folder: Path, compute: ComputeConfig, seed: int, watch: Watcher) -> None:
    """Runs the phases to their end; their products then stand in `folder/<phase>/product`.

    `watch(phase, records)` is called with new records of metrics.jsonl, from another thread, while the workers train.
    """
    # Ray Train brings torch: not before the parameters are checked.
    from tasks import launch

    tail = _Tail(phases, folder, watch)
    tail.start()
    try:
        launch.workers("tasks.training:run", {"phases": list(phases), "folder": folder, "seed": seed}, folder, compute)
    finally:
        tail.stop()


class _Tail(threading.Thread):
    """Reads what rank 0 writes, until told to stop; then once more."""

    def __init__(self, phases: Sequence[Phase], folder: Path, watch: Watcher) -> None:
        super().__init__(name="metrics-tail", daemon=True)
        self._files = [(p, MetricsTail(folder / p.name / METRICS)) for p in phases]
        self._notes = folder / NOTES
        self._notes_read = self._notes.stat().st_size if self._notes.exists() else 0
        self._watch = watch
        self._over = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if self._error is None:
                try:
                    self._pass_on()
                except Exception as error:  # noqa: BLE001 - raised in `stop`, once the training is over: its work stays
                    self._error = error

    def stop(self) -> None:
        """Ends the thread and passes on the rest; raises what went wrong in it."""
        self._over.set()
        self.join()
        if self._error is not None:
            raise self._error
        self._pass_on()

    def _pass_on(self) -> None:
        if self._notes.exists():
            with self._notes.open(encoding="utf-8") as file:
                file.seek(self._notes_read)
                sys.stderr.write(file.read())
                self._notes_read = file.tell()
        for phase, tail in self._files:
            if records := list(tail.read()):
                self._watch(phase, records)
