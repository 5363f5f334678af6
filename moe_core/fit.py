"""Fits a MoE layer to the dense FFN whose place it takes, in closed form, on a sample of the tokens that the FFN sees.

Four choices of `moe` ask for it; each can be had without the others:

- `split: greedy`. The shared expert gets the hidden units from which the whole FFN's output can be predicted best by a linear map: forward
  selection, as orthogonal matching pursuit does it for one output (Pati et al. 1993), for all outputs at once.
- `deal: coactivation`. Units whose contributions rise and fall together over tokens come to one expert: k-means with clusters of equal size, on
  the cosine of contributions. A token then needs few experts (MoEfication, Zhang et al., arXiv:2110.01786, clusters rows of W1).
- `router_init: norms`. The router is the ridge regression from a token to the norms of the experts' outputs (MoEfication takes the sum of
  activations as its target, and an MLP). Its logits are scaled to a mean square of 1.
- `refit`. The second matrices of shared and normal experts are the ridge regression from the hidden units that run, gates included, to the whole
  FFN's output: what the units left out would have added is added as far as those that run can tell (pruning's least squares, as in
  He, Zhang and Sun, arXiv:1707.06168).

All in fp64, as the compression of AdaLN is. Nothing here reads more than an FFN at a time.

Shapes: N tokens, D width, F hidden width of the FFN, S of the shared expert, E experts, f expert width, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.errors import ConfigError
from moe_core.moe import Router

if TYPE_CHECKING:
    from moe_core.config import MoEConfig

KMEANS_ROUNDS = 50
"""At most; it ends when nothing changes."""

ROUNDS, CANDIDATES = 64, 4
"""Of `select`: rounds at most, and columns looked at for each that a round takes."""

EXPLAINED = 1e-10
"""A column of which a smaller part is left is explained by those chosen."""


class Split(NamedTuple):
    """Which segments of an FFN go where; indices into F, rising within each expert."""

    shared: Tensor
    experts_EF: Tensor


class LayerFit(NamedTuple):
    """The tensors of a MoE layer, in fp64, on the device of the tokens; W1 and b1 are the FFN's own rows of `split`."""

    split: Split
    router_ED: Tensor
    shared_DS: Tensor
    """W2 of the shared expert."""
    experts_EDF: Tensor
    """W2 of the normal experts."""


def tokens_of(name: str, tokens: Mapping[str, Tensor] | None, width: int) -> Tensor:
    """The tokens of an FFN, [N, D]. Raises ConfigError where there are none, they are of another width, or not finite."""
    require_tokens(name, tokens)
    assert tokens is not None
    found = tokens[name]
    if found.ndim != 2 or found.shape[1] != width or not len(found) or not torch.isfinite(found).all():
        raise ConfigError(
            f"tokens of {name} must be finite and [N, {width}], N at least 1; their shape is {list(found.shape)}"
        )
    return found


def require_tokens(name: str, tokens: Mapping[str, Tensor] | None) -> None:
    """Raises ConfigError where there are no tokens of this FFN; reads none."""
    if tokens is None or name not in tokens:
        raise ConfigError(
            f"there are no tokens of {name}; moe.split greedy, deal coactivation, router_init norms and refit need them: run stage importance again"
        )


def fit_layer(
    tokens_ND: Tensor,
    ffn: tuple[Tensor, Tensor, Tensor],
    order_F: Tensor,
    router_ED: Tensor,
    moe: MoEConfig,
    generator: torch.Generator,
    alone: bool,
) -> LayerFit:
    """Fits a layer as `moe` says, on the device of the tokens.

    ffn: w1_FD, b1_F, w2_DF. order_F: all units, the most important first; the shared expert gets the first of them unless `split` is greedy.
    router_ED: the router unless one is fitted. alone: the shared expert is to work without the others; their W2 is then the FFN's own.
    """
    device = tokens_ND.device
    x_ND, w1_FD, b1_F, w2_DF, router_ED = (
        value.detach().to(device, torch.float64) for value in (tokens_ND, *ffn, router_ED)
    )
    # Units go by rank from here on: importance settles what is equal otherwise.
    order_F = order_F.to(device)
    w2_DF = w2_DF[:, order_F]
    h_NF = F.gelu(F.linear(x_ND, w1_FD[order_F], b1_F[order_F]), approximate="tanh")
    width, shared = w2_DF.shape[0], round(moe.shared_ratio * w2_DF.shape[0])
    gram_FF = h_NF.T @ h_NF
    chosen_S = torch.arange(shared, device=device)
    if moe.split == "greedy":
        chosen_S = select(gram_FF, gram_FF @ w2_DF.T, shared)
    left_F = torch.ones(len(order_F), dtype=torch.bool, device=device).scatter(0, chosen_S, value=False)
    dealt_Ef = deal(left_F.nonzero().flatten(), gram_FF, w2_DF, moe, generator)
    # Within an expert, units stand as they stood in the FFN.
    chosen_S = chosen_S[order_F[chosen_S].argsort()]
    dealt_Ef = dealt_Ef.gather(1, order_F[dealt_Ef].argsort(-1))
    split = Split(order_F[chosen_S], order_F[dealt_Ef])
    shared_DS, experts_EDF = w2_DF[:, chosen_S], w2_DF[:, dealt_Ef].transpose(0, 1)
    if alone:
        if moe.refit:
            shared_DS = regress(h_NF[:, chosen_S], h_NF @ w2_DF.T, moe.ridge, towards_OI=shared_DS)
        return LayerFit(split, router_ED, shared_DS, experts_EDF)
    if moe.router_init == "norms":
        router_ED = fit_router(x_ND, h_NF, experts_EDF, dealt_Ef, moe.ridge)
    if moe.refit:
        gates_NE = _gates(x_ND, router_ED, moe)
        gated = [gates_NE[:, e, None] * h_NF[:, units] for e, units in enumerate(dealt_Ef)]
        running_NF = torch.cat([h_NF[:, chosen_S], *gated], dim=1)
        own_DF = torch.cat([shared_DS, *experts_EDF], dim=1)
        refitted_DF = regress(running_NF, h_NF @ w2_DF.T, moe.ridge, towards_OI=own_DF)
        shared_DS, experts = refitted_DF[:, :shared], refitted_DF[:, shared:]
        experts_EDF = experts.view(width, moe.num_experts, -1).transpose(0, 1)
    return LayerFit(split, router_ED, shared_DS, experts_EDF)


