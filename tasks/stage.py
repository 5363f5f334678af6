"""What every stage shares: `execute` validates, opens the MLflow run, runs the stage's one function, and closes everything again.

A stage's function gets a `Stage`; its module is run by DVC as `python -m tasks.<stage> [item]` in the folder of dvc.yaml.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moe_core.config import Params
from moe_core.errors import Dense2MoEError
from tasks import leftovers, outs
from tasks.places import STAGE_REPORTS
from tasks.progress import Progress
from tasks.project import git_state, main_checkout, read_params

if TYPE_CHECKING:
    from tasks.cluster import Early
    from tasks.fingerprint import Identity
    from tasks.resume import ResumeFolder
    from tasks.tracking import StageRun

RESUME_ROOT = ".resume"
LIBRARIES = ("torch", "diffusers", "transformers", "ray", "mlflow", "dvc")


@dataclass
class Stage:
    """A running stage."""

    name: str
    """as DVC addresses it: `mob_kd@M`"""
    root: Path
    params: Params
    identity: Identity
    run: StageRun
    progress: Progress
    resume: ResumeFolder | None = None
    early_ray: Early | None = None

    @property
    def file_name(self) -> str:
        """The name of this stage's files in reports/: `mob_kd-M`."""
        return self.name.replace("@", "-")

    @contextlib.contextmanager
    def ray(self, module: str = "torch") -> Iterator[None]:
        """Inside, Ray is up; `module`, which is slow to load, loads while Ray's processes start."""
        threading.Thread(target=importlib.import_module, args=(module,), daemon=True).start()
        with contextlib.ExitStack() as stack:
            if self.early_ray is not None:
                self.early_ray.joined()
            else:
                # Ray is not imported by stages that do without it.
                from tasks import cluster

                stack.enter_context(cluster.connect(self.name, self.params.compute))
            self.run.tag({"device": _device(self.params.compute.use_gpu)})
            yield

    def summary(self, metrics: dict[str, Any], **more: Any) -> None:
        """Writes `reports/stages/<stage>.json`: what the stage came to; nothing that differs between equal runs."""
        content = {"stage": self.name, "fingerprint": self.identity.fingerprint, "metrics": metrics, **more}
        outs.write_json(self.root / STAGE_REPORTS / f"{self.file_name}.json", content)
        self.run.metrics({name: value for name, value in metrics.items() if isinstance(value, int | float)})


def workers(params: Params) -> bool:
    """Whether a stage has its work done in Ray's workers."""
    return params.compute.num_workers > 0


def execute(
    name: str,
    body: Callable[[Stage], None],
    resumable: bool = False,
    joins: Callable[[Params], bool] = lambda params: False,
) -> NoReturn:
    """Runs a stage and ends the process: 0, 2 after an error of this project (one clear message), 143 after SIGTERM.

    `resumable`: the stage trains, and has a resume folder. `joins`: whether it will enter `Stage.ray`, so that Ray is asked for
    before anything else.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _execute(name, body, resumable, joins)
    except Exception as error:
        if (ours := _ours(error)) is None:
            raise
        print(f"{name}: {ours}", file=sys.stderr, flush=True)
        sys.exit(2)
    # At its end Python would look for garbage among all of torch's and Ray's objects once more: a second for nothing.
    gc.freeze()
    sys.exit(0)


def _ours(error: BaseException | None) -> Dense2MoEError | None:
    """The error of this project that `error` is or was caused by: Ray wraps those of its workers, once or more."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        # Ray gives its wrapper the class of what it wraps, and the worker's traceback for a message.
        if isinstance(error, Dense2MoEError) and not hasattr(error, "cause"):
            return error
        error = cause
    return None


def _execute(name: str, body: Callable[[Stage], None], resumable: bool, joins: Callable[[Params], bool]) -> None:
    root = Path.cwd()
    params = read_params(root)
    leftovers.check(root, params.models)
    params = params.model_copy(update={"compute": params.compute.of(name)})
    with contextlib.ExitStack() as stack:
        early = None
        if joins(params):
            from tasks import cluster

            early = stack.enter_context(cluster.Early(name, params.compute))
        # DVC and MLflow load while Ray starts processes for the workers.
        from tasks.fingerprint import identify
        from tasks.resume import ResumeFolder
        from tasks.tracking import StageRun

        [identity] = identify(root, name)
        resume = stack.enter_context(ResumeFolder(main_checkout(root) / RESUME_ROOT, identity)) if resumable else None
        run = StageRun(root, identity, _earlier_run(resume))
        status = "FAILED"
        stage = Stage(name, root, params, identity, run, Progress(name), resume, early)
        try:
            if resume:
                outs.write_text(resume.path / "mlflow_run", run.run_id)
            run.tag(_circumstances(root) | {"device": _device(use_gpu=False)})
            run.params()
            run.inputs()
            body(stage)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            stage.progress.close()
            run.end(status)
        if resume:
            resume.finish()


def _earlier_run(resume: ResumeFolder | None) -> str | None:
    file = resume.path / "mlflow_run" if resume else None
    return file.read_text().strip() if file and file.exists() else None


def _circumstances(root: Path) -> dict[str, str]:
    git = git_state(root)
    tags = {f"version.{library}": version(library) for library in LIBRARIES}
    tags |= {
        "version.python": sys.version.split()[0],
        "git.commit": git.commit,
        "git.branch": git.branch,
        "git.dirty": str(bool(git.dirty)).lower(),
    }
    if git.dirty:
        tags["git.dirty_files"] = "\n".join(git.dirty)[:5000]
    return tags | {"mlflow.source.git.commit": git.commit}


def _device(use_gpu: bool) -> str:
    if not use_gpu:
        return f"cpu x {os.cpu_count()}"
    import ray  # loaded already: this is called inside `ray()`

    kinds = {key.partition(":")[2] for key in ray.cluster_resources() if key.startswith("accelerator_type:")}
    return ", ".join(sorted(kinds)) or "gpu"


def _terminate(number: int, frame: object) -> NoReturn:
    # Unwinds, so that the MLflow run is closed as KILLED and Ray's workers end.
    sys.exit(128 + number)
