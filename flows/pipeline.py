"""The DAG of `dvc.yaml` as a Prefect flow: a worktree, a task a stage, a sealed experiment.

- DVC decides what has to run, Prefect shows it: `dvc repro -s STAGE` in a process group of its own, no Prefect cache.
- The main thread only waits. A cancelled flow raises there, and the end of the `with` block ends every process group;
  if this process is killed with -9, `end_processes` does the same from Prefect's runner by the records on disk.
- `python -m flows.pipeline --experiment demo` runs it here; `python -m flows.services up` serves it to the UI.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_any
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from httpx import HTTPError
from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectException
from prefect.flows import Flow
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Cancelled, Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts, dag, planning, processes, tracking
from flows.parameters import Commit, Experiment, Override, RunName, StageName, compose
from flows.ray_head import RayHead, tail
from flows.workspace import RunFailed, Workspace, checkout_root, python_environment, uncommitted, workspaces
from moe_core.errors import ConfigError, Dense2MoEError
from tasks import leftovers
from tasks.project import read_params

PARALLEL_STAGES = 2
"""Stages side by side: evaluations are many and small; two keep a machine busy, and SQLite without contention."""

PROGRESS_EVERY_S = 2.0

SOURCE_STAGE = "source"
"""The stage that looks at the user's data, which DVC does not know: forced unless the data set is the embedded one."""


class Run:
    """What the tasks of one flow run share."""

    def __init__(self, workspace: Workspace, parent: str) -> None:
        self.workspace = workspace
        self.stopping = threading.Event()
        self.environment = python_environment(workspace.path)
        self.environment[tracking.PARENT] = parent
        self._ray = RayHead(workspace.state, code=workspace.path)
        self._ray_lock = threading.Lock()

    def join_ray(self) -> None:
        """Sees to it that there is a Ray to join: the one RAY_ADDRESS names, or this run's own, started now."""
        with self._ray_lock:
            if not self.environment.get("RAY_ADDRESS"):
                cpus = read_params(self.workspace.path).compute.most_cpus
                self._ray.wait(self._ray.start(cpus=cpus))
                self.environment |= self._ray.environment()

    def reproduce(self, stage: str, force: bool, log: Any) -> bool:
        """Runs `dvc repro -s STAGE` to its end, with its output in `log`; returns whether the stage's command ran.

        Raises RunFailed with the last lines of the output.
        """
        state = self.workspace.state
        file = state / "logs" / f"{stage}.log"
        # A retry of the same flow run begins a new log.
        file.unlink(missing_ok=True)
        steps = state / "progress" / stage
        steps.parent.mkdir(parents=True, exist_ok=True)
        steps.unlink(missing_ok=True)
        command = ["python", "-m", "dvc", "--wait-for-lock", "repro", "-s", stage, *(["--force"] if force else [])]
        record = state / "groups" / f"stage-{stage}"
        process = processes.start(
            command,
            record=record,
            log=file,
            cwd=self.workspace.path,
            env={**self.environment, "DENSE2MOE_PROGRESS": str(steps)},
        )
        ran = False
        progress = artifacts.Progress(stage, steps)
        shown = time.monotonic()
        for line in _follow(file, process):
            if line:
                ran = ran or line.startswith(dag.RUNNING)
                log.info("%s", line)
            if time.monotonic() - shown > PROGRESS_EVERY_S:
                _show(progress, log)
                shown = time.monotonic()
        _show(progress, log)
        # Whatever the stage left behind ends with it; usually nothing.
        processes.stop([record])
        if process.returncode:
            raise RunFailed(f"stage {stage} failed (exit code {process.returncode}):\n{tail(file)}")
        return ran


def _show(progress: artifacts.Progress, log: Any) -> None:
    """Moves the bars; a server that does not answer costs a bar, never the stage."""
    try:
        progress.update()
    except (HTTPError, PrefectException) as error:
        log.warning("progress of %s is not shown: %s", progress.stage, error)


