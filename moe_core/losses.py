"""The losses of eq. 7 to 10, each per sample before anything is averaged.

- A mean over samples of per-sample losses does not depend on how a batch is cut over workers or accumulation steps.
  The one exception is the balance of blocks: its unit is the sample, so its statistics are gathered over all
  workers.
- ||.||_2^2 between outputs or features is a mean over elements, as in every distillation code: summed, the losses
  of FLUX at 1024 px would be of order 10^3 beside a balance loss of order 1. The terms of eq. 8 are
  multiples of L_distill either way; eq. 9's ||f_tea||_2 is the norm as printed.
- Everything is computed in at least float32, whatever the features' type.

Shapes: L layers, B samples, T tokens, D width, E experts, K top-k, m blocks of a group, k active ones.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

BalanceProbs = Literal["softmax", "gate"]

Feature = tuple[Tensor, Tensor]
"""What a block returns: (encoder_hidden_states [B, T_text, D], hidden_states [B, T_image, D])."""


def distill_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 7 per sample: mean squared difference of two model outputs [B, ...]. Returns [B]."""
    return _squared_error(student, teacher) / student[0].numel()


def feature_loss(student: Feature, teacher: Feature) -> Tensor:
    """One layer's unweighted term of eq. 8 per sample: mean squared difference over the elements of both streams.
    Returns [B]."""
    elements = sum(stream[0].numel() for stream in teacher)
    return torch.stack([_squared_error(s, t) for s, t in zip(student, teacher)]).sum(0) / elements


def feature_norm(teacher: Feature) -> Tensor:
    """||f_tea||_2 of eq. 9 per sample, over the elements of both streams. Returns [B]."""
    return torch.stack([_wide(stream).square().flatten(1).sum(1) for stream in teacher]).sum(0).sqrt()


def feature_weights(distill_B: Tensor, feature_LB: Tensor, norm_LB: Tensor, floor_LB: Tensor) -> Tensor:
    """Eq. 9 per sample, detached: w_l = |L_distill| / |L_feature^(l)| * (sum_l ||f_tea^(l)||) / (L ||f_tea^(l)||).
    Returns [L, B].

    Detached because w_l * L_feature^(l) would otherwise be a multiple of L_distill, whose gradient does not see
    layer l at all.

    Division by zero: a layer whose feature loss is at most `floor_LB` (see `rounding_floor`) gets weight 0: it
    equals the teacher's as far as the number type can tell, so it has nothing left to learn, and its weight would
    turn rounding errors into a gradient without bound. The same holds for a layer where the teacher's feature is 0.
    Such layers still count in L and in the sum of norms.
    """
    distill_B, feature_LB, norm_LB = distill_B.detach(), feature_LB.detach(), norm_LB.detach()
    usable = (feature_LB > floor_LB) & (norm_LB > 0)
    layers = norm_LB.shape[0]
    # Where not usable, 1 in the denominators: no division by zero, and the result is not taken.
    weight_LB = distill_B / feature_LB.where(usable, 1.0) * norm_LB.sum(0) / (layers * norm_LB.where(usable, 1.0))
    return weight_LB.where(usable, 0.0)


def rounding_floor(norm_LB: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """The mean squared error that one rounding of a feature of `elements` elements to `dtype` may leave: eps^2
    times its mean square. [L, B]."""
    return norm_LB.square() / elements * torch.finfo(dtype).eps ** 2


def weighted_feature_loss(distill_B: Tensor, feature_LB: Tensor, norm_LB: Tensor, floor_LB: Tensor) -> Tensor:
    """Eq. 8 with the weights of eq. 9, per sample. Returns [B]."""
    return (feature_weights(distill_B, feature_LB, norm_LB, floor_LB) * feature_LB).sum(0)


def moe_balance(probs_BTE: Tensor, indices_BTK: Tensor, balance_probs: BalanceProbs = "softmax") -> Tensor:
    """Load balancing loss of one MoE layer per sample, over that sample's tokens: sum_i (n / (T k) * sum_t I(t, i))
    * (mean_t p(t, i)).

    1 when the load is even; n / k when all tokens choose the same k experts with certainty. `balance_probs`: p is
    the whole softmax (as in GShard), or eq. 3's renormalised gate, as printed. Returns [B].
    """
    load_BE = _chosen(probs_BTE, indices_BTK).mean(1) * (probs_BTE.shape[-1] / indices_BTK.shape[-1])
    return (load_BE * _balance_probs(probs_BTE, indices_BTK, balance_probs).mean(1)).sum(1)


def mob_balance(probs_Bm: Tensor, indices_Bk: Tensor, balance_probs: BalanceProbs = "softmax") -> Tensor:
    """Load balancing loss of one MoB group: the same formula with samples for tokens and blocks for experts.
    Returns a scalar.

    The load is that of all workers, and each worker's mean probability is scaled by its share of the samples, so
    that the mean of the workers' losses, and of their gradients (which is what DDP takes), equals the global
    batch's. The load has no gradient, so nothing needs to flow through the all-reduce. Every worker must call this
    the same number of times.
    """
    m = probs_Bm.shape[1]
    count_m = _chosen(probs_Bm, indices_Bk).sum(0)
    statistics = torch.cat([count_m, count_m.new_tensor([float(probs_Bm.shape[0])])])
    workers = 1
    if dist.is_available() and dist.is_initialized():
        workers = dist.get_world_size()
        dist.all_reduce(statistics)
    load_m = statistics[:-1] * (m / (statistics[-1] * indices_Bk.shape[1]))
    share = workers / statistics[-1]
    return (load_m * _balance_probs(probs_Bm, indices_Bk, balance_probs).sum(0) * share).sum()


def _chosen(probs: Tensor, indices: Tensor) -> Tensor:
    """The indicator I(t, i) as 0 and 1, without gradient; the shape of `probs`."""
    return torch.zeros_like(probs).scatter_(-1, indices, 1.0)


def _balance_probs(probs: Tensor, indices: Tensor, balance_probs: BalanceProbs) -> Tensor:
    if balance_probs == "softmax":
        return probs
    chosen = probs.gather(-1, indices)
    return torch.zeros_like(probs).scatter(-1, indices, chosen / chosen.sum(-1, keepdim=True))


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||student - teacher||_2^2 per sample, [B]."""
    return (_wide(student) - _wide(teacher)).square().flatten(1).sum(1)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
