"""The optimizer and its learning rate, from one section of the parameters."""

from __future__ import annotations

import math

import torch
from torch import nn

from moe_core import muon
from moe_core.config import OptimizerConfig

ONE_CYCLE_START = 25.0
"""one_cycle starts at the peak rate over this (torch's OneCycleLR has the same default)."""


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of the 0-based `step`: a function of the step alone, so that a resumed run needs no scheduler state."""
    if step < config.warmup_steps:
        rise = (step + 1) / config.warmup_steps
        if config.schedule == "one_cycle":
            start = 1 / ONE_CYCLE_START
            return config.learning_rate * (start + (1 - start) * (1 - math.cos(math.pi * rise)) / 2)
        return config.learning_rate * rise
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def build(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the parameters of `module` that are trained."""
    if config.optimizer == "muon":
        return muon.Muon(*muon.split_parameters(module), config.learning_rate, config.betas, config.weight_decay)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
