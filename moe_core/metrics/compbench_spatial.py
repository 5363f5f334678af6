"""T2I-CompBench++'s 2D and 3D spatial scores, over boxes of any detector.

- Half of a score is the two objects' confidences, half is how well the relation holds. A single object gives at most a quarter.
- Distances are in pixels of UniDet's frame: a picture whose shorter side is 479. `frame` and `to_frame` bring boxes there.
- Depths are nearness, 0 (far) to 1. The official script takes the depth map's rows for x; here they are y, and the official way is kept
  beside it (`swapped`), for comparison with published numbers.

Source: Karine-Huang/T2I-CompBench, UniDet_eval/2D_spatial_eval.py, 3D_spatial_eval.py and experts/model_bank.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_core.errors import DataError
from moe_core.metrics.open_detector import Box, Detection, iou

RELATIONS_2D = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
)
RELATIONS_3D = ("in front of", "behind", "hidden by")
PEOPLE = ("girl", "boy", "man", "woman")
"""looked for as "person" """
DISTANCE = 150.0
"""pixels of the frame within which things are near"""
OVERLAP_2D = 0.1
"""IoU up to which left, right, top and bottom count in full"""
OVERLAP_3D = 0.5
"""IoU above which in front and behind count in full"""
LEAST = 0.5
"""a 2D score below it is 0"""
_SHORTER, _LONGEST = 479, 480


def parse_relation(text: str, relations: Sequence[str]) -> tuple[str, str, str]:
    """(first object, relation, second object) of "a cat on the left of a dog".

    The official script takes the first and last noun of spaCy's tagging. All prompts of the two categories have this one form, in which
    they are the words before and after the relation; so no tagger is needed. Raises DataError for another form.
    """
    match = re.fullmatch(rf"an? (\w+) ({'|'.join(map(re.escape, relations))}) an? (\w+)", text)
    if match is None:
        raise DataError(f"{text!r} is not 'a <thing> <relation> a <thing>' with a relation of {', '.join(relations)}")
    first, relation, second = match.groups()
    return first, relation, second


def sought(thing: str) -> str:
    """What the detector is asked for."""
    return "person" if thing in PEOPLE else thing


def frame(width: int, height: int) -> tuple[int, int]:
    """(width, height) that UniDet sees: shorter side 479, unless the longer one were above 480."""
    shorter, longer = min(width, height), max(width, height)
    new_shorter, new_longer = _SHORTER, int(_SHORTER * longer / shorter)
    if new_longer > _LONGEST:
        new_shorter, new_longer = int(_LONGEST * new_shorter / new_longer), _LONGEST
    return (new_shorter, new_longer) if width <= height else (new_longer, new_shorter)


def to_frame(detections: Sequence[Detection], width: int, height: int) -> list[Detection]:
    """Detections in a picture of this size, with boxes in the frame's pixels."""
    frame_width, frame_height = frame(width, height)
    x, y = frame_width / width, frame_height / height
    return [Detection(d.name, d.score, (d.box[0] * x, d.box[1] * y, d.box[2] * x, d.box[3] * y)) for d in detections]


def position_2d(relation: str, a: Box, b: Box) -> float:
    """How well `a` stands in the relation to `b`, 0 to 1. Raises DataError for an unknown relation.

    Near: 1 if the centres are closer than 150 in x or in y, else 150 over the larger distance. Sides: the distance to that side must be
    the larger one; then 1 for an IoU below 0.1, else 0.1 / IoU.
    """
    right = (b[0] + b[2]) / 2 - (a[0] + a[2]) / 2
    below = (b[1] + b[3]) / 2 - (a[1] + a[3]) / 2
    if relation in ("next to", "near", "on side of"):
        far = max(abs(right), abs(below))
        return 1.0 if min(abs(right), abs(below)) < DISTANCE else DISTANCE / far
    sides = {
        "on the left of": (right, below),
        "on the right of": (-right, below),
        "on the top of": (below, right),
        "on the bottom of": (-below, right),
    }
    if relation not in sides:
        raise DataError(f"relation is {relation!r}; it must be one of {', '.join(RELATIONS_2D)}")
    along, across = sides[relation]
    if along <= abs(across):
        return 0.0
    overlap = iou(a, b)
    return 1.0 if overlap < OVERLAP_2D else OVERLAP_2D / overlap


def position_3d(relation: str, a: Box, b: Box, nearness: Tensor, swapped: bool = False) -> float:
    """How well `a` stands before or behind `b`, 0 to 1, by the mean nearness ([H, W], in the boxes' pixels) of their boxes.

    0 if the order is wrong or the same, or the boxes do not touch; else 1 for an IoU above 0.5 and IoU / 0.5 below. An IoU of just 0.5
    gives 0, and so does a box without a whole pixel, as in the official script. `swapped` takes rows for x, as it does too.
    Raises DataError for an unknown relation.
    """
    if relation not in RELATIONS_3D:
        raise DataError(f"relation is {relation!r}; it must be one of {', '.join(RELATIONS_3D)}")
    lead = _mean_within(nearness, a, swapped) - _mean_within(nearness, b, swapped)
    ordered = lead > 0 if relation == "in front of" else lead < 0
    overlap = iou(a, b)
    if not ordered or overlap == OVERLAP_3D:
        return 0.0
    return 1.0 if overlap > OVERLAP_3D else overlap / OVERLAP_3D


def score_2d(first: str, relation: str, second: str, found: Sequence[Detection]) -> float:
    """A picture's 2D score, 0 to 1, of detections in the frame, best first.

    Each object is its most confident box. Two of one name (a girl and a woman are both a person) are the same box, as in the official
    script.
    """
    a, b = _best(sought(first), found), _best(sought(second), found)
    score = 0.25 * sum(d.score for d in (a, b) if d is not None)
    if a is not None and b is not None:
        score += position_2d(relation, a.box, b.box) / 2
    return score if score >= LEAST else 0.0


def score_3d(
    first: str, relation: str, second: str, found: Sequence[Detection], nearness: Tensor, swapped: bool = False
) -> float:
    """A picture's 3D score, 0 to 1, of detections in the frame, best first. No least score here.

    The official script goes down the list until both objects are known, and lets a later box of an object replace an earlier one till
    then; so does this.
    """
    names = sought(first), sought(second)
    a = b = None
    for detection in found:
        if detection.name == names[0]:
            a = detection
        if detection.name == names[1]:
            b = detection
        if a is not None and b is not None:
            position = position_3d(relation, a.box, b.box, nearness, swapped)
            return 0.25 * a.score + 0.25 * b.score + position / 2
    # With one object alone the script takes its first box.
    alone = _best(names[0], found) or _best(names[1], found)
    return 0.25 * alone.score if alone is not None else 0.0


def _best(name: str, found: Sequence[Detection]) -> Detection | None:
    return next((d for d in found if d.name == name), None)


def _mean_within(nearness: Tensor, box: Box, swapped: bool) -> float:
    """Mean in a box; nan without a whole pixel, with which no order holds."""
    x, y = slice(int(box[0]), int(box[2])), slice(int(box[1]), int(box[3]))
    return float(torch.mean(nearness[x, y] if swapped else nearness[y, x]))
