"""Conditioning compression."""

import pytest
import torch

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


def compressed(teacher, dim: int, ridge: float = 1e-6) -> FluxMoETransformer2DModel:
    torch.manual_seed(1)
    student = FluxMoETransformer2DModel(**SIZES, conditioning_dim=dim).to(teacher.dtype)
    adaln.compress(student, teacher, conditioning_bank(teacher), ridge)
    return student


def test_full_rank_reproduces_the_modulations():
    teacher = make_teacher()
    errors = adaln.modulation_error(compressed(teacher, WIDTH), teacher, conditioning_bank(teacher, seed=7))
    assert len(errors) == 5 * 2 + 6 + 1
    assert max(errors.values()) < 1e-8


def test_full_rank_reproduces_the_model():
    teacher = make_teacher()
    moe = make_moe(top_k=12, gate_norm="unit", conditioning_dim=WIDTH, ridge=1e-9)
    student = convert.to_moe_joint(teacher, make_scores(teacher), moe, conditioning_bank(teacher))
    torch.testing.assert_close(predict(student, make_inputs()), predict(teacher, make_inputs()), rtol=1e-3, atol=1e-3)


def test_low_rank_is_far_better_than_chance_on_unseen_conditions():
    teacher = make_teacher()
    unseen = conditioning_bank(teacher, seed=7)
    torch.manual_seed(1)
    chance = adaln.modulation_error(FluxMoETransformer2DModel(**SIZES, conditioning_dim=8), teacher, unseen)
    by_dim = [adaln.modulation_error(compressed(teacher, dim), teacher, unseen) for dim in (4, 8, 16, 24)]
    assert all(by_dim[1][name] < 0.5 * chance[name] for name in chance)
    means = [sum(errors.values()) / len(errors) for errors in by_dim]
    assert means == sorted(means, reverse=True)
    assert means[1] < 0.8  # 1 is what a constant would get
    assert means[3] < 0.2


def test_the_error_of_the_model_itself_is_what_modulation_error_says():
    """modulation_error infers the student's conditioning from the teacher's; here it comes from the student's own
    embedders."""
    teacher = make_teacher().double()
    g = torch.Generator().manual_seed(3)
    inputs = (
        1000 * torch.rand(50, generator=g, dtype=torch.float64),
        torch.full((50,), 3500.0, dtype=torch.float64),
        torch.randn(50, SIZES["pooled_projection_dim"], generator=g, dtype=torch.float64),
    )
    student = compressed(teacher.float(), 8).double()
    teacher = teacher.double()
    with torch.no_grad():
        y, z = teacher.time_text_embed(*inputs), student.time_text_embed(*inputs)
        target, output = (m.norm_out.linear(torch.nn.functional.silu(v)) for m, v in ((teacher, y), (student, z)))
        expected = (output - target).square().sum() / (target - target.mean(0)).square().sum()
    assert adaln.modulation_error(student, teacher, y)["norm_out.linear"] == pytest.approx(expected.item(), rel=1e-4)


def test_fewer_vectors_than_dimensions_still_fit():
    teacher = make_teacher()
    bank = conditioning_bank(teacher, count=5)
    weights = adaln.compressed_weights(teacher, bank, 8)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_bad_vectors():
    teacher = make_teacher()
    with pytest.raises(ConfigError, match=r"shape \[10, 3\]; it must be \[N, 32\]"):
        adaln.compressed_weights(teacher, torch.zeros(10, 3), 8)
    with pytest.raises(ConfigError, match="not finite"):
        adaln.compressed_weights(teacher, torch.full((10, WIDTH), torch.inf), 8)
    with pytest.raises(ConfigError, match="conditioning_dim is null"):
        adaln.compress(FluxMoETransformer2DModel(**SIZES), teacher, conditioning_bank(teacher))
