"""Dense -> shared experts -> MoE -> MoB: a function each, none of which changes its arguments.

- Each conversion is a recipe (`shared_recipe`, `moe_recipe`, `joint_recipe`, `mob_recipe`), followed here in memory, and in `moe_core.stream`
  from folder to folder.
- How an FFN is cut and dealt to experts stands in `moe_core.experts`; `to_shared` and `to_moe` find the same cut.
- b2 goes to the shared expert, once; in single blocks it stays with the attention's half of `proj_out`.
- With all experts active at gate 1, the conditioning not compressed and no refit, the result computes what the dense model does.
- Students keep the precision and device of what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from moe_core import adaln, structure
from moe_core.config import MoBConfig, MoBLevelConfig, MoEConfig
from moe_core.errors import ConfigError
from moe_core.experts import DenseFFN, Fitted, Layers, Ranked, dense_ffn, drawn
from moe_core.mob import MoBGroup
from moe_core.recipe import Recipe, Ref, fill, unchanged
from moe_core.transformer import FluxMoETransformer2DModel, on_meta


def ffn_names(model: FluxTransformer2DModel, dense_double_blocks: Collection[int] = ()) -> list[str]:
    """Names of the FFNs that conversion replaces, as importance scores are named.

    They are `transformer_blocks.3.ff`, `transformer_blocks.3.ff_context`, `single_transformer_blocks.7.moe`.
    """
    double = [i for i in range(model.config.num_layers) if i not in dense_double_blocks]
    names = [f"transformer_blocks.{i}.{branch}" for i in double for branch in ("ff", "ff_context")]
    return names + [f"single_transformer_blocks.{i}.moe" for i in range(model.config.num_single_layers)]


@torch.no_grad()
def to_shared(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
) -> FluxMoETransformer2DModel:
    """The dense teacher with each FFN cut down to its shared expert, and its conditioning compressed.

    scores: per FFN, [F] (see `ffn_names`). conditioning_bank: [N, D] outputs of the teacher's `time_text_embed`; needed
    where moe.conditioning_dim is set. tokens: per FFN, [N, D] of its inputs; needed where moe.needs_tokens. Raises
    ConfigError where one of them does not fit the teacher.
    """
    return fill(shared_recipe(teacher, scores, moe, conditioning_bank, seed, tokens), teacher=teacher)


@torch.no_grad()
def to_moe(
    shared_student: FluxMoETransformer2DModel,
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
) -> FluxMoETransformer2DModel:
    """Adds routers and normal experts to a student of `to_shared`, whose own weights (trained or not) it keeps.

    The experts are the teacher's remaining segments, by the same scores, split and seed as `to_shared` was given; routers
    are drawn from (seed, layer), or fitted. tokens: as there. Raises ConfigError if the student is no shared-only one,
    parameters ask for what is fitted to all experts together (moe.refit, split greedy), or something does not fit.
    """
    return fill(moe_recipe(shared_student, teacher, scores, moe, seed, tokens), student=shared_student, teacher=teacher)


@torch.no_grad()
def to_moe_joint(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
) -> FluxMoETransformer2DModel:
    """Dense to MoE at once, for joint training of shared and normal experts (Table 5)."""
    return fill(joint_recipe(teacher, scores, moe, conditioning_bank, seed, tokens), teacher=teacher)


@torch.no_grad()
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
    return fill(mob_recipe(student, level, mob, block_change, seed), student=student)


@torch.no_grad()
def to_depth(student: FluxTransformer2DModel, drop: Mapping[str, Collection[int]]) -> FluxMoETransformer2DModel:
    """Drops blocks of a dense model, or of one that was cut so before (kind -> the model's own numbers). Raises ConfigError for others."""
    return fill(depth_recipe(student, drop), student=student)


def shared_recipe(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
    layers: Layers | None = None,
) -> Recipe:
    """How `to_shared` makes its student of the source `teacher`, of which only the structure is used. `layers`: of a conversion that goes on
    from here; without, the shared experts are to work alone."""
    student = on_meta(structure.shared_config(teacher.config, moe))
    recipe = Recipe(student, {"teacher": teacher})
    layers = layers or Layers(scores, moe, seed, tokens, alone=True)

    def add(name: str, reads: Iterable[str], make: Callable[..., Tensor]) -> None:
        recipe.add(name, [Ref("teacher", read) for read in reads], make)

    for name, ffn, layer in _layers(teacher, layers, moe):
        for piece in layer.shared():
            add(f"{name}.{piece.name}", piece.reads, piece.make)
        if ffn.b2 is not None:
            add(f"{name}.shared.proj_out.bias", [ffn.b2], unchanged)
        else:
            block = name.removesuffix(".moe")
            add(f"{block}.proj_attn.weight", [ffn.w2], partial(_first_columns, ffn.first))
            add(f"{block}.proj_attn.bias", [f"{block}.proj_out.bias"], unchanged)
    if moe.conditioning_dim is not None:
        if conditioning_bank is None:
            raise ConfigError(
                f"moe.conditioning_dim is {moe.conditioning_dim}; compressing to it needs calibration vectors,"
                " none were given"
            )
        compression = adaln.fit(conditioning_bank, teacher.inner_dim, moe.conditioning_dim, moe.ridge)
        for name, (reads, make) in adaln.compressed_weights(teacher, compression).items():
            add(name, reads, make)
    recipe.keep("teacher")
    return recipe.finished()


def moe_recipe(
    shared_student: FluxMoETransformer2DModel,
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
    layers: Layers | None = None,
) -> Recipe:
    """How `to_moe` makes its student of the sources `student` and `teacher`, of which only the structure is used. `layers`: those that the
    student's shared experts were made with, where they are not trained."""
    config = shared_student.config
    if config.get("moe") is None or config.moe["num_experts"] or config.mob is not None:
        raise ConfigError("to_moe starts from a student of shared experts only, without MoB groups; this one is not")
    wanted = structure.moe_section(moe)
    for key in ("shared_ratio", "dense_double_blocks"):
        if config.moe[key] != wanted[key]:
            raise ConfigError(
                f"moe.{key} is {wanted[key]}, but the shared-expert student was made with"
                f" {config.moe[key]}; they must agree"
            )
    own = structure.dense_part(shared_student.config)
    for key, value in structure.dense_part(teacher.config).items():
        if own[key] != value:
            raise ConfigError(
                f"the teacher's {key} is {value}, but the shared-expert student's is {own[key]}; they must agree"
            )
    student = on_meta({**own, "moe": wanted, "conditioning_dim": config.conditioning_dim})
    recipe = Recipe(student, {"student": shared_student, "teacher": teacher})
    if layers is None and (moe.refit or moe.split == "greedy"):
        raise ConfigError(
            f"moe.refit is {str(moe.refit).lower()} and moe.split {moe.split}, but the shared experts were trained alone; W2 is fitted, and units are"
            " chosen, for all experts together: kd.joint must be true"
        )
    layers = layers or Layers(scores, moe, seed, tokens)
    for name, _, layer in _layers(teacher, layers, moe):
        # Normal experts come in the precision of the shared one beside them: it may have been trained in another than the teacher's.
        like = Ref("student", f"{name}.shared.proj_in.bias")
        for piece in layer.experts():
            recipe.add(f"{name}.{piece.name}", [like, *(Ref("teacher", read) for read in piece.reads)], piece.make)
    recipe.keep("student")
    for name, shape in recipe.shapes.items():
        if name not in recipe.made:  # a router that is drawn
            recipe.add(
                name, [_first_parameter(shared_student)], partial(_drawn, shape, moe.router_init_std, seed, name)
            )
    recipe.leave("teacher")  # all but its FFNs: the student has its own
    return recipe.finished()


def joint_recipe(
    teacher: FluxTransformer2DModel,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
) -> Recipe:
    """How `to_moe_joint` makes its student of the source `teacher`, of which only the structure is used."""
    layers = Layers(scores, moe, seed, tokens)
    shared = shared_recipe(teacher, scores, moe, conditioning_bank, seed, layers=layers)
    return moe_recipe(shared.student, teacher, scores, moe, seed, layers=layers).after(shared, "student")


def mob_recipe(
    student: FluxTransformer2DModel,
    level: MoBLevelConfig,
    mob: MoBConfig,
    block_change: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Recipe:
    """How `to_mob` makes its model of the source `student`, of which only the structure is used."""
    grouped = on_meta(structure.mob_config(student.config, level, mob, block_change))
    recipe = Recipe(grouped, {"student": student})
    stored = {original: name for name, original in _original_names(student).items()}
    for name, original in _original_names(grouped).items():
        if original in stored:
            recipe.add(name, [Ref("student", stored[original])], unchanged)
        else:  # the router of a new group
            make = partial(_drawn, recipe.shapes[name], mob.router_init_std, seed, original)
            recipe.add(name, [_first_parameter(student)], make)
    return recipe.finished()


def depth_recipe(student: FluxTransformer2DModel, drop: Mapping[str, Collection[int]]) -> Recipe:
    """How `to_depth` makes its model of the source `student`, of which only the structure is used."""
    shallow = on_meta(structure.depth_config(student.config, drop))
    recipe, kept = Recipe(shallow, {"student": student}), dict[str, str]()
    for kind, name in structure.KINDS.items():
        left = [number for number in range(len(getattr(student, name))) if number not in drop.get(kind, ())]
        kept |= {f"{name}.{position}": f"{name}.{number}" for position, number in enumerate(left)}
    for name in recipe.shapes:
        block, rest = name.split(".")[:2], name.split(".")[2:]
        source = ".".join([kept.get(".".join(block), ".".join(block)), *rest])
        recipe.add(name, [Ref("student", source)], unchanged)
    recipe.leave("student")
    return recipe.finished()


def _original_names(model: FluxTransformer2DModel) -> dict[str, str]:
    """Parameter name -> that with blocks under original numbers, routers under their group's: `[1, 2].router`."""
    renamed: dict[str, str] = {}
    for kind in structure.KINDS.values():
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


def _layers(
    teacher: FluxTransformer2DModel, layers: Layers, moe: MoEConfig
) -> Iterator[tuple[str, DenseFFN, Ranked | Fitted]]:
    """(name, the teacher's tensors, layer) of every FFN that conversion replaces."""
    for name in ffn_names(teacher, moe.dense_double_blocks):
        ffn = dense_ffn(name, teacher.inner_dim)
        hidden_width, width = teacher.get_parameter(ffn.w1).shape
        yield name, ffn, layers.layer(name, hidden_width, width)


def _first_parameter(model: nn.Module) -> Ref:
    """Routers are drawn in its precision."""
    return Ref("student", next(name for name, _ in model.named_parameters()))


def _first_columns(count: int, matrix: Tensor) -> Tensor:
    return matrix[:, :count]


def _drawn(shape: torch.Size, std: float, seed: int, name: str, like: Tensor) -> Tensor:
    return drawn(shape, std, seed, name).to(like)
