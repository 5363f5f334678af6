"""Stage `latency`: seconds for a whole sampling, each model in turn with the teacher, with nothing beside it. Measured: no two runs agree.

Two models are in memory at once, whatever the number of models. What slows the machine down for a while slows both of a pair.
"""

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
from moe_core.transformer import FluxMoETransformer2DModel
from tasks import outs
from tasks.places import DENSE, LATENCY, PROMPTS, TEACHER
from tasks.prompts import read_prompts
from tasks.stage import Stage, execute


def latency(stage: Stage) -> None:
    """Writes reports/latency.json."""
    params, config = stage.params, stage.params.eval
    torch.set_num_threads(params.compute.cpus_per_worker)
    # Bars of loading, one for each pipeline, say nothing here.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if params.compute.use_gpu else "cpu")
    stage.run.tag({"device": describe(device)})
    teacher = sampling.load_pipeline(stage.root / TEACHER, None, device, sampling.DTYPES[params.model.precision])
    teacher.transformer.eval()
    prompts = [record["prompt"] for record in read_prompts(stage.root / PROMPTS)]
    models: dict[str, dict[str, Any]] = {}
    for name, model in params.models.items():
        models[name] = _sizes(teacher, None if name == DENSE else stage.root / model.checkpoint, prompts, params)
        for size, times in models[name].items():
            stage.run.metrics({f"{name}/{key}_batch_{size}": times[key] for key in ("median_s", "ratio")})
        stage.progress.update("models", len(models), len(params.models))
    sizes = list(config.latency_batch_sizes)
    report = {"device": describe(device), "rounds": config.latency_rounds, "batch_sizes": sizes, "models": models}
    outs.write_json(stage.root / LATENCY, report)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _with(teacher: FluxPipeline, folder: Path, params: Params) -> FluxPipeline:
    """The transformer in `folder` with the teacher's text encoders and VAE."""
    transformer = sampling.load_transformer(folder, sampling.DTYPES[params.model.precision]).to(teacher.device).eval()
    if isinstance(transformer, FluxMoETransformer2DModel):
        transformer.set_expert_backend(params.compute.expert_backend)
    return sampling.with_transformer(teacher, transformer)


def _sizes(
    teacher: FluxPipeline, folder: Path | None, prompts: list[str], params: Params
) -> dict[str, dict[str, float]]:
    """Batch size -> times of the model in `folder`, which is let go in the end; None: of the teacher itself."""
    own = None if folder is None else _with(teacher, folder, params)
    return {
        str(size): _measure(teacher, own, [prompts[i % len(prompts)] for i in range(size)], params)
        for size in params.eval.latency_batch_sizes
    }


def _measure(teacher: FluxPipeline, own: FluxPipeline | None, prompts: list[str], params: Params) -> dict[str, float]:
    """Of one batch."""
    seconds, dense = [], []
    # The first round warms up: caches, prompt features, threads.
    for turn in range(params.eval.latency_rounds + 1):
        base = _time(teacher, prompts, params)
        taken = base if own is None else _time(own, prompts, params)
        if turn:
            dense.append(base)
            seconds.append(taken)
    low, median, high = (float(value) for value in np.percentile(seconds, [25, 50, 75]))
    # The ratio is taken within a round: what slows the machine down for a while slows both.
    ratio = float(np.median(np.array(seconds) / np.array(dense)))
    return {"median_s": median, "low_s": low, "high_s": high, "ratio": ratio}


def _time(pipeline: FluxPipeline, prompts: list[str], params: Params) -> float:
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
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter() - started


if __name__ == "__main__":
    execute("latency", latency)
