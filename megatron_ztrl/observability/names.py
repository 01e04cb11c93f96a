"""The keys of ``metrics.jsonl``. Every row also has ``step``, ``split`` and ``wall_seconds``.

Rows of the split ``eval`` also have ``env_iterations`` (N) and, per data set, ``eval/<data set>/<measure>``.
"""

from __future__ import annotations

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"

STEP = "step"
"""Optimizer steps behind the policy that this row speaks of."""
SPLIT = "split"
ENV_ITERATIONS = "env_iterations"
WALL_SECONDS = "wall_seconds"
"""Since training began; start-up and interruptions left out."""
TRAIN = "train"
EVAL = "eval"

# Measures of a set of rollouts: means over its trainable rollouts.
ACCURACY = "accuracy"
CODE_PROPORTION = "code_proportion"
"""Share of rollouts with at least one executed call."""
CODE_RATIO = "code_ratio"
"""Executed calls per rollout."""
WRITTEN_CALLS = "written_calls"
"""Code blocks per rollout, executed or not."""
RESPONSE_TOKENS = "response_tokens"
MEASURES = (ACCURACY, CODE_PROPORTION, CODE_RATIO, WRITTEN_CALLS, RESPONSE_TOKENS)

TRAIN_ACCURACY = "train/accuracy"
TRAIN_REWARD = "train/reward"
TRAIN_CODE_PROPORTION = "train/code_proportion"
TRAIN_CODE_RATIO = "train/code_ratio"
TRAIN_WRITTEN_CALLS = "train/written_calls"
TRAIN_RESPONSE_TOKENS = "train/response_tokens"
TRAIN_TRUNCATED = "train/truncated"
"""Share of rollouts that ended for want of tokens."""
TRAIN_GROUPS_KEPT = "train/groups_kept"
TRAIN_GROUPS_DROPPED = "train/groups_dropped"
TRAIN_STALENESS_MAX = "train/staleness_max"

LOSS_POLICY = "loss/policy"
LOSS_ENTROPY = "loss/entropy"
LOSS_CLIP_FRACTION = "loss/clip_fraction"
LOSS_APPROX_KL = "loss/approx_kl"
LOSS_GRAD_NORM = "loss/grad_norm"
LOSS_LEARNING_RATE = "loss/learning_rate"
LOSS_LOGPROB_GAP = "loss/logprob_gap"
"""Largest difference between trainer and engine at the sampled tokens, in nats."""
LOSS_REFERENCE_KL = "loss/reference_kl"
"""KL(policy || first policy), in nats per token; where the loss has that term."""

CRITIC_LOSS = "critic/loss"
CRITIC_VALUE = "critic/value"
CRITIC_RETURN = "critic/return"
CRITIC_EXPLAINED_VARIANCE = "critic/explained_variance"
"""Of the returns, by the values that the advantages were computed with: 1 is all, 0 no better than a constant."""

TIME_STEP = "time/step_seconds"
TIME_GENERATE = "time/generate_seconds"
TIME_TOOLS = "time/tools_seconds"
TIME_LOGPROBS = "time/logprobs_seconds"
TIME_TRAIN = "time/train_seconds"
TIME_PUBLISH = "time/publish_seconds"
TIME_OTHER = "time/other_seconds"
TIME_PHASES = (TIME_GENERATE, TIME_TOOLS, TIME_LOGPROBS, TIME_TRAIN, TIME_PUBLISH, TIME_OTHER)
"""Shares of a step, in the order they happen."""

THROUGHPUT_TOKENS = "throughput/tokens_per_second"
THROUGHPUT_SAMPLES = "throughput/samples_per_second"


def train_key(measure: str) -> str:
    """The key of one of `MEASURES` in a row of the split ``train``."""
    return f"train/{measure}"


def eval_key(dataset: str, measure: str) -> str:
    """The key of one of `MEASURES` in a row of the split ``eval``."""
    return f"eval/{dataset}/{measure}"
