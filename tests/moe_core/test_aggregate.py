"""Estimates and their intervals against plain references, and how often the intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_core.errors import DataError
from moe_core.metrics import aggregate
from moe_core.metrics.aggregate import Estimated
from moe_core.metrics.scorer import Measure, SetMeasure
from moe_core.metrics.set_distance import frechet_distance, kernel_distance

PLAIN = Measure("plain", "v")
BINARY = Measure("right", "v", binary=True)


def pictures(seed: int, prompts: int, each: int = 3, kinds: tuple[str, ...] = ("a", "b", "b", "c")) -> pd.DataFrame:
    """Rows of pictures; kinds of unequal size, a value and a weight a picture."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": f"p{prompt}",
            "kind": kinds[prompt % len(kinds)],
            "index": index,
            "v": rng.normal(prompt % 5),
            "w": float(prompt % 4),
        }
        for prompt in range(prompts)
        for index in range(each)
    )


def prompts(values: np.ndarray, kinds: list[str] | None = None) -> pd.DataFrame:
    """A row a prompt, as of `by_prompt`."""
    return pd.DataFrame(
        {"id": [f"p{i}" for i in range(len(values))], "kind": kinds or "", "v": np.asarray(values, float)}
    )


def mean_of_means(rows: pd.DataFrame, kinds: tuple[str, ...] = ()) -> float:
    """Slowly, by hand."""
    means = []
    for prompt in rows["id"].unique():
        own = rows[rows["id"] == prompt]
        if not kinds or own["kind"].iloc[0] in kinds:
            means.append(sum(own["v"]) / len(own))
    return sum(means) / len(means)


def test_a_value_is_the_mean_over_prompts_of_the_means_over_their_pictures():
    # Not all prompts have as many pictures: the mean over pictures would be another number.
    rows = pictures(0, 12).drop(index=[0, 1, 5, 30])
    table = aggregate.by_prompt(rows, ["v"])
    assert list(table["id"]) == [f"p{i}" for i in range(12)]
    found = aggregate.estimate(table, Measure("m", "v", scale=100), 0)
    assert found.value == pytest.approx(100 * mean_of_means(rows))
    assert found.value != pytest.approx(100 * rows["v"].mean(), rel=1e-3)
    assert found.low < found.value < found.high
    assert found.count == 12


def test_kinds_are_chosen_averaged_and_told():
    rows = pictures(1, 20)
    table = aggregate.by_prompt(rows, ["v"])
    by_hand = {kind: mean_of_means(rows, (kind,)) for kind in "abc"}
    over = Measure("m", "v", over_kinds=True, by_kind=True)
    assert aggregate.estimate(table, over, 0).value == pytest.approx(np.mean(list(by_hand.values())))
    assert aggregate.estimate(table, over, 0).value != pytest.approx(mean_of_means(rows), rel=1e-3)
    told = aggregate.by_kind(table, over, 0)
    assert {kind: found.value for kind, found in told.items()} == pytest.approx(by_hand)
    assert [found.count for found in told.values()] == [5, 10, 5]
    some = Measure("m", "v", kinds=("a", "c"))
    assert aggregate.estimate(table, some, 0).value == pytest.approx(mean_of_means(rows, ("a", "c")))
    assert list(aggregate.by_kind(table, some, 0)) == ["a", "c"]


def test_weights_count():
    rows = pictures(2, 12)
    table = aggregate.by_prompt(rows, ["v", "w"])
    found = aggregate.estimate(table, Measure("m", "v", weight="w"), 0)
    means = rows.groupby("id", sort=False)[["v", "w"]].mean()
    assert found.value == pytest.approx(sum(means["v"] * means["w"]) / sum(means["w"]))
    assert found.low < found.value < found.high
    # A prompt of weight 0 changes nothing, whatever it says.
    table.loc[table["w"] == 0, "v"] = 1e6
    assert aggregate.estimate(table, Measure("m", "v", weight="w"), 0).value == pytest.approx(found.value)


def test_an_interval_is_as_wide_as_the_standard_error_says():
    values = np.random.default_rng(0).normal(size=400)
    found = aggregate.estimate(prompts(values), PLAIN, 0, 4000)
    error = values.std(ddof=1) / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    # Strata of their own are drawn within themselves: what they differ by is no uncertainty.
    kinds = ["a", "b"] * 200
    apart = prompts(values + np.array([0.0, 50.0] * 200), kinds)
    within = aggregate.estimate(apart, Measure("m", "v", over_kinds=True), 0)
    assert within.high - within.low < 0.1 * (lambda e: e.high - e.low)(aggregate.estimate(apart, PLAIN, 0))


