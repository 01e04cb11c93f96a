"""Draws what a run learned, what the tool is worth, where the time went, and whether training was stable."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_ztrl.observability import names
from megatron_ztrl.observability.report import style
from megatron_ztrl.observability.report.runs import Run
from megatron_ztrl.observability.report.style import ACCENT, ACCENT_LIGHT, GREY, INK, MUTED, LineLabel

_PHASE_LABELS = dict(
    zip(names.TIME_PHASES, ("generate", "tools", "log-probs", "train", "publish", "other"), strict=True)
)
_STABILITY = {
    names.LOSS_POLICY: ("Policy loss", ""),
    names.LOSS_ENTROPY: ("Entropy", "nats"),
    names.LOSS_GRAD_NORM: ("Gradient norm", ""),
    names.LOSS_APPROX_KL: ("Approximate KL", "nats"),
    names.LOSS_CLIP_FRACTION: ("Clipped tokens", "%"),
    names.LOSS_REFERENCE_KL: ("KL to the first policy", "nats"),
    names.CRITIC_EXPLAINED_VARIANCE: ("Returns explained by the critic", "%"),
    names.CRITIC_LOSS: ("Critic loss", ""),
    names.MISMATCH_MEAN: ("|Trainer − engine log-prob|, mean", "nats"),
    names.IMPORTANCE_EFFECTIVE: ("Effective sample size", "%"),
    names.TRAIN_TRUNCATED: ("Truncated rollouts", "%"),
    names.TRAIN_STALENESS_MAX: ("Staleness, worst token", "steps"),
    names.THROUGHPUT_TOKENS: ("Sampled tokens", "per second"),
}
"""What is drawn of each step, and its unit."""
_X_LABEL = "training step"
_STABILITY_COLUMNS = 3
_SMOOTHING_SHARE = 20
"""The bold line averages one step in so many."""
_NAMED_SHARE = 0.05
"""A smaller part of the bar of times has no room for its name."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished figure."""

    name: str
    svg: str
    png: bytes


def draw_all(run: Run, others: Sequence[Run], control: Run | None) -> list[Drawn]:
    """Draws every figure there is data for."""
    drawings: dict[str, Callable[[], Figure | None]] = {
        "learning": lambda: learning_curves(run, others, control),
        "env_iterations": lambda: accuracy_by_env_iterations(run, control),
        "time": lambda: time_shares(run),
        "stability": lambda: stability(run),
    }
    drawn = []
    for name, draw in drawings.items():
        # The salt keeps the ids inside one SVG from meeting those of another on the same page.
        with mpl.rc_context({**style.RC, "svg.hashsalt": name}):
            figure = draw()
            if figure is not None:
                png = io.BytesIO()
                FigureCanvasAgg(figure).print_png(png)
                drawn.append(Drawn(name=name, svg=_svg(figure), png=png.getvalue()))
    return drawn


def learning_curves(run: Run, others: Sequence[Run], control: Run | None) -> Figure | None:
    """Accuracy, code proportion, calls and response length against the step."""
    if not run.train:
        return None
    figure = style.new_figure(11, 7.0)
    panels = figure.subplots(2, 2)
    measures = {
        names.ACCURACY: "Accuracy",
        names.CODE_PROPORTION: "Rollouts that execute code",
        names.CODE_RATIO: "Code calls per rollout",
        names.RESPONSE_TOKENS: "Response length (tokens)",
    }
    for axes, (measure, title) in zip(panels.flat, measures.items(), strict=True):
        axes.set_title(title)
        labels = [_compared(axes, other, measure, style=":", text=other.name) for other in others]
        if control is not None:
            without_tool = "executed, no tool" if measure == names.CODE_RATIO else "no tool"
            labels.append(_compared(axes, control, measure, style="--", text=without_tool))
        if measure == names.CODE_RATIO:
            labels += _written_calls(axes, run, control)
        labels.append(_main_line(axes, run, measure))
        if measure in (names.ACCURACY, names.CODE_PROPORTION):
            style.percent_axis(axes)
        else:
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", nbins=6)
        style.step_axis(axes)
        style.label_lines(axes, [label for label in labels if label is not None])
        axes.set_xlabel(_X_LABEL)
    figure.legend(
        handles=_kinds_of_lines(run, others, control),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9.5,
        handlelength=2.4,
        columnspacing=1.8,
    )
    return figure


