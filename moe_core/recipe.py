"""How each tensor of a converted model is made from tensors of the models it comes from.

- A recipe is the one definition of a conversion. `fill` follows it in memory, on modules; `moe_core.stream` follows it tensor by tensor,
  from folder to folder. Both call the same functions on the same values, so their results are the same bits.
- Nothing is read when a recipe is written: its models may lie on the meta device.
- A finished recipe makes every tensor of its student exactly once, and says of every source tensor that it is read, or is left aside on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_core.errors import CheckpointError
from moe_core.transformer import FluxMoETransformer2DModel


class Ref(NamedTuple):
    """A tensor of one of the models that a conversion starts from."""

    source: str
    name: str

    def __str__(self) -> str:
        return f"the {self.source}'s {self.name}"


class Made(NamedTuple):
    """`make` of the values of `reads`, in order. The result has the precision and device of the first of them."""

    reads: tuple[Ref, ...]
    make: Callable[..., Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """What a recipe makes of a tensor that the student keeps."""
    return tensor


class Recipe:
    """A student, on the meta device, and how its tensors are made of those of the `sources` (name -> model, or its structure)."""

    def __init__(self, student: FluxMoETransformer2DModel, sources: Mapping[str, nn.Module]) -> None:
        self.student = student
        self.shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
        self.made: dict[str, Made] = {}
        self._known = {
            Ref(source, name): tensor.shape
            for source, model in sources.items()
            for name, tensor in model.state_dict().items()
        }
        self._aside: set[Ref] = set()

    def add(self, name: str, reads: Iterable[Ref], make: Callable[..., Tensor]) -> None:
        """The student's tensor `name` is `make` of the sources' tensors `reads`. Raises CheckpointError if one of them is unknown, or `name` is
        made already."""
        made = Made(tuple(reads), make)
        if name in self.made:
            raise CheckpointError(f"conversion makes {name} twice")
        if name not in self.shapes:
            raise CheckpointError(f"conversion makes {name}, which the student does not have")
        for ref in made.reads:
            if ref not in self._known:
                raise CheckpointError(f"conversion needs {ref}, which is not there")
        self.made[name] = made

    def keep(self, source: str) -> None:
        """Every tensor that is not made yet is the source's of that name, where there is one. Raises CheckpointError if its shape is another."""
        for name, shape in self.shapes.items():
            ref = Ref(source, name)
            if name in self.made or ref not in self._known:
                continue
            if self._known[ref] != shape:
                raise CheckpointError(f"{ref} has shape {list(self._known[ref])}; the student's is {list(shape)}")
            self.add(name, [ref], unchanged)

    def leave(self, source: str) -> None:
        """Source tensors that were not read so far are left aside on purpose."""
        self._aside |= {ref for ref in self._known if ref.source == source}

    def finished(self) -> Recipe:
        """Itself, in the order of the student's tensors. Raises CheckpointError naming a tensor that is not made, or a source's that is
        not accounted for."""
        missing = [name for name in self.shapes if name not in self.made]
        if missing:
            raise CheckpointError(f"conversion does not make {len(missing)} tensors of the student, first {missing[0]}")
        read = {ref for made in self.made.values() for ref in made.reads}
        lost = [ref for ref in self._known if ref not in read | self._aside]
        if lost:
            raise CheckpointError(f"conversion would lose {len(lost)} tensors, first {lost[0]}")
        self.made = {name: self.made[name] for name in self.shapes}
        return self

    def after(self, first: Recipe, source: str) -> Recipe:
        """Both conversions in one: what this one reads of `source` is made by `first`, never stored."""
        joined = Recipe(self.student, {})
        joined._known = {ref: shape for ref, shape in self._known.items() if ref.source != source} | first._known
        joined._aside = first._aside
        for name, made in self.made.items():
            joined.add(name, *_substituted(made, first, source))
        return joined.finished()


def fill(recipe: Recipe, **sources: nn.Module) -> FluxMoETransformer2DModel:
    """The recipe's student with its weights, made in memory; none of them shares memory with a source."""
    states = {source: model.state_dict() for source, model in sources.items()}
    weights = {}
    for name, made in recipe.made.items():
        tensor = made.make(*(states[ref.source][ref.name] for ref in made.reads))
        weights[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    recipe.student.load_state_dict(weights, strict=True, assign=True)
    return recipe.student.eval()


def _substituted(made: Made, first: Recipe, source: str) -> tuple[list[Ref], Callable[..., Tensor]]:
    parts = [first.made[ref.name] if ref.source == source else Made((ref,), unchanged) for ref in made.reads]

    def make(*values: Tensor) -> Tensor:
        rest = iter(values)
        return made.make(*(part.make(*(next(rest) for _ in part.reads)) for part in parts))

    return [ref for part in parts for ref in part.reads], make
