"""The questions out of a script, the grades out of answers, and a small random LLaVA that is asked both questions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import compbench_scot as scot
from moe_core.metrics import registry
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample
from tests.moe_core import faulty_weights

CPU = torch.device("cpu")

# Of the official script's form, in other words: what matters is where its strings are.
SCRIPT = r"""
import nothing_that_exists
raise SystemExit("this script must not run")
for file in files:
    prompt = "Two talk. USER: <image>\n"
    if args.cot:
        if args.category in ["color", "shape"]:
            prompt += f"Name the {args.category}. ASSISTANT:"
        elif args.category == "spatial" or args.category == "3d_spatial":
            prompt += "Say where things are. ASSISTANT:"
        elif args.category == "action":
            prompt += "Say what they do. \
                In few words. ASSISTANT:"
        elif args.category == "complex":
            prompt += "Say all. ASSISTANT:"
    prompt += outputs
    for i in range(2):
        if args.category in ["color", "shape"]:
            query = f"Is there {chunk[i]}?"
        elif args.category == "action":
            query = f"Does \"{file.split('.png')[0]}\" happen? \n Give a score."
        elif args.category == "complex":
            query = f"Does it fit {file}? Score."
        query_prompt = prompt + f"</s> USER: {query} ASSISTANT:"
        if args.category in ["action", "complex"]:
            break
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "Share_eval.py"
    path.write_text(SCRIPT)
    return path


def test_questions_are_the_scripts_words(script: Path):
    asked = scot.read_questions(script, "action")
    begin = "Two talk. USER: <image>\nSay what they do.                 In few words. ASSISTANT:"
    assert asked.first() == begin
    assert asked.second("Cats run.", "a cat {runs}") == (
        begin + 'Cats run.</s> USER: Does "a cat {runs}" happen? \n Give a score. ASSISTANT:'
    )
    assert scot.read_questions(script, "complex").second("X", "Y") == (
        "Two talk. USER: <image>\nSay all. ASSISTANT:X</s> USER: Does it fit Y? Score. ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("<image>", "picture", "0 openings, 1 descriptions and 1 gradings"),
        ('"Say all. ASSISTANT:"', "words", "1 openings, 1 descriptions and 1 gradings"),
        ('prompt += "Say all', 'prompt = "Say all', "1 openings, 0 descriptions and 1 gradings"),
        ("fit {file}?", "fit?", "1 openings, 1 descriptions and 1 gradings"),
        ("fit {file}?", "fit {file} or {file}?", "1 openings, 1 descriptions and 1 gradings"),
        ('== "complex"', '== "hard"', "1 openings, 0 descriptions and 0 gradings"),
    ],
)
def test_another_script_is_an_error(script: Path, old: str, new: str, found: str):
    script.write_text(SCRIPT.replace(old, new))
    with pytest.raises(DataError, match=f"has {found} of category 'complex'"):
        scot.read_questions(script, "complex")


def test_what_is_no_script_is_an_error(tmp_path: Path):
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text").write_text("not python at all")
    for name in ("weights", "text", "missing"):
        with pytest.raises(DataError, match=f"{name} is no Python file"):
            scot.read_questions(tmp_path / name, "action")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"score": 1, "explanation": "none"}', 0.2),
        ('{"score": 4, "explanation": "most"}', 0.8),
        ('{\n"score": "5",\n"explanation": "all"\n}', 1.0),
        # Cut off within the explanation: the end is added.
        ('{"score": 3, "explanation": "some of', 0.6),
        # Cut off elsewhere, it is no JSON even then.
        ('{"score": 3', None),
        ('{"score": 3, "explanation": "fine"', None),
        ('{"score": 6, "explanation": "x"}', None),
        ('{"score": 0, "explanation": "x"}', None),
        ('{"score": 4.0, "explanation": "x"}', None),
        ('{"score": true}', None),
        ('{"explanation": "x"}', None),
        ('Score: 4 {"score": 4}', None),
        ("[4]}", None),
        ("4", None),
        ("}", None),
        ("", None),
    ],
)
def test_grades(answer: str, expected: float | None):
    assert scot.grade(answer) == expected


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava")
    words = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "\n", *map(chr, range(32, 127))]
    letters = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    letters.decoder = decoders.Fuse()
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, num_hidden_layers=2, image_size=32, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(
            **small,
            vocab_size=len(words),
            num_hidden_layers=1,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=4,
        ),
        image_token_index=3,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        # As they come, the weights are too small for the picture to matter.
        for weight in model.parameters():
            weight *= 6
    # Vicuna's own settings ask for sampling; the scorer must not heed them.
    model.generation_config.update(do_sample=True, temperature=0.9, top_p=0.6)
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    # patch_size is left out, as in processors of older date.
    LlavaProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


