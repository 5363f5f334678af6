"""Is a folder a whole checkpoint of this model? Asked before anything is loaded.

diffusers itself only warns where weights are missing, and leaves them as they happened to be initialised.
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


def read_config(folder: Path) -> dict[str, Any]:
    """The model's configuration. Raises CheckpointError, naming the file, if it is missing or no JSON object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    return _read_json(folder / CONFIG)


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: str
    """as safetensors calls it: `BF16`"""
    shape: tuple[int, ...]
    start: int
    """first byte in the file"""
    end: int
    """the byte after the last"""


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files. Reads headers only.

    Raises CheckpointError naming the file, and the tensor: a file is missing, truncated or outside the folder, a tensor lies in two files, or
    not in the one that the index names.
    """
    weight_map = _weight_map(folder)
    found: dict[str, Stored] = {}
    for path in _weight_files(folder, weight_map):
        for name, tensor in _header(path).items():
            if name in found:
                raise CheckpointError(f"{path}: tensor {name} is also in {found[name].path.name}")
            found[name] = tensor
    for name, file in (weight_map or {}).items():
        if name not in found or found[name].path.name != file:
            raise CheckpointError(f"{folder / INDEX}: says that tensor {name} is in {file}, but it is not")
    return found


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Checks that the folder's safetensors files hold exactly the expected tensors (name -> shape); returns where they lie.

    Raises CheckpointError as `stored`, and where a tensor is missing, unknown, or of another shape.
    """
    found = stored(folder)
    for name, tensor in found.items():
        if name not in expected:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} belongs to no parameter of the model that {folder / CONFIG} describes"
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}; the model that {folder / CONFIG} describes has"
                f" {list(expected[name])}"
            )
    missing = sorted(expected.keys() - found.keys())
    if missing:
        files = ", ".join(path.name for path in _weight_files(folder, _weight_map(folder)))
        raise CheckpointError(f"{folder}: {files} lack {len(missing)} tensors of the model, first {missing[0]}")
    return found


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index: tensor -> file; None if there is none."""
    index = folder / INDEX
    if not index.exists():
        return None
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        # A plain name: whoever made the index must not choose which of the reader's files is opened.
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{index}: says that tensor {name} is in {file!r}; it must be a file name in this folder"
            )
    return weight_map


def _weight_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    files = [folder / WEIGHTS] if weight_map is None else [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: the checkpoint lacks this file")
    return files


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks that the header is sound and fits the file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }


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
