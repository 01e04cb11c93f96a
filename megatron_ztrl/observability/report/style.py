"""How figures look: one accent colour, greys for everything it is compared with, labels on the lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

ACCENT = "#2457d6"
ACCENT_LIGHT = "#93b0f2"
INK = "#1a1d21"
MUTED = "#6a7280"
GREY = "#9aa2ae"
GRID = "#e8eaee"
SHADES = ("#1b3f9e", "#2457d6", "#4670d8", "#93b0f2", "#c4d3f8", "#d9dce2")
"""Dark to light, then grey for the rest. White text on the first three, and these on white, have a contrast of 4.5."""
_FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
_LABEL_GAP = 0.085
"""Least distance of two line labels, as a share of the axes' height."""

_SMALL = 0.01
"""Numbers below this are not written out."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_AVAILABLE = {font.name for font in font_manager.fontManager.ttflist}
RC: dict[str, Any] = {
    "font.family": [font for font in _FONTS if font in _AVAILABLE],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    # Text stays text: the page's own font, sharp at any size, and searchable.
    "svg.fonttype": "none",
    "figure.constrained_layout.h_pad": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class LineLabel:
    """A name to write beside the end of a line."""

    y: float
    text: str
    color: str


def label_lines(axes: Axes, labels: Sequence[LineLabel]) -> None:
    """Names lines at their right ends, apart from each other. Call it when the limits are set."""
    low, high = axes.get_ylim()
    wanted = sorted(labels, key=lambda label: label.y)
    heights = [(label.y - low) / (high - low) for label in wanted]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + _LABEL_GAP)
    ceiling = 1.0
    for index in reversed(range(len(heights))):  # back down, those that were pushed out at the top
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - _LABEL_GAP
    for label, height in zip(wanted, heights, strict=True):
        axes.annotate(
            label.text,
            (1.015, height),
            xycoords="axes fraction",
            color=label.color,
            fontsize=9.5,
            fontweight="bold" if label.color == ACCENT else "normal",
            va="center",
        )


def percent_axis(axes: Axes) -> None:
    """A y axis from 0 to 100 %."""
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))


def number_axis(axes: Axes, largest: float, unit: str) -> str:
    """A y axis of numbers that are short to read; per cent where that is the unit and the values are shares.

    Returns:
        The unit of the numbers at the axis: small ones are counted in a power of ten.
    """
    if unit == "%":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        return ""
    if not 0 < largest < _SMALL:
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
        )
        return unit
    exponent = math.floor(math.log10(largest))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**exponent:.3g}"))
    return f"10{str(exponent).translate(_SUPERSCRIPTS)} {unit}".rstrip()


def step_axis(axes: Axes) -> None:
    """An x axis of whole steps."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that needs no display."""
    return Figure(figsize=(width, height), layout="constrained")
