"""The benchmark of speed: peers compute what we do, levels cost what they should, graphs replay what blocks compute, tables say what was found."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import compiled, graphs, layer, memory, models, peers, sampling, tables, timing, workers
from moe_core import accounting
from moe_core.dry_run import Inputs
from moe_core.mob import MoBGroup

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
MACHINE = dict.fromkeys(("device", "threads", "torch", "diffusers", "transformers", "python"), "?")


def narrow(*levels: str) -> dict[str, dict[str, Any]]:
    """The CPU's models at an eighth of their width."""
    sizes = {"num_attention_heads": 1, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return {name: {**models.of_cpu()[name], **sizes} for name in levels}


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
    configs = narrow("dense", "L", "XS")
    even, skewed = (
        models.measure(configs, torch.float32, CPU, image=16, text=4, skewed=skew, rounds=3) for skew in (False, True)
    )
    assert skewed["models"]["L"]["largest_load_over_mean"] > even["models"]["L"]["largest_load_over_mean"] + 0.5
    assert even["models"]["dense"]["time_over_flops"] == 1
    assert even["models"]["XS"]["flops_ratio"] < even["models"]["L"]["flops_ratio"] < 1
    row = layer.measure(layer.Case(8, torch.float32, "balanced", False, False, 3), CPU, width=32, hidden=8)
    printed = tables.markdown({"machine": MACHINE, "layer": [row], "models": [even]}, "speed-cpu")
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


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 4])
def test_graphs_replay_what_the_blocks_compute_whichever_a_sample_chooses(samples: int):
    config = narrow("XS")["XS"]
    plain, recorded = (models.build(config, torch.float32, CPU) for _ in range(2))
    for model in (plain, recorded):
        model.set_expert_backend("grouped_mm")
        for module in model.modules():
            if isinstance(module, MoBGroup):
                torch.manual_seed(3)
                torch.nn.init.normal_(module.router.w_y.weight, std=100)
    replayed = graphs.Graphs(recorded, CPU, compiled=False)
    counts = []
    for seed in range(4):
        given = models.inputs(config, samples, 16, 4, torch.float32, CPU)
        generator = torch.Generator().manual_seed(seed)
        for name in ("hidden_states", "pooled_projections"):
            given[name] = 10 * torch.randn(given[name].shape, generator=generator)
        expected = sampling.sample(plain, given, 3)
        torch.testing.assert_close(sampling.sample(recorded, given, 3), expected, rtol=0, atol=0)
        counts.append(replayed.recorded)
    # A pass of one sample takes 11 of 23 blocks; others are recorded when a sample chooses them, and each once for a batch size.
    assert counts[0] >= 11
    assert counts[0] < counts[-1] <= 7 + 16 * samples


def test_a_sampling_and_its_table():
    rows = list(sampling.measure(narrow("dense", "XS"), CPU, 1, 16, 4, steps=3, ways=("plain", "recorded"), rounds=3))
    assert [row["model"] for row in rows] == ["dense", "XS"]
    assert rows[0]["ways"]["plain"]["step_ratio"] == rows[0]["ways"]["recorded"]["sampling_ratio"] == 1
    assert rows[0]["ways"]["recorded"]["recorded"] == 23
    assert rows[1]["ways"]["recorded"]["recorded"] >= 11
    printed = tables.markdown({"machine": MACHINE, "sampling": rows}, "speed-cuda")
    assert "sampling of 3, bf16" in printed
    assert f"{rows[1]['ways']['plain']['sampling_ratio']:.3f}" in printed


def test_blocks_that_no_sample_chose_are_not_brought():
    found = {
        name: memory.of_model(config, CPU, 16, 4, lambda run: int(run()[0].numel() > 0))
        for name, config in narrow("dense", "L", "XS").items()
    }
    assert found["dense"]["brought"] == found["dense"]["weights"]
    assert found["L"]["brought"] == found["L"]["weights"] == found["XS"]["weights"] - routers(narrow("XS")["XS"])
    with torch.device("meta"):
        model = models.FluxMoETransformer2DModel.from_config(narrow("XS")["XS"])
    halves = {id(p): p.numel() * 2 for p in model.parameters()}
    groups = [module for module in model.modules() if isinstance(module, MoBGroup)]
    blocks = [[sum(halves[id(p)] for p in block.parameters()) for block in group.blocks] for group in groups]
    assert found["XS"]["brought"] == found["XS"]["weights"] - sum(sum(sizes) - sizes[0] for sizes in blocks)
    # What is no block, and one block beside it.
    assert found["XS"]["resident"] < found["XS"]["weights"] - sum(map(sum, blocks))
    report = {"machine": MACHINE, "memory": found}
    assert f"{found['XS']['resident'] / found['XS']['weights']:.3f}" in tables.markdown(report, "speed-cpu")


def routers(config: dict[str, Any]) -> int:
    """Bytes of the block routers in bf16."""
    with torch.device("meta"):
        model = models.FluxMoETransformer2DModel.from_config(config)
    return 2 * sum(p.numel() for p in model.parts()["block_router"])


@pytest.mark.slow
def test_resident_memory_of_a_process_is_that_of_the_weights_it_keeps():
    config = {**models.of_cpu()["XS"], "num_attention_heads": 4, "joint_attention_dim": 64}
    row = memory.measure({"XS": config}, CPU, 16, 4)["XS"]
    slack = 40e6
    assert row["weights"] > 2 * slack
    assert 0 < row["peak_all"] - row["weights"] < slack
    assert 0 < row["peak_offloaded"] - row["resident"] < slack


@pytest.mark.slow
def test_workers_take_steps_of_the_loop_and_are_drawn(tmp_path: Path):
    sizes = workers.Sizes(heads=1, double=2, single=1, images=2, image_tokens=16, text_tokens=4, steps=3)
    rows = workers.measure(sizes)
    assert [row["x"] for row in rows] == [1, 2]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"], rel=0.05)
    others = [{**row, "x": 10 * row["x"]} for row in rows]
    report = {"machine": MACHINE, "growth": {"tokens": others, "workers": rows}}
    tables.plot(report, tmp_path / "growth.svg")
    assert "workers, a KD step" in (printed := tables.markdown(report, "speed-cpu"))
    assert "images a second" in printed
    assert (tmp_path / "growth.svg").stat().st_size > 1000


@pytest.mark.slow
def test_a_rented_gpu_machine_needs_few_packages():
    blocked = ("ray", "prefect", "mlflow", "dvc", "pydantic", "pandas", "matplotlib")
    program = (
        f"import sys, torch; sys.modules.update(dict.fromkeys({blocked}));"
        "from benchmarks.speed.__main__ import sections; print(*sections(torch.device('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["layer", "models", "sampling", "memory", "growth", "kd_step"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_what_compiling_takes_is_told_apart_from_a_step():
    configs = workers.Sizes(heads=1, double=2, single=1).configs()
    row = compiled.measure(configs, "L", Inputs(1, 16, 4), ("all",), rounds=3, backend="aot_eager")
    assert row["compiling_s"] > 5 * row["times"]["compiled"]["median_s"]
    assert row["times"]["plain"]["ratio"] == 1
