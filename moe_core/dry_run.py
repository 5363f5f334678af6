"""What a step costs in FLOPs and memory, found by running it on fake tensors: the code that trains, without the arithmetic.

- Fake tensors (`FakeTensorMode`) have shapes, types and storages, and no data. A step of 12 B parameters takes seconds and megabytes.
- What depends on values is replaced while it runs: a MoB group deals its samples to its blocks in turn, and the grouped
  matrix product, which knows no fake float32, is a product of the same size with one expert's weights.
- FLOPs are counted on the operations that run, those that checkpointing repeats included. Two a multiply-add.

Shapes: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moe_core.config import KDStageConfig
from moe_core.distill import KDBatch, KDStep, predict
from moe_core.importance import ImportanceAccumulator
from moe_core.memory import LiveMemory, Peak, parameters_and_buffers
from moe_core.mob import BlockRouting, MoBGroup
from moe_core.transformer import FluxMoETransformer2DModel

TEACHER, STUDENT, OPTIMIZER = "teacher", "student", "optimizer"


@dataclass(frozen=True)
class Inputs:
    """Size of a batch of a FLUX transformer."""

    samples: int
    image_tokens: int
    text_tokens: int


NOTHING = Peak(0)


@dataclass(frozen=True)
class Cost:
    """What one step takes."""

    flops: int
    peak: Peak
    """of forward and backward pass"""
    update: Peak = NOTHING
    """of the optimizer's update"""

    @property
    def most(self) -> Peak:
        """The larger of both."""
        return max(self.peak, self.update, key=lambda peak: peak.total)


def kd_step(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    stage: KDStageConfig,
    inputs: Inputs,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    frozen: torch.dtype,
    trained: torch.dtype,
) -> Cost:
    """One distillation step that is not the first: the optimizer has its state.

    `teacher`, `student`: configurations. `frozen`, `trained`: types of the weights; where they differ, the pass is computed
    in the first under autocast.
    """
    with _fake():
        dense, sparse = _dense(teacher, frozen), _sparse(student, trained)
        step = KDStep(sparse, dense, stage)
        for parameter in sparse.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen)
        weights = [parameter for parameter in sparse.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(step)
        memory = LiveMemory()
        memory.watch(parameters_and_buffers(dense), TEACHER)
        memory.watch(parameters_and_buffers(sparse), STUDENT)
        memory.watch_gradients(weights)
        autocast = torch.autocast("cpu", frozen) if frozen != trained else nullcontext()
        with memory, _Flops() as counter:
            optimizer.zero_grad(set_to_none=True)
            batch = _batch(dense, inputs, frozen)
            with autocast:
                loss = step(batch)["loss"]
            loss.backward()
            del loss, batch
            nn.utils.clip_grad_norm_(weights, stage.optimizer.grad_clip)
            passed, memory.peak = memory.peak, NOTHING
            with memory.all_new_is(OPTIMIZER):
                optimizer.step()
            # The update of the first step makes the optimizer's state; in every later pass that is there as well.
            state = memory.live[OPTIMIZER]
        peak = Peak(passed.total + state, {**passed.by_kind, OPTIMIZER: state})
        return Cost(counter.total, peak, memory.peak)


def importance_pass(teacher: Mapping[str, Any], inputs: Inputs, dtype: torch.dtype) -> Cost:
    """Forward and backward pass of a batch, with the per-sample scores of every FFN."""
    with _fake():
        dense = _dense(teacher, dtype)
        accumulator = ImportanceAccumulator(dense)
        return _pass(dense, TEACHER, lambda: accumulator.add_sums(_batch(dense, inputs, dtype)))


@torch.no_grad()
def denoising_step(config: Mapping[str, Any], inputs: Inputs, dtype: torch.dtype) -> Cost:
    """One call of a transformer, dense or sparse, as in sampling."""
    with _fake():
        sparse = config.get("moe") is not None or config.get("mob") is not None
        model = _sparse(config, dtype) if sparse else _dense(config, dtype)
        return _pass(model.eval(), STUDENT if sparse else TEACHER, lambda: predict(model, _batch(model, inputs, dtype)))


def call(build: Callable[[], nn.Module], inputs: Callable[[nn.Module], Any], kind: str) -> Cost:
    """A forward pass without gradients of any module, as a VAE or a text encoder: `inputs(module)` makes and runs it."""
    with _fake(), torch.no_grad():
        module = build().eval()
        return _pass(module, kind, lambda: inputs(module))


def _pass(module: nn.Module, kind: str, run: Callable[[], Any]) -> Cost:
    memory = LiveMemory()
    memory.watch(parameters_and_buffers(module), kind)
    with memory, _Flops() as counter:
        run()
    return Cost(counter.total, memory.peak)


def _dense(config: Mapping[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    with _made_as(dtype):
        return FluxTransformer2DModel.from_config(dict(config))


def _sparse(config: Mapping[str, Any], dtype: torch.dtype) -> FluxMoETransformer2DModel:
    with _made_as(dtype):
        return FluxMoETransformer2DModel.from_config(dict(config))


@contextmanager
def _made_as(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batch(model: FluxTransformer2DModel, inputs: Inputs, dtype: torch.dtype) -> KDBatch:
    config, samples = model.config, inputs.samples

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    return KDBatch(
        latents=empty(samples, inputs.image_tokens, config.in_channels),
        noise=empty(samples, inputs.image_tokens, config.in_channels),
        sigma=torch.empty(samples, dtype=torch.float32),
        prompt_embeds=empty(samples, inputs.text_tokens, config.joint_attention_dim),
        pooled=empty(samples, config.pooled_projection_dim),
        img_ids=torch.empty(inputs.image_tokens, 3, dtype=torch.float32),
        txt_ids=torch.empty(inputs.text_tokens, 3, dtype=torch.float32),
        guidance=torch.empty(samples, dtype=torch.float32) if config.guidance_embeds else None,
    )


@contextmanager
def _fake() -> Iterator[None]:
    with (
        FakeTensorMode(),
        mock.patch.object(F, "grouped_mm", _like_grouped_mm),
        mock.patch.object(MoBGroup, "choices", _in_turn),
    ):
        yield


def _like_grouped_mm(x_ND: Tensor, w_EDF: Tensor, offs: Tensor) -> Tensor:
    return x_ND @ w_EDF[0]


def _in_turn(group: MoBGroup, routing: BlockRouting) -> list[list[int]]:
    count, active = len(group.blocks), routing.indices_Bk.shape[1]
    return [sorted((sample + i) % count for i in range(active)) for sample in range(len(routing.indices_Bk))]


class _Flops(TorchDispatchMode):
    """Counts as `torch.utils.flop_counter` does, whose own mode cannot be in force during `torch.autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Of fused attention on a CPU, which torch's counter does not know; [B, heads, T, head width] each."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> int:
    # Q K^T once more, then the gradients of value, of the probabilities, of query and of key: as for CUDA's kernels.
    return _attention_flops(query, key, value) * 5 // 2


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
