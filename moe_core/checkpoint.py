"""Is a folder a whole checkpoint of this model? Asked before anything is loaded.

diffusers itself only warns where weights are missing, and leaves them as they happened to be initialised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moe_core.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The model's configuration. Raises CheckpointError, naming the file, if it is missing or no JSON object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    return _read_json(folder / CONFIG)


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that the folder's safetensors files hold exactly the expected tensors (name -> shape). Reads headers only.

    Raises CheckpointError naming the file and the tensor: a file is missing or truncated, a tensor is missing, unknown,
    or of another shape.
    """
    found: set[str] = set()
    for path in _weight_files(folder):
        for name, shape in _shapes(path).items():
            if name not in expected:
                raise CheckpointError(
                    f"{path}: tensor {name} belongs to no parameter of the model that {folder / CONFIG} describes"
                )
            if shape != expected[name]:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(shape)}; the model that {folder / CONFIG} describes has"
                    f" {list(expected[name])}"
                )
            found.add(name)
    missing = sorted(expected.keys() - found)
    if missing:
        files = ", ".join(path.name for path in _weight_files(folder))
        raise CheckpointError(f"{folder}: {files} lack {len(missing)} tensors of the model, first {missing[0]}")


def tensors_of(folder: Path) -> dict[Path, list[str]]:
    """Each weight file with the names of its tensors. Raises CheckpointError where one is missing or truncated."""
    return {path: list(_shapes(path)) for path in _weight_files(folder)}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / WEIGHTS]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: the checkpoint lacks this file")
    return files


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the checkpoint lacks this file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; it must be an object")
    return value
