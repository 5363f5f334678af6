"""The phrases asked, and their product. spaCy's part runs where spaCy is installed; no trained pipeline is needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import compbench_bvqa
from moe_core.metrics.scorer import MissingAsset, Prompt, Sample


@pytest.mark.parametrize(
    ("phrases", "asked"),
    [
        (["a green bench", "a blue bowl"], ["a green bench?", "a blue bowl?"]),
        # Only the bare places go.
        (
            ["the left", "a car", "top", "the right", "the side", "the top", "The left"],
            ["a car?", "the top?", "the left?"],
        ),
        (["A cubic Rubik's cube"], ["a cubic rubik's cube?"]),
        (["11:44", 'a "small" (cat).'], ["1144?", "a small cat?"]),
        ([f"thing {i}" for i in range(10)], [f"thing {i}?" for i in range(8)]),
        # The ninth phrase counts again if one before it goes.
        (["top", *(f"thing {i}" for i in range(8))], [f"thing {i}?" for i in range(8)]),
        ([" ".join(["word"] * 60)], [" ".join(["word"] * 50)]),
        ([], []),
    ],
)
def test_questions(phrases: list[str], asked: list[str]):
    assert compbench_bvqa.questions(phrases) == asked


class _Chunk:
    def __init__(self, text: str) -> None:
        self.text = text


class _English:
    """Stands in for spaCy where it is not installed: noun chunks by a table."""

    def __init__(self, chunks: dict[str, list[str]]) -> None:
        self._chunks, self.parsed = chunks, []

    def __call__(self, text: str) -> Any:
        self.parsed.append(text)
        doc = type("Doc", (), {})()
        doc.noun_chunks = map(_Chunk, self._chunks[text])
        return doc


class _Answerer:
    """Answers by a table of the picture's colour and the question; BLIP-VQA is tested in its own module's tests."""

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self._table = table

    def yes_probability(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
        names = {(255, 0, 0): "red", (0, 0, 255): "blue"}
        return [self._table[names[i.getpixel((0, 0))], q] for i, q in zip(images, questions, strict=True)]


RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


def test_a_row_is_the_product_over_its_own_phrases():
    english = _English({"a cat and a dog": ["a cat", "a dog"], "a cup": ["a cup"]})
    table = {("red", "a cat?"): 0.5, ("red", "a dog?"): 0.25, ("blue", "a cat?"): 1.0, ("blue", "a dog?"): 0.75}
    scorer = compbench_bvqa.BVqaScorer(_Answerer(table | {("red", "a cup?"): 0.125}), english)
    pair, cup = Prompt("color/1", "a cat and a dog", "color"), Prompt("shape/1", "a cup", "shape")
    other = Prompt("complex/1", "anything", "complex")
    rows = scorer.score([Sample(pair, 0, RED), Sample(other, 0, RED), Sample(cup, 0, RED), Sample(pair, 1, BLUE)])
    assert [row["bvqa"] for row in rows] == pytest.approx([0.125, math.nan, 0.125, 0.75], nan_ok=True)
    assert english.parsed == ["a cat and a dog", "a cup"]
    assert all(math.isnan(row["bvqa"]) for row in scorer.score([Sample(other, 0, RED)]))


def test_a_prompt_without_phrases_is_an_error():
    scorer = compbench_bvqa.BVqaScorer(_Answerer({}), _English({"go": [], "left": ["the left"]}))
    for text in ("go", "left"):
        with pytest.raises(DataError, match=f"no noun phrase in '{text}'"):
            scorer.score([Sample(Prompt("color/1", text, "color"), 0, RED)])


def test_without_spacy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(MissingAsset, match="pip install spacy"):
        compbench_bvqa.load_english("en_core_web_sm")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pipeline_that_is_not_there(tmp_path: Path):
    spacy = pytest.importorskip("spacy")
    with pytest.raises(MissingAsset, match=r"eval\.models\.spacy_english is 'no_such_pipeline'.*spacy download"):
        compbench_bvqa.load_english("no_such_pipeline")
    spacy.blank("en").to_disk(tmp_path / "english")
    assert [token.text for token in compbench_bvqa.load_english(str(tmp_path / "english"))("a cat")] == ["a", "cat"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_spacys_noun_chunks_are_asked():
    """A parse made by hand, of a sentence with all that matters: an article, an adjective, and a place that goes."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc

    vocab = spacy.blank("en").vocab
    rows = [
        ("a", 2, "det", "DET"),
        ("green", 2, "amod", "ADJ"),
        ("bench", 2, "ROOT", "NOUN"),
        ("on", 2, "prep", "ADP"),
        ("the", 5, "det", "DET"),
        ("left", 3, "pobj", "NOUN"),
        ("of", 5, "prep", "ADP"),
        ("a", 9, "det", "DET"),
        ("blue", 9, "amod", "ADJ"),
        ("bowl", 6, "pobj", "NOUN"),
    ]
    words, heads, deps, tags = (list(column) for column in zip(*rows, strict=True))

    def english(text: str) -> Doc:
        assert text == " ".join(words)
        return Doc(vocab, words=words, heads=heads, deps=deps, pos=tags)

    table = {("red", "a green bench?"): 0.5, ("red", "a blue bowl?"): 0.5}
    scorer = compbench_bvqa.BVqaScorer(_Answerer(table), english)
    assert scorer.score([Sample(Prompt("color/1", " ".join(words), "color"), 0, RED)]) == [{"bvqa": 0.25}]
