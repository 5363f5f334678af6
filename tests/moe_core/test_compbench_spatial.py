"""The 2D and 3D formulas on hand-made boxes; every expected score is worked out by hand."""

from __future__ import annotations

import pytest
import torch

from moe_core.errors import DataError
from moe_core.metrics import compbench_spatial as spatial
from moe_core.metrics.open_detector import Box, Detection


@pytest.mark.parametrize(
    ("text", "relations", "parsed"),
    [
        ("a cat on the top of a sofa", spatial.RELATIONS_2D, ("cat", "on the top of", "sofa")),
        ("a mouse on side of a key", spatial.RELATIONS_2D, ("mouse", "on side of", "key")),
        ("an owl near a airplane", spatial.RELATIONS_2D, ("owl", "near", "airplane")),
        ("a dog in front of a desk", spatial.RELATIONS_3D, ("dog", "in front of", "desk")),
        ("a chair hidden by a mouse", spatial.RELATIONS_3D, ("chair", "hidden by", "mouse")),
    ],
)
def test_parse(text: str, relations: tuple[str, ...], parsed: tuple[str, str, str]):
    assert spatial.parse_relation(text, relations) == parsed


@pytest.mark.parametrize("text", ["cats near a dog", "a cat over a dog", "a cat near a dog.", "a big cat near a dog"])
def test_another_form_is_an_error(text: str):
    with pytest.raises(DataError, match="is not 'a <thing> <relation> a <thing>'"):
        spatial.parse_relation(text, spatial.RELATIONS_2D)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (479, 479)),
        ((256, 256), (479, 479)),
        ((1000, 500), (480, 240)),  # 479 by 958 is too long; 480 * 479 / 958 = 240
        ((500, 1000), (240, 480)),
    ],
)
def test_frame(size: tuple[int, int], expected: tuple[int, int]):
    assert spatial.frame(*size) == expected


def test_boxes_are_brought_to_the_frame():
    (found,) = spatial.to_frame([Detection("cat", 0.5, (100, 100, 500, 250))], 1000, 500)
    assert found.box == pytest.approx((48, 48, 240, 120))


# Centres (50, 50) and (300, 50): 250 to the right, none down, apart.
LEFT, RIGHT = (0, 0, 100, 100), (250, 0, 350, 100)
BELOW_LEFT = (0, 250, 100, 350)


@pytest.mark.parametrize(
    ("relation", "a", "b", "expected"),
    [
        ("on the left of", LEFT, RIGHT, 1.0),
        ("on the right of", LEFT, RIGHT, 0.0),
        ("on the right of", RIGHT, LEFT, 1.0),
        ("on the top of", LEFT, BELOW_LEFT, 1.0),
        ("on the bottom of", LEFT, BELOW_LEFT, 0.0),
        ("on the bottom of", BELOW_LEFT, LEFT, 1.0),
        ("on the top of", LEFT, RIGHT, 0.0),
        # 250 right and 250 down: neither is the larger.
        ("on the left of", LEFT, (250, 250, 350, 350), 0.0),
        ("on the top of", LEFT, (250, 250, 350, 350), 0.0),
        # Moved by 50 of 100: common 5,000 of 15,000, IoU 1/3, so 0.1 * 3.
        ("on the left of", LEFT, (50, 0, 150, 100), 0.3),
        # Common 10 * 100 of 19,000 is 0.0526: below 0.1.
        ("on the left of", LEFT, (90, 0, 190, 100), 1.0),
        # Near: one of the two distances below 150 is enough.
        ("near", LEFT, RIGHT, 1.0),
        ("next to", LEFT, (149, 300, 249, 400), 1.0),
        # 150 right and 300 down: just not near, 150 / 300.
        ("on side of", LEFT, (150, 300, 250, 400), 0.5),
        ("near", LEFT, (200, 150, 300, 250), 0.75),
        ("near", LEFT, LEFT, 1.0),
    ],
)
def test_position_2d(relation: str, a: Box, b: Box, expected: float):
    assert spatial.position_2d(relation, a, b) == pytest.approx(expected)


def test_a_position_at_the_iou_threshold():
    # Common 20 * 100 over 11,000 + 11,000 - 2,000 is just 0.1, and 0.1 / 0.1 is 1.
    assert spatial.position_2d("on the left of", (0, 0, 110, 100), (90, 0, 200, 100)) == pytest.approx(1.0)


def test_unknown_relations_are_errors():
    with pytest.raises(DataError, match="relation is 'over'"):
        spatial.position_2d("over", LEFT, RIGHT)
    with pytest.raises(DataError, match="relation is 'near'"):
        spatial.position_3d("near", LEFT, RIGHT, torch.zeros(10, 10))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        # 0.25 * 0.8 + 0.25 * 0.6 + 1 / 2
        ([Detection("cat", 0.8, LEFT), Detection("dog", 0.6, RIGHT)], 0.85),
        # The best box of each counts.
        ([Detection("cat", 0.8, LEFT), Detection("dog", 0.6, RIGHT), Detection("cat", 0.5, BELOW_LEFT)], 0.85),
        # On the wrong side 0.25 * 1.4 = 0.35 is below a half.
        ([Detection("dog", 0.8, LEFT), Detection("cat", 0.6, RIGHT)], 0.0),
        # Wrong, but both certain: just a half, which stays.
        ([Detection("dog", 1.0, LEFT), Detection("cat", 1.0, RIGHT)], 0.5),
        ([Detection("cat", 1.0, LEFT)], 0.0),
        ([Detection("cow", 1.0, LEFT)], 0.0),
        ([], 0.0),
        # IoU 1/3 gives 0.3: 0.25 * 1.4 + 0.15 = 0.5
        ([Detection("cat", 0.8, LEFT), Detection("dog", 0.6, (50, 0, 150, 100))], 0.5),
    ],
)
def test_score_2d(found: list[Detection], expected: float):
    assert spatial.score_2d("cat", "on the left of", "dog", found) == pytest.approx(expected)


