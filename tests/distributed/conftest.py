"""One launch of two ranks and one of four, with all cases in them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's importlib mode leaves the path alone; the spawned ranks inherit it.
sys.path.insert(0, str(Path(__file__).parent))

from launcher import launch
from random_policies import POLICIES, reference_run, save_policy
from ranks import Case, measure_resume, run_parity_cases

INTERLEAVED = {"overlap_p2p_comm": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20_000}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

TWO_RANK_CASES = [
    Case(name="one-rank", policy="qwen2"),
    Case(name="one-rank-one-microbatch", policy="qwen2", tokens=1000),
    Case(name="one-rank-recompute", policy="qwen2", transformer=RECOMPUTE),
    Case(name="tp2", policy="qwen2", tp=2),
    Case(name="tp2-sp", policy="qwen2", tp=2, sp=True),
    Case(name="pp2", policy="qwen2", pp=2),
    Case(name="pp2-interleaved", policy="qwen2", pp=2, vp=2, transformer=INTERLEAVED),
    Case(name="dp2", policy="qwen2", dp=2),
    Case(name="dp2-all-reduce", policy="qwen2", dp=2, ddp={"use_distributed_optimizer": False}),
    Case(name="dp2-overlap", policy="qwen2", dp=2, ddp=OVERLAP),
    Case(name="tied-tp2-sp", policy="qwen2-tied", tp=2, sp=True),
    Case(name="tied-pp2", policy="qwen2-tied", pp=2),
    Case(name="tied-dp2", policy="qwen2-tied", dp=2),
    Case(name="llama-tp2", policy="llama", tp=2),
    Case(name="llama-tied-pp2", policy="llama-tied", pp=2),
    Case(name="qwen3-tied-tp2-sp", policy="qwen3-tied", tp=2, sp=True),
    Case(name="qwen3-tied-pp2", policy="qwen3-tied", pp=2),
]
FOUR_RANK_CASES = [
    Case(name="tp2-pp2", policy="qwen2", tp=2, pp=2),
    Case(name="tp2-sp-pp2-tied", policy="qwen2-tied", tp=2, pp=2, sp=True),
    Case(name="tp2-sp-dp2", policy="qwen2", tp=2, dp=2, sp=True),
    Case(name="llama-tied-pp2-dp2", policy="llama-tied", pp=2, dp=2),
]
BFLOAT16_CASE = Case(name="bfloat16-tp2-sp", policy="qwen2-tied", tp=2, sp=True, dtype="bfloat16")
BY_NAME = {case.name: case for case in TWO_RANK_CASES + FOUR_RANK_CASES}
RESUME_PAIRS = [
    ("tp2-sp", "tp2-sp"),
    ("dp2", "dp2"),
    ("tp2-sp", "pp2"),
    ("tied-pp2", "tied-dp2"),
    ("tied-dp2", "tied-tp2-sp"),
    ("pp2-interleaved", "tp2"),
    ("dp2-overlap", "dp2"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``case`` run for every layout, those that take ``pair`` for every resume."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", BY_NAME.values(), ids=BY_NAME)
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", RESUME_PAIRS, ids=["-to-".join(pair) for pair in RESUME_PAIRS])


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every random policy, and beside it what the reference run made of it."""
    directory = tmp_path_factory.mktemp("policies")
    torch.set_num_threads(1)
    for name in POLICIES:
        model = save_policy(name, directory / name)
        torch.save(reference_run(model), directory / f"{name}.pt")
    return directory


@pytest.fixture(scope="session")
def parity(root: Path) -> dict[str, list[dict[str, Any]]]:
    """By case name, what each of its ranks measured."""
    by_rank = launch(run_parity_cases, 2, root, [*TWO_RANK_CASES, BFLOAT16_CASE])
    by_rank += launch(run_parity_cases, 4, root, FOUR_RANK_CASES)
    names = [*BY_NAME, BFLOAT16_CASE.name]
    return {name: [ranks[name] for ranks in by_rank if name in ranks] for name in names}


@pytest.fixture(scope="session")
def resume(root: Path) -> list[dict[tuple[str, str], Any]]:
    """By rank and pair, the uninterrupted and the resumed run."""
    return launch(measure_resume, 2, root, [(BY_NAME[a], BY_NAME[b]) for a, b in RESUME_PAIRS])
