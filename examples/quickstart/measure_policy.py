"""Measures a policy of the quickstart in one process: `python measure_policy.py base`.

A quick look without engine, sandbox or Ray: all prompts are decoded in lockstep, and calls are limited to the
arithmetic that this file can evaluate by itself. `megatron_ztrl eval` is the real thing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from corpus import format_prompt, format_reply
from problems import ArithmeticProblem, Split, sample_problems
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from megatron_ztrl.observability.console import print_whole

CALL = re.compile(r"```python\n(.*?)```", re.DOTALL)
ARITHMETIC = re.compile(r"print\(([\d+\-* ]{1,40})\)\s*")
BOXED = re.compile(r"\\boxed\{([^}]*)\}")


@dataclass
class Attempt:
    """One response: the four lists of a rollout, less the weight versions."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    executed_calls: int = 0
    finished: bool = False
    pending: list[int] = field(default_factory=list)
    """Tokens of a tool reply that are still to be fed."""
    code_start: int = 0
    """Where the text that may hold the next call begins, in response tokens."""


def run_arithmetic(code: str) -> str:
    """Evaluates ``print(<integers and + - *>)``; everything else is an error."""
    match = ARITHMETIC.fullmatch(code)
    if match is None or "**" in match[1]:
        return "Error"
    try:
        return str(eval(match[1], {"__builtins__": {}}))
    except SyntaxError:
        return "Error"


def append_token(
    attempt: Attempt, token: int, logprob: float, tokenizer: PreTrainedTokenizerBase, env_iterations: int
) -> None:
    """Appends a sampled token, and runs the call that it completes."""
    attempt.token_ids.append(token)
    attempt.logprobs.append(logprob)
    attempt.loss_mask.append(True)
    if token == tokenizer.eos_token_id:
        attempt.finished = True
    elif token == tokenizer.convert_tokens_to_ids("```") and attempt.executed_calls < env_iterations:
        call = CALL.search(tokenizer.decode(attempt.token_ids[attempt.code_start :]))
        if call is not None:
            reply = format_reply(run_arithmetic(call[1]))
            attempt.pending = tokenizer(reply, add_special_tokens=False).input_ids
            attempt.executed_calls += 1
            attempt.code_start = len(attempt.token_ids) + len(attempt.pending)


@torch.no_grad()
def sample_attempts(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    env_iterations: int,
    max_response_tokens: int = 112,
    greedy: bool = False,
) -> list[Attempt]:
    """Decodes one response per prompt at temperature 1, token in, token out."""
    attempts = [Attempt(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
    longest = max(len(attempt.prompt_ids) for attempt in attempts)
    input_ids = torch.zeros(len(attempts), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, attempt in enumerate(attempts):  # left padding: every row's next token has the same index
        input_ids[row, longest - len(attempt.prompt_ids) :] = torch.tensor(attempt.prompt_ids)
        mask[row, longest - len(attempt.prompt_ids) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    for _ in range(max_response_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logprobs = output.logits[:, -1].log_softmax(-1)
        sampled = logprobs.argmax(-1, keepdim=True) if greedy else logprobs.exp().multinomial(1)
        sampled_logprobs = logprobs.gather(1, sampled)
        for attempt, token, logprob in zip(
            attempts, sampled[:, 0].tolist(), sampled_logprobs[:, 0].tolist(), strict=True
        ):
            if attempt.pending:
                attempt.token_ids.append(attempt.pending.pop(0))
                attempt.logprobs.append(0.0)
                attempt.loss_mask.append(False)
            elif not attempt.finished:
                append_token(attempt, token, logprob, tokenizer, env_iterations)
        if all(attempt.finished for attempt in attempts):
            break
        input_ids = torch.tensor([[attempt.token_ids[-1]] for attempt in attempts])
        mask = torch.cat([mask, torch.ones(len(attempts), 1, dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
    return attempts


def is_correct(attempt: Attempt, problem: ArithmeticProblem, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Ended by itself, with the right number in its last box."""
    boxed = BOXED.findall(tokenizer.decode(attempt.token_ids, skip_special_tokens=True))
    return attempt.finished and bool(boxed) and boxed[-1] == problem.answer


def measure(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[ArithmeticProblem],
    env_iterations: int,
    greedy: bool = False,
) -> dict[str, float]:
    """Accuracy and use of code over one attempt per problem; shares lie in [0, 1], nan if of nothing."""
    prompts = [format_prompt(problem.question) for problem in problems]
    attempts = sample_attempts(model, tokenizer, prompts, env_iterations, greedy=greedy)
    correct = [is_correct(a, p, tokenizer) for a, p in zip(attempts, problems, strict=True)]
    written = [tokenizer.decode(attempt.token_ids).count("```python") for attempt in attempts]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else float("nan")

    return {
        "accuracy": mean(correct),
        "code written": mean([count > 0 for count in written]),
        "code executed": mean([attempt.executed_calls > 0 for attempt in attempts]),
        "calls executed": mean([attempt.executed_calls for attempt in attempts]),
        "accuracy given code": mean([c for c, count in zip(correct, written, strict=True) if count]),
        "accuracy without code": mean([c for c, count in zip(correct, written, strict=True) if not count]),
        "tokens": mean([len(attempt.token_ids) for attempt in attempts]),
    }


def print_measurement(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, console: Console, num_problems: int = 1024
) -> None:
    """Prints one row per number of env iterations, on problems of the evaluation split."""
    problems = list(sample_problems(Split.EVAL, num_problems))
    rows = [(f"N = {n}", measure(model, tokenizer, problems, n)) for n in (0, 1, 2, 4)]
    rows.append(("N = 4, greedy", measure(model, tokenizer, problems, 4, greedy=True)))
    table = Table("", *rows[0][1], title=f"{num_problems} evaluation problems, temperature 1")
    for label, shares in rows:
        table.add_row(label, *(f"{value:.3f}" for value in shares.values()))
    print_whole(console, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=Path, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.policy / "config.json").is_file():
        parser.error(f"{arguments.policy} is no checkpoint: it has no config.json")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the matrices are too small to share
    tokenizer = AutoTokenizer.from_pretrained(arguments.policy)
    model = Qwen2ForCausalLM.from_pretrained(arguments.policy, dtype=torch.float32).eval()
    print_measurement(model, tokenizer, Console())


if __name__ == "__main__":
    main()
