"""Stage `latency`: seconds for a whole sampling, all models in turn in one process with nothing beside it. Measured: no two runs agree."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from moe_core import sampling
from moe_core.config import Params
from tasks import outs
from tasks.places import DENSE, LATENCY, PROMPTS, TEACHER
from tasks.prompts import read_prompts
from tasks.stage import Stage, execute


def latency(stage: Stage) -> None:
    """Writes reports/latency.json."""
    params, config = stage.params, stage.params.eval
    torch.set_num_threads(params.compute.cpus_per_worker)
    # Bars of loading, one for each of six pipelines, say nothing here.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if params.compute.use_gpu else "cpu")
    stage.run.tag({"device": describe(device)})
    pipelines = _load(stage.root, params, device)
    prompts = [record["prompt"] for record in read_prompts(stage.root / PROMPTS)]
    models: dict[str, dict[str, Any]] = {name: {} for name in pipelines}
    for size in config.latency_batch_sizes:
        batch = [prompts[i % len(prompts)] for i in range(size)]
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        # The first round warms up: caches, prompt features, threads.
        for turn in range(config.latency_rounds + 1):
            for name, pipeline in pipelines.items():
                taken = _time(pipeline, batch, params, device)
                if turn:
                    seconds[name].append(taken)
            stage.progress.update(f"batch {size}", turn, config.latency_rounds)
        for name, times in seconds.items():
            low, median, high = (float(value) for value in np.percentile(times, [25, 50, 75]))
            # The ratio is taken within a round: what slows the machine down for a while slows both.
            ratio = float(np.median(np.array(times) / np.array(seconds[DENSE])))
            models[name][str(size)] = {"median_s": median, "low_s": low, "high_s": high, "ratio": ratio}
            stage.run.metrics({f"{name}/median_s_batch_{size}": median, f"{name}/ratio_batch_{size}": ratio})
    sizes = list(config.latency_batch_sizes)
    report = {"device": describe(device), "rounds": config.latency_rounds, "batch_sizes": sizes, "models": models}
    outs.write_json(stage.root / LATENCY, report)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _load(root: Path, params: Params, device: torch.device) -> dict[str, FluxPipeline]:
    """Every model in a pipeline; all share the teacher's text encoders and VAE."""
    dtype = sampling.DTYPES[params.model.precision]
    teacher = sampling.load_pipeline(root / TEACHER, None, device, dtype)
    teacher.transformer.eval()
    pipelines = {}
    for name, model in params.models.items():
        if name == DENSE:
            pipelines[name] = teacher
            continue
        transformer = sampling.load_transformer(root / model.checkpoint, dtype).to(device).eval()
        transformer.set_expert_backend(params.compute.expert_backend)
        pipelines[name] = sampling.with_transformer(teacher, transformer)
    return pipelines


def _time(pipeline: FluxPipeline, prompts: list[str], params: Params, device: torch.device) -> float:
    """Seconds of one sampling, from prompt features to pictures."""
    model = params.model
    started = time.perf_counter()
    sampling.generate(
        pipeline,
        prompts,
        list(range(len(prompts))),
        params.seed,
        resolution=model.resolution,
        num_inference_steps=model.num_inference_steps,
        guidance_scale=model.guidance_scale,
        max_sequence_length=model.max_sequence_length,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    execute("latency", latency)
