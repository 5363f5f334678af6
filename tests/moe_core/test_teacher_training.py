"""The two trainees: batches are functions of the position, every weight gets a gradient, losses fall, products load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from moe_core import teacher_training
from moe_core.config import TimestepConfig
from moe_core.data.embedded import make_scene
from moe_core.errors import DataError
from moe_core.teacher_training import FlowTrainee, LatentCaptions, VAETrainee
from tests.moe_core.test_embedded import _config
from tests.moe_core.tiny_pipeline import tiny_pipeline


def _scenes(count: int) -> tuple[torch.Tensor, list[str]]:
    scenes = [make_scene(_config(), 0, index) for index in range(count)]
    return torch.stack([torch.from_numpy(scene.image) for scene in scenes]), [scene.prompt for scene in scenes]


def _vae_trainee() -> VAETrainee:
    images, _ = _scenes(24)
    return VAETrainee(tiny_pipeline().vae, 1e-6, images[:16], images[16:], seed=3)


def _flow_trainee() -> FlowTrainee:
    pipeline = tiny_pipeline()
    images, captions = _scenes(24)
    latents = teacher_training.encode(pipeline.vae, images)
    train, validation = LatentCaptions(latents[:16], captions[:16]), LatentCaptions(latents[16:], captions[16:])
    return FlowTrainee(pipeline, 3.5, 8, train, validation, TimestepConfig(), seed=3)


@pytest.mark.parametrize("build", [_vae_trainee, _flow_trainee])
def test_a_batch_is_a_function_of_its_positions(build: type[VAETrainee] | type[FlowTrainee]):
    trainee, again = build(), build()
    whole, half = trainee.batch(range(8, 16)), again.batch(range(12, 16))
    for name, value in half.items():
        expected = whole[name] if name == "img_ids" else whole[name][4:]
        assert torch.allclose(value, expected, atol=1e-6), name


@pytest.mark.parametrize("build", [_vae_trainee, _flow_trainee])
def test_losses_fall_and_every_weight_gets_a_gradient(build: type[VAETrainee] | type[FlowTrainee]):
    trainee = build()
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=3e-3)
    before = trainee.validate()["loss"]
    touched: set[str] = set()
    for step in range(20):
        trainee.module(trainee.batch(range(step * 8, step * 8 + 8)))["loss"].backward()
        named = trainee.module.named_parameters()
        touched |= {name for name, weight in named if weight.grad is not None and weight.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert touched == {name for name, _ in trainee.module.named_parameters()}
    assert trainee.validate()["loss"] < before
    assert trainee.validate() == trainee.validate()
    assert trainee.module.training


def test_the_vae_is_saved_with_latents_of_unit_scale(tmp_path: Path):
    trainee = _vae_trainee()
    trainee.save(tmp_path)
    latents = teacher_training.encode(AutoencoderKL.from_pretrained(tmp_path), trainee.images)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)


def test_the_product_is_a_whole_pipeline(tmp_path: Path):
    _flow_trainee().save(tmp_path)
    assert isinstance(FluxPipeline.from_pretrained(tmp_path), FluxPipeline)


def test_wrong_pictures_and_captions_are_refused():
    vae = tiny_pipeline().vae
    good = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"must be uint8 \[N, S, S, 3\]"):
        VAETrainee(vae, 0.0, good.float(), good, seed=0)
    with pytest.raises(DataError, match="0 pictures"):
        VAETrainee(vae, 0.0, good[:0], good, seed=0)
    with pytest.raises(DataError, match="2 latents and 1 captions"):
        LatentCaptions(torch.zeros(2, 4, 8, 8), ["a"])
