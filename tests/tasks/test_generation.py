"""Pictures and inspections of one model: the same by any number of workers, kept after a kill, and two stages beside each other that both
want the whole machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from moe_core import convert, small_flux
from moe_core.config import ComputeConfig, Params, parse
from moe_core.data.embedded import captions_vocabulary
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import RejectCount
from moe_core.errors import CheckpointError, EvaluationError
from moe_core.metrics.scorer import Prompt
from moe_core.pipeline_source import PipelineSource
from tasks import generation, inspection
from tasks.inspection import Inspector
from tasks.suites import Picture
from tests.moe_core.small_models import make_level, make_mob, make_moe, make_scores
from tests.moe_core.tiny_pipeline import SIZES, tiny_config, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a red seven", "two fours", "a nine left of a one"]
ARGUMENTS = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
    "max_sequence_length": 8,
}
# Two of each prompt, in units of four, the last of two.
PICTURES = [
    Picture(Prompt(f"p{number}", text), number, index, seed=100 * number + index)
    for number, text in enumerate(TEXTS)
    for index in range(2)
]
SIZE = 4


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline that no test changes."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with a teacher of three double blocks, and validation shards."""
    teacher = small_flux.build_pipeline(
        tiny_config(transformer={**SIZES["transformer"], "num_layers": 3}), captions_vocabulary(), 0
    )
    teacher.save_pretrained(tmp_path / "data" / "teacher")
    shards = tmp_path / "data" / "shards"
    shards.mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = [LatentRow(f"k{i}", torch.randn(4, 8, 8, generator=generator), "a red seven", {}) for i in range(6)]
    write_manifest(shards, {"val": [write_shard(shards, "val", 0, (16, 16), rows)]}, RejectCount(), {})
    return tmp_path


def silent(done: int, count: int, rate: float) -> None:
    """Tells nobody."""


def params_of(workers: int) -> Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["compute"].update(num_workers=workers, cpus_per_worker=1)
    values["model"]["num_inference_steps"] = 2
    values["eval"]["batch_size"] = 4
    return parse(Params, values)


def make(place: Path, folder: Path, compute: ComputeConfig, told: Callable[..., None] = silent) -> dict[str, bytes]:
    """Makes PICTURES; returns every file that is in their folder then."""
    source = PipelineSource(str(place), arguments=ARGUMENTS)
    generation.make(source, generation.units(folder, PICTURES, SIZE), compute, told)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_there_is_not_made_again_and_what_is_missing_is(
    pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig]
) -> None:
    events: list[tuple[int, int]] = []

    def told(done: int, count: int, rate: float) -> None:
        assert rate > 0
        events.append((done, count))

    whole = make(pipeline, tmp_path / "a", compute(0), told)
    assert sorted(whole) == [
        "00000-00.png",
        "00000-01.png",
        "00001-00.png",
        "00001-01.png",
        "00002-00.png",
        "00002-01.png",
    ]
    assert len(set(whole.values())) == 6
    assert events == [(4, 6), (6, 6)]
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    assert make(tmp_path / "there is none, and it is not loaded", tmp_path / "a", compute(0)) == whole
    (tmp_path / "a" / "00002-01.png").unlink()
    # What a kill left of a file that was being written.
    (tmp_path / "a" / ".00002-01.png.partial").write_bytes(b"half")
    events.clear()
    assert make(pipeline, tmp_path / "a", compute(0), told) == whole
    assert events == [(6, 6)]
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    # A unit is made as a whole: its batch decides the last bits.
    assert {name for name in times if again[name] == times[name]} == {name for name in times if name < "00002"}


def test_a_picture_is_of_its_seed(pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig]) -> None:
    """Of the prompt and the seed alone: the order and the cut into units change rounding at most."""
    whole = make(pipeline, tmp_path / "a", compute(0))
    source = PipelineSource(str(pipeline), arguments=ARGUMENTS)
    generation.make(source, generation.units(tmp_path / "b", PICTURES[::-1], 1), compute(0), silent)
    for name in whole:
        one, other = (Image.open(tmp_path / folder / name) for folder in "ab")
        assert one.size == (16, 16)
        assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_two_evaluations_that_each_want_the_whole_machine_both_end_with_the_same_pictures(
    pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig]
) -> None:
    alone = make(pipeline, tmp_path / "alone", compute(0))
    with ThreadPoolExecutor(2) as both:
        beside = list(both.map(lambda name: make(pipeline, tmp_path / name, compute(2)), "ab"))
    assert beside == [alone, alone]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_one_worker_makes_what_two_have_left_over(
    pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig]
) -> None:
    by_two = make(pipeline, tmp_path / "a", compute(2))
    assert make(pipeline, tmp_path / "b", compute(1)) == by_two
    (tmp_path / "a" / "00000-01.png").unlink()
    assert make(pipeline, tmp_path / "a", compute(1)) == by_two


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_pictures_that_are_no_numbers_are_named_and_the_good_ones_stay(
    pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig], workers: int
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    whole = make(pipeline, tmp_path / "a", compute(0))
    (tmp_path / "a" / "00002-00.png").unlink()
    with pytest.raises(EvaluationError, match="the picture of 'a nine left of a one' has values that are not numbers"):
        make(broken, tmp_path / "a", compute(workers))
    assert {file.name for file in (tmp_path / "a").iterdir()} == set(whole) - {"00002-00.png"}


