"""The dense models that Dense2MoE is compared with, each by its own paper's rule; here, which blocks they drop.

- Diff-Pruning (Fang, Ma and Wang, arXiv:2305.10924): structures of least first-order Taylor score go, all weights are trained after. Here the
  structures are the FFNs' hidden units, as in Dense2MoE's Table 2, and the scores those of eq. 6 over all noise levels; Fang et al. leave out
  time steps whose loss is below a threshold. `convert.to_shared` makes the cut.
- Lite (Verdu and Martin, "Flux.1 Lite", 2024): the blocks whose output is nearest to their input, by mean squared error. Only the block before
  a gap learns to do what the dropped ones did ("single block distillation", as Dense2MoE's Sec. 4.2 calls it).
- BK-SDM (Kim et al., arXiv:2305.15798): of each stage of a U-Net the first unit stays and the second goes; all weights are distilled. A transformer
  has no stages, so blocks go at equal distances, and its first and last stay.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe_core.errors import ConfigError


def least_change(change: Sequence[float], left: int) -> list[int]:
    """Numbers of the blocks to drop for `left` to be left: those of least `change`; among equals the earlier. Lite.

    The first always stays: of a gap before it, no block could learn what was dropped.
    """
    _check(len(change), left)
    order = sorted(range(1, len(change)), key=lambda number: (change[number], number))
    return sorted(order[: len(change) - left])


def evenly(count: int, left: int) -> list[int]:
    """The same of `count` blocks, at equal distances. BK-SDM."""
    _check(count, left)
    kept = {round(i * (count - 1) / (left - 1)) for i in range(left)} if left > 1 else {0}
    return [number for number in range(count) if number not in kept]


def _check(count: int, left: int) -> None:
    if not 1 <= left <= count:
        raise ConfigError(f"{left} blocks cannot be left of {count}; it must be 1 to {count}")
