"""What a step costs in FLOPs and memory, found by running it on fake tensors: the code that trains, without the arithmetic.

- Fake tensors (`FakeTensorMode`) have shapes, types and storages, and no data. A step of 12 B parameters takes seconds and megabytes.
- What depends on values is replaced while it runs: a MoB group deals its samples to its blocks in turn, and the grouped
  matrix product, which knows no fake float32, is a product of the same size with one expert's weights. Experts run all at once,
  whatever backend would be the fastest.
- FLOPs are counted on the operations that run, those that checkpointing repeats included. Two a multiply-add.

Shapes: B batch, T tokens, D width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from moe_core import backends, losses
from moe_core.distill import KDBatch, KDStep, predict
from moe_core.importance import ImportanceAccumulator
from moe_core.memory import LiveMemory, Peak, parameters_and_buffers
from moe_core.mob import BlockRouting, MoBGroup
from moe_core.moe import MoELayer
from moe_core.sharding import EXPERT_WIDTH, lower_frozen
from moe_core.transformer import FluxMoETransformer2DModel, on_meta

if TYPE_CHECKING:
    from moe_core.config import KDStageConfig

TEACHER, STUDENT, VAE, OPTIMIZER = "teacher", "student", "vae", "optimizer"


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


BuildOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def kd_step(
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    stage: KDStageConfig,
    inputs: Inputs,
    build_optimizer: BuildOptimizer,
    *,
    dtype: torch.dtype,
    masters: torch.dtype,
    gradients_kept: float = 1.0,
) -> Cost:
    """One distillation step that is not the first: the optimizer has its state.

    `teacher`, `student`: configurations. `dtype`: what is computed in, and frozen weights are kept in; `masters`: the trained ones.
    `gradients_kept`: share of the gradients' bytes that stays, where they are dealt out: by it the pass's worst moment is found.
    """
    with _fake():
        dense, sparse = _made(teacher, dtype), _made(student, masters)
        step = KDStep(sparse, dense, stage)
        lower_frozen(sparse, dtype)

        def loss() -> Tensor:
            batch = _batch(dense, inputs, dtype)
            with _computing_in(dtype):
                return step(batch)["loss"]

        return _train(
            step, {TEACHER: dense, STUDENT: sparse}, loss, build_optimizer, stage.optimizer.grad_clip, gradients_kept
        )


def flow_step(config: Mapping[str, Any], inputs: Inputs, build_optimizer: BuildOptimizer, grad_clip: float) -> Cost:
    """One step of training a transformer from nothing, in float32."""
    with _fake():
        model = _made(config, torch.float32)

        def loss() -> Tensor:
            batch = _batch(model, inputs, torch.float32)
            return losses.distill_loss(predict(model, batch), batch.target).mean()

        return _train(model, {TEACHER: model}, loss, build_optimizer, grad_clip)


def vae_step(
    build: Callable[[], nn.Module], picture: tuple[int, ...], samples: int, build_optimizer: BuildOptimizer, clip: float
) -> Cost:
    """One step of training a VAE from nothing, in float32, on pictures of this shape, [3, S, S]; `build` makes the `VAEStep`."""
    with _fake(), no_init_weights():
        step: Any = build()

        def loss() -> Tensor:
            images = torch.empty(samples, *picture)
            with torch.no_grad():
                drawn = torch.empty_like(step.vae.encode(images[:1]).latent_dist.mean).expand(samples, -1, -1, -1)
            return step({"images": images, "noise": drawn.clone()})["loss"]

        return _train(step, {VAE: step}, loss, build_optimizer, clip)


def _train(
    trainee: nn.Module,
    kinds: Mapping[str, nn.Module],
    loss: Callable[[], Tensor],
    build_optimizer: BuildOptimizer,
    grad_clip: float,
    gradients_kept: float = 1.0,
) -> Cost:
    weights = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    optimizer, memory = build_optimizer(trainee), _Counting(gradients_kept)
    for kind, module in kinds.items():
        memory.watch(parameters_and_buffers(module), kind)
    memory.watch_gradients(weights)
    with memory:
        loss().backward()
        nn.utils.clip_grad_norm_(weights, grad_clip)
        passed, memory.peak = memory.peak, NOTHING
        with memory.all_new_is(OPTIMIZER):
            optimizer.step()
        # The update of the first step makes the optimizer's state; in every later pass that is there as well.
        flops, update, made = memory.flops, memory.peak, memory.live[OPTIMIZER]
        # So is that of blocks which no sample chose this time.
        idle = [weight for weight in weights if weight.grad is None]
        for weight in weights:
            weight.grad = None
        for weight in idle:
            weight.grad = torch.zeros_like(weight)
        if idle:
            with memory.all_new_is(OPTIMIZER):
                optimizer.step()
        state = memory.live[OPTIMIZER]
    peak = Peak(passed.total + state, {**passed.by_kind, OPTIMIZER: state})
    others = {**update.by_kind, OPTIMIZER: update.by_kind.get(OPTIMIZER, 0) + state - made}
    return Cost(flops, peak, Peak(update.total + state - made, others))


def importance_pass(teacher: Mapping[str, Any], inputs: Inputs, dtype: torch.dtype) -> Cost:
    """Forward and backward pass of a batch, with the per-sample scores of every FFN."""
    with _fake():
        dense = _made(teacher, dtype)
        accumulator = ImportanceAccumulator(dense)
        with _computing_in(dtype):
            return _pass(dense, TEACHER, lambda: accumulator.add_sums(_batch(dense, inputs, dtype)))


@torch.no_grad()
def denoising_step(config: Mapping[str, Any], inputs: Inputs, dtype: torch.dtype) -> Cost:
    """One call of a transformer, dense or sparse, as in sampling."""
    with _fake():
        model = _made(config, dtype).eval()
        return _pass(model, STUDENT, lambda: predict(model, _batch(model, inputs, dtype).to(dtype)))


def shape_of(config: Mapping[str, Any]) -> FluxMoETransformer2DModel:
    """The model of a configuration without memory or values for its weights: for what is counted on it, again and again."""
    with no_init_weights():
        return on_meta(config)


def trained_parameters(shape: FluxMoETransformer2DModel, parts: Iterable[str]) -> int:
    """How many parameters of a sparse model `parts` are, see `FluxMoETransformer2DModel.set_trainable`."""
    shape.set_trainable(parts)
    return _trained(shape)


@dataclass(frozen=True)
class Unit:
    """A unit of sharding, by numbers of parameters."""

    parameters: int
    trained: int
    across: int
    """cut along another dimension than the first: FSDP2 puts their parts together in one more copy"""


def units(shape: FluxMoETransformer2DModel, parts: Iterable[str]) -> list[Unit]:
    """Blocks and MoB groups, in the order in which they run."""
    shape.set_trainable(parts)
    return [
        Unit(sum(p.numel() for p in block.parameters()), _trained(block), _across(block))
        for block in (*shape.transformer_blocks, *shape.single_transformer_blocks)
    ]


def _across(block: nn.Module) -> int:
    experts = [layer for layer in block.modules() if isinstance(layer, MoELayer) and layer.num_experts]
    return sum(getattr(layer, name).numel() for layer in experts for name in EXPERT_WIDTH)


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def call(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], Any], kind: str, dtype: torch.dtype = torch.float32
) -> Cost:
    """A forward pass without gradients of any module, as a VAE or a text encoder: `run(module)` makes inputs and calls it."""
    with _fake(), torch.no_grad(), _made_as(dtype):
        with no_init_weights():
            module = build().eval()
        return _pass(module, kind, lambda: run(module))


def _pass(module: nn.Module, kind: str, run: Callable[[], Any]) -> Cost:
    memory = _Counting()
    memory.watch(parameters_and_buffers(module), kind)
    with memory:
        run()
    return Cost(memory.flops, memory.peak)


def _made(config: Mapping[str, Any], dtype: torch.dtype) -> FluxMoETransformer2DModel:
    """A sparse or a dense transformer: a dense one is a sparse one without sparse parts."""
    # Values that nobody has need not be drawn.
    with _made_as(dtype), no_init_weights():
        return FluxMoETransformer2DModel.from_config(dict(config))


def _computing_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


@contextmanager
def _made_as(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _batch(model: FluxTransformer2DModel, inputs: Inputs, text: torch.dtype) -> KDBatch:
    # As `sampling.prepare_batch` makes it: text features come as their encoders give them, all else in float32.
    config, samples = model.config, inputs.samples

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    return KDBatch(
        latents=empty(samples, inputs.image_tokens, config.in_channels),
        noise=empty(samples, inputs.image_tokens, config.in_channels),
        sigma=empty(samples),
        prompt_embeds=empty(samples, inputs.text_tokens, config.joint_attention_dim, dtype=text),
        pooled=empty(samples, config.pooled_projection_dim, dtype=text),
        img_ids=empty(inputs.image_tokens, 3),
        txt_ids=empty(inputs.text_tokens, 3, dtype=text),
        guidance=empty(samples) if config.guidance_embeds else None,
    )


@contextmanager
def _fake() -> Iterator[None]:
    with (
        FakeTensorMode(),
        mock.patch.object(backends, "choose", _all_at_once),
        mock.patch.object(backends, "grouped_mm_fault", _no_fault),
        mock.patch.object(F, "grouped_mm", _like_grouped_mm),
        mock.patch.object(MoBGroup, "choices", _in_turn),
    ):
        yield


# Functions, as a mock keeps the tensors that it is called with.


def _all_at_once(*tensors: Tensor) -> str:
    return "grouped_mm"


def _no_fault(*tensors: Tensor) -> None:
    return None


def _like_grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    if right.ndim == 3:
        return left @ right[0]
    # Of columns with rows: every expert gets a matrix, and all of them together cost one product.
    product = left @ right
    return product.new_empty(len(offs), *product.shape)


def _in_turn(group: MoBGroup, routing: BlockRouting) -> list[list[int]]:
    count, active = len(group.blocks), routing.indices_Bk.shape[1]
    return [sorted((sample + i) % count for i in range(active)) for sample in range(len(routing.indices_Bk))]


class _Counting(LiveMemory):
    """Memory and FLOPs in one mode: every operation pays for each.

    FLOPs as `torch.utils.flop_counter` has them, whose own mode cannot be in force during `torch.autograd.grad`.
    """

    def __init__(self, gradients_kept: float = 1.0) -> None:
        super().__init__()
        self.flops = 0
        self._kept = gradients_kept

    def _raise_peak(self) -> None:
        total = self.live.total() - round((1 - self._kept) * self.live["gradients"])
        if total > self.peak.total:
            self.peak = Peak(total, {kind: size for kind, size in self.live.items() if size})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            # Autograd and autocast ask this of every fake tensor, more often than all else: it need not go through `FakeTensorMode`.
            return args[0].device
        output = func(*args, **(kwargs or {}))
        self.made(output)
        if formula := _FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


_DEVICE = torch.ops.prim.device.default


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
