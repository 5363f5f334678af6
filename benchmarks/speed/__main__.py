"""Everything that this package measures, in one run.

python -m benchmarks.speed                                  CPU, ten minutes: benchmarks/results/speed-cpu.{json,md,svg}
python -m benchmarks.speed --device cuda                    FLUX.1's size: benchmarks/results/speed-cuda.{json,md,svg}
python -m benchmarks.speed --only layer                     a part of it; the others' results stay as they are
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import growth, kd_step, layer, memory, models, sampling, tables
from moe_core import backend_choice
from moe_core.dry_run import Inputs

RESULTS = Path("benchmarks/results")
SECTIONS = ("layer", "models", "sampling", "kd_step", "memory", "growth")
"""`sampling` is for GPUs: a CPU would take an hour."""


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else backend_choice.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "transformers")},
    }


def sections(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Name -> what measures it: everything at once, or an iterator over rows, which are written as they come."""
    if device.type == "cuda":
        return {
            "layer": lambda: (layer.measure(case, device) for case in layer.cases(device)),
            "models": lambda: _full_size(device),
            "sampling": lambda: (
                row for samples in (1, 4) for row in sampling.measure(models.of_gpu(), device, samples, 4096, 512)
            ),
            "memory": lambda: memory.measure(models.of_gpu(), device, 4096, 512),
            "growth": lambda: growth.measure(device, torch.bfloat16),
            # Last: whether all of it fits one GPU nobody has seen.
            "kd_step": lambda: kd_step.measure(models.of_gpu(), torch.bfloat16, device, Inputs(1, 4096, 512)),
        }
    precisions, every = (torch.float32, torch.bfloat16), models.of_cpu()
    return {
        "layer": lambda: (layer.measure(case, device) for case in layer.cases(device)),
        "models": lambda: [
            *(models.measure(every, dtype, device, rounds=3) for dtype in precisions),
            # Not all of them: ten minutes are the limit.
            models.measure(_some(every, "dense", "L"), torch.bfloat16, device, skewed=True, rounds=3),
            models.measure(
                _some(every, "dense", "L", "XS"), torch.bfloat16, device, samples=4, image=128, text=32, rounds=3
            ),
            models.measure(models.of_calls(), torch.bfloat16, device, image=16, text=16, rounds=20),
        ],
        "kd_step": lambda: kd_step.measure(every, torch.float32, device, Inputs(1, 128, 32)),
        "memory": lambda: memory.measure(every, device, 64, 16),
        "growth": lambda: growth.measure(device, torch.float32),
    }


def _some(configs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: configs[name] for name in names}


def _full_size(device: torch.device) -> Iterator[dict[str, Any]]:
    """The paper's Table 1; a pair of models in memory at a time, as eight do not fit."""
    dense, *others = models.of_gpu().items()
    for samples, compiled, skewed in (
        (1, False, False),
        (1, True, False),
        (1, False, True),
        (4, False, False),
        (4, True, False),
    ):
        whole: dict[str, Any] = {"models": {}}
        for other in others:
            pair = models.measure(
                dict((dense, other)), torch.bfloat16, device,
                samples=samples, image=4096, text=512, skewed=skewed, compiled=compiled, rounds=10,
            )  # fmt: skip
            whole = {**pair, "models": {**whole["models"], **pair["models"]}}
            torch.cuda.empty_cache()
        yield whole


def main() -> int:
    """Measures, and writes what it has: on a GPU lent for minutes, an end by time loses a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--to", type=Path, default=RESULTS)
    given = parser.parse_args()
    device, target = torch.device(given.device), given.to / f"speed-{given.device}"
    if missing := [name for name in given.only or () if name not in sections(device)]:
        parser.error(f"{missing[0]} is not measured on {given.device}")
    file = target.with_suffix(".json")
    report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() and given.only else {}
    report["machine"] = machine(device)
    for name, run in sections(device).items():
        if given.only and name not in given.only:
            continue
        began = time.perf_counter()
        found = run()
        if isinstance(found, Iterator):
            report[name] = []
            for row in found:
                report[name].append(row)
                _write(report, file)
        else:
            report[name] = found
        report.setdefault("seconds", {})[name] = round(time.perf_counter() - began)
        print(f"{name}: {report['seconds'][name]} s", flush=True)
        _write(report, file)
    target.with_suffix(".md").write_text(tables.markdown(report, target.name))
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
    elif "growth" in report:
        tables.plot(report, target.with_suffix(".svg"))
    print(target.with_suffix(".md").read_text())
    return 0


def _write(report: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
