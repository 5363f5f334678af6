"""What a model costs: parameters and FLOPs, counted on its structure. Works on the meta device, so a plan needs no
memory.

- Activated: every weight that takes part in one forward pass of one token (MoE) and one sample (MoB).
- Activated by the paper's convention: the same without the text branch's FFN (`ff_context`) of converted double blocks.
  So counted, its Table 1 comes out (5.15, 4.01, 3.19, 2.64 B).
- FLOPs: two a multiply-add, matrix products and attention only, as `torch.utils.flop_counter` counts; that one sees no
  grouped products. The paper's figures come nearest if attention's products count once a multiply-add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import nn

from moe_core.mob import MoBGroup
from moe_core.moe import MoELayer
from moe_core.transformer import FluxMoESingleTransformerBlock, on_meta

FFNS = ("ff", "ff_context", "moe", "proj_mlp", "proj_out")
"""Names of the FFNs, or of their parts, in double, sparse single and dense single blocks."""

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@dataclass(frozen=True)
class ModuleCount:
    """Parameters of one kind of module."""

    total: int = 0
    activated: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Parameters of a model."""

    total: int
    activated: int
    activated_paper: int
    """By the paper's convention, see above."""
    by_module: dict[str, ModuleCount] = field(default_factory=dict)
    """`double.attention`, `double.adaln`, `double.ffn`, `double.ffn_context`, `single.attention`, `single.adaln`,
    `single.ffn`, `block_routers`, `embedders`, `output`; the sums over them are total and activated."""

    def by_kind(self) -> dict[str, ModuleCount]:
        """The split of the paper's Fig. 2: `ffn`, `attention`, `adaln`, and `other` (embedders, output, block routers)."""
        kinds = {kind: ModuleCount() for kind in ("ffn", "attention", "adaln", "other")}
        for name, module in self.by_module.items():
            kind = name.partition(".")[2].removesuffix("_context") or "other"
            kinds[kind] = ModuleCount(kinds[kind].total + module.total, kinds[kind].activated + module.activated)
        return kinds


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass on one sample (one denoising step), of the activated experts and blocks."""

    linear: float
    """of the products with weights"""
    attention: float
    """of Q K^T and its product with V"""

    @property
    def total(self) -> int:
        """Two a multiply-add."""
        return round(self.linear + self.attention)

    @property
    def paper(self) -> int:
        """Two a multiply-add with weights, one within attention."""
        return round(self.linear + self.attention / 2)


def count(model: FluxTransformer2DModel | Mapping[str, Any]) -> Counts:
    """Counts a model's parameters, or those of a configuration (of `FluxMoETransformer2DModel`).

    In a MoB group the mean of its blocks is taken, times the number of active ones.
    """
    model = _model(model)
    modules: dict[str, ModuleCount] = {}
    text_branch = 0.0

    def add(kind: str, module: nn.Module, share: float, activated: int | None = None) -> float:
        total = _size(module)
        active = share * (total if activated is None else activated)
        old = modules.get(kind, ModuleCount())
        modules[kind] = ModuleCount(old.total + total, old.activated + active)
        return active

    for kind, block, share in _blocks(model):
        for name, module in block.named_children():
            if isinstance(module, MoELayer):
                branch = "ffn_context" if name == "ff_context" else "ffn"
                active = add(f"{kind}.{branch}", module, share, _active_size(module))
                text_branch += active if name == "ff_context" else 0
            elif kind == "single" and name == "proj_out" and isinstance(module, nn.Linear):
                _add_dense_proj_out(modules, module, share)
            else:
                add(f"{kind}.{_part(name)}", module, share)
    for blocks in (getattr(model, DOUBLE), getattr(model, SINGLE)):
        for block in blocks:
            if isinstance(block, MoBGroup):
                add("block_routers", block.router, 1.0)
    for name, module in model.named_children():
        if name not in (DOUBLE, SINGLE):
            add("output" if name in ("norm_out", "proj_out") else "embedders", module, 1.0)
    activated = sum(module.activated for module in modules.values())
    return Counts(sum(m.total for m in modules.values()), round(activated), round(activated - text_branch), modules)


def flops(model: FluxTransformer2DModel | Mapping[str, Any], image_tokens: int, text_tokens: int) -> Flops:
    """FLOPs of a model, or of a configuration, at so many tokens: 4096 and 512 for FLUX.1 at 1024 x 1024 pixels."""
    model = _model(model)
    tokens, width = image_tokens + text_tokens, model.inner_dim
    total = attention = 0.0
    for kind, block, share in _blocks(model):
        attention += share * 4 * tokens**2 * width
        cost = 0
        for name, module in block.named_modules():
            if name.split(".")[0] not in FFNS and isinstance(module, nn.Linear):
                cost += 2 * _matrices(module) * _rows(kind, name, image_tokens, text_tokens)
        if kind == "double":
            image, text = _ffn_products(block.get_submodule("ff")), _ffn_products(block.get_submodule("ff_context"))
            cost += 2 * (image * image_tokens + text * text_tokens)
        elif isinstance(block, FluxMoESingleTransformerBlock):
            cost += 2 * _ffn_products(block.get_submodule("moe")) * tokens
        else:
            dense = _matrices(block.get_submodule("proj_mlp")) + _matrices(block.get_submodule("proj_out"))
            cost += 2 * dense * tokens
        total += share * cost
    for blocks in (getattr(model, DOUBLE), getattr(model, SINGLE)):
        total += sum(2 * _matrices(block.router) for block in blocks if isinstance(block, MoBGroup))
    total += 2 * (_matrices(model.time_text_embed) + _matrices(model.norm_out))
    total += 2 * (_matrices(model.context_embedder) * text_tokens + _matrices(model.x_embedder) * image_tokens)
    total += 2 * _matrices(model.proj_out) * image_tokens
    return Flops(total, attention)


def _model(model: FluxTransformer2DModel | Mapping[str, Any]) -> FluxTransformer2DModel:
    return model if isinstance(model, FluxTransformer2DModel) else on_meta(model)


def _blocks(model: FluxTransformer2DModel) -> list[tuple[str, nn.Module, float]]:
    """(double or single, block, share of it that is active) for every block, in groups or not."""
    found: list[tuple[str, nn.Module, float]] = []
    for kind, modules in (("double", getattr(model, DOUBLE)), ("single", getattr(model, SINGLE))):
        for module in modules:
            if isinstance(module, MoBGroup):
                share = module.router.active / len(module.blocks)
                found += [(kind, block, share) for block in module.blocks]
            else:
                found.append((kind, module, 1.0))
    return found


def _part(name: str) -> str:
    if name.startswith("norm"):
        return "adaln"
    if name.startswith("ff_context"):
        return "ffn_context"
    return "ffn" if name in ("ff", "proj_mlp") else "attention"


def _add_dense_proj_out(modules: dict[str, ModuleCount], proj_out: nn.Linear, share: float) -> None:
    width = proj_out.weight.shape[0]
    # Attention's and FFN's columns in one matrix, with one bias.
    sizes = {"single.attention": width * width + width, "single.ffn": proj_out.weight.numel() - width * width}
    for kind, size in sizes.items():
        old = modules.get(kind, ModuleCount())
        modules[kind] = ModuleCount(old.total + size, old.activated + share * size)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active_size(layer: MoELayer) -> int:
    size = _size(layer.shared)
    if layer.top_k:
        packed = layer.w1_EFD.numel() + layer.b1_EF.numel() + layer.w2_EDF.numel()
        size += _size(layer.router) + packed * layer.top_k // layer.num_experts
    return size


def _matrices(module: nn.Module) -> int:
    """Multiply-adds of a module's linear layers a row."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def _ffn_products(ffn: nn.Module) -> int:
    """Multiply-adds of an FFN or MoE layer a token."""
    if not isinstance(ffn, MoELayer):
        return _matrices(ffn)
    products = _matrices(ffn.shared)
    if ffn.top_k:
        products += ffn.router.weight.numel() + (ffn.w1_EFD.numel() + ffn.w2_EDF.numel()) * ffn.top_k // ffn.num_experts
    return products


def _rows(kind: str, name: str, image_tokens: int, text_tokens: int) -> int:
    """On how many rows a linear of a block works, for one sample."""
    if name.startswith("norm"):
        return 1  # AdaLN: on the conditioning
    if kind == "single":
        return image_tokens + text_tokens
    return text_tokens if name.split(".")[1].startswith(("add_", "to_add")) else image_tokens
