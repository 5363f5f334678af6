"""The normal experts' arithmetic, behind one seam.

- A backend is a function (x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF) -> y_TD: the second term of eq. 2,
  y[t] = sum_k gates[t, k] * W2[e] GELU(W1[e] x[t] + b1[e]), with e = indices[t, k].
- `loop` is the plain one, in any precision, with autograd's own backward pass: what the others are tested against.
- `by_expert`, `grouped_mm` and `triton` are `moe_core.grouped`: the same sums with a backward pass of their own.
- `megablocks` is that of the paper's own measurements, for CUDA machines where `make gpu` has installed it.
- All of them sort the tokens by expert, so that each expert reads one contiguous slice and none computes a token that
  is not its own. A token's K results are added in a fixed order, so that the bits are a function of the routing; of the gradients
  of `loop` on CUDA they are not, as autograd adds with atomics there.
- `auto` is the fastest here, measured once for a size (`moe_core.backend_choice`); `by_shape` is `grouped_mm` where that can run the shapes, else
  `by_expert`: the same on every machine.

Shapes: T tokens, D width, E experts, F expert width, K top-k, N = T * K rows sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import backend_choice, grouped, kernels
from moe_core.errors import ConfigError

BACKENDS = ("auto", "by_shape", "loop", "by_expert", "grouped_mm", "triton", "megablocks")

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
    Raises ConfigError if the named backend cannot run these tensors; `auto` and `by_shape` always find one that can.
    """
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        # Neither grouped_mm nor MegaBlocks knows autocast.
        dtype = torch.get_autocast_dtype(device)
        x_TD, w1_EFD, b1_EF, w2_EDF = (t.to(dtype) for t in (x_TD, w1_EFD, b1_EF, w2_EDF))
    tensors = (x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF)
    if not len(x_TD):
        # A block called on nothing (`MoBGroup.every_block`): not every kernel takes no rows.
        backend = "loop"
    if backend == "auto":
        backend = choose(*tensors)
    elif backend == "by_shape":
        backend = "by_expert" if grouped_mm_fault(x_TD, w1_EFD) else "grouped_mm"
    return _FUNCTIONS[check_name(backend)](*tensors)


def choose(x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor) -> str:
    """The backend that `auto` stands for with these tensors: the fastest of `candidates`, measured once for their size."""
    names = candidates(x_TD, w1_EFD)
    compiling = torch.compiler.is_compiling() or (x_TD.is_cuda and torch.cuda.is_current_stream_capturing())
    if len(names) == 1 or compiling:
        # When compiling nothing can be measured, and Inductor fuses what surrounds the products by itself.
        return names[0]
    tensors = (x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF)
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    case = backend_choice.case_of(x_TD, w1_EFD, indices_TK.shape[1], trained)
    return backend_choice.fastest(case, {name: partial(_once, _FUNCTIONS[name], tensors, trained) for name in names})


def candidates(x_TD: Tensor, w1_EFD: Tensor) -> list[str]:
    """The backends between which `auto` chooses for tensors like these."""
    if grouped_mm_fault(x_TD, w1_EFD):
        return ["by_expert"]
    if not x_TD.is_cuda:
        return ["grouped_mm", "by_expert"]
    names = ["grouped_mm"]
    if kernels.AVAILABLE:
        names.append("triton")
    if not _megablocks_fault(x_TD):
        names.append("megablocks")
    return names


def _once(backend: Callable[..., Tensor], tensors: tuple[Tensor, ...], trained: bool) -> None:
    """One pass of a layer with these values, backward too if they train; leaves no gradient."""
    inputs = [tensor.detach().requires_grad_(trained and tensor.requires_grad) for tensor in tensors]
    # Inside a checkpointed block what is saved here must not be taken for the block's own.
    with torch.set_grad_enabled(trained), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        output = backend(*inputs)
        if trained:
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            torch.autograd.grad(output, wanted, torch.ones_like(output))
    if output.is_cuda:
        torch.cuda.synchronize(output.device)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


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


