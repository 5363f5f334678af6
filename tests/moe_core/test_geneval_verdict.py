"""GenEval's rules on hand-made detections, each verdict worked out by hand; the reader on hand-made files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moe_core.errors import DataError
from moe_core.metrics import aggregate
from moe_core.metrics.geneval_verdict import Detection, check_record, read_prompts, relations, verdict
from moe_core.metrics.scene_detector import Detection as Cell
from moe_core.metrics.scorer import Measure

CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
LEFT, MIDDLE, RIGHT = (0, 40, 20, 60), (40, 40, 60, 60), (80, 40, 100, 60)
TOP, BOTTOM = (40, 0, 60, 20), (40, 80, 60, 100)


def _record(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "x", **more}


def _one(name: str, score: float = 0.95, box: Any = MIDDLE, colour: Any = None) -> Detection:
    return Detection(name, box, score, colour)


def _counting(count: int, name: str = "cat") -> dict[str, Any]:
    return _record("counting", {"class": name, "count": count}, exclude=[{"class": name, "count": count + 1}])


SINGLE = _record("single_object", CAT)
TWO = _record("two_object", CAT, DOG)
RED_CAT = _record("colors", {**CAT, "color": "red"})
PAIR = _record("color_attr", {**CAT, "color": "red"}, {**DOG, "color": "blue"})
LEFT_OF = _record("position", DOG, {**CAT, "position": ["left of", 0]})
ABOVE = _record("position", DOG, {**CAT, "position": ["above", 0]})


@pytest.mark.parametrize(
    ("record", "found", "right", "reason"),
    [
        (SINGLE, [_one("cat")], True, "as asked"),
        (SINGLE, [], False, "cat: 0 of 1 found"),
        (SINGLE, [_one("dog")], False, "cat: 0 of 1 found"),
        # More of the class, and bystanders, are no fault.
        (SINGLE, [_one("cat"), _one("cat"), _one("dog")], True, "as asked"),
        # Surer than the threshold, not as sure.
        (SINGLE, [_one("cat", 0.3)], False, "cat: 0 of 1 found"),
        (SINGLE, [_one("cat", 0.31)], True, "as asked"),
        (TWO, [_one("dog"), _one("cat")], True, "as asked"),
        (TWO, [_one("dog")], False, "cat: 0 of 1 found"),
        (TWO, [], False, "cat: 0 of 1 found; dog: 0 of 1 found"),
        (_counting(2), [_one("cat"), _one("cat")], True, "as asked"),
        (_counting(2), [_one("cat")], False, "cat: 1 of 2 found"),
        (_counting(2), [_one("cat")] * 3, False, "cat: 3 found, and there must be fewer than 3"),
        (_counting(2), [_one("cat"), _one("cat"), _one("dog")], True, "as asked"),
        # Counting wants 0.9: here two are sure enough, ...
        (_counting(2), [_one("cat"), _one("cat"), _one("cat", 0.9)], True, "as asked"),
        # ... and here one.
        (_counting(2), [_one("cat"), _one("cat", 0.89)], False, "cat: 1 of 2 found"),
        # Without `exclude`, counting is "at least".
        (_record("counting", {"class": "cat", "count": 2}), [_one("cat")] * 3, True, "as asked"),
        # An excluded class that is there.
        (_record("single_object", CAT, exclude=[DOG]), [_one("cat"), _one("dog")], False, None),
        (_record("single_object", CAT, exclude=[DOG]), [_one("cat"), _one("dog", 0.2)], True, "as asked"),
        (RED_CAT, [_one("cat", colour="red")], True, "as asked"),
        (RED_CAT, [_one("cat", colour="blue")], False, "cat: 0 of 1 red, the colours are blue"),
        # Only the surest is looked at.
        (RED_CAT, [_one("cat", 0.5, colour="red"), _one("cat", 0.9, colour="blue")], False, None),
        (RED_CAT, [_one("cat", 0.5, colour="blue"), _one("cat", 0.9, colour="red")], True, "as asked"),
        (
            _record("colors", {"class": "cat", "count": 2, "color": "red"}),
            [_one("cat", colour="red"), _one("cat", colour="blue"), _one("cat", colour="red")],
            False,
            "cat: 1 of 2 red, the colours are red, blue",
        ),
        (PAIR, [_one("cat", colour="red"), _one("dog", colour="blue")], True, "as asked"),
        # Swapped.
        (PAIR, [_one("cat", colour="blue"), _one("dog", colour="red")], False, None),
        (PAIR, [_one("cat", colour="red"), _one("dog", colour="red")], False, "dog: 0 of 1 blue, the colours are red"),
        (LEFT_OF, [_one("cat", box=LEFT), _one("dog")], True, "as asked"),
        (LEFT_OF, [_one("cat", box=RIGHT), _one("dog")], False, "cat: not left of the dog but right of it"),
        (LEFT_OF, [_one("cat", box=TOP), _one("dog")], False, "cat: not left of the dog but above it"),
        (LEFT_OF, [_one("cat", box=MIDDLE), _one("dog")], False, "cat: not left of the dog but at the same place as it"),
        (ABOVE, [_one("cat", box=TOP), _one("dog")], True, "as asked"),
        (ABOVE, [_one("cat", box=BOTTOM), _one("dog")], False, "cat: not above the dog but below it"),
        # Both relations of a diagonal hold.
        (LEFT_OF, [_one("cat", box=(0, 0, 20, 20)), _one("dog")], True, "as asked"),
        (ABOVE, [_one("cat", box=(0, 0, 20, 20)), _one("dog")], True, "as asked"),
        (LEFT_OF, [_one("cat", box=LEFT)], False, "dog: 0 of 1 found; cat: the dog that it should be left of is not as asked"),
        (LEFT_OF, [_one("dog")], False, "cat: 0 of 1 found"),
        # Only the surest of a class is looked at, here and there.
        (LEFT_OF, [_one("cat", 0.9, RIGHT), _one("cat", 0.5, LEFT), _one("dog")], False, None),
        (LEFT_OF, [_one("cat", box=MIDDLE), _one("dog", 0.9, RIGHT), _one("dog", 0.5, LEFT)], True, "as asked"),
    ],
)  # fmt: skip
def test_verdict(record: dict[str, Any], found: list[Detection], right: bool, reason: str | None):
    told = verdict(record, found)
    assert told.correct is right
    assert reason is None or told.reason == reason
    assert (told.reason == "as asked") is right


@pytest.mark.parametrize(
    ("here", "there", "held"),
    [
        # Sizes 20 and 20: 4 pixels are taken off each axis.
        ((0, 0, 20, 20), (30, 0, 50, 20), {"left of"}),
        ((4, 0, 24, 20), (0, 0, 20, 20), set()),
        ((5, 0, 25, 20), (0, 0, 20, 20), set()),  # 1 of 5 is left: a fifth of the offset
        ((8, 0, 28, 20), (0, 0, 20, 20), set()),  # a half is not more than a half
        ((9, 0, 29, 20), (0, 0, 20, 20), {"right of"}),
        # (30, 20): length 36.06; 26 of it is right, 16 is 0.444 below.
        ((30, 20, 50, 40), (0, 0, 20, 20), {"right of"}),
        # (30, 24): length 38.42; 26 and 20, 0.677 and 0.521.
        ((30, 24, 50, 44), (0, 0, 20, 20), {"right of", "below"}),
        # Both offsets are taken off: (9, 9), length 12.7; 5 and 5, 0.39.
        ((9, 9, 29, 29), (0, 0, 20, 20), set()),
        # A large object reaches further: 0.1 * (200 + 20) = 22 of 40.
        ((-90, 0, 110, 20), (40, 0, 60, 20), set()),
        ((-40, -40, -20, -20), (0, 0, 20, 20), {"left of", "above"}),
    ],
)
def test_relations(here: Any, there: Any, held: set[str]):
    assert relations(here, there) == held
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(there, here) == {mirrored[name] for name in held}


def test_several_targets_must_all_fit():
    record = _record("position", {"class": "dog", "count": 2}, {**CAT, "position": ["left of", 0]})
    dogs = [_one("dog", box=MIDDLE), _one("dog", box=RIGHT)]
    assert verdict(record, [_one("cat", box=LEFT), *dogs]).correct
    assert not verdict(record, [_one("cat", box=(70, 40, 75, 60)), *dogs]).correct


def test_a_wrong_colour_is_no_target():
    record = _record("position", {**DOG, "color": "red"}, {**CAT, "position": ["left of", 0]})
    told = verdict(record, [_one("dog", colour="blue"), _one("cat", box=LEFT)])
    assert "cat: the dog that it should be left of is not as asked" in told.reason


def test_sixteen_of_a_class_count():
    many = [_one("cat", 0.91 + i / 1000) for i in range(40)]
    asked = _record("counting", {"class": "cat", "count": 16}, exclude=[{"class": "cat", "count": 17}])
    assert verdict(asked, many).correct
    assert verdict(_counting(17), many).reason == "cat: 16 of 17 found"


def test_colours_are_looked_up_only_when_asked_for():
    asked: list[str] = []

    def colour(name: str) -> Callable[[], str]:
        return lambda: asked.append(name) or "red"  # type: ignore[func-returns-value]

    found = [_one("cat", 0.9, colour=colour("cat")), _one("cat", 0.4, colour=colour("other")), _one("dog", 0.9)]
    assert verdict(TWO, found).correct
    assert asked == []
    assert verdict(RED_CAT, found).correct
    assert asked == ["cat"]
    with pytest.raises(DataError, match="colour is asked for, and that of the dog"):
        verdict(_record("colors", {**DOG, "color": "red"}), found)


def test_cells_of_a_scene():
    """The same rules over a grid's cells: neighbours stand left of and above each other, diagonal ones both."""

    def as_detections(*cells: Cell) -> list[Detection]:
        return [
            Detection(c.name, (8 * c.column, 8 * c.row, 8 * c.column + 8, 8 * c.row + 8), 1.0, c.color) for c in cells
        ]

    seven, three = {"class": "seven", "count": 1}, {"class": "three", "count": 1}
    record = _record("position", three, {**seven, "position": ["left of", 0]})
    low = Cell("three", "blue", 1, 1, 0.6)
    assert verdict(record, as_detections(Cell("seven", "red", 1, 0, 0.6), low)).correct
    assert verdict(record, as_detections(Cell("seven", "red", 0, 0, 0.6), low)).correct
    assert not verdict(record, as_detections(Cell("seven", "red", 0, 1, 0.6), low)).correct
    coloured = _record("color_attr", {**seven, "color": "red"}, {**three, "color": "blue"})
    assert verdict(coloured, as_detections(Cell("seven", "red", 0, 1, 0.6), low)).correct
    assert not verdict(coloured, as_detections(Cell("seven", "blue", 0, 1, 0.6), low)).correct
    assert verdict(_counting(1, "three"), as_detections(low)).correct


