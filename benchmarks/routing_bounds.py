"""How good could a router be? A MoE layer's output, and a model's KD loss, with other choices of experts than its router's.

- random: k experts for each token by lot. The least that any router should beat.
- largest: the k experts whose outputs have the largest norm. What `moe.router_init: norms` aims at.
- best: of all sets of k experts, the one that leaves least of the dense FFN's output. No router can do better, gates being 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core import experts, noise, sampling
from moe_core.config import MoEConfig, Params
from moe_core.data.latents import LatentDataset
from moe_core.fit import LayerFit
from moe_core.moe import MoELayer, Router, Routing
from tasks.places import SHARDS, TEACHER
from tasks.validation import validation_loss


def layer_outputs(
    found: LayerFit, h_NF: Tensor, tokens_ND: Tensor, target_ND: Tensor, moe: MoEConfig, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """(routing, output [N, D]) of a layer at gates 1. `h_NF`: the FFN's hidden units on these tokens, `target_ND` its output."""
    given_NED = contributions(found, h_NF)
    shared_ND = F.linear(h_NF[:, found.split.shared], found.shared_DS)
    lot_NE = torch.rand(given_NED.shape[:2], generator=experts.generator(seed, "random routing"), dtype=torch.float64)
    for name, score_NE in (("random", lot_NE), ("largest", given_NED.norm(dim=-1))):
        yield f"{name} {moe.top_k} experts", gated(found, h_NF, mask(score_NE, moe.top_k))
    yield "fitted router", gated(found, h_NF, learned(found, tokens_ND, moe.top_k))
    yield f"best {moe.top_k} experts", shared_ND + _best_sum(given_NED, target_ND - shared_ND, moe.top_k)


def contributions(found: LayerFit, h_NF: Tensor) -> Tensor:
    """[N, E, D]: the output of every normal expert."""
    return torch.stack(
        [F.linear(h_NF[:, units], w2_DF) for units, w2_DF in zip(found.split.experts_EF, found.experts_EDF)], dim=1
    )


def gated(found: LayerFit, h_NF: Tensor, gates_NE: Tensor) -> Tensor:
    """The layer's output at these gates."""
    shared_ND = F.linear(h_NF[:, found.split.shared], found.shared_DS)
    return shared_ND + torch.einsum("ned,ne->nd", contributions(found, h_NF), gates_NE)


def gates(found: LayerFit, tokens_ND: Tensor, moe: MoEConfig) -> Tensor:
    """[N, E]: the gate of each expert as the model computes it, 0 where one does not run."""
    router = Router(tokens_ND.shape[1], moe.num_experts, moe.top_k, moe.gate_norm)
    router.weight.data = found.router_ED
    with torch.no_grad():
        routing = router(tokens_ND)
    return torch.zeros_like(routing.probs_TE).scatter(1, routing.indices_TK, routing.gates_TK)


def learned(found: LayerFit, tokens_ND: Tensor, top_k: int) -> Tensor:
    """The layer's own router's choice, [N, E] of 0 and 1."""
    return mask(F.linear(tokens_ND, found.router_ED), top_k)


def mask(score_NE: Tensor, top_k: int) -> Tensor:
    """1 for the `top_k` highest of each row, 0 for the rest."""
    return torch.zeros_like(score_NE).scatter(1, score_NE.topk(top_k, dim=1).indices, 1.0)


def _best_sum(given_NED: Tensor, wanted_ND: Tensor, top_k: int) -> Tensor:
    best_N = torch.full((len(given_NED),), float("inf"), dtype=given_NED.dtype)
    best_ND = torch.zeros_like(wanted_ND)
    for chosen in itertools.combinations(range(given_NED.shape[1]), top_k):
        sum_ND = given_NED[:, list(chosen)].sum(1)
        left_N = (wanted_ND - sum_ND).square().sum(1)
        better_N = left_N < best_N
        best_N = torch.where(better_N, left_N, best_N)
        best_ND = torch.where(better_N[:, None], sum_ND, best_ND)
    return best_ND


def model_losses(root: Path, params: Params, folder: Path) -> dict[str, float]:
    """Validation KD loss of a MoE model with its own routers, and with every layer's choice replaced; `best` is not known for a whole model."""
    pipeline = sampling.load_pipeline(root / TEACHER, without=("vae",))
    student = sampling.load_transformer(folder)
    data, losses = LatentDataset(root / SHARDS, "val"), {}
    generator = torch.Generator().manual_seed(noise.derive_seed(params.seed, "random routing"))
    choosers: dict[str, Callable[[MoELayer, Tensor], Tensor] | None] = {
        "own": None,
        "random": lambda layer, x: torch.rand((*x.shape[:-1], layer.num_experts), generator=generator),
        "largest": lambda layer, x: _outputs(layer, x).norm(dim=-1),
    }
    for name, choose in choosers.items():
        with _rerouted(student, choose):
            losses[name] = validation_loss(pipeline, student, data, params, params.kd.moe.optimizer.at_once)["distill"]
    return losses


def _outputs(layer: MoELayer, x_BTD: Tensor) -> Tensor:
    """[B, T, E, D]: what each expert would give."""
    h = F.gelu(torch.einsum("btd,efd->btef", x_BTD, layer.w1_EFD) + layer.b1_EF, approximate="tanh")
    return torch.einsum("btef,edf->bted", h, layer.w2_EDF)


@contextmanager
def _rerouted(model: nn.Module, choose: Callable[[MoELayer, Tensor], Tensor] | None) -> Iterator[None]:
    """Inside, experts are those of the highest `choose`; their gates are the router's own among them."""
    handles = []
    for layer in model.modules():
        if choose is None or not isinstance(layer, MoELayer) or not layer.num_experts:
            continue

        def reroute(module: nn.Module, args: Any, routing: Routing, layer: MoELayer = layer) -> Routing:
            indices_TK = choose(layer, args[0]).topk(layer.top_k, dim=-1).indices
            if layer.router.gate_norm == "unit":
                return routing._replace(gates_TK=torch.ones_like(routing.gates_TK), indices_TK=indices_TK)
            gates_TK = routing.probs_TE.gather(-1, indices_TK)
            gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
            scale = layer.top_k if layer.router.gate_norm == "scale_to_k" else 1
            return routing._replace(gates_TK=gates_TK * scale, indices_TK=indices_TK)

        handles.append(layer.router.register_forward_hook(reroute))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
