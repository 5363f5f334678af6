"""Intervals and verdicts against tables and by hand."""

from __future__ import annotations

import math

import pytest

from moe_core.metrics.paired import compare, interval


def test_an_interval_is_student_s() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Of a table: 2.776 for four degrees of freedom; the deviation of these five is sqrt(2.5).
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert interval([2.0]).half == math.inf
    with pytest.raises(ValueError, match="there are 0 values"):
        interval([])


def test_a_difference_between_pairs_is_found_where_the_values_overlap() -> None:
    than = [1.0, 5.0, 9.0, 13.0]
    found = compare([value - 0.5 - 0.01 * i for i, value in enumerate(than)], than)
    assert found.verdict == "holds"
    assert found.difference.mean == pytest.approx(-0.515)
    assert compare(than, [value - 0.5 - 0.01 * i for i, value in enumerate(than)]).verdict == "does not hold here"


@pytest.mark.parametrize(
    ("better", "than", "ratio", "rising", "verdict"),
    [
        ([0.77, 0.775, 0.765], [1.0, 1.0, 1.0], 0.8, False, "holds"),
        ([0.85, 0.86, 0.84], [1.0, 1.0, 1.0], 0.8, False, "does not hold here"),
        ([0.79, 0.81, 0.80], [1.0, 1.0, 1.0], 0.8, False, "undecided"),
        ([0.9, 0.91, 0.89], [0.8, 0.8, 0.8], 1.0, True, "holds"),
        # As good to 2 %.
        ([0.795, 0.794, 0.796], [0.8, 0.8, 0.8], 1.02, True, "holds"),
        ([0.7, 0.71, 0.69], [0.8, 0.8, 0.8], 1.02, True, "does not hold here"),
        ([0.5, 0.5], [0.5, 0.5], 1.0, True, "undecided"),
        # One seed decides nothing.
        ([0.1], [1.0], 1.0, False, "undecided"),
    ],
)
def test_verdicts(better: list[float], than: list[float], ratio: float, rising: bool, verdict: str) -> None:
    assert compare(better, than, ratio, rising).verdict == verdict


def test_of_a_zero_there_is_no_ratio_and_of_unequal_lists_nothing() -> None:
    assert compare([0.1, 0.2], [0.0, 0.1], rising=True).ratio is None
    with pytest.raises(ValueError, match="there are 1 and 2 values"):
        compare([1.0], [1.0, 2.0])
