"""The text encoders learn their captions' order: targets against plain loops, learning, and what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, T5EncoderModel

from moe_core.data.embedded import make_prompts
from moe_core.errors import DataError
from moe_core.text_training import TextTrainee, neighbouring
from tests.moe_core.test_embedded import _config
from tests.moe_core.tiny_pipeline import tiny_pipeline

WORDS = 2


def _trainee() -> TextTrainee:
    captions = [record["prompt"] for record in make_prompts(_config(), 0, 600)]
    return TextTrainee(tiny_pipeline(), 8, WORDS, captions[:500], captions[500:], seed=3)


def test_neighbours_are_those_of_plain_loops():
    ids = torch.tensor([[5, 6, 7, 1, 0, 0], [8, 1, 0, 0, 0, 0]])
    found = neighbouring(ids, WORDS, pad=0)
    for row, line in enumerate(ids.tolist()):
        for place, token in enumerate(line):
            for offset in range(-WORDS, WORDS + 1):
                there = place + offset
                expected = line[there] if token != 0 and 0 <= there < len(line) else -100
                assert found[row, place, offset + WORDS] == expected, (row, place, offset)


def test_order_is_learnt_and_every_weight_gets_a_gradient():
    trainee = _trainee()
    optimizer = torch.optim.AdamW(trainee.module.parameters(), lr=1e-2, weight_decay=0.0)
    before = trainee.validate()
    touched: set[str] = set()
    for step in range(200):
        trainee.module(trainee.batch(range(step * 32, step * 32 + 32)))["loss"].backward()
        named = trainee.module.named_parameters()
        touched |= {name for name, weight in named if weight.grad is not None and weight.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert touched == {name for name, _ in trainee.module.named_parameters()}
    after = trainee.validate()
    for encoder in ("t5", "clip"):
        assert before[f"{encoder}_accuracy"] < 0.2
        assert after[f"{encoder}_accuracy"] > 0.8
    assert trainee.validate() == after


def test_a_batch_is_a_function_of_its_positions():
    whole, half = _trainee().batch(range(8, 16)), _trainee().batch(range(12, 16))
    for name, ids in half.items():
        assert torch.equal(whole[name][4:], ids), name


def test_the_product_is_both_encoders(tmp_path: Path):
    trainee = _trainee()
    trainee.save(tmp_path)
    batch = trainee.batch(range(4))
    with torch.no_grad():
        clip = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")(batch["clip_ids"]).pooler_output
        t5 = T5EncoderModel.from_pretrained(tmp_path / "text_encoder_2")(batch["t5_ids"])[0]
        assert torch.equal(clip, trainee.module.text_encoder(batch["clip_ids"]).pooler_output)
        assert torch.equal(t5, trainee.module.text_encoder_2(batch["t5_ids"])[0])


def test_no_captions_are_refused():
    with pytest.raises(DataError, match="0 captions to train the text encoders on and 1 to validate them"):
        TextTrainee(tiny_pipeline(), 8, WORDS, [], ["a seven"], seed=3)
