"""What a training stage asks its workers to do, and where they leave it. No torch here: the driver reads this too."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_core import errors
from moe_core.config import OptimizerConfig
from tasks import outs

METRICS = "metrics.jsonl"
PRODUCT = "product"
FAILURE = "failure.json"
NOTES = "notes.log"
"""Lines that a worker wants its user to see, below the resume folder; Ray's own worker logs stay off the terminal."""


@dataclass(frozen=True)
class Phase:
    """One training run from start to product; a stage has one or more, in order."""

    name: str
    build: str
    """`package.module:function`; the worker calls function(device=..., **arguments) and gets a Trainee"""
    arguments: dict[str, Any]
    optimizer: OptimizerConfig
    validate_every: int
    log_every: int
    checkpoint_every: int


def call(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def leave_failure(folder: Path, error: errors.Dense2MoEError) -> None:
    """A worker leaves the error that it raised on purpose."""
    outs.write_json(folder / FAILURE, {"kind": type(error).__name__, "message": str(error)})


def failure_in(folder: Path) -> errors.Dense2MoEError | None:
    """The error a worker left, if any."""
    path = folder / FAILURE
    if not path.exists():
        return None
    failure = json.loads(path.read_text())
    return getattr(errors, failure["kind"])(failure["message"])


def take_failure(folder: Path) -> errors.Dense2MoEError | None:
    """The same; it is removed."""
    failure = failure_in(folder)
    (folder / FAILURE).unlink(missing_ok=True)
    return failure


@dataclass
class MetricsTail:
    """Reads a growing `metrics.jsonl`: every record once, in order, also when a restarted worker cuts the file back."""

    path: Path
    last: dict[str, int] = field(default_factory=dict)
    """split -> the last step already seen; steps up to it are passed over (they are the same, bit for bit)"""
    _offset: int = 0
    _inode: int = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole records that came since the last call."""
        if not self.path.exists():
            return
        if (inode := self.path.stat().st_ino) != self._inode:
            # A restarted worker has put a shorter file in its place.
            self._inode, self._offset = inode, 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            record = json.loads(line)
            if record["step"] > self.last.get(record["split"], -1):
                self.last[record["split"]] = record["step"]
                yield record
