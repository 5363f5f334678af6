"""How long a cancelled run takes to end: from the request, as the UI's button sends it, until its last process is gone.

    python -m benchmarks.cancel          writes benchmarks/results/cancel.json

Cancelled is a run of the demo's pipeline in a checkout that has the demo's data, on the stack of `make up` (a Prefect and an
MLflow server, a shared Ray), at a moment at which two Ray workers make pictures (the batch that pictures are made in is
changed, so that all are made anew). Three such runs; fails if one takes longer than ten seconds.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil

from flows import processes
from flows.ray_head import free_port
from flows.services import DEPLOYMENT_URL, Ports, Services
from flows.workspace import workspaces

RESULTS = Path("benchmarks/results/cancel.json")
ROUNDS = 3
LIMIT_S = 10.0
PATIENCE_S = 300.0
ACTOR = "ray::Painter"
"""Title of a process that makes pictures."""


def until(done: Callable[[], bool], what: str) -> None:
    """Waits; raises SystemExit if it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.05)


def below(records: Iterable[Path]) -> dict[int, psutil.Process]:
    """Every process on record and what descends from it, by id."""
    found = {process.pid: process for process in processes.members(records)}
    for process in list(found.values()):
        try:
            found |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return found


def actors(found: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that make pictures."""
    made = []
    for process in found:
        try:
            if ACTOR in " ".join(process.cmdline()):
                made.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return made


def one_round(services: Services, batch_size: int) -> dict[str, float]:
    """Triggers a run, cancels it in its midst, and waits for its end."""
    api, checkout = services.prefect_api, services.checkout
    deployment = httpx.get(f"{api}{DEPLOYMENT_URL}", timeout=30).raise_for_status().json()["id"]
    given: dict[str, Any] = {"name": f"cancel-{batch_size}", "overrides": [f"eval.batch_size={batch_size}"]}
    answer = httpx.post(
        f"{api}/deployments/{deployment}/create_flow_run",
        json={"parameters": given, "state": {"type": "SCHEDULED"}},
        timeout=30,
    )
    flow_run = answer.raise_for_status().json()["id"]
    found: list[psutil.Process] = []

    def busy() -> bool:
        nonlocal found
        mine = [workspace for workspace, identifier in workspaces(checkout) if identifier == flow_run]
        # The actors are the shared Ray's children, not the run's.
        making = actors(below([services.ray.record]).values())
        found = [*below(mine[0].records).values(), *making] if mine else []
        return len(making) >= 2

    until(busy, "two workers that make pictures")
    began = time.monotonic()
    state = {"state": {"type": "CANCELLING"}}
    httpx.post(f"{api}/flow_runs/{flow_run}/set_state", json=state, timeout=30).raise_for_status()
    until(lambda: not any(process.is_running() and process.status() != "zombie" for process in found), "the end")
    seconds = time.monotonic() - began
    [mine] = [workspace for workspace, identifier in workspaces(checkout) if identifier == flow_run]
    until(lambda: not below(mine.records), "an end without leftovers")
    mine.remove()
    return {"processes": len(found), "seconds": round(seconds, 1)}


def main() -> None:
    """Starts a stack of its own, cancels three runs, writes the times."""
    with tempfile.TemporaryDirectory(prefix="d2m-cancel-") as folder:
        ports = Ports(free_port(), free_port(), free_port(), free_port())
        services = Services(Path.cwd(), ports, state=Path(folder))
        try:
            services.up()
            rounds = [one_round(services, 40 + i) for i in range(ROUNDS)]
        finally:
            services.down()
    RESULTS.write_text(json.dumps(rounds, indent=2) + "\n")
    print(json.dumps(rounds, indent=2))
    if any(each["seconds"] > LIMIT_S for each in rounds):
        raise SystemExit(f"a cancelled run took longer than {LIMIT_S:g} s to end")


if __name__ == "__main__":
    main()
