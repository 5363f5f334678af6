"""Dense -> shared experts -> MoE -> MoB: a function each, none of which changes its arguments.

- An FFN is cut into segments (row i of W1, b1[i], column i of W2). The most important go to the shared expert, the rest
  are dealt to the normal experts (Sec. 3.2). The cut is a function of scores, parameters and seed alone: `to_shared`
  and `to_moe` find the same one.
- b2 goes to the shared expert, once; in single blocks it stays with the attention's half of `proj_out`.
- With all experts active at gate 1 and the conditioning not compressed, the result computes what the dense model does.
- Students keep the teacher's precision and device.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from moe_core import adaln
from moe_core.config import MoBConfig, MoBGroupsConfig, MoBLevelConfig, MoEConfig
from moe_core.errors import ConfigError
from moe_core.mob import MoBGroup
from moe_core.transformer import FluxMoETransformer2DModel, check_groups, on_meta

KINDS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


class DenseFFN(NamedTuple):
    """The weights of eq. 1."""

    w1_FD: Tensor
    b1_F: Tensor
    w2_DF: Tensor
    b2_D: Tensor | None
    """None in a single block, where the bias is shared with the attention's projection."""


class Split(NamedTuple):
    """Which segments of an FFN go where; indices into F, rising within each expert."""

    shared: Tensor
    experts_EF: Tensor


def ffn_names(model: FluxTransformer2DModel, dense_double_blocks: Collection[int] = ()) -> list[str]:
    """Names of the FFNs that conversion replaces, as importance scores are named.

    They are `transformer_blocks.3.ff`, `transformer_blocks.3.ff_context`, `single_transformer_blocks.7.moe`.
    """
    double = [i for i in range(model.config.num_layers) if i not in dense_double_blocks]
    names = [f"transformer_blocks.{i}.{branch}" for i in double for branch in ("ff", "ff_context")]
    return names + [f"single_transformer_blocks.{i}.moe" for i in range(model.config.num_single_layers)]


def dense_ffn(teacher: FluxTransformer2DModel, name: str) -> DenseFFN:
    """The weights of one of the teacher's FFNs (views), by its name in `ffn_names`."""
    parent, _, branch = name.rpartition(".")
    block = teacher.get_submodule(parent)
    if branch == "moe":
        width = block.proj_mlp.in_features
        return DenseFFN(block.proj_mlp.weight, block.proj_mlp.bias, block.proj_out.weight[:, width:], None)
    net = getattr(block, branch).net
    return DenseFFN(net[0].proj.weight, net[0].proj.bias, net[2].weight, net[2].bias)


def split_segments(
    name: str, hidden_width: int, width: int, scores: Mapping[str, Tensor], moe: MoEConfig, seed: int
) -> Split:
    """Deals the segments of the FFN `name` to the experts.

    taylor: the most important to the shared expert, the rest round-robin by rank, so that each expert gets an even
    share of importance.
    random: a permutation drawn from (seed, name); `scores` is not read.
    Raises ConfigError if scores are missing, of a wrong length or not finite, or r does not fit the FFN.
    """
    if abs(moe.expansion_ratio * width - hidden_width) > 1e-6:
        raise ConfigError(
            f"moe.expansion_ratio is {moe.expansion_ratio:g}, but {name} is {hidden_width} wide in a model of width"
            f" {width}; it must be {hidden_width / width:g}"
        )
    if moe.split == "random":
        order = torch.randperm(hidden_width, generator=_generator(seed, "split", name))
    else:
        if name not in scores:
            raise ConfigError(f"importance scores lack {name}; split 'taylor' needs one for each segment of every FFN")
        score_F = scores[name].detach().double().cpu()
        if score_F.shape != (hidden_width,) or not torch.isfinite(score_F).all():
            raise ConfigError(
                f"importance scores of {name} must be {hidden_width} finite numbers;"
                f" their shape is {list(score_F.shape)}"
            )
        order = score_F.sort(descending=True, stable=True).indices
    shared = round(moe.shared_ratio * width)
    dealt_EF = order[shared:].view(-1, moe.num_experts).T
    return Split(order[:shared].sort().values, dealt_EF.sort(-1).values)