def test_overall_is_the_mean_of_the_tags():
    # Colours: prompts at 1/2 and 1 -> 0.75; counting: 0. Overall 0.375, not 0.5.
    measure = Measure("geneval", "correct", over_kinds=True, by_kind=True, binary=True)
    rows = [("a", "colors", True), ("a", "colors", False), ("b", "colors", True), ("b", "colors", True), ("c", "counting", False)]  # fmt: skip
    pictures = pd.DataFrame([{"id": i, "kind": k, "index": n, "correct": c} for n, (i, k, c) in enumerate(rows)])
    prompts = aggregate.by_prompt(pictures, ["correct"])
    assert aggregate.estimate(prompts, measure, 0, 10).value == pytest.approx(0.375)
    assert aggregate.by_kind(prompts, measure, 0, 10)["colors"].value == pytest.approx(0.75)


def _write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_read_prompts(tmp_path: Path):
    first = {**_counting(2), "prompt": "a photo of two cats"}
    second = {**LEFT_OF, "prompt": "a photo of a cat left of a dog"}
    prompts = read_prompts(_write(tmp_path / "metadata.jsonl", first, second))
    assert [(p.id, p.kind, p.text) for p in prompts] == [
        ("00000", "counting", "a photo of two cats"),
        ("00001", "position", "a photo of a cat left of a dog"),
    ]
    assert prompts[1].record == second
    assert verdict(prompts[1].record, [_one("cat", box=LEFT), _one("dog")]).correct


