"""From the driver: starts the workers of a training stage on Ray Train, and passes on what they write."""

from __future__ import annotations

import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train.torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from moe_core.config import ComputeConfig
from tasks import training
from tasks.phase import METRICS, NOTES, MetricsTail, Phase, take_failure

POLL_SECONDS = 0.5

Watcher = Callable[[Phase, list[dict[str, Any]]], None]


def train(phases: Sequence[Phase], folder: Path, compute: ComputeConfig, seed: int, watch: Watcher) -> None:
    """Runs the phases to their end; their products then stand in `folder/<phase>/product`.

    - `watch(phase, records)` is called with new records of metrics.jsonl, from another thread, while the workers train.
    - A crashed worker is restarted by Ray, at most `compute.max_failures` times, and goes on from the last checkpoint.

    Raises what a worker raised of this project's errors, or Ray's TrainingFailedError.
    """
    take_failure(folder)
    tail = _Tail(phases, folder, watch)
    tail.start()
    try:
        if compute.num_workers == 0:
            training.run(list(phases), folder, training.torch.device("cpu"), compute.cpus_per_worker, seed)
        else:
            _fit(list(phases), folder, compute, seed)
    except TrainingFailedError as error:
        if failure := take_failure(folder):
            raise failure from error
        raise
    finally:
        tail.stop()


def _fit(phases: list[Phase], folder: Path, compute: ComputeConfig, seed: int) -> None:
    resources = {"CPU": float(compute.cpus_per_worker)} | ({"GPU": 1.0} if compute.use_gpu else {})
    # Ray Train keeps its own notes of a run; ours lie in `folder`, so a run of Ray's has a name that never comes again.
    storage = folder / "ray"
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "phases": phases,
            "folder": folder,
            "threads": compute.cpus_per_worker,
            "seed": seed,
        },
        scaling_config=ScalingConfig(num_workers=compute.num_workers, use_gpu=compute.use_gpu, resources_per_worker=resources),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if compute.use_gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex, storage_path=str(storage), failure_config=FailureConfig(max_failures=compute.max_failures)
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _work(config: dict[str, Any]) -> None:
    """What Ray Train calls in every worker process."""
    training.run(device=ray.train.torch.get_device(), **config)


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
