"""FID and KID of feature matrices against torchmetrics, and the jackknife beside the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from moe_core.errors import DataError
from moe_core.metrics.set_distance import Matrix, even_groups, frechet_distance, jackknife, kernel_distance


class _Given(nn.Module):
    """A feature extractor whose pictures are the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _normal(seed: int, rows: int, width: int, shift: float = 0.0, scale: float = 1.0) -> Matrix:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return shift + scale * rng.standard_normal((rows, width)) @ mixing


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_frechet_distance_is_that_of_torchmetrics(shift: float):
    real, made = _normal(0, 300, 12), _normal(1, 200, 12, shift, 1.3)
    metric = FrechetInceptionDistance(feature=_Given(12)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(made), real=False)
    assert frechet_distance(real, made) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_frechet_distance_where_the_covariances_are_known():
    # Two points at +-a on an axis have variance 2 a^2 there: (sqrt(2) * 3 - sqrt(2) * 1)^2 = 8, and the means are (4, 0) apart.
    real, made = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[7.0, 0.0], [1.0, 0.0]])
    assert frechet_distance(real, made) == pytest.approx(16 + 8)
    # Along different axes nothing is shared: the traces add up.
    across = np.array([[0.0, 3.0], [0.0, -3.0]])
    assert frechet_distance(real, across) == pytest.approx(2 + 18)


def test_a_set_is_at_no_distance_from_itself_though_it_has_fewer_rows_than_columns():
    few = _normal(0, 10, 40)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")
def test_kernel_distance_is_that_of_torchmetrics_on_one_whole_subset():
    real, made = _normal(0, 60, 8), _normal(1, 60, 8, 0.5)
    metric = KernelInceptionDistance(feature=_Given(8), subsets=1, subset_size=60)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(made), real=False)
    assert kernel_distance(real, made) == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_kernel_distance_of_sets_of_unequal_size_by_hand():
    real, made = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [0.0, 0.0]])

    def kernel(x: Matrix, y: Matrix) -> float:
        return (float(x @ y) / 2 + 1) ** 3

    within = np.mean([kernel(real[i], real[j]) for i in range(3) for j in range(3) if i != j])
    others = np.mean([kernel(made[i], made[j]) for i in range(2) for j in range(2) if i != j])
    across = np.mean([kernel(x, y) for x in real for y in made])
    assert kernel_distance(real, made) == pytest.approx(within + others - 2 * across)


def test_kernel_distance_has_no_bias_and_frechet_distance_has():
    pairs = [(_normal(2 * i, 40, 6), _normal(2 * i + 1, 80, 6)) for i in range(200)]
    kernels = np.array([kernel_distance(*pair) for pair in pairs])
    assert abs(kernels.mean()) < 4 * kernels.std() / np.sqrt(len(kernels))
    assert min(frechet_distance(*pair) for pair in pairs) > 0


def test_bootstrap_of_fid_is_biased_upwards_and_the_jackknife_covers():
    real = _normal(0, 5000, 8)

    def distance(made: Matrix) -> float:
        return frechet_distance(real, made)

    expected = np.mean([distance(_normal(1000 + i, 200, 8, 0.1)) for i in range(300)])
    bootstrap_above = jackknife_covers = bootstrap_covers = 0
    for i in range(60):
        made = _normal(5000 + i, 200, 8, 0.1)
        rng = np.random.default_rng(i)
        drawn = [distance(made[rng.integers(200, size=200)]) for _ in range(60)]
        bootstrap_above += np.mean(drawn) > distance(made)
        low, high = np.percentile(drawn, [2.5, 97.5])
        bootstrap_covers += low <= expected <= high
        found = jackknife(lambda rows, made=made: distance(made[rows]), even_groups(200))
        assert found.bias > 0
        jackknife_covers += found.low <= expected <= found.high
    assert bootstrap_above == 60
    assert jackknife_covers >= 51
    assert jackknife_covers >= bootstrap_covers


def test_jackknife_of_a_mean_is_the_standard_error():
    values = np.random.default_rng(0).standard_normal(50)
    found = jackknife(lambda rows: float(values[rows].mean()), np.arange(50))
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert found.bias == pytest.approx(0, abs=1e-12)
    assert found.high - found.value == pytest.approx(2.0096 * found.standard_error, rel=1e-3)


def test_jackknife_corrects_the_bias_of_a_variance():
    values = np.random.default_rng(0).standard_normal(30)
    found = jackknife(lambda rows: float(values[rows].var()), np.arange(30))
    assert found.value - found.bias == pytest.approx(values.var(ddof=1))


def test_jackknife_with_groups_of_unequal_size():
    # The mean of a mean's pseudo-values, weighted by the groups, is the mean itself.
    values, groups = np.arange(7.0) ** 2, [0, 0, 0, 1, 1, 2, 3]
    found = jackknife(lambda rows: float(values[rows].mean()), groups)
    assert found.bias == pytest.approx(0, abs=1e-12)
    means = [values[:3].mean(), values[3:5].mean(), values[5], values[6]]
    ratio = 7 / np.array([3, 2, 1, 1])
    assert found.standard_error == pytest.approx(np.sqrt(np.mean((means - values.mean()) ** 2 / (ratio - 1))))


def test_groups_are_even_and_of_neighbours():
    groups = even_groups(45, 20)
    assert (np.diff(groups) >= 0).all()
    assert set(np.bincount(groups)) == {2, 3}


def test_faults_are_named():
    good = _normal(0, 5, 3)
    with pytest.raises(DataError, match=r"made pictures are \[1, 3\]"):
        frechet_distance(good, good[:1])
    with pytest.raises(DataError, match="3 wide and of the made ones 2"):
        kernel_distance(good, good[:, :2])
    with pytest.raises(DataError, match="not all finite"):
        frechet_distance(np.full((3, 3), np.nan), good)
    with pytest.raises(DataError, match="there are 1"):
        jackknife(lambda rows: 0.0, [0, 0])
    with pytest.raises(DataError, match="20 groups"):
        even_groups(5)
