"""A MoE layer's tensors, made of those of the dense FFN whose place it takes: by ranks of its segments alone, or by `moe_core.fit`.

An FFN is cut into segments (row i of W1, b1[i], column i of W2); some go to the shared expert, the rest are dealt to the normal ones (Sec. 3.2).
The cut is a function of scores, parameters, seed and, where it is fitted, tokens and weights: every conversion of an FFN finds the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_core import fit
from moe_core.buffers import Buffers
from moe_core.config import MoEConfig
from moe_core.errors import ConfigError
from moe_core.fit import LayerFit, Split


class DenseFFN(NamedTuple):
    """Names of the tensors of one of the teacher's FFNs (eq. 1)."""

    w1: str
    b1: str
    w2: str
    b2: str | None
    """None in a single block, where the bias is shared with the attention's projection."""
    first: int
    """The column of `w2` at which the FFN's begin; those before it are the attention's."""


class Piece(NamedTuple):
    """A tensor of a MoE layer."""

    name: str
    """Within the layer."""
    reads: tuple[str, ...]
    """The teacher's tensors that it is made of."""
    make: Callable[..., Tensor]
    """Of their values; a normal expert's has a tensor before them whose precision and device it takes."""


def dense_ffn(name: str, width: int) -> DenseFFN:
    """The teacher's tensors of an FFN, by its name in `convert.ffn_names`; `width` is the model's."""
    block, _, branch = name.rpartition(".")
    if branch == "moe":
        return DenseFFN(f"{block}.proj_mlp.weight", f"{block}.proj_mlp.bias", f"{block}.proj_out.weight", None, width)
    first, second = f"{name}.net.0.proj", f"{name}.net.2"
    return DenseFFN(f"{first}.weight", f"{first}.bias", f"{second}.weight", f"{second}.bias", 0)


def ranks(name: str, hidden_width: int, width: int, scores: Mapping[str, Tensor], moe: MoEConfig, seed: int) -> Tensor:
    """The segments of the FFN `name`, the most important first. taylor, greedy: by eq. 6. random: a permutation drawn from (seed, name); `scores`
    is not read.

    Raises ConfigError if scores are missing, of a wrong length or not finite, or r does not fit the FFN.
    """
    if abs(moe.expansion_ratio * width - hidden_width) > 1e-6:
        raise ConfigError(
            f"moe.expansion_ratio is {moe.expansion_ratio:g}, but {name} is {hidden_width} wide in a model of width"
            f" {width}; it must be {hidden_width / width:g}"
        )
    if moe.split == "random":
        return torch.randperm(hidden_width, generator=generator(seed, "split", name))
    if name not in scores:
        raise ConfigError(f"importance scores lack {name}; split '{moe.split}' needs one for each segment of every FFN")
    score_F = scores[name].detach().double().cpu()
    if score_F.shape != (hidden_width,) or not torch.isfinite(score_F).all():
        raise ConfigError(
            f"importance scores of {name} must be {hidden_width} finite numbers; their shape is {list(score_F.shape)}"
        )
    return score_F.sort(descending=True, stable=True).indices


def split_segments(
    name: str, hidden_width: int, width: int, scores: Mapping[str, Tensor], moe: MoEConfig, seed: int
) -> Split:
    """Deals the segments of the FFN `name` to the experts where no tokens are needed: the first ranks to the shared expert, the rest in turn, so
    that each expert gets an even share of importance, or in their order. Raises as `ranks`."""
    order = ranks(name, hidden_width, width, scores, moe, seed)
    shared = round(moe.shared_ratio * width)
    return Split(order[:shared].sort().values, fit.deal_by_rank(order[shared:], moe))


class Ranked:
    """A layer whose parts are the FFN's own, dealt by rank."""

    def __init__(self, ffn: DenseFFN, split: Split, work: Buffers) -> None:
        self._ffn, self._split, self._work = ffn, split, work

    def shared(self) -> Iterator[Piece]:
        """The shared expert's tensors but its output bias."""
        ffn, units, work = self._ffn, self._split.shared, self._work
        yield Piece("shared.proj_in.weight", (ffn.w1,), partial(_rows, work, units))
        yield Piece("shared.proj_in.bias", (ffn.b1,), partial(_rows, work, units))
        yield Piece("shared.proj_out.weight", (ffn.w2,), partial(_columns, work, ffn.first + units))

    def experts(self) -> Iterator[Piece]:
        """The normal experts' tensors."""
        ffn, units_EF, work = self._ffn, self._split.experts_EF, self._work
        yield Piece("w1_EFD", (ffn.w1,), partial(_expert_rows, work, units_EF))
        yield Piece("b1_EF", (ffn.b1,), partial(_expert_rows, work, units_EF))
        yield Piece("w2_EDF", (ffn.w2,), partial(_expert_columns, work, ffn.first + units_EF))


