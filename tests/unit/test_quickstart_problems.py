"""The quickstart's problems are right, and its evaluation problems are seen nowhere else."""

from __future__ import annotations

import json
import random
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))

from problems import Split, sample_problem, sample_problems, split_of  # noqa: E402


def evaluate_by_hand(question: str) -> int:
    """Sum of the terms, one of which is a product; independent of how the problem was built."""
    terms = question.removesuffix(" = ?").split(" + ")
    product = terms.pop()
    left, right = product.split(" * ")
    return int(Fraction(left) / Fraction(1, int(right))) + sum(map(int, terms))


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_every_step_and_every_answer_is_right(num_steps: int) -> None:
    rng = random.Random(7)
    for split in Split:
        for _ in range(200):
            problem = sample_problem(rng, split, num_steps)
            assert evaluate_by_hand(problem.question) == int(problem.answer)
            assert len(problem.steps) == num_steps
            for step in problem.steps:
                left, operator, right = re.fullmatch(r"(\d+)([*+])(\d+)", step.expression).groups()
                assert step.value == (int(left) * int(right) if operator == "*" else int(left) + int(right))


def test_the_split_of_a_product_never_changes_between_runs() -> None:
    assert [split_of(factors) for factors in ((100, 11), (472, 19), (999, 99), (871, 67))] == [
        Split.CORPUS,
        Split.TRAIN,
        Split.CORPUS,
        Split.EVAL,
    ]


def test_all_products_are_shared_out_five_two_one() -> None:
    splits = [split_of((a, b)) for a in range(100, 1000) for b in range(11, 100)]
    assert splits.count(Split.CORPUS) / len(splits) == pytest.approx(5 / 8, abs=0.01)
    assert splits.count(Split.TRAIN) / len(splits) == pytest.approx(2 / 8, abs=0.01)
    assert splits.count(Split.EVAL) / len(splits) == pytest.approx(1 / 8, abs=0.01)


def test_the_committed_files_are_what_the_generator_writes_and_share_no_product() -> None:
    products: dict[Split, set[str]] = {}
    for split, count in ((Split.TRAIN, 2048), (Split.EVAL, 256)):
        rows = [json.loads(line) for line in (EXAMPLE / "data" / f"{split}.jsonl").read_text().splitlines()]
        expected = list(sample_problems(split, count))
        assert [(row["problem"], row["answer"]) for row in rows] == [(p.question, p.answer) for p in expected]
        assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == count
        assert sum(row["steps"] == 2 for row in rows) == count // 2
        assert all(evaluate_by_hand(row["problem"]) == int(row["answer"]) for row in rows)
        products[split] = {re.search(r"\d+ \* \d+", row["problem"])[0] for row in rows}
    assert not products[Split.TRAIN] & products[Split.EVAL]
