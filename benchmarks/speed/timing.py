"""Times of several ways to do the same, taken in turn: what slows the machine down for a while slows all of a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Times:
    """Of one way."""

    median_s: float
    low_s: float
    """first quartile over rounds"""
    high_s: float
    """third quartile"""
    ratio: float
    """over the first way's time in the same round, median over rounds"""
    ratio_low: float
    ratio_high: float


def in_turn(
    ways: Mapping[str, Callable[[], Any]], device: torch.device, *, rounds: int = 5, seconds: float = 60.0
) -> dict[str, dict[str, float]]:
    """Name -> `Times`. A round that does not count comes first; none begins after `seconds`, but three are made in any case.

    The first way is what the others are compared with.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    names = list(ways)
    for turn in range(rounds + 1):
        # Every other round runs backwards: what one leaves in caches and heap is not always the same one's burden.
        for name in names if turn % 2 else reversed(names):
            own = seconds_of(ways[name], device)
            if turn:
                taken[name].append(own)
        if turn >= 3 and time.perf_counter() - began > seconds:
            break
    base = next(iter(taken.values()))
    return {name: asdict(_times(times, base)) for name, times in taken.items()}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, until the device has done what it was given."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _times(times: list[float], base: list[float]) -> Times:
    ratios = [own / other for own, other in zip(times, base)]
    rounded = [float(f"{value:.4g}") for value in (*_quartiles(times), *_quartiles(ratios))]
    return Times(*rounded)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
