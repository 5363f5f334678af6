"""Shards of latents: written, found again, and refused when they are not what the manifest says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moe_core.data import duplicates, latents, splits
from moe_core.data.latents import LatentDataset
from moe_core.data.shard_files import LatentRow, write_manifest, write_shard
from moe_core.data.sources.samples import Reject, RejectCount
from moe_core.errors import DataError


def _rows(start: int, count: int) -> list[LatentRow]:
    return [
        LatentRow(f"k{i}", torch.full((4, 2, 2), float(i)), f"caption {i} é\u2028", {"tag": "x"})
        for i in range(start, start + count)
    ]


def _folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shards = [
        write_shard(folder, "train", 0, (16, 16), _rows(0, 3)),
        write_shard(folder, "train", 1, (16, 16), _rows(3, 2)),
    ]
    rejects = RejectCount()
    for i in range(8):
        rejects.add(Reject(f"r{i}", "broken_image", f"detail {i}"))
    write_manifest(folder, {"train": shards, "val": []}, rejects, {"sha256": "abc"})
    return folder


def test_rows_are_found_across_shards(tmp_path: Path):
    data = LatentDataset(_folder(tmp_path), "train", verify=True)
    found, captions = data.get([4, 0, 3])
    assert len(data) == 5
    assert found.shape == (3, 4, 2, 2)
    assert found[:, 0, 0, 0].tolist() == [4.0, 0.0, 3.0]
    assert captions == [f"caption {i} é\u2028" for i in (4, 0, 3)]


def test_the_manifest_counts_rejects_by_reason(tmp_path: Path):
    rejects = latents.read_manifest(_folder(tmp_path))["rejects"]
    assert rejects["broken_image"]["count"] == 8
    assert rejects["broken_image"]["examples"] == [{"key": f"r{i}", "detail": f"detail {i}"} for i in range(5)]


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
        write_shard(tmp_path, "train", 0, (16, 16), rows)


def _digests(keys: list[str], seed: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(splits.digest(seed, key) for key in keys), np.uint8).reshape(-1, 16)


def test_a_split_depends_on_the_key_alone():
    keys = [f"sample-{i}" for i in range(50)]
    dealt = splits.assign(_digests(keys, 1), 5, 7)
    assert np.bincount(dealt).tolist() == [38, 5, 7]
    assert np.array_equal(splits.assign(_digests(keys[::-1], 1), 5, 7), dealt[::-1])
    assert not np.array_equal(splits.assign(_digests(keys, 2), 5, 7), dealt)


def test_a_split_takes_the_smallest_hashes():
    keys = [f"sample-{i}" for i in range(500)]
    ranked = sorted(range(500), key=lambda i: hashlib.sha256(f"3/{keys[i]}".encode()).digest())
    dealt = splits.assign(_digests(keys, 3), 20, 30)
    assert sorted(ranked[:20]) == np.flatnonzero(dealt == splits.SPLITS.index("val")).tolist()
    assert sorted(ranked[20:50]) == np.flatnonzero(dealt == splits.SPLITS.index("calibration")).tolist()
    assert not splits.assign(_digests(keys, 3), 0, 0).any()


def test_too_few_samples_for_the_splits_are_refused():
    with pytest.raises(DataError, match="there are 12 good samples"):
        splits.assign(_digests([str(i) for i in range(12)], 0), 5, 7)


def test_the_first_of_equal_hashes_stays():
    rng = np.random.default_rng(0)
    # Few values in either half: hashes that agree in one half only are there, too.
    digests = rng.integers(0, 3, (400, 2)).astype(np.uint64).view(np.uint8)
    seen: set[bytes] = set()
    slow = [not (row.tobytes() in seen or seen.add(row.tobytes())) for row in digests]
    assert duplicates.first_of_each(digests).tolist() == slow
    assert duplicates.first_of_each(digests[:0]).tolist() == []


def _in_buckets(folder: Path, text: bool = False) -> Path:
    """Seven rows of 2 x 2 and four of 2 x 4."""
    folder.mkdir(exist_ok=True)
    shapes = {(16, 16): (4, 2, 2), (32, 16): (4, 2, 4)}
    made, number = [], 0
    for bucket, counts in (((16, 16), (4, 3)), ((32, 16), (4,))):
        for count in counts:
            rows = [
                LatentRow(
                    f"{number}-{i}",
                    torch.full(shapes[bucket], float(i)),
                    f"{number}-{i}",
                    {},
                    {"prompt_embeds": torch.full((3, 5), i + 0.5).bfloat16(), "pooled": torch.full((6,), i).bfloat16()}
                    if text
                    else {},
                )
                for i in range(count)
            ]
            made.append(write_shard(folder, "train", number, bucket, rows))
            number += 1
    write_manifest(folder, {"train": made}, RejectCount(), {})
    return folder


def test_a_batch_is_of_one_bucket(tmp_path: Path):
    data = LatentDataset(_in_buckets(tmp_path), "train")
    assert data.sizes == [7, 4]
    assert data.get([7, 10])[0].shape == (2, 4, 2, 4)
    assert data.get([6])[1] == ["1-2"]
    with pytest.raises(DataError, match=r"rows \[6, 7\] are of 2 buckets"):
        data.get([6, 7])
    for step in range(40):
        assert data.get(data.draw(5, range(step * 3, step * 3 + 3), 3))[0].ndim == 4


def test_cuts_take_every_row_once_and_of_each_bucket_its_share(tmp_path: Path):
    data = LatentDataset(_in_buckets(tmp_path), "train")
    assert data.cuts(3) == [range(3), range(3, 6), range(6, 7), range(7, 10), range(10, 11)]
    assert data.cuts(3, 6) == [range(3), range(3, 4), range(7, 9)]
    assert data.cuts(3, 100) == data.cuts(3)
    one = LatentDataset(_folder(tmp_path / "one"), "train")
    assert one.cuts(2, 3) == [range(2), range(2, 3)]


def test_stored_text_comes_back_in_float32(tmp_path: Path):
    features, pooled = LatentDataset(_in_buckets(tmp_path / "text", text=True), "train").text([8, 7]) or (None, None)
    assert features is not None
    assert pooled is not None
    assert (features.dtype, features.shape, features[:, 0, 0].tolist()) == (torch.float32, (2, 3, 5), [1.5, 0.5])
    assert pooled[:, 0].tolist() == [1.0, 0.0]
    assert LatentDataset(_in_buckets(tmp_path / "none"), "train").text([0]) is None


def test_an_index_with_a_line_too_few_is_refused(tmp_path: Path):
    index = _folder(tmp_path) / "train-00000.jsonl"
    cut = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(cut[:2]) + b" " * len(cut[2]))
    with pytest.raises(DataError, match=r"train-00000.jsonl has 2 lines; the manifest says 3"):
        LatentDataset(tmp_path, "train").get([0])
