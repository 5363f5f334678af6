"""The reader on tars as users have them: broken ones too."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from moe_core.data.webdataset import Reject, Sample
from PIL import Image

from moe_core.data import webdataset
from moe_core.errors import DataError


def _png(width: int = 16, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", _png()), (f"{key}.txt", b"a red seven")]


def _bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_samples_come_in_order_with_caption_and_meta(tmp_path: Path):
    tar = _tar(tmp_path / "x.tar", [*_pair("sub/0"), ("sub/0.json", b'{"a": 1}'), *_pair("sub/1")])
    first, second = webdataset.read_samples(tar)
    assert isinstance(first, Sample)
    assert (first.key, first.caption, first.meta) == ("x/sub/0", "a red seven", {"a": 1})
    assert isinstance(second, Sample)
    assert second.key == "x/sub/1"


@pytest.mark.parametrize(
    ("members", "reason", "words"),
    [
        ([("b.png", b"\x89PNG not really"), ("b.txt", b"x")], "broken_image", "must be PNG"),
        ([("b.png", _png()[:60]), ("b.txt", b"x")], "broken_image", "60 bytes"),
        ([("b.png", _bomb()), ("b.txt", b"x")], "oversized_image", "60000 x 60000|3600000000"),
        ([("b.png", _png())], "missing_caption", "'x/b'"),
        ([("b.txt", b"x")], "missing_image", "png, jpg"),
        ([("b.png", _png()), ("b.txt", b"caf\xe9")], "caption_encoding", "0xe9 at 3"),
        ([("b.png", _png()), ("b.txt", b"  ")], "caption_length", "0 characters"),
        ([("b.png", _png()), ("b.txt", b"y" * 3000)], "caption_length", "3000 characters; it must have 1 to 2000"),
        ([("b.png", _png()), ("b.txt", b"x"), ("b.json", b"{")], "broken_json", "b.json"),
        ([("b.png", _png()), ("b.txt", b"x"), ("b.json", b"[1]")], "broken_json", "JSON list"),
        ([("../b.png", _png())], "unsafe_name", "'../b.png' points outside"),
        ([("/etc/b.png", _png())], "unsafe_name", "'/etc/b.png' points outside"),
        ([("a.png", _png())], "duplicate_key", "'x/a' comes again"),
    ],
)
def test_what_is_broken_is_rejected_by_name_and_its_neighbours_are_not(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str, words: str
):
    tar = _tar(tmp_path / "x.tar", [*_pair("a"), *_pair("m"), *members, *_pair("z")])
    found = list(webdataset.read_samples(tar))
    assert [entry.key for entry in found if isinstance(entry, Sample)] == ["x/a", "x/m", "x/z"]
    (reject,) = [entry for entry in found if isinstance(entry, Reject)]
    assert reject.reason == reason
    assert any(word in reject.detail for word in words.split("|"))


def test_links_are_rejected(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (reject,) = webdataset.read_samples(path)
    assert isinstance(reject, Reject)
    assert reject.reason == "unsafe_name"


def test_an_oversized_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 1000)
    tar = _tar(tmp_path / "x.tar", [("a.png", b"0" * 1001), *_pair("b")])
    reasons = [entry.reason for entry in webdataset.read_samples(tar) if isinstance(entry, Reject)]
    assert reasons == ["oversized_member"]


@pytest.mark.parametrize("cut", [512 * 4 + 100, 512 * 4, 512 * 5 + 5, 512 * 2 - 100])
def test_a_truncated_tar_gives_what_is_whole_and_says_so(tmp_path: Path, cut: int):
    tar = _tar(tmp_path / "x.tar", [*_pair("a"), *_pair("b")])
    tar.write_bytes(tar.read_bytes()[:cut])
    found = list(webdataset.read_samples(tar))
    truncated = [entry for entry in found if isinstance(entry, Reject) and entry.reason == "truncated_tar"]
    assert len(truncated) == 1
    assert f"({cut} bytes)" in truncated[0].detail
    assert [entry.key for entry in found if isinstance(entry, Sample)] == (["x/a"] if cut >= 512 * 4 else [])


def test_a_file_that_is_no_tar_raises(tmp_path: Path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DataError, match=r"x\.tar \(1600 bytes\) cannot be read as a tar"):
        list(webdataset.read_samples(path))


def test_a_folder_without_tars_raises(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no \.tar"):
        webdataset.list_tars(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        webdataset.list_tars(tmp_path / "nowhere")


def test_pictures_are_cut_square_and_resized():
    sample = Sample("k", _png(40, 20), "x")
    picture = webdataset.decode(sample, 16)
    assert picture.shape == (16, 16, 3)
    assert np.array_equal(picture[8, 8], (200, 30, 10))


def test_decode_raises_where_the_reader_rejects():
    with pytest.raises(DataError, match="must be PNG"):
        webdataset.decode(Sample("k", b"nothing", "x"), 16)


def test_too_much_that_is_broken_is_refused_with_the_reasons() -> None:
    rejects = [Reject(str(i), "broken_image", f"{i}: image of 3 bytes cannot be decoded") for i in range(2)]
    told = r"2 of 152 samples are broken, a share of 0.0132; .*max_reject_share allows 0.01. broken_image: 2, the first: 0: image"
    with pytest.raises(DataError, match=told):
        webdataset.check_rejects(150, rejects, 1, 0.01)
    with pytest.raises(DataError, match="the dataset is empty: 0 samples kept, 0 rejected"):
        webdataset.check_rejects(0, [], 1, 0.01)
    webdataset.check_rejects(250, rejects, 1, 0.01)
    cut = [Reject("a", "truncated_tar", "a.tar is cut off")]
    webdataset.check_rejects(5000, cut, 200, 0.01)
    with pytest.raises(DataError, match=r"1 of 3 tars are cut off, a share of 0.3333; .* the first: a.tar is cut off"):
        webdataset.check_rejects(5000, cut, 3, 0.01)
