"""Sharding on a real Ray: what comes out does not depend on workers; what is broken is counted, or ends the stage."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from PIL import Image

from moe_core import text_encoding
from moe_core.config import Params, parse
from moe_core.data import embedded
from moe_core.data.latents import LatentDataset
from moe_core.errors import ConfigError, DataError
from tasks import pictures, shard, source, tracking
from tasks.batches import make_batch
from tasks.fingerprint import Identity
from tasks.places import SHARDS, SOURCE, TEACHER
from tasks.progress import Progress
from tasks.resume import ResumeFolder
from tasks.source_files import LISTING
from tasks.stage import Stage, _ours
from tasks.tracking import StageRun
from tests.moe_core.tiny_pipeline import tiny_pipeline

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("ray_session"),
]
SAMPLES = 150


class OnSession(Stage):
    """A stage that finds Ray up: the session's."""

    def ray(self) -> contextlib.nullcontext[None]:  # type: ignore[override]
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "mlflow.db"
    tracking.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def stage(project: Path, migrated: Path) -> Callable[..., Stage]:
    """Makes the stage in a project with a tiny teacher; `workers` and sections may be set."""
    (project / "mlflow.db").write_bytes(migrated.read_bytes())
    if not (project / TEACHER).exists():
        tiny_pipeline().save_pretrained(project / TEACHER)

    def make(workers: int = 1, data: dict[str, Any] | None = None, **limits: Any) -> Stage:
        values = yaml.safe_load((project / "params.yaml").read_text())
        values["compute"].update(num_workers=workers)
        values["data"]["embedded"].update(samples=SAMPLES)
        values["data"]["shard"].update(
            samples_per_shard=40, validation_samples=20, calibration_samples=10, batch_size=16
        )
        values["data"]["shard"].update(limits)
        for section, changes in (data or {}).items():
            values["data"][section] = {**values["data"][section], **changes} if isinstance(changes, dict) else changes
        values["kd"]["validation_samples"] = 20
        if values["data"]["kind"] != "embedded":
            values["eval"]["classifier"] = None
        identity = Identity("shard", {str(SOURCE): "0" * 32 + ".dir"}, {})
        run = StageRun(project, identity)
        resume = ResumeFolder(project / ".resume", identity)
        resume.path.mkdir(parents=True, exist_ok=True)
        return OnSession("shard", project, parse(Params, values), identity, run, Progress("shard"), resume)

    return make


def sharded(stage: Stage) -> Path:
    """Runs the stage from nothing; the folder that it wrote."""
    assert stage.resume is not None
    shutil.rmtree(stage.resume.path)
    stage.resume.path.mkdir()
    shard.shard(stage)
    return stage.root / SHARDS


