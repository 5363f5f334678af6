"""`dense2moe plan experiment=flux1-moe-l compute=h100x8`: what a run will build and take, before it starts.

Arguments are Hydra overrides, as of `dvc exp run -S`; without any, ./params.yaml is planned. Nothing is downloaded or trained. Ends with 3 if a
stage does not fit the GPUs of `compute.gpu_memory_gb`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from moe_core.config import Params
from moe_core.errors import Dense2MoEError
from tasks import outs
from tasks.params import compose
from tasks.plan_costs import Costs, StageCost
from tasks.plan_studies import studies
from tasks.plan_teacher import describe
from tasks.project import read_params, validated

DOES_NOT_FIT = 3
"""Exit status."""
KEPT_FREE = 0.05
"""Share of a GPU's memory that CUDA and what its allocator cannot fill take beyond tensors; ours, see docs/flux1.md."""


def plan(root: Path, overrides: Sequence[str]) -> tuple[str, bool]:
    """The plan of the parameters that the overrides compose, or of params.yaml, in Markdown; and whether it fits."""
    params = validated(yaml.safe_load(compose(root, list(overrides))), "params/") if overrides else read_params(root)
    teacher = describe(params.model)
    stages = [*Costs(params, teacher).stages(), *studies(params, teacher)]
    return render(params, stages), not crowded(params, stages)


def crowded(params: Params, stages: Sequence[StageCost]) -> list[StageCost]:
    """Stages that need more than the GPUs have; none where `compute.gpu_memory_gb` is not given."""
    room = params.compute.gpu_memory_gb
    return [stage for stage in stages if room is not None and stage.peak > room * 1e9 * (1 - KEPT_FREE)]


def render(params: Params, stages: Sequence[StageCost]) -> str:
    """The plan in Markdown."""
    lines = [
        f"# Plan of `{params.experiment}`",
        "",
        *_models(stages),
        "",
        *_stages(params, stages),
        "",
        *_memory(stages),
        "",
    ]
    return "\n".join([*lines, *_verdict(params, stages), ""])


def _models(stages: Sequence[StageCost]) -> list[str]:
    rows = []
    for stage in stages:
        if stage.parameters is None or not stage.stage.startswith("generate@"):
            continue
        count, kinds = stage.parameters, stage.parameters.by_kind()
        split = [f"{_billions(kinds[kind].activated)}" for kind in ("ffn", "attention", "adaln", "other")]
        own = [_billions(count.total), _billions(count.activated), _billions(count.activated_paper)]
        rows.append([stage.stage.partition("@")[2], *own, *split, f"{stage.step_flops / 1e12:.4g}"])
    head = [
        "model",
        "total",
        "activated",
        "by the paper's count",
        "FFN",
        "attention",
        "AdaLN",
        "other",
        "TFLOPs a step",
    ]
    return ["Parameters, in billions; FFN to other: the activated ones.", "", *_table(head, rows)]


def _stages(params: Params, stages: Sequence[StageCost]) -> list[str]:
    tflops = params.compute.tflops
    rows = [
        [
            f"`{stage.stage}`",
            stage.work,
            f"{stage.flops / 1e15:.4g}",
            "not stated" if tflops is None else f"{stage.flops / tflops / 3.6e15:.4g}",
            str(stage.gpus),
            _gigabytes(stage.peak),
            _gigabytes(stage.disk),
            _gigabytes(stage.meanwhile),
        ]
        for stage in stages
    ]
    total = sum(stage.flops for stage in stages)
    hours = "not stated" if tflops is None else f"{total / tflops / 3.6e15:.4g}"
    kept, more = sum(stage.disk for stage in stages), max(stage.meanwhile for stage in stages)
    rows.append(["all", "", f"{total / 1e15:.4g}", hours, "", "", _gigabytes(kept), _gigabytes(more)])
    device = "GPU" if params.compute.use_gpu else "worker"
    head = [
        "stage",
        "work",
        "PFLOPs",
        f"{device} hours",
        f"{device}s",
        f"GB on each {device}",
        "GB on disk",
        "more while it runs",
    ]
    return _table(head, rows)


def _memory(stages: Sequence[StageCost]) -> list[str]:
    kinds = list(dict.fromkeys(kind for stage in stages for kind in stage.memory))
    rows = [
        [f"`{stage.stage}`", *(_gigabytes(stage.memory[kind]) if kind in stage.memory else "" for kind in kinds)]
        for stage in stages
        if stage.memory
    ]
    return ["GB on each at the worst moment, tensors alone:", "", *_table(["stage", *kinds], rows)]


def _verdict(params: Params, stages: Sequence[StageCost]) -> list[str]:
    compute = params.compute
    lines = []
    if compute.tflops is None:
        lines.append("- Hours need `compute.tflops`, what one GPU sustains.")
    else:
        lines.append(
            f"- Hours at {compute.tflops:g} TFLOPs a second on each GPU (`compute.tflops`): stated, not measured."
        )
    if compute.gpu_memory_gb is None:
        return [*lines, "- Whether it fits needs `compute.gpu_memory_gb`."]
    room = compute.gpu_memory_gb * (1 - KEPT_FREE)
    if not (tight := crowded(params, stages)):
        return [*lines, f"- It fits: no stage needs more than {room:.4g} of {compute.gpu_memory_gb:g} GB."]
    for stage in tight:
        lines.append(
            f"- **`{stage.stage}` does not fit**: it needs {_gigabytes(stage.peak)} GB of tensors, a GPU has {room:.4g} of"
            f" {compute.gpu_memory_gb:g} GB for them. {_remedy(stage.stage)}"
        )
    return lines


def _remedy(stage: str) -> str:
    if stage.startswith("generate"):
        return "Smaller: `eval.batch_size`."
    if stage == "latency":
        return "Smaller: `eval.latency_batch_sizes`."
    if stage in ("shard", "teacher"):
        return (
            "Smaller: `data.shard.batch_size`."
            if stage == "shard"
            else "Smaller: `model.training.transformer.micro_batch`."
        )
    if stage == "importance":
        return "Smaller: `kd.importance_batch_size`."
    section = {"shared_expert_kd": "shared_expert", "moe_kd": "moe"}.get(stage, "mob")
    return f"Smaller: `kd.{section}.optimizer.micro_batch`; more GPUs with `compute.sharding=full`; `kd.{section}.gradient_checkpointing`."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _billions(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e8 else f"{count / 1e9:.4g}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def main(arguments: Sequence[str]) -> int:
    """Prints the plan, or writes it `--to` a file."""
    parser = argparse.ArgumentParser(
        prog="dense2moe plan", description="What a run will build and take, before it starts."
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the plan there instead of printing it")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as of `dvc exp run -S`; without any: ./params.yaml"
    )
    given = parser.parse_intermixed_args(arguments)
    try:
        text, fits = plan(Path.cwd(), given.overrides)
    except Dense2MoEError as error:
        print(error, file=sys.stderr)
        return 2
    if given.to is None:
        print(text)
    else:
        outs.write_text(given.to, text)
    return 0 if fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
