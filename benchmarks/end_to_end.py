"""Speed of the whole loop on this machine: where a step's time goes, samples and tokens per second.

python benchmarks/end_to_end.py [--steps 12] [a.b=c ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_ztrl.cli import main as ztrl
from megatron_ztrl.observability import names
from megatron_ztrl.observability.jsonl import read_rows

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart" / "config.yaml"
WARM_UP_STEPS = 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_UP_STEPS} are not counted")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        code = ztrl(
            [
                "train",
                str(CONFIG),
                f"run.directory={directory}",
                f"train.num_steps={options.steps}",
                "eval.interval_steps=0",
                "checkpoint.export_hf=false",
                *options.overrides,
            ]
        )
        if code != 0:
            return code
        rows = list(read_rows(Path(directory) / names.METRICS_FILE))[WARM_UP_STEPS:]
    figures = summarise(rows)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over the counted steps; phases as shares of the step."""
    step_seconds = fmean(row[names.TIME_STEP] for row in rows)
    tokens = fmean(row[names.THROUGHPUT_TOKENS] * row[names.TIME_STEP] for row in rows)
    samples = fmean(row[names.THROUGHPUT_SAMPLES] * row[names.TIME_STEP] for row in rows)
    rollout_seconds = fmean(row[names.TIME_GENERATE] + row[names.TIME_TOOLS] for row in rows)
    return {
        "steps": len(rows),
        "step_seconds": step_seconds,
        "samples_per_second": samples / step_seconds,
        "tokens_per_second": tokens / step_seconds,
        "rollout_tokens_per_second": tokens / rollout_seconds,
        "generation_tokens_per_second": tokens / fmean(row[names.TIME_GENERATE] for row in rows),
        **{f"share/{phase}": fmean(row[phase] for row in rows) / step_seconds for phase in names.TIME_PHASES},
    }


def print_table(figures: dict[str, float]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.1%}" if name.startswith("share/") else f"{value:,.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
