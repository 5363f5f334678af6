"""GenEval's own rules (Ghosh et al. 2023): its prompts, and whether a picture's detections show what a prompt asks for.

- The rules are those of djghosh13/geneval evaluation/evaluate_images.py, odd ones included: a bystander is no fault unless the prompt
  excludes it, only the surest `count` objects of a class are looked at for colour and position, and an object that has the wrong
  colour is no target of a position. `moe_core.metrics.geneval` has stricter rules, for pictures where a bystander is a fault.
- Detections may be of any kind: Mask2Former's (`geneval_detector`), or cells of a scene with boxes in pixels.
- A colour may be looked up only when it is asked for.
- Overall score: the mean of the six tasks' shares of right pictures (`Measure.over_kinds`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_core.errors import DataError
from moe_core.metrics.scorer import Prompt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3
"""A detection counts if it is surer than this"""
COUNTING_THRESHOLD = 0.9
"""the same for prompts of the tag `counting`"""
MOST_OBJECTS = 16
"""of a class: the surest"""
POSITION_THRESHOLD = 0.1
"""Share of both objects' sizes by which their centres must differ more"""
_LEAST_SHARE = 0.5
"""of the offset's direction, for a relation to hold; both axes reach it between 30 and 60 degrees"""
_ITEM_KEYS = {"class", "count", "color", "position"}

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, from the upper left; the far edges are outside, as of a picture's crop"""


@dataclass(frozen=True)
class Detection:
    """One object found."""

    name: str
    """class in GenEval's spelling: "tv remote" """
    box: Box
    score: float = 1.0
    """confidence, 0 to 1; 1 of a detector that has none"""
    colour: str | Callable[[], str] | None = None
    """or what tells it when it is asked for; None where it is not known"""


@dataclass(frozen=True)
class Verdict:
    """Of one picture."""

    correct: bool
    reason: str
    """each fault in a few words; "as asked" where there is none"""


def verdict(record: Mapping[str, Any], detections: Sequence[Detection]) -> Verdict:
    """Whether the detections show what the record {tag, include, exclude?} asks for.

    Detections that are not sure enough for the record's tag do not count. Raises DataError for a record that breaks a rule of
    `read_prompts`, or where a colour is asked for and not known.
    """
    check_record(record)
    objects = _sure(detections, COUNTING_THRESHOLD if record["tag"] == "counting" else THRESHOLD)
    faults: list[str] = []
    groups: list[list[Detection] | None] = []
    for item in record["include"]:
        group = objects.get(item["class"], [])[: item["count"]]
        wrong = _wrong(item, group, record["include"], groups)
        if wrong:
            faults.append(f"{item['class']}: {wrong}")
        groups.append(None if wrong else group)
    for item in record.get("exclude", ()):
        found = len(objects.get(item["class"], []))
        if found >= item["count"]:
            faults.append(f"{item['class']}: {found} found, and there must be fewer than {item['count']}")
    return Verdict(not faults, "; ".join(faults) or "as asked")


def check_record(record: Mapping[str, Any]) -> None:
    """Raises DataError for a record that the rules cannot judge."""
    fault = _fault(record)
    if fault:
        raise DataError(f"GenEval record {dict(record)!r}: {fault}")


def relations(here: Box, there: Box) -> frozenset[str]:
    """How `here` lies to `there`: none, one, or two of RELATIONS.

    On each axis the centres' offset is shortened by POSITION_THRESHOLD of both sizes; what is left must be more than half of the whole
    offset's length.
    """
    offsets, left = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (here[low] + here[high] - there[low] - there[high]) / 2
        reach = POSITION_THRESHOLD * (abs(here[high] - here[low]) + abs(there[high] - there[low]))
        offsets.append(offset)
        left.append(math.copysign(max(abs(offset) - reach, 0.0), offset))
    if all(abs(rest) < 1e-3 for rest in left):
        return frozenset()
    x, y = (rest / math.hypot(*offsets) for rest in left)
    held = (x < -_LEAST_SHARE, x > _LEAST_SHARE, y < -_LEAST_SHARE, y > _LEAST_SHARE)
    return frozenset(name for name, holds in zip(RELATIONS, held, strict=True) if holds)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file like GenEval's evaluation_metadata.jsonl: a record {tag, include, exclude?, prompt} a line.

    Ids are the lines' numbers from 0 in five digits, as the official scripts name their folders; the kind is the tag.
    Raises DataError, with file and line, for an unknown tag, position or colour, a record without objects, a position that points at no
    earlier object, a line that is twice there, or one that is no record.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file; it must be GenEval's evaluation_metadata.jsonl")
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        where = f"{path}, line {number + 1}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is no JSON ({error}); it must be a record {{tag, include, prompt}}") from None
        fault = _fault(record) or _file_fault(record)
        if fault:
            raise DataError(f"{where}: {fault}")
        key = json.dumps(record, sort_keys=True)
        if key in seen:
            raise DataError(f"{where} repeats line {seen[key] + 1}; a prompt would count twice")
        seen[key] = number
        prompts.append(Prompt(f"{number:05d}", record["prompt"], record["tag"], record))
    if not prompts:
        raise DataError(f"{path} has no prompts; it must have one a line")
    return prompts


