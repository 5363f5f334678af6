"""`make demo`: the whole pipeline on the demo preset as a Prefect flow, and its reports brought into this checkout.

- Uses the stack of `make up` if it runs; otherwise a Prefect server of its own, for as long as the run takes.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flows import processes, results
from flows.ray_head import free_port
from flows.services import Ports, Services, existing
from flows.workspace import CODE, RunFailed, checkout_root, git, python_environment
from moe_core.errors import ConfigError, Dense2MoEError

EXPERIMENT = "demo"

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def prefect_environment(checkout: Path) -> Iterator[dict[str, str]]:
    """Variables of the running stack, or of a Prefect server that lives as long as the block."""
    running = existing(checkout)
    if running is not None:
        print(f"using the running stack:\n{running.describe()}", flush=True)
        yield running.environment()
        return
    folder = Path(tempfile.mkdtemp(prefix="d2m-demo-"))
    server = Services(checkout, Ports(prefect=free_port(), mlflow=0, ray=0, dashboard=0), state=folder)
    try:
        server.start_prefect()
        server.wait_prefect()
        yield {"PREFECT_API_URL": server.prefect_api, "PREFECT_HOME": str(folder / "prefect")}
    finally:
        processes.stop([server.record("prefect")])
        shutil.rmtree(folder)


class Stopped(Exception):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"signal {number}")


def to_the_end(command: list[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its exit status; raises Stopped after a signal, when the command has ended its own."""
    # Its session is its own: it is told once, by us, and Ctrl-C in a terminal does not tell it a second time while it
    # ends what it started.
    run = subprocess.Popen(command, cwd=CODE, env=environment, start_new_session=True)
    try:
        return run.wait()
    except Stopped:
        run.terminate()
        run.wait()
        raise


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for later in STOPPING:
        signal.signal(later, signal.SIG_IGN)
    raise Stopped(number)


def unsaved(checkout: Path) -> list[str]:
    """Tracked files with changes that neither a commit nor a sealed experiment has: `dvc exp apply`, which resets every
    tracked file, would lose them. What an earlier demo brought here is its experiment's, and not lost.
    """
    changed = [file for file, state in _changes(checkout).items() if state != "??"]
    saved: set[str] = set()
    for reference in _experiments(checkout) if changed else ():
        for line in git("ls-tree", reference, "--", *changed, cwd=checkout).splitlines():
            about, _, file = line.partition("\t")
            path = checkout / file
            if path.is_file() and git("hash-object", file, cwd=checkout).strip() == about.split()[2]:
                saved.add(file)
    return sorted(set(changed) - saved)


def conflicts(checkout: Path, experiment: str) -> list[str]:
    """What applying an experiment would lose: unsaved changes, and untracked files that the experiment has too."""
    reference = next(name for name in _experiments(checkout) if name.endswith(f"/{experiment}"))
    theirs = set(git("diff", "--name-only", "HEAD", reference, cwd=checkout).splitlines())
    untracked = {file for file, state in _changes(checkout).items() if state == "??"}
    return sorted({*unsaved(checkout), *(untracked & theirs)})


def apply(checkout: Path, experiment: str) -> None:
    """Brings a sealed experiment into the checkout: parameters, dvc.lock, reports and what DVC holds.

    Raises ConfigError if that would overwrite what the user has not committed.
    """
    if lost := conflicts(checkout, experiment):
        raise ConfigError(
            f"uncommitted changes of {', '.join(lost)} would be overwritten; commit or stash them, then bring the"
            f" finished run here with `dvc exp apply {experiment}`"
        )
    command = [sys.executable, "-m", "dvc", "exp", "apply", experiment]
    done = subprocess.run(command, cwd=checkout, env=python_environment(checkout), capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"`dvc exp apply {experiment}` failed: {done.stderr.strip()}")


def summary(reports: Path) -> str:
    """The models' metrics as a table of plain text."""
    rows = results.models(reports)
    columns = [column for column in results.columns(rows) if column != "model"]
    table = [["model", *columns]]
    table += [[row["model"], *(f"{row.get(column, float('nan')):.4g}" for column in columns)] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)


def _changes(checkout: Path) -> dict[str, str]:
    """File -> its two letters in `git status`."""
    lines = git("status", "--porcelain", "--untracked-files=all", cwd=checkout).splitlines()
    return {line[3:].split(" -> ")[-1].strip('"'): line[:2] for line in lines}


def _experiments(checkout: Path) -> list[str]:
    return git("for-each-ref", "--format=%(refname)", "refs/exps", cwd=checkout).splitlines()


def main() -> int:
    """Runs the demo; an error is one line, without a traceback. Returns the exit status."""
    for number in STOPPING:
        signal.signal(number, _stop)
    name = f"{EXPERIMENT}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        checkout = checkout_root()
        if lost := unsaved(checkout):
            raise ConfigError(
                f"uncommitted changes of {', '.join(lost)} would be overwritten when the finished run is brought here;"
                " commit or stash them first"
            )
        with prefect_environment(checkout) as extra:
            # Times are of the machine that runs the demo, also where the models come out as in the commit, bit for bit.
            command = [
                *(sys.executable, "-m", "flows.pipeline"),
                *("--experiment", EXPERIMENT, "--name", name, "--again", "latency"),
            ]
            # The flow's own process: Prefect reads its settings when it is imported.
            status = to_the_end(command, {**python_environment(CODE), **extra})
        if status:
            print(f"the run {name} failed; what it says above names the stage", file=sys.stderr)
            return status
        apply(checkout, name)
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.number
    print(f"\n{summary(checkout / 'reports')}\n\nreport: {checkout / 'reports' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
