"""One denoising step and a whole sampling of 28, at batch 1 and 4: dense FLUX.1, levels L to XS, Lite and Mini; the paper's Table 1. For GPUs.

- `compiled`: block by block with Inductor. `graphs`: CUDA graphs of compiled blocks (`benchmarks.speed.graphs`).
- A sampling is 28 steps of the transformer and of diffusers' Euler scheduler, without text encoders and VAE, which all models share. Its choices
  of blocks change on the way.
- One model is in memory at a time, so ratios are over the dense model's median, taken before: not within a round.
- `recorded`: graphs. `resident`: bytes of the device at most.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.speed import models, timing
from benchmarks.speed.graphs import Graphs
from moe_core.compiling import compile_blocks

STEPS = 28
WAYS = ("compiled", "graphs")


def measure(
    configs: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    samples: int,
    image: int,
    text: int,
    *,
    steps: int = STEPS,
    ways: tuple[str, ...] = WAYS,
    rounds: int = 10,
) -> Iterator[dict[str, Any]]:
    """Rows as they come, one a model, in bf16; the dense one first."""
    first: dict[str, dict[str, float]] = {}
    for name, config in configs.items():
        row: dict[str, Any] = {
            "model": name,
            "samples": samples,
            "image_tokens": image,
            "text_tokens": text,
            "steps": steps,
            "ways": {},
        }
        for way in ways:
            found = _of_model(config, device, samples, image, text, way, steps, rounds)
            over = first.setdefault(way, found)
            row["ways"][way] = {
                **found,
                "step_ratio": round(found["step_s"] / over["step_s"], 4),
                "sampling_ratio": round(found["sampling_s"] / over["sampling_s"], 4),
            }
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        yield row


@torch.no_grad()
def _of_model(
    config: Mapping[str, Any],
    device: torch.device,
    samples: int,
    image: int,
    text: int,
    way: str,
    steps: int,
    rounds: int,
) -> dict[str, float]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = models.build(config, torch.bfloat16, device)
    # What never asks the host; on a GPU `auto` would choose it, too, when compiling.
    model.set_expert_backend("grouped_mm")
    given = models.inputs(config, samples, image, text, torch.bfloat16, device)
    graphs = prepare(model, device, way)
    run = {"step": lambda: model(**given), "sampling": lambda: sample(model, given, steps)}
    step = timing.in_turn({"step": run["step"]}, device, rounds=rounds)["step"]
    # Its round that does not count records the blocks that samples choose on the way.
    sampling = timing.in_turn({"sampling": run["sampling"]}, device, rounds=2)["sampling"]
    return {
        "step_s": step["median_s"],
        "sampling_s": sampling["median_s"],
        "recorded": graphs.recorded if graphs else 0,
        "resident": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    }


def prepare(model: Any, device: torch.device, way: str) -> Graphs | None:
    """Makes a model run that way: `plain`, or one of WAYS. `recorded`: graphs of blocks that are not compiled, for tests."""
    if way == "compiled":
        compile_blocks(model, fullgraph=True)
    return Graphs(model, device, compiled=way == "graphs") if way in ("graphs", "recorded") else None


def sample(model: nn.Module, given: Mapping[str, Any], steps: int) -> Tensor:
    """The latents that a sampling from `given["hidden_states"]` comes to, as `FluxPipeline` steps."""
    latents = given["hidden_states"]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=latents.device)
    for time in scheduler.timesteps:
        timestep = time.expand(len(latents)).to(latents.dtype) / 1000
        velocity = model(**{**given, "hidden_states": latents, "timestep": timestep})[0]
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents
