"""The Triton kernels, ours and MegaBlocks', in Triton's interpreter on a CPU: against the same in torch's own operations. `make extras` has both."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_core import backends, grouped, kernels

pytestmark = pytest.mark.skipif(
    not (kernels.AVAILABLE and kernels.INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1 (`make extras`)"
)


def drawn(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    h_NF, b1_EF = 2 * torch.randn(rows, width).to(dtype), torch.randn(5, width).to(dtype)
    return h_NF, b1_EF, torch.randint(0, 5, (rows,)).sort().values, torch.rand(rows, 1)


# One column less than a block, a block, one more; and a row alone.
SIZES = [(7, 24), (3, 1023), (3, 1024), (2, 1025), (1, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_bias_gelu_gate(rows: int, width: int, dtype: torch.dtype):
    h_NF, b1_EF, expert_N, gate_N1 = drawn(rows, width, dtype)
    u_NF, a_NF = kernels.fused_bias_gated(h_NF, b1_EF, expert_N, gate_N1)
    wide_NF = h_NF.double() + b1_EF.double()[expert_N]
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(u_NF.double(), wide_NF, rtol=rounding, atol=rounding)
    torch.testing.assert_close(
        a_NF.double(), kernels.gated(u_NF.double(), gate_N1.double()), rtol=rounding, atol=rounding
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_its_gradient(rows: int, width: int, dtype: torch.dtype):
    u_NF, _, _, gate_N1 = drawn(rows, width, dtype)
    da_NF = torch.randn(rows, width).to(dtype)
    du_NF, dgate_N1 = kernels.fused_gated_backward(da_NF, u_NF, gate_N1)
    wide_NF = u_NF.double().requires_grad_()
    gate = gate_N1.double().requires_grad_()
    kernels.gated(wide_NF, gate).backward(da_NF.double())
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(du_NF.double(), wide_NF.grad, rtol=rounding, atol=rounding)
    torch.testing.assert_close(dgate_N1.double(), gate.grad, rtol=1e-4, atol=1e-3)


def test_gelu_far_from_zero():
    u_NF = torch.tensor([[-1e4, -40.0, -9.0, 0.0, 9.0, 40.0, 1e4]])
    _, a_NF = kernels.fused_bias_gated(u_NF, torch.zeros(1, 7), torch.zeros(1, dtype=torch.int64), torch.ones(1, 1))
    torch.testing.assert_close(a_NF, kernels.gated(u_NF, torch.ones(1, 1)))


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("width", [8, 1025])
def test_sum_of_slots(width: int, top_k: int):
    torch.manual_seed(0)
    y_ND, row_TK = torch.randn(6 * top_k, width), torch.randperm(6 * top_k).view(6, top_k)
    assert torch.equal(kernels.fused_sum_of_slots(y_ND, row_TK), grouped._sum_of_slots(y_ND, row_TK))


def gradients(run, x_TD, gates_TK, indices_TK, weights, dtype) -> list[torch.Tensor]:
    """The output and all gradients of a backend."""
    inputs = [tensor.to(dtype) for tensor in (x_TD, *weights)]
    inputs.insert(1, gates_TK.to(torch.promote_types(dtype, torch.float32)))
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = run(inputs[0], inputs[1], indices_TK, *inputs[2:])
    output.sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


CASES = ["even", "one token", "non-contiguous", "all to one expert"]


def compare(run, dtype: torch.dtype, top_k: int = 2, case: str = "even") -> None:
    """A backend against fp64, with rounded values and an expert without tokens."""
    torch.manual_seed(0)
    tokens, top_k = 1 if case == "one token" else 30, 1 if case == "all to one expert" else top_k
    x_TD, gates_TK = torch.randn(tokens, 16).to(dtype), torch.rand(tokens, top_k)
    indices_TK = torch.rand(tokens, 5).topk(top_k).indices
    if case == "non-contiguous":
        x_TD = torch.randn(16, tokens).to(dtype).t()
    elif case == "all to one expert":
        indices_TK = torch.full_like(indices_TK, 3)
    weights = [(torch.randn(*shape) / 4).to(dtype) for shape in ((6, 8, 16), (6, 8), (6, 16, 8))]
    exact = gradients(grouped.by_expert, x_TD, gates_TK, indices_TK, weights, torch.float64)
    for wanted, own in zip(exact, gradients(run, x_TD, gates_TK, indices_TK, weights, dtype)):
        error = (own.double() - wanted).norm() / wanted.norm()
        # Of one token there are few roundings to cancel out.
        assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2 if tokens == 1 else 1e-2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_backend(dtype: torch.dtype, case: str):
    compare(lambda *tensors: grouped.all_experts(*tensors, fused=True), dtype, case=case)


def megablocks_kernels() -> ModuleType:
    """MegaBlocks' Triton kernels. Its package cannot be imported here: the rest of it is compiled for CUDA."""
    try:
        file = distribution("megablocks").locate_file("megablocks/backend/kernels.py")
    except PackageNotFoundError:
        pytest.skip("needs MegaBlocks (`make extras`)")
    spec = importlib.util.spec_from_file_location("megablocks_kernels", str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for kernel in (module._padded_copy, module._padded_copy_wgrad):
        # Which of them is the fastest cannot be timed here.
        kernel.configs = kernel.configs[:1]
    return module


class Moved(torch.autograd.Function):
    """MegaBlocks' gather or scatter without weights, whose backward pass is its other kernel, as in its own functions."""

    @staticmethod
    def forward(ctx, there, back, x, pair, expert, bins, top_k):
        ctx.kept = back, pair, expert, bins, top_k
        return there(x, pair, expert, None, bins, top_k)

    @staticmethod
    def backward(ctx, grad):
        back, pair, expert, bins, top_k = ctx.kept
        return None, None, back(grad.contiguous(), pair, expert, None, bins, top_k), None, None, None, None


@pytest.mark.parametrize(("top_k", "case"), [(1, "even"), (2, "even"), (4, "even"), *((2, case) for case in CASES[1:])])
def test_megablocks(top_k: int, case: str, monkeypatch: pytest.MonkeyPatch):
    # Of MegaBlocks these are its Triton kernels; what it has compiled for CUDA (sort, histogram, cumsum, grouped_gemm) is torch's here.
    triton_kernels = megablocks_kernels()

    def sort(flat_N, bits):
        expert_N, pair_N = flat_N.sort(stable=True)
        assert int(flat_N.max()) < 1 << bits
        return expert_N, pair_N.to(torch.int32)

    def gmm(rows, weights, sizes, trans_b):
        assert trans_b
        parts = [part @ weight.T for part, weight in zip(rows.split(sizes.tolist()), weights)]
        return torch.cat(parts)

    ops = SimpleNamespace(
        sort=sort,
        histogram=lambda flat_N, count: flat_N.bincount(minlength=count).to(torch.int32),
        inclusive_cumsum=lambda counts_E, dim: counts_E.cumsum(dim).to(torch.int32),
        gather=lambda x, *where: Moved.apply(triton_kernels.gather, triton_kernels.scatter, x, *where),
        scatter=lambda x, pair, expert, weights, bins, top_k: Moved.apply(
            triton_kernels.scatter, triton_kernels.gather, x, pair, expert, bins, top_k
        ),
    )
    monkeypatch.setattr(backends, "_megablocks_ops", lambda: (ops, SimpleNamespace(gmm=gmm)))
    monkeypatch.setattr(backends, "_megablocks_fault", lambda x_TD: None)
    compare(backends._FUNCTIONS["megablocks"], torch.bfloat16, top_k, case)
