"""The examples' programs answer what they cannot do in one line, before they do anything."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
from pathlib import Path

from rich.console import Console

EXAMPLES = Path(__file__).parents[2] / "examples"
MEASURES = {"accuracy": 0.5, "code_proportion": 0.25, "code_ratio": 1.5, "response_tokens": 40.0}


def test_a_job_without_a_configuration_ends_before_it_starts_a_cluster(tmp_path: Path) -> None:
    script = EXAMPLES / "cluster" / "train.sbatch"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no configuration file ''") and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_quickstart_prints_the_evaluations_that_there_are(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("quickstart_run", EXAMPLES / "quickstart" / "run.py")
    assert spec is not None and spec.loader is not None
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    summary = {
        "before": MEASURES,
        "after": None,
        "control_no_tool": None,
    }  # eval.interval_steps=0 has none at all
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    console = Console(file=io.StringIO(), width=40)
    quickstart._print_summary(console, tmp_path)
    rows = [line.split("│")[1:-1] for line in console.file.getvalue().splitlines() if "before" in line]  # type: ignore[attr-defined]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["before", "0.500", "0.250", "1.500", "40.000"]
    ]
    assert "after" not in console.file.getvalue()  # type: ignore[attr-defined]
