"""The MoE layer that takes an FFN's place (paper, Sec. 3.1).

- One shared expert that every token passes, and n small normal experts of which a token passes k (eq. 2).
- The router is its own small module, called as one: a forward hook on it sees every routing decision.
- Routing is computed in fp32 at least: in bf16 two experts would tie, and the softmax would round to a few levels.
- The normal experts' weights are packed, so that one grouped matrix product runs them all (`backends.py`).
- `top_k` may be changed after training; at 0 the shared expert works alone and the router does not run.

Shapes: B batch, T tokens, D width, E experts, F expert width, K top-k.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_core import backends
from moe_core.errors import ConfigError

GATE_NORMS = ("renormalize", "scale_to_k", "unit")


class Routing(NamedTuple):
    """What a router decided. Leading dimensions are its input's: for [B, T, D], probs_TE is [B, T, E]."""

    probs_TE: Tensor
    """Softmax over all experts; fp32 (fp64 for fp64 input); differentiable."""
    gates_TK: Tensor
    """Weight of each chosen expert in the sum of eq. 2; fp32; differentiable."""
    indices_TK: Tensor
    """The chosen experts, best first; int64."""


class Router(nn.Module):
    """Chooses k of n experts for each token (eq. 3): softmax(W_g x), top k, normalised among them.

    `gate_norm`: "renormalize" is eq. 3; "scale_to_k" the same times k; "unit" gives every chosen expert 1, through p /
    stopgrad(p) so that the router still gets a gradient.
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, gate_norm: str = "renormalize", init_std: float = 0.02
    ):
        super().__init__()
        if gate_norm not in GATE_NORMS:
            raise ConfigError(f"moe.gate_norm is {gate_norm!r}; it must be one of {', '.join(GATE_NORMS)}")
        self.top_k = top_k
        self.gate_norm = gate_norm
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        # Small, so that training starts from an even choice.
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, hidden_states: Tensor) -> Routing:
        """hidden_states: [..., T, D]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            log_probs_TE = F.linear(hidden_states.to(dtype), self.weight.to(dtype)).log_softmax(-1)
        probs_TE = log_probs_TE.exp()
        top_TK, indices_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.gate_norm == "unit":
            chosen_TK = log_probs_TE.gather(-1, indices_TK)
            # Value 1 exactly, gradient that of log p, which is the gradient of p / stopgrad(p).
            gates_TK = 1 + (chosen_TK - chosen_TK.detach())
        else:
            gates_TK = top_TK / top_TK.sum(-1, keepdim=True)
            if self.gate_norm == "scale_to_k":
                gates_TK = gates_TK * self.top_k
        return Routing(probs_TE, gates_TK, indices_TK)


class SharedExpert(nn.Module):
    """The expert that every token passes: an FFN with GELU (tanh), as FLUX's, only narrower.

    `out_bias` is False in single blocks, whose output bias stays with the attention's projection.
    """

    def __init__(self, width: int, hidden_width: int, out_bias: bool = True):
        super().__init__()
        self.proj_in = nn.Linear(width, hidden_width)
        self.proj_out = nn.Linear(hidden_width, width, bias=out_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj_out(F.gelu(self.proj_in(hidden_states), approximate="tanh"))


class MoELayer(nn.Module):
    """Eq. 2: the shared expert plus the gated sum of the k chosen normal experts.

    Parameters `w1_EFD`, `b1_EF`, `w2_EDF` are the normal experts'; with `num_experts=0` the layer is the shared expert
    alone, with neither them nor a router. Raises ConfigError if top_k does not lie between 0 and num_experts.
    """

    def __init__(
        self,
        width: int,
        shared_width: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        *,
        out_bias: bool = True,
        gate_norm: str = "renormalize",
        router_init_std: float = 0.02,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.backend = "auto"
        self.shared = SharedExpert(width, shared_width, out_bias)
        if num_experts:
            self.router = Router(width, num_experts, top_k, gate_norm, router_init_std)
            self.w1_EFD = nn.Parameter(torch.empty(num_experts, expert_width, width))
            self.b1_EF = nn.Parameter(torch.empty(num_experts, expert_width))
            self.w2_EDF = nn.Parameter(torch.empty(num_experts, width, expert_width))
            for tensor, fan_in in ((self.w1_EFD, width), (self.b1_EF, width), (self.w2_EDF, expert_width)):
                nn.init.uniform_(tensor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))  # as nn.Linear does
        self.set_top_k(top_k)

    @property
    def top_k(self) -> int:
        """Normal experts that each token passes."""
        return self._top_k

    def set_top_k(self, top_k: int) -> None:
        """Changes how many normal experts a token passes; 0: the shared expert alone."""
        if not 0 <= top_k <= self.num_experts:
            raise ConfigError(
                f"moe.top_k is {top_k}, but there are {self.num_experts} experts; it must lie between 0 and that"
            )
        self._top_k = top_k
        if self.num_experts:
            self.router.top_k = top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [B, T, D], any strides; the result has the same shape."""
        output = self.shared(hidden_states)
        if self._top_k == 0:
            return output
        routing = self.router(hidden_states)
        routed_TD = backends.run_experts(
            self.backend,
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            routing.gates_TK.reshape(-1, self._top_k),
            routing.indices_TK.reshape(-1, self._top_k),
            self.w1_EFD,
            self.b1_EF,
            self.w2_EDF,
        )
        routed_BTD = routed_TD.reshape(output.shape).to(output.dtype)
        # Where autograd watches, adding in place would copy more: the output is a view of a product.
        return output + routed_BTD if torch.is_grad_enabled() else output.add_(routed_BTD)
