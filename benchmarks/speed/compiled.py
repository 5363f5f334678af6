"""Whether `compute.compile` pays on a CPU: a distillation step with and without it, and what compiling takes; `benchmarks/LOG.md` has what came out.

    python -m benchmarks.speed.compiled             writes benchmarks/results/compiled-cpu.json; a quarter of an hour

- `demo`: the model and the batch of the demo preset. `middle`: 1,024 wide, 4 double and 6 single blocks, one sample. One
  thread, as `params/compute/local.yaml` has it.
- Each in a process of its own, with an empty cache on disk: a new machine's first run.
- `repaid_after`: steps after which what compiling took is won back; null: never.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_full_size import batch, stage_of
from benchmarks.speed import models, timing
from moe_core.compiling import compile_blocks
from moe_core.distill import KDStep
from moe_core.dry_run import Inputs

RESULTS = Path("benchmarks/results/compiled-cpu.json")
CPU = torch.device("cpu")

DEMO: dict[str, Any] = {
    "patch_size": 1, "in_channels": 16, "num_layers": 5, "num_single_layers": 12, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 64, "pooled_projection_dim": 64, "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
"""`params/model/digits.yaml`"""
CASES: dict[str, tuple[dict[str, dict[str, Any]], Inputs, int]] = {
    "demo": (models.levels(DEMO, 1, 1, {"M": 0}, 16), Inputs(64, 16, 8), 1),
    "middle": (
        models.levels({**models.MIDDLE, "num_layers": 4, "num_single_layers": 6}, 1, 1, {"M": 0}, 96),
        Inputs(1, 128, 32),
        1,
    ),
}
"""Case -> levels, batch, threads."""


def measure(
    configs: dict[str, dict[str, Any]],
    level: str,
    inputs: Inputs,
    train: tuple[str, ...],
    rounds: int = 10,
    **options: Any,
) -> dict[str, Any]:
    """One row. `options`: of `torch.compile`."""
    torch._dynamo.reset()
    given = batch(configs["dense"], inputs, CPU).to(torch.float32)
    steps = {}
    for way in ("plain", "compiled"):
        teacher, student = (models.build(configs[name], torch.float32, CPU) for name in ("dense", level))
        student.set_expert_backend("by_shape")
        steps[way] = KDStep(student, teacher, stage_of(train, 0.01, checkpointing=False))
    for model in (steps["compiled"].student, steps["compiled"].teacher):
        compile_blocks(model, **options)

    def run(way: str) -> None:
        steps[way](given)["loss"].backward()
        steps[way].zero_grad(set_to_none=True)

    began = time.perf_counter()
    run("compiled")
    first = time.perf_counter() - began
    times = timing.in_turn({way: partial(run, way) for way in steps}, CPU, rounds=rounds)
    plain, compiled = (times[way]["median_s"] for way in ("plain", "compiled"))
    spent, won = first - compiled, plain - compiled
    return {
        "level": level,
        "times": times,
        "compiling_s": round(spent, 1),
        "repaid_after": round(spent / won) if won > 0 else None,
    }


def main() -> int:
    """All cases, or the one that is told."""
    if sys.argv[1:]:
        case, level = sys.argv[1:]
        configs, inputs, threads = CASES[case]
        torch.set_num_threads(threads)
        print(json.dumps(measure(configs, level, inputs, ("all",))))
        return 0
    found: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        for level in ("L", "M"):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "benchmarks.speed.compiled", case, level]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(case, []).append(json.loads(done.stdout))
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(case, found[case][-1], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
