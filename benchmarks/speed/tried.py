"""Ways to do a piece of the experts' work that were weighed against each other; `benchmarks/LOG.md` has what came out.

    python -m benchmarks.speed.tried             writes benchmarks/results/tried-cpu.json

At FLUX.1's size, 4,608 tokens, 2 of 12 experts each; the way that is used first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed import timing
from benchmarks.speed.layer import EXPERTS, HIDDEN, TOP_K, WIDTH, routing_of
from moe_core import backends, grouped, kernels
from moe_core.memory import LiveMemory

TOKENS = 4608
CPU = torch.device("cpu")
RESULTS = Path("benchmarks/results/tried-cpu.json")


class Tried:
    """Tensors of one layer's experts, and the ways."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(dtype)

        self.x_TD, self.y_ND = drawn(TOKENS, WIDTH), drawn(TOKENS * TOP_K, WIDTH)
        self.u_NF = drawn(TOKENS * TOP_K, HIDDEN)
        self.weights = [
            drawn(EXPERTS, HIDDEN, WIDTH, std=0.02), drawn(EXPERTS, HIDDEN), drawn(EXPERTS, WIDTH, HIDDEN, std=0.02)
        ]  # fmt: skip
        self.indices_TK = routing_of("balanced", TOKENS, EXPERTS, TOP_K, generator)
        self.gates_TK = torch.rand(TOKENS, TOP_K, generator=generator)
        self.order = grouped.sort(self.indices_TK, EXPERTS)
        self.gate_N1 = self.gates_TK.reshape(-1, 1)[self.order.pair_N]

    def slots(self) -> dict[str, Callable[[], Any]]:
        """Adding a token's K rows: with gates before it, and gates among it."""
        rows, gates = self.order.row_TK, self.gates_TK.to(self.y_ND.dtype)

        def gathered() -> Tensor:
            return self.y_ND.index_select(0, rows.flatten()).unflatten(0, tuple(rows.shape))

        def added() -> Tensor:
            sums = torch.zeros_like(self.x_TD)
            return sums.index_add_(0, self.order.token_N, self.y_ND)

        return {
            "one pass (embedding_bag)": lambda: F.embedding_bag(rows, self.y_ND, mode="sum"),
            "gather, then sum": lambda: gathered().sum(1),
            "gather, weigh, sum": lambda: (gathered() * gates.unsqueeze(-1)).sum(1),
            "gather, then a product with the gates": lambda: torch.bmm(gates.unsqueeze(1), gathered()),
            "index_add_ by expert": added,
        }

    def gates(self) -> dict[str, Callable[[], Any]]:
        """Weighing by gates: hidden units, or outputs four times as wide."""
        return {
            "hidden units": lambda: kernels.gated(self.u_NF, self.gate_N1),
            "outputs": lambda: (F.gelu(self.u_NF, approximate="tanh"), (self.y_ND * self.gate_N1).to(self.y_ND.dtype)),
        }

    def experts(self, backend: str, trains: bool) -> Callable[[], Any]:
        """All of the experts."""
        tensors = [self.x_TD, self.gates_TK, *self.weights]

        def run() -> None:
            inputs = [tensor.detach().requires_grad_(trains) for tensor in tensors]
            with torch.set_grad_enabled(trains):
                output = backends.run_experts(backend, inputs[0], inputs[1], self.indices_TK, *inputs[2:])
            if trains:
                output.backward(self.x_TD)

        return run


def kept_for_backward(tried: Tried, backend: str) -> int:
    """Bytes between forward and backward pass, the layer's output aside."""
    inputs = [tensor.detach().requires_grad_() for tensor in (tried.x_TD, tried.gates_TK, *tried.weights)]
    with LiveMemory() as memory:
        memory.watch([*inputs, tried.indices_TK], "given")
        output = backends.run_experts(backend, inputs[0], inputs[1], tried.indices_TK, *inputs[2:])
        return memory.live["activations"] - output.nbytes


def main() -> int:
    """Times all ways in both precisions."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for dtype in (torch.float32, torch.bfloat16):
        tried, name = Tried(dtype), str(dtype).removeprefix("torch.")
        with torch.no_grad():
            found[name] = {piece: timing.in_turn(getattr(tried, piece)(), CPU) for piece in ("slots", "gates")}
        backends_tried = ("by_expert", "grouped_mm", "loop")
        for trains in (False, True):
            ways = {backend: tried.experts(backend, trains) for backend in backends_tried}
            found[name]["forward, backward" if trains else "forward"] = timing.in_turn(ways, CPU, rounds=3)
        found[name]["kept_mb"] = {name: kept_for_backward(tried, name) / 1e6 for name in backends_tried}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name, pieces in found.items():
        if isinstance(pieces, dict):
            for piece, ways in pieces.items():
                print(name, piece, {way: _told(value) for way, value in ways.items()})
    return 0


def _told(value: Any) -> str:
    return f"{value:.0f} MB" if isinstance(value, float) else f"{1e3 * value['median_s']:.1f} ms, {value['ratio']:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
