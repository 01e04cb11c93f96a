"""A run in a few numbers."""

from __future__ import annotations

from typing import Any

from megatron_ztrl.observability import names
from megatron_ztrl.observability.report.runs import Run, datasets


def summarize(run: Run, control: Run | None) -> dict[str, Any]:
    """What ``summary.json`` holds.

    ``before``, ``after`` and ``control_no_tool`` are evaluations: the measures as means over data sets at the
    run's own N, then the same by N and by data set. They are None where nothing was evaluated.
    """
    steps = run.evaluated_steps
    trained = len(steps) > 1
    return {
        "run": run.name,
        "steps": run.train[-1][names.STEP] if run.train else 0,
        "wall_seconds": run.wall_seconds,
        "before": _evaluation(run, steps[0]) if steps else None,
        "after": _evaluation(run, steps[-1]) if trained else None,
        "control_no_tool": (
            _evaluation(control, control.evaluated_steps[-1]) if control and control.evaluated_steps else None
        ),
    }


def _evaluation(run: Run, step: int) -> dict[str, Any]:
    evaluated = run.env_iterations_at(step)
    # An evaluation in between may have left out the run's own N.
    n = run.env_iterations if run.env_iterations in evaluated else evaluated[-1]
    row = run.evaluations[step, n]
    return {
        names.STEP: step,
        names.ENV_ITERATIONS: n,
        **(run.evaluation(step, n) or {}),
        "by_env_iterations": {str(other): run.evaluation(step, other) for other in evaluated},
        "by_dataset": {name: run.evaluation(step, n, name) for name in datasets(row)},
    }
