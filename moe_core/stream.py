"""Conversion from folder to folder in bounded memory: the recipes of `moe_core.convert`, tensor by tensor.

- Sources are one file or shards with an index, never mapped or held as a whole; what is in memory is about a block (0.7 GB for FLUX.1 in bf16),
  `AHEAD_BYTES` that were read ahead, as many that wait to be written, and the work of a fit, an AdaLN layer, an FFN. Memory is used again for
  tensors of the same size and kept until the end: for FLUX.1 in bf16, less than 3 GB in all.
  A fit on tokens (`moe.needs_tokens`) has an FFN's activations and products in fp64 besides: by arithmetic, 7 GB for FLUX.1's with 8,192 tokens.
- The same bits as `moe_core.convert` makes in memory of the same weights, and the precision of the source, tensor by tensor.
- A folder appears whole or not at all: it is written beside its place (`.<name>.partial`), flushed, then renamed. What a killed conversion
  left is removed by the next one into the same place.
- All is checked before anything is written: folders, parameters, free space.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from moe_core import adaln, convert, folders
from moe_core.config import MoBConfig, MoBLevelConfig, MoEConfig
from moe_core.errors import ConfigError
from moe_core.recipe import Recipe, Ref
from moe_core.shards import AHEAD_BYTES, Entry, ModelFolder, ShardWriter, cut
from moe_core.transformer import FluxMoETransformer2DModel

MAX_SHARD_BYTES = 10 * 10**9
"""diffusers' own default."""


def to_shared(
    teacher: Path,
    out: Path,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`convert.to_shared` from the dense transformer in folder `teacher` to folder `out`.

    Raises as that; CheckpointError naming file and tensor where `teacher` is not a whole FLUX transformer; ConfigError if `out` exists, lies
    within a source, or does not fit the disk. So do the others.
    """
    with ModelFolder(teacher, FluxTransformer2DModel) as dense:
        recipe = convert.shared_recipe(dense.model, scores, moe, conditioning_bank, seed, tokens)
        _follow(recipe, {"teacher": dense}, out, max_shard_bytes)


def to_moe(
    shared_student: Path,
    teacher: Path,
    out: Path,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`convert.to_moe` from the folders of a shared-expert student and of its teacher to folder `out`."""
    with (
        ModelFolder(shared_student, FluxMoETransformer2DModel) as shared,
        ModelFolder(teacher, FluxTransformer2DModel) as dense,
    ):
        recipe = convert.moe_recipe(shared.model, dense.model, scores, moe, seed, tokens)
        _follow(recipe, {"student": shared, "teacher": dense}, out, max_shard_bytes)


def to_moe_joint(
    teacher: Path,
    out: Path,
    scores: Mapping[str, Tensor],
    moe: MoEConfig,
    conditioning_bank: Tensor | None = None,
    seed: int = 0,
    tokens: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`convert.to_moe_joint` from folder `teacher` to folder `out`, in one pass."""
    with ModelFolder(teacher, FluxTransformer2DModel) as dense:
        recipe = convert.joint_recipe(dense.model, scores, moe, conditioning_bank, seed, tokens)
        _follow(recipe, {"teacher": dense}, out, max_shard_bytes)


def to_mob(
    student: Path,
    out: Path,
    level: MoBLevelConfig,
    mob: MoBConfig,
    block_change: Mapping[str, float] | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """`convert.to_mob` from folder `student`, of a dense, MoE or MoB model, to folder `out`."""
    with ModelFolder(student, FluxTransformer2DModel, FluxMoETransformer2DModel) as start:
        recipe = convert.mob_recipe(start.model, level, mob, block_change, seed)
        _follow(recipe, {"student": start}, out, max_shard_bytes)


def to_depth(
    student: Path, out: Path, drop: Mapping[str, Collection[int]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """`convert.to_depth` from folder `student`, of a dense model or one cut in its depth before, to folder `out`."""
    with ModelFolder(student, FluxTransformer2DModel, FluxMoETransformer2DModel) as start:
        _follow(convert.depth_recipe(start.model, drop), {"student": start}, out, max_shard_bytes)


def start_errors(teacher: Path, conditioning_bank: Tensor, moe: MoEConfig, seed: int = 0) -> adaln.Start:
    """`adaln.start_errors` of the compression that `to_shared` makes, for the dense transformer in folder `teacher`."""
    if moe.conditioning_dim is None:
        raise ConfigError("moe.conditioning_dim is null; there is no compression whose error could be measured")
    with ModelFolder(teacher, FluxTransformer2DModel) as dense:
        return adaln.start_errors(dense.model, dense.read, conditioning_bank, moe.conditioning_dim, moe.ridge, seed)


@torch.no_grad()
def _follow(recipe: Recipe, sources: Mapping[str, ModelFolder], out: Path, max_shard_bytes: int) -> None:
    entries = [
        # A tensor has the precision of the first that it is made of.
        Entry(name, sources[made.reads[0].source].dtype(made.reads[0].name), tuple(recipe.shapes[name]))
        for name, made in recipe.made.items()
    ]
    _check_out(out, [source.path for source in sources.values()], sum(entry.size for entry in entries))
    shards = cut(entries, max_shard_bytes)
    with _removed_on_error(out), folders.folder(out) as partial:
        with ShardWriter(partial, shards) as writer:
            for name, tensor in _made(recipe, sources, [entry.name for shard in shards for entry in shard]):
                writer.put(name, tensor)
        # Last, so that the folder loads from nowhere before it is whole.
        recipe.student.save_config(partial)


def _made(recipe: Recipe, sources: Mapping[str, ModelFolder], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, in this order. A source tensor is read when it is first needed, and let go after its last use."""
    order = [(name, recipe.made[name]) for name in names]
    uses = Counter(ref for _, made in order for ref in made.reads)
    ahead = deque(dict.fromkeys(ref for _, made in order for ref in made.reads))
    held: dict[Ref, Tensor] = {}
    expected = 0
    asked: set[Ref] = set()
    for name, made in order:
        for ref in made.reads:
            if ref in held:
                continue
            while ahead and (expected < AHEAD_BYTES or ref not in asked):
                expected += sources[ahead[0].source].size(ahead[0].name)
                sources[ahead[0].source].expect(ahead[0].name)
                asked.add(ahead.popleft())
            held[ref] = sources[ref.source].read(ref.name)
            expected -= sources[ref.source].size(ref.name)
        yield name, made.make(*(held[ref] for ref in made.reads))
        for ref in made.reads:
            uses[ref] -= 1
            if not uses[ref]:
                del held[ref]


@contextlib.contextmanager
def _removed_on_error(out: Path) -> Iterator[None]:
    """A conversion that fails leaves no 18 GB behind; one that is killed does, until the next."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folders.partial(out), ignore_errors=True)
        raise


def _check_out(out: Path, sources: Iterable[Path], size: int) -> None:
    place = out.resolve()
    for source in sources:
        if place == source.resolve() or source.resolve() in place.parents or place in source.resolve().parents:
            raise ConfigError(f"the output folder {out} must lie apart from the source {source}")
    if out.exists():
        raise ConfigError(f"the output folder {out} exists already; remove it or name another")
    parent = next(folder for folder in place.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    left = folders.partial(out)
    if left.is_dir():
        free += sum(path.stat().st_size for path in left.iterdir())
    if free < size:
        raise ConfigError(f"{out} needs {size / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB left")
