"""Whole models over the dense one: time over FLOPs, one denoising step of random weights.

- CPU: a FLUX 1024 wide, of 8 double and 15 single blocks; 512 image tokens and 64 of text. GPU: FLUX.1's size, Lite's and Mini's,
  at 1024 x 1024 pixels.
- Levels as the paper cuts FLUX.1, in proportion: L, and M, S, XS with groups of 3 double and 5 single blocks.
- Routing of random weights is nearly even; `largest_load_over_mean` tells, over the MoE layers. With `skewed` the routers get a bias that makes the
  i-th most popular expert about i times rarer than the first.
- FLOPs: `moe_core.accounting`, two a multiply-add. A sample pays for the blocks that it passes, whichever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import timing
from moe_core import accounting, references
from moe_core.compiling import compile_blocks
from moe_core.moe import MoELayer, Routing
from moe_core.transformer import MOB_DEFAULTS, MOE_DEFAULTS, FluxMoETransformer2DModel

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_grouped_mm")
"""What torch's profiler calls them."""
PROFILED = 3
"""Calls."""

MIDDLE: dict[str, Any] = {
    **references.FLUX1_DEV,
    "num_layers": 8,
    "num_single_layers": 15,
    "num_attention_heads": 8,
}


NARROW = MIDDLE | {"num_attention_heads": 1}
"""As deep, and hardly any arithmetic: what the calls themselves take."""


def levels(
    dense: Mapping[str, Any], kept: int, double_groups: int, single_groups: Mapping[str, int], conditioning: int
) -> dict[str, dict[str, Any]]:
    """Level -> configuration. `kept`: double blocks that stay dense; groups follow them, as many as are said."""
    large = {
        **dense,
        "moe": {**MOE_DEFAULTS, "dense_double_blocks": list(range(kept))},
        "conditioning_dim": conditioning,
    }
    made = {"dense": dict(dense), "L": large}
    for level, count in single_groups.items():
        mob = {
            **MOB_DEFAULTS,
            "double_groups": [list(range(kept + 3 * i, kept + 3 * i + 3)) for i in range(double_groups)],
            "single_groups": [list(range(5 * i, 5 * i + 5)) for i in range(count)],
        }
        made[level] = {**large, "mob": mob}
    return made


def of_cpu() -> dict[str, dict[str, Any]]:
    """What a CPU measures."""
    return levels(MIDDLE, 1, 2, {"M": 0, "S": 1, "XS": 2}, 96)


def of_calls() -> dict[str, dict[str, Any]]:
    """Two that cost their calls alone."""
    made = levels(NARROW, 1, 0, {}, 96)
    return {name: made[name] for name in ("dense", "L")}


def of_gpu() -> dict[str, dict[str, Any]]:
    """What a GPU measures: the paper's Table 1."""
    made = levels(references.FLUX1_DEV, 3, 5, {"M": 0, "S": 3, "XS": 5}, 256)
    return {**made, "Lite": dict(references.FLUX1_LITE), "Mini": dict(references.FLUX1_MINI)}


def build(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> FluxMoETransformer2DModel:
    """Random weights, made on the device, of one size for all: drawing 600 M normal numbers takes a CPU longer than what is measured."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            torch.manual_seed(0)
            model = FluxMoETransformer2DModel.from_config(dict(config)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03)
    return model


def inputs(
    config: Mapping[str, Any], samples: int, image: int, text: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of one call."""
    torch.manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "hidden_states": drawn(samples, image, config["in_channels"]),
        "encoder_hidden_states": drawn(samples, text, config["joint_attention_dim"]),
        "pooled_projections": drawn(samples, config["pooled_projection_dim"]),
        "timestep": torch.linspace(0.2, 0.9, samples, device=device, dtype=dtype),
        "guidance": torch.full((samples,), 3.5, device=device, dtype=dtype) if config["guidance_embeds"] else None,
        "img_ids": torch.zeros(image, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def skew(model: FluxMoETransformer2DModel) -> None:
    """Makes routing uneven: routers see the popular experts above the rest, by a bias that is no part of a model."""
    for layer in moe_layers(model):
        bias_E = -torch.arange(1, layer.num_experts + 1, device=layer.router.weight.device).log()

        def forward(hidden: Tensor, router: Any = layer.router, bias_E: Tensor = bias_E) -> Routing:
            # Spread as the logits are, so that neither bias nor choice stands alone.
            logits_TE = nn.functional.linear(hidden.float(), router.weight.float())
            probs_TE = (logits_TE / logits_TE.std() + bias_E).softmax(-1)
            top_TK, indices_TK = probs_TE.topk(router.top_k)
            return Routing(probs_TE, top_TK / top_TK.sum(-1, keepdim=True), indices_TK)

        layer.router.forward = forward


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Those that route."""
    return [module for module in model.modules() if isinstance(module, MoELayer) and module.num_experts]


def where(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call on a CPU in matrix products, in attention and in all other operators, by torch's profiler; a mean of some calls.

    What a call takes between its operators is in none of them.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(PROFILED):
            run()
    seconds = {"products": 0.0, "attention": 0.0, "else": 0.0}
    for event in found.key_averages():
        kind = "products" if event.key in PRODUCTS else "attention" if "attention" in event.key else "else"
        seconds[kind] += event.self_cpu_time_total / 1e6 / PROFILED
    return {kind: float(f"{value:.4g}") for kind, value in seconds.items()}


@contextmanager
def loads(model: nn.Module) -> Iterator[list[float]]:
    """Inside, collects the largest expert's load over the mean, of every call of a router."""
    found: list[float] = []

    def look(_module: nn.Module, _given: Any, routing: Routing) -> None:
        count_E = routing.indices_TK.flatten().bincount(minlength=routing.probs_TE.shape[-1])
        found.append(float(count_E.max() / count_E.float().mean()))

    hooks = [layer.router.register_forward_hook(look) for layer in moe_layers(model)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(
    configs: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    samples: int = 1,
    image: int = 512,
    text: int = 64,
    skewed: bool = False,
    compiled: bool = False,
    rounds: int = 5,
) -> dict[str, Any]:
    """One step of every model, in turn; the dense one first."""
    ways: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    torch._dynamo.reset()
    for name, config in configs.items():
        model = build(config, dtype, device)
        if skewed:
            skew(model)
        given = inputs(config, samples, image, text, dtype, device)
        with loads(model) as found:
            model(**given)
        flops = accounting.flops(model, image, text).total
        if compiled:
            compile_blocks(model, fullgraph=True)
        ways[name] = lambda model=model, given=given: model(**given)  # type: ignore[misc]
        rows[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_ratio": round(flops / (rows["dense"]["flops"] if rows else flops), 4),
            "flops": flops,
            "largest_load_over_mean": round(sum(found) / len(found), 2) if found else None,
        }
    times = timing.in_turn(ways, device, rounds=rounds)
    for name, row in rows.items():
        row |= {"times": times[name], "time_over_flops": round(times[name]["ratio"] / row["flops_ratio"], 3)}
        # Of two: to go through what a profiler has recorded takes longer than the calls.
        row["seconds_of"] = where(ways[name]) if device.type == "cpu" and name in ("dense", "L") else {}
    return {
        "precision": str(dtype).removeprefix("torch."),
        "samples": samples,
        "image_tokens": image,
        "text_tokens": text,
        "routing": "skewed" if skewed else "as random weights choose",
        "compiled": compiled,
        "width": configs["dense"]["num_attention_heads"] * configs["dense"]["attention_head_dim"],
        "models": rows,
    }
