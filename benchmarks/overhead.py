"""Where a stage's time goes beyond its own work: what a training stage does before its first step and after its last, piece by piece.

    python -m benchmarks.overhead        writes benchmarks/results/overhead.json (seconds, median of three)

The pieces are timed one after the other in fresh processes on a Ray that is up already, as in a flow run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flows import processes
from flows.ray_head import RayHead

RESULTS = Path("benchmarks/results/overhead.json")
ROUNDS = 3

IN_RAY = """
import sys, time
from pathlib import Path
from moe_core.config import ComputeConfig
from tasks import cluster
compute = ComputeConfig(num_workers=1, cpus_per_worker=1, checkpoint_every=1, log_every=1)
began = time.monotonic()
from tasks import launch
loaded = time.monotonic()
with cluster.connect("overhead", compute):
    joined = time.monotonic()
    launch.workers(sys.argv[1], {}, Path(sys.argv[2]), compute)
    worked = time.monotonic()
print("TIMES", loaded - began, joined - loaded, worked - joined)
"""

MLFLOW = """
import time
from mlflow import MlflowClient
client = MlflowClient()
experiment = client.create_experiment("first")
began = time.monotonic()
run = client.create_run(experiment)
client.log_batch(run.info.run_id, [])
client.set_terminated(run.info.run_id)
print("TIMES", time.monotonic() - began)
"""


def nothing(device: torch.device, threads: int) -> None:
    """In a worker: no work at all."""


def imports(device: torch.device, threads: int) -> None:
    """In a worker: what every distillation imports."""
    import tasks.kd_trainee  # noqa: F401


def timed(code: str, *arguments: str, env: dict[str, str]) -> tuple[float, list[float]]:
    """Wall seconds of a process that runs `code`, and the times that it printed itself."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line.startswith("TIMES")]
    return time.monotonic() - began, [float(value) for line in told for value in line.split()[1:]]


def one_round(env: dict[str, str], folder: str) -> dict[str, float]:
    """Each piece once."""
    alone, _ = timed("import tasks.moe_kd, tasks.fingerprint, tasks.tracking", env=env)
    tracking, _ = timed("pass", env=env)
    _, [mlflow] = timed(MLFLOW, env={**env, "MLFLOW_TRACKING_URI": f"sqlite:///{tempfile.mkdtemp(dir=folder)}/m.db"})
    _, [launch, join, empty] = timed(IN_RAY, "benchmarks.overhead:nothing", folder, env=env)
    _, [_, _, loaded] = timed(IN_RAY, "benchmarks.overhead:imports", folder, env=env)
    return {
        "driver: Python and imports": alone - tracking,
        "driver: MLflow run": mlflow,
        "driver: torch and Ray Train": launch,
        "driver: join Ray": join,
        "Ray Train: start and end of a group of one worker that does nothing": empty,
        "worker: imports of diffusers and the stage": loaded - empty,
    }


def main() -> None:
    """Starts a Ray, times three rounds, writes medians."""
    with tempfile.TemporaryDirectory(prefix="d2m-overhead-") as folder:
        head = RayHead(Path(folder) / "state", code=Path.cwd())
        head.wait(head.start())
        try:
            env = processes.inherit(head.environment()) | {"PYTHONPATH": os.getcwd()}
            rounds = [one_round(env, folder) for _ in range(ROUNDS)]
        finally:
            head.stop()
    seconds: dict[str, Any] = {name: round(statistics.median(times[name] for times in rounds), 2) for name in rounds[0]}
    seconds["sum"] = round(sum(seconds.values()), 2)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(seconds, indent=2) + "\n")
    print(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()
