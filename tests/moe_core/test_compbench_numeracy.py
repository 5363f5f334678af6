"""The numbers asked for, and the score on hand-made boxes."""

from __future__ import annotations

import pytest

from moe_core.errors import DataError
from moe_core.metrics import compbench_numeracy as numeracy
from moe_core.metrics.open_detector import Box, Detection

PLURALS = numeracy.parse_plurals("Cup - cups\nfish - fish\nboy - boys\nship - ships\nlemon - lemons\nmouse - mice\n")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("eight cups", [("cup", 8)]),
        ("one fish", [("fish", 1)]),
        ("four fish", [("fish", 4)]),
        ("two boys, one cup and five lemons", [("boy", 2), ("cup", 1), ("lemon", 5)]),
        ("a cup, three ships, and a lemon were in the pantry", [("cup", 1), ("ship", 3), ("lemon", 1)]),
        # A number before an unknown thing is passed over.
        ("three mice shared a burger", [("mouse", 3)]),
        # Asked twice is asked twice.
        ("one cup and two cups", [("cup", 1), ("cup", 2)]),
        # A plural after "one" is one of it.
        ("one cups", [("cup", 1)]),
    ],
)
def test_counts(text: str, counts: list[tuple[str, int]]):
    assert numeracy.parse_counts(text, PLURALS) == counts


@pytest.mark.parametrize(("text", "message"), [("many cups", "asks for no number"), ("two cup", "it must be 'cups'")])
def test_wrong_counts_are_errors(text: str, message: str):
    with pytest.raises(DataError, match=message):
        numeracy.parse_counts(text, PLURALS)


@pytest.mark.parametrize("text", ["cup", "cup - ", " - cups", "a - b - c"])
def test_wrong_plurals_are_errors(text: str):
    with pytest.raises(DataError, match="line 1 is"):
        numeracy.parse_plurals(text)


def _at(x: float, name: str = "cup", score: float = 0.5) -> Detection:
    return Detection(name, score, (x, 0, x + 49, 49))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ((0, 0, 99, 99), (0, 0, 99, 99), True),
        # 91 of 100 columns are common: 0.91 of either.
        ((0, 0, 99, 99), (9, 0, 108, 99), True),
        # 90 of 100 is not above 0.9.
        ((0, 0, 99, 99), (10, 0, 109, 99), False),
        # A small one within a large one.
        ((0, 0, 99, 99), (20, 20, 29, 29), True),
        ((0, 0, 9, 9), (100, 100, 109, 109), False),
    ],
)
def test_same_thing(a: Box, b: Box, same: bool):
    assert numeracy.same_thing(a, b) is same
    assert numeracy.same_thing(b, a) is same


@pytest.mark.parametrize(
    ("counts", "found", "expected"),
    [
        ([("cup", 2)], [_at(0), _at(100)], 1.0),
        ([("cup", 2)], [_at(0)], 0.5),
        ([("cup", 2)], [_at(0), _at(100), _at(200)], 0.5),
        ([("cup", 2)], [], 0.0),
        # The third is the first again.
        ([("cup", 2)], [_at(0), _at(100), _at(1)], 1.0),
        # In the same place, but another name.
        ([("cup", 1), ("lemon", 1)], [_at(0), _at(0, "lemon")], 1.0),
        # Of three: one right (1/3), one of the wrong number (1/6), one not there.
        ([("cup", 1), ("lemon", 2), ("mouse", 3)], [_at(0), _at(100, "lemon")], 0.5),
        # Boys and men are persons; ships are boats.
        ([("boy", 2)], [_at(0, "person"), _at(100, "person")], 1.0),
        ([("ship", 1), ("painting", 1), ("goldfish", 1)], [_at(0, "boat"), _at(99, "picture"), _at(200, "fish")], 1.0),
        ([("ship", 1)], [_at(0, "ship")], 0.0),
    ],
)
def test_score(counts: list[tuple[str, int]], found: list[Detection], expected: float):
    assert numeracy.score(counts, found) == pytest.approx(expected)
