"""Memory of tensors: counted by storage while it lives; and dry runs, which must agree with real ones and with the accounting."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from moe_core import accounting, dry_run, structure
from moe_core.config import KDStageConfig
from moe_core.distill import KDBatch, KDStep
from moe_core.dry_run import Inputs
from moe_core.memory import LiveMemory
from moe_core.transformer import FluxMoETransformer2DModel
from tests.moe_core.small_models import IMAGE_TOKENS, SIZES, TEXT_TOKENS, make_level, make_mob, make_moe

INPUTS = Inputs(3, IMAGE_TOKENS, TEXT_TOKENS)
DENSE = structure.dense_part(SIZES)
SPARSE = structure.moe_config(DENSE, make_moe(dense_double_blocks=(0,)))
GROUPED = structure.mob_config(SPARSE, make_level({"blocks": [[1, 2, 3]]}), make_mob())


def test_views_cost_nothing_and_what_is_gone_is_not_counted() -> None:
    with LiveMemory() as memory:
        kept = torch.zeros(100)
        views = [kept[10:], kept.view(10, 10).T]
        assert memory.live.total() == 400
        passing = torch.zeros(50)
        del passing, views
        gc.collect()
        assert memory.live.total() == 400
    assert memory.peak.total == 600


def test_what_autograd_keeps_is_counted_until_backward() -> None:
    weight = nn.Parameter(torch.ones(10, 10))
    with LiveMemory() as memory:
        memory.watch([weight], "weights")
        memory.watch_gradients([weight])
        loss = torch.exp(torch.ones(10, 10) @ weight).sum()
        before = memory.live["activations"]
        assert before >= 800, "the input of the product and the result of exp"
        loss.backward()
        assert memory.live["gradients"] == 400
        assert memory.live["activations"] < before
    assert memory.live["weights"] == 400


def stage(train: tuple[str, ...], **more: Any) -> KDStageConfig:
    optimizer = {"steps": 2, "batch_size": 3, "learning_rate": 1e-3}
    return KDStageConfig.model_validate({"optimizer": optimizer, "train": train, "validate_every": 1, **more})


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])


def real_step(config: dict[str, Any], kd: KDStageConfig) -> tuple[int, int]:
    """Peaks of the second step's pass and of its update, by real tensors."""
    teacher, student = (FluxMoETransformer2DModel.from_config(c) for c in (DENSE, config))
    student.set_expert_backend("grouped_mm")  # as a dry one; `by_expert` takes less
    step = KDStep(student, teacher, kd)
    optimizer = adamw(step)
    memory = LiveMemory()
    for module in (teacher, student):
        memory.watch([*module.parameters(), *module.buffers()], "weights")
    with memory:
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            memory.peak = type(memory.peak)(0)
            batch = KDBatch(
                latents=torch.randn(3, IMAGE_TOKENS, 8), noise=torch.randn(3, IMAGE_TOKENS, 8), sigma=torch.rand(3),
                prompt_embeds=torch.randn(3, TEXT_TOKENS, 12), pooled=torch.randn(3, 10), guidance=torch.ones(3),
                img_ids=torch.zeros(IMAGE_TOKENS, 3), txt_ids=torch.zeros(TEXT_TOKENS, 3),
            )  # fmt: skip
            loss = step(batch)["loss"]
            loss.backward()
            del loss, batch
            passed, memory.peak = memory.peak, type(memory.peak)(0)
            optimizer.step()
    return passed.total, memory.peak.total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "train"),
    [(SPARSE, ("experts", "router")), (SPARSE, ("shared", "conditioning"))],
    ids=["experts", "shared"],
)
def test_a_dry_step_takes_what_a_real_one_takes(
    config: dict[str, Any], train: tuple[str, ...], checkpointing: bool
) -> None:
    kd = stage(train, gradient_checkpointing=checkpointing)
    dry = dry_run.kd_step(DENSE, config, kd, INPUTS, adamw, dtype=torch.float32, masters=torch.float32)
    passed, update = real_step(config, kd)
    assert dry.peak.total == pytest.approx(passed, rel=0.03)
    assert dry.update.total == pytest.approx(update, rel=0.03)


@pytest.mark.parametrize("config", [DENSE, SPARSE, GROUPED], ids=["dense", "moe", "mob"])
def test_a_dry_call_has_the_flops_of_the_accounting(config: dict[str, Any]) -> None:
    cost = dry_run.denoising_step(config, INPUTS, torch.float32)
    assert cost.flops == 3 * accounting.flops(config, IMAGE_TOKENS, TEXT_TOKENS).total


def test_flops_of_a_dry_step() -> None:
    """Forward of both models, backward of the student."""
    kd = stage(("all",))
    dry = dry_run.kd_step(DENSE, DENSE, kd, INPUTS, adamw, dtype=torch.float32, masters=torch.float32)
    forward = 3 * accounting.flops(DENSE, IMAGE_TOKENS, TEXT_TOKENS).total
    # A product's backward is two of its size. Of attention, fused, it is 2.5 times; no gradient goes into the inputs.
    assert 4 * forward * 0.9 < dry.flops < 4.2 * forward


def test_a_plan_of_flux1_needs_no_memory_of_its_own() -> None:
    cost = dry_run.denoising_step({"guidance_embeds": True}, Inputs(1, 4096, 512), torch.bfloat16)
    assert cost.peak.by_kind["student"] == 2 * 11_901_408_320
    assert cost.flops == accounting.flops({"guidance_embeds": True}, 4096, 512).total
