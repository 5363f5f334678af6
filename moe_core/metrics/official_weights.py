"""Weights of an official checkpoint, saved as safetensors under their official names, into a module that names them otherwise.

- Strict: a weight that is missing, unexpected or of another shape is an error, in official names. The official scripts load with
  `strict=False`, by which a wrong file leaves random weights and a number that looks like a score.
- Never unpickles. How a pickled checkpoint becomes a safetensors file is in docs/metrics.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from moe_core.errors import DataError

_NAMED = 5
"""Weights that an error lists."""


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of a safetensors file. Raises DataError if it is none."""
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(
            f"{file} is no safetensors file ({error}); docs/metrics.md has the command that makes it"
        ) from error


def load_weights(module: nn.Module, file: Path, official_name: Callable[[str], str], unused: re.Pattern[str]) -> None:
    """Copies the file's weights into all parameters and persistent buffers of `module`, in the module's own precision.

    `official_name` says what a weight of the module is called in the file; official weights that `unused` matches may be there and are
    left out. Raises DataError for a weight that is missing, unexpected, or of another shape.
    """
    found = read_shapes(file)
    wanted = {official_name(name): (name, tuple(weight.shape)) for name, weight in module.state_dict().items()}
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - wanted.keys() if not unused.fullmatch(name))
    if missing or unexpected:
        faults = [
            f"{fault}: {_listed(names)}" for fault, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise DataError(f"{file} has not just the weights of the official model of this size; {'; '.join(faults)}")
    for name, (_, shape) in wanted.items():
        if found[name] != shape:
            raise DataError(f"{file}: {name} has shape {list(found[name])}; the model of this size has {list(shape)}")
    with safe_open(file, framework="pt") as weights:
        module.load_state_dict({own: weights.get_tensor(name) for name, (own, _) in wanted.items()})


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
