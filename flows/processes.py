"""Process groups that outlive nobody: every child is on record from its first instant, and can be ended by anyone.

- A child leads its own session, and its id is in a record file before it runs its command, so that another process
  (Prefect's runner, `make down`) finds it even when the one that started it was killed with -9.
- Membership is by session and by an environment mark that children inherit, not by process group: Ray gives each worker
  a group of its own and overwrites its environment, and a number on disk may have been handed to a stranger since.
- Ending is TERM to all, `GRACE_S` seconds, then KILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

MARK = "DENSE2MOE_GROUP"
"""Environment variable that names the record a process belongs to."""

GRACE_S = 5.0
"""Seconds between TERM and KILL: DESIGN.md, "cancel ends every process within ten seconds"."""

POLL_S = 0.1

_children: dict[Path, subprocess.Popen[bytes]] = {}
"""This process's own children, by record: who ends one has to take its exit status, or it stays as a zombie."""

# The shell writes its own id and then becomes the command: the id stays the same, and no instant is left in which
# the command runs and is not on record.
_WRITE_ID_THEN_EXEC = 'echo $$ > "$0" && exec "$@"'


def start(
    command: list[str], *, record: Path, log: Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts `command` as the leader of a session of its own; its output goes to the end of `log`."""
    record.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        _children[record] = subprocess.Popen(
            ["/bin/sh", "-c", _WRITE_ID_THEN_EXEC, str(record), *command],
            cwd=cwd,
            env={**(os.environ if env is None else env), MARK: str(record)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _children[record]


def inherit(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` on top."""
    return {**os.environ, **extra}


def members(records: Iterable[Path]) -> list[psutil.Process]:
    """Every live process (zombies are not) that has the mark of one of `records` or is in its leader's session."""
    records = list(records)
    marks = {str(record) for record in records}
    leaders = {int(text) for record in records if (text := _read(record)).isdigit()}
    marked: dict[int, psutil.Process] = {}
    in_session: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if os.getsid(process.pid) in leaders:
                in_session[process.pid] = process
            if process.environ().get(MARK) in marks:
                marked[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            # Gone meanwhile, or somebody else's and therefore none of ours.
            continue
    # A session's number is not given to a new process while the session has members. So if the leader's number belongs
    # to a process without the mark, our session is over and the number is a stranger's.
    strangers = {pid for pid in leaders if pid in in_session and pid not in marked}
    ours = {pid: p for pid, p in in_session.items() if pid not in marked and _session(pid) not in strangers}
    return [*marked.values(), *ours.values()]


def leader(record: Path) -> int | None:
    """Id of the process that `record` names, if that very process still runs; otherwise None."""
    written = _read(record)
    return next((p.pid for p in members([record]) if str(p.pid) == written), None)


def ended(record: Path) -> bool:
    """Whether the process that `record` names has ended; a child's own exit status is asked where there is one."""
    child = _children.get(record)
    return child.poll() is not None if child is not None else leader(record) is None


def stop(records: Iterable[Path], grace_s: float = GRACE_S) -> list[str]:
    """Ends every member of `records` and deletes the records; returns the names of those that only KILL ended.

    Raises RuntimeError if a process survives KILL for `grace_s` seconds (it hangs in the kernel).
    """
    records = list(records)
    told: set[int] = set()
    deadline = time.monotonic() + grace_s
    while (alive := _lasting(records)) and time.monotonic() < deadline:
        for process in alive:
            # Children that appear after the first round are told too, and nobody is told twice: a second TERM makes
            # some programs drop their own clean-up.
            if process.pid not in told:
                told.add(process.pid)
                _signal(process, signal.SIGTERM)
        time.sleep(POLL_S)
    killed = [_name(process) for process in alive]
    deadline = time.monotonic() + grace_s
    while alive := _lasting(records):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {[p.pid for p in alive]} survive KILL; look at them with `ps -o stat,wchan`")
        for process in alive:
            _signal(process, signal.SIGKILL)
        time.sleep(POLL_S)
    for record in records:
        record.unlink(missing_ok=True)
        if (child := _children.pop(record, None)) is not None:
            child.wait()
    return killed


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _lasting(records: list[Path]) -> list[psutil.Process]:
    """Members, looked for twice before the answer is "none": a process in the middle of an exec has no environment."""
    found = members(records)
    if not found:
        time.sleep(POLL_S)
        found = members(records)
    return found


def _read(record: Path) -> str:
    return record.read_text().strip() if record.is_file() else ""


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        # It ended between being listed and being told: what was wanted.
        return


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.name()}"
    except psutil.NoSuchProcess:
        return str(process.pid)
