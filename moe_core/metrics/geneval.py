"""A verdict stricter than GenEval's (Ghosh et al. 2023), and GenEval's aggregation, over detections of any kind.

- A picture is right if it shows exactly the objects of the record: right classes, counts, colours and positions, and
  nothing else. GenEval itself lets bystanders pass in most kinds; here the pictures are small and a bystander is a
  fault. GenEval's own rules are `moe_core.metrics.geneval_verdict`.
- Position: `["left of", i]` holds if the object's column is smaller than that of object i, whatever the rows.
- Overall score: the mean of the kinds' accuracies, not of the pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Protocol

from moe_core.errors import DataError


class Found(Protocol):
    """What the verdict needs of a detection."""

    @property
    def name(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def row(self) -> float: ...
    @property
    def column(self) -> float: ...


_RELATIONS = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def is_correct(record: Mapping[str, Any], found: Sequence[Found]) -> bool:
    """Whether the detections are just what the record asks for.

    Raises DataError for a record without `include`, or with an unknown position.
    """
    if "include" not in record:
        raise DataError(f"GenEval record {dict(record)!r} has no 'include'; it must list the objects")
    wanted = [(number, item) for number, item in enumerate(record["include"]) for _ in range(item["count"])]
    if Counter(item["class"] for _, item in wanted) != Counter(d.name for d in found):
        return False
    # At most four objects: trying every assignment is exact and cheap.
    return any(_fits(wanted, order) for order in permutations(found))


def aggregate(records: Sequence[Mapping[str, Any]], correct: Sequence[bool]) -> dict[str, Any]:
    """{"overall": mean of the kinds' accuracies, "by_kind": {tag: accuracy}, "counts": {tag: pictures}}.

    Raises DataError if there is nothing to aggregate or the lengths differ.
    """
    if len(records) != len(correct) or not records:
        raise DataError(
            f"{len(records)} records and {len(correct)} verdicts; there must be equally many, and at least one"
        )
    counts = Counter(record["tag"] for record in records)
    hits = Counter(record["tag"] for record, right in zip(records, correct, strict=True) if right)
    by_kind = {tag: hits[tag] / count for tag, count in counts.items()}
    return {"overall": sum(by_kind.values()) / len(by_kind), "by_kind": by_kind, "counts": dict(counts)}


def _fits(wanted: Sequence[tuple[int, Mapping[str, Any]]], order: Sequence[Found]) -> bool:
    """Whether each wanted object is the detection at its place in `order`."""
    by_number: dict[int, list[Found]] = {}
    for (number, item), detection in zip(wanted, order, strict=True):
        if item["class"] != detection.name or item.get("color", detection.color) != detection.color:
            return False
        by_number.setdefault(number, []).append(detection)
    for number, item in wanted:
        if "position" in item and not _stands(item["position"], by_number[number], by_number):
            return False
    return True


def _stands(position: Sequence[Any], here: Sequence[Found], by_number: Mapping[int, Sequence[Found]]) -> bool:
    relation, other = position
    if relation not in _RELATIONS or other not in by_number:
        raise DataError(
            f"position is {list(position)!r}; it must be one of {', '.join(_RELATIONS)} and the number of an"
            " included object"
        )
    return all(_RELATIONS[relation](a, b) for a in here for b in by_number[other])