def _kinds_of_lines(run: Run, others: Sequence[Run], control: Run | None) -> list[Line2D]:
    """What a line or a dot of the learning curves stands for."""
    window = _window(len(run.train))
    kinds = [
        Line2D([], [], color=ACCENT, label="this run" if window == 1 else f"this run, mean of {window} steps")
    ]
    if window > 1:
        kinds.append(Line2D([], [], color=ACCENT, alpha=0.22, linewidth=1, label="each step"))
    if run.env_iterations is not None:
        text = f"evaluation, N = {run.env_iterations}"
        kinds.append(Line2D([], [], color=ACCENT, marker="o", markersize=6.5, linestyle="", label=text))
    if control is not None:
        kinds.append(Line2D([], [], color=GREY, linestyle="--", label="control, trained without the tool"))
    if others:
        kinds.append(Line2D([], [], color=GREY, linestyle=":", label="other runs"))
    return kinds


def _main_line(axes: Axes, run: Run, measure: str) -> LineLabel | None:
    steps, values = run.series(names.train_key(measure))
    if not steps:
        return None
    axes.plot(steps, values, color=ACCENT, alpha=0.22, linewidth=1)
    smooth = _smooth(values)
    axes.plot(steps, smooth, color=ACCENT)
    if run.env_iterations is not None:
        points = run.evaluation_series(measure, run.env_iterations)
        axes.plot(*points, "o", color=ACCENT, markersize=6.5, markeredgecolor="white", markeredgewidth=1.4)
    text = "executed" if measure == names.CODE_RATIO else "this run"
    return LineLabel(y=float(smooth[-1]), text=text, color=ACCENT)


def _compared(axes: Axes, run: Run, measure: str, *, style: str, text: str) -> LineLabel | None:
    steps, values = run.series(names.train_key(measure))
    if not steps:
        return None
    smooth = _smooth(values)
    axes.plot(steps, smooth, color=GREY, linestyle=style, linewidth=1.8)
    return LineLabel(y=float(smooth[-1]), text=text, color=MUTED)


def _written_calls(axes: Axes, run: Run, control: Run | None) -> list[LineLabel]:
    """Code text that nobody ran: a policy can write blocks with the tool off, or used up."""
    labels = []
    for owner, color, line, text in (
        (run, ACCENT_LIGHT, "-", "written"),
        (control, GREY, "-", "written, no tool"),
    ):
        steps, values = owner.series(names.TRAIN_WRITTEN_CALLS) if owner is not None else ([], [])
        if steps:
            smooth = _smooth(values)
            axes.plot(steps, smooth, color=color, linestyle=line, linewidth=1.6)
            labels.append(
                LineLabel(y=float(smooth[-1]), text=text, color=MUTED if color == GREY else style.SHADES[2])
            )
    return labels


