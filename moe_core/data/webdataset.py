"""Reads image-text pairs from WebDataset tars: members of one key, `x.png` / `x.jpg` / `x.webp`, `x.txt` and, if there
is, `x.json`.

- Nothing is unpacked to disk. A name that points outside (`../x`, `/x`), a link or a device is rejected all the same.
- What is broken becomes a `Reject` with its reason, in its place in the stream; the samples around it are good. Only a
  tar that cannot be read at all raises.
- Sizes are checked before anything is decompressed.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from moe_core.errors import DataError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
MAX_PIXELS = 64_000_000
"""Largest image that is decoded; beyond that it counts as a decompression bomb."""
MAX_MEMBER_BYTES = 256 * 2**20
MAX_CAPTION_CHARS = 2000
TRUNCATED = "truncated_tar"
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """An image-text pair; `key` is "<tar's stem>/<key in the tar>"."""

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


@dataclass(frozen=True)
class _Member:
    """A plain file of a tar."""

    key: str
    suffix: str
    content: bytes


def list_tars(folder: Path) -> list[Path]:
    """The .tar files of a folder, by name. Raises DataError if there is no folder or no tar."""
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist; it must be a folder of .tar files")
    tars = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and path.is_file())
    if not tars:
        raise DataError(f"data folder {folder} holds no .tar file; at least one is needed")
    return tars


def read_samples(
    tar: Path, max_caption_chars: int = MAX_CAPTION_CHARS, check_images: bool = True
) -> Iterator[Sample | Reject]:
    """The samples of a tar, in its order, and what was rejected.

    `check_images`: decode each image once, so that every Sample that comes out can be decoded; a caller that decodes
    anyway, with `decode`, saves the time. Raises DataError if the file is no tar.
    """
    seen: set[str] = set()
    for key, group in itertools.groupby(_members(tar), key=lambda entry: entry.key):
        files: dict[str, bytes] = {}
        for entry in group:
            if isinstance(entry, Reject):
                yield entry
            else:
                files[entry.suffix] = entry.content
        if not files:
            continue
        if key in seen:
            yield Reject(
                key,
                "duplicate_key",
                f"{tar}: key '{key}' comes again; the members of a sample must stand together, once",
            )
            continue
        seen.add(key)
        found = _sample(tar, key, files, max_caption_chars)
        if isinstance(found, Sample) and check_images:
            picture = decode_or_reject(found, resolution=None)
            if isinstance(picture, Reject):
                found = picture
        yield found


def decode(sample: Sample, resolution: int) -> NDArray[np.uint8]:
    """The image as uint8 [resolution, resolution, 3]: cut to a centred square, resized if need be.

    Raises DataError where `decode_or_reject` would reject.
    """
    picture = decode_or_reject(sample, resolution)
    if isinstance(picture, Reject):
        raise DataError(picture.detail)
    return picture


def check_rejects(kept: int, rejects: Sequence[Reject], tars: int, max_share: float) -> None:
    """Raises DataError where nothing is kept, or more than `max_share` of the samples is rejected, or of the tars cut off:
    how many samples a cut took, nobody knows. The message has the reasons and the first of each.
    """
    counted = Counter(reject.reason for reject in rejects)
    first = {reject.reason: reject.detail for reject in reversed(rejects)}
    told = "; ".join(f"{reason}: {count}, the first: {first[reason]}" for reason, count in sorted(counted.items()))
    if not kept:
        raise DataError(f"the dataset is empty: 0 samples kept, {len(rejects)} rejected. {told}".rstrip())
    for what, broken, whole in (
        ("samples are broken", len(rejects), kept + len(rejects)),
        ("tars are cut off", counted[TRUNCATED], tars),
    ):
        if broken / whole > max_share:
            raise DataError(
                f"{broken} of {whole} {what}, a share of {broken / whole:.4f}; data.shard.max_reject_share allows {max_share:g}."
                f" {told}"
            )


def decode_or_reject(sample: Sample, resolution: int | None) -> NDArray[np.uint8] | Reject:
    """As `decode`; what cannot be decoded is a Reject. Without a resolution the picture keeps its size."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures below its own limit; ours is checked here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(sample.image), formats=("PNG", "JPEG", "WEBP"))
            width, height = image.size
            if width * height > MAX_PIXELS:
                size = f"{width} x {height} = {width * height} pixels"
                detail = f"{sample.key}: image is {size}; at most {MAX_PIXELS} are decoded"
                return Reject(sample.key, "oversized_image", detail)
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        return Reject(sample.key, "oversized_image", f"{sample.key}: {error}; at most {MAX_PIXELS} pixels are decoded")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow has no common base for "these bytes are no image"; SyntaxError is what its PNG reader raises.
        return Reject(
            sample.key,
            "broken_image",
            f"{sample.key}: image of {len(sample.image)} bytes cannot be decoded ({error});"
            " it must be PNG, JPEG or WebP",
        )
    if resolution is not None and picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _members(tar: Path) -> Iterator[_Member | Reject]:
    """Each plain file, and Rejects for the rest and for a cut-off end."""
    try:
        archive = tarfile.open(tar, "r:")  # noqa: SIM115 - closed below; an error at opening has its own message
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{tar} ({tar.stat().st_size if tar.exists() else 'no'} bytes) cannot be read as a tar: {error}"
        ) from None
    with archive:
        while True:
            try:
                member = archive.next()
                content = b"" if member is None else _content(archive, member)
            except (tarfile.TarError, EOFError) as error:
                yield _truncated(tar, str(error))
                return
            if member is None:
                break
            path = PurePosixPath(member.name)
            if member.isdir():
                continue
            if not member.isreg():
                yield Reject(
                    f"{tar.stem}/{path.name}",
                    "unsafe_name",
                    f"{tar}: member '{member.name}' is a link or device; only plain files are read",
                )
            elif path.is_absolute() or ".." in path.parts or "\\" in member.name:
                yield Reject(
                    f"{tar.stem}/{path.name}",
                    "unsafe_name",
                    f"{tar}: member '{member.name}' points outside; names must be relative, without '..'",
                )
            elif content is None:
                detail = f"{tar}: member '{member.name}' has {member.size} bytes; at most {MAX_MEMBER_BYTES} are read"
                yield Reject(f"{tar.stem}/{path.name}", "oversized_member", detail)
            else:
                # WebDataset's rule: the key ends at the first dot of the file name.
                stem, _, suffix = path.name.partition(".")
                yield _Member(f"{tar.stem}/{path.parent / stem}", suffix.lower(), content)
        if not _ends_whole(tar, archive.offset):
            yield _truncated(tar, f"no end mark after byte {archive.offset}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """A plain file's bytes; None if there are too many. Raises tarfile.ReadError if the archive ends within them."""
    if not member.isreg():
        return b""
    if member.size > MAX_MEMBER_BYTES:
        return None
    reader = archive.extractfile(member)
    content = b"" if reader is None else reader.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"'{member.name}' has {len(content)} of {member.size} bytes")
    return content


