"""``ztrl report``: one self-contained page, its figures and ``summary.json``, from what a run wrote down.

``runs`` reads a run directory, ``summary`` reduces it to numbers, ``figures`` draws, ``page`` fills the
template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_ztrl.observability import names
from megatron_ztrl.observability.run_info import write_whole


def write_report(run_directories: Sequence[str | Path], *, control: str | Path | None = None) -> Path:
    """Writes ``report.html``, ``summary.json`` and ``figures/*.png`` into the first run directory.

    Args:
        run_directories: The run to report on, then runs that are drawn beside it.
        control: The same run trained and evaluated without the tool.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: A directory holds no run, the control has used the tool, nothing can be written, or matplotlib is
            not installed.
    """
    # matplotlib takes a second to import, and training does not need it.
    try:
        from megatron_ztrl.observability.report import figures
    except ModuleNotFoundError as error:
        raise ValueError(f"ztrl report needs {error.name}: pip install {error.name}") from error
    from megatron_ztrl.observability.report.page import render
    from megatron_ztrl.observability.report.runs import load_run
    from megatron_ztrl.observability.report.summary import summarize

    run, *others = map(load_run, run_directories)
    control_run = None if control is None else load_run(control)
    if control_run is not None and (n := control_run.setting("rollout.env_iterations")):
        raise ValueError(
            f"--control: {control_run.directory} was trained with the tool (rollout.env_iterations={n}); "
            "to draw it beside the run, name it without --control"
        )
    summary = summarize(run, control_run)
    drawn = figures.draw_all(run, others, control_run)
    html = render(run, others, control_run, summary, drawn)
    # Only now is anything written, the page last: it speaks of files that are there.
    try:
        (run.directory / "figures").mkdir(exist_ok=True)
        for figure in drawn:
            write_whole(run.directory / "figures" / f"{figure.name}.png", figure.png)
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        write_whole(run.directory / names.SUMMARY_FILE, text + "\n")
        write_whole(run.directory / names.REPORT_FILE, html)
    except PermissionError as error:
        raise ValueError(
            f"{error.filename}: no permission to write the report into the run's directory; report on a copy of it"
        ) from error
    return run.directory / names.REPORT_FILE
