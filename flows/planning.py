"""What a run will take, on its page before it has taken it: `tasks.plan`, in the run's worktree, as a task of its own."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import processes
from flows.ray_head import tail
from flows.workspace import RunFailed, Workspace

COMMAND = Path("tasks/plan.py")
DOES_NOT_FIT = 3
"""Exit status of `tasks.plan`, which is not imported: it brings torch."""


@task(task_run_name="plan", cache_policy=NO_CACHE, persist_result=False)
def show_plan(workspace: Workspace, environment: dict[str, str]) -> None:
    """Plans the run and shows that on its page. Raises RunFailed, with the plan's own words, if a stage does not fit its GPUs."""
    log, file = workspace.state / "logs" / "plan.log", workspace.state / "plan.md"
    log.unlink(missing_ok=True)
    process = processes.start(
        # It may take a minute of one core, and nothing waits for it but a run on GPUs of a stated size: the first stages go first.
        ["nice", "-n", "19", "python", "-m", "tasks.plan", "--to", str(file)],
        record=workspace.state / "groups" / "plan",
        log=log,
        cwd=workspace.path,
        env=environment,
    )
    status = process.wait()
    if status not in (0, DOES_NOT_FIT):
        raise RunFailed(f"the run cannot be planned (exit code {status}):\n{tail(log)}")
    plan = file.read_text()
    create_markdown_artifact(plan, key="plan", description="What this run takes: parameters, FLOPs, memory, hours")
    if status == DOES_NOT_FIT:
        tight = [line.removeprefix("- ") for line in plan.splitlines() if "does not fit" in line]
        raise RunFailed("\n".join(tight))
    get_run_logger().info("planned: the artifact `plan` of this run")
