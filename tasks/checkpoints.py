"""Training state on disk: whole or absent, checked by hash, in safetensors and JSON only.

- A checkpoint is a folder `step-00000050/` with `manifest.json` (step, sha256 of each file) and the state in safetensors files:
  `state.safetensors`, or, of a sharded model, a file a worker, written by torch.distributed.checkpoint (DCP).
- Either is read by any number of workers, sharded or not: each takes its slices of the tensors.
- It is written under another name, flushed, and renamed: a kill at any point leaves the older ones as they were.
- Tensors: `model.<parameter>` for each trained parameter, `optimizer.<key>.<parameter>` for each tensor of the optimizer's state,
  `average.<parameter>` where there is a moving average.

DCP's own storage keeps its metadata as a pickle, which could run code when read. Its storage for Hugging Face's format has them in
the safetensors headers, as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe_core.dtensors import is_sharded
from moe_core.errors import CheckpointError
from tasks import outs
from tasks.optimizer import Average, counter_device, restored, stored
from tasks.worker import Worker

KEPT = 2
"""Newest checkpoints that stay: the second is there for when the first turns out broken."""

STATE = "state.safetensors"
ALONE = Worker(0, 1, torch.device("cpu"))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average | None = None,
    worker: Worker = ALONE,
) -> Path:
    """Writes the checkpoint of `step` below `folder` and removes all but the newest two; returns its folder. Every worker must call it."""
    final = folder / f"step-{step:08d}"
    partial = worker.told(folder / f".{final.name}.partial-{os.getpid()}")
    if worker.rank == 0:
        for stale in folder.glob(".step-*.partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    worker.barrier()
    tensors = _state(module, optimizer, average)
    if is_sharded(module):
        with _quiet():
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
        worker.barrier()
    elif worker.rank == 0:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / STATE)
    hashes = _hashes(partial, worker)
    if worker.rank == 0:
        (partial / "manifest.json").write_text(json.dumps({"step": step, "sha256": hashes}, indent=2))
        outs.flush_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        outs.flush_folder(folder)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old)
    worker.barrier()
    return final


def newest(folder: Path, worker: Worker = ALONE) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below `folder`, if any, and what is wrong with each broken one that was passed over.

    Every worker must call it; all are told the same.
    """
    broken: list[str] = []
    for candidate in worker.told(sorted(folder.glob("step-*"), reverse=True)):
        try:
            check(candidate, worker)
            return candidate, broken
        except CheckpointError as error:
            broken.append(str(error))
    return None, broken


def check(checkpoint: Path, worker: Worker = ALONE) -> int:
    """The step of a checkpoint; raises CheckpointError, in every worker, unless it is whole."""
    try:
        manifest = json.loads(worker.told(_text(checkpoint / "manifest.json")))
        step, hashes = int(manifest["step"]), dict(manifest["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} has no readable manifest.json: {error!r}") from error
    there = _hashes(checkpoint, worker)
    for name, expected in hashes.items():
        if name not in there:
            raise CheckpointError(f"checkpoint {checkpoint} lacks {name}, which its manifest lists")
        if there[name] != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} has sha256 {there[name]}, but its manifest says {expected}"
            )
    if unknown := sorted(there.keys() - hashes.keys()):
        raise CheckpointError(f"checkpoint {checkpoint} has {unknown[0]}, which its manifest does not list")
    return step


def load(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None = None) -> None:
    """Puts parameters, optimizer state and moving average back: bit for bit, whatever number of workers wrote them.

    Raises CheckpointError where the names or shapes are not those of `module`.
    """
    parameters = trained(module)
    if (checkpoint / STATE).exists() and not is_sharded(module):
        tensors = load_file(checkpoint / STATE)
        _check_fits(checkpoint, {name: tensor.shape for name, tensor in tensors.items()}, parameters, average)
    else:
        tensors = _read_slices(checkpoint, parameters, average)
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        with torch.no_grad():
            if kind == "model":
                parameters[rest].copy_(tensor)
            elif kind == "average" and average is not None:
                average.weights[rest].copy_(tensor)
            else:
                key, _, name = rest.partition(".")
                place = parameters[name].device if tensor.dim() else counter_device(optimizer, parameters[name])
                # Copied: a tensor mapped from a file may start at any byte, and CPU kernels then round otherwise.
                value = restored(optimizer, parameters[name], key, tensor.to(place, copy=True))
                state.setdefault(parameters[name], {})[key] = value
    for parameter, values in state.items():
        optimizer.state[parameter] = values


def _state(module: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(module).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = stored(value)
    if average is not None:
        tensors |= {f"average.{name}": weight for name, weight in average.weights.items()}
    return tensors


def _read_slices(
    checkpoint: Path, parameters: Mapping[str, nn.Parameter], average: Average | None
) -> dict[str, Tensor]:
    """Each worker's parts of the tensors of a checkpoint, placed as the parameters are."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    found = reader.read_metadata().state_dict_metadata
    there = {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    _check_fits(checkpoint, {name: entry.size for name, entry in there.items()}, parameters, average)
    tensors: dict[str, Tensor] = {}
    for name, entry in there.items():
        parameter = parameters[_parameter_of(name)]
        dtype = entry.properties.dtype
        same = entry.size == parameter.shape
        tensors[name] = torch.zeros_like(parameter, dtype=dtype) if same else torch.zeros(entry.size, dtype=dtype)
    with _quiet():
        dcp.load(tensors, storage_reader=reader)
    return tensors


def _parameter_of(name: str) -> str:
    kind, _, rest = name.partition(".")
    return rest.partition(".")[2] if kind == "optimizer" else rest


def _check_fits(
    checkpoint: Path,
    shapes: Mapping[str, torch.Size],
    parameters: Mapping[str, nn.Parameter],
    average: Average | None,
) -> None:
    expected = {f"model.{name}" for name in parameters}
    expected |= {f"average.{name}" for name in average.weights} if average is not None else set()
    stored = {name for name in shapes if not name.startswith("optimizer.")}
    if stored != expected:
        missing, unknown = (
            [name.removeprefix("model.") for name in sorted(names)[:3]]
            for names in (expected - stored, stored - expected)
        )
        raise CheckpointError(f"checkpoint {checkpoint} does not fit the model: missing {missing}, unknown {unknown}")
    for name in stored:
        shape = parameters[_parameter_of(name)].shape
        if shapes[name] != shape:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {_parameter_of(name)} is {list(shapes[name])}, the model's {list(shape)}"
            )


def _hashes(folder: Path, worker: Worker) -> dict[str, str]:
    """File name -> sha256 of the state's files; every worker reads its share of them."""
    names = worker.told(sorted(path.name for path in folder.glob("*.safetensors")))
    mine = {name: _sha256(folder / name) for name in names[worker.rank :: worker.size]}
    return {name: value for found in worker.gathered(mine) for name, value in found.items()}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's word that it works in one process, where it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        yield
