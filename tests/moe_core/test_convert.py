"""Conversion: nothing is lost, nothing is counted twice, and the same arguments give the same model."""

import itertools

import pytest
import torch
from torch import nn

from moe_core import convert, experts, structure
from moe_core.errors import ConfigError
from moe_core.mob import MoBGroup
from tests.moe_core.small_models import (
    conditioning_bank,
    make_inputs,
    make_level,
    make_mob,
    make_moe,
    make_scores,
    make_teacher,
    predict,
)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("split", ["taylor", "random"])
@pytest.mark.parametrize("sizes", [{"num_single_layers": 0}, {"num_layers": 0}, {}], ids=["double", "single", "both"])
def test_all_experts_at_gate_1_equal_the_dense_model(split: str, sizes: dict):
    teacher = make_teacher(**sizes)
    moe = make_moe(
        top_k=12, gate_norm="unit", split=split, dense_double_blocks=(0,) if sizes.get("num_layers", 1) else ()
    )
    student = convert.to_moe_joint(teacher, make_scores(teacher), moe)
    expected = predict(teacher, make_inputs())
    assert expected.std() > 0.1
    for backend in ("loop", "grouped_mm"):
        student.set_expert_backend(backend)
        torch.testing.assert_close(predict(student, make_inputs()), expected, rtol=1e-5, atol=3e-6)
    # ... and the test would notice a missing expert.
    student.set_top_k(11)
    assert (predict(student, make_inputs()) - expected).abs().max() > 1e-3


def test_all_experts_at_gate_1_equal_the_dense_model_in_fp64():
    teacher = make_teacher().double()
    student = convert.to_moe_joint(teacher, make_scores(teacher), make_moe(top_k=12, gate_norm="unit"))
    inputs = make_inputs(dtype=torch.float64)
    torch.testing.assert_close(predict(student, inputs), predict(teacher, inputs), rtol=1e-12, atol=1e-12)


def test_taylor_split_gives_the_best_to_the_shared_expert_and_deals_the_rest():
    moe = make_moe(shared_ratio=1.0, normal_ratio=1.5, num_experts=2)
    scores = torch.tensor([0.0, 7, 1, 6, 2, 5, 3, 4])
    split = experts.split_segments("ffn", 8, 2, {"ffn": scores}, moe, seed=0)
    assert split.shared.tolist() == [1, 3]
    # By rank: 5 (5), 7 (4), 6 (3), 4 (2), 2 (1), 0 (0), alternating.
    assert split.experts_EF.tolist() == [[2, 5, 6], [0, 4, 7]]


@pytest.mark.parametrize("split", ["taylor", "random"])
def test_every_segment_has_one_place(split: str):
    teacher = make_teacher()
    scores, moe = make_scores(teacher), make_moe(split=split)
    for name in convert.ffn_names(teacher):
        found = experts.split_segments(name, 128, 32, scores, moe, seed=3)
        assert found.shared.shape == (32,)
        assert found.experts_EF.shape == (12, 8)
        assert sorted(found.shared.tolist() + found.experts_EF.flatten().tolist()) == list(range(128))


def test_random_split_is_a_function_of_seed_and_layer():
    moe = make_moe(split="random")

    def shared(name: str, seed: int) -> list[int]:
        return experts.split_segments(name, 128, 32, {}, moe, seed).shared.tolist()

    assert shared("a", 0) == shared("a", 0)
    assert shared("a", 0) != shared("a", 1)
    assert shared("a", 0) != shared("b", 0)


