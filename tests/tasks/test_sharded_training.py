"""Sharded training in real processes: as one worker trains, and from a checkpoint of another number of workers, or of whole models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moe_core.transformer import FluxMoETransformer2DModel
from tasks import training
from tasks.phase import METRICS, NOTES, PRODUCT, Phase
from tests.tasks.sharded_kd import CPU, phase, train, write_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = "diffusion_pytorch_model.safetensors"
F64, F32 = 1e-9, 2e-4
"""How far losses may be apart, relative to them, and weights, to them or to 1: rounding, and what so many steps make of it."""
CASES: dict[str, dict[str, Any]] = {
    "moe-adamw": {"kind": "moe", "steps": 50, "ema_decay": 0.9},
    "mob-adamw": {"kind": "mob", "steps": 50, "micro_batch": 4},
    "mob-muon": {"kind": "mob", "steps": 10, "optimizer": "muon"},
    "moe-fp32": {"kind": "moe", "steps": 10, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def jobs(models: Path, sharded: bool) -> list[Phase]:
    return [phase(models, sharded=sharded, name=name, **values) for name, values in CASES.items()]


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process that has whole models, and no process group."""
    folder = tmp_path_factory.mktemp("whole")
    training.run(jobs(models, sharded=False), folder, CPU, 1, 0)
    return folder


@pytest.fixture(scope="module")
def two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two sharded workers."""
    folder = tmp_path_factory.mktemp("two")
    train(jobs(models, sharded=True), folder, 2)
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(folder: Path) -> dict[tuple[str, int, str], float]:
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    # balance_moe is a mean over the samples that a router saw: in groups it follows how samples are dealt. It is no part of the loss.
    without = ("split", "step", "seconds", "balance_moe")
    return {(r["split"], r["step"], name): value for r in rows for name, value in r.items() if name not in without}


def assert_alike(one: Path, two: Path, case: str) -> None:
    """Every loss of every step, every validation and every weight of the product."""
    within = F32 if case == "moe-fp32" else F64
    expected, found = losses(one / case), losses(two / case)
    assert found.keys() == expected.keys()
    assert len([key for key in found if key[0] == "train" and key[2] == "loss"]) == CASES[case]["steps"]
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=within, abs=1e-15), key
    weights = [load_file(folder / case / PRODUCT / WEIGHTS) for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=10 * within, atol=10 * within)


def killed(folder: Path, to: Path) -> Path:
    """A copy of a finished run as a kill before its last checkpoint would have left it."""
    shutil.copytree(folder, to)
    for case, values in CASES.items():
        shutil.rmtree(to / case / PRODUCT)
        shutil.rmtree(to / case / f"step-{values['steps']:08d}")
    (to / NOTES).write_text("")
    return to


def assert_went_on(folder: Path, like: Path) -> None:
    notes = (folder / NOTES).read_text()
    for case, values in CASES.items():
        assert f"{case}/step-{values['steps'] - 5:08d}" in notes
        assert_alike(like, folder, case)


@pytest.mark.parametrize("case", CASES)
def test_two_sharded_workers_train_as_one_whole_does(whole: Path, two: Path, case: str) -> None:
    assert_alike(whole, two, case)


def test_two_workers_with_whole_models_train_as_one_does(models: Path, whole: Path, tmp_path: Path) -> None:
    """DDP, which leaves the gradients of all but the last micro batch unsummed, of blocks that not every rank or micro batch chose."""
    case = "mob-adamw"
    train([phase(models, sharded=False, name=case, **CASES[case])], tmp_path, 2)
    assert_alike(whole, tmp_path, case)


def test_the_product_is_a_diffusers_folder(models: Path, two: Path) -> None:
    start = FluxMoETransformer2DModel.from_pretrained(models / "mob")
    found = FluxMoETransformer2DModel.from_pretrained(two / "mob-adamw" / PRODUCT)
    assert found.config["mob"] == start.config["mob"]
    kept = [name for name, p in start.named_parameters() if start.part_of(name) not in ("group_blocks", "block_router")]
    trained = dict(found.named_parameters())
    assert kept
    assert all(torch.equal(trained[name], dict(start.named_parameters())[name]) for name in kept)


def test_each_worker_writes_half_and_nothing_is_pickled(two: Path) -> None:
    checkpoint = two / "moe-adamw" / "step-00000050"
    files = sorted(path.name for path in checkpoint.iterdir())
    assert len(files) == 3
    assert files[0] == "manifest.json"
    assert all(name.endswith(".safetensors") for name in files[1:])
    state = [load_file(checkpoint / name) for name in files[1:]]
    for kind in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.", "average."):
        held = [sum(t.nbytes for name, t in part.items() if name.startswith(kind)) for part in state]
        assert min(held) > 0.45 * sum(held)


@pytest.mark.filterwarnings("ignore")
def test_eight_bit_moments_train_sharded_and_go_on_nearly_as_they_were(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    # Only parts of 4,096 weights and more get moments of a byte: a worker's experts of a block have 6,144.
    models = write_models(tmp_path / "models", torch.float32, num_attention_heads=8)
    job = phase(models, "moe", sharded=True, steps=10, optimizer="adamw8bit", dtype="float32")
    train([job], tmp_path / "whole", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "train" / PRODUCT)
    shutil.rmtree(tmp_path / "cut" / "train" / "step-00000010")
    train([job], tmp_path / "cut", 2)
    start = FluxMoETransformer2DModel.from_pretrained(models / "moe").state_dict()
    whole, cut = (load_file(tmp_path / name / "train" / PRODUCT / WEIGHTS) for name in ("whole", "cut"))
    moved = sum((whole[name] - start[name]).square().sum().item() for name in whole) ** 0.5
    apart = sum((whole[name] - cut[name]).square().sum().item() for name in whole) ** 0.5
    assert moved > 0
    # Rounded once more on the way: of moments in fp32 it would be 0.
    assert 0 < apart < 0.05 * moved


@pytest.mark.usefixtures("alone")
def test_from_two_workers_to_one(models: Path, two: Path, tmp_path: Path) -> None:
    cut = killed(two, tmp_path / "cut")
    training.run(jobs(models, sharded=True), cut, CPU, 1, 0)
    assert_went_on(cut, two)


def test_from_two_workers_to_a_whole_model(models: Path, two: Path, tmp_path: Path) -> None:
    cut = killed(two, tmp_path / "cut")
    training.run(jobs(models, sharded=False), cut, CPU, 1, 0)
    assert_went_on(cut, two)


def test_from_a_whole_model_to_two_workers(models: Path, whole: Path, tmp_path: Path) -> None:
    cut = killed(whole, tmp_path / "cut")
    train(jobs(models, sharded=True), cut, 2)
    assert_went_on(cut, whole)
