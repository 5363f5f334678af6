"""Muon against a slow reference, on what it is for, and on what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_core.moe import MoELayer
from moe_core.muon import MOMENTUM, Muon, orthogonalize, split_parameters
from tests.moe_core.tiny_pipeline import tiny_pipeline


def test_singular_values_come_near_1_and_directions_stay():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 12, 40, generator=generator)
    for shaped in (matrices, matrices.mT):
        made = orthogonalize(shaped)
        assert made.shape == shaped.shape
        values = torch.linalg.svdvals(made)
        assert float(values.min()) > 0.6
        assert float(values.max()) < 1.3
        left, _, right = torch.linalg.svd(shaped, full_matrices=False)
        assert torch.nn.functional.cosine_similarity((left @ right).flatten(1), made.flatten(1)).min() > 0.97


def test_a_step_equals_the_formulas_one_matrix_at_a_time():
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(6, 10, generator=generator)) for _ in range(2)]
    rest = [nn.Parameter(torch.randn(7, generator=generator))]
    grads = [[torch.randn(weight.shape, generator=generator) for weight in [*weights, *rest]] for _ in range(3)]
    expected = [weight.detach().clone() for weight in weights]
    momentum = [torch.zeros(6, 10) for _ in weights]
    other = nn.Parameter(rest[0].detach().clone())
    adam = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    optimizer = Muon(weights, rest, 0.01, (0.9, 0.99), 0.1)
    for step in grads:
        for weight, grad in zip([*weights, *rest], step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
        other.grad = step[-1].clone()
        adam.step()
        for number, grad in enumerate(step[:2]):
            momentum[number] = MOMENTUM * momentum[number] + (1 - MOMENTUM) * grad
            update = orthogonalize((MOMENTUM * momentum[number] + (1 - MOMENTUM) * grad)[None])[0]
            expected[number] = expected[number] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 10**0.5 * update
    for weight, value in zip(weights, expected, strict=True):
        assert torch.allclose(weight, value, atol=1e-5)
    assert torch.allclose(rest[0], other, atol=1e-6)


def test_embeddings_and_end_layers_are_adamws():
    transformer = tiny_pipeline().transformer
    matrices, rest = split_parameters(transformer)
    names = {id(weight): name for name, weight in transformer.named_parameters()}
    chosen = {names[id(weight)] for weight in matrices}
    assert "transformer_blocks.0.attn.to_q.weight" in chosen
    assert "single_transformer_blocks.0.proj_out.weight" in chosen
    assert not chosen & {"proj_out.weight", "x_embedder.weight", "context_embedder.weight"}
    assert len(matrices) + len(rest) == len(names)
    text, _ = split_parameters(tiny_pipeline().text_encoder_2)
    assert all(weight.shape != tiny_pipeline().text_encoder_2.shared.weight.shape for weight in text)


def test_a_restored_optimizer_goes_on_as_if_never_stopped():
    def run(pause: bool) -> torch.Tensor:
        weight, bias = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(4))
        optimizer = Muon([weight], [bias], 0.1, (0.9, 0.99))
        for step in range(6):
            if pause and step == 3:
                state = optimizer.state_dict()
                optimizer = Muon([weight], [bias], 0.1, (0.9, 0.99))
                optimizer.load_state_dict(state)
            generator = torch.Generator().manual_seed(step)
            weight.grad = torch.randn(4, 4, generator=generator)
            bias.grad = torch.randn(4, generator=generator)
            optimizer.step()
        return torch.cat([weight.detach().flatten(), bias.detach()])

    assert torch.equal(run(pause=True), run(pause=False))


def test_a_stack_of_experts_is_as_many_matrices():
    layer = MoELayer(16, 16, 4, 12, 2, out_bias=True)
    matrices, rest = split_parameters(layer)
    assert {id(layer.w1_EFD), id(layer.w2_EDF)} <= {id(weight) for weight in matrices}
    assert {id(layer.b1_EF), id(layer.router.weight)} <= {id(weight) for weight in rest}
    start = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    stack, single = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    together, apart = Muon([stack], [], 0.1, (0.9, 0.99)), Muon(single, [], 0.1, (0.9, 0.99))
    for step in range(3):
        stack.grad = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(step))
        for weight, grad in zip(single, stack.grad, strict=True):
            weight.grad = grad.clone()
        together.step()
        apart.step()
    assert torch.allclose(stack, torch.stack(list(single)), atol=1e-6)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match=r"shape \[3\]; it must be a matrix"):
        Muon([nn.Parameter(torch.ones(3))], [], 0.1, (0.9, 0.99))
