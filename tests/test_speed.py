"""The benchmark of speed: peers compute what we do, levels cost what they should, skewed routing is skewed, and its tables say what was measured."""

import pytest
import torch

from benchmarks.speed import layer, models, peers, tables, timing
from moe_core import accounting

CPU = torch.device("cpu")


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_peers_compute_the_same(routing: str):
    case = layer.Case(64, torch.float32, routing, False, True)
    small = layer.Layer(case, CPU, width=32, hidden=12, experts=6)
    others = peers.peers(small.weights[0])
    layer.check(small, others)
    with torch.no_grad():
        expected = small.run_moe(layer.ours("loop"))
        for name in ("sorted loop", "masked loop", "transformers eager", "transformers grouped_mm"):
            torch.testing.assert_close(small.run_moe(others[name]), expected, rtol=1e-4, atol=1e-5)
    # Its experts compute something else, with as many multiply-adds.
    nucleus = others["diffusers Nucleus"]
    assert small.run_moe(nucleus).shape == expected.shape
    weights = sum(weight.numel() for weight in nucleus.experts.parameters())
    assert weights == small.weights[0].numel() + small.weights[2].numel()


def test_a_peer_that_is_wrong_is_told():
    small = layer.Layer(layer.Case(64, torch.float32, "balanced", False, True), CPU, width=32, hidden=12, experts=6)
    with pytest.raises(AssertionError, match="wrong is off by"):
        layer.check(small, {"wrong": lambda *tensors: 2 * peers.sorted_loop(*tensors)})


def test_full_size_levels_cost_what_the_paper_cuts():
    costs = {name: accounting.flops(config, 4096, 512).total for name, config in models.of_gpu().items()}
    for name, ratio in {"L": 0.684, "M": 0.567, "S": 0.427, "XS": 0.333}.items():
        assert costs[name] / costs["dense"] == pytest.approx(ratio, abs=0.0015)


def test_a_run_of_small_models_and_its_tables():
    configs = {
        name: {**config, "num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
        for name, config in models.of_cpu().items()
        if name in ("dense", "L", "XS")
    }
    even, skewed = (
        models.measure(configs, torch.float32, CPU, image=16, text=4, skewed=skew, rounds=3) for skew in (False, True)
    )
    assert skewed["models"]["L"]["largest_load_over_mean"] > even["models"]["L"]["largest_load_over_mean"] + 0.5
    assert even["models"]["dense"]["time_over_flops"] == 1
    assert even["models"]["XS"]["flops_ratio"] < even["models"]["L"]["flops_ratio"] < 1
    row = layer.measure(layer.Case(8, torch.float32, "balanced", False, False, 3), CPU, width=32, hidden=8)
    report = {"machine": dict.fromkeys(("device", "threads", "torch", "diffusers", "transformers", "python"), "?")}
    printed = tables.markdown({**report, "layer": [row], "models": [even]}, "speed-cpu")
    assert f"| {row['choice']} |" in printed
    assert "| XS |" in printed
    assert "speed-cpu.svg" not in printed


def test_ratios_are_taken_within_a_round(monkeypatch: pytest.MonkeyPatch):
    now, turns = [0.0], {"a": 0, "b": 0}

    def way(name: str, cost: int) -> None:
        # Rounds take longer and longer.
        now[0] += cost * 2 ** turns[name]
        turns[name] += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    times = timing.in_turn({"a": lambda: way("a", 1), "b": lambda: way("b", 3)}, CPU, rounds=3)
    assert times["b"]["ratio"] == times["b"]["ratio_low"] == 3
    assert times["a"]["median_s"] == 4
