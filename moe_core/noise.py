"""Noise, noise levels and sample order, each a function of (seed, position) and of nothing else.

- A position is the global number of a sample in a run: step * batch_size + i. How positions are dealt to workers,
  or where a run was resumed, changes nothing.
- Every position has its own Philox stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): the key
  is (seed, position), so no two positions share a stream. torch's CPU generator keeps 32 bits of its seed, where
  among a million samples some hundred would collide.
- Noise is made on the CPU in float32, so that it is the same on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moe_core.config import TimestepConfig

_SIGMA, _NOISE, _ORDER, _BUCKET = range(4)
"""What a stream is for: the top word of Philox's counter, so that the purposes of one (seed, position) never
overlap."""
_BLOCK = 4096
"""Global batches whose buckets are drawn from one stream."""


def derive_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose of a run (say `moe_kd`), so that stages with one `seed` do not see the same noise; in
    [0, 2**63)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


def draw(
    seed: int, positions: Sequence[int], shape: tuple[int, ...], timesteps: TimestepConfig
) -> tuple[Tensor, Tensor]:
    """Gaussian noise [B, *shape] and noise levels sigma [B] in (0, 1], float32, for the samples at these positions."""
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    sigma = np.empty(len(positions), dtype=np.float64)
    levels = sampler_sigmas(timesteps) if timesteps.kind == "discrete" else None
    for row, position in enumerate(positions):
        generator = _stream(seed, position, _SIGMA)
        if levels is None:
            sigma[row] = _sigmoid(generator.normal(timesteps.mean, timesteps.std))
        else:
            sigma[row] = levels[generator.integers(len(levels))]
        _stream(seed, position, _NOISE).standard_normal(dtype=np.float32, out=noise[row])
    if levels is None:
        sigma = _shift(sigma, timesteps.shift)
    return torch.from_numpy(noise), torch.from_numpy(sigma.astype(np.float32))


def sampler_sigmas(timesteps: TimestepConfig) -> np.ndarray:
    """The levels that a sampler of `timesteps.steps` steps visits, high to low: FluxPipeline's 1 ... 1/steps,
    shifted. Float64 [steps]."""
    return _shift(np.linspace(1.0, 1.0 / timesteps.steps, timesteps.steps), timesteps.shift)


def sample_index(seed: int, positions: Sequence[int], n: int) -> list[int]:
    """Which of n samples stands at each position: every epoch (n positions) is a permutation of its own.

    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; there must be at least one sample to draw from")
    permutation = _permutations(seed, n)
    return [int(permutation(position // n)[position % n]) for position in positions]


def bucket_rows(seed: int, positions: Sequence[int], sizes: Sequence[int], group: int) -> list[int]:
    """Which sample of a data set in buckets of `sizes` samples, numbered through, stands at each position.

    The positions that make one global batch (`group` of them, from a multiple of `group`) get samples of one bucket, drawn with
    probability proportional to its size; which batch it is decides, not which worker. Within a bucket every epoch is a permutation.
    With one bucket this is `sample_index`. Raises ValueError for positions of more than one global batch.
    """
    if len(batches := {position // group for position in positions}) != 1:
        raise ValueError(
            f"positions {list(positions)} are of {len(batches)} global batches of {group}; they must be of one"
        )
    batch = batches.pop()
    bucket, earlier = _bucket_of(seed, tuple(sizes), batch)
    # As if the bucket's batches stood one after the other.
    own = [position + (earlier - batch) * group for position in positions]
    start = sum(sizes[:bucket])
    return [start + row for row in sample_index(seed, own, sizes[bucket])]


def _bucket_of(seed: int, sizes: tuple[int, ...], batch: int) -> tuple[int, int]:
    """The bucket of a global batch, and how many earlier batches were of the same."""
    block, place = divmod(batch, _BLOCK)
    drawn = _buckets(seed, sizes, block)
    bucket = int(drawn[place])
    earlier = sum(int(_bucket_counts(seed, sizes, before)[bucket]) for before in range(block))
    return bucket, earlier + int((drawn[:place] == bucket).sum())


@lru_cache(maxsize=2)
def _buckets(seed: int, sizes: tuple[int, ...], block: int) -> np.ndarray:
    ends = np.cumsum(sizes)
    drawn = _stream(seed, block, _BUCKET).integers(ends[-1], size=_BLOCK)
    return np.searchsorted(ends, drawn, side="right")


@lru_cache(maxsize=4096)
def _bucket_counts(seed: int, sizes: tuple[int, ...], block: int) -> np.ndarray:
    return np.bincount(_buckets(seed, sizes, block), minlength=len(sizes))


def _stream(seed: int, position: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, purpose]))


@lru_cache(maxsize=256)  # one a bucket
def _permutations(seed: int, n: int) -> Callable[[int], np.ndarray]:
    """Epoch -> permutation of n."""

    @lru_cache(maxsize=2)  # a batch touches at most two epochs, unless it is larger than the data set
    def permutation(epoch: int) -> np.ndarray:
        return _stream(seed, epoch, _ORDER).permutation(n)

    return permutation


def _shift(sigma: np.ndarray, shift: float) -> np.ndarray:
    """FLUX's resolution shift, as in FlowMatchEulerDiscreteScheduler (shift = exp(mu) where mu is dynamic)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
