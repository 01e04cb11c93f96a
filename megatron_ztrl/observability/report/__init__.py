"""``ztrl report``: one self-contained page, its figures and ``summary.json``, from what a run wrote down.

``runs`` reads a run directory, ``summary`` reduces it to numbers, ``figures`` draws, ``page`` fills the
template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_ztrl.observability import names


def write_report(run_directories: Sequence[str | Path], *, control: str | Path | None = None) -> Path:
    """Writes ``report.html``, ``summary.json`` and ``figures/*.png`` into the first run directory.

    Args:
        run_directories: The run to report on, then runs that are drawn beside it.
        control: The same run trained and evaluated without the tool.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: A directory holds no run, or matplotlib is not installed.
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
    summary = summarize(run, control_run)
    drawn = figures.draw_all(run, others, control_run, run.directory / "figures")
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (run.directory / names.SUMMARY_FILE).write_text(text + "\n", "utf-8")
    page = run.directory / names.REPORT_FILE
    page.write_text(render(run, others, control_run, summary, drawn), "utf-8")
    return page
