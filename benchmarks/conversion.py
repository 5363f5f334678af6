"""Does a checkpoint of FLUX.1's size convert in bounded memory, and how fast beside `cp` on the same disk?

    python -m benchmarks.conversion [--folder DIR]         24 GB of random bf16 weights -> L; writes benchmarks/results/conversion.json
    python -m benchmarks.conversion --double 4 --single 4  the same with fewer blocks; writes the result below DIR only

- DIR (default: a folder of this name in the temporary folder) needs 48 GB; the source in it is made once, and kept for the next time.
- Dense to L at once (`stream.to_moe_joint`): 1S12E2A, the first three double blocks dense, conditioning 3072 -> 256 fitted to 512
  vectors, as many as the presets take.
- `cp` before and after, so that a disk that becomes slower or faster shows. For each run the page cache is dropped before the clock starts, and
  it stops when all is on the disk. Seconds are those of the whole command, imports of torch included; peak memory is the process's VmHWM.
- Then the result is opened, counted against `moe_core.accounting`, and experts of three FFNs are compared with the teacher's segments.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_core import accounting, checkpoint, convert, experts, folders, noise, shards
from moe_core.config import MoEConfig
from moe_core.transformer import FluxMoETransformer2DModel, on_meta

RESULTS = Path("benchmarks/results/conversion.json")
DOUBLE, SINGLE = 19, 38
DENSE_BLOCKS = 3
VECTORS = 512
SHARD_BYTES = 10 * 10**9
GB = 1e9

CONVERT = """
import json, sys, time
from pathlib import Path
from safetensors.torch import load_file
from moe_core import stream
from moe_core.config import MoEConfig
source, inputs, out, moe = sys.argv[1:]
tensors = load_file(inputs)
bank = tensors.pop("conditioning")
began = time.monotonic()
stream.to_moe_joint(Path(source), Path(out), tensors, MoEConfig.model_validate_json(moe), bank, seed=0)
seconds = time.monotonic() - began
status = Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps({"conversion_seconds": seconds, "peak_bytes": peak}))
"""


def make_source(folder: Path, double: int, single: int) -> None:
    """A dense FLUX.1 transformer of so many blocks in bf16, its weights random numbers, written shard by shard."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True)
    entries = [shards.Entry(name, torch.bfloat16, tuple(t.shape)) for name, t in model.state_dict().items()]
    cut = shards.cut(entries, SHARD_BYTES)
    with folders.folder(folder) as partial:
        with shards.ShardWriter(partial, cut) as writer:
            for entry in (entry for shard in cut for entry in shard):
                generator = torch.Generator().manual_seed(noise.derive_seed(0, entry.name))
                writer.put(
                    entry.name, torch.empty(entry.shape, dtype=entry.dtype).normal_(0, 0.02, generator=generator)
                )
        model.save_config(partial)


