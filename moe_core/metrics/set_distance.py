"""Distances between two sets of pictures by their features: FID and KID, with intervals by the jackknife.

- From feature matrices [N, D] of any extractor. What the features are, and so whether two numbers may be compared, is the caller's to say.
- In float64 throughout, and without random numbers: KID uses all pictures at once instead of random subsets.
- Intervals by delete-a-group jackknife, not by bootstrap: a bootstrap sample holds about 37 % of the pictures not at all and others
  twice, so its covariance is that of a smaller set, and FID, which falls with the number of pictures, comes out too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from moe_core.errors import DataError

Matrix = NDArray[np.float64]
MIN_PICTURES = 2
"""Of either set: one picture has no covariance."""
GROUPS = 20
"""Deletions of a jackknife where the caller has no reason for another number."""
_KERNEL_DEGREE, _KERNEL_OFFSET = 3, 1.0
_ROWS = 2048
"""Rows of the kernel matrix in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A statistic of a set and how sure it is."""

    value: float
    """of the whole set"""
    low: float
    high: float
    """of the 95 % interval around `value`: for the statistic's expectation at this number of pictures"""
    standard_error: float
    bias: float
    """by how much `value` exceeds what infinitely many pictures of the same kind would give, as far as it falls with one over their
    number; of the set that is deleted from alone"""


def frechet_distance(real: Matrix, made: Matrix) -> float:
    """Fréchet distance of two Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017, eq. 6), covariances over N - 1.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as `torchmetrics.image.fid`. The last trace is the sum of the singular values of
    A1^T A2, with S = A A^T: exact where a covariance is singular, whereas eigenvalues of S1 S2 that should be zero are rounding errors
    there, and their square roots are not small. Raises DataError as `kernel_distance` does.
    """
    real, made = _checked(real, made)
    difference = real.mean(0) - made.mean(0)
    roots = [(m - m.mean(0)) / math.sqrt(len(m) - 1) for m in (real, made)]
    one, other = (np.asarray(np.linalg.qr(root, mode="r")) for root in roots)
    cross = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    return float(difference @ difference + sum((root**2).sum() for root in roots) - 2 * cross)


def kernel_distance(real: Matrix, made: Matrix) -> float:
    """KID (Binkowski et al. 2018): unbiased MMD^2 of features [N, D] and [M, D] with the kernel (x.y / D + 1)^3.

    Its expectation is 0 for two sets of one distribution, at any N and M; so it may be negative. `torchmetrics.image.kid` takes the mean
    over random subsets of equal size; this is the same number for one subset that is the whole set.
    Raises DataError for fewer than two rows, unequal widths, or values that are not finite.
    """
    real, made = _checked(real, made)
    within = sum((_kernel_sum(m, m) - _kernel_diagonal(m)) / (len(m) * (len(m) - 1)) for m in (real, made))
    return within - 2 * _kernel_sum(real, made) / (len(real) * len(made))


def even_groups(count: int, number: int = GROUPS) -> NDArray[np.int64]:
    """Labels [count] of `number` groups of neighbours, equal in size give or take one. For a jackknife.

    Several pictures of a prompt belong into one group: label the prompts, and repeat the labels.
    """
    if not 2 <= number <= count:
        raise DataError(f"{count} pictures are to be cut into {number} groups; there must be 2 to {count} groups")
    return np.arange(count, dtype=np.int64) * number // count


def jackknife(statistic: Callable[[NDArray[np.intp]], float], groups: Sequence[int] | NDArray[np.int64]) -> Estimate:
    """95 % interval of a statistic by deleting a group at a time (Busing, Meijer, van der Leeden 1999, for groups of unequal size).

    `statistic` is given the numbers of the rows that are kept; `groups` is the label of each row. A difference of two models is a
    statistic too: of both on the same rows. Student's t with as many degrees of freedom as groups less one.
    Raises DataError for fewer than two groups.
    """
    labels = np.asarray(groups)
    names, sizes = np.unique(labels, return_counts=True)
    if labels.ndim != 1 or len(names) < 2:
        raise DataError(f"a jackknife needs at least two groups of rows; there are {len(names)}")
    value = statistic(np.arange(len(labels)))
    without = np.array([statistic(np.flatnonzero(labels != name)) for name in names])
    ratio = len(labels) / sizes
    pseudo = ratio * value - (ratio - 1) * without
    corrected = float((pseudo / ratio).sum())
    error = math.sqrt(float(((pseudo - corrected) ** 2 / (ratio - 1)).mean()))
    half = float(student_t.ppf(0.975, len(names) - 1)) * error
    return Estimate(value, value - half, value + half, error, value - corrected)


def _checked(real: Matrix, made: Matrix) -> tuple[Matrix, Matrix]:
    matrices = []
    for name, matrix in (("real", real), ("made", made)):
        whole = np.asarray(matrix, np.float64)
        if whole.ndim != 2 or len(whole) < MIN_PICTURES:
            raise DataError(
                f"features of the {name} pictures are {list(whole.shape)}; they must be [N, D] with N at least {MIN_PICTURES}"
            )
        if not np.isfinite(whole).all():
            raise DataError(f"features of the {name} pictures are not all finite")
        matrices.append(whole)
    if matrices[0].shape[1] != matrices[1].shape[1]:
        raise DataError(
            f"features of the real pictures are {matrices[0].shape[1]} wide and of the made ones {matrices[1].shape[1]};"
            " both must be of one extractor"
        )
    return matrices[0], matrices[1]


def _kernel_sum(one: Matrix, other: Matrix) -> float:
    """Over all pairs of rows."""
    parts = (one[start : start + _ROWS] @ other.T / one.shape[1] for start in range(0, len(one), _ROWS))
    return float(sum(((part + _KERNEL_OFFSET) ** _KERNEL_DEGREE).sum() for part in parts))


def _kernel_diagonal(matrix: Matrix) -> float:
    return float((((matrix**2).sum(1) / matrix.shape[1] + _KERNEL_OFFSET) ** _KERNEL_DEGREE).sum())