def regress(x_NI: Tensor, y_NO: Tensor, ridge: float, towards_OI: Tensor | None = None) -> Tensor:
    """W_OI of least |x W^T - y|^2 + strength |W - towards|^2; `ridge` is the strength relative to the mean square of an input.

    `towards`, or 0, is what is left where there are no data: the W2 of an expert that no token chose stays its own.
    """
    if towards_OI is not None:
        return towards_OI + regress(x_NI, y_NO - x_NI @ towards_OI.T, ridge)
    gram_II = x_NI.T @ x_NI
    strength = ridge * gram_II.diagonal().mean().clamp_min(torch.finfo(gram_II.dtype).tiny)
    gram_II.diagonal().add_(strength)
    return torch.cholesky_solve(x_NI.T @ y_NO, torch.linalg.cholesky(gram_II)).T


def select(gram_FF: Tensor, cross_FO: Tensor, count: int) -> Tensor:
    """Columns of h whose span comes nearest to y, chosen one by one; indices in the order of choice. Among equals, the first.

    gram_FF = h^T h, cross_FO = h^T y. Each step takes the column whose part orthogonal to those chosen explains most of what is left of y: a
    pivoted Cholesky factorization, carried along in the cross products. Columns that those chosen explain to rounding come last.
    More than ROUNDS columns are chosen in so many rounds: each step then looks only at the CANDIDATES times as many columns that are best when
    its round begins, and all others follow at the round's end, by products of matrices. FLUX.1's FFNs would take hours otherwise.
    """
    left_F, cross_FO = gram_FF.diagonal().clone(), cross_FO.clone()
    floor_F = left_F * EXPLAINED
    free_F = torch.ones_like(left_F, dtype=torch.bool)
    factor = gram_FF.new_zeros(count, len(gram_FF))
    chosen = torch.empty(count, dtype=torch.int64, device=gram_FF.device)
    each = -(-count // ROUNDS)
    for first in range(0, count, each):
        last = min(first + each, count)
        near = _gains(cross_FO, left_F, floor_F, free_F).sort(descending=True, stable=True).indices
        # One column a round may be any of them.
        near = (near if each == 1 else near[: CANDIDATES * each]).sort().values
        row_CF = gram_FF[near][:, near] - factor[:first, near].T @ factor[:first, near]
        picked = near[_greedy(row_CF, cross_FO[near], floor_F[near], free_F[near], last - first)]
        chosen[first:last] = picked
        free_F[picked] = False
        rows = gram_FF[picked] - factor[:first, picked].T @ factor[:first]
        # Columns that are explained already add nothing; the diagonal keeps their factor from being singular.
        within = rows[:, picked] + torch.diag(floor_F[picked].clamp_min(torch.finfo(rows.dtype).tiny))
        cholesky = torch.linalg.cholesky(within)
        factor[first:last] = torch.linalg.solve_triangular(cholesky, rows, upper=False)
        cross_FO -= factor[first:last].T @ torch.linalg.solve_triangular(cholesky, cross_FO[picked], upper=False)
        left_F -= factor[first:last].square().sum(0)
    return chosen


def _greedy(gram_CC: Tensor, cross_CO: Tensor, floor_C: Tensor, free_C: Tensor, count: int) -> Tensor:
    """`select` among few columns, one by one; `gram` and `cross` are of what is left of them."""
    gram_CC, cross_CO, free_C = gram_CC.clone(), cross_CO.clone(), free_C.clone()
    picked = []
    for _ in range(count):
        left_C = gram_CC.diagonal()
        best = int(_gains(cross_CO, left_C, floor_C, free_C).argmax())
        picked.append(best)
        free_C[best] = False
        if left_C[best] > floor_C[best]:
            row_C = gram_CC[best] / left_C[best].sqrt()
            cross_CO -= torch.outer(row_C, cross_CO[best] / left_C[best].sqrt())
            gram_CC -= torch.outer(row_C, row_C)
    return torch.tensor(picked, device=gram_CC.device)


def _gains(cross_FO: Tensor, left_F: Tensor, floor_F: Tensor, free_F: Tensor) -> Tensor:
    """What each column would explain; below 0 for those explained already, least for those taken."""
    gain_F = torch.where(left_F > floor_F, cross_FO.square().sum(1) / left_F, -1.0)
    return torch.where(free_F, gain_F, -2.0)


def deal(rest: Tensor, gram_FF: Tensor, w2_DF: Tensor, moe: MoEConfig, generator: torch.Generator) -> Tensor:
    """[E, f]: which of the units `rest`, the most important first, come to which normal expert; rising within each."""
    if moe.deal == "coactivation":
        norm = w2_DF.norm(dim=0)[rest]
        contribution = gram_FF[rest][:, rest] * torch.outer(norm, norm)
        size = contribution.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return rest[clusters(contribution / torch.outer(size, size), moe.num_experts, generator)].sort(-1).values
    return deal_by_rank(rest, moe)


def deal_by_rank(rest: Tensor, moe: MoEConfig) -> Tensor:
    """The same where no tokens are needed."""
    ranked = rest.view(-1, moe.num_experts).T if moe.deal == "round_robin" else rest.view(moe.num_experts, -1)
    return ranked.sort(-1).values


def clusters(similarity_RR: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means with `count` clusters of equal size, of points given by their inner products; [E, R / E] indices.

    Each round deals the points to the centroids of the last, those first that lose most by not getting their choice. The best round counts.
    """
    points = len(similarity_RR)
    size = points // count
    centres = torch.randperm(points, generator=generator)[:count].to(similarity_RR.device)
    towards_RE = similarity_RR[:, centres]
    best, dealt, before = -float("inf"), centres, None
    for _ in range(KMEANS_ROUNDS):
        of_R = _deal_evenly(towards_RE, size)
        member_RE = F.one_hot(of_R, count).to(similarity_RR.dtype)
        inner_RE = similarity_RR @ member_RE / size
        spread_E = (member_RE * inner_RE).sum(0) / size
        # Of points of length 1 the summed squared distance to the centroids is R - size * the sum of these.
        if (score := spread_E.sum().item()) > best:
            best, dealt = score, of_R
        if before is not None and torch.equal(of_R, before):
            break
        before, towards_RE = of_R, inner_RE - spread_E / 2
    return torch.stack([(dealt == e).nonzero().flatten() for e in range(count)])


def _deal_evenly(towards_RE: Tensor, size: int) -> Tensor:
    """[R]: for every point a cluster, `size` to each; by falling regret, each takes the nearest that has room."""
    best_RE = towards_RE.sort(dim=1, descending=True, stable=True)
    regret_R = best_RE.values[:, 0] - best_RE.values[:, 1:2].sum(1)
    room = [size] * towards_RE.shape[1]
    choices: Sequence[Sequence[int]] = best_RE.indices.tolist()
    of_R = torch.empty(len(choices), dtype=torch.int64)
    for point in regret_R.sort(descending=True, stable=True).indices.tolist():
        cluster = next(cluster for cluster in choices[point] if room[cluster])
        room[cluster] -= 1
        of_R[point] = cluster
    return of_R.to(towards_RE.device)


def fit_router(x_ND: Tensor, h_NF: Tensor, experts_EDF: Tensor, units_EF: Tensor, ridge: float) -> Tensor:
    """The router's weight, [E, D], whose logits tell the norms of the experts' outputs apart; their mean square is 1."""
    norm_NE = torch.stack(
        [F.linear(h_NF[:, units], w2_DF).norm(dim=1) for units, w2_DF in zip(units_EF, experts_EDF)], dim=1
    )
    router_ED = regress(x_ND, norm_NE, ridge)
    # What all experts have in common changes no choice.
    router_ED = router_ED - router_ED.mean(0)
    size = F.linear(x_ND, router_ED).square().mean().sqrt()
    return router_ED / size.clamp_min(torch.finfo(torch.float64).tiny)


def _gates(x_ND: Tensor, router_ED: Tensor, moe: MoEConfig) -> Tensor:
    """[N, E]: the gate of each expert, 0 where it does not run."""
    router = Router(x_ND.shape[1], moe.num_experts, moe.top_k, moe.gate_norm)
    router.weight.data = router_ED
    with torch.no_grad():
        routing = router(x_ND)
    return torch.zeros_like(routing.probs_TE).scatter(1, routing.indices_TK, routing.gates_TK)
