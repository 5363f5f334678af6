"""Whether one model is better than another, from runs paired by seed: the mean difference with its 95 % interval (Student's t)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student_t

Verdict = Literal["holds", "does not hold here", "undecided"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its interval; infinite where there is one value only."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Its lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values; t with as many degrees of freedom as there are values, less one. Raises ValueError for none."""
    if not values:
        raise ValueError("there are 0 values; a mean needs at least one")
    if len(values) == 1:
        return Interval(values[0], math.inf)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Comparison:
    """One measure of two arms, seed by seed."""

    better: float
    """mean of the arm that is said to be better"""
    than: float
    difference: Interval
    """better - than"""
    ratio: Interval | None
    """better / than; None where a value of `than` is 0, as an accuracy may be"""
    verdict: Verdict


def compare(better: Sequence[float], than: Sequence[float], ratio: float = 1.0, rising: bool = False) -> Comparison:
    """Of paired values: does better <= ratio * than hold, or where more is better (`rising`) better >= than / ratio?

    It holds where the whole interval of the mean margin says so, does not hold where the whole interval says the opposite, and is undecided
    otherwise. Raises ValueError unless there are as many values of both, and at least one.
    """
    if len(better) != len(than) or not better:
        raise ValueError(f"there are {len(better)} and {len(than)} values; there must be equally many, at least one")
    pairs = list(zip(better, than, strict=True))
    margin = interval([a - b / ratio if rising else ratio * b - a for a, b in pairs])
    verdict: Verdict = "undecided"
    if margin.low > 0:
        verdict = "holds"
    elif margin.high < 0:
        verdict = "does not hold here"
    return Comparison(
        better=statistics.fmean(better),
        than=statistics.fmean(than),
        difference=interval([a - b for a, b in pairs]),
        ratio=interval([a / b for a, b in pairs]) if all(than) else None,
        verdict=verdict,
    )
