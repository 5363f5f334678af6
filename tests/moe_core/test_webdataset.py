"""Tars as users have them: broken and hostile ones too."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from moe_core.data.sources import webdataset
from moe_core.data.sources.samples import UNREADABLE, Reject, Sample
from moe_core.errors import DataError
from tests.moe_core.sources_made import FIELDS, FILTERS, bomb, config, image, keys, read, reasons, tar


def _pair(key: str, shade: int = 200) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image(shade=shade)), (f"{key}.txt", b"a red seven")]


def _samples(path: Path) -> list[Sample | Reject]:
    return list(webdataset.read_samples(path, path.stem, FIELDS, FILTERS))


def test_samples_come_in_order_with_caption_meta_and_the_exact_bytes(tmp_path: Path):
    path = tar(tmp_path / "x.tar", [*_pair("sub/0"), ("sub/0.json", b'{"a": 1}'), *_pair("sub/1", 100)])
    first, second = _samples(path)
    assert first == Sample("x/sub/0", image(), "a red seven", {"a": 1})
    assert second == Sample("x/sub/1", image(shade=100), "a red seven", {})


def test_tars_in_subfolders_are_units_of_their_own_keys(tmp_path: Path):
    for number, name in enumerate(("b/00000.tar", "a/00000.tar", "00001.tar")):
        tar(tmp_path / name, _pair("0", shade=number))
    (tmp_path / "00001.parquet").write_bytes(b"img2dataset's own table")
    kept, _ = read(config("webdataset", tmp_path))
    assert keys(kept) == ["00001/0", "a/00000/0", "b/00000/0"]


@pytest.mark.parametrize(
    ("members", "reason", "words"),
    [
        ([("b.png", b"\x89PNG not really"), ("b.txt", b"x")], "broken_image", "must be PNG"),
        ([("b.png", image()[:60]), ("b.txt", b"x")], "broken_image", "60 bytes"),
        ([("b.png", bomb()), ("b.txt", b"x")], "oversized_image", "60000 x 60000|3600000000"),
        ([("b.png", image(8)), ("b.json", b"{}")], "missing_caption", "'x/b'"),
        ([("b.txt", b"x")], "missing_image", "png, jpg"),
        ([("b.png", image(8)), ("b.txt", b"caf\xe9")], "caption_encoding", "0xe9 at 3"),
        ([("b.png", image(8)), ("b.txt", b"  ")], "missing_caption", "is empty"),
        ([("b.png", image(8)), ("b.txt", b"x"), ("b.json", b"{")], "broken_json", "b.json"),
        ([("b.png", image(8)), ("b.txt", b"x"), ("b.json", b"[1]")], "broken_json", "JSON list"),
        ([("b.png", image(8)), ("b.txt", b"x"), ("b.json", b"[" * 100_000)], "broken_json", "recursion"),
        ([("b.png", image(8)), ("b.txt", b"x"), ("b.json", b'{"a": "\\ud800"}')], "broken_json", "surrogates"),
        ([("../b.png", image(8))], "unsafe_name", "'../b.png' points outside"),
        ([("/etc/b.png", image(8))], "unsafe_name", "'/etc/b.png' points outside"),
        ([("b\udcff.png", image(8))], "unsafe_name", "not UTF-8"),
        ([("a.png", image(8))], "duplicate_key", "'x/a' comes again"),
    ],
)
def test_what_is_broken_is_rejected_by_name_and_its_neighbours_are_not(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str, words: str
):
    tar(tmp_path / "x.tar", [*_pair("a", 1), *_pair("m", 2), *members, *_pair("z", 3)])
    kept, (reject,) = read(config("webdataset", tmp_path))
    assert keys(kept) == ["x/a", "x/m", "x/z"]
    assert reject.reason == reason
    assert any(word in reject.detail for word in words.split("|"))


def test_links_are_rejected(tmp_path: Path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    (reject,) = _samples(path)
    assert isinstance(reject, Reject)
    assert reject.reason == "unsafe_name"


def test_an_oversized_member_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 1000)
    path = tar(tmp_path / "x.tar", [("a.png", b"0" * 1001), *_pair("b")])
    assert [entry.reason for entry in _samples(path) if isinstance(entry, Reject)] == ["oversized_member"]


@pytest.mark.parametrize("cut", [512 * 4 + 100, 512 * 4, 512 * 5 + 5, 512 * 2 - 100])
def test_a_truncated_tar_gives_what_is_whole_and_says_so(tmp_path: Path, cut: int):
    path = tar(tmp_path / "x.tar", [*_pair("a"), *_pair("b")])
    path.write_bytes(path.read_bytes()[:cut])
    found = _samples(path)
    truncated = [entry for entry in found if isinstance(entry, Reject) and entry.reason == "truncated_tar"]
    assert len(truncated) == 1
    assert f"({cut} bytes)" in truncated[0].detail
    assert [entry.key for entry in found if isinstance(entry, Sample)] == (["x/a"] if cut >= 512 * 4 else [])


@pytest.mark.parametrize("content", [b"not a tar at all" * 100, b""])
def test_a_file_that_is_no_tar_is_a_reject(tmp_path: Path, content: bytes):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    tar(tmp_path / "y.tar", _pair("a"))
    kept, rejects = read(config("webdataset", tmp_path))
    assert (keys(kept), reasons(rejects)) == (["y/a"], ["unreadable_file"])
    assert f"x.tar ({len(content)} bytes) cannot be read as a tar" in rejects[0].detail


def _header(size: int, kind: bytes = tarfile.REGTYPE, extended: bool = False) -> bytes:
    """A header of member z.bin with this size and a right checksum; `extended`: a map of holes goes on in the next block."""
    member = tarfile.TarInfo("z.bin")
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = bytes([0xFF if size < 0 else 0x80]) + (size % 256**11).to_bytes(11, "big")
    header[482] = extended
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _extension(content: bytes, kind: bytes) -> bytes:
    return _header(len(content), kind) + content + b"\0" * (-len(content) % 512)


HOSTILE = {
    "the next header is this one": _header(-512),
    "the next header is the one before": _header(-1024),
    "a size that means all there is": _header(-1),
    "the next header is this one, says an extension": _extension(b"14 size=-1536\n", tarfile.XHDTYPE) + _header(0),
    "the next header is this one, which has holes": _header(-512, tarfile.GNUTYPE_SPARSE),
    "names without end": _extension(b"x\0", tarfile.GNUTYPE_LONGNAME) * 1200,
    "a name that no memory holds": _header(2**45, tarfile.GNUTYPE_LONGNAME),
    "a name of no size that there is": _header(2**80, tarfile.GNUTYPE_LONGNAME),
    "an extension that takes minutes": _extension(b"1" * 2**18, tarfile.XHDTYPE),
}


@pytest.mark.timeout(20, method="signal")
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("before", [[], _pair("a")], ids=["first", "later"])
def test_a_header_made_to_harm_ends_its_tar_and_nothing_else(
    tmp_path: Path, before: list[tuple[str, bytes]], hostile: bytes
):
    path = tar(tmp_path / "x.tar", before)
    good = tar(tmp_path / "y.tar", _pair("a", 1)).read_bytes()
    path.write_bytes(path.read_bytes()[: 2048 if before else 0] + hostile + good)
    kept, (reject,) = read(config("webdataset", tmp_path))
    assert keys(kept) == [*(["x/a"] if before else []), "y/a"]
    assert reject.reason in UNREADABLE
    assert f"x.tar ({path.stat().st_size} bytes)" in reject.detail


def test_a_map_of_holes_that_is_cut_off_is_a_reject(tmp_path: Path):
    path = tar(tmp_path / "x.tar", _pair("a"))
    path.write_bytes(path.read_bytes()[:2048] + _header(0, tarfile.GNUTYPE_SPARSE, extended=True))
    kept, rejects = read(config("webdataset", tmp_path))
    assert (keys(kept), reasons(rejects)) == (["x/a"], ["truncated_tar"])


def test_a_long_name_is_read(tmp_path: Path):
    name = "/".join("0123456789" * 20 for _ in range(20))
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar(tmp_path / "x.tar", _pair(name), format)
        assert [entry.key for entry in _samples(path)] == [f"x/{name}"]


def test_a_folder_without_tars_raises(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no \.tar"):
        webdataset.list_tars(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        webdataset.list_tars(tmp_path / "nowhere")


def test_a_tar_reader_forgets_the_headers_that_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    assert len(_samples(tar(tmp_path / "x.tar", [m for i in range(50) for m in _pair(f"{i}")]))) == 50
    assert len(opened[-1].members) <= 1
