"""Progress: a live display on a terminal, a line per phase and step where there is none."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from megatron_ztrl.observability import names

_SHOWN: dict[str, tuple[str, str]] = {
    names.TRAIN_REWARD: ("reward", "{:.3f}"),
    names.TRAIN_ACCURACY: ("accuracy", "{:.1%}"),
    names.TRAIN_CODE_PROPORTION: ("code", "{:.1%}"),
    names.TRAIN_CODE_RATIO: ("calls", "{:.2f}"),
    names.TRAIN_RESPONSE_TOKENS: ("length", "{:.0f}"),
    names.THROUGHPUT_TOKENS: ("tokens/s", "{:,.0f}"),
}
_ETA_WINDOW_STEPS = 10


class Progress:
    """Shows where a run is. Everything is printed through it, so that lines do not break the live display."""

    def __init__(self, num_steps: int, *, unit: str = "step", console: Console | None = None) -> None:
        """Nothing is shown yet.

        Args:
            num_steps: The step at which the run ends.
            unit: What a step is called.
            console: In place of stderr.
        """
        self._console = console or _standard_error()
        self._num_steps = num_steps
        self._unit = unit
        self._step = 0
        self._phase = "starting"
        self._counted = ""
        self._phase_start_seconds = time.monotonic()
        self._step_seconds: deque[float] = deque(maxlen=_ETA_WINDOW_STEPS)
        self._metrics: Mapping[str, float] = {}
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._phase = "done" if kind is None else "stopped"
            self._live.stop()
            self._live = None

    @contextmanager
    def startup(self, name: str) -> Iterator[None]:
        """A phase of the start, e.g. ``SGLang engine``; prints a line with its duration when it ends."""
        start_seconds = time.monotonic()
        self.phase(name)
        if self._live is None:
            self.note(f"{name} ...")
        yield
        self.note(f"{name}: ready in {time.monotonic() - start_seconds:.1f} s")

    def phase(self, name: str) -> None:
        """What the run is doing now, e.g. ``generating``; shown on the live display only."""
        self._phase = name
        self._counted = ""
        self._phase_start_seconds = time.monotonic()

    def count(self, done: int, total: int) -> None:
        """How far the phase has come; shown on the live display only."""
        self._counted = f" {done}/{total}"

    def resume(self, step: int) -> None:
        """The run is at ``step``, of which there are no metrics to show."""
        self._step = step

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step is done; ``metrics`` are those of its row."""
        self._step = step
        self._metrics = metrics
        if names.TIME_STEP in metrics:
            self._step_seconds.append(metrics[names.TIME_STEP])
        if self._live is None:
            self.note(f"{self._unit} {step}/{self._num_steps}  {self._summary()}")

    def note(self, message: str) -> None:
        """Prints a line above the live display."""
        self._console.print(Text(message), soft_wrap=True)

    def eta_seconds(self) -> float | None:
        """Time left, judged by the last steps; None before the first."""
        if not self._step_seconds:
            return None
        return (self._num_steps - self._step) * sum(self._step_seconds) / len(self._step_seconds)

    def _summary(self) -> str:
        parts = [
            f"{label} {form.format(self._metrics[key])}"
            for key, (label, form) in _SHOWN.items()
            if key in self._metrics
        ]
        if self._step_seconds:
            parts.append(f"{self._step_seconds[-1]:.1f} s/step")
        eta_seconds = self.eta_seconds()
        if eta_seconds:
            parts.append(f"{format_duration(eta_seconds)} left")
        return "  ".join(parts)

    def _render(self) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        spent = format_duration(time.monotonic() - self._phase_start_seconds)
        self._spinner.update(text=Text(f"{self._phase}{self._counted} {spent}", style="cyan"))
        line.add_row(
            Text(f"{self._unit} {self._step}/{self._num_steps}", style="bold"),
            ProgressBar(total=self._num_steps, completed=self._step, width=32, complete_style="cyan"),
            self._spinner,
        )
        return Group(line, Text(self._summary(), style="dim"))


def _standard_error() -> Console:
    """Never takes a file for a terminal: ``FORCE_COLOR`` would, and fill the logs of a CI with control characters."""
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


def format_duration(seconds: float) -> str:
    """``42 s``, ``3:07`` (minutes) or ``2:03:07`` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds_left = divmod(whole, 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}:{minutes_left:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
