"""Pictures of one model in Ray actors: the same as in process, and two evaluations beside each other that both want the whole machine."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from moe_core.config import Params, parse
from moe_core.data.embedded import captions_vocabulary
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import RejectCount
from moe_core.errors import CheckpointError
from moe_core.small_flux import build_pipeline
from tasks import generation
from tasks.generation import Made, Unit
from tests.moe_core.tiny_pipeline import SIZES, tiny_config, tiny_pipeline

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


def made(root: Path, workers: int, model: Path | None = None) -> Made:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=workers, cpus_per_worker=1)
    values["model"]["num_inference_steps"] = 2
    return generation.make((root, parse(Params, values), model or root, model is None), UNITS, 4, lambda done, of: None)


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


def test_a_dense_model_with_fewer_blocks_is_evaluated_as_any_other(root: Path) -> None:
    """As FLUX.1-Lite is: the teacher's own blocks, 8 of 19 double ones; here 1 of 3."""
    teacher = build_pipeline(
        tiny_config(transformer={**SIZES["transformer"], "num_layers": 3}), captions_vocabulary(), 0
    )
    shutil.rmtree(root / "data" / "teacher")
    teacher.save_pretrained(root / "data" / "teacher")
    lite = FluxTransformer2DModel.from_config({**teacher.transformer.config, "num_layers": 1})
    lite.load_state_dict({name: teacher.transformer.state_dict()[name] for name in lite.state_dict()})
    lite.save_pretrained(root / "lite")
    dense, found = made(root, 0), made(root, 0, Path("lite"))
    assert found.cost["params"]["total"] == found.cost["params"]["activated"] == lite.num_parameters()
    assert found.cost["flops"] < dense.cost["flops"]
    assert dense.validation["distill"] == 0 < found.validation["distill"]
    assert not np.array_equal(found.pictures[0].images, dense.pictures[0].images)
    assert all(not unit.experts and not unit.blocks for unit in found.pictures)
    # A file that lacks a block is no such model.
    file = root / "lite" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".ff." not in name}, file)
    with pytest.raises(
        CheckpointError, match=r"lack 4 tensors of the model, first transformer_blocks.0.ff.net.0.proj.bias"
    ):
        made(root, 0, Path("lite"))
