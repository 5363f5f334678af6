"""FLUX.1 at full size on one GPU: five steps of importance and of each KD stage, beside what a plan says. `make bench-gpu`.

    python -m benchmarks.gpu_full_size                 random weights, 1024 x 1024, bf16; writes benchmarks/results/gpu_full_size.json
    python -m benchmarks.gpu_full_size --device cpu --double 2 --single 2 --heads 2 --image-tokens 64 --text-tokens 16    small

- Needs torch, diffusers, transformers, safetensors and this checkout: no other package, no net, no data.
- Weights are random, so routers choose nearly evenly. With one sample at once a MoB group runs one block a step; the optimizer
  has the state of all blocks from the first step on, as it has after some steps of a real run.
- Peak memory: CUDA's allocator, tensors alone; on a CPU, tensors counted while they live.
- Model FLOPs utilisation: FLOPs of the step, checkpointing's repetition left out, over its time and what the GPU can do
  (`--peak-tflops`, 989 for an H100 or H200 in dense bf16, by its data sheet).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moe_core import dry_run, references
from moe_core.distill import KDBatch, KDStep
from moe_core.dry_run import Cost, Inputs
from moe_core.importance import ImportanceAccumulator
from moe_core.memory import LiveMemory
from moe_core.sharding import lower_frozen
from moe_core.transformer import MOB_DEFAULTS, MOE_DEFAULTS, FluxMoETransformer2DModel

RESULTS = Path("benchmarks/results/gpu_full_size.json")
STEPS = 5
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Measured:
    """Of the steps after the first, which makes the optimizer's state and loads kernels."""

    seconds_a_step: float
    peak_bytes: int


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """As the stages build it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=all(parameter.is_cuda for parameter in trained) or None)


def batch(config: dict[str, Any], inputs: Inputs, device: torch.device) -> KDBatch:
    """Random inputs, as `sampling.prepare_batch` makes them."""

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    samples, image, text = inputs.samples, inputs.image_tokens, inputs.text_tokens
    return KDBatch(
        latents=drawn(samples, image, config["in_channels"]),
        noise=drawn(samples, image, config["in_channels"]),
        sigma=torch.rand(samples, device=device),
        prompt_embeds=drawn(samples, text, config["joint_attention_dim"], dtype=BF16),
        pooled=drawn(samples, config["pooled_projection_dim"], dtype=BF16),
        img_ids=torch.zeros(image, 3, device=device),
        txt_ids=torch.zeros(text, 3, device=device),
        guidance=torch.full((samples,), 3.5, device=device),
    )


def build(config: dict[str, Any], device: torch.device) -> FluxMoETransformer2DModel:
    """A model of random weights in bf16, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with device:
            return FluxMoETransformer2DModel.from_config(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def measure(step: Callable[[], None], device: torch.device, memory: LiveMemory) -> Measured:
    """Runs STEPS steps after one that does not count."""
    seconds = []
    for number in range(STEPS + 1):
        if number == 1:
            memory.peak = type(memory.peak)(0)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak.total
    return Measured(sorted(seconds[1:])[STEPS // 2], peak)


def importance(dense: dict[str, Any], inputs: Inputs, device: torch.device) -> Measured:
    """A batch's scores."""
    with _counting(device) as memory:
        accumulator = ImportanceAccumulator(build(dense, device))

        def step() -> None:
            with torch.autocast(device.type, BF16):
                accumulator.add_sums(batch(dense, inputs, device))

        return measure(step, device, memory)


def distillation(
    dense: dict[str, Any], sparse: dict[str, Any], stage: Any, inputs: Inputs, device: torch.device
) -> Measured:
    """A KD step: both models whole on the device, masters in float32."""
    with _counting(device) as memory:
        teacher, student = build(dense, device), build(sparse, device).float()
        step_of = KDStep(student, teacher, stage)
        lower_frozen(student, BF16)
        optimizer = optimizer_of(step_of)
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]

        def step() -> None:
            with torch.autocast(device.type, BF16):
                loss = step_of(batch(dense, inputs, device))["loss"]
            loss.backward()
            if not optimizer.state:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            nn.utils.clip_grad_norm_(trained, stage.optimizer.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return measure(step, device, memory)


class _counting(LiveMemory):
    """Counts tensors on a CPU; on a GPU its allocator does, and nothing is in its way."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._idle = device.type == "cuda"

    def __enter__(self) -> LiveMemory:
        return self if self._idle else super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        if not self._idle:
            super().__exit__(*error)


def stage_of(train: tuple[str, ...], balance: float, checkpointing: bool = True) -> Any:
    """What `KDStep` asks of a KD stage, as the FLUX.1 presets have it: the parameters' own classes need pydantic."""
    return SimpleNamespace(
        train=train,
        lambda_feature=1.0,
        lambda_balance=balance,
        gradient_checkpointing=checkpointing,
        optimizer=SimpleNamespace(grad_clip=1.0),
    )


def stages(dense: dict[str, Any], kept: int, conditioning_dim: int) -> dict[str, tuple[dict[str, Any], Any]]:
    """KD stage -> student's configuration and stage: the paper's L and M, as far as the double blocks go after those `kept` dense."""
    moe = {**MOE_DEFAULTS, "dense_double_blocks": list(range(kept))}
    large = {**dense, "moe": moe, "conditioning_dim": conditioning_dim}
    shared = {**large, "moe": {**moe, "num_experts": 0, "top_k": 0}}
    double = dense["num_layers"]
    count = (double - kept) // 3
    groups = [list(range(first, first + 3)) for first in range(double - 3 * count, double, 3)]
    made = {
        "shared_expert_kd": (shared, stage_of(("shared", "conditioning"), 0.0)),
        "moe_kd": (large, stage_of(("experts", "router"), 1e-2)),
    }
    if groups:
        grouped = {**large, "mob": {**MOB_DEFAULTS, "double_groups": groups}}
        made["mob_kd@M"] = (grouped, stage_of(("group_blocks", "block_router"), 1e-2))
    return made


def row(found: Measured, planned: Cost, useful_flops: int, peak_tflops: float) -> dict[str, Any]:
    """One stage's figures."""
    return {
        "seconds_a_step": round(found.seconds_a_step, 4),
        "peak_gb": round(found.peak_bytes / 1e9, 3),
        "planned_gb": round(planned.most.total / 1e9, 3),
        "planned_over_measured": round(planned.most.total / found.peak_bytes, 3),
        "tflop_a_step": round(useful_flops / 1e12, 3),
        "model_flops_utilisation": round(useful_flops / found.seconds_a_step / (peak_tflops * 1e12), 4),
    }


def main() -> int:
    """Measures all stages; writes what it has after each, so that an end by memory or time loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--double", type=int, default=references.FLUX1_DEV["num_layers"])
    parser.add_argument("--single", type=int, default=references.FLUX1_DEV["num_single_layers"])
    parser.add_argument("--heads", type=int, default=references.FLUX1_DEV["num_attention_heads"])
    parser.add_argument("--image-tokens", type=int, default=4096)
    parser.add_argument("--dense-double-blocks", type=int, default=3)
    parser.add_argument("--conditioning-dim", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--to", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    dense: dict[str, Any] = {
        **references.FLUX1_DEV,
        "num_layers": given.double,
        "num_single_layers": given.single,
        "num_attention_heads": given.heads,
    }
    inputs = Inputs(given.samples, given.image_tokens, given.text_tokens)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    report: dict[str, Any] = {
        "device": name,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "steps": STEPS,
        "peak_tflops": given.peak_tflops,
        **{key: getattr(given, key) for key in ("double", "single", "heads", "samples", "image_tokens", "text_tokens")},
        "stages": {},
    }

    def add(stage: str, found: Measured, planned: Cost, useful: int) -> None:
        report["stages"][stage] = row(found, planned, useful, given.peak_tflops)
        given.to.parent.mkdir(parents=True, exist_ok=True)
        given.to.write_text(json.dumps(report, indent=2) + "\n")
        print(stage, report["stages"][stage], flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    planned = dry_run.importance_pass(dense, inputs, BF16)
    add("importance", importance(dense, inputs, device), planned, planned.flops)
    for stage, (sparse, kd) in stages(dense, given.dense_double_blocks, given.conditioning_dim).items():
        costs = [
            dry_run.kd_step(dense, sparse, config, inputs, optimizer_of, dtype=BF16, masters=torch.float32)
            for config in (kd, stage_of(kd.train, kd.lambda_balance, checkpointing=False))
        ]
        add(stage, distillation(dense, sparse, kd, inputs, device), costs[0], costs[1].flops)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
