"""Mixture of Blocks: of a group of consecutive blocks, each sample passes only some (paper, Sec. 3.1).

- A group has a block's signature and stands among the blocks of the model: diffusers' own forward runs it.
- Routing is per sample, from features and conditioning together (eq. 5). A batch is split by chosen block and joined
  again, so no sample pays for a block that it did not choose.
- With one active block a normalised gate is always 1 and the router would learn nothing. So a block's change of the
  features is scaled by p / stopgrad(p), p the block's probability: the value is exactly 1, the gradient is alive.

Shapes: B batch, T tokens, D width, m blocks in the group, k (kappa) active ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_core.errors import ConfigError


class BlockRouting(NamedTuple):
    """What a block router decided, for a batch."""

    probs_Bm: Tensor
    """Softmax over the group's blocks; fp32 (fp64 for fp64 input); differentiable."""
    indices_Bk: Tensor
    """The chosen blocks, by position in the group, in their old order; int64."""
    gates_Bk: Tensor
    """Probabilities of the chosen blocks, normalised among them (constantly 1 if one is active); differentiable."""
    scales_Bk: Tensor
    """p / stopgrad(p) of the chosen blocks: 1 in value, with the gradient of log p."""


class _Projection(nn.Linear):
    """In its input's precision. A module that is called, as what offloads weights leaf by leaf brings them by hooks on calls."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class BlockRouter(nn.Module):
    """Eq. 5: the k best of alpha * W_x([x; c]) + (1 - alpha) * W_y y.

    [x; c] is the mean over image and text tokens together of the layer norm without parameters; y the conditioning
    (`temb`). With `contiguous` the choice is eq. 4's window of k consecutive blocks: the one of the greatest summed
    probability.
    """

    def __init__(
        self,
        width: int,
        conditioning_dim: int,
        num_blocks: int,
        active: int,
        *,
        alpha: float = 0.5,
        contiguous: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        if not 1 <= active <= num_blocks:
            raise ConfigError(
                f"mob.active is {active}, but the group has {num_blocks} blocks; it must lie between 1 and that"
            )
        self.active = active
        self.alpha = alpha
        self.contiguous = contiguous
        self.w_x = _Projection(width, num_blocks, bias=False)
        self.w_y = _Projection(conditioning_dim, num_blocks, bias=False)
        for linear in (self.w_x, self.w_y):
            nn.init.normal_(linear.weight, std=init_std)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> BlockRouting:
        """hidden_states (image) and encoder_hidden_states (text): [B, T, D] each; temb: [B, conditioning_dim]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            tokens_BTD = torch.cat([hidden_states.to(dtype), encoder_hidden_states.to(dtype)], dim=1)
            mean_BD = F.layer_norm(tokens_BTD, tokens_BTD.shape[-1:], eps=1e-6).mean(1)
            logits_Bm = self.alpha * self.w_x(mean_BD) + (1 - self.alpha) * self.w_y(temb.to(dtype))
            log_probs_Bm = logits_Bm.log_softmax(-1)
        probs_Bm = log_probs_Bm.exp()
        if self.contiguous:
            first_B1 = probs_Bm.unfold(1, self.active, 1).sum(-1).argmax(-1, keepdim=True)
            indices_Bk = first_B1 + torch.arange(self.active, device=first_B1.device)
        else:
            indices_Bk = logits_Bm.topk(self.active, dim=-1).indices.sort(-1).values
        chosen_Bk = probs_Bm.gather(1, indices_Bk)
        log_chosen_Bk = log_probs_Bm.gather(1, indices_Bk)
        return BlockRouting(
            probs_Bm,
            indices_Bk,
            chosen_Bk / chosen_Bk.sum(-1, keepdim=True),
            1 + (log_chosen_Bk - log_chosen_Bk.detach()),
        )


class MoBGroup(nn.Module):
    """Consecutive blocks of one kind; every sample passes those that the router chose for it, in their old order.

    `every_block`: blocks that no sample here chose are called too, on nothing: they change no value and get gradients of zero.
    So it must be where processes share the blocks' weights (`moe_core.sharding`), as their collectives pair up by order.
    """

    def __init__(self, blocks: Iterable[nn.Module], router: BlockRouter):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.router = router
        self.every_block = False

    def choices(self, routing: BlockRouting) -> list[list[int]]:
        """The chosen blocks of each sample, on the host."""
        return routing.indices_Bk.tolist()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns what a FLUX block does: (encoder_hidden_states, hidden_states)."""
        if joint_attention_kwargs and "ip_hidden_states" in joint_attention_kwargs:
            raise ConfigError(
                "joint_attention_kwargs has ip_hidden_states; a MoB group splits the batch and takes no IP-Adapter"
            )
        routing = self.router(hidden_states, encoder_hidden_states, temb)
        batch = hidden_states.shape[0]
        choices = self.choices(routing)
        for position, block in enumerate(self.blocks):
            rows = [(sample, chosen.index(position)) for sample, chosen in enumerate(choices) if position in chosen]
            if not rows and not self.every_block:
                continue
            samples, places = torch.tensor(rows, dtype=torch.int64, device=hidden_states.device).view(-1, 2).unbind(1)
            whole = len(rows) == batch
            image, text, cond = (
                t if whole else t.index_select(0, samples) for t in (hidden_states, encoder_hidden_states, temb)
            )
            with nullcontext() if rows else _on_nothing():
                new_text, new_image = block(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    temb=cond,
                    image_rotary_emb=image_rotary_emb if rows else None,
                    joint_attention_kwargs=joint_attention_kwargs,
                )
            if torch.is_grad_enabled():
                # x + scale * (block(x) - x), so written that block(x) comes through unrounded: scale - 1 is exactly 0.
                change_b11 = (routing.scales_Bk[samples, places] - 1).to(new_image.dtype).view(-1, 1, 1)
                new_image = new_image + change_b11 * (new_image - image)
                new_text = new_text + change_b11 * (new_text - text)
            hidden_states = new_image if whole else _put(hidden_states, samples, new_image)
            encoder_hidden_states = new_text if whole else _put(encoder_hidden_states, samples, new_text)
        return encoder_hidden_states, hidden_states


@contextmanager
def _on_nothing() -> Iterator[None]:
    # CUDA's fused attention and diffusers' rotation of positions cannot be computed; a graph for it would be compiled for no work.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        yield


def _put(batch_BTD: Tensor, samples: Tensor, rows_bTD: Tensor) -> Tensor:
    # Under autocast a block may return another precision than it was given.
    return batch_BTD.to(rows_bTD.dtype).index_copy(0, samples, rows_bTD)
