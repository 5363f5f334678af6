"""The MLflow run of a flow run: parent of its stages' runs.

- Where it is logged, and what is said when no server answers, is decided in `tasks.tracking`, as for the stages.
- Cached stages are recorded by the worktree's own `tasks.tracking`, all in one process: its imports take seconds.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.workspace import RunFailed, python_environment
from tasks.tracking import PARENT, connect, experiment_id


@contextmanager
def parent_run(root: Path, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Opens a run, yields its id, and closes it as FINISHED, FAILED (an error) or KILLED (a cancellation).

    Raises ConfigError, before anything else happens, if the tracking server does not answer.
    """
    client = connect(root)
    run = client.create_run(experiment_id(client, root), run_name=name, tags={"kind": "flow", **tags})
    identifier = str(run.info.run_id)
    status = "KILLED"
    try:
        yield identifier
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(identifier, status=status)


def record_cached(root: Path, parent: str, stages: list[str]) -> None:
    """Gives each cached stage an MLflow run with its earlier metrics, under `parent`.

    Raises RunFailed with what `tasks.tracking` says.
    """
    if not stages:
        return
    command = [sys.executable, "-m", "tasks.tracking", "cached", *stages]
    environment = {**python_environment(root), PARENT: parent}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"cached stages could not be recorded in MLflow: {done.stderr.strip()}")