def _smooth(values: Sequence[float]) -> np.ndarray:
    """[steps] Trailing mean over one step in `_SMOOTHING_SHARE`, shorter at the start."""
    window = _window(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _window(count: int) -> int:
    """How many of so many steps the bold line averages."""
    return max(1, round(count / _SMOOTHING_SHARE))


def accuracy_by_env_iterations(run: Run, control: Run | None) -> Figure | None:
    """Accuracy against N, before and after training; None with one N, which the learning curves show."""
    if len(run.evaluated_steps) < 2:
        return None
    first, last = run.evaluated_steps[0], run.evaluated_steps[-1]
    values_of_n = run.env_iterations_at(last)
    if len(values_of_n) < 2:
        return None
    figure = style.new_figure(6.4, 3.9)
    axes = figure.subplots()
    axes.set_title("Accuracy against N, the most tool calls of a rollout")
    labels = []
    for step, color, text in ((first, GREY, f"step {first}"), (last, ACCENT, f"step {last}")):
        found = [(n, run.evaluation(step, n)) for n in values_of_n]
        points = [(values_of_n.index(n), values[names.ACCURACY]) for n, values in found if values]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=7, markeredgecolor="white")
        labels.append(LineLabel(y=points[-1][1], text=text, color=ACCENT if color == ACCENT else MUTED))
        if step == last:
            for x, y in points:
                axes.annotate(f"{y:.0%}", (x, y), (-4, 8), textcoords="offset points", ha="right", color=INK)
    if control is not None and control.evaluated_steps:
        n = control.env_iterations_at(control.evaluated_steps[-1])[0]
        accuracy = (control.evaluation(control.evaluated_steps[-1], n) or {}).get(names.ACCURACY)
        if accuracy is not None:
            axes.axhline(accuracy, color=GREY, linestyle="--", linewidth=1.8)
            labels.append(LineLabel(y=accuracy, text="trained without tool", color=MUTED))
    axes.set_xticks(range(len(values_of_n)), [str(n) for n in values_of_n])
    axes.set_xlabel("N in evaluation (calls)")
    axes.margins(x=0.12)
    style.percent_axis(axes)
    axes.set_ylim(top=1.12)
    style.label_lines(axes, labels)
    return figure


def time_shares(run: Run) -> Figure | None:
    """One bar: where the time of a step goes."""
    totals = {phase: sum(run.series(phase)[1]) for phase in names.TIME_PHASES}
    whole = sum(totals.values())
    if whole <= 0:
        return None
    figure = style.new_figure(11, 1.7)
    axes = figure.subplots()
    axes.set_title(f"Time of a step, {whole / len(run.train):.1f} s on average")
    left = 0.0
    for index, (phase, seconds) in enumerate(totals.items()):
        share = seconds / whole
        axes.barh(
            0, share, left=left, height=0.8, color=style.SHADES[index], edgecolor="white", linewidth=1.5
        )
        if share >= _NAMED_SHARE:
            text = f"{_PHASE_LABELS[phase]}\n{share:.0%}, {seconds / len(run.train):.3g} s"
            color = "white" if index < 3 else INK
            axes.text(left + share / 2, 0, text, ha="center", va="center", color=color, fontsize=9.5)
        left += share
    small = [f"{_PHASE_LABELS[p]} {s / whole:.1%}" for p, s in totals.items() if 0 < s / whole < _NAMED_SHARE]
    if small:
        axes.set_xlabel("also: " + ", ".join(small), loc="left")
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return figure


def stability(run: Run) -> Figure | None:
    """Small multiples of what shows trouble first."""
    found = {key: run.series(key) for key in _STABILITY if run.series(key)[0]}
    if not found:
        return None
    rows = -(-len(found) // _STABILITY_COLUMNS)
    figure = style.new_figure(11, 2.1 * rows)
    panels = figure.subplots(rows, _STABILITY_COLUMNS, squeeze=False)
    for index, (key, (steps, values)) in enumerate(found.items()):
        axes = panels.flat[index]
        title, unit = _STABILITY[key]
        axes.plot(steps, values, color=ACCENT, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=ACCENT, linewidth=1.8)
        axes.locator_params(axis="y", nbins=4)
        unit = style.number_axis(axes, max(map(abs, values)), unit)
        axes.set_title(f"{title} ({unit})" if unit else title, fontsize=9.5, fontweight="normal", color=MUTED)
        if min(values) >= 0:
            axes.set_ylim(0, None if any(values) else 1)
        style.step_axis(axes)
        if index + _STABILITY_COLUMNS >= len(found):  # nothing below it
            axes.set_xlabel(_X_LABEL)
    for axes in list(panels.flat)[len(found) :]:
        axes.set_visible(False)
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an inline SVG element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
