"""T2I-CompBench++'s numeracy score, over boxes of any detector.

- Of n things asked, each gives 1/(2n) for being there and 1/(2n) for its exact number.
- Boxes of one name that nearly agree, or lie within each other, are counted once.

Source: Karine-Huang/T2I-CompBench, UniDet_eval/numeracy_eval.py; the things and their plurals are its examples/dataset/new_objects.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from moe_core.errors import DataError
from moe_core.metrics.open_detector import Box, Detection

NUMBERS = {
    "a": 1,
    "an": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
}
SOUGHT = {
    "boy": "person",
    "girl": "person",
    "man": "person",
    "woman": "person",
    "ship": "boat",
    "goldfish": "fish",
    "painting": "picture",
}
"""thing -> what the detector is asked for: UniDet's classes, kept so that the score is as lenient"""
SAME = 0.9
"""IoU, or share of either box that is common, above which two boxes of a name are one thing"""


def parse_plurals(text: str) -> dict[str, str]:
    """Singular -> plural of the lines "cup - cups". Raises DataError for another line."""
    plurals: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        singular, _, plural = (part.strip().lower() for part in line.partition(" - "))
        if not singular or not plural or not line.count(" - ") == 1:
            raise DataError(f"line {number} is {line!r}; it must be '<singular> - <plural>'")
        plurals.setdefault(singular, plural)
    return plurals


def parse_counts(text: str, plurals: Mapping[str, str]) -> list[tuple[str, int]]:
    """(thing, how many) in the order of the prompt: each known thing right after a number word.

    A number before any other word is passed over ("shared a burger"), as in the official script. Raises DataError if nothing is left, or
    for a singular after a number above one.
    """
    singulars = {plural: singular for singular, plural in plurals.items()}
    words = re.findall(r"\w+|[^\w\s]", text)
    counts = []
    for number, word in pairwise(words):
        if number not in NUMBERS:
            continue
        if NUMBERS[number] == 1 and word in plurals:
            counts.append((word, 1))
        elif word in singulars:
            counts.append((singulars[word], NUMBERS[number]))
        elif word in plurals:
            raise DataError(f"{text!r} has {number!r} before {word!r}; it must be {plurals[word]!r}")
    if not counts:
        raise DataError(f"{text!r} asks for no number of a known thing")
    return counts


def sought(thing: str) -> str:
    """What the detector is asked for."""
    return SOUGHT.get(thing, thing)


def same_thing(a: Box, b: Box) -> bool:
    """Whether two boxes are one thing. Sides count their last pixel, as in the official script."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    common = width * height
    area_a, area_b = _area(a), _area(b)
    return max(common / (area_a + area_b - common), common / area_a, common / area_b) > SAME


def distinct(found: Sequence[Detection]) -> list[Detection]:
    """Without those that are the same thing as an earlier one of their name."""
    kept: list[Detection] = []
    for detection in found:
        if not any(other.name == detection.name and same_thing(detection.box, other.box) for other in kept):
            kept.append(detection)
    return kept


def score(counts: Sequence[tuple[str, int]], found: Sequence[Detection]) -> float:
    """A picture's score, 0 to 1, of detections in UniDet's frame (`compbench_spatial.to_frame`), best first."""
    names = [detection.name for detection in distinct(found)]
    total = 0.0
    for thing, number in counts:
        seen = names.count(sought(thing))
        total += 0.5 * (seen > 0) + 0.5 * (seen == number)
    return total / len(counts)


def _area(box: Box) -> float:
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
