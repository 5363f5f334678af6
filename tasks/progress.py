"""How far a stage has come: a bar on a terminal, and JSON lines for whoever started it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

PROGRESS_FILE = "DENSE2MOE_PROGRESS"
"""Environment variable: a file to which one JSON line an event is appended."""


Told = Callable[[int, int, float], None]
"""Is called with pictures done, all of them, and pictures a second."""

SAY_S = 30.0
"""Seconds between lines of a log that is no terminal."""


class Progress:
    """Progress of one stage, phase after phase.

    - A line is {"stage", "phase", "step", "steps", "loss"}; loss is null where there is none.
    - The bar stands on stderr, and only where that is a terminal.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._phase: str | None = None
        self._bar: tqdm | None = None
        self._said = time.monotonic()
        path = os.environ.get(PROGRESS_FILE)
        self._path = Path(path) if path else None

    def update(self, phase: str, step: int, steps: int, loss: float | None = None) -> None:
        """Tells that `phase` has done `step` of its `steps`."""
        if self._path is not None:
            event = {"stage": self.stage, "phase": phase, "step": step, "steps": steps, "loss": loss}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        if sys.stderr.isatty():
            if self._bar is None or phase != self._phase:
                self.close()
                self._bar = tqdm(total=steps, desc=f"{self.stage} {phase}", leave=True, dynamic_ncols=True)
            if loss is not None:
                self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self._bar.update(step - self._bar.n)
        self._phase = phase

    def pictures(self, phase: str, done: int, count: int, rate: float) -> None:
        """The same for pictures; `rate` is how many there are a second."""
        left = (count - done) / rate if rate else float("nan")
        self.update(phase, done, count)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.3g} pictures/s, {left:.0f} s left", refresh=False)
        elif done == count or time.monotonic() - self._said > SAY_S:
            self._said = time.monotonic()
            print(
                f"{phase}: {done} of {count} pictures, {rate:.3g} a second, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
