"""Training state on disk: whole or absent, checked by hash, in safetensors and JSON only.

- A checkpoint is a folder `step-00000050/` with `state.safetensors` and `manifest.json` (step, sha256 of the state).
- It is written under another name, flushed, and renamed: a kill at any point leaves the older ones as they were.
- Tensors: `model.<parameter>` for each trained parameter, `optimizer.<key>.<parameter>` for each tensor of the optimizer's state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_core.errors import CheckpointError
from tasks import outs

KEPT = 2
"""Newest checkpoints that stay: the second is there for when the first turns out broken."""


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def save(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Writes the checkpoint of `step` below `folder` and removes all but the newest two; returns its folder."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained(module).items():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial-{os.getpid()}"
    for stale in folder.glob(".step-*.partial-*"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / "state.safetensors"
    )
    manifest = {"step": step, "sha256": {"state.safetensors": _sha256(partial / "state.safetensors")}}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
    outs.flush_tree(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    outs.flush_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint below `folder`, if any, and what is wrong with each broken one that was passed over."""
    broken: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            check(candidate)
            return candidate, broken
        except CheckpointError as error:
            broken.append(str(error))
    return None, broken


def check(checkpoint: Path) -> int:
    """The step of a checkpoint; raises CheckpointError unless it is whole."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        step, hashes = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} has no readable manifest.json: {error!r}") from error
    for name, expected in hashes.items():
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"checkpoint {checkpoint} lacks {name}, which its manifest lists")
        if (found := _sha256(checkpoint / name)) != expected:
            raise CheckpointError(
                f"checkpoint {checkpoint}: {name} has sha256 {found}, but its manifest says {expected}"
            )
    return step


def load(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts parameters and optimizer state back, bit for bit.

    Raises CheckpointError where the names or shapes are not those of `module`.
    """
    tensors = load_file(checkpoint / "state.safetensors")
    parameters = trained(module)
    stored = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    if stored != parameters.keys():
        raise CheckpointError(
            f"checkpoint {checkpoint} does not fit the model: missing {sorted(parameters.keys() - stored)[:3]},"
            f" unknown {sorted(stored - parameters.keys())[:3]}"
        )
    state: dict[nn.Parameter, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        if kind == "model":
            parameter = parameters[rest]
            if parameter.shape != tensor.shape:
                raise CheckpointError(
                    f"checkpoint {checkpoint}: {rest} is {list(tensor.shape)}, the model's {list(parameter.shape)}"
                )
            with torch.no_grad():
                parameter.copy_(tensor)
        else:
            key, _, name = rest.partition(".")
            # A step counter stays on the CPU, where AdamW keeps it; moments follow their parameter.
            place = torch.device("cpu") if tensor.dim() == 0 else parameters[name].device
            # Copied: a tensor mapped from a file may start at any byte, and CPU kernels then round otherwise.
            state.setdefault(parameters[name], {})[key] = tensor.to(place, copy=True)
    for parameter, values in state.items():
        optimizer.state[parameter] = values


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
