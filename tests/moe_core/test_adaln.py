"""Conditioning compression."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import silu

from moe_core import adaln, convert
from moe_core.errors import ConfigError
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.small_models import (
    SIZES,
    WIDTH,
    conditioning_bank,
    make_inputs,
    make_moe,
    make_scores,
    make_teacher,
    predict,
)


def compressed(teacher: FluxTransformer2DModel, dim: int, ridge: float = 1e-6) -> FluxMoETransformer2DModel:
    """The teacher with its conditioning compressed, and its FFNs whole."""
    moe = make_moe(top_k=12, gate_norm="unit", conditioning_dim=dim, ridge=ridge)
    return convert.to_moe_joint(teacher, make_scores(teacher), moe, conditioning_bank(teacher))


def start(teacher: FluxTransformer2DModel, dim: int, ridge: float = 1e-6, count: int = 400) -> adaln.Start:
    bank = conditioning_bank(teacher, count)
    return adaln.start_errors(teacher, teacher.state_dict().__getitem__, bank, dim, ridge)


def test_full_rank_reproduces_the_modulations():
    found = start(make_teacher(), WIDTH)
    assert max(found.fit, found.fit_worst_layer, found.fit_held_out) < 1e-8
    assert found.random > 1


def test_full_rank_reproduces_the_model():
    teacher = make_teacher()
    student = compressed(teacher, WIDTH, ridge=1e-9)
    torch.testing.assert_close(predict(student, make_inputs()), predict(teacher, make_inputs()), rtol=1e-3, atol=1e-3)


def test_low_rank_is_far_better_than_chance_on_unseen_conditions():
    teacher = make_teacher()
    by_dim = [start(teacher, dim) for dim in (4, 8, 16, 24)]
    held_out = [found.fit_held_out for found in by_dim]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[1] < 0.8  # 1 is what a constant would get
    assert held_out[3] < 0.2
    for found in by_dim:
        assert max(found.fit, found.fit_held_out) < 0.5 * found.random
        assert found.fit < found.fit_worst_layer


def test_few_vectors_fit_well_where_they_were_seen_and_nowhere_else():
    found = start(make_teacher(), 16, count=20)
    assert found.fit < 0.1
    assert found.fit_held_out > 5 * found.fit


def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return (
        1000 * torch.rand(count, generator=g, dtype=torch.float64),
        torch.full((count,), 3500.0, dtype=torch.float64),
        torch.randn(count, SIZES["pooled_projection_dim"], generator=g, dtype=torch.float64),
    )


@torch.no_grad()
def by_forward(student: nn.Module, teacher: nn.Module, count: int) -> list[float]:
    """Relative error of every AdaLN layer's modulations, each model's conditioning coming from its own embedders."""
    y, z = teacher.time_text_embed(*inputs(count)), student.time_text_embed(*inputs(count))
    errors = []
    for name, linear in adaln.adaln_linears(teacher).items():
        target, own = linear(silu(y)), student.get_submodule(name)(silu(z))
        errors.append((own - target).square().sum().item() / (target - target.mean(0)).square().sum().item())
    return errors


def test_the_error_is_that_of_the_models_themselves():
    teacher = make_teacher().double()
    with torch.no_grad():
        bank = teacher.time_text_embed(*inputs(50))
    found = adaln.start_errors(teacher, teacher.state_dict().__getitem__, bank, 8)
    moe = make_moe(conditioning_dim=8)
    errors = by_forward(convert.to_shared(teacher, make_scores(teacher), moe, bank), teacher, 50)
    assert len(errors) == 5 * 2 + 6 + 1
    assert found.fit == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    assert found.fit_worst_layer == pytest.approx(max(errors), rel=1e-6)


def test_a_random_start_is_what_a_fresh_model_gets():
    """The embedders' hidden states are inferred from the vectors, so it is only near."""
    teacher = make_teacher().double()
    with torch.no_grad():
        bank = teacher.time_text_embed(*inputs(50))
    fresh = []
    for seed in range(5):
        torch.manual_seed(seed)
        student = FluxMoETransformer2DModel(**SIZES, conditioning_dim=8).double()
        errors = by_forward(student, teacher, 50)
        fresh.append(sum(errors) / len(errors))
    found = [adaln.start_errors(teacher, teacher.state_dict().__getitem__, bank, 8, seed=seed) for seed in range(5)]
    assert len({start.random for start in found}) == 5
    assert len({start.fit for start in found}) == 1
    assert sum(start.random for start in found) == pytest.approx(sum(fresh), rel=0.2)
    before = torch.get_rng_state()
    again = adaln.start_errors(teacher, teacher.state_dict().__getitem__, bank, 8, seed=0)
    assert again == found[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_fitted_as_well():
    teacher = make_teacher().to(torch.bfloat16)
    bank = conditioning_bank(make_teacher())
    exact = convert.to_shared(teacher.double(), make_scores(teacher), make_moe(conditioning_dim=8), bank).state_dict()
    teacher = teacher.to(torch.bfloat16)
    rounded = convert.to_shared(teacher, make_scores(teacher), make_moe(conditioning_dim=8), bank).state_dict()
    for name in rounded:
        torch.testing.assert_close(rounded[name].double(), exact[name], rtol=2**-8, atol=1e-6)


def test_fewer_vectors_than_dimensions_still_fit():
    fitted = adaln.fit(conditioning_bank(make_teacher(), count=5), WIDTH, 8)
    assert all(torch.isfinite(tensor).all() for tensor in (*fitted.projection, fitted.fit_CD, fitted.rest_D))


@pytest.mark.parametrize("count", [9, 20, 31, 32, 100])
def test_the_components_are_the_covariances_whichever_way_they_are_found(count: int):
    bank = conditioning_bank(make_teacher(), count).double()
    basis_DC = adaln.fit(bank, WIDTH, 8).projection.basis_DC
    torch.testing.assert_close(basis_DC.T @ basis_DC, torch.eye(8, dtype=torch.float64))
    largest_DC = torch.linalg.eigh(torch.cov(bank.T)).eigenvectors[:, -8:]
    torch.testing.assert_close(basis_DC @ basis_DC.T, largest_DC @ largest_DC.T)


def test_bad_vectors():
    with pytest.raises(ConfigError, match=r"shape \[10, 3\]; it must be \[N, 32\]"):
        adaln.fit(torch.zeros(10, 3), WIDTH, 8)
    with pytest.raises(ConfigError, match="not finite"):
        adaln.fit(torch.full((10, WIDTH), torch.inf), WIDTH, 8)
    with pytest.raises(ConfigError, match="conditioning_dim is 33; the teacher's conditioning has 32 channels"):
        adaln.fit(conditioning_bank(make_teacher()), WIDTH, 33)