def _ends_whole(tar: Path, offset: int) -> bool:
    """A whole tar ends with a block of zeros; `next` returns None both there and at a bare end of file."""
    with tar.open("rb") as file:
        file.seek(max(0, offset - _BLOCK))
        tail = file.read(2 * _BLOCK)
    return len(tail) >= _BLOCK and not any(tail[-_BLOCK:])


def _truncated(tar: Path, detail: str) -> Reject:
    return Reject(
        f"{tar.stem}/",
        TRUNCATED,
        f"{tar} ({tar.stat().st_size} bytes) is cut off: {detail}; a tar ends with two blocks of zeros",
    )


def _sample(tar: Path, key: str, by_suffix: dict[str, bytes], max_caption_chars: int) -> Sample | Reject:
    """The pair that these members of one key make, or why they make none."""
    image = next((by_suffix[suffix] for suffix in IMAGE_SUFFIXES if suffix in by_suffix), None)
    if image is None:
        return Reject(
            key,
            "missing_image",
            f"{tar}: '{key}' has members {sorted(by_suffix)}; one of {', '.join(IMAGE_SUFFIXES)} is needed",
        )
    if "txt" not in by_suffix:
        return Reject(
            key, "missing_caption", f"{tar}: '{key}' has members {sorted(by_suffix)}; a .txt with the caption is needed"
        )
    try:
        caption = by_suffix["txt"].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Reject(
            key,
            "caption_encoding",
            f"{tar}: caption of '{key}' has byte 0x{error.object[error.start]:02x} at {error.start}; it must be UTF-8",
        )
    if not caption or len(caption) > max_caption_chars:
        return Reject(
            key,
            "caption_length",
            f"{tar}: caption of '{key}' has {len(caption)} characters; it must have 1 to {max_caption_chars}",
        )
    try:
        meta = json.loads(by_suffix.get("json", b"{}"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return Reject(key, "broken_json", f"{tar}: '{key}.json' cannot be parsed ({error}); it must be a JSON object")
    if not isinstance(meta, dict):
        return Reject(
            key, "broken_json", f"{tar}: '{key}.json' is a JSON {type(meta).__name__}; it must be a JSON object"
        )
    return Sample(key, image, caption, meta)
