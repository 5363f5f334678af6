"""The small pipeline is an ordinary FluxPipeline: it is saved, loaded, and its tokenizers know the scenes' words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from moe_core import small_flux
from moe_core.data.embedded import make_prompts
from moe_core.text_training import ENCODERS
from tests.moe_core.test_embedded import _config
from tests.moe_core.tiny_pipeline import tiny_pipeline

PARTS = ("vae", "text_encoder", "text_encoder_2", "transformer")


def test_equal_seeds_give_equal_pipelines_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = tiny_pipeline(0), tiny_pipeline(0), tiny_pipeline(1)
    assert torch.equal(torch.get_rng_state(), before)
    for part in PARTS:
        weights = [getattr(pipeline, part).state_dict() for pipeline in (first, second, other)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def test_every_word_of_a_prompt_is_one_token():
    pipeline = tiny_pipeline()
    for record in make_prompts(_config(), 0, 60):
        words = record["prompt"].split()
        assert [token.removesuffix("</w>") for token in pipeline.tokenizer.tokenize(record["prompt"])] == words
        assert [token.removeprefix("▁") for token in pipeline.tokenizer_2.tokenize(record["prompt"])] == words


def test_a_saved_pipeline_makes_the_same_picture(tmp_path: Path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path)
    pictures = []
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        arguments = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "np"}
        pictures.append(each(["a red seven", "two fours"], generator=noise, **arguments).images)
    assert pictures[0].shape == (2, 16, 16, 3)
    assert (pictures[0] == pictures[1]).all()


def test_the_sampler_runs_from_1_to_1_over_steps_without_a_shift():
    scheduler = tiny_pipeline().scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_finished_parts_are_put_in_without_a_trace_of_where_they_lay(tmp_path: Path):
    finished, written = tiny_pipeline(seed=1), []
    for name in ("here", "there"):
        finished.vae.save_pretrained(tmp_path / name / "vae")
        for part in ENCODERS:
            getattr(finished, part).save_pretrained(tmp_path / name / "text" / part)
        pipeline = tiny_pipeline(seed=0)
        small_flux.put_finished(pipeline, tmp_path / name / "vae", tmp_path / name / "text")
        for part in ("vae", *ENCODERS):
            loaded, given = getattr(pipeline, part), getattr(finished, part)
            assert not any(weight.requires_grad for weight in loaded.parameters())
            assert all(torch.equal(weight, given.state_dict()[key]) for key, weight in loaded.state_dict().items())
        pipeline.save_pretrained(tmp_path / name / "pipeline")
        files = sorted(file for file in (tmp_path / name / "pipeline").rglob("*") if file.is_file())
        written.append({str(file.relative_to(tmp_path / name)): file.read_bytes() for file in files})
    assert written[0] == written[1]