def test_people_are_persons_and_two_of_them_are_one_box():
    found = [Detection("person", 0.8, LEFT), Detection("person", 0.4, RIGHT)]
    # Both are the first box, near itself: 0.5 * 0.8 + 0.5.
    assert spatial.score_2d("girl", "near", "woman", found) == pytest.approx(0.9)
    assert spatial.score_2d("boy", "on the left of", "man", found) == 0.0


def _nearness(near: Box) -> torch.Tensor:
    """[480, 480], 1 within the box."""
    nearness = torch.zeros(480, 480)
    nearness[near[1] : near[3], near[0] : near[2]] = 1.0
    return nearness


A, B = (0, 0, 100, 100), (80, 0, 180, 100)
"""common 2,000 of 18,000: IoU 1/9"""


@pytest.mark.parametrize(
    ("relation", "a", "b", "near", "expected"),
    [
        ("in front of", A, B, (0, 0, 80, 100), 2 / 9),
        ("in front of", A, B, (100, 0, 180, 100), 0.0),
        ("behind", A, B, (100, 0, 180, 100), 2 / 9),
        ("hidden by", A, B, (100, 0, 180, 100), 2 / 9),
        ("hidden by", A, B, (0, 0, 80, 100), 0.0),
        # Equally near: in no order.
        ("in front of", A, B, (0, 0, 180, 100), 0.0),
        ("behind", A, B, (0, 0, 180, 100), 0.0),
        # Apart, or only touching: 0, though the order is right.
        ("in front of", A, (200, 0, 300, 100), A, 0.0),
        ("in front of", A, (100, 0, 200, 100), A, 0.0),
        # Common 9,000 of 11,000: above a half.
        ("in front of", A, (10, 0, 110, 100), (0, 0, 10, 100), 1.0),
        # B within A, half as large: IoU just a half, which the official script gives 0.
        ("in front of", A, (0, 0, 50, 100), (50, 0, 100, 100), 0.0),
        # A box without a whole pixel.
        ("in front of", (10.2, 0, 10.8, 100), A, A, 0.0),
    ],
)
def test_position_3d(relation: str, a: Box, b: Box, near: Box, expected: float):
    assert spatial.position_3d(relation, a, b, _nearness(near)) == pytest.approx(expected)


def test_swapped_axes_read_the_other_corner():
    # A is upper right, near; B is right beside it, far. The transposed places are lower left.
    a, b = (200, 0, 300, 100), (280, 0, 380, 100)
    nearness = _nearness((200, 0, 280, 100))
    assert spatial.position_3d("in front of", a, b, nearness) == pytest.approx(2 / 9)
    assert spatial.position_3d("in front of", a, b, nearness, swapped=True) == 0.0
    assert spatial.position_3d("in front of", a, b, nearness.T.contiguous(), swapped=True) == pytest.approx(2 / 9)


def test_score_3d():
    near = _nearness((0, 0, 80, 100))
    both = [Detection("cat", 0.8, A), Detection("dog", 0.6, B)]
    assert spatial.score_3d("cat", "in front of", "dog", both, near) == pytest.approx(0.35 + 1 / 9)
    # No least score in 3D: the wrong order keeps the confidences.
    assert spatial.score_3d("cat", "behind", "dog", both, near) == pytest.approx(0.35)
    assert spatial.score_3d("cat", "behind", "dog", both[:1], near) == pytest.approx(0.2)
    assert spatial.score_3d("cat", "behind", "dog", both[1:], near) == pytest.approx(0.15)
    assert spatial.score_3d("cat", "behind", "dog", [], near) == 0.0


def test_score_3d_takes_the_last_box_before_both_are_known():
    near = _nearness((0, 0, 80, 100))
    cats = [Detection("cat", 0.9, (300, 300, 400, 400)), Detection("cat", 0.8, A)]
    dog, late = Detection("dog", 0.6, B), Detection("cat", 0.5, A)
    # The second cat replaces the first, for the dog is not known yet; the third comes too late.
    assert spatial.score_3d("cat", "in front of", "dog", [*cats, dog, late], near) == pytest.approx(0.35 + 1 / 9)
    # Alone, the first counts.
    assert spatial.score_3d("cat", "in front of", "dog", cats, near) == pytest.approx(0.225)


def test_a_thing_before_its_like_is_one_box():
    phones = [Detection("phone", 0.8, A), Detection("phone", 0.6, B)]
    assert spatial.score_3d("phone", "in front of", "phone", phones, _nearness(A)) == pytest.approx(0.4)
