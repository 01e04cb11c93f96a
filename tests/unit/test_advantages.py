"""Advantages, against numbers worked out by hand."""

import math

import pytest
import torch

from megatron_ztrl.algorithms.advantages import gae, grpo, reinforce_pp_baseline, whiten


def test_reinforce_pp_baseline_whitens_over_tokens_not_over_rollouts():
    # Group 7: rewards 1, 0 -> +.5, -.5; group 3: 1, 1 -> 0, 0. Tokens 10, 30, 20, 20.
    # Token mean = (5 - 15) / 80 = -1/8; centred: 5/8, -3/8, 1/8, 1/8.
    # Token variance = (10*25 + 30*9 + 20 + 20) / 64 / 80 = 560 / 5120 = 7/64.
    std = math.sqrt(7) / 8
    advantages_B = reinforce_pp_baseline(
        torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([7, 3, 7, 3]), torch.tensor([10, 20, 30, 20])
    )
    assert advantages_B.dtype == torch.float32
    assert advantages_B.tolist() == pytest.approx([x / 8 / std for x in (5, 1, -3, 1)], abs=1e-6)


def test_reinforce_pp_baseline_over_tokens_has_mean_zero_and_variance_one():
    generator = torch.Generator().manual_seed(0)
    rewards_B = torch.randint(0, 2, (64,), generator=generator).float()
    tokens_B = torch.randint(1, 500, (64,), generator=generator)
    advantages_B = reinforce_pp_baseline(rewards_B, torch.arange(64) // 8, tokens_B)
    advantages_T = torch.repeat_interleave(advantages_B.double(), tokens_B)
    assert advantages_T.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantages_T.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    # Group 0: 1,0,0,0 -> mean 1/4, std sqrt(3)/4 -> sqrt(3), -1/sqrt(3) x3. Group 1: 1,0 -> +1, -1.
    advantages_B = grpo(torch.tensor([1.0, 0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 0, 1, 1]))
    third = 1 / math.sqrt(3)
    assert advantages_B.tolist() == pytest.approx([math.sqrt(3), -third, -third, -third, 1, -1], abs=1e-6)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_uniform_groups_get_zeros_never_nan_or_amplified_rounding(reward: float):
    rewards_B, groups_B = torch.full((9,), reward), torch.arange(9) // 3
    assert grpo(rewards_B, groups_B).abs().max().item() < 1e-6
    advantages_B = reinforce_pp_baseline(rewards_B, groups_B, torch.arange(1, 10))
    assert advantages_B.abs().max().item() < 1e-6


def test_a_lone_rollout_and_a_batch_without_model_tokens_get_zeros():
    one = torch.tensor([1.0])
    assert grpo(one, torch.tensor([5])).tolist() == [0.0]
    assert reinforce_pp_baseline(one, torch.tensor([5]), torch.tensor([0])).tolist() == [0.0]


def test_gae_works_backwards_from_the_reward():
    # gamma 1/2, lambda 1/2, values .4 .2 .6, reward 1. Surprises: .5*.2-.4 = -.3; .5*.6-.2 = .1; 1-.6 = .4.
    # Advantages: .4; .1 + .25*.4 = .2; -.3 + .25*.2 = -.25. Returns are advantage + value.
    advantages_BN, returns_BN = gae(
        torch.tensor([[0.4, 0.2, 0.6, math.nan]]),
        torch.tensor([3]),
        torch.tensor([1.0]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantages_BN.dtype == torch.float32
    assert advantages_BN[0].tolist() == pytest.approx([-0.25, 0.2, 0.4, 0.0])
    assert returns_BN[0].tolist() == pytest.approx([0.15, 0.4, 1.0, 0.0])


def test_gae_without_discount_is_reward_minus_value_however_long_the_rollout():
    generator = torch.Generator().manual_seed(0)
    values_BN = torch.rand(5, 40, generator=generator)
    lengths_B = torch.tensor([1, 40, 7, 23, 2])
    rewards_B = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0])
    advantages_BN, returns_BN = gae(values_BN, lengths_B, rewards_B, gamma=1.0, gae_lambda=1.0)
    for b, length in enumerate(lengths_B.tolist()):
        expected = rewards_B[b] - values_BN[b, :length]
        assert torch.allclose(advantages_BN[b, :length], expected, atol=1e-6)
        assert torch.allclose(returns_BN[b, :length], rewards_B[b].expand(length), atol=1e-6)
        assert not advantages_BN[b, length:].any() and not returns_BN[b, length:].any()


def test_gae_with_lambda_zero_looks_one_model_token_ahead():
    values_BN = torch.tensor([[0.5, 0.25, 1.0]])
    advantages_BN, _ = gae(values_BN, torch.tensor([3]), torch.tensor([0.0]), gamma=0.8, gae_lambda=0.0)
    assert advantages_BN[0].tolist() == pytest.approx([0.8 * 0.25 - 0.5, 0.8 * 1.0 - 0.25, 0.0 - 1.0])


def test_whitening_leaves_equal_values_at_zero():
    assert whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    assert whiten(torch.full((4,), 0.1)).abs().max().item() < 1e-6