@pytest.mark.parametrize(
    ("record", "rule"),
    [
        ("{", "is no JSON"),
        ("", "is no JSON"),
        ("[]", "must be a record"),
        (_record("colours", CAT), "tag is 'colours'; it must be one of single_object"),
        ({"tag": "counting", "prompt": "x"}, "include is None; it must list the objects"),
        (_record("counting"), "include is \\[\\]"),
        (_record("colors", CAT, exclude=CAT), "exclude is {"),
        (_record("colors", {"count": 1}), "an object is"),
        (_record("colors", {**CAT, "colour": "red"}), "an object has colour; it may have class, color"),
        (_record("colors", {**CAT, "color": "grey"}), "color of cat is 'grey'; it must be one of red"),
        (_record("counting", {"class": "cat", "count": 0}), "count of cat is 0"),
        (_record("counting", {"class": "cat", "count": "two"}), "count of cat is 'two'"),
        (_record("colors", CAT, exclude=[{**DOG, "color": "red"}]), "the excluded dog has class, color, count"),
        (_record("position", DOG, {**CAT, "position": ["beside", 0]}), "position of cat is .* must be one of left of"),
        (_record("position", DOG, {**CAT, "position": ["above", 1]}), "an earlier object, and this is object 1"),
        (_record("position", DOG, {**CAT, "position": ["above", -1]}), "an earlier object"),
        (_record("position", {**CAT, "position": ["above", 0]}, DOG), "an earlier object, and this is object 0"),
        (_record("position", DOG, {**CAT, "position": "above"}), "position of cat is 'above'"),
        ({"tag": "colors", "include": [CAT]}, "prompt is None; it must be a text"),
        ({**SINGLE, "prompt": " "}, "prompt is ' '"),
        (RED_CAT, "line 2 repeats line 1"),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, record: Any, rule: str):
    path = _write(tmp_path / "metadata.jsonl", RED_CAT, record)
    with pytest.raises(DataError, match=f"metadata.jsonl, line 2.*{rule}" if "repeats" not in rule else rule):
        read_prompts(path)


def test_other_faults(tmp_path: Path):
    with pytest.raises(DataError, match="is no file; it must be GenEval's"):
        read_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="has no prompts"):
        read_prompts(_write(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="tag is None"):
        check_record({"include": [CAT]})
    with pytest.raises(DataError, match="count of cat is True"):
        verdict(_record("counting", {"class": "cat", "count": True}), [])