class Fitted:
    """A layer that is fitted to the FFN; once, when the first of its tensors is asked for. `kept` has the fit that was made last, of all layers."""

    def __init__(
        self, ffn: DenseFFN, moe: MoEConfig, kept: dict[DenseFFN, LayerFit], make: Callable[..., LayerFit]
    ) -> None:
        self._ffn, self._moe, self._kept, self._make = ffn, moe, kept, make
        self._reads = (ffn.w1, ffn.b1, ffn.w2)

    def shared(self) -> Iterator[Piece]:
        """The shared expert's tensors but its output bias. Each reads its own of the FFN's tensors first, whose precision it has."""
        ffn = self._ffn
        for name, own, make in (
            ("proj_in.weight", ffn.w1, lambda found, w1, b1: w1[found.split.shared]),
            ("proj_in.bias", ffn.b1, lambda found, w1, b1: b1[found.split.shared]),
            ("proj_out.weight", ffn.w2, lambda found, w1, b1: found.shared_DS),
        ):
            yield Piece(f"shared.{name}", (own, *self._reads), partial(self._made, make))

    def experts(self) -> Iterator[Piece]:
        """The normal experts' tensors, and the router's where it is fitted."""
        yield Piece("w1_EFD", self._reads, partial(self._made, lambda found, w1, b1: w1[found.split.experts_EF]))
        yield Piece("b1_EF", self._reads, partial(self._made, lambda found, w1, b1: b1[found.split.experts_EF]))
        yield Piece("w2_EDF", self._reads, partial(self._made, lambda found, w1, b1: found.experts_EDF))
        if self._moe.router_init == "norms":
            yield Piece("router.weight", self._reads, partial(self._made, lambda found, w1, b1: found.router_ED))

    def _made(self, make: Callable[..., Tensor], like: Tensor, w1_FD: Tensor, b1_F: Tensor, w2: Tensor) -> Tensor:
        if self._ffn not in self._kept:
            self._kept.clear()
            found = self._make((w1_FD, b1_F, w2[:, self._ffn.first :]))
            split = Split(*(part.to(w1_FD.device) for part in found.split))
            self._kept[self._ffn] = found._replace(split=split)
        return make(self._kept[self._ffn], w1_FD, b1_F).to(like)


class Layers:
    """How the MoE layers of one conversion are made."""

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        moe: MoEConfig,
        seed: int,
        tokens: Mapping[str, Tensor] | None = None,
        alone: bool = False,
    ) -> None:
        """tokens: FFN name -> [N, D], needed where `moe.needs_tokens`. alone: shared experts only."""
        self._scores, self._moe, self._seed, self._tokens, self._alone = scores, moe, seed, tokens, alone
        self._work = Buffers()
        self._kept: dict[DenseFFN, LayerFit] = {}

    def layer(self, name: str, hidden_width: int, width: int) -> Ranked | Fitted:
        """The layer in the place of the FFN `name`. Raises ConfigError where scores, tokens or parameters do not fit."""
        ffn, moe = dense_ffn(name, width), self._moe
        if not moe.needs_tokens:
            split = split_segments(name, hidden_width, width, self._scores, moe, self._seed)
            return Ranked(ffn, split, self._work)
        order_F = ranks(name, hidden_width, width, self._scores, moe, self._seed)
        fit.require_tokens(name, self._tokens)
        return Fitted(ffn, moe, self._kept, partial(self._fit, name, order_F))

    def _fit(self, name: str, order_F: Tensor, ffn: tuple[Tensor, Tensor, Tensor]) -> LayerFit:
        moe, width = self._moe, ffn[0].shape[1]
        tokens_ND = fit.tokens_of(name, self._tokens, width)
        router_ED = drawn_router(name, torch.Size((moe.num_experts, width)), moe, self._seed)
        made = generator(self._seed, "deal", name)
        return fit.fit_layer(tokens_ND, ffn, order_F, router_ED, moe, made, self._alone)


def drawn_router(name: str, shape: torch.Size, moe: MoEConfig, seed: int) -> Tensor:
    """The router of the FFN `name` where it is drawn: a function of (seed, layer)."""
    return drawn(shape, moe.router_init_std, seed, f"{name}.router.weight")


def drawn(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    """A normal tensor, a function of (seed, name)."""
    return torch.randn(shape, generator=generator(seed, name)) * std


def generator(seed: int, *names: str) -> torch.Generator:
    """A generator that is a function of (seed, names)."""
    digest = hashlib.sha256("/".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# Big tensors are made in memory of `work`, which is used again for the next once the result was copied.


def _rows(work: Buffers, index: Tensor, tensor: Tensor) -> Tensor:
    made = work.empty((index.numel(), *tensor.shape[1:]), tensor.dtype, tensor.device)
    torch.index_select(tensor, 0, index.flatten().to(tensor.device), out=made)
    return made.view(*index.shape, *tensor.shape[1:])


def _columns(work: Buffers, index: Tensor, matrix: Tensor) -> Tensor:
    made = work.empty((len(matrix), len(index)), matrix.dtype, matrix.device)
    # Twice as fast as `matrix[:, index]`.
    return torch.gather(matrix, 1, index.to(matrix.device).expand(len(matrix), -1), out=made)


def _expert_rows(work: Buffers, experts_EF: Tensor, like: Tensor, tensor: Tensor) -> Tensor:
    return _rows(work, experts_EF, tensor).to(like)


def _expert_columns(work: Buffers, experts_EF: Tensor, like: Tensor, matrix_DF: Tensor) -> Tensor:
    return _columns(work, experts_EF.flatten(), matrix_DF).view(-1, *experts_EF.shape).transpose(0, 1).to(like)
