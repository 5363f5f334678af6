"""Sections `moe` and `mob`: what the sparse model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section


class MoEConfig(Section):
    """Sec. 3.1: what an FFN becomes."""

    expansion_ratio: float = Field(4.0, gt=0, description="r: hidden width of the dense FFN over the model's width")
    shared_ratio: float = Field(gt=0, description="r_s")
    normal_ratio: float = Field(gt=0, description="r_n")
    num_experts: int = Field(gt=0, description="n")
    top_k: int = Field(gt=0, description="k")
    split: Literal["taylor", "random", "greedy"] = Field(
        "taylor",
        description="which segments the shared expert gets: those of the highest scores of eq. 6; any (Table 5); or those that tell the whole FFN's"
        " output best (`moe_core.fit`)",
    )
    deal: Literal["round_robin", "importance", "coactivation"] = Field(
        "round_robin",
        description="how normal experts get the rest: in turn by rank; the best to the first expert; or units that are active together",
    )
    refit: bool = Field(
        False, description="second matrices fitted to the whole FFN's output; without it they are the FFN's own"
    )
    gate_norm: Literal["renormalize", "scale_to_k", "unit"] = Field(
        "renormalize", description="eq. 3; the same times k; or 1 for each active expert"
    )
    balance_probs: Literal["softmax", "gate"] = "softmax"
    router_init: Literal["normal", "norms"] = Field(
        "normal", description="drawn; or fitted to the norms of the experts' outputs"
    )
    router_init_std: float = Field(0.02, gt=0, description="router_init normal")
    dense_double_blocks: tuple[int, ...] = Field((0,), description="double blocks that keep their FFNs")
    conditioning_dim: int | None = Field(
        None, gt=0, description="width of the compressed AdaLN conditioning; null: not compressed"
    )
    ridge: float = Field(
        1e-3,
        gt=0,
        description="ridge of the regressions, relative to the inputs' mean variance (AdaLN) or mean square (refit, router)",
    )

    @model_validator(mode="after")
    def _adds_up(self) -> MoEConfig:
        total = self.shared_ratio + self.num_experts * self.normal_ratio
        if abs(total - self.expansion_ratio) > 1e-9:
            raise ValueError(
                f"expansion_ratio is {self.expansion_ratio:g}, but shared_ratio + num_experts * normal_ratio ="
                f" {self.shared_ratio:g} + {self.num_experts} * {self.normal_ratio:g} = {total:g}; they must be equal"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.num_experts} experts")
        return self

    @property
    def needs_tokens(self) -> bool:
        """Whether the conversion reads tokens of the FFNs, which stage `importance` keeps."""
        return self.split == "greedy" or self.deal == "coactivation" or self.router_init == "norms" or self.refit


class MoBGroupsConfig(Section):
    """The groups among one kind of block: chosen (number and size) or written out."""

    groups: int = Field(0, ge=0)
    size: int = Field(0, ge=0)
    blocks: tuple[tuple[int, ...], ...] | None = Field(None, description="explicit groups of consecutive block indices")

    @model_validator(mode="after")
    def _sane(self) -> MoBGroupsConfig:
        if self.groups and self.blocks is not None:
            raise ValueError(f"groups is {self.groups} and blocks are written out; one of both must be left out")
        if self.groups and self.size < 2:
            raise ValueError(f"groups is {self.groups}; then size must be at least 2, not {self.size}")
        seen: set[int] = set()
        for group in self.blocks or ():
            if len(group) < 2 or list(group) != list(range(group[0], group[0] + len(group))):
                raise ValueError(f"group {list(group)} must be two or more consecutive block indices in rising order")
            if seen & set(group):
                raise ValueError(f"blocks {sorted(seen & set(group))} stand in two groups; a block may be in one")
            seen |= set(group)
        return self


class MoBLevelConfig(Section):
    """One sparsity level (M, S, XS)."""

    init: str = Field(
        description="model it starts from, below data: `checkpoints/moe`, `checkpoints/mob/M`, or `teacher`: dense"
    )
    double: MoBGroupsConfig = MoBGroupsConfig()
    single: MoBGroupsConfig = MoBGroupsConfig()


class MoBConfig(Section):
    """Sec. 3.1, Mixture of Blocks."""

    active: int = Field(1, gt=0, description="kappa: active blocks a group")
    contiguous: bool = Field(False, description="eq. 4's window of consecutive blocks instead of eq. 5's best kappa")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the features against the conditioning, eq. 5")
    balance_probs: Literal["softmax", "gate"] = "softmax"
    router_init_std: float = Field(0.02, gt=0)
    levels: Mapping[str, MoBLevelConfig]
