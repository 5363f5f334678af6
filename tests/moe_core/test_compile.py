"""Compiled models: a block is one graph, and neither timesteps, prompts nor the choice of blocks make another."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from moe_core.capture import record
from moe_core.compiling import compile_blocks
from moe_core.distill import KDStep, predict
from moe_core.mob import MoBGroup
from tests.moe_core.tiny_flux import make_batch, make_stage, make_student, make_teacher

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


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_distillation_step_of_compiled_models(checkpointing: bool):
    """Features and routings are recorded by hooks that come and go with every step."""
    found, graphs = [], []
    for compiled in (False, True):
        sizes = {"num_layers": 3, "num_single_layers": 2}
        groups = {"double_groups": [[1, 2]], "single_groups": []}
        stage = make_stage("mob", train=("all",), gradient_checkpointing=checkpointing)
        step = KDStep(make_student("mob", mob=groups, **sizes), make_teacher(**sizes), stage)
        step.student.set_expert_backend("by_shape")
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            for model in (step.student, step.teacher):
                compile_blocks(model, backend="aot_eager")
        for seed in range(3):
            losses = step(make_batch(1, seed))
            losses["loss"].backward()
            graphs.append(counters["stats"]["unique_graphs"])
        found.append((losses, {name: p.grad for name, p in step.named_parameters() if p.grad is not None}))
    (plain, wanted), (losses, gradients) = found
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        {name: value.item() for name, value in plain.items()}, rel=1e-5
    )
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    assert len(set(graphs[3:])) == 1, f"graphs after each step: {graphs[3:]}"


@torch.no_grad()
def test_what_is_recorded_after_compiling_is_seen():
    model = make_student("moe", num_layers=2, num_single_layers=1).eval()
    model.set_expert_backend("grouped_mm")
    with record(model) as wanted:
        expected = predict(model, make_batch(1))
    compile_blocks(model, backend="aot_eager")
    torch.testing.assert_close(predict(model, make_batch(1)), expected)
    with record(model) as found:
        torch.testing.assert_close(predict(model, make_batch(1)), expected)
    assert found.routings.keys() == wanted.routings.keys()
    assert wanted.routings
    assert found.features.keys() == wanted.features.keys()


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="a Linear has no FLUX block"):
        compile_blocks(nn.Linear(2, 2))