RED, BLUE = (Image.new("RGB", (40, 40), colour) for colour in ("red", "blue"))
TOKENS = 12


def _speaker(folder: str) -> scot.ShareGpt4V:
    model = scot.ShareGpt4V.load(folder, CPU)
    model._most_tokens = TOKENS
    return model


@torch.inference_mode()
def _plain_words(folder: str, image: Image.Image, text: str) -> str:
    """Greedy decoding without a cache, over places that are laid out by hand: 16 patches and no class token."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokens = tokenizer(text.replace("<image>", "<image>" * 16))["input_ids"]
    start = len(tokens)
    while len(tokens) < start + TOKENS and tokens[-1] != 2:
        logits = model(
            input_ids=torch.tensor([tokens]), pixel_values=pixels(image, return_tensors="pt")["pixel_values"]
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()


def test_words_are_the_likeliest_and_of_the_picture(llava: str):
    speaker = _speaker(llava)
    texts = {
        (colour, text): speaker.say(image, text)
        for colour, image in (("red", RED), ("blue", BLUE))
        for text in ("USER: <image>\nhello ASSISTANT:", "<image>\nwhat is it?")
    }
    for (colour, text), words in texts.items():
        assert words == _plain_words(llava, RED if colour == "red" else BLUE, text)
    assert len(set(texts.values())) == 4


def test_both_questions_are_asked_of_the_model(llava: str, script: Path):
    scorer = scot.load({"sharegpt4v": llava, "compbench_share_eval": str(script)}, CPU)
    scorer._model._most_tokens = TOKENS
    prompt = Prompt("non_spatial/1", "a cat runs", "non_spatial")
    (row,) = scorer.score([Sample(prompt, 0, RED)])
    asked = scot.read_questions(script, "action")
    description = _plain_words(llava, RED, asked.first())
    answer = _plain_words(llava, RED, asked.second(description, "a cat runs"))
    # What a random model says is no JSON: a full mark, and said to be one.
    assert answer
    assert row == {"scot": 1.0, "scot_unparsed": 1.0, "scot_answer": answer}


def test_a_model_without_all_its_weights_is_refused(llava: str, tmp_path: Path):
    place = faulty_weights.without(llava, tmp_path / "a", "language_model.lm_head.weight")
    with pytest.raises(DataError, match=r"lacks 1 of ShareGPT4V's weights, as lm_head\.weight;"):
        scot.ShareGpt4V.load(place, CPU)


def test_a_folder_without_a_model_is_a_missing_asset(script: Path, tmp_path: Path):
    with pytest.raises(MissingAsset, match=r"eval\.models\.sharegpt4v is .*, which cannot be .* hold ShareGPT4V-7B"):
        registry.spec("compbench_scot").load({"sharegpt4v": str(tmp_path), "compbench_share_eval": str(script)}, CPU)


class _Scripted(scot.ShareGpt4V):
    """Says what a list has; a small model that answers in JSON cannot be had."""

    def __init__(self, *words: str) -> None:
        self._words, self.heard = list(words), []

    def say(self, image: Image.Image, text: str) -> str:
        self.heard.append(text)
        return self._words.pop(0)


def test_rows(script: Path):
    questions: dict[str, Any] = {k: scot.read_questions(script, name) for k, name in scot.OFFICIAL_NAMES.items()}
    answers = ['{"score": 4, "explanation": "x"}', "I cannot say."]
    model = _Scripted("A cat.", answers[0], "A dog.", answers[1])
    samples = [
        Sample(Prompt("non_spatial/1", "a cat runs", "non_spatial"), 0, RED),
        Sample(Prompt("color/1", "a red cat", "color"), 0, RED),
        Sample(Prompt("complex/1", "a red dog", "complex"), 0, RED),
    ]
    rows = scot.SCotScorer(model, questions).score(samples)
    assert rows[0] == {"scot": 0.8, "scot_unparsed": 0.0, "scot_answer": answers[0]}
    assert rows[2] == {"scot": 1.0, "scot_unparsed": 1.0, "scot_answer": answers[1]}
    assert math.isnan(rows[1]["scot"])
    assert rows[1].keys() == rows[0].keys()
    assert model.heard == [
        questions["non_spatial"].first(),
        questions["non_spatial"].second("A cat.", "a cat runs"),
        questions["complex"].first(),
        questions["complex"].second("A dog.", "a red dog"),
    ]
