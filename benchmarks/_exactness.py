"""Whether interrupted rollouts are what the server returned, token for token, and what Hugging Face computes.

A rollout is made again from the server's replies and from where its turns end, and compared.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from _interrupted_rollouts import Call, Publish, Record
from _sending_trainer import Policies

from megatron_ztrl.rollout.trajectory import Tokenizer
from megatron_ztrl.types import NOT_SAMPLED, Rollout, Turn

CLOSED_BLOCK = re.compile(r"```python.*?```", re.DOTALL)
MAX_GAP = 1e-4
"""Nats, float32."""
BATCH = 64
NEIGHBOUR_STRIDE = 20
"""Every so many versions, log-probs are also computed under the next one."""


@dataclass(kw_only=True)
class Findings:
    """Tokens, all rollouts together."""

    returned: int = 0
    """By the server."""
    cut: int = 0
    """Of those, sampled past the end of a code block and rightly dropped."""
    lost: int = 0
    """Of those, in no rollout for no such reason."""
    kept: int = 0
    """Model tokens that came from the server once."""
    duplicated: int = 0
    """Positions that two replies filled, or none."""
    wrong_tokens: int = 0
    """Another id, or another log-prob, than the server's."""
    wrong_masks: int = 0
    wrong_versions: int = 0
    """Not the server's, older than the token before it, or not published at that time."""
    spans: list[int] = field(default_factory=list)
    """Weight versions of each rollout."""

    @property
    def exact(self) -> bool:
        """Nothing is wrong; says nothing about log-probs."""
        wrong = self.lost + self.duplicated + self.wrong_tokens + self.wrong_masks + self.wrong_versions
        return wrong == 0 and self.kept == self.returned - self.cut > 0


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Differences of log-probs, in nats."""

    largest: float
    """Between engine and Hugging Face under each token's own version."""
    over_limit: int
    """Tokens above ``MAX_GAP``."""
    neighbour_median: float
    """Between a token's own version and the next one, by Hugging Face: what a wrong version would show as."""
    neighbour_told_apart: float
    """Share of tokens whose neighbour gap is above ``MAX_GAP``."""


def check_record(record: Record, tokenizer: Tokenizer) -> Findings:
    """Account for every token."""
    findings = Findings()
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in record.calls:
        calls[call.rollout_id].append(call)
    windows = _windows(record.publishes)
    for rollout in record.rollouts:
        check_rollout(rollout, calls.pop(rollout.rollout_id, []), windows, tokenizer, findings)
    findings.lost += sum(len(call.token_ids) for left in calls.values() for call in left)
    return findings


def check_rollout(
    rollout: Rollout,
    calls: Sequence[Call],
    windows: dict[int, tuple[float, float]],
    tokenizer: Tokenizer,
    findings: Findings,
) -> None:
    """Make one rollout again from its calls and compare; adds to ``findings``.

    Args:
        rollout: Finished.
        calls: The server's replies to it.
        windows: When each version may have been served, first and last second.
        tokenizer: Of the policy.
        findings: Added to.
    """
    size = len(rollout.token_ids)
    filled = [0] * size
    expected: list[tuple[int, float, int]] = [(-1, 0.0, NOT_SAMPLED)] * size
    for call in calls:
        start = len(call.input_ids) - len(rollout.prompt_ids)
        end = start + len(call.token_ids)
        turn = next((t for t in rollout.turns if t.start <= start < t.tool_start), None)
        stop = min(end, turn.tool_start if turn else start)
        findings.returned += len(call.token_ids)
        if end > stop:
            legitimate = turn is not None and ends_a_block(rollout, turn, tokenizer)
            findings.cut += (end - stop) * legitimate
            findings.lost += (end - stop) * (not legitimate)
        if call.input_ids != rollout.prompt_ids + rollout.token_ids[:start]:
            findings.wrong_tokens += 1
        versions = _versions(call, windows)
        for position in range(start, stop):
            filled[position] += 1
            offset = position - start
            expected[position] = (call.token_ids[offset], call.logprobs[offset], versions[offset])
    _compare(rollout, filled, expected, findings)


def _compare(
    rollout: Rollout, filled: Sequence[int], expected: Sequence[tuple[int, float, int]], findings: Findings
) -> None:
    model = [False] * len(rollout.token_ids)
    for turn in rollout.turns:
        model[turn.start : turn.tool_start] = [True] * (turn.tool_start - turn.start)
    newest = 0
    for position, is_model in enumerate(model):
        found = (
            rollout.token_ids[position],
            rollout.logprobs[position],
            rollout.weight_versions[position],
        )
        findings.wrong_masks += rollout.loss_mask[position] != is_model
        if is_model:
            findings.kept += filled[position] == 1
            findings.duplicated += filled[position] != 1
            findings.wrong_tokens += found[:2] != expected[position][:2]
            findings.wrong_versions += found[2] != expected[position][2] or found[2] < newest
            newest = max(newest, found[2])
        else:
            findings.wrong_masks += found[1:] != (0.0, NOT_SAMPLED)
    findings.spans.append(len({v for v in rollout.weight_versions if v != NOT_SAMPLED}))


