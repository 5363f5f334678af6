"""Memory of a model's weights at batch 1: all of them on the device, and with `enable_group_offload`, where a block comes when a sample passes it.

- `weights`: bytes of all; `resident`: the most that were on the device at once; `brought`: bytes that come to it in one step. A block that no
  sample chose does not come. Counted where diffusers brings and takes them.
- `peak_all`, `peak_offloaded`: the device's memory at most, one step's tensors included. On a GPU by CUDA's allocator, with the rest of the weights
  in the host's memory. On a CPU in a process of its own: its resident memory over what it had before the model, the rest of the weights in files.

python -m benchmarks.speed.memory CONFIG...     on a CPU, one JSON object a line: what `measure` starts
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import ModuleGroup

from benchmarks.speed import models

ALONE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
"""What is freed goes back at once, and new memory that nobody has written takes no room: else the heap would be measured."""
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside, `resident` is the most bytes of weights that diffusers had on the device at once, `brought` all that it brought."""
    found, here = {"resident": 0, "brought": 0}, dict[int, int]()
    onload, offload = ModuleGroup.onload_, ModuleGroup.offload_

    def bring(group: ModuleGroup) -> None:
        weights = {*group.parameters, *(p for module in group.modules for p in module.parameters())}
        here[id(group)] = sum(weight.nbytes for weight in weights)
        found["brought"] += here[id(group)]
        found["resident"] = max(found["resident"], sum(here.values()))
        onload(group)

    def take(group: ModuleGroup) -> None:
        here.pop(id(group), None)
        offload(group)

    with (
        mock.patch.object(ModuleGroup, "onload_", bring),
        mock.patch.object(ModuleGroup, "offload_", take),
        # accelerate's, which the lock does not have: what comes in is on the device already.
        mock.patch.object(group_offloading, "send_to_device", lambda given, *where, **how: given, create=True),
    ):
        yield found


@torch.no_grad()
def of_model(
    config: Mapping[str, Any], device: torch.device, image: int, text: int, peak: Callable[[Callable[[], Any]], int]
) -> dict[str, Any]:
    """One row, in bf16. `peak(run)`: bytes that the device holds at most while `run` runs."""
    model = models.build(config, torch.bfloat16, device)
    # `auto` would measure backends, and their tensors would be the most there ever is.
    model.set_expert_backend("by_shape")
    given = models.inputs(config, 1, image, text, torch.bfloat16, device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    whole = peak(lambda: model(**given))
    with tempfile.TemporaryDirectory() as folder, counted() as found:
        disk = {"offload_to_disk_path": folder} if device.type == "cpu" else {}
        model.enable_group_offload(device, torch.device("cpu"), num_blocks_per_group=1, **disk)
        offloaded = peak(lambda: model(**given))
    return {"weights": weights, **found, "peak_all": whole, "peak_offloaded": offloaded}


def measure(configs: Mapping[str, Mapping[str, Any]], device: torch.device, image: int, text: int) -> dict[str, Any]:
    """Level -> row."""
    if device.type == "cuda":
        rows = {}
        for name, config in configs.items():
            rows[name] = of_model(config, device, image, text, _allocated)
            gc.collect()
            torch.cuda.empty_cache()
        return rows
    asked = [json.dumps([dict(config), image, text]) for config in configs.values()]
    command = [sys.executable, "-m", "benchmarks.speed.memory", *asked]
    done = subprocess.run(command, env={**os.environ, **ALONE}, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(configs, map(json.loads, done.stdout.splitlines()), strict=True))


def _allocated(run: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def _kilobytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def _nothing(run: Callable[[], Any]) -> int:
    run()
    return 0


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    REFERENCES.write_text("5")  # The high-water mark is now what is resident.


def main() -> int:
    """Measures the models that are told, each over what the process holds without it."""
    cpu = torch.device("cpu")
    for asked in sys.argv[1:]:
        config, image, text = json.loads(asked)
        # Libraries load with their first use, and then stay.
        narrow = {"num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
        of_model({**config, **narrow}, cpu, 8, 8, _nothing)
        _settle()
        before = _kilobytes("VmRSS")

        def peak(run: Callable[[], Any], before: int = before) -> int:
            _settle()
            run()
            return 1024 * (_kilobytes("VmHWM") - before)

        print(json.dumps(of_model(config, cpu, image, text, peak)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