def covered(make, truth: float, times: int = 150) -> float:
    """The share of repetitions whose interval holds the truth."""
    rng = np.random.default_rng(7)
    found: list[Estimated] = [make(rng) for _ in range(times)]
    assert all(one.low <= one.value <= one.high for one in found)
    return sum(one.low <= truth <= one.high for one in found) / times


def test_intervals_hold_the_truth_about_95_times_of_100():
    def one(rng: np.random.Generator) -> Estimated:
        return aggregate.estimate(prompts(rng.exponential(size=60)), PLAIN, 0, 400)

    def right(rng: np.random.Generator) -> Estimated:
        return aggregate.estimate(prompts(rng.random(40) < 0.95), BINARY, 0, 400)

    def apart(rng: np.random.Generator) -> Estimated:
        hard = rng.normal(size=60)
        ours, theirs = (prompts(hard + rng.normal(size=60)) for _ in range(2))
        return aggregate.difference(ours, theirs, PLAIN, 0, 400)

    assert 0.88 <= covered(one, 1.0) <= 0.99
    assert covered(right, 0.95) >= 0.9
    assert 0.88 <= covered(apart, 0.0) <= 0.99


@pytest.mark.parametrize(("share", "each"), [(0.99, 92), (0.9, 33), (0.5, 20), (0.05, 33)])
def test_intervals_of_a_mean_over_kinds_hold_the_truth_too(share: float, each: int):
    kinds = [kind for kind in "abcdef" for _ in range(each)]
    measure = Measure("m", "v", binary=True, over_kinds=True)

    def one(rng: np.random.Generator) -> Estimated:
        return aggregate.estimate(prompts(rng.random(6 * each) < share, kinds), measure, 0, 400)

    def apart(rng: np.random.Generator) -> Estimated:
        theirs = rng.random(6 * each) < share
        ours = np.where(rng.random(6 * each) < 0.2, rng.random(6 * each) < share, theirs)
        return aggregate.difference(prompts(ours, kinds), prompts(theirs, kinds), measure, 0, 400)

    assert 0.9 <= covered(one, share) <= 0.99
    assert covered(apart, 0.0) >= 0.9


def test_right_on_all_prompts_is_not_sure():
    all_right, none = prompts(np.ones(50)), prompts(np.zeros(50))
    found = aggregate.estimate(all_right, BINARY, 0)
    assert found.value == found.high == 1
    # Agresti and Coull's own interval is 0.91 to 1.01.
    assert found.low == pytest.approx(0.91, abs=0.03)
    assert aggregate.estimate(none, BINARY, 0).high == pytest.approx(0.09, abs=0.03)
    # Without the four more there is no width.
    assert aggregate.estimate(all_right, PLAIN, 0).low == 1
    assert aggregate.estimate(all_right, Measure("m", "v", binary=True, scale=100), 0).low == pytest.approx(
        100 * found.low
    )


def test_two_models_that_differ_on_no_prompt_are_not_the_same_for_sure():
    same = prompts(np.random.default_rng(0).random(50) < 0.7)
    found = aggregate.difference(same, same, BINARY, 0)
    assert found.value == 0
    assert found.low < -0.01
    assert found.high > 0.01

    def rarely(rng: np.random.Generator) -> Estimated:
        theirs = rng.random(50) < 0.6
        # Of every 50 prompts one is right by ours alone, on average; a third of all draws have none.
        return aggregate.difference(prompts(theirs | (rng.random(50) < 0.05)), prompts(theirs), BINARY, 0, 400)

    assert covered(rarely, 0.4 * 0.05) >= 0.9


