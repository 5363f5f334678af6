"""FLUX's transformer with MoE layers and MoB groups: a diffusers model.

- A subclass of diffusers' `FluxTransformer2DModel` whose blocks differ; its forward, attention, LoRA loading, gradient
  checkpointing and file format are diffusers' own. It takes the transformer's place in an ordinary `FluxPipeline`.
- Double block: `ff` and `ff_context` are MoE layers. Single block: `proj_out` is split into the attention's columns
  with the bias (`proj_attn`) and the FFN's second matrix (inside `moe`).
- A MoB group stands in the list of blocks in its blocks' stead. Original block numbers are in the configuration and in
  `feature_names()`.
- Every combination is legal: MoE alone, groups of dense blocks alone, compressed conditioning alone, shared experts
  only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import apply_group_offloading
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings, CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from moe_core import backends, checkpoint
from moe_core.errors import CheckpointError, ConfigError
from moe_core.mob import BlockRouter, MoBGroup
from moe_core.moe import MoELayer

PARTS = ("shared", "conditioning", "experts", "router", "group_blocks", "block_router", "gap_blocks", "rest")
"""What a parameter can belong to, see `FluxMoETransformer2DModel.part_of`."""

MOE_DEFAULTS: dict[str, Any] = {
    "num_experts": 12,
    "top_k": 2,
    "shared_ratio": 1.0,
    "normal_ratio": 0.25,
    "mlp_ratio": 4.0,
    "gate_norm": "renormalize",
    "balance_probs": "softmax",
    "router_init_std": 0.02,
    "dense_double_blocks": [],
}
"""Keys of the configuration's `moe`; names and meaning as in `config.MoEConfig`, `mlp_ratio` being the dense FFN's r.
`num_experts` 0: shared experts only."""

MOB_DEFAULTS: dict[str, Any] = {
    "double_groups": [],
    "single_groups": [],
    "active": 1,
    "contiguous": False,
    "alpha": 0.5,
    "balance_probs": "softmax",
    "router_init_std": 0.02,
}
"""Keys of the configuration's `mob`; the groups are lists of original block numbers, the rest as in
`config.MoBConfig`."""

BLOCKS = ["FluxTransformerBlock", "FluxSingleTransformerBlock", "FluxMoESingleTransformerBlock"]

CPU = torch.device("cpu")

_CONDITIONED_NORMS = (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)
_EMBEDDINGS = (CombinedTimestepTextProjEmbeddings, CombinedTimestepGuidanceTextProjEmbeddings)


class FluxMoESingleTransformerBlock(nn.Module):
    """diffusers' single block with its FFN replaced by a MoE layer that runs beside the attention."""

    def __init__(self, dim: int, num_attention_heads: int, attention_head_dim: int, moe: MoELayer):
        super().__init__()
        self.norm = AdaLayerNormZeroSingle(dim)
        self.proj_attn = nn.Linear(dim, dim)
        self.moe = moe
        self.attn = FluxAttention(
            query_dim=dim,
            dim_head=attention_head_dim,
            heads=num_attention_heads,
            out_dim=dim,
            bias=True,
            processor=FluxAttnProcessor(),
            eps=1e-6,
            pre_only=True,
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, D] image and text states, [B, C] conditioning; returns (encoder_hidden_states, hidden_states)."""
        text_tokens = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(residual, emb=temb)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        output = residual + gate.unsqueeze(1) * (self.proj_attn(attended) + self.moe(normed))
        if output.dtype == torch.float16:
            output = output.clip(-65504, 65504)
        return output[:, :text_tokens], output[:, text_tokens:]


class FluxMoETransformer2DModel(FluxTransformer2DModel):
    """A sparse FLUX. Arguments of `FluxTransformer2DModel`, and:

    Args:
        moe: keys of MOE_DEFAULTS; None: dense FFNs.
        conditioning_dim: width of the conditioning that the AdaLN layers take; None: the model's width.
        mob: keys of MOB_DEFAULTS; None: no groups.
        dropped_blocks: numbers of the teacher's blocks that are not there, `double` and `single`; None: none. All other numbers here
            are of the blocks that are.

    Raises ConfigError for unknown keys, ratios that do not add up, widths that are not whole, top_k above the number of
    experts, and groups that are not consecutive, overlap, or name blocks that do not exist.
    """

    _no_split_modules: ClassVar[list[str]] = [*BLOCKS, "MoBGroup"]
    _repeated_blocks: ClassVar[list[str]] = BLOCKS
    _tp_plan = None  # diffusers' tensor-parallel plan names the dense FFNs

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        moe: dict[str, Any] | None = None,
        conditioning_dim: int | None = None,
        mob: dict[str, Any] | None = None,
        dropped_blocks: dict[str, list[int]] | None = None,
    ):
        # The parent makes everything but the blocks: dense ones would only be thrown away.
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=0,
            num_single_layers=0,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )
        moe = _complete("moe", moe, MOE_DEFAULTS)
        mob = _complete("mob", mob, MOB_DEFAULTS)
        # Also puts right the numbers of blocks, which the parent has just registered as 0.
        dropped_blocks = _complete("dropped_blocks", dropped_blocks, {"double": [], "single": []})
        self.register_to_config(
            num_layers=num_layers, num_single_layers=num_single_layers, moe=moe, mob=mob, dropped_blocks=dropped_blocks
        )
        if moe is not None:
            _check_moe(moe, self.inner_dim, num_layers)
        self._originals = {
            kind: _original_numbers(kind, count, (dropped_blocks or {}).get(kind, []))
            for kind, count in (("double", num_layers), ("single", num_single_layers))
        }

        double = [self._double_block(index) for index in range(num_layers)]
        single = [self._single_block() for _ in range(num_single_layers)]
        self.transformer_blocks = self._grouped(double, "double_groups")
        self.single_transformer_blocks = self._grouped(single, "single_groups")
        if conditioning_dim is not None:
            self._narrow_conditioning(conditioning_dim)
        self._gaps = frozenset(self.gap_blocks())

    # -- construction

    def _moe_layer(self, out_bias: bool) -> MoELayer:
        moe = self.config.moe
        return MoELayer(
            self.inner_dim,
            round(moe["shared_ratio"] * self.inner_dim),
            round(moe["normal_ratio"] * self.inner_dim),
            moe["num_experts"],
            moe["top_k"],
            out_bias=out_bias,
            gate_norm=moe["gate_norm"],
            router_init_std=moe["router_init_std"],
        )

    def _double_block(self, index: int) -> nn.Module:
        block = FluxTransformerBlock(self.inner_dim, self.config.num_attention_heads, self.config.attention_head_dim)
        if self.config.moe is not None and index not in self.config.moe["dense_double_blocks"]:
            block.ff = self._moe_layer(out_bias=True)
            block.ff_context = self._moe_layer(out_bias=True)
        return block

    def _single_block(self) -> nn.Module:
        sizes = (self.inner_dim, self.config.num_attention_heads, self.config.attention_head_dim)
        if self.config.moe is None:
            return FluxSingleTransformerBlock(*sizes)
        return FluxMoESingleTransformerBlock(*sizes, self._moe_layer(out_bias=False))

    def _grouped(self, blocks: Sequence[nn.Module], kind: str) -> nn.ModuleList:
        mob = self.config.mob
        groups = [] if mob is None else check_groups(mob[kind], len(blocks), f"mob.{kind}")
        starts = {group[0]: group for group in groups}
        inside = {index for group in groups for index in group}
        modules: list[nn.Module] = []
        for index, block in enumerate(blocks):
            if index in starts:
                router = BlockRouter(
                    self.inner_dim,
                    self.config.conditioning_dim or self.inner_dim,
                    len(starts[index]),
                    mob["active"],
                    alpha=mob["alpha"],
                    contiguous=mob["contiguous"],
                    init_std=mob["router_init_std"],
                )
                modules.append(MoBGroup([blocks[member] for member in starts[index]], router))
            elif index not in inside:
                modules.append(block)
        return nn.ModuleList(modules)

    def _narrow_conditioning(self, conditioning_dim: int) -> None:
        for embedder in self.time_text_embed.children():
            if hasattr(embedder, "linear_2"):
                embedder.linear_2 = nn.Linear(embedder.linear_2.in_features, conditioning_dim)
        for module in self.modules():
            if isinstance(module, _CONDITIONED_NORMS):
                module.linear = nn.Linear(conditioning_dim, module.linear.out_features)

    # -- what the distillation and the user ask of it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'. Raises ConfigError for ControlNet residuals where there are groups: diffusers deals them to blocks by number."""
        mob = self.config.mob or {}
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            if kwargs.get(name) is not None and (mob.get("double_groups") or mob.get("single_groups")):
                raise ConfigError(f"{name} are given; a model with MoB groups takes no ControlNet")
        return super().forward(*args, **kwargs)

    def set_top_k(self, top_k: int) -> None:
        """Changes how many normal experts a token passes, in every MoE layer; 0: shared experts only. Not saved."""
        for layer in self._moe_layers():
            layer.set_top_k(top_k)

    def set_expert_backend(self, backend: str) -> None:
        """Chooses what computes the normal experts, one of `backends.BACKENDS`. Not saved."""
        for layer in self._moe_layers():
            layer.backend = backends.check_name(backend)

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = CPU,
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """As diffusers'; of a MoB group only the blocks that a sample chose are brought to the device, one after the other.

        Raises ConfigError where there are groups, for streams (diffusers fetches ahead in the order of the first call, and samples choose other
        blocks) and for several blocks at once.
        """
        groups = {name: module for name, module in self.named_modules() if isinstance(module, MoBGroup)}
        if groups and options.get("use_stream"):
            raise ConfigError(
                "use_stream is True; a model with MoB groups cannot fetch ahead: samples choose other blocks"
            )
        if groups and offload_type == "block_level":
            # A pipeline hands on None where nothing was said.
            if options.get("num_blocks_per_group") is None:
                options["num_blocks_per_group"] = 1
            if options["num_blocks_per_group"] != 1:
                raise ConfigError(
                    f"num_blocks_per_group is {options['num_blocks_per_group']}; with MoB groups it must be 1"
                )
            for name, group in groups.items():
                own = dict(options)
                if folder := options.get("offload_to_disk_path"):
                    own["offload_to_disk_path"] = os.path.join(folder, name)
                # Marks the group, too: diffusers then leaves it alone.
                apply_group_offloading(group, onload_device, offload_device, offload_type, **own)
        super().enable_group_offload(onload_device, offload_device, offload_type, **options)

    def _moe_layers(self) -> list[MoELayer]:
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def feature_names(self) -> list[tuple[str, str]]:
        """(name of a block or group here, name of the teacher's block whose output it stands for), in order of
        computation.

        A group stands for its last block, and a block after which some were dropped for the last of these. Both are names for
        `get_submodule`, of this model and of the dense teacher.
        """
        return [(name, f"{kind}.{following - 1}") for kind, name, _, following in self._stood_for()]

    def gap_blocks(self) -> list[str]:
        """Names of the blocks after which some of the teacher's were dropped."""
        return [name for _, name, last, following in self._stood_for() if following > last + 1]

    def _stood_for(self) -> Iterator[tuple[str, str, int, int]]:
        """(kind, name, number of the teacher's block that it ends with, number of the one that follows here) of every block and group."""
        for kind, originals in zip(("transformer_blocks", "single_transformer_blocks"), self._originals.values()):
            after = 0
            for position, block in enumerate(getattr(self, kind)):
                after += len(block.blocks) if isinstance(block, MoBGroup) else 1
                yield kind, f"{kind}.{position}", originals[after - 1], originals[after]

    def part_of(self, name: str) -> str:
        """Which of PARTS the parameter of this name belongs to. In a group's blocks, all is `group_blocks`; in one before a gap, `gap_blocks`."""
        module: nn.Module = self
        block = ".".join(name.split(".")[:2])
        if block in self._gaps and not isinstance(self.get_submodule(block), MoBGroup):
            return "gap_blocks"
        for piece in name.split("."):
            if isinstance(module, MoBGroup):
                return "block_router" if piece == "router" else "group_blocks"
            if isinstance(module, MoELayer):
                return piece if piece in ("shared", "router") else "experts"
            if isinstance(module, (*_CONDITIONED_NORMS, *_EMBEDDINGS)):
                return "conditioning"
            module = getattr(module, piece)
        return "rest"

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by part; every part is a key."""
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            parts[self.part_of(name)].append(parameter)
        return parts

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Sets requires_grad on the parameters of these parts and clears it on all others; "all" is every part."""
        wanted = set(parts)
        if wanted - {*PARTS, "all"}:
            raise ConfigError(
                f"unknown part {sorted(wanted - {*PARTS, 'all'})[0]!r}; the parts are {', '.join(PARTS)}, or all"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("all" in wanted or self.part_of(name) in wanted)

    # -- loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Any:
        """As diffusers', from safetensors only; a local folder is first checked to hold exactly this model's weights.

        Raises CheckpointError naming the file that is missing, truncated, or has tensors of other names or shapes.
        """
        path = Path(pretrained_model_name_or_path or "")
        if path.is_dir() or path.is_absolute() or len(path.parts) != 2:  # anything else could be a hub id, owner/name
            folder = path / (kwargs.get("subfolder") or "")
            config = checkpoint.read_config(folder)
            if config.get("_class_name") != cls.__name__:
                raise CheckpointError(
                    f"{folder / checkpoint.CONFIG}: describes a {config.get('_class_name')}, not a {cls.__name__}"
                )
            checkpoint.check_weights(folder, {name: tuple(t.shape) for name, t in on_meta(config).state_dict().items()})
        loaded = super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            if parameter.device.type == "cpu":
                # Tensors mapped from a file start at any byte; CPU kernels then round otherwise than on the weights
                # that were saved.
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return loaded


def on_meta(config: Mapping[str, Any]) -> FluxMoETransformer2DModel:
    """The model of a configuration, without memory for its weights: to count, to plan, to compare shapes."""
    with torch.device("meta"):
        return FluxMoETransformer2DModel.from_config(dict(config))


def check_groups(groups: Sequence[Sequence[int]], count: int, where: str) -> list[list[int]]:
    """Returns the groups in order.

    Raises ConfigError unless each is two or more consecutive, existing blocks, and none overlap.
    """
    ordered = sorted([list(group) for group in groups])
    end = 0
    for group in ordered:
        if len(group) < 2 or group != list(range(group[0], group[0] + len(group))):
            raise ConfigError(f"{where}: group {group} must be two or more consecutive block indices in rising order")
        if group[0] < 0 or group[-1] >= count:
            raise ConfigError(f"{where}: group {group} must lie within the model's blocks, 0 to {count - 1}")
        if group[0] < end:
            raise ConfigError(f"{where}: block {group[0]} stands in two groups; a block may be in one")
        end = group[-1] + 1
    return ordered


def _original_numbers(kind: str, count: int, dropped: Sequence[int]) -> list[int]:
    """The teacher's numbers of `count` blocks that are left of it, and, at the end, how many it has."""
    total = count + len(dropped)
    wrong = [number for number in dropped if not 0 <= number < total]
    if wrong or len(set(dropped)) < len(dropped):
        raise ConfigError(
            f"dropped_blocks.{kind} is {list(dropped)}; with {count} blocks left they must be {len(dropped)} different numbers"
            f" of 0 to {total - 1}"
        )
    return [*(number for number in range(total) if number not in dropped), total]


def _complete(section: str, values: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    if values is None:
        return None
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise ConfigError(f"{section} has the unknown key {unknown[0]!r}; its keys are {', '.join(defaults)}")
    return {**defaults, **values}


def _check_moe(moe: Mapping[str, Any], width: int, num_layers: int) -> None:
    n, total = moe["num_experts"], moe["shared_ratio"] + moe["num_experts"] * moe["normal_ratio"]
    if n and abs(total - moe["mlp_ratio"]) > 1e-9:
        raise ConfigError(
            f"moe.mlp_ratio is {moe['mlp_ratio']:g}, but shared_ratio + num_experts * normal_ratio ="
            f" {moe['shared_ratio']:g} + {n} * {moe['normal_ratio']:g} = {total:g}; they must be equal"
        )
    for name in ("shared_ratio", "normal_ratio"):
        hidden = moe[name] * width
        if abs(hidden - round(hidden)) > 1e-6:
            raise ConfigError(f"moe.{name} * width = {moe[name]:g} * {width} = {hidden:g}; it must be a whole number")
    for index in moe["dense_double_blocks"]:
        if not 0 <= index < num_layers:
            raise ConfigError(
                f"moe.dense_double_blocks has {index}, but the model's double blocks are 0 to {num_layers - 1}"
            )
