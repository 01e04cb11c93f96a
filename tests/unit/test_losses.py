"""The losses of policy and critic, against numbers worked out by hand."""

import math

import pytest
import torch

from megatron_ztrl.algorithms.losses import kl_penalty, ppo_clip_loss, value_loss


def _log(*ratios: float) -> torch.Tensor:
    return torch.tensor([math.log(r) for r in ratios])


def test_loss_takes_the_smaller_of_clipped_and_unclipped_objective_per_token():
    # ratio 1.5, A=+2: min(3.0, 1.28 * 2) = 2.56   clipped
    # ratio 1.5, A=-1: min(-1.5, -1.28)   = -1.5   not clipped
    # ratio 0.5, A=+1: min(0.5, 0.8)      = 0.5    not clipped
    # ratio 0.5, A=-3: min(-1.5, -2.4)    = -2.4   clipped
    loss = ppo_clip_loss(
        _log(1.5, 1.5, 0.5, 0.5),
        torch.zeros(4),
        torch.tensor([2.0, -1.0, 1.0, -3.0]),
        torch.ones(4, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.28,
    )
    assert loss.loss_sum.item() == pytest.approx(-(2.56 - 1.5 + 0.5 - 2.4), abs=1e-6)
    assert loss.clipped_sum.item() == 2.0
    assert loss.ratio_sum.item() == pytest.approx(4.0, abs=1e-6)
    # k3 = r - 1 - log r: twice 0.5 - log 1.5, twice -0.5 + log 2
    assert loss.kl_sum.item() == pytest.approx(2 * (0.5 - math.log(1.5)) + 2 * (math.log(2) - 0.5), abs=1e-6)


def test_gradient_on_policy_is_minus_the_advantage_and_zero_where_clipped_or_masked():
    logp_T = _log(1.0, 1.0, 2.0, 1.0).requires_grad_()
    loss = ppo_clip_loss(
        logp_T,
        torch.zeros(4),
        torch.tensor([0.7, -0.3, 1.0, 5.0]),
        torch.tensor([True, True, True, False]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.loss_sum.backward()
    assert torch.allclose(logp_T.grad, torch.tensor([-0.7, 0.3, 0.0, 0.0]))
    assert not loss.kl_sum.requires_grad
    assert not loss.ratio_sum.requires_grad


def test_masked_tokens_may_hold_anything():
    logp_T = torch.tensor([0.0, -math.inf, math.nan, 400.0], requires_grad=True)
    loss = ppo_clip_loss(
        logp_T,
        torch.tensor([0.0, -math.inf, 1.0, 0.0]),
        torch.tensor([1.0, math.nan, math.inf, 1.0]),
        torch.tensor([True, False, False, False]),
        clip_low=0.2,
        clip_high=0.2,
    )
    loss.loss_sum.backward()
    assert (loss.loss_sum.item(), loss.clipped_sum.item(), loss.kl_sum.item(), loss.ratio_sum.item()) == (
        -1,
        0,
        0,
        1,
    )
    assert logp_T.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]


def test_an_empty_microbatch_gives_zero_sums_that_can_be_differentiated():
    logp_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    mask_T = torch.zeros(2, dtype=torch.bool)
    loss = ppo_clip_loss(logp_T, torch.zeros(2), torch.ones(2), mask_T, clip_low=0.2, clip_high=0.2)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0.0
    assert logp_T.grad.tolist() == [0.0, 0.0]


def test_importance_weights_multiply_the_loss_and_nothing_else():
    # As above, 2.56, -1.5, 0.5 and -2.4, now weighted 0.5, 2, 0 and 1.
    weighted, plain = (
        ppo_clip_loss(
            _log(1.5, 1.5, 0.5, 0.5),
            torch.zeros(4),
            torch.tensor([2.0, -1.0, 1.0, -3.0]),
            torch.ones(4, dtype=torch.bool),
            clip_low=0.2,
            clip_high=0.28,
            weights_T=weights_T,
        )
        for weights_T in (torch.tensor([0.5, 2.0, 0.0, 1.0]), None)
    )
    assert weighted.loss_sum.item() == pytest.approx(-(1.28 - 3.0 - 2.4), abs=1e-6)
    for name in ("clipped_sum", "kl_sum", "ratio_sum"):
        assert getattr(weighted, name).item() == getattr(plain, name).item()


def test_a_token_of_weight_zero_has_no_gradient_and_an_untrained_one_may_have_any_weight():
    logp_T = torch.zeros(4, requires_grad=True)
    weights_T = torch.tensor([0.5, 0.0, 1.0, math.nan])
    loss = ppo_clip_loss(
        logp_T,
        torch.zeros(4),
        torch.tensor([0.7, -0.3, 1.0, 5.0]),
        torch.tensor([True, True, True, False]),
        clip_low=0.2,
        clip_high=0.2,
        weights_T=weights_T,
    )
    loss.loss_sum.backward()
    assert logp_T.grad.tolist() == pytest.approx([-0.35, 0.0, -1.0, 0.0])


def test_value_loss_takes_the_larger_of_plain_and_clipped_error():
    # old 0, clip 0.2. value 0.5, return 1: plain .25, clipped (0.2 - 1)^2 = .64 -> clipped, no gradient.
    # value 0.5, return 0: plain .25, clipped .04 -> plain. value 0.1, return 1: both .81.
    value_N = torch.tensor([0.5, 0.5, 0.1], requires_grad=True)
    loss = value_loss(value_N, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), value_clip=0.2)
    assert loss.loss_sum.item() == pytest.approx(0.5 * (0.64 + 0.25 + 0.81))
    assert loss.clipped_sum.item() == 1.0
    assert loss.squared_error_sum.item() == pytest.approx(0.25 + 0.25 + 0.81)
    loss.loss_sum.backward()
    assert value_N.grad.tolist() == pytest.approx([0.0, 0.5, -0.9])


def test_value_loss_without_clip_is_half_the_squared_error():
    value_N = torch.tensor([0.5, -3.0])
    loss = value_loss(value_N, torch.zeros(2), torch.ones(2), value_clip=None)
    assert loss.loss_sum.item() == pytest.approx(0.5 * (0.25 + 16.0))
    assert loss.clipped_sum.item() == 0.0


def test_kl_penalty_is_the_k3_estimate_and_pulls_towards_the_reference():
    logp_N = _log(0.5, 0.25).requires_grad_()
    # r = reference / policy = 1/2 and 2: r - 1 - log r.
    kl = kl_penalty(logp_N, _log(0.25, 0.5))
    assert kl.item() == pytest.approx((0.5 - 1 + math.log(2)) + (2 - 1 - math.log(2)))
    kl.backward()
    assert logp_N.grad.tolist() == pytest.approx([0.5, -1.0])  # 1 - r
    assert kl_penalty(logp_N, logp_N.detach()).item() == 0.0
