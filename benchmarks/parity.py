"""Compares training in Megatron, under every parallel layout, with plain transformers and torch.

Runs the cases of tests/distributed, and eight-process ones: loss, gradients, log-probs (a critic: values), and the
parameters and outputs after three optimizer steps. Prints a table, writes docs/parity.md, and exits with 1 where a
bound is exceeded.

    python benchmarks/parity.py [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("distributed", "support")]

from cases import (  # noqa: E402
    BFLOAT16_CASES,
    EIGHT_RANK_CASES,
    FOUR_RANK_CASES,
    FOUR_RANK_CRITICS,
    TWO_RANK_CASES,
    TWO_RANK_CASES_OF_THE_TABLE,
    TWO_RANK_CRITICS,
    Case,
)
from judge import BFLOAT16_FACTOR, BOUNDS, bounds, compares_everything, gaps, rounding  # noqa: E402
from launcher import launch  # noqa: E402
from random_policies import CHECKPOINTS, STEPS  # noqa: E402
from ranks import run_parity_cases  # noqa: E402
from reference import prepare  # noqa: E402

LAUNCHES = {
    2: [*TWO_RANK_CASES, *TWO_RANK_CASES_OF_THE_TABLE, *TWO_RANK_CRITICS, *BFLOAT16_CASES],
    4: [*FOUR_RANK_CASES, *FOUR_RANK_CRITICS],
    8: EIGHT_RANK_CASES,
}
HEADINGS = {
    "loss": "loss",
    "gradients": "gradients",
    "outputs": "log-probs",
    "parameters": "parameters, step 3",
    "final_outputs": "log-probs, step 3",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case, measured. Differences are by quantity, see ``judge.BOUNDS``."""

    case: Case
    found: dict[str, float]
    """From transformers in float32."""
    bounds: dict[str, float]
    exact: dict[str, float]
    """From transformers in float64."""
    invariance: float | None
    """From the gradients of one process, where only the cut of the batch differs."""

    @property
    def passes(self) -> bool:
        """Whether every bound holds."""
        return all(self.found[name] <= bound for name, bound in self.bounds.items()) and (
            self.invariance is None or self.invariance <= BOUNDS["gradients"]
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "parity.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        checkpoints = sorted({case.checkpoint for cases in LAUNCHES.values() for case in cases})
        prepare(root, checkpoints, (torch.float32, torch.float64, torch.bfloat16))
        rows = [row for processes, cases in LAUNCHES.items() for row in measure(cases, processes, root)]
        errors = {name: rounding(root, name, torch.float32, torch.float64) for name in checkpoints}
    print_table(rows)
    options.output.write_text(document(rows, errors))
    return 0 if all(row.passes for row in rows) else 1


def measure(cases: list[Case], processes: int, root: Path) -> list[Row]:
    """Runs the cases in one launch."""
    by_rank = launch(run_parity_cases, processes, root, cases, limit_seconds=900)
    rows = []
    for case in cases:
        ranks: list[dict[str, Any]] = [results[case.name] for results in by_rank if case.name in results]
        assert compares_everything(ranks, case), case
        rows.append(
            Row(
                case=case,
                found=gaps(ranks, root, case),
                bounds=bounds(case, root),
                exact=gaps(ranks, root, case, torch.float64),
                invariance=max(rank["invariance"] for rank in ranks) if case.like else None,
            )
        )
    return rows


def layout(case: Case) -> str:
    """The parallel sizes above 1."""
    sizes = {"TP": case.tp, "PP": case.pp, "VPP": case.vp, "CP": case.cp, "DP": case.dp}
    named = [f"{name}{size}" for name, size in sizes.items() if size > 1] + ["SP"] * case.sp
    return " × ".join(named) or "one process"


def options_of(case: Case) -> str:
    """What else the case sets."""
    recompute = case.transformer.get("recompute_granularity")
    found = [
        f"{recompute} recompute" if recompute else "",
        "overlapped reduce and gather" if case.ddp.get("overlap_grad_reduce") else "",
        "no distributed optimizer" if case.ddp.get("use_distributed_optimizer") is False else "",
        "" if case.tokens == 64 else f"microbatches of {case.tokens} tokens",
        "samples in another order" if case.order else "",
        "new value head" if CHECKPOINTS[case.checkpoint].new_head else "",
        "importance weights" if CHECKPOINTS[case.checkpoint].weighted else "",
    ]
    return ", ".join(text for text in found if text)


def cells(row: Row) -> list[str]:
    """The row as it is printed and written."""
    numbers = [
        f"{value:.1e}" if value <= row.bounds[name] else f"**{value:.1e}**"
        for name, value in row.found.items()
    ]
    case = row.case
    return [case.checkpoint, layout(case), options_of(case), *numbers, "pass" if row.passes else "**fail**"]


def print_table(rows: list[Row]) -> None:
    table = Table(*COLUMNS, title="largest difference from transformers")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def document(rows: list[Row], errors: dict[str, dict[str, float]]) -> str:
    """docs/parity.md."""
    parts: dict[str, list[Row]] = {"policies": [], "critics": [], "bfloat16": []}
    for row in rows:
        kind = "policies" if row.case.role == "actor" else "critics"
        parts[kind if row.case.dtype == "float32" else "bfloat16"].append(row)
    versions = (
        f"{name} {version(name).partition('+')[0]}" for name in ("torch", "megatron-core", "transformers")
    )
    invariance = [row.invariance for row in rows if row.invariance is not None]
    return TEMPLATE.format(
        versions=", ".join(versions),
        passed=sum(row.passes for row in rows),
        total=len(rows),
        processes=max(LAUNCHES),
        steps=STEPS,
        invariant=len(invariance),
        invariance=f"{max(invariance):.1e}",
        factor=f"{BFLOAT16_FACTOR:g}",
        bounds="gradients {gradients:.0e}, everything else {loss:.0e}".format(**BOUNDS),
        rounding=markdown(["checkpoint", "", *HEADINGS.values()], rounding_cells(parts, errors)),
        coarse=" | ".join(f"{bound / BFLOAT16_FACTOR:.1e}" for bound in parts["bfloat16"][0].bounds.values()),
        **{name: markdown(COLUMNS, map(cells, part)) for name, part in parts.items()},
    )


def rounding_cells(parts: dict[str, list[Row]], errors: dict[str, dict[str, float]]) -> Iterator[list[str]]:
    """For every checkpoint, the distances from float64 of transformers and of the worst layout."""
    for name, error in errors.items():
        rows = [row for part in ("policies", "critics") for row in parts[part] if row.case.checkpoint == name]
        worst = (max(row.exact[quantity] for row in rows) for quantity in HEADINGS)
        yield [name, "transformers", *(f"{error[quantity]:.1e}" for quantity in HEADINGS)]
        yield ["", f"worst of {len(rows)}", *(f"{value:.1e}" for value in worst)]


def markdown(headings: Sequence[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = ["checkpoint", "layout", "options", *HEADINGS.values(), ""]
TEMPLATE = """\
# Parity with transformers

Written by `make parity` ({versions}). {passed} of {total} rows pass.

Every row trains one small random checkpoint in Megatron on up to {processes} CPU processes, and the same one with plain
transformers and torch: one sequence at a time, full logits, torch's AdamW (`tests/distributed/reference.py`
shares no code with the trainer). The cells are the largest absolute differences over all elements of all ranks, in
float32: of the mean loss in any step; of the gradients of the first step, reduced over all ranks and not yet clipped;
of the log-probs (nats; a critic's values) before the first step; of the parameters, and of the log-probs again, after
{steps} steps of AdamW.

Bounds: {bounds}. A number above its bound is bold. 4.8e-07 is
one unit in the last place of a log-prob between -4 and -8.

Twelve sequences of 3 to 40 tokens in packed microbatches of at most 64, so that every row accumulates gradients. The
distributed optimizer is on unless a row says otherwise; each rank then compares the part of the reduced gradient that
it keeps, and together they compare all of it. Log-probs are at temperature 0.8, the loss is clipped; checkpoints
have 4 layers, deep ones 8, of width 64.

## Policies

{policies}

## Critics

A critic is `AutoModelForTokenClassification` with one label; its loss is the clipped value loss. The columns of
log-probs are its values. A new value head starts from a policy and at 0.

{critics}

## However the batch is cut

{invariant} rows above differ from the first one only in data-parallel ranks, microbatch budget or order of the
samples. Their gradients differ from those of that one process by at most {invariance}.

## What rounding makes of it

Distances from transformers in float64, where both sides of the tables above round: transformers in float32, and
the layout of that checkpoint that is furthest. (The rotary tables are float32 in all of them.) The two are alike: what
is left of a difference is the rounding of either side.

{rounding}

## bfloat16

Weights and activations in bfloat16; main weights, gradients that are accumulated and optimizer states in float32. The
cells are distances from transformers in float32, as above; each may be {factor} times as far as the last row,
which is transformers itself in bfloat16 with float32 main weights: the worst of these checkpoints.

{bfloat16}
| transformers, worst | | | {coarse} | |
"""

if __name__ == "__main__":
    sys.exit(main())
