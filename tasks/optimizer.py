"""The optimizer, its learning rate and the weights' moving average, from one section of the parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_core import muon
from moe_core.config import OptimizerConfig
from moe_core.errors import ConfigError

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


FACTOR = "rate_factor"
"""Of a group of parameters: its learning rate over the optimizer's."""


def build(
    config: OptimizerConfig, module: nn.Module, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the parameters of `module` that are trained. `rates`: as a trainee's."""
    made = _build(config, module)
    factors = {id(module.get_parameter(name)): factor for name, factor in (rates or {}).items()}
    groups = []
    for group in made.param_groups:
        of = {id(parameter): factors.get(id(parameter), 1.0) for parameter in group["params"]}
        for factor in sorted(set(of.values())):
            own = [parameter for parameter in group["params"] if of[id(parameter)] == factor]
            rate = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
            groups.append({**group, "params": own, "lr": rate, FACTOR: factor})
    made.param_groups[:] = groups
    return made


def _build(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        return muon.Muon(*muon.split_parameters(module), config.learning_rate, config.betas, config.weight_decay)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rates: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return _adamw8bit()(parameters, **rates)
    # CUDA's other kinds make copies of all weights for a moment.
    return torch.optim.AdamW(parameters, **rates, fused=all(parameter.is_cuda for parameter in parameters) or None)


def _adamw8bit() -> Callable[..., torch.optim.Optimizer]:
    try:
        # Imported here: an extra that only those install who ask for it.
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer is adamw8bit, but torchao cannot be imported ({error}); install the extra: pip install -e '.[lowbit]'"
        ) from error
    made: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group, its factor included."""
    for group in optimizer.param_groups:
        own = rate * group[FACTOR]
        if isinstance(group["lr"], Tensor):  # torchao compiles its step, and the rate is an argument of it
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def counter_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    """Where the optimizer keeps its step counter of a parameter: beside it if its kernel is fused, else on the CPU."""
    for group in optimizer.param_groups:
        if any(own is parameter for own in group["params"]):
            return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    raise ValueError("the optimizer does not have this parameter")


def stored(value: Tensor) -> Tensor:
    """A tensor of an optimizer's state as a checkpoint holds it: eight-bit moments as the fp32 numbers that they stand for.

    So they can be cut anew for another number of workers. `restored` rounds them once more: with adamw8bit alone, a resumed run
    is not the same to the bit.
    """
    if not is_traceable_wrapper_subclass(local := _local(value)):
        return value
    plain = local.dequantize()
    if not isinstance(value, DTensor):
        return plain
    return DTensor.from_local(plain, value.device_mesh, value.placements, shape=value.shape, stride=value.stride())


def restored(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    """`stored` undone."""
    # torchao has no other way to make a state than a step; which states are of eight bits, it alone decides.
    new_buffer = getattr(optimizer, "_new_buffer", None)
    if new_buffer is None or value.shape != parameter.shape:
        return value
    made: Tensor = new_buffer(parameter, key == "exp_avg")
    _local(made).copy_(_local(value))
    return made


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class Average:
    """The exponential moving average of trained weights; of the masters' precision, and placed on workers as they are.

    Its decay rises with the steps, (1 + t) / (10 + t) up to the one given: otherwise a short run would still hold its start.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay = decay
        self._parameters = parameters
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after the 0-based `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.weights.items():
            weight.lerp_(self._parameters[name].detach(), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # One by one and in place: a second copy of all would not fit beside the first.
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self._parameters[name])
            self._parameters[name].copy_(kept)
