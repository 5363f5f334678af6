import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from moe_core import noise
from moe_core.config import TimestepConfig
from moe_core.noise import derive_seed, draw, sample_index, sampler_sigmas

LOGIT_NORMAL = TimestepConfig()
SHAPE = (4, 6)


def test_draw_depends_on_seed_and_position_alone():
    noise, sigma = draw(7, range(10), SHAPE, LOGIT_NORMAL)
    again, sigma_again = draw(7, [8, 3], SHAPE, LOGIT_NORMAL)
    assert torch.equal(again, noise[[8, 3]])
    assert torch.equal(sigma_again, sigma[[8, 3]])
    other, sigma_other = draw(8, range(10), SHAPE, LOGIT_NORMAL)
    assert not torch.equal(other, noise)
    assert not torch.equal(sigma_other, sigma)


def test_draw_ignores_and_leaves_global_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state()
    first, _ = draw(0, [5], SHAPE, LOGIT_NORMAL)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(0, [5], SHAPE, LOGIT_NORMAL)[0], first)


def test_noise_is_standard_normal_within_and_across_positions():
    noise, _ = draw(3, range(2000), (64,), LOGIT_NORMAL)
    assert abs(noise.mean().item()) < 0.01
    assert abs(noise.var().item() - 1) < 0.02
    assert abs(noise.pow(4).mean().item() - 3) < 0.1
    assert (noise.mean(1) * 8).std().item() == pytest.approx(1, abs=0.06)  # no common offset within a sample
    neighbours = (noise[:-1] * noise[1:]).mean().item()
    assert abs(neighbours) < 0.01
    assert noise.unique(dim=0).shape[0] == 2000


def test_logit_normal_levels_have_the_stated_mean_std_and_shift():
    timesteps = TimestepConfig(mean=0.5, std=0.8, shift=3.0)
    _, sigma = draw(0, range(4000), (1,), timesteps)
    assert bool(((sigma > 0) & (sigma <= 1)).all())
    unshifted = sigma.double() / (3 - 2 * sigma.double())  # the shift, solved for its argument
    assert torch.logit(unshifted).mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.logit(unshifted).std().item() == pytest.approx(0.8, abs=0.05)


def test_noise_and_level_of_a_sample_are_independent():
    noise, sigma = draw(0, range(4000), (1,), LOGIT_NORMAL)
    correlation = np.corrcoef(noise[:, 0].numpy(), sigma.numpy())[0, 1]
    assert abs(correlation) < 0.06


def test_discrete_levels_are_those_of_the_samplers_schedule_and_all_occur():
    timesteps = TimestepConfig(kind="discrete", steps=8, shift=3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8).tolist())
    np.testing.assert_allclose(sampler_sigmas(timesteps), scheduler.sigmas[:-1].numpy(), rtol=1e-6)
    _, sigma = draw(0, range(200), (1,), timesteps)
    assert set(sigma.tolist()) == set(sampler_sigmas(timesteps).astype(np.float32).tolist())


def test_sample_index_deals_every_sample_once_an_epoch_in_a_new_order():
    order = sample_index(5, range(30), 10)
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sample_index(5, [23, 4, 11], 10) == [order[23], order[4], order[11]]
    assert sample_index(6, range(10), 10) != epochs[0]


def test_sample_index_refuses_an_empty_set():
    with pytest.raises(ValueError, match="n is 0"):
        sample_index(0, [0], 0)


def test_derived_seeds_differ_by_purpose_and_seed():
    seeds = {derive_seed(seed, purpose) for seed in range(3) for purpose in ("moe_kd", "mob_kd")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_one_bucket_is_no_bucket():
    for step in (0, 1, 63, 64, 5000):
        positions = range(step * 8, step * 8 + 8)
        assert noise.bucket_rows(3, positions, [30], 8) == noise.sample_index(3, positions, 30)


def _bucket(row: int, sizes: list[int]) -> int:
    return next(number for number in range(len(sizes)) if row < sum(sizes[: number + 1]))


def test_a_global_batch_is_of_one_bucket_whichever_worker_asks():
    sizes = [40, 7, 25]
    for step in range(200):
        whole = noise.bucket_rows(5, range(step * 8, step * 8 + 8), sizes, 8)
        assert len({_bucket(row, sizes) for row in whole}) == 1
        halves = [noise.bucket_rows(5, range(step * 8 + at, step * 8 + at + 4), sizes, 8) for at in (0, 4)]
        assert halves[0] + halves[1] == whole


def test_buckets_are_drawn_by_their_size_and_within_one_every_sample_comes_once_an_epoch():
    sizes = [60, 20, 40]
    # More than one block of draws: the count of earlier batches goes over its end.
    rows = [noise.bucket_rows(7, range(step * 4, step * 4 + 4), sizes, 4) for step in range(noise._BLOCK + 500)]
    drawn = [_bucket(batch[0], sizes) for batch in rows]
    for bucket, size in enumerate(sizes):
        assert drawn.count(bucket) / len(drawn) == pytest.approx(size / 120, abs=0.03)
        own = [row for batch, of in zip(rows, drawn) if of == bucket for row in batch]
        start = sum(sizes[:bucket])
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(start, start + size))


def test_positions_of_two_global_batches_are_refused():
    with pytest.raises(ValueError, match="2 global batches of 8"):
        noise.bucket_rows(0, range(6, 10), [30], 8)
