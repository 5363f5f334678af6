"""A trainee so small that a step takes no time: a linear model with a function of the position as data."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 4


class Linear(nn.Module):
    """Squared error; its frozen part must survive a restart by being built again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)
        self.unused = nn.Linear(WIDTH, 1)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.steep = False

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        error = (self.layer(self.frozen(x)).squeeze(1) - y).square().mean()
        if self.steep:
            # Adds 0, and a root's slope at 0.
            error = error + (error - error.detach()).abs().sqrt()
        return {"loss": error, "error": error.detach().sqrt()}


class Trivial:
    """The trainee. `kill_at`: the worker kills itself at this step, once; `mark` remembers that it did."""

    def __init__(
        self,
        steps_seconds: float,
        kill_at: int | None,
        mark: str | None,
        nan_at: int | None,
        steep_at: int | None = None,
        rates: dict[str, float] | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.module = Linear()
        self.rates = rates or {}
        self.seconds, self.kill_at, self.mark, self.nan_at = steps_seconds, kill_at, mark, nan_at
        self.steep_at = steep_at

    def batch(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.kill_at is not None and self.mark and positions[0] >= self.kill_at and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        self.module.steep = self.steep_at is not None and positions[0] >= self.steep_at
        x = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(p)) for p in positions])
        y = x.sum(1)
        return x, y * float("nan") if self.nan_at is not None and positions[0] >= self.nan_at else y

    def validate(self) -> dict[str, float]:
        with torch.no_grad():
            return {
                "loss": self.module(self.batch(range(8)) if self.kill_at is None and self.nan_at is None else _fixed())[
                    "loss"
                ].item()
            }

    def save(self, folder: Path) -> None:
        save_file(
            {name: p.detach().contiguous() for name, p in self.module.named_parameters()}, folder / "model.safetensors"
        )


def _fixed() -> tuple[Tensor, Tensor]:
    return torch.ones(8, WIDTH), torch.ones(8)


def build(
    device: torch.device,
    seconds: float = 0.0,
    kill_at: int | None = None,
    mark: str | None = None,
    nan_at: int | None = None,
    steep_at: int | None = None,
    rates: dict[str, float] | None = None,
) -> Trivial:
    return Trivial(seconds, kill_at, mark, nan_at, steep_at, rates)


def build_frozen(device: torch.device) -> Trivial:
    trainee = Trivial(0.0, None, None, None)
    trainee.module.requires_grad_(False)
    return trainee
