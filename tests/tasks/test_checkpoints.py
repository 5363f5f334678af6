"""Checkpoints: bit-identical, whole or passed over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_core.config import OptimizerConfig
from moe_core.errors import CheckpointError, ConfigError
from tasks import checkpoints, optimizer
from tests.tasks.trivial import Linear


def steps(module: nn.Module, optim: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optim.zero_grad()
        module((x, x.sum(1)))["loss"].backward()
        optim.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_training_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    config = OptimizerConfig(steps=10, batch_size=8, learning_rate=0.1, weight_decay=0.1, optimizer=kind)
    torch.manual_seed(0)
    whole = Linear()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    optim = optimizer.build(config, whole)
    steps(whole, optim, 0, 4)
    checkpoint = checkpoints.save(tmp_path, 4, whole, optim)
    steps(whole, optim, 4, 10)

    again = Linear()
    again.load_state_dict(start)
    optim = optimizer.build(config, again)
    checkpoints.load(checkpoint, again, optim)
    steps(again, optim, 4, 10)

    assert checkpoints.check(checkpoint) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert not any("frozen" in name for name in json.dumps([p.name for p in checkpoint.iterdir()]))


def test_only_the_newest_two_stay_and_broken_ones_are_named(tmp_path: Path) -> None:
    module = Linear()
    optim = torch.optim.AdamW(module.parameters())
    for step in (5, 10, 15):
        checkpoints.save(tmp_path, step, module, optim)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]

    state = tmp_path / "step-00000015" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    found, broken = checkpoints.newest(tmp_path)
    assert found == tmp_path / "step-00000010"
    assert "step-00000015" in broken[0]
    assert "its manifest says" in broken[0]

    (tmp_path / "step-00000010" / "manifest.json").unlink()
    found, broken = checkpoints.newest(tmp_path)
    assert found is None
    assert len(broken) == 2


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005.partial-1").mkdir()
    (tmp_path / ".step-00000005.partial-1" / "state.safetensors").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) == (None, [])
    checkpoints.save(tmp_path, 5, Linear(), torch.optim.AdamW(Linear().parameters()))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    module = Linear()
    checkpoint = checkpoints.save(tmp_path, 5, module, torch.optim.AdamW(module.parameters()))
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"does not fit the model: missing \['0.bias', '0.weight'\]"):
        checkpoints.load(checkpoint, other, torch.optim.AdamW(other.parameters()))


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoints.save(tmp_path, 5, Linear(), torch.optim.AdamW(Linear().parameters()))
    (checkpoint / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has more\.safetensors, which its manifest does not list"):
        checkpoints.check(checkpoint)


@pytest.mark.parametrize("option", ["fused", "capturable"])
def test_counters_of_a_fused_adamw_lie_beside_their_weights(option: str) -> None:
    """Its kernel refuses a counter on another device than the weight's."""
    weight, other = nn.Parameter(torch.empty(2, device="meta")), nn.Parameter(torch.empty(2, device="meta"))
    optim = torch.optim.AdamW([{"params": [weight]}, {"params": [other]}])
    optim.param_groups[0][option] = True
    assert optimizer.counter_device(optim, weight) == torch.device("meta")
    assert optimizer.counter_device(optim, other) == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_training_on_a_gpu_goes_on_after_its_checkpoint(tmp_path: Path, kind: str) -> None:
    config = OptimizerConfig(steps=10, batch_size=8, learning_rate=0.1, weight_decay=0.1, optimizer=kind)

    def train(module: nn.Module, optim: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).cuda()
            optim.zero_grad()
            module((x, x.sum(1)))["loss"].backward()
            optim.step()

    torch.manual_seed(0)
    whole = Linear().cuda()
    optim = optimizer.build(config, whole)
    train(whole, optim, 0, 3)
    checkpoint = checkpoints.save(tmp_path, 3, whole, optim)
    train(whole, optim, 3, 6)
    torch.manual_seed(0)
    again = Linear().cuda()
    optim = optimizer.build(config, again)
    checkpoints.load(checkpoint, again, optim)
    train(again, optim, 3, 6)
    assert torch.equal(again.layer.weight, whole.layer.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_eight_bit_moments_go_on_nearly_as_they_were(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = OptimizerConfig(steps=10, batch_size=8, learning_rate=0.01, optimizer="adamw8bit")

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(64, 64)

    def train(module: nn.Module, optim: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            optim.zero_grad()
            (module(x) - x).square().mean().backward()
            optimizer.set_rate(optim, 0.01)
            optim.step()

    whole, again = made(), made()
    optim = optimizer.build(config, whole)
    train(whole, optim, 0, 3)
    checkpoint = checkpoints.save(tmp_path, 3, whole, optim)
    train(whole, optim, 3, 6)
    start = made().weight
    optim = optimizer.build(config, again)
    checkpoints.load(checkpoint, again, optim)
    assert type(optim.state[again.weight]["exp_avg"]).__name__ == "OptimState8bit"
    train(again, optim, 3, 6)
    assert (again.weight - whole.weight).norm() < 0.02 * (whole.weight - start).norm()


def test_without_torchao_eight_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    config = OptimizerConfig(steps=10, batch_size=8, learning_rate=0.01, optimizer="adamw8bit")
    with pytest.raises(ConfigError, match=r"optimizer is adamw8bit, but torchao cannot be imported .*'.\[lowbit\]'"):
        optimizer.build(config, Linear())
