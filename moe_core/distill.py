"""One distillation step (paper, Sec. 3.2): the teacher's and the student's forward pass and the loss between them.
No loop, no devices.

- One step serves all stages; the stage's parameters say what trains and how the parts weigh, the student's
  structure says the rest: where it has MoB groups, features are compared at the ends of groups only (the paper's
  group feature loss), otherwise after every block; after those before gaps only where they alone are trained.
- A router's balance counts where the router is trained. Balance is summed over layers, as Switch Transformers do
  and as eq. 8 does for features.
- The teacher is no submodule: its parameters are neither trained, saved, nor moved with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_core import losses
from moe_core.capture import Recording, record
from moe_core.mob import MoBGroup
from moe_core.transformer import FluxMoETransformer2DModel

if TYPE_CHECKING:
    from moe_core.config import KDStageConfig


@dataclass(frozen=True)
class KDBatch:
    """Inputs of one step: what a FLUX transformer takes, with image and noise still apart."""

    latents: Tensor
    """x0, packed: [B, T_image, C]."""
    noise: Tensor
    """Gaussian, packed as the latents: [B, T_image, C]."""
    sigma: Tensor
    """Noise level in (0, 1]: [B]."""
    prompt_embeds: Tensor
    """T5 features: [B, T_text, D_text]."""
    pooled: Tensor
    """CLIP's pooled vector: [B, D_pooled]."""
    img_ids: Tensor
    """[T_image, 3]; the same for all samples."""
    txt_ids: Tensor
    """[T_text, 3]; the same for all samples."""
    guidance: Tensor | None = None
    """Guidance scale: [B]; None for a model without guidance embedding."""

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def noisy(self) -> Tensor:
        """x_t = (1 - sigma) * x0 + sigma * noise."""
        sigma = self.sigma.to(self.latents.dtype).view(-1, 1, 1)
        return (1 - sigma) * self.latents + sigma * self.noise

    @property
    def target(self) -> Tensor:
        """What a flow-matching model should answer: noise - x0."""
        return self.noise - self.latents

    def __getitem__(self, rows: slice) -> KDBatch:
        """The samples of a slice."""
        return self._map(lambda name, value: value if name in ("img_ids", "txt_ids") else value[rows])

    def to(self, *args: Any) -> KDBatch:
        """Every tensor through `Tensor.to` (a device, a floating type, or both)."""
        return self._map(lambda name, value: value.to(*args))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> KDBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(name, value) for name, value in values.items() if value is not None})


def predict(model: nn.Module, batch: KDBatch, noisy: Tensor | None = None) -> Tensor:
    """The model's answer for a batch: [B, T_image, C]. `noisy`: x_t, where the caller needs that very tensor (for
    its gradient)."""
    return model(
        hidden_states=batch.noisy if noisy is None else noisy,
        encoder_hidden_states=batch.prompt_embeds,
        pooled_projections=batch.pooled,
        timestep=batch.sigma,
        img_ids=batch.img_ids,
        txt_ids=batch.txt_ids,
        guidance=batch.guidance,
        return_dict=False,
    )[0]


def feature_pairs(student: FluxMoETransformer2DModel, trained: Collection[str] = ()) -> list[tuple[str, str]]:
    """(student's block or group, teacher's block) whose outputs a stage compares: the groups where there are any, the blocks before
    gaps where these alone are `trained`, otherwise all blocks."""
    pairs = student.feature_names()
    groups = [pair for pair in pairs if isinstance(student.get_submodule(pair[0]), MoBGroup)]
    if not groups and set(trained) == {"gap_blocks"}:
        return [pair for pair in pairs if pair[0] in student.gap_blocks()]
    return groups or pairs