@torch.no_grad()
def to_shared(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
) -> FluxMoETransformer2DModel:
    """The dense teacher with each FFN cut down to its shared expert, and its conditioning compressed.

    scores: per FFN, [F] (see `ffn_names`). conditioning_bank: [N, D] outputs of the teacher's `time_text_embed`; needed
    where moe.conditioning_dim is set. Raises ConfigError where scores or parameters do not fit the teacher.
    """
    student = on_meta(_config(teacher, moe=_moe_section(moe, num_experts=0), conditioning_dim=moe.conditioning_dim))
    state = _kept(teacher, student)
    for name in ffn_names(teacher, moe.dense_double_blocks):
        ffn = dense_ffn(teacher, name)
        shared = split_segments(name, len(ffn.b1_F), ffn.w1_FD.shape[1], scores, moe, seed).shared.to(ffn.b1_F.device)
        state[f"{name}.shared.proj_in.weight"] = ffn.w1_FD[shared]
        state[f"{name}.shared.proj_in.bias"] = ffn.b1_F[shared]
        state[f"{name}.shared.proj_out.weight"] = ffn.w2_DF[:, shared]
        if ffn.b2_D is not None:
            state[f"{name}.shared.proj_out.bias"] = ffn.b2_D
        else:
            block = name.removesuffix(".moe")
            proj_out = teacher.get_submodule(f"{block}.proj_out")
            state[f"{block}.proj_attn.weight"] = proj_out.weight[:, : len(proj_out.weight)]
            state[f"{block}.proj_attn.bias"] = proj_out.bias
    if moe.conditioning_dim is not None:
        if conditioning_bank is None:
            raise ConfigError(
                f"moe.conditioning_dim is {moe.conditioning_dim}; compressing to it needs calibration vectors,"
                " none were given"
            )
        state.update(adaln.compressed_weights(teacher, conditioning_bank, moe.conditioning_dim, moe.ridge))
    return _filled(student, state)


@torch.no_grad()
def to_moe(
    shared_student: FluxMoETransformer2DModel,
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    seed: int = 0,
) -> FluxMoETransformer2DModel:
    """Adds routers and normal experts to a student of `to_shared`, whose own weights (trained or not) it keeps.

    The experts are the teacher's remaining segments, by the same scores, split and seed as `to_shared` was given; the
    routers are drawn from (seed, layer). Raises ConfigError if the student is no shared-only one, or scores or
    parameters do not fit.
    """
    config = shared_student.config
    if config.moe is None or config.moe["num_experts"] or config.mob is not None:
        raise ConfigError("to_moe starts from a student of shared experts only, without MoB groups; this one is not")
    wanted = _moe_section(moe)
    for key in ("shared_ratio", "dense_double_blocks"):
        if config.moe[key] != wanted[key]:
            raise ConfigError(
                f"moe.{key} is {wanted[key]}, but the shared-expert student was made with"
                f" {config.moe[key]}; they must agree"
            )
    student = on_meta(_config(shared_student, moe=wanted, conditioning_dim=config.conditioning_dim))
    state = dict(shared_student.state_dict())
    for name in ffn_names(teacher, moe.dense_double_blocks):
        ffn = dense_ffn(teacher, name)
        experts_EF = split_segments(name, len(ffn.b1_F), ffn.w1_FD.shape[1], scores, moe, seed).experts_EF.to(
            ffn.b1_F.device
        )
        state[f"{name}.w1_EFD"] = ffn.w1_FD[experts_EF]
        state[f"{name}.b1_EF"] = ffn.b1_F[experts_EF]
        state[f"{name}.w2_EDF"] = ffn.w2_DF.T[experts_EF].transpose(1, 2)
    for name, router in student.named_parameters():
        if name not in state:
            state[name] = _drawn(router.shape, moe.router_init_std, seed, name, like=shared_student)
    return _filled(student, state)


def to_moe_joint(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
) -> FluxMoETransformer2DModel:
    """Dense to MoE at once, for joint training of shared and normal experts (Table 5)."""
    return to_moe(to_shared(teacher, scores, moe, conditioning_bank, seed), teacher, scores, moe, seed)


