"""The MoE FFN over the dense FFN, at FLUX.1's size, beside peers. The arithmetic says 0.375.

Every way has the same router and the same shared expert; what differs is who computes the normal experts. Routing is given, so that all compute
the same. `balanced`: experts by lot; `skewed`: the i-th most popular expert is i times rarer than the first.

Shapes: as in `moe_core.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed import peers, timing
from moe_core import backends
from moe_core.moe import MoELayer, Routing

WIDTH, HIDDEN, EXPERTS, TOP_K = 3072, 768, 12, 2
"""of FLUX.1 at 1S12E2A"""
LOOP_TOKENS = 1024
"""Up to which the reference is timed as well: it is for being right."""
CHECKED = 64
"""Tokens on which peers must agree with us."""
ARITHMETIC = (1 + TOP_K * HIDDEN / WIDTH) / 4


@dataclass(frozen=True)
class Case:
    """What is timed."""

    tokens: int
    dtype: torch.dtype
    routing: str
    trains: bool
    with_peers: bool
    rounds: int = 5


def routing_of(kind: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """[T, K], K different experts a token."""
    if not top_k:
        return torch.empty(tokens, 0, dtype=torch.int64)
    weight_E = torch.ones(experts) if kind == "balanced" else 1 / torch.arange(1, experts + 1)
    return torch.multinomial(weight_E.expand(tokens, -1), top_k, generator=generator)


class Layer:
    """A dense FFN, and a MoE layer of the same size whose routing is given; random weights, no biases of experts."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        experts: int = EXPERTS,
        top_k: int = TOP_K,
    ):
        generator = torch.Generator().manual_seed(0)
        self.case = case
        with torch.device(device):
            self.dense = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
            )
            self.moe = MoELayer(width, width, hidden, experts, top_k)
        nn.init.zeros_(self.moe.b1_EF)
        for module in (self.dense, self.moe):
            module.to(case.dtype).requires_grad_(case.trains)
        self.x_TD = torch.randn(case.tokens, width, generator=generator).to(device, case.dtype)
        self.x_TD.requires_grad_(case.trains)
        self.indices_TK = routing_of(case.routing, case.tokens, experts, top_k, generator).to(device)
        router = self.moe.router.forward

        def given(hidden_states: Tensor) -> Routing:
            # The router works; what it chose is replaced.
            probs_TE = router(hidden_states).probs_TE
            gates_TK = probs_TE.gather(1, self.indices_TK)
            return Routing(probs_TE, gates_TK / gates_TK.sum(-1, keepdim=True), self.indices_TK)

        self.moe.router.forward = given

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The normal experts'."""
        return self.moe.w1_EFD, self.moe.b1_EF, self.moe.w2_EDF

    def run_dense(self) -> Tensor:
        """The FFN whose place the layer takes."""
        return self.dense(self.x_TD)  # type: ignore[no-any-return]

    def run_moe(self, experts: peers.Experts) -> Tensor:
        """The layer with its normal experts computed by `experts`."""
        with mock.patch.object(backends, "run_experts", lambda backend, *tensors: experts(*tensors)):
            return self.moe(self.x_TD)  # type: ignore[no-any-return]

    def run_experts(self, experts: peers.Experts, tokens: int) -> Tensor:
        """The normal experts alone, on the first tokens."""
        gates_TK = self.moe.router(self.x_TD).gates_TK
        return experts(self.x_TD[:tokens], gates_TK[:tokens], self.indices_TK[:tokens], *self.weights)

    def timed(self, run: Callable[[], Tensor], others: Iterable[nn.Module] = ()) -> Callable[[], None]:
        """The pass that the case asks for; `others`: what has weights besides."""

        def forward() -> None:
            with torch.no_grad():
                run()

        def both() -> None:
            run().backward(self.x_TD.detach())
            self.x_TD.grad = None
            for module in (self.dense, self.moe, *others):
                module.zero_grad(set_to_none=True)

        return both if self.case.trains else forward


def ours(backend: str = "auto") -> peers.Experts:
    """Our experts by a backend."""
    return partial(backends.run_experts, backend)


def measure(case: Case, device: torch.device, **sizes: int) -> dict[str, Any]:
    """One row: times of all ways, the dense FFN first; `choice`: the backend that `auto` stands for. `sizes`: of `Layer`, where not FLUX.1's."""
    layer = Layer(case, device, **sizes)
    ways: dict[str, Callable[[], Tensor]] = {
        "dense FFN": layer.run_dense,
        "ours": lambda: layer.run_moe(ours()),
    }
    if case.with_peers and case.tokens <= LOOP_TOKENS:
        ways["ours, loop (reference)"] = lambda: layer.run_moe(ours("loop"))
    others = peers.peers(layer.weights[0]) if case.with_peers else {}
    if others:
        check(layer, others)
        ways |= {name: lambda experts=experts: layer.run_moe(experts) for name, experts in others.items()}  # type: ignore[misc]
    weighted = [experts.experts for experts in others.values() if isinstance(experts, peers.Nucleus)]
    timed = {name: layer.timed(run, weighted) for name, run in ways.items()}
    times = timing.in_turn(timed, device, rounds=case.rounds)
    with torch.set_grad_enabled(case.trains):
        gates_TK = torch.ones(layer.indices_TK.shape, device=device)
        choice = backends.choose(layer.x_TD, gates_TK, layer.indices_TK, *layer.weights)
    load_E = layer.indices_TK.flatten().bincount(minlength=len(layer.weights[0]))
    return {
        "tokens": case.tokens,
        "precision": str(case.dtype).removeprefix("torch."),
        "routing": case.routing,
        "largest_load_over_mean": round(float(load_E.max() / load_E.float().mean()), 2),
        "passes": "forward, backward" if case.trains else "forward",
        "choice": choice,
        "times": times,
    }


@torch.no_grad()
def check(layer: Layer, others: dict[str, peers.Experts]) -> None:
    """Raises AssertionError if a peer computes something else than we do; Nucleus does, by its nature."""
    expected = layer.run_experts(ours("loop"), CHECKED).float()
    for name, experts in others.items():
        if "Nucleus" not in name:
            error = F.mse_loss(layer.run_experts(experts, CHECKED).float(), expected).sqrt() / expected.std()
            assert error < 0.02, f"{name} is off by {error:.3g}"


def cases(device: torch.device) -> list[Case]:
    """What a run measures: on a CPU what ten minutes allow, so fp32, which takes three times as long, has fewer rows."""
    gpu = device.type == "cuda"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (256, 4608) if dtype == torch.float32 and not gpu else (256, 1024, 4608):
            rows.append(Case(tokens, dtype, "balanced", False, True, 20 if gpu else 3))
        tokens = 512 if dtype == torch.float32 and not gpu else 1024
        rows.append(Case(tokens, dtype, "balanced", True, True, 20 if gpu else 3))
    for trains, routing in ((False, "skewed"), (True, "balanced")):
        rows.append(Case(4608, torch.bfloat16, routing, trains, gpu, 20 if gpu else 3))
    return rows
