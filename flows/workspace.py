"""A git worktree a run: nothing that a run does touches the user's files or another run's.

- `.runs/NAME` is the worktree, `.runs/NAME.state` what the run keeps beside it: process records, logs, progress, and
  the lock that says that the run is alive.
- The worktree shares the checkout's DVC cache by links, so that a run costs no second copy of the data.
- `seal` makes a DVC experiment of it; then the worktree goes. A failed or cancelled run's worktree stays, to be looked
  at, until a run of the same name replaces it. Nothing is lost with it: finished stages are in DVC's run cache.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dvc.config import Config

from flows import processes
from moe_core.errors import ConfigError, Dense2MoEError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$"
"""Names of runs: legal in a git ref, a file name and a shell word."""

LINK_TYPES = ["reflink", "hardlink", "symlink"]
"""Never `copy`: a FLUX teacher is 24 GB."""


CODE = Path(__file__).resolve().parents[1]
"""Where this flow's own code is; a run's stages use the worktree's."""


class RunFailed(Dense2MoEError):
    """A run cannot go on; its message says at which stage and why."""


def checkout_root() -> Path:
    """The main checkout: the one given by DENSE2MOE_CHECKOUT, or the one (not a worktree) that holds this file."""
    given = os.environ.get("DENSE2MOE_CHECKOUT")
    start = Path(given) if given else CODE
    common = Path(git("rev-parse", "--path-format=absolute", "--git-common-dir", cwd=start))
    return common.parent


