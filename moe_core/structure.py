"""What a converted model looks like: its configuration, made from that of the model it starts from. No weights.

Configurations are mappings with the arguments of `FluxMoETransformer2DModel`; they may come from a model, from a config.json, or be written
down. What is missing has the class's own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffusers import FluxTransformer2DModel

from moe_core.config import MoBConfig, MoBGroupsConfig, MoBLevelConfig, MoEConfig
from moe_core.errors import ConfigError
from moe_core.transformer import check_groups

KINDS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
COUNTS = {"double": "num_layers", "single": "num_single_layers"}


def dense_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dense transformer's own arguments: a stored configuration also says where it was loaded from."""
    parameters = list(inspect.signature(FluxTransformer2DModel.__init__).parameters.values())[1:]
    values = {parameter.name: config.get(parameter.name, parameter.default) for parameter in parameters}
    values["axes_dims_rope"] = tuple(values["axes_dims_rope"])  # a list once it was stored
    return values


def shared_config(teacher: Mapping[str, Any], moe: MoEConfig) -> dict[str, Any]:
    """A dense model with each FFN cut down to its shared expert, and its conditioning compressed."""
    section = {**moe_section(moe), "num_experts": 0, "top_k": 0}
    return {**dense_part(teacher), "moe": section, "conditioning_dim": moe.conditioning_dim}


def moe_config(teacher: Mapping[str, Any], moe: MoEConfig) -> dict[str, Any]:
    """A dense model with MoE layers for FFNs, and its conditioning compressed: level L."""
    return {**dense_part(teacher), "moe": moe_section(moe), "conditioning_dim": moe.conditioning_dim}


def mob_config(
    start: Mapping[str, Any], level: MoBLevelConfig, mob: MoBConfig, block_change: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A model with a level's groups: of a MoE model, of a MoB model, whose groups stay, or of a dense one.

    A level counts all its groups, those the model already has included. Groups that are not written out are chosen by
    `choose_groups` for the least block_change (dense model's block name, e.g. `transformer_blocks.3` -> relative change);
    double blocks kept dense in a MoE model are left out, as all blocks of a group should cost the same. Raises
    ConfigError where the groups asked for do not fit.
    """
    old = start.get("mob") or {"double_groups": [], "single_groups": []}
    section: dict[str, Any] = mob.model_dump(
        include={"active", "contiguous", "alpha", "balance_probs", "router_init_std"}
    )
    start = {**dense_part(start), "moe": start.get("moe"), "conditioning_dim": start.get("conditioning_dim")}
    for kind, wanted in (("double", level.double), ("single", level.single)):
        section[f"{kind}_groups"] = _groups(start, kind, wanted, old[f"{kind}_groups"], block_change)
    return {**start, "mob": section}


def depth_config(start: Mapping[str, Any], drop: Mapping[str, Collection[int]]) -> dict[str, Any]:
    """A dense model, or one that was cut in its depth before, without its blocks of these numbers (kind -> numbers; its own)."""
    if start.get("moe") is not None or start.get("mob") is not None:
        raise ConfigError("blocks are dropped from dense models only; this one has MoE layers or MoB groups")
    dropped = start.get("dropped_blocks") or {}
    config, section = dense_part(start), {}
    for kind, key in COUNTS.items():
        before = list(dropped.get(kind, []))
        originals = [number for number in range(start[key] + len(before)) if number not in before]
        if wrong := [number for number in drop.get(kind, ()) if not 0 <= number < start[key]]:
            raise ConfigError(f"{kind} block {wrong[0]} cannot be dropped: the model has {start[key]}")
        section[kind] = sorted(before + [originals[number] for number in drop.get(kind, ())])
        config[key] = start[key] - len(set(drop.get(kind, ())))
    return {**config, "conditioning_dim": start.get("conditioning_dim"), "dropped_blocks": section}


def moe_section(moe: MoEConfig) -> dict[str, Any]:
    """The configuration's `moe`."""
    keys = {"num_experts", "top_k", "shared_ratio", "normal_ratio", "gate_norm", "balance_probs", "router_init_std"}
    return {
        **moe.model_dump(include=keys),
        "mlp_ratio": moe.expansion_ratio,
        "dense_double_blocks": list(moe.dense_double_blocks),
    }


def choose_groups(change: Sequence[float], groups: int, size: int, taken: Collection[int] = ()) -> list[list[int]]:
    """Chooses `groups` disjoint windows of `size` consecutive blocks, none of them `taken`, with the least summed
    change.

    By dynamic programming over the blocks; among equals, the earliest windows. Raises ConfigError if so many do not
    fit.
    """
    count = len(change)
    # best[g][i]: (least change of g windows within the first i blocks, the windows' starts), or None if they do not
    # fit.
    best: list[list[tuple[float, tuple[int, ...]] | None]] = [[(0.0, ())] * (count + 1)]
    for _ in range(groups):
        row: list[tuple[float, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            row[end] = row[end - 1]
            start = end - size
            before = best[-1][start] if start >= 0 else None
            if before is None or any(start <= index < end for index in taken):
                continue
            total = before[0] + sum(change[start:end])
            kept = row[end]
            if kept is None or total < kept[0]:
                row[end] = (total, (*before[1], start))
        best.append(row)
    found = best[-1][count]
    if found is None:
        raise ConfigError(
            f"{groups} groups of {size} consecutive blocks do not fit: of {count} blocks, {sorted(taken)} are not free"
        )
    return [list(range(start, start + size)) for start in found[1]]


def _groups(
    config: Mapping[str, Any],
    kind: str,
    wanted: MoBGroupsConfig,
    existing: list[list[int]],
    block_change: Mapping[str, float] | None,
) -> list[list[int]]:
    count = config["num_layers" if kind == "double" else "num_single_layers"]
    if wanted.blocks is not None:
        groups = check_groups(wanted.blocks, count, f"mob level, {kind}.blocks")
        lost = [group for group in existing if group not in groups]
        if lost:
            raise ConfigError(
                f"mob level, {kind}.blocks is {groups}, but lacks the group {lost[0]} of the checkpoint it starts from"
            )
        return groups
    if wanted.groups < len(existing):
        raise ConfigError(
            f"mob level, {kind}.groups is {wanted.groups}, but the checkpoint it starts from has"
            f" {len(existing)}: {existing}; they stay"
        )
    if wanted.groups == len(existing):
        return existing
    names = [f"{KINDS[kind]}.{index}" for index in range(count)]
    missing = [name for name in names if name not in (block_change or {})]
    if missing or block_change is None:
        raise ConfigError(f"block_change lacks {missing[0]}; it is needed to choose {wanted.groups} {kind} groups")
    taken = {index for group in existing for index in group}
    if kind == "double" and config.get("moe") is not None:
        taken |= set(config["moe"]["dense_double_blocks"])
    change = [float(block_change[name]) for name in names]
    return sorted(existing + choose_groups(change, wanted.groups - len(existing), wanted.size, taken))