@pytest.fixture
def tars(project: Path, stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source, in three tars."""
    monkeypatch.setattr(embedded, "SAMPLES_PER_TAR", 60)
    source.source(stage())
    return project / SOURCE


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def add(tar: Path, **members: bytes) -> None:
    with tarfile.open(tar, "a") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_one_and_two_workers_write_the_same_bytes(
    tars: Path, stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list(tars.glob("*.tar"))) == 3
    folder = sharded(stage(1))
    one = hashes(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: split["samples"] for name, split in manifest["splits"].items()} == {
        "train": 120,
        "val": 20,
        "calibration": 10,
    }
    assert [s["rows"] for s in manifest["splits"]["train"]["shards"]] == [40, 40, 40]
    assert manifest["rejects"] == {}
    train = LatentDataset(folder, "train", verify=True)
    keys = [record["key"] for record in train.records(range(len(train)))]
    assert keys == sorted(keys)
    assert hashes(sharded(stage(2))) == one
    # Ray runs reader and encoder in one actor where both ask for the same; on GPUs they do not, and pixels travel.
    together = ray.data.Dataset.map_batches
    monkeypatch.setattr(ray.data.Dataset, "map_batches", lambda *a, **k: together(*a, **{**k, "num_cpus": 0.25}))
    assert hashes(sharded(stage(2))) == one


def test_what_is_broken_is_counted_by_reason_and_the_rest_is_kept(tars: Path, stage: Callable[..., Stage]) -> None:
    first = sorted(tars.glob("*.tar"))[0]
    add(first, bad__png=b"no image", bad__txt=b"a red one", dumb__png=png(), wide__png=png(), wide__txt=b"a red box")
    sharded(stage(max_reject_share=0.05))
    manifest = json.loads((stage().root / SHARDS / "manifest.json").read_text())
    assert {reason: entry["count"] for reason, entry in manifest["rejects"].items()} == {
        "broken_image": 1,
        "missing_caption": 1,
    }
    assert sum(split["samples"] for split in manifest["splits"].values()) == SAMPLES + 1


def test_a_teacher_is_trained_on_the_rest_and_refuses_what_shard_would_refuse(
    tars: Path, stage: Callable[..., Stage]
) -> None:
    made = stage()
    found = pictures.load(made.root, made.params)
    assert (len(found.train), len(found.train_captions), len(found.validation)) == (SAMPLES - 30, SAMPLES - 30, 20)
    add(sorted(tars.glob("*.tar"))[0], one__png=b"no image", one__txt=b"a red one", two__png=png())
    pictures._read.cache_clear()
    with pytest.raises(DataError, match=r"2 of 152 samples are broken.*broken_image: 1.*missing_caption: 1"):
        pictures.load(made.root, made.params)


@pytest.mark.slow
def test_a_cut_off_tar_is_a_reject_and_a_file_that_is_no_tar_an_error(tars: Path, stage: Callable[..., Stage]) -> None:
    last = sorted(tars.glob("*.tar"))[-1]
    last.write_bytes(last.read_bytes()[:20000])
    with pytest.raises(DataError, match=r"1 of 3 files are cut off.*truncated_tar: 1, the first: .*is cut off"):
        sharded(stage())
    assert not (stage().root / SHARDS).exists()
    last.write_bytes(b"no tar at all" * 100)
    with pytest.raises(
        DataError, match=r"unreadable_file: 1, the first: \S+2.tar \(1300 bytes\) cannot be read as a tar"
    ):
        sharded(stage())


def test_a_tar_that_is_gone_is_named(tars: Path, stage: Callable[..., Stage]) -> None:
    gone = {"path": "gone.tar", "bytes": 1, "changed": None, "part": None}
    (tars / LISTING).write_text(json.dumps(gone) + "\n")
    with pytest.raises(DataError, match=r"gone.tar, which .* names, does not exist"):
        shard.shard(stage())


def _photos(count: int) -> list[tuple[str, bytes]]:
    """Members of a tar: pictures of three aspect ratios, every tenth the same as the one before."""
    members = []
    for number in range(count):
        shade = number - (number % 10 == 9)
        size = ((24, 24), (40, 20), (20, 40))[shade % 3]
        file = io.BytesIO()
        Image.new("RGB", size, (shade, 255 - shade, 7)).save(file, "PNG")
        members += [(f"{number:04d}.png", file.getvalue()), (f"{number:04d}.txt", f"photo {number}".encode())]
    return members


@pytest.fixture
def own(project: Path) -> dict[str, Any]:
    """Section `data` of three tars of one's own; the last has the first's pictures once more."""
    folder = project / "own"
    folder.mkdir()
    members = _photos(120)
    for name, part in (("a", members[:120]), ("b", members[120:]), ("c", members[:40])):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for member, content in part:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return {
        "kind": "webdataset",
        "path": str(folder),
        "embedded": None,
        "filters": {"drop_duplicates": True},
        "buckets": [[16, 16], [24, 12], [12, 24]],
    }


@pytest.mark.slow
def test_buckets_and_duplicates_come_out_the_same_from_one_and_two_workers(
    own: dict[str, Any], stage: Callable[..., Stage]
) -> None:
    source.source(stage(data=own))
    folder = sharded(stage(1, own, text_embeddings="stored"))
    manifest = json.loads((folder / "manifest.json").read_text())
    # 120 pictures, every tenth twice, and 20 once more in the third tar.
    assert {reason: entry["count"] for reason, entry in manifest["rejects"].items()} == {"duplicate_image": 12 + 20}
    assert manifest["rejects"]["duplicate_image"]["examples"][0]["key"] == "a/0009"
    assert sum(split["samples"] for split in manifest["splits"].values()) == 108
    train = LatentDataset(folder, "train", verify=True)
    assert [shard.bucket for shard in train.shards] == [(16, 16), (24, 12), (12, 24)]
    latents, captions = train.get(range(3))
    assert latents.shape[2:] == (8, 8)
    assert train.get([len(train) - 1])[0].shape[2:] == (12, 6)
    text = train.text(range(3))
    assert text is not None
    pipeline = tiny_pipeline()
    fresh, pooled, _ = text_encoding.encode_prompts(pipeline, captions, 8)
    # Encoded and stored in bf16.
    torch.testing.assert_close(text[0], fresh, atol=0.05, rtol=0.05)
    torch.testing.assert_close(text[1], pooled, atol=0.05, rtol=0.05)
    params = stage(data=own).params
    batch = make_batch(pipeline, train, range(3), 1, range(3), params)
    assert torch.equal(batch.prompt_embeds, text[0])
    one = hashes(folder)
    assert hashes(sharded(stage(2, own, text_embeddings="stored"))) == one


def test_a_bucket_that_the_vae_cannot_cut_is_refused_before_any_work(
    own: dict[str, Any], stage: Callable[..., Stage]
) -> None:
    source.source(stage(data=own))
    with pytest.raises(ConfigError, match=r"data.buckets has \[18, 16\] .* multiples of 4"):
        shard.shard(stage(data={**own, "buckets": [[16, 16], [18, 16]]}))


def test_an_error_of_ours_is_found_in_what_ray_wraps_around_it() -> None:
    @ray.remote
    def broken() -> None:
        raise DataError("data/shards has 3 bytes")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(broken.remote())
    assert str(_ours(caught.value)) == "data/shards has 3 bytes"
    assert _ours(ValueError("another")) is None