def _sure(detections: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """The detections that count, by class, the surest first."""
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: -d.score):
        if found.score > threshold:
            objects.setdefault(found.name, []).append(found)
    return {name: found[:MOST_OBJECTS] for name, found in objects.items()}


def _wrong(
    item: Mapping[str, Any],
    group: Sequence[Detection],
    include: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Detection] | None],
) -> str:
    """What is wrong with an item's objects, in words; "" if nothing is. `groups` are those of the items before it."""
    count = item["count"]
    if len(group) < count:
        return f"{len(group)} of {count} found"
    if "color" in item:
        colours = [_colour(found) for found in group]
        if colours.count(item["color"]) < count:
            return f"{colours.count(item['color'])} of {count} {item['color']}, the colours are {', '.join(colours)}"
    if "position" in item:
        relation, target = item["position"]
        there = groups[target]
        name = include[target]["class"]
        if there is None:
            return f"the {name} that it should be {relation} is not as asked"
        for a in group:
            for b in there:
                true = relations(a.box, b.box)
                if relation not in true:
                    held = " and ".join(sorted(true)) or "at the same place as"
                    return f"not {relation} the {name} but {held} it"
    return ""


def _colour(found: Detection) -> str:
    colour = found.colour() if callable(found.colour) else found.colour
    if colour is None:
        raise DataError(f"a colour is asked for, and that of the {found.name} at {found.box} is not known")
    return colour


def _fault(record: Any) -> str:
    """The rule that a record breaks, in words; "" if none."""
    if not isinstance(record, Mapping):
        return f"is {record!r}; it must be a record {{tag, include, prompt}}"
    if record.get("tag") not in TAGS:
        return f"tag is {record.get('tag')!r}; it must be one of {', '.join(TAGS)}"
    include, exclude = record.get("include"), record.get("exclude", [])
    if not isinstance(include, list) or not include:
        return f"include is {include!r}; it must list the objects, one at least"
    if not isinstance(exclude, list):
        return f"exclude is {exclude!r}; it must list objects"
    for item in (*include, *exclude):
        if not isinstance(item, Mapping) or not isinstance(item.get("class"), str):
            return f"an object is {item!r}; it must be {{class, count, color?, position?}}"
        if set(item) - _ITEM_KEYS:
            return f"an object has {', '.join(sorted(set(item) - _ITEM_KEYS))}; it may have {', '.join(sorted(_ITEM_KEYS))}"
        if type(item.get("count")) is not int or item["count"] < 1:
            return f"count of {item['class']} is {item.get('count')!r}; it must be a whole number from 1"
    for item in exclude:
        if set(item) != {"class", "count"}:
            return (
                f"the excluded {item['class']} has {', '.join(sorted(item))}; GenEval excludes by class and count alone"
            )
    for number, item in enumerate(include):
        fault = _position_fault(item["position"], number) if "position" in item else ""
        if fault:
            return f"position of {item['class']} is {item['position']!r}; {fault}"
    return ""


def _position_fault(position: Any, number: int) -> str:
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        return f"it must be one of {', '.join(RELATIONS)} and the number of an object"
    if type(position[1]) is not int or not 0 <= position[1] < number:
        return f"the number must be that of an earlier object, and this is object {number}"
    return ""


def _file_fault(record: Mapping[str, Any]) -> str:
    """What a prompt's record needs more than one that is only judged."""
    if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        return f"prompt is {record.get('prompt')!r}; it must be a text"
    for item in record["include"]:
        if item.get("color", COLOURS[0]) not in COLOURS:
            return f"color of {item['class']} is {item['color']!r}; it must be one of {', '.join(COLOURS)}"
    return ""
