"""Models cut in their depth: what is left, what it stands for, what of it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moe_core import baselines, convert, stream
from moe_core.distill import KDStep, predict
from moe_core.errors import ConfigError
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.tiny_flux import make_batch, make_stage, make_student, make_teacher

DROP = {"double": [1, 2], "single": [0, 2]}
"""Of 4 double and 3 single blocks."""


class Skipped(nn.Module):
    """A block that is not there."""

    def forward(self, hidden_states, encoder_hidden_states, **more):
        return encoder_hidden_states, hidden_states


def test_it_computes_what_the_teacher_does_with_these_blocks_passed_over() -> None:
    teacher, batch = make_teacher(dtype=torch.float64), make_batch(2, dtype=torch.float64)
    shallow = convert.to_depth(teacher, DROP)
    for number in DROP["double"]:
        teacher.transformer_blocks[number] = Skipped()
    for number in DROP["single"]:
        teacher.single_transformer_blocks[number] = Skipped()
    torch.testing.assert_close(predict(shallow, batch), predict(teacher, batch), rtol=1e-12, atol=1e-12)


def test_a_block_stands_for_those_dropped_after_it() -> None:
    shallow = convert.to_depth(make_teacher(), DROP)
    assert shallow.feature_names() == [
        ("transformer_blocks.0", "transformer_blocks.2"),
        ("transformer_blocks.1", "transformer_blocks.3"),
        ("single_transformer_blocks.0", "single_transformer_blocks.2"),
    ]
    assert shallow.gap_blocks() == ["transformer_blocks.0", "single_transformer_blocks.0"]


def test_two_cuts_are_one() -> None:
    teacher = make_teacher()
    first = convert.to_depth(teacher, {"double": [1], "single": []})
    # What was block 2 is block 1 now.
    second = convert.to_depth(first, {"double": [1], "single": [0, 2]})
    once = convert.to_depth(teacher, DROP)
    assert second.config["dropped_blocks"] == DROP
    assert second.feature_names() == once.feature_names()
    for name, weight in once.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


def test_only_blocks_before_gaps_train_and_are_compared_where_they_alone_are_asked_for() -> None:
    teacher, shallow = make_teacher(), convert.to_depth(make_teacher(), DROP)
    step = KDStep(shallow, teacher, make_stage("shared", train=("gap_blocks",)))
    assert [student for student, _ in step.pairs] == shallow.gap_blocks()
    step(make_batch(2))["loss"].backward()
    trained = {name for name, p in shallow.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, _ in shallow.named_parameters() if n.startswith(tuple(f"{g}." for g in shallow.gap_blocks()))
    }
    for name in trained:
        gradient = shallow.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
    everything = KDStep(shallow, teacher, make_stage("shared", train=("all",)))
    assert len(everything.pairs) == 3
    assert all(p.requires_grad for p in shallow.parameters())


def test_folder_to_folder_is_the_same_and_loads(tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    stream.to_depth(tmp_path / "teacher", tmp_path / "out", DROP)
    found, expected = FluxMoETransformer2DModel.from_pretrained(tmp_path / "out"), convert.to_depth(teacher, DROP)
    assert found.feature_names() == expected.feature_names()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"double": [4]}, "double block 4 cannot be dropped: the model has 4"),
        ({"single": [-1]}, "single block -1 cannot"),
    ],
)
def test_blocks_that_are_not_there_are_refused(drop: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert.to_depth(make_teacher(), drop)


def test_sparse_models_lose_no_blocks() -> None:
    with pytest.raises(ConfigError, match="blocks are dropped from dense models only"):
        convert.to_depth(make_student("moe"), DROP)


def test_numbers_of_dropped_blocks_must_fit() -> None:
    with pytest.raises(
        ConfigError,
        match=r"dropped_blocks.double is \[9\]; with 4 blocks left they must be 1 different numbers of 0 to 4",
    ):
        make_student("shared", moe=None, conditioning_dim=None, dropped_blocks={"double": [9], "single": []})


def test_lite_drops_what_changes_least() -> None:
    assert baselines.least_change([5.0, 1.0, 3.0, 1.0, 4.0], 3) == [1, 3]
    assert baselines.least_change([5.0, 1.0], 2) == []


@pytest.mark.parametrize(
    ("count", "left", "dropped"), [(19, 10, list(range(1, 19, 2))), (5, 3, [1, 3]), (12, 12, []), (3, 1, [1, 2])]
)
def test_bk_drops_at_equal_distances(count: int, left: int, dropped: list[int]) -> None:
    assert baselines.evenly(count, left) == dropped


@pytest.mark.parametrize("left", [0, 4])
def test_as_many_must_be_left_as_there_can_be(left: int) -> None:
    for rule in (lambda: baselines.evenly(3, left), lambda: baselines.least_change([1.0] * 3, left)):
        with pytest.raises(ConfigError, match=f"{left} blocks cannot be left of 3"):
            rule()
