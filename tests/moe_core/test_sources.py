"""The kinds of data set but tars: what they list, what they read, what they refuse; and the filters, which are the same for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_core.data.sources import journeydb, manifest, open_source
from moe_core.data.sources.samples import Reject, RejectCount, check_rejects
from moe_core.data.sources.units import Unit
from moe_core.errors import ConfigError, DataError
from tests.moe_core.sources_made import config, image, keys, lines, read, reasons, tar

TABLE = {"image": "path", "caption": "caption"}


def images(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(shade=shade))


def test_a_manifest_of_json_lines(tmp_path: Path):
    images(tmp_path, "a/0.png", "a/1.png")
    lines(
        tmp_path / "m.jsonl",
        [{"path": "a/1.png", "caption": " one "}, b"", {"path": "a/0.png", "caption": "nil", "x": 1}],
    )
    kept, rejects = read(config("manifest", tmp_path / "m.jsonl", TABLE))
    assert rejects == []
    assert [(k.sample.key, k.sample.caption, k.sample.image) for k in kept] == [
        ("a/1.png", "one", image(shade=1)),
        ("a/0.png", "nil", image(shade=0)),
    ]
    assert kept[1].sample.meta == {"path": "a/0.png", "caption": "nil", "x": 1}


def test_lines_are_cut_into_units_that_together_are_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [f"{i}.png" for i in range(7)]
    images(tmp_path, *names)
    rows = [{"path": name, "caption": "é" * number or "x"} for number, name in enumerate(names)]
    table = lines(tmp_path / "m.jsonl", rows)
    whole = read(config("manifest", table, TABLE))
    monkeypatch.setattr(manifest, "SAMPLES_PER_UNIT", 3)
    data = config("manifest", table, TABLE)
    assert len(list(open_source(data, tmp_path).units())) == 3
    assert keys(read(data)[0]) == keys(whole[0]) == names


def test_a_manifest_of_parquet_by_row_groups(tmp_path: Path):
    names = [f"{i}.png" for i in range(5)]
    images(tmp_path, *names)
    table = pa.table(
        {
            "path": names,
            "caption": [f"c{i}" for i in range(5)],
            "score": [1.0, 6.0, None, 7.0, 5.0],
            "other": [b"x"] * 5,
        }
    )
    pq.write_table(table, tmp_path / "m.parquet", row_group_size=2)
    fields = {**TABLE, "aesthetic_score": "score", "meta": ["score"]}
    data = config("manifest", tmp_path / "m.parquet", fields, filters={"min_aesthetic_score": 5})
    assert [unit.part for unit in open_source(data, tmp_path).units()] == [(0, 1), (1, 2), (2, 3)]
    kept, rejects = read(data)
    assert [(k.sample.key, k.sample.meta) for k in kept] == [
        ("1.png", {"score": 6.0}),
        ("3.png", {"score": 7.0}),
        ("4.png", {"score": 5.0}),
    ]
    assert reasons(rejects) == ["aesthetic_score"] * 2


def test_a_parquet_caption_that_is_not_utf8_takes_no_other_along(tmp_path: Path):
    images(tmp_path, "0.png", "1.png", "2.png")
    raw = pa.array([b"good", b"caf\xe9", b"fine"]).cast(pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"path": ["0.png", "1.png", "2.png"], "caption": captions}), tmp_path / "m.parquet")
    kept, rejects = read(config("manifest", tmp_path / "m.parquet", TABLE))
    assert (keys(kept), reasons(rejects)) == (["0.png", "2.png"], ["caption_encoding"])


def test_a_broken_parquet_file_is_a_reject_beside_a_good_one(tmp_path: Path):
    images(tmp_path, "0.png")
    pq.write_table(pa.table({"path": ["0.png"], "caption": ["c"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    kept, rejects = read(config("manifest", tmp_path, TABLE))
    assert (keys(kept), reasons(rejects)) == (["0.png"], ["unreadable_file"])
    assert "b.parquet" in rejects[0].detail


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"path": "../secret.png", "caption": "x"}, "unsafe_path"),
        ({"path": "a/../../secret.png", "caption": "x"}, "unsafe_path"),
        ({"path": "{outside}/secret.png", "caption": "x"}, "unsafe_path"),
        ({"path": "link.png", "caption": "x"}, "unsafe_path"),
        ({"path": "a", "caption": "x"}, "unsafe_path"),
        ({"path": "pipe.png", "caption": "x"}, "unsafe_path"),
        ({"path": "gone.png", "caption": "x"}, "missing_image"),
        ({"path": "https://example.org/x.jpg", "caption": "x"}, "missing_image"),
        ({"path": "nul\0.png", "caption": "x"}, "missing_image"),
        ({"path": "", "caption": "x"}, "missing_path"),
        ({"caption": "x"}, "missing_path"),
        ({"path": "0.png"}, "missing_caption"),
        ({"path": "0.png", "caption": 3}, "missing_caption"),
        ({"path": "0.png", "caption": " "}, "missing_caption"),
        (b'{"path": "0.png", "caption": "x\xff"}', "broken_json"),
        (b'{"path": "0.png", "caption": "\\ud800"}', "broken_json"),
        (b'["0.png", "x"]', "broken_json"),
        (b"{" * 100_000, "broken_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "broken_json"),
    ],
)
def test_a_hostile_row_is_named_and_its_neighbours_are_kept(tmp_path: Path, row: Any, reason: str):
    root, outside = tmp_path / "root", tmp_path / "outside"
    images(root, "0.png", "1.png", "a/2.png")
    images(outside, "secret.png")
    images(tmp_path, "secret.png")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "inside.png").symlink_to(root / "a" / "2.png")
    os.mkfifo(root / "pipe.png")
    if isinstance(row, dict) and "path" in row:
        row = {**row, "path": row["path"].replace("{outside}", str(outside))}
    good = [{"path": str(root / "1.png"), "caption": "c"}, {"path": "inside.png", "caption": "c"}]
    table = lines(tmp_path / "m.jsonl", [good[0], row, good[1]])
    kept, rejects = read(config("manifest", table, TABLE, root=str(root)))
    assert keys(kept) == [str(root / "1.png"), "inside.png"]
    assert reasons(rejects) == [reason]
    counted = RejectCount()
    counted.add(rejects[0])
    json.dumps(counted.as_dict(), ensure_ascii=False).encode()


def test_an_endless_line_is_one_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "MAX_LINE_BYTES", 100)
    images(tmp_path, "0.png", "1.png")
    rows = [
        {"path": "0.png", "caption": "c"},
        {"path": "1.png", "caption": "x" * 500},
        {"path": "1.png", "caption": "d"},
    ]
    kept, rejects = read(config("manifest", lines(tmp_path / "m.jsonl", rows), TABLE))
    assert (keys(kept), reasons(rejects)) == (["0.png", "1.png"], ["broken_json"])


def test_tables_that_cannot_be_meant_are_refused_at_listing(tmp_path: Path):
    pq.write_table(pa.table({"file": ["0.png"], "caption": ["c"]}), tmp_path / "m.parquet")
    for path, told in (
        (tmp_path / "m.parquet", "has no column 'path'; its columns are file, caption"),
        (tmp_path / "gone.parquet", "it must be a .parquet or .jsonl file, or a folder that holds some"),
        (lines(tmp_path / "empty.jsonl", []), "is empty"),
    ):
        with pytest.raises(DataError, match=told):
            read(config("manifest", path, TABLE))


def _journeydb(folder: Path) -> Path:
    images(folder / "imgs", "000/a.png", "001/b.png")
    rows = [
        {"img_path": "./000/a.png", "prompt": "a --v 5", "Task2": {"Caption": "An a."}, "Task1": {"Label": "x"}},
        {"img_path": "./001/b.png", "prompt": "b", "Task2": {}},
    ]
    lines(folder / "train_anno.jsonl", [{"img_path": "./old/a.png"}])
    lines(folder / "train_anno_realease_repath.jsonl", rows)
    return folder


def test_journeydb_as_it_is_published(tmp_path: Path):
    fields = {"image": "img_path", "caption": "Task2.Caption", "meta": ["prompt"]}
    kept, rejects = read(config("journeydb", _journeydb(tmp_path / "train"), fields))
    assert [(k.sample.key, k.sample.caption, k.sample.meta) for k in kept] == [
        ("./000/a.png", "An a.", {"prompt": "a --v 5"})
    ]
    assert reasons(rejects) == ["missing_caption"]
    kept, _ = read(config("journeydb", tmp_path / "train", {**fields, "caption": "prompt"}))
    assert [k.sample.caption for k in kept] == ["a --v 5", "b"]


def test_journeydb_without_its_list_or_its_images_is_refused(tmp_path: Path):
    fields = {"image": "img_path", "caption": "prompt"}
    lines(tmp_path / "a.jsonl", [{}])
    with pytest.raises(DataError, match="imgs does not exist; JourneyDB's archives must be unpacked there"):
        read(config("journeydb", tmp_path, fields))
    lines(tmp_path / "b.jsonl", [{}])
    with pytest.raises(DataError, match=r"with the lists a.jsonl, b.jsonl; it must be JourneyDB's"):
        journeydb.list_of(tmp_path)


def _folder(folder: Path) -> Path:
    images(folder, "0.png", "b/1.png", "b/2.png", "a/3.png")
    for name in ("0", "b/1", "b/2", "a/3"):
        (folder / f"{name}.txt").write_text(f"caption of {name}")
    (folder / "b" / "1.json").write_text('{"lang": "en"}')
    return folder


def test_a_folder_with_captions_beside_the_images(tmp_path: Path):
    kept, rejects = read(config("folder", _folder(tmp_path)))
    assert rejects == []
    assert [(k.sample.key, k.sample.caption) for k in kept] == [
        (n, f"caption of {n}") for n in ("0", "a/3", "b/1", "b/2")
    ]
    assert kept[2].sample.meta == {"lang": "en"}


def test_a_folder_is_cut_by_names_and_its_listing_tells_of_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_core.data.sources.folder.SAMPLES_PER_UNIT", 1)
    source = open_source(config("folder", _folder(tmp_path)), tmp_path)
    listed = list(source.units())
    assert [unit.part for unit in listed] == [("0.png",) * 2, ("3.png",) * 2, ("1.png",) * 2, ("2.png",) * 2]
    assert [Unit.from_dict(json.loads(json.dumps(unit.as_dict()))) for unit in listed] == listed
    (tmp_path / "b" / "1.txt").write_text("another caption")
    again = list(source.units())
    assert [a == b for a, b in zip(listed, again)] == [True, True, False, True]


def test_hostile_and_incomplete_neighbours_in_a_folder(tmp_path: Path):
    root = _folder(tmp_path / "root")
    (tmp_path / "secret.txt").write_text("secret")
    images(root, "c/no_caption.png", "c/stolen.png", "c/same.png")
    (root / "c" / "stolen.txt").symlink_to(tmp_path / "secret.txt")
    (root / "c" / "same.txt").write_text("x")
    (root / "c" / os.fsdecode(b"caf\xe9.png")).write_bytes(image())
    kept, rejects = read(config("folder", root))
    assert keys(kept) == ["0", "a/3", "b/1", "b/2", "c/same"]
    assert reasons(rejects) == ["unsafe_path", "missing_caption", "unsafe_path"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it holds no image"):
        read(config("folder", tmp_path / "empty"))
    with pytest.raises(DataError, match="it must be a folder of images"):
        read(config("folder", tmp_path / "gone"))


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        ({"min_side": 17}, "min_side"),
        ({"max_aspect": 1.9}, "max_aspect"),
        ({"min_aesthetic_score": 5.01}, "aesthetic_score"),
        ({"caption_min_chars": 4}, "caption_length"),
        ({"caption_max_chars": 2}, "caption_length"),
        ({"languages": ["en", "fr"]}, "language"),
        (
            {
                "min_side": 16,
                "max_aspect": 2.0,
                "min_aesthetic_score": 5.0,
                "caption_min_chars": 3,
                "caption_max_chars": 3,
            },
            None,
        ),
    ],
)
def test_a_filter_drops_what_it_says_and_nothing_else(tmp_path: Path, filters: dict[str, Any], reason: str | None):
    meta = json.dumps({"score": "5", "lang": "de"}).encode()
    tar(tmp_path / "x.tar", [("0.png", image(32, 16)), ("0.txt", b"abc"), ("0.json", meta)])
    data = config("webdataset", tmp_path, {"aesthetic_score": "score", "language": "lang"}, filters=filters)
    kept, rejects = read(data)
    assert len(kept) == (0 if reason else 1)
    assert reasons(rejects) == ([reason] if reason else [])
    counted = RejectCount()
    for reject in rejects:
        counted.add(reject)
    assert counted.broken() == 0


def test_sides_in_the_record_are_judged_before_the_image_is_looked_at(tmp_path: Path):
    rows = [{"path": "gone.png", "caption": "x", "w": 10, "h": 500}]
    data = config(
        "manifest", lines(tmp_path / "m.jsonl", rows), {**TABLE, "width": "w", "height": "h"}, filters={"min_side": 100}
    )
    assert reasons(read(data)[1]) == ["min_side"]


def test_equal_images_stay_once_if_they_are_dropped_at_all(tmp_path: Path):
    tar(tmp_path / "x.tar", [m for i in range(3) for m in ((f"{i}.png", image()), (f"{i}.txt", b"x"))])
    kept, rejects = read(config("webdataset", tmp_path))
    assert (keys(kept), reasons(rejects)) == (["x/0"], ["duplicate_image"] * 2)
    assert len(read(config("webdataset", tmp_path, filters={"drop_duplicates": False}))[0]) == 3


def test_too_much_that_is_broken_is_refused_with_the_reasons_and_what_is_filtered_is_not() -> None:
    counted = RejectCount()
    for i in range(2):
        counted.add(Reject(str(i), "broken_image", f"{i}: image of 3 bytes cannot be decoded"))
    told = r"2 of 152 samples are broken, a share of 0.0132; .*max_reject_share allows 0.01. broken_image: 2, the first: 0: image"
    with pytest.raises(DataError, match=told):
        check_rejects(150, counted, 1, 0.01)
    with pytest.raises(DataError, match="the dataset is empty: 0 samples kept, 0 rejected"):
        check_rejects(0, RejectCount(), 1, 0.01)
    for i in range(100):
        counted.add(Reject(str(i), "min_side", "small"))
    check_rejects(150, counted, 1, 0.01)
    cut = RejectCount()
    cut.add(Reject("a", "truncated_tar", "a.tar is cut off"))
    check_rejects(5000, cut, 200, 0.01)
    with pytest.raises(
        DataError, match=r"1 of 3 files are cut off .*, a share of 0.3333; .* the first: a.tar is cut off"
    ):
        check_rejects(5000, cut, 3, 0.01)


def test_counts_merge_in_order_and_survive_json() -> None:
    first, second = RejectCount(), RejectCount()
    for i in range(4):
        first.add(Reject(f"a{i}", "min_side", "x" * 5000))
        second.add(Reject(f"b{i}\udcff", "min_side", "y"))
    first.merge(RejectCount.from_dict(json.loads(json.dumps(second.as_dict()))))
    (entry,) = first.as_dict().values()
    assert entry["count"] == 8
    assert [example["key"] for example in entry["examples"]] == ["a0", "a1", "a2", "a3", "b0\\udcff"]
    assert len(entry["examples"][0]["detail"]) == 1000


@pytest.mark.parametrize(
    ("kind", "fields", "more", "told"),
    [
        ("manifest", {}, {}, "fields.image must name the field"),
        ("journeydb", {"image": "img_path"}, {}, "fields.caption must name a field, not 'txt'"),
        ("folder", {"image": "path"}, {}, "kind 'folder' has no paths"),
        ("webdataset", {}, {"filters": {"languages": ["en"]}}, "fields.language must name"),
        ("webdataset", {}, {"filters": {"min_aesthetic_score": 5}}, "fields.aesthetic_score must name"),
        ("webdataset", {"width": "w"}, {}, "width and fields.height must both be given"),
        (
            "webdataset",
            {},
            {"filters": {"caption_min_chars": 9, "caption_max_chars": 3}},
            "is 9, above caption_max_chars, 3",
        ),
        ("webdataset", {}, {"buckets": [[64, 32], [32, 16]]}, r"\[64, 32\] and \[32, 16\] of one aspect ratio"),
        ("webdataset", {}, {"buckets": [[64, 0]]}, "sides must be positive"),
        ("webdataset", {}, {"embedded": {"samples": 50, "kinds": ["colors"]}}, "then embedded must be null"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(kind: str, fields: dict[str, Any], more: Any, told: str):
    with pytest.raises(ConfigError, match=told):
        config(kind, Path("/x"), fields, **more)


def test_a_kind_needs_its_path():
    with pytest.raises(ConfigError, match="kind is 'folder'; then path must be given"):
        config("folder", None)
