"""Pictures of one model in Ray actors: the same as in process, and two evaluations beside each other that both want the whole machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moe_core.config import Params, parse
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import RejectCount
from tasks import generation
from tasks.generation import Made, Unit
from tests.moe_core.tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")

ROOT = Path(__file__).resolve().parents[2]
UNITS = [Unit([0, 1], ["a red seven", "two fours"]), Unit([2], ["a nine left of a one"])]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a teacher and validation shards."""
    tiny_pipeline().save_pretrained(tmp_path / "data" / "teacher")
    shards = tmp_path / "data" / "shards"
    shards.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = [LatentRow(f"k{i}", torch.randn(4, 8, 8, generator=generator), "a red seven", {}) for i in range(6)]
    write_manifest(shards, {"val": [write_shard(shards, "val", 0, (16, 16), rows)]}, RejectCount(), {})
    return tmp_path


def made(root: Path, workers: int) -> Made:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=workers, cpus_per_worker=1)
    values["model"]["num_inference_steps"] = 2
    return generation.make((root, parse(Params, values), root, True), UNITS, 4, lambda done, of: None)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_two_evaluations_that_each_want_the_whole_machine_both_end(root: Path) -> None:
    alone = made(root, 0)
    with ThreadPoolExecutor(2) as both:
        beside = list(both.map(lambda _: made(root, 2), range(2)))
    for found in beside:
        for one, two in zip(alone.pictures, found.pictures, strict=True):
            assert np.array_equal(one.images, two.images)
        assert replace(found, pictures=[]) == replace(alone, pictures=[])
