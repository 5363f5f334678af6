"""The Triton kernels in Triton's interpreter, on a CPU: against the same in torch's own operations. `make extras` has Triton."""

import pytest
import torch

from moe_core import grouped, kernels

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_backend(dtype: torch.dtype):
    torch.manual_seed(0)
    x_TD, gates_TK = torch.randn(30, 16).to(dtype), torch.rand(30, 2)
    indices_TK = torch.rand(30, 6)[:, :5].topk(2).indices  # the sixth expert has no token
    weights = [(torch.randn(*shape) / 4).to(dtype) for shape in ((6, 8, 16), (6, 8), (6, 16, 8))]
    found = []
    for computed in (torch.float64, dtype):
        inputs = [tensor.to(computed) for tensor in (x_TD, *weights)]
        inputs.insert(1, gates_TK.to(torch.promote_types(computed, torch.float32)))
        inputs = [tensor.requires_grad_() for tensor in inputs]
        if computed == torch.float64:
            output = grouped.by_expert(inputs[0], inputs[1], indices_TK, *inputs[2:])
        else:
            output = grouped.all_experts(inputs[0], inputs[1], indices_TK, *inputs[2:], fused=True)
        output.sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in inputs)])
    for exact, own in zip(*found):
        error = (own.double() - exact.double()).norm() / exact.double().norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 1e-2)
