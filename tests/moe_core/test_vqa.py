"""BLIP-VQA on a small random model: against a plain reference without batches, caches or generation code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BlipForQuestionAnswering

from moe_core.errors import DataError
from moe_core.metrics import vqa
from moe_core.metrics.vqa import BlipVQA
from tests.moe_core import faulty_weights
from tests.moe_core.tiny_blip import DEC, ENC, SIZE, VOCABULARY, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def blip(folder: str) -> BlipVQA:
    return BlipVQA.load(folder, torch.device("cpu"))


def _picture(seed: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


PICTURES = [_picture(0), _picture(1, (64, 33)), _picture(2, (20, 50))]
QUESTIONS = [
    "red ?",
    "is there a very old small dog on the left of the red ball and a blue cat in the picture ?",
    "Is there a Dog?",
]


class _Plain:
    """One picture, one question, no cache."""

    def __init__(self, folder: str) -> None:
        self._model = BlipForQuestionAnswering.from_pretrained(folder).eval()

    @torch.no_grad()
    def logits(self, image: Image.Image, question: str, said: list[int]) -> torch.Tensor:
        """Of the next token."""
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        spread = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3) / 255
        seen = self._model.vision_model(((pixels - mean) / spread).permute(2, 0, 1)[None]).last_hidden_state
        words = question.lower().replace("?", " ?").split()
        ids = torch.tensor([[ENC, *(VOCABULARY.index(word) for word in words), VOCABULARY.index("[SEP]")]])
        states = self._model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        decoder = self._model.text_decoder
        return decoder(torch.tensor([[DEC, *said]]), encoder_hidden_states=states, use_cache=False).logits[0, -1]

    def yes(self, image: Image.Image, question: str) -> float:
        shares = self.logits(image, question, []).softmax(0)
        yes, no = shares[VOCABULARY.index("yes")], shares[VOCABULARY.index("no")]
        return float(yes / (yes + no))

    def answer(self, image: Image.Image, question: str) -> str:
        said: list[int] = []
        while len(said) < 9:
            token = int(self.logits(image, question, said).argmax())
            if token == VOCABULARY.index("[SEP]"):
                break
            said.append(token)
        # The tokenizer writes its question marks without a space before them.
        return " ".join(VOCABULARY[token] for token in said if 5 <= token < DEC).replace(" ?", "?")


@pytest.fixture(scope="module")
def plain(folder: str) -> _Plain:
    return _Plain(folder)


def test_yes_probability_is_that_of_each_alone(blip: BlipVQA, plain: _Plain):
    expected = [plain.yes(image, question) for image, question in zip(PICTURES, QUESTIONS, strict=True)]
    assert blip.yes_probability(PICTURES, QUESTIONS) == pytest.approx(expected, rel=1e-4)
    assert max(expected) - min(expected) > 0.01
    # The picture matters, not only the question.
    same = blip.yes_probability(PICTURES, [QUESTIONS[2]] * 3)
    assert max(same) - min(same) > 1e-4


def test_answer_is_that_of_each_alone(blip: BlipVQA, plain: _Plain):
    # All pairs in one batch: each question is padded to the longest, each picture comes three times.
    pairs = [(image, question) for image in PICTURES for question in QUESTIONS]
    expected = [plain.answer(image, question) for image, question in pairs]
    assert blip.answer([image for image, _ in pairs], [question for _, question in pairs]) == expected
    assert len(set(expected)) > 2
    alone = [blip.answer([image], [question])[0] for image, question in pairs]
    assert alone == expected


def test_padding_and_order_do_not_matter(blip: BlipVQA, monkeypatch: pytest.MonkeyPatch):
    images = PICTURES * 3
    questions = [QUESTIONS[i] for i in (0, 1, 2, 1, 2, 0, 2, 0, 1)]
    whole = blip.yes_probability(images, questions)
    monkeypatch.setattr(vqa, "BATCH", 2)
    assert blip.yes_probability(images, questions) == pytest.approx(whole, rel=1e-4)
    assert blip.yes_probability(images[::-1], questions[::-1])[::-1] == pytest.approx(whole, rel=1e-4)


def test_long_questions_are_cut(blip: BlipVQA):
    long = " ".join(["red"] * 60)
    # [ENC], 33 words, [SEP]
    cut = blip.yes_probability(PICTURES[:2], [long, " ".join(["red"] * 33)])
    assert cut[0] == pytest.approx(blip.yes_probability(PICTURES[:1], [" ".join(["red"] * 33)])[0], rel=1e-4)
    assert cut[0] != pytest.approx(blip.yes_probability(PICTURES[:1], [" ".join(["red"] * 32)])[0], rel=1e-4)


def test_nothing_asked_nothing_said(blip: BlipVQA):
    assert blip.answer([], []) == []
    assert blip.yes_probability([], []) == []


def test_a_model_without_all_its_weights_is_refused(folder: str, tmp_path: Path):
    place = faulty_weights.without(folder, tmp_path / "a", "text_decoder.cls.predictions.bias")
    with pytest.raises(DataError, match=r"of BLIP's weights, as text_decoder\.cls\.predictions\.bias"):
        BlipVQA.load(place, torch.device("cpu"))


def test_faults_are_named(blip: BlipVQA, tmp_path: Path):
    with pytest.raises(DataError, match="3 images and 2 questions"):
        blip.yes_probability(PICTURES, QUESTIONS[:2])
    with pytest.raises(DataError, match="3 images and 2 questions"):
        blip.answer(PICTURES, QUESTIONS[:2])
    without = [word for word in VOCABULARY if word != "no"]
    with pytest.raises(DataError, match="no word 'no'"):
        BlipVQA.load(save(tmp_path / "a", without, len(without) + 2), torch.device("cpu"))
    with pytest.raises(DataError, match=r"one more after it, \[ENC\]"):
        BlipVQA.load(save(tmp_path / "b", VOCABULARY, len(VOCABULARY) + 1), torch.device("cpu"))
