"""The normal experts with a backward pass of their own, in two orders of work: expert by expert, and all experts at once.

- Kept for the backward pass are the tokens and the experts' hidden units before their GELU. Autograd would keep K copies of every token, K outputs,
  and the hidden units before and after it.
- Gates multiply the hidden units, not the outputs: W2 (g h) = g (W2 h), and F is a quarter of D in the paper's experts.
- `by_expert` takes one expert's rows through all of its arithmetic before the next: what it works on stays in a CPU's caches, and little
  memory is taken anew, which costs a CPU as much as copying it. It must know how many rows each expert has: on a GPU, a wait for it.
- `all_experts` never asks: `torch.nn.functional.grouped_mm` reads the experts' bounds where they are, in bf16 on GPUs of compute capability 9 and 10;
  elsewhere torch itself waits for them. It compiles as one graph.

Shapes: T tokens, D width, E experts, F expert width, K top-k, N = T * K rows sorted by expert, n those of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_core import kernels

Gradients = tuple[Tensor | None, ...]


class Order(NamedTuple):
    """The T * K (token, expert) pairs in the order of their experts."""

    pair_N: Tensor
    """flat position in [T, K] of each sorted row"""
    token_N: Tensor
    """its token"""
    expert_N: Tensor
    """its expert"""
    row_TK: Tensor
    """the sorted row of each pair"""
    ends_E: Tensor
    """where each expert's rows end"""

    def counts(self) -> list[int]:
        """Rows of each expert, on the host."""
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).tolist()

    def slices(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) of every expert that has some, on the host."""
        start = 0
        for expert, end in enumerate(self.ends_E.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


def sort(indices_TK: Tensor, num_experts: int) -> Order:
    """The order in which experts take their rows."""
    flat_N = indices_TK.reshape(-1)
    # Stable, so that the order of additions, hence every bit of the result, is a function of the routing alone.
    expert_N, pair_N = flat_N.sort(stable=True)
    row_N = torch.empty_like(pair_N)
    row_N[pair_N] = torch.arange(len(pair_N), device=pair_N.device)
    # Not by bincount, which waits for the device to learn the size of its result.
    ends_E = torch.searchsorted(expert_N, torch.arange(num_experts, device=expert_N.device), right=True, out_int32=True)
    return Order(pair_N, pair_N // indices_TK.shape[1], expert_N, row_N.view_as(indices_TK), ends_E)


def by_expert(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    """One expert after the other; in any precision."""
    tensors = (x_TD, gates_TK, w1_EFD, b1_EF, w2_EDF)
    return _ByExpert.apply(*tensors, sort(indices_TK, len(w1_EFD)), _trains(tensors))


def all_experts(
    x_TD: Tensor,
    gates_TK: Tensor,
    indices_TK: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor,
    w2_EDF: Tensor,
    fused: bool = False,
) -> Tensor:
    """All experts in one product; what `torch.nn.functional.grouped_mm` takes. fused: between the products with `moe_core.kernels`."""
    tensors = (x_TD, gates_TK, w1_EFD, b1_EF, w2_EDF)
    return _AllExperts.apply(*tensors, sort(indices_TK, len(w1_EFD)), _trains(tensors), fused)


def _trains(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _sum_of_slots(y_ND: Tensor, row_TK: Tensor) -> Tensor:
    # Gathers and adds a token's K rows in one pass, in the order of its choices, in fp32 at least: no atomics, no [T, K, D] between.
    return F.embedding_bag(row_TK, y_ND, mode="sum")


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        w1_EFD: Tensor,
        b1_EF: Tensor,
        w2_EDF: Tensor,
        order: Order,
        trains: bool,
    ) -> Tensor:
        gate_N1 = gates_TK.reshape(-1, 1).index_select(0, order.pair_N)
        sums_TD = _sums(x_TD, gates_TK.shape[1])
        u_NF = x_TD.new_empty(len(gate_N1), b1_EF.shape[1]) if trains else None
        for expert, own in order.slices():
            token_n = order.token_N[own]
            out = None if u_NF is None else u_NF[own]
            u_nF = torch.addmm(b1_EF[expert], x_TD.index_select(0, token_n), w1_EFD[expert].t(), out=out)
            y_nD = kernels.gated(u_nF, gate_N1[own]) @ w2_EDF[expert].t()
            sums_TD.index_add_(0, token_n, y_nD.to(sums_TD.dtype))
        if u_NF is not None:
            ctx.save_for_backward(x_TD, gate_N1, w1_EFD, b1_EF, w2_EDF, u_NF, *order)
        return sums_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Gradients:
        x_TD, gate_N1, w1_EFD, b1_EF, w2_EDF, u_NF, *of_order = ctx.saved_tensors
        order, (needs_x, needs_gates, needs_w1, needs_b1, needs_w2, *_) = Order(*of_order), ctx.needs_input_grad
        dx_TD = _sums(x_TD, order.row_TK.shape[1]) if needs_x else None
        dgate_N1 = torch.empty_like(gate_N1)
        dw1_EFD, dw2_EDF = (_empty(w, needs) for w, needs in ((w1_EFD, needs_w1), (w2_EDF, needs_w2)))
        db1_EF = torch.zeros_like(b1_EF) if needs_b1 else None
        busy = dict(order.slices())
        for expert, own in busy.items():
            token_n, u_nF, gate_n1 = order.token_N[own], u_NF[own], gate_N1[own]
            dy_nD = grad_TD.index_select(0, token_n)
            da_nF = dy_nD @ w2_EDF[expert]
            if dw2_EDF is not None:
                torch.mm(dy_nD.t(), kernels.gated(u_nF, gate_n1), out=dw2_EDF[expert])
            du_nF, dgate_N1[own] = kernels.gated_backward(da_nF, u_nF, gate_n1)
            if db1_EF is not None:
                torch.sum(du_nF, 0, out=db1_EF[expert])
            if dw1_EFD is not None:
                torch.mm(du_nF.t(), x_TD.index_select(0, token_n), out=dw1_EFD[expert])
            if dx_TD is not None:
                dx_TD.index_add_(0, token_n, (du_nF @ w1_EFD[expert]).to(dx_TD.dtype))
        for expert in set(range(len(w1_EFD))) - busy.keys():
            for gradient in (dw1_EFD, dw2_EDF):
                if gradient is not None:
                    gradient[expert].zero_()
        dx_TD = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        dgates_TK = dgate_N1[order.row_TK].squeeze(-1) if needs_gates else None
        return dx_TD, dgates_TK, dw1_EFD, db1_EF, dw2_EDF, None, None


def _sums(x_TD: Tensor, top_k: int) -> Tensor:
    """Zeros to which a token's rows are added in the order of their experts; of more than two in fp32 at least.

    An expert has a token once, so that adding its rows is the same every time, on a GPU too.
    """
    return torch.zeros_like(
        x_TD,
        dtype=x_TD.dtype if top_k <= 2 else torch.promote_types(x_TD.dtype, torch.float32),
        memory_format=torch.contiguous_format,
    )


def _empty(like: Tensor, needed: bool) -> Tensor | None:
    return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else None


class _AllExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TK: Tensor,
        w1_EFD: Tensor,
        b1_EF: Tensor,
        w2_EDF: Tensor,
        order: Order,
        trains: bool,
        fused: bool,
    ) -> Tensor:
        gate_N1, ends_E = gates_TK.reshape(-1, 1).index_select(0, order.pair_N), order.ends_E
        h_NF = _product(x_TD.index_select(0, order.token_N), w1_EFD.transpose(1, 2), ends_E)
        if fused:
            u_NF, a_NF = kernels.fused_bias_gated(h_NF, b1_EF, order.expert_N, gate_N1)
        else:
            u_NF = h_NF + b1_EF.index_select(0, order.expert_N)
            a_NF = kernels.gated(u_NF, gate_N1)
        y_ND = _product(a_NF, w2_EDF.transpose(1, 2), ends_E)
        if trains:
            ctx.save_for_backward(x_TD, gate_N1, w1_EFD, b1_EF, w2_EDF, u_NF, *order)
        ctx.fused = fused
        return kernels.fused_sum_of_slots(y_ND, order.row_TK) if fused else _sum_of_slots(y_ND, order.row_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> Gradients:
        x_TD, gate_N1, w1_EFD, b1_EF, w2_EDF, u_NF, *of_order = ctx.saved_tensors
        order, (needs_x, needs_gates, needs_w1, needs_b1, needs_w2, *_) = Order(*of_order), ctx.needs_input_grad
        ends_E, fused = order.ends_E, ctx.fused
        dy_ND = grad_TD.index_select(0, order.token_N)
        da_NF = _product(dy_ND, w2_EDF, ends_E)
        dw2_EDF = _product(dy_ND.t(), kernels.gated(u_NF, gate_N1), ends_E) if needs_w2 else None
        du_NF, dgate_N1 = (kernels.fused_gated_backward if fused else kernels.gated_backward)(da_NF, u_NF, gate_N1)
        # Of the biases: a product with one-hot rows. Adding thousands of rows into each bias one by one would need atomics.
        db1_EF = F.one_hot(order.expert_N, len(b1_EF)).to(du_NF.dtype).t() @ du_NF if needs_b1 else None
        dw1_EFD = _product(du_NF.t(), x_TD.index_select(0, order.token_N), ends_E) if needs_w1 else None
        dx_TD = None
        if needs_x:
            dx_ND = _product(du_NF, w1_EFD, ends_E)
            dx_TD = kernels.fused_sum_of_slots(dx_ND, order.row_TK) if fused else _sum_of_slots(dx_ND, order.row_TK)
        dgates_TK = dgate_N1[order.row_TK].squeeze(-1) if needs_gates else None
        return dx_TD, dgates_TK, dw1_EFD, db1_EF, dw2_EDF, None, None, None


def _product(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Of each expert's rows with its matrix, [N, A] x [E, A, B] -> [N, B], or of its columns with its rows, [A, N] x [N, B] -> [E, A, B]."""
    if torch.compiler.is_compiling() and left.dtype != torch.bfloat16:
        # Inductor takes bf16 alone.
        return torch.ops.dense2moe.grouped_mm(left, right, ends_E)
    return F.grouped_mm(left, right, offs=ends_E)


@torch.library.custom_op("dense2moe::grouped_mm", mutates_args=())
def _opaque_product(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(left, right, offs=ends_E)


@_opaque_product.register_fake
def _(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(ends_E.shape[0], left.shape[0], right.shape[1])
