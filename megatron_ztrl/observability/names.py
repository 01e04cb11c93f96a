"""The keys of ``metrics.jsonl`` that the code reads again; docs/metrics.md explains all that are written.

Every row also has ``step``, ``split`` and ``wall_seconds``; rows of the split ``eval`` have ``env_iterations`` (N) and,
per data set, ``eval/<data set>/<measure>``.
"""

from __future__ import annotations

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
FINISHED_FILE = "finished"
"""The last step of a run that has also evaluated and exported its last policy."""

STEP = "step"
"""Training steps behind the policy that this row speaks of."""
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
LOSS_REFERENCE_KL = "loss/reference_kl"
"""KL(policy || first policy), in nats per token; where the loss has that term."""

# |trainer - engine| log-prob at the trained tokens, in nats; the trainer's at the start of the step.
MISMATCH = "mismatch"
"""At tokens that the trainer's own weights sampled: what is left is a difference of implementations."""
STALENESS = "staleness"
"""At tokens that older weights sampled: the policy has moved as well."""
GAP_MEAN = "gap_mean"
GAP_P99 = "gap_p99"
GAP_MAX = "gap_max"
GAP_KL = "kl"
"""The k3 estimate of KL(engine || trainer), in nats per token."""
PLACES = ("turn_1", "turn_2", "turn_3_on", "after_reply", "past_reply")
"""Where in a rollout: by turn; and of turns past the first, the first 8 model tokens after the tool reply, and the
later ones. Means there are ``mismatch/gap_<place>``, ``staleness/gap_<place>`` and ``importance/cut_<place>``."""
MISMATCH_MEAN = f"{MISMATCH}/{GAP_MEAN}"
MISMATCH_ALARM = f"{MISMATCH}/alarm"
"""1 in a step whose mean gap is above ``algorithm.mismatch_alarm``, else 0; left out where no token was fresh."""
STALENESS_SHARE = f"{STALENESS}/share"
"""Share of trained tokens that older weights sampled."""

IMPORTANCE_MEAN = "importance/weight_mean"
IMPORTANCE_LARGEST = "importance/weight_max"
"""Before it was truncated or masked; e^20 stands for anything above."""
IMPORTANCE_CUT = "importance/cut"
"""Share of trained tokens whose weight was truncated or masked."""
IMPORTANCE_EFFECTIVE = "importance/effective_share"
"""Effective sample size of the weighted tokens, as a share of their number: 1 when all weigh the same."""

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
TIME_EVALUATION = "time/evaluation_seconds"
"""The part of ``other`` in which the publish waited for an evaluation beside training."""
TIME_PHASES = (TIME_GENERATE, TIME_TOOLS, TIME_LOGPROBS, TIME_TRAIN, TIME_PUBLISH, TIME_OTHER)
"""Shares of a step, in the order they happen."""

EVAL_OLDEST_VERSION = "eval/oldest_version"
EVAL_NEWEST_VERSION = "eval/newest_version"
"""The policies that sampled an evaluation's tokens; both are its step unless it ran beside training for longer."""

THROUGHPUT_TOKENS = "throughput/tokens_per_second"
THROUGHPUT_SAMPLES = "throughput/samples_per_second"


def train_key(measure: str) -> str:
    """The key of one of `MEASURES` in a row of the split ``train``."""
    return f"train/{measure}"


def eval_key(dataset: str, measure: str) -> str:
    """The key of one of `MEASURES` in a row of the split ``eval``."""
    return f"eval/{dataset}/{measure}"


def gap_key(group: str, measure: str) -> str:
    """The key of a ``GAP_*`` measure of the tokens in `MISMATCH` or `STALENESS`."""
    return f"{group}/{measure}"
