"""Section `baselines`: dense models of a sparse one's active size, made and distilled as other papers do it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from moe_core.config.kd import KDStageConfig
from moe_core.config.section import Section
from moe_core.config.sparse import MoEConfig


class BaselineConfig(Section):
    """One baseline; what it leaves of the teacher, and how that is distilled."""

    method: Literal["diff_pruning", "lite", "bk"] = Field(
        description="diff_pruning: FFNs cut by Taylor scores; lite, bk: whole blocks dropped, see `moe_core.baselines`"
    )
    init: str = Field(
        "teacher", description="model it starts from, below data: `teacher`, or `checkpoints/baselines/NAME`"
    )
    ratio: float | None = Field(None, gt=0, description="diff_pruning: r of the FFNs that are left")
    compress_conditioning: bool = Field(
        False, description="diff_pruning: AdaLN compressed to moe.conditioning_dim, as in the sparse models"
    )
    fitted: bool = Field(
        False,
        description="diff_pruning: hidden units chosen, and second matrices fitted, as moe.split greedy and moe.refit do for experts; not the rule of"
        " that paper, but what of a fitted MoE model is not routing",
    )
    double_blocks: int | None = Field(None, gt=0, description="lite, bk: how many are left; null: all")
    single_blocks: int | None = Field(None, gt=0, description="lite, bk: how many are left; null: all")
    kd: KDStageConfig

    def cut(self, moe: MoEConfig) -> MoEConfig:
        """diff_pruning: its FFNs as a shared expert without others."""
        changes: dict[str, Any] = {
            "shared_ratio": self.ratio,
            "num_experts": 1,
            "split": "greedy" if self.fitted else "taylor",
            "deal": "round_robin",
            "router_init": "normal",
            "refit": self.fitted,
        }
        if not self.compress_conditioning:
            changes["conditioning_dim"] = None
        return moe.model_copy(update=changes)

    @model_validator(mode="after")
    def _fits_the_method(self) -> BaselineConfig:
        depth = {"double_blocks": self.double_blocks, "single_blocks": self.single_blocks}
        given = [name for name, value in depth.items() if value is not None]
        if self.method == "diff_pruning":
            if self.ratio is None:
                raise ValueError(
                    "method is diff_pruning, but ratio is missing; it says how wide the FFNs are afterwards"
                )
            if given:
                raise ValueError(f"method is diff_pruning, but {given[0]} is {depth[given[0]]}; it drops no blocks")
            if self.init != "teacher":
                raise ValueError(f"method is diff_pruning, but init is {self.init}; its scores are the teacher's")
        elif self.ratio is not None or self.compress_conditioning or self.fitted:
            raise ValueError(
                f"method is {self.method}, which cuts nothing in a block: ratio, compress_conditioning and fitted must be left out"
            )
        elif not given:
            raise ValueError(f"method is {self.method}, but neither double_blocks nor single_blocks is given")
        lacks = {"experts", "router", "group_blocks", "block_router"} | (
            {"gap_blocks"} if self.method == "diff_pruning" else {"shared"}
        )
        for key in ("train", "rates"):
            if absent := [part for part in getattr(self.kd, key) if part in lacks]:
                raise ValueError(f"kd.{key} has {absent[0]}; a model made by {self.method} has none")
        return self
