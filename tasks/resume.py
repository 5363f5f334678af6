"""The folder from which a killed stage goes on: in the main checkout, named by the stage's identity, held under a lock.

- `.resume/<stage>-<fingerprint>/` has `identity.json`, a folder a training phase, and whatever the stage wants to find again.
- The lock is the kernel's (flock): it ends with the process that held it, however that died.
- A second, equal run waits; what the first one leaves lets it finish at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from moe_core.errors import CheckpointError
from tasks import outs
from tasks.fingerprint import Identity


class ResumeFolder:
    """A context: inside it this process alone owns `path`, which then holds what an earlier, killed run left."""

    def __init__(self, root: Path, identity: Identity) -> None:
        self.identity = identity
        self.path = root / f"{identity.stage}-{identity.fingerprint}"
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _acquire(self.path.with_name(self.path.name + ".lock"))
        try:
            self.path.mkdir(exist_ok=True)
            self._check()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.close()

    def finish(self) -> None:
        """Called when the stage's outs stand: removes the folder, unless an equal run waits for it."""
        if not _waiting(self.path.with_name(self.path.name + ".lock")):
            shutil.rmtree(self.path)

    def _check(self) -> None:
        file = self.path / "identity.json"
        if not file.exists():
            outs.write_json(file, asdict(self.identity))
            return
        try:
            there = Identity(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); remove {self.path} to start the stage anew") from error
        if difference := self.identity.difference(there):
            raise CheckpointError(
                f"resume folder {self.path} belongs to other parameters: {'; '.join(difference)}; remove it to start anew"
            )


def _acquire(path: Path) -> IO[str]:
    """Locks `path`, waiting for its holder; from before until then a file beside it tells the holder that someone waits."""
    mark = path.with_name(f"{path.name}.waits-{os.getpid()}")
    mark.touch()
    file = path.open("a")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run holds {path}; waiting for it to finish", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        mark.unlink()
    return file


def _waiting(lock: Path) -> bool:
    """Whether a living process waits for `lock`; marks of dead ones are removed."""
    alive = False
    for mark in lock.parent.glob(f"{lock.name}.waits-*"):
        if Path(f"/proc/{mark.name.rpartition('-')[2]}").exists():
            alive = True
        else:
            mark.unlink()
    return alive
