"""Arithmetic problems for the quickstart: `python problems.py` writes data/train.jsonl and data/eval.jsonl.

Every problem contains exactly one product, ``a * b``, and the stable hash of that pair of factors alone
decides to which split the problem belongs. A pair of the evaluation problems therefore occurs nowhere else:
not in RL training, not in the corpus of the base policy, and not inside a longer problem of either.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DATA_DIRECTORY = Path(__file__).parent / "data"
TRAIN_PROBLEMS = 2048
EVAL_PROBLEMS = 256
SEED = 20250512


class Split(StrEnum):
    """Who may see a product."""

    CORPUS = "corpus"  # pre-training of the base policy
    TRAIN = "train"  # reinforcement learning
    EVAL = "eval"


@dataclass(frozen=True)
class Step:
    """One operation, as one call of Python would do it: ``eval(expression) == value``."""

    expression: str
    value: int


@dataclass(frozen=True)
class ArithmeticProblem:
    """``a * b``, or ``c + a * b``, or ``d + c + a * b``: as many steps as operations."""

    question: str
    """With the closing `` = ?``."""
    factors: tuple[int, int]
    steps: tuple[Step, ...]

    @property
    def answer(self) -> str:
        return str(self.steps[-1].value)


def split_of(factors: tuple[int, int]) -> Split:
    """One product in eight is for evaluation, two are for reinforcement learning, five for the corpus."""
    digest = hashlib.blake2b(f"{factors[0]}*{factors[1]}".encode(), digest_size=8).digest()
    match int.from_bytes(digest) % 8:
        case 0:
            return Split.EVAL
        case 1 | 2:
            return Split.TRAIN
        case _:
            return Split.CORPUS


def sample_factors(rng: random.Random) -> tuple[int, int]:
    """Draws both factors log-uniformly, so that products of four and of five digits are equally frequent.

    A small policy copies by relative position: with uniform factors it meets mostly five digits, and fails to
    copy four.
    """
    return int(10 ** rng.uniform(2, 3)), int(10 ** rng.uniform(math.log10(11), 2))


def sample_problem(rng: random.Random, split: Split, num_steps: int) -> ArithmeticProblem:
    """Draws a problem of ``num_steps`` operations whose product belongs to ``split``.

    The second factor starts at 11: products with 10 are easy enough to be guessed without running anything.
    """
    factors = sample_factors(rng)
    while split_of(factors) is not split:
        factors = sample_factors(rng)
    value = factors[0] * factors[1]
    expression = f"{factors[0]} * {factors[1]}"
    steps = [Step(f"{factors[0]}*{factors[1]}", value)]
    for _ in range(num_steps - 1):
        addend = rng.randint(100, 999)
        steps.append(Step(f"{addend}+{value}", addend + value))
        value += addend
        expression = f"{addend} + {expression}"
    return ArithmeticProblem(f"{expression} = ?", factors, tuple(steps))


def sample_problems(
    split: Split, count: int, max_steps: int = 2, seed: int = SEED
) -> Iterator[ArithmeticProblem]:
    """Yields ``count`` different problems, in turn of 1, 2, ... ``max_steps`` operations."""
    rng = random.Random(f"{seed}/{split}")
    seen: set[str] = set()
    while len(seen) < count:
        problem = sample_problem(rng, split, num_steps=len(seen) % max_steps + 1)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def write_jsonl(path: Path, split: Split, count: int) -> None:
    """Writes one JSON object a line: id, problem, answer, steps (how many operations)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for index, problem in enumerate(sample_problems(split, count)):
            row = {
                "id": f"{split}-{index:04d}",
                "problem": problem.question,
                "answer": problem.answer,
                "steps": len(problem.steps),
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    for split, count in ((Split.TRAIN, TRAIN_PROBLEMS), (Split.EVAL, EVAL_PROBLEMS)):
        path = DATA_DIRECTORY / f"{split}.jsonl"
        write_jsonl(path, split, count)
        print(f"{path}: {count} problems")


if __name__ == "__main__":
    main()
