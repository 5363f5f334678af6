"""Seconds of a distillation step by the project's own loop, on one worker and on two, at the same global batch.

- The loop is that of the stages (`tasks.training`): micro batches, DDP, clipping, AdamW. Workers are processes on gloo, of one thread each; Ray is
  left out.
- The model is small beside the others here, as every worker has a teacher and a student, and steps of a single thread must end.
- Processes of two runs cannot take turns step by step, as ways elsewhere do: the runs follow each other, and what slows the machine down may slow
  one of them alone.

python -m benchmarks.speed.workers RANK SIZE FOLDER SIZES      one worker: what `measure` starts
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_full_size import batch, stage_of
from benchmarks.speed import models
from moe_core.config import OptimizerConfig
from moe_core.distill import KDBatch, KDStep
from moe_core.dry_run import Inputs
from tasks import training
from tasks.phase import METRICS, Phase

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step."""

    heads: int = 4
    double: int = 4
    single: int = 6
    images: int = 4
    image_tokens: int = 128
    text_tokens: int = 32
    steps: int = 6

    def configs(self) -> dict[str, dict[str, Any]]:
        """The dense model and L."""
        depth = {"num_layers": self.double, "num_single_layers": self.single, "num_attention_heads": self.heads}
        return models.levels({**models.MIDDLE, **depth}, 1, 0, {}, 64)


class Distillation:
    """The trainee: experts and routers of L, on inputs drawn as they are asked for."""

    rates: Mapping[str, float] = {}

    def __init__(self, device: torch.device, sizes: dict[str, int]) -> None:
        self.sizes, self.device = Sizes(**sizes), device
        self.configs = self.sizes.configs()
        teacher, student = (models.build(self.configs[name], torch.float32, device) for name in ("dense", "L"))
        student.set_expert_backend("by_shape")
        self.module = KDStep(student, teacher, stage_of(("experts", "router"), 0.01, checkpointing=False))

    def batch(self, positions: Sequence[int]) -> KDBatch:
        """Random, of so many samples."""
        inputs = Inputs(len(positions), self.sizes.image_tokens, self.sizes.text_tokens)
        return batch(self.configs["dense"], inputs, self.device).to(torch.float32)

    def validate(self) -> dict[str, float]:
        """Nothing: it is the steps that are timed."""
        return {}

    def save(self, folder: Path) -> None:
        """Nothing is kept."""


def measure(sizes: Sizes = Sizes()) -> list[dict[str, Any]]:
    """Rows as `growth` has them, and `images_per_second`; medians over the steps after the first."""
    medians = {workers: statistics.median(_run(workers, sizes)) for workers in (1, 2)}
    return [
        {
            "x": workers,
            "seconds": round(median, 4),
            "expected_ratio": round(1 / workers, 3),
            "ratio": round(median / medians[1], 4),
            "images_per_second": round(sizes.images / median, 3),
        }
        for workers, median in medians.items()
    ]


def _run(workers: int, sizes: Sizes) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.speed.workers"]
        tail = [str(workers), folder, json.dumps(asdict(sizes))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [subprocess.Popen([*command, str(rank), *tail], env=environment) for rank in range(workers)]
        if any([process.wait() for process in started]):
            raise RuntimeError(f"one of {workers} workers failed; what it said stands above")
        lines = (Path(folder) / "train" / METRICS).read_text().splitlines()
    records = [record for line in lines if (record := json.loads(line))["split"] == "train"]
    return [record["seconds"] for record in records if record["step"] > 1]


def main(rank: int, size: int, folder: Path, sizes: dict[str, int]) -> int:
    """One worker's part of the loop."""
    steps, images = sizes["steps"], sizes["images"]
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    optimizer = OptimizerConfig(steps=steps, batch_size=images, learning_rate=1e-5)
    job = Phase("train", "benchmarks.speed.workers:Distillation", {"sizes": sizes}, optimizer, steps, steps, steps)
    training.run([job], folder, CPU, threads=1, seed=0)
    if size > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])))
