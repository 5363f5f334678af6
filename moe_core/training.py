"""What a training loop needs to know of the thing it trains.

The loop (in `tasks/`) knows devices, workers, checkpoints and logs; a trainee knows its model, its loss and its data.
Randomness of a trainee is a function of the global sample position alone, so that neither the number of workers nor a
restart changes what is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn


class Trainee(Protocol):
    """Something to train for a number of steps."""

    @property
    def module(self) -> nn.Module:
        """`module(batch)` returns a dict of scalar tensors; "loss" is minimised, the rest is logged.

        Its parameters with requires_grad are trained and saved for resuming; all others must be reproduced by building
        the trainee again. This is what DDP wraps, unless it is sharded already.
        """
        ...

    @property
    def rates(self) -> Mapping[str, float]:
        """Learning rate over the optimizer's, by name of the module's parameter; 1 for those that are not there."""
        ...

    def batch(self, positions: Sequence[int]) -> Any:
        """The inputs for these global sample positions (step * batch_size + i), on the module's device."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on a fixed validation set with fixed noise; the same for the same weights.

        Leaves the module in training mode.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes the finished product into an existing, empty folder.

        Of a sharded module in every worker, which takes part in gathering the weights: rank 0 writes, in the others nothing is
        written and there is no folder.
        """
        ...