def _follow(file: Path, process: Any) -> Iterator[str]:
    """Lines that `process` writes to `file`, and "" whenever there is none, until it has ended."""
    with file.open(errors="replace", newline="\n") as lines:
        part = ""
        while True:
            over = process.poll() is not None
            while text := lines.readline():
                part += text
                if part.endswith("\n"):
                    # A progress bar redraws its line after \r: only the last state is of use.
                    yield part.rstrip("\n").rsplit("\r", 1)[-1].rstrip()
                    part = ""
            if over:
                yield part
                return
            yield ""
            time.sleep(processes.POLL_S)


@task(task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(run: Run, stage: str, force: bool, stands: bool, alone: bool) -> State:
    """One stage: ends as `Cached` if DVC finds it unchanged or in its run cache.

    `stands`: that it is unchanged is known; `alone`: nothing may run beside it, of other runs neither.
    """
    log = get_run_logger()
    if run.stopping.is_set():
        return Cancelled(message="the run was ended before this stage began")
    root = run.workspace.path
    if stands or (not force and dag.unchanged(root, stage)):
        return Completed(name="Cached", message=f"{stage}: unchanged, as dvc.lock has it")
    if force or not dag.restorable(root, stage):
        run.join_ray()
    try:
        with run.workspace.place(alone, run.stopping):
            if run.stopping.is_set():
                return Cancelled(message="the run was ended before this stage began")
            ran = run.reproduce(stage, force, log)
    except RunFailed:
        if run.stopping.is_set():
            return Cancelled(message="the run was ended during this stage")
        raise
    if not ran:
        return Completed(name="Cached", message=f"{stage}: outs taken from the run cache")
    return Completed(message=f"{stage}: made by this run")


def end_processes(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Hook of the serving process: ends what a cancelled or crashed flow run has left alive."""
    for workspace, identifier in workspaces(checkout_root()):
        if identifier == str(flow_run.id):
            workspace.clear()


def default_name(experiment: str, flow_run_id: str) -> str:
    """Name of a run that was given none: the same again when Prefect retries the flow run."""
    return f"{experiment}-{flow_run_id.split('-')[0]}"


def _flow_run_name() -> str:
    given = runtime.flow_run.parameters
    return given["name"] or default_name(given["experiment"], str(runtime.flow_run.id))


@contextmanager
def _opened(workspace: Workspace, parent: str) -> Iterator[Run]:
    """A run whose processes end with the block, however that ends."""
    run = Run(workspace, parent)
    try:
        yield run
    finally:
        # On a cancellation this is where TerminationSignal passes through, in the main thread. The stages' threads see
        # their processes end and return.
        run.stopping.set()
        workspace.clear()


@flow(
    name="dense2moe",
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=PARALLEL_STAGES + 1),  # and the plan
    on_cancellation=[end_processes],
    on_crashed=[end_processes],
    persist_result=False,
)
def pipeline(
    experiment: Experiment = "demo",
    overrides: list[Override] = [],  # noqa: B006 a form needs the default as a value; pydantic copies it
    name: RunName = "",
    commit: Commit = "HEAD",
    again: list[StageName] = [],  # noqa: B006 as above
) -> str:
    """Turns a dense diffusion transformer into the sparse levels L, M, S and XS, evaluates them, and writes the report.

    The run works in a git worktree of its own and ends as a DVC experiment: `dvc exp apply NAME` brings it here.

    Args:
        experiment: The preset: model, data, recipe and evaluation that belong together (params/experiment).
        overrides: Single parameters on top of the preset, each as key=value: moe.top_k=4, kd=scenes, seed=1.
        name: What the run and its experiment are called. Empty: made from the preset and the run's id.
        commit: Branch, tag or hash to run. Uncommitted files are not part of the run; its page lists them.
        again: Stages to run although nothing that DVC knows of has changed: teacher, if the given folder has; latency.
    """
    log = get_run_logger()
    identifier = str(runtime.flow_run.id)
    workspace = Workspace(checkout_root(), name or default_name(experiment, identifier))
    end_orphans(workspace.checkout)
    with workspace.claimed(identifier):
        revision = workspace.create(commit)
        compose(workspace.path, experiment, overrides)
        params = read_params(workspace.path)
        leftovers.remove(workspace.path, params.models, params.studies)
        log.info("run %s of commit %s in %s", workspace.name, revision[:12], workspace.path)
        if changes := uncommitted(workspace.checkout):
            log.warning("%d uncommitted files are not part of this run", len(changes))
            artifacts.show_uncommitted(changes)
        about = {
            "experiment": experiment,
            "overrides": " ".join(overrides),
            "git_commit": revision,
            "flow_run": identifier,
        }
        with tracking.parent_run(workspace.path, workspace.name, about) as parent:
            with _opened(workspace, parent) as run:
                cached = walk(run, again)
            # DVC and MLflow each take seconds to load, and neither waits for the other.
            with ThreadPoolExecutor(1) as beside:
                sealed = beside.submit(workspace.seal)
                try:
                    tracking.record_cached(workspace.path, parent, cached)
                    artifacts.show_results(workspace.path / "reports")
                except BaseException:
                    # The run has failed: a later one of the same name takes over, and must not find its name taken.
                    sealed.result()
                    workspace.unseal()
                    raise
                sealed.result()
        workspace.remove()
    log.info("sealed: `dvc exp apply %s` brings it into the checkout", workspace.name)
    return workspace.name


def walk(run: Run, again: Collection[str] = ()) -> list[str]:
    """Runs every stage as soon as those before it are done, those in `again` in any case; returns the cached ones, in the DAG's order.

    Raises ConfigError for a name in `again` that is no stage, RunFailed after the first failure, when the stages that ran beside
    it are over; their work is kept.
    """
    stages = dag.read(run.workspace.path)
    names = [stage.name for stage in stages]
    if unknown := [name for name in again if name not in names]:
        raise ConfigError(f"again has {unknown[0]}; the stages are {', '.join(names)}")
    force = {*again, *({SOURCE_STAGE} if _own_data(run.workspace.path) else ())}
    standing = dag.standing(stages, force)
    plan = _plan(run) if len(standing) < len(stages) else None
    waiting = {stage.name: stage for stage in stages}
    running: dict[PrefectConcurrentFuture[Any], dag.Stage] = {}
    done: dict[str, State] = {}
    while waiting or running:
        failed = any(not state.is_completed() for state in done.values())
        for stage in list(waiting.values()):
            alone = not running or not (stage.exclusive or any(other.exclusive for other in running.values()))
            if failed or len(running) >= PARALLEL_STAGES or not alone or not stage.upstream <= done.keys():
                continue
            name = stage.name
            submitted = run_stage.submit(run, name, name in force, name in standing, stage.exclusive)
            running[submitted] = waiting.pop(name)
        if not running:
            break
        finished, _ = wait_for_any([future.wrapped_future for future in running], return_when=FIRST_COMPLETED)
        for future in [future for future in running if future.wrapped_future in finished]:
            future.wait()
            done[running.pop(future).name] = future.state
    if plan is not None:
        plan.wait()
    broken = {stage: state for stage, state in done.items() if not state.is_completed()}
    if broken:
        told = "\n".join(f"{state.message}" for state in broken.values())
        raise RunFailed(f"{told}\nThe worktree is kept: {run.workspace.path}. A run of the same name takes over.")
    return [stage.name for stage in stages if done[stage.name].name == "Cached"]


def _plan(run: Run) -> PrefectConcurrentFuture[Any] | None:
    """Begins to plan the run. Where GPUs of a stated size must hold it, ends that first, and raises RunFailed if they cannot."""
    if not (run.workspace.path / planning.COMMAND).is_file():
        return None  # a commit from before there were plans
    plan = planning.show_plan.submit(run.workspace, run.environment)
    if read_params(run.workspace.path).compute.gpu_memory_gb is not None:
        plan.result()
    return plan


def end_orphans(checkout: Path) -> None:
    """Ends what runs have left alive whose flow process was killed together with the serving one."""
    for workspace, _ in workspaces(checkout):
        if not workspace.in_progress():
            workspace.clear()


def _own_data(root: Path) -> bool:
    """Whether the run's data are the user's: DVC cannot see that they changed, so `source` looks every time."""
    return bool(yaml.safe_load((root / "params.yaml").read_text())["data"]["kind"] != "embedded")


def main() -> int:
    """Runs the flow in this process, against the Prefect server of PREFECT_API_URL; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description="Run the pipeline as a Prefect flow, here."
    )
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--name", default="")
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--again", action="append", default=[], metavar="STAGE")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    try:
        pipeline(given.experiment, given.overrides, given.name, given.commit, given.again)
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
