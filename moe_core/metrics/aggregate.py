"""What rows of single pictures come to: means over prompts with 95 % intervals, and differences of two models on the same prompts.

- The unit that is drawn again is the prompt: pictures of one prompt are not independent.
- Percentile bootstrap (Efron 1979); where a measure is the mean of its kinds' means, prompts are drawn within each kind.
- A column of right and wrong gets two right and two wrong prompts more before it is drawn from (Agresti and Coull's "plus four"), since 50
  right ones of 50 would give an interval without width. They are four in all, shared out among the kinds: four in each of six would
  pull the interval so far to the middle that it misses a truth of 0.99 half the time. The value itself is left as it is.
- A difference draws the same prompts for both models. The four more are of the four possible pairs, so that two models that differ on no
  prompt are not held to be equal for sure (Agresti and Min 2005).
- Sets of features (FID, KID) have no bootstrap: `moe_core.metrics.set_distance` says why, and makes their jackknife.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_core.errors import DataError
from moe_core.metrics import set_distance
from moe_core.metrics.scorer import Measure, SetMeasure

Vector = NDArray[np.float64]

DRAWS = "bootstrap"
"""What the draws of intervals are seeded for; the same for every model, so that differences are paired."""
RESAMPLES = 1000
CONFIDENCE = 0.95
_AT_ONCE = 50
"""Resamples whose counts are in memory together."""
_FOUR = ((0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0))
"""Two right and two wrong, of the first model and of the one that it is compared with."""
_STATISTICS: dict[str, Callable[[Vector, Vector], float]] = {
    "fid": set_distance.frechet_distance,
    "kid": set_distance.kernel_distance,
}


@dataclass(frozen=True)
class Estimated:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float
    count: int
    """prompts (or, of a set, pictures) that it is of"""


def by_prompt(pictures: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Rows of pictures (`id`, `kind`, `index` and value columns) -> a row a prompt, in their order: means over a prompt's pictures.

    Raises DataError for a value that is missing or no number: nothing is averaged over what is left.
    """
    for column in columns:
        wrong = ~np.isfinite(pictures[column].to_numpy(np.float64))
        if wrong.any():
            first = pictures[wrong].iloc[0]
            raise DataError(
                f"column {column} of prompt {first['id']}, picture {first['index']}, is {first[column]}; it must be a number"
            )
    grouped = pictures.groupby("id", sort=False)
    table = grouped[columns].mean() if columns else pd.DataFrame(index=pd.Index(pictures["id"].unique(), name="id"))
    return table.assign(kind=grouped["kind"].first()).reset_index()


def estimate(prompts: pd.DataFrame, measure: Measure, seed: int, resamples: int = RESAMPLES) -> Estimated:
    """A measure over prompts, a table of `by_prompt`. Raises DataError where it has no prompts."""
    strata = _strata(prompts, measure)
    drawn = _resampled([strata], measure, seed, resamples)[0]
    low, high = _interval(drawn)
    value = measure.scale * _value(strata)
    # The two prompts more of each sort draw the interval to the middle; it still must hold the value.
    return Estimated(value, min(low, value), max(high, value), sum(len(values) for values, _ in strata))


def by_kind(prompts: pd.DataFrame, measure: Measure, seed: int, resamples: int = RESAMPLES) -> dict[str, Estimated]:
    """The same for each kind alone, in the order in which the kinds come."""
    kinds = [kind for kind in prompts["kind"].unique() if not measure.kinds or kind in measure.kinds]
    return {kind: estimate(prompts[prompts["kind"] == kind], measure, seed, resamples) for kind in kinds}


def difference(
    ours: pd.DataFrame, theirs: pd.DataFrame, measure: Measure, seed: int, resamples: int = RESAMPLES
) -> Estimated:
    """Ours less theirs on the same prompts. Raises DataError where these differ."""
    if list(ours["id"]) != list(theirs["id"]):
        raise DataError(
            f"{measure.name}: the two models were given other prompts; a paired difference needs the same ones"
        )
    pair = [_strata(ours, measure), _strata(theirs, measure)]
    drawn = _resampled(pair, measure, seed, resamples)
    low, high = _interval(drawn[0] - drawn[1])
    value = measure.scale * (_value(pair[0]) - _value(pair[1]))
    return Estimated(value, min(low, value), max(high, value), sum(len(values) for values, _ in pair[0]))


