from __future__ import annotations

import pytest
import torch

from moe_core import convert, importance
from moe_core.capture import block_names, record
from moe_core.config import MoBConfig, MoBGroupsConfig, MoBLevelConfig, MoEConfig
from moe_core.distill import predict
from moe_core.importance import ImportanceAccumulator, block_change, taylor_scores
from tests.moe_core.tiny_flux import SIZES, make_batch, make_teacher

F64 = torch.float64


def scores_by_autograd(teacher, batch) -> dict[str, torch.Tensor]:
    """Eq. 6 from its words: each sample alone, autograd's weight gradients, segment by segment."""
    scores = {}
    for i in range(len(batch)):
        one = batch[i : i + 1]
        teacher.zero_grad()
        (predict(teacher, one) - (one.noise - one.latents)).square().mean().backward()
        for name in block_names(teacher):
            block = teacher.get_submodule(name)
            if name.startswith("single"):
                ffns = {f"{name}.moe": (block.proj_mlp, block.proj_out, 16)}
            else:
                nets = {"ff": block.ff.net, "ff_context": block.ff_context.net}
                ffns = {f"{name}.{ff}": (net[0].proj, net[2], 0) for ff, net in nets.items()}
            for ffn, (up, down, offset) in ffns.items():
                taylor = [(p.grad * p).abs().detach() for p in (up.weight, up.bias, down.weight)]
                segments = [
                    taylor[0][f].sum() + taylor[1][f] + taylor[2][:, offset + f].sum() for f in range(up.out_features)
                ]
                scores[ffn] = scores.get(ffn, 0) + torch.stack(segments)
    teacher.zero_grad()
    return scores


@pytest.mark.parametrize("chunk", [1, 2**26])
def test_scores_equal_those_of_a_loop_over_samples(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importance, "CHUNK_ELEMENTS", chunk)
    sizes = {"num_layers": 2, "num_single_layers": 2}
    teacher, batch = make_teacher(dtype=F64, **sizes), make_batch(3, dtype=F64)
    expected = scores_by_autograd(teacher, batch)
    scores = taylor_scores(teacher, [batch])
    assert list(scores) == [
        *(f"transformer_blocks.{i}.{ff}" for i in range(2) for ff in ("ff", "ff_context")),
        *(f"single_transformer_blocks.{i}.moe" for i in range(2)),
    ]
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score.shape == (64,)
        assert score.dtype == F64
        assert bool((score > 0).all())
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-15, msg=name)


def test_states_of_batches_and_workers_add_up():
    teacher, batch = make_teacher(dtype=F64), make_batch(4, dtype=F64)
    whole, first, second = (ImportanceAccumulator(teacher) for _ in range(3))
    whole.update(batch, keys=list("abcd"))
    first.update(batch[:1], keys=["a"])
    second.update(batch[1:3], keys=["b", "c"])
    second.update(batch[3:], keys=["d"])
    assert whole.state.keys() == first.state.keys()
    for name, value in whole.state.items():
        assert value.dtype == F64
        torch.testing.assert_close(first.state[name] + second.state[name], value, msg=name)
    assert whole.state["samples"] == 4
    rows = first.rows + second.rows
    assert [row["key"] for row in rows] == [row["key"] for row in whole.rows] == list("abcd")
    for row, expected in zip(rows, whole.rows):
        assert row["relative"] == pytest.approx(expected["relative"])
    vectors = torch.cat([first.conditioning_vectors(), second.conditioning_vectors()])
    torch.testing.assert_close(vectors, whole.conditioning_vectors())


def test_loss_is_the_diffusion_models_own():
    teacher, batch = make_teacher(), make_batch(5)
    accumulator = ImportanceAccumulator(teacher)
    accumulator.update(batch)
    with torch.no_grad():
        expected = torch.nn.functional.mse_loss(predict(teacher, batch), batch.target)
    mean = accumulator.state["loss"] / accumulator.state["samples"]
    assert mean.item() == pytest.approx(expected.item(), rel=1e-5)


def test_block_change_is_output_against_input():
    teacher, batch = make_teacher(), make_batch(3)
    accumulator = ImportanceAccumulator(teacher)
    accumulator.update(batch)
    with torch.no_grad(), record(teacher) as recording:
        predict(teacher, batch)
    names = list(recording.features)
    streams = [torch.cat(recording.features[name], dim=1) for name in names]
    assert accumulator.blocks == names
    for sample, row in enumerate(accumulator.rows):
        assert row["key"] == str(sample)
        assert row["sigma"] == pytest.approx(batch.sigma[sample].item())
        for layer in range(1, len(names)):  # the first block's input is no block's output
            before, after = streams[layer - 1][sample], streams[layer][sample]
            change = (after - before).square()
            assert row["mse"][layer] == pytest.approx(change.mean().item(), rel=1e-4)
            assert row["relative"][layer] == pytest.approx((change.sum() / before.square().sum()).item(), rel=1e-4)
    totals = block_change(accumulator.blocks, accumulator.rows)
    assert list(totals) == names
    mean = sum(row["relative"][2] for row in accumulator.rows) / 3
    assert totals[names[2]]["relative"] == pytest.approx(mean)


