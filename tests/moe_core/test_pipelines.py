"""Any diffusers text-to-image pipeline makes pictures from seeds of their own: FLUX, Stable Diffusion and PixArt of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from moe_core import pipelines
from moe_core.errors import CheckpointError, EvaluationError
from moe_core.pipeline_source import PipelineSource
from tests.moe_core.other_pipelines import CAPTIONS, save_pixart, save_stable_diffusion
from tests.moe_core.tiny_pipeline import tiny_pipeline

# NumPy 2 on diffusers' DPM-Solver, which PixArt has.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

CPU = torch.device("cpu")
ARGUMENTS = {
    "height": 16,
    "width": 16,
    "num_inference_steps": 2,
    "guidance_scale": 3.5,
    "max_sequence_length": 8,
    "not_of_any_call": 1,
}
SEEDS = [5, 2**63 - 1, 7]


def save_flux(folder: Path) -> Path:
    tiny_pipeline().save_pretrained(folder)
    return folder


KINDS: dict[str, tuple[Callable[[Path], Path], type]] = {
    "flux": (save_flux, FluxPipeline),
    "stable_diffusion": (save_stable_diffusion, StableDiffusionPipeline),
    "pixart": (save_pixart, PixArtAlphaPipeline),
}


@pytest.fixture(scope="module", params=list(KINDS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    save, kind = KINDS[request.param]
    pipeline = pipelines.load(PipelineSource(str(save(tmp_path_factory.mktemp(request.param)))), CPU)
    assert type(pipeline) is kind
    return pipeline


def paint(pipeline: Any, prompts: list[str], seeds: list[int]) -> np.ndarray:
    return pipelines.paint(pipeline, prompts, seeds, ARGUMENTS)


def test_pictures_are_of_their_prompts_and_seeds(loaded: Any) -> None:
    made = paint(loaded, CAPTIONS, SEEDS)
    assert made.shape == (3, 16, 16, 3)
    assert made.dtype == np.uint8
    assert made.std() > 0
    assert np.array_equal(paint(loaded, CAPTIONS, SEEDS), made)
    assert not np.array_equal(paint(loaded, CAPTIONS[:1], [6])[0], made[0])
    # What else is drawn from in this process, and in what order and batch, changes no noise.
    torch.manual_seed(99)
    back = paint(loaded, CAPTIONS[::-1], SEEDS[::-1])[::-1]
    alone = np.concatenate([paint(loaded, [prompt], [seed]) for prompt, seed in zip(CAPTIONS, SEEDS, strict=True)])
    for other in (back, alone):
        # Rounding of another batch may cross a level; another noise is far away.
        assert np.abs(other.astype(int) - made).max() <= 1


def test_the_prompt_is_read(loaded: Any) -> None:
    texts: list[list[str]] = []
    encode = loaded.encode_prompt

    def spied(prompt: Any, *arguments: Any, **more: Any) -> Any:
        texts.append(prompt)
        return encode(prompt, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded, "encode_prompt", spied)
        paint(loaded, CAPTIONS, SEEDS)
    assert texts == [CAPTIONS]


def test_a_weight_that_is_no_number_is_named_by_its_prompt(tmp_path: Path) -> None:
    folder = save_flux(tmp_path / "broken")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    broken = pipelines.load(PipelineSource(str(folder)), CPU)
    with pytest.raises(EvaluationError, match="the picture of 'a red seven' has values that are not numbers"):
        paint(broken, CAPTIONS, SEEDS)


def test_only_one_of_several_pictures_is_no_number() -> None:
    class Pipeline:
        def __call__(self, prompt: list[str], generator: list[torch.Generator], output_type: str) -> Any:
            images = np.full((len(prompt), 4, 4, 3), 0.5, np.float32)
            images[1, 0, 0, 0] = np.inf
            return SimpleNamespace(images=images)

    made: Any = Pipeline()
    with pytest.raises(EvaluationError, match="the picture of 'two green fours'"):
        paint(made, CAPTIONS, SEEDS)


def test_a_picture_that_a_safety_checker_has_blackened_is_named(tmp_path: Path) -> None:
    class Checker(torch.nn.Module):
        """Finds the second picture unsafe. A real one is a CLIP of a gigabyte; the pipeline that asks it is real."""

        device, dtype = CPU, torch.float32

        def forward(self, images: np.ndarray, clip_input: torch.Tensor) -> tuple[np.ndarray, list[bool]]:
            return images, [number == 1 for number in range(len(images))]

    pipeline: Any = pipelines.load(PipelineSource(str(save_stable_diffusion(tmp_path))), CPU)
    pipeline.safety_checker = Checker()
    pipeline.feature_extractor = lambda images, return_tensors: SimpleNamespace(
        to=lambda device: SimpleNamespace(pixel_values=torch.zeros(len(images), 3, 8, 8))
    )
    with pytest.raises(EvaluationError, match="safety checker has blackened the picture of 'two green fours'"):
        paint(pipeline, CAPTIONS, SEEDS)


def test_seeds_must_be_as_many_as_prompts(loaded: Any) -> None:
    with pytest.raises(ValueError, match="3 prompts and 2 seeds"):
        paint(loaded, CAPTIONS, SEEDS[:2])


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json; it must be a diffusers pipeline folder"):
        pipelines.load(PipelineSource(str(tmp_path)), CPU)
    with pytest.raises(
        CheckpointError, match=r"nowhere cannot be loaded .*must be a diffusers pipeline folder or hub id"
    ):
        pipelines.load(PipelineSource(str(tmp_path / "nowhere")), CPU)
    folder = save_stable_diffusion(tmp_path / "sd")
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError, match=r"sd cannot be loaded"):
        pipelines.load(PipelineSource(str(folder)), CPU)


def test_a_pipeline_that_takes_no_prompt_is_named(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a DDIMPipeline, whose call takes no prompt"):
        pipelines.load(PipelineSource(str(tmp_path)), CPU)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        pipelines.load(PipelineSource(str(folder)), CPU)


def test_our_transformers_have_no_place_in_another_pipeline(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "sd")
    source = PipelineSource(str(folder), transformer=tmp_path / "moe")
    with pytest.raises(CheckpointError, match=r"sd is no FluxPipeline; the transformer .*moe has no place in it"):
        pipelines.load(source, CPU)


def test_precision_and_steps_are_as_asked_for(tmp_path: Path) -> None:
    folder = save_flux(tmp_path)
    pipeline: Any = pipelines.load(PipelineSource(str(folder), precision="bf16"), CPU)
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.bfloat16}
    calls = []
    pipeline.transformer.register_forward_hook(lambda *a: calls.append(1))
    pipelines.paint(pipeline, CAPTIONS[:1], [0], {**ARGUMENTS, "num_inference_steps": 3, "guidance_scale": None})
    assert len(calls) == 3
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
