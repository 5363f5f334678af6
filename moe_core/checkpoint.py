"""Is a folder a whole checkpoint of this model? Asked before anything is loaded, of headers alone, without torch.

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
FLOATS = ("F64", "F32", "BF16", "F16")
"""Number formats of weights, as safetensors names them."""


class Stored(NamedTuple):
    """Where a tensor lies, and what it is."""

    path: Path
    dtype: str
    """as safetensors calls it: `BF16`"""
    shape: tuple[int, ...]
    start: int
    """first byte in the file"""
    end: int
    """the byte after the last"""


def read_config(folder: Path) -> dict[str, Any]:
    """The model's configuration. Raises CheckpointError, naming the file, if it is missing or no JSON object."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    return read_json(folder / CONFIG)


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files.

    Raises CheckpointError naming the file, and the tensor: a file is missing, truncated or outside the folder, a tensor lies in
    two files, not in the one that the index names, or is no floating-point one.
    """
    found: dict[str, Stored] = {}
    for path in weight_files(folder):
        for name, tensor in read_floats(path).items():
            if name in found:
                raise CheckpointError(f"{path}: tensor {name} is also in {found[name].path.name}")
            found[name] = tensor
    for name, file in (_weight_map(folder, WEIGHTS) or {}).items():
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
        files = ", ".join(weight_names(folder))
        raise CheckpointError(f"{folder}: {files} lack {len(missing)} tensors of the model, first {missing[0]}")
    return found


def tensors_of(folder: Path) -> dict[Path, list[str]]:
    """Each weight file with the names of its tensors. Raises CheckpointError as `stored`."""
    files: dict[Path, list[str]] = {}
    for name, tensor in stored(folder).items():
        files.setdefault(tensor.path, []).append(name)
    return files


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
    weight_map = _weight_map(folder, weights)
    return [weights] if weight_map is None else sorted(set(weight_map.values()))


def read_floats(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by its header.

    Raises CheckpointError for a file that is none, is cut off, or has a tensor of another format than `FLOATS`.
    """
    try:
        # "np": asks for nothing of torch, and headers are the same.
        with safe_open(path, framework="np"):
            pass  # the library checks that the header is sound and fits the file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {tensor.dtype}; weights must be one of {', '.join(FLOATS)},"
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


def _weight_map(folder: Path, weights: str) -> dict[str, str] | None:
    """The index: tensor -> file; None if there is none."""
    index = folder / f"{weights}.index.json"
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        # A plain name: whoever made the index must not choose which of the reader's files is opened.
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: says that tensor {name} is in {file!r}; it must be a .safetensors file beside the index"
            )
    return weight_map