def test_conversion_is_deterministic_and_leaves_its_arguments_alone():
    teacher, scores, moe = make_teacher(), make_scores(make_teacher()), make_moe(conditioning_dim=8)
    bank = conditioning_bank(teacher)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    first, second = (convert.to_moe_joint(teacher, scores, moe, bank, seed=5) for _ in range(2))
    assert same_weights(first, second)
    for parameter in first.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_staged_conversion_equals_joint_and_keeps_what_was_trained():
    teacher = make_teacher()
    scores, moe = make_scores(teacher), make_moe()
    shared = convert.to_shared(teacher, scores, moe, seed=1)
    assert shared.config.moe["num_experts"] == 0
    staged = convert.to_moe(shared, teacher, scores, moe, seed=1)
    assert same_weights(staged, convert.to_moe_joint(teacher, scores, moe, seed=1))
    trained = shared.get_parameter("transformer_blocks.2.ff.shared.proj_in.weight")
    trained.data += 1
    staged = convert.to_moe(shared, teacher, scores, moe, seed=1)
    assert torch.equal(staged.get_parameter("transformer_blocks.2.ff.shared.proj_in.weight"), trained)
    staged.set_top_k(0)
    assert torch.equal(predict(staged, make_inputs()), predict(shared, make_inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_students_keep_the_teachers_precision(dtype: torch.dtype):
    teacher = make_teacher().to(dtype)
    student = convert.to_moe_joint(
        teacher, make_scores(teacher), make_moe(conditioning_dim=8), conditioning_bank(make_teacher())
    )
    student = convert.to_mob(student, make_level({"blocks": [[1, 2]]}), make_mob())
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    assert predict(student, make_inputs(dtype=dtype)).dtype == dtype


# -- MoB


def change(teacher_blocks: dict[str, list[float]]) -> dict[str, float]:
    return {f"{kind}.{i}": value for kind, values in teacher_blocks.items() for i, value in enumerate(values)}


CHANGE = change({"transformer_blocks": [0.0, 5, 1, 1, 1], "single_transformer_blocks": [1.0, 9, 2, 2, 9, 0]})


def test_grouped_blocks_keep_their_weights():
    """All blocks active: the groups change nothing, for MoE and for dense blocks."""
    teacher = make_teacher()
    moe = convert.to_moe_joint(teacher, make_scores(teacher), make_moe())
    level = make_level({"groups": 1, "size": 3}, {"groups": 1, "size": 2})
    for model in (moe, teacher):
        grouped = convert.to_mob(model, level, make_mob(active=2), CHANGE)
        for group in (m for m in grouped.modules() if isinstance(m, MoBGroup)):
            group.router.active = len(group.blocks)
        assert torch.equal(predict(grouped, make_inputs()), predict(model, make_inputs()))


def test_chosen_groups_and_the_dense_block():
    teacher = make_teacher()
    level = make_level({"groups": 1, "size": 3}, {"groups": 2, "size": 2})
    dense = convert.to_mob(teacher, level, make_mob(), CHANGE)
    assert dense.config.mob["double_groups"] == [[2, 3, 4]]
    assert dense.config.mob["single_groups"] == [[2, 3], [4, 5]]
    moe = convert.to_moe_joint(teacher, make_scores(teacher), make_moe(dense_double_blocks=(2,)))
    with pytest.raises(ConfigError, match="1 groups of 3"):
        convert.to_mob(moe, level, make_mob(), CHANGE)


def test_explicit_groups_are_honoured():
    grouped = convert.to_mob(make_teacher(), make_level({"blocks": [[3, 4], [0, 1]]}), make_mob())
    assert grouped.config.mob["double_groups"] == [[0, 1], [3, 4]]
    assert grouped.feature_names()[:3] == [
        ("transformer_blocks.0", "transformer_blocks.1"),
        ("transformer_blocks.1", "transformer_blocks.2"),
        ("transformer_blocks.2", "transformer_blocks.4"),
    ]


def test_level_s_keeps_ms_groups_and_router_weights():
    teacher = make_teacher()
    moe = convert.to_moe_joint(teacher, make_scores(teacher), make_moe(conditioning_dim=8), conditioning_bank(teacher))
    m = convert.to_mob(moe, make_level({"groups": 1, "size": 3}), make_mob(), CHANGE)
    for parameter in m.transformer_blocks[2].parameters():  # as training would
        parameter.data += 0.01
    worse = {**CHANGE, "transformer_blocks.4": 100.0}  # would choose other groups, were they chosen anew
    s = convert.to_mob(m, make_level({"groups": 1, "size": 3}, {"groups": 1, "size": 2}), make_mob(), worse)
    assert s.config.mob["double_groups"] == m.config.mob["double_groups"] == [[2, 3, 4]]
    assert same_weights(s.transformer_blocks, m.transformer_blocks)
    assert s.config.mob["single_groups"] == [[2, 3]]
    assert s.config.conditioning_dim == 8
    one_more = make_level({"groups": 1, "size": 3}, {"groups": 2, "size": 2})
    assert convert.to_mob(s, one_more, make_mob(), CHANGE).config.mob["single_groups"] == [[2, 3], [4, 5]]


def test_levels_that_drop_groups_are_refused():
    m = convert.to_mob(make_teacher(), make_level({"blocks": [[1, 2]]}), make_mob())
    with pytest.raises(ConfigError, match=r"double.groups is 0.*has 1"):
        convert.to_mob(m, make_level(), make_mob())
    with pytest.raises(ConfigError, match=r"lacks the group \[1, 2\]"):
        convert.to_mob(m, make_level({"blocks": [[2, 3]]}), make_mob())
    with pytest.raises(ConfigError, match=r"block_change lacks single_transformer_blocks\.0"):
        convert.to_mob(m, make_level({"groups": 1, "size": 2}, {"groups": 1, "size": 2}), make_mob())
    with pytest.raises(ConfigError, match="0 to 4"):
        convert.to_mob(make_teacher(), make_level({"blocks": [[4, 5]]}), make_mob())


@pytest.mark.parametrize(
    ("count", "groups", "size", "taken"), [(9, 3, 2, ()), (9, 2, 3, (2,)), (10, 2, 4, ()), (5, 1, 5, ())]
)
def test_choose_groups_against_brute_force(count: int, groups: int, size: int, taken: tuple[int, ...]):
    for seed in range(5):
        cost = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
        legal = [
            starts
            for starts in itertools.combinations(range(count - size + 1), groups)
            if all(b - a >= size for a, b in itertools.pairwise(starts))
            and not any(start <= t < start + size for start in starts for t in taken)
        ]
        best = min(legal, key=lambda starts: sum(sum(cost[s : s + size]) for s in starts))
        found = structure.choose_groups(cost, groups, size, taken)
        assert [group[0] for group in found] == list(best)
        assert all(group == list(range(group[0], group[0] + size)) for group in found)


def test_too_many_groups_are_refused():
    with pytest.raises(ConfigError, match="3 groups of 3"):
        structure.choose_groups([1.0] * 8, 3, 3)


# -- bad input


def test_scores_that_do_not_fit():
    teacher = make_teacher()
    scores = make_scores(teacher)
    name = "transformer_blocks.1.ff"
    with pytest.raises(ConfigError, match=f"lack {name}"):
        convert.to_shared(teacher, {k: v for k, v in scores.items() if k != name}, make_moe())
    for wrong in (torch.rand(64), torch.full((128,), torch.nan)):
        with pytest.raises(ConfigError, match=f"scores of {name} must be 128 finite"):
            convert.to_shared(teacher, {**scores, name: wrong}, make_moe())


def test_parameters_that_do_not_fit():
    teacher = make_teacher()
    scores = make_scores(teacher)
    with pytest.raises(ConfigError, match=r"expansion_ratio is 3.5.*it must be 4"):
        convert.to_shared(teacher, scores, make_moe(expansion_ratio=3.5, shared_ratio=0.5))
    with pytest.raises(ConfigError, match=r"conditioning_dim is 8.*none were given"):
        convert.to_shared(teacher, scores, make_moe(conditioning_dim=8))
    shared = convert.to_shared(teacher, scores, make_moe())
    with pytest.raises(ConfigError, match=r"shared_ratio is 0.5.*made with 1.0"):
        convert.to_moe(shared, teacher, scores, make_moe(shared_ratio=0.5, num_experts=14))
    moe = convert.to_moe(shared, teacher, scores, make_moe())
    with pytest.raises(ConfigError, match="shared experts only"):
        convert.to_moe(moe, teacher, scores, make_moe())
