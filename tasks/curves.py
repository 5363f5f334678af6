"""A training run's curve: about a hundred points, made from the losses of every step.

The window is a function of the number of steps alone, so the same training gives the same table wherever and with whatever interruptions it ran.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import outs

POINTS = 100
NOT_CURVES = frozenset({"split", "step", "seconds"})


@dataclass(frozen=True)
class Point:
    """Values at a step: train losses are means over the window that ends there, validation is as measured."""

    split: str
    step: int
    values: dict[str, float]


@dataclass
class Curve:
    """Turns records of metrics.jsonl, in order, into points."""

    steps: int
    _window: list[dict[str, Any]] = field(default_factory=list)

    def add(self, records: Iterable[dict[str, Any]]) -> Iterator[Point]:
        """The points that these records complete."""
        size = max(1, self.steps // POINTS)
        for record in records:
            values = {name: value for name, value in record.items() if name not in NOT_CURVES}
            if record["split"] != "train":
                yield Point(record["split"], record["step"], values)
                continue
            self._window.append(values)
            if record["step"] % size == 0 or record["step"] == self.steps:
                window, self._window = self._window, []
                yield Point("train", record["step"], {n: sum(v[n] for v in window) / len(window) for n in values})


def read(path: Path, steps: int) -> list[Point]:
    """The points of a finished metrics.jsonl."""
    with path.open(encoding="utf-8") as file:
        return list(Curve(steps).add(json.loads(line) for line in file))


def write(path: Path, points: list[Point]) -> None:
    """`reports/curves/<stage>.csv`: columns step, split, loss, then the other metrics by name; ordered by step."""
    names = sorted({name for point in points for name in point.values}, key=lambda name: (name != "loss", name))
    ordered = sorted(points, key=lambda point: (point.step, point.split))
    outs.write_csv(path, ["step", "split", *names], [{"step": p.step, "split": p.split, **p.values} for p in ordered])


def last(points: list[Point], split: str) -> dict[str, float]:
    """The values of the last point of a split; empty without one."""
    found = [point for point in points if point.split == split]
    return found[-1].values if found else {}
