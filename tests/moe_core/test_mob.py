"""MoB groups against eq. 4-5 written out sample by sample."""

import pytest
import torch
from torch import Tensor, nn

from moe_core.errors import ConfigError
from moe_core.mob import BlockRouter, MoBGroup

WIDTH, CONDITIONING, BLOCKS = 12, 5, 4


class RecordingBlock(nn.Module):
    """A block's signature, order-dependent arithmetic, and a note of which samples (by temb[:, 0]) passed. Stands in
    for a FLUX block, whose own behaviour inside groups is tested in test_transformer.py."""

    def __init__(self, number: int):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.number = number
        self.seen: list[list[float]] = []

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        self.seen.append(temb[:, 0].tolist())
        change = torch.tanh(self.linear(hidden_states)) + temb.mean(1)[:, None, None]
        return encoder_hidden_states + change.mean(1, keepdim=True), (hidden_states + change) * (1 + self.number)


def make_group(active: int, contiguous: bool = False, alpha: float = 0.5, seed: int = 0) -> MoBGroup:
    torch.manual_seed(seed)
    router = BlockRouter(WIDTH, CONDITIONING, BLOCKS, active, alpha=alpha, contiguous=contiguous, init_std=1.0).double()
    return MoBGroup([RecordingBlock(i) for i in range(BLOCKS)], router)


def make_input(batch: int = 6, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 5, WIDTH), (batch, 3, WIDTH), (batch, CONDITIONING))
    image, text, temb = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return image, text, temb


def slow_choice(group: MoBGroup, image_TD: Tensor, text_TD: Tensor, y: Tensor) -> list[int]:
    """Eq. 5 (or the window of eq. 4) for one sample."""
    router = group.router
    tokens = torch.cat([image_TD, text_TD])
    normed = (tokens - tokens.mean(1, keepdim=True)) / torch.sqrt(tokens.var(1, unbiased=False, keepdim=True) + 1e-6)
    logits = router.alpha * router.w_x.weight @ normed.mean(0) + (1 - router.alpha) * router.w_y.weight @ y
    probs = (torch.exp(logits) / torch.exp(logits).sum()).tolist()
    if router.contiguous:
        windows = [range(q, q + router.active) for q in range(BLOCKS - router.active + 1)]
        return list(max(windows, key=lambda window: sum(probs[i] for i in window)))
    return sorted(sorted(range(BLOCKS), key=lambda i: -probs[i])[: router.active])


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("active", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@torch.no_grad()
def test_group_is_equations_4_and_5(active: int, contiguous: bool, alpha: float):
    group = make_group(active, contiguous, alpha)
    image, text, temb = make_input()
    new_text, new_image = group(image, text, temb)
    choices = [slow_choice(group, image[b], text[b], temb[b]) for b in range(6)]
    assert group.router(image, text, temb).indices_Bk.tolist() == choices
    for b, chosen in enumerate(choices):
        x, c = image[b : b + 1], text[b : b + 1]
        for i in chosen:
            c, x = group.blocks[i](x, c, temb[b : b + 1])
        torch.testing.assert_close(new_image[b : b + 1], x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new_text[b : b + 1], c, rtol=1e-12, atol=1e-12)
    if active < BLOCKS:
        assert len({tuple(choice) for choice in choices}) > 1  # or the test would not see a batch split


@torch.no_grad()
def test_a_sample_costs_only_its_own_blocks():
    group = make_group(active=1)
    image, text, temb = make_input()
    group(image, text, temb)
    passed = sorted(sample for block in group.blocks for call in block.seen for sample in call)
    assert passed == sorted(temb[:, 0].tolist())


@pytest.mark.parametrize("active", [1, 2])
def test_scaling_by_p_over_stopgrad_p(active: int):
    """Value: as if unscaled, to the bit. Gradient: that of x + p/stopgrad(p) * (block(x) - x), by hand for one
    sample."""
    group = make_group(active)
    image, text, temb = make_input(batch=1)
    with torch.no_grad():
        plain = group(image, text, temb)
    outputs = group(image, text, temb)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain))
    (outputs[0].square().sum() + outputs[1].sum()).backward()
    found = group.router.w_x.weight.grad.clone()
    assert found.abs().sum() > 0
    assert group.router.w_y.weight.grad.abs().sum() > 0

    group.zero_grad()
    routing = group.router(image, text, temb)
    x, c = image, text
    for i in routing.indices_Bk[0].tolist():
        p = routing.probs_Bm[0, i]
        new_c, new_x = group.blocks[i](x, c, temb)
        x, c = x + p / p.detach() * (new_x - x), c + p / p.detach() * (new_c - c)
    (c.square().sum() + x.sum()).backward()
    torch.testing.assert_close(found, group.router.w_x.weight.grad, rtol=1e-9, atol=1e-12)


def test_gates_sum_to_one_and_scales_are_one():
    routing = make_group(active=3).router(*make_input())
    torch.testing.assert_close(routing.gates_Bk.sum(1), torch.ones(6, dtype=torch.float64))
    assert (routing.scales_Bk == 1).all()
    assert routing.probs_Bm.shape == (6, BLOCKS)


def test_more_active_than_blocks():
    with pytest.raises(ConfigError, match="active is 5, but the group has 4 blocks"):
        make_group(active=5)


def test_ip_adapter_is_refused():
    with pytest.raises(ConfigError, match="IP-Adapter"):
        make_group(1)(*make_input(), joint_attention_kwargs={"ip_hidden_states": []})
