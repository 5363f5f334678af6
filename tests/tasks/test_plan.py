"""The plan: its memory against tensors counted while the real stages run, its FLOPs against the accounting, what it says and refuses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_core import sampling, small_flux
from moe_core.config import Params, parse
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import RejectCount
from moe_core.memory import LiveMemory
from tasks import importance, training
from tasks.generation import Generator, Unit
from tasks.params import compose
from tasks.phase import Phase
from tasks.plan_costs import Costs, StageCost
from tasks.plan_teacher import describe

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SAMPLES = 16
WITHIN = 0.15
"""How far a planned peak may be from a measured one."""


def params(*overrides: str) -> Params:
    return parse(Params, yaml.safe_load(compose(ROOT, list(overrides))))


@pytest.fixture(scope="module")
def small() -> Params:
    """The demo with few samples and steps, both double blocks' groups and compression included."""
    batches = [
        f"kd.{stage}.optimizer.{key}"
        for stage in ("shared_expert", "moe", "mob")
        for key in ("batch_size=16", "steps=2")
    ]
    batches += [f"kd.{stage}.optimizer.warmup_steps=0" for stage in ("shared_expert", "moe", "mob")]
    checkpointing = ["kd.moe.gradient_checkpointing=true", "kd.moe.optimizer.optimizer=adamw"]
    data = [f"data.shard.{split}_samples={SAMPLES}" for split in ("validation", "calibration")]
    sizes = [f"kd.validation_samples={SAMPLES}", f"kd.importance_batch_size={SAMPLES}", f"eval.batch_size={SAMPLES}"]
    return params(*batches, *checkpointing, *data, *sizes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small: Params) -> Path:
    """A checkout with a teacher and shards."""
    folder = tmp_path_factory.mktemp("checkout")
    small_flux.build_pipeline(small.model, ["red seven"], 0).save_pretrained(folder / "data" / "teacher")
    shards = folder / "data" / "shards"
    shards.mkdir()
    rows = [LatentRow(f"k{i}", torch.randn(4, 8, 8), "red seven", {}) for i in range(SAMPLES)]
    written = {split: [write_shard(shards, split, 0, (16, 16), rows)] for split in ("train", "val", "calibration")}
    write_manifest(shards, written, RejectCount(), {})
    return folder


@pytest.fixture(scope="module")
def planned(small: Params) -> dict[str, StageCost]:
    costs, kd = Costs(small, describe(small.model)), small.kd
    stages = [
        costs.importance(),
        costs.distillation("shared_expert_kd", kd.shared_expert, costs.configs["shared"]),
        costs.distillation("moe_kd", kd.moe, costs.configs["L"]),
        costs.distillation("mob_kd@M", kd.mob, costs.configs["M"]),
        costs.evaluation("teacher"),
        costs.evaluation("L"),
    ]
    return {stage.stage: stage for stage in stages}


def peak(run: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once while `run` ran, what it loaded included.

    What loading itself takes for a moment does not count: it lies in the host's memory, whatever the device.
    """
    memory = LiveMemory()

    def uncounted(load: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        before = memory.peak
        loaded = load(*arguments, **more)
        gc.collect()  # what conversion wrote, the files' writer may still hold
        memory.peak = before
        return loaded

    with pytest.MonkeyPatch.context() as patch, memory:
        for name in ("load_pipeline", "load_transformer"):
            patch.setattr(sampling, name, partial(uncounted, getattr(sampling, name)))
        run()
    return memory.peak.total


@pytest.fixture(scope="module")
def measured(root: Path, small: Params) -> dict[str, int]:
    """Stage -> peak of the real stage's work, in this process."""
    values, place = small.model_dump(mode="json"), str(root)
    units = root / "units"
    units.mkdir()
    found = {"importance": peak(lambda: importance.work(CPU, 1, root, values, units))}
    (root / "data" / "importance").mkdir()
    importance.merge(units, root / "data" / "importance")

    def stage(module: str, checkpoint: str, config: Any, **more: Any) -> int:
        arguments = {"root": place, "params": values, "made": str(root / "made" / checkpoint), **more}
        phase = Phase("train", f"tasks.{module}:build", arguments, config.optimizer, 100, 100, 100)
        folder = root / "resume" / checkpoint
        (root / "made" / checkpoint).parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True)
        most = peak(lambda: training.run([phase], folder, CPU, 1, 0))
        target = root / "data" / "checkpoints" / checkpoint
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / "product").rename(target)
        return most

    found["shared_expert_kd"] = stage("shared_expert_kd", "shared_expert", small.kd.shared_expert)
    found["moe_kd"] = stage("moe_kd", "moe", small.kd.moe)
    found["mob_kd@M"] = stage("mob_kd", "mob/M", small.kd.mob, level="M")
    unit = Unit(list(range(SAMPLES)), ["red seven"] * SAMPLES)
    for name in ("teacher", "L"):
        folder = root / small.models[name].checkpoint
        found[f"evaluate@{name}"] = peak(partial(_evaluate, root, small, folder, name == "teacher", unit))
    return found


def _evaluate(root: Path, small: Params, folder: Path, dense: bool, unit: Unit) -> None:
    generator = Generator(root, small, folder, dense)
    generator.pictures(unit)
    generator.validation(SAMPLES)


@pytest.mark.slow
def test_planned_memory_is_near_what_the_stages_really_take(
    planned: dict[str, StageCost], measured: dict[str, int]
) -> None:
    ratios = {stage: planned[stage].peak / bytes_ for stage, bytes_ in measured.items()}
    assert {stage: ratio for stage, ratio in ratios.items() if abs(ratio - 1) > WITHIN} == {}, ratios