def to_mob(
    student: FluxTransformer2DModel,
    level: MoBLevelConfig,
    mob: MoBConfig,
    block_change: Mapping[str, float] | None = None,
    seed: int = 0,
) -> FluxMoETransformer2DModel:
    """Groups blocks of a MoE student, of a MoB student (its groups stay, with their routers), or of a dense model.

    A level counts all its groups, those the student already has included. Groups that are not written out are chosen by
    `choose_groups` for the least block_change (teacher's block name, e.g. `transformer_blocks.3` -> relative change);
    double blocks kept dense in a MoE model are left out, as all blocks of a group should cost the same. Raises
    ConfigError where the groups asked for do not fit.
    """
    old = student.config.get("mob") or {"double_groups": [], "single_groups": []}
    section: dict[str, Any] = mob.model_dump(
        include={"active", "contiguous", "alpha", "balance_probs", "router_init_std"}
    )
    for kind, wanted in (("double", level.double), ("single", level.single)):
        section[f"{kind}_groups"] = _groups(student, kind, wanted, old[f"{kind}_groups"], block_change)
    moe, conditioning_dim = student.config.get("moe"), student.config.get("conditioning_dim")
    grouped = on_meta(_config(student, moe=moe, conditioning_dim=conditioning_dim, mob=section))
    names = _original_names(student)
    tensors = {names[name]: tensor for name, tensor in student.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, original in _original_names(grouped).items():
        if original in tensors:
            state[name] = tensors[original]
        else:  # the router of a new group
            state[name] = _drawn(grouped.get_parameter(name).shape, mob.router_init_std, seed, original, like=student)
    return _filled(grouped, state)


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
    student: FluxTransformer2DModel,
    kind: str,
    wanted: MoBGroupsConfig,
    existing: list[list[int]],
    block_change: Mapping[str, float] | None,
) -> list[list[int]]:
    count = student.config.num_layers if kind == "double" else student.config.num_single_layers
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
    if kind == "double" and student.config.get("moe") is not None:
        taken |= set(student.config["moe"]["dense_double_blocks"])
    change = [float(block_change[name]) for name in names]
    return sorted(existing + choose_groups(change, wanted.groups - len(existing), wanted.size, taken))


def _original_names(model: FluxTransformer2DModel) -> dict[str, str]:
    """Parameter name -> that with blocks under original numbers, routers under their group's: `[1, 2].router`."""
    renamed: dict[str, str] = {}
    for kind in KINDS.values():
        number = 0
        for position, block in enumerate(getattr(model, kind)):
            members: list[tuple[str, str, nn.Module]] = [(f"{kind}.{position}", f"{kind}.{number}", block)]
            if isinstance(block, MoBGroup):
                numbers = list(range(number, number + len(block.blocks)))
                members = [
                    (f"{kind}.{position}.blocks.{i}", f"{kind}.{n}", block.blocks[i]) for i, n in enumerate(numbers)
                ]
                members.append((f"{kind}.{position}.router", f"{kind}.{numbers}.router", block.router))
            for own, original, module in members:
                renamed.update({f"{own}.{rest}": f"{original}.{rest}" for rest in module.state_dict()})
            number += len(block.blocks) if isinstance(block, MoBGroup) else 1
    return {name: renamed.get(name, name) for name in model.state_dict()}


def _config(model: FluxTransformer2DModel, **sparse: Any) -> dict[str, Any]:
    # Only the dense transformer's own arguments: a config also holds where it was loaded from.
    names = list(inspect.signature(FluxTransformer2DModel.__init__).parameters)[1:]
    return {**{name: model.config[name] for name in names}, **sparse}


def _moe_section(moe: MoEConfig, **changes: Any) -> dict[str, Any]:
    keys = {"num_experts", "top_k", "shared_ratio", "normal_ratio", "gate_norm", "balance_probs", "router_init_std"}
    section = {
        **moe.model_dump(include=keys),
        "mlp_ratio": moe.expansion_ratio,
        "dense_double_blocks": list(moe.dense_double_blocks),
    }
    section.update(changes)
    section["top_k"] = min(section["top_k"], section["num_experts"])
    return section


def _kept(teacher: FluxTransformer2DModel, student: nn.Module) -> dict[str, Tensor]:
    wanted = student.state_dict()
    return {name: t for name, t in teacher.state_dict().items() if name in wanted and wanted[name].shape == t.shape}


def _filled(student: FluxMoETransformer2DModel, state: Mapping[str, Tensor]) -> FluxMoETransformer2DModel:
    # Copies, so that training the student leaves teacher and source alone; strict, so that no weight is left unset.
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    student.load_state_dict(copies, strict=True, assign=True)
    return student.eval()


def _generator(seed: int, *names: str) -> torch.Generator:
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _drawn(shape: torch.Size, std: float, seed: int, name: str, like: nn.Module) -> Tensor:
    model_weight = next(like.parameters())
    return (torch.randn(shape, generator=_generator(seed, name)) * std).to(model_weight)
