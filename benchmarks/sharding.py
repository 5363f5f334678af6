"""Sharding, against a plain loop on the same images: images a second and core, and the memory of driver and workers over time.

    python -m benchmarks.sharding [--images 100000] [--folder DIR]     writes benchmarks/results/sharding.json

- The images are JPEGs of four sizes, 256 pixels on the short side (208 for two of them), in tars as img2dataset writes them. 512 of them
  are different to look at; a comment in each file makes its bytes its own, so that none is a duplicate.
- The stage is the real one, on a private Ray: read, decode, cut to three buckets of about 64 x 64 pixels, encode, write, hash. Its VAE is as
  small as a VAE of FLUX's shape can be (four levels of one channel), so that it is not what is measured; it takes time all the same, and the
  loop is timed with the same VAE, too.
- The plain loop is one process: tarfile, Pillow's decode and fit, the pixels into a tar. It checks, hashes and filters nothing, and decodes
  every JPEG whole, where the stage has libjpeg leave out what resizing would.
- "1 core": driver, Ray and the one worker together are bound to one core. The seconds are those of the whole stage, start of the worker
  included; `steady` leaves out what came before the first unit was finished.
- Memory is private to a process (resident minus shared), sampled twice a second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image, ImageOps

RESULTS = Path("benchmarks/results/sharding.json")
SIZES = ((256, 256), (320, 208), (208, 320), (384, 256))
BUCKETS = ((64, 64), (80, 48), (48, 80))
SAMPLES_PER_TAR = 1000
LOOKS = 512
BATCH = 64
POINTS = 40
"""Of a memory curve that are kept."""


def jpegs() -> list[bytes]:
    """The different pictures: soft shapes with some grain."""
    made = []
    for look in range(LOOKS):
        rng = np.random.default_rng(look)
        width, height = SIZES[look % len(SIZES)]
        soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(soft) + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def write_tar(folder: Path, number: int, count: int, looks: list[bytes]) -> None:
    """One tar of the source."""
    with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
        for index in range(count):
            key = f"{number:05d}{index:04d}"
            jpeg = looks[(number * SAMPLES_PER_TAR + index) % LOOKS]
            comment = f"{key:>16}".encode()
            own = jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
            size = SIZES[(number * SAMPLES_PER_TAR + index) % LOOKS % len(SIZES)]
            meta = {
                "key": key,
                "url": f"https://example.org/{key}.jpg",
                "width": size[0],
                "height": size[1],
                "status": "success",
            }
            for suffix, content in (
                ("jpg", own),
                ("txt", f"a soft picture, number {key}".encode()),
                ("json", json.dumps(meta).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_source(folder: Path, images: int) -> None:
    """All tars, on all cores."""
    folder.mkdir(parents=True)
    looks = jpegs()
    tars = -(-images // SAMPLES_PER_TAR)
    counts = [min(SAMPLES_PER_TAR, images - tar * SAMPLES_PER_TAR) for tar in range(tars)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_tar, [folder] * tars, range(tars), counts, [looks] * tars))


def make_vae(folder: Path) -> None:
    """The teacher, as far as the stage looks at it: a VAE that does next to nothing."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[1] * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    vae.save_pretrained(folder / "vae")


def plain(tars: Path, vae: Path | None) -> dict[str, float]:
    """The loop; with `vae` it encodes too, in batches of one bucket."""
    import torch
    from diffusers import AutoencoderKL

    from moe_core.data.sources.decoding import nearest
    from moe_core.teacher_training import encode
    from moe_core.text_encoding import LOADING

    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(vae, subfolder="vae", **LOADING).eval() if vae else None
    began, images = time.monotonic(), 0
    waiting: dict[tuple[int, int], list[np.ndarray]] = {bucket: [] for bucket in BUCKETS}
    with tempfile.TemporaryDirectory(dir=tars.parent) as out:
        for path in sorted(tars.glob("*.tar")):
            with tarfile.open(path) as tar, tarfile.open(Path(out) / path.name, "w") as target:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    content = file.read()
                    if member.name.endswith(".jpg"):
                        image = Image.open(io.BytesIO(content)).convert("RGB")
                        bucket = BUCKETS[nearest(*image.size, BUCKETS)]
                        pixels = np.asarray(ImageOps.fit(image, bucket, Image.Resampling.BICUBIC))
                        content = pixels.tobytes()
                        images += 1
                        if model is not None:
                            waiting[bucket].append(pixels)
                            if len(waiting[bucket]) == BATCH:
                                encode(model, torch.from_numpy(np.stack(waiting[bucket])))
                                waiting[bucket].clear()
                    new = tarfile.TarInfo(member.name)
                    new.size = len(content)
                    target.addfile(new, io.BytesIO(content))
    seconds = time.monotonic() - began
    return {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 1)}


class Memory:
    """Samples this process and Ray's workers."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.driver: list[tuple[float, float]] = []
        self.workers: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.5):
            at = round(time.monotonic() - self.began, 1)
            self.driver.append((at, _private(me)))
            largest = 0.0
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.name().startswith("ray::"):
                        largest = max(largest, _private(child))
            self.workers.append((at, largest))

    def stop(self) -> dict[str, Any]:
        """Peaks, the growth from the second quarter of the time to its last, and curves; MB."""
        self._stop.set()
        self._thread.join()
        found: dict[str, Any] = {}
        for name, curve in (("driver", self.driver), ("largest_worker", self.workers)):
            quarter = max(len(curve) // 4, 1)
            values = [value for _, value in curve]
            found[name] = {
                "peak_mb": max(values),
                "second_quarter_mb": round(float(np.median(values[quarter : 2 * quarter] or values)), 1),
                "last_quarter_mb": round(float(np.median(values[-quarter:])), 1),
                "curve_s_mb": curve[:: max(len(curve) // POINTS, 1)],
            }
        return found


def _private(process: psutil.Process) -> float:
    info = process.memory_info()
    return round((info.rss - info.shared) / 2**20, 1)


class Times:
    """A stage's progress: when each unit was finished."""

    def __init__(self) -> None:
        self.units: list[float] = []

    def update(self, phase: str, step: int, steps: int, loss: float | None = None) -> None:
        """Notes the time."""
        if phase == "encode":
            self.units.append(time.monotonic())


