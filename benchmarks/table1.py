"""The paper's Table 1, counted on the meta device: `python -m benchmarks.table1` prints the table of docs/flux1.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from moe_core import accounting, references, structure
from moe_core.config import MoBConfig, MoEConfig

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
"""1024 x 1024 pixels."""
MOE = MoEConfig(
    shared_ratio=1.0, normal_ratio=0.25, num_experts=12, top_k=2, dense_double_blocks=(0, 1, 2), conditioning_dim=256
)


def configurations() -> dict[str, Mapping[str, Any]]:
    """Name in the paper's Table 1 -> configuration."""
    found: dict[str, Mapping[str, Any]] = {
        "FLUX.1 [dev]": references.FLUX1_DEV,
        "FLUX.1-Lite": references.FLUX1_LITE,
        "FLUX-Mini": references.FLUX1_MINI,
        "FLUX.1-MoE-L": (large := structure.moe_config(references.FLUX1_DEV, MOE)),
    }
    change = {f"{kind}.{i}": 0.0 for kind in structure.KINDS.values() for i in range(38)}
    for name, single in (("M", 0), ("S", 3), ("XS", 5)):
        groups = {"double": {"groups": 5, "size": 3}, "single": {"groups": single, "size": 5}}
        mob = MoBConfig.model_validate({"levels": {name: {"init": "checkpoints/moe", **groups}}})
        found[f"FLUX.1-MoE-{name}"] = structure.mob_config(large, mob.levels[name], mob, change)
    return found


def main() -> int:
    """Prints the table in Markdown."""
    head = ["model", "total", "activated", "paper's count", "paper", "FFN", "attention", "AdaLN", "other"]
    head += ["TFLOPs", "attention once", "paper", "deviation"]
    print("| " + " | ".join(head) + " |\n|---|" + "--:|" * (len(head) - 1))
    for name, config in configurations().items():
        counts, flops, paper = (
            accounting.count(config),
            accounting.flops(config, IMAGE_TOKENS, TEXT_TOKENS),
            references.TABLE_1[name],
        )
        parameters = [counts.total, counts.activated, counts.activated_paper]
        row = [f"{value / 1e9:.2f}" for value in parameters] + [f"{paper.activated:.2f}"]
        row += [f"{kind.activated / 1e9:.2f}" for kind in counts.by_kind().values()]
        once = flops.paper / 1e12
        row += [
            f"{flops.total / 1e12:.2f}",
            f"{once:.2f}",
            f"{paper.tflops:.2f}",
            f"{100 * (once / paper.tflops - 1):+.1f} %",
        ]
        print("| " + " | ".join([name, *row]) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
