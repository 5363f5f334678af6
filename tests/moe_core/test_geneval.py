"""The verdict on hand-made detections, and the aggregation by kind."""

from __future__ import annotations

from typing import Any

import pytest

from moe_core.errors import DataError
from moe_core.metrics import geneval
from moe_core.metrics.scene_detector import Detection


def _found(*objects: tuple[str, str, int, int]) -> list[Detection]:
    return [Detection(name, colour, row, column, 1.0) for name, colour, row, column in objects]


def _record(*include: dict[str, Any]) -> dict[str, Any]:
    return {"tag": "x", "include": list(include), "prompt": ""}


SEVEN = {"class": "seven", "count": 1}
THREE = {"class": "three", "count": 1}
RED_SEVEN = {**SEVEN, "color": "red"}
BLUE_THREE = {**THREE, "color": "blue"}
LEFT = {**SEVEN, "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("include", "found", "right"),
    [
        ([SEVEN], [("seven", "red", 0, 0)], True),
        ([SEVEN], [], False),
        ([SEVEN], [("three", "red", 0, 0)], False),
        ([SEVEN], [("seven", "red", 0, 0), ("three", "red", 1, 0)], False),
        (
            [{"class": "seven", "count": 3}],
            [("seven", "red", 0, 0), ("seven", "blue", 0, 1), ("seven", "red", 1, 1)],
            True,
        ),
        ([{"class": "seven", "count": 3}], [("seven", "red", 0, 0), ("seven", "blue", 0, 1)], False),
        ([RED_SEVEN], [("seven", "green", 0, 0)], False),
        ([RED_SEVEN, BLUE_THREE], [("three", "blue", 1, 1), ("seven", "red", 0, 1)], True),
        ([RED_SEVEN, BLUE_THREE], [("three", "red", 1, 1), ("seven", "blue", 0, 1)], False),
        # Two of a class in two colours: the order of the detections must not matter.
        ([RED_SEVEN, {**SEVEN, "color": "blue"}], [("seven", "blue", 0, 0), ("seven", "red", 0, 1)], True),
        ([RED_SEVEN, {**SEVEN, "color": "blue"}], [("seven", "red", 0, 0), ("seven", "red", 0, 1)], False),
        ([THREE, LEFT], [("seven", "red", 0, 0), ("three", "red", 0, 1)], True),
        ([THREE, LEFT], [("seven", "red", 0, 1), ("three", "red", 0, 0)], False),
        ([THREE, LEFT], [("seven", "red", 1, 0), ("three", "red", 0, 1)], True),
        ([THREE, LEFT], [("seven", "red", 0, 0), ("three", "red", 1, 0)], False),
        ([THREE, {**SEVEN, "position": ["below", 0]}], [("seven", "red", 1, 0), ("three", "red", 0, 0)], True),
        ([THREE, {**SEVEN, "position": ["above", 0]}], [("seven", "red", 1, 0), ("three", "red", 0, 0)], False),
    ],
)
def test_verdict(include: list[dict[str, Any]], found: list[tuple[str, str, int, int]], right: bool):
    assert geneval.is_correct(_record(*include), _found(*found)) is right


def test_overall_is_the_mean_of_the_kinds():
    tags = ["colors"] * 4 + ["position"]
    verdicts = [True, True, True, False, False]
    result = geneval.aggregate([{"tag": tag} for tag in tags], verdicts)
    assert result["by_kind"] == {"colors": 0.75, "position": 0.0}
    assert result["overall"] == pytest.approx(0.375)
    assert result["counts"] == {"colors": 4, "position": 1}


def test_faults_are_named():
    with pytest.raises(DataError, match="2 records and 1 verdicts"):
        geneval.aggregate([{"tag": "x"}] * 2, [True])
    with pytest.raises(DataError, match="no 'include'"):
        geneval.is_correct({"tag": "x"}, [])
    record = _record(THREE, {**SEVEN, "position": ["beside", 0]})
    with pytest.raises(DataError, match="'beside'"):
        geneval.is_correct(record, _found(("seven", "red", 0, 0), ("three", "red", 0, 1)))
