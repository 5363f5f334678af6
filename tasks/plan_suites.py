"""What the benchmarks of `eval.suites` take beside the data's own prompts: pictures, and the FLOPs of scoring them.

A scorer's FLOPs are those of its published models: two for each parameter and token of a pass, passes counted for one picture. The hours that
come of them are the least that it can take: small batches, single precision, and answers that a language model writes token by token, reading
all its weights for each, are far from what a GPU sustains. `seconds_a_picture` in MLflow is what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_core.config import Params, SuiteConfig

OFFICIAL_PROMPTS = {"geneval": 553, "dpg": 1065, "compbench": 2400, "mjhq": 30_000}
"""Prompts that a benchmark publishes; where `count` is given, that many."""


TOKENS_A_READ = 300
"""FLOPs of a GPU over the bytes that its memory gives, half-precision weights: 990 T over 3.35 T a second, H100."""


@dataclass(frozen=True)
class Pass:
    """A model's passes for one picture."""

    model: str
    parameters: float
    tokens: float
    """of one pass"""
    passes: float = 1.0

    @property
    def flops(self) -> float:
        """Of all of them."""
        return 2 * self.parameters * self.tokens * self.passes


_CLIP_L = (Pass("CLIP ViT-L/14, pictures", 0.303e9, 257), Pass("CLIP ViT-L/14, text", 0.085e9, 77))
_BLIP_VQA = Pass("BLIP-VQA's ViT-B/16 at 384 px", 0.086e9, 577)
PASSES: dict[str, tuple[Pass, ...]] = {
    "clip_score": _CLIP_L,
    "image_reward": (Pass("BLIP's ViT-L/16 at 224 px", 0.303e9, 197), Pass("BERT with cross-attention", 0.14e9, 35)),
    "mps": (
        Pass("CLIP ViT-H/14, pictures", 0.632e9, 257),
        Pass("CLIP ViT-H/14, text, prompt and condition", 0.302e9, 77, 2),
    ),
    # The detector's authors give 313 G for one picture; colours: some four crops.
    "geneval": (Pass("Mask2Former Swin-S", 313e9 / 2, 1), Pass("CLIP ViT-L/14, crops", 0.303e9, 257, 4)),
    "dpg": (Pass(_BLIP_VQA.model, _BLIP_VQA.parameters, _BLIP_VQA.tokens, 13.5),),
    "compbench_bvqa": (Pass(_BLIP_VQA.model, _BLIP_VQA.parameters, _BLIP_VQA.tokens, 2),),
    "compbench_unidet": (Pass("OWLv2-B/16 at 960 px", 0.086e9, 3601), Pass("DPT-hybrid at 384 px", 0.12e9, 577, 1 / 3)),
    # A written token reads 14 GB of weights, for which a GPU could have done the arithmetic of some 300 tokens: so it counts as that many.
    "compbench_scot": (
        Pass("LLaVA-type, 7 B, two questions", 7e9, 950, 2),
        Pass("LLaVA-type, 7 B, its answers", 7e9, 100 * TOKENS_A_READ, 2),
    ),
}
COMPBENCH_SHARES = {"compbench_bvqa": 3 / 8, "compbench_unidet": 3 / 8, "compbench_scot": 2 / 8}
"""Of CompBench's prompts; the other scorers score all."""


def pictures(suite: SuiteConfig) -> int:
    """That a benchmark's suite asks for; 0 for own prompts, and for files whose length is not known before they are read."""
    prompts = suite.count or OFFICIAL_PROMPTS.get(suite.prompts, 0)
    return 0 if suite.prompts == "own" else prompts * suite.images_per_prompt


def more_pictures(params: Params) -> int:
    """Of all suites beside the own one."""
    return sum(pictures(suite) for suite in params.eval.suites.values())


def scoring_flops(params: Params) -> dict[str, float]:
    """Scorer -> FLOPs for one model's pictures, of those whose models are known."""
    found: dict[str, float] = {}
    for suite in params.eval.suites.values():
        count = pictures(suite)
        for name in suite.scorers:
            if name in PASSES and count:
                share = COMPBENCH_SHARES.get(name, 1.0)
                found[name] = found.get(name, 0.0) + count * share * sum(each.flops for each in PASSES[name])
    return found
