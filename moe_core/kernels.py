"""What stands between the experts' matrix products: GELU with gates, its gradient, and the sum of a token's K rows.

In torch's own operations, and as Triton kernels for CUDA (`fused_*`), which read and write each row once where the former do so once an
operation. Both weigh and add in fp32 at least. The kernels also run in Triton's interpreter (`TRITON_INTERPRET=1`), on a CPU: so they are tested.

Shapes: T tokens, D width, F expert width, K top-k, N = T * K rows sorted by expert.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def gated(u_NF: Tensor, gate_N1: Tensor) -> Tensor:
    """gate * GELU(u), in the precision of u; gates in fp32 or fp64."""
    output_NF = F.gelu(u_NF, approximate="tanh")
    if torch.is_grad_enabled():
        return (output_NF * gate_N1).to(u_NF.dtype)
    return output_NF.mul_(gate_N1)  # multiplies in the wider precision as well, without memory for it


def gated_backward(da_NF: Tensor, u_NF: Tensor, gate_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of u, in its precision, and of the gates [N, 1], from that of `gated`."""
    wide_NF = da_NF.to(gate_N1.dtype)
    dgate_N1 = (wide_NF * F.gelu(u_NF, approximate="tanh")).sum(-1, keepdim=True)
    du_NF = torch.ops.aten.gelu_backward((wide_NF * gate_N1).to(u_NF.dtype), u_NF, approximate="tanh")
    return du_NF, dgate_N1


def fault(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot run on this tensor, or None if they can."""
    if not AVAILABLE:
        return "Triton is not installed; it comes with torch's CUDA builds"
    if not (tensor.is_cuda or INTERPRETED):
        return f"the tensors are on {tensor.device}; Triton's kernels need a CUDA device"
    return None


if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _gelu(u):
        """GELU (tanh) and its derivative."""
        inner = 0.7978845608028654 * (u + 0.044715 * u * u * u)
        # tanh by exp of a number that is never positive: it cannot overflow.
        small = tl.exp(-2 * tl.abs(inner))
        tanh = (1 - small) / (1 + small)
        tanh = tl.where(inner < 0, -tanh, tanh)
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * u * u)
        return 0.5 * u * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * u * (1 - tanh * tanh) * slope

    @triton.jit
    def _bias_gated(h, bias, expert, gate, u, a, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        own = tl.load(expert + row)
        value = tl.load(h + row * width + column, mask=inside).to(tl.float32)
        value += tl.load(bias + own * width + column, mask=inside).to(tl.float32)
        # Rounded before the GELU: the backward pass finds it as it was used.
        rounded = value.to(u.dtype.element_ty)
        tl.store(u + row * width + column, rounded, mask=inside)
        output, _ = _gelu(rounded.to(tl.float32))
        tl.store(a + row * width + column, (output * tl.load(gate + row)).to(a.dtype.element_ty), mask=inside)

    @triton.jit
    def _gated_backward(da, u, gate, du, dgate, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        weight, total = tl.load(gate + row), 0.0
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < width
            upper = tl.load(da + row * width + column, mask=inside, other=0.0).to(tl.float32)
            output, slope = _gelu(tl.load(u + row * width + column, mask=inside, other=0.0).to(tl.float32))
            total += tl.sum(upper * output)
            tl.store(du + row * width + column, (upper * weight * slope).to(du.dtype.element_ty), mask=inside)
        tl.store(dgate + row, total)

    @triton.jit
    def _sum_of_slots(y, rows, sums, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
        token = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros([BLOCK], tl.float32)
        for slot in range(TOP_K):
            row = tl.load(rows + token * TOP_K + slot)
            total += tl.load(y + row * width + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + token * width + column, total.to(sums.dtype.element_ty), mask=inside)


BLOCK = 1024
"""Columns of one program."""


def fused_bias_gated(h_NF: Tensor, b1_EF: Tensor, expert_N: Tensor, gate_N1: Tensor) -> tuple[Tensor, Tensor]:
    """(u, `gated(u)`) with u = h + the bias of each row's expert, rounded to the precision of h; gates in fp32."""
    rows, width = h_NF.shape
    u_NF, a_NF = torch.empty_like(h_NF), torch.empty_like(h_NF)
    grid = (rows, triton.cdiv(width, BLOCK))
    with torch.cuda.device_of(h_NF):
        _bias_gated[grid](h_NF, b1_EF.contiguous(), expert_N, gate_N1, u_NF, a_NF, width, BLOCK=BLOCK)
    return u_NF, a_NF


def fused_gated_backward(da_NF: Tensor, u_NF: Tensor, gate_N1: Tensor) -> tuple[Tensor, Tensor]:
    """As `gated_backward`."""
    rows, width = u_NF.shape
    du_NF, dgate_N1 = torch.empty_like(u_NF), torch.empty_like(gate_N1)
    with torch.cuda.device_of(u_NF):
        _gated_backward[(rows,)](da_NF.contiguous(), u_NF, gate_N1, du_NF, dgate_N1, width, BLOCK=BLOCK)
    return du_NF, dgate_N1


def fused_sum_of_slots(y_ND: Tensor, row_TK: Tensor) -> Tensor:
    """y_TD, y[t] = sum over k of y_ND[row[t, k]], added in the order of k."""
    (tokens, top_k), width = row_TK.shape, y_ND.shape[1]
    sums_TD = y_ND.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width, BLOCK))
    with torch.cuda.device_of(y_ND):  # Triton launches on the current device, whatever its tensors lie on
        _sum_of_slots[grid](y_ND.contiguous(), row_TK.contiguous(), sums_TD, width, TOP_K=top_k, BLOCK=BLOCK)
    return sums_TD