def git(*arguments: str, cwd: Path) -> str:
    """Output of one git command, without its last newline.

    Raises RunFailed with git's own message.
    """
    done = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"`git {' '.join(arguments)}` in {cwd} failed: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def python_environment(root: Path) -> dict[str, str]:
    """This environment, in which `python` is this interpreter and project modules come from `root`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}


class Workspace:
    """One run's worktree and state, in the main checkout's `.runs/`."""

    def __init__(self, checkout: Path, name: str) -> None:
        if not re.match(NAME, name) or name.endswith(".lock"):
            raise ConfigError(
                f"name is {name!r}; it must be letters, digits, '-', '_' and inner dots, and not end in .lock"
            )
        self.checkout = checkout
        self.name = name
        self.path = checkout / ".runs" / name
        self.state = checkout / ".runs" / f"{name}.state"

    @property
    def records(self) -> list[Path]:
        """The record of every process group that the run has started."""
        return sorted(self.state.glob("groups/*"))

    @contextmanager
    def claimed(self, flow_run_id: str) -> Iterator[None]:
        """Holds the name, after ending what a killed run of that name left behind.

        Raises ConfigError if a live run or a sealed experiment has the name.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        lock = self._try_lock()
        if lock is None:
            raise ConfigError(f"name is {self.name!r}; a run of that name is in progress, choose another")
        with lock:
            taken = git("for-each-ref", "--format=%(refname)", "refs/exps", cwd=self.checkout).splitlines()
            if any(ref.rsplit("/", 1)[-1] == self.name for ref in taken):
                raise ConfigError(
                    f"name is {self.name!r}; a sealed experiment has that name: choose another,"
                    f" or remove it with `dvc exp remove {self.name}`"
                )
            self.clear()
            (self.state / "run.json").write_text(json.dumps({"flow_run": flow_run_id}))
            yield

    def in_progress(self) -> bool:
        """Whether a live process has claimed the name. The kernel drops the lock with its holder, even at a kill -9."""
        lock = self._try_lock()
        if lock is None:
            return True
        lock.close()
        return False

    def clear(self) -> None:
        """Ends every process of the run and removes its temporary folders."""
        processes.stop(self.records)
        for folder in self.state.glob("temporary/*"):
            shutil.rmtree(folder.read_text(), ignore_errors=True)
            folder.unlink()

    def create(self, commit: str) -> str:
        """Checks `commit` out into a fresh worktree and links what DVC has of it; returns its full hash.

        Raises RunFailed if there is no such commit.
        """
        try:
            revision = git(
                "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}", cwd=self.checkout
            )
        except RunFailed:
            raise RunFailed(f"commit is {commit!r}; {self.checkout} has no such commit") from None
        self._remove_worktree()
        with self._repository_alone():
            git("worktree", "add", "--detach", str(self.path), revision, cwd=self.checkout)
        self._share_cache()
        # --allow-missing: what the cache lacks will be made by its stage.
        self.dvc("checkout", "--allow-missing", "--force")
        return revision

    def dvc(self, *arguments: str) -> str:
        """Output of one quick DVC command in the worktree; raises RunFailed with what it said."""
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(command, cwd=self.path, env=python_environment(self.path), capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(
                f"`dvc {' '.join(arguments)}` in {self.path} failed: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout.strip()

    def seal(self) -> None:
        """Saves the worktree as the DVC experiment `name`, with reports that HEAD does not have yet."""
        # -I because DVC leaves `cache: false` outs out of the experiment when HEAD lacks them (FACTS.md).
        reports = ["-I", "reports"] if (self.path / "reports").is_dir() else []
        # One at a time: DVC keeps its bookkeeping (refs/exps/exec) in the repository that all worktrees share.
        with self._repository_alone():
            self.dvc("exp", "save", "--name", self.name, *reports)

    def unseal(self) -> None:
        """Takes the experiment back; the worktree stays as it is."""
        with self._repository_alone():
            self.dvc("exp", "remove", self.name)

    @contextmanager
    def place(self, alone: bool, stopping: threading.Event) -> Iterator[None]:
        """Inside, a stage may run: beside those of other runs of this checkout, or alone; waits for that until `stopping`.

        Who wants to be alone closes the gate first, so that no stage that begins later keeps it waiting.
        """
        with (self.checkout / ".runs" / "place.lock").open("a") as lock:
            with (self.checkout / ".runs" / "gate.lock").open("a") as gate:
                _take(gate, fcntl.LOCK_EX, stopping)
                _take(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, stopping)
            yield

    def remove(self) -> None:
        """Removes worktree and state: the run is over, and well."""
        self._remove_worktree()
        shutil.rmtree(self.state)

    @contextmanager
    def _repository_alone(self) -> Iterator[None]:
        """Keeps the other runs of this checkout from git's worktrees and DVC's refs for a moment."""
        with (self.checkout / ".runs" / "repository.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _try_lock(self) -> IO[str] | None:
        lock = (self.state / "lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def _remove_worktree(self) -> None:
        if self.path.exists():
            # Hard-linked outs are read-only; git removes them all the same, it needs the folders' permission only.
            git("worktree", "remove", "--force", str(self.path), cwd=self.checkout)
        git("worktree", "prune", cwd=self.checkout)

    def _share_cache(self) -> None:
        """Gives the worktree the checkout's private DVC settings (remotes, keys) and its cache."""
        ours = Config(str(self.checkout / ".dvc"))
        cache = ours["cache"].get("dir") or str(self.checkout / ".dvc" / "cache")
        with Config(str(self.path / ".dvc")).edit("local") as theirs:
            theirs.update(_plain(ours.load_one("local")))
            theirs["cache"]["dir"] = cache
            theirs["cache"]["type"] = LINK_TYPES


def _take(lock: IO[str], kind: int, stopping: threading.Event) -> None:
    while not stopping.is_set():
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            stopping.wait(processes.POLL_S)


def workspaces(checkout: Path) -> Iterator[tuple[Workspace, str]]:
    """Every run that has state on disk, with the id of its flow run."""
    for file in sorted(checkout.glob(".runs/*.state/run.json")):
        yield Workspace(checkout, file.parent.name.removesuffix(".state")), json.loads(file.read_text())["flow_run"]


def uncommitted(checkout: Path) -> list[str]:
    """Lines of `git status --short`: what a run of HEAD does not see."""
    return git("status", "--short", cwd=checkout).splitlines()


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
