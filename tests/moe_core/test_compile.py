"""Compiled models: a block is one graph, and neither timesteps, prompts nor the choice of blocks make another."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from moe_core.distill import predict
from moe_core.mob import MoBGroup
from tests.moe_core.tiny_flux import make_batch, make_student

# Dynamo makes an instance of the experts' autograd function and looks for gradients where there are none; torch itself warns of both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

CALLS = range(6)


@torch.no_grad()
def test_blocks_are_whole_graphs_and_compile_once():
    model = make_student("mob", num_single_layers=5, mob={"double_groups": [[1, 2, 3]], "single_groups": [[0, 1, 2]]})
    model.eval().set_expert_backend("grouped_mm")
    chosen: set[tuple[int, ...]] = set()
    for group in model.modules():
        if isinstance(group, MoBGroup):
            nn.init.normal_(group.router.w_y.weight)
            group.router.register_forward_hook(
                lambda _m, _given, routing: chosen.update(map(tuple, routing.indices_Bk.tolist()))
            )
    expected = [predict(model, make_batch(1, seed)) for seed in CALLS]
    assert len(chosen) > 1
    model.set_expert_backend("auto")
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for seed in CALLS:
        torch.testing.assert_close(predict(model, make_batch(1, seed)), expected[seed])
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, f"graphs after each call: {graphs}"
    # Of dense double, sparse double and sparse single blocks, and of the first single one, whose input has other strides.
    assert graphs[0] == 4


def test_compiled_step_has_the_same_gradients():
    found = []
    for compiled in (False, True):
        model = make_student("moe")
        model.set_expert_backend("auto" if compiled else "grouped_mm")
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        predict(model, make_batch(2)).square().mean().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