def ends_a_block(rollout: Rollout, turn: Turn, tokenizer: Tokenizer) -> bool:
    """Whether a code block closes in the last token that the turn has kept, and not before."""

    def closed(end: int) -> bool:
        return CLOSED_BLOCK.search(tokenizer.decode(rollout.token_ids[turn.start : end])) is not None

    return closed(turn.tool_start) and not closed(turn.tool_start - 1)


def _versions(call: Call, windows: dict[int, tuple[float, float]]) -> list[int]:
    """Version of each token of a call, or an impossible one where the server's word cannot be true."""
    versions = [-2] * len(call.token_ids)
    for version, start, end in call.spans:
        first, last = windows.get(version, (float("inf"), 0.0))
        if first <= call.returned_seconds and last >= call.sent_seconds:
            versions[start:end] = [version] * (end - start)
    return versions


def _windows(publishes: Sequence[Publish]) -> dict[int, tuple[float, float]]:
    """From the beginning of a version's publish to the end of the next one's."""
    ends = [publish.ended_seconds for publish in publishes[1:]] + [float("inf")]
    return {p.version: (p.began_seconds, end) for p, end in zip(publishes, ends, strict=True)}


@torch.no_grad()
def check_logprobs(rollouts: Sequence[Rollout], policies: Policies, temperature: float) -> Gaps:
    """Compute every model token's log-prob again, under its own version and all that precedes it."""
    by_version: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        for version in set(rollout.weight_versions) - {NOT_SAMPLED}:
            by_version[version].append(rollout)
    gaps: list[torch.Tensor] = []
    neighbour: list[torch.Tensor] = []
    for version, held in sorted(by_version.items()):
        for batch in _batches(held, version):
            logp_T = _logprobs(policies, version, batch, version, temperature)
            engine_T = torch.tensor([lp for r in batch for lp, v in _tokens(r) if v == version])
            gaps.append((logp_T - engine_T).abs())
            if version % NEIGHBOUR_STRIDE == 1:
                neighbour.append(
                    (_logprobs(policies, version + 1, batch, version, temperature) - logp_T).abs()
                )
    gap_T, neighbour_T = torch.cat(gaps), torch.cat(neighbour)
    return Gaps(
        largest=gap_T.max().item(),
        over_limit=int((~(gap_T <= MAX_GAP)).sum()),
        neighbour_median=neighbour_T.median().item(),
        neighbour_told_apart=(neighbour_T > MAX_GAP).float().mean().item(),
    )


def _tokens(rollout: Rollout) -> Iterator[tuple[float, int]]:
    return zip(rollout.logprobs, rollout.weight_versions, strict=True)


def _batches(rollouts: Sequence[Rollout], version: int) -> Iterator[list[Rollout]]:
    """Rollouts of similar length."""
    ordered = sorted(rollouts, key=lambda rollout: _last(rollout, version))
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]


def _last(rollout: Rollout, version: int) -> int:
    """Length of the sequence that ends with the last token of a version."""
    end = len(rollout.weight_versions) - rollout.weight_versions[::-1].index(version)
    return len(rollout.prompt_ids) + end


def _logprobs(
    policies: Policies, under: int, batch: Sequence[Rollout], of: int, temperature: float
) -> torch.Tensor:
    """Log-probs, under one version, of the tokens that version ``of`` sampled, rollout after rollout: [T]."""
    longest = max(_last(rollout, of) for rollout in batch)
    ids_BL = torch.zeros(len(batch), longest, dtype=torch.long)
    mine_BL = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, rollout in enumerate(batch):
        length, prompt = _last(rollout, of), len(rollout.prompt_ids)
        ids_BL[row, :length] = torch.tensor((rollout.prompt_ids + rollout.token_ids)[:length])
        sampled = [version == of for version in rollout.weight_versions]
        mine_BL[row, prompt:length] = torch.tensor(sampled[: length - prompt])
    # Padding is on the right: under causal attention nothing sees it.
    logp_BLV = (policies.model(under)(ids_BL[:, :-1]).logits / temperature).log_softmax(-1)
    return logp_BLV.gather(2, ids_BL[:, 1:, None])[..., 0][mine_BL[:, 1:]]
