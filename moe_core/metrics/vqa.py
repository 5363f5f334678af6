"""BLIP-VQA of transformers: what a picture shows, asked in words.

- Two ways to ask. `answer` writes an answer, word by word (greedy); `yes_probability` compares the decoder's first word: yes or no.
- The question starts with BLIP's own [ENC], as in Salesforce's code; transformers leaves BERT's [CLS] there.
- Only questions of the same length are asked together, so that none is padded. transformers' BLIP drops the mask by which the answer
  would pass over padding (in 5.23; BLIP's own `generate` does so too): an answer would depend on the longest question of its batch.
- A picture that is asked about several times in a call is encoded once.

Source: Li et al. 2022 (BLIP), salesforce/BLIP models/blip_vqa.py; Karine-Huang/T2I-CompBench BLIPvqa_eval/models/blip_vqa.py `vqa_prob`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from moe_core.errors import DataError
from moe_core.metrics.loading import load_model, load_part
from moe_core.metrics.scorer import Asset

ASSET = Asset(
    key="blip_vqa",
    what="BLIP-VQA, Salesforce/blip-vqa-capfilt-large",
    files=("config.json", "model.safetensors", "preprocessor_config.json"),
)
MAX_QUESTION_TOKENS = 35
"""Of a question, [ENC] and [SEP] among them; what is longer is cut. BLIP's own limit."""
MAX_ANSWER_TOKENS = 9
"""BLIP's limit is 10 with the start token."""
BATCH = 16
"""Questions at once."""


_T = TypeVar("_T")


class BlipVQA:
    """Answers questions on pictures."""

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, device: torch.device) -> None:
        """Of a `BlipForQuestionAnswering` with its tokenizer and image processor.

        Raises DataError where the tokenizer lacks yes or no as words, or the model lacks BLIP's two start tokens.
        """
        text = model.config.text_config
        self._model, self._image_processor, self._device = model.to(device).eval(), image_processor, device
        self._tokenizer = tokenizer
        self._start = text.bos_token_id
        # Salesforce's tokenizer is BERT's with two more: [DEC], which transformers calls bos, and after it [ENC].
        self._question_start = self._start + 1
        self._end, self._pad = text.sep_token_id, text.pad_token_id
        if self._question_start >= text.vocab_size:
            raise DataError(
                f"the BLIP model's bos_token_id is {self._start} of {text.vocab_size} tokens; there must be one more after it, [ENC]"
            )
        self._yes, self._no = (self._word(word) for word in ("yes", "no"))

    @classmethod
    def load(cls, folder: str, device: torch.device) -> BlipVQA:
        """From a folder or hub id in transformers' format with safetensors. Raises Unloadable, or DataError where weights are missing."""
        from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

        model = load_model(BlipForQuestionAnswering, folder, "BLIP")
        # Pillow resizes as BLIP's own code does; torchvision would differ in the last digit.
        image_processor = load_part(AutoImageProcessor, folder, backend="pil")
        return cls(model, load_part(AutoTokenizer, folder), image_processor, device)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """An answer a question, in small letters and without special tokens: "yes", "two", "on the table".

        `images` [n] are RGB; the i-th question is asked of the i-th. Greedy, where BLIP's own code takes the best of three beams.
        Raises DataError where the two are not equally many.
        """

        def read(states: Tensor) -> list[str]:
            tokens = self._model.text_decoder.generate(
                input_ids=self._starts(states),
                attention_mask=torch.ones_like(self._starts(states)),
                encoder_hidden_states=states,
                max_new_tokens=MAX_ANSWER_TOKENS,
                do_sample=False,
                num_beams=1,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            )
            # The start token is none of the tokenizer's.
            texts = self._tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)
            return [text.strip() for text in texts]

        return self._ask(images, questions, read)

    @torch.inference_mode()
    def yes_probability(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the answer's first word, a number a question; T2I-CompBench rounds it to four places.

        Raises DataError where pictures and questions are not equally many.
        """

        def read(states: Tensor) -> list[float]:
            logits = self._model.text_decoder(
                input_ids=self._starts(states), encoder_hidden_states=states, use_cache=False
            ).logits[:, 0]
            shares: list[float] = (logits[:, self._yes] - logits[:, self._no]).float().sigmoid().tolist()
            return shares

        return self._ask(images, questions, read)

    def _ask(
        self, images: Sequence[Image.Image], questions: Sequence[str], read: Callable[[Tensor], list[_T]]
    ) -> list[_T]:
        """What `read` makes of the question encoder's states [b, t, width], in the questions' order."""
        if len(images) != len(questions):
            raise DataError(
                f"there are {len(images)} images and {len(questions)} questions; each question needs its own"
            )
        if not questions:
            return []
        distinct = list({id(image): image for image in images}.values())
        places = {id(image): place for place, image in enumerate(distinct)}
        seen = torch.cat([self._see(distinct[first : first + BATCH]) for first in range(0, len(distinct), BATCH)])
        tokens = self._tokenizer(list(questions), truncation=True, max_length=MAX_QUESTION_TOKENS)["input_ids"]
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, ids in enumerate(tokens):
            by_length[len(ids)].append(number)
        answers: dict[int, _T] = {}
        for numbers in by_length.values():
            for first in range(0, len(numbers), BATCH):
                part = numbers[first : first + BATCH]
                states = self._encode([tokens[n] for n in part], seen[[places[id(images[n])] for n in part]])
                answers.update(zip(part, read(states), strict=True))
        return [answers[number] for number in range(len(questions))]

    def _see(self, images: Sequence[Image.Image]) -> Tensor:
        """The image encoder's states [b, p, width]."""
        pixels = self._image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        states: Tensor = self._model.vision_model(pixels["pixel_values"].to(self._device)).last_hidden_state
        return states

    def _encode(self, tokens: Sequence[Sequence[int]], seen: Tensor) -> Tensor:
        """The question encoder's states [b, t, width] of equally long questions."""
        ids = torch.tensor(tokens, device=self._device)
        ids[:, 0] = self._question_start
        states: Tensor = self._model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        return states

    def _starts(self, states: Tensor) -> Tensor:
        return torch.full((len(states), 1), self._start, dtype=torch.long, device=self._device)

    def _word(self, word: str) -> int:
        found = self._tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(found) != 1 or found[0] == self._tokenizer.unk_token_id:
            raise DataError(f"the BLIP tokenizer has no word '{word}'; a VQA model's must")
        return int(found[0])
