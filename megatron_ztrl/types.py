"""The nouns of the project. Standard library only, so that every layer may import them.

Shapes: ``P`` prompt tokens, ``R`` response tokens (model and tool), ``L = P + R``, ``G`` rollouts of a group.
Log-probabilities are in nats, after temperature.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NOT_SAMPLED = -1
"""Weight version of a token that no policy sampled (a tool reply)."""


class FinishReason(enum.StrEnum):
    """Why one engine call ended."""

    STOP = "stop"  # a stop pattern or end-of-sequence
    LENGTH = "length"  # the token budget of the call
    ABORT = "abort"  # interrupted by us; the tokens so far are valid


class StopReason(enum.StrEnum):
    """Why a rollout ended."""

    STOP = "stop"
    LENGTH = "length"
    INFRASTRUCTURE = "infrastructure"  # executor unavailable: the rollout is masked, never scored as wrong
    DEADLINE = "deadline"  # out of wall-clock time: masked as well, see rollout.deadlines


class ExecutionStatus(enum.StrEnum):
    """What became of one snippet. Only ``SANDBOX_ERROR`` and ``REJECTED`` are the infrastructure's fault."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_TRUNCATED = "output_truncated"
    KILLED = "killed"
    REJECTED = "rejected"
    SANDBOX_ERROR = "sandbox_error"

    @property
    def is_infrastructure(self) -> bool:
        return self in (ExecutionStatus.SANDBOX_ERROR, ExecutionStatus.REJECTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One task."""

    prompt_id: str
    problem: str
    """The bare problem statement."""
    text: str
    """What the model reads: the problem inside the prompt template."""
    ground_truth: str
    data_source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Tokens ``[start, end)`` of one completion were sampled under weight version ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What one engine call returned."""

    token_ids: list[int]
    """[R] Includes the tokens of the stop pattern and end-of-sequence."""
    logprobs: list[float]
    """[R]"""
    finish_reason: FinishReason
    matched_stop: str | int | None
    """The stop pattern, or the id of the end-of-sequence token, that ended the call."""
    version_spans: list[VersionSpan]
    """Cover ``[0, R)`` without gaps."""
    cached_tokens: int
    """Prompt tokens whose KV the engine already had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionResult:
    """What the sandbox says of one snippet."""

    status: ExecutionStatus
    stdout: str
    stderr: str
    run_seconds: float
    queue_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Model tokens ``[start, tool_start)`` and the tool reply ``[tool_start, end)``, in response positions."""

    start: int
    tool_start: int
    end: int
    code: str | None = None
    result: ExecutionResult | None = None


@dataclass(kw_only=True, slots=True)
class Rollout:
    """All turns of one attempt at one prompt. The four per-token lists always have equal length."""

    rollout_id: str
    prompt: Prompt
    prompt_ids: list[int]
    """[P]"""
    token_ids: list[int] = field(default_factory=list)
    """[R]"""
    logprobs: list[float] = field(default_factory=list)
    """[R] 0.0 at tool tokens."""
    loss_mask: list[bool] = field(default_factory=list)
    """[R] True at the tokens the policy sampled, False at tool tokens."""
    weight_versions: list[int] = field(default_factory=list)
    """[R] ``NOT_SAMPLED`` at tool tokens."""
    turns: list[Turn] = field(default_factory=list)
    ended: bool = False
    """The policy has ended its response by itself (end of sequence)."""
    text: str = ""
    """The response, decoded."""
    stop_reason: StopReason | None = None
    """None while the rollout is in flight."""
    reward: float | None = None
    """None until the verifier has spoken."""
    generate_seconds: float = 0.0
    tool_seconds: float = 0.0

    @property
    def executed_calls(self) -> int:
        """Snippets that the sandbox really ran (the paper's code executions)."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def oldest_version(self) -> int:
        """The oldest weight version among the sampled tokens, of which there must be one."""
        return min(set(self.weight_versions) - {NOT_SAMPLED})

    @property
    def trainable(self) -> bool:
        """False for a rollout that the infrastructure failed: it counts in no loss and no statistic."""
        return self.stop_reason not in (StopReason.INFRASTRUCTURE, StopReason.DEADLINE)


@dataclass(kw_only=True, slots=True)
class RolloutGroup:
    """The sibling rollouts of one prompt."""

    group_id: int
    """Admission number: groups are trained in this order."""
    prompt: Prompt
    rollouts: list[Rollout]
    """[G]"""

    @property
    def accuracy(self) -> float:
        """Mean reward of the trainable rollouts."""
        rewards = [r.reward for r in self.rollouts if r.trainable and r.reward is not None]
        return sum(rewards) / len(rewards) if rewards else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSample:
    """One flat sequence, ready to pack."""

    token_ids: list[int]
    """[L] Prompt and response."""
    loss_mask: list[bool]
    """[L] True on the tokens to train; False on prompt and tool tokens."""
    rollout_logprobs: list[float]
    """[L] As the engine sampled them; 0.0 where ``loss_mask`` is False."""
    weight_versions: list[int]
    """[L] That sampled them; ``NOT_SAMPLED`` where ``loss_mask`` is False."""
    reward: float
    group_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSlice:
    """A block of a local parameter and the block of a Hugging Face tensor that it holds.

    ``param[start : start + length]`` along ``dim`` is ``tensor[tensor_start : tensor_start + length]`` along
    the same ``dim``; all other dimensions are whole. One Megatron rank, and one engine rank, is described by a
    list of these; their intersections are the reshard plan.
    """

    param: str
    tensor: str
    dim: int
    start: int
    tensor_start: int
    length: int
