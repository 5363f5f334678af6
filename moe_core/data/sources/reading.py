"""Samples that are kept: read, decoded, and told apart by a hash of their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_core.config import FiltersConfig
from moe_core.data.sources.decoding import Picture, decode
from moe_core.data.sources.samples import Reject, Sample
from moe_core.data.sources.units import Source, Unit

DIGEST_BYTES = 16
"""Of a hash: among 100 million images two different ones agree by chance with probability 1e-23."""
DOUBLED = {
    "duplicate_key": "key '{}' comes again; keys must differ",
    "duplicate_image": "'{}' is byte for byte an image that comes earlier",
}
"""Reasons to drop what comes a second time: the first is damage, the second policy."""


@dataclass(frozen=True)
class Kept:
    """A sample that no filter drops, and that can be decoded."""

    sample: Sample
    picture: Picture
    digest: bytes
    """16 bytes of BLAKE2b of the image's bytes"""


def keep(
    source: Source, unit: Unit, buckets: Sequence[tuple[int, int]], filters: FiltersConfig
) -> Iterator[Kept | Reject]:
    """A unit's samples in its order. Duplicates within the unit are dropped here already, before they are decoded."""
    seen: set[bytes] = set()
    for entry in source.read(unit):
        if isinstance(entry, Reject):
            yield entry
            continue
        digest = hashlib.blake2b(entry.image, digest_size=DIGEST_BYTES).digest()
        if filters.drop_duplicates and digest in seen:
            yield doubled(entry.key, "duplicate_image")
            continue
        picture = decode(entry, buckets, filters)
        if isinstance(picture, Reject):
            yield picture
            continue
        seen.add(digest)
        yield Kept(entry, picture, digest)


def doubled(key: str, reason: str) -> Reject:
    """Of a sample whose key or image came before."""
    return Reject(key, reason, DOUBLED[reason].format(key))
