"""How a MoE layer's time grows: with tokens, experts, active experts, of a model with groups, with the batch; and a KD step's with workers.

One layer, 1,024 wide; times over those of the smallest case, beside what the arithmetic says. Workers: `benchmarks.speed.workers`.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed import models, timing
from benchmarks.speed.layer import Case, Layer, ours
from moe_core import accounting

WIDTH = 1024


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> dict[str, list[dict[str, Any]]]:
    """Axis -> rows (`x`, `seconds`, `expected_ratio`, `ratio`), ratios over the first row."""
    axes = {
        "tokens": [
            (tokens, _layer(tokens, 12, 2, dtype, device)) for tokens in (128, 256, 512, 1024, 2048, 4096, 8192)
        ],
        # As many tokens and active units, dealt to more and more experts of the same width.
        "experts": [(experts, _layer(2048, experts, 2, dtype, device)) for experts in (4, 8, 16, 32, 64)],
        "top_k": [(top_k, _layer(2048, 12, top_k, dtype, device)) for top_k in (0, 1, 2, 3, 4, 6, 8, 12)],
    }
    found = {axis: _rows(ways, device) for axis, ways in axes.items()}
    found["batch"] = _batches(device, dtype)
    if device.type == "cpu":
        # Here, as it takes the loop and so more packages than a rented GPU machine has; and that has one GPU.
        from benchmarks.speed import workers

        found["workers"] = workers.measure()
    return found


def _layer(tokens: int, experts: int, top_k: int, dtype: torch.dtype, device: torch.device) -> Any:
    case = Case(tokens, dtype, "balanced", False, False)
    layer = Layer(case, device, width=WIDTH, hidden=WIDTH // 4, experts=experts, top_k=top_k)
    macs = tokens * WIDTH * (2 * WIDTH + 2 * top_k * WIDTH // 4 + experts)
    return macs, lambda: layer.run_moe(ours())


def _batches(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of XS, whose groups split a batch."""
    config = models.of_cpu()["XS"]
    model = models.build(config, dtype, device)
    flops = accounting.flops(model, 256, 64).total
    ways = []
    for samples in (1, 2, 4, 8):
        given = models.inputs(config, samples, 256, 64, dtype, device)
        ways.append((samples, (samples * flops, lambda given=given: model(**given))))
    return _rows(ways, device)


def _rows(ways: list[tuple[int, Any]], device: torch.device) -> list[dict[str, Any]]:
    times = timing.in_turn({str(x): run for x, (_, run) in ways}, device, rounds=5, seconds=12)
    first = ways[0][1][0]
    return [
        {
            "x": x,
            "seconds": times[str(x)]["median_s"],
            "expected_ratio": round(arithmetic / first, 3),
            "ratio": times[str(x)]["ratio"],
        }
        for x, (arithmetic, _) in ways
    ]
