"""Other libraries' experts over our packed weights: functions (x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF) -> y_TD.

- `transformers eager`, `transformers grouped_mm`: what a model of transformers 5 runs with that `_experts_implementation`; eager is the loop
  that its expert classes have as their own forward. Its `batched_mm` copies an expert's weights for each token: 28 times the dense FFN's time at
  256 tokens, and so left out. Biases are 0 here and these two add none: theirs would be in both products, of ours it is one.
- `diffusers Nucleus`: `SwiGLUExperts` of diffusers' Nucleus-MoE transformer, by its grouped products, the faster of its two ways. It has three
  matrices an expert and no biases: two thirds as wide as ours it does the same arithmetic, but computes something else. Its layer lets experts
  choose tokens; here it gets our tokens, sorted, and its results are added as that layer adds them (`scatter_add_`).
- `sorted loop`: sort, split, an expert after the other, weighted rows added back with `index_add_`: what OLMo-core and many others do without
  grouped products.
- `masked loop`: for each expert, find its tokens with a mask: what most published models have as their forward.

Shapes: as in `moe_core.backends`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def gelu(x: Tensor) -> Tensor:
    """FLUX's."""
    return F.gelu(x, approximate="tanh")


def _transformers(function: Callable[..., Tensor]) -> Experts:
    def run(
        x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
    ) -> Tensor:
        layer = SimpleNamespace(
            num_experts=len(w1_EFD), has_gate=False, has_bias=False, has_post_expert_norm=False, is_transposed=False,
            _is_expert_parallel=False, up_proj=w1_EFD, down_proj=w2_EDF, act_fn=gelu,
        )  # fmt: skip
        return function(layer, x_TD, indices_TK, gates_TK.to(x_TD.dtype))

    return run


def masked_loop(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    """See above."""
    y_TD = torch.zeros_like(x_TD)
    for expert in range(len(w1_EFD)):
        token_n, slot_n = torch.where(indices_TK == expert)
        h_nF = gelu(F.linear(x_TD[token_n], w1_EFD[expert], b1_EF[expert]))
        rows_nD = F.linear(h_nF, w2_EDF[expert]) * gates_TK[token_n, slot_n, None].to(x_TD.dtype)
        y_TD.index_add_(0, token_n, rows_nD)
    return y_TD


def eager(layer: SimpleNamespace, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """The loop of transformers' expert classes: experts that were hit, by a one-hot mask."""
    y_TD = torch.zeros_like(x_TD)
    mask_EKT = F.one_hot(indices_TK, layer.num_experts).permute(2, 1, 0)
    for (expert,) in mask_EKT.sum(dim=(-1, -2)).nonzero():
        slot_n, token_n = torch.where(mask_EKT[expert])
        h_nF = gelu(F.linear(x_TD[token_n], layer.up_proj[expert]))
        rows_nD = F.linear(h_nF, layer.down_proj[expert]) * gates_TK[token_n, slot_n, None]
        y_TD.index_add_(0, token_n, rows_nD.to(y_TD.dtype))
    return y_TD


def sorted_loop(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    """See above."""
    flat_N, pair_N = indices_TK.flatten().sort()
    token_N = pair_N // indices_TK.shape[1]
    counts = flat_N.bincount(minlength=len(w1_EFD)).tolist()
    rows = [
        F.linear(gelu(F.linear(x_nD, w1, b1)), w2)
        for x_nD, w1, b1, w2 in zip(x_TD[token_N].split(counts), w1_EFD, b1_EF, w2_EDF)
    ]
    weighted_ND = torch.cat(rows) * gates_TK.flatten()[pair_N, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add_(0, token_N, weighted_ND)


class Nucleus:
    """diffusers' experts, of random weights two thirds as wide as `w1_EFD`."""

    def __init__(self, w1_EFD: Tensor) -> None:
        experts, hidden, width = w1_EFD.shape
        self.experts = SwiGLUExperts(width, hidden * 2 // 3, experts, use_grouped_mm=True).to(w1_EFD)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)

    def __call__(
        self, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
    ) -> Tensor:
        flat_N, pair_N = indices_TK.flatten().sort()
        token_N = pair_N // indices_TK.shape[1]
        y_ND = self.experts(x_TD[token_N], flat_N.bincount(minlength=len(w1_EFD)))
        y_ND = (y_ND * gates_TK.flatten()[pair_N, None]).to(x_TD.dtype)
        return torch.zeros_like(x_TD).scatter_add_(0, token_N.unsqueeze(-1).expand_as(y_ND), y_ND)


def peers(w1_EFD: Tensor) -> dict[str, Experts]:
    """Name -> peer, for experts of this size."""
    return {
        "transformers eager": _transformers(eager),
        "transformers grouped_mm": _transformers(grouped_mm_experts_forward),
        "diffusers Nucleus": Nucleus(w1_EFD),
        "sorted loop": sorted_loop,
        "masked loop": masked_loop,
    }