def test_a_paired_difference_is_narrower_than_two_intervals_of_correlated_models():
    rng = np.random.default_rng(3)
    hard = rng.normal(size=100)
    ours, theirs = prompts(hard + 0.1 * rng.normal(size=100) + 0.2), prompts(hard + 0.1 * rng.normal(size=100))
    found = aggregate.difference(ours, theirs, PLAIN, 0)
    one, other = (aggregate.estimate(table, PLAIN, 0) for table in (ours, theirs))
    assert found.value == pytest.approx(one.value - other.value)
    unpaired = np.hypot(one.high - one.low, other.high - other.low)
    assert found.high - found.low < unpaired / 4
    assert found.low > 0
    assert one.low < other.high
    # By hand: the standard error of the differences of the pairs.
    pairs = (ours["v"] - theirs["v"]).to_numpy()
    assert found.high - found.low == pytest.approx(2 * 1.96 * pairs.std(ddof=1) / 10, rel=0.15)
    back = aggregate.difference(theirs, ours, PLAIN, 0)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    same = aggregate.difference(ours, ours, PLAIN, 0)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_seed_alone_decides():
    table = prompts(np.random.default_rng(0).normal(size=30))
    assert aggregate.estimate(table, PLAIN, 5) == aggregate.estimate(table.copy(), PLAIN, 5)
    one, other = aggregate.estimate(table, PLAIN, 5), aggregate.estimate(table, PLAIN, 6)
    assert one.value == other.value
    assert (one.low, one.high) != (other.low, other.high)
    assert one.low == pytest.approx(other.low, abs=0.1)
    # How many resamples are in memory together is none of the numbers' business.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregate, "_AT_ONCE", 7)
        again = aggregate.estimate(table, PLAIN, 5)
    assert (again.low, again.high) == pytest.approx((one.low, one.high), rel=1e-12)


def test_other_prompts_are_refused():
    table = prompts(np.arange(4.0))
    for other in (table[:3], table[::-1], table.assign(id=["p0", "p1", "p2", "p9"])):
        with pytest.raises(DataError, match="m: the two models were given other prompts"):
            aggregate.difference(table, other, Measure("m", "v"), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_value_that_is_no_number_is_named(value: float | None):
    rows = pictures(0, 3)
    rows["v"] = rows["v"].astype(object)
    rows.loc[4, "v"] = value
    with pytest.raises(DataError, match=r"column v of prompt p1, picture 1, is (nan|inf|None); it must be a number"):
        aggregate.by_prompt(rows, ["v"])


def test_a_measure_without_prompts_is_named():
    table = aggregate.by_prompt(pictures(0, 8), ["v", "w"])
    with pytest.raises(DataError, match=r"m has no prompts to be measured on of \('z',\)"):
        aggregate.estimate(table, Measure("m", "v", kinds=("z",)), 0)
    with pytest.raises(DataError, match="m has no prompts"):
        aggregate.estimate(table[:0], Measure("m", "v"), 0)
    with pytest.raises(DataError, match="m has no prompts"):
        aggregate.estimate(table[table["w"] == 0], Measure("m", "v", weight="w"), 0)


def test_sets_of_features():
    rng = np.random.default_rng(0)
    real, ours, theirs = (rng.normal(shift, size=(60, 4)) for shift in (0.0, 0.4, 0.5))
    ids = [str(i) for i in range(60)]
    for statistic, distance in (("fid", frechet_distance), ("kid", kernel_distance)):
        measure = SetMeasure("m", "features", statistic, "key", "file")
        found = aggregate.set_estimate(ours, ids, real, measure)
        assert found.value == pytest.approx(distance(real, ours))
        assert found.low < found.value < found.high
        assert found.count == 60
        apart = aggregate.set_difference(ours, theirs, ids, real, measure)
        assert apart.value == pytest.approx(distance(real, ours) - distance(real, theirs))
        assert apart.low < apart.value < apart.high
        same = aggregate.set_difference(ours, ours, ids, real, measure)
        assert (same.value, same.low, same.high) == (0, 0, 0)


def test_pictures_of_a_prompt_are_left_out_together():
    rng = np.random.default_rng(1)
    real, alike = rng.normal(size=(80, 3)), np.repeat(rng.normal(0.5, size=(30, 3)), 4, axis=0)
    measure = SetMeasure("m", "features", "fid", "key", "file")
    apart = [str(i) for i in range(120)]
    # Of every prompt four times the same picture, in an order that puts them far from each other.
    order = rng.permutation(120)
    prompts = np.repeat([f"p{i}" for i in range(30)], 4)[order]
    together = aggregate.set_estimate(alike[order], list(prompts), real, measure)
    careless = aggregate.set_estimate(alike[order], apart, real, measure)
    assert together.value == careless.value
    assert together.high - together.low > 1.3 * (careless.high - careless.low)
    assert together.count == 120
