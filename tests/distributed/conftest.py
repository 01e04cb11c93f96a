"""One launch of two ranks and one of four, with all cases in them, and one that saves and resumes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Several ranks on one GPU cannot meet over NCCL, and the bounds are those of float32 on a CPU. CUDA looks at this once
# in a process, so tests/gpu wants a run of its own.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

# pytest's importlib mode leaves the path alone; the spawned ranks inherit it.
sys.path.insert(0, str(Path(__file__).parent))

from cases import (
    BFLOAT16_CASES,
    FOUR_RANK_CASES,
    FOUR_RANK_CRITICS,
    TWO_RANK_CASES,
    TWO_RANK_CASES_OF_THE_TABLE,
    TWO_RANK_CRITICS,
)
from launcher import LIMIT_SECONDS, launch
from ranks import run_checkpoint_cases, run_parity_cases
from reference import prepare

TWO_RANKS = [*TWO_RANK_CASES, *TWO_RANK_CRITICS, *BFLOAT16_CASES]
FOUR_RANKS = [*FOUR_RANK_CASES, *FOUR_RANK_CRITICS]
POLICIES = {case.name: case for case in TWO_RANK_CASES + FOUR_RANK_CASES}
CRITICS = {case.name: case for case in TWO_RANK_CRITICS + FOUR_RANK_CRITICS}
EVERY_CASE = POLICIES | CRITICS
COARSE = {case.name: case for case in BFLOAT16_CASES}
RECUT = {name: case for name, case in POLICIES.items() if case.like}
KINDS = {"policy": POLICIES, "critic": CRITICS, "case": EVERY_CASE, "coarse": COARSE, "recut": RECUT}
"""The arguments of a test that stand for one case after the other."""
LAUNCHES = {"parity", "checkpoints"}
"""Fixtures that launch ranks, up to twice."""
RESUME_PAIRS = [
    ("tp2-sp", "tp2-sp"),
    ("dp2", "dp2"),
    ("tp2-sp", "pp2"),
    ("pp2-interleaved", "tp2"),
    ("dp2-overlap", "dp2"),
    ("critic-tp2-sp", "critic-tp2-sp"),
    ("critic-pp2", "critic-dp2-overlap"),
    ("dp2-all-reduce", "dp2-all-reduce"),
    ("cp2", "tp2-sp"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes one of ``KINDS``, or a ``pair`` of layouts, for every one of them."""
    for name, cases in KINDS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases.values(), ids=cases)
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", RESUME_PAIRS, ids=["-to-".join(pair) for pair in RESUME_PAIRS])


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives the time that its launches may take to the test that happens to need them first."""
    if LAUNCHES & set(getattr(item, "fixturenames", ())):
        item.add_marker(pytest.mark.timeout(3 * LIMIT_SECONDS))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every random checkpoint, and beside it what the reference run made of it."""
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.set_num_threads(1)
    prepare(directory, {case.checkpoint for case in TWO_RANKS + FOUR_RANKS}, (torch.float32,))
    prepare(directory, {case.checkpoint for case in BFLOAT16_CASES}, (torch.bfloat16,))
    return directory


@pytest.fixture(scope="session")
def parity(root: Path) -> dict[str, list[dict[str, Any]]]:
    """By case name, what each of its ranks measured."""
    by_rank = launch(run_parity_cases, 2, root, TWO_RANKS)
    by_rank += launch(run_parity_cases, 4, root, FOUR_RANKS)
    return {
        case.name: [ranks[case.name] for ranks in by_rank if case.name in ranks]
        for case in TWO_RANKS + FOUR_RANKS
    }


@pytest.fixture(scope="session")
def checkpoints(root: Path) -> list[dict[str, Any]]:
    """By rank, the uninterrupted and the resumed run of every pair, and what a failed write says."""
    cases = EVERY_CASE | {case.name: case for case in TWO_RANK_CASES_OF_THE_TABLE}
    pairs = [(cases[saver], cases[loader]) for saver, loader in RESUME_PAIRS]
    return launch(run_checkpoint_cases, 2, root, pairs)
