"""Is a folder a whole checkpoint of this model? Asked before anything is loaded.

- diffusers itself only warns where weights are missing, and leaves them as they happened to be initialised.
- Files' headers are all that is read, without torch: a 24 GB model is checked in milliseconds, by a flow as well as by a stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from moe_core.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")
"""Number formats of weights, as safetensors names them."""


class Stored(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """The model's configuration. Raises CheckpointError, naming the file, if it is missing or no JSON object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    return read_json(folder / CONFIG)


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that the folder's safetensors files hold exactly the expected tensors (name -> shape). Reads headers only.

    Raises CheckpointError naming the file and the tensor: a file is missing or truncated, a tensor is missing, unknown,
    stands in two files, has another shape or no floating-point numbers.
    """
    files = weight_files(folder)
    found: set[str] = set()
    for path in files:
        for name, stored in read_floats(path).items():
            if name not in expected:
                raise CheckpointError(
                    f"{path}: tensor {name} belongs to no parameter of the model that {folder / CONFIG} describes"
                )
            if stored.shape != expected[name]:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(stored.shape)}; the model that {folder / CONFIG} describes has"
                    f" {list(expected[name])}"
                )
            if name in found:
                raise CheckpointError(
                    f"{path}: tensor {name} stands in another file of {folder} as well; it must be in one"
                )
            found.add(name)
    missing = sorted(expected.keys() - found)
    if missing:
        names = ", ".join(path.name for path in files)
        raise CheckpointError(f"{folder}: {names} lack {len(missing)} tensors of the model, first {missing[0]}")


def tensors_of(folder: Path) -> dict[Path, list[str]]:
    """Each weight file with the names of its tensors. Raises CheckpointError where one is missing or truncated."""
    return {path: list(read_floats(path)) for path in weight_files(folder)}


def weight_files(folder: Path, weights: str = WEIGHTS) -> list[Path]:
    """The files of `weight_names`. Raises CheckpointError if one is not there."""
    files = [folder / name for name in weight_names(folder, weights)]
    for path in files:
        if not path.is_file():
            because = "" if path.name == weights else f", which {weights}.index.json names"
            raise CheckpointError(f"{path}: the checkpoint lacks this file{because}")
    return files


def weight_names(folder: Path, weights: str = WEIGHTS) -> list[str]:
    """The safetensors files that hold a model's weights: those that the index in `folder` names, or the one called `weights`.

    Raises CheckpointError if the index is broken or points out of the folder.
    """
    index = folder / f"{weights}.index.json"
    if not index.exists():
        return [weights]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file '{name}'; it must be a .safetensors file beside the index")
    return names


def read_floats(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by its header.

    Raises CheckpointError for a file that is none, is cut off, or has a tensor of another format than `FLOATS`.
    """
    try:
        # "np": asks for nothing of torch, and headers are the same.
        with safe_open(path, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            found = {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error
    for name, stored in found.items():
        if stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {stored.dtype}; weights must be one of {', '.join(FLOATS)},"
                " quantized ones cannot be converted"
            )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError if it is missing or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the checkpoint lacks this file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; it must be an object")
    return value
