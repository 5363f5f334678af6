"""A distillation step over its arithmetic: the teacher's forward pass and the student's forward and backward pass, each timed alone.

What the step adds: recorded features and routings, the losses on them (eq. 7 to 10) and their gradients. Of the models of `benchmarks.speed.models`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu_full_size import batch, stage_of
from benchmarks.speed import models, timing
from moe_core.distill import KDStep, predict
from moe_core.dry_run import Inputs

STAGES = {"L, experts and routers": ("L", ("experts", "router")), "M, all": ("M", ("all",))}
"""What is trained -> level, parts."""


def measure(
    configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype, device: torch.device, inputs: Inputs
) -> list[dict[str, Any]]:
    """Rows of `seconds` of each way, and `over_parts`, the step over the sum of its parts in the same round."""
    torch.manual_seed(0)
    given = batch(dict(configs["dense"]), inputs, device).to(dtype)
    teacher, rows = models.build(configs["dense"], dtype, device), []
    for title, (level, train) in STAGES.items():
        student = models.build(configs[level], dtype, device)
        step = KDStep(student, teacher, stage_of(train, 0.01, checkpointing=False))

        def alone(student: Any = student) -> None:
            predict(student, given).square().mean().backward()
            student.zero_grad(set_to_none=True)

        def whole(step: Any = step) -> None:
            step(given)["loss"].backward()
            step.zero_grad(set_to_none=True)

        @torch.no_grad()
        def dense() -> None:
            predict(teacher, given)

        apart: dict[str, list[float]] = {"teacher": [], "student": []}

        def parts(alone: Any = alone, dense: Any = dense, apart: dict[str, list[float]] = apart) -> None:
            for part, run in (("teacher", dense), ("student", alone)):
                apart[part].append(timing.seconds_of(run, device))

        times = timing.in_turn({"parts": parts, "step": whole}, device, rounds=5, seconds=12)
        rows.append(
            {
                "trained": title,
                "samples": inputs.samples,
                "precision": str(dtype).removeprefix("torch."),
                # The first round does not count.
                "seconds": {name: own["median_s"] for name, own in times.items()}
                | {part: float(f"{statistics.median(taken[1:]):.4g}") for part, taken in apart.items()},
                "over_parts": times["step"]["ratio"],
            }
        )
    return rows
