"""A small real repository (git, DVC, Hydra parameters) with stages of a second, and a real Prefect stack for it.

The stages only sleep and write: the flow knows no stage by name, so it is all here except the science. The repository
has the project's own parameters and the modules of it that a run calls in the commit (config check, cached records).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from flows import processes
from tests.tasks.imports import closure

PATIENCE_S = 300
"""No test measures time: these waits end a test that hangs, also on a machine with others' work on it."""

PROJECT = Path(__file__).resolve().parents[2]
MODULES = ("curves", "fingerprint", "leftovers", "outs", "params", "places", "project", "tracking")
"""Of tasks, what a run calls in its commit."""
COPIED = [
    "params",
    "params.yaml",
    "moe_core/__init__.py",
    "moe_core/config",
    "tasks/__init__.py",
    *sorted(set().union(*(closure(PROJECT / "tasks" / f"{name}.py") for name in MODULES))),
]

STAGE = '''"""A stage of the test repository: NAME OUT DEP... writes OUT; evaluations take `seed` seconds."""
import json, os, pathlib, subprocess, sys, time
import yaml

name, out, *deps = sys.argv[1:]
params = yaml.safe_load(open("params.yaml"))
if name == "report" and params["eval"]["latency_rounds"] == 13:
    sys.exit("report is broken on purpose")
steps = params["seed"] * 5 if name.startswith("evaluate") else 0
child = None
if steps:
    # What stages leave behind at worst: a child in a session of its own that does not listen to TERM.
    child = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], start_new_session=True)
if steps and params["seed"] > 999:
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)

    @ray.remote(num_cpus=0.1)
    class Worker:
        def work(self):
            time.sleep(1000)

        def process(self):
            return os.getpid()

    workers = [Worker.remote() for _ in range(2)]
    print("workers", *ray.get([worker.process.remote() for worker in workers]), flush=True)
    busy = [worker.work.remote() for worker in workers]
for step in range(steps):
    time.sleep(0.2)
    event = {"stage": name, "phase": "train", "step": step + 1, "steps": steps, "loss": 1 / (step + 1)}
    with open(os.environ["DENSE2MOE_PROGRESS"], "a") as file:
        file.write(json.dumps(event) + "\\n")
if child:
    child.kill()
print(f"{name} ran with RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}")
out = pathlib.Path(out)
text = "\\n".join([name, str(params["moe"]["top_k"]), *(pathlib.Path(dep).read_text() for dep in deps)])
if out.suffix == ".json":
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"metrics": {"accuracy": 0.9, "top_k": params["moe"]["top_k"]}}))
elif out.suffix == ".md":
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"# Report\\n\\n{len(text)} characters\\n")
else:
    out.mkdir(parents=True)
    (out / "file.txt").write_text(text)
'''

PLAN = '''"""The plan of the test repository, which asks no more than half a gigabyte; called as the project's own."""
import pathlib, sys
import yaml

room = yaml.safe_load(open("params.yaml"))["compute"]["gpu_memory_gb"]
fits = room is None or room >= 0.5
text = "# Plan of `test`\\n" if fits else "# Plan of `test`\\n- **`teacher` does not fit**: it needs 0.5 GB\\n"
pathlib.Path(sys.argv[sys.argv.index("--to") + 1]).write_text(text)
sys.exit(0 if fits else 3)
'''

DVC_YAML = """
stages:
  source:
    cmd: python stage.py source data/source
    deps: [stage.py]
    params: [data]
    outs: [data/source]
  teacher:
    cmd: python stage.py teacher data/teacher data/source/file.txt
    deps: [stage.py, data/source]
    params: [moe.top_k]
    outs: [data/teacher]
  evaluate:
    foreach: {L: moe, M: mob}
    do:
      cmd: python stage.py evaluate@${key} reports/stages/evaluate-${key}.json data/teacher/file.txt
      deps: [stage.py, data/teacher]
      params: [seed]
      # Metrics, as in the project: DVC keeps no run cache for a stage with other outs of `cache: false`.
      metrics:
        - reports/stages/evaluate-${key}.json: {cache: false}
  latency:
    cmd: python stage.py latency reports/latency.json data/teacher/file.txt
    deps: [stage.py, data/teacher]
    metrics:
      - reports/latency.json: {cache: false}
    meta: {exclusive: true}
  report:
    cmd: python stage.py report reports/report.md reports/stages/evaluate-L.json reports/stages/evaluate-M.json
    params: [eval.latency_rounds]
    deps: [stage.py, reports/stages/evaluate-L.json, reports/stages/evaluate-M.json]
    outs:
      - reports/report.md: {cache: false}
"""