def set_estimate(features: Vector, prompts: Sequence[str], real: Vector, measure: SetMeasure) -> Estimated:
    """The distance of pictures' features [N, D] to the reference's [M, D], with the jackknife's interval.

    `prompts`: the prompt's id of each picture; those of one prompt are left out together.
    """
    statistic = _STATISTICS[measure.statistic]
    found = set_distance.jackknife(lambda rows: statistic(real, features[rows]), _groups(prompts))
    return Estimated(found.value, found.low, found.high, len(features))


def set_difference(
    ours: Vector, theirs: Vector, prompts: Sequence[str], real: Vector, measure: SetMeasure
) -> Estimated:
    """Ours less theirs, the same prompts' pictures left out of both."""
    statistic = _STATISTICS[measure.statistic]
    found = set_distance.jackknife(
        lambda rows: statistic(real, ours[rows]) - statistic(real, theirs[rows]), _groups(prompts)
    )
    return Estimated(found.value, found.low, found.high, len(ours))


def _groups(prompts: Sequence[str]) -> NDArray[np.int64]:
    numbers, found = pd.factorize(np.asarray(prompts))
    return set_distance.even_groups(len(found), min(set_distance.GROUPS, len(found)))[numbers]


_Strata = list[tuple[Vector, Vector]]
"""Values and weights of the prompts that are drawn among each other."""


def _strata(prompts: pd.DataFrame, measure: Measure) -> _Strata:
    own = prompts[prompts["kind"].isin(measure.kinds)] if measure.kinds else prompts
    kinds = list(own["kind"].unique()) if measure.over_kinds else [None]
    strata = []
    for kind in kinds:
        part = own if kind is None else own[own["kind"] == kind]
        values = part[measure.column].to_numpy(np.float64)
        weights = np.ones(len(part)) if measure.weight is None else part[measure.weight].to_numpy(np.float64)
        strata.append((values, weights))
    if not strata or not all(weights.sum() > 0 for _, weights in strata):
        raise DataError(
            f"{measure.name} has no prompts to be measured on" + (f" of {measure.kinds}" if measure.kinds else "")
        )
    return strata


def _value(strata: _Strata) -> float:
    return float(np.mean([(values * weights).sum() / weights.sum() for values, weights in strata]))


def _resampled(models: list[_Strata], measure: Measure, seed: int, resamples: int) -> list[Vector]:
    """Per model the measure of each resample; all models are given the same draws."""
    rng = np.random.default_rng(seed)
    sums = [np.zeros(resamples) for _ in models]
    for stratum in range(len(models[0])):
        parts = [model[stratum] for model in models]
        likely = np.ones(len(parts[0][0]))
        if measure.binary:
            parts = [_plus_four(*part, more) for part, more in zip(parts, _FOUR, strict=False)]
            likely = np.concatenate([likely, np.full(4, 1 / len(models[0]))])
        count = round(likely.sum())
        for first in range(0, resamples, _AT_ONCE):
            at_once = min(_AT_ONCE, resamples - first)
            times = rng.multinomial(count, likely / likely.sum(), size=at_once).astype(np.float64)
            for total, (values, weights) in zip(sums, parts, strict=True):
                drawn = times @ weights
                # A draw may hold no prompt that counts; such a one says nothing of the measure.
                with np.errstate(invalid="ignore"):
                    total[first : first + at_once] += (times @ (values * weights)) / drawn
    return [measure.scale * total / len(models[0]) for total in sums]


def _plus_four(values: Vector, weights: Vector, more: tuple[float, ...]) -> tuple[Vector, Vector]:
    return np.concatenate([values, more]), np.concatenate([weights, np.full(4, weights.mean())])


def _interval(drawn: Vector) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(drawn, [tail, 100 - tail])
    return float(low), float(high)
