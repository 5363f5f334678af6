"""The MoE layer against eq. 2-3 written out token by token, and the backends against each other."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_core import backends
from moe_core.errors import ConfigError
from moe_core.moe import MoELayer


def make_layer(
    top_k: int = 2, gate_norm: str = "renormalize", backend: str = "loop", dtype=torch.float64, seed: int = 0
) -> MoELayer:
    torch.manual_seed(seed)
    # A wide router, so that choices are clear-cut.
    layer = MoELayer(16, 16, 8, 6, top_k, gate_norm=gate_norm, router_init_std=0.5).to(dtype)
    layer.backend = backend
    return layer


def mlp(x_D: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    hidden = w1 @ x_D + b1
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return w2 @ gelu


def slow_reference(layer: MoELayer, x_BTD: Tensor) -> Tensor:
    """Eq. 2 and 3, a token at a time."""
    shared, y_BTD = layer.shared, torch.empty_like(x_BTD)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x_BTD.shape[:2])).tolist():
        x_D = x_BTD[tuple(place)]
        alpha = torch.exp(layer.router.weight @ x_D)
        alpha = alpha / alpha.sum()
        chosen = sorted(range(layer.num_experts), key=lambda i: -float(alpha[i].detach()))[: layer.top_k]
        total = mlp(x_D, shared.proj_in.weight, shared.proj_in.bias, shared.proj_out.weight) + shared.proj_out.bias
        for i in chosen:
            gate = alpha[i] / sum(alpha[j] for j in chosen)
            gate = {"renormalize": gate, "scale_to_k": gate * layer.top_k, "unit": 1.0}[layer.router.gate_norm]
            total = total + gate * mlp(x_D, layer.w1_EFD[i], layer.b1_EF[i], layer.w2_EDF[i])
        y_BTD[tuple(place)] = total
    return y_BTD


@pytest.mark.parametrize("gate_norm", ["renormalize", "scale_to_k", "unit"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@torch.no_grad()
def test_layer_is_equations_2_and_3(top_k: int, gate_norm: str):
    layer = make_layer(top_k, gate_norm)
    x_BTD = torch.randn(2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x_BTD), slow_reference(layer, x_BTD), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["loop", "by_expert", "grouped_mm"])
@pytest.mark.parametrize("case", ["one token", "non-contiguous", "all to one expert"])
def test_layer_on_unusual_input(case: str, backend: str):
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    layer, exact = make_layer(backend=backend, dtype=dtype), make_layer()
    x_BTD = torch.randn(2, 7, 16, dtype=dtype)
    if case == "one token":
        x_BTD = x_BTD[:1, :1]
    elif case == "non-contiguous":
        x_BTD = torch.randn(16, 7, 4, dtype=dtype).permute(2, 1, 0)[::2]
        assert not x_BTD.is_contiguous()
    else:
        layer.set_top_k(1)
        exact.set_top_k(1)
        x_BTD = x_BTD.abs()
        with torch.no_grad():
            layer.router.weight.zero_()[3] = 1.0
        assert (layer.router(x_BTD).indices_TK == 3).all()
    exact.load_state_dict(layer.state_dict())
    expected = gradients(exact, x_BTD.double(), lambda x: slow_reference(exact, x))
    for name, value in gradients(layer, x_BTD).items():
        if not (case == "all to one expert" and name == "router.weight"):  # its gate is 1, whatever the router says
            assert relative(value, expected[name]) < (1e-5 if dtype == torch.float32 else 1e-12), name


@pytest.mark.parametrize("backend", ["loop", "by_expert"])
@pytest.mark.parametrize("gate_norm", ["renormalize", "scale_to_k"])
def test_gradients_in_fp64(gate_norm: str, backend: str):
    layer = make_layer(gate_norm=gate_norm, backend=backend)
    x_BTD = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    inputs = (x_BTD, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_unit_gate_is_one_and_still_moves_the_router():
    layer = make_layer(gate_norm="unit")
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    assert (layer.router(x_BTD).gates_TK == 1).all()
    layer(x_BTD).square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


def gradients(layer: MoELayer, x_BTD: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    x_BTD = x_BTD.detach().requires_grad_()
    layer.zero_grad()
    output = (layer if run is None else run)(x_BTD)
    output.sum().backward()  # an expanded gradient, which grouped_mm by itself refuses
    weights = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    return {"output": output.detach(), "input": x_BTD.grad, **weights}


FAST = ["by_expert", "grouped_mm"]


def relative(actual: Tensor, expected: Tensor) -> float:
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(error / size if size else error)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("backend", [*FAST, "auto"])
def test_backends_equal_loop(backend: str, tokens: int, top_k: int):
    layer = make_layer(top_k, dtype=torch.float32)
    layer.router.weight.data[4:] = -5.0  # never chosen, as the input is positive
    x_BTD = torch.randn(1, tokens, 16).abs()
    expected = gradients(layer, x_BTD)
    layer.backend = backend
    assert (layer.router(x_BTD).indices_TK.flatten().bincount(minlength=6) == 0).any()
    for name, value in gradients(layer, x_BTD).items():
        # Of one expert the gate is 1, and its gradient the rounding of both.
        if not (top_k == 1 and name == "router.weight"):
            assert relative(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_bf16_against_fp64(backend: str):
    exact, layer = make_layer(), make_layer(dtype=torch.bfloat16, backend=backend)
    exact.load_state_dict(layer.state_dict())  # the rounded weights
    x_BTD = torch.randn(2, 64, 16, dtype=torch.bfloat16)
    expected = gradients(exact, x_BTD.double())
    for name, value in gradients(layer, x_BTD).items():
        assert relative(value, expected[name]) < 1e-2, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("trained", ["w1_EFD", "b1_EF", "w2_EDF", "router.weight", "input"])
def test_backend_where_one_part_trains(backend: str, trained: str):
    layer = make_layer(dtype=torch.float32).requires_grad_(False)
    x_BTD = torch.randn(1, 40, 16)
    part = x_BTD if trained == "input" else layer.get_parameter(trained)
    found = {}
    for layer.backend in ("loop", backend):
        part.requires_grad_().grad = None
        layer(x_BTD).square().sum().backward()
        found[layer.backend] = part.grad
        assert {name for name, p in layer.named_parameters() if p.grad is not None} <= {trained}
    assert relative(found[backend], found["loop"]) < 1e-5


@pytest.mark.parametrize("backend", FAST)
def test_backend_gives_the_same_bits_again(backend: str):
    layer = make_layer(top_k=4, dtype=torch.float32, backend=backend)
    x_BTD = torch.randn(2, 500, 16)
    first, second = gradients(layer, x_BTD), gradients(layer, x_BTD)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(layer(x_BTD), first["output"])


# Dynamo makes an instance of the function, which torch itself warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_compiles_as_one_graph(dtype: torch.dtype):
    layer = make_layer(dtype=dtype, backend="auto")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_BTD = torch.randn(1, 40, 16, dtype=dtype)
    layer.backend = "grouped_mm"
    expected = gradients(layer, x_BTD)
    layer.backend = "auto"
    x_BTD.requires_grad_()
    layer.zero_grad()
    compiled(x_BTD).sum().backward()
    for name, parameter in layer.named_parameters():
        assert relative(parameter.grad, expected[name]) < (1e-5 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("backend", ["loop", *FAST])
def test_autocast_reaches_the_experts(backend: str):
    layer = make_layer(dtype=torch.float32, backend=backend)
    x_BTD = torch.randn(2, 40, 16)
    exact = gradients(layer, x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, x_BTD)
        assert layer.router(x_BTD).probs_TE.dtype == torch.float32
    assert found["output"].dtype == torch.bfloat16
    for name, value in found.items():
        assert relative(value, exact[name]) < 2e-2, name


@pytest.mark.parametrize("backend", FAST)
def test_fp16(backend: str):
    layer, exact = make_layer(dtype=torch.float16, backend=backend), make_layer()
    exact.load_state_dict(layer.state_dict())
    x_BTD = torch.randn(2, 40, 16, dtype=torch.float16)
    expected = gradients(exact, x_BTD.double())
    for name, value in gradients(layer, x_BTD).items():
        assert relative(value, expected[name]) < 2e-3, name


def test_bf16_layer_routes_in_fp32():
    routing = make_layer(dtype=torch.bfloat16).router(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    assert routing.probs_TE.dtype == routing.gates_TK.dtype == torch.float32
    assert routing.probs_TE.shape == (1, 3, 6)


def test_top_k_0_is_the_shared_expert_and_runs_no_router():
    layer = make_layer()
    layer.set_top_k(0)
    layer.router.register_forward_hook(lambda *_: pytest.fail("the router ran"))
    x_BTD = torch.randn(1, 3, 16, dtype=torch.float64)
    assert torch.equal(layer(x_BTD), layer.shared(x_BTD))


def test_no_experts_means_no_router():
    layer = MoELayer(16, 16, 8, num_experts=0, top_k=0)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"shared"}
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)


@pytest.mark.parametrize("top_k", [7, -1])
def test_top_k_beyond_the_experts(top_k: int):
    with pytest.raises(ConfigError, match=f"top_k is {top_k}, but there are 6 experts"):
        make_layer(top_k)


def test_unknown_names():
    with pytest.raises(ConfigError, match="gate_norm is 'odd'"):
        make_layer(gate_norm="odd")
    with pytest.raises(ConfigError, match="backend is 'odd'"):
        backends.check_name("odd")


def test_backend_that_cannot_run_says_why():
    x_BTD = torch.randn(1, 3, 16, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"grouped_mm.*float64"):
        make_layer(backend="grouped_mm")(x_BTD)
    with pytest.raises(ConfigError, match=r"megablocks.*CUDA"):
        make_layer(backend="megablocks")(x_BTD)
    with pytest.raises(ConfigError, match=r"triton' cannot be used.*Triton"):
        make_layer(backend="triton", dtype=torch.float32)(x_BTD.float())
    odd = MoELayer(6, 6, 3, 6, 2)
    odd.backend = "grouped_mm"
    with pytest.raises(ConfigError, match="width is 6 and the expert width 3"):
        odd(torch.randn(1, 3, 6))
    odd.backend = "auto"
    assert odd(torch.randn(1, 3, 6)).shape == (1, 3, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["grouped_mm", "triton", "megablocks"])
def test_backends_on_cuda_against_fp64(backend: str):
    if backend == "megablocks":
        pytest.importorskip("megablocks")
    layer, exact = make_layer(dtype=torch.bfloat16, backend=backend).cuda(), make_layer().cuda()
    exact.load_state_dict(layer.state_dict())
    x_BTD = torch.randn(2, 64, 16, dtype=torch.bfloat16, device="cuda")
    expected = gradients(exact, x_BTD.double())
    for name, value in gradients(layer, x_BTD).items():
        assert relative(value, expected[name]) < 1e-2, name


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a CUDA device of compute capability 9, where torch's grouped product does not wait",
)
@pytest.mark.parametrize("backend", ["grouped_mm", "triton"])
def test_grouped_paths_do_not_wait_for_the_device(backend: str):
    layer = make_layer(dtype=torch.bfloat16, backend=backend).cuda()
    x_BTD = torch.randn(2, 64, 16, dtype=torch.bfloat16, device="cuda")
    gradients(layer, x_BTD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(layer, x_BTD)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch warns of itself on the way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_compiled_by_inductor(dtype: torch.dtype):
    layer = make_layer(dtype=dtype, backend="grouped_mm")
    x_BTD = torch.randn(1, 40, 16, dtype=dtype)
    expected = gradients(layer, x_BTD)
    layer.backend = "auto"
    for name, value in gradients(layer, x_BTD, torch.compile(layer, fullgraph=True)).items():
        assert relative(value, expected[name]) < (1e-5 if dtype == torch.float32 else 2e-2), name
