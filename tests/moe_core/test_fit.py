"""MoE layers fitted to dense FFNs: every closed form against a slow, plain one, and what it is good for."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core import convert, experts, fit
from moe_core.config import MoEConfig
from moe_core.errors import ConfigError
from moe_core.moe import MoELayer
from tests.moe_core.small_models import make_inputs, make_moe, make_scores, make_teacher, predict

D, HIDDEN, N = 8, 32, 400
FITTED = {"split": "greedy", "deal": "coactivation", "router_init": "norms", "refit": True, "gate_norm": "scale_to_k"}


def ffn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((HIDDEN, D), (HIDDEN,), (D, HIDDEN))
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes)  # type: ignore[return-value]


def tokens(seed: int = 1, count: int = N) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    return F.gelu(x @ w1.T + b1, approximate="tanh")


def small_moe(**changes: object) -> MoEConfig:
    return make_moe(**{"shared_ratio": 1.0, "normal_ratio": 0.5, "num_experts": 6, "top_k": 2, **changes})


def fitted(moe: MoEConfig, alone: bool = False, x: Tensor | None = None) -> fit.LayerFit:
    router = experts.drawn(torch.Size((moe.num_experts, D)), 0.02, 0, "router").double()
    x = tokens() if x is None else x
    return fit.fit_layer(x, ffn(), torch.arange(HIDDEN), router, moe, experts.generator(0, "deal"), alone)


def layer_of(found: fit.LayerFit, moe: MoEConfig) -> MoELayer:
    w1, b1, _ = ffn()
    layer = MoELayer(D, 8, 4, 6, moe.top_k, out_bias=False, gate_norm=moe.gate_norm).double()
    layer.backend = "loop"
    state = {
        "shared.proj_in.weight": w1[found.split.shared],
        "shared.proj_in.bias": b1[found.split.shared],
        "shared.proj_out.weight": found.shared_DS,
        "router.weight": found.router_ED,
        "w1_EFD": w1[found.split.experts_EF],
        "b1_EF": b1[found.split.experts_EF],
        "w2_EDF": found.experts_EDF,
    }
    layer.load_state_dict(state)
    return layer


@torch.no_grad()
def error(found: fit.LayerFit, moe: MoEConfig, x: Tensor) -> float:
    w1, b1, w2 = ffn()
    return (layer_of(found, moe)(x) - hidden(x, w1, b1) @ w2.T).square().sum().item()


def test_selection_takes_each_time_the_column_that_leaves_least():
    g = torch.Generator().manual_seed(0)
    h, y = (torch.randn(50, count, generator=g, dtype=torch.float64) for count in (9, 3))
    h[:, 4] = h[:, 1] + 0.3 * h[:, 2]
    y = y + 5 * h[:, :3] @ torch.randn(3, 3, generator=g, dtype=torch.float64)
    expected: list[int] = []
    for _ in range(5):
        left = {}
        for column in set(range(9)) - set(expected):
            span = h[:, [*expected, column]]
            left[column] = (y - span @ torch.linalg.lstsq(span, y).solution).square().sum().item()
        expected.append(min(left, key=left.__getitem__))
    assert fit.select(h.T @ h, h.T @ y, 5).tolist() == expected


def test_columns_that_others_explain_come_last():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(50, 4, generator=g, dtype=torch.float64)
    h = torch.cat([h, 2 * h[:, :2]], dim=1)
    y = h @ torch.ones(6, 2, dtype=torch.float64)
    chosen = fit.select(h.T @ h, h.T @ y, 6).tolist()
    assert sorted(chosen) == list(range(6))
    for twins in ((0, 4), (1, 5)):
        assert sum(twin in chosen[:4] for twin in twins) == 1


def test_regression_has_no_gradient_left():
    x, y = tokens(), tokens(2)[:, :3]
    weight = fit.regress(x, y, 1e-2).requires_grad_()
    strength = 1e-2 * x.square().sum(0).mean()
    loss = (x @ weight.T - y).square().sum() + strength * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-9


def test_clusters_are_of_equal_size_and_find_what_belongs_together():
    g = torch.Generator().manual_seed(3)
    centres = torch.eye(4, 20, dtype=torch.float64)
    of = torch.arange(24) % 4
    points = centres[of] + 0.1 * torch.randn(24, 20, generator=g, dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True)
    best = [fit.clusters(points @ points.T, 4, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert all(sorted(found.flatten().tolist()) == list(range(24)) for found in best)
    assert all(found.shape == (4, 6) for found in best)
    # k-means ends in a local optimum from some starts; from most it finds the planted ones.
    pure = [all(len(set(of[cluster].tolist())) == 1 for cluster in found) for found in best]
    assert sum(pure) >= 4


def test_clusters_of_few_points_are_near_the_best_of_all():
    g = torch.Generator().manual_seed(5)
    points = torch.randn(6, 3, generator=g, dtype=torch.float64)
    similarity = points @ points.T

    def inside(groups: list[tuple[int, ...]]) -> float:
        return sum(similarity[list(group)][:, list(group)].sum().item() for group in groups)

    best = max(inside([first, tuple(set(range(6)) - set(first))]) for first in itertools.combinations(range(6), 3))
    found = [
        inside([tuple(group) for group in fit.clusters(similarity, 2, torch.Generator().manual_seed(seed)).tolist()])
        for seed in range(10)
    ]
    assert max(found) == pytest.approx(best)


def test_router_chooses_the_experts_that_give_most():
    """Units that are active on one side of a plane only: the norms are nearly linear in the token there."""
    moe = small_moe(router_init="norms")
    found = fitted(moe)
    x, (w1, b1, w2) = tokens(7), ffn()
    h = hidden(x, w1, b1)
    norm_NE = torch.stack([(h[:, units] @ w2[:, units].T).norm(dim=1) for units in found.split.experts_EF], dim=1)
    logits_NE = x @ found.router_ED.T
    assert logits_NE.std().item() == pytest.approx(1, rel=0.1)
    chosen = norm_NE.gather(1, logits_NE.topk(2).indices).sum(1).mean()
    by_chance = norm_NE.mean() * 2
    at_best = norm_NE.topk(2).values.sum(1).mean()
    assert chosen > by_chance + 0.4 * (at_best - by_chance)


@pytest.mark.parametrize("gate_norm", ["renormalize", "scale_to_k", "unit"])
def test_refit_is_the_best_second_matrix_for_the_units_that_run(gate_norm: str):
    moe = small_moe(**{**FITTED, "gate_norm": gate_norm, "ridge": 1e-9})
    found = fitted(moe)
    layer, x, (w1, b1, w2) = layer_of(found, moe), tokens(), ffn()
    target = hidden(x, w1, b1) @ w2.T
    loss = (layer(x) - target).square().sum()
    loss.backward()
    for weight in (layer.shared.proj_out.weight, layer.w2_EDF):
        assert weight.grad is not None
        assert weight.grad.abs().max() < 1e-4
    assert loss < 0.5 * error(fitted(small_moe(**{**FITTED, "gate_norm": gate_norm, "refit": False})), moe, x)


def test_each_choice_helps_on_tokens_that_were_not_seen():
    """The order that the conversion relies on, on one FFN; the layers differ by one choice each."""
    seen, other = tokens(1, 4000), tokens(9, 4000)
    choices = [{}, {"router_init": "norms"}, {"router_init": "norms", "refit": True}, FITTED]
    errors = []
    for choice in choices:
        moe = small_moe(**{"gate_norm": "unit", **choice})
        errors.append(error(fitted(moe, x=seen), moe, other))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_shared_expert_alone_is_fitted_alone():
    moe = small_moe(refit=True, ridge=1e-9)
    alone, together = fitted(moe, alone=True), fitted(moe)
    x, (w1, b1, w2) = tokens(), ffn()
    h = hidden(x, w1, b1)
    expected = torch.linalg.lstsq(h[:, alone.split.shared], h @ w2.T).solution.T
    torch.testing.assert_close(alone.shared_DS, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(alone.shared_DS, together.shared_DS, atol=1e-3)


def teacher_tokens(teacher, count: int = 300) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, teacher.inner_dim, generator=g) for name in convert.ffn_names(teacher)}


@pytest.mark.parametrize(
    "choice", [{"split": "greedy"}, {"deal": "coactivation"}, {"router_init": "norms"}, {"deal": "importance"}]
)
def test_without_refit_all_experts_at_gate_1_equal_the_dense_model(choice: dict[str, str]):
    teacher = make_teacher()
    moe = make_moe(top_k=12, dense_double_blocks=(0,), **{**choice, "gate_norm": "unit"})
    student = convert.to_moe_joint(teacher, make_scores(teacher), moe, tokens=teacher_tokens(teacher))
    torch.testing.assert_close(predict(student, make_inputs()), predict(teacher, make_inputs()), rtol=1e-5, atol=3e-6)


def test_two_steps_find_the_cut_that_one_finds():
    teacher = make_teacher()
    moe = make_moe(deal="coactivation", router_init="norms")
    given = (make_scores(teacher), moe)
    found = teacher_tokens(teacher)
    joint = convert.to_moe_joint(teacher, *given, tokens=found).state_dict()
    shared = convert.to_shared(teacher, *given, tokens=found)
    staged = convert.to_moe(shared, teacher, *given, tokens=found).state_dict()
    assert all(torch.equal(staged[name], value) for name, value in joint.items())


def test_deal_by_importance_keeps_the_order():
    moe = small_moe(deal="importance", num_experts=3, normal_ratio=1.0)
    found = experts.split_segments("ffn", HIDDEN, D, {"ffn": torch.arange(HIDDEN, 0, -1.0)}, moe, 0)
    assert found.shared.tolist() == list(range(8))
    assert found.experts_EF.tolist() == [list(range(8 * (e + 1), 8 * (e + 2))) for e in range(3)]


def test_what_is_missing_is_named():
    teacher = make_teacher()
    moe = make_moe(**FITTED)
    first = "transformer_blocks.1.ff"
    with pytest.raises(ConfigError, match=rf"there are no tokens of {first}; .* run stage importance again"):
        convert.to_moe_joint(teacher, make_scores(teacher), moe)
    found = teacher_tokens(teacher)
    rule = rf"tokens of {first} must be finite and \[N, 32\], N at least 1; their shape is"
    with pytest.raises(ConfigError, match=rule + r" \[300, 31\]"):
        convert.to_moe_joint(teacher, make_scores(teacher), moe, tokens={**found, first: found[first][:, 1:]})
    with pytest.raises(ConfigError, match=rule + r" \[0, 32\]"):
        convert.to_moe_joint(teacher, make_scores(teacher), moe, tokens={**found, first: found[first][:0]})
    found[first][7, 3] = float("nan")
    with pytest.raises(ConfigError, match=rule):
        convert.to_moe_joint(teacher, make_scores(teacher), moe, tokens=found)


@pytest.mark.parametrize(
    ("choice", "named"), [({"refit": True}, "moe.refit is true"), ({"split": "greedy"}, "moe.split greedy")]
)
def test_what_is_fitted_together_cannot_be_made_in_two_steps(choice: dict[str, object], named: str):
    teacher = make_teacher()
    found, scores, moe = teacher_tokens(teacher), make_scores(teacher), make_moe(**choice)
    shared = convert.to_shared(teacher, scores, moe, tokens=found)
    with pytest.raises(ConfigError, match=rf"{re.escape(named)}.*kd.joint must be true"):
        convert.to_moe(shared, teacher, scores, moe, tokens=found)


def test_an_expert_that_no_token_chose_keeps_its_own_weights():
    moe = small_moe(**FITTED)
    one = tokens(1, 1)
    found = fitted(moe, x=one)
    _, _, w2 = ffn()
    logits_E = (one @ found.router_ED.T)[0]
    idle = logits_E.argsort()[: moe.num_experts - moe.top_k]
    for expert in idle.tolist():
        own = w2[:, found.split.experts_EF[expert]]
        torch.testing.assert_close(found.experts_EDF[expert], own, rtol=1e-9, atol=1e-12)
    busy = int(logits_E.argmax())
    assert (found.experts_EDF[busy] - w2[:, found.split.experts_EF[busy]]).abs().max() > 1e-4


def test_selection_in_rounds_explains_nearly_as_much(monkeypatch: pytest.MonkeyPatch):
    g = torch.Generator().manual_seed(0)
    h = torch.randn(300, 20, generator=g, dtype=torch.float64) @ torch.randn(20, 60, generator=g, dtype=torch.float64)
    h = h + 0.3 * torch.randn(300, 60, generator=g, dtype=torch.float64)
    y = h @ torch.randn(60, 8, generator=g, dtype=torch.float64)

    def left(chosen: Tensor) -> float:
        span = h[:, chosen]
        return ((y - span @ torch.linalg.lstsq(span, y).solution).square().sum() / y.square().sum()).item()

    one_by_one = fit.select(h.T @ h, h.T @ y, 24)
    monkeypatch.setattr(fit, "ROUNDS", 4)
    in_rounds = fit.select(h.T @ h, h.T @ y, 24)
    assert len(set(in_rounds.tolist())) == 24
    assert not torch.equal(one_by_one, in_rounds)
    assert left(in_rounds) < 1.5 * left(one_by_one)
    assert left(in_rounds) < 0.6 * left(torch.arange(24))


def test_units_that_nothing_tells_apart_go_by_importance():
    """Two tokens have a span of two units; the others are taken in the order of importance."""
    order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(4))
    moe, router = small_moe(split="greedy"), torch.zeros(6, D)
    found = fit.fit_layer(tokens(1, 2), ffn(), order, router, moe, experts.generator(0, "deal"), alone=True)
    assert len(set(found.split.shared.tolist()) & set(order[:8].tolist())) >= 6


@pytest.mark.gpu
def test_a_fit_is_computed_where_the_tokens_lie():
    teacher = make_teacher()
    moe, scores, found = make_moe(**FITTED), make_scores(teacher), teacher_tokens(teacher)
    expected = convert.to_moe_joint(teacher, scores, moe, tokens=found).state_dict()
    on_gpu = {name: value.cuda() for name, value in found.items()}
    for name, value in convert.to_moe_joint(teacher, scores, moe, tokens=on_gpu).state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
