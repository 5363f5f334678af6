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
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moe_core.config import TimestepConfig

_SIGMA, _NOISE, _ORDER = range(3)
"""What a stream is for: the top word of Philox's counter, so that the purposes of one (seed, position) never
overlap."""


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
    return [int(_permutation(seed, position // n, n)[position % n]) for position in positions]


def _stream(seed: int, position: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, position], counter=[0, 0, 0, purpose]))


@lru_cache(maxsize=2)  # a batch touches at most two epochs, unless it is larger than the data set
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return _stream(seed, epoch, _ORDER).permutation(n)


def _shift(sigma: np.ndarray, shift: float) -> np.ndarray:
    """FLUX's resolution shift, as in FlowMatchEulerDiscreteScheduler (shift = exp(mu) where mu is dynamic)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
