"""Pictures from fixed noise: the same for every batch cut; sparse transformers in a dense pipeline; prepared batches."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from moe_core import sampling, text_encoding
from moe_core.distill import predict
from moe_core.errors import CheckpointError, DataError
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.tiny_pipeline import tiny_pipeline

PROMPTS = ["a red seven", "two fours", "a nine left of a one"]
HOW = {"resolution": 16, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 8}


def test_noise_belongs_to_the_prompts_number():
    pipeline = tiny_pipeline()
    whole = sampling.start_noise(pipeline, 7, [0, 1, 2], 16)
    assert whole.shape == (3, 16, 16)
    assert torch.equal(whole[1:], sampling.start_noise(pipeline, 7, [1, 2], 16))
    assert not torch.equal(whole, sampling.start_noise(pipeline, 8, [0, 1, 2], 16))


def test_pictures_do_not_depend_on_how_prompts_are_cut():
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    whole = sampling.generate(pipeline, PROMPTS, [0, 1, 2], 0, **HOW)
    parts = [sampling.generate(pipeline, [prompt], [number], 0, **HOW) for number, prompt in enumerate(PROMPTS)]
    assert whole.shape == (3, 16, 16, 3)
    assert whole.dtype == np.uint8
    # Another batch size is another matrix product: a rounding of the last of 256 levels may differ.
    assert np.abs(whole.astype(int) - np.concatenate(parts).astype(int)).max() <= 1


def test_each_prompt_needs_its_number():
    with pytest.raises(ValueError, match="3 prompts and 1 numbers"):
        sampling.generate(tiny_pipeline(), PROMPTS, [0], 0, **HOW)


def test_a_sparse_transformer_takes_the_dense_ones_place(tmp_path: Path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "teacher")
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    moe = {"num_experts": 12, "top_k": 2, "shared_ratio": 1.0, "normal_ratio": 0.25}
    FluxMoETransformer2DModel(**config, moe=moe).save_pretrained(tmp_path / "sparse")
    dense = sampling.load_pipeline(tmp_path / "teacher")
    sparse = sampling.load_pipeline(tmp_path / "teacher", tmp_path / "sparse")
    assert isinstance(dense, FluxPipeline)
    assert not isinstance(dense.transformer, FluxMoETransformer2DModel)
    assert isinstance(sparse.transformer, FluxMoETransformer2DModel)
    assert sampling.generate(sparse, PROMPTS[:1], [0], 0, **HOW).shape == (1, 16, 16, 3)


def test_folders_that_are_no_models_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        sampling.load_pipeline(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: the checkpoint lacks this file"):
        sampling.load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet"}))
    with pytest.raises(CheckpointError, match="_class_name 'UNet'; it must be one of FluxTransformer2DModel"):
        sampling.load_transformer(tmp_path)


def test_a_prepared_batch_holds_what_the_pipeline_would_feed():
    pipeline = tiny_pipeline()
    latents, drawn = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    batch = sampling.prepare_batch(pipeline, latents, PROMPTS[:2], drawn, torch.tensor([0.2, 0.9]), 3.5, 8)
    text, pooled, text_ids = pipeline.encode_prompt(PROMPTS[:2], None, max_sequence_length=8)
    assert torch.allclose(batch.prompt_embeds, text, atol=1e-6)
    assert torch.allclose(batch.pooled, pooled, atol=1e-6)
    assert torch.equal(batch.txt_ids, text_ids)
    assert batch.img_ids.shape == (16, 3)
    assert batch.guidance is not None
    assert batch.guidance.tolist() == [3.5, 3.5]
    assert torch.equal(FluxPipeline._unpack_latents(batch.latents, 16, 16, 2), latents)
    with torch.no_grad():
        pipeline.transformer(
            hidden_states=batch.noisy, timestep=batch.sigma, encoder_hidden_states=batch.prompt_embeds,
            pooled_projections=batch.pooled, guidance=batch.guidance, img_ids=batch.img_ids, txt_ids=batch.txt_ids,
        )  # fmt: skip


def test_a_prompt_is_encoded_the_same_alone_and_in_company():
    alone, _, _ = text_encoding.encode_prompts(tiny_pipeline(), PROMPTS[:1], 8)
    company, _, _ = text_encoding.encode_prompts(tiny_pipeline(), PROMPTS[::-1], 8)
    assert torch.equal(alone[0], company[2])


def test_a_sharded_encoder_runs_once_for_all_prompts_and_keeps_none(monkeypatch: pytest.MonkeyPatch):
    pipeline, calls = tiny_pipeline(), []
    monkeypatch.setattr(text_encoding, "is_sharded", lambda module: module is pipeline.text_encoder_2)
    monkeypatch.setattr(text_encoding, "_encode", partial(_noted, text_encoding._encode, calls))
    for _ in range(2):
        together = text_encoding.encode_prompts(pipeline, PROMPTS, 8)
    assert calls == [list(PROMPTS)] * 2
    assert pipeline not in text_encoding._CACHES
    for found, alone in zip(together, text_encoding.encode_prompts(tiny_pipeline(), PROMPTS, 8), strict=True):
        torch.testing.assert_close(found, alone)


def _noted(encode, calls, pipeline, captions, length):
    calls.append(captions)
    return encode(pipeline, captions, length)


def test_no_more_tokens_are_encoded_than_asked_for():
    pipeline = tiny_pipeline()
    assert text_encoding.encode_prompts(pipeline, PROMPTS, 4)[0].shape[1] == 4
    longest = pipeline.tokenizer_2.model_max_length
    assert text_encoding.encode_prompts(pipeline, PROMPTS, 512)[0].shape[1] == min(longest, 512)


def test_the_prompt_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline()
    monkeypatch.setattr(text_encoding, "CACHE_BYTES", 1)
    text_encoding.encode_prompts(pipeline, PROMPTS, 8)
    assert len(text_encoding._CACHES[pipeline].entries) == 1


def test_a_batch_of_a_wide_bucket_has_the_positions_of_its_patches():
    pipeline = tiny_pipeline()
    latents = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    drawn = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    batch = sampling.prepare_batch(pipeline, latents, PROMPTS[:2], drawn, torch.tensor([0.3, 0.6]), 3.5, 8)
    assert batch.latents.shape == (2, 2 * 4, 16)
    assert batch.img_ids[:, 1:].tolist() == [[y, x] for y in range(2) for x in range(4)]
    # Token 5 is the patch in row 1, column 1.
    assert torch.equal(batch.latents[0, 5], latents[0, :, 2:4, 2:4].reshape(-1))
    assert predict(pipeline.transformer, batch).shape == batch.latents.shape


def test_stored_text_is_taken_and_must_have_the_length_that_is_asked_for():
    pipeline = tiny_pipeline()
    latents = torch.zeros(1, 4, 4, 4)
    text, pooled, _ = text_encoding.encode_prompts(pipeline, PROMPTS[:1], 8)
    batch = sampling.prepare_batch(
        pipeline, latents, ["another caption"], latents, torch.tensor([0.5]), 3.5, 8, (text, pooled)
    )
    assert torch.equal(batch.prompt_embeds, text)
    assert torch.equal(batch.pooled, pooled)
    with pytest.raises(DataError, match=f"have {text.shape[1]} tokens; model.max_sequence_length asks for 4"):
        sampling.prepare_batch(pipeline, latents, ["x"], latents, torch.tensor([0.5]), 3.5, 4, (text, pooled))