KILLED = """
import sys
from pathlib import Path
from moe_core.config import ComputeConfig
from tests.tasks.test_generation import make
def told(done, count, rate):
    print(done, flush=True)
    sys.stdin.read()
make(Path(sys.argv[1]), Path(sys.argv[2]), ComputeConfig(num_workers=0, cpus_per_worker=1, checkpoint_every=1, log_every=1), told)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_after_its_first_unit_it_goes_on_with_the_second(
    pipeline: Path, tmp_path: Path, compute: Callable[..., ComputeConfig]
) -> None:
    whole = make(pipeline, tmp_path / "whole", compute(0))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(pipeline), str(tmp_path / "cut")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4\n"
        os.kill(process.pid, signal.SIGKILL)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cut").iterdir()}
    assert len(before) == 4
    time.sleep(0.01)
    assert make(pipeline, tmp_path / "cut", compute(0)) == whole
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before} == before


def report(root: Path, workers: int, model: Path | None = None) -> dict[str, Any]:
    return inspection.inspect(root, params_of(workers), model or root, model is None, TEXTS)


def lite_of(root: Path) -> FluxTransformer2DModel:
    """The teacher's own blocks, one of three double ones, in root/lite."""
    teacher = FluxTransformer2DModel.from_pretrained(root / "data" / "teacher" / "transformer", low_cpu_mem_usage=False)
    lite = FluxTransformer2DModel.from_config({**teacher.config, "num_layers": 1})
    lite.load_state_dict({name: teacher.state_dict()[name] for name in lite.state_dict()})
    lite.save_pretrained(root / "lite")
    return lite


def test_a_dense_model_with_fewer_blocks_is_inspected_as_any_other(root: Path) -> None:
    """As FLUX.1-Lite is: the teacher's own blocks, 8 of 19 double ones; here 1 of 3."""
    lite = lite_of(root)
    dense, found = report(root, 0), report(root, 0, Path("lite"))
    assert found["params"]["total"] == found["params"]["activated"] == lite.num_parameters()
    assert found["flops"] < dense["flops"]
    assert dense["kd_loss"] == 0 < found["kd_loss"]
    assert not found["expert_use"]
    assert not found["block_use"]
    assert json.loads(json.dumps(found)) == found
    # A file that lacks a block is no such model.
    file = root / "lite" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".ff." not in name}, file)
    with pytest.raises(
        CheckpointError, match=r"lack 4 tensors of the model, first transformer_blocks.0.ff.net.0.proj.bias"
    ):
        report(root, 0, Path("lite"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(180)
def test_an_inspection_by_an_actor_says_the_same(root: Path) -> None:
    lite_of(root)
    assert report(root, 2, Path("lite")) == report(root, 0, Path("lite"))


def test_an_inspector_tells_what_the_routers_of_a_sparse_model_choose(root: Path) -> None:
    dense = FluxTransformer2DModel.from_pretrained(root / "data" / "teacher" / "transformer", low_cpu_mem_usage=False)
    moe = convert.to_moe_joint(dense, make_scores(dense), make_moe())
    level = make_level({"blocks": [[1, 2]]})
    convert.to_mob(moe, level, make_mob()).save_pretrained(root / "sparse")
    inspector = Inspector(root, params_of(0), Path("sparse"), dense=False)
    found = inspector.routing(TEXTS)
    assert inspector.routing(TEXTS) == found
    steps, blocks = 2, found["block_use_by_timestep"]["transformer_blocks.1-2"]
    assert [sum(step) for step in blocks] == [1] * steps
    assert [len(step) for step in blocks] == [2] * steps
    experts = found["expert_use"]
    assert {len(shares) for shares in experts.values()} == {12}
    assert [sum(shares) for shares in experts.values()] == pytest.approx([1] * len(experts))
    # Over all steps it is the mean of the steps', as each has as many choices where the block is not one of a group.
    name = "single_transformer_blocks.0.moe"
    by_step = found["expert_use_by_timestep"][name]
    assert experts[name] == pytest.approx([sum(step) / steps for step in zip(*by_step, strict=True)])
    cost = inspector.cost()["params"]
    assert cost["activated"] < cost["total"]
