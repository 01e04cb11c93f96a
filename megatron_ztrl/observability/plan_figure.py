"""Draws a memory plan: what fills each GPU, and where the time of a step would go under each layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Patch

from megatron_ztrl.observability.report import style

_COLORS = {
    "weights": style.SHADES[0],
    "gradients": style.SHADES[1],
    "optimizer": style.SHADES[2],
    "activations": style.SHADES[3],
    "working": style.SHADES[4],
    "KV cache": style.GREY,
    "reserved": style.SHADES[5],
    "generation": style.SHADES[0],
    "log-probs": style.SHADES[1],
    "training": style.SHADES[2],
    "publish": style.SHADES[3],
}
_NAMED_SHARE = 0.06
_LIMIT = "#c0392b"


def draw_plan(
    path: Path,
    *,
    title: str,
    memory_gb: Sequence[tuple[str, Mapping[str, float]]],
    limit_gb: float,
    seconds: Sequence[tuple[str, Mapping[str, float]]],
) -> None:
    """Writes the picture as PNG.

    Args:
        path: File to write.
        title: Model and number of GPUs.
        memory_gb: For each kind of GPU, its name and what fills it.
        limit_gb: Memory of a GPU.
        seconds: For each layout, its name and the phases of a step.
    """
    with mpl.rc_context({**style.RC, "axes.grid.axis": "x"}):
        rows = len(memory_gb), len(seconds)
        figure = style.new_figure(11, 2.4 + 0.52 * sum(rows))
        upper, lower = figure.subplots(2, 1, height_ratios=[rows[0] + 1.0, rows[1] + 1.0])
        upper.set_title(f"{title}: memory of one GPU (GB)")
        right = max(limit_gb, *(sum(parts.values()) for _, parts in memory_gb)) * 1.1
        _stack(upper, memory_gb, right, "{:.1f}")
        upper.axvline(limit_gb, color=_LIMIT, linewidth=1.6)
        upper.annotate(
            f"{limit_gb:.0f} GB",
            (limit_gb, -0.62),
            (4, 0),
            textcoords="offset points",
            color=_LIMIT,
            fontsize=9,
        )
        names = list(dict.fromkeys(name for _, parts in memory_gb for name in parts))
        upper.legend(
            handles=[Patch(color=_COLORS[name], label=name) for name in names],
            loc="upper left",
            bbox_to_anchor=(0.0, -0.35 / (rows[0] + 1.0)),
            borderaxespad=0.0,
            ncols=len(names),
            frameon=False,
            fontsize=8.5,
            handlelength=0.9,
            columnspacing=1.2,
        )
        lower.set_title("Estimated time of a training step (s)")
        _stack(lower, seconds, max(sum(parts.values()) for _, parts in seconds) * 1.1, "{:.0f}")
        FigureCanvasAgg(figure).print_png(path)


def _stack(axes: Axes, bars: Sequence[tuple[str, Mapping[str, float]]], right: float, form: str) -> None:
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for name, amount in parts.items():
            color = _COLORS[name]
            axes.barh(row, amount, left=left, height=0.68, color=color, edgecolor="white", linewidth=1.2)
            if amount >= _NAMED_SHARE * right:
                ink = "white" if color in style.SHADES[:3] else style.INK
                text = f"{name}\n{form.format(amount)}"
                axes.text(left + amount / 2, row, text, ha="center", va="center", color=ink, fontsize=8)
            left += amount
        axes.annotate(
            form.format(left),
            (left, row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the line of the limit
        )
    axes.set_xlim(0, right)
    axes.set_ylim(len(bars) - 0.4, -0.9)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.tick_params(axis="y", labelcolor=style.INK)
