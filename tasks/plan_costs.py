"""What each stage of an experiment takes: parameters, FLOPs, memory of a GPU, disk.

- Steps are run on fake tensors (`moe_core.dry_run`), by the code that trains; what is shared out over GPUs is divided.
- Memory is that of tensors. A GPU needs some more: CUDA's context and libraries, and what its allocator cannot fill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_core import accounting, checkpoint, dry_run, structure
from moe_core.config import BaselineConfig, KDStageConfig, OptimizerConfig, Params
from moe_core.dry_run import OPTIMIZER, STUDENT, TEACHER, VAE, Cost, Inputs, Unit
from moe_core.memory import ACTIVATIONS
from moe_core.teacher_training import VAEStep
from moe_core.transformer import FluxMoETransformer2DModel
from tasks import checkpoints, optimizer, plan_suites
from tasks.plan_teacher import Teacher

MASTER_BYTES = 4
MOMENTS = {"muon": 1.0, "adamw": 2.0, "adamw8bit": 0.5}
"""Size of an optimizer's state over that of the masters."""


@dataclass(frozen=True)
class StageCost:
    """One stage."""

    stage: str
    work: str
    """what FLOPs are for, in words"""
    flops: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)
    """bytes on one GPU at the worst moment, by kind"""
    disk: float = 0.0
    """bytes of its outs"""
    meanwhile: float = 0.0
    """bytes on disk while it runs, gone when it is done: checkpoints, the student to begin with"""
    parameters: accounting.Counts | None = None
    """of the model that it makes or judges"""
    step_flops: float = 0.0
    """of one call of that model, for one picture"""
    gpus: int = 1

    @property
    def peak(self) -> float:
        """Bytes on one GPU."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Sampling:
    """Making pictures with one model, some at once."""

    flops: float
    """of one picture, its prompt and its decoding included"""
    memory: Mapping[str, float]
    """bytes by kind, while the transformer works"""
    decoding: float
    """bytes of activations while the VAE decodes"""


class Costs:
    """All stages of the parameters, in the DAG's order."""

    def __init__(self, params: Params, teacher: Teacher) -> None:
        self.params, self.teacher = params, teacher
        self.image_tokens = teacher.image_tokens(params.model.resolution)
        self.text_tokens = params.model.max_sequence_length
        self.given = torch.bfloat16 if params.model.precision == "bf16" else torch.float32
        self._shapes: dict[str, FluxMoETransformer2DModel] = {}
        self._samplings: dict[tuple[str, int], Sampling] = {}
        self._decodings: dict[int, Cost] = {}

    def stages(self) -> list[StageCost]:
        """One each; those that compute next to nothing are left out."""
        made = [self.teacher_stage(), self.shard(), self.importance()]
        made.append(self.distillation("shared_expert_kd", self.params.kd.shared_expert, self.configs["shared"]))
        made.append(self.distillation("moe_kd", self.params.kd.moe, self.configs["L"]))
        for level in self.params.mob.levels:
            made.append(self.distillation(f"mob_kd@{level}", self.params.kd.mob, self.configs[level]))
        for name, baseline in self.params.baselines.items():
            made.append(self.distillation(f"baseline@{name}", baseline.kd, self.configs[name]))
        return [*made, *(self.generation(name) for name in self.configs), *self.scoring(), self.latency()]

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Name of a model in the report -> its configuration. Raises CheckpointError for a baseline whose folder is not there."""
        dense, moe, mob = self.teacher.transformer, self.params.moe, self.params.mob
        found = {
            "teacher": structure.dense_part(dense),
            "shared": structure.shared_config(dense, moe),
            "L": structure.moe_config(dense, moe),
        }
        starts = {"teacher": "teacher", "checkpoints/moe": "L"} | {
            f"checkpoints/mob/{level}": level for level in mob.levels
        }
        waiting = list(mob.levels)
        # Which blocks form groups is found by their importance; what a group costs does not depend on it.
        change = {f"{kind}.{i}": 0.0 for kind in structure.KINDS.values() for i in range(_blocks(dense))}
        while waiting:
            level = next(name for name in waiting if starts[mob.levels[name].init] in found)
            waiting.remove(level)
            found[level] = structure.mob_config(found[starts[mob.levels[level].init]], mob.levels[level], mob, change)
        found |= {name: self._baseline(baseline) for name, baseline in self.params.baselines.items()}
        baselines = {name: model.checkpoint for name, model in self.params.models.items() if name not in found}
        for name, folder in baselines.items():
            found[name] = structure.dense_part(checkpoint.read_config(Path(folder)))
        return {name: found[name] for name in self.params.models}

    def _baseline(self, baseline: BaselineConfig) -> dict[str, Any]:
        dense = self.teacher.transformer
        if baseline.ratio is not None:
            return structure.shared_config(dense, baseline.cut(self.params.moe))
        # Which blocks go is found by their importance; what is left costs the same. What an earlier step dropped stays dropped.
        start = self.params.baselines.get(baseline.init.removeprefix("checkpoints/baselines/"))
        config = dict(dense) if start is None else self._baseline(start)
        left = {"double": baseline.double_blocks, "single": baseline.single_blocks}
        gone = {kind: range(left[kind] or config[key], config[key]) for kind, key in structure.COUNTS.items()}
        return structure.depth_config(config, gone)

    # -- stages

    def teacher_stage(self) -> StageCost:
        """A given teacher is copied; of one that is trained, the transformer's training counts."""
        counts = accounting.count(self._shape(self.configs["teacher"]))
        disk = sum(self._sizes.values()) * self.given.itemsize
        training = self.params.model.training
        if training is None:
            work = "copied" if self.params.model.lora is None else "copied, a LoRA fused"
            return StageCost("teacher", work, disk=disk, parameters=counts)
        config = training.transformer
        flow, vae = self._flow_step(config), self._vae_step(training.vae)
        # The transformer's trainee holds the whole pipeline; before it the VAE is trained alone.
        together = {
            **flow.most.by_kind,
            "text encoders": self._text(torch.float32)[1],
            VAE: float(self._sizes[VAE] * MASTER_BYTES),
        }
        memory = max(together, vae.most.by_kind, key=lambda kinds: sum(kinds.values()))
        flops = self._passes("teacher", config) * flow.flops + self._passes("teacher", training.vae) * vae.flops
        return StageCost(
            "teacher", f"{config.steps} steps of {config.batch_size}", flops, memory, disk,
            self._checkpoint(config, counts.total), counts, gpus=self._gpus("teacher"),
        )  # fmt: skip

    def shard(self) -> StageCost:
        """The VAE's encoder; of data whose number nobody knows, for a thousand pictures."""
        shard, model = self.params.data.shard, self.params.model
        known = self.params.data.embedded.samples if self.params.data.embedded else None
        count, size = known or 1000, shard.batch_size
        width, height = max(self.params.data.buckets_or(model.resolution), key=math.prod)
        cost = dry_run.call(self.teacher.build_vae, partial(_encode, (size, 3, height, width)), VAE)
        memory: dict[str, float] = dict(cost.most.by_kind)
        flops = cost.flops / size
        kept = self.image_tokens * int(self.teacher.transformer["in_channels"]) * torch.float32.itemsize
        if shard.text_embeddings == "stored":
            text_flops, memory["text encoders"] = self._text(torch.bfloat16)
            features = self.text_tokens * int(self.teacher.transformer["joint_attention_dim"])
            kept += (features + int(self.teacher.transformer["pooled_projection_dim"])) * torch.bfloat16.itemsize
            flops += text_flops
        return StageCost(
            "shard", f"{count} pictures" + ("" if known else " (each thousand)"), flops * count,
            memory, kept * count, gpus=self._gpus("shard"),
        )  # fmt: skip

    def importance(self) -> StageCost:
        """Forward and backward pass with per-sample scores, over the calibration split."""
        samples, size = self.params.data.shard.calibration_samples, self.params.kd.importance_batch_size
        cost = dry_run.importance_pass(self.teacher.transformer, self._inputs(min(size, samples)), self.given)
        text_flops, text_memory = self._text(self.given)
        flops = samples * (cost.flops / min(size, samples) + text_flops)
        memory = {**cost.most.by_kind, "text encoders": text_memory}
        # Units of work keep a copy until the stage ends.
        disk = self._kept_tokens(samples)
        return StageCost(
            "importance", f"{samples} samples, {size} at once", flops, memory, disk, disk, gpus=self._gpus("importance")
        )

    def _kept_tokens(self, samples: int) -> float:
        """Bytes of the FFNs' inputs that stage importance keeps."""
        each = math.ceil(self.params.kd.calibration_tokens / samples)
        double, single = (int(self.teacher.transformer[key]) for key in structure.COUNTS.values())
        tokens = double * (min(each, self.image_tokens) + min(each, self.text_tokens))
        tokens += single * min(each, self.image_tokens + self.text_tokens)
        heads, size = (int(self.teacher.transformer[name]) for name in ("num_attention_heads", "attention_head_dim"))
        return samples * tokens * heads * size * self.given.itemsize

    def distillation(self, name: str, stage: KDStageConfig, config: Mapping[str, Any]) -> StageCost:
        """Teacher and student, every step and validation."""
        params, optim = self.params, stage.optimizer
        compute, local = params.compute.of(name), self._local(name, optim)
        low = torch.bfloat16 if optim.precision == "bf16" else torch.float32
        sharded = compute.sharding == "full"
        # Sharded weights are gathered in the precision computed in; otherwise the masters themselves are used.
        cost = dry_run.kd_step(
            self.teacher.transformer, config, stage, self._inputs(local), _optimizer(optim),
            dtype=low, masters=low if sharded else torch.float32,
            gradients_kept=MASTER_BYTES / low.itemsize / compute.num_workers if sharded else 1.0,
        )  # fmt: skip
        shape = self._shape(config)
        counts, trained = accounting.count(shape), dry_run.trained_parameters(shape, stage.train)
        memory: dict[str, float] = dict(cost.most.by_kind)
        text_flops, text_memory = self._text(low)
        if sharded:
            memory = self._sharded(cost, config, stage, compute.num_workers, low)
            if compute.text_encoders == "sharded":
                text_memory /= compute.num_workers
        elif compute.num_workers > 1:
            memory["DDP's buckets"] = trained * MASTER_BYTES
        memory["text encoders"] = text_memory
        if optim.ema_decay is not None:
            memory["average"] = trained * MASTER_BYTES / (compute.num_workers if sharded else 1)
        samples = optim.steps * optim.batch_size
        validations = (1 + math.ceil(optim.steps / stage.validate_every)) * params.kd.validation_samples
        once = self._flops(self.configs["teacher"]) + self._flops(config) + text_flops
        flops = samples * (cost.flops / local + text_flops) + validations * once
        disk = counts.total * low.itemsize
        meanwhile = disk + self._checkpoint(optim, trained)
        work = f"{optim.steps} steps of {optim.batch_size}, {local} at once on a GPU"
        return StageCost(name, work, flops, memory, disk, meanwhile, counts, gpus=self._gpus(name))

    def generation(self, name: str, benchmarks: bool = True) -> StageCost:
        """Pictures of all prompts, of every suite or of the data's own, and the validation loss."""
        params, made = self.params, self._sampling(name, min(self.params.eval.batch_size, self.params.eval.prompts))
        size, more = params.eval.batch_size, plan_suites.more_pictures(params) if benchmarks else 0
        prompts = params.eval.prompts + more
        flops, memory = prompts * made.flops, dict(made.memory)
        beside = 0 if name == "teacher" else self._sizes["transformer"] * self.given.itemsize
        # Either the teacher is there for the validation loss, or the VAE decodes.
        if made.decoding > memory[ACTIVATIONS] + beside:
            memory[ACTIVATIONS] = made.decoding
        else:
            memory[TEACHER] = beside
        validation = params.kd.validation_samples * (
            self._flops(self.configs["teacher"]) + self._flops(self.configs[name])
        )
        counts = accounting.count(self._shape(self.configs[name]))
        work = f"{prompts} pictures of {params.model.num_inference_steps} steps, {size} at once"
        return StageCost(
            f"generate@{name}", work, flops + validation, memory, parameters=counts,
            step_flops=self._flops(self.configs[name]), gpus=self._gpus("generate"),
        )  # fmt: skip

    def scoring(self) -> list[StageCost]:
        """The benchmarks' scorers over one model's pictures; none where there are no benchmarks."""
        flops = plan_suites.scoring_flops(self.params)
        if not flops:
            return []
        work = f"{', '.join(flops)}; {plan_suites.more_pictures(self.params)} pictures; at the least"
        return [
            StageCost(f"evaluate@{name}", work, sum(flops.values()), gpus=self._gpus("evaluate"))
            for name in self.configs
        ]

    def latency(self) -> StageCost:
        """Whole samplings of each model in turn with the teacher, which stays in memory beside it."""
        sizes, rounds = self.params.eval.latency_batch_sizes, self.params.eval.latency_rounds + 1
        made = {name: self._sampling(name, max(sizes)) for name in self.configs}
        flops = rounds * sum(sizes) * sum(one.flops for one in made.values())
        memory: dict[str, float] = {}
        for name, one in made.items():
            kinds = {**one.memory, ACTIVATIONS: max(one.memory[ACTIVATIONS], one.decoding)}
            if name != "teacher":
                flops += rounds * sum(sizes) * made["teacher"].flops
                kinds[TEACHER] = made["teacher"].memory[STUDENT]
            memory = max(memory, kinds, key=lambda kinds: sum(kinds.values()))
        batches = " and ".join(str(size) for size in sizes)
        return StageCost("latency", f"{rounds} rounds of {batches} at once, each model and the teacher", flops, memory)

    # -- pieces

    def _sampling(self, name: str, count: int) -> Sampling:
        """Of `count` pictures at once."""
        if (name, count) not in self._samplings:
            step = dry_run.denoising_step(self.configs[name], self._inputs(count), self.given)
            decode, (text_flops, text_memory) = self._decoding(count), self._text(self.given)
            memory = {
                "text encoders": text_memory,
                VAE: decode.most.by_kind[VAE],
                STUDENT: step.most.by_kind[STUDENT],
                ACTIVATIONS: step.most.by_kind.get(ACTIVATIONS, 0),
            }
            flops = (self.params.model.num_inference_steps * step.flops + decode.flops) / count + text_flops
            self._samplings[name, count] = Sampling(flops, memory, decode.most.by_kind[ACTIVATIONS])
        return self._samplings[name, count]

    def _sharded(
        self, cost: Cost, config: Mapping[str, Any], stage: KDStageConfig, workers: int, low: torch.dtype
    ) -> dict[str, float]:
        """Of a step whose weights lie on `workers` GPUs: `cost` is that of whole models in `low`."""
        shape = self._shape(config)
        trained, student = dry_run.trained_parameters(shape, stage.train), accounting.count(shape).total
        # Those that had arrived at the pass's worst moment: gradients come as activations go. An update is less than a pass: AdamW
        # works in place, and Muon gathers a matrix where a pass gathers blocks.
        arrived = cost.peak.by_kind.get("gradients", 0) / low.itemsize
        return {
            TEACHER: cost.most.by_kind[TEACHER] / workers,
            STUDENT: ((student - trained) * low.itemsize + trained * MASTER_BYTES) / workers,
            "gradients": arrived * MASTER_BYTES / workers,
            OPTIMIZER: MOMENTS[stage.optimizer.optimizer] * trained * MASTER_BYTES / workers,
            "gathered units": _gathered(dry_run.units(shape, stage.train), student, low.itemsize),
            ACTIVATIONS: cost.peak.by_kind.get(ACTIVATIONS, 0),
        }

    def _flow_step(self, config: OptimizerConfig) -> Cost:
        inputs = self._inputs(self._local("teacher", config))
        return dry_run.flow_step(self.teacher.transformer, inputs, _optimizer(config), config.grad_clip)

    def _vae_step(self, config: OptimizerConfig) -> Cost:
        picture, samples = (
            (3, self.params.model.resolution, self.params.model.resolution),
            self._local("teacher", config),
        )

        def step() -> VAEStep:
            # What the loss weighs how costs nothing.
            return VAEStep(self.teacher.build_vae(), kl_weight=1.0)

        return dry_run.vae_step(step, picture, samples, _optimizer(config), config.grad_clip)

    def _passes(self, stage: str, config: OptimizerConfig) -> float:
        """Of one GPU's samples at once, all GPUs' together."""
        return config.steps * config.batch_size / self._local(stage, config)

    def _inputs(self, samples: int) -> Inputs:
        return Inputs(samples, self.image_tokens, self.text_tokens)

    def _local(self, stage: str, config: OptimizerConfig) -> int:
        """Samples of one pass on one GPU."""
        return max(1, config.at_once // self._gpus(stage))

    def _gpus(self, stage: str) -> int:
        return max(1, self.params.compute.of(stage).num_workers)

    def _flops(self, config: Mapping[str, Any]) -> int:
        return accounting.flops(self._shape(config), self.image_tokens, self.text_tokens).total

    def _shape(self, config: Mapping[str, Any]) -> FluxMoETransformer2DModel:
        key = json.dumps(dict(config), sort_keys=True)
        if key not in self._shapes:
            self._shapes[key] = dry_run.shape_of(config)
        return self._shapes[key]

    def _decoding(self, count: int) -> Cost:
        """The VAE's, of `count` pictures: the same for every model."""
        if count not in self._decodings:
            side = int(self.image_tokens**0.5 * 2)
            shape = (count, int(self.teacher.vae["latent_channels"]), side, side)
            self._decodings[count] = dry_run.call(self.teacher.build_vae, partial(_decode, shape), VAE, self.given)
        return self._decodings[count]

    def _text(self, dtype: torch.dtype) -> tuple[float, float]:
        """FLOPs of encoding one prompt, and bytes of both encoders."""
        return self._text_flops, sum(self._sizes[part] for part in ("text_encoder", "text_encoder_2")) * dtype.itemsize

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return self.teacher.parameters()

    @cached_property
    def _text_flops(self) -> float:
        def run(module: nn.Module) -> Any:
            # CLIP takes 77 tokens at most.
            length = min(self.text_tokens, int(getattr(module.config, "max_position_embeddings", self.text_tokens)))
            return module(torch.zeros(1, length, dtype=torch.int64))

        return sum(dry_run.call(build, run, "text").flops for build in (self.teacher.build_clip, self.teacher.build_t5))

    def _checkpoint(self, config: OptimizerConfig, trained: int) -> float:
        """Bytes of the resume checkpoints: masters, the optimizer's state, the average. A new one is written before the oldest goes."""
        # On disk, moments of a byte are the fp32 numbers that they stand for.
        moments = MOMENTS["adamw" if config.optimizer == "adamw8bit" else config.optimizer]
        average = config.ema_decay is not None
        return (checkpoints.KEPT + 1) * trained * MASTER_BYTES * (1 + moments + average)


class _EightBitState(torch.optim.Optimizer):
    """What AdamW with moments of a byte keeps: two of them a weight, and a scale for each `BLOCK`.

    torchao's own asks for values, which fake tensors have not, and otherwise makes nothing that stays.
    """

    BLOCK = 256

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and not self.state[weight]:
                    self.state[weight] = {
                        name: (torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.numel() // self.BLOCK))
                        for name in ("exp_avg", "exp_avg_sq")
                    }


def _optimizer(config: OptimizerConfig) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """What builds it in a dry run."""
    if config.optimizer != "adamw8bit":
        return partial(optimizer.build, config)
    return lambda module: _EightBitState([weight for weight in module.parameters() if weight.requires_grad], {})


def _blocks(config: Mapping[str, Any]) -> int:
    return max(int(config["num_layers"]), int(config["num_single_layers"]))


def _gathered(units: Sequence[Unit], parameters: int, low: int) -> float:
    """Bytes that FSDP2 has of whole weights and gradients beside a GPU's parts, at the worst unit of a backward pass.

    `low`: bytes of a gathered weight. A unit's gradients are summed in a copy of `MASTER_BYTES` each, kept until the next unit's.
    """
    most = 0
    nothing = Unit(0, 0, 0)
    # In a backward pass the later unit came before, and the earlier one is gathered ahead.
    for earlier, unit, later in zip([nothing, *units], units, [*units[1:], nothing], strict=False):
        # Gathered in one buffer, copied out into the weights.
        copied = (2 * unit.parameters + unit.across) * low + later.trained * MASTER_BYTES
        run = (unit.parameters + earlier.parameters + unit.trained) * low + later.trained * MASTER_BYTES
        summed = earlier.parameters * low + unit.trained * (low + MASTER_BYTES)
        most = max(most, copied, run, summed)
    # What is in no block stays whole throughout.
    return most + (parameters - sum(unit.parameters for unit in units)) * low


def _encode(shape: tuple[int, ...], vae: Any) -> Any:
    return vae.encode(torch.empty(shape)).latent_dist.mode()


def _decode(shape: tuple[int, ...], vae: Any) -> Any:
    return vae.decode(torch.empty(shape)).sample