def _loop(x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor) -> Tensor:
    order = grouped.sort(indices_TK, len(w1_EFD))
    outputs = []
    for x_nD, w1_FD, b1_F, w2_DF in zip(
        x_TD.index_select(0, order.token_N).split(order.counts()), w1_EFD, b1_EF, w2_EDF
    ):
        outputs.append(F.linear(F.gelu(F.linear(x_nD, w1_FD, b1_F), approximate="tanh"), w2_DF))
    y_TKD = torch.cat(outputs).index_select(0, order.row_TK.flatten()).unflatten(0, tuple(gates_TK.shape))
    return (y_TKD * gates_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)


def _grouped_mm(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor, fused: bool
) -> Tensor:
    name = "triton" if fused else "grouped_mm"
    fault = grouped_mm_fault(x_TD, w1_EFD)
    if fused and not fault:
        fault = kernels.fault(x_TD)
    if fault:
        raise ConfigError(f"expert backend '{name}' cannot be used: {fault}")
    return grouped.all_experts(x_TD, gates_TK, indices_TK, w1_EFD, b1_EF, w2_EDF, fused)


@cache
def _megablocks_ops() -> tuple[Any, Any] | None:
    try:
        # Imported here: it is an extra that only CUDA machines can have, and its import fails elsewhere.
        import grouped_gemm.ops as grouped_gemm
        from megablocks import ops
    except ImportError:
        return None
    return ops, grouped_gemm


def _megablocks_fault(x_TD: Tensor) -> str | None:
    if x_TD.device.type != "cuda":
        return f"it needs a CUDA device; the tensors are on {x_TD.device}"
    if x_TD.dtype != torch.bfloat16:
        return f"it computes in bfloat16; the tensors are {x_TD.dtype}"
    if _megablocks_ops() is None:
        return "it is not installed; run `make gpu`, or choose grouped_mm or loop"
    return None


def _megablocks(
    x_TD: Tensor, gates_TK: Tensor, indices_TK: Tensor, w1_EFD: Tensor, b1_EF: Tensor, w2_EDF: Tensor
) -> Tensor:
    found = _megablocks_ops()
    if (fault := _megablocks_fault(x_TD)) or found is None:
        raise ConfigError(f"expert backend 'megablocks' cannot be used: {fault}")

    # MegaBlocks' own dMoE layer has no expert biases, FLUX has them: hence its operations one by one.
    ops, grouped_gemm = found
    num_experts, top_k = len(w1_EFD), indices_TK.shape[1]
    with torch.no_grad():
        flat_N = indices_TK.reshape(-1).to(torch.int32)
        expert_N, pair_N = ops.sort(flat_N, max(math.ceil(math.log2(num_experts)), 1))
        counts_E = ops.histogram(flat_N, num_experts)
        bins_E = ops.inclusive_cumsum(counts_E, 0).view(num_experts)
        sizes_E = counts_E.cpu().to(torch.int64)  # grouped_gemm wants them on the host
    x_ND = ops.gather(x_TD.contiguous(), pair_N, expert_N, bins_E, top_k)
    # A product with one-hot rows, exact in any precision: its backward is a matrix product too, whereas that of an
    # index would add thousands of rows into each bias one by one.
    bias_NF = F.one_hot(expert_N.long(), num_experts).to(b1_EF.dtype) @ b1_EF
    h_NF = grouped_gemm.gmm(x_ND, w1_EFD, sizes_E, trans_b=True) + bias_NF
    a_NF = kernels.gated(h_NF, gates_TK.reshape(-1, 1).index_select(0, pair_N.long()))
    y_ND = grouped_gemm.gmm(a_NF, w2_EDF, sizes_E, trans_b=True)
    return ops.scatter(y_ND, pair_N, expert_N, None, bins_E, top_k)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "loop": _loop,
    "by_expert": grouped.by_expert,
    "grouped_mm": partial(_grouped_mm, fused=False),
    "triton": partial(_grouped_mm, fused=True),
    "megablocks": _megablocks,
}