def staged(folder: Path, tars: Path, cores: int) -> dict[str, Any]:
    """The stage, in this process, on so many cores with as many workers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import ray

    from moe_core.config import Params, parse
    from tasks import shard, source
    from tasks.cluster import OBJECT_STORE_BYTES
    from tasks.fingerprint import Identity
    from tasks.places import SOURCE
    from tasks.resume import ResumeFolder
    from tasks.stage import Stage

    class Measured(Stage):
        def ray(self) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    values = yaml.safe_load(Path("params.yaml").read_text())
    preset = yaml.safe_load(Path("params/data/webdataset.yaml").read_text())["data"]
    preset.update(path=str(tars), buckets=[list(bucket) for bucket in BUCKETS])
    preset["filters"].update(min_side=128, caption_min_chars=3)
    preset["shard"].update(batch_size=BATCH, validation_samples=64, calibration_samples=64)
    values["data"], values["eval"]["classifier"] = preset, None
    values["kd"]["validation_samples"] = 64
    values["compute"].update(num_workers=cores, cpus_per_worker=1, stages={})
    identity = Identity("shard", {str(SOURCE): "benchmark"}, {})
    resume = ResumeFolder(folder / ".resume", identity)
    resume.path.mkdir(parents=True)
    run = SimpleNamespace(metrics=lambda metrics: None, tag=lambda tags: None)
    times = Times()
    stage = Measured("shard", folder, parse(Params, values), identity, run, times, resume)  # type: ignore[arg-type]
    os.environ["PYTHONPATH"] = os.getcwd()
    ray.init(
        address="local",
        num_cpus=cores,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    source.source(stage)
    memory, began = Memory(), time.monotonic()
    shard.shard(stage)
    seconds = time.monotonic() - began
    manifest = json.loads((folder / "data" / "shards" / "manifest.json").read_text())
    images = sum(split["samples"] for split in manifest["splits"].values())
    steady = (
        (len(times.units) - cores) * SAMPLES_PER_TAR / (times.units[-1] - times.units[cores - 1])
        if len(times.units) > cores
        else None
    )
    ray.shutdown()
    return {
        "cores": cores,
        "images": images,
        "rejects": manifest["rejects"],
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
        "steady_images_per_second": None if steady is None else round(steady, 1),
        "memory": memory.stop(),
    }


def in_process(*arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own: its memory is its own, and so are its cores."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sharding", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        arguments[0], {key: value for key, value in result.items() if key not in ("memory", "rejects")}, file=sys.stderr
    )
    return result


def measure(images: int, folder: Path) -> dict[str, Any]:
    """Everything, one after the other."""
    cores = len(os.sched_getaffinity(0))
    whole, quarter = folder / "whole", folder / "quarter"
    make_source(whole, images)
    make_source(quarter, images // 4)
    results: dict[str, Any] = {"images": images, "cores": cores}
    for name, vae in (("plain_loop", ()), ("plain_loop_with_vae", ("--vae", str(folder / "vae")))):
        make_vae(folder / "vae") if vae and not (folder / "vae").exists() else None
        results[name] = in_process("plain", "--tars", str(whole), *vae)
    runs = [("stage_1_core", whole, 1), (f"stage_{cores}_cores", whole, cores), ("stage_quarter", quarter, cores)]
    for name, tars, used in runs:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            make_vae(Path(root) / "data" / "teacher")
            results[name] = in_process("stage", "--folder", root, "--tars", str(tars), "--cores", str(used))
    one, every = results["stage_1_core"], results[f"stage_{cores}_cores"]
    loop = results["plain_loop"]["images_per_second"]
    results["summary"] = {
        "ratio_1_core": round(one["images_per_second"] / loop, 3),
        "ratio_1_core_steady": round((one["steady_images_per_second"] or 0) / loop, 3),
        "ratio_1_core_against_loop_with_vae": round(
            one["images_per_second"] / results["plain_loop_with_vae"]["images_per_second"], 3
        ),
        f"ratio_per_core_of_{cores}": round(every["images_per_second"] / cores / loop, 3),
        "scaling": round(every["images_per_second"] / one["images_per_second"], 3),
        "driver_peak_mb": every["memory"]["driver"]["peak_mb"],
        "driver_peak_mb_quarter_of_the_images": results["stage_quarter"]["memory"]["driver"]["peak_mb"],
        "largest_worker_peak_mb": every["memory"]["largest_worker"]["peak_mb"],
        "largest_worker_peak_mb_quarter_of_the_images": results["stage_quarter"]["memory"]["largest_worker"]["peak_mb"],
    }
    return results


def main() -> None:
    """The whole benchmark, or one measurement of it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("what", nargs="?", choices=("all", "plain", "stage"), default="all")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument(
        "--folder", type=Path, help="for the images and shards, some 4 GB at 100,000; default: a temporary one"
    )
    parser.add_argument("--tars", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vae", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "plain":
        print(json.dumps(plain(given.tars, given.vae)))
    elif given.what == "stage":
        print(json.dumps(staged(given.folder, given.tars, given.cores)))
    else:
        with tempfile.TemporaryDirectory(prefix="d2m-sharding-", dir=given.folder) as folder:
            results = measure(given.images, Path(folder))
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results["summary"], indent=2))


if __name__ == "__main__":
    main()