class KDStep(nn.Module):
    """Teacher and student on one batch, and the total loss of eq. 10. This is the module that training wraps (DDP)
    and steps.

    Sets which of the student's parameters are trained (`stage.train`) and its gradient checkpointing. The teacher
    must be on the batch's device.
    """

    def __init__(self, student: FluxMoETransformer2DModel, teacher: nn.Module, stage: KDStageConfig):
        super().__init__()
        self.student = student
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, so that nn.Module does not register it
        self.stage = stage
        student.set_trainable(stage.train)
        if stage.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self.pairs = feature_pairs(student, stage.train)

    @property
    def teacher(self) -> nn.Module:
        """The dense model that is imitated; frozen."""
        return self._teacher[0]

    def forward(self, batch: KDBatch) -> dict[str, Tensor]:
        """Scalars: `loss` (eq. 10, with gradient) and, detached, its parts.

        distill: eq. 7; feature: eq. 8 with the weights of eq. 9; feature_unweighted: the same with all weights 1;
        balance: sum over the trained routers; balance_moe and balance_mob (where there are such): the mean over
        layers, 1 when the load is even.
        """
        with torch.no_grad(), record(self.teacher, [teacher for _, teacher in self.pairs]) as expected:
            answer = predict(self.teacher, batch)
        with record(self.student, [student for student, _ in self.pairs]) as actual:
            distill_B = losses.distill_loss(predict(self.student, batch), answer)
        del answer
        feature_LB, norm_LB, floor_LB = self._features(actual, expected)
        feature_B = losses.weighted_feature_loss(distill_B, feature_LB, norm_LB, floor_LB)
        balance, evenness = self._balance(actual, distill_B)
        total = (distill_B + self.stage.lambda_feature * feature_B).mean() + self.stage.lambda_balance * balance
        parts = {
            "distill": distill_B.mean(),
            "feature": feature_B.mean(),
            "feature_unweighted": feature_LB.sum(0).mean(),
            "balance": balance,
            **evenness,
        }
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}

    def _features(self, actual: Recording, expected: Recording) -> tuple[Tensor, Tensor, Tensor]:
        """Per layer and sample, [L, B]: unweighted feature loss, the teacher's norm, and the loss that counts as
        none."""
        feature, norm, floor = [], [], []
        for student, teacher in self.pairs:
            # Taken out of the recordings, so that what autograd does not keep is freed before the next layer.
            wanted, given = expected.features.pop(teacher), actual.features.pop(student)
            feature.append(losses.feature_loss(given, wanted))
            norm.append(losses.feature_norm(wanted))
            elements = sum(stream[0].numel() for stream in wanted)
            floor.append(losses.rounding_floor(norm[-1], elements, given[1].dtype))
        return torch.stack(feature), torch.stack(norm), torch.stack(floor)

    def _balance(self, actual: Recording, distill_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The balance loss summed over the trained routers; and, by kind, the mean over the routers that ran."""
        total = distill_B.new_zeros(())
        experts, blocks = [], []
        for name, routing in actual.routings.items():
            if self._trained(name):
                probs = self.student.config.moe["balance_probs"]
                balance_b = losses.moe_balance(routing.probs_TE, routing.indices_TK, probs)
                # By the whole batch: inside a MoB group a router sees only the samples that were sent its way.
                total = total + balance_b.sum() / len(distill_B)
                if len(balance_b):
                    experts.append(balance_b.mean())
        for name, choice in actual.block_routings.items():
            if self._trained(name):
                probs = self.student.config.mob["balance_probs"]
                blocks.append(losses.mob_balance(choice.probs_Bm, choice.indices_Bk, probs))
                total = total + blocks[-1]
        kinds = {"balance_moe": experts, "balance_mob": blocks}
        return total, {kind: torch.stack(values).mean() for kind, values in kinds.items() if values}

    def _trained(self, name: str) -> bool:
        return any(p.requires_grad for p in self.student.get_submodule(name).parameters())


def validate_kd(student: nn.Module, teacher: nn.Module, batches: Iterable[KDBatch]) -> dict[str, float]:
    """How far the student's answers are from the teacher's on fixed batches.

    distill: eq. 7, mean over samples; distill_relative: its sum over samples over that of the teacher's mean
    squares. Both models are put into evaluation mode for it, and the student's mode is restored. Raises ValueError
    where there is no sample.
    """
    return kd_metrics(*kd_sums(student, teacher, ((batch, len(batch)) for batch in batches)))


def kd_metrics(error: float, scale: float, samples: float) -> dict[str, float]:
    """What `validate_kd` says, from its sums."""
    if not samples:
        raise ValueError("validation has 0 samples; it needs at least one")
    return {"distill": error / samples, "distill_relative": error / scale}


@torch.no_grad()
def kd_sums(
    student: nn.Module, teacher: nn.Module, batches: Iterable[tuple[KDBatch, int]]
) -> tuple[float, float, float]:
    """The sums behind `validate_kd`, of (batch, how many of its first samples count): eq. 7, the teacher's mean squares, samples."""
    was_training = student.training
    student.eval()
    teacher.eval()
    error, scale, samples = 0.0, 0.0, 0
    for batch, counted in batches:
        answer = predict(teacher, batch)
        error += losses.distill_loss(predict(student, batch), answer)[:counted].double().sum().item()
        scale += losses.distill_loss(torch.zeros_like(answer), answer)[:counted].double().sum().item()
        samples += counted
    student.train(was_training)
    return error, scale, samples
