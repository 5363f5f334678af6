"""What reading a source gives: samples and rejects, and how rejects are counted.

A reject is either broken (damage: a cut-off tar, bytes that are no image) or filtered (policy: too small, said twice).
Both are counted by reason, with the first few quoted; only what is broken can end a run, by its share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from moe_core.errors import DataError

FILTERED = frozenset({"min_side", "max_aspect", "aesthetic_score", "caption_length", "language", "duplicate_image"})
"""Reasons that are policy; every other reason is damage."""
UNREADABLE = frozenset({"truncated_tar", "unreadable_file"})
"""Reasons that take an unknown number of samples with them: they count against the number of files, too."""
MAX_EXAMPLES = 5
"""Rejects of a reason that are quoted."""
MAX_DETAIL_CHARS = 1000
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_IMAGE_BYTES = 256 * 2**20
"""Largest file, or member of a tar, that is read."""


@dataclass(frozen=True)
class Sample:
    """An image-text pair: the image's bytes as they were found; `key` names it in the whole source."""

    key: str
    image: bytes
    caption: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """What was dropped, and why: `reason` is one of a few names to count by, `detail` names the value and the rule."""

    key: str
    reason: str
    detail: str


class RejectCount:
    """Rejects by reason: how many, and the first few."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[dict[str, str]]] = {}

    def add(self, reject: Reject) -> None:
        """Counts one."""
        self.add_many(reject.reason, 1, [{"key": _quoted(reject.key), "detail": _quoted(reject.detail)}])

    def add_many(self, reason: str, count: int, examples: list[dict[str, str]]) -> None:
        """Counts `count` of one reason; of the examples, each `{key, detail}`, the first are kept."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.examples.setdefault(reason, [])
        kept += examples[: MAX_EXAMPLES - len(kept)]

    def merge(self, other: RejectCount) -> None:
        """Adds what came after in the source's order."""
        for reason, count in other.counts.items():
            self.add_many(reason, count, other.examples[reason])

    def broken(self) -> int:
        """How many are damage."""
        return sum(count for reason, count in self.counts.items() if reason not in FILTERED)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """{reason: {"count", "examples": [{"key", "detail"}]}}, by reason."""
        return {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]} for reason in sorted(self.counts)
        }

    @classmethod
    def from_dict(cls, counted: Mapping[str, Mapping[str, Any]]) -> Self:
        """What `as_dict` gave."""
        made = cls()
        for reason, entry in counted.items():
            made.add_many(reason, entry["count"], entry["examples"])
        return made


def _quoted(text: str) -> str:
    """What can be written as UTF-8, and is no longer than a message should be: names and errors hold what others wrote."""
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_DETAIL_CHARS]


def check_rejects(kept: int, rejects: RejectCount, units: int, max_share: float) -> None:
    """Raises DataError where nothing is kept, or more than `max_share` of the samples is broken, or of the units
    unreadable: how many samples a cut took, nobody knows. The message has the reasons and the first of each.
    """
    told = "; ".join(
        f"{reason}: {entry['count']}, the first: {entry['examples'][0]['detail']}"
        for reason, entry in rejects.as_dict().items()
    )
    dropped = sum(rejects.counts.values())
    if not kept:
        raise DataError(f"the dataset is empty: 0 samples kept, {dropped} rejected. {told}".rstrip())
    cut = sum(count for reason, count in rejects.counts.items() if reason in UNREADABLE)
    for what, broken, whole in (
        ("samples are broken", rejects.broken(), kept + dropped),
        ("files are cut off or unreadable", cut, units),
    ):
        if broken / whole > max_share:
            raise DataError(
                f"{broken} of {whole} {what}, a share of {broken / whole:.4f};"
                f" data.shard.max_reject_share allows {max_share:g}. {told}"
            )
