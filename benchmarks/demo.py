"""Wall time, memory and overhead of the demo and of a run in which nothing changes.

    python -m benchmarks.demo            both, on this checkout; writes benchmarks/results/demo.json
    python -m benchmarks.demo --no-op    only the run in which nothing changes, on the experiment that the last demo sealed

- Memory: proportional set size (shared pages counted once) summed over the run's process tree, sampled twice a second.
- A training stage's overhead: the life of its process less its workers' steps and validations, both as it logs them. Of
  the other stages the life of the process is given. `dvc repro -s` itself adds one to two seconds to each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from flows import demo, processes
from flows.workspace import git
from tasks.tracking import connect, experiment_id

RESULTS = Path("benchmarks/results/demo.json")
SAMPLE_SECONDS = 0.5


def timed(command: list[str], extra: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command, with more environment, to its end: wall seconds and the peak memory of its process tree, GB.

    Raises CalledProcessError if it fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, env=processes.inherit(extra or {}))
    peak = 0
    over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(SAMPLE_SECONDS):
            peak = max(peak, tree_memory(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        code = process.wait()
    finally:
        over.set()
        sampler.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return {"wall_seconds": round(time.monotonic() - started, 1), "peak_memory_gb": round(peak / 1e9, 2)}


def tree_memory(pid: int) -> int:
    """Bytes that a process and all below it hold; processes that end meanwhile count as nothing."""
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def stage_times(root: Path, since: float) -> dict[str, dict[str, float]]:
    """Stage -> seconds of its process, of its training work and the difference, for stages run since then (epoch)."""
    client = connect(root)
    times: dict[str, dict[str, float]] = {}
    query = f"attributes.start_time > {int(since * 1000)}"
    for run in reversed(client.search_runs([experiment_id(client, root)], query, max_results=1000)):
        tags = run.data.tags
        if "process_seconds" in tags and "cached" not in tags:
            times[tags["stage"]] = {"process_seconds": float(tags["process_seconds"])}
            if "work_seconds" in tags:
                work = float(tags["work_seconds"])
                overhead = float(tags["process_seconds"]) - work
                times[tags["stage"]] |= {"work_seconds": work, "overhead_seconds": round(overhead, 1)}
    return times


def over_compute(wall_seconds: float, stages: dict[str, dict[str, float]]) -> dict[str, float]:
    """The run's wall time over what its training steps and validations took, and over the life of all its stages' processes.

    The second is below 1 where stages ran beside each other.
    """
    work = sum(times.get("work_seconds", 0.0) for times in stages.values())
    alive = sum(times["process_seconds"] for times in stages.values())
    return {
        "work_seconds": round(work, 1),
        "process_seconds": round(alive, 1),
        "wall_over_work": round(wall_seconds / work, 2),
        "wall_over_processes": round(wall_seconds / alive, 2),
    }


def main() -> None:
    """Runs what was asked for and writes the results beside the machine they are from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-op", action="store_true", help="only the run in which nothing changes")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["machine"] = {
        "cpu_count": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if not given.no_op:
        since = time.time()
        found["demo"] = timed([sys.executable, "-m", "flows.demo"])
        found["demo"]["stages"] = stage_times(Path.cwd(), since)
        if not any("work_seconds" in times for times in found["demo"]["stages"].values()):
            raise SystemExit("no stage was trained: this checkout has run its demo before; measure in a fresh clone")
        found["demo"]["totals"] = over_compute(found["demo"]["wall_seconds"], found["demo"]["stages"])
        keep(found)
    with demo.prefect_environment(Path.cwd()) as extra:
        command = [sys.executable, "-m", "flows.pipeline", "--commit", last_sealed(Path.cwd())]
        found["no_op_flow"] = timed(command, extra)
    found["no_op_repro"] = timed([sys.executable, "-m", "dvc", "repro"])
    keep(found)


def keep(found: dict[str, Any]) -> None:
    """Writes the results and shows them."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def last_sealed(checkout: Path) -> str:
    """Commit of the newest sealed experiment: its dvc.lock is that of a finished run."""
    form = "--format=%(objectname)"
    found = git("for-each-ref", "--sort=-creatordate", form, "refs/exps/*/*/demo-*", cwd=checkout).split()
    if not found:
        raise SystemExit("there is no sealed demo in this checkout; leave out --no-op")
    return found[0]


if __name__ == "__main__":
    main()
