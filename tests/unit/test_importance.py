"""Importance weights and the gap between trainer and engine, against hand calculations and plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_ztrl.algorithms.importance import (
    correction_of,
    effective_share,
    importance_ratios,
    importance_weights,
    turns_and_positions,
)
from megatron_ztrl.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_ztrl.data.mismatch import (
    SampledTokens,
    gap_statistics,
    importance_statistics,
    mismatch_warning,
)
from megatron_ztrl.observability.names import PLACES
from megatron_ztrl.types import NOT_SAMPLED, TrainingSample

LEVELS = ("token", "sequence", "geometric")


def _log(*values: float) -> np.ndarray:
    return np.log(np.array(values))


def _config(*, dtype: str = "float32", max_staleness: int = 0, **algorithm: str) -> Config:
    return Config(
        run=RunConfig(directory="none"),
        model=ModelConfig(path="none", dtype=dtype),
        data=DataConfig(train=DatasetConfig(name="none", path="none")),
        train=TrainConfig(num_steps=1),
        rollout=RolloutConfig(max_staleness=max_staleness),
        algorithm=AlgorithmConfig(**algorithm),
    )


def test_the_ratio_is_proximal_over_behaviour_of_a_token_or_of_its_response():
    # Two responses of two tokens and one, an empty one between them.
    proximal_N, behaviour_N = _log(0.6, 0.2, 0.9), _log(0.3, 0.4, 0.3)
    ratios = {level: importance_ratios(proximal_N, behaviour_N, [2, 0, 1], level) for level in LEVELS}
    assert ratios["token"] == pytest.approx([2.0, 0.5, 3.0])
    assert ratios["sequence"] == pytest.approx([1.0, 1.0, 3.0])
    assert ratios["geometric"] == pytest.approx([1.0, 1.0, 3.0])
    three = importance_ratios(_log(0.8, 0.5, 0.4), _log(0.4, 0.25, 0.2), [3], "sequence")
    assert three == pytest.approx([8.0, 8.0, 8.0])
    assert importance_ratios(_log(0.8, 0.5, 0.4), _log(0.4, 0.25, 0.2), [3], "geometric") == pytest.approx(
        [2.0, 2.0, 2.0]
    )


def test_truncating_lowers_what_is_above_the_cap_and_masking_drops_what_is_outside_the_bounds():
    ratio_N = np.array([0.1, 0.5, 1.0, 2.0, 2.1])
    assert importance_weights(ratio_N, "truncate", cap=2.0, floor=0.5).tolist() == [0.1, 0.5, 1.0, 2.0, 2.0]
    assert importance_weights(ratio_N, "mask", cap=2.0, floor=0.5).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]


def test_a_product_over_a_long_response_stays_finite():
    ratio_N = importance_ratios(np.zeros(9000), np.full(9000, -1.0), [9000], "sequence")
    assert np.isfinite(ratio_N).all() and ratio_N[0] == pytest.approx(math.exp(20))
    assert importance_weights(ratio_N, "mask", cap=2.0, floor=0.5).sum() == 0.0
    vanished_N = importance_ratios(np.full(9000, -1.0), np.zeros(9000), [9000], "sequence")
    assert vanished_N.tolist() == [0.0] * 9000


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_weights_equal_a_plain_loop_over_responses(level: str, correction: str):
    random = np.random.default_rng(3)
    lengths = [5, 0, 1, 40, 17, *[2] * 12]
    proximal = [-random.exponential(1.0, n) for n in lengths]
    behaviour = [p + random.normal(0, 0.4, p.size) for p in proximal]
    expected = []
    for p, b in zip(proximal, behaviour, strict=True):
        ratios = [math.exp(x) / math.exp(y) for x, y in zip(p, b, strict=True)]
        if level == "sequence":
            ratios = [math.prod(ratios)] * len(ratios)
        if level == "geometric" and ratios:
            ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
        for ratio in ratios:
            if correction == "truncate":
                expected.append(1.3 if ratio > 1.3 else ratio)
            else:
                expected.append(ratio if 0.8 <= ratio <= 1.3 else 0.0)
    ratio_N = importance_ratios(np.concatenate(proximal), np.concatenate(behaviour), lengths, level)
    found = importance_weights(ratio_N, correction, cap=1.3, floor=0.8)
    assert found == pytest.approx(expected, rel=1e-12)
    assert len(set(np.round(expected, 9))) > 2  # the bounds are at work, and not on everything


def test_the_product_makes_an_expectation_under_the_engine_one_under_the_trainer():
    """Exact, over all responses of two tokens; the geometric mean does not."""
    random = np.random.default_rng(0)
    trainer, engine = random.dirichlet([1] * 3, 2), random.dirichlet([1] * 3, 2)  # [2 tokens, 3 words]
    reward = random.normal(size=(3, 3))
    expectation = dict.fromkeys(LEVELS, 0.0)
    wanted = 0.0
    for first, second in itertools.product(range(3), repeat=2):
        proximal_N = np.log([trainer[0, first], trainer[1, second]])
        behaviour_N = np.log([engine[0, first], engine[1, second]])
        wanted += math.exp(proximal_N.sum()) * reward[first, second]
        for level in LEVELS:
            weight = importance_ratios(proximal_N, behaviour_N, [2], level)[0]
            expectation[level] += math.exp(behaviour_N.sum()) * weight * reward[first, second]
    assert expectation["sequence"] == pytest.approx(wanted, rel=1e-12)
    assert expectation["geometric"] != pytest.approx(wanted, rel=1e-3)


def test_effective_share_counts_equally_weighted_tokens():
    assert effective_share(np.array([0.7, 0.7, 0.7])) == pytest.approx(1.0)
    assert effective_share(np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)
    assert effective_share(np.array([3.0, 1.0])) == pytest.approx(16 / 10 / 2)
    assert effective_share(np.zeros(3)) == 0.0


def test_turns_begin_after_the_gaps_of_the_loss_mask():
    #                             prompt   turn 1   reply turn 2    reply  turn 3, and a reply that ends it
    turn_N, position_N = turns_and_positions(np.array([0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0], dtype=bool))
    assert turn_N.tolist() == [1, 1, 1, 2, 2, 3]
    assert position_N.tolist() == [0, 1, 2, 0, 1, 0]
    assert [part.tolist() for part in turns_and_positions(np.zeros(3, dtype=bool))] == [[], []]
    assert turns_and_positions(np.ones(2, dtype=bool))[0].tolist() == [1, 1]  # no prompt


@pytest.mark.parametrize(
    ("settings", "correction"),
    [
        ({}, "none"),
        ({"max_staleness": 1}, "truncate"),
        ({"dtype": "bfloat16"}, "truncate"),
        ({"max_staleness": 1, "old_logprobs": "engine"}, "none"),
        ({"max_staleness": 1, "importance_correction": "none"}, "none"),
        ({"importance_correction": "mask"}, "mask"),
    ],
)
def test_correction_is_on_where_trainer_and_engine_do_not_agree_exactly(settings, correction):
    assert correction_of(_config(**settings)) == correction


def _sample(mask: list[int], engine_logprob: float, versions: list[int]) -> TrainingSample:
    return TrainingSample(
        token_ids=[1] * len(mask),
        loss_mask=[bool(value) for value in mask],
        rollout_logprobs=[engine_logprob if value else 0.0 for value in mask],
        weight_versions=[v if m else NOT_SAMPLED for m, v in zip(mask, versions, strict=True)],
        reward=1.0,
        group_id=0,
    )


def test_fresh_tokens_show_the_mismatch_and_older_ones_the_staleness():
    samples = [
        _sample([0, 1, 1, 0, 1], -1.0, [0, 6, 6, 0, 7]),  # the second turn under newer weights
        _sample([0, 1], -2.0, [0, 7]),
    ]
    trainer = [np.array([-1.5, -0.9, -1.2]), np.array([-2.1])]
    found = gap_statistics(SampledTokens.of(samples, trainer, version=7))
    # Fresh: -0.2 in turn 2, and -0.1 in turn 1. Stale: -0.5 and +0.1, both in turn 1.
    assert found == pytest.approx(
        {
            "staleness/share": 0.5,
            "mismatch/gap_mean": 0.15,
            "mismatch/gap_p99": 0.1 + 0.99 * 0.1,
            "mismatch/gap_max": 0.2,
            "mismatch/kl": ((math.exp(-0.2) - 1 + 0.2) + (math.exp(-0.1) - 1 + 0.1)) / 2,
            "mismatch/gap_turn_1": 0.1,
            "mismatch/gap_turn_2": 0.2,
            "mismatch/gap_after_reply": 0.2,
            "staleness/gap_mean": 0.3,
            "staleness/gap_p99": 0.1 + 0.99 * 0.4,
            "staleness/gap_max": 0.5,
            "staleness/kl": ((math.exp(-0.5) - 1 + 0.5) + (math.exp(0.1) - 1 - 0.1)) / 2,
            "staleness/gap_turn_1": 0.3,
        },
        rel=1e-6,
    )


def test_the_first_eight_model_tokens_after_a_reply_stand_apart():
    mask = [0, 1, 0] + [1] * 10 + [0] + [1] * 9
    trainer = np.array([0.5] + [0.1] * 8 + [0.2] * 2 + [0.3] * 8 + [0.6])
    found = gap_statistics(SampledTokens.of([_sample(mask, 0.0, [3] * len(mask))], [trainer], version=3))
    assert {place: found[f"mismatch/gap_{place}"] for place in PLACES} == pytest.approx(
        {
            "turn_1": 0.5,
            "turn_2": (8 * 0.1 + 2 * 0.2) / 10,
            "turn_3_on": (8 * 0.3 + 0.6) / 9,
            "after_reply": (8 * 0.1 + 8 * 0.3) / 16,
            "past_reply": (2 * 0.2 + 0.6) / 3,
        }
    )
    assert not any(key.startswith("staleness/gap") for key in found)


def test_importance_statistics_speak_of_weights_before_and_after_the_cut():
    tokens = SampledTokens.of([_sample([0, 1, 1, 0, 1, 1], 0.0, [0] * 6)], [np.zeros(4)], version=0)
    ratio_N, weight_N = np.array([1.0, 5.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0, 1.0])
    assert importance_statistics(tokens, ratio_N, weight_N) == pytest.approx(
        {
            "importance/weight_mean": 1.25,
            "importance/weight_max": 5.0,
            "importance/cut": 0.25,
            "importance/effective_share": 25 / 7 / 4,
            "importance/cut_turn_1": 0.5,
            "importance/cut_turn_2": 0.0,
            "importance/cut_after_reply": 0.0,
        }
    )


def test_a_step_without_any_trained_token_has_no_statistics():
    tokens = SampledTokens.of([_sample([0, 0], 0.0, [0, 0])], [np.zeros(0)], version=0)
    assert gap_statistics(tokens) == {}
    assert importance_statistics(tokens, np.zeros(0), np.zeros(0)) == {}


def test_the_alarm_names_the_limit_and_where_the_gap_is():
    metrics = {"mismatch/gap_mean": 0.04, "mismatch/gap_turn_1": 0.001, "mismatch/gap_after_reply": 0.3}
    assert mismatch_warning(metrics, 0.05, step=3) is None
    warning = mismatch_warning(metrics, 0.03, step=3)
    assert warning is not None and "\n" not in warning
    assert "step 3: trainer and engine differ by 0.04 nats" in warning
    assert "algorithm.mismatch_alarm is 0.03" in warning
    assert "turn_1 0.001, after_reply 0.3" in warning
