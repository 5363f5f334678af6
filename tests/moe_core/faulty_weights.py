"""Copies of a model's folder whose weights are not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def without(folder: str, copy: Path, *names: str) -> str:
    """Without these weights, which must be there."""
    weights = load_file(Path(folder) / WEIGHTS)
    for name in names:
        del weights[name]
    return _save(folder, copy, weights)


def cut(folder: str, copy: Path, name: str) -> str:
    """With a weight whose first axis is shorter by one."""
    weights = load_file(Path(folder) / WEIGHTS)
    weights[name] = weights[name][1:].clone()
    return _save(folder, copy, weights)


def _save(folder: str, copy: Path, weights: dict[str, Tensor]) -> str:
    shutil.copytree(folder, copy)
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    return str(copy)