def make_inputs(file: Path, model: FluxTransformer2DModel) -> None:
    """Scores of every segment, and conditioning vectors whose variance falls off over their components, as a real teacher's does."""
    generator = torch.Generator().manual_seed(1)
    width = model.inner_dim
    scores = {name: torch.rand(4 * width, generator=generator) for name in convert.ffn_names(model)}
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    spread = torch.arange(1, width + 1) ** -0.5
    vectors = (torch.randn(VECTORS, width, generator=generator) * spread) @ mixing
    save_file({**scores, "conditioning": vectors}, file)


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.glob("*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp`, until the copy is on the disk."""
    forget(source)
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    folders.flush_tree(target)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def converted(source: Path, inputs: Path, target: Path, moe: MoEConfig) -> dict[str, float]:
    """Seconds and peak memory of the conversion, which flushes its files itself."""
    forget(source)
    began = time.monotonic()
    command = [sys.executable, "-c", CONVERT, source, inputs, target, moe.model_dump_json()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.monotonic() - began, **json.loads(done.stdout.splitlines()[-1])}


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def check(source: Path, target: Path, inputs: Path, moe: MoEConfig) -> int:
    """Opens the result and returns its number of parameters. Raises AssertionError where it is not what it should be."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one a tensor: on the meta device nothing is copied
        opened = FluxMoETransformer2DModel.from_pretrained(target, torch_dtype=torch.bfloat16)
    count = sum(parameter.numel() for parameter in opened.parameters())
    assert count == accounting.count(checkpoint.read_config(target)).total, count
    # The weights themselves, mapped: strict, so that none is missing or unknown.
    mapped = on_meta(checkpoint.read_config(target))
    weights = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    mapped.load_state_dict(weights, strict=True, assign=True)
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.bfloat16}
    scores = load_file(inputs)
    where = checkpoint.stored(source)
    names = convert.ffn_names(mapped, moe.dense_double_blocks)
    for name in (names[0], names[len(names) // 2], names[-1]):
        ffn = experts.dense_ffn(name, mapped.inner_dim)
        with safe_open(where[ffn.w2].path, "pt") as file:
            w2_DF = file.get_tensor(ffn.w2)[:, ffn.first :]
        split = experts.split_segments(name, w2_DF.shape[1], len(w2_DF), scores, moe, 0)
        assert torch.equal(mapped.get_parameter(f"{name}.shared.proj_out.weight"), w2_DF[:, split.shared])
        experts_EDF = mapped.get_parameter(f"{name}.w2_EDF")
        assert torch.equal(experts_EDF[-1], w2_DF[:, split.experts_EF[-1]])
    return count


def main() -> None:
    """Makes what is missing, runs cp, conversion, cp, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dense2moe-conversion")
    parser.add_argument("--double", type=int, default=DOUBLE)
    parser.add_argument("--single", type=int, default=SINGLE)
    chosen = parser.parse_args()
    whole = (chosen.double, chosen.single) == (DOUBLE, SINGLE)
    name = f"{chosen.double}-{chosen.single}"
    source, inputs = chosen.folder / f"flux-{name}", chosen.folder / f"inputs-{name}.safetensors"
    target, copy = chosen.folder / f"L-{name}", chosen.folder / "copy"
    moe = MoEConfig(
        shared_ratio=1.0,
        normal_ratio=0.25,
        num_experts=12,
        top_k=2,
        dense_double_blocks=tuple(range(min(DENSE_BLOCKS, chosen.double - 1))),
        conditioning_dim=256,
    )
    if not source.exists():
        print(f"making {source}", flush=True)
        make_source(source, chosen.double, chosen.single)
    with shards.ModelFolder(source, FluxTransformer2DModel) as dense:
        make_inputs(inputs, dense.model)
    for left in (target, copy):
        shutil.rmtree(left, ignore_errors=True)
    before = copied(source, copy)
    made = converted(source, inputs, target, moe)
    after = copied(source, copy)
    parameters = check(source, target, inputs, moe)
    read, written = size(source), size(target)
    cp = (before + after) / 2
    result: dict[str, Any] = {
        "double_blocks": chosen.double,
        "single_blocks": chosen.single,
        "source_GB": round(read / GB, 2),
        "result_GB": round(written / GB, 2),
        "result_parameters": parameters,
        "cp_seconds": [round(before, 1), round(after, 1)],
        "conversion_seconds": round(made["seconds"], 1),
        "conversion_without_imports_seconds": round(made["conversion_seconds"], 1),
        "cp_GB_of_source_per_second": round(read / cp / GB, 3),
        "conversion_GB_of_source_per_second": round(read / made["seconds"] / GB, 3),
        "speed_over_cp": round(cp / made["seconds"], 3),
        "peak_resident_GB": round(made["peak_bytes"] / GB, 2),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    shutil.rmtree(target)
    out = RESULTS if whole else chosen.folder / f"conversion-{name}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