def test_conditioning_vectors_are_the_adaln_inputs():
    teacher, batch = make_teacher(), make_batch(3)
    accumulator = ImportanceAccumulator(teacher)
    accumulator.update(batch)
    seen = []
    handle = teacher.norm_out.silu.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        predict(teacher, batch)
    handle.remove()
    torch.testing.assert_close(accumulator.conditioning_vectors(), seen[0])
    assert seen[0].shape == (3, SIZES["num_attention_heads"] * SIZES["attention_head_dim"])


def test_conversion_takes_what_is_collected():
    teacher, batch = make_teacher(), make_batch(12)
    accumulator = ImportanceAccumulator(teacher)
    accumulator.update(batch)
    moe = MoEConfig(shared_ratio=1.0, normal_ratio=0.75, num_experts=4, top_k=2, conditioning_dim=8)
    student = convert.to_moe_joint(teacher, accumulator.scores(), moe, accumulator.conditioning_vectors(), seed=0)
    level = MoBLevelConfig(init="moe", double=MoBGroupsConfig(groups=1, size=3))
    changes = block_change(accumulator.blocks, accumulator.rows)
    relative = {name: change["relative"] for name, change in changes.items()}
    grouped = convert.to_mob(student, level, MoBConfig(levels={"M": level}), relative, seed=0)
    with torch.no_grad():
        assert predict(grouped, batch).shape == batch.latents.shape


def test_the_teacher_is_left_as_it_was():
    teacher = make_teacher().train()
    teacher.proj_out.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    ImportanceAccumulator(teacher).update(make_batch(2))
    assert teacher.training
    assert not any(module._forward_hooks for module in teacher.modules())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "proj_out.weight")


def test_gradient_checkpointing_changes_no_score():
    batch = make_batch(2)
    teacher = make_teacher()
    expected = taylor_scores(teacher, [batch])
    teacher.enable_gradient_checkpointing()
    for name, score in taylor_scores(teacher, [batch]).items():
        torch.testing.assert_close(score, expected[name], msg=name)


def test_bf16_scores_rank_as_fp32_ones():
    teacher, batch = make_teacher(), make_batch(4)
    expected = taylor_scores(teacher, [batch])
    scores = taylor_scores(make_teacher(dtype=torch.bfloat16), [batch.to(torch.bfloat16)])
    for name, score in scores.items():
        assert torch.corrcoef(torch.stack([score, expected[name]]))[0, 1] > 0.95, name


def test_nothing_to_average_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        block_change(["transformer_blocks.0"], [])
    with pytest.raises(ValueError, match="no batch"):
        ImportanceAccumulator(make_teacher()).conditioning_vectors()


def kept(count: int, *cuts: slice, **changes) -> dict[str, torch.Tensor]:
    """Tokens of a batch of four that goes through in these cuts."""
    teacher, batch = make_teacher(), make_batch(4)
    accumulator = ImportanceAccumulator(teacher, count, **{"seed": 3, **changes})
    for cut in cuts or [slice(0, 4)]:
        accumulator.update(batch[cut], number=cut.start)
    return accumulator.tokens()


def test_tokens_are_inputs_of_their_ffn():
    teacher, batch = make_teacher(), make_batch(4)
    seen: dict[str, torch.Tensor] = {}
    linears = {
        "transformer_blocks.1.ff_context": teacher.transformer_blocks[1].ff_context.net[0].proj,
        "single_transformer_blocks.0.moe": teacher.single_transformer_blocks[0].proj_mlp,
    }
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        predict(teacher, batch)
    tokens = kept(3)
    assert list(tokens) == list(taylor_scores(teacher, [batch]))
    for name, inputs_BTD in seen.items():
        assert tokens[name].shape == (12, inputs_BTD.shape[2])
        for sample, tokens_TD in enumerate(tokens[name].split(3)):
            distance_TT = torch.cdist(tokens_TD, inputs_BTD[sample])
            assert distance_TT.min(1).values.max() < 1e-4
            # Three different ones.
            assert len(set(distance_TT.argmin(1).tolist())) == 3
    # A text of fewer tokens gives all that it has.
    whole = kept(1000)["transformer_blocks.1.ff_context"]
    assert len(whole) == seen["transformer_blocks.1.ff_context"].shape[:2].numel()


def test_tokens_do_not_depend_on_how_the_set_is_cut():
    expected = kept(3)
    for cuts in ((slice(0, 1), slice(1, 4)), (slice(0, 2), slice(2, 3), slice(3, 4))):
        for name, tokens in kept(3, *cuts).items():
            torch.testing.assert_close(tokens, expected[name], rtol=1e-5, atol=1e-5)
    name = "single_transformer_blocks.0.moe"
    assert not torch.allclose(kept(3, seed=4)[name], expected[name])
    assert kept(0) == {}
