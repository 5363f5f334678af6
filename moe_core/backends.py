"""The normal experts' arithmetic, behind one seam.

- A backend is a function (x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF) -> y_TD: the second term of eq. 2,
  y[t] = sum_k gates[t, k] * W2[e] GELU(W1[e] x[t] + b1[e]), with e = indices[t, k].
- `loop` is the plain one, in any precision (gradients are checked on it in fp64); `grouped_mm` is torch's grouped
  matrix product; `megablocks` is that of the paper's own measurements, for CUDA machines where `make gpu` has installed
  it.
- All of them sort the tokens by expert, so that each expert reads one contiguous slice and none computes a token that
  is not its own.

Shapes: T tokens, D width, E experts, F expert width, K top-k, N = T * K rows sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.errors import ConfigError

BACKENDS = ("auto", "loop", "grouped_mm", "megablocks")

GROUPED_MM_ALIGNMENT = 16
"""Bytes: `torch.nn.functional.grouped_mm` refuses row strides that are no multiple of it."""


def check_name(name: str) -> str:
    """Returns a backend's name as it is. Raises ConfigError if there is no such backend."""
    if name not in BACKENDS:
        raise ConfigError(f"expert backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    return name


def run_experts(
    backend: str, x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    """Sums each token's experts, weighted by their gates (second term of eq. 2).

    Under autocast the products run in its precision, whatever the backend. Returns y_TD in the precision computed in.
    Raises ConfigError if the named backend cannot run these tensors; `auto` always finds one that can.
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        # Neither grouped_mm nor MegaBlocks knows autocast.
        dtype = torch.get_autocast_dtype(device)
        x_TD, w1_EFD, b1_EF, w2_EDF = (t.to(dtype) for t in (x_TD, w1_EFD, b1_EF, w2_EDF))
    if not len(x_TD):
        # A block called on nothing (`MoBGroup.every_block`): not every kernel takes no rows.
        backend = "loop"
    if backend == "auto":
        # On CPU too: forward and backward of 3,072 tokens at width 64 to 512, one thread, took 0.48 to 0.82 of the
        # loop's time.
        backend = "loop" if grouped_mm_fault(x_TD, w1_EFD) else "grouped_mm"
    return _FUNCTIONS[check_name(backend)](x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF)


def grouped_mm_fault(x_TD: Tensor, w1_EFD: Tensor) -> str | None:
    """Why torch's grouped_mm cannot run these tensors, or None if it can."""
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the tensors are {x_TD.dtype}; it takes float32, bfloat16 and float16"
    step = GROUPED_MM_ALIGNMENT // x_TD.element_size()
    expert_width, width = w1_EFD.shape[1:]
    if width % step or expert_width % step:
        sizes = f"the width is {width} and the expert width {expert_width}"
        return f"{sizes}; in {x_TD.dtype} both must be multiples of {step}"
    return None


class _Order(NamedTuple):
    """The T * K (token, expert) pairs in the order of their experts."""

    pair_N: Tensor  # sorted row -> flat position in [T, K]
    row_N: Tensor  # flat position in [T, K] -> sorted row
    expert_N: Tensor  # the expert of each sorted row
    ends_E: Tensor  # where each expert's rows end


def _sort(indices_TK: Tensor, num_experts: int) -> _Order:
    flat_N = indices_TK.reshape(-1)
    # Stable, so that the order of additions, hence every bit of the result, is a function of the routing alone.
    expert_N, pair_N = flat_N.sort(stable=True)
    row_N = torch.empty_like(pair_N)
    row_N[pair_N] = torch.arange(len(pair_N), device=pair_N.device)
    # Not by bincount, which waits for the device to learn the size of its result.
    ends_E = torch.searchsorted(expert_N, torch.arange(num_experts, device=expert_N.device), right=True)
    return _Order(pair_N, row_N, expert_N, ends_E)


class _Gather(torch.autograd.Function):
    """Copies each token to its K rows in expert order.

    Its backward sums the K rows of a token through the inverse permutation; that of `index_select` would add with
    atomics, in an order that changes from run to run on CUDA.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pair_N: Tensor, row_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(row_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, pair_N // top_k)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (row_N,) = ctx.saved_tensors
        grad_ND = grad_outputs[0]
        return grad_ND.index_select(0, row_N).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


def _combine(y_ND: Tensor, order: _Order, gates_TK: Tensor) -> Tensor:
    y_TKD = y_ND.index_select(0, order.row_N).unflatten(0, tuple(gates_TK.shape))
    return (y_TKD * gates_TK.to(y_ND.dtype).unsqueeze(-1)).sum(1)


def _loop(x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor) -> Tensor:
    order = _sort(indices_TK, len(w1_EFD))
    x_ND = _Gather.apply(x_TD, order.pair_N, order.row_N, indices_TK.shape[1])
    outputs = []
    for x_nD, w1_FD, b1_F, w2_DF in zip(x_ND.tensor_split(order.ends_E[:-1].tolist()), w1_EFD, b1_EF, w2_EDF):
        outputs.append(F.linear(F.gelu(F.linear(x_nD, w1_FD, b1_F), approximate="tanh"), w2_DF))
    return _combine(torch.cat(outputs), order, gates_TK)


def _grouped_mm(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    fault = grouped_mm_fault(x_TD, w1_EFD)
    if fault:
        raise ConfigError(f"expert backend 'grouped_mm' cannot be used: {fault}")
    order = _sort(indices_TK, len(w1_EFD))
    offsets_E = order.ends_E.to(torch.int32)
    x_ND = _Gather.apply(x_TD, order.pair_N, order.row_N, indices_TK.shape[1])
    h_NF = F.grouped_mm(x_ND, w1_EFD.transpose(1, 2), offs=offsets_E) + _bias(order.expert_N, b1_EF)
    y_ND = F.grouped_mm(F.gelu(h_NF, approximate="tanh"), w2_EDF.transpose(1, 2), offs=offsets_E)
    return _combine(y_ND, order, gates_TK)


def _bias(expert_N: Tensor, b1_EF: Tensor) -> Tensor:
    # A product with one-hot rows, exact in any precision: its backward is a matrix product too, whereas that of an
    # index would add thousands of rows into each bias one by one.
    return F.one_hot(expert_N, len(b1_EF)).to(b1_EF.dtype) @ b1_EF


def _megablocks(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    if x_TD.device.type != "cuda":
        raise ConfigError(f"expert backend 'megablocks' needs a CUDA device; the tensors are on {x_TD.device}")
    try:
        # Imported here: it is an extra that only CUDA machines can have, and its import fails elsewhere.
        import grouped_gemm.ops as grouped_gemm
        from megablocks import ops
    except ImportError as error:
        raise ConfigError(
            f"expert backend 'megablocks' is not installed ({error}); run `make gpu`, or choose grouped_mm or loop"
        ) from error
    if x_TD.dtype != torch.bfloat16:
        raise ConfigError(f"expert backend 'megablocks' computes in bfloat16; the tensors are {x_TD.dtype}")

    # MegaBlocks' own dMoE layer has no expert biases, FLUX has them: hence its operations one by one.
    num_experts, top_k = len(w1_EFD), indices_TK.shape[1]
    with torch.no_grad():
        flat_N = indices_TK.reshape(-1).to(torch.int32)
        expert_N, pair_N = ops.sort(flat_N, max(math.ceil(math.log2(num_experts)), 1))
        counts_E = ops.histogram(flat_N, num_experts)
        bins_E = ops.inclusive_cumsum(counts_E, 0).view(num_experts)
        sizes_E = counts_E.cpu().to(torch.int64)  # grouped_gemm wants them on the host
    x_ND = ops.gather(x_TD.contiguous(), pair_N, expert_N, bins_E, top_k)
    h_NF = grouped_gemm.gmm(x_ND, w1_EFD, sizes_E, trans_b=True) + _bias(expert_N.long(), b1_EF)
    y_ND = grouped_gemm.gmm(F.gelu(h_NF, approximate="tanh"), w2_EDF, sizes_E, trans_b=True)
    return ops.scatter(y_ND, pair_N, expert_N, gates_TK.to(y_ND.dtype).flatten(), bins_E, top_k)


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "loop": _loop,
    "grouped_mm": _grouped_mm,
    "megablocks": _megablocks,
}
