"""Shards of latents: written, found again, and refused when they are not what the manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_core.data.webdataset import Reject

from moe_core.data import latents, splits
from moe_core.data.latents import LatentDataset, LatentRow
from moe_core.errors import DataError


def _rows(start: int, count: int) -> list[LatentRow]:
    return [
        LatentRow(f"k{i}", torch.full((4, 2, 2), float(i)), f"caption {i} é", {"tag": "x"})
        for i in range(start, start + count)
    ]


def _folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shards = [
        latents.write_shard(folder, "train", 0, _rows(0, 3)),
        latents.write_shard(folder, "train", 1, _rows(3, 2)),
    ]
    rejects = [Reject(f"r{i}", "broken_image", f"detail {i}") for i in range(8)]
    latents.write_manifest(folder, {"train": shards, "val": []}, rejects, {"sha256": "abc"})
    return folder


def test_rows_are_found_across_shards(tmp_path: Path):
    data = LatentDataset(_folder(tmp_path), "train", verify=True)
    found, captions = data.get([4, 0, 3])
    assert len(data) == 5
    assert found.shape == (3, 4, 2, 2)
    assert found[:, 0, 0, 0].tolist() == [4.0, 0.0, 3.0]
    assert captions == ["caption 4 é", "caption 0 é", "caption 3 é"]


def test_the_manifest_counts_rejects_by_reason(tmp_path: Path):
    rejects = latents.read_manifest(_folder(tmp_path))["rejects"]
    assert rejects["broken_image"]["count"] == 8
    assert rejects["broken_image"]["examples"] == [f"detail {i}" for i in range(latents.MAX_EXAMPLES)]


def test_equal_rows_give_equal_bytes(tmp_path: Path):
    first, second = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_a_changed_shard_is_refused(tmp_path: Path):
    shard = _folder(tmp_path) / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    LatentDataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"train-00001.*sha256.*the manifest says"):
        LatentDataset(tmp_path, "train", verify=True)
    shard.write_bytes(content[:-4])
    with pytest.raises(DataError, match=r"train-00001.*bytes; the manifest says"):
        LatentDataset(tmp_path, "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.*does not exist"):
        LatentDataset(tmp_path, "train")


def test_missing_and_empty_splits_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="stage shard writes it"):
        LatentDataset(tmp_path, "train")
    _folder(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        LatentDataset(tmp_path, "test")
    with pytest.raises(DataError, match=r"split 'val'.* is empty"):
        LatentDataset(tmp_path, "val")


def test_an_index_outside_is_refused(tmp_path: Path):
    with pytest.raises(IndexError, match="index is 5"):
        LatentDataset(_folder(tmp_path), "train").get([5])


def test_rows_of_different_shapes_are_refused(tmp_path: Path):
    rows = [*_rows(0, 1), LatentRow("k", torch.zeros(4, 3, 3), "x", {})]
    with pytest.raises(DataError, match="all of one shape"):
        latents.write_shard(tmp_path, "train", 0, rows)


def test_a_split_depends_on_the_key_alone():
    keys = [f"sample-{i}" for i in range(50)]
    split = dict(zip(keys, splits.assign(keys, 5, 7, seed=1), strict=True))
    assert [list(split.values()).count(name) for name in splits.SPLITS] == [38, 5, 7]
    backwards = keys[::-1]
    assert dict(zip(backwards, splits.assign(backwards, 5, 7, seed=1), strict=True)) == split
    assert splits.assign(keys, 5, 7, seed=2) != list(split.values())


def test_too_few_samples_for_the_splits_are_refused():
    with pytest.raises(DataError, match="there are 12 good samples"):
        splits.assign([str(i) for i in range(12)], 5, 7, seed=0)
    with pytest.raises(DataError, match="'a' stands twice"):
        splits.assign(["a", "b", "a"], 1, 0, seed=0)