IGNORED = "\n".join(
    [".runs/", ".services/", ".resume/", "__pycache__/", "/data/", "mlflow.db*", "mlruns/", ".dvc/tmp", ".dvc/cache"]
)


def run(*command: str, cwd: Path, check: bool = True) -> str:
    """Output of a command in a test repository; `python` is this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert not check or done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def dvc(*arguments: str, cwd: Path, check: bool = True) -> str:
    return run(sys.executable, "-m", "dvc", *arguments, cwd=cwd, check=check)


def make_repository(folder: Path) -> Path:
    """A committed repository whose stages nobody has run yet."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        copy(PROJECT / name, target)
    (folder / "stage.py").write_text(STAGE)
    (folder / "tasks" / "plan.py").write_text(PLAN)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / ".gitignore").write_text(IGNORED)
    (folder / ".dvcignore").write_text("__pycache__/\n.runs/\n.services/\n")
    run("git", "init", "-q", "-b", "main", cwd=folder)
    run("git", "config", "user.email", "test@example.org", cwd=folder)
    run("git", "config", "user.name", "test", cwd=folder)
    dvc("init", "-q", cwd=folder)
    dvc("config", "core.analytics", "false", cwd=folder)
    dvc("config", "hydra.config_dir", "params", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-q", "-m", "a repository", cwd=folder)
    return folder


@dataclass
class Stack:
    """A Prefect server and a serving process for one test repository."""

    checkout: Path
    state: Path
    api: str

    def request(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """The server's answer; asks again while it is "Service Unavailable", as Prefect's own clients do: two writers met in SQLite."""
        answer: httpx.Response | None = None

        def answered() -> bool:
            nonlocal answer
            answer = httpx.request(method, f"{self.api}{path}", json=body, timeout=30)
            return answer.status_code != httpx.codes.SERVICE_UNAVAILABLE

        until(answered, PATIENCE_S)
        assert answer is not None
        return answer

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.request("POST", path, body)

    def get(self, path: str) -> dict[str, Any]:
        answer = self.request("GET", path)
        answer.raise_for_status()
        return answer.json()

    def submit(self, **parameters: Any) -> httpx.Response:
        """What the UI's form does."""
        deployment = self.get("/deployments/name/dense2moe/pipeline")["id"]
        return self.post(
            f"/deployments/{deployment}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"}
        )

    def trigger(self, **parameters: Any) -> str:
        answer = self.submit(**parameters)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["id"]

    def cancel(self, flow_run: str) -> None:
        self.post(f"/flow_runs/{flow_run}/set_state", state={"type": "CANCELLING"}).raise_for_status()

    def kill_flow_process(self, flow_run: str) -> None:
        """kill -9 of the process in which the flow run's main thread waits."""
        for process in psutil.process_iter():
            try:
                # Prefect gives the run's id to that process and to nobody above it; stages have it from there.
                mine = process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run
                if mine and Path(process.environ().get(processes.MARK, "")).name == "serve":
                    process.kill()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue

    def state_of(self, flow_run: str) -> dict[str, Any]:
        return self.get(f"/flow_runs/{flow_run}")["state"]

    def wait(
        self, flow_run: str, types: tuple[str, ...] = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}

        def over() -> bool:
            nonlocal state
            state = self.state_of(flow_run)
            return state["type"] in types

        until(over, PATIENCE_S)
        return state

    def tasks(self, flow_run: str) -> dict[str, str]:
        """State names of a run's stages."""
        runs = self.post("/task_runs/filter", flow_runs={"id": {"any_": [flow_run]}}).json()
        return {task["name"]: task["state"]["name"] for task in runs}

    def logs(self, flow_run: str) -> str:
        found = self.post("/logs/filter", logs={"flow_run_id": {"any_": [flow_run]}}, sort="TIMESTAMP_ASC").json()
        return "\n".join(entry["message"] for entry in found)

    def artifacts(self, flow_run: str) -> dict[str, Any]:
        found = self.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run]}}).json()
        return {artifact["key"]: artifact["data"] for artifact in found if artifact["key"]}


def until(true: Callable[[], bool], seconds: float) -> None:
    """Waits for something; fails the test if it has not come after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.1)


def leftovers(checkout: Path) -> list[str]:
    """Live processes that carry the mark of any run of the test repository."""
    prefix = str(checkout / ".runs")
    alive = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(processes.MARK, "").startswith(prefix)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(f"{process.pid} {' '.join(process.cmdline())}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive


def read_yaml(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())
